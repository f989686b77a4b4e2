"""Class sums of earlier batches, for more classes than a batch can hold."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.papers.class_selectivity.sums import class_sums

__all__ = ["EmaMemory", "Memory", "QueueMemory", "make_memory"]


class Memory(Protocol):
    """What adds earlier batches to the class sums of the present one."""

    def add(self, sums: Tensor, counts: Tensor, rows: Tensor, targets: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """Sums (C, U) and counts (C, 1) with memory; the present batch, the only part with gradients, is remembered."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Tensors for ``state_dict``."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Counterpart of ``state``."""
        ...


def make_memory(kind: str | None, num_classes: int | None, decay: float, size: int) -> Memory | None:
    """The memory of this kind, or None."""
    if kind is None:
        return None
    if kind not in ("ema", "queue"):
        raise InvalidInput(f"memory={kind!r} is not known; use 'ema', 'queue' or None.")
    if num_classes is None:
        raise InvalidInput(f"memory={kind!r} needs num_classes: batches hold different classes.")
    if kind == "ema":
        return EmaMemory(decay)
    return QueueMemory(size)


class EmaMemory:
    r"""Exponentially forgotten sums and counts.

    .. math:: S_t = S_t^{\mathrm{batch}} + d\, S_{t-1}, \qquad n_t = n_t^{\mathrm{batch}} + d\, n_{t-1}

    Parameters
    ----------
    decay
        d in [0, 1): about :math:`1 / (1 - d)` batches are remembered.

    Examples
    --------
    >>> memory = EmaMemory(0.5)
    >>> one = torch.ones(2, 1)
    >>> for _ in range(3):
    ...     sums, counts = memory.add(one, one, one, one, keep=True)
    >>> sums[0].item()
    1.75
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise InvalidInput(f"memory_decay={decay!r} must lie in [0, 1); 0.95 remembers about 20 batches.")
        self.decay = decay
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    def add(self, sums: Tensor, counts: Tensor, rows: Tensor, targets: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """As in :class:`Memory`."""
        if self._sums is not None and self._counts is not None:
            _check_units(self._sums.shape[1], sums.shape[1])
            sums = sums + self.decay * self._sums.to(sums)
            counts = counts + self.decay * self._counts.to(counts)
        if keep:
            self._sums, self._counts = sums.detach(), counts.detach()
        return sums, counts

    def state(self) -> dict[str, Tensor]:
        """As in :class:`Memory`."""
        if self._sums is None or self._counts is None:
            return {}
        return {"sums": self._sums, "counts": self._counts}

    def load(self, state: dict[str, Tensor]) -> None:
        """As in :class:`Memory`."""
        self._sums, self._counts = state.get("sums"), state.get("counts")


class QueueMemory:
    """The responses and targets of the last samples, the oldest of which give way.

    Parameters
    ----------
    size
        Samples remembered besides the present batch.

    Examples
    --------
    >>> memory = QueueMemory(2)
    >>> rows, labels = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 1])
    >>> sums, counts = torch.tensor([[1.0], [5.0]]), torch.tensor([[1.0], [2.0]])
    >>> _ = memory.add(sums, counts, rows, labels, keep=True)
    >>> memory.add(sums, counts, rows, labels, keep=True)[0].tolist()  # 2 and 3 of class 1 were remembered
    [[1.0], [10.0]]
    """

    def __init__(self, size: int) -> None:
        if isinstance(size, bool) or math.floor(size) != size or size < 1:
            raise InvalidInput(f"memory_size={size!r} must be a whole number of samples of at least 1.")
        self.size = int(size)
        self._rows: Tensor | None = None
        self._targets: Tensor | None = None

    def add(self, sums: Tensor, counts: Tensor, rows: Tensor, targets: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """As in :class:`Memory`."""
        if self._rows is not None and self._targets is not None:
            _check_units(self._rows.shape[1], rows.shape[1])
            self._rows, self._targets = self._rows.to(rows), self._targets.to(targets)
            old_sums, old_counts = class_sums(self._rows, self._targets, len(sums))
            sums, counts = sums + old_sums, counts + old_counts
        if keep:
            new = (rows.detach(), targets.detach())
            old = (self._rows, self._targets)
            self._rows, self._targets = (
                (n if o is None else torch.cat([o, n]))[-self.size :] for o, n in zip(old, new, strict=True)
            )
        return sums, counts

    def state(self) -> dict[str, Tensor]:
        """As in :class:`Memory`."""
        if self._rows is None or self._targets is None:
            return {}
        return {"rows": self._rows, "targets": self._targets}

    def load(self, state: dict[str, Tensor]) -> None:
        """As in :class:`Memory`."""
        self._rows, self._targets = state.get("rows"), state.get("targets")


def _check_units(before: int, now: int) -> None:
    if before != now:
        raise InvalidInput(
            f"the memory holds {before} units, the last forward pass gave {now}; a memory needs the same layers in "
            "every pass."
        )
