"""Metrics as losses: of one prediction, and of many candidate ensembles at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from mlcollage._users import users_code
from mlcollage.errors import InvalidInput, UnknownName

FloatArray = NDArray[np.float64]
Kind = Literal["classification", "regression"]
Batched = Callable[[FloatArray, int], FloatArray]
_TINY = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class ScoreMetric:
    """A loss: lower is better.

    Parameters
    ----------
    name
        How it is called.
    kind
        ``"classification"`` or ``"regression"``.
    loss
        ``loss(y, prediction, weight)``: ``y`` holds classes 0, 1, ... or values, ``prediction`` is
        ``(rows, classes)`` or ``(rows, 1)``, ``weight`` is ``(rows,)`` or None.
    optimum
        The score of a perfect prediction; ``score = optimum - loss`` is what a user sees.

    Examples
    --------
    >>> metric_of("balanced_accuracy").loss(np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]), None)
    0.5
    """

    name: str
    kind: Kind
    loss: Callable[[NDArray, FloatArray, FloatArray | None], float]
    optimum: float = 1.0

    def score(self, y: NDArray, prediction: FloatArray, weight: FloatArray | None = None) -> float:
        """Higher is better."""
        return self.optimum - self.loss(y, prediction, weight)

    @property
    def code(self) -> str:
        """What tells a user's loss from another one of that name: a hash of its code; empty for ours."""
        if METRICS.get(self.name) is self:
            return ""
        function: Any = self.loss
        while isinstance(function, partial):
            function = function.keywords.get("function", function.func)
        body = getattr(function, "__code__", None)
        if body is None:
            return f"{type(function).__module__}.{type(function).__qualname__}"
        plain = [c for c in body.co_consts if isinstance(c, int | float | str | bytes | None)]
        return hashlib.sha256(repr((body.co_code, plain, body.co_names)).encode()).hexdigest()[:16]

    def batched(self, predictions: FloatArray, y: NDArray, weight: FloatArray | None) -> Batched:
        """``losses(total, s)``: the loss of each ``(total + predictions[k]) / s``, as an array over k."""
        # A user's loss may have the name of one of ours.
        fast = _FAST.get(self.name) if METRICS.get(self.name) is self else None
        if fast is not None:
            found = fast(predictions, y, weight)
            if found is not None:
                return found

        def losses(total: FloatArray, s: int) -> FloatArray:
            return np.array([self.loss(y, (total + p) / s, weight) for p in predictions])

        return losses


def _row_weights(y: NDArray, weight: FloatArray | None, *, balanced: bool) -> FloatArray:
    """What each row adds to accuracy, or to mean recall over the classes that are there."""
    w = np.ones(len(y)) if weight is None else weight
    if not balanced:
        return w / w.sum()
    shares = np.zeros(len(y))
    classes = [c for c in np.unique(y) if w[y == c].sum() > 0]
    for c in classes:
        shares[y == c] = w[y == c] / w[y == c].sum() / len(classes)
    return shares


def _accuracy_loss(y: NDArray, p: FloatArray, weight: FloatArray | None, *, balanced: bool) -> float:
    return 1.0 - float((_row_weights(y, weight, balanced=balanced) * (p.argmax(1) == y)).sum())


def _fast_accuracy(balanced: bool) -> Callable[..., Batched]:
    def make(p: FloatArray, y: NDArray, weight: FloatArray | None) -> Batched:
        w = _row_weights(y, weight, balanced=balanced)

        def losses(total: FloatArray, s: int) -> FloatArray:
            return 1.0 - ((p + total).argmax(2) == y) @ w

        return losses

    return make


def _log_loss(y: NDArray, p: FloatArray, weight: FloatArray | None) -> float:
    q = np.clip(p[np.arange(len(y)), y] / p.sum(1), _TINY, 1 - _TINY)
    return float(np.average(-np.log(q), weights=weight))


def _fast_log_loss(p: FloatArray, y: NDArray, weight: FloatArray | None) -> Batched:
    rows = np.arange(len(y))
    own, whole = p[:, rows, y], p.sum(2)  # (models, rows)
    w = np.full(len(y), 1 / len(y)) if weight is None else weight / weight.sum()

    def losses(total: FloatArray, s: int) -> FloatArray:
        q = (own + total[rows, y]) / (whole + total.sum(1))
        return -np.log(np.clip(q, _TINY, 1 - _TINY)) @ w

    return losses


