"""Workloads from tables: CSV and Parquet files are read, and columns become features, labels and the split."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mlcollage.data._reading import SPLIT_NOTE, encode, encode_as, is_number, split_rows, standardize
from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput, MLCollageError

OPTIONS = ("target", "test", "split", "scale", "words", "sep", "na", "decimal", "thousands")
_SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|", "space": r"\s+"}
_LOOKED_AT = 100  # records that a separator is told by
_WORDS = 50  # different words of a column that are still one-hot encoded
_DATE = r"\s*(\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T\s].*)?|\d{1,2}:\d{2}(:\d{2}.*)?)\s*"
_UNIT = r"^\s*[-+]?\d[\d.,]*\s*([^\W\d_]{1,4})\s*$"
_MARKS = r"[\s%$€£,'_]"  # what numbers are written with


def read_table(path: Path, options: Mapping[str, str]) -> tuple[pd.DataFrame, str]:
    """A CSV or Parquet file, and a note on what was guessed; ``sep, na, decimal, thousands`` are for CSV."""
    try:
        table, note = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path, options)
    except MLCollageError:
        raise
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except Exception as error:  # the parsers and Arrow raise anything
        line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InvalidInput(f"{path} cannot be read as a table ({line}).") from error
    # What pandas wrote with its index has a column of row numbers without a name.
    numbers = [c for c in table if str(c).startswith("Unnamed: ") and list(table[c]) == list(table.index)]
    return table.drop(columns=numbers), note


def _parquet(path: Path) -> tuple[pd.DataFrame, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: dict[str, Callable[[Any], bool]] = {
        "lists or structures": pa.types.is_nested,
        "bytes": lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t) or pa.types.is_fixed_size_binary(t),
        "dates or times": pa.types.is_temporal,
    }
    for column in pq.read_schema(path):
        for what, holds in kinds.items():
            if holds(column.type):
                raise InvalidInput(
                    f"the column {column.name!r} of {path} holds {what} ({column.type}); turn them into columns of "
                    "numbers or words, or drop it."
                )
    table = pd.read_parquet(path)
    exact = [f.name for f in pq.read_schema(path) if pa.types.is_decimal(f.type) and f.name in table]
    return table.astype(dict.fromkeys(exact, float)), ""


def _csv(path: Path, options: Mapping[str, str]) -> tuple[pd.DataFrame, str]:
    given = options.get("sep")
    separators = [_SEPARATORS.get(given, given.replace("\\t", "\t"))] if given is not None else _SEPARATORS.values()
    if given is not None and len(given.replace("\\t", "\t")) != 1 and given not in _SEPARATORS:
        raise InvalidInput(f"option sep must be one character or one of {', '.join(_SEPARATORS)}; got {given!r}.")
    for key in ("decimal", "thousands"):
        if len(options.get(key, ",")) != 1:
            raise InvalidInput(f"option {key} must be one character; got {options[key]!r}.")
    heads = {sep: _head(path, sep) for sep in separators}
    # A separator fits if it cuts every record into as many fields as there are names.
    fits = {s: len(h[0]) for s, h in heads.items() if h and len(h[0]) > 1 and {len(r) for r in h} == {len(h[0])}}
    if len(fits) > 1:
        fits.pop(r"\s+", None)  # names and words may hold spaces
    names = {sep: name for name, sep in _SEPARATORS.items()}
    if len(fits) > 1:
        found = " or ".join(names[sep] for sep in fits)
        raise InvalidInput(f"the fields of {path} may be separated by {found}; add ?sep={names[next(iter(fits))]}.")
    sep = next(iter(fits), next(iter(separators)))
    _check_names(path, heads[sep])
    with path.open("rb") as binary:
        if any(b"\0" in part for part in iter(lambda: binary.read(1 << 20), b"")):  # pandas ends a field there
            raise InvalidInput(f"{path} holds zero bytes, so it is no text; write it as UTF-8 text.")
    table = pd.read_csv(
        path,
        sep=sep,
        na_values=options["na"].split(",") if "na" in options else None,
        decimal=options.get("decimal", "."),
        thousands=options.get("thousands"),
        skipinitialspace=True,
        low_memory=False,
    )
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first fields for names of rows
        raise InvalidInput(f"the records of {path} have more fields than its first line has names; name each column.")
    if len(table.columns) == 1:
        raise InvalidInput(
            f"{path} has the column {table.columns[0]!r} only; expected features and a label, or name what separates "
            "the fields: ?sep=semicolon."
        )
    return table, "" if given is not None or sep == "," else f" (separated by {names[sep]})"


def _head(path: Path, sep: str) -> list[list[str]]:
    """The first records; empty lines are no records."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        if sep == r"\s+":
            return list(islice((fields for line in stream if (fields := line.split())), _LOOKED_AT))
        rows = csv.reader(stream, delimiter=sep, skipinitialspace=True)
        return list(islice((row for row in rows if row), _LOOKED_AT))


