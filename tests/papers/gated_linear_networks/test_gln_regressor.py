"""The Gaussian network against autograd, and the regressor as an online learner."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, make_friedman1
from sklearn.linear_model import BayesianRidge

from mlcollage.errors import InvalidInput
from mlcollage.papers.gated_linear_networks import GLNRegressor
from mlcollage.papers.gated_linear_networks.gaussian import GaussianNetwork

SMALL = {"hidden_layer_sizes": (6, 4), "context_dim": 3, "random_state": 0}


def stream(n=80, d=4, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    side = rng.normal(size=(n, d))
    base = np.concatenate([np.tile([-1.0, 0.0, 1.0], (n, 1)), side], axis=1)
    return base, side, scale * (side[:, 0] - side[:, 1] + 0.3 * rng.normal(size=n))


def build(d=4, **settings):
    net = GaussianNetwork((5, 3, 1), d, d, context_dim=2, dtype="float64", **settings)
    net.add_heads(1)
    return net


def autograd_step(net, base, side, target, eta):
    """Weights after one step on one sample, by autograd through the neuron and, for "official", its projection."""
    low, high, box = (float(c) for c in net.constants[:3])
    contexts = np.split(net.context_indices(side)[0, 0].astype(int), np.cumsum(net.sizes)[:-1])
    mean, precision = torch.tensor(base[0]), torch.ones(base.shape[1], dtype=torch.float64)
    after, active = [], []
    for layer, index in enumerate(contexts):
        table = torch.tensor(net.layer_weights(layer)[0])
        stored = table[torch.arange(len(index)), torch.tensor(index)].clone().requires_grad_()
        tau = stored @ precision
        shift = (tau - tau.clamp(low, high)) / (precision @ precision)
        active.append(bool((shift != 0).any()))
        projected = stored - shift[:, None] * precision
        if not net.official:
            projected = projected.detach().requires_grad_()
        tau = projected @ precision
        mu = projected @ (precision * mean) / tau
        loss = -torch.distributions.Normal(mu, tau.rsqrt()).log_prob(torch.tensor(target))
        leaf = stored if net.official else projected
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
        table[torch.arange(len(index)), torch.tensor(index)] = (leaf - eta * slope).clamp(-box, box).detach()
        after.append(table.numpy())
        mean = torch.cat([torch.tensor([-1.0, 0.0, 1.0]), mu.detach()])
        precision = torch.cat([torch.ones(3, dtype=torch.float64), tau.detach()])
    return after, any(active)


@pytest.mark.parametrize("gradient", ["paper", "official"])
def test_steps_are_autograd_gradients_with_the_projection(gradient):
    base, side, y = stream()
    net = build(gradient=gradient, min_variance=0.5, max_variance=1.2, step_limit=None)
    projected = 0
    for i in range(len(base)):
        expected, active = autograd_step(net, base[i : i + 1], side[i : i + 1], y[i], 0.02)
        projected += active
        net.run(base[i : i + 1], side[i : i + 1], y[i : i + 1], rate=0.02)
        for layer in range(3):
            np.testing.assert_allclose(net.layer_weights(layer)[0], expected[layer], rtol=1e-8, atol=1e-10)
    assert projected > 5


def test_output_is_the_weighted_product_of_gaussians():
    base, side, y = stream()
    net = build(min_variance=1e-3)
    net.run(base, side, y, rate=0.01)
    out = net.run(base, side)
    index = net.context_indices(side)[:, 0, :5].astype(int)
    w = net.layer_weights(0)[0][np.arange(5), index]
    tau = w.sum(axis=2)
    free = tau > 1e-4
    np.testing.assert_allclose(out[:, 1, :5][free], tau[free], rtol=1e-12)
    np.testing.assert_allclose(out[:, 0, :5][free], (np.einsum("nkf,nf->nk", w, base) / tau)[free], rtol=1e-10)


@pytest.mark.parametrize("gradient", ["paper", "official"])
def test_variances_stay_in_their_bounds_and_learning_is_stable_for_large_rates(gradient):
    base, side, y = stream(n=500, scale=3.0)
    net = build(gradient=gradient, min_variance=0.1, max_variance=10.0)
    net.run(base, side, y, rate=0.5)
    out = net.run(base, side)
    assert np.isfinite(out).all()
    assert out[:, 1].min() >= 0.1 - 1e-12
    assert out[:, 1].max() <= 10.0 + 1e-12


def nll(y, mean, std):
    return float(np.mean(0.5 * np.log(2 * np.pi * std**2) + (y - mean) ** 2 / (2 * std**2)))


def test_one_pass_beats_bayesian_ridge_on_friedman1_and_keeps_up_on_diabetes():
    X, y = make_friedman1(4000, noise=1.0, random_state=0)
    ridge = BayesianRidge().fit(X[:3000], y[:3000])
    ours = GLNRegressor(random_state=0).fit(X[:3000], y[:3000])
    assert ours.score(X[3000:], y[3000:]) > ridge.score(X[3000:], y[3000:]) + 0.05
    theirs = nll(y[3000:], *ridge.predict(X[3000:], return_std=True))
    assert nll(y[3000:], *ours.predict(X[3000:], return_std=True)) < theirs
    X, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = X[order], y[order]
    assert GLNRegressor(random_state=0).fit(X[:330], y[:330]).score(X[330:], y[330:]) > 0.25


def test_chunks_and_a_saved_stream_equal_one_fit_bit_for_bit(tmp_path):
    X, y = make_friedman1(500, random_state=1)
    whole = GLNRegressor(**SMALL).fit(X, y)
    parts = GLNRegressor(**SMALL).partial_fit(X[:1], y[:1]).partial_fit(X[1:200], y[1:200])
    parts.save(tmp_path / "r.npz")
    resumed = GLNRegressor.load(tmp_path / "r.npz").partial_fit(X[200:], y[200:])
    parts.partial_fit(X[200:], y[200:])
    for model in (parts, resumed):
        assert np.array_equal(whole.predict(X, return_std=True), model.predict(X, return_std=True))
        assert np.array_equal(whole.context_counts(X), model.context_counts(X))
        assert model.t_ == 500


def test_progressive_predictions_are_those_from_before_each_sample():
    X, y = make_friedman1(60, random_state=2)
    mean, std = GLNRegressor(**SMALL).progressive_predict(X, y, return_std=True)
    model = GLNRegressor(**SMALL)
    one = [model.progressive_predict(X[i : i + 1], y[i : i + 1], return_std=True) for i in range(60)]
    assert np.array_equal(mean, np.concatenate([m for m, _ in one]))
    assert np.array_equal(std, np.concatenate([s for _, s in one]))


def test_units_of_the_target_do_not_matter_and_layers_predict():
    X, y = make_friedman1(300, random_state=3)
    one, other = GLNRegressor(**SMALL).fit(X, y), GLNRegressor(**SMALL).fit(X, 1024 * y)
    np.testing.assert_allclose(1024 * one.predict(X), other.predict(X), rtol=1e-9)
    layers = one.layer_predictions(X[:7])
    assert [m.shape for m, _ in layers] == [(7, 6), (7, 4), (7, 1)]
    assert np.array_equal(layers[-1][0][:, 0], one.predict(X[:7]))


@pytest.mark.parametrize("where", ["features", "target"])
def test_one_wrong_reading_does_not_ruin_the_regression(where):
    X, y = make_friedman1(3000, random_state=3)
    clean = GLNRegressor(**SMALL).fit(X[:2000], y[:2000]).score(X[2000:], y[2000:])
    wrong = {"features": (X.copy(), y), "target": (X, y.copy())}[where]
    wrong[where == "target"][700] *= 1e6
    harmed = GLNRegressor(**SMALL).fit(wrong[0][:2000], wrong[1][:2000])
    assert harmed.score(X[2000:], y[2000:]) > clean - 0.05
    assert clean > 0.6


def test_weights_scale_the_step_and_zero_leaves_out():
    X, y = make_friedman1(200, random_state=4)
    weight = np.ones(200)
    weight[::4] = 0
    kept = weight > 0
    left_out = GLNRegressor(**SMALL).fit(X, y, sample_weight=weight).predict(X)
    assert np.array_equal(left_out, GLNRegressor(**SMALL).fit(X[kept], y[kept]).predict(X))
    half = GLNRegressor(learning_rate=0.02, **SMALL).fit(X, y, sample_weight=np.full(200, 0.5)).predict(X)
    np.testing.assert_allclose(half, GLNRegressor(learning_rate=0.01, **SMALL).fit(X, y).predict(X), rtol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_variance": 0}, "variance"),
        ({"min_variance": 2, "max_variance": 1}, "variance"),
        ({"step_limit": 0}, "step_limit"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"n_passes": 0}, "n_passes"),
        ({"gradient": "exact"}, "gradient"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, message):
    with pytest.raises(InvalidInput, match=message):
        GLNRegressor(**settings).fit(np.eye(4), np.arange(4.0))


def test_bad_arrays_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        GLNRegressor().fit([[np.nan], [1.0]], [0.0, 1.0])
    with pytest.raises(ValueError, match="features"):
        GLNRegressor().fit(np.eye(3), np.arange(3.0)).predict(np.eye(4))
    with pytest.raises(InvalidInput, match="weight"):
        GLNRegressor().fit(np.eye(3), np.arange(3.0), sample_weight=[0, 0, 0])
