"""Ideal worlds made of finite data: a big dataset handed out once, and CIFAR-5m from its npz parts."""

from __future__ import annotations

import copy
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from mlcollage._random import permutation
from mlcollage.errors import InvalidInput, MissingFile

__all__ = ["FiniteAsIdeal", "NpzParts", "cifar5m", "memory_map_npz"]

Gather = Callable[[Tensor], tuple[Tensor, Tensor]]
_TEST, _STREAM, _TRAIN = 1, 2, 3  # keys of the random orders


class FiniteAsIdeal:
    """A big finite dataset as an Ideal World: each sample is handed out once, in a seeded order.

    The dataset is cut into three disjoint parts: a test block, an optional train pool and the stream. One pass
    through the stream is a sample *without replacement* of the distribution, as good as fresh data; past it samples
    come back and the "Ideal" World is a Real World with a large n. That is refused, or counted.

    Parameters
    ----------
    dataset
        A map-style dataset of ``(input, label)``, or a pair of arrays or tensors ``(x, y)``.
        uint8 inputs are scaled to [0, 1] unless ``transform`` says otherwise.
    num_classes
        Number of classes; read off the labels if they are in memory.
    test
        Number of samples kept for the test block (default 10,000), or a dataset of its own.
    train_pool
        Number of samples kept for finite sets that share nothing with the stream (default 0: the Real World's
        set is then the beginning of the stream, see ``DeepBootstrap(coupling="stream")``).
    seed
        Seeds the cut and the orders.
    past_one_pass
        ``"raise"`` (default), or ``"warn"``: go on in a new order and count.
    transform
        Function of a batch of raw inputs that gives float inputs.

    Attributes
    ----------
    num_classes, shape
        As every :class:`~mlcollage.data.world.DataWorld` has them.
    stream_size
        Number of samples that one pass hands out.

    Raises
    ------
    InvalidInput
        If the parts do not fit into the dataset, a set larger than its part is asked for, or the stream is exhausted.

    Examples
    --------
    >>> world = FiniteAsIdeal((torch.arange(10.0).reshape(10, 1), torch.arange(10) % 2), test=2)
    >>> x, y = world.batch(0, 4)
    >>> x.shape, world.stream_size, world.passes
    (torch.Size([4, 1]), 8, 0.5)
    >>> world.batch(2, 4)
    Traceback (most recent call last):
    ...
    mlcollage.errors.InvalidInput: the finite Ideal World is exhausted: sample 12 of 8 was asked for; ...
    """

    def __init__(
        self,
        dataset: Dataset[Any] | tuple[Any, Any],
        *,
        num_classes: int | None = None,
        test: int | Dataset[Any] | tuple[Any, Any] = 10_000,
        train_pool: int = 0,
        seed: int = 0,
        past_one_pass: Literal["raise", "warn"] = "raise",
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if past_one_pass not in ("raise", "warn"):
            raise InvalidInput(f"past_one_pass={past_one_pass!r} is not known; use 'raise' or 'warn'.")
        self._gather, size, classes = _source(dataset)
        self._transform = transform
        kept_for_test = test if isinstance(test, int) else 0
        self.stream_size = size - kept_for_test - train_pool
        if kept_for_test < 0 or train_pool < 0 or self.stream_size < 1:
            raise InvalidInput(
                f"a dataset of {size} samples cannot give {kept_for_test} for the test block, {train_pool} for the "
                "train pool and a stream; make test or train_pool smaller."
            )
        if num_classes is None and classes is None:
            raise InvalidInput("this dataset does not show its labels without reading it all; pass num_classes.")
        self.num_classes = int(num_classes if num_classes is not None else classes or 0)
        self.past_one_pass = past_one_pass
        self.seed = seed
        self._view = 0
        order = permutation(size, seed, _TEST)
        self._test_gather, self._test_index = self._gather, order[:kept_for_test]
        if not isinstance(test, int):
            self._test_gather, test_size, _ = _source(test)
            self._test_index = torch.arange(test_size)
        self._pool = order[kept_for_test : kept_for_test + train_pool]
        self._stream = order[kept_for_test + train_pool :]
        self._orders: dict[int, Tensor] = {}
        self._drawn: dict[int, int] = {}  # shared by the views of all seeds
        self._warned: set[int] = set()
        self.shape = tuple(self._read(self._gather, order[:1])[0].shape[1:])

    def for_seed(self, seed: int) -> FiniteAsIdeal:
        """The same samples and test block in another order, for a repetition of the experiment."""
        view = copy.copy(self)
        view._view, view._orders = seed, {}
        return view

    def batch(self, step: int, batch_size: int, *, split: str = "stream") -> tuple[Tensor, Tensor]:
        """Samples ``step * batch_size ... (step + 1) * batch_size - 1`` of the stream (or another split)."""
        start, stop = step * batch_size, (step + 1) * batch_size
        if split != "stream":
            gather, index = self._part(split, stop, 0)
            return self._read(gather, index[start:stop])
        if stop > self.stream_size:
            self._past_one_pass(stop)
        self._drawn[self._view] = max(stop, self._drawn.get(self._view, 0))
        pieces = []
        while start < stop:
            turn, at = divmod(start, self.stream_size)
            end = min(stop - start + at, self.stream_size)
            pieces.append(self._order(turn)[at:end])
            start += end - at
        return self._read(self._gather, torch.cat(pieces))

    def fixed(self, n: int, *, seed: int = 0, split: str = "train") -> TensorDataset:
        """The first ``n`` samples of the train pool in the order of ``seed``, or of the test block; nested in ``n``."""
        gather, index = self._part(split, n, seed)
        return TensorDataset(*self._read(gather, index[:n]))

    @property
    def passes(self) -> float:
        """Passes over the stream handed out so far, for the seed that drew most."""
        return max(self._drawn.values(), default=0) / self.stream_size

    def reuse(self) -> pd.DataFrame:
        """One row a seed: samples ``drawn``, ``passes`` over the stream, and how many draws were ``reused`` samples."""
        rows = [
            {"seed": s, "drawn": d, "passes": d / self.stream_size, "reused": max(0, d - self.stream_size)}
            for s, d in sorted(self._drawn.items())
        ]
        return pd.DataFrame(rows, columns=["seed", "drawn", "passes", "reused"])

    def _past_one_pass(self, stop: int) -> None:
        text = f"the finite Ideal World is exhausted: sample {stop} of {self.stream_size} was asked for"
        if self.past_one_pass == "raise":
            raise InvalidInput(
                f"{text}; use fewer steps, a smaller batch or more data, or past_one_pass='warn' to reuse "
                "samples and count."
            )
        if self._view not in self._warned:
            self._warned.add(self._view)
            warnings.warn(f"{text}; from here on samples come back and the world is no longer ideal.", stacklevel=3)

    def _order(self, turn: int) -> Tensor:
        if turn not in self._orders:
            # The last two passes suffice: a batch spans at most neighbors unless the stream is smaller than it.
            self._orders = {t: o for t, o in self._orders.items() if t >= turn - 1}
            self._orders[turn] = self._stream[permutation(self.stream_size, self.seed, _STREAM, self._view, turn)]
        return self._orders[turn]

    def _part(self, split: str, n: int, seed: int) -> tuple[Gather, Tensor]:
        if split == "test":
            gather, index = self._test_gather, self._test_index
        elif split == "train":
            order = permutation(len(self._pool), self.seed, _TRAIN, self._view, seed)
            gather, index = self._gather, self._pool[order]
        else:
            raise InvalidInput(f"split {split!r} is not known; there are 'stream', 'train' and 'test'.")
        if n > len(index):
            keep = "train_pool" if split == "train" else "test"
            raise InvalidInput(f"the {split} part holds {len(index)} samples, {n} were asked for; make {keep} larger.")
        return gather, index

    def _read(self, gather: Gather, index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = gather(index)
        if self._transform is not None:
            x = self._transform(x)
        elif x.dtype == torch.uint8:
            x = x.to(torch.float32) / 255
        return x, y if y.is_floating_point() else y.long()


def _source(dataset: Dataset[Any] | tuple[Any, Any]) -> tuple[Gather, int, int | None]:
    """How to read many samples at once, how many there are, and the number of classes if that is cheap to know."""
    if isinstance(dataset, NpzParts):
        return dataset.gather, len(dataset), int(dataset.labels.max()) + 1
    if isinstance(dataset, TensorDataset):
        dataset = (dataset.tensors[0], dataset.tensors[1])
    if isinstance(dataset, tuple):
        x, y = (torch.as_tensor(a) for a in dataset)
        if len(x) != len(y) or len(x) == 0:
            raise InvalidInput(f"inputs and labels must be as many and at least one, got {len(x)} and {len(y)}.")
        classes = 0 if y.is_floating_point() else int(y.max()) + 1
        return lambda index: (x[index], y[index]), len(x), classes
    if not hasattr(dataset, "__len__"):
        raise InvalidInput(
            f"{type(dataset).__name__} has no length; FiniteAsIdeal needs a map-style dataset of (input, label) pairs."
        )

    def gather(index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = default_collate([dataset[i] for i in index.tolist()])
        return torch.as_tensor(x), torch.as_tensor(y)

    return gather, len(dataset), None


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
            info = archive.getinfo(f"{member}.npy")
    except zipfile.BadZipFile:
        raise InvalidInput(f"{path.name} is not an npz file, or only half of it was downloaded.") from None
    if info.compress_type != zipfile.ZIP_STORED:
        raise InvalidInput(
            f"{member!r} in {path.name} is compressed and cannot be memory-mapped; "
            "store it once more with numpy.savez, which does not compress."
        )
    with path.open("rb") as handle:
        handle.seek(info.header_offset + 26)
        lengths = np.frombuffer(handle.read(4), "<u2")  # of the name and of the extra field, before the data
        handle.seek(info.header_offset + 30 + int(lengths.sum()))
        try:
            version = np.lib.format.read_magic(handle)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(handle)
        except ValueError as reason:
            raise InvalidInput(f"{member!r} in {path.name} is not a plain npy array: {reason}") from None
        offset = handle.tell()
    if dtype.hasobject:
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
        labels = [np.asarray(memory_map_npz(f, y)).reshape(-1) for f in files]
        for file, images, label in zip(files, self._images, labels, strict=True):
            if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1:] != self._images[0].shape[1:]:
                raise InvalidInput(
                    f"{Path(file).name}: {x!r} is {images.dtype} {images.shape}; images must be uint8 (N, "
                    "height, width, channels), "
                    "the same size in all parts."
                )
            if len(images) != len(label) or label.dtype.kind not in "iu":
                raise InvalidInput(
                    f"{Path(file).name}: {len(images)} images but {len(label)} labels of type {label.dtype}."
                )
        self.labels = np.concatenate(labels).astype(np.int64)
        if limit is not None and not 0 < limit <= len(self.labels):
            raise InvalidInput(f"limit={limit} must lie between 1 and the {len(self.labels)} samples that there are.")
        self.labels = self.labels[:limit]
        self._starts = np.cumsum([0, *(len(a) for a in labels)])

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``(b, C, H, W)`` (uint8) and labels of these samples; read part by part in file order."""
        at = index.numpy()
        out = np.empty((len(at), *self._images[0].shape[1:]), np.uint8)
        part = np.searchsorted(self._starts, at, side="right") - 1
        for p in np.unique(part):
            here = np.flatnonzero(part == p)
            here = here[np.argsort(at[here], kind="stable")]  # sequential reads
            out[here] = self._images[p][at[here] - self._starts[p]]
        return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(self.labels[at])

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        x, y = self.gather(torch.tensor([i % len(self)]))
        return x[0], y[0]


def _to_plus_minus_one(x: Tensor) -> Tensor:
    return x.to(torch.float32) / 127.5 - 1


def cifar5m(
    folder: Path | str,
    *,
    test_size: int = 10_000,
    train_pool: int = 0,
    seed: int = 0,
    past_one_pass: Literal["raise", "warn"] = "raise",
) -> FiniteAsIdeal:
    """CIFAR-5m as an Ideal World: about five million synthetic 32x32 images, memory-mapped.

    The files ``cifar5m_part0.npz`` ... ``cifar5m_part5.npz`` (17 GB, not compressed) are the paper's own; the stream
    is made of all parts but the last, and the test block is the first ``test_size`` images of the last, as there.
    Images are scaled to [-1, 1]. Batch 128 for 39,000 steps is one pass.

    Parameters
    ----------
    folder
        Where the parts lie.
    test_size, train_pool, seed, past_one_pass
        As in :class:`FiniteAsIdeal`.

    Raises
    ------
    MissingFile
        If the folder holds fewer than two parts.

    References
    ----------
    Nakkiran, Neyshabur, Sedghi, "The Deep Bootstrap Framework", ICLR 2021, section 4 and appendix (CIFAR-5m).
    """
    found = {int(m[1]): f for f in Path(folder).glob("*.npz") if (m := re.fullmatch(r"cifar5m_part(\d+)\.npz", f.name))}
    if len(found) < 2:
        raise MissingFile(
            f"{folder} holds {len(found)} of the files cifar5m_part0.npz ... cifar5m_part5.npz; at least two "
            "parts are needed "
            "(the last one is the test set)."
        )
    files = [found[k] for k in sorted(found)]
    return FiniteAsIdeal(
        NpzParts(files[:-1]),
        num_classes=10,
        test=NpzParts(files[-1:], limit=test_size),
        train_pool=train_pool,
        seed=seed,
        past_one_pass=past_one_pass,
        transform=_to_plus_minus_one,
    )
