"""Density of binary vectors: one gated linear network a coordinate, chained (Veness et al., 2017 and 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from joblib import effective_n_jobs  # type: ignore[import-untyped]
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from mlcollage.errors import InvalidInput

from .classifier import check_rate
from .network import GatedNetwork, LearningRate, hidden_sizes, sigmoid

__all__ = ["GLNDensity"]

Array = NDArray[Any]
_BLOCK = 4096


class GLNDensity(DensityMixin, BaseEstimator):
    r"""Autoregressive density of binary vectors that is learned in one pass.

    .. math:: \log \rho(x) = \sum_{i=1}^{d} \log \rho_i(x_i \mid x_{<i}),

    where :math:`\rho_i` is a gated linear network whose base predictions and side information are the coordinates
    before :math:`i`: :math:`p_{0,j} = \operatorname{clip}(x_j, \epsilon, 1-\epsilon)` and :math:`z_j = 2 x_j - 1`. Each
    factor is a probability, so the density sums to one over all :math:`2^d` vectors.

    Parameters
    ----------
    hidden_layer_sizes : sequence of int, default (16, 16)
        Neurons in each layer below the output neuron, for every coordinate.
    context_dim : int, default 4
        Hyperplanes of a neuron.
    learning_rate : "sqrt", "paper", "official", float or callable, default "sqrt"
        As in :class:`GLNClassifier`.
    learning_rate_init : float, optional
        Largest rate of the named schedules; 3.2 / d by default, since the inputs' squared norm grows with d.
    eps : float, default 0.01
        Clip between layers.
    min_probability : float, default 0.0001
        The factors' probabilities stay in ``[min_probability, 1 - min_probability]``, which bounds the loss of a bit.
    weight_clip, context_bias_scale, layer_bias, weight_init, gradient, tables, dtype, n_jobs
        As in :class:`GLNClassifier`; threads run over coordinates.
    random_state : int, RandomState or None, default None
        Draws the hyperplanes.

    Attributes
    ----------
    network_ : GatedNetwork
        One head a coordinate.
    t_ : int
        Samples learned from so far.

    Examples
    --------
    >>> X = (np.random.default_rng(0).random((500, 1)) < 0.5) * np.ones((1, 3))
    >>> model = GLNDensity(random_state=0).fit(X)
    >>> cube = np.array(np.meshgrid([0, 1], [0, 1], [0, 1])).reshape(3, 8).T
    >>> bool(abs(np.exp(model.score_samples(cube)).sum() - 1) < 1e-6)
    True
    """

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (16, 16),
        context_dim: int = 4,
        *,
        learning_rate: LearningRate = "sqrt",
        learning_rate_init: float | None = None,
        eps: float = 0.01,
        min_probability: float = 1e-4,
        weight_clip: float = 200.0,
        context_bias_scale: float = 0.05,
        layer_bias: float = 0.731,
        weight_init: str = "mean",
        gradient: str = "paper",
        tables: str = "auto",
        dtype: Any = "float32",
        n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.context_dim = context_dim
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.eps = eps
        self.min_probability = min_probability
        self.weight_clip = weight_clip
        self.context_bias_scale = context_bias_scale
        self.layer_bias = layer_bias
        self.weight_init = weight_init
        self.gradient = gradient
        self.tables = tables
        self.dtype = dtype
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Forget everything and learn from the binary samples ``(n, d)`` in their order.

        Raises
        ------
        InvalidInput
            A value other than 0 and 1, or a setting that cannot be used.
        """
        self._learn(self._validate(X, reset=True), begin=True)
        return self

    def partial_fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Continue with more samples; any cut of a stream into calls gives the same model, bit for bit."""
        first = not hasattr(self, "network_")
        self._learn(self._validate(X, reset=first), begin=first)
        return self

    def progressive_score(self, X: ArrayLike) -> Array:
        """Test, then train: log-likelihood in nats of each sample from before it was learned, ``(n,)``.

        Its negative sum is the length in nats of the code that the model, as it learns, gives the data.
        """
        first = not hasattr(self, "network_")
        return self._learn(self._validate(X, reset=first), begin=first)

    def score_samples(self, X: ArrayLike) -> Array:
        """Log-likelihood of each sample in nats, ``(n,)``."""
        check_is_fitted(self, "network_")
        X = self._validate(X, reset=False)
        scores = np.empty(len(X))
        for start in range(0, len(X), _BLOCK):
            block = X[start : start + _BLOCK]
            raw = self.network_.predict(*self._inputs(block), n_jobs=effective_n_jobs(self.n_jobs))
            scores[start : start + _BLOCK] = self._log_likelihood(raw, block)
        return scores

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Mean log-likelihood in nats."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Array:
        """Draw binary vectors ``(n_samples, d)``, one coordinate after the other."""
        check_is_fitted(self, "network_")
        if n_samples < 1:
            raise InvalidInput(f"n_samples must be >= 1; got {n_samples!r}.")
        rng = check_random_state(random_state)
        X = np.zeros((n_samples, self.n_features_in_))
        for i in range(self.n_features_in_):
            p = self._probability(self.network_.predict(*self._inputs(X), heads=[i])[:, 0])
            X[:, i] = rng.random_sample(n_samples) < p
        return X

    def _validate(self, X: ArrayLike, *, reset: bool) -> Array:
        X = np.asarray(validate_data(self, X, reset=reset, dtype=np.float64))
        if not np.isin(X, (0, 1)).all():
            raise InvalidInput("GLNDensity models binary vectors: X must hold 0 and 1 only; binarize it, e.g. X > 0.5.")
        return X

    def _inputs(self, X: Array) -> tuple[Array, Array]:
        network = self.network_
        side = (2 * X - 1).astype(network.dtype)
        base = np.empty((len(X), X.shape[1] + 1), network.dtype)
        base[:, 0] = network.bias
        base[:, 1:] = side * network.limit
        return base, side

    def _begin(self) -> None:
        check_rate(self.learning_rate, self._rate())
        if not 0 < self.min_probability < 0.5:
            raise InvalidInput(f"min_probability must lie strictly between 0 and 0.5; got {self.min_probability!r}.")
        d = self.n_features_in_
        self.network_ = GatedNetwork(
            (*hidden_sizes(self.hidden_layer_sizes), 1),
            d,
            d,
            context_dim=self.context_dim,
            eps=self.eps,
            weight_clip=self.weight_clip,
            layer_bias=self.layer_bias,
            context_bias_scale=self.context_bias_scale,
            weight_init=self.weight_init,
            gradient=self.gradient,
            tables=self.tables,
            nested=True,
            dtype=self.dtype,
            seed=int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max)),
        )
        self.network_.add_heads(d)
        self.t_ = 0

    def _rate(self) -> float:
        return 3.2 / self.n_features_in_ if self.learning_rate_init is None else self.learning_rate_init

    def _learn(self, X: Array, *, begin: bool) -> Array:
        if begin:
            self._begin()
        scores = np.empty(len(X))
        for start in range(0, len(X), _BLOCK):
            block = X[start : start + _BLOCK]
            raw = self.network_.learn(
                *self._inputs(block),
                block,
                rate=self.learning_rate,
                initial_rate=self._rate(),
                n_jobs=effective_n_jobs(self.n_jobs),
            )
            scores[start : start + _BLOCK] = self._log_likelihood(raw, block)
            self.t_ += len(block)
        return scores

    def _probability(self, raw: Array) -> Array:
        return np.clip(sigmoid(raw.astype(np.float64)), self.min_probability, 1 - self.min_probability)

    def _log_likelihood(self, raw: Array, X: Array) -> Array:
        p = self._probability(raw)
        return np.log(np.where(X == 1, p, 1 - p)).sum(axis=1)
