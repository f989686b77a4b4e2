"""The classifier as a river estimator: samples as dicts, one at a time; features and classes may appear at any time."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput, MissingDependency

from ._settings import LearningRate, check_rate
from .network import GatedNetwork, normalized

try:
    from river import base
except ImportError as error:
    raise MissingDependency("RiverGLN needs river: pip install 'mlcollage[river]'.") from error

Array = NDArray[Any]


@dataclass(eq=False, repr=False)
class RiverGLN(base.Classifier):
    """Gated linear network for river: ``learn_one(x, y)``, ``predict_proba_one(x)``, any features, any classes.

    A feature is standardized by the running mean and deviation of the samples that had it; a sample that lacks it
    counts as having its mean. Features that are strings are one-hot (``name=value``). A feature not met before widens
    the network, and a class not met before adds one, from that sample on.

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
    weight_init: str = "mean"
    gradient: str = "paper"
    seed: int = 0

    def __post_init__(self) -> None:
        check_rate(self.learning_rate, 0.01)
        self.classes: list[Hashable] = []
        self._columns: dict[Hashable, int] = {}  # feature -> its place among the network's inputs
        self._choices: dict[Hashable, dict[str, None]] = {}  # string feature -> its columns
        self._moments = np.zeros((3, 0))  # (3, features): how often seen, mean, sum of squared deviations
        self._network: GatedNetwork | None = None

    @property
    def _multiclass(self) -> bool:
        return True

    def learn_one(self, x: Mapping[Hashable, Any], y: Any) -> None:
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
            A feature that is neither a finite number nor a string.
        """
        values = self._numbers(x)
        for name in (name for name, value in x.items() if isinstance(value, str)):
            self._choices.setdefault(name, {})[f"{name}={x[name]}"] = None
        self._widen(values)
        columns = np.array([self._columns[name] for name in values], np.int64)
        row = np.fromiter(values.values(), np.float64, len(values))
        # Welford's update, for the features that the sample has.
        count, mean, square = self._moments[:, columns]
        delta = row - mean
        mean = mean + delta / (count + 1)
        self._moments[:, columns] = count + 1, mean, square + delta * (row - mean)
        network = self._network
        assert network is not None
        if y not in self.classes:
            self.classes.append(y.item() if isinstance(y, np.generic) else y)
            network.add_heads(1)
        # (1, classes)
        targets = np.array([[float(label == y) for label in self.classes]])
        network.learn(*self._inputs(values), targets, rate=self.learning_rate)

    def predict_proba_one(self, x: Mapping[Hashable, Any], **kwargs: Any) -> dict[Any, float]:
        """Probability of each label seen so far; an empty dict before the first."""
        if self._network is None or not self.classes:
            return {}
        p = normalized(self._network.predict(*self._inputs(self._numbers(x))))[0]
        return dict(zip(self.classes, p.tolist(), strict=True))

    def _widen(self, values: Mapping[Hashable, float]) -> None:
        # By name, so that the order of the features in a dict does not matter.
        new = sorted((name for name in values if name not in self._columns), key=lambda name: (str(name), repr(name)))
        if self._network is None:
            self._network = GatedNetwork(
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
        if not new:
            return
        self._columns |= {name: len(self._columns) + i for i, name in enumerate(new)}
        self._moments = np.concatenate([self._moments, np.zeros((3, len(new)))], axis=1)
        self._network.widen(len(new))

    def _numbers(self, x: Mapping[Hashable, Any]) -> dict[Hashable, float]:
        """Numbers as they are; a string as 1 for its value and 0 for the other values met under that name."""
        values: dict[Hashable, float] = {}
        for name, value in x.items():
            if isinstance(value, str):
                values |= dict.fromkeys(self._choices.get(name, ()), 0.0)
                values[f"{name}={value}"] = 1.0
                continue
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise InvalidInput(f"Feature {name!r} must be a finite number, a bool or a string; got {value!r}.")
            values[name] = number
        return values

    def _inputs(self, values: Mapping[Hashable, float]) -> tuple[Array, Array]:
        network = self._network
        assert network is not None
        side = np.zeros((1, len(self._columns)), network.dtype)  # 0 is the mean: what a missing feature counts as
        for name, value in values.items():
            column = self._columns.get(name)
            if column is None:
                continue  # never learned from
            count, mean, square = self._moments[:, column]
            if square > 0:
                side[0, column] = (value - mean) / math.sqrt(square / count)
        base = np.empty((1, side.shape[1] + 1), network.dtype)
        base[0, 0] = network.bias
        np.clip(side, -network.limit, network.limit, out=base[:, 1:])
        return base, side
