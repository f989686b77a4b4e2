"""From solved degrees to families of laws: one law per free unknown, alike ones together, entries as terms."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mlcollage.papers.neural_mechanics._degrees import Ids, Solution
from mlcollage.papers.neural_mechanics._rules import Walk
from mlcollage.papers.neural_mechanics.symmetry import Kind, Symmetry, Term

__all__ = ["Family", "Found", "Slot", "families", "law_term", "module_of", "unique_names"]


@dataclass(frozen=True)
class Slot:
    """The unknowns of one parameter along some of its axes."""

    parameter: str
    shape: tuple[int, ...]
    ids: Ids


@dataclass
class Family:
    """Laws that touch the same parameters in the same way.

    Attributes
    ----------
    free
        The free unknown of each law.
    entries
        (slot, sign, laws): `laws` has the slot's shape and names the law of each position, -1 for none.
    """

    free: Ids
    entries: list[tuple[Slot, int, Ids]]
    broken_by: str | None = None

    @property
    def kind(self) -> Kind:
        """Scale if all entries grow together, rescale if some shrink."""
        return "scale" if all(sign > 0 for _, sign, _ in self.entries) else "rescale"


@dataclass
class Found:
    """Families as symmetries, with notes of what was left out."""

    symmetries: tuple[Symmetry, ...] = ()
    notes: list[str] = field(default_factory=list)


def families(slots: Sequence[Slot], solution: Solution, walk: Walk) -> Found:
    """All diagonal symmetries, and the matrix symmetries that contain them where only linear maps lie between."""
    from mlcollage.papers.neural_mechanics.attention import matrix_symmetry

    groups = _grouped(slots, solution)
    broken = _broken_by(walk, solution)
    diagonal = _touched(walk, solution, "diagonal")
    blocks = _block_keys(walk, solution)
    out: list[Symmetry] = []
    notes: list[str] = []
    for family in groups:
        reasons = sorted({reason for f in family.free for reason in broken.get(int(f), ())})
        family.broken_by = ", ".join(reasons) or None
        keys = [None if int(f) in diagonal else blocks.get(int(f)) for f in family.free]
        out += matrix_symmetry(family, keys, notes) or [vector_symmetry(family)]
    return Found(unique_names(out), notes)


def vector_symmetry(family: Family) -> Symmetry:
    """One conserved number per law of the family."""
    terms = tuple(law_term(slot, sign, laws, len(family.free)) for slot, sign, laws in family.entries)
    return Symmetry(
        family.kind, family_name(family.kind, family.entries), terms, len(family.free), broken_by=family.broken_by
    )


def family_name(kind: str, entries: Sequence[tuple[Slot, int, Ids]]) -> str:
    """For example ``rescale:conv1->conv2``: the first module that grows and the first that shrinks."""
    up = [module_of(slot.parameter) for slot, sign, _ in entries if sign > 0]
    down = [module_of(slot.parameter) for slot, sign, _ in entries if sign < 0]
    return f"{kind}:{up[0]}->{down[0]}" if up and down else f"{kind}:{(up or down)[0]}"


def module_of(parameter: str) -> str:
    """The module that owns a parameter, unless the name tells more (packed projections, bare parameters)."""
    owner, _, last = parameter.rpartition(".")
    return owner if last in ("weight", "bias") and owner else parameter


def unique_names(symmetries: Sequence[Symmetry]) -> tuple[Symmetry, ...]:
    """Number the second and later families of one name."""
    seen: dict[str, int] = defaultdict(int)
    out = []
    for law in symmetries:
        seen[law.name] += 1
        out.append(law if seen[law.name] == 1 else replace(law, name=f"{law.name}#{seen[law.name]}"))
    return tuple(out)


# --- grouping -------------------------------------------------------------------------------------------------------


def _grouped(slots: Sequence[Slot], solution: Solution) -> list[Family]:
    touches: dict[int, dict[tuple[int, float], list[int]]] = defaultdict(lambda: defaultdict(list))
    for s, slot in enumerate(slots):
        rows, free, coefs = solution.members(slot.ids)
        for row, f, coef in zip(rows.tolist(), free.tolist(), np.round(coefs, 9).tolist(), strict=True):
            touches[f][s, coef].append(row)
    by_signature: dict[frozenset[tuple[int, Fraction]], list[int]] = defaultdict(list)
    cleaned: dict[int, dict[tuple[int, Fraction], list[int]]] = {}
    for f, where in touches.items():
        kept = _without_canceled(slots, where)
        if kept:
            cleaned[f] = kept
            by_signature[frozenset(kept)].append(f)
    out = []
    for signature, members in by_signature.items():
        ordered = sorted(signature, key=lambda key: (key[0], key[1]))
        members.sort(key=lambda f: tuple(min(cleaned[f][key]) for key in ordered))
        out.append(_family(slots, ordered, members, cleaned))
    order = {id(slot): k for k, slot in enumerate(slots)}
    out.sort(key=lambda family: min(order[id(slot)] for slot, _, _ in family.entries))
    return out


def _without_canceled(
    slots: Sequence[Slot], where: dict[tuple[int, float], list[int]]
) -> dict[tuple[int, Fraction], list[int]]:
    """One law's entries in whole numbers; whole-parameter entries of several axes added up, vanished ones dropped."""
    whole: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for s, coef in where:
        if len(where[s, coef]) == slots[s].ids.size:
            whole[slots[s].parameter].append((s, coef))
    left = {(s, Fraction(coef).limit_denominator(1000)): rows for (s, coef), rows in where.items()}
    for keys in whole.values():
        if len(keys) < 2:
            continue
        total = sum(Fraction(coef).limit_denominator(1000) for _, coef in keys)
        for s, coef in keys:
            rows = left.pop((s, Fraction(coef).limit_denominator(1000)))
        if total:
            left[keys[-1][0], total] = rows
    if not left:
        return {}
    common = math.lcm(*(coef.denominator for _, coef in left))
    shared = math.gcd(*(int(coef * common) for _, coef in left))
    factor = Fraction(common, shared) * _orientation(slots, left)
    return {(s, coef * factor): rows for (s, coef), rows in left.items()}


