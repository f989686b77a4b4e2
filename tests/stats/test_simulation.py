"""Calibration of ranks against exact coverage, right and wrong posteriors told apart, predictive checks."""

import numpy as np
import pytest
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.stats.simulation import ecdf_band, posterior_predictive_check, sbc_ranks, sbc_uniformity


def exact_coverage(n: int, z: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """P(the counts below z stay in [low, high] at all points), by recursion over the points (Saeilynoja, sec. 2.1)."""
    p, before = np.zeros(n + 1), 0.0
    p[0] = 1.0
    counts = np.arange(n + 1)
    for zi, lo, hi in zip(z, low, high, strict=True):
        step = (zi - before) / (1 - before)
        move = sps.binom.pmf(counts[:, None] - counts[None, :], n - counts[None, :], step)
        p = move @ p
        p[(counts < lo - 1e-9) | (counts > hi + 1e-9)] = 0.0
        before = zi
    return float(p.sum())


@pytest.mark.parametrize(("n", "n_ranks", "level"), [(50, 20, 0.95), (120, 100, 0.95), (60, 1000, 0.8)])
def test_the_band_covers_simultaneously_what_it_says(n, n_ranks, level):
    """Exact coverage, within what 4,000 simulated samples and whole counts leave open."""
    band = ecdf_band(n, n_ranks, level)
    coverage = exact_coverage(n, band.z, band.lower * n, band.upper * n)
    assert level - 0.015 <= coverage <= level + 0.035


def test_points_are_boundaries_of_ranks():
    band = ecdf_band(100, 64)
    np.testing.assert_allclose(band.z * 64, np.arange(1, 64))
    wide = ecdf_band(100, 1001)
    assert len(wide.z) == 99
    np.testing.assert_allclose(wide.z * 1001, np.round(wide.z * 1001))


@pytest.mark.parametrize("n_ranks", [10, 37, 100, 1000])
def test_uniform_ranks_are_rejected_as_often_as_alpha(n_ranks):
    """400 quantities of 150 simulations: both tests at 5 %, within 3.5 binomial errors; whole counts may lower it."""
    ranks = np.random.default_rng(n_ranks).integers(0, n_ranks, (150, 400))
    result = sbc_uniformity(ranks, n_ranks)
    slack = 3.5 * np.sqrt(0.05 * 0.95 / 400)
    for p in (result.p_values, result.ecdf_p_values):
        assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=slack)
    assert np.mean(~result.inside) <= 0.05 + slack
    agree = (result.ecdf_p_values <= 0.05) == ~result.inside
    assert agree.mean() > 0.98


