"""Intervals of a mean: what they cover with few seeds, by simulation and against peers."""

import numpy as np
import pytest
from scipy import stats as sps
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from mlcollage.errors import InvalidInput
from mlcollage.stats.bootstrap import (
    bca_interval,
    bootstrap_t_interval,
    bootstrap_t_test,
    percentile_interval,
    resample_counts,
    t_interval,
)

REPEATS = 400


def coverage(interval, samples: np.ndarray, truth: float, **kw) -> float:
    ends = np.array([interval(row, **kw) for row in samples])
    return float(np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1])))


def test_t_interval_equals_statsmodels():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=9), rng.normal(1, 3, size=6)
    assert t_interval(x, 0.9) == pytest.approx(DescrStatsW(x).tconfint_mean(alpha=0.1))
    welch = CompareMeans(DescrStatsW(x), DescrStatsW(y)).tconfint_diff(usevar="unequal")
    assert t_interval(x, y=y) == pytest.approx(welch)


def test_counts_are_a_resample_of_units():
    x = np.random.default_rng(1).normal(size=12)
    means = resample_counts(12, 20_000, rng=2) @ x / 12
    assert means.mean() == pytest.approx(x.mean(), abs=4 * x.std() / np.sqrt(12 * 20_000))
    assert means.std() == pytest.approx(x.std() / np.sqrt(12), rel=0.03)


def test_bootstrap_t_equals_the_textbook_loop():
    """Same quantiles as resampling by index and studentising each resample, up to Monte Carlo error."""
    rng = np.random.default_rng(3)
    x = rng.exponential(size=15)
    picks = x[rng.integers(0, 15, (40_000, 15))]
    roots = (picks.mean(axis=1) - x.mean()) / (picks.std(axis=1, ddof=1) / np.sqrt(15))
    se = x.std(ddof=1) / np.sqrt(15)
    expected = x.mean() - np.quantile(roots, [0.975, 0.025]) * se
    assert bootstrap_t_interval(x, n_boot=40_000, rng=4) == pytest.approx(tuple(expected), abs=0.1 * se)


@pytest.mark.parametrize("n", [5, 10])
def test_percentile_bootstrap_is_too_narrow_and_t_is_not(n):
    """Nominal 95 % on normal data, 400 repeats (standard error 1.1 points): t and bootstrap-t hold, others do not."""
    samples = np.random.default_rng(n).normal(1.0, 2.0, (REPEATS, n))
    slack = 3 * np.sqrt(0.95 * 0.05 / REPEATS)
    assert abs(coverage(t_interval, samples, 1.0) - 0.95) <= slack
    assert abs(coverage(bootstrap_t_interval, samples, 1.0, n_boot=999) - 0.95) <= slack
    short = {5: 0.89, 10: 0.93}[n]
    assert coverage(percentile_interval, samples, 1.0, n_boot=999) <= short
    assert coverage(bca_interval, samples, 1.0, n_boot=999) <= short


def test_bootstrap_t_covers_skewed_data_better_than_the_rest():
    samples = np.random.default_rng(8).lognormal(size=(REPEATS, 10))
    truth = float(np.exp(0.5))
    studentised = coverage(bootstrap_t_interval, samples, truth, n_boot=999)
    assert studentised >= 0.86
    assert studentised > coverage(t_interval, samples, truth) + 0.02
    assert studentised > coverage(percentile_interval, samples, truth, n_boot=999) + 0.05


def test_two_arm_bootstrap_t_covers():
    rng = np.random.default_rng(9)
    hits = 0
    for _ in range(REPEATS):
        x, y = rng.normal(1, 3, 6), rng.normal(0, 1, 10)
        low, high = bootstrap_t_interval(x, n_boot=999, y=y)
        hits += low <= 1 <= high
    assert abs(hits / REPEATS - 0.95) <= 0.04


@pytest.mark.parametrize("null", [0.0, 0.3, 0.8])
def test_bootstrap_t_test_inverts_the_interval(null):
    x = np.random.default_rng(10).exponential(size=12)
    low, high = bootstrap_t_interval(x, 0.9)
    assert (bootstrap_t_test(x, null=null) <= 0.05) == (null < low)
    assert (bootstrap_t_test(x, null=null + 0.5, alternative="less") <= 0.05) == (null + 0.5 > high)


def test_null_rate_of_bootstrap_t():
    """At most 5 % of 600 null samples of eight are significant, within 3 binomial standard errors."""
    d = np.random.default_rng(11).normal(size=(600, 8))
    rate = np.mean([bootstrap_t_test(row, n_boot=999) <= 0.05 for row in d])
    assert 0.02 <= rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 600)


def test_resamples_without_variance_widen_the_interval():
    """Four equal values and another: a third of the resamples have no spread, and count as infinite roots."""
    low, high = bootstrap_t_interval([1.0, 1.0, 1.0, 1.0, 2.0])
    assert np.isfinite(low)
    assert high == np.inf


def test_same_seed_same_interval_and_the_global_generator_is_left_alone():
    x = np.random.default_rng(12).normal(size=9)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert bootstrap_t_interval(x, rng=1) == bootstrap_t_interval(x, rng=1) != bootstrap_t_interval(x, rng=2)
    assert bca_interval(x, rng=1) == bca_interval(x, rng=1)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_shifting_and_scaling_moves_the_intervals_along():
    x = np.random.default_rng(13).normal(size=9)
    for interval in (t_interval, bootstrap_t_interval, percentile_interval):
        low, high = interval(x)
        assert interval(1e6 + 3 * x) == pytest.approx((1e6 + 3 * low, 1e6 + 3 * high), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: t_interval([1.0]), "at least 2"),
        (lambda: t_interval([1.0, 2.0], level=95), "between 0 and 1"),
        (lambda: bootstrap_t_interval([1.0, 2.0, 3.0]), "at least 4"),
        (lambda: bootstrap_t_interval([2.0] * 6), "all values are equal"),
        (lambda: bca_interval([2.0] * 6), "all values are equal"),
        (lambda: resample_counts(0, 10, 0), "at least 1"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        call()


def test_bca_equals_scipy():
    x = np.random.default_rng(14).exponential(size=11)
    ends = sps.bootstrap((x,), np.mean, method="BCa", random_state=np.random.default_rng(5)).confidence_interval
    assert bca_interval(x, rng=5) == pytest.approx((ends.low, ends.high))
