r"""Symmetries found from gradients alone, where there is no graph or it does not tell.

Detection stacks :math:`r_{ij} = ⟨g_i, A_jθ⟩` over batches i for the rows, columns and entries j of all parameters: the
null space of this table is the laws.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..symmetry import Symmetry
from ..term import Kind, Term
from .families import Slot
from .laws import law_term
from .names import diagonal_kind, law_name, unique_names
from .probe import Gradients, Probe

MOST_CANDIDATES = 64


def dead_biases(probe: Probe, taken: set[str], batches: int = 3) -> list[Symmetry]:
    """Entries of one-dimensional parameters whose gradient is zero though their layer learns (key biases, for one).

    A bias whose weight row has no gradient either (a dead unit) does not count. Parameters in `taken` are left out.
    """
    grads = [probe.gradients(k) for k in range(batches)]
    scales = [float(max(g.abs().max() for g in batch.values() if g is not None)) for batch in grads]
    named = probe.parameters()
    out = []
    for name, value in named.items():
        weight = f"{name.removesuffix('bias')}weight" if name.endswith("bias") else ""  # by the naming of torch.nn
        if value.dim() != 1 or name in taken or weight not in named or named[weight].dim() < 2:
            continue
        axis = next((axis for axis in (0, 1) if named[weight].shape[axis] == value.numel()), None)
        seen = [(g[name], g[weight], scale) for g, scale in zip(grads, scales, strict=True)]
        if axis is None or seen[0][0] is None:
            continue
        # an entry is dead if its gradient is zero in all batches, and alive if its weight row has one in any
        dead = torch.ones(value.numel(), dtype=torch.bool, device=value.device)
        alive = torch.zeros_like(dead)
        for own, rows, scale in seen:
            if own is not None and rows is not None:
                dead &= own.abs() <= 1e3 * probe.precision * scale
                alive |= rows.abs().movedim(axis, 0).flatten(1).amax(1) > 1e4 * probe.precision * scale
        index = torch.nonzero(dead & alive).flatten().cpu().numpy()
        if index.size:  # one law per entry
            laws = np.full(value.numel(), -1, dtype=np.int64)
            laws[index] = np.arange(index.size)
            term = law_term(Slot(name, tuple(value.shape), laws), 1, laws, index.size)
            out.append(Symmetry("translation", f"translation:{name}", (term,), index.size))
    return out


def detect(probe: Probe, tol: float = 1e-6) -> tuple[list[Symmetry], list[str]]:
    """Scale, rescale and translation families from gradients alone, with notes of what this cannot see.

    Candidates are the rows, the columns and, for vectors, the entries of every parameter, and columns in equal runs
    (a linear layer after a flatten). For candidates of one count n, the null space of the (batches·n, candidates)
    matrix of :math:`⟨g, Aθ⟩` gives families whose k-th law joins the k-th row, column or entry of each.
    """
    notes = [
        "found by numbers alone: matrix laws, and laws that pair channels in another order than their own, are not seen"
    ]
    out: list[Symmetry] = []
    with probe.small_eps(1e-4):  # so that what an epsilon breaks is in the null space too; confirmation tells
        groups = _candidates(probe)
        largest = max((len(terms) for terms in groups.values()), default=0)
        # twice as many equations as candidates, as far as that can be paid for
        grads = [probe.gradients(k) for k in range(min(max(6, 2 * largest), 40))]
        for size, terms in sorted(groups.items(), reverse=True):
            if len(terms) > MOST_CANDIDATES or len(grads) * size < 2 * len(terms):
                notes.append(f"{len(terms)} candidates for families of {size} laws are too many to be told apart")
                continue
            shifted = {name for law in out if law.kind == "translation" for name in law.parameters}
            # if every entry of a vector may be shifted, it is not news that all of them may
            # nor, if all columns may be, that runs of columns may be
            new = [t for t in terms if t.view is None and (size > 1 or t.parameter not in shifted)]
            out += _null_families(probe, grads, new, size, True)
            if size > 1:
                out += _null_families(probe, grads, terms, size, False)
    return list(unique_names(out)), notes


def _candidates(probe: Probe) -> dict[int, list[Term]]:
    """Rows, columns and runs of columns of parameters, by their number."""
    groups: dict[int, list[Term]] = defaultdict(list)
    named = {n: value for n, value in probe.parameters().items() if value.dim() and bool((value != 0).any())}
    for name, value in named.items():
        for axis in range(min(value.dim(), 2)):
            groups[value.shape[axis]].append(Term(name, 1, keep=axis))
        if value.dim() == 1:
            groups[1].append(Term(name))
        elif value.dim() > 2:  # a kernel: its sum over output channels
            groups[value[0].numel()].append(Term(name, keep=tuple(range(1, value.dim()))))
    for name, value in named.items():
        if value.dim() == 2:  # columns in runs, where another parameter has as many rows: a flatten in between
            rows, columns = value.shape
            for size in sorted(groups):
                if 1 < size < columns and columns % size == 0 and len(groups[size]) > 1:
                    groups[size].append(Term(name, 1, (rows, size, columns // size), 1))
    return groups


def _null_families(
    probe: Probe, grads: Sequence[Gradients], terms: Sequence[Term], size: int, translation: bool
) -> list[Symmetry]:
    params = probe.parameters()
    table = np.zeros((len(grads), size, len(terms)))  # ⟨g, θ⟩, or Σ g, by batch, law and candidate
    scale = np.zeros(len(terms))
    for j, term in enumerate(terms):
        value = torch.ones_like(params[term.parameter]) if translation else params[term.parameter].detach()
        for i, batch in enumerate(grads):
            if (grad := batch[term.parameter]) is not None:
                table[i, :, j] = term.bilinear(value, grad, size).cpu().numpy()
                scale[j] += float(grad.norm() * value.norm())
    # a parameter without a gradient has no law of this kind
    used = np.flatnonzero(scale > 1e-9 * scale.max(initial=0.0))
    if not used.size:
        return []
    flat = table.reshape(-1, len(terms))[:, used]
    out = []
    for vector in _integer_null_vectors(flat, 1e-8 * np.abs(flat).max()):
        touched = [replace(terms[used[j]], sign=int(sign)) for j, sign in enumerate(vector) if sign]
        if touched[0].sign < 0:  # the first, which produces the activations, grows
            touched = [replace(term, sign=-term.sign) for term in touched]
        touched.sort(key=lambda term: term.sign < 0)
        kind: Kind = "translation" if translation else diagonal_kind(term.sign for term in touched)
        name = law_name(kind, [(term.parameter, term.sign) for term in touched])
        out.append(Symmetry(kind, name, tuple(touched), size))
    return out


def _integer_null_vectors(table: NDArray[np.float64], exact: float) -> list[NDArray[np.int64]]:
    """A sparse basis of the null space by row reduction, of which vectors of small whole numbers are kept."""
    _, singular, right = np.linalg.svd(table, full_matrices=True)
    rank = int((singular > exact * np.sqrt(table.shape[0])).sum())
    basis = right[rank:].copy()  # (null vectors, candidates)
    pivots: list[int] = []
    # Reduced with complete pivoting: each vector has a 1 where all others have a 0, so that laws come apart.
    for row in range(len(basis)):
        block = np.abs(basis[row:])
        block[:, pivots] = 0.0
        at, pivot = np.unravel_index(int(block.argmax()), block.shape)
        swapped = row + int(at)
        basis[[row, swapped]] = basis[[swapped, row]]
        basis[row] /= basis[row, pivot]
        others = [r for r in range(len(basis)) if r != row]
        basis[others] -= np.outer(basis[others, pivot], basis[row])
        pivots.append(int(pivot))
    whole = np.round(basis)
    small = (np.abs(basis - whole).max(1) < 1e-4) & (np.abs(whole).max(1) > 0) & (np.abs(whole).max(1) <= 4)
    return list(whole[small].astype(np.int64))