def _orientation(slots: Sequence[Slot], left: dict[tuple[int, Fraction], list[int]]) -> int:
    """+1 or -1, so that what produces the activations (biases, gains, rows) grows with α."""

    def rank(key: tuple[int, Fraction]) -> tuple[int, int]:
        slot = slots[key[0]]
        axes = [axis for axis, size in enumerate(slot.ids.shape) if size > 1]
        return (0 if len(slot.shape) == 1 else 1 if axes == [0] else 2), key[0]

    first = min(left, key=rank)
    return 1 if first[1] > 0 else -1


def _family(
    slots: Sequence[Slot],
    ordered: Sequence[tuple[int, Fraction]],
    members: Sequence[int],
    cleaned: dict[int, dict[tuple[int, Fraction], list[int]]],
) -> Family:
    entries = []
    for key in ordered:
        slot = slots[key[0]]
        layers: list[Ids] = []
        for law, f in enumerate(members):
            rows = np.asarray(cleaned[f][key])
            for layer in layers:
                if (layer[rows] < 0).all():
                    break
            else:
                layer = np.full(slot.ids.size, -1, dtype=np.int64)
                layers.append(layer)
            layer[rows] = law
        entries += [(slot, int(key[1]), layer.reshape(slot.ids.shape)) for layer in layers]
    entries.sort(key=lambda entry: entry[1] < 0)
    return Family(np.asarray(members, dtype=np.int64), entries)


def _broken_by(walk: Walk, solution: Solution) -> dict[int, set[str]]:
    out: dict[int, set[str]] = defaultdict(set)
    for site, ids in walk.epsilons:
        for f in np.unique(solution.members(ids)[1]).tolist():
            out[f].add(f"eps of {site}" if site else "eps")
    return out


def _touched(walk: Walk, solution: Solution, tag: str) -> set[int]:
    arrays = [np.unique(ids) for kind, ids in walk.system.marks if kind == tag]
    if not arrays:
        return set()
    return set(np.unique(solution.members(np.unique(np.concatenate(arrays)))[1]).tolist())


