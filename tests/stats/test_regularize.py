"""Effective size, double descent, the horseshoe, leave-one-out: closed forms, quadrature, brute force, peers."""

import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from scipy import stats as sps
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import check_estimator

from mlcollage.errors import InvalidInput
from mlcollage.stats.horseshoe import HorseshoePrior, horseshoe_scale
from mlcollage.stats.regularize import (
    RandomReLURegressor,
    _Spectral,
    double_descent,
    effective_degrees_of_freedom,
    noisy_line,
    penalty_for,
    psis_loo,
)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), p=st.integers(1, 12), log_penalty=st.floats(-3, 4))
def test_degrees_of_freedom_are_the_trace_of_the_hat_matrix(seed, n, p, log_penalty):
    x, penalty = np.random.default_rng(seed).normal(size=(n, p)), 10.0**log_penalty
    hat = x @ np.linalg.solve(x.T @ x + penalty * np.eye(p), x.T)
    df = effective_degrees_of_freedom(x, penalty)
    assert df == pytest.approx(np.trace(hat))
    assert effective_degrees_of_freedom(x, penalty_for(x, df)) == pytest.approx(df)


def test_degrees_of_freedom_are_the_covariance_of_fit_and_data():
    """Efron's definition, sum Cov(fit_i, y_i) / sigma^2, by simulation with scikit-learn's ridge."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 6))
    y = rng.normal(size=(20000, 20))
    fit = Ridge(alpha=5.0, fit_intercept=False).fit(x, y.T).predict(x).T
    assert (fit * y).mean(axis=0).sum() == pytest.approx(effective_degrees_of_freedom(x, 5.0), rel=0.03)


def test_without_a_penalty_it_is_the_rank():
    x = np.random.default_rng(1).normal(size=(9, 3))
    doubled = np.column_stack([x, x])
    assert effective_degrees_of_freedom(doubled, 0.0) == pytest.approx(3)
    assert penalty_for(doubled, 3) == 0.0


def test_regressor_is_a_scikit_learn_estimator():
    results = check_estimator(RandomReLURegressor(features=40, penalty=0.1), on_skip=None)
    assert {r["status"] for r in results} <= {"passed", "skipped"}  # skipped: what needs optional array libraries
    assert sum(r["status"] == "passed" for r in results) > 40


@pytest.mark.parametrize("features", [20, 200])
def test_regressor_is_a_ridge_on_its_features(features):
    x, y, x_test, _ = noisy_line(60, 5, rng=2, n_test=30)
    model = RandomReLURegressor(features, penalty=0.3, bias=0.5, random_state=1).fit(x, y)

    def phi(z):
        return np.maximum(z @ model.weights_ + model.offsets_, 0) * np.sqrt(2 / features)

    peer = Ridge(alpha=0.3, fit_intercept=False).fit(phi(x), y - y.mean())
    np.testing.assert_allclose(model.predict(x_test), y.mean() + peer.predict(phi(x_test)), atol=1e-8)
    assert model.effective_df_ == pytest.approx(effective_degrees_of_freedom(phi(x), 0.3))


def test_without_a_penalty_it_interpolates_with_the_least_norm():
    x, y, _, _ = noisy_line(30, 5, rng=3)
    model = RandomReLURegressor(100).fit(x, y)
    np.testing.assert_allclose(model.predict(x), y, atol=1e-8)
    features = np.maximum(x @ model.weights_, 0) * np.sqrt(2 / 100)
    np.testing.assert_allclose(model.coef_, np.linalg.lstsq(features, y - y.mean())[0], atol=1e-8)


def test_leave_one_out_equals_refitting():
    rng = np.random.default_rng(4)
    design, y = rng.normal(size=(15, 25)), rng.normal(size=15)
    y -= y.mean()
    errors = []
    for i in range(15):
        rest = np.delete(np.arange(15), i)
        fit = Ridge(alpha=0.7, fit_intercept=False).fit(design[rest], y[rest])
        errors.append((y[i] - fit.predict(design[[i]])[0]) ** 2)
    assert _Spectral.of(design, y).leave_one_out(0.7) == pytest.approx(np.mean(errors))


def test_double_descent_and_its_cure():
    """The dossier's bench: n 100, d 30, noise 0.5; medians 0.65/181/0.30/0.18/0.13, ridge 0.48/0.28/0.15/0.14/0.12."""
    sizes = [30, 100, 300, 1000, 3000]
    curves = [double_descent(*noisy_line(rng=seed, n_test=400), features=sizes, random_state=seed) for seed in range(9)]
    plain = np.median([c["min_norm"] for c in curves], axis=0)
    ridge = np.median([c["ridge"] for c in curves], axis=0)
    assert plain[1] > 5 * plain.min()  # the peak at as many features as units
    assert plain[-1] < plain[0]  # the second descent goes below the classical minimum
    assert plain[[0, 2, 3, 4]] == pytest.approx([0.65, 0.30, 0.18, 0.13], rel=0.6)
    assert (np.diff(ridge) < 0.03).all()  # no peak
    assert ridge == pytest.approx([0.48, 0.28, 0.15, 0.14, 0.12], rel=0.6)
    for c in curves:
        assert (c["ridge_df"] < np.minimum(sizes, 100)).all()