def _auc(y: NDArray, p: FloatArray, weight: FloatArray | None) -> float:
    from sklearn.metrics import roc_auc_score

    present = np.unique(y)
    if len(present) < 2:
        return 0.5
    columns = [1] if p.shape[1] == 2 else present
    return 1.0 - float(np.mean([roc_auc_score(y == c, p[:, c], sample_weight=weight) for c in columns]))


def _fast_auc(p: FloatArray, y: NDArray, weight: FloatArray | None) -> Batched | None:
    present = np.unique(y)
    if weight is not None or len(present) < 2:
        return None
    columns = [1] if p.shape[2] == 2 else [int(c) for c in present]

    def losses(total: FloatArray, s: int) -> FloatArray:
        found = np.zeros(len(p))
        for c in columns:
            # The share of pairs in the right order, from the ranks of the positive rows.
            positive = y == c
            n, m = positive.sum(), (~positive).sum()
            ranks = rankdata((p[:, :, c] + total[:, c]) / s, axis=1)[:, positive].sum(1)
            found += (ranks - n * (n + 1) / 2) / (n * m)
        return 1.0 - found / len(columns)

    return losses


def _error(y: NDArray, p: FloatArray, weight: FloatArray | None, *, power: int) -> float:
    return float(np.average(np.abs(p[:, 0] - y) ** power, weights=weight))


def _fast_error(power: int) -> Callable[..., Batched]:
    def make(p: FloatArray, y: NDArray, weight: FloatArray | None) -> Batched:
        w = np.full(len(y), 1 / len(y)) if weight is None else weight / weight.sum()
        return lambda total, s: (np.abs((p[:, :, 0] + total[:, 0]) / s - y) ** power) @ w

    return make


def _r2(y: NDArray, p: FloatArray, weight: FloatArray | None) -> float:
    spread = np.average((y - np.average(y, weights=weight)) ** 2, weights=weight)
    return _error(y, p, weight, power=2) / (float(spread) or 1.0)


def _fast_r2(p: FloatArray, y: NDArray, weight: FloatArray | None) -> Batched:
    squared = _fast_error(2)(p, y, weight)
    spread = float(np.average((y - np.average(y, weights=weight)) ** 2, weights=weight)) or 1.0
    return lambda total, s: squared(total, s) / spread


_FAST: dict[str, Callable[..., Batched | None]] = {
    "accuracy": _fast_accuracy(False),
    "balanced_accuracy": _fast_accuracy(True),
    "log_loss": _fast_log_loss,
    "roc_auc": _fast_auc,
    "mse": _fast_error(2),
    "mae": _fast_error(1),
    "r2": _fast_r2,
}
METRICS = {
    m.name: m
    for m in (
        ScoreMetric("balanced_accuracy", "classification", partial(_accuracy_loss, balanced=True)),
        ScoreMetric("accuracy", "classification", partial(_accuracy_loss, balanced=False)),
        ScoreMetric("log_loss", "classification", _log_loss, 0.0),
        ScoreMetric("roc_auc", "classification", _auc),
        ScoreMetric("r2", "regression", _r2),
        ScoreMetric("mse", "regression", partial(_error, power=2), 0.0),
        ScoreMetric("mae", "regression", partial(_error, power=1), 0.0),
    )
}
"""Metrics by name."""
_ALIASES = {"neg_log_loss": "log_loss", "neg_mean_squared_error": "mse", "neg_mean_absolute_error": "mae"}


def metric_of(metric: Any, kind: Kind | None = None) -> ScoreMetric:
    """A metric by its name, or a user's function of ``(y, prediction, weight)``, which gives a loss.

    Raises
    ------
    UnknownName, InvalidInput
        If there is none of that name, or it is one for the other kind of task.
    """
    if isinstance(metric, ScoreMetric):
        found = metric
    elif callable(metric):
        name, of = getattr(metric, "__name__", "custom"), kind or "classification"
        found = ScoreMetric(name, of, partial(_users, function=metric), 0.0)
    else:
        name = _ALIASES.get(metric, metric) if isinstance(metric, str) else metric
        if name not in METRICS:
            raise UnknownName(
                f"metric must be one of {', '.join(METRICS)}, a ScoreMetric, or a function of (y, prediction, weight) "
                f"that gives a loss; not {metric!r}."
            )
        found = METRICS[name]
    if kind is not None and found.kind != kind:
        raise InvalidInput(f"the metric {found.name!r} is for {found.kind}; this is {kind}.")
    return found


def _users(y: NDArray, p: FloatArray, weight: FloatArray | None, *, function: Callable[..., Any]) -> float:
    with users_code("metric(y, prediction, weight)"):
        return float(function(y, p, weight))
