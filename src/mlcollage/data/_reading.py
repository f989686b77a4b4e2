"""What the loaders share: where data lie, options, arrays, labels of any kind, splits, images, fingerprints."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlcollage._users import described
from mlcollage.errors import InvalidInput, MissingFile

SPLIT_NOTE = " (80/20 split)"
"""Added to the name of a workload whose test set we split off."""


# --- where data lie ---------------------------------------------------------------------------------------------------


def roots() -> list[Path]:
    """Folders that data are looked for in: ``$MLCOLLAGE_DATA``, ``./data`` and ``~/data``."""
    named = os.environ.get("MLCOLLAGE_DATA")
    return [*([Path(named).expanduser()] if named else []), Path("data"), Path.home() / "data"]


def first_holding(places: Iterable[Path], files: Iterable[str]) -> Path | None:
    """The first of the folders that holds all files (compressed with ``.gz`` or not), or None."""
    files = list(files)
    found = (p for p in places if all((p / f).is_file() or (p / f"{f}.gz").is_file() for f in files))
    return next(found, None)


# --- options, written ?key=value&key=value ----------------------------------------------------------------------------


def check_options(options: Mapping[str, str], known: Sequence[str], what: str) -> None:
    """Refuse options that nobody reads."""
    for key in options:
        if key not in known:
            allowed = ", ".join(known) if known else "none"
            raise InvalidInput(f"{what} has no option {key!r}; it takes {allowed}.")


def with_options(name: str, options: Mapping[str, str]) -> str:
    """The name that loads the same again."""
    return name + ("?" if options else "") + "&".join(f"{key}={value}" for key, value in sorted(options.items()))


def image_size(options: Mapping[str, str]) -> int | None:
    """The option ``size``, whose square Pillow must be willing to decode too."""
    size = whole_number(options, "size")
    if size is not None and size**2 > (most := Image.MAX_IMAGE_PIXELS or size**2):
        raise InvalidInput(f"option size must be at most {math.isqrt(most):,}; got {size}.")
    return size


def whole_number(options: Mapping[str, str], key: str, default: int | None = None) -> int | None:
    """An option that is a whole number from 1."""
    if key not in options:
        return default
    if not options[key].strip().isdecimal() or int(options[key]) < 1:
        raise InvalidInput(f"option {key} must be a whole number from 1; got {options[key]!r}.")
    return int(options[key])


def channels_of(options: Mapping[str, str], default: int) -> int:
    """The option ``channels``: 1 (gray) or 3 (RGB)."""
    if options.get("channels", "1") not in ("1", "3"):
        raise InvalidInput(f"option channels must be 1 or 3; got {options['channels']!r}.")
    return int(options.get("channels", default))


# --- arrays -----------------------------------------------------------------------------------------------------------


def read_npz(path: Path, instead: str = "save numbers and strings only") -> dict[str, NDArray]:
    """The arrays of an ``.npz`` archive by their names in lower case; nothing is unpickled.

    Raises
    ------
    MissingFile
        If there is no such file.
    InvalidInput
        If it is no archive, is damaged or holds Python objects; then ``instead`` says what to do.
    """
    if not path.is_file():
        raise MissingFile(f"there is no file {path}.")
    if not zipfile.is_zipfile(path):
        raise InvalidInput(f"{path} is not an .npz archive.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key.lower(): archive[key] for key in archive.files}
            # What is no array is given as its bytes.
            if odd := [key for key, value in arrays.items() if not isinstance(value, np.ndarray)]:
                raise ValueError(f"{odd[0]} is no array")
            twice = [key for key in archive.files if sum(key.lower() == other.lower() for other in archive.files) > 1]
    except Exception as error:  # damaged archives raise anything, also MemoryError
        if isinstance(error, ValueError) and "allow_pickle" in str(error):
            raise InvalidInput(
                f"{path} holds arrays of Python objects, which are pickled and never loaded; {instead}."
            ) from error
        raise InvalidInput(f"{path} is damaged ({described(error, where=False)}); save it again.") from error
    if twice:
        raise InvalidInput(f"{path} holds {' and '.join(twice)}, which differ in case only; save it with one of them.")
    return arrays


def standardize(train: NDArray, test: NDArray) -> tuple[NDArray, NDArray]:
    """Columns of mean 0 and standard deviation 1 over the training rows; constant columns become 0."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    std = np.where(std > 1e-12 * np.abs(mean), std, 1.0)  # relative: a feature may have any unit
    return (train - mean) / std, (test - mean) / std


