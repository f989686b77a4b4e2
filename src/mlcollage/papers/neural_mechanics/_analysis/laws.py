r"""Families of laws written as symmetries: one number per law, or matrices.

Where two linear maps meet in a product with nothing but linear operations between them, any invertible matrix M can be
slipped in, ``U → MU, V → M^{-⊤}V``, and the whole symmetric matrix :math:`UU^⊤ - VV^⊤` is conserved (biases are columns
of U and V). For one head of an attention layer:

* queries and keys: :math:`\hat Q\hat Q^⊤ - \hat K\hat K^⊤`, d(d+1)/2 laws; grouped heads add up over the queries that
  share a key;
* values and output: :math:`\hat V\hat V^⊤ - O^⊤O`, with or without rotary embedding;
* with a rotary embedding, queries and keys keep one law per rotary pair: the rotation commutes only with rotations and
  multiples of the identity in each plane;
* key bias: its gradient is zero (every score of a query shifts alike); not with a rotary embedding;
* two linear maps in a row, without a head: :math:`W_1W_1^⊤ - W_2^⊤W_2`.

Nothing here looks for attention by name. The walk over the graph marks the unknowns that passed an operation with which
only diagonal matrices commute (a ReLU, a gain, a slice that is rotated against another), and remembers which of them
enter the same sums; a family of rescale laws without marks is a matrix law on each such set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..symmetry import Symmetry
from ..term import Term, as_keep
from .degrees import Ids
from .families import Family, Slot
from .names import module_of

LARGEST_MATRIX = 1024


def as_symmetry(family: Family, notes: list[str]) -> Symmetry | None:
    """The family as matrix laws if its rescale laws join into blocks, else as one number per law.

    `notes` receives a sentence where a matrix law exists but is tracked by its diagonal only, or a law is of no kind.
    """
    if family.mixed:
        names = ", ".join(dict.fromkeys(slot.parameter for slot, _, _ in family.entries))
        notes.append(
            f"{names}: a law that scales about a point other than 0, or shifts different copies, is not tracked"
        )
        return None
    if (matrices := _matrix_symmetry(family, notes)) is not None:
        return matrices
    terms = tuple(law_term(slot, sign, laws, family.size) for slot, sign, laws in family.entries)
    return Symmetry(family.kind, family.name(family.kind), terms, family.size, broken_by=family.broken_by)


def by_layer(symmetries: Sequence[Symmetry]) -> list[Symmetry]:
    """Translations first; those of weight and bias of one layer, [W | b], as one family."""
    layers: dict[str, list[Symmetry]] = {}
    for law in symmetries:
        alone = law.kind == "translation" and len(law.terms) == 1
        layers.setdefault(module_of(law.parameters[0]) if alone else law.name + str(id(law)), []).append(law)
    out = []
    for members in layers.values():
        terms, start = [], 0
        for law in members:
            for term in law.terms:
                own = range(law.n_laws) if term.laws is None else term.laws
                laws = tuple(k if k < 0 else k + start for k in own) if len(members) > 1 else term.laws
                terms.append(replace(term, laws=laws))
            start += law.n_laws
        out.append(replace(members[0], terms=tuple(terms), n_laws=start) if len(members) > 1 else members[0])
    return sorted(out, key=lambda law: law.kind != "translation")


# --- matrices -------------------------------------------------------------------------------------------------------


def _matrix_symmetry(family: Family, notes: list[str]) -> Symmetry | None:
    blocks = list(dict.fromkeys(family.blocks))
    size = family.size // len(blocks)
    alike = all(family.blocks.count(block) == size for block in blocks)
    if (
        family.kind != "rescale"
        or None in blocks
        or not alike
        or size < 2
        or {sign for _, sign, _ in family.entries} != {1, -1}
    ):
        return None
    name = family.name("matrix")
    if size > LARGEST_MATRIX:
        notes.append(f"{name}: the {size}x{size} matrix law is followed by its diagonal only (the rescale laws)")
        return None
    # old law number -> block * size + position in the block
    place = np.empty(family.size, dtype=np.int64)
    for number, block in enumerate(blocks):
        own = [law for law, key in enumerate(family.blocks) if key == block]
        place[own] = number * size + np.arange(size)
    terms = []
    for slot, sign, laws in family.entries:
        term = _matrix_term(slot, sign, np.where(laws >= 0, place[laws], -1), size, len(blocks))
        if term is None:
            notes.append(
                f"{name}: the channels of a block are not in one order everywhere; followed by its diagonal only"
            )
            return None
        terms.append(term)
    count = len(blocks) * size * (size + 1) // 2
    return Symmetry("matrix", name, tuple(terms), count, broken_by=family.broken_by, size=size)


def _matrix_term(slot: Slot, sign: float, laws: Ids, size: int, blocks: int) -> Term | None:
    """The term that reads the slot's axis as (block, position in the block); None if it is not laid out so."""
    axes = [axis for axis, n in enumerate(laws.shape) if n > 1]
    if len(axes) != 1 or slot.shape[axes[0]] % size:
        return None
    axis, flat = axes[0], laws.ravel()
    runs = flat.size // size
    # the axis holds the positions of a block side by side, or the same position of all blocks side by side
    for inner, table, (keep, gram) in (
        ((runs, size), flat.reshape(runs, size), (axis, axis + 1)),
        ((size, runs), flat.reshape(size, runs).T, (axis + 1, axis)),
    ):
        filled, heads = table[:, :1] >= 0, table[:, :1] // size  # (runs, 1)
        if bool((table == np.where(filled, heads * size + np.arange(size), -1)).all()):
            view = (*slot.shape[:axis], *inner, *slot.shape[axis + 1 :])
            named = tuple(np.where(filled, heads, -1).ravel().tolist())
            return Term(slot.parameter, sign, view, keep, laws=_names(named, blocks), gram=gram)
    return None


