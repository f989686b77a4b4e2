"""Degrees: by which power of the scale factors an activation or a parameter grows, and the equations between them.

Give every entry of every tensor a degree, a linear form in unknowns: under the action with parameter α the entry is
multiplied by α^degree. An operation is equivariant under the action only if its degrees satisfy linear equations (a
sum: all addends equal; a product: degrees add; a GELU: zero). The null space of all equations of a network is the space
of its diagonal symmetries. Degrees are stored as arrays of unknowns that have size 1 along every axis on which they do
not depend, so that a layer costs (inputs + outputs), not inputs x outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

Ids = NDArray[np.int64]
LARGEST_JOINT = 4_000_000  # equations written out for one operation before its degrees are given up (set to zero)
LARGEST_ELIMINATION = 100_000
NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Part:
    """`coef` times the unknowns `ids`; the array has the tensor's rank, and size 1 where the unknown is the same.

    In a shift (see ``carriers``) the array has one axis more, in front, and `key` and `labels` say which function of
    data and parameters the unknowns multiply.
    """

    coef: float
    ids: Ids
    key: int = 0
    labels: tuple[Ids, ...] = ()

    @property
    def axes(self) -> frozenset[int]:
        """Axes along which the unknown differs."""
        return frozenset(axis for axis, size in enumerate(self.ids.shape) if size > 1)

    @property
    def carrier(self) -> Hashable:
        """What the unknowns multiply, for comparison."""
        return self.key, tuple((label.shape, label.tobytes()) for label in self.labels)


Degree = tuple[Part, ...]  # their sum


def changed(degree: Iterable[Part], change: Callable[[Ids], Ids]) -> Degree:
    """The degree with `change` applied to each array of unknowns."""
    return tuple(replace(part, ids=change(part.ids)) for part in degree)


def scaled(degree: Iterable[Part], factor: float) -> Degree:
    """The degree times a number."""
    return tuple(replace(part, coef=part.coef * factor) for part in degree)


def aligned(degree: Degree, rank: int) -> Degree:
    """The degree of a tensor that is broadcast to `rank` axes (new axes lead)."""
    return changed(degree, lambda ids: ids.reshape((1,) * (rank - ids.ndim) + ids.shape))


def compress(ids: Ids) -> Ids:
    """The same unknowns with size 1 along every axis where they do not differ."""
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1:
            # a stride of 0 (a broadcast view) tells without a look at the entries
            first = ids.take([0], axis)
            if ids.strides[axis] == 0 or bool((ids == first).all()):
                ids = first
    return np.ascontiguousarray(ids)


def merge(parts: Iterable[Part]) -> Degree:
    """Sum of parts: equal arrays added up, vanished ones dropped."""
    out: list[Part] = []
    for part in parts:
        for k, other in enumerate(out):
            if (part.ids is other.ids or np.array_equal(part.ids, other.ids)) and part.carrier == other.carrier:
                out[k] = replace(other, coef=part.coef + other.coef)
                break
        else:
            out.append(part)
    # unknown 0 is the constant zero
    return tuple(part for part in out if abs(part.coef) > 1e-12 and bool(part.ids.any()))


def overlapping(
    parts: Iterable[Part], ignored: Collection[int] = frozenset()
) -> list[tuple[frozenset[int], list[Part]]]:
    """Parts that share an axis, with the axes of each group; axes that are `ignored` do not count."""
    groups: list[tuple[frozenset[int], list[Part]]] = []
    for part in parts:
        axes, members, rest = part.axes.difference(ignored), [part], []
        for other_axes, others in groups:
            if axes & other_axes:
                axes, members = axes | other_axes, others + members
            else:
                rest.append((other_axes, others))
        groups = [*rest, (axes, members)]  # the part joins all groups that it touches into one
    return groups


def axis_groups(a: Sequence[int], b: Sequence[int]) -> Iterable[tuple[range, range]]:
    """Runs of axes of shape `a` that a reshape turns into runs of axes of shape `b`."""
    # A run ends where both shapes have used up the same number of entries.
    i = j = 0
    while i < len(a) or j < len(b):
        i0, j0, size_a, size_b = i, j, 1, 1
        if i < len(a):
            size_a, i = a[i], i + 1
        if j < len(b):
            size_b, j = b[j], j + 1
        while size_a != size_b:
            if size_a < size_b:
                size_a, i = size_a * a[i], i + 1
            else:
                size_b, j = size_b * b[j], j + 1
        yield range(i0, i), range(j0, j)


def reshape_ids(ids: Ids, shape: Sequence[int], new: Sequence[int]) -> Ids:
    """Unknowns of a tensor of `shape` after a reshape to `new`; only axes that differ are written out."""
    # `middle`: the tensor before, written out where a run of axes differs; `target`: the same after the reshape
    middle, target = list(ids.shape), [1] * len(new)
    for before, after in axis_groups(shape, new):
        if any(ids.shape[axis] > 1 for axis in before):
            for axis in before:
                middle[axis] = shape[axis]
            for axis in after:
                target[axis] = new[axis]
    return compress(np.broadcast_to(ids, middle).reshape(target))


@dataclass(frozen=True)
class Solution:
    """All solutions of a :class:`System`: every unknown as a combination of free ones.

    Attributes
    ----------
    forms
        Sparse (unknowns, unknowns): row x holds the coefficients of x in the free unknowns.
    free
        The free unknowns.
    """

    forms: Any
    free: Ids

    def members(self, ids: Ids) -> tuple[Ids, Ids, NDArray[np.float64]]:
        """Of an array of unknowns: positions (flat), the free unknown found there, and its coefficient."""
        rows = self.forms[ids.ravel()].tocoo()
        return rows.row.astype(np.int64), rows.col.astype(np.int64), rows.data

    def with_zero(self, ids: Ids) -> Solution:
        """The solutions in which these unknowns are zero, too."""
        if not ids.size:
            return self
        forms, _ = _reduced(_clean(self.forms[ids]), self.forms.shape[0])
        forms = _clean(self.forms @ forms, rows=False)
        return Solution(forms, np.unique(forms.tocoo().col).astype(np.int64))

    def touched(self, ids: Iterable[Ids]) -> set[int]:
        """The free unknowns that any of these arrays depends on."""
        flat = [array.ravel() for array in ids]
        return set(np.unique(self.members(np.unique(np.concatenate(flat)))[1]).tolist()) if flat else set()


@dataclass
class System:
    """Unknown degrees and the linear equations between them. Unknown 0 is the constant zero.

    Attributes
    ----------
    size
        Number of unknowns.
    given_up
        Where there were too many equations to write out.
    """

    size: int = 1
    given_up: list[str] = field(default_factory=list)
    # Equations in blocks: a table (equations, terms) of unknowns, and each term's coefficient. The first is x_0 = 0.
    _blocks: list[tuple[Ids, NDArray[np.float64]]] = field(
        default_factory=lambda: [(np.zeros((1, 1), np.int64), np.ones(1))]
    )

    def fresh(self, shape: Sequence[int]) -> Ids:
        """New unknowns in an array of `shape`."""
        count = int(np.prod(shape, dtype=np.int64))
        out = np.arange(self.size, self.size + count, dtype=np.int64).reshape(tuple(shape))
        self.size += count
        return out

    def equate(self, parts: Iterable[Part], where: str = "") -> None:
        """Σ parts = 0 for every entry. Parts on disjoint axes are each constant, and the constants sum to zero."""
        groups = overlapping(merge(parts))
        constants = [part for axes, members in groups if not axes for part in members]
        varying = [members for axes, members in groups if axes]
        for members in varying[1:]:  # each group but one is equal to a constant of its own, the level
            level = Part(1.0, self.fresh((1,) * members[0].ids.ndim))
            self._write([*members, Part(-1.0, level.ids)], where)
            constants.append(level)
        self._write([*(varying[0] if varying else []), *constants], where)

    def _write(self, parts: Sequence[Part], where: str) -> None:
        if not parts:
            return
        shape = np.broadcast_shapes(*(part.ids.shape for part in parts))
        if np.prod(shape, dtype=np.float64) > LARGEST_JOINT:
            self.given_up.append(where)
            self._blocks += [(part.ids.reshape(-1, 1), np.ones(1)) for part in parts]  # each unknown is zero
            return
        self.combine([np.broadcast_to(part.ids, shape).ravel() for part in parts], [part.coef for part in parts])

    def combine(self, terms: Sequence[Ids], coefs: Sequence[float]) -> None:
        """Σ coefs · terms = 0, entry by entry."""
        self._blocks.append((np.stack(terms, axis=1), np.array(coefs)))  # a row per entry, a column per term

    def solve(self) -> Solution:
        """Every unknown in terms of free ones: merging equal, opposite and zero unknowns, then elimination."""
        n = self.size
        # compressed rows: the terms of all equations in a row, and where each equation starts
        widths = np.concatenate([np.full(len(table), table.shape[1]) for table, _ in self._blocks])
        columns = np.concatenate([table.ravel() for table, _ in self._blocks])
        values = np.concatenate([np.tile(coefs, len(table)) for table, coefs in self._blocks])
        starts = np.concatenate([[0], np.cumsum(widths)])
        equations = _clean(sparse.csr_matrix((values, columns, starts), shape=(len(widths), n)))
        return Solution(*_reduced(equations, n))


def _reduced(equations: Any, n: int) -> tuple[Any, Ids]:
    """Every unknown as a form in those that the equations leave free, and these."""
    forms = sparse.identity(n, format="csr")
    # Every merge may make others possible (x + y = z with y = 0), so that it is done until nothing changes.
    while equations.shape[0] and (step := _merge_step(equations, n)) is not None:
        forms, equations = forms @ step, _clean(equations @ step)
    if equations.shape[0]:
        forms = forms @ _eliminate(equations, n)
    forms = _clean(forms, rows=False)
    return forms, np.unique(forms.tocoo().col).astype(np.int64)


def _clean(matrix: Any, rows: bool = True) -> Any:
    """A sparse matrix without vanished coefficients, and without empty rows if asked."""
    matrix = matrix.tocsr()
    matrix.sum_duplicates()
    matrix.data[np.abs(matrix.data) < 1e-9] = 0.0
    matrix.eliminate_zeros()
    return matrix[np.diff(matrix.indptr) > 0] if rows else matrix


def _merge_step(equations: Any, n: int) -> Any:
    """Substitution from the equations x = 0, x = y and x = -y; None if there are none."""
    counts = np.diff(equations.indptr)
    starts = equations.indptr[:-1]
    zero = equations.indices[starts[counts == 1]]
    pairs = starts[counts == 2]  # where the equations a x + b y = 0 begin
    a, b = equations.data[pairs], equations.data[pairs + 1]
    equal = np.isclose(np.abs(a), np.abs(b), rtol=1e-9)
    x, y = equations.indices[pairs][equal], equations.indices[pairs + 1][equal]
    if not zero.size and not x.size:
        return None
    return _substitution(n, zero, x, y, -np.sign(a[equal] * b[equal]))


def _substitution(n: int, zero: Ids, x: Ids = NONE, y: Ids = NONE, sign: NDArray[Any] = NONE) -> Any:
    """Each unknown as plus or minus the first of its class, or zero: components of the graph of signed copies.

    Node k stands for +x_k and node n + k for -x_k; an unknown that is connected to its own negative is zero.
    """
    same = sign > 0
    start = np.concatenate([zero, x, x + n])
    stop = np.concatenate([zero + n, np.where(same, y, y + n), np.where(same, y + n, y)])
    graph = sparse.coo_matrix((np.ones(start.size), (start, stop)), shape=(2 * n, 2 * n))
    count, component = connected_components(graph, directed=False)
    first = np.full(count, n, dtype=np.int64)  # of each component, the first unknown
    np.minimum.at(first, component, np.tile(np.arange(n), 2))
    plus, minus = component[:n], component[n:]
    root = first[plus]
    factor = np.where(component[root] == plus, 1.0, -1.0)
    kept = np.flatnonzero(plus != minus)
    return sparse.csr_matrix((factor[kept], (kept, root[kept])), shape=(n, n))


def _eliminate(equations: Any, n: int) -> Any:
    """Substitution from the remaining equations; of each the rarest unknown is solved for."""
    if equations.shape[0] > LARGEST_ELIMINATION:  # give up: all of them zero, which only loses symmetries
        return _substitution(n, np.unique(equations.indices))
    solved: dict[int, dict[int, float]] = {}
    rows = {
        tuple(zip(row.indices.tolist(), (row.data / row.data[0]).round(12).tolist(), strict=True)) for row in equations
    }
    uses = np.bincount(equations.indices, minlength=n)
    for row in sorted(rows, key=lambda items: max(x for x, _ in items)):
        form = _expand(dict(row), solved)
        if form:
            pivot = max(form, key=lambda x: (-int(uses[x]), x))
            scale = -form.pop(pivot)
            solved[pivot] = {x: c / scale for x, c in form.items()}
    keep = np.ones(n)  # unknowns that are not solved for stay themselves
    keep[list(solved)] = 0.0
    out = sparse.diags(keep, format="lil")
    for pivot in sorted(solved):
        for x, c in _expand(solved[pivot], solved).items():
            out[pivot, x] = c
    return out.tocsr()


def _expand(form: dict[int, float], solved: dict[int, dict[int, float]]) -> dict[int, float]:
    """The form with solved unknowns replaced until none is left."""
    out: dict[int, float] = {}
    work = list(form.items())
    while work:
        x, c = work.pop()
        if x in solved:
            work += [(z, c * d) for z, d in solved[x].items()]
        else:
            out[x] = out.get(x, 0.0) + c
    return {x: c for x, c in out.items() if abs(c) > 1e-9}