def _block_keys(walk: Walk, solution: Solution) -> dict[int, int]:
    """A number for each free unknown that is the same for two only if every sum they enter keeps them together."""
    keys: dict[int, int] = defaultdict(int)
    for record, (ids, tokens) in enumerate(walk.system.tokens):
        rows, free, _ = solution.members(ids)
        pairs = np.unique(np.stack([free, tokens[rows]], axis=1), axis=0)
        for f, token in pairs.tolist():
            keys[f] += _mix(record, token)
    return keys


def _mix(record: int, token: int) -> int:
    """A fixed 61-bit hash of a pair of small numbers."""
    value = (record * 0x9E3779B97F4A7C15 + token * 0xC2B2AE3D27D4EB4F + 0x165667B19E3779F9) & (2**64 - 1)
    value ^= value >> 29
    return (value * 0xBF58476D1CE4E5B9) & (2**61 - 1)


# --- terms ----------------------------------------------------------------------------------------------------------


def law_term(slot: Slot, sign: int, laws: Ids, count: int) -> Term:
    """The term of one parameter, in the plainest form that says which law each entry belongs to."""
    shape, name = slot.shape, slot.parameter
    axes = [axis for axis, size in enumerate(laws.shape) if size > 1]
    if not axes or bool((laws == laws.flat[0]).all()):
        law = int(laws.flat[0])
        return Term(name, sign, laws=None if count == 1 else (law,))
    if len(axes) == 1:
        return _one_axis(name, sign, shape, axes[0], laws.ravel(), count)
    view: list[int] = []
    keep: list[int] = []
    for axis, size in enumerate(shape):
        run = _run_length(laws, axis) if laws.shape[axis] > 1 else 1
        laws = laws.take(np.arange(0, laws.shape[axis], run), axis)
        if laws.shape[axis] > 1:
            keep.append(len(view))
        view += [size // run, run] if run > 1 else [size]
    flat = laws.ravel()
    named = None if _counts(flat, count) else tuple(flat.tolist())
    return Term(name, sign, None if tuple(view) == shape else tuple(view), tuple(keep), laws=named)


def _counts(flat: NDArray[np.int64], count: int) -> bool:
    return flat.size == count and bool((flat == np.arange(count)).all())


def _run_length(laws: Ids, axis: int) -> int:
    """Longest run length that divides the axis and along which the law does not change."""
    size = laws.shape[axis]
    moved = np.moveaxis(laws, axis, 0).reshape(size, -1)
    changes = np.flatnonzero((moved[1:] != moved[:-1]).any(1)) + 1
    return math.gcd(size, *changes.tolist()) if changes.size else size


def _one_axis(name: str, sign: int, shape: tuple[int, ...], axis: int, laws: Ids, count: int) -> Term:
    used = np.flatnonzero(laws >= 0)
    start, stop = int(used[0]), int(used[-1]) + 1
    whole = (start, stop) == (0, shape[axis])
    rows = columns = None
    if not whole and axis < 2 and used.size == stop - start:
        rows, columns = ((start, stop), None) if axis == 0 else (None, (start, stop))
        laws = laws[start:stop]
        shape = (*shape[:axis], stop - start, *shape[axis + 1 :])
    elif not whole:
        return Term(name, sign, keep=axis, laws=tuple(laws.tolist()))
    if _counts(laws, count):
        return Term(name, sign, keep=axis, rows=rows, columns=columns)
    size = laws.size
    if size % count == 0 and size > count:
        inner = size // count
        for view, keep, pattern in (
            ((count, inner), axis, np.repeat(np.arange(count), inner)),
            ((inner, count), axis + 1, np.tile(np.arange(count), inner)),
        ):
            if bool((laws == pattern).all()):
                return Term(name, sign, (*shape[:axis], *view, *shape[axis + 1 :]), keep, rows, columns)
    return Term(name, sign, keep=axis, rows=rows, columns=columns, laws=tuple(laws.tolist()))
