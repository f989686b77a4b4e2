"""What a run yields: a tidy table of numbers and named arrays for pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlcollage.errors import InvalidInput

_ARRAY_NAME = re.compile(r"[A-Za-z0-9_.\-]+")


class Measurements:
    """Numbers (rows of metric, step, value and free key columns) and named arrays.

    Rows carry the run's own ``arm`` and ``seed`` unless they name others, as a run that trains
    many replicas at once does.

    Examples
    --------
    >>> m = Measurements()
    >>> m.add("accuracy", 0.93, step=100, task=1)
    >>> m.add("accuracy", 0.95, step=200, task=1, seed=3)
    >>> m.array("weights", np.zeros((2, 3)))
    >>> m.table["value"].tolist(), m.table["task"].tolist()
    ([0.93, 0.95], [1, 1])
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self.arrays: dict[str, npt.NDArray[Any]] = {}

    def add(self, metric: str, value: float, *, step: int = 0, **keys: str | int | float | bool) -> None:
        """Record one number. ``step`` counts whatever the study counts; ``keys`` become columns."""
        # One row per number (a long table), so that metrics may have different free columns.
        self._rows.append({"metric": metric, "step": int(step), "value": float(value), **keys})

    def add_all(self, values: Mapping[str, float], *, step: int = 0, **keys: str | int | float | bool) -> None:
        """Record several metrics that share step and keys."""
        for metric, value in values.items():
            self.add(metric, value, step=step, **keys)

    def array(self, name: str, values: npt.ArrayLike) -> None:
        """Keep an array (an image, a matrix, a trajectory) under a name."""
        if not _ARRAY_NAME.fullmatch(name):
            raise InvalidInput(f"array name {name!r} must be made of letters, digits, '_', '-' and '.'.")
        array = np.asarray(values)
        # Objects would be pickled, and what is pickled is never loaded.
        if array.dtype.hasobject:
            raise InvalidInput(f"array {name!r} holds Python objects; only numbers, bools and strings are stored.")
        self.arrays[name] = array

    @property
    def table(self) -> pd.DataFrame:
        """All rows as a DataFrame with at least the columns metric, step and value."""
        return pd.DataFrame(self._rows, columns=None if self._rows else ["metric", "step", "value"])

    def __len__(self) -> int:
        return len(self._rows)
