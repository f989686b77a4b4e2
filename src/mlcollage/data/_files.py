"""Workloads from one file: ``.npz`` arrays, CSV and Parquet tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mlcollage.data._reading import (
    SPLIT_NOTE,
    check_options,
    encode,
    encode_as,
    file_hash,
    read_npz,
    split_rows,
    standardize,
)
from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput, MissingFile

__all__ = ["SUFFIXES", "from_table", "load"]

SUFFIXES = (".npz", ".csv", ".parquet")
_WORDS = 50  # different words of a column that are still one-hot encoded
_KEYS = {  # the first name that is there wins
    "X": ("x_train", "x", "train_images", "images", "data"),
    "y": ("y_train", "y", "train_labels", "labels", "target"),
    "X_test": ("x_test", "test_images"),
    "y_test": ("y_test", "test_labels"),
}


def load(name: str | Path, options: Mapping[str, str]) -> Labeled:
    """Load ``.npz``, ``.csv`` or ``.parquet``."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise MissingFile(f"there is no file {name}; it was taken from --workload.")
    if path.suffix.lower() == ".npz":
        check_options(options, (), str(path))
        return _npz(path)
    check_options(options, ("target", "test", "scale"), str(path))
    table, paths = read_table(path), [path]
    test = None
    if "test" in options:
        other = Path(options["test"]).expanduser()
        other = other if other.is_file() else path.parent / options["test"]
        if not other.is_file():
            raise MissingFile(f"there is no file {options['test']}; it was named as the test set of {path}.")
        test = read_table(other)
        paths.append(other)
    found = from_table(table, test, options, str(path))
    return replace(found, name=path.name + found.name, fingerprint=file_hash(*paths, extra=str(options)))


def _npz(path: Path) -> Labeled:
    found = read_npz(path)
    held = {name: next((found[key] for key in keys if key in found), None) for name, keys in _KEYS.items()}
    names = ", ".join(found) or "nothing"
    if held["X"] is None or held["y"] is None:
        raise InvalidInput(f"{path} must hold the arrays X and y (and X_test, y_test); it holds {names}.")
    if (held["X_test"] is None) != (held["y_test"] is None):
        raise InvalidInput(f"{path} must hold both X_test and y_test, or neither; it holds {names}.")
    X = _inputs(held["X"], f"X of {path}")
    y, classes = encode(held["y"], str(path))
    _same_length(X, y, str(path))
    if held["X_test"] is None or held["y_test"] is None:
        rows, test_rows = split_rows(y, classes, str(path))
        X, y, X_test, y_test, note = X[rows], y[rows], X[test_rows], y[test_rows], SPLIT_NOTE
    else:
        X_test, note = _inputs(held["X_test"], f"X_test of {path}"), ""
        y_test = encode_as(held["y_test"], classes, str(path))
        _same_length(X_test, y_test, f"the test set of {path}")
        if X_test.shape[1:] != X.shape[1:]:
            raise InvalidInput(f"inputs of {path} are {X.shape[1:]} in X and {X_test.shape[1:]} in X_test.")
    return Labeled.from_arrays(X, y, X_test, y_test, classes, name=path.name + note, fingerprint=file_hash(path))


def _same_length(X: NDArray, y: NDArray, where: str) -> None:
    if len(X) != len(y):
        raise InvalidInput(f"{where} has {len(X)} inputs and {len(y)} labels; expected one label per input.")


