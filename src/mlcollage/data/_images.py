"""Workloads from a folder of images, one folder a class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from mlcollage.data._labeled import (
    SPLIT_NOTE,
    check_options,
    file_hash,
    image_tensor,
    split_rows,
    whole_number,
)
from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput

__all__ = ["ImageFolder", "load"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_TEST_NAMES = ("test", "val", "valid", "validation")
_HASHED = 256 * 1024**2  # bytes; of larger folders, names, sizes and times are hashed instead of contents


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """Images on disk, decoded when asked for.

    Parameters
    ----------
    paths, labels
        One label an image.
    classes
        Names by label.
    size
        Cut and resize to squares of this size, or None to leave the images as they are.
    channels
        1 (gray) or 3 (RGB).
    """

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[int], classes: Sequence[str], size: int | None, channels: int
    ) -> None:
        self.paths, self.labels, self.classes = list(paths), list(labels), tuple(classes)
        self.size, self.channels = size, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return image_tensor(image, self.size, self.channels), torch.tensor(self.labels[index])
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises any of them for damaged files
            raise InvalidInput(f"the image {path} is damaged ({error}); delete or replace it.") from error


def load(folder: Path, options: Mapping[str, str]) -> Labeled:
    """Load ``folder/train/<class>/*.png`` and ``folder/test/...``, or ``folder/<class>/*.png``."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        from mlcollage.data import _hub

        return _hub.load(str(folder), options)
    check_options(options, ("size", "channels"), f"the image folder {folder}")
    size = whole_number(options, "size", None)
    parts = [folder / name for name in _TEST_NAMES if (folder / name).is_dir()]
    train_folder = folder / "train"
    if train_folder.is_dir() and not parts:
        parts = [train_folder]
    root = train_folder if train_folder.is_dir() else folder
    paths, labels, classes = _scan(root)
    channels = _look(paths, size)
    if root == train_folder and parts[0] != train_folder:
        test_paths, test_labels, test_classes = _scan(parts[0])
        if unknown := sorted(set(test_classes) - set(classes)):
            raise InvalidInput(f"{parts[0]} has the class {unknown[0]!r}, which {root} has not.")
        test_labels = [classes.index(test_classes[label]) for label in test_labels]
        channels = max(channels, _look(test_paths, size, like=paths[0]))
        note = ""
    else:
        rows, test_rows = split_rows(np.array(labels), classes, str(root))
        test_paths, test_labels = [paths[i] for i in test_rows], [labels[i] for i in test_rows]
        paths, labels, note = [paths[i] for i in rows], [labels[i] for i in rows], SPLIT_NOTE
    if "channels" in options:
        if options["channels"] not in ("1", "3"):
            raise InvalidInput(f"option channels must be 1 or 3; got {options['channels']!r}.")
        channels = int(options["channels"])
    return Labeled(
        ImageFolder(paths, labels, classes, size, channels),
        ImageFolder(test_paths, test_labels, classes, size, channels),
        len(classes),
        name=folder.resolve().name + note,
        fingerprint=_fingerprint(folder, [*paths, *test_paths], str(options)),
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
    first, gray = None, True
    for path in ([like] if like else []) + list(paths):
        try:
            with Image.open(path) as image:
                here, mode = image.size, image.mode
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise InvalidInput(f"the image {path} is damaged ({error}); delete or replace it.") from error
        first = first or here
        if size is None and here != first:
            raise InvalidInput(
                f"images differ in size: {path} has {here[0]} x {here[1]} pixels, others {first[0]} x {first[1]}; "
                "add ?size=32 (or another size) to the folder's name to resize them."
            )
        gray = gray and (mode in ("1", "L") or mode.startswith("I"))
    return 1 if gray else 3


def _fingerprint(folder: Path, paths: Sequence[Path], options: str) -> str:
    digest = hashlib.sha256(options.encode())
    states = [path.stat() for path in paths]
    small = sum(state.st_size for state in states) <= _HASHED
    for path, state in sorted(zip(paths, states, strict=True)):
        content = file_hash(path) if small else f"{state.st_size} {state.st_mtime_ns}"
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
