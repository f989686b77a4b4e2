"""The classifier as a river estimator: samples as dicts or data frames; features and classes may appear at any time."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput, MissingDependency

from ._inputs import Inputs
from ._settings import LearningRate, check_rate
from .network import GatedNetwork, normalized

try:
    from river import base
except ImportError as error:
    raise MissingDependency("RiverGLN needs river: pip install 'mlcollage[river]'.") from error

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]
Sample = Mapping[Hashable, Any]


@dataclass(eq=False, repr=False)
class RiverGLN(base.MiniBatchClassifier):
    """Gated linear network for river: ``learn_one(x, y)``, ``predict_proba_one(x)``, any features, any classes.

    A feature is standardized by the running mean and deviation of the samples that had it; a sample that lacks it
    counts as having its mean. Features that are strings are one-hot (``name=value``). A feature not met before widens
    the network, and a class not met before adds one, from that sample on.

    ``learn_many`` gives the same network as ``learn_one`` row after row, bit for bit, in less time; a missing value of
    a data frame (NaN, None, NA) is a feature that the row lacks.

    Parameters
    ----------
    hidden_layer_sizes : tuple of int, default (16, 16)
        Neurons in each layer below the output neuron.
    context_dim : int, default 4
        Hyperplanes of a neuron.
    learning_rate : float, default 0.02
        Step size; also ``"paper"``, ``"official"`` or a function of the step, as in :class:`GLNClassifier`.
    eps : float, default 0.01
        Clip between layers.
    weight_clip : float, default 200
        Box of the weights.
    context_bias_scale : float, default 0.05
        Standard deviation of the hyperplanes' offsets.
    max_deviation : float or None, default 10
        A feature counts as at most so many running standard deviations from its mean.
    memory : int or None, default None
        Samples that the running moments, and named schedules of step sizes, remember; for streams that change.
    weight_init : {"mean", "zeros"}, default "mean"
        Weights start at 1/fan-in or at 0.
    gradient : {"paper", "official"}, default "paper"
        As in :class:`GLNClassifier`.
    seed : int, default 0
        Draws the hyperplanes.

    Examples
    --------
    >>> from river import datasets, metrics
    >>> model, accuracy = RiverGLN(), metrics.Accuracy()
    >>> for x, y in datasets.Phishing():
    ...     accuracy.update(y, model.predict_one(x))
    ...     model.learn_one(x, y)
    >>> accuracy.get() > 0.85
    True
    """

    hidden_layer_sizes: tuple[int, ...] = (16, 16)
    context_dim: int = 4
    learning_rate: LearningRate = 0.02
    eps: float = 0.01
    weight_clip: float = 200.0
    context_bias_scale: float = 0.05
    max_deviation: float | None = 10.0
    memory: int | None = None
    weight_init: str = "mean"
    gradient: str = "paper"
    seed: int = 0

    def __post_init__(self) -> None:
        check_rate(self.learning_rate, 0.01)
        self.classes: list[Hashable] = []
        self._columns: dict[Hashable, int] = {}  # feature -> its place among the network's inputs
        self._choices: dict[Hashable, dict[str, None]] = {}  # string feature -> its columns
        self._network: GatedNetwork | None = None
        self._inputs = Inputs(0, "standardize", 0.0, 0.0, 0.0, np.float32, self.max_deviation, self.memory)

    @property
    def _multiclass(self) -> bool:
        return True

    # ------------------------------------------------------------------ one sample

    def learn_one(self, x: Sample, y: Any) -> None:
        """Learn from one sample.

        Parameters
        ----------
        x : dict
            Feature name -> number, bool or string.
        y : hashable
            Label.

        Raises
        ------
        InvalidInput
            A feature that is neither a finite number nor a string, or a missing label.
        """
        self._learn([x], [y])

    def predict_proba_one(self, x: Sample, **kwargs: Any) -> dict[Any, float]:
        """Probability of each label seen so far; an empty dict before the first."""
        return dict(zip(self.classes, self._predict([x])[0].tolist(), strict=True))

    # ------------------------------------------------------------------ mini-batches

    def learn_many(self, X: pd.DataFrame, y: pd.Series) -> None:
        """Learn from the rows of a data frame, one after the other.

        Raises
        ------
        InvalidInput
            A value that is neither a finite number nor a string nor missing, a missing label, or another number of
            labels than of rows; then nothing is learned.
        """
        if len(X) != len(y):
            raise InvalidInput(f"X and y must have as many rows; got {len(X)} and {len(y)}.")
        self._learn(_rows(X), y.tolist())

    def predict_proba_many(self, X: pd.DataFrame) -> pd.DataFrame:
        """Probability of each label seen so far, a column per label and a row per sample."""
        import pandas as pd

        return pd.DataFrame(self._predict(_rows(X)), index=X.index, columns=pd.Index(self.classes, dtype=object))

    # ------------------------------------------------------------------ both

    def _learn(self, samples: Sequence[Sample], labels: Sequence[Any]) -> None:
        import pandas as pd

        encoded = [_numbers(x) for x in samples]  # all are checked before anything is learned
        for label in labels:
            if pd.isna(label) is True:  # of a tuple it gives an array
                raise InvalidInput(f"A label is missing ({label!r}); leave out the samples that have none.")
        if self._network is None:
            self._network = self._untrained()
        start = 0
        for i, (x, values, label) in enumerate(zip(samples, encoded, labels, strict=True)):
            # By name, so that the order of the features in a dict does not matter.
            new = sorted(values.keys() - self._columns.keys(), key=lambda name: (str(name), repr(name)))
            if new or label not in self.classes:  # what is new begins here: the samples before it go first
                self._learn_block(samples[start:i], encoded[start:i], labels[start:i])
                start = i
            if new:
                for name in (name for name, value in x.items() if isinstance(value, str)):
                    self._choices.setdefault(name, {})[f"{name}={x[name]}"] = None
                self._columns |= {name: len(self._columns) + k for k, name in enumerate(new)}
                self._inputs.widen(len(new))
                self._network.widen(len(new))
            if label not in self.classes:
                self.classes.append(label.item() if isinstance(label, np.generic) else label)
                self._network.add_heads(1)
        self._learn_block(samples[start:], encoded[start:], labels[start:])

    def _learn_block(
        self, samples: Sequence[Sample], encoded: Sequence[Mapping[Hashable, float]], labels: Sequence[Any]
    ) -> None:
        """Learn from samples whose features and labels are all known."""
        if not samples or self._network is None:
            return
        base, side = self._inputs(self._matrix(samples, encoded), learn=True)
        targets = np.array([[float(own == label) for own in self.classes] for label in labels])  # (n, classes)
        self._network.learn(base, side, targets, rate=self.learning_rate, memory=self.memory)

    def _predict(self, samples: Sequence[Sample]) -> Array:
        """Class probabilities, ``(n, classes)``."""
        encoded = [_numbers(x) for x in samples]
        if self._network is None or not samples:
            return np.empty((len(samples), len(self.classes)))
        return normalized(self._network.predict(*self._inputs(self._matrix(samples, encoded), learn=False)))

    def _matrix(self, samples: Sequence[Sample], encoded: Sequence[Mapping[Hashable, float]]) -> Array:
        """Samples as rows ``(n, columns)``, NaN where one lacks a feature; what was never learned from is left out."""
        out = np.full((len(samples), len(self._columns)), np.nan)
        for row, x, values in zip(out, samples, encoded, strict=True):
            for name, choices in self._choices.items():
                if isinstance(x.get(name), str):  # 0 for the other strings met under this name
                    row[[self._columns[choice] for choice in choices]] = 0.0
            for name, value in values.items():
                column = self._columns.get(name)
                if column is not None:
                    row[column] = value
        return out

    def _untrained(self) -> GatedNetwork:
        network = GatedNetwork(
            (*self.hidden_layer_sizes, 1),
            0,
            0,
            context_dim=self.context_dim,
            eps=self.eps,
            weight_clip=self.weight_clip,
            context_bias_scale=self.context_bias_scale,
            weight_init=self.weight_init,
            gradient=self.gradient,
            seed=self.seed,
        )
        self._inputs.bias, self._inputs.limit = network.bias, network.limit
        return network


def _numbers(x: Sample) -> dict[Hashable, float]:
    """Numbers as they are; a string as 1 under the name of its value."""
    values: dict[Hashable, float] = {}
    for name, value in x.items():
        if isinstance(value, str):
            values[f"{name}={value}"] = 1.0
            continue
        try:
            values[name] = float(value)
        except (TypeError, ValueError):
            values[name] = math.nan
        if not math.isfinite(values[name]):
            raise InvalidInput(f"Feature {name!r} must be a finite number, a bool or a string; got {value!r}.")
    return values


def _rows(X: pd.DataFrame) -> Sequence[Sample]:
    """The rows as dicts of what they have."""
    records: Sequence[Sample] = X.to_dict("records")
    there = X.notna().to_numpy()
    if there.all():
        return records
    return [
        {k: v for (k, v), has in zip(x.items(), row, strict=True) if has} for x, row in zip(records, there, strict=True)
    ]
