"""The one way from a workload, or from a study's own data, to what is trained and tested, with which network, where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from mlcollage import _checks as checks
from mlcollage.data._samples import in_memory, length
from mlcollage.data.fresh_networks import fresh
from mlcollage.data.row_hashes import row_hashes
from mlcollage.data.workload import Labeled, arrays
from mlcollage.errors import InvalidInput

Statistics = Literal["population", "sample", "none"]
_ACCIDENTS = 0.01  # share of test samples that may be in training, beyond what the training set lets expect
_CHANCE = 1e-6  # probability that more than the largest allowed number are shared by accident


class Samples(NamedTuple):
    """Inputs ``(n, *shape)`` float32 and labels ``(n,)`` int64, on the problem's device."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Problem:
    """One seed's data and the network that learns them; made by :func:`problem`.

    Parameters
    ----------
    train, validation, test
        Inputs and labels; unpack them as ``x, y = p.train``. A part of which no sample was asked for is empty.
    num_classes
        Number of classes.
    make_model
        Makes a fresh network on the CPU: the user's, or the study's own.
    users_model
        Whether it is the user's.
    center, spread
        What :meth:`standardize` subtracts and then divides by: 0 and 1 if inputs are left as they are, one number for
        each feature of a user's table.
    shared
        Number of test samples whose inputs are, byte for byte, also among the training or validation samples.
    device
        Where the samples are.
    """

    train: Samples
    validation: Samples
    test: Samples
    num_classes: int
    make_model: Callable[[], nn.Module]
    users_model: bool = False
    center: float | Tensor = 0.0
    spread: float | Tensor = 1.0
    shared: int = 0
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.x.shape[1:])

    def standardize(self, x: NDArray[np.float32] | Tensor) -> Tensor:
        """Other inputs, as the problem's own were: ``(x - center) / spread``, float32."""
        return ((torch.as_tensor(x) - self.center) / self.spread).float()


