"""Nearest neighbors, ridge probes with leave-one-out, and splits with few labels."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from mlcollage.errors import InvalidInput
from mlcollage.measure import few_shot_split, knn_probe, ridge_probe, semi_supervised_split


def blobs(n=120, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return rng.normal(size=(n, 6)) + 1.5 * np.eye(6)[y], y


def test_knn_is_that_of_scikit_learn():
    X, y = blobs()
    Q, t = blobs(90, seed=1)
    unit = [A / np.linalg.norm(A, axis=1, keepdims=True) for A in (X, Q)]
    # Of unit vectors, cos = 1 - d^2 / 2.
    peer = KNeighborsClassifier(15, weights=lambda d: np.exp((1 - d**2 / 2) / 0.1), algorithm="brute").fit(unit[0], y)
    found = knn_probe(X, y, Q, t, k=15)
    np.testing.assert_array_equal(found.predictions, peer.predict(unit[1]))
    assert found.accuracy == pytest.approx(peer.score(unit[1], t))
    assert (found.k, found.temperature, found.left_out) == (15, 0.1, False)


def test_a_query_does_not_vote_for_itself():
    """Random labels: one neighbor is right always if it may be the query, else by chance."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(400, 5)), rng.integers(0, 7, 400)
    for queries in (None, X, X.copy()):
        found = knn_probe(X, y, queries, y, k=1)
        assert found.left_out
        assert found.accuracy < 0.25
    with pytest.warns(UserWarning, match="100% of the queries"):
        assert knn_probe(np.vstack([X, X[:1]]), [*y, y[0]], X, y, k=1).accuracy == 1.0  # another bank


def test_votes_of_a_large_bank_are_taken_in_parts(monkeypatch):
    X, y = blobs()
    whole = knn_probe(X, y, k=9)
    monkeypatch.setattr("mlcollage.measure.knn._CHUNK", 7)
    np.testing.assert_array_equal(knn_probe(X, y, k=9).predictions, whole.predictions)


def test_labels_may_be_text_and_have_gaps():
    X, y = blobs()
    names = np.array(["a", "b", "c", "x"])[y]
    assert knn_probe(X, names, k=9).accuracy == knn_probe(X, y * 10 + 3, k=9).accuracy == knn_probe(X, y, k=9).accuracy
    probe = ridge_probe(X, names)
    assert set(probe.predict(X)) <= set("abcx")
    assert probe.score(X, names) == ridge_probe(X, 7 * y).score(X, 7 * y)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda X, y: knn_probe(X, y, k=120), "k=120 neighbors of 119 rows"),
        (lambda X, y: knn_probe(X, y, X[:, :3], y), "features"),
        (lambda X, y: knn_probe(X, y[:-1]), "one label for each"),
        (lambda X, y: knn_probe(X, y - 1), "below 0"),
        (lambda X, y: knn_probe(X, y + 0.5), "no labels"),
        (lambda X, y: knn_probe(0 * X, y), "no direction"),
        (lambda X, y: knn_probe(X, y, X[:5], k=3), "labels y of the queries"),
        (lambda X, y: knn_probe(X, y, X, y[::-1], k=3), "their labels are others"),
        (lambda X, y: knn_probe(X, y, temperature=0), "temperature"),
        (lambda X, y: ridge_probe(X, 0 * y), "two classes"),
        (lambda X, y: ridge_probe(X, y - 1), "below 0"),
        (lambda X, y: ridge_probe(0 * X + 3, y), "same for all rows"),
        (lambda X, y: ridge_probe(X[:2], y[:2]), "three rows"),
        (lambda X, y: ridge_probe(X, y * np.nan), "finite ones"),
        (lambda X, y: ridge_probe(X, y, ridges=()), "empty"),
        (lambda X, y: ridge_probe(X, np.minimum(y, 1)).score(X, y), "has not seen class 2"),
        (lambda X, y: ridge_probe(X, y).predict(X[:, :2]), r"expected \(rows, 6\)"),
        (lambda X, y: few_shot_split(y, 31), "lower shots"),
        (lambda X, y: semi_supervised_split(y, 1.5), "share"),
    ],
)
def test_what_cannot_be_probed_is_refused(call, words):
    with pytest.raises(InvalidInput, match=words):
        call(*blobs())


