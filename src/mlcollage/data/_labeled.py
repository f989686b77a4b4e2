"""What the loaders of the user's data share: labels of any kind, splits, options, fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from mlcollage.errors import InvalidInput

__all__ = [
    "SPLIT_NOTE",
    "LabeledTensors",
    "check_options",
    "encode",
    "encode_as",
    "file_hash",
    "image_tensor",
    "split_rows",
    "whole_number",
]

SPLIT_NOTE = " (80/20 split)"
"""Added to the name of a workload whose test set we split off."""


class LabeledTensors(TensorDataset):
    """A ``TensorDataset`` of inputs and labels that knows what the classes are called.

    Attributes
    ----------
    classes
        Names by label.
    """

    def __init__(self, X: NDArray, y: NDArray, classes: Sequence[str]) -> None:
        inputs = torch.from_numpy(np.ascontiguousarray(X, dtype=np.float32))
        super().__init__(inputs, torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64)))
        self.classes = tuple(classes)


def check_options(options: Mapping[str, str], known: Sequence[str], what: str) -> None:
    """Refuse options that nobody reads."""
    for key in options:
        if key not in known:
            allowed = ", ".join(known) if known else "none"
            raise InvalidInput(f"{what} has no option {key!r}; it takes {allowed}.")


def whole_number(options: Mapping[str, str], key: str, default: int | None, *, least: int = 1) -> int | None:
    """An option that is a whole number."""
    if key not in options:
        return default
    try:
        value = int(options[key])
    except ValueError:
        value = least - 1
    if value < least:
        raise InvalidInput(f"option {key} must be a whole number from {least}; got {options[key]!r}.")
    return value


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
        labels = np.array([v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in labels])
    names, y = np.unique(labels, return_inverse=True)
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
    values = np.asarray(labels).reshape(-1)
    if values.dtype.kind == "f" and np.isfinite(values).all() and (values == np.round(values)).all():
        values = values.astype(np.int64)
    place = {name: number for number, name in enumerate(classes)}
    words = [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values]
    unknown = sorted(set(words) - set(place))
    if unknown:
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


def file_hash(*paths: Path, extra: str = "") -> str:
    """SHA-256 of the contents of files, and of the options they were read with."""
    digest = hashlib.sha256(extra.encode())
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def image_tensor(image: Any, size: int | None, channels: int) -> torch.Tensor:
    """A Pillow image as ``(channels, h, w)`` float32 in [0, 1], upright, cut and resized to a square if asked for."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray; converting it to "L" would clip it
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).clip(0, 255).round().astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())