def test_double_descent_is_the_regressors_error():
    x, y, x_test, truth = noisy_line(40, 6, rng=5)
    row = double_descent(x, y, x_test, truth, features=[70], random_state=3).iloc[0]
    for column, penalty in (("min_norm", 0.0), ("ridge", row["penalty"])):
        model = RandomReLURegressor(70, penalty=penalty, random_state=3).fit(x, y)
        assert row[column] == pytest.approx(np.mean((model.predict(x_test) - truth) ** 2))
    again = double_descent(x, y, x_test, truth, features=[70], random_state=3).iloc[0]
    assert again.equals(row)


def test_features_are_not_the_callers_own_numbers():
    """Data and features of one seed are unrelated: no feature points along the coefficients of the data."""
    x, y, _, _ = noisy_line(2000, 30, noise=0.0, rng=0)
    beta = np.linalg.lstsq(x, y)[0]
    weights = RandomReLURegressor(50, random_state=0).fit(x, y).weights_
    assert np.abs(beta @ weights / np.linalg.norm(weights, axis=0)).max() < 0.7
    narrow = RandomReLURegressor(20, random_state=0).fit(x, y).weights_
    np.testing.assert_array_equal(narrow, weights[:, :20])


def test_horseshoe_density_is_the_change_of_variables():
    prior, rng = HorseshoePrior(3, scale=0.2), np.random.default_rng(6)
    theta = rng.normal(size=(5, 7))
    z, lam, tau = theta[:, :3], np.exp(theta[:, 3:6]), np.exp(theta[:, 6])
    expected = sps.norm.logpdf(z).sum(1) + (sps.halfcauchy.logpdf(lam) + np.log(lam)).sum(1)
    expected += sps.halfcauchy.logpdf(tau, scale=0.2) + np.log(tau)
    np.testing.assert_allclose(prior.log_prob(torch.from_numpy(theta)).numpy(), expected)


def test_horseshoe_coefficients_have_the_priors_law():
    """Given tau, the shrinkage weight 1 / (1 + lambda^2) is Beta(1/2, 1/2), the horseshoe that names the prior."""
    prior = HorseshoePrior(4, scale=0.5)
    theta = prior.sample(3000, generator=torch.Generator().manual_seed(0))
    kappa = 1 / (1 + (2 * theta[:, 4:8]).exp())
    assert sps.kstest(kappa.numpy().ravel(), sps.beta(0.5, 0.5).cdf).pvalue > 0.01
    assert sps.kstest(theta[:, -1].exp().numpy(), sps.halfcauchy(scale=0.5).cdf).pvalue > 0.01
    expected = theta[:, :4] * (theta[:, 4:8] + theta[:, -1:]).exp()
    torch.testing.assert_close(prior.coefficients(theta), expected)


