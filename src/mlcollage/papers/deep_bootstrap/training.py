"""The training runs behind the framework: which samples each world sees at each step, and what is measured of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlcollage._random import generator, permutation
from mlcollage.data import DataWorld
from mlcollage.data.problem import refuse_overlap
from mlcollage.data.row_hashes import row_hashes
from mlcollage.errors import InvalidInput
from mlcollage.train.loop import Augment, Loss

from .metrics import error, soft_error
from .settings import check_labels, loss_function

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
        where = "the Ideal World" if self.n is None else f"the Real World with n={self.n}"
        return f"{where}, seed {self.seed}"


class FreshBatches:
    """Batches of a world's endless stream, generated in chunks, the section of one seed.

    What is drawn is remembered by the hashes of its rows, so that :meth:`refuse_tested` finds a test sample wherever in
    the stream it comes.
    """

    def __init__(self, world: DataWorld, seed: int, batch_size: int, steps: int, device: torch.device) -> None:
        own = getattr(world, "for_seed", None)
        self.world: DataWorld = world if own is None else own(seed)
        self.seed = seed
        self.batch_size, self.steps, self.device = batch_size, steps, device
        self.per_chunk = max(1, _CHUNK // batch_size)
        # Of a world with one stream for all, each seed has a section, cut at a whole number of chunks.
        chunks = -(-_SECTION // (self.per_chunk * batch_size))
        self.first_chunk = 0 if own is not None else seed * chunks
        self._at, self._chunk = -1, (torch.empty(0), torch.empty(0))
        self._drawn: dict[int, Tensor] = {}  # hashes of what was drawn, by the place in the stream of the first
        self._once = getattr(world, "stream_size", math.inf)  # samples after which a finite world comes again

    def batch(self, t: int) -> tuple[Tensor, Tensor]:
        """The fresh batch (b, *shape), (b,) of 0-based step ``t``."""
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
        x, y = x.to(self.device), y.to(self.device)
        if step * size < self._once and step * size not in self._drawn:
            self._drawn[step * size] = row_hashes(x)
        return x, y

    def refuse_tested(self, test: Tensor) -> None:
        """Refuse test samples, given by their hashes, that were drawn from the stream until now."""
        if not self._drawn:
            return
        drawn = torch.cat(list(self._drawn.values()))
        refuse_overlap(
            drawn,
            test.to(drawn.device),
            "{shared} of {tests} samples of the test block have come in the stream of seed "
            f"{self.seed} as well; the world's splits 'test', 'train' and 'stream' must not overlap.",
        )


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
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.seed, self.batch_size, self.coupling = seed, batch_size, coupling
        self.augment, self.transform, self.dtype = augment, transform, dtype
        self.fresh = FreshBatches(world, seed, batch_size, steps, device)
        if coupling == "stream":
            self.x, self.y = self.fresh.first(n_max)  # of all n at once: smaller sets are its beginning
        else:
            x, y = self.fresh.world.fixed(n_max, seed=seed, split="train").tensors
            check_labels(y, world.num_classes)
            self.x, self.y = x.to(device), y.to(device)
        self._orders: dict[int, tuple[int, Tensor]] = {}  # by n: the epoch, and the order (n,) of its samples

    def batch(self, lane: Lane, t: int) -> tuple[Tensor, Tensor]:
        """What the lane trains on at 0-based step ``t``, augmented with draws that all worlds share."""
        x, y = self.fresh.batch(t) if lane.n is None else self._reused(lane.n, t)  # (b, *shape), (b,)
        if self.augment is not None:
            # The key has no world in it: all worlds of the seed get the same draws at step t.
            out = self.augment(x, generator(self.seed, _AUGMENT, t, device=x.device))
            if not isinstance(out, Tensor) or out.shape != x.shape:
                shown = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise InvalidInput(f"augment must keep the shape of its batch, {tuple(x.shape)}, but gave {shown}.")
            x = out
        return self._ready(x, y)

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` samples of the train set as the network sees them, not augmented."""
        return self._ready(self.x[:n], self.y[:n])

    def _ready(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return as_type(x if self.transform is None else self.transform(x), self.dtype), as_type(y, self.dtype)

    def _reused(self, n: int, t: int) -> tuple[Tensor, Tensor]:
        epoch, i = divmod(t, n // self.batch_size)  # the last samples that fill no batch are left out of the epoch
        here = slice(i * self.batch_size, (i + 1) * self.batch_size)
        if epoch == 0 and self.coupling == "stream":
            return self.x[here], self.y[here]
        if self._orders.get(n, (-1,))[0] != epoch:
            self._orders[n] = (epoch, permutation(n, self.seed, _ORDER, n, epoch).to(self.x.device))
        index = self._orders[n][1][here]
        return self.x[index], self.y[index]


def as_type(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point inputs and targets in the type of a network's parameters; whole numbers as they are."""
    return values.to(dtype) if values.is_floating_point() else values


def measure(outputs: Tensor, y: Tensor, loss: str | Loss, num_classes: int) -> dict[str, float]:
    """Loss, error and soft-error of a network's outputs (N, K) on N samples; NaN where one has no meaning.

    A network trained by squared error gives no class probabilities, so it has an error but no soft-error.
    """
    values = {"loss": float(loss_function(loss, num_classes)(outputs, y)), "error": math.nan, "soft_error": math.nan}
    if num_classes:
        values["error"] = float(error(outputs, y))
        if loss != "mse":
            values["soft_error"] = float(soft_error(outputs, y))
    return values
