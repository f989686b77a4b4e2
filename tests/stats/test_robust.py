"""Robust summaries against statsmodels, scipy, brute force, and simulations in which they must win, or lose."""

from enum import StrEnum

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.stats.robust import (
    hodges_lehmann,
    huber,
    iqm,
    mad,
    median_of_means,
    multiverse,
    optimality_gap,
    prob_improvement,
    theil_sen,
    trimmed_mean,
    tukey_biweight,
)

samples = st.lists(st.integers(-200, 200).map(lambda v: v / 8), min_size=3, max_size=25)
LOCATIONS = [iqm, trimmed_mean, huber, tukey_biweight, median_of_means, hodges_lehmann]


def heavy(seed=0, n=40):
    return np.random.default_rng(seed).standard_t(2, n) * 3 + 10


@pytest.mark.parametrize(
    ("ours", "norm"), [(huber, sm.robust.norms.HuberT(1.345)), (tukey_biweight, sm.robust.norms.TukeyBiweight(4.685))]
)
@pytest.mark.parametrize("seed", range(3))
def test_m_estimates_equal_statsmodels(ours, norm, seed):
    x = heavy(seed)
    model = sm.RLM(x, np.ones(len(x)), M=norm)
    # statsmodels takes the first scale about 0: of the values about their median, that is ours
    fit = model.fit(
        start_params=[np.median(x)],
        start_scale=sps.median_abs_deviation(x, scale="normal"),
        update_scale=False,
        tol=1e-12,
        maxiter=500,
    )
    assert ours(x) == pytest.approx(fit.params[0], abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(x=samples)
def test_huber_solves_its_equation(x):
    x, s = np.array(x), mad(x)
    if s == 0:
        assert huber(x) == np.median(x)
    else:
        assert np.clip((x - huber(x)) / s, -1.345, 1.345).sum() == pytest.approx(0, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(x=samples.filter(lambda v: len(v) >= 5), shift=st.integers(-50, 50), scale=st.sampled_from([0.25, 1.0, 8.0]))
def test_locations_move_with_the_data(x, shift, scale):
    x = np.array(x)
    for location in LOCATIONS:
        assert location(scale * x + shift) == pytest.approx(scale * location(x) + shift, abs=1e-6)
        assert x.min() - 1e-9 <= location(x) <= x.max() + 1e-9
    assert mad(scale * x + shift) == pytest.approx(scale * mad(x))


@pytest.mark.parametrize("location", LOCATIONS)
def test_one_crashed_seed_does_no_harm(location):
    x = np.random.default_rng(1).normal(size=20)
    broken = np.append(x[:-1], 1e6)
    assert abs(location(broken) - location(x)) < 1
    assert location(np.full(7, 3.0)) == 3.0


def test_extreme_tunings_are_the_mean_and_the_median():
    x = heavy(3, 21)
    assert huber(x, c=1e6) == pytest.approx(x.mean())
    assert huber(x, c=1e-6) == pytest.approx(np.median(x), abs=1e-4)
    assert tukey_biweight(x, c=1e6) == pytest.approx(x.mean())
    assert trimmed_mean(x, 0) == pytest.approx(x.mean())
    assert median_of_means(x, 1) == pytest.approx(x.mean())
    assert median_of_means(x, 21) == np.median(x)


def test_iqm_pools_seeds_and_tasks():
    scores = np.random.default_rng(4).normal(size=(8, 5))
    middle = np.sort(scores.ravel())[10:30]
    assert iqm(scores) == pytest.approx(middle.mean())
    assert iqm(scores) == pytest.approx(sps.trim_mean(scores, 0.25, axis=None))


def test_median_of_means_depends_on_the_seed_only():
    x = heavy(5)
    assert median_of_means(x, 7, rng=3) == median_of_means(x, 7, rng=np.random.default_rng(3))
    assert len({median_of_means(x, 7, rng=s) for s in range(5)}) > 1


@settings(max_examples=40, deadline=None)
@given(x=samples, y=samples)
def test_hodges_lehmann_is_the_median_of_all_pairs(x, y):
    walsh = [(x[i] + x[j]) / 2 for i in range(len(x)) for j in range(i, len(x))]
    assert hodges_lehmann(x) == pytest.approx(np.median(walsh))
    assert hodges_lehmann(x, y) == pytest.approx(np.median([u - v for u in x for v in y]))


def test_theil_sen_is_the_median_slope():
    rng = np.random.default_rng(6)
    x = np.arange(15.0)
    y = 2 * x + 1 + rng.normal(size=15)
    y[3] = 500
    slopes = [(y[j] - y[i]) / (x[j] - x[i]) for i in range(15) for j in range(i + 1, 15)]
    line = theil_sen(x, y)
    assert line.slope == pytest.approx(np.median(slopes))
    assert line.slope_interval[0] < line.slope < line.slope_interval[1]
    assert line.slope == pytest.approx(2, abs=0.2)
    assert line.intercept == pytest.approx(np.median(y) - line.slope * np.median(x))


def test_optimality_gap_counts_shortfall_only():
    assert optimality_gap([[0.5, 2.0], [1.0, 0.0]], target=1.0) == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert optimality_gap([3.0, 4.0]) == 0.0


@settings(max_examples=60, deadline=None)
@given(x=samples, y=samples)
def test_improvement_is_the_share_of_won_pairs(x, y):
    result = prob_improvement(x, y)
    won = np.mean([(u > v) + 0.5 * (u == v) for u in x for v in y])
    assert result.probability == pytest.approx(won)
    assert result.probability == pytest.approx(sps.mannwhitneyu(x, y).statistic / (len(x) * len(y)))
    assert 0 <= result.interval[0] <= result.probability <= result.interval[1] <= 1
    assert result.interval[1] > result.interval[0]  # never a point, also when one arm always wins
    back = prob_improvement(y, x)
    assert back.probability == pytest.approx(1 - result.probability)
    assert back.interval == pytest.approx((1 - result.interval[1], 1 - result.interval[0]), abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_improvement_interval_covers(shift):
    rng = np.random.default_rng(7)
    truth = sps.norm.cdf(shift / np.sqrt(2))
    inside = 0
    for _ in range(400):
        low, high = prob_improvement(rng.normal(shift, 1, 10), rng.normal(0, 1, 10)).interval
        inside += low <= truth <= high
    assert 0.92 <= inside / 400 <= 0.99


def test_improvement_averages_over_tasks():
    rng = np.random.default_rng(8)
    x, y = rng.normal(0.3, 1, (10, 4)), rng.normal(0, 1, (12, 4))
    each = [prob_improvement(x[:, t], y[:, t]).probability for t in range(4)]
    both = prob_improvement(x, y)
    assert both.probability == pytest.approx(np.mean(each))
    assert np.ptp(both.interval) < np.ptp(prob_improvement(x[:, 0], y[:, 0]).interval)


def errors(draw, repeats=2000):
    rng = np.random.default_rng(9)
    x = np.array([draw(rng) for _ in range(repeats)])
    found = np.array([x.mean(axis=1), np.median(x, axis=1), sps.trim_mean(x, 0.25, axis=1)])
    return np.sqrt((found**2).mean(axis=1))


def test_the_dossiers_errors_under_contamination():
    """RMSE of mean, median, IQM at n = 20."""
    mean, median, middle = errors(lambda rng: rng.standard_t(2, 20))
    assert mean > 1.8 * median
    assert median == pytest.approx(0.313, abs=0.04)
    assert middle == pytest.approx(0.299, abs=0.04)
    bad = errors(lambda rng: np.where(rng.random(20) < 0.1, rng.normal(0, 10, 20), rng.normal(size=20)))
    assert bad == pytest.approx([0.751, 0.300, 0.273], abs=0.05)


def test_on_clean_data_the_mean_is_best():
    mean, median, middle = errors(lambda rng: rng.normal(size=20))
    assert mean < middle < median
    assert (mean / median) ** 2 == pytest.approx(0.67, abs=0.06)  # 2/pi in the limit


def test_mad_estimates_the_sd():
    assert mad(np.random.default_rng(10).normal(0, 3, 20000)) == pytest.approx(3, rel=0.03)


class Status(StrEnum):
    YES = "supported"
    NO = "inconclusive"


def test_multiverse_runs_every_combination():
    seen = []

    def verdict(trim, log):
        seen.append((trim, log))
        if trim == 0.2 and log:
            raise InvalidInput("a value is negative")
        return {"verdict": Status.YES if trim else Status.NO, "estimate": trim * 2}

    result = multiverse(verdict, {"trim": [0.0, 0.1, 0.2], "log": [False, True]})
    assert len(seen) == len(result.table) == 6
    assert result.shares == pytest.approx({"supported": 3 / 6, "inconclusive": 2 / 6, "not testable": 1 / 6})
    assert result.agreement == 0.5
    assert result.influence == pytest.approx({"trim": 1.0, "log": 2 / 3 - 1 / 3})
    assert result.table.loc[result.table["verdict"] == "not testable", "reason"].item() == "a value is negative"
    assert set(result.table.columns) == {"trim", "log", "verdict", "estimate", "reason"}


def test_options_without_names_are_told_apart():
    result = multiverse(lambda f: f(2) > 3, {"f": [lambda v: v, lambda v: v * v]})
    assert result.table["f"].tolist() == ["<lambda> 1", "<lambda> 2"]
    assert result.influence == {"f": 1.0}


def test_multiverse_does_not_hide_bugs():
    with pytest.raises(ZeroDivisionError):
        multiverse(lambda a: 1 / a, {"a": [0]})


def test_nothing_matters_when_all_agree():
    result = multiverse(lambda a, f: True, {"a": [1, 2], "f": [np.mean, np.median]})
    assert result.agreement == 1.0
    assert result.influence == {"a": 0.0, "f": 0.0}
    assert result.table["f"].tolist() == ["mean", "median"] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iqm([1.0, np.nan]), "what a failed run counts as"),
        (lambda: huber([]), "empty"),
        (lambda: huber([1.0, 2.0], c=0), "c must be a finite number above 0"),
        (lambda: tukey_biweight([-10.0, -9.0, 9.0, 10.0], c=0.5), "c must be a finite number of at least 1"),
        (lambda: trimmed_mean([1.0], 0.5), r"cut must be a finite number of at least 0 and below 0\.5"),
        (lambda: median_of_means([1.0, 2.0], 3), "blocks must be a whole number of at least 1 and at most 2"),
        (lambda: hodges_lehmann([[1.0, 2.0]]), "one value per seed"),
        (lambda: theil_sen([1, 1, 1], [1, 2, 3]), "all x are equal"),
        (lambda: theil_sen([1, 2, 3], [1, 2]), r"x has 3 values and y 2; they belong together one by one\."),
        (lambda: prob_improvement([1.0], [1.0, 2.0]), "at least 2"),
        (lambda: prob_improvement([[1.0, 2.0]] * 3, [1.0, 2.0]), "same tasks"),
        (
            lambda: prob_improvement([1.0, 2.0], [1.0, 2.0], level=0),
            "level must be a finite number above 0 and below 1",
        ),
        (lambda: optimality_gap([1.0], target=np.inf), "target must be a finite number"),
        (lambda: multiverse(lambda: 1, {}), "at least one choice"),
        (lambda: multiverse(lambda reason: 1, {"reason": [1]}), "may not be called 'reason'"),
        (lambda: multiverse(lambda a: {"p": 0.1}, {"a": [1]}), "must return a verdict"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()


@pytest.mark.parametrize(("of_run", "of_task"), [(1.0, 0.05), (0.7, 0.7), (0.0, 1.0)])
def test_improvement_over_tasks_resamples_runs(of_run, of_task):
    """Five runs of each arm, each scored on thirty tasks: what a run is worth shows on all of them, or on none."""
    rng = np.random.default_rng(0)
    shift = 1.0
    truth = sps.norm.cdf(shift / np.sqrt(2 * (of_run**2 + of_task**2)))
    covered, widths = [], []
    for _ in range(120):
        x, y = (of_run * rng.normal(size=(5, 1)) + of_task * rng.normal(size=(5, 30)) for _ in "xy")
        low, high = prob_improvement(x + shift, y).interval
        covered.append(low <= truth <= high)
        widths.append(high - low)
    assert np.mean(covered) >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 120)
    if of_run == 0:  # tasks that tell of runs anew make it narrower
        assert np.mean(widths) < 0.25


def test_improvement_on_all_tasks_is_not_a_point():
    x, y = np.ones((5, 30)), np.zeros((5, 30))
    assert prob_improvement(x, y).interval == pytest.approx(prob_improvement(x[:, 0], y[:, 0]).interval)
