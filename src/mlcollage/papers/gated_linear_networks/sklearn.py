"""The scikit-learn estimators: classification, regression and binary densities, learned one sample at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import SimpleNamespace
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit
from sklearn.base import ClassifierMixin, DensityMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from mlcollage import _checks as checks
from mlcollage._npz import pack_labels, unpack_labels
from mlcollage.errors import InvalidInput

from . import _kernels
from ._estimator import OnlineEstimator, StepOptions, as_array, blocks, only_weight, step_factors
from ._inputs import BasePredictor, Inputs, bounds
from ._settings import LearningRate, hidden_sizes
from .gaussian import GaussianNetwork
from .network import GatedNetwork, normalized

Array = NDArray[Any]


@dataclass(eq=False, repr=False)
class GLNClassifier(ClassifierMixin, OnlineEstimator):
    r"""Gated linear network classifier that learns from one sample at a time, in one pass, without back-propagation.

    Every neuron predicts the class probability itself: with the weights that its context :math:`c(z)` selects,

    .. math::
        q = \sigma(w_{c(z)} \cdot \operatorname{logit}(p)), \qquad
        w_{c(z)} \leftarrow \operatorname{clip}(w_{c(z)} - \eta_t (q - x) \operatorname{logit}(p), -b, b),

    (Veness et al., AAAI 2021, Section 2). There is one network per class (one-vs-all, two for a binary problem), and
    the outputs are normalized to sum to one by their ratio.

    Parameters
    ----------
    hidden_layer_sizes : sequence of int, default (50, 25)
        Neurons in each layer; with ``aggregator="last"`` one output neuron is added.
    context_dim : int, default 4
        Hyperplanes of a neuron, ``m``: 2**m weight rows each. 0 is plain online logistic mixing.
    learning_rate : "paper", "official", "sqrt", float or callable, default "paper"
        ``min(learning_rate_init, 100 / t)``; ``min(learning_rate_init, 1 / (1 + 0.1 t))``; ``learning_rate_init /
        sqrt(t)``; a constant; or a function of the step ``t = 1, 2, ...``. Each class counts its own steps.
    learning_rate_init : float, default 0.01
        Largest rate of the named schedules.
    eps : float, default 0.01
        Probabilities passed between layers are clipped to ``[eps, 1 - eps]``.
    weight_clip : float, default 200
        Box of the weights.
    context_bias_scale : float, default 0.05
        Standard deviation of the hyperplanes' offsets.
    layer_bias : float, default 0.731
        Probability of the constant input that every layer has, ``sigmoid(1)`` in the official code.
    base_predictor : {"standardize", "minmax"}, callable or fitted estimator, default "standardize"
        Base predictions: ``sigmoid`` of the online-standardized features; features rescaled to [0, 1] within each
        sample; ``callable(X) -> (n, k)`` probabilities; or ``estimator.predict_proba``. Side information is the
        online-standardized sample in all cases.
    std_offset : float, default 0
        Added to the running standard deviation when standardizing; the official MNIST example has 1 for pixels from 0
        to 255. With 0, results do not depend on the features' units.
    max_deviation : float or None, default 10
        A feature counts as at most so many running standard deviations from its mean, so that one wrong reading of any
        size does not ruin it. None is no bound, as in the official code.
    memory : int or None, default None
        For streams that change: the schedule of step sizes and the running moments stop counting at this many samples,
        so that older ones fade. None weighs all samples alike, and cannot follow a change late in a long stream.
    weight_init : {"mean", "zeros"}, default "mean"
        Weights start at 1/fan-in or at 0.
    aggregator : {"last", "mean"}, default "last"
        Read-out: the output neuron, or the geometric mean of the last hidden layer.
    gradient : {"paper", "official"}, default "paper"
        The closed form, or the official code's, which is 0 where a neuron's raw output lies outside ``[eps, 1 - eps]``.
    tables : {"auto", "dense", "lazy"}, default "auto"
        Whether weight rows exist for all contexts or from their first visit on. Results are the same; ``"auto"`` is
        dense up to 256 MiB.
    shuffle : bool, default False
        Shuffle the samples before each pass of ``fit``.
    n_passes : int, default 1
        Passes of ``fit`` over the data.
    dtype : {"float32", "float64"}, default "float32"
        Of weights and arithmetic.
    n_jobs : int, optional
        Threads over classes (-1: all cores). Results do not depend on it.
    random_state : int, RandomState or None, default None
        Draws the hyperplanes, and the order when shuffling.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels, sorted.
    n_features_in_ : int
        Width of a sample.
    network_ : GatedNetwork
        The networks of all classes.
    settings_ : SimpleNamespace
        The parameters as they were when learning began; those changed since then take effect at the next ``fit``.
    t_ : int
        Samples learned from so far.

    Notes
    -----
    ``fit`` takes ``sample_weight=`` as an option that its signature does not name: scikit-learn reads a parameter of
    that name as the promise that weight 2 equals the sample twice, which no single-pass learner can keep. Here a
    weight scales the step.

    Sparse ``X`` is refused: standardized samples are dense.

    References
    ----------
    Veness et al., "Gated Linear Networks", AAAI 2021, arXiv:1910.01526.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> model = GLNClassifier(hidden_layer_sizes=(16, 16), random_state=0).fit(X[:1200] / 16, y[:1200])
    >>> bool(model.score(X[1200:] / 16, y[1200:]) > 0.85)
    True
    """

    hidden_layer_sizes: Sequence[int] = (50, 25)
    context_dim: int = 4
    _: KW_ONLY
    learning_rate: LearningRate = "paper"
    learning_rate_init: float = 0.01
    eps: float = 0.01
    layer_bias: float = 0.731
    base_predictor: BasePredictor = "standardize"
    std_offset: float = 0.0
    max_deviation: float | None = 10.0
    aggregator: str = "last"
    shuffle: bool = False
    n_passes: int = 1
    n_jobs: int | None = None

    # ------------------------------------------------------------------ learning

    def fit(self, X: Any, y: Any, **options: Unpack[StepOptions]) -> Self:
        """Forget everything and learn from the samples in their order.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.
        y : array-like of shape (n_samples,)
            Labels.
        sample_weight : array-like of shape (n_samples,), optional
            Factors >= 0 on the step sizes; samples of weight 0 are left out.

        Returns
        -------
        self

        Raises
        ------
        InvalidInput
            A setting or an array that cannot be used.
        """
        weight, passes = only_weight(options), checks.integer("n_passes", self.n_passes, least=1)
        X, y = validate_data(self, as_array(X), y, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        factors, order = step_factors(weight, X)
        classes, codes = np.unique(y[order], return_inverse=True)
        rng = self._begin(X)
        self._add_classes(classes)
        position = np.empty(len(X), np.int64)  # number of each sample's class; unset where the weight is 0
        position[order] = codes
        self._passes(X, position, factors, order, rng, passes)
        return self

    def partial_fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        grow: bool = False,
    ) -> Self:
        """Continue with more samples; any cut of a stream into calls gives the same network, bit for bit.

        Parameters
        ----------
        X, y : array-like
            As in :meth:`fit`.
        classes : array-like, optional
            All labels that can occur; needed at the first call unless ``grow``. Labels that are new at a later call get
            a network each, from then on.
        sample_weight : array-like of shape (n_samples,), optional
            Factors >= 0 on the step sizes; samples of weight 0 are left out.
        grow : bool, default False
            Give each label never seen before a network of its own, which starts untrained at its first sample.

        Returns
        -------
        self
        """
        self._partial(X, y, classes, sample_weight, grow=grow)
        return self

    def progressive_predict(
        self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None = None, sample_weight: ArrayLike | None = None
    ) -> Array:
        """Test, then train: each sample is predicted, then learned from, as :meth:`partial_fit` does.

        Before the first call of any kind, ``classes`` defaults to the labels in ``y``. Inputs are standardized with
        the sample's own features included, which needs no label.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Class probabilities from before each sample was learned.
        """
        if classes is None and not hasattr(self, "network_"):
            classes = np.unique(np.asarray(y))
        if sample_weight is not None and not np.asarray(sample_weight, np.float64).all():
            raise InvalidInput("progressive_predict takes weights > 0: a sample of weight 0 is left out of the stream.")
        return normalized(self._partial(X, y, classes, sample_weight))

    def _partial(
        self, X: Any, y: Any, classes: ArrayLike | None, weight: ArrayLike | None, *, grow: bool = False
    ) -> Array:
        """Logits from before each sample since a label was last new, ``(n, n_classes)``."""
        first = not hasattr(self, "network_")
        if first and classes is None and not grow:
            raise InvalidInput(
                "The first call of partial_fit needs classes= (all labels that can occur), or grow=True to add each "
                "label when it is first seen."
            )
        X, y = validate_data(self, as_array(X), y, reset=first, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        factors, order = step_factors(weight, X)
        if first:
            self._begin(X)
        if classes is not None:
            self._add_classes(np.setdiff1d(np.asarray(classes), self.classes_))
        new, where = np.unique(y[order], return_index=True)
        unknown = ~np.isin(new, self.classes_)
        if unknown.any() and not grow:
            raise InvalidInput(
                f"Label {new[unknown][0]!r} is not in classes {self.classes_.tolist()}: pass classes= at the first "
                "call, or grow=True to add a network for it."
            )
        # The stream is cut where a label is new, so that its network begins there.
        cuts = sorted(zip(where[unknown].tolist(), new[unknown], strict=True), key=lambda cut: cut[0])
        edges = [0, *(at for at, _ in cuts), len(order)]
        for number, label in enumerate([None, *(label for _, label in cuts)]):
            if number:
                self._add_classes(np.array([label], dtype=new.dtype))
            codes = np.searchsorted(self.classes_, y) if len(self.classes_) else np.zeros(len(y), np.int64)
            raw = self._learn(X, codes, factors, order[edges[number] : edges[number + 1]])
        return raw

    def _begin(self, X: Array | None = None) -> np.random.RandomState:
        rng = super()._begin(X)
        self._head_ = np.empty(0, np.int64)
        self.classes_ = np.empty(0)
        return rng

    def _build(self, settings: SimpleNamespace, seed: int, X: Array | None) -> tuple[GatedNetwork, Inputs]:
        hidden = hidden_sizes(settings.hidden_layer_sizes)
        sizes = (*hidden, 1) if settings.aggregator == "last" else hidden
        network = self._network(GatedNetwork, settings, seed, sizes, readout=settings.aggregator)
        inputs = Inputs(
            *(self.n_features_in_, settings.base_predictor, settings.std_offset),
            *(network.bias, network.limit, network.dtype, settings.max_deviation, settings.memory),
        )
        if X is not None:
            network.n_inputs = inputs.probe(X)
        return network, inputs

    def _add_classes(self, labels: Array) -> None:
        """Add untrained networks for labels; ``_head_[k]`` is the number of the network of class ``k``."""
        if not len(labels):
            return
        heads = len(self.network_.heads) + np.arange(len(labels))
        self.network_.add_heads(len(labels))
        classes = np.concatenate([self.classes_, labels]) if len(self.classes_) else labels
        # Labels are sorted, as scikit-learn has them; networks stay where they are.
        order = np.argsort(classes, kind="stable")
        self.classes_ = classes[order]
        self._head_ = np.concatenate([self._head_, heads])[order]

    def _learn(self, X: Array, y: Array, factors: Array | None, order: Array) -> Array:
        """Learn from ``X[order]``, classes by number; the logits from before each sample, ``(n, n_classes)``."""
        raw = np.empty((len(order), len(self.classes_)), self.network_.dtype)
        heads = self._head_
        for part in blocks(len(order)):
            block = order[part]
            targets = np.zeros((len(block), len(heads)), self.network_.dtype)  # one-hot, by head
            targets[np.arange(len(block)), heads[y[block]]] = 1
            weight = None if factors is None else factors[block]
            inputs = self._read(X[block], learn=True)
            raw[part] = self._steps(*inputs, targets, weight=weight, n_jobs=self._jobs)[:, heads]
            told = normalized(raw[part])[np.arange(len(block)), y[block]]
            self._note(-np.log(np.maximum(told, np.finfo(float).tiny)))
        return raw

    # ------------------------------------------------------------------ prediction

    def _logits(self, X: ArrayLike) -> Array:
        return self._map(X, lambda base, side: self.network_.predict(base, side, n_jobs=self._jobs)[:, self._head_])

    def decision_function(self, X: ArrayLike) -> Array:
        """Logit of each class's network, ``(n, n_classes)``; for two classes the log-odds of their ratio, ``(n,)``."""
        raw = self._logits(X)
        if raw.shape[1] != 2:
            return raw
        log_q = log_expit(raw.astype(np.float64))
        return np.asarray(log_q[:, 1] - log_q[:, 0])

    def predict_proba(self, X: ArrayLike) -> Array:
        """Class probabilities ``(n, n_classes)``: the networks' outputs divided by their sum."""
        return normalized(self._logits(X))

    def predict(self, X: ArrayLike) -> Array:
        """Label of the class whose network gives the largest output, ``(n,)``."""
        best = self._logits(X).argmax(axis=1)
        return self.classes_[best]

    # ------------------------------------------------------------------ looking inside

    def saliency(self, X: ArrayLike, *, clipped: str = "product") -> Array:
        r"""Exact linear map from base logits to output logits, ``(n, n_classes, 1 + d)``, the bias first.

        ``saliency[i, k] @ [bias logit, logit(p_0)] = `` logit of class ``k``. The map is the product of the selected
        weight matrices, exact where no neuron's output is clipped (see :meth:`clip_active`); ``clipped="constant"``
        counts a clipped neuron as the constant that it is, and is exact everywhere.
        """
        checks.choice("clipped", clipped, ("product", "constant"))
        return self._map(X, lambda b, s: self.network_.saliency(b, s, clipped=clipped)[:, self._head_])

    def base_logits(self, X: ArrayLike) -> Array:
        """What the first layer reads, ``(n, 1 + d)``: the bias logit, then the base predictions' clipped logits."""
        return self._map(X, lambda base, side: base)

    def clip_active(self, X: ArrayLike) -> Array:
        """Whether any neuron below the read-out is clipped, ``(n, n_classes)`` bool."""
        raw = self._neurons(X)
        # The read-out neurons are not clipped.
        inner = raw[:, :, : raw.shape[2] - int(self.network_.sizes[-1])]
        return (np.abs(inner) > self.network_.constants.limit).any(axis=2)

    def layer_predictions(self, X: ArrayLike) -> list[Array]:
        """Probability that every neuron predicts, a list over layers of ``(n, n_classes, K_l)``, clipped to eps."""
        raw, limit = self._neurons(X), self.network_.constants.limit
        p = expit(np.clip(raw, -limit, limit))
        return np.split(p, np.cumsum(self.network_.sizes)[:-1], axis=2)

    def _neurons(self, X: ArrayLike) -> Array:
        """Raw logit of every neuron, ``(n, n_classes, neurons)``."""
        return self._map(X, lambda base, side: self.network_.neuron_logits(base, side)[:, self._head_])

    def context_counts(self, X: ArrayLike) -> Array:
        """How often the contexts active at each sample were learned from, ``(n, n_classes, n_neurons)``.

        Small counts mark samples unlike those seen: a novelty score that costs nothing.
        """
        return self._map(X, lambda base, side: self.network_.visit_counts(side)[:, self._head_])

    # ------------------------------------------------------------------ disk

    def _state(self) -> dict[str, Array]:
        return super()._state() | pack_labels(self.classes_) | {"heads": self._head_}

    def _restore(self, arrays: Mapping[str, Array]) -> None:
        super()._restore(arrays)
        self.network_.n_inputs = self._inputs_.n_base
        self.classes_, self._head_ = unpack_labels(arrays), arrays["heads"]


