"""Workloads from a folder of images, one folder per class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mlcollage.data._pixels import image_tensor, mode_of, opened, upright_size
from mlcollage.data._reading import (
    SPLIT_NOTE,
    channels_of,
    check_options,
    file_hash,
    image_size,
    split_rows,
)
from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_TEST_NAMES = ("test", "val", "valid", "validation")
_HASHED = 256 * 1024**2  # bytes; of larger folders, names, sizes and times are hashed instead of contents


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images that are decoded when asked for: ``(channels, h, w)`` float32 in [0, 1], all of one shape.

    Parameters
    ----------
    labels
        One per image.
    classes
        Names by label.
    size
        Cut and resize to squares of this size, or None to leave the images as they are.
    channels
        1 (gray) or 3 (RGB).
    """

    def __init__(
        self, labels: Sequence[int] | NDArray, classes: Sequence[str], size: int | None, channels: int
    ) -> None:
        self.labels, self.classes = list(labels), tuple(classes)
        self.size, self.channels = size, channels
        self.shape: tuple[int, ...] | None = None  # of the first image that was decoded

    def open(self, index: int) -> Any:
        """A context that gives the Pillow image."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with self.open(index) as image:
            x = image_tensor(image, self.size, self.channels)
        self.shape = self.shape or tuple(x.shape)
        if tuple(x.shape) != self.shape:
            raise InvalidInput(
                f"images differ in size: image {index} is {tuple(x.shape)}, others {self.shape}; add ?size=32 (or "
                "another size) to the name to resize them."
            )
        return x, torch.tensor(int(self.labels[index]))


class ImageFolder(Images):
    """Images on disk, by their paths; the other parameters are those of :class:`Images`."""

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[int], classes: Sequence[str], size: int | None, channels: int
    ) -> None:
        super().__init__(labels, classes, size, channels)
        self.paths = list(paths)

    def open(self, index: int) -> Any:
        return opened(self.paths[index])


def load(name: str | Path, options: Mapping[str, str]) -> Labeled:
    """Load ``folder/train/<class>/*.png`` and ``folder/test/...``, or ``folder/<class>/*.png``."""
    folder = Path(name).expanduser()
    check_options(options, ("size", "channels"), f"the image folder {folder}")
    size = image_size(options)
    root = folder / "train" if (folder / "train").is_dir() else folder
    paths, labels, classes = _scan(root)
    channels = _look(paths, size)
    held = next((folder / part for part in _TEST_NAMES if (folder / part).is_dir()), None)
    if root != folder and held is not None:
        test_paths, test_labels, test_classes = _scan(held)
        if unknown := sorted(set(test_classes) - set(classes)):
            raise InvalidInput(f"{held} has the class {unknown[0]!r}, which {root} has not.")
        test_labels = [classes.index(test_classes[label]) for label in test_labels]
        # A single color image, in either part, makes all of them color.
        channels, note = max(channels, _look(test_paths, size, like=paths[0])), ""
    else:
        rows, test_rows = split_rows(np.array(labels), classes, str(root))
        test_paths, test_labels = [paths[i] for i in test_rows], [labels[i] for i in test_rows]
        paths, labels, note = [paths[i] for i in rows], [labels[i] for i in rows], SPLIT_NOTE
    channels = channels_of(options, channels)
    return Labeled(
        ImageFolder(paths, labels, classes, size, channels),
        ImageFolder(test_paths, test_labels, classes, size, channels),
        len(classes),
        name=folder.resolve().name + note,
        fingerprint=files_hash(folder, [*paths, *test_paths], str(options)),
    )


def _scan(root: Path) -> tuple[list[Path], list[int], list[str]]:
    """All images below the class folders of ``root``, in sorted order."""
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise InvalidInput(f"{root} has no class folders; expected {root.name}/cat/1.png, {root.name}/dog/1.png, ...")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        if not found:
            raise InvalidInput(f"the class folder {root / name} has no images ({', '.join(sorted(_SUFFIXES))}).")
        paths += found
        labels += [label] * len(found)
    if len(classes) < 2:
        raise InvalidInput(f"{root} has the class {classes[0]!r} only; expected two class folders or more.")
    return paths, labels, classes


def _look(paths: Sequence[Path], size: int | None, like: Path | None = None) -> int:
    """Read the headers: every file must be an image, all of one size unless they are resized. Returns the channels."""
    first, channels = None, 1
    for path in ([like] if like else []) + list(paths):
        with opened(path) as image:
            here = upright_size(image)
            channels = max(channels, mode_of(image).channels)  # a single color image makes all of them color
        first = first or here
        if size is None and here != first:
            raise InvalidInput(
                f"images differ in size: {path} has {here[0]} x {here[1]} pixels, others {first[0]} x {first[1]}; "
                "add ?size=32 (or another size) to the folder's name to resize them."
            )
    return channels


def files_hash(folder: Path, paths: Sequence[Path], options: str) -> str:
    """SHA-256 of names and contents; of more than 256 MB, of names, sizes and times."""
    digest = hashlib.sha256(options.encode())
    states = [path.stat() for path in paths]
    small = sum(state.st_size for state in states) <= _HASHED
    # Relative names: a folder that was moved is still the same data.
    for path, state in sorted(zip(paths, states, strict=True)):
        content = file_hash(path) if small else f"{state.st_size} {state.st_mtime_ns}"
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
