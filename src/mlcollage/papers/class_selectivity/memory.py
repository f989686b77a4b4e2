"""Class sums of earlier batches, for more classes than a batch can hold."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .sums import class_sums


class ClassMemory:
    """What adds earlier batches to the class sums of the present one; it holds two tensors of them."""

    names: ClassVar[tuple[str, str]]  # of the two tensors in state_dict
    held: tuple[Tensor, Tensor] | None = None

    def add(self, sums: Tensor, counts: Tensor, rows: Tensor, targets: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """Sums (C, U) and counts (C, 1) of the batch with those of earlier ones added.

        Parameters
        ----------
        sums, counts
            (C, U) and (C, 1) of the present batch, the only part with gradients.
        rows, targets
            (N, U) and (N,) or (N, C): what they are sums of.
        keep
            Whether the present batch is remembered.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Tensors for ``state_dict``; none before the first batch."""
        return {} if self.held is None else dict(zip(self.names, self.held, strict=True))

    def load(self, state: dict[str, Tensor]) -> None:
        """Counterpart of :meth:`state`."""
        first, second = self.names
        if state and set(state) != set(self.names):
            raise InvalidInput(
                f"the state has a memory of {' and '.join(state)}; this one is of {first} and {second}: make the "
                "regularizer with the memory= it was saved with."
            )
        self.held = (state[first], state[second]) if state else None

    def _check_units(self, now: int) -> None:
        before = now if self.held is None else self.held[0].shape[1]
        if before != now:
            raise InvalidInput(
                f"the memory holds {before} units, the last forward pass gave {now}; a memory needs the same layers "
                "in every pass."
            )


def make_memory(kind: str | None, num_classes: int | None, decay: float, size: int) -> ClassMemory | None:
    """The memory of this kind, or None."""
    if kind is None:
        return None
    checks.choice("memory", kind, ("ema", "queue"))
    if num_classes is None:
        raise InvalidInput(f"memory={kind!r} needs num_classes: batches hold different classes.")
    return EmaMemory(decay) if kind == "ema" else QueueMemory(size)


class EmaMemory(ClassMemory):
    r"""Exponentially forgotten sums and counts.

    .. math:: S_t = S_t^{\mathrm{batch}} + d\, S_{t-1}, \qquad n_t = n_t^{\mathrm{batch}} + d\, n_{t-1}

    Parameters
    ----------
    decay
        d in [0, 1): about :math:`1 / (1 - d)` batches are remembered.

    Examples
    --------
    >>> memory, one = EmaMemory(0.5), torch.ones(2, 1)
    >>> for _ in range(3):
    ...     sums, counts = memory.add(one, one, one, one, keep=True)
    >>> sums[0].item()
    1.75
    """

    names = ("sums", "counts")

    def __init__(self, decay: float) -> None:
        self.decay = checks.real("memory_decay", decay, least=0, below=1)

    def add(self, sums: Tensor, counts: Tensor, rows: Tensor, targets: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """As in :class:`ClassMemory`."""
        self._check_units(sums.shape[1])
        if self.held is not None:
            sums = sums + self.decay * self.held[0].to(sums)
            counts = counts + self.decay * self.held[1].to(counts)
        if keep:
            self.held = sums.detach(), counts.detach()
        return sums, counts


class QueueMemory(ClassMemory):
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

    names = ("rows", "targets")

    def __init__(self, size: int) -> None:
        self.size = checks.integer("memory_size", size, least=1)

    def add(self, sums: Tensor, counts: Tensor, rows: Tensor, targets: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """As in :class:`ClassMemory`."""
        self._check_units(rows.shape[1])
        parts = [(rows.detach(), targets.detach())]
        if self.held is not None:
            parts.insert(0, (self.held[0].to(rows), self.held[1].to(targets)))
            old_sums, old_counts = class_sums(*parts[0], len(sums))
            sums, counts = sums + old_sums, counts + old_counts
        if keep:
            all_rows, all_targets = (torch.cat(part)[-self.size :] for part in zip(*parts, strict=True))
            self.held = all_rows, all_targets
        return sums, counts
