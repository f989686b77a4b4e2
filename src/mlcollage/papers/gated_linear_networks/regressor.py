"""Online regression with predictive standard deviations: the Gaussian network as a scikit-learn estimator."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from mlcollage.errors import InvalidInput

from .classifier import StepOptions, check_rate, only_weight, step_factors
from .gaussian import GaussianNetwork
from .inputs import Inputs
from .kernels import active
from .network import LearningRate, hidden_sizes
from .persist import load_arrays, save_arrays

__all__ = ["GLNRegressor"]

Array = NDArray[Any]
_BLOCK = 4096


class GLNRegressor(RegressorMixin, BaseEstimator):
    r"""Gaussian gated linear network: online regression, one sample at a time, with a predictive variance.

    A neuron is the weighted product of the Gaussians below it, with the weights that its context selects, and descends
    its own negative log-likelihood (Budden et al., NeurIPS 2020; see :mod:`.gaussian` for the equations). Features
    enter as :math:`N(s_i, 1)`, online-standardized; the target is online-standardized too, so that its units do not
    matter.

    Parameters
    ----------
    hidden_layer_sizes : sequence of int, default (50, 25)
        Neurons in each layer below the output neuron.
    context_dim : int, default 4
        Hyperplanes of a neuron.
    learning_rate : "paper", "official", float or callable, default 0.02
        As in :class:`GLNClassifier`.
    learning_rate_init : float, default 0.01
        Largest rate of the named schedules.
    min_variance, max_variance : float, default 0.05 and 10
        Bounds of the variance of every neuron, in units of the target's variance (the official code has 1e5 above).
    weight_clip : float, default 1000
        Box of the weights.
    step_limit : float or None, default 1
        Longest step in units of a neuron's inverse information, which keeps learning stable for any learning rate; None
        is the paper's plain gradient (see :class:`.gaussian.GaussianNetwork`).
    context_bias_scale : float, default 0.05
        Standard deviation of the hyperplanes' offsets.
    std_offset : float, default 0
        Added to the features' running standard deviation.
    weight_init : {"mean", "zeros"}, default "mean"
        Weights start at 1/fan-in or at 0.
    gradient : {"paper", "official"}, default "paper"
        Projected gradient descent, or the official code's gradient through the projection.
    tables : {"auto", "dense", "lazy"}, default "auto"
        As in :class:`GLNClassifier`.
    shuffle : bool, default False
        Shuffle the samples before each pass of ``fit``.
    n_passes : int, default 1
        Passes of ``fit``.
    dtype : {"float64", "float32"}, default "float64"
        Of weights and arithmetic.
    random_state : int, RandomState or None, default None
        Draws the hyperplanes, and the order when shuffling.

    Attributes
    ----------
    network_ : GaussianNetwork
        The network.
    n_features_in_ : int
        Width of a sample.
    t_ : int
        Samples learned from so far.

    References
    ----------
    Budden et al., "Gaussian Gated Linear Networks", NeurIPS 2020, arXiv:2006.05964.

    Examples
    --------
    >>> from sklearn.datasets import make_friedman1
    >>> X, y = make_friedman1(4000, random_state=0)
    >>> model = GLNRegressor(random_state=0).fit(X[:3000], y[:3000])
    >>> mean, std = model.predict(X[3000:], return_std=True)
    >>> bool(model.score(X[3000:], y[3000:]) > 0.7), mean.shape, std.shape
    (True, (1000,), (1000,))
    """

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (50, 25),
        context_dim: int = 4,
        *,
        learning_rate: LearningRate = 0.02,
        learning_rate_init: float = 0.01,
        min_variance: float = 0.05,
        max_variance: float = 10.0,
        weight_clip: float = 1000.0,
        step_limit: float | None = 1.0,
        context_bias_scale: float = 0.05,
        std_offset: float = 0.0,
        weight_init: str = "mean",
        gradient: str = "paper",
        tables: str = "auto",
        shuffle: bool = False,
        n_passes: int = 1,
        dtype: Any = "float64",
        random_state: Any = None,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.context_dim = context_dim
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.min_variance = min_variance
        self.max_variance = max_variance
        self.weight_clip = weight_clip
        self.step_limit = step_limit
        self.context_bias_scale = context_bias_scale
        self.std_offset = std_offset
        self.weight_init = weight_init
        self.gradient = gradient
        self.tables = tables
        self.shuffle = shuffle
        self.n_passes = n_passes
        self.dtype = dtype
        self.random_state = random_state

    # ------------------------------------------------------------------ learning

    def fit(self, X: Any, y: Any, **options: Unpack[StepOptions]) -> Self:
        """Forget everything and learn from the samples in their order; see :meth:`GLNClassifier.fit`."""
        weight = only_weight(options)
        if self.n_passes < 1:
            raise InvalidInput(f"n_passes must be >= 1; got {self.n_passes!r}.")
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32), y_numeric=True)
        factors = step_factors(weight, X)
        rng = self._begin()
        order = np.arange(len(X)) if factors is None else np.flatnonzero(factors > 0)
        for _ in range(self.n_passes):
            if self.shuffle:
                rng.shuffle(order)
            self._learn(X, y, factors, order)
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Continue with more samples; any cut of a stream into calls gives the same network, bit for bit."""
        self._partial(X, y, sample_weight)
        return self

    def progressive_predict(self, X: Any, y: Any, *, return_std: bool = False) -> Any:
        """Test, then train: the prediction of each sample from before it was learned, ``(n,)``, and its deviation."""
        mean, std = self._partial(X, y, None)
        return (mean, std) if return_std else mean

    def _partial(self, X: Any, y: Any, weight: ArrayLike | None) -> tuple[Array, Array]:
        first = not hasattr(self, "network_")
        X, y = validate_data(self, X, y, reset=first, dtype=(np.float64, np.float32), y_numeric=True)
        factors = step_factors(weight, X)
        if first:
            self._begin()
        return self._learn(X, y, factors, np.arange(len(X)) if factors is None else np.flatnonzero(factors > 0))

    def _begin(self) -> np.random.RandomState:
        check_rate(self.learning_rate, self.learning_rate_init)
        rng = check_random_state(self.random_state)
        self._build(int(rng.randint(np.iinfo(np.int32).max)), self.n_features_in_)
        self.network_.add_heads(1)
        self._target_, self._seen_ = np.zeros((2, 1)), np.zeros(1)
        self.t_ = 0
        return rng

    def _build(self, seed: int, n_features: int) -> None:
        self._seed_ = seed
        self.network_ = GaussianNetwork(
            (*hidden_sizes(self.hidden_layer_sizes), 1),
            n_features,
            n_features,
            context_dim=self.context_dim,
            min_variance=self.min_variance,
            max_variance=self.max_variance,
            weight_clip=self.weight_clip,
            step_limit=self.step_limit,
            context_bias_scale=self.context_bias_scale,
            weight_init=self.weight_init,
            gradient=self.gradient,
            tables=self.tables,
            dtype=self.dtype,
            seed=seed,
        )
        # The means of base Gaussians are not clipped: the limit of the inputs is infinite.
        self._inputs_ = Inputs(n_features, "standardize", self.std_offset, 0.0, np.inf, self.network_.dtype)

    def _base(self, X: Array, *, learn: bool) -> tuple[Array, Array]:
        base, side = self._inputs_(X, learn=learn)
        biases = np.broadcast_to(np.array(self.network_.bias_means, base.dtype), (len(X), 3))
        return np.concatenate([biases, base[:, 1:]], axis=1), side

    def _learn(self, X: Array, y: Array, factors: Array | None, order: Array) -> tuple[Array, Array]:
        """Learn from ``X[order]``; mean and deviation from before each sample, in the target's units."""
        means, stds = np.empty(len(order)), np.empty(len(order))
        for start in range(0, len(order), _BLOCK):
            block = order[start : start + _BLOCK]
            scaled, before = np.empty(len(block)), np.empty((2, len(block)))
            goals = np.require(y[block], np.float64, ["C", "W"])
            active().running_moments(goals, self._target_, self._seen_, scaled, before)
            out = self.network_.run(
                *self._base(X[block], learn=True),
                scaled,
                rate=self.learning_rate,
                initial_rate=self.learning_rate_init,
                weight=None if factors is None else factors[block],
            )
            part = slice(start, start + len(block))
            means[part] = before[0] + before[1] * out[:, 0, -1]
            stds[part] = before[1] / np.sqrt(out[:, 1, -1])
            self.t_ += len(block)
        return means, stds

    # ------------------------------------------------------------------ prediction

    def _neurons(self, X: Any) -> tuple[Array, float, float]:
        """Mean and precision of all neurons in standardized units, and the target's mean and deviation."""
        check_is_fitted(self, "network_")
        X = validate_data(self, X, reset=False, dtype=(np.float64, np.float32))
        parts = [
            self.network_.run(*self._base(X[start : start + _BLOCK], learn=False)) for start in range(0, len(X), _BLOCK)
        ]
        deviation = float(np.sqrt(self._target_[1, 0] / max(self._seen_[0], 1.0)))
        return np.concatenate(parts), float(self._target_[0, 0]), deviation if deviation > 0 else 1.0

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predictive mean ``(n,)``; with ``return_std`` also the predictive standard deviation ``(n,)``."""
        out, mean, deviation = self._neurons(X)
        center = mean + deviation * out[:, 0, -1].astype(np.float64)
        return (center, deviation / np.sqrt(out[:, 1, -1].astype(np.float64))) if return_std else center

    def layer_predictions(self, X: Any) -> list[tuple[Array, Array]]:
        """Mean and standard deviation that every neuron predicts: a list over layers of two ``(n, K_l)`` arrays."""
        out, mean, deviation = self._neurons(X)
        ends = np.cumsum(self.network_.sizes)[:-1]
        means = np.split(mean + deviation * out[:, 0], ends, axis=1)
        return list(zip(means, np.split(deviation / np.sqrt(out[:, 1]), ends, axis=1), strict=True))

    def context_counts(self, X: Any) -> Array:
        """How often the contexts active at each sample were learned from, ``(n, n_neurons)``."""
        check_is_fitted(self, "network_")
        X = validate_data(self, X, reset=False, dtype=(np.float64, np.float32))
        return self.network_.visit_counts(self._base(X, learn=False)[1])[:, 0]

    # ------------------------------------------------------------------ disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the estimator to an ``.npz`` file without pickle; :meth:`load` continues from it bit for bit."""
        check_is_fitted(self, "network_")
        arrays = self.network_.state() | self._inputs_.state()
        names = getattr(self, "feature_names_in_", None)
        if names is not None:
            arrays["features"] = names.astype(str)
        arrays |= {"target": self._target_, "seen": self._seen_, "seed": np.array(self._seed_), "t": np.array(self.t_)}
        save_arrays(path, type(self).__name__, self.get_params(deep=False), arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **params: Any) -> Self:
        """Read what :meth:`save` wrote; a callable learning rate is passed again; see :meth:`GLNClassifier.load`."""
        settings, arrays = load_arrays(path, cls.__name__, params)
        model = cls(**settings)
        model.n_features_in_ = arrays["inputs.moments"].shape[1]
        if "features" in arrays:
            model.feature_names_in_ = arrays["features"].astype(object)
        model._build(int(arrays["seed"]), model.n_features_in_)
        model._inputs_.restore(arrays)
        model.network_.restore(arrays)
        model._target_, model._seen_, model.t_ = arrays["target"], arrays["seen"], int(arrays["t"])
        return model
