"""Partial pooling: quadrature against brute force and calibration, sampler against both, and what pooling gains."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps
from scipy.special import logsumexp

from mlcollage.errors import InvalidInput
from mlcollage.stats.multilevel import PartialPooling

SCHOOLS_Y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
SCHOOLS_S = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])


def schools(**kw) -> PartialPooling:
    return PartialPooling(5, 5, tau_prior="half-cauchy", **kw).fit(SCHOOLS_Y, SCHOOLS_S)


def brute_force(y, s, a, log_prior, tau_max, effect_density=None, n=400):
    """Means of mu and tau and P(mu > 0) from a plain grid over (mu, tau), effects integrated one by one."""
    mu = np.linspace(-6 * a, 6 * a, n)[:, None]
    tau = ((np.arange(n) + 0.5) / n * tau_max)[None, :]
    log_p = sps.norm.logpdf(mu, 0, a) + log_prior(tau)
    for yj, sj in zip(y, s, strict=True):
        if effect_density is None:
            log_p = log_p + sps.norm.logpdf(yj, mu, np.sqrt(sj**2 + tau**2))
        else:
            z, w = np.polynomial.hermite_e.hermegauss(61)  # over the noise: theta = y - s z
            log_p = log_p + np.log(sum(wi * effect_density(yj - sj * zi, mu, tau) for zi, wi in zip(z, w, strict=True)))
    p = np.exp(log_p - logsumexp(log_p))
    return float((p * mu).sum()), float((p * tau).sum()), float(p[mu[:, 0] > 0].sum())


@pytest.mark.parametrize(
    ("prior", "log_prior", "tau_max"),
    [
        ("half-normal", lambda t: -0.5 * (t / 5) ** 2, 40),
        ("half-cauchy", lambda t: -np.log1p((t / 5) ** 2), 200),
    ],
)
def test_eight_schools_equal_a_plain_grid(prior, log_prior, tau_max):
    exact = PartialPooling(5, 5, tau_prior=prior).fit(SCHOOLS_Y, SCHOOLS_S).exact()
    mu, tau, positive = brute_force(SCHOOLS_Y, SCHOOLS_S, 5, log_prior, tau_max, n=700)
    assert float(exact.mu.mean) == pytest.approx(mu, rel=1e-3)
    assert float(exact.tau.mean) == pytest.approx(tau, rel=1e-3)
    assert exact.prob_positive() == pytest.approx(positive, abs=2e-3)


def test_the_exact_posterior_is_calibrated():
    """Truth from the prior: its posterior cdf is uniform, for mu, tau, an effect and the next effect."""
    rng = np.random.default_rng(0)
    s = np.array([0.5, 1.0, 2.0, 1.0])
    levels = []
    for _ in range(300):
        mu, tau = rng.normal(0, 2), abs(rng.normal(0, 1.5))
        theta, new = rng.normal(mu, tau, 4), rng.normal(mu, tau)
        post = PartialPooling(2, 1.5).fit(rng.normal(theta, s), s).exact()
        levels.append([post.mu.cdf(mu), post.tau.cdf(tau), post.theta.cdf(theta)[1], post.new.cdf(new)])
    for column in np.array(levels, dtype=float).T:
        assert sps.kstest(column, "uniform").pvalue > 0.002


def test_a_tight_and_a_loose_prior_pool_completely_and_not_at_all():
    y, s = SCHOOLS_Y / 10, SCHOOLS_S / 10
    together = PartialPooling(50, 0.03).fit(y, s).exact()
    weights = s**-2 / (s**-2).sum()
    np.testing.assert_allclose(together.theta.mean, weights @ y, atol=0.01)
    spread = np.array([-900.0, -300, 200, 800])
    apart = PartialPooling(1e4, 1e4).fit(spread, np.ones(4)).exact()
    np.testing.assert_allclose(apart.theta.mean, spread, atol=0.01)
    np.testing.assert_allclose(apart.theta.sd, 1, atol=1e-3)


@settings(max_examples=12, deadline=None)
@given(
    y=st.lists(st.floats(-50, 50), min_size=2, max_size=12),
    log_s=st.floats(-2, 2),
    prior=st.sampled_from(["half-normal", "half-cauchy"]),
    scale=st.floats(0.5, 20),
)
@pytest.mark.filterwarnings("ignore:.*same units:UserWarning")
def test_marginals_are_consistent(y, log_s, prior, scale):
    s = np.exp(log_s) * np.linspace(1, 2, len(y))
    post = PartialPooling(scale, scale, tau_prior=prior).fit(y, s).exact()
    for p in (0.025, 0.5, 0.9):
        for marginal in (post.mu, post.tau, post.theta, post.new):
            np.testing.assert_allclose(marginal.cdf(marginal.quantile(p)), p, atol=1e-6)
    tau2 = post.tau.sd**2 + post.tau.mean**2
    assert float(post.new.sd) ** 2 == pytest.approx(float(post.mu.sd**2 + tau2), rel=1e-6)  # law of total variance
    assert 0 <= post.rope(0.1) <= post.rope(10) <= 1


def test_scaling_the_units_scales_the_posterior():
    a = schools().exact()
    b = PartialPooling(500, 500, tau_prior="half-cauchy").fit(100 * SCHOOLS_Y, 100 * SCHOOLS_S).exact()
    np.testing.assert_allclose(b.theta.mean, 100 * a.theta.mean, rtol=1e-8)
    assert float(b.tau.quantile(0.9)) == pytest.approx(100 * float(a.tau.quantile(0.9)), rel=1e-6)


def standard_error(draws: np.ndarray) -> np.ndarray:
    """Of the mean over (chains, draws, ...), from batches of 50 draws."""
    batches = draws.reshape(draws.shape[0], -1, 50, *draws.shape[2:]).mean(axis=2)
    return batches.reshape(-1, *draws.shape[2:]).std(axis=0) / np.sqrt(batches.shape[0] * batches.shape[1])


def test_the_sampler_agrees_with_the_quadrature():
    model = schools(draws=2000, warmup=50, rng=1)
    exact, sampled = model.exact(), model.sample()
    for name in ("mu", "tau", "theta"):
        error = standard_error(sampled.draws[name])
        assert (np.abs(getattr(sampled, name).mean - getattr(exact, name).mean) < 4 * error).all(), name
        np.testing.assert_allclose(getattr(sampled, name).sd, getattr(exact, name).sd, rtol=0.06)
    assert sampled.prob_positive() == pytest.approx(exact.prob_positive(), abs=0.02)
    assert sampled.draws["theta"].shape == (4, 2000, 8)


def test_student_effects_agree_with_a_plain_grid():
    """One outlier among five: its effect is shrunk less than under normal effects."""
    y, s = np.array([0.0, 1.0, -1.0, 0.5, 9.0]), np.full(5, 1.0)
    model = PartialPooling(3, 2, dist="t", draws=2000, rng=2).fit(y, s)
    post = model.posterior()
    density = lambda x, mu, tau: sps.t.pdf(x, 4, mu, tau)  # noqa: E731
    mu, tau, positive = brute_force(y, s, 3, lambda t: -0.5 * (t / 2) ** 2, 16, density, n=200)
    assert abs(float(post.mu.mean) - mu) < 4 * standard_error(post.draws["mu"]) + 0.01
    assert abs(float(post.tau.mean) - tau) < 4 * standard_error(post.draws["tau"]) + 0.01
    assert post.prob_positive() == pytest.approx(positive, abs=0.02)
    assert post.theta.mean[4] > PartialPooling(3, 2).fit(y, s).exact().theta.mean[4]


def seeds_table(values: list[list[float]]) -> pd.DataFrame:
    return pd.DataFrame([(f"d{j}", k, v) for j, vs in enumerate(values) for k, v in enumerate(vs)],
                        columns=["dataset", "seed", "value"])  # fmt: skip


def test_pooled_noise_agrees_with_importance_sampling():
    """Three data sets: 200,000 draws from the prior of everything but mu and theta, which are integrated."""
    values = [[0.1, 0.9, 0.3], [1.0, 1.2], [2.5, 0.5, 1.0, 1.6]]
    post = PartialPooling(2, 1, noise="pooled", draws=1500, rng=3).fit(seeds_table(values)).posterior()

    n = np.array([len(v) for v in values])
    y = np.array([np.mean(v) for v in values])
    squares = np.array([np.sum((np.array(v) - np.mean(v)) ** 2) for v in values])
    rng = np.random.default_rng(5)
    size = (200_000, 1)
    m, omega, tau = rng.uniform(-4, 3, size), abs(rng.normal(0, 0.5, size)), abs(rng.normal(0, 1, size))
    u = m + omega * rng.normal(size=(size[0], 3))
    total = np.exp(2 * u) / n + tau**2
    precision = (1 / total).sum(axis=1) + 2.0**-2
    mu = (y / total).sum(axis=1) / precision
    quad = (y**2 / total).sum(axis=1) - precision * mu**2
    log_w = (-(n - 1) * u - 0.5 * squares * np.exp(-2 * u) - 0.5 * np.log(total)).sum(axis=1)
    log_w += -0.5 * np.log(precision) - 0.5 * quad
    w = np.exp(log_w - logsumexp(log_w))
    assert 1 / (w**2).sum() > 5000
    noise = np.log(post.draws["noise"])
    np.testing.assert_allclose(noise.mean(axis=(0, 1)), w @ u, atol=0.03)
    np.testing.assert_allclose(noise.std(axis=(0, 1)), np.sqrt(w @ u**2 - (w @ u) ** 2), atol=0.03)
    assert float(post.mu.mean) == pytest.approx(float(w @ mu), abs=0.04)
    assert float(post.tau.mean) == pytest.approx(float(w @ tau[:, 0]), abs=0.03)


def test_many_seeds_make_the_noise_known():
    rng = np.random.default_rng(4)
    table = seeds_table([list(m + rng.normal(size=200)) for m in (0.0, 0.1, 0.3, 0.2)])
    pooled = PartialPooling(1, 0.5, noise="pooled", draws=500).fit(table)
    known = PartialPooling(1, 0.5).fit(pooled.shrunken()["estimate"], pooled.shrunken()["se"])
    np.testing.assert_allclose(pooled.shrunken()["shrunken"], known.shrunken()["shrunken"], atol=0.01)
    assert list(pooled.shrunken().index) == ["d0", "d1", "d2", "d3"]


def test_a_data_set_with_one_seed_borrows_its_noise():
    shrunken = PartialPooling(1, 1, noise="pooled", draws=200).fit(seeds_table([[0.1, 0.2, 0.3], [0.9]])).shrunken()
    assert np.isnan(shrunken["se"].iloc[1])
    assert np.isfinite(shrunken[["shrunken", "sd", "low", "high"]].to_numpy()).all()


@pytest.mark.parametrize("j", [8, 20])
@pytest.mark.parametrize("tau", [0.0, 1.0, 4.0])
def test_partial_pooling_against_none_and_complete(j, tau):
    """Squared error of effects over 200 tables: below both where effects vary as noise does, near the better else."""
    rng = np.random.default_rng(int(10 * tau) + j)
    loss = {"partial": 0.0, "none": 0.0, "complete": 0.0}
    for _ in range(200):
        s = rng.uniform(0.5, 1.5, j)
        theta = rng.normal(1, tau, j)
        y = rng.normal(theta, s)
        guesses = {"partial": PartialPooling(2, 2).fit(y, s).exact().theta.mean, "none": y}
        guesses["complete"] = np.full(j, (y / s**2).sum() / (1 / s**2).sum())
        for name, guess in guesses.items():
            loss[name] += float(((guess - theta) ** 2).mean())
    if tau == 0:
        assert loss["partial"] < 0.5 * loss["none"]  # complete pooling is the truth here and wins
    if tau == 1:
        assert loss["partial"] < 0.8 * loss["none"]
        assert loss["partial"] < 0.8 * loss["complete"]
    if tau == 4:
        assert loss["partial"] < 1.02 * loss["none"]
        assert loss["partial"] < 0.3 * loss["complete"]


def test_same_seed_same_draws():
    a, b, c = (schools(draws=20, rng=r).sample().draws["mu"] for r in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_percent_and_fraction_are_noticed():
    with pytest.warns(UserWarning, match="same units"):
        PartialPooling(1000, 1000).fit([0.01, 0.02, 0.015], [0.01, 0.01, 0.01])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: PartialPooling(0, 1), "must be a finite number above 0"),
        (lambda: PartialPooling(1, np.inf), "must be a finite number above 0"),
        (lambda: PartialPooling(1, 1, tau_prior="flat"), "tau_prior must be one of 'half-normal', 'half-cauchy'"),
        (lambda: PartialPooling(1, 1, dist="t", df=1), "df must be a finite number above 2"),
        (lambda: PartialPooling(1, 1, draws=0), "at least 1"),
        (lambda: PartialPooling(1, 1).exact(), "call fit first"),
        (lambda: PartialPooling(1, 1).fit([1.0, 2.0]), "standard_errors"),
        (lambda: PartialPooling(1, 1).fit([1.0, 2.0], [1.0]), "at least 2"),
        (
            lambda: PartialPooling(1, 1).fit([1.0, 2.0, 3.0], [1.0, 1.0]),
            "y has 3 values and s 2",
        ),
        (lambda: PartialPooling(1, 1).fit([1.0, 2.0], [1.0, 0.0]), "must be positive"),
        (lambda: PartialPooling(1, 1).fit([1.0, np.nan], [1.0, 1.0]), "not finite"),
        (lambda: PartialPooling(1, 1).fit([1.0, 2.0], [1.0, 1.0], names="a"), "names"),
        (lambda: PartialPooling(1, 1, dist="t").fit([1.0, 2.0], [1.0, 1.0]).exact(), "which samples"),
        (lambda: schools().shrunken(level=95), "must be a finite number above 0 and below 1"),
        (lambda: schools().exact().rope(-1), "must be a finite number above 0"),
        (lambda: schools().exact().mu.quantile(50), "must be a finite number above 0 and below 1"),
        (lambda: PartialPooling(1, 1, noise="pooled").fit([1.0], [1.0]), "fit\\(table\\)"),
        (lambda: PartialPooling(1, 1, noise="pooled").fit(pd.DataFrame({"value": [1.0]})), "lacks dataset"),
        (lambda: PartialPooling(1, 1, noise="pooled").fit(seeds_table([[1.0, 2.0]])), "one data set"),
        (lambda: PartialPooling(1, 1, noise="pooled").fit(seeds_table([[1.0], [2.0]])), "one seed"),
        (lambda: PartialPooling(1, 1, noise="pooled").fit(seeds_table([[1.0, 1.0], [2.0, 2.0]])), "no noise"),
        (
            lambda: PartialPooling(1, 1, noise="pooled").fit(seeds_table([[1.0, 1.5], [2.0, 2.1]]).assign(seed=0)),
            "twice",
        ),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        call()
