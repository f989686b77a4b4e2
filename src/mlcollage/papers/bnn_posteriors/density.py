r"""The log-posterior of a network's weights at many positions, and its gradient.

.. math:: \log p_T(w) = \frac{1}{T} \Big[ \sum_{i=1}^N \log p(y_i \mid x_i, w) + \log p(w) \Big] + \mathrm{const}

The likelihood is a **sum** over the data, accumulated over chunks of them, so that neither the size of a chunk nor of a
minibatch, nor the number of devices, enters the temperature. Values are summed in float64: a Metropolis test subtracts
two of them. Gradients have the type of the positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from mlcollage._checks import integer, positive
from mlcollage.errors import InvalidInput
from mlcollage.nn import logits_of

from .backends import Backend, Batch
from .function import TRIED_DATA, BackendName, NetworkFunction
from .priors import PlacedPrior


class PosteriorDensity:
    """Positions (chains, P) to log-densities and gradients, for the samplers of :mod:`mlcollage.infer`.

    Made by ``BayesianNetwork.log_density``.

    Attributes
    ----------
    backend : Backend
        How it is computed; its ``name`` is ``"mlp"``, ``"vmap"``, ``"compile"`` or ``"loop"``, see
        :mod:`mlcollage.papers.bnn_posteriors.backends`.
    num_data : int
        N.
    x, y : Tensor
        The data, (N, ...) each, as they are used.
    temperature : float
        T, which divides values and gradients.
    target_shape : tuple of int
        Shape of one target as it was given, which predictions have too.
    """

    def __init__(
        self,
        function: NetworkFunction,
        prior: PlacedPrior,
        backend: Backend,
        x: Tensor,
        y: Tensor,
        targets: Tensor,
        features: Tensor,
        *,
        target_shape: tuple[int, ...],
        temperature: float = 1.0,
        chunk_size: int | None = None,
    ):
        self.layout, self.prior, self.backend, self._function = function.layout, prior, backend, function
        self.target_shape = target_shape
        self.temperature, self.num_data = positive("temperature", temperature), len(x)
        # what the backend takes: inputs, or what a frozen part makes of them
        self._features = features
        self.x, self.y, self._targets, self._dtype = x, y, targets, function.parameters_flat.dtype
        size = len(x) if chunk_size is None else integer("chunk_size", chunk_size, least=1)
        # split once: a trajectory passes over the same chunks at every step
        parts = zip(features.split(size), y.split(size), targets.split(size, dim=-1), strict=True)
        self._chunks = [Batch(a, b, t.contiguous()) for a, b, t in parts]
        self._scratch: Tensor | None = None  # (chains, P), reused within a trajectory

    def take_path(self, name: BackendName) -> None:
        """Compute gradients by the backend of that name from here on."""
        if name != self.backend.name:
            few, (module, features) = slice(TRIED_DATA), self._function.reduced(self.x)
            outputs = logits_of(module(features[:4]))
            self.backend = self._function.for_gradients(name, module, features[few], self.y[few], outputs)

    @property
    def given_y(self) -> Tensor:
        """Targets in the shape in which they were given."""
        return self.y.reshape(-1, *self.target_shape)

    def _check(self, q: Tensor) -> None:
        if q.ndim != 2 or q.shape[1] != self.layout.size:
            raise InvalidInput(f"positions have shape {tuple(q.shape)}; (chains, {self.layout.size}) is needed.")
        if q.dtype != self._dtype or q.device != self.x.device:
            here = f"{self._dtype} on {self.x.device}"
            raise InvalidInput(f"positions are {q.dtype} on {q.device}; {here} is needed, as network and data are.")

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density (chains,) in float64 and its gradient (chains, P)."""
        self._check(q)
        with torch.no_grad():
            out = torch.empty_like(q)
            value = self.backend.gradient(q, self._chunks, out, True)
            assert value is not None
            value = value + self.prior.log_prob(q)
            self._finish(out, q)
        return value if self.temperature == 1 else value / self.temperature, out

    def gradient(self, q: Tensor) -> Tensor:
        """The gradient alone, (chains, P), in a buffer that the next call overwrites: for the steps of a trajectory."""
        if self._scratch is None or self._scratch.shape != q.shape:
            self._check(q)
            self._scratch = torch.empty_like(q)
        with torch.no_grad():
            self.backend.gradient(q, self._chunks, self._scratch, False)
            return self._finish(self._scratch, q)

    def _finish(self, out: Tensor, q: Tensor) -> Tensor:
        self.prior.add_gradient_(out, q)
        return out if self.temperature == 1 else out.div_(self.temperature)

    def estimate(
        self,
        q: Tensor,
        index: Tensor,
        *,
        transform: Callable[[Tensor], Tensor] | None = None,
        value: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        r"""An unbiased estimate of value and gradient from a minibatch.

        .. math:: \frac{1}{T} \Big[ \frac{N}{B} \sum_{i \in \mathrm{batch}} \nabla \log p(y_i \mid x_i, w)
            + \nabla \log p(w) \Big]

        Parameters
        ----------
        q
            (chains, P).
        index
            Data of the batch: (B,) for all chains the same, or (chains, B).
        transform
            Applied to the inputs of the batch, (B, ...) or (chains * B, ...): an augmentation.
        value
            Whether the value is needed too.

        Returns
        -------
        Tensor or None, Tensor
            (chains,), and (chains, P).
        """
        self._check(q)
        own = index.ndim == 2
        backend, x, y = self.backend, self._features[index], self.y[index]  # (B, ...), or (chains, B, ...)
        targets = self._targets[..., index]  # (..., B), or (..., chains, B)
        if own:
            targets = targets.movedim(-2, 0)  # (chains, ..., B)
        if transform is not None:
            # all chains' batches as one, (chains * B, ...); changed inputs have other features
            backend, x = self._whole_backend, self.x[index]
            x = transform(x.flatten(0, 1) if own else x).reshape(x.shape)
        with torch.no_grad():
            out = torch.empty_like(q)
            total = backend.gradient(q, [Batch(x, y, targets.contiguous(), own)], out, value)
            out.mul_(self.num_data / index.shape[-1])  # N / B, before the prior, which is counted once
            self._finish(out, q)
            if total is not None:
                total = (total * (self.num_data / index.shape[-1]) + self.prior.log_prob(q)) / self.temperature
        return total, out

    @cached_property
    def _whole_backend(self) -> Backend:
        """For inputs, also where a part of the network is frozen."""
        if self._features is self.x:
            return self.backend
        function, few = self._function, slice(TRIED_DATA)
        outputs = function.module(self.x[:4])
        return function.for_gradients("untimed", function.module, self.x[few], self.y[few], logits_of(outputs))

    def outputs(self, q: Tensor, x: Tensor) -> Tensor:
        """Outputs of the network, (chains, n, ...), for inputs (n, ...)."""
        self._check(q)
        return self._function.outputs(q, x)


def largest_curvature(density: Callable[[Tensor], tuple[Tensor, Tensor]], q: Tensor, steps: int = 8) -> Tensor:
    r"""Largest curvature of minus the log-density at positions (chains, P), (chains,), by power iteration.

    Hessian-vector products are differences of two gradients, along a deterministic first direction. The leapfrog is
    unstable beyond a step of :math:`2 / \sqrt{\lambda}`.

    Parameters
    ----------
    density
        Positions to (value, gradient).
    q
        (chains, P).
    steps
        Iterations; two gradients each.

    Examples
    --------
    >>> scale = torch.tensor([1.0, 100.0])
    >>> density = lambda q: (-0.5 * (scale * q.square()).sum(1), -scale * q)
    >>> largest_curvature(density, torch.zeros(1, 2)).round()
    tensor([100.], dtype=torch.float64)
    """
    generator = torch.Generator(q.device).manual_seed(0)
    v = torch.randn(q.shape, dtype=q.dtype, device=q.device, generator=generator)  # (chains, P)
    v = v / v.norm(dim=1, keepdim=True)
    # the step that balances rounding and truncation of a central difference
    h = (torch.finfo(q.dtype).eps ** (1 / 3)) * (1 + q.norm(dim=1, keepdim=True))
    top = q.new_zeros(len(q), dtype=torch.float64)
    for _ in range(steps):
        # H v of minus the log-density, (chains, P)
        hv = -(density(q + h * v)[1] - density(q - h * v)[1]) / (2 * h)
        norm = hv.norm(dim=1, keepdim=True)
        top = norm[:, 0].double()  # |H v| with |v| = 1
        # where the density is flat the direction stays
        v = torch.where(norm > 0, hv / norm.clamp(min=torch.finfo(q.dtype).tiny), v)
    return top
