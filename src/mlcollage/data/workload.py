"""What a study is run on: the kinds of workload. :mod:`mlcollage.data.loading` loads them by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from mlcollage.errors import InvalidInput

_AT_ONCE = 1024  # samples that are decoded together


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Base of all kinds of workload.

    Parameters
    ----------
    name
        How it is called on slides and in the store.
    fingerprint
        Changes when the user's file changes, so that old results are not taken for new ones.
    """

    name: str = "workload"
    fingerprint: str = ""

    def check(self, where: str) -> None:
        """Refuse what no study can use, in one sentence that starts with ``where``."""

    def describe(self) -> dict[str, Any]:
        """What the workload holds, in plain values; ``mlcollage data check`` prints them."""
        return {"name": self.name, "fingerprint": self.fingerprint or "none (built in)"}


@dataclass(frozen=True)
class Labeled(Workload):
    """Labeled samples to train on and to test on, and (where the study trains networks) a model.

    Parameters
    ----------
    train, test
        Map-style datasets of ``(input, label)``; inputs float tensors (images ``(channels, height, width)``
        scaled to [0, 1], tables ``(features,)``), labels integers from 0.
    num_classes
        Number of classes.
    model
        Makes a fresh ``nn.Module`` that maps a batch of inputs to logits, or None for the study's own.
    name, fingerprint
        As every :class:`Workload` has them.

    Examples
    --------
    >>> data = TensorDataset(torch.rand(20, 3), torch.arange(20) % 2)
    >>> Labeled(data, data, num_classes=2, name="noise").describe()["shape"]
    [3]
    """

    train: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    model: Callable[[], nn.Module] | None = None

    @classmethod
    def from_arrays(
        cls,
        X: NDArray,
        y: NDArray,
        X_test: NDArray,
        y_test: NDArray,
        classes: int | Sequence[str],
        *,
        name: str = "workload",
        fingerprint: str = "",
    ) -> Labeled:
        """Make a workload of arrays, inputs ``(n, ...)`` and labels ``(n,)``; ``classes`` are names or their number."""
        names = [str(k) for k in range(classes)] if isinstance(classes, int) else list(classes)
        train, test = LabeledTensors(X, y, names), LabeledTensors(X_test, y_test, names)
        return cls(train, test, len(names), name=name, fingerprint=fingerprint)

    def check(self, where: str) -> None:
        """Look at the first and last samples, since most mistakes are in every sample.

        Raises
        ------
        InvalidInput
            One sentence that starts with ``where``.
        """
        if not isinstance(self.num_classes, int) or self.num_classes < 2:
            raise InvalidInput(f"{where}: num_classes must be an int of at least 2; got {self.num_classes!r}.")
        if isinstance(self.model, nn.Module):
            raise InvalidInput(f"{where}: model must make a fresh module, e.g. lambda: Net(); it is a module itself.")
        if self.model is not None and not callable(self.model):
            raise InvalidInput(f"{where}: model must be a function that returns a module; got {self.model!r}.")
        shapes = [_check_part(self.train, self.num_classes, f"{where}: train")]
        shapes += [_check_part(self.test, self.num_classes, f"{where}: test")]
        if shapes[0] != shapes[1]:
            raise InvalidInput(f"{where}: inputs are {shapes[0]} in train and {shapes[1]} in test.")

    def describe(self) -> dict[str, Any]:
        """Sizes, shape and classes in plain values; makes the model once and tries it on two samples.

        Raises
        ------
        InvalidInput
            If the model does not map a batch to ``num_classes`` logits.
        """
        facts = super().describe()
        return {
            "name": facts.pop("name"),
            "train": len(cast(Sized, self.train)),
            "test": len(cast(Sized, self.test)),
            "shape": list(self.train[0][0].shape),
            "num_classes": self.num_classes,
            "classes": [str(name) for name in getattr(self.train, "classes", range(self.num_classes))],
            "model": "the study's own" if self.model is None else self._try(self.model),
            **facts,
        }

    def _try(self, make: Callable[[], nn.Module]) -> str:
        x = torch.stack([self.train[i][0] for i in (0, len(cast(Sized, self.train)) - 1)])  # (2, *shape)
        # Initialization draws from the global generator, which is left as it was.
        with torch.random.fork_rng(devices=[]):
            model = make_network(make)
        try:
            with torch.no_grad():
                logits = model.eval()(x)
        except Exception as error:
            raise InvalidInput(
                f"the workload's model fails on inputs {tuple(x.shape)}: {type(error).__name__}: {error}."
            ) from error
        if getattr(logits, "shape", None) != (2, self.num_classes):
            raise InvalidInput(
                f"the workload's model maps {tuple(x.shape)} to {tuple(getattr(logits, 'shape', ()))}; expected "
                f"(2, {self.num_classes}), one logit per class."
            )
        return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"


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


