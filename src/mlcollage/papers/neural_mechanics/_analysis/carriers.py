"""Shifts: what is added to an activation or a parameter under the action, and how linear operations pass it on.

To first order the action changes an entry x by d x + s, with the degree d and the shift s, both linear in unknowns. The
shift of a bias is an unknown number. That of a weight W arrives in Wx multiplied by x, and later by whatever else
it meets. So a shift is a sum of parts, each an array of unknowns times a *carrier*, a function of data and parameters
that is not known. Carriers are taken for linearly independent unless they are the same (``Part.carrier``): a `key`
for how they were made, and `labels`, arrays of the tensor's rank whose entries differ wherever the function does.
Carrier 0 without labels is the number 1.

The arrays of unknowns have an extra axis in front, for entries that were summed over and now stand for parts of
their own: in Wx with a shift of x, each column of W carries another entry.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from .degrees import Degree, Ids, Part, changed, scaled

Shift = tuple[Part, ...]
Intern = Callable[[Hashable], int]


def lifted(degree: Degree, factor: float) -> Shift:
    """A degree times a number, as a shift with carrier 1."""
    return tuple(Part(part.coef * factor, part.ids[None]) for part in degree)


def by_carrier(shift: Iterable[Part]) -> list[list[Part]]:
    """The parts, those of one carrier together."""
    groups: dict[Hashable, list[Part]] = defaultdict(list)
    for part in shift:
        groups[part.carrier].append(part)
    return list(groups.values())


def moved(shift: Shift, change: Callable[[Ids], Ids]) -> Shift:
    """The shift after an operation that moves entries about; `change` does so to an array of the tensor's rank."""
    out = []
    for part in shift:
        head, shape = len(part.ids), part.ids.shape[1:]
        # where each entry comes from, counted from 1; an operation may fill in 0
        origin = change(np.arange(1, math.prod(shape) + 1).reshape(shape))
        flat = np.concatenate([np.zeros((head, 1), np.int64), part.ids.reshape(head, -1)], axis=1)
        out.append(replace(part, ids=flat[:, origin], labels=tuple(change(label) for label in part.labels)))
    return tuple(out)


def varying(part: Part) -> set[int]:
    """The axes along which the carrier differs."""
    return {axis for label in part.labels for axis, size in enumerate(label.shape) if size > 1}


def through(
    shift: Shift,
    before: str,
    after: str,
    factor: Hashable,
    varies: Mapping[str, int],
    intern: Intern,
    total: float | None = None,
) -> Shift:
    r"""The shift of :math:`y_o = \sum_k x_{..k} f_{k..}`, from that of x; f is not known.

    Parameters
    ----------
    shift
        Of x.
    before, after
        The letters of the axes of x and y, as in einsum; those that y lacks are summed over.
    factor
        What tells f from other factors.
    varies
        The letters of y along which f differs, with their sizes.
    intern
        Gives a number for each new carrier.
    total
        What f sums to over the letters that are summed, if that is one number; what does not differ along them then
        keeps its carrier.
    """
    gone = [axis for axis, letter in enumerate(before) if letter not in after]
    summed = tuple(1 + axis for axis in gone)
    left = [letter for letter in before if letter in after]
    fresh = tuple(along(size, after.index(letter), len(after)) for letter, size in varies.items() if size > 1)

    def placed(ids: Ids) -> Ids:
        """An array of the letters of x that y keeps, after axes in front, laid out in the letters of y."""
        lead = ids.ndim - len(left)
        order = [lead + left.index(letter) for letter in after if letter in left]
        kept = iter(ids.transpose([*range(lead), *order]).shape[lead:])
        shape = (*ids.shape[:lead], *(next(kept) if letter in left else 1 for letter in after))
        return ids.transpose([*range(lead), *order]).reshape(shape)

    def first(array: Ids, axes: Collection[int]) -> Ids:
        return array[tuple(0 if axis in axes else slice(None) for axis in range(array.ndim))]

    out = []
    for parts in by_carrier(shift):
        labels = tuple(placed(first(label, gone)) for label in parts[0].labels)
        if total is not None and not varying(parts[0]) & set(gone):
            # f s = f s_0 + f (s - s_0): the first entry keeps its carrier, the differences get a new one
            same = changed(parts, lambda ids: first(ids, summed))
            out += [Part(part.coef * total, placed(part.ids), part.key, labels) for part in same]
            if not any(part.axes.intersection(summed) for part in parts):
                continue
            parts = [*parts, *scaled(changed(same, lambda ids: np.expand_dims(ids, summed)), -1.0)]
        # in front, all parts of one carrier have the same size
        shape = np.broadcast_shapes(*(part.ids.shape for part in parts))
        fronts = (0, *summed)
        dropped = tuple(label.tobytes() for label in parts[0].labels if first(label, gone).size < label.size)
        key = intern((parts[0].key, factor, before, after, dropped, *(shape[axis] for axis in fronts)))
        for part in parts:
            ids = np.broadcast_to(
                part.ids, [shape[k] if k in fronts else size for k, size in enumerate(part.ids.shape)]
            )
            ids = np.moveaxis(ids, summed, range(1, 1 + len(summed)))
            ids = ids.reshape(-1, *ids.shape[1 + len(summed) :])
            out.append(Part(part.coef, placed(ids), key, (*labels, *fresh)))
    return tuple(part for part in out if part.coef)


def along(size: int, axis: int, rank: int) -> Ids:
    """Labels that differ along one axis."""
    return np.arange(size).reshape([size if k == axis else 1 for k in range(rank)])


def joined(pieces: Sequence[tuple[Shift, int]], axis: int) -> Shift:
    """The shift of tensors joined along an axis, each with its size there: zero where the other tensors are."""
    out: list[Part] = []
    start, total = 0, sum(size for _, size in pieces)

    def widened(array: Ids, size: int, axis: int, fill: int) -> Ids:
        whole = np.broadcast_to(array, [size if k == axis else n for k, n in enumerate(array.shape)])
        return np.pad(
            whole,
            [(start, total - start - size) if k == axis else (0, 0) for k in range(array.ndim)],
            constant_values=fill,
        )

    for shift, size in pieces:
        for part in shift:
            labels = [widened(label, size, axis, -1) if label.shape[axis] > 1 else label for label in part.labels]
            out.append(replace(part, ids=widened(part.ids, size, axis + 1, 0), labels=tuple(labels)))
        start += size
    return tuple(out)
