"""From solved degrees to families of laws: one law per free unknown, alike ones together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ..term import Kind
from .degrees import Ids, Solution, compress
from .names import diagonal_kind, law_name
from .walk import Walk

LARGEST_DENOMINATOR = 1000
Key = tuple[int, Fraction]  # number of a slot, and a law's exponent there
Entries = Mapping[Key, list[int]]  # the (flat) positions of the slot that have the exponent


@dataclass(frozen=True)
class Slot:
    """The unknowns of one parameter along some of its axes (of size 1 along the others).

    Attributes
    ----------
    what
        ``"degree"``, ``"shift"``, or ``"common"``: a shift that is the same along the others.
    free
        Of a shift: the axes along which each entry may be shifted differently, a law for each of them.
    left_out
        An entry of the free axis that is never shifted, -1 for none.
    """

    parameter: str
    shape: tuple[int, ...]
    ids: Ids
    what: str = "degree"
    free: tuple[int, ...] = ()
    left_out: int = -1

    @property
    def labels(self) -> tuple[Ids, ...]:
        """The carrier's labels."""
        return (self._numbers,) if self.free else ()

    @property
    def copies(self) -> int:
        """How many laws there are for each unknown."""
        return self._numbers.size - (self.left_out >= 0) if self.free else 1

    @property
    def _numbers(self) -> Ids:
        sizes = [size if axis in self.free else 1 for axis, size in enumerate(self.shape)]
        return np.arange(math.prod(sizes)).reshape(sizes)

    def numbered(self, laws: Ids) -> Ids:
        """The laws' numbers, by entry, with a law for each entry of the free axes."""
        if not self.free:
            return laws
        copy = np.where(
            self._numbers == self.left_out, -1, self._numbers - ((self.left_out >= 0) & (self._numbers > self.left_out))
        )
        laws = compress(laws)
        return np.where((laws >= 0) & (copy >= 0), laws * self.copies + copy, -1)


@dataclass(frozen=True)
class Family:
    """Laws that touch the same parameters in the same way.

    Attributes
    ----------
    size
        How many laws.
    entries
        (slot, sign, laws): `laws` has the slot's shape and names the law of each position, -1 for none.
    blocks
        Laws with one number here are the diagonal of one matrix; None where only diagonal matrices commute.
    broken_by
        The epsilons that break the laws a little.
    """

    size: int
    entries: list[tuple[Slot, float, Ids]]
    blocks: list[int | None]
    broken_by: str | None

    @property
    def mixed(self) -> bool:
        """Whether the laws scale some entries and shift others, or do not have one number of copies."""
        return len({(slot.what == "degree", slot.copies) for slot, _, _ in self.entries}) > 1

    @property
    def kind(self) -> Kind:
        """Translation if something is shifted, scale if all entries grow together, rescale if some shrink."""
        if any(slot.what != "degree" for slot, _, _ in self.entries):
            return "translation"
        return diagonal_kind(sign for _, sign, _ in self.entries)

    def name(self, kind: Kind) -> str:
        """The name of the family as a symmetry of this kind."""
        return law_name(kind, [(slot.parameter, sign) for slot, sign, _ in self.entries])


def families(slots: Sequence[Slot], solution: Solution, walk: Walk) -> list[Family]:
    """All diagonal symmetries of a solved walk."""
    laws: dict[int, Entries] = {}
    alike: dict[frozenset[Key], list[int]] = defaultdict(list)
    for free, entries in _touched(slots, solution).items():
        if whole := _in_whole_numbers(slots, entries):
            laws[free] = whole
            # laws with the same exponents in the same slots are one family
            alike[frozenset(whole)].append(free)
    reasons: dict[int, set[str]] = defaultdict(set)
    for site, ids in walk.epsilons:
        for free in solution.touched([ids]):
            reasons[free].add(f"eps of {site}" if site else "eps")
    diagonal = solution.touched(walk.marks)
    blocks = _block_keys(walk, solution)
    out = []
    for signature, members in sorted(alike.items(), key=lambda item: min(slot for slot, _ in item[0])):
        keys = sorted(signature)
        # in the order of the positions that they touch, so that law k is channel k
        members.sort(key=lambda free: tuple(min(laws[free][key]) for key in keys))
        broken_by = ", ".join(sorted(set().union(*(reasons.get(free, ()) for free in members)))) or None
        in_blocks = [None if free in diagonal else blocks.get(free) for free in members]
        placed = [entry for key in keys for entry in _placed(slots[key[0]], key, [laws[f] for f in members])]
        copies = max(slot.copies for slot, _, _ in placed)
        # what grows comes first; otherwise the order of the parameters
        placed.sort(key=lambda entry: entry[1] < 0)
        out.append(Family(len(members) * copies, placed, in_blocks, broken_by))
    return out