@pytest.mark.parametrize("p", [4, 60])
def test_leave_one_out_is_what_leaving_out_gives(p):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, p)) * 3 + 7
    Y = X[:, :2] + rng.normal(size=(30, 2))
    ridges = (1e-3, 0.1, 10.0)
    probe = ridge_probe(X, Y, ridges=ridges)
    unit = ((X - X.mean(0)) ** 2).mean()
    for ridge in ridges:
        # What is penalized must be the same in all fits, so the centering of the whole is part of the definition.
        A = np.hstack([X - X.mean(0), np.ones((30, 1))])
        penalty = np.diag([30 * ridge * unit] * p + [0.0])
        rest = []
        for i in range(30):
            keep = np.arange(30) != i
            W = np.linalg.solve(A[keep].T @ A[keep] + penalty, A[keep].T @ Y[keep])
            rest.append(Y[i] - A[i] @ W)
        expected = (1 - (np.array(rest) ** 2).mean(0) / Y.var(0)).mean()
        assert probe.scores[ridge] == pytest.approx(expected, rel=1e-8)
    assert probe.ridge == max(probe.scores, key=probe.scores.get)
    peer = Ridge(30 * probe.ridge * unit).fit(X, Y)
    np.testing.assert_allclose(probe.weight.numpy(), peer.coef_.T, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(probe.predict(X).numpy(), peer.predict(X), rtol=1e-7)
    assert probe.score(X, Y) == pytest.approx(peer.score(X, Y))


def test_classes_are_chosen_by_their_accuracy():
    X, y = blobs()
    probe = ridge_probe(torch.from_numpy(X), torch.from_numpy(y))
    assert probe.scores[probe.ridge] == max(probe.scores.values())
    Q, t = blobs(400, seed=5)
    assert abs(probe.score(Q, t) - probe.scores[probe.ridge]) < 0.1
    noise = np.random.default_rng(0).normal(size=(120, 300))
    assert max(ridge_probe(noise, y).scores.values()) < 0.4  # no training accuracy of 1 from 300 columns


def test_splits():
    y = np.repeat(["a", "b", "c"], [200, 100, 10])
    few, rest = semi_supervised_split(y, 0.1)
    assert {c: int((y[few] == c).sum()) for c in "abc"} == {"a": 20, "b": 10, "c": 1}
    assert sorted([*few, *rest]) == list(range(310))
    assert {c: int((y[semi_supervised_split(y)[0]] == c).sum()) for c in "abc"} == {"a": 2, "b": 1, "c": 1}
    np.testing.assert_array_equal(few, semi_supervised_split(y, 0.1)[0])
    assert not np.array_equal(few, semi_supervised_split(y, 0.1, seed=1)[0])
    shots, _ = few_shot_split(y, 5)
    assert {c: int((y[shots] == c).sum()) for c in "abc"} == {"a": 5, "b": 5, "c": 5}


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (lambda y: y[:, None], "one label for each"),  # compared with all predictions, it gave another accuracy
        (lambda y: y - 1, "below 0"),
        (lambda y: y + 1, "has not seen class 4"),
        (lambda y: y[:1], "one label for each"),
        (lambda y: np.array(["a", None] * (len(y) // 2)), "NoneType, str"),
        (lambda y: [], "one label for each"),
    ],
)
def test_labels_of_queries_are_looked_at(y, words):
    x, labels = blobs()
    with pytest.raises(InvalidInput, match=words):
        knn_probe(x[:80], labels[:80], x[80:], y(labels[80:]), k=5)
    with pytest.raises(InvalidInput, match=words):
        ridge_probe(x[:80], labels[:80]).score(x[80:], y(labels[80:]))


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (lambda y: y[:, :1], "expected .40, 2."),  # not compared with both predictions
        (lambda y: y[:1], "expected .40, 2."),
        (lambda y: torch.ones_like(y), "no R.2"),
        (lambda y: y * torch.nan, "no R.2"),
    ],
)
def test_targets_of_other_rows_are_looked_at(y, words):
    x, _ = blobs()
    x = torch.as_tensor(x)
    probe = ridge_probe(x[:80], x[:80, :2])
    assert probe.score(x[80:], x[80:, :2]) > 0.99
    with pytest.raises(InvalidInput, match=words):
        probe.score(x[80:], y(x[80:, :2]))
    with pytest.raises(InvalidInput, match="NaN or infinity"):
        probe.predict(x * torch.nan)


def test_targets_may_be_bfloat16():
    x = torch.as_tensor(blobs()[0])
    y = x[:, 0].bfloat16()
    assert torch.equal(ridge_probe(x, y).weight, ridge_probe(x, y.double()).weight)


@pytest.mark.parametrize("split", [lambda y: few_shot_split(y, 1), semi_supervised_split])
def test_splits_of_nothing_and_of_missing_labels_are_refused(split):
    with pytest.raises(InvalidInput, match="of one at least"):
        split([])
    with pytest.raises(InvalidInput, match="missing ones perhaps"):
        split(["a", None, "a"])
    with pytest.raises(InvalidInput, match="class 2 has 1 rows"):
        few_shot_split([1, 1, 2], 2)


def test_queries_that_lie_in_the_bank_are_warned_of(recwarn):
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 10, (100,), generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="50% of the queries"):
        found = knn_probe(x[:80], y[:80], x[60:], y[60:], k=1)
    assert found.accuracy > 0.5  # labels are random
    recwarn.clear()
    assert knn_probe(x[:60], y[:60], x[60:], y[60:], k=1).accuracy < 0.3
    assert not recwarn.list
