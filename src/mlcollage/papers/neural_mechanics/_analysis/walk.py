"""What is known while a graph is walked, and the table of rules by which operators are passed.

A rule is a function ``(walk, *args, **kwargs)`` of an operator's arguments, tensors given as :class:`Value`. It writes
its equations into the walk and returns the degree of the result, or a :class:`Value` that stays a view of a parameter
(a list of either, for an operator with several results; those it leaves out are constant). An operator without a rule
is opaque: what enters it must not change at all (degree zero), which can lose a symmetry but never invents one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from torch import Tensor

from .carriers import Shift, by_carrier, moved, through, varying
from .degrees import Degree, Ids, Part, System, aligned, changed, merge, scaled

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
PASSES_SHIFTS: set[str] = set()
SAME = ("clone", "_to_copy", "to", "type_as", "alias", "contiguous", "lift_fresh_copy", "positive")
# Operators that look at the shape or type of their input, not at its values.
VALUES_UNSEEN = frozenset([
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_empty_strided", "sym_size", "_assert_tensor_metadata", "_assert_scalar",
])  # fmt: skip


@dataclass
class Value:
    """A tensor in the walk: what the action does to it, to first order.

    Attributes
    ----------
    shape, degree, shift
        An entry x changes by d x + s. What depends on no parameter has degree and shift ``()``, that is zero.
    root
        The parameter that the tensor is a view of.
    fill
        The number that all entries have, if that is known.
    total
        An axis and what the entries sum to along it, if that is known: 1 after a softmax, 0 after a bare layer norm.
    key
        Equal for two tensors only if their entries are equal.
    """

    shape: tuple[int, ...]
    degree: Degree = ()
    root: str | None = None
    shift: Shift = ()
    fill: float | None = None
    total: tuple[int, float] | None = None
    key: int = 0

    def moved(self, change: Callable[[Ids], Ids], shape: tuple[int, ...] | None = None) -> Value:
        """The tensor after an operation that moves entries about; `change` does so to an array of the same rank."""
        degree, shift = changed(self.degree, change), moved(self.shift, change)
        return replace(self, shape=self.shape if shape is None else shape, degree=degree, shift=shift, total=None)

    def broadcast(self, rank: int) -> Value:
        """With new axes of size 1 in front."""
        return self.moved(lambda ids: ids.reshape((1,) * (rank - ids.ndim) + ids.shape))

    def along(self, axis: int, rank: int) -> Value:
        """A vector laid along one of `rank` axes."""
        return self.moved(lambda ids: ids.reshape([ids.size if k == axis % rank else 1 for k in range(rank)]))


@dataclass
class Walk:
    """State of one walk over a graph.

    Attributes
    ----------
    system
        The equations.
    used
        Parameters whose first product has been seen (it fixes how their degree is shared out among their axes).
    epsilons
        Where an epsilon was met, and the unknowns whose laws it breaks a little.
    notes
        What could not be decided, in sentences; `unknown` are the operators without a rule among them.
    marks
        Unknowns that met an operation with which only diagonal matrices commute.
    tokens
        Unknowns, flat, with a token for each: a matrix law joins only laws whose tokens agree in every entry.
    weights
        The model's parameters by name: a padding row tells by its value whether it may be scaled.
    site, operator, target, shape
        Of the operator at hand: its module, its name, itself, and the shape (or list of shapes) of its result.
    """

    system: System = field(default_factory=System)
    used: set[str] = field(default_factory=set)
    epsilons: list[tuple[str, Ids]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    marks: list[Ids] = field(default_factory=list)
    tokens: list[tuple[Ids, Ids]] = field(default_factory=list)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    site: str = ""
    operator: str = ""
    target: Any = None
    shape: Any = ()
    _numbers: dict[Hashable, int] = field(default_factory=dict)
    _equated: dict[Hashable, Any] = field(default_factory=dict)

    def call(self, target: Any, name: str, shape: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The value (or list of values) of an operator, by its rule."""
        before = self.target, self.operator, self.shape
        self.target, self.operator, self.shape = target, name, shape
        given = [*args, *kwargs.values()]
        found = RULES.get(name, opaque)
        # only where something would have been changed is it worth a note
        if name not in RULES and any(value.degree or value.shift for value in values_in(given)):
            self.hold_fixed(name)
        if name not in PASSES_SHIFTS:
            self.still(given)
        result = found(self, *args, **kwargs)
        if name in SAME and isinstance(args[0], Value):
            self.target, self.operator, self.shape = before
            return replace(result, key=args[0].key)
        random = any(word in name for word in ("dropout", "rand", "bernoulli", "empty"))
        made = (name, self.new() if random else _token(given))
        several = isinstance(shape, list)
        results = list(zip_longest(shape, result if isinstance(result, list) else [result], fillvalue=()))
        out = []
        for number, (own, one) in enumerate(results if several else [(shape, result)]):
            value = one if isinstance(one, Value) else Value(own, one)
            out.append(replace(value, key=self.number((made, number))))
        self.target, self.operator, self.shape = before
        return out if several else out[0]

    def number(self, thing: Hashable) -> int:
        """A number for each different thing."""
        return self._numbers.setdefault(thing, len(self._numbers) + 1)

    def new(self) -> int:
        """A number that nothing else has."""
        return self.number(("new", len(self._numbers)))

    def hold_fixed(self, name: str) -> None:
        """Note, once, that there is no rule for an operator."""
        if name not in self.unknown:
            self.unknown.add(name)
            self.notes.append(f"operator {name} at {self.site or 'the top'}: no rule, what enters it was held fixed")

    def take_for_alike(self, x: Value) -> None:
        """Note that all entries of a tensor must change alike, though an operator may pick some."""
        if x.degree or x.shift:
            site = self.site or "the top"
            self.notes.append(f"operator {self.operator} at {site}: the entries that it picks from were held alike")

    def eps(self, degree: Degree) -> None:
        """An epsilon at this site breaks the laws of these unknowns a little."""
        self.epsilons += [(self.site, part.ids) for part in degree]

    def diagonal(self, degree: Degree) -> Degree:
        """Only a diagonal matrix commutes with the operation at this site; returns the degree."""
        self.marks += [part.ids for part in degree]
        return degree

    def equal(self, a: Degree, b: Degree = ()) -> None:
        """Two degrees agree entry by entry; without the second, the first is zero."""
        self.system.equate([*a, *scaled(b, -1.0)], self.site)

    def fix(self, *values: Any) -> None:
        """The values must not change under the action."""
        self.fix_degree(*values)
        self.still(values)

    def fix_degree(self, *values: Any) -> None:
        """The values must not be scaled."""
        for value in values_in(values):
            self.equal(value.degree)

    def still(self, *values: Any) -> None:
        """The values must not be shifted."""
        for value in values_in(values):
            for parts in by_carrier(value.shift):
                self._equate_once(parts)

    def forget(self, shift: Shift, axes: Iterable[int]) -> Shift:
        """A shift must be the same along `axes`; returned with size 1 there."""
        wanted, out = {axis + 1 for axis in axes}, list[Part]()

        def firsts_of(ids: Ids) -> Ids:
            return ids[tuple(slice(1 if k in wanted else None) for k in range(ids.ndim))]

        for parts in by_carrier(shift):
            if {axis + 1 for axis in varying(parts[0])} & wanted:  # its carrier is not
                self._equate_once(parts)
                continue
            if any(part.axes & wanted for part in parts):
                self._equate_once(parts, firsts_of)
            out += changed(parts, firsts_of)
        return merge(out)

    def averaged(self, shift: Shift, axes: Sequence[int]) -> Shift:
        """The mean of a shift over axes, with size 1 there; where the carrier differs along them, the shift itself."""
        places, out = [axis + 1 for axis in axes], list[Part]()
        for part in shift:
            if not part.axes & set(places) or varying(part) & set(axes):
                out.append(part)
                continue
            kept = [1 if axis in places else size for axis, size in enumerate(part.ids.shape)]
            mean = self.system.fresh(kept)  # an axis of size 1 has equal entries, of which the mean is any
            rows = np.moveaxis(part.ids, places, range(-len(places), 0)).reshape(mean.size, -1)
            self.system.combine([*rows.T, mean.ravel()], [1.0] * rows.shape[1] + [-float(rows.shape[1])])
            out.append(replace(part, ids=mean))
        return tuple(out)

    def _equate_once(self, parts: Sequence[Part], change: Callable[[Ids], Ids] | None = None) -> None:
        """Parts are zero, or equal to themselves after a change; once each, as a residual stream passes many norms."""
        after = () if change is None else changed(parts, change)
        # told apart by where in memory they lie
        ids = [(part.coef, part.ids.__array_interface__["data"], part.ids.strides) for part in (*parts, *after)]
        shapes = [part.ids.shape for part in (*parts, *after)]
        if (key := (tuple(ids), tuple(shapes))) not in self._equated:
            self._equated[key] = parts  # kept, so that their memory is not used again
            self.system.equate([*parts, *scaled(after, -1.0)], self.site)

    def through(
        self, x: Value, before: str, after: str, factor: Value | Hashable, varies: Mapping[str, int],
        total: float | None = None, coef: float = 1.0,
    ) -> Shift:  # fmt: skip
        """The shift of x after a product with a factor (see ``carriers.through``)."""
        key = ("value", factor.key) if isinstance(factor, Value) else factor
        return scaled(through(x.shift, before, after, key, varies, self.number, total), coef)

    def uniform(self, value: Value, axes: Sequence[int]) -> Degree:
        """The degree must not differ along `axes`; returned with size 1 there."""
        wanted = {axis % len(value.shape) for axis in axes} if value.shape else set()
        touched = tuple(part for part in value.degree if part.axes & wanted)
        if not touched:
            return value.degree
        # size 1 along the wanted axes, whole along the others
        firsts = changed(touched, lambda ids: ids[tuple(slice(1 if k in wanted else None) for k in range(ids.ndim))])
        self.equal(touched, firsts)
        self.diagonal(touched)
        return merge([*(part for part in value.degree if not part.axes & wanted), *firsts])

    def match(self, *values: Value) -> Degree:
        """All addends have one degree, entry by entry after broadcasting; returned."""
        # what is zero has any degree
        degrees = [aligned(value.degree, len(self.shape)) for value in values if value.fill != 0]
        # the plainest form stands for all; a constant, whose degree has no parts, makes them zero
        best = min(degrees, key=lambda degree: sum(part.ids.size for part in degree), default=())
        for degree in degrees:
            if degree is not best:
                self.equal(degree, best)
        return best

    def sum_of(self, *terms: tuple[Value, float]) -> Shift:
        """The shift of a sum of tensors times numbers, broadcast to the result's shape."""
        parts = [scaled(value.broadcast(len(self.shape)).shift, coef) for value, coef in terms]
        return merge(part for shift in parts for part in shift)