def _touched(slots: Sequence[Slot], solution: Solution) -> dict[int, dict[Key, list[int]]]:
    """By free unknown: where it enters the degrees of parameters, and with which coefficient."""
    out: dict[int, dict[Key, list[int]]] = defaultdict(lambda: defaultdict(list))
    for s, slot in enumerate(slots):
        rows, free, coefs = solution.members(slot.ids)
        for row, f, coef in zip(rows.tolist(), free.tolist(), np.round(coefs, 9).tolist(), strict=True):
            out[f][s, _ratio(coef)].append(row)
    return out


def _in_whole_numbers(slots: Sequence[Slot], entries: dict[Key, list[int]]) -> Entries:
    """One law's entries in whole numbers; whole-parameter entries of several axes added up, vanished ones dropped."""
    whole: dict[str, list[Key]] = defaultdict(list)
    for key, rows in entries.items():
        slot = slots[key[0]]
        if slot.what == "degree" and len(rows) == slot.ids.size:  # the law scales the parameter as a whole
            whole[slot.parameter].append(key)
    left = dict(entries)
    for keys in whole.values():
        if len(keys) > 1:
            rows = [left.pop(key) for key in keys][-1]
            if total := sum(coef for _, coef in keys):
                left[keys[-1][0], Fraction(total)] = rows
    if not left:
        return {}
    # the smallest whole numbers in the same proportion
    if max(coef.denominator for _, coef in left) > LARGEST_DENOMINATOR:
        factor = 1 / abs(next(iter(left))[1])
    else:
        common = math.lcm(*(coef.denominator for _, coef in left))
        factor = Fraction(common, math.gcd(*(int(coef * common) for _, coef in left)))
    factor *= _orientation(slots, left)
    return {(s, coef * factor): rows for (s, coef), rows in left.items()}


def _ratio(value: float) -> Fraction:
    """The simple ratio that a coefficient is, or (embeddings times a square root) the number itself."""
    simple = Fraction(value).limit_denominator(LARGEST_DENOMINATOR)
    return simple if abs(simple - value) < 1e-8 else Fraction(value)


def _orientation(slots: Sequence[Slot], entries: Entries) -> int:
    """+1 or -1, so that what produces the activations (biases, gains, rows) grows with α."""

    def rank(key: Key) -> tuple[int, int]:
        slot = slots[key[0]]
        axes = [axis for axis, size in enumerate(slot.ids.shape) if size > 1]
        return (0 if len(slot.shape) == 1 else 1 if axes == [0] else 2), key[0]

    return 1 if min(entries, key=rank)[1] > 0 else -1


def _placed(slot: Slot, key: Key, laws: Sequence[Entries]) -> list[tuple[Slot, float, Ids]]:
    """Which law each position of a slot belongs to; laws that share a position go into several layers."""
    layers: list[Ids] = []
    for law, entries in enumerate(laws):
        rows = np.asarray(entries[key])
        layer = next((layer for layer in layers if (layer[rows] < 0).all()), None)
        if layer is None:
            layer = np.full(slot.ids.size, -1, dtype=np.int64)
            layers.append(layer)
        layer[rows] = law
    sign = int(key[1]) if key[1].denominator == 1 else float(key[1])
    return [(slot, sign, slot.numbered(layer.reshape(slot.ids.shape))) for layer in layers]


def _block_keys(walk: Walk, solution: Solution) -> dict[int, int]:
    """A number for each free unknown that is the same for two only if every sum they enter keeps them together."""
    keys: dict[int, int] = defaultdict(int)
    for record, (ids, tokens) in enumerate(walk.tokens):
        rows, free, _ = solution.members(ids)
        pairs = np.unique(np.stack([free, tokens[rows]], axis=1), axis=0)
        for f, token in pairs.tolist():
            keys[f] += _mix(record, token)
    return dict(keys)


def _mix(record: int, token: int) -> int:
    """A fixed 61-bit hash of a pair of small numbers."""
    value = (record * 0x9E3779B97F4A7C15 + token * 0xC2B2AE3D27D4EB4F + 0x165667B19E3779F9) & (2**64 - 1)
    value ^= value >> 29
    return (value * 0xBF58476D1CE4E5B9) & (2**61 - 1)
