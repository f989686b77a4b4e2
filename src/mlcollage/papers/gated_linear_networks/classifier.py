"""Online classification: one gated linear network a class, one-vs-all, as a scikit-learn estimator."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Self, TypedDict, Unpack

import numpy as np
from joblib import effective_n_jobs  # type: ignore[import-untyped]
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from mlcollage.errors import InvalidInput

from .inputs import BasePredictor, Inputs
from .network import GatedNetwork, LearningRate, hidden_sizes, sigmoid
from .persist import load_arrays, pack_labels, save_arrays, unpack_labels

__all__ = ["GLNClassifier", "StepOptions", "check_rate", "only_weight", "step_factors"]

Array = NDArray[Any]
_BLOCK = 4096  # samples whose inputs are held at once


class StepOptions(TypedDict, total=False):
    """What ``fit`` takes besides the data.

    ``sample_weight`` scales the step of each sample; samples of weight 0 are left out altogether.
    """

    sample_weight: ArrayLike | None


def check_rate(rate: LearningRate, initial: float) -> None:
    """Refuse learning rates that are not > 0."""
    if isinstance(rate, str):
        if rate not in ("paper", "official", "sqrt"):
            raise InvalidInput(
                f"learning_rate must be 'paper', 'official', 'sqrt', a float > 0 or a callable; got {rate!r}."
            )
    elif not callable(rate) and not (np.isfinite(rate) and rate > 0):
        raise InvalidInput(f"learning_rate must be > 0; got {rate!r}.")
    if not (np.isfinite(initial) and initial > 0):
        raise InvalidInput(f"learning_rate_init must be > 0; got {initial!r}.")


class GLNClassifier(ClassifierMixin, BaseEstimator):
    r"""Gated linear network classifier that learns from one sample at a time, in one pass, without back-propagation.

    Every neuron predicts the class probability itself: with the weights that its context :math:`c(z)` selects,

    .. math::
        q = \sigma(w_{c(z)} \cdot \operatorname{logit}(p)), \qquad
        w_{c(z)} \leftarrow \operatorname{clip}(w_{c(z)} - \eta_t (q - x) \operatorname{logit}(p), -b, b),

    (Veness et al., AAAI 2021, Section 2). There is one network a class (one-vs-all, two for a binary problem), and the
    outputs are normalized to sum to one by their ratio.

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

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (50, 25),
        context_dim: int = 4,
        *,
        learning_rate: LearningRate = "paper",
        learning_rate_init: float = 0.01,
        eps: float = 0.01,
        weight_clip: float = 200.0,
        context_bias_scale: float = 0.05,
        layer_bias: float = 0.731,
        base_predictor: BasePredictor = "standardize",
        std_offset: float = 0.0,
        weight_init: str = "mean",
        aggregator: str = "last",
        gradient: str = "paper",
        tables: str = "auto",
        shuffle: bool = False,
        n_passes: int = 1,
        dtype: Any = "float32",
        n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.context_dim = context_dim
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.eps = eps
        self.weight_clip = weight_clip
        self.context_bias_scale = context_bias_scale
        self.layer_bias = layer_bias
        self.base_predictor = base_predictor
        self.std_offset = std_offset
        self.weight_init = weight_init
        self.aggregator = aggregator
        self.gradient = gradient
        self.tables = tables
        self.shuffle = shuffle
        self.n_passes = n_passes
        self.dtype = dtype
        self.n_jobs = n_jobs
        self.random_state = random_state

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
        weight = only_weight(options)
        if self.n_passes < 1:
            raise InvalidInput(f"n_passes must be >= 1; got {self.n_passes!r}.")
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        factors = step_factors(weight, X)
        kept = slice(None) if factors is None else factors > 0
        classes, codes = np.unique(y[kept], return_inverse=True)
        rng = self._begin(X, classes)
        order = np.arange(len(X))[kept]
        position = np.empty(len(X), np.int64)
        position[order] = codes
        for _ in range(self.n_passes):
            if self.shuffle:
                rng.shuffle(order)
            self._learn(X, position, factors, order)
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
        self._partial(X, y, classes, sample_weight, grow, record=False)
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
        return self._partial(X, y, classes, sample_weight, False, record=True)

    def _partial(
        self, X: Any, y: Any, classes: ArrayLike | None, weight: ArrayLike | None, grow: bool, *, record: bool
    ) -> Array:
        first = not hasattr(self, "network_")
        if first and classes is None and not grow:
            raise InvalidInput(
                "The first call of partial_fit needs classes= (all labels that can occur), or grow=True to add each "
                "label when it is first seen."
            )
        X, y = validate_data(self, X, y, reset=first, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        factors = step_factors(weight, X)
        order = np.arange(len(X)) if factors is None else np.flatnonzero(factors > 0)
        if first:
            self._begin(X, np.unique(np.asarray(classes)) if classes is not None else y[:0])
        elif classes is not None:
            self._add_classes(np.setdiff1d(np.asarray(classes), self.classes_))
        new, where = np.unique(y[order], return_index=True)
        unknown = ~np.isin(new, self.classes_)
        if unknown.any() and not grow:
            raise InvalidInput(
                f"Label {new[unknown][0]!r} is not in classes {self.classes_.tolist()}: pass classes= at the first "
                "call, or grow=True to add a network for it."
            )
        cuts = sorted(zip(where[unknown].tolist(), new[unknown], strict=True), key=lambda cut: cut[0])
        starts = [0, *(at for at, _ in cuts)]
        pieces = []
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(order)], strict=True)):
            if number:
                self._add_classes(np.array([cuts[number - 1][1]], dtype=new.dtype))
            codes = np.searchsorted(self.classes_, y) if len(self.classes_) else np.zeros(len(y), np.int64)
            pieces.append(self._learn(X, codes, factors, order[start:stop]))
        if not record:
            return np.empty(0)
        if len(order) < len(X):
            raise InvalidInput("progressive_predict takes weights > 0: a sample of weight 0 is left out of the stream.")
        return _ratio(pieces[-1])

    def _begin(self, X: Array, classes: Array) -> np.random.RandomState:
        """Draw the seed and build networks for the classes."""
        check_rate(self.learning_rate, self.learning_rate_init)
        rng = check_random_state(self.random_state)
        self._build(int(rng.randint(np.iinfo(np.int32).max)), self.n_features_in_, X)
        self.classes_ = classes[:0]
        self._head_ = np.empty(0, np.int64)
        self.t_ = 0
        self._add_classes(classes)
        return rng

    def _build(self, seed: int, n_features: int, X: Array | None, n_base: int | None = None) -> None:
        hidden = hidden_sizes(self.hidden_layer_sizes)
        self._seed_ = seed
        network = GatedNetwork(
            (*hidden, 1) if self.aggregator == "last" else hidden,
            0,
            n_features,
            context_dim=self.context_dim,
            eps=self.eps,
            weight_clip=self.weight_clip,
            layer_bias=self.layer_bias,
            context_bias_scale=self.context_bias_scale,
            weight_init=self.weight_init,
            gradient=self.gradient,
            readout=self.aggregator,
            tables=self.tables,
            dtype=self.dtype,
            seed=seed,
        )
        self._inputs_ = Inputs(
            n_features, self.base_predictor, self.std_offset, network.bias, network.limit, network.dtype
        )
        network.n_inputs = self._inputs_.probe(X) if X is not None else int(n_base or 0)
        self.network_ = network

    def _add_classes(self, labels: Array) -> None:
        if not len(labels):
            return
        heads = len(self.network_.heads) + np.arange(len(labels))
        self.network_.add_heads(len(labels))
        classes = np.concatenate([self.classes_, labels]) if len(self.classes_) else labels
        order = np.argsort(classes, kind="stable")
        self.classes_ = classes[order]
        self._head_ = np.concatenate([self._head_, heads])[order]

    def _learn(self, X: Array, codes: Array, factors: Array | None, order: Array) -> Array:
        """Learn from ``X[order]``; the logits from before each sample, ``(n, n_classes)``."""
        raw = np.empty((len(order), len(self.classes_)), self.network_.dtype)
        heads = self._head_
        for start in range(0, len(order), _BLOCK):
            block = order[start : start + _BLOCK]
            base, side = self._inputs_(X[block], learn=True)
            targets = np.zeros((len(block), len(heads)), self.network_.dtype)
            targets[np.arange(len(block)), heads[codes[block]]] = 1
            learned = self.network_.learn(
                base,
                side,
                targets,
                rate=self.learning_rate,
                initial_rate=self.learning_rate_init,
                weight=None if factors is None else factors[block],
                n_jobs=effective_n_jobs(self.n_jobs),
            )
            raw[start : start + len(block)] = learned[:, heads]
            self.t_ += len(block)
        return raw

    # ------------------------------------------------------------------ prediction

    def _blocks(self, X: Any, compute: Callable[[Array, Array], Array]) -> Array:
        check_is_fitted(self, "network_")
        X = validate_data(self, X, reset=False, dtype=(np.float64, np.float32))
        return np.concatenate(
            [compute(*self._inputs_(X[start : start + _BLOCK], learn=False)) for start in range(0, len(X), _BLOCK)]
        )

    def _logits(self, X: ArrayLike) -> Array:
        jobs = effective_n_jobs(self.n_jobs)
        return self._blocks(X, lambda base, side: self.network_.predict(base, side, n_jobs=jobs)[:, self._head_])

    def decision_function(self, X: ArrayLike) -> Array:
        """Logit of each class's network, ``(n, n_classes)``; for two classes the log-odds of their ratio, ``(n,)``."""
        raw = self._logits(X)
        if raw.shape[1] != 2:
            return raw
        log_q = _log_sigmoid(raw)
        return log_q[:, 1] - log_q[:, 0]

    def predict_proba(self, X: ArrayLike) -> Array:
        """Class probabilities ``(n, n_classes)``: the networks' outputs divided by their sum."""
        return _ratio(self._logits(X))

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
        if clipped not in ("product", "constant"):
            raise InvalidInput(f"clipped must be 'product' or 'constant'; got {clipped!r}.")
        return self._blocks(X, lambda b, s: self.network_.saliency(b, s, clipped=clipped)[:, self._head_])

    def base_logits(self, X: ArrayLike) -> Array:
        """What the first layer reads, ``(n, 1 + d)``: the bias logit, then the base predictions' clipped logits."""
        return self._blocks(X, lambda base, side: base)

    def clip_active(self, X: ArrayLike) -> Array:
        """Whether any neuron below the read-out is clipped, ``(n, n_classes)`` bool."""
        raw = self._blocks(X, lambda b, s: self.network_.neuron_logits(b, s)[:, self._head_])
        network = self.network_
        inner = raw[:, :, : network.neurons - int(network.sizes[-1])]
        return (np.abs(inner) > network.constants[1]).any(axis=2)

    def layer_predictions(self, X: ArrayLike) -> list[Array]:
        """Probability that every neuron predicts, a list over layers of ``(n, n_classes, K_l)``, clipped to eps."""
        raw = self._blocks(X, lambda b, s: self.network_.neuron_logits(b, s)[:, self._head_])
        network = self.network_
        p = sigmoid(np.clip(raw, -network.constants[1], network.constants[1]))
        return np.split(p, np.cumsum(network.sizes)[:-1], axis=2)

    def context_counts(self, X: ArrayLike) -> Array:
        """How often the contexts active at each sample were learned from, ``(n, n_classes, n_neurons)``.

        Small counts mark samples unlike those seen: a novelty score that costs nothing.
        """
        return self._blocks(X, lambda base, side: self.network_.visit_counts(side)[:, self._head_])

    # ------------------------------------------------------------------ disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the estimator to an ``.npz`` file without pickle; :meth:`load` continues from it bit for bit."""
        check_is_fitted(self, "network_")
        arrays = self.network_.state() | self._inputs_.state() | pack_labels(self.classes_)
        names = getattr(self, "feature_names_in_", None)
        if names is not None:
            arrays["features"] = names.astype(str)
        arrays |= {"heads": self._head_, "seed": np.array(self._seed_), "t": np.array(self.t_)}
        save_arrays(path, type(self).__name__, self.get_params(deep=False), arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **params: Any) -> Self:
        """Read what :meth:`save` wrote. Parameters that were objects (a callable, an estimator) are passed again.

        Raises
        ------
        MissingFile
            There is no such file.
        InvalidInput
            The file is damaged or of another kind, or a parameter must be passed.
        """
        settings, arrays = load_arrays(path, cls.__name__, params)
        model = cls(**settings)
        model.n_features_in_ = arrays["inputs.moments"].shape[1]
        if "features" in arrays:
            model.feature_names_in_ = arrays["features"].astype(object)
        model._build(int(arrays["seed"]), model.n_features_in_, None, int(arrays["inputs.n_base"]))
        model._inputs_.restore(arrays)
        model.network_.restore(arrays)
        model.classes_, model._head_, model.t_ = unpack_labels(arrays), arrays["heads"], int(arrays["t"])
        return model


def only_weight(options: Any) -> ArrayLike | None:
    """The only option of ``fit``; others are refused as Python refuses unknown keywords."""
    unknown = sorted(set(options) - {"sample_weight"})
    if unknown:
        raise TypeError(f"fit() got an unexpected keyword argument {unknown[0]!r}; it takes sample_weight.")
    return options.get("sample_weight")


def step_factors(weight: ArrayLike | None, X: Array) -> Array | None:
    """Sample weights as factors on the step sizes, checked."""
    if weight is None:
        return None
    if not np.asarray(weight, np.float64).any():
        raise InvalidInput("All sample weights are zero; at least one sample must have a weight > 0.")
    return np.asarray(_check_sample_weight(weight, X, dtype=np.float64, ensure_non_negative=True))


def _ratio(raw: Array) -> Array:
    """Outputs divided by their sum, computed from log-probabilities so that tiny outputs keep their order."""
    log_q = _log_sigmoid(raw)
    q = np.exp(log_q - log_q.max(axis=1, keepdims=True))
    return q / q.sum(axis=1, keepdims=True)


def _log_sigmoid(raw: Array) -> Array:
    return -np.logaddexp(0.0, -raw.astype(np.float64))
