"""What is known while a graph is walked, and the table of rules by which operators are passed.

A rule is a function ``(walk, *args, **kwargs)`` of an operator's arguments, tensors given as :class:`Value`. It writes
its equations into the walk and returns the degree of the result, or a :class:`Value` that stays a view of a parameter
(a list of either, for an operator with several results; those it leaves out are constant). An operator without a rule
is opaque: what enters it must not change at all (degree zero), which can lose a symmetry but never invents one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from .degrees import Degree, Ids, System, aligned, changed, merge, scaled

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
# Operators that look at the shape or type of their input, not at its values.
VALUES_UNSEEN = frozenset([
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_empty_strided", "sym_size", "_assert_tensor_metadata", "_assert_scalar",
])  # fmt: skip


@dataclass
class Value:
    """A tensor in the walk: its shape, its degree, and the parameter that it is a view of.

    What depends on no parameter has degree ``()``, that is zero.
    """

    shape: tuple[int, ...]
    degree: Degree = ()
    root: str | None = None


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
    site: str = ""
    operator: str = ""
    target: Any = None
    shape: Any = ()

    def call(self, target: Any, name: str, shape: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The value (or list of values) of an operator, by its rule."""
        self.target, self.operator, self.shape = target, name, shape
        found = RULES.get(name, opaque)
        # only where something would have been scaled is it worth a note
        if name not in RULES and any(value.degree for value in _values([*args, *kwargs.values()])):
            self.hold_fixed(name)
        result = found(self, *args, **kwargs)
        if not isinstance(shape, list):
            return result if isinstance(result, Value) else Value(shape, result)
        results = zip_longest(shape, result if isinstance(result, list) else [result], fillvalue=())
        return [one if isinstance(one, Value) else Value(own, one) for own, one in results]

    def hold_fixed(self, name: str) -> None:
        """Note, once, that there is no rule for an operator."""
        if name not in self.unknown:
            self.unknown.add(name)
            self.notes.append(f"operator {name} at {self.site or 'the top'}: no rule, what enters it was held fixed")

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
        for value in _values(values):
            self.equal(value.degree)

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
        degrees = [aligned(value.degree, len(self.shape)) for value in values]
        # the plainest form stands for all; a constant, whose degree has no parts, makes them zero
        best = min(degrees, key=lambda degree: sum(part.ids.size for part in degree), default=())
        for degree in degrees:
            if degree is not best:
                self.equal(degree, best)
        return best

    def view(self, x: Value, degree: Degree | None = None) -> Value:
        """The result is `x`, or a view of it with this degree."""
        return Value(self.shape, x.degree if degree is None else degree, x.root)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function into the table as the rule of these operators."""

    def keep(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return keep


def opaque(walk: Walk, *args: Any, **kwargs: Any) -> Degree:
    """The inputs must not change."""
    walk.fix(args, *kwargs.values())
    return ()


@rule(*VALUES_UNSEEN)
def _unseen(walk: Walk, *args: Any, **kwargs: Any) -> Degree:
    return ()


def _values(items: Sequence[Any]) -> Iterator[Value]:
    """The values among arguments, those in lists included."""
    for item in items:
        if isinstance(item, Value):
            yield item
        elif isinstance(item, list | tuple):
            yield from _values(item)


def batch_statistics(operator: str, args: Sequence[Any]) -> bool:
    """Whether a batch or instance norm takes the batch's statistics: its first flag, unless its name says so."""
    flags = [value for value in args if isinstance(value, bool)]
    return "with_update" in operator or bool(flags and flags[0])


def statistics_axes(operator: str, rank: int) -> list[int]:
    """The axes over which a batch or instance norm takes statistics: examples and space, or space alone."""
    return [axis for axis in range(rank) if axis != 1 and (axis or operator != "instance_norm")]


def convolution_groups(operator: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The number of groups, which stands ninth in aten's general convolution and seventh in the others."""
    # convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups)
    position = 8 if operator == "convolution" else 6
    return args[position] if len(args) > position else kwargs.get("groups", 1)
