"""Images of several npz files as one dataset that is never read whole: the format of CIFAR-5m."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mlcollage.errors import InvalidInput, MissingFile


def memory_map_npz(file: Path | str, member: str) -> npt.NDArray[Any]:
    """An array of an npz file as a memory map: nothing is read before it is indexed.

    numpy's own ``mmap_mode`` ignores npz files. An npz is a zip archive; a member that is *stored* (``numpy.savez``)
    lies in it as a plain npy file, so that it can be mapped at its offset. A compressed one
    (``numpy.savez_compressed``) cannot.

    Parameters
    ----------
    file
        Path of the npz file.
    member
        Name of the array, e.g. ``"X"``.

    Raises
    ------
    MissingFile
        If the file is not there.
    InvalidInput
        If it is no npz file, lacks the member, or holds it compressed, pickled or damaged.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...     np.savez(d + "/a.npz", X=np.arange(6).reshape(2, 3))
    ...     memory_map_npz(d + "/a.npz", "X")[1].tolist()
    [3, 4, 5]
    """
    path = Path(file)
    if not path.is_file():
        raise MissingFile(f"there is no file {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if f"{member}.npy" not in names:
                raise InvalidInput(
                    f"{path.name} has no array {member!r}; it has {', '.join(n.removesuffix('.npy') for n in names)}."
                )
            info = archive.getinfo(f"{member}.npy")  # where the member begins, and how it is stored
    except zipfile.BadZipFile:
        raise InvalidInput(f"{path.name} is not an npz file, or only half of it was downloaded.") from None
    if info.compress_type != zipfile.ZIP_STORED:
        raise InvalidInput(
            f"{member!r} in {path.name} is compressed and cannot be memory-mapped; "
            "store it once more with numpy.savez, which does not compress."
        )
    with path.open("rb") as handle:
        # The local header of a zip member: 26 bytes, two lengths, then name and extra field, then the data.
        handle.seek(info.header_offset + 26)
        lengths = np.frombuffer(handle.read(4), "<u2")
        handle.seek(info.header_offset + 30 + int(lengths.sum()))
        try:
            version = np.lib.format.read_magic(handle)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(handle)
        except ValueError as reason:
            raise InvalidInput(f"{member!r} in {path.name} is not a plain npy array: {reason}") from None
        offset = handle.tell()
    if dtype.hasobject:  # an array of Python objects is a pickle
        raise InvalidInput(f"{member!r} in {path.name} holds pickled objects, which are never loaded.")
    if offset + int(np.prod(shape)) * dtype.itemsize > path.stat().st_size:
        raise InvalidInput(f"{path.name} ends before {member!r} does; download it again.")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")


class NpzParts(Dataset[tuple[Tensor, Tensor]]):
    """Images of several npz files as one dataset, memory-mapped: the format of CIFAR-5m.

    Parameters
    ----------
    files
        npz files with images ``x`` (uint8, ``(N, H, W, C)``) and labels ``y`` (integers ``(N,)``), not compressed.
    x, y
        Names of the arrays.
    limit
        Use only the first so many samples.

    Attributes
    ----------
    labels
        All labels, in memory.

    Raises
    ------
    MissingFile, InvalidInput
        See :func:`memory_map_npz`; also if images and labels of a part do not fit together.
    """

    def __init__(self, files: Sequence[Path | str], *, x: str = "X", y: str = "Y", limit: int | None = None) -> None:
        if not files:
            raise InvalidInput("no npz file was named; give at least one.")
        self._images = [memory_map_npz(f, x) for f in files]
        labels = [np.asarray(memory_map_npz(f, y)).reshape(-1) for f in files]  # read whole: they are small
        for file, images, label in zip(files, self._images, labels, strict=True):
            if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1:] != self._images[0].shape[1:]:
                raise InvalidInput(
                    f"{Path(file).name}: {x!r} is {images.dtype} {images.shape}; images must be uint8 (N, height, "
                    "width, channels), the same size in all parts."
                )
            if len(images) != len(label) or label.dtype.kind not in "iu":
                raise InvalidInput(f"{Path(file).name}: {len(images)} images but {len(label)} {label.dtype} labels.")
        self.labels = np.concatenate(labels).astype(np.int64)
        if limit is not None and not 0 < limit <= len(self.labels):
            raise InvalidInput(f"limit={limit} must lie between 1 and the {len(self.labels)} samples that there are.")
        self.labels = self.labels[:limit]
        self._starts = np.cumsum([0, *(len(a) for a in labels)])  # first sample of each part, and the end

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``(b, C, H, W)`` (uint8) and labels of these samples; read part by part in file order."""
        at = index.numpy()
        out = np.empty((len(at), *self._images[0].shape[1:]), np.uint8)
        part = np.searchsorted(self._starts, at, side="right") - 1  # (b,) the file of each sample
        for p in np.unique(part):
            here = np.flatnonzero(part == p)
            here = here[np.argsort(at[here], kind="stable")]  # sequential reads
            out[here] = self._images[p][at[here] - self._starts[p]]
        # From (b, H, W, C), as stored, to channels first.
        return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(self.labels[at])

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        x, y = self.gather(torch.tensor([i % len(self)]))
        return x[0], y[0]