def test_a_slab_bounds_large_coefficients_and_spares_small_ones():
    free, bound = HorseshoePrior(2), HorseshoePrior(2, slab=3.0)
    huge = torch.tensor([1.0, -1.0, 400.0, 400.0, 400.0], dtype=torch.float64)
    torch.testing.assert_close(bound.coefficients(huge), torch.tensor([3.0, -3.0], dtype=torch.float64))
    small = torch.tensor([1.0, -1.0, -5.0, -5.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(bound.coefficients(small), free.coefficients(small), rtol=1e-6, atol=0)
    # c lambda tau / sqrt(c^2 + tau^2 lambda^2) in between
    middle = torch.tensor([1.0, 1.0, 0.5, 1.5, 0.7], dtype=torch.float64)
    product = (middle[2:4] + middle[4]).exp()
    torch.testing.assert_close(bound.coefficients(middle), 3 * product / (9 + product**2).sqrt())


def test_horseshoe_is_smooth_and_finite_far_out():
    prior = HorseshoePrior(2, slab=2.0)
    theta = torch.tensor(np.random.default_rng(7).normal(size=(3, 5)), requires_grad=True)
    assert torch.autograd.gradcheck(prior.log_prob, theta)
    assert torch.autograd.gradcheck(prior.coefficients, theta)
    far = torch.full((5,), 300.0, dtype=torch.float64, requires_grad=True)
    prior.log_prob(far).backward()
    assert torch.isfinite(far.grad).all()


def test_horseshoe_spares_signals_and_shrinks_noise():
    """Posterior mean of one coefficient with y ~ N(beta, 1), tau = 1, by quadrature over log lambda."""

    def shrunk(y):
        def weight(u):
            return sps.norm.pdf(y, scale=np.sqrt(1 + np.exp(2 * u))) * 2 / np.pi / (np.exp(u) + np.exp(-u))

        mass = integrate.quad(weight, -12, 12, limit=200)[0]
        kept = integrate.quad(lambda u: weight(u) * np.exp(2 * u) / (1 + np.exp(2 * u)), -12, 12, limit=200)[0]
        return kept / mass

    # the same by importance sampling from the prior, with the class's own coefficients
    prior = HorseshoePrior(1)
    theta = prior.sample(200_000, generator=torch.Generator().manual_seed(1))
    theta[:, -1] = 0.0
    beta = prior.coefficients(theta)[:, 0].numpy()
    for y in (0.5, 4.0):
        w = sps.norm.pdf(y - beta)
        assert (w @ beta) / w.sum() == pytest.approx(shrunk(y) * y, rel=0.03)
    assert shrunk(0.5) < 0.4
    assert shrunk(6.0) > 0.9


def test_horseshoe_scale_is_the_papers():
    assert horseshoe_scale(5, 100, sigma=2.0, n=400) == pytest.approx(5 / 95 * 2 / 20)


def conjugate(seed, n=30, draws=4000, prior_sd=3.0):
    """Normal data of known sd 1 and a normal prior on the mean: exact posterior draws, exact leave-one-out."""
    rng = np.random.default_rng(seed)
    y = rng.normal(1.0, 1.0, n)

    def posterior(values):
        variance = 1 / (len(values) + prior_sd**-2)
        return variance * values.sum(), variance

    mean, variance = posterior(y)
    mu = rng.normal(mean, np.sqrt(variance), (4, draws // 4, 1))
    exact = []
    for i in range(n):
        m, v = posterior(np.delete(y, i))
        exact.append(sps.norm.logpdf(y[i], m, np.sqrt(1 + v)))
    return y, sps.norm.logpdf(y, mu, 1.0), np.array(exact)


def test_loo_equals_exact_leave_one_out():
    _, log_likelihood, exact = conjugate(0)
    loo = psis_loo(log_likelihood)
    assert loo.elpd == pytest.approx(exact.sum(), abs=0.05)
    np.testing.assert_allclose(loo.pointwise, exact, atol=0.03)
    assert loo.se == pytest.approx(np.sqrt(30) * exact.std(), rel=0.05)
    assert loo.p == pytest.approx(1, abs=0.4)  # one parameter
    assert loo.unreliable == []


def test_loo_speaks_the_interface_of_arviz_1(monkeypatch):
    """From 1.0, from_dict takes one mapping of groups, and the result's fields are elpd, se, p, elpd_i and pareto_k."""
    fake, log_likelihood = types.ModuleType("arviz"), np.random.default_rng(0).normal(size=(4, 50, 3))
    fake.__version__, calls = "1.0.0", []
    fake.from_dict = lambda data: data

    def loo(data, pointwise=None, var_name=None, reff=None):
        calls.append((sorted(data), sorted(data["log_likelihood"]), pointwise, reff))
        pointwise_elpd = -np.log(np.exp(-data["log_likelihood"]["y"]).mean(axis=(0, 1)))
        names = {"elpd": pointwise_elpd.sum(), "se": 0.5, "p": 1.5}
        return types.SimpleNamespace(**names, elpd_i=pointwise_elpd, pareto_k=np.array([0.1, 0.8, 0.2]))

    fake.loo = loo
    monkeypatch.setitem(sys.modules, "arviz", fake)
    found = psis_loo(log_likelihood, relative_efficiency=0.9)
    assert calls == [(["log_likelihood", "posterior"], ["y"], True, 0.9)]
    assert found.elpd == pytest.approx(-np.log(np.exp(-log_likelihood).mean(axis=(0, 1))).sum())
    assert (found.se, found.p, found.unreliable) == (0.5, 1.5, [1])
    assert found.pointwise.shape == (3,)


def test_models_are_compared_unit_by_unit():
    y, log_likelihood, exact = conjugate(1)
    fixed = sps.norm.logpdf(y, np.zeros((4, 1000, 1)), 1.0)  # a model without the parameter
    fixed += np.random.default_rng(0).normal(0, 1e-9, fixed.shape)  # ArviZ smooths no tail of equal values
    difference, se = psis_loo(log_likelihood).difference(psis_loo(fixed))
    d = exact - sps.norm.logpdf(y, 0, 1)
    assert difference == pytest.approx(d.sum(), abs=0.1)
    assert se == pytest.approx(np.sqrt(30) * d.std(ddof=1), rel=0.05)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_an_overwhelming_unit_is_named():
    rng = np.random.default_rng(2)
    y = np.append(rng.normal(size=10), 12.0)
    scale = 0.4  # the likelihood's sd is far too small for the outlier
    mean, variance = y.mean(), scale**2 / len(y)
    mu = rng.normal(mean, 2.5 * np.sqrt(variance), (4, 500, 1))
    assert 10 in psis_loo(sps.norm.logpdf(y, mu, scale)).unreliable


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_degrees_of_freedom([1.0, 2.0], 1.0), "\\(units, columns\\)"),
        (lambda: effective_degrees_of_freedom([[1.0, np.nan]], 1.0), "not finite"),
        (lambda: effective_degrees_of_freedom([[1.0]], -1.0), "penalty must be a finite number of at least 0"),
        (lambda: penalty_for(np.eye(3), 4), "degrees_of_freedom must be a finite number above 0 and at most 3"),
        (lambda: penalty_for(np.eye(3), 0), "degrees_of_freedom must be a finite number above 0 and at most 3"),
        (lambda: RandomReLURegressor(0).fit(*noisy_line()[:2]), "features must be a whole number of at least 1"),
        (
            lambda: RandomReLURegressor(5, penalty=-1).fit(*noisy_line()[:2]),
            "penalty must be a finite number of at least 0",
        ),
        (lambda: noisy_line(0), "n must be a whole number of at least 1"),
        (lambda: double_descent(np.eye(3), [1, 2], np.eye(3), [1, 2, 3]), "do not match"),
        (lambda: double_descent(*noisy_line(), features=[]), "features must be positive"),
        (lambda: double_descent(*noisy_line(), penalties=[0.0]), "penalties positive"),
        (lambda: HorseshoePrior(0), "dim must be a whole number of at least 1"),
        (lambda: HorseshoePrior(2, scale=0), "scale must be a finite number above 0"),
        (lambda: HorseshoePrior(2, slab=-1), "slab must be a finite number above 0"),
        (lambda: HorseshoePrior(2).log_prob(torch.zeros(4, 2)), "last axis must be 2 dim \\+ 1 = 5"),
        (lambda: horseshoe_scale(10, 10, n=5), "relevant must be a finite number above 0 and below 10"),
        (lambda: horseshoe_scale(1, 10, n=0), "n must be a whole number of at least 1"),
        (lambda: psis_loo(np.zeros((4, 500))), "Do not sum over units"),
        (lambda: psis_loo(np.zeros((1, 50, 3))), "100 draws"),
        (
            lambda: psis_loo(np.full((1, 200, 3), -math.inf)),
            "600 values that are not finite",
        ),
        (
            lambda: psis_loo(np.zeros((1, 200, 3)), relative_efficiency=0),
            "relative_efficiency must be a finite number above 0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()


def test_models_of_other_data_are_not_compared():
    one, two = (psis_loo(conjugate(0, n)[1]) for n in (20, 21))
    with pytest.raises(InvalidInput, match="compare on the same data"):
        one.difference(two)
