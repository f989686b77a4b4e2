"""Workloads from the Hugging Face hub, or from a folder that its ``datasets`` package wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlcollage import _checks as checks
from mlcollage._users import users_code
from mlcollage.data._images import Images
from mlcollage.data._pixels import mode_of
from mlcollage.data._reading import SPLIT_NOTE, channels_of, check_options, encode, encode_as, image_size, split_rows
from mlcollage.data._tabular import from_table
from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput, MissingDependency, MissingFile, MLCollageError

_LABELS = ("label", "labels", "target", "class", "fine_label", "y")
_TESTS = ("test", "validation", "valid", "val")  # parts that may serve as the test set, the best first


class HubImages(Images):
    """Images of a ``datasets.Dataset``, in its column; the other parameters are those of :class:`Images`."""

    def __init__(
        self,
        rows: Any,
        column: str,
        labels: Sequence[int] | NDArray,
        classes: Sequence[str],
        size: int | None,
        channels: int,
    ) -> None:
        super().__init__(labels, classes, size, channels)
        self.rows, self.column = rows, column

    @contextmanager
    def open(self, index: int) -> Any:
        try:
            yield self.rows[int(index)][self.column]
        except MLCollageError as error:
            raise InvalidInput(f"image {index} cannot be used: {str(error).rstrip('.')}.") from error


def saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the package ``datasets`` wrote a folder."""
    return any((folder / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json"))


def load(name: str, options: Mapping[str, str]) -> Labeled:
    """Load ``name``, ``name:configuration`` or a folder."""
    check_options(options, ("label", "image", "size", "channels", "scale", "words"), f"the data set {name}")
    train, test = _parts(_open(name), name)
    label = _label_column(train, options, name)
    image = _image_column(train, options, name)
    found = (
        _table(train, test, label, options, name)
        if image is None
        else _images(train, test, label, image, options, name)
    )
    folder = Path(name).expanduser()
    where = folder.name if folder.is_dir() else name
    return replace(found, name=f"hf:{where}{found.name}", fingerprint=_fingerprint(train, test, options))


def _images(train: Any, test: Any, label: str, image: str, options: Mapping[str, str], name: str) -> Labeled:
    """A column of images; the workload's name is the note on the split."""
    y, classes = _labels(train, label, name)
    note = ""
    if test is None:
        rows, test_rows = split_rows(y, classes, name)
        train, test, y, y_test, note = train.select(rows), train.select(test_rows), y[rows], y[test_rows], SPLIT_NOTE
    else:
        y_test = encode_as(_names(test, label), classes, name)
    size = image_size(options)
    with users_code(f"the first image of {name}"):
        found = train[0][image]
        if not isinstance(found, Image.Image):
            raise InvalidInput(f"the first image of {name} is {type(found).__name__}; expected an image.")
        channels = channels_of(options, mode_of(found).channels)
    parts = [HubImages(rows, image, labels, classes, size, channels) for rows, labels in ((train, y), (test, y_test))]
    return Labeled(parts[0], parts[1], len(classes), name=note)


def _table(train: Any, test: Any, label: str, options: Mapping[str, str], name: str) -> Labeled:
    """Columns of numbers and words, as a CSV table would be read; the workload's name is the note on the split."""
    frames: list[Any] = [None if part is None else part.to_pandas() for part in (train, test)]
    for part, frame in zip((train, test), frames, strict=True):
        if frame is not None:
            # Names and not numbers, so that train and test agree where their numbers do not.
            frame[label] = _names(part, label)
    return from_table(frames[0], frames[1], {**options, "target": label}, f"the data set {name}")


def _open(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency("Hugging Face data sets need `datasets`: pip install 'mlcollage[hub]'.") from error
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return datasets.load_from_disk(str(folder)) if saved(folder) else datasets.load_dataset(str(folder))
        identifier, _, configuration = name.partition(":")
        return datasets.load_dataset(identifier, configuration or None)
    except (FileNotFoundError, ConnectionError) as error:  # DatasetNotFoundError is a FileNotFoundError
        raise MissingFile(f"the data set {name!r} is neither a folder nor on the hub ({_line(error)}).") from error
    except Exception as error:  # the hub's builders raise anything
        raise InvalidInput(f"the data set {name!r} failed to load ({type(error).__name__}: {_line(error)}).") from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _parts(found: Any, name: str) -> tuple[Any, Any]:
    """Training and test rows; the test rows may be None."""
    if not isinstance(found, dict):  # a single datasets.Dataset
        return found, None
    if "train" not in found:
        if len(found) == 1:
            return next(iter(found.values())), None
        raise InvalidInput(f"the data set {name} has no part 'train'; it has {', '.join(found)}.")
    return found["train"], next((found[part] for part in _TESTS if part in found), None)


def _label_column(rows: Any, options: Mapping[str, str], name: str) -> str:
    columns = list(rows.features)
    if "label" in options:
        return checks.choice(f"the label column of {name}", options["label"], columns)
    # By its usual names first, then by its type; a guess is only made where a single answer is likely.
    found = [key for key in _LABELS if key in columns] or _columns(rows, "ClassLabel")
    if not found:
        raise InvalidInput(f"which column of {name} is the label? Add ?label=column; it has {', '.join(columns)}.")
    return _only(found, "label", name)


def _image_column(rows: Any, options: Mapping[str, str], name: str) -> str | None:
    images = _columns(rows, "Image")
    if "image" in options:
        return checks.choice(f"the image column of {name}", options["image"], images)
    return _only(images, "image", name) if images else None


def _only(columns: list[str], what: str, name: str) -> str:
    """The one column that it can be."""
    if len(columns) > 1:
        raise InvalidInput(f"{name} has the columns {', '.join(columns)}; say which is the {what}: ?{what}=column.")
    return columns[0]


def _columns(rows: Any, kind: str) -> list[str]:
    """Names of the columns of a kind of feature, told by its name so that ``datasets`` need not be imported."""
    return [key for key, feature in rows.features.items() if type(feature).__name__ == kind]


def _names(rows: Any, column: str) -> NDArray:
    """Labels as words where the data set knows them (-1, the hub's mark for none, is refused)."""
    values = np.asarray(rows[column])
    feature = rows.features[column]
    if type(feature).__name__ != "ClassLabel":
        return values
    # The hub's mark for a hidden label, usual in test sets of competitions.
    if (values < 0).any():
        raise InvalidInput(f"{int((values < 0).sum())} rows have no label in the column {column!r}.")
    return np.array([feature.names[value] for value in values])


def _labels(rows: Any, column: str, name: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Integers from 0 in the data set's own order of classes where it has one, else sorted."""
    feature = rows.features[column]
    if type(feature).__name__ != "ClassLabel":
        return encode(np.asarray(rows[column]), name)
    words = _names(rows, column)
    # All of its classes count, also those that no row has.
    return encode_as(words, feature.names, name), tuple(feature.names)


def _fingerprint(train: Any, test: Any, options: Mapping[str, str]) -> str:
    """``datasets`` keeps a hash of contents and of everything done to them."""
    # `datasets` keeps a hash of what a set was made of, which saves reading it.
    text = f"{train._fingerprint} {getattr(test, '_fingerprint', '')} {sorted(options.items())}"
    return hashlib.sha256(text.encode()).hexdigest()
