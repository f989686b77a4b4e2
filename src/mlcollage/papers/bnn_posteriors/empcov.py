r"""The prior whose first layer has the covariance of the data: the remedy for covariate shift."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mlcollage.errors import InvalidInput

from ._families import GaussianPrior, PlacedPrior, Prior, normal, positive
from .first_layer import layer_inputs
from .layout import Layout

__all__ = ["EmpCovPrior"]


class EmpCovPrior(Prior):
    r"""The first layer's weights have the covariance of its inputs: the remedy for covariate shift.

    For each output unit, the weights :math:`w \in R^D` that meet an input are

    .. math:: w \sim N(0, \Sigma), \qquad \Sigma = \frac{\alpha}{n - 1} \sum_{i=1}^n x_i x_i^\top + \epsilon I,

    so that directions in which the training inputs never vary have almost no weight, instead of the prior's, which no
    datum ever corrected. P. Izmailov, P. Nicholson, S. Lotfi and A. G. Wilson, "Dangers of Bayesian Model Averaging
    under Covariate Shift", NeurIPS 2021, section 6. For a convolution, :math:`x_i` are the patches it sees.

    Parameters
    ----------
    inputs
        Inputs of the layer, (n, D): for a convolution patches; :meth:`from_module` finds layer and inputs.
    parameter
        Name of the layer's weight, (units, ...) with D numbers a unit.
    alpha
        :math:`\alpha > 0`.
    eps
        :math:`\epsilon > 0`.
    rest
        Prior of all other parameters, that layer's bias among them.

    Raises
    ------
    InvalidInput
        For settings out of range, inputs that are not finite or do not fit the parameter.

    Examples
    --------
    The second input is always zero, and so, almost, are its weights:

    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])
    >>> net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> prior = EmpCovPrior.from_module(net, x, alpha=1.0, eps=1e-4)
    >>> weights = Layout.of(net).unflatten(prior.sample(Layout.of(net), 100))["0.weight"]
    >>> [round(sd, 1) for sd in weights.std(dim=(0, 1)).tolist()]
    [1.7, 0.0]
    """

    def __init__(
        self,
        inputs: Tensor,
        parameter: str,
        *,
        alpha: float = 1.0,
        eps: float = 1e-4,
        rest: Prior | None = None,
    ):
        self.alpha, self.eps, self.parameter = positive(alpha, "alpha"), positive(eps, "eps"), parameter
        self.rest = GaussianPrior() if rest is None else rest
        if not isinstance(self.rest, Prior):
            raise InvalidInput(f"rest is {type(rest).__name__}; a Prior for the other parameters is needed.")
        x = torch.as_tensor(inputs).detach()
        if x.ndim != 2 or len(x) < 2 or not bool(x.isfinite().all()):
            raise InvalidInput(f"inputs of shape {tuple(x.shape)} must be finite (n, D) with at least two rows.")
        x = x.double()
        identity = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
        self.covariance = self.alpha / (len(x) - 1) * x.T @ x + self.eps * identity

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        inputs: Tensor,
        *,
        alpha: float = 1.0,
        eps: float = 1e-4,
        rest: Prior | None = None,
        batch_size: int = 1024,
    ) -> EmpCovPrior:
        """The prior of a network's first linear map or convolution, from what that layer is given.

        Parameters
        ----------
        module
            Run once over ``inputs``, in evaluation mode, and left as it was.
        inputs
            Training inputs (n, ...), as the network takes them.
        alpha, eps, rest
            As above.
        batch_size
            Inputs a pass; patches of a convolution are summed up a batch at a time.
        """
        n, second, name = 0, None, ""
        for part in inputs.split(batch_size):
            name, seen = layer_inputs(module, part)
            outer = seen.T @ seen
            n, second = n + len(seen), outer if second is None else second + outer
        if second is None or n < 2:
            raise InvalidInput(f"the first layer saw {n} inputs or patches; at least two are needed for a covariance.")
        made = cls(second[:1].expand(2, -1), f"{name}.weight" if name else "weight", alpha=alpha, eps=eps, rest=rest)
        identity = torch.eye(len(second), dtype=torch.float64, device=second.device)
        made.covariance = made.alpha / (n - 1) * second + made.eps * identity
        return made

    def place(self, layout: Layout, like: Tensor) -> PlacedPrior:
        """See :meth:`Prior.place`."""
        if self.parameter not in layout.names:
            raise InvalidInput(f"parameter {self.parameter!r} is not sampled; the prior is for one that is.")
        shape = layout.shapes[layout.names.index(self.parameter)]
        if len(shape) < 2 or math.prod(shape[1:]) != len(self.covariance):
            raise InvalidInput(
                f"parameter {self.parameter} has shape {shape}, but inputs have {len(self.covariance)} numbers."
            )
        return _PlacedEmpCov(self, layout, like)


class _PlacedEmpCov(PlacedPrior):
    def __init__(self, prior: EmpCovPrior, layout: Layout, like: Tensor):
        kept = [i for i, name in enumerate(layout.names) if name != prior.parameter]
        others = Layout(tuple(layout.names[i] for i in kept), tuple(layout.shapes[i] for i in kept))
        self._rest = prior.rest.place(others, like) if kept else None
        self._slice, self._size = layout.slices[prior.parameter], layout.size
        covariance = prior.covariance.to(like.device)
        self._shape = (-1, len(covariance))
        self._root = torch.linalg.cholesky(covariance)
        self._exact = torch.cholesky_inverse(self._root)
        self._precision = self._exact.to(like.dtype)
        self._log_norm = self._root.diagonal().log().sum() + 0.5 * len(covariance) * math.log(2 * math.pi)
        self._like = like

    def _own(self, w: Tensor) -> Tensor:
        """The layer's weights, (chains, units, D)."""
        return w[:, self._slice].unflatten(1, self._shape)

    def _others(self, w: Tensor) -> Tensor:
        if self._slice.start == 0:
            return w[:, self._slice.stop :]
        return torch.cat([w[:, : self._slice.start], w[:, self._slice.stop :]], dim=1)

    def log_prob(self, w: Tensor) -> Tensor:
        own = self._own(w.double())
        value = -0.5 * ((own @ self._exact) * own).sum(dim=(1, 2)) - own.shape[1] * self._log_norm
        return value if self._rest is None else value + self._rest.log_prob(self._others(w))

    def add_gradient_(self, out: Tensor, w: Tensor) -> Tensor:
        out[:, self._slice].sub_((self._own(w) @ self._precision).flatten(1))
        if self._rest is not None:
            others = self._rest.gradient(self._others(w))
            out[:, : self._slice.start].add_(others[:, : self._slice.start])
            out[:, self._slice.stop :].add_(others[:, self._slice.start :])
        return out

    def _together(self, own: Tensor, others: Tensor | None) -> Tensor:
        if others is None:
            return own
        at = self._slice.start
        return torch.cat([others[..., :at], own, others[..., at:]], dim=-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        numbers = self._slice.stop - self._slice.start
        noise = normal((n * numbers // self._shape[1], self._shape[1]), generator)
        own = (noise @ self._root.T).reshape(n, numbers).to(self._like.dtype)
        return self._together(own, None if self._rest is None else self._rest.sample(n, generator))

    def sd(self) -> Tensor:
        each = self._root.square().sum(dim=1).sqrt()
        units = (self._slice.stop - self._slice.start) // len(each)
        return self._together(each.repeat(units), None if self._rest is None else self._rest.sd())