def rule(*names: str, shifts: bool = False) -> Callable[[Rule], Rule]:
    """Enter a function into the table as the rule of these operators.

    Without `shifts` their arguments must not be shifted; such a function sees degrees only.
    """

    def keep(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        if shifts:
            PASSES_SHIFTS.update(names)
        return function

    return keep


def opaque(walk: Walk, *args: Any, **kwargs: Any) -> Degree:
    """The inputs must not change."""
    walk.fix(args, *kwargs.values())
    return ()


@rule(*VALUES_UNSEEN, "detach", shifts=True)
def _unseen(walk: Walk, *args: Any, **kwargs: Any) -> Degree:
    return ()


def values_in(items: Sequence[Any]) -> Iterator[Value]:
    """The values among arguments, those in lists included."""
    for item in items:
        if isinstance(item, Value):
            yield item
        elif isinstance(item, list | tuple):
            yield from values_in(item)


def _token(item: Any) -> Hashable:
    if isinstance(item, Value):
        return "value", item.key
    return tuple(map(_token, item)) if isinstance(item, list | tuple) else repr(item)


def letters(shape: Sequence[int], skip: str = "") -> str:
    """A letter for each axis, the last axis always having the same one."""
    names = [letter for letter in "abcdefghijlmnpqrstuvwxyz" if letter not in skip]
    return "".join(names[len(names) - len(shape) :])


def sizes(value: Value, names: str) -> dict[str, int]:
    """The sizes of a tensor's axes by letter, those along which it cannot differ left out."""
    return {letter: size for letter, size in zip(names, value.shape, strict=True) if size > 1}


def batch_statistics(operator: str, args: Sequence[Any]) -> bool:
    """Whether a batch or instance norm takes the batch's statistics: its first flag, unless its name says so."""
    flags = [value for value in args if isinstance(value, bool)]
    return "with_update" in operator or bool(flags and flags[0])


def statistics_axes(operator: str, rank: int) -> list[int]:
    """The axes over which a batch or instance norm takes statistics: examples and space, or space alone."""
    return [axis for axis in range(rank) if axis != 1 and (axis or operator != "instance_norm")]


@dataclass(frozen=True)
class Convolution:
    """The options of a convolution that matter here."""

    groups: int
    transposed: bool
    padded: bool

    @classmethod
    def of(cls, operator: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Convolution:
        """Read off the arguments: of aten's general convolution, or of the others.

        The general one is (x, w, b, stride, padding, dilation, transposed, output_padding, groups), a transposed one
        (x, w, b, stride, padding, output_padding, groups), the others (x, w, b, stride, padding, dilation, groups).
        """
        place = 8 if operator == "convolution" else 6
        groups = args[place] if len(args) > place else kwargs.get("groups", 1)
        transposed = "transpose" in operator or (operator == "convolution" and bool(args[6]))
        padding = args[4] if len(args) > 4 else kwargs.get("padding", 0)
        padded = bool(transposed or padding == "same" or (isinstance(padding, list | tuple) and any(padding)))
        return cls(groups, transposed, padded or (isinstance(padding, int) and padding != 0))
