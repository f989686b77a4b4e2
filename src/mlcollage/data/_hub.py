"""Workloads from the Hugging Face hub, or from a folder that its ``datasets`` package wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mlcollage.data._files import from_table
from mlcollage.data._labeled import (
    SPLIT_NOTE,
    check_options,
    encode,
    encode_as,
    image_tensor,
    split_rows,
    whole_number,
)
from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput, MissingDependency, MissingFile, UnknownName

__all__ = ["HubImages", "load"]

_LABELS = ("label", "labels", "target", "class", "fine_label", "y")
_TESTS = ("test", "validation", "valid", "val")


class HubImages(Dataset[tuple[Tensor, Tensor]]):
    """Images of a Hugging Face data set, decoded when asked for.

    Parameters
    ----------
    rows
        A ``datasets.Dataset``.
    column
        Where the images are.
    labels
        One a row.
    classes
        Names by label.
    size
        Cut and resize to squares of this size, or None.
    channels
        1 or 3.
    """

    def __init__(
        self, rows: Any, column: str, labels: NDArray, classes: tuple[str, ...], size: int | None, channels: int
    ) -> None:
        self.rows, self.column, self.labels, self.classes = rows, column, labels, classes
        self.size, self.channels = size, channels
        self.shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = image_tensor(self.rows[int(index)][self.column], self.size, self.channels)
        self.shape = self.shape or tuple(x.shape)
        if tuple(x.shape) != self.shape:
            raise InvalidInput(
                f"images differ in size: image {index} is {tuple(x.shape)}, others {self.shape}; add ?size=32 (or "
                "another size) to the name to resize them."
            )
        return x, torch.tensor(int(self.labels[index]))


def load(name: str, options: Mapping[str, str]) -> Labeled:
    """Load ``name``, ``name:configuration`` or a folder."""
    check_options(options, ("label", "image", "size", "channels", "scale"), f"the data set {name}")
    train, test = _parts(_open(name), name)
    label = _label_column(train, options, name)
    image = _image_column(train, options, name)
    if image is None:
        return _table(train, test, label, options, name)
    y, classes = _labels(train, label, name)
    note = ""
    if test is None:
        rows, test_rows = split_rows(y, classes, name)
        train, test, y, y_test, note = train.select(rows), train.select(test_rows), y[rows], y[test_rows], SPLIT_NOTE
    else:
        y_test = encode_as(_names(test, label), classes, name)
    size = whole_number(options, "size", None)
    channels = options.get("channels", "1" if train[0][image].mode in ("1", "L") else "3")
    if channels not in ("1", "3"):
        raise InvalidInput(f"option channels must be 1 or 3; got {channels!r}.")
    return Labeled(
        HubImages(train, image, y, classes, size, int(channels)),
        HubImages(test, image, y_test, classes, size, int(channels)),
        len(classes),
        name=f"hf:{Path(name).name if Path(name).is_dir() else name}{note}",
        fingerprint=_fingerprint(train, test, options),
    )


def _table(train: Any, test: Any, label: str, options: Mapping[str, str], name: str) -> Labeled:
    """Columns of numbers and words: as a CSV table would be read."""
    frames: list[Any] = []
    for part in (train, test):
        if part is None:
            frames.append(None)
            continue
        frame = part.to_pandas()
        frame[label] = _names(part, label)
        frames.append(frame)
    workload = from_table(frames[0], frames[1], {**options, "target": label}, f"the data set {name}")
    where = f"hf:{Path(name).name if Path(name).is_dir() else name}{workload.name}"
    return Labeled(
        workload.train, workload.test, workload.num_classes, name=where, fingerprint=_fingerprint(train, test, options)
    )


def _open(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency(
            "Hugging Face data sets need the package `datasets`; run pip install 'mlcollage[hub]'."
        ) from error
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            if any((folder / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json")):
                return datasets.load_from_disk(str(folder))
            return datasets.load_dataset(str(folder))
        identifier, _, configuration = name.partition(":")
        return datasets.load_dataset(identifier, configuration or None)
    except (FileNotFoundError, ConnectionError) as error:  # DatasetNotFoundError is a FileNotFoundError
        raise MissingFile(
            f"the data set {name!r} is neither a folder here nor to be had from the hub ({_line(error)})."
        ) from error
    except Exception as error:  # the hub's builders raise anything
        raise InvalidInput(
            f"the data set {name!r} cannot be loaded ({type(error).__name__}: {_line(error)})."
        ) from error


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
        if options["label"] not in columns:
            raise UnknownName(f"the data set {name} has no column {options['label']!r}; it has {', '.join(columns)}.")
        return options["label"]
    marked = [key for key, feature in rows.features.items() if type(feature).__name__ == "ClassLabel"]
    found = [key for key in _LABELS if key in columns] or marked
    if not found:
        raise InvalidInput(f"which column of {name} is the label? Add ?label=column; it has {', '.join(columns)}.")
    return str(found[0])


def _image_column(rows: Any, options: Mapping[str, str], name: str) -> str | None:
    images = [key for key, feature in rows.features.items() if type(feature).__name__ == "Image"]
    if "image" in options:
        if options["image"] not in images:
            raise UnknownName(f"the data set {name} has no column of images {options['image']!r}; it has {images}.")
        return options["image"]
    return images[0] if images else None


def _names(rows: Any, column: str) -> NDArray:
    """Labels as words where the data set knows them (-1, the hub's mark for none, is refused)."""
    values = np.asarray(rows[column])
    feature = rows.features[column]
    if type(feature).__name__ != "ClassLabel":
        return values
    if (values < 0).any():
        raise InvalidInput(f"{int((values < 0).sum())} rows have no label in the column {column!r}.")
    return np.array([feature.names[value] for value in values])


def _labels(rows: Any, column: str, name: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Integers from 0 in the data set's own order of classes where it has one, else sorted."""
    feature = rows.features[column]
    if type(feature).__name__ != "ClassLabel":
        return encode(np.asarray(rows[column]), name)
    words = _names(rows, column)
    return encode_as(words, feature.names, name), tuple(feature.names)


def _fingerprint(train: Any, test: Any, options: Mapping[str, str]) -> str:
    """``datasets`` keeps a hash of contents and of everything done to them."""
    import hashlib

    text = f"{train._fingerprint} {getattr(test, '_fingerprint', '')} {sorted(options.items())}"
    return hashlib.sha256(text.encode()).hexdigest()