def problem(
    workload: Labeled | None,
    default: Callable[[], Labeled],
    *,
    rng: np.random.Generator | None = None,
    train: int | None = None,
    validation: int = 0,
    test: int | None = None,
    share: float = 1.0,
    draw_test: bool = True,
    standardize: Statistics = "population",
    standardize_users: bool = False,
    flat: bool = False,
    model: Callable[[tuple[int, ...], int], nn.Module] | None = None,
    device: str | torch.device = "cpu",
) -> Problem:
    """Draw one seed's training, validation and test samples and standardize them by the training samples.

    Training samples are the first ``train`` of a random order of the training rows, validation samples the next
    ``validation``; test samples are the first ``test`` of a random order of the test rows. Only these are read, so that
    images that are decoded when asked for cost no more than they must.

    Parameters
    ----------
    workload
        The user's, or None for the study's own data.
    default
        Gives the study's own data; called only without a workload. :meth:`Labeled.from_arrays` makes it of arrays.
    rng
        Draws the order of the training rows, then that of the test rows, and nothing else: what the study draws from
        it afterwards (wrong labels, shuffled inputs) goes on from there. None keeps the order of the data.
    train, validation, test
        Number of samples, at most: where there are fewer, all are taken. ``train=None`` takes all rows that validation
        leaves, ``test=None`` all test rows; ``test=0`` for a study that tests nothing.
    share
        At most this share of the training rows is trained on, so that small sets leave some to validate on.
    draw_test
        Whether the test rows are put in random order too; False takes the first ones and draws nothing for them.
    standardize
        Over all entries of all training inputs together, so that pixels keep their relation, but over each feature of a
        user's table (inputs that are vectors), since features have units of their own: ``"population"``
        subtracts the mean and divides by the standard deviation with denominator n (as numpy computes them),
        ``"sample"`` with denominator n - 1 (as torch does); ``"none"`` leaves inputs as they are.
    standardize_users
        Whether inputs are standardized for a model of the user's too. By default they are not: the model may have
        layers or weights that expect them as they are.
    flat
        Whether inputs become vectors, ``(n, features)``.
    model
        Makes the study's own network from the shape of an input and the number of classes.
    device
        Where the samples go.

    Returns
    -------
    Problem

    Raises
    ------
    InvalidInput
        If a part is empty, if the workload's model hands out the same network twice (:func:`fresh`), or if its test
        and training samples overlap by more than accidental duplicates (:func:`refuse_shared`). All rows of tensors
        in memory are compared, and those that are drawn of datasets that decode their rows when asked for. The study's
        own data are never refused; :attr:`Problem.shared` counts in any case, among the samples that were drawn.

    Examples
    --------
    >>> from mlcollage.data.loading import load_workload
    >>> p = problem(None, lambda: load_workload("digits"), rng=np.random.default_rng(0), train=500, validation=100)
    >>> p.train.x.shape, len(p.validation.y), len(p.test.y), p.num_classes
    (torch.Size([500, 1, 8, 8]), 100, 540, 10)
    >>> round(float(p.train.x.mean()), 4), round(float(p.train.x.std()), 4)
    (0.0, 1.0)
    """
    checks.choice("standardize", standardize, ("population", "sample", "none"))
    for name, count in (("train", train), ("validation", validation), ("test", test)):
        if count is not None:
            checks.integer(name, count, least=0)
    source = default() if workload is None else workload
    users_model = workload is not None and workload.model is not None
    size, tests = (length(part, f"a part of {source.name}", least=0) for part in (source.train, source.test))
    # The training order is drawn before the test order, and always over all rows: sizes do not change what is drawn.
    order = np.arange(size) if rng is None else rng.permutation(size)
    tested = (np.arange(tests) if rng is None or not draw_test else rng.permutation(tests))[:test]
    trained = min(max(0, size - validation) if train is None else train, int(share * size))
    chosen, held = order[:trained], order[trained : trained + validation]
    asked = {"training": (chosen, 1), "validation": (held, validation), "test": (tested, 1 if test is None else test)}
    for part, (rows, wanted) in asked.items():
        if wanted and not len(rows):
            raise InvalidInput(f"{source.name} has too few samples: none is left for the {part} set.")
    # (train + validation, *shape) and (test, *shape)
    x, y = arrays(source.train, np.concatenate([chosen, held]), num_classes=source.num_classes)
    x_test, y_test = arrays(source.test, tested, num_classes=source.num_classes) if len(tested) else (x[:0], y[:0])
    if workload is not None:
        if workload.model is not None:
            fresh(workload.model)
        if len(tested):
            refuse_overlap(_compared(source.train, x), _compared(source.test, x_test), _samples_of(workload.name))
    shared = shared_samples(x, x_test)
    n, place = len(chosen), torch.device(device)
    statistics: Statistics = standardize if standardize_users or not users_model else "none"
    table = workload is not None and x.ndim == 2
    center, spread = feature_moments(x[:n], statistics) if table else moments(x[:n], statistics)

    def samples(inputs: NDArray, labels: NDArray) -> Samples:
        # Standardized on the CPU: GPUs divide by a number by multiplying with its rounded inverse.
        t = ((torch.from_numpy(inputs) - center) / spread).float()  # (n, *shape)
        return Samples((t.flatten(1) if flat else t).to(place), torch.from_numpy(labels).to(place))

    first = samples(x[:n], y[:n])
    make = source.model or (partial(model, tuple(first.x.shape[1:]), source.num_classes) if model else _no_model)
    return Problem(
        first,
        samples(x[n:], y[n:]),
        samples(x_test, y_test),
        source.num_classes,
        make,
        users_model,
        center,
        spread,
        shared,
        place,
    )


def feature_moments(x: NDArray[np.float32], statistics: Statistics = "sample") -> tuple[Tensor, Tensor]:
    """As :func:`moments`, for each column of ``x`` of shape ``(n, features)``: two vectors in float64.

    Examples
    --------
    >>> feature_moments(np.float32([[1, 10, 7], [3, 50, 7]]), "population")
    (tensor([ 2., 30.,  7.], dtype=torch.float64), tensor([ 1., 20.,  1.], dtype=torch.float64))
    """
    found = [moments(column, statistics) for column in np.asarray(x, np.float64).T]
    center, spread = torch.tensor(found, dtype=torch.float64).T
    return center, spread


