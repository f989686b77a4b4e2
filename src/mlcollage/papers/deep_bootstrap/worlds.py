"""Ideal worlds made of finite data: a big dataset handed out once, and CIFAR-5m from its npz parts."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from mlcollage import _checks as checks
from mlcollage._random import permutation
from mlcollage.data._samples import check_finite, check_labels, gathered, length
from mlcollage.data.batches import read_batch
from mlcollage.errors import InvalidInput, MissingFile

from .npz_parts import NpzParts

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
        If the parts do not fit into the dataset, a set larger than its part is asked for, the stream is exhausted, or
        samples are not finite or have labels that are no class: at once if they are in memory, else when they are
        read. The sentence names the sample.

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
        checks.choice("past_one_pass", past_one_pass, ("raise", "warn"))
        self._gather, size, classes = _source(dataset, "the dataset")
        self._own_test: Gather | None = None
        self._transform = transform
        test = checks.integer("test", test, least=0) if isinstance(test, int | np.integer) else test
        train_pool = checks.integer("train_pool", train_pool, least=0)
        kept_for_test = test if isinstance(test, int) else 0
        self.stream_size = size - kept_for_test - train_pool
        if self.stream_size < 1:
            raise InvalidInput(
                f"a dataset of {size} samples cannot give {kept_for_test} for the test block, {train_pool} for the "
                "train pool and a stream; make test or train_pool smaller."
            )
        if num_classes is None and classes is None:
            raise InvalidInput("this dataset does not show its labels without reading it all; pass num_classes.")
        self.num_classes = classes or 0 if num_classes is None else checks.integer("num_classes", num_classes, least=0)
        for name, given in (("the dataset", dataset), ("the test set", test)):
            if isinstance(given, TensorDataset | tuple | NpzParts):
                self._check_all(given, name)
        self.past_one_pass = past_one_pass
        self.seed = checks.integer("seed", seed, least=0)
        self._view = 0  # the seed whose order this view hands out; 0 until for_seed
        order = permutation(size, seed, _TEST)  # cut into test block, train pool and stream
        self._test_gather, self._test_index = self._gather, order[:kept_for_test]
        if not isinstance(test, int):  # a test set of its own, in its own order
            self._test_gather, test_size, _ = _source(test, "the test set")
            self._own_test = self._test_gather
            self._test_index = torch.arange(test_size)
        self._pool = order[kept_for_test : kept_for_test + train_pool]
        self._stream = order[kept_for_test + train_pool :]
        self._orders: dict[int, Tensor] = {}  # by pass over the stream
        self._drawn: dict[int, int] = {}  # shared by the views of all seeds
        self._warned: set[int] = set()
        self.shape = tuple(self._read(self._gather, order[:1])[0].shape[1:])

    def for_seed(self, seed: int) -> FiniteAsIdeal:
        """The same samples and test block in another order, for a repetition of the experiment."""
        # A shallow copy: the data and the counts of draws are shared, the orders are not.
        view = copy.copy(self)
        view._view, view._orders = seed, {}
        return view

    def batch(self, step: int, batch_size: int, *, split: str = "stream") -> tuple[Tensor, Tensor]:
        """Samples ``step * batch_size ... (step + 1) * batch_size - 1`` of the stream (or another split)."""
        checks.choice("split", split, ("stream", "test", "train"))
        start, stop = step * batch_size, (step + 1) * batch_size
        if split != "stream":
            gather, index = self._part(split, stop, 0)
            return self._read(gather, index[start:stop])
        if stop > self.stream_size:
            self._past_one_pass(stop)
        self._drawn[self._view] = max(stop, self._drawn.get(self._view, 0))
        pieces = []  # the batch's indices; a batch may span the end of a pass
        while start < stop:
            turn, at = divmod(start, self.stream_size)
            end = min(stop - start + at, self.stream_size)  # of this pass
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
        """One row per seed: samples ``drawn``, ``passes`` over the stream, how many draws were ``reused`` samples."""
        rows = [
            {"seed": s, "drawn": d, "passes": d / self.stream_size, "reused": max(0, d - self.stream_size)}
            for s, d in sorted(self._drawn.items())
        ]
        return pd.DataFrame(rows, columns=["seed", "drawn", "passes", "reused"])

    def _past_one_pass(self, stop: int) -> None:
        text = f"the finite Ideal World is exhausted: sample {stop} of {self.stream_size} was asked for"
        if self.past_one_pass == "raise":
            raise InvalidInput(
                f"{text}; use fewer steps, a smaller batch or more data, or past_one_pass='warn' to reuse samples and "
                "count."
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
        """How to read a split, and the indices (at least n) of its samples in order."""
        checks.choice("split", split, ("test", "train"))
        if split == "test":
            gather, index = self._test_gather, self._test_index
        else:
            order = permutation(len(self._pool), self.seed, _TRAIN, self._view, seed)
            gather, index = self._gather, self._pool[order]
        if n > len(index):
            keep = "train_pool" if split == "train" else "test"
            raise InvalidInput(f"the {split} part holds {len(index)} samples, {n} were asked for; make {keep} larger.")
        return gather, index

    def _check_all(self, dataset: TensorDataset | tuple[Any, ...] | NpzParts, name: str) -> None:
        """Look at all samples that are in memory, so that nothing is trained in vain."""
        gather, size, _ = _source(dataset, name)
        everything = torch.arange(size)
        if isinstance(dataset, NpzParts):  # images are bytes, and stay on the disk
            check_labels(torch.from_numpy(dataset.labels), everything.numpy(), name, self.num_classes or None)
            return
        x, y = gather(everything)
        # a transform may be what makes the inputs finite, so they are looked at behind it
        self._checked(x if self._transform is None else torch.zeros(size), y, everything, name)

    def _checked(self, x: Tensor, y: Tensor, index: Tensor, name: str) -> tuple[Tensor, Tensor]:
        rows = index.numpy()
        if x.is_floating_point():
            check_finite(x, rows, name)
        if self.num_classes:
            return x, check_labels(y, rows, name, self.num_classes)
        check_finite(y, rows, name, "the target")  # of a regression
        return x, y

    def _read(self, gather: Gather, index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = gather(index)
        if self._transform is not None:
            x = self._transform(x)
        elif x.dtype == torch.uint8:  # images are stored as bytes and used in [0, 1]
            x = x.to(torch.float32) / 255
        return self._checked(x, y, index, "the test set" if gather is self._own_test else "the dataset")


def _source(dataset: Dataset[Any] | tuple[Any, ...], name: str) -> tuple[Gather, int, int | None]:
    """How to read many samples at once, how many there are, and the number of classes if that is cheap to know."""
    if isinstance(dataset, NpzParts):
        return dataset.gather, len(dataset), int(dataset.labels.max()) + 1
    if isinstance(dataset, TensorDataset | tuple):
        parts = dataset.tensors if isinstance(dataset, TensorDataset) else dataset
        try:
            tensors = tuple(torch.as_tensor(a) for a in parts)
        except (TypeError, ValueError, RuntimeError):
            kinds = " and ".join(str(getattr(a, "dtype", type(a).__name__)) for a in parts)
            raise InvalidInput(
                f"inputs and labels must be arrays of numbers, but are {kinds}; number labels that are words with "
                "numpy.unique(labels, return_inverse=True)[1]."
            ) from None
        if any(t.is_meta for t in tensors):
            raise InvalidInput(f"{name} is on the meta device, which has no numbers; give tensors with data.")
        read = read_batch(tensors)
        x, y = read.x, read.y
        if len(x) != len(y) or len(x) == 0:
            raise InvalidInput(f"inputs and labels must be as many and at least one, got {len(x)} and {len(y)}.")
        classes = 0 if y.is_floating_point() else int(y.max()) + 1  # 0 is a regression
        return lambda index: (x[index], y[index]), len(x), classes
    size = length(dataset, name)

    def gather(index: Tensor) -> tuple[Tensor, Tensor]:
        return gathered(dataset, index.numpy(), name)  # decoded one by one, where the dataset can do no better

    return gather, size, None


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
            f"{folder} holds {len(found)} of the files cifar5m_part0.npz ... cifar5m_part5.npz; at least two parts are "
            "needed (the last one is the test set)."
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