def make_network(model: Callable[[], nn.Module]) -> nn.Module:
    """Call a user's ``model`` function.

    Raises
    ------
    InvalidInput
        If it fails or returns something else than a module.
    """
    try:
        network = model()
    except Exception as error:
        raise InvalidInput(f"the workload's model() failed with {type(error).__name__}: {error}.") from error
    if not isinstance(network, nn.Module):
        raise InvalidInput(f"the workload's model() must return a torch.nn.Module; got {type(network).__name__}.")
    return network


def arrays(dataset: Dataset[Any], rows: int | Sequence[int] | NDArray | None = None) -> tuple[NDArray, NDArray]:
    """Return a dataset as arrays: inputs float32 ``(n, ...)`` and labels int64 ``(n,)``.

    Parameters
    ----------
    dataset
        Map-style dataset of ``(input, label)``.
    rows
        Which samples: their indices, or a number for the first so many; by default all.

    Raises
    ------
    InvalidInput
        If there is no sample, inputs differ in shape or hold NaN or infinity, or labels are not integers from 0.

    Examples
    --------
    >>> data = TensorDataset(torch.rand(120, 4), torch.arange(120) % 3)
    >>> X, y = arrays(data, 100)
    >>> X.shape, X.dtype, y.dtype
    ((100, 4), dtype('float32'), dtype('int64'))
    """
    size = len(cast(Sized, dataset))
    wanted = np.arange(size)[:rows] if rows is None or isinstance(rows, int) else np.asarray(rows)
    if not len(wanted):
        raise InvalidInput(f"the dataset has {size} samples and rows is {rows}; nothing is left.")
    # Tensors are indexed at once; other datasets are asked for a block of samples where they can give one.
    if isinstance(dataset, TensorDataset):
        index = torch.from_numpy(wanted)
        x, y = (tensor[index] for tensor in dataset.tensors)
    else:
        blocks = [wanted[i : i + _AT_ONCE].tolist() for i in range(0, len(wanted), _AT_ONCE)]
        several = getattr(dataset, "__getitems__", lambda block: [dataset[i] for i in block])
        parts = [_stack(several(block), block) for block in blocks]
        x, y = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    X, labels = x.detach().cpu().numpy().astype(np.float32), y.detach().cpu().numpy()
    if not np.isfinite(X).all():
        raise InvalidInput(f"{int((~np.isfinite(X)).sum())} input values are NaN or infinite; clean the data first.")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InvalidInput(
            f"labels must be integers from 0, one per sample; got {labels.dtype} of shape {labels.shape}."
        )
    return X, labels.astype(np.int64)


def _stack(samples: list[Any], numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Pairs of one shape as one batch; ``numbers`` are the samples' places in the dataset, for messages."""
    shape = None
    for number, sample in zip(numbers, samples, strict=True):
        here = tuple(np.shape(_pair(sample, f"sample {number}")[0]))
        shape = shape or here
        if here != shape:
            raise InvalidInput(f"sample {number} has shape {here}, the first one {shape}; all must be alike.")
    return torch.stack([torch.as_tensor(x) for x, _ in samples]), torch.tensor([int(y) for _, y in samples])


def _pair(sample: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise InvalidInput(f"{where} is {type(sample).__name__}; expected a pair (input, label).")
    return sample[0], sample[1]


def _check_part(dataset: Any, num_classes: int, where: str) -> tuple[int, ...]:
    """Shape of the inputs of a dataset whose first and last samples are as they must be."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        kind = type(dataset).__name__
        raise InvalidInput(f"{where} must be a map-style dataset with __getitem__ and __len__; got {kind}.")
    if len(dataset) == 0:
        raise InvalidInput(f"{where} is empty.")
    shape: tuple[int, ...] = ()
    for index in (0, len(dataset) - 1):
        here = f"{where}[{index}]"
        x, y = _pair(dataset[index], here)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise InvalidInput(f"{here}: the input is {kind}; expected a float tensor, images scaled to [0, 1].")
        if not bool(torch.isfinite(x).all()):
            raise InvalidInput(f"{here}: the input holds NaN or infinity.")
        whole = isinstance(y, int | np.integer) or (
            isinstance(y, Tensor) and y.numel() == 1 and not y.is_floating_point()
        )
        if not whole or not 0 <= int(y) < num_classes:
            raise InvalidInput(f"{here}: the label is {y!r}; expected an integer from 0 to {num_classes - 1}.")
        shape = tuple(x.shape)
    return shape
