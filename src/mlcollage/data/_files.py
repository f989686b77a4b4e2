"""Workloads from one file: ``.npz`` arrays, CSV and Parquet tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlcollage.data._reading import (
    SPLIT_NOTE,
    check_options,
    encode,
    encode_as,
    file_hash,
    read_npz,
    split_rows,
)
from mlcollage.data._tabular import OPTIONS, from_table, read_table
from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput, MissingFile

SUFFIXES = (".npz", ".csv", ".parquet")
_KEYS = {  # one of these names each
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
    check_options(options, OPTIONS, str(path))
    (table, note), paths = read_table(path, options), [path]
    test = None
    if "test" in options:
        other = Path(options["test"]).expanduser()
        other = other if other.is_file() else path.parent / options["test"]
        if not other.is_file():
            raise MissingFile(f"there is no file {options['test']}; it was named as the test set of {path}.")
        if "split" in options:
            raise InvalidInput(f"{path} has ?test= and ?split=; the test set comes from one of them.")
        test, _ = read_table(other, options)
        paths.append(other)
    found = from_table(table, test, options, str(path))
    return replace(found, name=path.name + note + found.name, fingerprint=file_hash(*paths, extra=str(options)))


def _npz(path: Path) -> Labeled:
    found = read_npz(path)
    held: dict[str, NDArray | None] = {}
    for name, keys in _KEYS.items():
        there = [key for key in keys if key in found]
        if len(there) > 1:
            raise InvalidInput(
                f"{path} holds {' and '.join(there)}, and either may be {name}; save it with one of them only."
            )
        held[name] = found[there[0]] if there else None
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
