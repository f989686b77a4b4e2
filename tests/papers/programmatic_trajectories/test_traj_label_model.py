"""The label model: brute force over label sequences, planted accuracies, and votes that must stand."""

import itertools

import numpy as np
import pytest

from mlcollage.errors import InvalidInput
from mlcollage.papers.programmatic_trajectories import ABSTAIN, SequenceLabelModel


def planted(accuracies, n=60, t=30, c=3, stay=0.9, seed=0, coverage=0.8):
    rng = np.random.default_rng(seed)
    y = rng.integers(c, size=(n, t, 1))
    for s in range(1, t):
        y[:, s] = np.where(rng.random((n, 1)) < stay, y[:, s - 1], y[:, s])
    votes = []
    for a in accuracies:
        wrong = (y + rng.integers(1, c, y.shape)) % c
        vote = np.where(rng.random(y.shape) < a, y, wrong)
        votes.append(np.where(rng.random(y.shape) < coverage, vote, ABSTAIN))
    return y, np.stack(votes, -1)


@pytest.mark.parametrize("method", ["dawid-skene", "hmm"])
def test_planted_accuracies_are_found(method):
    right = np.array([0.9, 0.75, 0.6])
    _, L = planted(right)
    model = SequenceLabelModel(method).fit(L)
    assert np.abs(model.accuracy_ - right).max() < 0.06
    assert (np.diff(model.log_likelihood_) > -1e-3).all()  # EM climbs, up to the prior
    if method == "hmm":
        assert model.stay_ == pytest.approx(0.9, abs=0.03)


def test_smoothing_helps_and_order_is_as_expected():
    y, L = planted([0.8, 0.6, 0.55])
    score = {}
    for method in ("majority", "dawid-skene", "hmm"):
        p = SequenceLabelModel(method, ties="lowest", keep_unanimous=False).fit(L).predict_proba(L)
        score[method] = (p.argmax(-1) == y).mean()
    assert score["majority"] < score["dawid-skene"] + 0.02 < score["hmm"]


def test_the_chain_is_brute_force():
    rng = np.random.default_rng(3)
    L = rng.integers(-1, 2, (1, 4, 1, 2))
    model = SequenceLabelModel("hmm", 2, max_iter=1).fit(np.maximum(L, 0))
    model.accuracy_, model.class_share_, model.stay_ = np.array([0.8, 0.7]), np.array([0.3, 0.7]), 0.6
    weights, total = np.zeros((4, 2)), 0.0
    for path in itertools.product(range(2), repeat=4):
        p = 1.0
        for t, c in enumerate(path):
            share = model.class_share_[c]
            p *= share if t == 0 else 0.6 * (c == path[t - 1]) + 0.4 * share
            for j, a in enumerate((0.8, 0.7)):
                if L[0, t, 0, j] != ABSTAIN:
                    p *= a if L[0, t, 0, j] == c else 1 - a
        total += p
        for t, c in enumerate(path):
            weights[t, c] += p
    post, _, loglik = model._posterior(L)
    assert np.allclose(post[0, :, 0], weights / total, atol=1e-12)
    assert loglik == pytest.approx(np.log(total), rel=1e-12)


@pytest.mark.parametrize("method", ["majority", "dawid-skene", "hmm"])
def test_one_function_passes_through(method):
    _, L = planted([0.8], n=5)
    found = SequenceLabelModel(method).fit(L).predict(L)
    said = L[..., 0] != ABSTAIN
    assert (found[said] == L[..., 0][said]).all()
    if method != "hmm":
        assert (found[~said] == ABSTAIN).all()


def test_unanimous_votes_stand():
    _, L = planted([0.9, 0.5, 0.5, 0.5, 0.5], n=20)
    found = SequenceLabelModel("hmm").fit(L).predict(L)
    low, high = np.where(L < 0, 99, L).min(-1), L.max(-1)
    agree = (low == high) & (high >= 0)
    assert (found[agree] == high[agree]).all()


def test_ties_of_a_majority():
    L = np.array([[0, 1], [1, 1], [-1, -1]])[None, :, None]
    assert SequenceLabelModel("majority").fit(L).predict(L)[0, :, 0].tolist() == [-1, 1, -1]
    assert SequenceLabelModel("majority", ties="lowest").fit(L).predict(L)[0, :, 0].tolist() == [0, 1, -1]


def test_refusals():
    L = np.zeros((1, 2, 1, 2), int)
    with pytest.raises(InvalidInput, match="abstain everywhere"):
        SequenceLabelModel().fit(L - 1)
    with pytest.raises(InvalidInput, match="n_classes is 2"):
        SequenceLabelModel(n_classes=2).fit(L + 5)
    with pytest.raises(InvalidInput, match="functions"):
        SequenceLabelModel().fit(L[0])
    with pytest.raises(InvalidInput, match="whole numbers"):
        SequenceLabelModel().fit(L + 0.5)
    with pytest.raises(InvalidInput, match="call fit"):
        SequenceLabelModel().predict(L)
    with pytest.raises(InvalidInput, match="fitted on 2 functions"):
        SequenceLabelModel().fit(L).predict(L[..., :1])
