"""A :class:`DataWorld` is a distribution from which one can draw without end, reproducibly."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import TensorDataset


@runtime_checkable
class DataWorld(Protocol):
    """Endless, seeded data: the same arguments give the same samples on every call and machine.

    Sample ``i`` of a split does not depend on how the stream is cut into batches, and splits never overlap.
    """

    num_classes: int
    shape: tuple[int, ...]

    def batch(self, step: int, batch_size: int, *, split: str = "stream") -> tuple[Tensor, Tensor]:
        """Inputs ``(b, *shape)`` and labels ``(b,)``: samples ``step * b ... (step + 1) * b - 1`` of a split."""
        ...

    def fixed(self, n: int, *, seed: int = 0, split: str = "train") -> TensorDataset:
        """The first ``n`` samples of a finite set; sets with the same seed are nested in ``n``."""
        ...
