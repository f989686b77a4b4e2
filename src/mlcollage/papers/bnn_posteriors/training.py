"""Minibatches for many chains at once, and the way to an optimum of the log-posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput

from .density import PosteriorDensity
from .method import Progress

Transform = Callable[[Tensor], Tensor]
_OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": partial(torch.optim.SGD, momentum=0.9)}


class Gradients:
    """Gradients of the log-posterior from all data or from minibatches, one batch after the other.

    Parameters
    ----------
    density
        What is differentiated.
    batch_size
        B; None for all data. Every epoch is shuffled anew, for each chain by itself.
    generator
        Of the order.
    transform
        Applied to the inputs of each batch: an augmentation.
    """

    def __init__(
        self,
        density: PosteriorDensity,
        batch_size: int | None,
        generator: torch.Generator,
        transform: Transform | None = None,
    ):
        self.density, self.generator, self.transform = density, generator, transform
        self.size = None if batch_size is None or batch_size >= density.num_data else batch_size
        self.waiting: Tensor | None = None  # places of the data that this epoch has yet to take, (chains, ...)

    def _next(self, chains: int, size: int) -> Tensor:
        """Places of the next batch of every chain, (chains, B)."""
        # what is left over at the end of an epoch waits for another one
        if self.waiting is None or self.waiting.shape[1] < size:
            shape, device = (chains, self.density.num_data), self.generator.device
            self.waiting = torch.rand(shape, generator=self.generator, device=device).argsort(dim=1)
        batch, self.waiting = self.waiting[:, :size], self.waiting[:, size:]
        return batch

    def __call__(self, q: Tensor) -> Tensor:
        """An unbiased estimate of the gradient at positions (chains, P), of the same shape."""
        if self.size is not None:
            index = self._next(len(q), self.size)
        elif self.transform is None:
            return self.density.gradient(q)
        else:
            # all data, but through the transform: (chains, N)
            index = torch.arange(self.density.num_data, device=q.device).expand(len(q), -1)
        return self.density.estimate(q, index, transform=self.transform)[1]


@dataclass(frozen=True)
class GradientAscent:
    """Gradient ascent from positions (chains, P) to optima of the log-posterior, all at once.

    Parameters
    ----------
    steps, lr
        Steps, and the rate at the first one; it falls to zero along a cosine.
    optimizer
        ``"adam"``, whose rate is of the order of a weight's change in a step, or ``"sgd"`` with momentum .9, whose
        rate multiplies the summed gradient.
    constant_from
        Share of the steps after which the rate stays as it is.
    """

    steps: int
    lr: float
    optimizer: Literal["adam", "sgd"] = "adam"
    constant_from: float = 1.0

    def __call__(
        self,
        gradients: Gradients,
        q: Tensor,
        progress: Progress | None = None,
        each: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Where training ends, (chains, P); ``each(step, positions)`` is called after each step."""
        q = q.clone()  # moved in place by the optimizer
        rule: torch.optim.Optimizer = _OPTIMIZERS[self.optimizer]([q], lr=self.lr)
        for step in range(self.steps):
            # half a cosine, cut off where the rate stays constant
            share = min(step / self.steps, self.constant_from)
            rule.param_groups[0]["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * share))
            q.grad = gradients(q).neg()  # optimizers go down
            rule.step()
            if each:
                each(step, q)
            if progress:
                progress(step + 1, self.steps)
        if not bool(q.isfinite().all()):
            raise InvalidInput(f"training diverged at lr={self.lr:.3g}; give a smaller lr.")
        return q.detach()
