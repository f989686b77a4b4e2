r"""SWAG: a Gaussian around the average of the weights that training passes through.

From weights :math:`w_1, \dots, w_n` met late in training, say once an epoch at a constant learning rate,

.. math::
    \bar w = \frac{1}{n} \sum_i w_i, \qquad
    \Sigma_{diag} = \mathrm{diag}\Big(\frac{1}{n} \sum_i w_i^2 - \bar w^2\Big), \qquad
    D = [\, w_i - \bar w_i \,]_{\text{last } K}

with :math:`\bar w_i` the running mean including :math:`w_i`, and a draw is

.. math:: w = \bar w + \frac{1}{\sqrt 2} \Sigma_{diag}^{1/2} z_1 + \frac{1}{\sqrt{2 (K - 1)}} D z_2, \qquad
    z_1 \sim N(0, I_P), \; z_2 \sim N(0, I_K).

W. J. Maddox, T. Garipov, P. Izmailov, D. Vetrov and A. G. Wilson, "A Simple Baseline for Bayesian Uncertainty in Deep
Learning", NeurIPS 2019, section 3, algorithm 1.
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path

import torch
from torch import Tensor, nn

from mlcollage._checks import integer, real
from mlcollage.errors import InvalidInput
from mlcollage.infer import tensor_file
from mlcollage.infer.density import Generator, normal, torch_generator
from mlcollage.nn.signature import other_layer, signature

_KIND = "SWAG (mlcollage, 2)"


class SWAG:
    r"""Running moments of a module's parameters, and draws from the Gaussian they make.

    Moments are kept by Welford's recursion, which does not subtract large squares from each other; memory is
    (2 + K) times the parameters.

    **Batch normalization**: running statistics are no parameters. A draw carries those of the model seen last, which
    fit another network; load the draw and pass training data through it,
    ``torch.optim.swa_utils.update_bn(loader, model)``, before predicting. Networks without batch statistics need no
    such pass.

    Parameters
    ----------
    model
        Whose parameters will be followed; it is only read for their names and shapes, not counted.
    rank
        K, deviations kept for the low-rank part: at least 2; or 0 for SWAG-Diagonal, which draws
        from :math:`N(\bar w, \Sigma_{diag})`, not halved.

    Attributes
    ----------
    count : int
        n, models seen.
    mean, variance : Tensor
        (P,), over all parameters in the order of ``model.parameters()``.
    deviations : Tensor
        (at most K, P), rows of :math:`D^\top`, the oldest first.

    Raises
    ------
    InvalidInput
        For models without parameters or with half-precision ones, and a rank of 1 or below 0.

    Examples
    --------
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer, swag = torch.optim.SGD(model.parameters(), lr=0.1), SWAG(model, rank=5)
    >>> generator = torch.Generator().manual_seed(0)
    >>> for epoch in range(10):
    ...     x = torch.randn(16, 3, generator=generator)
    ...     optimizer.zero_grad()
    ...     (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
    ...     optimizer.step()
    ...     swag.update(model)
    >>> model.load_state_dict(swag.sample(generator))
    <All keys matched successfully>
    >>> swag.count, swag.mean.shape, swag.deviations.shape
    (10, torch.Size([4]), torch.Size([5, 4]))
    """

    def __init__(self, model: nn.Module, rank: int = 20):
        if integer("rank", rank, least=0) == 1:
            raise InvalidInput("rank=1 has no low-rank part, since K - 1 divides; give 0 (the diagonal alone) or 2.")
        parameters = dict(model.named_parameters())
        if not parameters:
            raise InvalidInput("the model has no parameters; create lazy ones by one forward pass first.")
        for name, p in parameters.items():
            if p.dtype not in (torch.float32, torch.float64):
                raise InvalidInput(f"parameter {name} is {p.dtype}; float32 or float64 is needed for its moments.")
        self.rank = rank
        self.count = 0
        self._shapes = {name: p.shape for name, p in parameters.items()}
        first = next(iter(parameters.values()))
        size = sum(p.numel() for p in parameters.values())
        self.mean = torch.zeros(size, dtype=first.dtype, device=first.device)
        self._squares = torch.zeros_like(self.mean)  # sum of squared deviations from the mean
        self._last: deque[Tensor] = deque(maxlen=rank)  # deviations (P,), the oldest falls out
        self._state: dict[str, Tensor] = {}  # parameters and buffers of the model seen last
        self._layers = signature(model)
        self._tied: dict[str, str] = {}  # name in the state dict to the parameter behind it; tied names share one

    @property
    def variance(self) -> Tensor:
        """Variance of each parameter over the models seen, (P,), divided by n; zero before any."""
        return self._squares / max(self.count, 1)

    @property
    def deviations(self) -> Tensor:
        """The deviations kept, (at most K, P)."""
        return torch.stack(list(self._last)) if self._last else self.mean.new_empty((0, len(self.mean)))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Count the model's parameters in, as they are now.

        Raises
        ------
        InvalidInput
            If names, shapes or layers are not those of the first model, or a parameter is not finite.
        """
        parameters = dict(model.named_parameters())
        if {name: p.shape for name, p in parameters.items()} != self._shapes:
            raise InvalidInput("the model's parameters have other names or shapes than those SWAG was made for.")
        if (difference := other_layer(self._layers, signature(model))) is not None:
            raise InvalidInput(
                f"the model is another one than SWAG was made for: {difference}; give the one that is trained."
            )
        w = torch.cat([p.detach().reshape(-1).to(self.mean) for p in parameters.values()])
        if not bool(w.isfinite().all()):
            bad = next(name for name, p in parameters.items() if not bool(p.isfinite().all()))
            raise InvalidInput(f"parameter {bad} is not finite; training has diverged, and no average mends that.")
        self.count += 1
        before = w - self.mean
        self.mean += before / self.count
        after = w - self.mean
        self._squares.addcmul_(before, after)
        self._last.append(after)
        names = {id(p): name for name, p in parameters.items()}
        shared = model.named_parameters(remove_duplicate=False)
        self._tied = {name: names[id(p)] for name, p in shared}  # a state dict lists tied parameters under each name
        self._state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def average(self) -> dict[str, Tensor]:
        """State dict of the mean: stochastic weight averaging (P. Izmailov et al., UAI 2018)."""
        self._needs(1)
        return self._as_state(self.mean)

    @torch.no_grad()
    def sample(self, generator: Generator = 0, *, scale: float = 1.0) -> dict[str, Tensor]:
        r"""A draw, as a state dict for ``model.load_state_dict``.

        Parameters
        ----------
        generator
            A torch.Generator on the parameters' device, or a seed. Pass the same generator on for further draws.
        scale
            Factor of the covariance; 0 gives the mean. The low-rank part has as many columns as models were
            seen, up to K.

        Returns
        -------
        dict
            Parameters, and buffers as in the model seen last (see the note on batch normalization).

        Raises
        ------
        InvalidInput
            Before two models were seen, or for a negative scale.
        """
        self._needs(2)
        real("scale", scale, least=0)
        generator = torch_generator(generator, self.mean.device)
        offset = self.variance.sqrt() * normal(self.mean.shape, self.mean, generator)
        if self.rank:  # half the variance from the diagonal, half from the deviations d, (K, P)
            d = self.deviations
            offset += d.T @ normal((len(d),), d, generator) / math.sqrt(len(d) - 1)
            offset *= math.sqrt(0.5)
        return self._as_state(self.mean + math.sqrt(scale) * offset)

    def save(self, path: str | Path) -> Path:
        """Write all that was learned to one ``.safetensors`` file: moments, deviations, buffers; settings as JSON.

        Written under another name and moved into place when complete.

        Parameters
        ----------
        path
            Where to.

        Returns
        -------
        Path
        """
        return tensor_file.save(
            path,
            _KIND,
            {
                "rank": self.rank, "count": self.count, "mean": self.mean, "squares": self._squares,
                "deviations": self.deviations, "shapes": {n: list(shape) for n, shape in self._shapes.items()},
                "tied": self._tied, "state": self._state, "layers": self._layers,
            },
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> SWAG:
        """Read what :meth:`save` wrote, for draws or for going on with ``update``.

        Parameters
        ----------
        path
            The file.
        model
            Of the architecture it was saved from; moments go to its device.

        Raises
        ------
        MissingFile
            If there is no such file.
        InvalidInput
            If it is damaged, of something else, or of another architecture, also of another activation.

        Examples
        --------
        >>> import tempfile
        >>> model = torch.nn.Linear(2, 1)
        >>> swag = SWAG(model)
        >>> swag.update(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = SWAG.load(swag.save(f"{folder}/swag.safetensors"), model)
        >>> again.count, bool((again.mean == swag.mean).all())
        (1, True)
        """
        content = tensor_file.load(path, _KIND)
        swag = cls(model, content["rank"])
        own, saved = {name: list(shape) for name, shape in swag._shapes.items()}, content["shapes"]
        if own != saved:
            odd = sorted(set(own) ^ set(saved)) or [name for name in own if own[name] != saved[name]]
            raise InvalidInput(f"{path} is of another architecture: it differs in {odd[0]} ({len(odd)} in all).")
        # files of earlier versions do not say
        if (difference := other_layer(content.get("layers", swag._layers), swag._layers)) is not None:
            raise InvalidInput(
                f"{path} is of another network than this: {difference}; give one like that it was saved from."
            )
        where = swag.mean.device
        swag.mean, swag._squares = content["mean"].to(where), content["squares"].to(where)
        swag._last.extend(content["deviations"].to(where))
        swag.count, swag._tied = content["count"], content["tied"]
        swag._state = {name: value.to(where) for name, value in content["state"].items()}
        return swag

    def _needs(self, models: int) -> None:
        if self.count < models:
            raise InvalidInput(f"SWAG has seen {self.count} of at least {models} models; call update during training.")

    def _as_state(self, w: Tensor) -> dict[str, Tensor]:
        # the vector (P,) cut into the parameters' shapes, over the buffers of the model seen last
        pieces = w.split([shape.numel() for shape in self._shapes.values()])
        parts = {name: p.reshape(s) for (name, s), p in zip(self._shapes.items(), pieces, strict=True)}
        state = {name: value.clone() for name, value in self._state.items()}
        for name, owner in self._tied.items():
            state[name] = parts[owner].to(state[name], copy=True)
        return state
