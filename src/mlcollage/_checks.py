"""Checks of single arguments, called once, at the public door; each returns the value in the type that is wanted.

A refusal names the argument, what it must be and what it was: ``draws must be a whole number of at least 1, not 0.``
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

from mlcollage.errors import InvalidInput, UnknownName

T = TypeVar("T", bound=str)


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """A whole number (also numpy's), within bounds that are part of the range; ``True`` is not a number."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        raise InvalidInput(f"{name} must be a whole number{_bounds(least=least, most=most)}, not {value!r}.")
    return number


def real(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """A finite number within bounds; ``least`` and ``most`` are part of the range, ``above`` and ``below`` are not."""
    number = _float(value)
    outside = (
        not math.isfinite(number)
        or (least is not None and number < least)
        or (most is not None and number > most)
        or (above is not None and number <= above)
        or (below is not None and number >= below)
    )
    if outside:
        limits = _bounds(least=least, most=most, above=above, below=below)
        raise InvalidInput(f"{name} must be a finite number{limits}, not {value!r}.")
    return number


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    return real(name, value, above=0)


def probability(name: str, value: Any, *, inside: bool = True) -> float:
    """A number between 0 and 1, the ends excluded; ``inside=False`` allows them."""
    return real(name, value, above=0, below=1) if inside else real(name, value, least=0, most=1)


def choice(name: str, value: T, known: Iterable[str]) -> T:
    """One of the known names; a refusal lists them, the closest one first."""
    names = list(known)
    if not isinstance(value, str) or value not in names:
        same = [n for n in names if n.casefold() == str(value).casefold()]
        close = same or get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise UnknownName(f"{name} must be one of {', '.join(map(repr, names))}, not {value!r}{hint}")
    return value


def generator(value: Any) -> Any:
    """A generator of torch's, which keeps draws apart from the global random state."""
    import torch

    if not isinstance(value, torch.Generator):
        raise InvalidInput(
            f"generator is a {type(value).__name__}; give torch.Generator().manual_seed(0), the same one for all "
            "batches."
        )
    return value


def _float(value: Any) -> float:
    if isinstance(value, bool | str):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _bounds(
    *, least: float | None = None, most: float | None = None, above: float | None = None, below: float | None = None
) -> str:
    words = ((least, "of at least {:g}"), (above, "above {:g}"), (most, "at most {:g}"), (below, "below {:g}"))
    said = [text.format(limit) for limit, text in words if limit is not None]
    return f" {' and '.join(said)}" if said else ""