def normal_model(n_sims: int, n_draws: int, bug: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Ranks of mu and of the log likelihood for y ~ N(mu, 1), mu ~ N(0, 1), 5 observations each."""
    mu = rng.normal(size=n_sims)
    y = mu[:, None] + rng.normal(size=(n_sims, 5))
    mean = y.sum(axis=1) / 6
    sd = 6**-0.5 * (0.8 if bug == "too narrow" else 1.0)
    draws = mean[:, None] + sd * rng.normal(size=(n_sims, n_draws))
    if bug == "data ignored":
        draws = rng.normal(size=(n_sims, n_draws))

    def log_lik(m):
        return -0.5 * ((y[:, None, :] - m[..., None]) ** 2).sum(axis=-1)

    return {
        "mu": sbc_ranks(mu, draws, rng)[:, 0],
        "log likelihood": sbc_ranks(log_lik(mu[:, None])[:, 0], log_lik(draws), rng)[:, 0],
    }


def test_a_right_posterior_passes_and_wrong_ones_fail():
    rng = np.random.default_rng(1)
    assert sbc_uniformity(normal_model(500, 99, "none", rng), 100).passed()
    assert not sbc_uniformity(normal_model(500, 99, "too narrow", rng), 100).passed()


def test_a_posterior_that_ignores_the_data_is_seen_by_the_likelihood_only():
    """Modrak et al. 2023: draws from the prior have uniform ranks for every parameter."""
    result = sbc_uniformity(normal_model(500, 99, "data ignored", np.random.default_rng(2)), 100)
    assert result.names == ("mu", "log likelihood")
    assert result.inside.tolist() == [True, False]
    assert not result.passed()


def test_a_bias_lifts_the_difference():
    rng = np.random.default_rng(3)
    truth = rng.normal(size=400)
    result = sbc_uniformity(sbc_ranks(truth, 0.7 + rng.normal(size=(400, 49))), 50)
    assert result.difference.max() > 0.1
    assert result.difference.min() > -0.03
    assert not result.inside[0]


def test_ties_are_broken_evenly():
    ranks = sbc_ranks(np.zeros(5000), np.zeros((5000, 9)), rng=4)
    assert sbc_uniformity(ranks, 10).passed()
    np.testing.assert_array_equal(sbc_ranks([1.0], [[0.0, 2.0, 3.0]]), [[1]])


def test_same_seed_same_band():
    np.testing.assert_array_equal(ecdf_band(90, 30, rng=5).lower, ecdf_band(90, 30, rng=5).lower)


def test_predictive_checks_find_the_statistic_the_model_cannot_make():
    """Four data sets with the same mean and variance; a normal model is right about one of them."""
    rng = np.random.default_rng(6)
    n = 120
    shapes = {
        "normal": rng.normal(size=n),
        "skewed": rng.exponential(size=n) - 1,
        "heavy": rng.standard_t(2, size=n),
        "drifting": np.linspace(-1.7, 1.7, n) + 0.3 * rng.normal(size=n),
    }
    stats = {
        "mean": np.mean,
        "sd": np.std,
        "skewness": sps.skew,
        "kurtosis": sps.kurtosis,
        "lag 1": lambda v: np.corrcoef(v[:-1], v[1:])[0, 1],
    }
    found = {}
    for name, raw in shapes.items():
        y = (raw - raw.mean()) / raw.std()
        sigma = np.sqrt((n - 1) / rng.chisquare(n - 1, 800))  # posterior under the reference prior
        mu = sigma * rng.normal(size=800) / np.sqrt(n)
        check = posterior_predictive_check(mu[:, None] + sigma[:, None] * rng.normal(size=(800, n)), y, stats)
        assert 0.3 < check.p_values["mean"] < 0.7
        found[name] = check.flagged(0.01)
    assert found["normal"] == []
    assert "skewness" in found["skewed"]
    assert "kurtosis" in found["heavy"]
    assert "lag 1" in found["drifting"]


def test_pit_of_held_out_data_is_uniform_exactly_if_the_prediction_is_right():
    rng = np.random.default_rng(7)
    y = rng.normal(size=300)
    right = posterior_predictive_check(rng.normal(size=(400, 300)), y, [np.mean])
    narrow = posterior_predictive_check(0.7 * rng.normal(size=(400, 300)), y, [np.mean])
    assert right.pit_uniformity().passed()
    assert not narrow.pit_uniformity().passed()
    assert list(right.p_values) == ["mean"]


def test_pit_of_counts_is_uniform_too():
    rng = np.random.default_rng(8)
    check = posterior_predictive_check(rng.poisson(2, (400, 500)), rng.poisson(2, 500), {"mean": np.mean})
    assert check.pit_uniformity().passed()


def test_p_values_count_ties_half():
    check = posterior_predictive_check(np.zeros((10, 4)), np.zeros(4), {"max": np.max})
    assert check.p_values["max"] == 0.5


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: sbc_uniformity(np.full(50, 100), 100), r"0\.\.99"),
        (lambda: sbc_uniformity(np.full(50, 0.5), 100), "whole numbers"),
        (lambda: sbc_uniformity(np.full(50, np.nan), 100), "not finite"),
        (
            lambda: sbc_uniformity(np.zeros(5, int), 100),
            r"ranks has shape \(5, 1\); \(simulations, quantities\) with at least \(20, 1\) was expected\.",
        ),
        (lambda: sbc_uniformity(np.zeros((50, 2, 2), int), 100), "was expected"),
        (lambda: sbc_uniformity({"a": np.zeros(50), "b": np.zeros(49)}, 100), "each name"),
        (lambda: sbc_ranks(np.zeros(3), np.zeros((4, 9))), "were expected"),
        (lambda: sbc_ranks([np.nan], np.zeros((1, 9))), "failed fit"),
        (lambda: ecdf_band(10, 1), "n_ranks must be a whole number of at least 2"),
        (lambda: ecdf_band(10, 10, level=95), "level must be a finite number above 0 and below 1"),
        (lambda: posterior_predictive_check(np.zeros((5, 3)), np.zeros(4), [np.mean]), "were expected"),
        (lambda: posterior_predictive_check(np.full((5, 4), np.inf), np.zeros(4), [np.mean]), "not finite"),
        (lambda: posterior_predictive_check(np.zeros((5, 4)), np.zeros(4), []), "one or more"),
        (lambda: posterior_predictive_check(np.zeros((5, 4)), np.zeros(4), {"all": lambda v: v}), "one finite number"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        call()
