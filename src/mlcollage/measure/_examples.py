r"""Which dimension of a layer's input and output holds the examples of a batch: proved at run time, never guessed.

Sizes only say where the examples *may* be: with 8 examples of 8 positions, either of two dimensions, and 8 rows that a
mask has chosen may belong to anything. The proof: of a loss :math:`\sum_i w_i \ell_i` with a weight for each example,
row i of the gradient at a layer's output is :math:`w_i` times that of :math:`\sum_i \ell_i`, for all i and random
weights, if and only if row i belongs to example i alone. The weights are powers of two, by which floating-point numbers
are multiplied without rounding, so that nothing but another example's share can make a difference.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _random


@dataclass(frozen=True)
class Layout:
    """How the examples of a tensor come to the front: they are dimension ``axis``, once dimension ``at`` was split."""

    axis: int
    at: int = 0
    split: tuple[int, int] | None = None  # (examples, positions) or (positions, examples), in one dimension so far

    def __call__(self, x: Tensor, lead: int = 0) -> Tensor:
        """X as (..., examples, positions and the rest), behind ``lead`` dimensions of another kind; a view."""
        if self.split is not None:
            x = x.unflatten(lead + self.at, self.split)
        return x.movedim(lead + self.axis, lead) if self.axis else x


def layouts(shape: Sequence[int], batch: int, free: int | None) -> tuple[Layout, ...]:
    """All layouts that the sizes allow, the usual ones first.

    Parameters
    ----------
    shape
        Of the layer's input.
    batch
        Number of examples.
    free
        Leading dimensions that the layer treats alike, so that the examples may be any of them, also together with
        positions in one dimension; None if they can only be the first.
    """
    if batch == 1:  # everything belongs to the one example
        whole = shape[0] == 1 or free is None
        return () if shape[0] != 1 and free is None else (Layout(0, 0, None if whole else (1, shape[0])),)
    found = [Layout(k) for k in range(free or 1) if shape[k] == batch]
    for k in range(free or 0):
        positions, rest = divmod(shape[k], batch)
        if rest == 0 and positions > 1:
            found += [Layout(k, k, (batch, positions)), Layout(k + 1, k, (positions, batch))]
    return tuple(found)


def weights(batch: int, *, narrow: bool) -> Tensor:
    """A power of two for each example, (batch,), different for all that are near each other.

    ``narrow`` for gradients in float16, whose exponents have little room.
    """
    powers = torch.arange(-2, 3) if narrow else torch.arange(-16, 17)
    generator = _random.generator(batch)
    blocks = [torch.randperm(len(powers), generator=generator) for _ in range(-(-batch // len(powers)))]
    return torch.ldexp(torch.ones(batch), powers[torch.cat(blocks)[:batch]])


def belongs(plain: Tensor, weighted: Tensor, w: Tensor) -> tuple[bool, int]:
    """Is row i of ``weighted`` the row of ``plain`` times w_i, for all i; and how many rows were not zero?

    Both are (examples, ...), with the examples in front.
    """
    plain, weighted = (t.reshape(len(w), -1) for t in (plain, weighted))
    if not plain.shape[1]:
        return True, 0
    kind = torch.promote_types(plain.dtype, torch.float32)
    # What is not a number says nothing: the other rows decide.
    size = plain.abs().nan_to_num().amax(1).to(kind)  # (examples,)
    off = (weighted.to(kind) / w.to(kind).unsqueeze(1) - plain).abs().nan_to_num().amax(1)
    # The same sums give the same roundings; some devices do not add in the same order twice.
    return bool((off <= torch.finfo(plain.dtype).eps ** 0.5 * size).all()), int((size > 0).sum())


# Autograd's names of functions that move rows by numbers computed from the data: what holds for one batch need not hold
# for the next.
_MOVES = (
    *("CopySlices", "Index", "Gather", "Scatter", "Masked", "Sort"),
    *("Topk", "Take", "Put", "Unique", "RepeatInterleave"),
)


def moves_rows(nodes: Iterable[Any]) -> bool:
    """Do nodes of autograd's graph move rows of activations in a way that depends on the data?"""
    for node in nodes:
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True  # unseen, so it may
        if type(node).__name__.startswith(_MOVES):
            source = node.next_functions[0][0] if node.next_functions else None
            if not hasattr(source, "variable"):  # else it reads a table of parameters
                return True
    return False


_remembered: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def remembered(model: nn.Module) -> dict[Hashable, Any]:
    """What was proved for a model, by a description of its graph and of all shapes; forgotten with the model."""
    return _remembered.setdefault(model, {})
