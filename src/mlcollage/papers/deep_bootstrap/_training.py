"""The training runs behind the framework: which samples each world sees at each step, and how it is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage._random import generator, permutation
from mlcollage.data.world import DataWorld
from mlcollage.errors import InvalidInput
from mlcollage.papers.deep_bootstrap.metrics import error, soft_error

__all__ = [
    "Augment",
    "Coupling",
    "Lane",
    "Loss",
    "SeedData",
    "Stream",
    "check_labels",
    "log_steps",
    "loss_function",
    "measure",
]

Loss = Callable[[Tensor, Tensor], Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]
Coupling = Literal["stream", "independent"]
_ORDER, _AUGMENT = 11, 12  # keys of the random draws
_CHUNK = 1024  # samples generated at once: what worlds cut their streams by
_SECTION = 2**30  # samples that each seed has of an endless stream


@dataclass(frozen=True)
class Lane:
    """One training run: a Real World of ``n`` samples, or the Ideal World (``n`` is None)."""

    n: int | None
    seed: int

    @property
    def world(self) -> str:
        """``"real"`` or ``"ideal"``."""
        return "ideal" if self.n is None else "real"

    def __str__(self) -> str:
        return (
            f"the Ideal World, seed {self.seed}"
            if self.n is None
            else f"the Real World with n={self.n}, seed {self.seed}"
        )


def log_steps(steps: int, count: int = 24) -> tuple[int, ...]:
    """About ``count`` logarithmically spaced steps from 1 to ``steps``, and 0.

    Examples
    --------
    >>> log_steps(100, 5)
    (0, 1, 3, 10, 32, 100)
    """
    return (0, *sorted({round(float(s)) for s in np.geomspace(1, steps, max(count, 2))}))


def check_labels(y: Tensor, num_classes: int) -> None:
    """Labels must be integers from 0 to ``num_classes - 1``; a world with ``num_classes == 0`` is a regression."""
    if num_classes == 0:
        if not y.is_floating_point():
            raise InvalidInput(
                f"a world with num_classes=0 is a regression and needs floating-point targets, got {y.dtype}."
            )
    elif y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= num_classes:
        raise InvalidInput(
            f"the world has num_classes={num_classes}, so labels must be integers from 0 to {num_classes - 1}; "
            f"got {y.dtype} from {y.min().item():g} to {y.max().item():g}."
        )


class Stream:
    """Batches of a world's endless stream, generated in chunks, the section of one seed."""

    def __init__(self, world: DataWorld, seed: int, batch_size: int, steps: int, device: torch.device) -> None:
        own = getattr(world, "for_seed", None)
        self.world: DataWorld = world if own is None else own(seed)
        self.batch_size, self.steps, self.device = batch_size, steps, device
        self.per_chunk = max(1, _CHUNK // batch_size)
        chunks = -(-_SECTION // (self.per_chunk * batch_size))
        self.first_chunk = 0 if own is not None else seed * chunks
        self._at, self._chunk = -1, (torch.empty(0), torch.empty(0))

    def batch(self, t: int) -> tuple[Tensor, Tensor]:
        """The fresh batch of 0-based step ``t``."""
        c, i = divmod(t, self.per_chunk)
        if (c + 1) * self.per_chunk > self.steps:  # never draw what is not needed: finite worlds count
            return self._draw(self.first_chunk * self.per_chunk + t, self.batch_size)
        if c != self._at:
            self._at, self._chunk = c, self._draw(self.first_chunk + c, self.per_chunk * self.batch_size)
        here = slice(i * self.batch_size, (i + 1) * self.batch_size)
        return self._chunk[0][here], self._chunk[1][here]

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """The stream's first ``n`` samples."""
        parts = [self.batch(t) for t in range(-(-n // self.batch_size))]
        x, y = (torch.cat(p)[:n] for p in zip(*parts, strict=True))
        return x, y

    def _draw(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        x, y = self.world.batch(step, size, split="stream")
        if len(x) != size or len(y) != size or tuple(x.shape[1:]) != tuple(self.world.shape):
            raise InvalidInput(
                f"the world gave inputs {tuple(x.shape)} and {len(y)} labels for a batch of {size} samples of shape "
                f"{tuple(self.world.shape)}; batch(step, batch_size) must return exactly that many."
            )
        check_labels(y, self.world.num_classes)
        return x.to(self.device), y.to(self.device)


class SeedData:
    """Everything one repetition trains on, shared by its worlds.

    With the coupling ``"stream"`` the set of n samples *is* the beginning of the stream, taken in the stream's order
    in the first epoch and reshuffled afterwards. A random order of an i.i.d. set is an i.i.d. sequence, so each world
    alone has the law it should have; together they share all random numbers they can, and are one run until the
    first sample is used again.
    """

    def __init__(
        self,
        world: DataWorld,
        seed: int,
        *,
        n_max: int,
        batch_size: int,
        steps: int,
        coupling: Coupling,
        augment: Augment | None,
        transform: Callable[[Tensor], Tensor] | None,
        device: torch.device,
    ) -> None:
        self.seed, self.batch_size, self.coupling = seed, batch_size, coupling
        self.augment, self.transform = augment, transform
        self.stream = Stream(world, seed, batch_size, steps, device)
        if coupling == "stream":
            self.x, self.y = self.stream.first(n_max)
        else:
            x, y = self.stream.world.fixed(n_max, seed=seed, split="train").tensors
            check_labels(y, world.num_classes)
            self.x, self.y = x.to(device), y.to(device)
        self._orders: dict[int, tuple[int, Tensor]] = {}

    def batch(self, lane: Lane, t: int) -> tuple[Tensor, Tensor]:
        """What the lane trains on at 0-based step ``t``, augmented with draws that all worlds share."""
        x, y = self.stream.batch(t) if lane.n is None else self._reused(lane.n, t)
        if self.augment is not None:
            out = self.augment(x, generator(self.seed, _AUGMENT, t, device=x.device))
            if not isinstance(out, Tensor) or out.shape != x.shape:
                shown = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise InvalidInput(f"augment must keep the shape of its batch, {tuple(x.shape)}, but gave {shown}.")
            x = out
        return (x if self.transform is None else self.transform(x)), y

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` samples of the train set as the network sees them, not augmented."""
        x = self.x[:n]
        return (x if self.transform is None else self.transform(x)), self.y[:n]

    def _reused(self, n: int, t: int) -> tuple[Tensor, Tensor]:
        epoch, i = divmod(t, n // self.batch_size)
        here = slice(i * self.batch_size, (i + 1) * self.batch_size)
        if epoch == 0 and self.coupling == "stream":
            return self.x[here], self.y[here]
        if self._orders.get(n, (-1,))[0] != epoch:
            self._orders[n] = (epoch, permutation(n, self.seed, _ORDER, n, epoch).to(self.x.device))
        index = self._orders[n][1][here]
        return self.x[index], self.y[index]


def loss_function(loss: str | Loss, num_classes: int) -> Loss:
    """The training loss as a function of outputs and targets."""
    if callable(loss):
        return loss
    if loss == "cross_entropy":
        if num_classes == 0:
            raise InvalidInput(
                "loss='cross_entropy' needs classes, but the world has num_classes=0; use 'mse' or your own function."
            )
        return F.cross_entropy
    if loss == "mse":
        return _squared_error if num_classes == 0 else _one_hot_squared_error
    raise InvalidInput(f"loss={loss!r} is not known; use 'cross_entropy', 'mse' or a function of (outputs, targets).")


def _one_hot_squared_error(logits: Tensor, y: Tensor) -> Tensor:
    # A comparison instead of F.one_hot, which looks at the values and so cannot be mapped over replicas.
    one_hot = (y.unsqueeze(-1) == torch.arange(logits.shape[-1], device=y.device)).to(logits.dtype)
    return F.mse_loss(logits, one_hot)


def _squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(outputs.reshape(y.shape), y)


def measure(outputs: Tensor, y: Tensor, loss: str | Loss, num_classes: int) -> dict[str, float]:
    """Loss, error and soft-error of a network's outputs on a block of samples; NaN where one has no meaning.

    A network trained by squared error gives no class probabilities, so it has an error but no soft-error.
    """
    values = {"loss": float(loss_function(loss, num_classes)(outputs, y)), "error": math.nan, "soft_error": math.nan}
    if num_classes:
        values["error"] = float(error(outputs, y))
        if loss != "mse":
            values["soft_error"] = float(soft_error(outputs, y))
    return values


def check_outputs(outputs: Any, batch: int, num_classes: int, model: nn.Module) -> None:
    """The network must give ``(batch, num_classes)`` logits (a regression: one number a sample)."""
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if num_classes and shape != (batch, num_classes):
        raise InvalidInput(
            f"{type(model).__name__} gives {shape} for {batch} samples; the world's {num_classes} classes "
            f"need {(batch, num_classes)}."
        )
    if not num_classes and (not isinstance(outputs, Tensor) or outputs.numel() != batch):
        raise InvalidInput(
            f"{type(model).__name__} gives {shape} for {batch} samples; a regression needs one number a sample."
        )


def check_batch_norm(model: nn.Module, batch_size: int) -> None:
    """BatchNorm has no variance to divide by in a batch of one."""
    if batch_size == 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise InvalidInput(
            f"{type(model).__name__} has BatchNorm layers, which cannot train with batch_size=1; use at least 2."
        )


def batches(data: SeedData, lane: Lane, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The lane's batches, in order."""
    return (data.batch(lane, t) for t in range(steps))
