"""What a study is run on: the kinds of workload. :mod:`mlcollage.data.loading` loads them by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from mlcollage._users import users_code
from mlcollage.data._samples import in_memory, length, look, read
from mlcollage.errors import InvalidInput

_MANY = 100_000  # classes; more than that, and more than there are samples, is a mistake that would fill the memory


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

    def check(self, where: str, *, every: bool = False) -> None:
        """Refuse what no study can use, in one sentence that starts with ``where``; ``every`` reads every sample."""

    def describe(self, *, every: bool = False) -> dict[str, Any]:
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
    other_model
        A second network in the same way, for studies that compare two.
    views
        ``views(x, generator)`` gives two random views of a batch of inputs, with draws from a ``torch.Generator``, for
        studies that learn from views; None for the study's own changes.
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
    other_model: Callable[[], nn.Module] | None = None
    views: Callable[[torch.Tensor, torch.Generator], tuple[torch.Tensor, torch.Tensor]] | None = None

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

    def check(self, where: str, *, every: bool = False) -> None:
        """Look at all samples of tensors in memory, else at the first and the last.

        Parameters
        ----------
        where
            Begins the sentence of a refusal.
        every
            Read every sample, however long it takes. Without it, the others are checked when a study reads them.

        Raises
        ------
        InvalidInput
            If a sample is no pair of a finite float tensor and a label from 0 to ``num_classes - 1``, shapes or types
            differ, or ``num_classes`` or ``model`` cannot be used.
        """
        self._seen(where, every)

    def _seen(self, where: str, every: bool) -> tuple[tuple[int, ...], float, float]:
        """Shape, smallest and largest value of the inputs that were looked at."""
        count = self.num_classes
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 2:
            raise InvalidInput(f"{where}: num_classes must be an int of at least 2; got {count!r}.")
        for name, make in (("model", self.model), ("other_model", self.other_model)):
            if isinstance(make, nn.Module):
                raise InvalidInput(
                    f"{where}: {name} must make a fresh module, e.g. lambda: Net(); it is a module itself."
                )
            if make is not None and not callable(make):
                raise InvalidInput(f"{where}: {name} must be a function that returns a module; got {make!r}.")
        size = length(self.train, f"{where}: train")
        if count > max(_MANY, size):
            raise InvalidInput(
                f"{where}: num_classes is {count:,} and train has {size:,} samples; give the true number."
            )
        seen = [look(part, int(count), f"{where}: {name}", every) for name, part in self._parts()]
        if seen[0][0] != seen[1][0]:
            raise InvalidInput(f"{where}: inputs are {seen[0][0]} in train and {seen[1][0]} in test.")
        return seen[0][0], min(part[1] for part in seen), max(part[2] for part in seen)

    def _parts(self) -> tuple[tuple[str, Dataset[Any]], tuple[str, Dataset[Any]]]:
        return ("train", self.train), ("test", self.test)

    def describe(self, *, every: bool = False) -> dict[str, Any]:
        """Sizes, shape and classes in plain values; makes the model once and tries it on two samples.

        Parameters
        ----------
        every
            Look at every sample first, also where each must be decoded (see :meth:`check`).

        Raises
        ------
        InvalidInput
            If the samples are not as they must be, or the model does not map a batch to ``num_classes`` logits.
        """
        facts = super().describe()
        shape, low, high = self._seen(self.name, every)
        whole = every or all(in_memory(part) is not None for _, part in self._parts())
        with users_code(f"{self.name}: train.classes"):
            names = [str(name) for name in getattr(self.train, "classes", None) or ()]
        return {
            "name": facts.pop("name"),
            "train": length(self.train, "train"),
            "test": length(self.test, "test"),
            "shape": list(shape),
            "values": f"{low:g} to {high:g}",
            "checked": "all samples" if whole else "the first and the last sample; --all looks at every one",
            "num_classes": int(self.num_classes),
            "classes": names if len(names) == self.num_classes else [str(k) for k in range(self.num_classes)],
            "model": "the study's own" if self.model is None else self._try(self.model),
            **({} if self.other_model is None else {"other_model": self._try(self.other_model)}),
            **facts,
        }

    def _try(self, make: Callable[[], nn.Module]) -> str:
        last = length(self.train, "train") - 1
        ((x, _),) = read(self.train, np.array([0, last]), "train")  # (2, *shape)
        # Initialization draws from the global generator, which is left as it was.
        with torch.random.fork_rng(devices=[]):
            model = make_network(make)
        with users_code(f"the workload's model on inputs {tuple(x.shape)}"), torch.no_grad():
            logits = model.eval()(x)
        if getattr(logits, "shape", None) != (2, self.num_classes):
            raise InvalidInput(
                f"the workload's model maps {tuple(x.shape)} to {tuple(getattr(logits, 'shape', ()))}; expected "
                f"(2, {self.num_classes}), one logit per class."
            )
        if not torch.isfinite(logits).all():
            raise InvalidInput(
                "the workload's fresh model gives NaN or infinity for the first or the last training sample; expected "
                "finite logits: look at its initialization, and at the range of the inputs."
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


def make_network(model: Callable[[], nn.Module], what: str = "the workload's model()") -> nn.Module:
    """Call a user's ``model`` function, which messages call ``what``.

    Raises
    ------
    InvalidInput
        If it fails or returns something else than a module.
    """
    with users_code(what):
        network = model()
    if not isinstance(network, nn.Module):
        raise InvalidInput(f"{what} must return a torch.nn.Module; got {type(network).__name__}.")
    return network


def arrays(
    dataset: Dataset[Any], rows: int | Sequence[int] | NDArray | None = None, *, num_classes: int | None = None
) -> tuple[NDArray, NDArray]:
    """Return a dataset as arrays: inputs float32 ``(n, ...)`` and labels int64 ``(n,)``; every sample is checked.

    Parameters
    ----------
    dataset
        Map-style dataset of ``(input, label)``.
    rows
        Which samples: their indices, or a number for the first so many; by default all.
    num_classes
        Labels must be below it; None does not look.

    Raises
    ------
    InvalidInput
        If there is no sample, one fails, inputs differ in shape or type or hold NaN or infinity, or labels are not
        integers from 0 (below ``num_classes``). The sentence names the sample.

    Examples
    --------
    >>> data = TensorDataset(torch.rand(120, 4), torch.arange(120) % 3)
    >>> X, y = arrays(data, 100)
    >>> X.shape, X.dtype, y.dtype
    ((100, 4), dtype('float32'), dtype('int64'))
    """
    size = length(dataset, "the dataset")
    wanted = np.arange(size)[:rows] if rows is None or isinstance(rows, int) else np.asarray(rows)
    if len(wanted) and (wanted.dtype.kind not in "iu" or not -size <= wanted.min() <= wanted.max() < size):
        raise InvalidInput(f"rows must be whole numbers below {size}, the number of samples; got {rows!r}.")
    if not len(wanted):
        raise InvalidInput(f"the dataset has {size} samples and rows is {rows}; nothing is left.")
    parts = list(read(dataset, wanted, "dataset", num_classes, floats=False))
    X, y = (torch.cat([part[i] for part in parts]) if len(parts) > 1 else parts[0][i] for i in (0, 1))
    return X.cpu().numpy(), y.cpu().numpy()
