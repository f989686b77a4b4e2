"""One pipeline: a prepared table and a learner that is fitted step by step, 2, 4, 8, ... iterations (section 2.1.2)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn import preprocessing
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import SGDClassifier, SGDRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.utils.class_weight import compute_sample_weight

from .rows import TableRows
from .space import FULL_ITERATIONS, Kind, Value

FloatArray = NDArray[np.float64]
Matrix = Any  # a dense float64 array or a CSR matrix, (rows, features)


class _Learner(Protocol):
    """What every learner can do: go on to a number of iterations, and predict."""

    done: bool
    model: Any

    def advance(self, iterations: int) -> None: ...

    def predict(self, X: Matrix) -> FloatArray: ...


def doubling(limit: int) -> list[int]:
    """Iterations after which a pipeline is scored: 2, 4, 8, ... and the limit.

    Examples
    --------
    >>> doubling(20)
    [2, 4, 8, 16, 20]
    """
    steps = [2]
    while steps[-1] < limit:
        steps.append(min(2 * steps[-1], limit))
    return [min(step, limit) for step in steps]


class Preparation:
    """Missing values, scales and categories of a table, as a configuration has them; fitted on training rows.

    Rare levels become one (a level that is rarer than the fraction), levels become columns of 0 and 1 or their number;
    missing numbers are imputed, then columns are rescaled. A missing category is a level of its own, and so is a
    category that was not seen in training.
    """

    def __init__(self, config: Mapping[str, Value], seed: int) -> None:
        self.config, self.seed = config, seed

    def fit_transform(self, rows: TableRows) -> Matrix:
        """Fit on training rows and prepare them."""
        numbers = rows.numbers
        if sp.issparse(numbers):
            self._scaler = self._make_scaler(numbers.shape[0], sparse=True)
            return sp.csr_matrix(numbers if self._scaler is None else self._scaler.fit_transform(numbers))
        self._fill = self._filling(numbers)
        filled = self._filled(numbers)
        self._scaler = self._make_scaler(len(filled), sparse=False) if filled.shape[1] else None
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            scaled = filled if self._scaler is None else self._scaler.fit_transform(filled)
        self._levels = [self._frequent(column) for column in rows.codes.T]
        return self._joined(scaled, rows)

    def transform(self, rows: TableRows) -> Matrix:
        """Prepare other rows."""
        if sp.issparse(rows.numbers):
            return sp.csr_matrix(rows.numbers if self._scaler is None else self._scaler.transform(rows.numbers))
        filled = self._filled(rows.numbers)
        with np.errstate(all="ignore"):
            return self._joined(filled if self._scaler is None else self._scaler.transform(filled), rows)

    def _joined(self, scaled: FloatArray, rows: TableRows) -> FloatArray:
        parts = [np.nan_to_num(scaled, posinf=1e12, neginf=-1e12), *self._encoded(rows.codes)]
        return np.ascontiguousarray(np.hstack(parts))

    def _filling(self, numbers: FloatArray) -> FloatArray:
        """What stands in for a missing number of each column; 0 where all are missing."""
        how = self.config["imputation"]
        fill = np.zeros(numbers.shape[1])
        for j, column in enumerate(numbers.T):
            seen = column[~np.isnan(column)]
            if not len(seen):
                continue
            if how == "most_frequent":
                values, counts = np.unique(seen, return_counts=True)
                fill[j] = values[counts.argmax()]
            else:
                fill[j] = seen.mean() if how == "mean" else np.median(seen)
        return fill

    def _filled(self, numbers: FloatArray) -> FloatArray:
        return np.where(np.isnan(numbers), self._fill, numbers)

    def _make_scaler(self, rows: int, *, sparse: bool) -> Any:
        c, how = self.config, self.config["rescaling"]
        if how == "standardize":
            return preprocessing.StandardScaler(with_mean=not sparse)
        if how == "minmax":
            return preprocessing.MinMaxScaler()
        if how == "normalize":
            return preprocessing.Normalizer()
        if how == "robust_scaler":
            quantiles = (100 * float(c["rescaling:q_min"]), 100 * float(c["rescaling:q_max"]))
            return preprocessing.RobustScaler(quantile_range=quantiles)
        if how == "quantile_transformer":
            return preprocessing.QuantileTransformer(
                n_quantiles=min(int(c["rescaling:n_quantiles"]), rows),
                output_distribution=str(c["rescaling:output_distribution"]),
                random_state=self.seed,
            )
        return preprocessing.PowerTransformer() if how == "power_transformer" else None

    def _frequent(self, column: NDArray[np.int64]) -> NDArray[np.int64]:
        """Levels that keep a code of their own; the others share one."""
        levels, counts = np.unique(column, return_counts=True)
        if self.config["coalescence"] == "minority":
            levels = levels[counts >= float(self.config["coalescence:minimum_fraction"]) * len(column)]
        # One-hot columns fill the memory: the 255 most frequent levels are kept.
        if len(levels) > 255:
            levels = np.sort(np.array([v for v in _by_frequency(column) if v in set(levels.tolist())][:255]))
        return levels

    def _encoded(self, codes: NDArray[np.int64]) -> list[FloatArray]:
        parts = []
        for levels, column in zip(self._levels, codes.T, strict=True):
            place = np.searchsorted(levels, column)  # (rows,): its level, or len(levels) for rare and unseen ones
            place[
                (place >= len(levels)) | (levels[np.minimum(place, len(levels) - 1)] != column if len(levels) else True)
            ] = len(levels)
            if self.config["encoding"] == "one_hot":
                parts.append(np.eye(len(levels) + 1)[place])
            else:
                parts.append(place[:, None].astype(np.float64))
        return parts


def _by_frequency(column: NDArray[np.int64]) -> list[int]:
    levels, counts = np.unique(column, return_counts=True)
    return [int(v) for v in levels[np.argsort(-counts, kind="stable")]]


def _parameters(config: Mapping[str, Value]) -> dict[str, Any]:
    prefix = f"{config['learner']}:"
    return {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}


class _Trees:
    """Forests and boosted trees: scikit-learn's warm start adds trees to those that are there."""

    def __init__(self, model: Any, X: Matrix, y: NDArray, weight: FloatArray | None, name: str) -> None:
        self.model, self.X, self.y, self.weight, self.name, self.done = model, X, y, weight, name, False

    def advance(self, iterations: int) -> None:
        self.model.set_params(**{self.name: iterations})
        self.model.fit(self.X, self.y, sample_weight=self.weight)
        self.done = self.name == "max_iter" and self.model.n_iter_ < iterations

    def predict(self, X: Matrix) -> FloatArray:
        return _predictions(self.model, X)


