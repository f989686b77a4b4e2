"""Checks of samples that all statistics share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlcollage.errors import InvalidInput

__all__ = ["Floats", "is_constant", "sample"]

Floats = npt.NDArray[np.float64]


def sample(values: npt.ArrayLike, name: str = "x", least: int = 2) -> Floats:
    """One finite value a replication unit (a seed), as a float64 vector of at least ``least`` entries."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise InvalidInput(
            f"{name} has shape {x.shape}; one value a seed was expected. Average what was repeated inside a seed "
            "(episodes, batches) first: the seed is the unit of replication."
        )
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x))
        raise InvalidInput(
            f"{name} has {len(bad)} values that are not finite (positions {', '.join(map(str, bad[:5]))}); "
            "decide what a failed run counts as before testing."
        )
    if len(x) < least:
        raise InvalidInput(
            f"{name} has {len(x)} value(s); at least {least} are needed: with fewer, variance is not identifiable."
        )
    return x


def is_constant(x: Floats, scale: float | None = None) -> bool:
    """Whether all values are equal up to rounding at the given scale (default: the largest magnitude in ``x``)."""
    scale = float(np.abs(x).max()) if scale is None else scale
    return bool(np.ptp(x) <= 1e-12 * scale)
