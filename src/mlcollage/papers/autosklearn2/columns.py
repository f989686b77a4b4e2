"""From the user's table to numbers and codes: what each column is, is decided once and kept.

The same values give the same rows, whatever type the column has: text, categories, nullable integers, Arrow.
"""

from __future__ import annotations

import datetime
import decimal
import numbers as number_kinds
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput

from .rows import TableRows

_PLAIN = re.compile(r"[-+]?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d)?)?")
_MARKS = ("", "?", "NA", "N/A", "n/a", "nan", "NaN", "null", "None")
_UNSEEN, _MISSING = -1, 0


@dataclass
class _Column:
    """How one column is read."""

    name: Any
    kind: str  # number, category, time, duration, dropped
    levels: dict[str, int] = field(default_factory=dict)  # code of each level, from 1; 0: missing, -1: unseen
    why: str = ""


class TableCoder:
    """Reads tables as the training table was read.

    Parameters
    ----------
    categorical
        Names (or places) of columns that hold categories although they hold numbers.

    Attributes
    ----------
    columns_ : list
        What was decided for each column.
    notes_ : list of str
        What a user should know: columns that were dropped or turned into numbers.

    Examples
    --------
    >>> table = pd.DataFrame({"size": ["1", "2", None, "4"], "color": ["red", "blue", "red", None]})
    >>> coder = TableCoder()
    >>> rows = coder.fit(table).transform(table)
    >>> rows.numbers.ravel().tolist(), rows.codes.ravel().tolist()
    ([1.0, 2.0, nan, 4.0], [2, 1, 2, 0])
    >>> coder.notes_
    ["the column 'size' holds numbers as text; they are read as numbers."]
    """

    def __init__(self, categorical: Sequence[Any] | None = None) -> None:
        self.categorical = categorical

    def fit(self, X: Any) -> TableCoder:
        """Decide what each column is."""
        self.notes_: list[str] = []
        self.sparse_ = sp.issparse(X)
        self.width_ = int(X.shape[1]) if hasattr(X, "shape") else 0
        self.columns_: list[_Column] = []
        named = set(self.categorical if self.categorical is not None else ())
        if self.sparse_:
            if named:
                raise InvalidInput("categorical columns of a sparse X cannot be told from numbers; give X as a table.")
            return self
        frame = as_frame(X)
        names = list(frame.columns)
        if not names:
            raise InvalidInput("X has no columns; 0 feature(s) are too few, give one at least.")
        twice = sorted({str(n) for n in names if names.count(n) > 1})
        if twice:
            raise InvalidInput(f"X has more than one column called {twice[0]!r}; rename them.")
        places = dict(enumerate(names))
        if unknown := [c for c in named if c not in names and c not in places]:
            raise InvalidInput(
                f"categorical names the column {unknown[0]!r}, which X does not have; it has {_few(names)}."
            )
        chosen = {c if c in names else places[c] for c in named}
        self.columns_ = [self._decide(frame[name], name, name in chosen) for name in names]
        if all(c.kind == "dropped" for c in self.columns_):
            raise InvalidInput(f"no column of X can be used: {'; '.join(c.why for c in self.columns_[:3])}.")
        self.width_ = len(names)
        return self

    def transform(self, X: Any) -> TableRows:
        """Read a table with the same columns, in any order."""
        if self.sparse_ or sp.issparse(X):
            if not sp.issparse(X):
                X = sp.csr_matrix(np.asarray(X, np.float64))
            if not self.sparse_:
                X = X.toarray()
            else:
                data = sp.csr_matrix(X, dtype=np.float64)
                if not np.isfinite(data.data).all():
                    raise InvalidInput("X has NaN or infinite values in its sparse data; replace them by numbers.")
                return TableRows.of(data)
        frame = as_frame(X)
        if not _has_names(X) and frame.shape[1] == len(self.columns_):
            frame = frame.set_axis([c.name for c in self.columns_], axis=1)
        twice = frame.columns[frame.columns.duplicated()]
        if wrong := [c.name for c in self.columns_ if c.name in twice]:
            raise InvalidInput(f"X has more than one column called {wrong[0]!r}; rename them.")
        lacking = [c.name for c in self.columns_ if c.name not in frame.columns and c.kind != "dropped"]
        if lacking:
            raise InvalidInput(
                f"X lacks the column {lacking[0]!r} that was there at fit; it has {_few(frame.columns)}."
            )
        numbers: list[NDArray[np.float64]] = []
        codes: list[NDArray[np.int64]] = []
        for column in self.columns_:
            if column.kind == "category":
                codes.append(self._codes(frame[column.name], column))
            elif column.kind != "dropped":
                numbers += self._numbers(frame[column.name], column)
        n = len(frame)
        return TableRows(
            np.column_stack(numbers) if numbers else np.empty((n, 0)),
            np.column_stack(codes) if codes else np.empty((n, 0), np.int64),
        )

    def names_of_parts(self) -> list[str]:
        """Names for messages: of the columns of the numbers, then of those of the codes."""
        width = {"number": 1, "duration": 1, "time": 4}  # a date has four numbers
        numbers = [repr(c.name) for c in self.columns_ for _ in range(width.get(c.kind, 0))]
        return numbers + [repr(c.name) for c in self.columns_ if c.kind == "category"]

    def _decide(self, values: pd.Series, name: Any, chosen: bool) -> _Column:
        kind = values.dtype
        if pd.api.types.is_complex_dtype(kind):
            raise InvalidInput(f"Complex data not supported: the column {name!r} holds complex numbers.")
        if values.isna().all():
            self.notes_.append(f"the column {name!r} is empty and was left out.")
            return _Column(name, "dropped", why=f"the column {name!r} is empty")
        if not chosen and pd.api.types.is_bool_dtype(kind) and not isinstance(kind, pd.CategoricalDtype):
            return _Column(name, "number")
        if not chosen and pd.api.types.is_numeric_dtype(kind):
            return _Column(name, "number")
        if not chosen and (pd.api.types.is_datetime64_any_dtype(kind) or isinstance(kind, pd.PeriodDtype)):
            return self._time(values, name)
        if not chosen and pd.api.types.is_timedelta64_dtype(kind):
            return _Column(name, "duration")
        keys = _keys(values, name)
        seen = keys.dropna()
        if not chosen and not isinstance(kind, pd.CategoricalDtype):
            if _all_numbers(values.dropna()):
                return _Column(name, "number")
            if values.dropna().map(lambda v: isinstance(v, datetime.date | np.datetime64)).all():
                return self._time(values, name)
            if values.dropna().map(lambda v: isinstance(v, datetime.timedelta | np.timedelta64)).all():
                return _Column(name, "duration")
            if seen.map(lambda t: t.strip() in _MARKS).all():
                self.notes_.append(f"the column {name!r} is empty and was left out.")
                return _Column(name, "dropped", why=f"the column {name!r} is empty")
            if seen.map(lambda t: _DATE.fullmatch(t) is not None).all() and _read_times(seen) is not None:
                self.notes_.append(f"the column {name!r} holds dates as text; they are read as dates.")
                return self._time(values, name)
            if seen.map(lambda t: t.strip() in _MARKS or _PLAIN.fullmatch(t.strip()) is not None).all():
                self.notes_.append(f"the column {name!r} holds numbers as text; they are read as numbers.")
                return _Column(name, "number")
            if len(seen) > 50 and seen.nunique() == len(seen):
                self.notes_.append(f"the column {name!r} has another text in every row and was left out.")
                return _Column(name, "dropped", why=f"the column {name!r} has another text in every row")
        levels = sorted(seen.unique())
        return _Column(name, "category", {level: i + 1 for i, level in enumerate(levels)})

    def _time(self, values: pd.Series, name: Any) -> _Column:
        when = _read_times(values.dropna())
        if when is not None and when.nunique() > 2 and (when.is_monotonic_increasing or when.is_monotonic_decreasing):
            self.notes_.append(
                f"the rows are in the order of the column {name!r}, and the split is random, so the score is not that "
                "of a later time; for that give blocks of time as groups."
            )
        return _Column(name, "time")

    def _codes(self, values: pd.Series, column: _Column) -> NDArray[np.int64]:
        keys = _keys(values, column.name)
        codes = keys.map(lambda k: _MISSING if k is None or k is pd.NA or k != k else column.levels.get(k, _UNSEEN))
        found = codes.to_numpy(np.int64, na_value=_MISSING)
        if new := int((found == _UNSEEN).sum()):
            warnings.warn(f"the column {column.name!r} has {new} values that were not seen at fit.", stacklevel=5)
        return found

    def _numbers(self, values: pd.Series, column: _Column) -> list[NDArray[np.float64]]:
        if column.kind == "time":
            when = None if _is_number(values) and not values.isna().all() else _read_times(values)
            if when is None:
                raise InvalidInput(f"the column {column.name!r} held dates at fit and holds {values.dtype} now.")
            gone = when.isna().to_numpy()
            days = (when - pd.Timestamp("1970-01-01", tz="UTC")) / pd.Timedelta(days=1)
            parts = [days, when.dt.month, when.dt.day_of_week, when.dt.hour]
            return [np.where(gone, np.nan, np.asarray(p, np.float64)) for p in parts]
        if column.kind == "duration":
            try:
                if _is_number(values) and not values.isna().all():
                    raise ValueError  # numbers have no unit
                return [np.asarray(pd.to_timedelta(values).dt.total_seconds(), np.float64)]
            except (TypeError, ValueError) as error:
                raise InvalidInput(
                    f"the column {column.name!r} held durations at fit and holds {values.dtype} now."
                ) from error
        if _is_number(values):
            found = values.to_numpy(np.float64, na_value=np.nan)
        else:
            text = values.map(lambda v: v.strip() if isinstance(v, str) else v)
            text = text.astype(object).where(~text.isin(_MARKS), None)
            found = np.array([np.nan if v is None or v is pd.NA else _float(v, column.name) for v in text], np.float64)
        if np.isinf(found).any():
            raise InvalidInput(
                f"Input X contains infinity: {int(np.isinf(found).sum())} values of the column {column.name!r}; "
                "replace them, or make them missing."
            )
        return [found]