def _check_names(path: Path, head: list[list[str]]) -> None:
    """Refuse a first line that holds data, and names that are there twice."""
    names, rows = head[0] if head else [], head[1:]
    numbers = [float(name) for name in names if is_number(name)]
    counted = len(numbers) > 1 and all(b - a == 1 for a, b in pairwise(numbers))
    columns = list(zip(*(row for row in rows if len(row) == len(names)), strict=True))
    like = [is_number(n) or n in column for n, column in zip(names, columns, strict=False)]
    # Pixels or years may be called 0, 1, 2, ...
    if len(names) > 1 and not counted and (2 * len(numbers) > len(names) or (len(rows) > 1 and like and all(like))):
        raise InvalidInput(
            f"the first line of {path} looks like data ({', '.join(names[:3])}, ...); add a first line that names the "
            "columns."
        )
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise InvalidInput(f"{path} has {names.count(twice[0])} columns called {twice[0]!r}; rename them.")


def from_table(table: pd.DataFrame, test: pd.DataFrame | None, options: Mapping[str, str], where: str) -> Labeled:
    """Make a workload of tables; its name is the note on the split."""
    if options.get("scale", "standard") not in ("standard", "none"):
        raise InvalidInput(f"option scale must be standard or none; got {options['scale']!r}.")
    if not len(table):
        raise InvalidInput(f"{where} has no rows; expected a row per sample.")
    if test is None and (column := _split_column(table, options, where)) is not None:
        words = table[column].astype(str).str.strip().str.lower()
        table, test = (table[words == part].drop(columns=column) for part in ("train", "test"))
    target = options.get("target", str(table.columns[-1]) if len(table.columns) else "")
    _check_columns(table, test, target, where)
    whole = table if test is None else pd.concat([table, test], ignore_index=True)
    if whole[target].isna().any():
        raise InvalidInput(
            f"{int(whole[target].isna().sum())} labels in the column {target!r} of {where} are missing; give them, or "
            "drop the rows."
        )
    # One-hot columns are those of both tables together.
    # X is (rows of both, columns); labels are encoded by the training rows alone.
    X, labels = _features(whole.drop(columns=target), options, where), whole[target].to_numpy()
    y, classes = encode(labels[: len(table)], f"the column {target!r} of {where}")
    if test is None:
        rows, test_rows = split_rows(y, classes, where)
        y, y_test = y[rows], y[test_rows]
    else:
        rows, test_rows = np.arange(len(table)), np.arange(len(table), len(whole))
        y_test = encode_as(labels[len(table) :], classes, where)
    parts = (X[rows], X[test_rows])
    if options.get("scale") != "none":
        parts = standardize(*parts)
    return Labeled.from_arrays(parts[0], y, parts[1], y_test, classes, name=SPLIT_NOTE if test is None else "")


def _split_column(table: pd.DataFrame, options: Mapping[str, str], where: str) -> str | None:
    """The column that says train or test: the one that is named, or one called ``split`` that holds ``train``."""
    column = options.get("split", "split")
    if column not in table:
        if "split" in options:
            raise InvalidInput(f"{where} has no column {column!r}; its columns are {_listed(table.columns)}.")
        return None
    words = set(table[column].astype(str).str.strip().str.lower())
    if "split" not in options and (options.get("target") == "split" or "train" not in words):
        return None
    if words != {"train", "test"}:
        raise InvalidInput(f"the column {column!r} of {where} holds {_listed(sorted(words))}; expected train and test.")
    return column


