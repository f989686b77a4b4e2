r"""The prior whose first layer has the covariance of the data: the remedy for covariate shift."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mlcollage._checks import positive
from mlcollage.errors import InvalidInput

from .first_layer import layer_batches, network_of
from .layout import Layout
from .priors import GaussianPrior, PlacedPrior, Prior, standard_normal


@dataclass(frozen=True, eq=False)
class EmpCovPrior(Prior):
    r"""The first layer's weights have the covariance of its inputs: the remedy for covariate shift.

    For each output unit, the weights :math:`w \in R^D` that meet an input are

    .. math:: w \sim N(0, \Sigma), \qquad \Sigma = \frac{\alpha}{n - 1} \sum_{i=1}^n x_i x_i^\top + \epsilon I,

    so that directions in which the training inputs never vary have almost no weight, instead of the prior's, which no
    datum ever corrected. P. Izmailov, P. Nicholson, S. Lotfi and A. G. Wilson, "Dangers of Bayesian Model Averaging
    under Covariate Shift", NeurIPS 2021, section 6. For a convolution, :math:`x_i` are the patches it sees.
    :meth:`from_module` finds layer and inputs, :meth:`from_inputs` is for a layer of your own choice.

    Parameters
    ----------
    parameter
        Name of the layer's weight, (units, ...) with D numbers per unit.
    gram
        :math:`\sum_i x_i x_i^\top`, (D, D), float64.
    count
        n, at least 2.
    alpha
        :math:`\alpha > 0`.
    eps
        :math:`\epsilon > 0`, variance of weights in directions without variance.
    rest
        Prior of all other parameters, that layer's bias among them; by default ``GaussianPrior()``.

    Raises
    ------
    InvalidInput
        For settings out of range, inputs that are not finite or do not fit the parameter.

    Examples
    --------
    The second input is always zero, and so, almost, are its weights:

    >>> from torch import nn
    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])
    >>> net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> prior = EmpCovPrior.from_module(net, x, alpha=1.0, eps=1e-4)
    >>> weights = Layout.of(net).unflatten(prior.sample(Layout.of(net), 100))["0.weight"]
    >>> [round(sd, 1) for sd in weights.std(dim=(0, 1)).tolist()]
    [1.7, 0.0]
    """

    parameter: str
    gram: Tensor = field(repr=False)
    count: int
    alpha: float = 1.0
    eps: float = 1e-4
    rest: Prior = field(default_factory=GaussianPrior)

    def __post_init__(self) -> None:
        positive("alpha", self.alpha), positive("eps", self.eps)
        if not isinstance(self.rest, Prior):
            raise InvalidInput(f"rest is {type(self.rest).__name__}; a Prior for the other parameters is needed.")
        if self.count < 2:
            raise InvalidInput(f"the layer saw {self.count} inputs or patches; at least two are needed.")

    @property
    def covariance(self) -> Tensor:
        r""":math:`\Sigma`, (D, D), float64."""
        identity = torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        return self.alpha / (self.count - 1) * self.gram + self.eps * identity

    @classmethod
    def from_inputs(
        cls, inputs: Tensor, parameter: str, *, alpha: float = 1.0, eps: float = 1e-4, rest: Prior | None = None
    ) -> EmpCovPrior:
        """The prior of any layer, from its inputs (n, D), which for a convolution are patches."""
        x = torch.as_tensor(inputs).detach().double()
        if x.ndim != 2 or len(x) < 2 or not bool(x.isfinite().all()):
            raise InvalidInput(f"inputs of shape {tuple(x.shape)} must be finite (n, D) with at least two rows.")
        return cls(parameter, x.T @ x, len(x), alpha, eps, GaussianPrior() if rest is None else rest)

    @classmethod
    def from_module(
        cls,
        module: Any,
        X: Any,
        *,
        alpha: float | None = None,
        eps: float = 1e-4,
        rest: Prior | None = None,
        batch_size: int = 1024,
    ) -> EmpCovPrior:
        r"""The prior of a network's first linear map or convolution, from what that layer is given.

        By default it is of the same strength as the Gaussian prior that it replaces: the :math:`\alpha` that leaves
        the units' prior variance, averaged over the training inputs, as it is under :math:`N(0, s^2 I)`, is, with
        :math:`C = \frac{1}{n - 1} \sum_i x_i x_i^\top`,

        .. math:: s^2 \, \mathrm{tr}(C) = \alpha \, \mathrm{tr}(C^2) \quad\Longrightarrow\quad
            \alpha = s^2 \, \frac{\mathrm{tr}(C)}{\mathrm{tr}(C^2)}.

        Parameters
        ----------
        module
            A network, or a ``BayesianNetwork``, whose prior is then the default of ``rest``. Run once over the inputs
            in the mode it has, and left as it was.
        X
            Training inputs (n, ...), as the network takes them. Center them first: directions along which they are
            constant but not zero are not dead to this prior, since C is about zero.
        alpha
            :math:`\alpha > 0`; None for the rule above, which needs a Gaussian ``rest``.
        eps, rest
            As above.
        batch_size
            Inputs per pass; patches of a convolution are summed up over batches.

        Examples
        --------
        >>> from torch import nn
        >>> x = torch.randn(900, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0, 0.0])
        >>> prior = EmpCovPrior.from_module(nn.Linear(3, 2), x, rest=GaussianPrior(0.2))
        >>> prior.covariance.diagonal().round(decimals=1).tolist()
        [0.2, 0.2, 0.0]
        """
        network = network_of(module)
        rest = rest or getattr(module, "prior", None) or GaussianPrior()
        rest = rest.rest if isinstance(rest, EmpCovPrior) else rest  # sampling again with a remedy tried before
        count, gram, parameter = 0, torch.zeros(()), ""
        for weight, seen, _ in layer_batches(network, X, batch_size):
            parameter = weight
            gram = gram.to(seen) + seen.T @ seen  # (D, D)
            count += len(seen)
        given = 1.0 if alpha is None else alpha
        made = cls(parameter, gram, count, given, eps, rest)
        if alpha is not None:
            return made
        if not isinstance(rest, GaussianPrior):
            raise InvalidInput(f"rest is {type(rest).__name__}; give alpha, or a GaussianPrior as rest.")
        variance = Layout.of(network).assign(rest.variance, "variance")[made.parameter]
        # the trace of C^2 is the sum of the squares of C
        second = gram / (count - 1)  # C
        return replace(made, alpha=float(variance * second.trace() / second.square().sum()))

    def place(self, layout: Layout, like: Tensor) -> PlacedPrior:
        """See :meth:`Prior.place`."""
        if self.parameter not in layout.names:
            raise InvalidInput(f"parameter {self.parameter!r} is not sampled; the prior is for one that is.")
        shape = layout.shapes[layout.names.index(self.parameter)]
        if len(shape) < 2 or math.prod(shape[1:]) != len(self.gram):
            raise InvalidInput(f"{self.parameter} has shape {shape}, but inputs have {len(self.gram)} numbers.")
        return _PlacedEmpCov(self, layout, like)


class _PlacedEmpCov(PlacedPrior):
    """The layer's weights are a slice of the position; the others lie before and behind it."""

    def __init__(self, prior: EmpCovPrior, layout: Layout, like: Tensor):
        kept = [i for i, name in enumerate(layout.names) if name != prior.parameter]
        others = Layout(tuple(layout.names[i] for i in kept), tuple(layout.shapes[i] for i in kept))
        # of a layer without bias there are no others, and names of theirs need not be found
        self._rest, self._like = (prior.rest if kept else GaussianPrior()).place(others, like), like
        self._slice = layout.slices[prior.parameter]
        places = torch.arange(layout.size, device=like.device)
        # places of the other parameters, (P - units * D,)
        self._others = torch.cat([places[: self._slice.start], places[self._slice.stop :]])
        covariance = prior.covariance.to(like.device)
        self._shape = (-1, len(covariance))
        self._root = torch.linalg.cholesky(covariance)  # (D, D), lower
        self._exact = torch.cholesky_inverse(self._root)  # the precision, float64
        self._precision = self._exact.to(like.dtype)
        self._log_norm = self._root.diagonal().log().sum() + 0.5 * len(covariance) * math.log(2 * math.pi)

    def _own(self, w: Tensor) -> Tensor:
        """The layer's weights, (chains, units, D)."""
        return w[:, self._slice].unflatten(1, self._shape)

    def log_prob(self, w: Tensor) -> Tensor:
        own = self._own(w.double())  # each unit's w' S^-1 w, summed over units
        value = -0.5 * ((own @ self._exact) * own).sum(dim=(1, 2)) - own.shape[1] * self._log_norm
        return value + self._rest.log_prob(w[:, self._others])

    def add_gradient_(self, out: Tensor, w: Tensor) -> Tensor:
        # -S^-1 w of each unit; the rest by its own prior
        out[:, self._slice].sub_((self._own(w) @ self._precision).flatten(1))
        return out.index_add_(1, self._others, self._rest.gradient(w[:, self._others]))

    def _together(self, own: Tensor, others: Tensor) -> Tensor:
        """The layer's numbers and the others as positions (..., P)."""
        at = self._slice.start
        return torch.cat([others[..., :at], own, others[..., at:]], dim=-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        numbers = self._slice.stop - self._slice.start
        # one row per draw and unit
        noise = standard_normal((n * numbers // self._shape[1], self._shape[1]), generator)
        own = (noise @ self._root.T).reshape(n, numbers).to(self._like.dtype)
        return self._together(own, self._rest.sample(n, generator))

    def sd(self) -> Tensor:
        each = self._root.square().sum(dim=1).sqrt()  # (D,), the root of the covariance's diagonal
        units = (self._slice.stop - self._slice.start) // len(each)
        return self._together(each.repeat(units), self._rest.sd())