def _float(value: Any, name: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"the column {name!r} held numbers at fit and holds {str(value)[:50]!r} now.") from error


def as_frame(X: Any) -> pd.DataFrame:
    """A table as a DataFrame: pandas, Arrow, polars, or an array; no copy where none is needed."""
    if isinstance(X, pd.DataFrame):
        if isinstance(X.columns, pd.MultiIndex):
            raise InvalidInput("X has columns of several levels; join their names: X.columns = ['_'.join(c) ...].")
        return X
    if hasattr(X, "to_pandas"):
        return as_frame(X.to_pandas())
    array = np.asarray(X)
    if array.ndim != 2:
        raise InvalidInput(
            f"Expected 2D array, got an array of {array.ndim} dimensions; X must be (rows, columns). Reshape your data."
        )
    return pd.DataFrame(array) if array.dtype.kind != "O" else pd.DataFrame(array).infer_objects()


def _keys(values: pd.Series, name: Any) -> pd.Series:
    """The text by which a value is known: 1, 1.0 and "1" are one category; None where it is missing."""
    odd = [v for v in values.dropna().head(1000) if isinstance(v, list | dict | set | tuple | np.ndarray)]
    if odd:
        raise InvalidInput(
            f"the column {name!r} of X holds {type(odd[0]).__name__}s in its cells; give one value each."
        )

    if any(isinstance(v, complex) for v in values.dropna().head(1000)):
        raise InvalidInput(f"Complex data not supported: the column {name!r} holds complex numbers.")

    def key(v: Any) -> str | None:
        if v is None or v is pd.NA or v is pd.NaT or (isinstance(v, float) and v != v):
            return None
        if isinstance(v, bool | np.bool_):
            return str(bool(v))
        if isinstance(v, number_kinds.Integral):
            return str(int(v))
        if isinstance(v, number_kinds.Real | decimal.Decimal) and float(v).is_integer():
            return str(int(float(v)))
        return str(v)

    return pd.Series([key(v) for v in values.astype(object)], index=values.index, dtype=object)


def _is_number(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values.dtype) or pd.api.types.is_bool_dtype(values.dtype)


def _has_names(X: Any) -> bool:
    return hasattr(X, "columns") or hasattr(X, "column_names") or hasattr(X, "to_pandas")


def _read_times(values: pd.Series) -> pd.Series | None:
    """Points in time in UTC, NaT where missing; None where the values are no dates."""
    if isinstance(values.dtype, pd.PeriodDtype):
        values = values.dt.to_timestamp()
    try:
        if values.dtype == object or pd.api.types.is_string_dtype(values.dtype):
            values = values.astype(object).where(values.notna(), None)
            return pd.to_datetime(values, utc=True, format="ISO8601" if _any_text(values) else None)
        return pd.to_datetime(values, utc=True)
    except (TypeError, ValueError, OverflowError):
        return None


def _any_text(values: pd.Series) -> bool:
    return any(isinstance(v, str) for v in values)


def _all_numbers(values: pd.Series) -> bool:
    return all(isinstance(v, number_kinds.Real | decimal.Decimal | bool | np.bool_) for v in values)


def _few(names: Any) -> str:
    shown = [repr(n) for n in names]
    return ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")