def _listed(names: Any) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def _check_columns(table: pd.DataFrame, test: pd.DataFrame | None, target: str, where: str) -> None:
    for part in (table, test):
        if part is not None and target not in part:
            raise InvalidInput(f"{where} has no column {target!r}; its columns are {_listed(part.columns)}.")
    if len(table.columns) < 2:
        raise InvalidInput(f"{where} has the column {target!r} only; expected features and a label.")
    if test is not None and list(test.columns) != list(table.columns):
        raise InvalidInput(f"the test table of {where} has other columns: {_listed(test.columns)}.")
    if test is not None and not len(test):
        raise InvalidInput(f"the test table of {where} is empty.")


def _features(table: pd.DataFrame, options: Mapping[str, str], where: str) -> NDArray[np.float64]:
    """Numbers as they are, truth values as 0 and 1, words one-hot."""
    missing = table.isna().sum()
    if missing.any():
        columns = ", ".join(f"{name} ({count})" for name, count in missing[missing > 0].items())
        raise InvalidInput(f"{where} has missing values in {columns}; fill or drop them first.")
    named = options["words"].split(",") if "words" in options else []
    if unknown := [name for name in named if name not in table]:
        raise InvalidInput(f"{where} has no feature {unknown[0]!r}; its features are {_listed(table.columns)}.")
    words = [name for name in table if name in named or not pd.api.types.is_numeric_dtype(table[name])]
    for name in words:
        if name not in named:
            _check_words(table[name], f"the column {name!r} of {where}", f"?words={name}", "decimal" in options)
        if (count := table[name].astype(str).nunique()) > _WORDS:
            raise InvalidInput(
                f"the column {name!r} of {where} holds {count} different words (at most {_WORDS} are one-hot encoded); "
                "drop it or turn it into numbers."
            )
    if words:
        table = pd.get_dummies(table.astype(dict.fromkeys(words, str)), columns=words)
    X = table.to_numpy(dtype=np.float64)
    if not np.isfinite(X).all():
        raise InvalidInput(f"{where} holds infinite values; clean it first.")
    return X


def _check_words(column: pd.Series[Any], where: str, option: str, decimal: bool) -> None:
    """Refuse words that mean numbers or dates; as words they would be one-hot encoded without their order."""
    text = column.astype(str)
    if pd.api.types.is_datetime64_any_dtype(column) or text.str.fullmatch(_DATE).all():
        raise InvalidInput(f"{where} holds dates or times such as {text.iloc[0]!r}; make them numbers, or drop it.")
    number = pd.to_numeric(text, errors="coerce").notna()
    if number.all() and (decimal or not isinstance(column.iloc[0], str)):
        raise InvalidInput(
            f"{where} holds numbers such as {text.iloc[0]!r} that were not read as numbers; leave out ?decimal= where "
            f"a point is written, keep whole numbers within 64 bits, or add {option}."
        )
    units = text.str.extract(_UNIT, expand=False)
    one = units.notna().all() and units.nunique() == 1  # 3 kg, 5 kg
    bare = text.str.strip().str.removesuffix(units.iloc[0]) if one else text
    plain = pd.to_numeric(bare.str.replace(_MARKS, "", regex=True), errors="coerce").notna()
    odd = text[~number]
    if len(odd) and plain.all():
        comma = "add ?decimal=, or, if it separates thousands, ?thousands=,"
        hint = comma if re.search(",", odd.iloc[0]) else f"write plain numbers, or add {option}"
        raise InvalidInput(f"{where} holds numbers written like {odd.iloc[0]!r}; {hint}.")
    if len(odd) and number.mean() >= 0.5:
        raise InvalidInput(
            f"{where} holds numbers and words such as {odd.iloc[0]!r}; if that marks a missing value, add "
            f"?na={odd.iloc[0]}; if all are words, add {option}."
        )
