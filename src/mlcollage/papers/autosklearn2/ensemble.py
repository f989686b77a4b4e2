"""Greedy ensemble selection from stored predictions (Caruana et al., ICML 2004; section 2.1 of the paper)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .metrics import ScoreMetric, metric_of

FloatArray = NDArray[np.float64]


class EnsembleSelection:
    r"""A weighted mean of models, chosen greedily with replacement.

    At step s the model is added that makes the loss smallest:

    .. math:: k_s = \arg\min_k L(y, \frac{1}{s} (\sum_{r<s} P_{k_r} + P_k))

    and a model's weight is how often it was added. The losses of all candidates of a step come from one pass over
    their predictions; nothing is approximated.

    Parameters
    ----------
    size
        Steps; 50 in the paper.
    metric
        A name such as ``"balanced_accuracy"``, ``"log_loss"``, ``"roc_auc"``, ``"accuracy"``, ``"mse"``, ``"mae"``,
        ``"r2"``, or a :class:`ScoreMetric`.
    random_state
        Draws among models that are equally good.

    Attributes
    ----------
    indices_ : ndarray of shape (steps,)
        Which model was added.
    weights_ : ndarray of shape (models,)
        They sum to 1.
    trajectory_ : ndarray of shape (steps,)
        Loss of the ensemble after each step.

    Examples
    --------
    >>> y = np.array([0, 1, 1, 0])
    >>> p = np.array([[0.4, 0.6, 0.3, 0.2], [0.1, 0.4, 0.9, 0.6]])  # of class 1, by two models
    >>> selection = EnsembleSelection(4, "log_loss").fit(np.stack([1 - p, p], axis=2), y)
    >>> selection.weights_.tolist()
    [0.25, 0.75]
    """

    def __init__(
        self, size: int = 50, metric: str | ScoreMetric = "balanced_accuracy", *, random_state: Any = 0
    ) -> None:
        self.size = checks.integer("size", size, least=1)
        self.metric = metric
        self.random_state = random_state

    def fit(self, predictions: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> EnsembleSelection:
        """Select.

        Parameters
        ----------
        predictions
            ``(models, rows, classes)`` probabilities, or ``(models, rows, 1)`` values.
        y
            ``(rows,)``: classes 0, 1, ..., or values.
        sample_weight
            ``(rows,)``.
        """
        p, target = np.asarray(predictions, np.float64), np.asarray(y)
        if p.ndim != 3 or len(p) == 0 or p.shape[1] != len(target):
            raise InvalidInput(
                f"predictions are {p.shape} and y {target.shape}; expected (models, rows, outputs) and (rows,)."
            )
        metric = metric_of(self.metric)
        target = _checked_target(metric, p, target)
        if not np.isfinite(p).all():
            raise InvalidInput(f"model {int(np.argwhere(~np.isfinite(p))[0][0])} has predictions that are not finite.")
        weight = None if sample_weight is None else np.asarray(sample_weight, np.float64)
        if weight is not None and (
            weight.shape != target.shape or not np.isfinite(weight).all() or (weight < 0).any() or weight.sum() == 0
        ):
            raise InvalidInput(
                f"sample_weight must be {len(target)} finite numbers of at least 0, not all zero; got {weight.shape}."
            )
        losses = metric.batched(p, target, weight)
        rng = np.random.default_rng(self.random_state)
        picks: list[int] = []
        course: list[float] = []
        steps = 1 if len(p) == 1 else self.size
        total = np.zeros(p.shape[1:])
        for step in range(steps):
            found = losses(total, step + 1)
            if np.isnan(found).all():
                raise InvalidInput(f"the metric {metric.name!r} gives no number for any model, so none can be chosen.")
            best = np.flatnonzero(found == np.nanmin(found))
            k = int(best[0] if len(best) == 1 else rng.choice(best))
            total += p[k]
            picks.append(k)
            course.append(float(found[k]))
        self.indices_ = np.array(picks)
        self.trajectory_ = np.array(course)
        self.weights_ = np.bincount(self.indices_, minlength=len(p)) / len(picks)
        return self

    def predict(self, predictions: ArrayLike) -> FloatArray:
        """The weighted mean of the models' predictions, ``(rows, outputs)``."""
        if not hasattr(self, "weights_"):
            raise InvalidInput("the ensemble is not selected yet; call fit(predictions, y) first.")
        p = np.asarray(predictions, np.float64)
        if p.ndim != 3 or len(p) != len(self.weights_):
            raise InvalidInput(f"predictions are {p.shape}; expected ({len(self.weights_)}, rows, outputs).")
        return np.tensordot(self.weights_, p, axes=1)


def _checked_target(metric: ScoreMetric, p: FloatArray, y: NDArray) -> NDArray:
    """Targets that fit the predictions: numbers of classes, or finite values."""
    if y.ndim != 1 or len(y) == 0:
        raise InvalidInput(f"y is {y.shape}; expected (rows,), one row at least.")
    if metric.kind == "regression":
        if p.shape[2] != 1 or y.dtype.kind not in "biuf" or not np.isfinite(y).all():
            raise InvalidInput(
                f"for {metric.name!r} predictions must be (models, rows, 1), not {p.shape}, and y finite numbers."
            )
        return y
    whole = y.dtype.kind in "biu" or (y.dtype.kind == "f" and bool((y == np.round(y)).all()))
    if p.shape[2] < 2 or not whole or y.min() < 0 or y.max() >= p.shape[2]:
        raise InvalidInput(
            f"y must be numbers of classes from 0 to {p.shape[2] - 1}, the columns of predictions {p.shape} (two at "
            "least); for other labels give np.searchsorted(classes, y)."
        )
    return y.astype(np.int64)
