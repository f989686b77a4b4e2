"""The density model: a density, learned online, that beats independence."""

import itertools

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mlcollage.errors import InvalidInput
from mlcollage.papers.gated_linear_networks import GLNDensity

SMALL = {"hidden_layer_sizes": (5, 3), "context_dim": 2, "random_state": 0}


def correlated(n, d, seed=0):
    rng = np.random.default_rng(seed)
    first = rng.random((n, 1)) < 0.4
    return (first ^ (rng.random((n, d)) < 0.15)).astype(float)


@pytest.mark.parametrize("d", [1, 2, 7])
@pytest.mark.parametrize("tables", ["dense", "lazy"])
def test_sums_to_one_over_all_vectors(d, tables):
    model = GLNDensity(tables=tables, dtype="float64", learning_rate=0.1, **SMALL).fit(correlated(300, d))
    every = np.array(list(itertools.product([0, 1], repeat=d)))
    assert abs(np.exp(model.score_samples(every)).sum() - 1) < 1e-12


def test_score_is_the_chain_rule_over_prefixes():
    model = GLNDensity(dtype="float64", **SMALL).fit(correlated(300, 5))
    x = np.array([[1.0, 0, 1, 1, 0]])
    tails = np.array(list(itertools.product([0, 1], repeat=2)))
    marginal = np.exp(model.score_samples(np.hstack([np.repeat(x[:, :3], 4, axis=0), tails]))).sum()
    changed = np.array([[1.0, 0, 1, 0, 1]])
    assert marginal < 1
    # The first three factors see nothing of the rest.
    p = [sum(np.exp(model.score_samples(np.hstack([np.repeat(v[:, :3], 4, axis=0), tails])))) for v in (x, changed)]
    assert p[0] == pytest.approx(p[1], rel=1e-12)


def test_one_pass_on_binarized_digits_beats_independence():
    X, _ = load_digits(return_X_y=True)
    X = (X[np.random.default_rng(0).permutation(len(X))] > 7).astype(float)
    model = GLNDensity(random_state=0).fit(X[:1400])
    p = np.clip(X[:1400].mean(axis=0), 1e-3, 1 - 1e-3)
    independent = (X[1400:] * np.log(p) + (1 - X[1400:]) * np.log(1 - p)).sum(axis=1).mean()
    assert model.score(X[1400:]) > independent + 5
    drawn = model.sample(300, random_state=0)
    assert np.abs(drawn.mean(axis=0) - X.mean(axis=0)).mean() < 0.1
    assert model.score(drawn) > model.score((np.random.default_rng(0).random(drawn.shape) < p).astype(float))


def test_samples_have_the_models_frequencies():
    model = GLNDensity(dtype="float64", learning_rate=0.1, **SMALL).fit(correlated(500, 3))
    drawn = model.sample(20_000, random_state=1)
    every = np.array(list(itertools.product([0, 1], repeat=3)))
    frequency = (drawn[:, None] == every).all(axis=2).mean(axis=0)
    np.testing.assert_allclose(frequency, np.exp(model.score_samples(every)), atol=0.015)
    assert np.array_equal(drawn, model.sample(20_000, random_state=1))


def test_chunks_threads_and_progressive_scores():
    X = correlated(400, 6)
    whole = GLNDensity(n_jobs=2, **SMALL).fit(X)
    parts = GLNDensity(**SMALL)
    scores = np.concatenate([parts.progressive_score(X[a:b]) for a, b in ((0, 1), (1, 150), (150, 400))])
    assert np.array_equal(whole.score_samples(X), parts.score_samples(X))
    assert scores[0] == pytest.approx(6 * np.log(0.5), abs=2.5)
    assert scores[-100:].mean() > scores[:50].mean()
    assert parts.t_ == 400
    again = GLNDensity(**SMALL).partial_fit(X[:150]).partial_fit(X[150:])
    assert np.array_equal(again.score_samples(X), parts.score_samples(X))


@pytest.mark.parametrize("tables", ["dense", "lazy"])
def test_a_saved_stream_continues_bit_for_bit(tmp_path, tables):
    X = correlated(300, 5)
    whole = GLNDensity(tables=tables, **SMALL).fit(X)
    GLNDensity(tables=tables, **SMALL).fit(X[:100]).save(tmp_path / "d.npz")
    resumed = GLNDensity.load(tmp_path / "d.npz").partial_fit(X[100:])
    assert np.array_equal(whole.score_samples(X), resumed.score_samples(X))
    assert np.array_equal(whole.sample(9, random_state=0), resumed.sample(9, random_state=0))
    assert resumed.t_ == 300


def test_a_memory_stops_the_schedule_and_health_tells_the_step():
    X = correlated(700, 5)
    model = GLNDensity(memory=100, learning_rate_init=0.5, **SMALL).fit(X)
    health = model.health()
    assert (health.samples, health.step_size) == (700, pytest.approx(0.5 / 10))
    early = GLNDensity(learning_rate_init=0.5, **SMALL)
    scores = early.progressive_score(X)
    assert early.health().step_size == pytest.approx(0.5 / np.sqrt(701))
    assert early.health().recent_loss == pytest.approx(-scores[:500].mean())
    assert not np.array_equal(model.score_samples(X), early.score_samples(X))


def test_bad_input_is_named():
    with pytest.raises(InvalidInput, match="binary"):
        GLNDensity().fit([[0.0, 0.5]])
    with pytest.raises(InvalidInput, match="min_probability"):
        GLNDensity(min_probability=0).fit([[0, 1]])
    with pytest.raises(InvalidInput, match="learning_rate"):
        GLNDensity(learning_rate=-1).fit([[0, 1]])
    model = GLNDensity(**SMALL).fit([[0, 1], [1, 1]])
    with pytest.raises(InvalidInput, match="n_samples"):
        model.sample(0)
    with pytest.raises(ValueError, match="features"):
        model.score_samples([[0, 1, 1]])
