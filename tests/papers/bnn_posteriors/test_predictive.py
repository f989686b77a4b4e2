"""What a regression predicts, against Bayesian linear regression in closed form, in the shape that targets have."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn.init import build
from mlcollage.papers.bnn_posteriors import (
    HMC,
    MAP,
    BayesianNetwork,
    CustomLikelihood,
    Ensemble,
    GaussianLikelihood,
    GaussianPrior,
    HMCRegressor,
    Posterior,
)

NOISE, VARIANCE, N = 0.5, 0.7, 25
G = torch.Generator().manual_seed(0)
X = torch.randn(N, 2, dtype=torch.float64, generator=G)
Y = X @ torch.tensor([1.0, -0.5]).double() + 0.2 + NOISE * torch.randn(N, dtype=torch.float64, generator=G)
NEW = torch.randn(6, 2, dtype=torch.float64, generator=G)
D = torch.distributions


def ones(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)


def exact(x, y):
    """Mean and covariance of weights and bias."""
    a = ones(x)
    covariance = torch.linalg.inv(a.T @ a / NOISE**2 + torch.eye(3, dtype=torch.float64) / VARIANCE)
    return covariance @ (a.T @ y) / NOISE**2, covariance


def predictive(x, y, at):
    """The normal distribution of new targets."""
    mean, covariance = exact(x, y)
    a = ones(at)
    return D.Normal(a @ mean, (((a @ covariance) * a).sum(1) + NOISE**2).sqrt())


def network(outputs=1, likelihood=None):
    module = build(lambda: nn.Linear(2, outputs).double(), 0)
    return BayesianNetwork(module, likelihood or GaussianLikelihood(NOISE), GaussianPrior(VARIANCE))


def sampled(draws=5000):
    """Independent draws of the posterior itself."""
    mean, covariance = exact(X, Y)
    params = D.MultivariateNormal(mean, covariance)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        params = params.sample((4, draws))
    model = network()
    return Posterior(model.layout, "exact", params, network=model, target_shape=(), data=(X, Y))


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
@pytest.mark.parametrize("store", ["params", "predictions"])
def test_predictions_have_the_shape_of_the_targets(shape, store):
    y = Y.reshape(N, *shape) if shape != (2,) else torch.stack([Y, -Y], dim=1)
    method = HMC(chains=2, draws=4, burn_in=1, warmup=10, store=store, at=NEW)
    fitted = network(2 if shape == (2,) else 1).fit(X, y, method)
    assert fitted.predict(NEW).shape == (6, *shape)
    assert [part.shape for part in fitted.predict_moments(NEW)] == [(6, *shape)] * 2
    assert fitted.function_ess(NEW).shape == (6, *shape)
    if store == "params":
        assert fitted.predict_draws(NEW).shape == fitted.sample_targets(NEW).shape == (2, 4, 6, *shape)
        assert fitted.predict_quantiles(NEW, 0.5).shape == (6, *shape)
        assert fitted.predict_quantiles(NEW, [0.1, 0.9]).shape == (2, 6, *shape)
        assert fitted.log_likelihood(X, y).shape == (2, 4, N)
        assert fitted.thinned(2).predict(NEW).shape == (6, *shape)


def test_an_error_of_predictions_is_not_one_of_all_pairs():
    fitted = network().fit(X, Y, MAP(steps=300, lr=0.05))
    mean = exact(X, Y)[0]
    truth = (Y - ones(X) @ mean).square().mean()
    torch.testing.assert_close((Y - fitted.predict(X)).square().mean(), truth, rtol=1e-3, atol=0)


def test_shapes_survive_a_file_and_hold_for_classes_too(tmp_path):
    fitted = network().fit(X, Y, Ensemble(members=2, steps=5))
    again = Posterior.load(fitted.save(tmp_path / "p"), network())
    assert torch.equal(again.predict(NEW), fitted.predict(NEW))
    assert again.predict(NEW).shape == (6,)
    column = (Y > 0).double()[:, None]
    assert network(1, "bernoulli").fit(X, column, MAP(steps=5)).predict(NEW).shape == (6, 1)
    assert network(1, "bernoulli").fit(X, column[:, 0], MAP(steps=5)).predict(NEW).shape == (6,)


def test_mean_spread_quantiles_and_draws_are_those_in_closed_form():
    posterior, truth = sampled(), predictive(X, Y, NEW)
    mean, variance = posterior.predict_moments(NEW)
    torch.testing.assert_close(mean, truth.mean, rtol=0, atol=0.01)
    torch.testing.assert_close(variance, truth.variance, rtol=0.01, atol=0)
    q = torch.tensor([0.025, 0.5, 0.9], dtype=torch.float64)
    quantiles = posterior.predict_quantiles(NEW, q.tolist(), batch_size=4)
    torch.testing.assert_close(quantiles, truth.icdf(q[:, None]), rtol=0, atol=0.02)
    low, high = posterior.predict_interval(NEW, 0.95)
    torch.testing.assert_close(low, quantiles[0])
    assert bool((high > quantiles[2]).all())
    drawn = posterior.sample_targets(NEW, generator=3).flatten(0, 1)  # (draws, 6)
    torch.testing.assert_close(drawn.mean(0), truth.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.std(0), truth.stddev, rtol=0.02, atol=0)
    assert torch.equal(posterior.sample_targets(NEW, generator=3), posterior.sample_targets(NEW, generator=3))
    y = truth.mean + truth.stddev
    torch.testing.assert_close(posterior.log_predictive(NEW, y), truth.log_prob(y), rtol=0, atol=0.01)


def test_quantiles_solve_the_mixture_to_the_last_digits():
    posterior = sampled(3)
    q = [1e-6, 0.3, 0.999]
    means = posterior.predict_draws(NEW).flatten(0, 1)  # (12, 6)
    mixture = D.MixtureSameFamily(D.Categorical(torch.ones(6, 12).double()), D.Normal(means.T, NOISE))
    found = mixture.cdf(posterior.predict_quantiles(NEW, q))
    torch.testing.assert_close(found, torch.tensor(q).double()[:, None].expand(3, 6), rtol=1e-7, atol=1e-12)
    for bad in (0.0, 1.0, [0.5, 1.5]):
        with pytest.raises(InvalidInput, match="q must be"):
            posterior.predict_quantiles(NEW, bad)


def test_log_likelihoods_are_those_of_torch_in_float64():
    posterior = sampled(3)
    means = torch.einsum("nk,cdk->cdn", ones(X), posterior.params)
    each = posterior.log_likelihood(X, Y, batch_size=7)
    torch.testing.assert_close(each, D.Normal(means, NOISE).log_prob(Y))
    mixture = each.flatten(0, 1).exp().mean(0).log()
    torch.testing.assert_close(posterior.log_predictive(X, Y), mixture)
    with pytest.raises(InvalidInput, match="X has 25 data and y 6"):
        posterior.log_likelihood(X, Y[:6])


def test_leave_one_out_by_arviz_is_that_in_closed_form():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz as az
    data = sampled(2000).to_arviz()
    found = az.loo(data, pointwise=True)
    others = [torch.arange(N) != i for i in range(N)]
    truth = [float(predictive(X[o], Y[o], X[~o]).log_prob(Y[~o])) for o in others]
    np.testing.assert_allclose(found.loo_i if "loo_i" in found else found.elpd_i, truth, atol=0.02)
    assert data.observed_data["y"].shape == (N,)
    fitted = network().fit(X, Y, HMC(chains=2, draws=30, burn_in=2, warmup=10))
    assert math.isfinite(az.loo(fitted.to_arviz())["elpd_loo"])


def test_arviz_gets_log_likelihoods_only_where_they_are_known(tmp_path):
    method = HMC(chains=2, draws=3, burn_in=1, warmup=10)
    again = Posterior.load(network().fit(X, Y, method).save(tmp_path / "p"), network())
    assert "log_likelihood" not in again.to_arviz().groups()
    assert again.to_arviz(X, Y).log_likelihood["y"].shape == (2, 3, N)
    cold = network().fit(X, Y, HMC(chains=2, draws=3, burn_in=1, warmup=10, temperature=0.1))
    with pytest.warns(UserWarning, match="another temperature than 1"):
        assert "log_likelihood" not in cold.to_arviz().groups()


def test_targets_of_classes_and_likelihoods_that_draw_none():
    y = (Y > 0).long()
    for outputs, likelihood in ((2, "categorical"), (1, "bernoulli")):
        model = network(outputs, likelihood)
        posterior = model.fit(X, y, Ensemble(members=3, steps=20))
        many = Posterior(model.layout, "many", posterior.params.repeat(1, 3000, 1), network=model, target_shape=())
        share = many.sample_targets(NEW).double().mean(dim=(0, 1))
        torch.testing.assert_close(share, posterior.predict_proba(NEW)[:, 1], rtol=0, atol=0.02)
        with pytest.raises(InvalidInput, match="no mean and variance"):
            posterior.predict_quantiles(NEW, 0.5)
    own = CustomLikelihood(lambda out, t: -(out[:, 0] - t).abs())
    with pytest.raises(InvalidInput, match="draws no targets; give it a function sample"):
        network(1, own).fit(X, Y, MAP(steps=2)).sample_targets(NEW)


def test_the_regressor_of_scikit_learn_follows_its_targets():
    shape = {"hidden_layer_sizes": (), "noise": 5.0, "method": HMC(chains=2, draws=20, warmup=20, jitter=0.2)}
    x, y = X.numpy(), 100 + 10 * Y.numpy()
    model = HMCRegressor(prior=1.0, random_state=0, **shape).fit(x, y)
    low, middle, high = model.predict_quantiles(x, [0.05, 0.5, 0.95])
    mean, sd = model.predict(x, return_std=True)
    np.testing.assert_allclose(middle, mean, atol=0.5)
    np.testing.assert_allclose((high - low) / sd, 2 * 1.645, rtol=0.05)
    with pytest.warns(UserWarning, match="column-vector"):
        column = HMCRegressor(prior=1.0, random_state=0, **shape).fit(x, y[:, None])
    np.testing.assert_array_equal(column.predict(x), mean[:, None])
    assert column.predict_quantiles(x, [0.1, 0.9]).shape == (2, N, 1)
