r"""Matrix laws: what attention heads and chains of linear maps conserve beyond one number per channel.

Where two linear maps meet in a product with nothing but linear operations between them, any invertible matrix M can be
slipped in, ``U → MU, V → M^{-⊤}V``, and the whole symmetric matrix :math:`UU^⊤ - VV^⊤` is conserved (biases are columns
of U and V). For one head of an attention layer:

==========================  ========================================================================================
queries and keys            :math:`\hat Q\hat Q^⊤ - \hat K\hat K^⊤`, d(d+1)/2 laws; grouped heads add up over the
                            queries that share a key
values and output           :math:`\hat V\hat V^⊤ - O^⊤O`, with or without rotary embedding
with a rotary embedding     queries and keys keep one law per rotary pair: the rotation commutes only with rotations and
                            multiples of the identity in each plane
key bias                    its gradient is zero (every score of a query shifts alike); not with a rotary embedding
two linear maps in a row    :math:`W_1W_1^⊤ - W_2^⊤W_2`
==========================  ========================================================================================

Nothing here looks for attention by name. The walk over the graph marks the unknowns that passed an operation with which
only diagonal matrices commute (a ReLU, a gain, a slice that is rotated against another), and remembers which of them
enter the same sums; a family of rescale laws without marks is a matrix law on each such set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlcollage.papers.neural_mechanics._degrees import Ids
from mlcollage.papers.neural_mechanics._families import Family, Slot, family_name
from mlcollage.papers.neural_mechanics.symmetry import Symmetry, Term

__all__ = ["LARGEST_MATRIX", "matrix_symmetry", "matrix_term"]

LARGEST_MATRIX = 1024


def matrix_symmetry(family: Family, keys: Sequence[int | None], notes: list[str]) -> list[Symmetry]:
    """The family's rescale laws joined into one matrix law per block; empty where they are not.

    Parameters
    ----------
    family
        Rescale laws, one per channel.
    keys
        The block of each law, None where only diagonal matrices commute.
    notes
        Receives a sentence where a matrix law exists but is tracked by its diagonal only.
    """
    if family.kind != "rescale" or any(key is None for key in keys) or any(abs(s) != 1 for _, s, _ in family.entries):
        return []
    blocks = list(dict.fromkeys(keys))
    sizes = {keys.count(block) for block in blocks}
    size = sizes.pop()
    if sizes or size < 2:
        return []
    name = family_name("matrix", family.entries)
    if size > LARGEST_MATRIX:
        notes.append(f"{name}: the {size}x{size} matrix law is followed by its diagonal only (the rescale laws)")
        return []
    place = _renumbered(keys, blocks, size)
    entries = [(slot, sign, np.where(laws >= 0, place[laws], -1)) for slot, sign, laws in family.entries]
    terms = [matrix_term(slot, sign, laws, size, len(blocks)) for slot, sign, laws in entries]
    if any(term is None for term in terms):
        notes.append(f"{name}: the channels of a block are not in one order everywhere; followed by its diagonal only")
        return []
    count = len(blocks) * size * (size + 1) // 2
    done = tuple(term for term in terms if term is not None)
    return [Symmetry("matrix", name, done, count, broken_by=family.broken_by, size=size)]


def _renumbered(keys: Sequence[int | None], blocks: Sequence[int | None], size: int) -> Ids:
    """Old law number to block * size + position in the block."""
    position = {block: k for k, block in enumerate(blocks)}
    filled = [0] * len(blocks)
    out = np.empty(len(keys), dtype=np.int64)
    for law, key in enumerate(keys):
        block = position[key]
        out[law] = block * size + filled[block]
        filled[block] += 1
    return out


def matrix_term(slot: Slot, sign: int, laws: Ids, size: int, blocks: int) -> Term | None:
    """The term that reads the slot's axis as (block, position in the block); None if it is not laid out so."""
    axes = [axis for axis, n in enumerate(laws.shape) if n > 1]
    if len(axes) != 1 or slot.shape[axes[0]] % size:
        return None
    axis, flat = axes[0], laws.ravel()
    runs = flat.size // size
    for table, order in ((flat.reshape(runs, size), (axis, axis + 1)), (flat.reshape(size, runs).T, (axis + 1, axis))):
        heads = table[:, 0] // size
        filled = table[:, 0] >= 0
        expected = np.where(filled[:, None], heads[:, None] * size + np.arange(size), -1)
        if not bool((table == expected).all()):
            continue
        inner = (runs, size) if order[0] == axis else (size, runs)
        view = (*slot.shape[:axis], *inner, *slot.shape[axis + 1 :])
        named = tuple(np.where(filled, heads, -1).tolist())
        plain = named == tuple(range(blocks))
        return Term(slot.parameter, sign, view, order[0], laws=None if plain else named, gram=order[1])
    return None