# --- labels -----------------------------------------------------------------------------------------------------------


def label_words(labels: NDArray) -> list[str]:
    """What labels are called: whole numbers without a decimal point, bytes as text."""
    values = np.asarray(labels).reshape(-1)
    if values.dtype.kind == "f" and np.isfinite(values).all() and (values == np.round(values)).all():
        values = values.astype(np.int64)
    return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values]


def encode(labels: NDArray, where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels of any kind as 0, 1, ... in sorted order, and what they were called."""
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise InvalidInput(f"the labels of {where} must be one per sample; got shape {labels.shape}.")
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise InvalidInput(f"{int((~np.isfinite(labels)).sum())} labels of {where} are NaN or infinite.")
        if (labels != np.round(labels)).any():
            raise InvalidInput(
                f"the labels of {where} are real numbers such as {labels[labels != np.round(labels)][0]:g}; "
                "a workload is for classification: give each sample a class."
            )
        labels = labels.astype(np.int64)
    elif labels.dtype.kind not in "biuUSO":
        raise InvalidInput(f"the labels of {where} are of type {labels.dtype}; expected integers or strings.")
    if labels.dtype.kind in "SO":
        labels = np.array(label_words(labels))
    names, y = np.unique(labels, return_inverse=True)  # numbers in their order, 2 before 10
    if len(names) < 2:
        raise InvalidInput(f"{where} has one class only ({names[0] if len(names) else 'no label at all'}); give two.")
    if len(names) > max(2, len(y) // 2):
        raise InvalidInput(
            f"{where} has {len(names)} different labels for {len(y)} samples; that is no classification: name the "
            "column or array that holds the class."
        )
    return y.astype(np.int64), tuple(map(str, names))


def encode_as(labels: NDArray, classes: Sequence[str], where: str) -> NDArray[np.int64]:
    """Labels of a test set by the classes of its training set."""
    place = {name: number for number, name in enumerate(classes)}
    words = label_words(labels)
    if unknown := sorted(set(words) - set(place)):
        raise InvalidInput(f"the test labels of {where} hold {unknown[0]!r}, which the training labels never do.")
    return np.array([place[word] for word in words], dtype=np.int64)


def split_rows(y: NDArray[np.int64], classes: Sequence[str], where: str) -> tuple[NDArray, NDArray]:
    """Rows for training (80 %) and testing (20 %): always the same, with the classes in proportion."""
    from sklearn.model_selection import train_test_split

    counts = np.bincount(y, minlength=len(classes))
    if counts.min() < 2:
        raise InvalidInput(
            f"class {classes[int(counts.argmin())]!r} of {where} has one sample; splitting off a test set takes two: "
            "add some, drop the class, or give a test set."
        )
    if len(y) < 5 * len(classes):
        raise InvalidInput(
            f"{where} has {len(y)} samples of {len(classes)} classes; an 80/20 split takes at least {5 * len(classes)}."
        )
    train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
    return np.sort(train), np.sort(test)


# --- files ------------------------------------------------------------------------------------------------------------


def file_hash(*paths: Path, extra: str = "") -> str:
    """SHA-256 of the contents of files, and of the options they were read with."""
    digest = hashlib.sha256(extra.encode())
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def is_number(text: str) -> bool:
    """Whether Python reads the text as a number; also ``nan`` and ``1e-3``."""
    try:
        float(text)
    except ValueError:
        return False
    return True
