"""Ensemble selection: the official numbers, and the naive loop with scikit-learn's metrics."""

import numpy as np
import pytest
from sklearn import metrics

from mlcollage.errors import InvalidInput
from mlcollage.papers.autosklearn2 import EnsembleSelection
from mlcollage.papers.autosklearn2.metrics import METRICS, ScoreMetric, metric_of

CASES = ("bin_logloss", "bin_auc", "multi_logloss", "multi_ber", "bin_acc", "one_model")


@pytest.mark.parametrize("case", CASES)
def test_ensembles_are_the_official_ones(official, case):
    d = official("ensemble")
    p, y = d[f"{case}_predictions"], d[f"{case}_labels"]
    found = EnsembleSelection(int(d[f"{case}_size"]), str(d[f"{case}_metric"])).fit(p, y)
    np.testing.assert_array_equal(found.indices_, d[f"{case}_indices"])
    np.testing.assert_allclose(found.trajectory_, d[f"{case}_trajectory"], atol=1e-13)
    np.testing.assert_allclose(found.weights_, d[f"{case}_weights"], atol=1e-15)
    np.testing.assert_allclose(found.predict(p), d[f"{case}_ensemble"], atol=1e-14)


def sklearn_loss(name, y, p, w):
    labels = np.arange(p.shape[1])
    return {
        "balanced_accuracy": lambda: 1 - metrics.balanced_accuracy_score(y, p.argmax(1), sample_weight=w),
        "accuracy": lambda: 1 - metrics.accuracy_score(y, p.argmax(1), sample_weight=w),
        "log_loss": lambda: metrics.log_loss(y, p, labels=labels, sample_weight=w),
        "roc_auc": lambda: 1 - np.mean([metrics.roc_auc_score(y == c, p[:, c], sample_weight=w) for c in labels]),
        "mse": lambda: metrics.mean_squared_error(y, p[:, 0], sample_weight=w),
        "mae": lambda: metrics.mean_absolute_error(y, p[:, 0], sample_weight=w),
        "r2": lambda: 1 - metrics.r2_score(y, p[:, 0], sample_weight=w),
    }[name]()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", list(METRICS))
def test_the_fast_losses_are_those_of_scikit_learn(name, weighted):
    rng = np.random.default_rng(1)
    y = np.arange(60) % 3
    p = rng.dirichlet(np.ones(3), size=(5, 60)) + 0.4 * np.eye(3)[y]
    p /= p.sum(2, keepdims=True)
    if METRICS[name].kind == "regression":
        y, p = rng.normal(size=60), rng.normal(size=(5, 60, 1))
    w = rng.random(60) if weighted else None
    fast, total = METRICS[name].batched(p, y, w), p[0] + p[1]
    expected = [sklearn_loss(name, y, (total + q) / 3, w) for q in p]
    np.testing.assert_allclose(fast(total, 3), expected, rtol=1e-12)
    np.testing.assert_allclose([METRICS[name].loss(y, (total + q) / 3, w) for q in p], expected, rtol=1e-12)


def test_weights_count_as_copies_do():
    y, p = np.array([0, 0, 0, 0, 1, 1]), np.eye(2)[[0, 0, 1, 1, 1, 0]]
    w = np.array([1.0, 1, 0, 0, 1, 1])
    ber = METRICS["balanced_accuracy"].loss
    assert ber(y, p, w) == ber(y[w > 0], p[w > 0], None) == 0.25
    assert ber(y, p, None) == 0.5


def test_a_users_loss_with_the_name_of_ours_is_the_users():
    rng = np.random.default_rng(0)
    p, y = rng.dirichlet([1, 1], (4, 30)), np.arange(30) % 2

    def accuracy(y, p, weight):  # a loss that is small where ours is large
        return float((p.argmax(1) == y).mean())

    picked = EnsembleSelection(1, metric_of(accuracy)).fit(p, y).indices_[0]
    assert picked == np.argmax([(q.argmax(1) != y).mean() for q in p])
    assert metric_of("accuracy").code == ""
    assert metric_of(accuracy).code != metric_of(lambda y, p, weight: 0.5).code


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": np.array(["a", "b"] * 5)}, "y must be numbers of classes"),
        ({"y": np.array([1, 2] * 5)}, "y must be numbers of classes"),
        ({"y": np.array([-1, 1] * 5)}, "y must be numbers of classes"),
        ({"y": np.zeros((10, 1))}, "expected \\(rows,\\)"),
        ({"sample_weight": -np.ones(10)}, "sample_weight must be 10 finite numbers"),
        ({"sample_weight": np.ones(3)}, "sample_weight must be 10 finite numbers"),
        ({"metric": "mse"}, "predictions must be \\(models, rows, 1\\)"),
        ({"metric": lambda y, p, w: np.nan}, "gives no number for any model"),
    ],
)
def test_targets_and_weights_that_do_not_fit_are_refused(changes, message):
    p = np.random.default_rng(0).dirichlet([1, 1], (3, 10))
    given = {"y": np.arange(10) % 2, "metric": "log_loss", **changes}
    selection = EnsembleSelection(3, given.pop("metric"))
    with pytest.raises(InvalidInput, match=message):
        selection.fit(p, **given)
    with pytest.raises(InvalidInput, match="not selected yet"):
        selection.predict(p)


def test_ties_are_drawn_by_the_seed_and_a_users_metric_works():
    p = np.tile(np.array([[[0.9, 0.1]] * 4]), (5, 1, 1))
    y = np.zeros(4, int)
    picks = [EnsembleSelection(3, random_state=s).fit(p, y).indices_.tolist() for s in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]

    def brier(y, p, weight):
        return float(((1 - p[np.arange(len(y)), y]) ** 2).mean())

    found = EnsembleSelection(2, ScoreMetric("brier", "classification", brier)).fit(p, y)
    np.testing.assert_allclose(found.trajectory_, 0.01)


@pytest.mark.parametrize(
    ("p", "message"),
    [(np.ones((2, 3)), "expected"), (np.full((2, 3, 2), np.nan), "model 0 has predictions that are not finite")],
)
def test_bad_input_gets_a_sentence(p, message):
    with pytest.raises(InvalidInput, match=message):
        EnsembleSelection().fit(p, np.zeros(3, int))
    with pytest.raises(InvalidInput, match="metric must be one of"):
        EnsembleSelection(metric="brier").fit(np.ones((1, 3, 2)), np.zeros(3, int))
