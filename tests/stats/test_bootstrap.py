"""Intervals of a mean: what they cover with few seeds, by simulation and against peers."""

import time
import warnings

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats as sps
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from mlcollage.errors import InvalidInput
from mlcollage.stats.bootstrap import (
    bootstrap_ci,
    bootstrap_t_interval,
    bootstrap_t_test,
    resample_counts,
    t_interval,
    wild_bootstrap,
)

REPEATS = 400

pytestmark = pytest.mark.filterwarnings("ignore:.* units. a .* bootstrap interval:UserWarning")  # tested below


def percentile(x, **kw) -> tuple[float, float]:
    found = bootstrap_ci(x, method="percentile", **kw)
    return found.low, found.high


def bca(x, **kw) -> tuple[float, float]:
    found = bootstrap_ci(x, method="bca", **kw)
    return found.low, found.high


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
    """Same quantiles as resampling by index and studentizing each resample, up to Monte Carlo error."""
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
    assert coverage(percentile, samples, 1.0, n_boot=999) <= short
    assert coverage(bca, samples, 1.0, n_boot=999) <= short


def test_bootstrap_t_covers_skewed_data_better_than_the_rest():
    samples = np.random.default_rng(8).lognormal(size=(REPEATS, 10))
    truth = float(np.exp(0.5))
    studentized = coverage(bootstrap_t_interval, samples, truth, n_boot=999)
    assert studentized >= 0.86
    assert studentized > coverage(t_interval, samples, truth) + 0.02
    assert studentized > coverage(percentile, samples, truth, n_boot=999) + 0.05


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
    assert bca(x, rng=1) == bca(x, rng=1)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_shifting_and_scaling_moves_the_intervals_along():
    x = np.random.default_rng(13).normal(size=9)
    for interval in (t_interval, bootstrap_t_interval, percentile):
        low, high = interval(x)
        assert interval(1e6 + 3 * x) == pytest.approx((1e6 + 3 * low, 1e6 + 3 * high), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: t_interval([1.0]), "at least 2"),
        (lambda: t_interval([1.0, 2.0], level=95), "above 0 and below 1"),
        (lambda: bootstrap_t_interval([1.0, 2.0, 3.0]), "at least 4"),
        (lambda: bootstrap_t_interval([2.0] * 6), "all values are equal"),
        (lambda: bca([2.0] * 6), "all values are equal"),
        (lambda: resample_counts(0, 10, 0), "at least 1"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        call()


def test_bca_equals_scipy():
    x = np.random.default_rng(14).exponential(size=11)
    ends = sps.bootstrap((x,), np.mean, method="BCa", random_state=np.random.default_rng(5)).confidence_interval
    assert bca(x, rng=5) == pytest.approx((ends.low, ends.high))


def skewed(n: int, seed: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=n)


@pytest.mark.parametrize(("method", "peer"), [("percentile", "percentile"), ("basic", "basic"), ("bca", "BCa")])
@pytest.mark.parametrize("stat", [np.mean, np.median, np.std])
def test_the_front_agrees_with_scipy(method, peer, stat):
    """Same ends up to Monte Carlo error: 40,000 resamples each, tolerance a twentieth of the width."""
    x = skewed(31)
    kw = {"n_resamples": 40_000, "random_state": np.random.default_rng(1)}
    ends = sps.bootstrap((x,), stat, method=peer, **kw).confidence_interval
    ours = bootstrap_ci(x, stat, method, n_boot=40_000)
    assert (ours.low, ours.high) == pytest.approx((ends.low, ends.high), abs=0.05 * (ends.high - ends.low))
    assert ours.estimate == pytest.approx(stat(x))


def test_the_front_gives_bootstrap_t_of_a_mean():
    x = skewed(12)
    se = x.std(ddof=1) / np.sqrt(12)
    ours = bootstrap_ci(x, n_boot=40_000)
    assert (ours.low, ours.high) == pytest.approx(bootstrap_t_interval(x, n_boot=40_000), abs=0.1 * se)
    nested = bootstrap_ci(x, lambda v, axis: np.mean(v, axis=axis), n_boot=4000)  # the mean, in disguise
    assert (nested.low, nested.high) == pytest.approx((ours.low, ours.high), abs=0.5 * se)


def test_bayesian_bootstrap_of_a_mean_has_rubins_moments():
    """Var of sum w_i x_i under Dirichlet(1) is population variance / (n + 1)."""
    x = skewed(14)
    ours = bootstrap_ci(x, method="bayes", n_boot=60_000)
    assert ours.se == pytest.approx(x.std() / np.sqrt(15), rel=0.02)
    other = bootstrap_ci(x, lambda v, weights=None: np.average(v, weights=weights), "bayes", n_boot=4000)
    assert (other.low, other.high) == pytest.approx((ours.low, ours.high), abs=0.1 * ours.se * 2)


def test_a_statistic_is_called_once_for_many_resamples_or_once_each_to_the_same_end():
    x = skewed(9)
    vectorized = bootstrap_ci(x, np.median, "percentile", n_boot=500, rng=3)
    looped = bootstrap_ci(x, lambda v: float(np.median(v)), "percentile", n_boot=500, rng=3)
    assert vectorized == looped


def clustered(rng, n_clusters=12, per=6, between=1.0, within=1.0):
    effects = between * rng.normal(size=n_clusters)
    x = (effects[:, None] + within * rng.normal(size=(n_clusters, per))).ravel()
    return x, np.repeat(np.arange(n_clusters), per), np.tile(np.arange(per), n_clusters)


@pytest.mark.parametrize("method", ["percentile", "basic", "bca"])
def test_a_mean_is_resampled_the_same_way_whichever_way_is_quick(method):
    """Without counts where each value is a unit, in any order of labels; by counts where a function is given."""
    x = np.random.default_rng(0).normal(size=23)
    for labels in ({}, {"unit": np.arange(23)[::-1]}, {"strata": np.arange(23) % 3}):
        quick = bootstrap_ci(x, "mean", method, n_boot=500, **labels)
        slow = bootstrap_ci(x, lambda v, axis=-1: np.mean(v, axis=axis), method, n_boot=500, **labels)
        assert (quick.low, quick.high) == pytest.approx((slow.low, slow.high), abs=1e-12)


def test_errors_of_cluster_and_hierarchical_means_are_the_textbooks():
    """Davison and Hinkley, sec. 3.8: balanced clusters resampled whole; then the values within them as well."""
    x, cluster, seed = clustered(np.random.default_rng(4))
    table = x.reshape(12, 6)
    whole = table.mean(axis=1).var() / 12
    anew = whole + table.var(axis=1).mean() / (12 * 6)
    assert bootstrap_ci(x, method="percentile", unit=cluster, n_boot=40_000).se == pytest.approx(whole**0.5, rel=0.02)
    both = bootstrap_ci(x, method="percentile", unit=(cluster, seed), n_boot=40_000)
    assert both.se == pytest.approx(anew**0.5, rel=0.02)
    assert both.units == 12


def test_a_stratum_keeps_its_size_and_its_mean_is_not_resampled():
    """Two tasks far apart, seeds within them: the error is that within tasks."""
    rng = np.random.default_rng(5)
    x = np.concatenate([rng.normal(0, 1, 8), rng.normal(100, 2, 8)])
    task = np.repeat(["easy", "hard"], 8)
    expected = np.sqrt((x[:8].var() + x[8:].var()) / 8) / 2
    for method in ("percentile", "bayes"):
        assert bootstrap_ci(x, method=method, strata=task, n_boot=20_000).se == pytest.approx(expected, rel=0.07)
    t = bootstrap_ci(x, strata=task)
    assert t.high - t.low < 8 * expected


def test_only_resampling_the_clusters_covers():
    """300 repeats of 12 data sets with 6 seeds: nominal 95 % for clusters, far less if seeds pass for units."""
    hits = {"clusters": 0, "seeds": 0}
    rng = np.random.default_rng(6)
    for _ in range(300):
        x, cluster, _ = clustered(rng)
        for name, unit in (("clusters", cluster), ("seeds", None)):
            ci = bootstrap_ci(x, unit=unit, n_boot=399)
            hits[name] += ci.low <= 0 <= ci.high
    assert hits["clusters"] / 300 == pytest.approx(0.95, abs=0.04)
    assert hits["seeds"] / 300 < 0.75


def test_bca_is_finite_where_the_textbooks_is_0_over_0():
    """scipy gives NaN for both: no skewness in a jackknife without spread, and a maximum no resample exceeds."""
    flat = bootstrap_ci([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0], np.median, "bca")
    assert (flat.low, flat.high) == (1.0, 1.0)
    x = skewed(20)
    top = bootstrap_ci(x, np.max, "bca")
    assert np.isfinite([top.low, top.high]).all()
    assert top.low <= top.high == x.max()


def test_ten_thousand_resamples_of_a_hundred_tasks_take_a_tenth_of_a_second():
    """About 0.03 s on one core; the bound leaves room for a busy machine."""
    x = skewed(100)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        bootstrap_ci(x, method="percentile", n_boot=10_000)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1


@pytest.mark.parametrize("method", ["bootstrap-t", "percentile", "bayes"])
def test_many_values_are_resampled_in_blocks(method):
    """100,000 values, 300 resamples: all counts at once would take 240 MB; the error is that of the mean."""
    x = skewed(100_000)
    ci = bootstrap_ci(x, method=method, n_boot=300)
    assert ci.high - ci.low == pytest.approx(3.92 * x.std() / np.sqrt(len(x)), rel=0.2)


def test_wild_bootstrap_uses_the_errors_of_statsmodels():
    rng = np.random.default_rng(7)
    cluster = np.repeat(np.arange(14), 5)
    x = rng.normal(size=70)
    design = np.column_stack([np.ones(70), x, rng.normal(size=70)])
    y = 1 + 0.5 * x + rng.normal(size=14)[cluster] + x**2 * rng.normal(size=70)
    robust = sm.OLS(y, design).fit(cov_type="cluster", cov_kwds={"groups": cluster})
    ours = wild_bootstrap(design, y, 1, cluster=cluster)
    assert (ours.estimate, ours.se) == pytest.approx((robust.params[1], robust.bse[1]))
    assert wild_bootstrap(design, y, 1).se == pytest.approx(sm.OLS(y, design).fit(cov_type="HC1").bse[1])


def test_wild_interval_holds_exactly_the_nulls_not_rejected():
    rng = np.random.default_rng(8)
    x = rng.normal(size=30)
    design, y = np.column_stack([np.ones(30), x]), x * (1 + rng.normal(size=30))
    fit = wild_bootstrap(design, y, 1)
    for end, out in ((fit.low, -1), (fit.high, 1)):
        assert wild_bootstrap(design, y, 1, null=end + out * 1e-3).p_value <= 0.05
        assert wild_bootstrap(design, y, 1, null=end - out * 1e-3).p_value > 0.05


def test_wild_cluster_bootstrap_keeps_the_level_with_ten_clusters():
    """A regressor constant in clusters, 300 null studies: 5 % within 3 binomial errors; ordinary errors do not."""
    rng = np.random.default_rng(9)
    cluster = np.repeat(np.arange(10), 8)
    wild = ordinary = 0
    for _ in range(300):
        x = rng.normal(size=10)[cluster]
        y = rng.normal(size=10)[cluster] + rng.normal(size=80)
        design = np.column_stack([np.ones(80), x])
        wild += wild_bootstrap(design, y, 1, cluster=cluster, n_boot=199).p_value <= 0.05
        ordinary += sm.OLS(y, design).fit().pvalues[1] <= 0.05
    assert wild / 300 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)
    assert ordinary / 300 > 0.2


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: bootstrap_ci(skewed(9), method="magic"), "must be one of"),
        (lambda: bootstrap_ci(skewed(9), stat="mode"), "neither 'mean' nor"),
        (lambda: bootstrap_ci(np.ones(9)), "all values are equal"),
        (lambda: bootstrap_ci([1.0, np.nan, 2.0, 3.0]), "not finite"),
        (lambda: bootstrap_ci(np.ones((5, 4))), "the seed is the unit"),
        (lambda: bootstrap_ci([1.0, 2.0, 3.0]), "at least 4"),
        (lambda: bootstrap_ci(skewed(9), n_boot=0), "at least 1"),
        (lambda: bootstrap_ci(skewed(9), unit=[1, 2]), "one label for each"),
        (lambda: bootstrap_ci(skewed(9), unit=(range(9),)), "pair"),
        (lambda: bootstrap_ci(skewed(9), unit=np.zeros(9), method="bca"), "1 unit"),
        (lambda: bootstrap_ci(skewed(9), strata=range(9)), "a stratum has 1"),
        (lambda: bootstrap_ci(skewed(8), unit=[1, 1, 2, 2, 3, 3, 4, 4], strata=[0, 1] * 4), "two strata"),
        (lambda: bootstrap_ci(skewed(9), unit=([0, 1, 2] * 3, range(9)), method="bayes"), "outer labels only"),
        (lambda: bootstrap_ci(skewed(9), np.median, "bayes"), "'weights'"),
        (lambda: bootstrap_ci(skewed(9), lambda v: v, "basic"), "one number"),
        (lambda: bootstrap_ci(skewed(9), lambda v: np.log(np.unique(v).size - 9), "basic"), "not finite"),
        (lambda: wild_bootstrap(np.ones((9, 2)), skewed(9), 0), "full rank"),
        (lambda: wild_bootstrap(np.ones((9, 1)), skewed(9), 1), "column must be a whole number"),
        (lambda: wild_bootstrap(np.ones((8, 1)), skewed(9), 0), "shape"),
        (lambda: wild_bootstrap(np.ones((9, 1)), skewed(9), 0, cluster=[0, 1, 2] * 3), "at least 5"),
        (lambda: wild_bootstrap(np.ones((9, 1)), np.ones(9), 0), "perfect"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*units. a:UserWarning", "ignore:.*encountered in log:RuntimeWarning")
def test_what_cannot_be_resampled_gets_a_sentence(call, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        call()


@pytest.mark.parametrize(("n", "covers"), [(4, "80 %"), (5, "85 %"), (9, "85 %")])
def test_few_units_are_said(n, covers):
    x = np.random.default_rng(0).normal(size=n)
    with pytest.warns(UserWarning, match=f"{n} units: a percentile bootstrap interval covers about {covers}"):
        bootstrap_ci(x, method="percentile", n_boot=99)


def test_ten_units_and_bootstrap_t_are_not():
    x = np.random.default_rng(0).normal(size=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bootstrap_ci(x, method="percentile", n_boot=99)
        bootstrap_ci(x[:5], n_boot=99)