# --- numbers --------------------------------------------------------------------------------------------------------


def _names(laws: Sequence[int], count: int) -> tuple[int, ...] | None:
    """The laws' numbers, None if they just count up."""
    return None if list(laws) == list(range(count)) else tuple(laws)


def law_term(slot: Slot, sign: float, laws: Ids, count: int) -> Term:
    """The term of one parameter, in the plainest form that says which law each entry belongs to."""
    shape, name = slot.shape, slot.parameter
    axes = [axis for axis, size in enumerate(laws.shape) if size > 1]
    if not axes or bool((laws == laws.flat[0]).all()):
        return Term(name, sign, laws=None if count == 1 else (int(laws.flat[0]),))
    rows = columns = None
    if len(axes) == 1:
        axis, used = axes[0], np.flatnonzero(laws >= 0)
        span = start, stop = int(used[0]), int(used[-1]) + 1
        if used.size < laws.size:
            if axis > 1 or used.size < stop - start:
                return Term(name, sign, keep=axis, laws=tuple(laws.ravel().tolist()))
            # only some rows or columns take part: cut them out
            rows, columns = (span, None) if axis == 0 else (None, span)
            laws, shape = laws.take(range(start, stop), axis), (*shape[:axis], stop - start, *shape[axis + 1 :])
        again = laws.size // count
        if again > 1 and np.array_equal(laws.ravel(), np.tile(np.arange(count), again)):
            # the laws side by side, again and again
            return Term(name, sign, (*shape[:axis], again, count, *shape[axis + 1 :]), axis + 1, rows, columns)
    # Each axis is split into (runs, entries of a run), and the runs are kept.
    view: list[int] = []
    keep: list[int] = []
    for axis, size in enumerate(shape):
        run = _run_length(laws, axis) if laws.shape[axis] > 1 else 1
        laws = laws.take(range(0, laws.shape[axis], run), axis)
        if laws.shape[axis] > 1:
            keep.append(len(view))
        view += [size // run, run] if run > 1 else [size]
    seen_as = None if tuple(view) == shape else tuple(view)
    return Term(name, sign, seen_as, as_keep(keep), rows, columns, _names(laws.ravel().tolist(), count))


def _run_length(laws: Ids, axis: int) -> int:
    """Longest run length that divides the axis and along which the law does not change."""
    size = laws.shape[axis]
    moved = np.moveaxis(laws, axis, 0).reshape(size, -1)
    changes = np.flatnonzero((moved[1:] != moved[:-1]).any(1)) + 1
    return math.gcd(size, *changes.tolist())
