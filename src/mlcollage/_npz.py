"""Estimators and results on disk: one ``.npz`` of arrays and a line of JSON, nothing pickled."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput, MissingFile

Array = NDArray[Any]
_FORMAT = 2
_NOT_SAVED = {"not saved": True}


def save_arrays(
    path: str | os.PathLike[str], kind: str, params: Mapping[str, Any], arrays: Mapping[str, Array]
) -> Path:
    """Write parameters and arrays to ``path`` in one step: a reader sees the old file or the new one, never a part."""
    target = Path(path)
    header = {"kind": kind, "format": _FORMAT, "params": {name: _plain(value) for name, value in params.items()}}
    # Beside the target, since renaming is atomic within one folder only; named by process, since two may save at once.
    if not target.parent.is_dir():
        raise MissingFile(f"There is no folder {target.parent}; make it first.")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            contents: dict[str, Any] = {"header": np.array(json.dumps(header)), **arrays}
            np.savez(file, **contents)
            file.flush()
            # On disk before it takes the name, so that a crash leaves no empty file under it.
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.integer | np.floating):
        return value.item()
    if isinstance(value, tuple | list | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    return _NOT_SAVED


def load_arrays(
    path: str | os.PathLike[str], kind: str, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read what :func:`save_arrays` wrote; ``given`` replaces parameters, and must name those that are objects."""
    source = Path(path)
    if not source.is_file():
        raise MissingFile(f"There is no file {source}; save() writes one.")
    try:
        with np.load(source, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidInput(f"{source} is not a file that save() wrote, or it is damaged ({error}).") from error
    if header.get("kind") != kind or header.get("format") != _FORMAT:
        raise InvalidInput(
            f"{source} holds {header.get('kind')!r} in format {header.get('format')!r}; expected {kind!r} in format "
            f"{_FORMAT}."
        )
    params = {**header["params"], **given}
    # A random state that was an object is not needed: what it drew is in the arrays.
    missing = [name for name, value in params.items() if value == _NOT_SAVED and name != "random_state"]
    if missing:
        raise InvalidInput(
            f"{', '.join(missing)} was an object when {source.name} was saved, which a file without pickle cannot "
            f"hold: pass it again, load(path, {missing[0]}=...)."
        )
    return {name: None if value == _NOT_SAVED else _tupled(value) for name, value in params.items()}, arrays


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def pack_labels(classes: Array) -> dict[str, Array]:
    """Labels as arrays without objects."""
    if classes.dtype != object:
        return {"classes": classes}
    if not all(isinstance(label, str) for label in classes):
        raise InvalidInput("Only labels that are numbers, booleans or strings can be saved without pickle.")
    # numpy would pickle an array of objects.
    return {"classes": classes.astype(str), "classes.object": np.array(True)}


def unpack_labels(arrays: Mapping[str, Array]) -> Array:
    """The labels that :func:`pack_labels` stored."""
    return arrays["classes"].astype(object) if "classes.object" in arrays else arrays["classes"]