def _inputs(X: NDArray, where: str) -> NDArray:
    """Float32 rows, or images ``(n, c, h, w)``; whole-number pixels over 255."""
    if X.dtype.kind not in "biuf":
        raise InvalidInput(f"{where} is of type {X.dtype}; expected numbers.")
    if X.ndim not in (2, 3, 4) or 0 in X.shape:
        raise InvalidInput(
            f"{where} has shape {X.shape}; expected (n, features), (n, h, w), (n, h, w, c) or (n, c, h, w)."
        )
    if X.dtype.kind == "f" and not np.isfinite(X).all():
        bad = np.flatnonzero(~np.isfinite(X).reshape(len(X), -1).all(axis=1))
        raise InvalidInput(
            f"{where} holds NaN or infinity in {len(bad)} samples, the first is {bad[0]}; clean it first."
        )
    if X.ndim == 2:
        return X.astype(np.float32)
    if X.ndim == 3:
        X = X[:, None]  # (n, 1, h, w)
    elif X.shape[1] not in (1, 3, 4):
        if X.shape[3] not in (1, 3, 4):
            raise InvalidInput(f"{where} has shape {X.shape}; images need 1, 3 or 4 channels, second or last.")
        X = X.transpose(0, 3, 1, 2)  # (n, h, w, c) to (n, c, h, w)
    # Whole numbers up to 1 are masks, not pixels.
    pixels = X.dtype.kind in "iu" and X.max() > 1
    if pixels and not 0 <= X.min() <= X.max() <= 255:
        raise InvalidInput(f"{where} has whole-number pixels from {X.min()} to {X.max()}; expected 0 to 255.")
    return (X / np.float32(255 if pixels else 1)).astype(np.float32)


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV or Parquet file."""
    try:
        table = pd.read_parquet(path) if path.suffix.lower() == ".parquet" else pd.read_csv(path)
    except (ValueError, OSError, UnicodeDecodeError) as error:  # parser and Arrow errors are ValueErrors
        raise InvalidInput(f"{path} cannot be read as a table ({str(error).splitlines()[0]}).") from error
    # What pandas wrote with its index has a column of row numbers without a name.
    numbers = [c for c in table if str(c).startswith("Unnamed: ") and list(table[c]) == list(table.index)]
    return table.drop(columns=numbers)


def from_table(table: pd.DataFrame, test: pd.DataFrame | None, options: Mapping[str, str], where: str) -> Labeled:
    """Make a workload of tables; its name is the note on the split."""
    if options.get("scale", "standard") not in ("standard", "none"):
        raise InvalidInput(f"option scale must be standard or none; got {options['scale']!r}.")
    marked = "split" in table and options.get("target") != "split" and set(table["split"]) == {"train", "test"}
    if test is None and marked:
        table, test = (table[table["split"] == part].drop(columns="split") for part in ("train", "test"))
    target = options.get("target", str(table.columns[-1]) if len(table.columns) else "")
    _check_columns(table, test, target, where)
    whole = table if test is None else pd.concat([table, test], ignore_index=True)
    if whole[target].isna().any():
        raise InvalidInput(f"{int(whole[target].isna().sum())} labels in the column {target!r} of {where} are missing.")
    # One-hot columns are those of both tables together.
    # X is (rows of both, columns); labels are encoded by the training rows alone.
    X, labels = _features(whole.drop(columns=target), where), whole[target].to_numpy()
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


def _check_columns(table: pd.DataFrame, test: pd.DataFrame | None, target: str, where: str) -> None:
    for part in (table, test):
        if part is not None and target not in part:
            raise InvalidInput(
                f"{where} has no column {target!r}; its columns are {', '.join(map(str, part.columns))}."
            )
    if len(table.columns) < 2:
        raise InvalidInput(f"{where} has the column {target!r} only; expected features and a label.")
    if test is not None and list(test.columns) != list(table.columns):
        raise InvalidInput(f"the test table of {where} has other columns: {', '.join(map(str, test.columns))}.")
    if test is not None and not len(test):
        raise InvalidInput(f"the test table of {where} is empty.")


def _features(table: pd.DataFrame, where: str) -> NDArray[np.float64]:
    """Numbers as they are, truth values as 0 and 1, words one-hot."""
    missing = table.isna().sum()
    if missing.any():
        columns = ", ".join(f"{name} ({count})" for name, count in missing[missing > 0].items())
        raise InvalidInput(f"{where} has missing values in {columns}; fill or drop them first.")
    words = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    for name in words:
        if pd.api.types.is_datetime64_any_dtype(table[name]):
            raise InvalidInput(f"the column {name!r} of {where} holds dates; turn them into numbers or drop it.")
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