@dataclass(eq=False, repr=False)
class GLNRegressor(RegressorMixin, OnlineEstimator):
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
    max_deviation, memory
        As in :class:`GLNClassifier`; for the target too.
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
    settings_ : SimpleNamespace
        The parameters as they were when learning began; those changed since then take effect at the next ``fit``.
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

    hidden_layer_sizes: Sequence[int] = (50, 25)
    context_dim: int = 4
    _: KW_ONLY
    learning_rate: LearningRate = 0.02
    learning_rate_init: float = 0.01
    min_variance: float = 0.05
    max_variance: float = 10.0
    weight_clip: float = 1000.0
    step_limit: float | None = 1.0
    std_offset: float = 0.0
    max_deviation: float | None = 10.0
    shuffle: bool = False
    n_passes: int = 1
    dtype: Any = "float64"

    # ------------------------------------------------------------------ learning

    def fit(self, X: Any, y: Any, **options: Unpack[StepOptions]) -> Self:
        """Forget everything and learn from the samples in their order; see :meth:`GLNClassifier.fit`."""
        weight, passes = only_weight(options), checks.integer("n_passes", self.n_passes, least=1)
        X, y = validate_data(self, as_array(X), y, dtype=(np.float64, np.float32), y_numeric=True)
        factors, order = step_factors(weight, X)
        self._passes(X, y, factors, order, self._begin(X), passes)
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
        X, y = validate_data(self, as_array(X), y, reset=first, dtype=(np.float64, np.float32), y_numeric=True)
        factors, order = step_factors(weight, X)
        if first:
            self._begin(X)
        return self._learn(X, y, factors, order)

    def _begin(self, X: Array | None = None) -> np.random.RandomState:
        rng = super()._begin(X)
        self.network_.add_heads(1)
        self._target_ = np.zeros((3, 1))  # count, mean and sum of squared deviations of the target
        return rng

    def _build(self, settings: SimpleNamespace, seed: int, X: Array | None) -> tuple[GaussianNetwork, Inputs]:
        sizes = (*hidden_sizes(settings.hidden_layer_sizes), 1)
        network = self._network(GaussianNetwork, settings, seed, sizes)
        # The means of base Gaussians are not clipped: the limit of the inputs is infinite.
        return network, Inputs(
            *(self.n_features_in_, "standardize", settings.std_offset, 0.0, np.inf),
            *(network.dtype, settings.max_deviation, settings.memory),
        )

    def _read(self, X: Array, *, learn: bool = False) -> tuple[Array, Array]:
        base, side = super()._read(X, learn=learn)
        biases = np.broadcast_to(np.array(self.network_.bias_means, base.dtype), (len(X), 3))
        return np.concatenate([biases, base[:, 1:]], axis=1), side  # (n, 3 + d)

    def _learn(self, X: Array, y: Array, factors: Array | None, order: Array) -> tuple[Array, Array]:
        """Learn from ``X[order]``; mean and deviation from before each sample, in the target's units, ``(n,)`` each."""
        means, stds = np.empty(len(order)), np.empty(len(order))
        for part in blocks(len(order)):
            block = order[part]
            scaled, before = np.empty(len(block)), np.empty((2, len(block)))
            # A read-only array would be a type of its own to the compiler.
            goals = np.require(y[block], np.float64, ["C", "W"])
            most, memory = self._inputs_.most, self._inputs_.memory
            _kernels.running_moments(goals, self._target_, most, memory, scaled, before)
            weight = None if factors is None else factors[block]
            out = self._steps(*self._read(X[block], learn=True), scaled, weight=weight)
            means[part] = before[0] + before[1] * out[:, 0, -1]
            stds[part] = before[1] / np.sqrt(out[:, 1, -1])
            self._note(0.5 * np.log(2 * np.pi * stds[part] ** 2) + 0.5 * ((goals - means[part]) / stds[part]) ** 2)
        return means, stds

    # ------------------------------------------------------------------ prediction

    def _neurons(self, X: Any) -> tuple[Array, Array]:
        """Mean and standard deviation that every neuron predicts, in the target's units, ``(n, neurons)`` each."""
        out = self._map(X, lambda base, side: self.network_.run(base, side)).astype(np.float64)  # (n, 2, neurons)
        count, mean, square = self._target_[:, 0]
        deviation = float(np.sqrt(square / max(count, 1.0))) or 1.0
        return mean + deviation * out[:, 0], deviation / np.sqrt(out[:, 1])

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predictive mean ``(n,)``; with ``return_std`` also the predictive standard deviation ``(n,)``."""
        mean, std = (values[:, -1].copy() for values in self._neurons(X))  # the output neuron is the last
        return (mean, std) if return_std else mean

    def layer_predictions(self, X: Any) -> list[tuple[Array, Array]]:
        """Mean and standard deviation that every neuron predicts: a list over layers of two ``(n, K_l)`` arrays."""
        neurons = self._neurons(X)
        means, stds = (np.split(values, np.cumsum(self.network_.sizes)[:-1], axis=1) for values in neurons)
        return list(zip(means, stds, strict=True))

    def context_counts(self, X: Any) -> Array:
        """How often the contexts active at each sample were learned from, ``(n, n_neurons)``."""
        return self._map(X, lambda base, side: self.network_.visit_counts(side)[:, 0])

    # ------------------------------------------------------------------ disk

    def _state(self) -> dict[str, Array]:
        return super()._state() | {"target": self._target_}

    def _restore(self, arrays: Mapping[str, Array]) -> None:
        super()._restore(arrays)
        self._target_ = arrays["target"]


@dataclass(eq=False, repr=False)
class GLNDensity(DensityMixin, OnlineEstimator):
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
    memory : int or None, default None
        Step at which the schedule of step sizes stops, for streams that change.
    min_probability : float, default 0.0001
        The factors' probabilities stay in ``[min_probability, 1 - min_probability]``, which bounds the loss of a bit.
    weight_clip, context_bias_scale, layer_bias, weight_init, gradient, tables, dtype, n_jobs
        As in :class:`GLNClassifier`; threads run over coordinates.
    random_state : int, RandomState or None, default None
        Draws the hyperplanes.

    Attributes
    ----------
    network_ : GatedNetwork
        One head per coordinate.
    settings_ : SimpleNamespace
        The parameters as they were when learning began; those changed since then take effect at the next ``fit``.
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

    hidden_layer_sizes: Sequence[int] = (16, 16)
    context_dim: int = 4
    _: KW_ONLY
    learning_rate: LearningRate = "sqrt"
    learning_rate_init: float | None = None
    eps: float = 0.01
    min_probability: float = 1e-4
    layer_bias: float = 0.731
    n_jobs: int | None = None

    # ------------------------------------------------------------------ learning

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Forget everything and learn from the binary samples ``(n, d)`` in their order.

        Raises
        ------
        InvalidInput
            A value other than 0 and 1, or a setting that cannot be used.
        """
        self._partial(X, first=True)
        return self

    def partial_fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Continue with more samples; any cut of a stream into calls gives the same model, bit for bit."""
        self._partial(X, first=not hasattr(self, "network_"))
        return self

    def progressive_score(self, X: ArrayLike) -> Array:
        """Test, then train: log-likelihood in nats of each sample from before it was learned, ``(n,)``.

        Its negative sum is the length in nats of the code that the model, as it learns, gives the data.
        """
        return self._partial(X, first=not hasattr(self, "network_"))

    def _partial(self, X: ArrayLike, *, first: bool) -> Array:
        X = self._validated(X, reset=first)
        if first:
            self._begin(X)
        scores = np.empty(len(X))
        for part in blocks(len(X)):
            raw = self._steps(*self._read(X[part]), X[part], n_jobs=self._jobs)
            scores[part] = self._log_likelihood(raw, X[part])
            self._note(-scores[part])
        return scores

    def _begin(self, X: Array | None = None) -> np.random.RandomState:
        rng = super()._begin(X)
        self.network_.add_heads(self.n_features_in_)
        return rng

    def _build(self, settings: SimpleNamespace, seed: int, X: Array | None) -> tuple[GatedNetwork, None]:
        checks.real("min_probability", settings.min_probability, above=0, below=0.5)
        bounds(None, settings.memory)
        sizes = (*hidden_sizes(settings.hidden_layer_sizes), 1)
        return self._network(GatedNetwork, settings, seed, sizes, nested=True), None

    def _initial_rate(self, settings: SimpleNamespace) -> float:
        rate: float | None = settings.learning_rate_init
        return 3.2 / self.n_features_in_ if rate is None else rate

    def _validated(self, X: Any, *, reset: bool = False) -> Array:
        X = np.asarray(validate_data(self, as_array(X), reset=reset, dtype=np.float64))
        if not np.isin(X, (0, 1)).all():
            raise InvalidInput("GLNDensity models binary vectors: X must hold 0 and 1 only; binarize it, e.g. X > 0.5.")
        return X

    def _read(self, X: Array, *, learn: bool = False) -> tuple[Array, Array]:
        network = self.network_
        side = (2 * X - 1).astype(network.dtype)  # (n, d): head i sees the first i columns
        base = np.empty((len(X), X.shape[1] + 1), network.dtype)
        base[:, 0] = network.bias
        base[:, 1:] = side * network.limit
        return base, side

    # ------------------------------------------------------------------ the density

    def score_samples(self, X: ArrayLike) -> Array:
        """Log-likelihood of each sample in nats, ``(n,)``."""
        self._check_fitted()
        X = self._validated(X)
        raw = [self.network_.predict(*self._read(X[part]), n_jobs=self._jobs) for part in blocks(len(X))]
        return self._log_likelihood(np.concatenate(raw), X)

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Mean log-likelihood in nats."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Array:
        """Draw binary vectors ``(n_samples, d)``, one coordinate after the other."""
        self._check_fitted()
        checks.integer("n_samples", n_samples, least=1)
        rng = check_random_state(random_state)
        X = np.zeros((n_samples, self.n_features_in_))
        for i in range(self.n_features_in_):
            # Head i reads the columns before i only: that the others are still 0 does not matter.
            p = self._probability(self.network_.predict(*self._read(X), heads=[i])[:, 0])  # (n_samples,)
            X[:, i] = rng.random_sample(n_samples) < p
        return X

    def _probability(self, raw: Array) -> Array:
        least = self.settings_.min_probability
        return np.clip(expit(raw.astype(np.float64)), least, 1 - least)

    def _log_likelihood(self, raw: Array, X: Array) -> Array:
        p = self._probability(raw)
        return np.log(np.where(X == 1, p, 1 - p)).sum(axis=1)