def moments(x: NDArray[np.float32] | Tensor, statistics: Statistics = "sample") -> tuple[float, float]:
    """Mean and standard deviation over all entries; the deviation of constant inputs is given as 1.

    Parameters
    ----------
    x
        Inputs of any shape.
    statistics
        ``"population"``: denominator n, computed by numpy. ``"sample"``: denominator n - 1, computed by torch.
        ``"none"``: 0 and 1.

    Examples
    --------
    >>> moments(np.float32([[1, 5]]), "population")
    (3.0, 2.0)
    >>> moments(torch.tensor([1.0, 3.0, 5.0]), "sample")
    (3.0, 2.0)
    """
    if statistics == "none":
        return 0.0, 1.0
    if statistics == "population":
        # numpy and torch sum in different orders; studies that began with one keep its last bits.
        values = np.asarray(x)
        center, spread = float(values.mean()), float(values.std())
    else:
        tensor = torch.as_tensor(x)
        center, spread = float(tensor.mean()), float(tensor.std())
    # Rounding gives constant float32 inputs a deviation of about 1e-8 of their size.
    return center, spread if spread > 1e-6 * abs(center) else 1.0


def shared_samples(train: NDArray, test: NDArray) -> int:
    """Count the test rows whose inputs are, byte for byte, also a training row; labels are not looked at.

    Examples
    --------
    >>> shared_samples(np.float32([[0, 1], [2, 3]]), np.float32([[2, 3], [4, 5], [2, 3]]))
    2
    """
    return int(torch.isin(row_hashes(test), row_hashes(train)).sum())


def refuse_shared(train: NDArray[Any] | Tensor, test: NDArray[Any] | Tensor, name: str = "the workload") -> None:
    """Refuse test samples that were trained on, but not the accidental duplicates that most real sets have.

    The rule: if all rows were drawn independently, a test row would have a twin in training about as often as a
    training row has one among the other training rows (never for photographs, often for a table of four yes-or-no
    columns). The overlap is refused if it is larger than the 1 - 1e-6 quantile of a binomial with as many trials as
    there are test rows and that share, plus 1 %, as its probability: 1 of 38 (iris as scikit-learn has it) passes, and
    so does 1 % of any set, but not 150 of 10,000 or all of 4. Fewer than four test rows are never refused. Rows that
    were copied before the split cannot be told from natural duplicates, so they pass too.

    Parameters
    ----------
    train, test
        Inputs ``(n, ...)``.
    name
        Of the workload, for the message.

    Raises
    ------
    InvalidInput
        One sentence with the count.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(100, 3))
    >>> refuse_shared(x[:80], x[80:])
    >>> refuse_shared(x, x[80:])
    Traceback (most recent call last):
    ...
    mlcollage.errors.InvalidInput: 20 of 20 test samples of the workload are also training samples; ...
    """
    refuse_overlap(row_hashes(train), row_hashes(test), _samples_of(name))


def refuse_overlap(train: Tensor, test: Tensor, sentence: str) -> None:
    """The rule of :func:`refuse_shared` for rows that are known by their hashes alone.

    Parameters
    ----------
    train, test
        Of :func:`~mlcollage.data.row_hashes.row_hashes`, ``(n,)`` and ``(m,)``.
    sentence
        Of the refusal, with ``{shared}`` and ``{tests}`` in it.
    """
    shared = int(torch.isin(test, train).sum())
    if shared <= binom.isf(_CHANCE, len(test), _ACCIDENTS):  # few enough whatever twins there are
        return
    counts = train.unique(return_counts=True)[1]
    expected = min(1.0, int(counts[counts > 1].sum()) / len(train) + _ACCIDENTS)
    if shared > binom.isf(_CHANCE, len(test), expected):
        raise InvalidInput(sentence.format(shared=shared, tests=len(test)))


def _samples_of(name: str) -> str:
    return (
        "{shared} of {tests} test samples of "
        + name.replace("{", "{{").replace("}", "}}")
        + " are also training samples; give test samples that training never sees."
    )


_known: WeakKeyDictionary[Dataset[Any], tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()


def _compared(dataset: Dataset[Any], drawn: NDArray) -> Tensor:
    """Hashes of all inputs of a dataset that holds them in memory, else of those that were drawn."""
    tensors = in_memory(dataset)
    if tensors is None:
        return row_hashes(drawn)
    # Every run and seed of a process asks for them; a tensor that was written to since has another version.
    state = tensors[0].data_ptr(), tensors[0]._version
    if not isinstance(dataset, TensorDataset):  # a part of one, put together anew at each call
        return row_hashes(tensors[0].float())
    if dataset not in _known or _known[dataset][0] != state:
        _known[dataset] = state, row_hashes(tensors[0].float())
    return _known[dataset][1]


def _no_model() -> nn.Module:
    raise InvalidInput("this problem has no network: neither the workload nor the study gives one.")