class _Passes:
    """Linear models and networks: one ``partial_fit`` is a pass over the rows; they stop when the loss stands still.

    ``partial_fit`` keeps the state of optimizer and schedule, which a second ``fit`` would set back.
    """

    def __init__(
        self, model: Any, X: Matrix, y: NDArray, weight: FloatArray | None, rule: tuple[str, float, int], seed: int
    ):
        self.model, self.done, self.passes = model, False, 0
        self.how, self.tol, self.patience = rule
        self.held: tuple[Matrix, NDArray] | None = None
        keep = np.arange(X.shape[0])
        if self.how == "valid" and len(keep) >= 20:
            order = np.random.default_rng(seed).permutation(len(keep))
            out, keep = np.sort(order[: len(keep) // 10]), np.sort(order[len(keep) // 10 :])
            self.held = X[out], y[out]
        self.X, self.y = X[keep], y[keep]
        self.weight = None if weight is None else weight[keep]
        self.classes = (
            {"classes": np.unique(y)} if hasattr(model, "predict_proba") or hasattr(model, "loss_function_") else {}
        )
        if isinstance(model, SGDClassifier | MLPClassifier):
            self.classes = {"classes": np.unique(y)}
        self.best, self.waited = np.inf, 0

    def advance(self, iterations: int) -> None:
        while self.passes < iterations and not self.done:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore", ConvergenceWarning)
                self.model.partial_fit(
                    self.X, self.y, **self.classes, **({} if self.weight is None else {"sample_weight": self.weight})
                )
            self.classes, self.passes = {}, self.passes + 1
            if isinstance(self.model, MLPClassifier | MLPRegressor):
                self._watch(self.model.loss_ if self.held is None else -self.model.score(*self.held))
        if not isinstance(self.model, MLPClassifier | MLPRegressor):
            self._watch(1.0 - float(self.model.score(self.X, self.y)))  # once a step: a pass costs less than a score

    def _watch(self, loss: float) -> None:
        self.waited = 0 if loss < self.best - self.tol else self.waited + 1
        self.best = min(self.best, loss)
        self.done = self.waited >= self.patience

    def predict(self, X: Matrix) -> FloatArray:
        return _predictions(self.model, X)


def _predictions(model: Any, X: Matrix) -> FloatArray:
    """Probabilities (rows, classes), or values (rows, 1)."""
    if not hasattr(model, "classes_"):
        return np.clip(np.asarray(model.predict(X), np.float64), -1e150, 1e150).reshape(-1, 1)
    if hasattr(model, "predict_proba"):
        found = np.asarray(model.predict_proba(X), np.float64)
        if np.isfinite(found).all():
            return found
    scores = np.asarray(model.decision_function(X), np.float64) if hasattr(model, "decision_function") else found
    scores = np.nan_to_num(scores, nan=0.0, posinf=1e9, neginf=-1e9)
    if scores.ndim == 1:
        scores = np.column_stack([-scores / 2, scores / 2])
    scores -= scores.max(1, keepdims=True)
    odds = np.exp(scores)
    return odds / odds.sum(1, keepdims=True)


def _make(
    config: Mapping[str, Value], kind: Kind, X: Matrix, y: NDArray, weight: FloatArray | None, seed: int
) -> _Learner:
    name, p = str(config["learner"]), _parameters(config)
    labels = kind == "classification"
    if name in ("random_forest", "extra_trees"):
        forests = (
            (RandomForestClassifier, ExtraTreesClassifier) if labels else (RandomForestRegressor, ExtraTreesRegressor)
        )
        features = round(X.shape[1] ** float(p.pop("max_features")))
        model = forests[name == "extra_trees"](
            max_features=min(max(features, 1), X.shape[1]), warm_start=True, n_jobs=1, random_state=seed, **p
        )
        return _Trees(model, X, y, weight, "n_estimators")
    if name == "gradient_boosting":
        return _Trees(_boosting(p, labels, y, seed), X, y, weight, "max_iter")
    if name == "mlp":
        layers = (int(p["num_nodes_per_layer"]),) * int(p["hidden_layer_depth"])
        kinds = MLPClassifier if labels else MLPRegressor
        model = kinds(
            hidden_layer_sizes=layers,
            activation=p["activation"],
            alpha=p["alpha"],
            learning_rate_init=p["learning_rate_init"],
            random_state=seed,
        )
        return _Passes(model, X, y, weight, (p["early_stopping"], 1e-4, 32), seed)
    tol = p.pop("tol")
    if name == "passive_aggressive":
        # PA-I and PA-II are steps of the hinge loss; the second is what the squared one gives.
        schedule = "pa1" if p["loss"] == "hinge" else "pa2"
        model = SGDClassifier(
            loss="hinge", penalty=None, learning_rate=schedule, eta0=p["C"], average=p["average"], random_state=seed
        )
    else:
        p["loss"] = "log_loss" if p["loss"] == "log" else p["loss"]
        p.setdefault("eta0", 0.01)
        model = (SGDClassifier if labels else SGDRegressor)(random_state=seed, **p)
    return _Passes(model, X, y, weight, ("train", tol, 3), seed)


def _boosting(p: Mapping[str, Any], labels: bool, y: NDArray, seed: int) -> Any:
    early = p["early_stop"]
    # Its own split is stratified, and cannot be made with a class of one row: the training loss is watched then.
    if labels and early == "valid" and np.unique(y, return_counts=True)[1].min() < 2:
        early = "train"
    stop: dict[str, Any] = {"early_stopping": early != "off"}
    if early != "off":
        stop["n_iter_no_change"] = p["n_iter_no_change"]
        stop["validation_fraction"] = p["validation_fraction"] if early == "valid" else None
    kind = HistGradientBoostingClassifier if labels else HistGradientBoostingRegressor
    return kind(
        learning_rate=p["learning_rate"],
        max_leaf_nodes=p["max_leaf_nodes"],
        min_samples_leaf=p["min_samples_leaf"],
        l2_regularization=p["l2_regularization"],
        warm_start=True,
        random_state=seed,
        **stop,
    )


class IterativePipeline:
    """A pipeline that is fitted step by step.

    Going on from 8 to 16 iterations gives what 16 at once would: trees are added, optimizers go on.

    Parameters
    ----------
    config
        A configuration of :func:`pipeline_space`.
    kind
        ``"classification"`` or ``"regression"``.
    n_classes
        Number of classes; labels are 0, ..., n_classes - 1. Probabilities have a column for each, also for classes that
        are not among the training rows.
    seed
        Of all that the learner draws.

    Examples
    --------
    >>> from mlcollage.papers.autosklearn2.rows import TableRows
    >>> from mlcollage.papers.autosklearn2.space import pipeline_space
    >>> X = np.random.default_rng(0).normal(size=(80, 3))
    >>> y = (X[:, 0] > 0).astype(int)
    >>> pipeline = IterativePipeline(pipeline_space().default(), "classification", 2).start(TableRows.of(X), y)
    >>> pipeline.advance(4).predict(TableRows.of(X)).shape
    (80, 2)
    """

    def __init__(self, config: Mapping[str, Value], kind: Kind, n_classes: int = 0, seed: int = 0) -> None:
        self.config, self.kind, self.n_classes, self.seed = dict(config), kind, n_classes, seed

    def start(self, rows: TableRows, y: NDArray, sample_weight: FloatArray | None = None) -> IterativePipeline:
        """Prepare the training rows; nothing is fitted yet."""
        self.preparation = Preparation(self.config, self.seed)
        X = self.preparation.fit_transform(rows)
        weight = sample_weight
        if self.kind == "classification":
            self.seen, y = np.unique(y, return_inverse=True)
            if self.config["balancing"] == "weighting":
                balance = compute_sample_weight("balanced", y)
                weight = balance if weight is None else weight * balance
        else:
            self.shift, self.scale = float(y.mean()), float(y.std()) or 1.0
            y = (y - self.shift) / self.scale
        self.constant = self.kind == "classification" and len(self.seen) == 1
        self.iterations = 0
        if X.shape[1] == 0:
            X = np.zeros((len(y), 1))
        self._learner = None if self.constant else _make(self.config, self.kind, X, y, weight, self.seed)
        return self

    @property
    def limit(self) -> int:
        """Iterations of a full fit."""
        return FULL_ITERATIONS[str(self.config["learner"])]

    @property
    def done(self) -> bool:
        """Whether the learner stopped by itself."""
        return self._learner is None or self._learner.done

    def advance(self, iterations: int) -> IterativePipeline:
        """Go on until so many iterations are done; what is done already stays."""
        if self._learner is not None and not self._learner.done and iterations > self.iterations:
            self._learner.advance(iterations)
        self.iterations = max(iterations, self.iterations)
        return self

    def predict(self, rows: TableRows) -> FloatArray:
        """Probabilities ``(rows, classes)``, or values ``(rows, 1)``."""
        if self._learner is None:
            found = np.ones((len(rows), 1))
        else:
            X = self.preparation.transform(rows)
            found = self._learner.predict(X if X.shape[1] else np.zeros((len(rows), 1)))
        if self.kind == "regression":
            return found * self.scale + self.shift
        out = np.zeros((len(rows), self.n_classes))
        out[:, self.seen] = found
        return out

    def frozen(self) -> IterativePipeline:
        """A copy that predicts and does not go on: without the training rows."""
        found = copy.copy(self)
        if self._learner is not None:
            found._learner = copy.copy(self._learner)
            for name in ("X", "y", "weight", "held"):
                setattr(found._learner, name, None)
            # Trees that come later are added to the list of the model itself.
            model = copy.copy(self._learner.model)
            for name in ("estimators_", "_predictors"):
                if hasattr(model, name):
                    setattr(model, name, list(getattr(model, name)))
            for name in ("coef_", "intercept_", "coefs_", "intercepts_"):
                if hasattr(model, name):
                    setattr(model, name, copy.deepcopy(getattr(model, name)))
            found._learner.model = model
        return found
