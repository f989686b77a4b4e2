"""Reading a dataset that may be the user's: each sample that is read is checked, and named if it is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from mlcollage._users import described, users_code
from mlcollage.data.batches import read_batch
from mlcollage.errors import InvalidInput, UserCodeError

_AT_ONCE = 1024  # samples that are decoded together


def gathered(dataset: Any, rows: NDArray, where: str) -> tuple[Tensor, Tensor]:
    """Inputs ``(m, ...)`` and targets ``(m, ...)`` of some samples, in the types they have; values are not looked at.

    Samples are pairs, or have parts with names, as :func:`~mlcollage.data.batches.read_batch` reads them.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for number, sample in zip(rows, _samples(dataset, rows.tolist(), where), strict=True):
        try:
            one = read_batch(default_collate([sample]))  # tensors of what numpy and Python have
        except (TypeError, RuntimeError) as error:
            raise InvalidInput(
                f"{where}[{number}] does not become tensors: {described(error, where=False)}."
            ) from error
        if not isinstance(one.x, Tensor) or not isinstance(one.y, Tensor):
            kinds = f"{type(one.x).__name__} and {type(one.y).__name__}"
            raise InvalidInput(f"{where}[{number}] is a pair of {kinds}; expected numbers, an input and its target.")
        for part, first in zip((one.x, one.y), found[0] if found else (one.x, one.y), strict=True):
            if (part.shape, part.dtype) != (first.shape, first.dtype):
                raise InvalidInput(
                    f"{where}[{number}] has shape {tuple(part.shape[1:])} and {part.dtype}, another one "
                    f"{tuple(first.shape[1:])} and {first.dtype}; all must be alike."
                )
        found.append((one.x, one.y))
    inputs, targets = zip(*found, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def length(dataset: Any, where: str, *, least: int = 1) -> int:
    """Number of samples."""
    with users_code(f"the length of {where}"):
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            kind = type(dataset).__name__
            raise InvalidInput(f"{where} must be a map-style dataset with __getitem__ and __len__; got {kind}.")
        size = len(dataset)
    if size < least:
        raise InvalidInput(f"{where} is empty.")
    return size


def in_memory(dataset: Any) -> tuple[Tensor, ...] | None:
    """The tensors of a dataset that only hands out their rows, or None; a subclass may do more in ``__getitem__``."""
    kind = type(dataset)
    if kind.__getitem__ is TensorDataset.__getitem__:
        return tuple(dataset.tensors)
    if kind is Subset and (tensors := in_memory(dataset.dataset)) is not None:
        return tuple(t[torch.as_tensor(list(dataset.indices), dtype=torch.int64)] for t in tensors)
    return None


def look(dataset: Any, num_classes: int, where: str, every: bool) -> tuple[tuple[int, ...], float, float]:
    """Check samples: all that are in memory, else the first and last, or every one; shape and range of the inputs."""
    size = length(dataset, where)
    rows = np.arange(size) if every or in_memory(dataset) is not None else np.array([0, size - 1])
    shape: tuple[int, ...] = ()
    low, high = np.inf, -np.inf
    for x, _ in read(dataset, rows, where, num_classes):
        shape, low, high = tuple(x.shape[1:]), min(low, float(x.min())), max(high, float(x.max()))
    return shape, low, high


def read(
    dataset: Any, rows: NDArray, where: str, num_classes: int | None = None, *, floats: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs ``(m, *shape)`` float32 and labels ``(m,)`` int64, block by block; tensors in memory are one block.

    ``floats``: inputs must be float tensors, as in a workload; else anything that numpy makes numbers of.
    """
    if (tensors := in_memory(dataset)) is not None:
        if len(tensors) != 2:
            raise InvalidInput(f"{where} holds {len(tensors)} tensors; expected a pair (input, label).")
        everything = len(rows) == len(tensors[0]) and bool((rows == np.arange(len(rows))).all())
        index: Any = slice(None) if everything else torch.from_numpy(rows)
        yield _checked(tensors[0][index], tensors[1][index], rows, where, num_classes, floats)
        return
    like: Tensor | None = None  # the first input; all must be like it
    for start in range(0, len(rows), _AT_ONCE):
        block = rows[start : start + _AT_ONCE]
        pairs = []
        for number, sample in zip(block, _samples(dataset, block.tolist(), where), strict=True):
            pair = _pair(sample, f"{where}[{number}]", floats)
            like = pair[0] if like is None else like
            if (pair[0].shape, pair[0].dtype) != (like.shape, like.dtype):
                raise InvalidInput(
                    f"{where}[{number}] has shape {tuple(pair[0].shape)} and {pair[0].dtype}, the first one "
                    f"{tuple(like.shape)} and {like.dtype}; all must be alike."
                )
            pairs.append(pair)
        inputs, labels = torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])
        yield _checked(inputs, labels, block, where, num_classes, floats)


def _samples(dataset: Any, block: list[int], where: str) -> list[Any]:
    """A block at once where the dataset can give one; where that fails, one by one, to find the sample that fails."""
    failed: UserCodeError | None = None
    if (several := getattr(dataset, "__getitems__", None)) is not None:
        try:
            with users_code(f"{where}.__getitems__"):
                samples = list(several(block))
            if len(samples) == len(block):
                return samples
            raise InvalidInput(f"{where}.__getitems__ gave {len(samples)} samples where {len(block)} were asked for.")
        except UserCodeError as error:
            failed = error
    samples = []
    for number in block:
        with users_code(f"{where}[{number}]"):
            samples.append(dataset[number])
    if failed is not None:
        raise failed
    return samples


def _pair(sample: Any, where: str, floats: bool) -> tuple[Tensor, int]:
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise InvalidInput(f"{where} is {type(sample).__name__}; expected a pair (input, label).")
    x, y = sample
    if not floats and not isinstance(x, Tensor):
        with users_code(f"{where}: making numbers of the input"):
            x = torch.as_tensor(np.asarray(x))
    if not isinstance(x, Tensor):
        kind = type(x).__name__
        raise InvalidInput(f"{where}: the input is {kind}; expected a float tensor, images scaled to [0, 1].")
    label = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    if label.size != 1 or label.dtype.kind not in "biu":
        raise InvalidInput(f"{where}: the label is {_shown(y)}; expected an integer.")
    return x.detach(), int(label.item())


def _shown(value: Any) -> str:
    with users_code("the label's repr()"):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _checked(
    x: Tensor, y: Tensor, rows: NDArray, where: str, num_classes: int | None, floats: bool
) -> tuple[Tensor, Tensor]:
    """A batch, inputs ``(m, ...)`` and labels ``(m,)`` or ``(m, 1)``, as float32 and int64."""
    if x.is_complex() or (floats and not x.is_floating_point()):
        raise InvalidInput(
            f"{where}[{rows[0]}]: the input is a tensor of {x.dtype}; expected a float tensor, images scaled to [0, 1]."
        )
    x = x.detach().to(torch.float32)
    check_finite(x, rows, where)
    return x, check_labels(y.detach(), rows, where, num_classes)


def check_finite(x: Tensor, rows: NDArray, where: str, what: str = "the input") -> None:
    """Refuse numbers ``(m, ...)`` of which some are NaN or infinite; the sentence names the first sample's row."""
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        bad = (~finite.reshape(len(x), -1).all(dim=1)).nonzero().flatten()
        raise InvalidInput(
            f"{where}[{rows[int(bad[0])]}]: {what} holds NaN or infinity (in {str(x.dtype)[6:]}), as {len(bad)} of "
            f"{len(rows)} samples do; clean the data first."
        )


def check_labels(y: Tensor, rows: NDArray, where: str, num_classes: int | None) -> Tensor:
    """Labels ``(m,)`` or ``(m, 1)`` as int64 ``(m,)``; refused if one is no class from 0, or not below the number."""
    if y.is_floating_point() or y.is_complex() or y.numel() != len(y):
        raise InvalidInput(
            f"{where}[{rows[0]}]: the label is {_shown(y[0])}; expected an integer from 0, one per sample."
        )
    y = y.reshape(-1).to(torch.int64)
    wrong = (y < 0) if num_classes is None else (y < 0) | (y >= num_classes)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        upto = "" if num_classes is None else f" to {num_classes - 1}"
        raise InvalidInput(f"{where}[{rows[first]}]: the label is {int(y[first])}; expected an integer from 0{upto}.")
    return y
