"""Checks of data, and small conventions, that all statistics share."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from mlcollage._checks import choice, probability
from mlcollage.errors import InvalidInput

ROUNDING = 1e-12
"""Values closer than this share of their magnitude are equal: what is left is rounding. The one tolerance of all."""

Floats = npt.NDArray[np.float64]
Rng = np.random.Generator | int  # a generator, or a seed of one
Alternative = Literal["greater", "less", "two-sided"]


def _floats(values: npt.ArrayLike, name: str) -> Floats:
    try:
        if np.iscomplexobj(values):
            raise TypeError("numpy would drop the imaginary part")
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name} must hold real numbers, in rows of one length; numpy says: {error}.") from error


def finite(values: npt.ArrayLike, name: str = "x") -> Floats:
    """Finite values of any shape, at least one of them, as float64."""
    x = _floats(values, name)
    if not x.size:
        raise InvalidInput(f"{name} is empty; at least one value is needed.")
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x))
        raise InvalidInput(
            f"{name} has {len(bad)} values that are not finite (positions {', '.join(map(str, bad[:5]))}); "
            "decide what a failed run counts as, e.g. the worst value."
        )
    return x


def sample(values: npt.ArrayLike, name: str = "x", least: int = 2) -> Floats:
    """One finite value per replication unit (a seed), as a float64 vector of at least ``least`` entries."""
    x = _floats(values, name)
    if x.ndim != 1:  # episodes or tasks as a second axis would pass for more seeds than there are
        raise InvalidInput(
            f"{name} has shape {x.shape}; one value per seed was expected. Average what was repeated inside a seed "
            "(episodes, batches) first: the seed is the unit of replication."
        )
    if len(x) < least:
        raise InvalidInput(f"{name} has {len(x)} value(s); at least {least} are needed to estimate a variance.")
    return finite(x, name)


def pair(
    x: npt.ArrayLike, y: npt.ArrayLike, names: tuple[str, str] = ("x", "y"), least: int = 2
) -> tuple[Floats, Floats]:
    """Two samples in which entries at one position belong together."""
    a, b = sample(x, names[0], least), sample(y, names[1], least)
    if len(a) != len(b):
        raise InvalidInput(f"{names[0]} has {len(a)} values and {names[1]} {len(b)}; they belong together one by one.")
    return a, b


def table(values: npt.ArrayLike, name: str, shape: str, rows: int = 1, columns: int = 1) -> Floats:
    """A finite matrix of at least so many rows and columns; ``shape`` says in words what they are."""
    x = _floats(values, name)
    if x.ndim != 2 or len(x) < rows or x.shape[1] < columns:
        raise InvalidInput(f"{name} has shape {x.shape}; ({shape}) with at least ({rows}, {columns}) was expected.")
    return finite(x, name)


def is_constant(x: Floats, scale: float | None = None) -> bool:
    """Whether all values are equal up to rounding at the given scale (default: the largest magnitude in ``x``)."""
    scale = float(np.abs(x).max()) if scale is None else scale
    return bool(np.ptp(x) <= ROUNDING * scale)


def difference(x: npt.ArrayLike, y: npt.ArrayLike) -> Floats:
    """``x - y``, broadcast; 0 where the two are equal up to rounding, so that ranks and signs see a tie."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    d = np.asarray(a - b, dtype=np.float64)
    # An infinite difference would lie within a share of infinity.
    return np.where(np.isfinite(d) & (np.abs(d) <= ROUNDING * np.maximum(np.abs(a), np.abs(b))), 0.0, d)


def levels(x: Floats) -> npt.NDArray[np.int64]:
    """Values as whole numbers in their order along the last axis, those equal up to rounding being one level.

    The scale is the largest magnitude along the axis. Ranks of levels are ranks of the values, ties included.
    """
    scale = np.abs(x).max(axis=-1, keepdims=True)
    order = np.argsort(x, axis=-1, kind="stable")
    steps = np.diff(np.take_along_axis(x, order, axis=-1), axis=-1, prepend=-np.inf) > ROUNDING * scale
    found = np.empty(x.shape, dtype=np.int64)
    np.put_along_axis(found, order, steps.cumsum(axis=-1), axis=-1)
    return found


def tail(level: float) -> float:
    """Probability beyond each end of a central interval whose coverage is ``level``."""
    return (1 - probability("level", level)) / 2


def by_side(alternative: Alternative, above: float, below: float) -> float:
    """The p value of an alternative, given those of ``greater`` and ``less``: two-sided is twice the smaller."""
    choice("alternative", alternative, ("greater", "less", "two-sided"))
    return float({"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative])
