"""Paired designs, randomization tests and t tests, against scipy, brute force and simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.stats.causal import (
    page_trend,
    paired_difference,
    permutation_test_two_sample,
    sign_flip_interval,
    sign_flip_test,
    t_test,
)

values = st.lists(st.floats(-5, 5).map(lambda v: round(v, 2)), min_size=2, max_size=9)


def binomial_tolerance(rate: float, repeats: int) -> float:
    """Three standard errors of an observed rate."""
    return 3 * np.sqrt(rate * (1 - rate) / repeats)


def test_pairing_is_worth_what_the_variances_say():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=400)
    x, y = shared + 0.5 * rng.normal(size=400), shared + 0.5 * rng.normal(size=400)
    pair = paired_difference(x, y)
    assert pair.mean == pytest.approx(x.mean() - y.mean())
    assert pair.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    # Var(d) = s1² + s0² - 2 rho s1 s0, so n pairs are worth n (s1² + s0²) / Var(d) unpaired seeds
    s1, s0, rho = x.std(ddof=1), y.std(ddof=1), pair.correlation
    assert pair.sd**2 == pytest.approx(s1**2 + s0**2 - 2 * rho * s1 * s0)
    assert pair.equivalent_seeds == pytest.approx(400 * (s1**2 + s0**2) / pair.sd**2)
    assert pair.equivalent_seeds > 3 * pair.n


def test_constant_difference_is_worth_infinitely_many_seeds():
    assert paired_difference([3, 4, 6], [1, 2, 4]).equivalent_seeds == np.inf


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_t_tests_equal_scipy(alternative):
    rng = np.random.default_rng(1)
    x, y = rng.normal(0.4, 1, 7), rng.normal(0, 3, 5)
    expected = sps.ttest_1samp(x, 0.1, alternative=alternative).pvalue
    assert t_test(x, null=0.1, alternative=alternative) == pytest.approx(expected)
    expected = sps.ttest_ind(x, y + 0.1, equal_var=False, alternative=alternative).pvalue
    assert t_test(x, y, null=0.1, alternative=alternative) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(d=values, null=st.sampled_from([-0.5, 0.0, 0.5]), alternative=st.sampled_from(["greater", "less"]))
def test_sign_flip_counts_all_patterns(d, null, alternative):
    e = (np.array(d) - null) * (1 if alternative == "greater" else -1)
    sums = [float(np.dot(s, e)) for s in itertools.product([-1, 1], repeat=len(e))]
    expected = np.mean(np.array(sums) >= e.sum() - 1e-9)
    assert sign_flip_test(d, alternative, null=null) == pytest.approx(expected)


def test_sign_flip_equals_scipy_and_draws_patterns_beyond_twenty():
    rng = np.random.default_rng(2)
    d = rng.normal(0.3, 1, 12)
    peer = sps.permutation_test((d,), np.mean, permutation_type="samples", alternative="greater", n_resamples=2**12)
    assert sign_flip_test(d) == pytest.approx(peer.pvalue)
    long = rng.normal(0.2, 1, 60)
    p = sign_flip_test(long, n_resamples=20_000, rng=3)
    assert p == sign_flip_test(long, n_resamples=20_000, rng=3)
    assert p == pytest.approx(t_test(long), abs=0.02)  # close by the central limit theorem


@settings(max_examples=40, deadline=None)
@given(
    d=st.lists(st.floats(-5, 5).map(lambda v: round(v, 2)), min_size=6, max_size=9), level=st.sampled_from([0.8, 0.95])
)
def test_sign_flip_interval_holds_what_the_test_does_not_reject(d, level):
    low, high = sign_flip_interval(d, level)
    tail, step = (1 - level) / 2, 1e-6
    assert sign_flip_test(d, "greater", null=low + step) > tail
    assert sign_flip_test(d, "greater", null=low - step) <= tail
    assert sign_flip_test(d, "less", null=high - step) > tail
    assert sign_flip_test(d, "less", null=high + step) <= tail


def test_sign_flip_interval_is_infinite_when_no_pattern_is_rare_enough():
    assert sign_flip_interval([1, 2, 3, 4, 5]) == (-np.inf, np.inf)
    assert np.isfinite(sign_flip_interval([1, 2, 3, 4, 5, 6])).all()
    assert np.isfinite(sign_flip_interval(np.arange(30.0))).all()


def test_permutation_counts_all_labelings():
    x, y = np.array([3.1, 2.2, 4.0]), np.array([1.0, 2.5, 1.9, 0.3])

    def welch(a, b):
        return (a.mean() - b.mean()) / np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))

    pool = np.concatenate([x, y])
    splits = [
        (pool[list(chosen)], np.delete(pool, chosen)) for chosen in itertools.combinations(range(len(pool)), len(x))
    ]
    expected = np.mean([welch(a, b) >= welch(x, y) - 1e-9 for a, b in splits])
    assert permutation_test_two_sample(x, y) == pytest.approx(expected)


def test_permutation_of_constant_arms_gives_the_share_of_labelings():
    assert permutation_test_two_sample([1.0] * 4, [0.0] * 4) == pytest.approx(1 / 70)
    assert permutation_test_two_sample([1.0] * 3, [1.0] * 3) == 1.0


def test_page_equals_scipy_and_spearman():
    v = np.random.default_rng(4).normal(size=(6, 5)) + 0.4 * np.arange(5)
    trend = page_trend(v)
    peer = sps.page_trend_test(v)
    assert (trend.statistic, trend.p_value) == (pytest.approx(peer.statistic), pytest.approx(peer.pvalue))
    rho = [sps.spearmanr(row, np.arange(5)).statistic for row in v]
    np.testing.assert_allclose(trend.correlations, rho)
    falling = page_trend(-v, "less")
    assert falling.p_value == pytest.approx(trend.p_value)
    np.testing.assert_allclose(falling.correlations, -trend.correlations)


def test_a_seed_without_any_change_has_no_trend():
    assert page_trend([[1, 1, 1], [1, 2, 3], [1, 2, 3]]).correlations.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("test", [t_test, sign_flip_test])
@pytest.mark.parametrize("alternative", ["greater", "less"])
def test_null_rate_of_paired_tests(test, alternative):
    """At the null at most 5 % are significant: within 3 binomial standard errors over 1,000 repeats."""
    d = np.random.default_rng(5).normal(size=(1000, 8))
    rate = np.mean([test(row, alternative=alternative) <= 0.05 for row in d])
    assert rate <= 0.05 + binomial_tolerance(0.05, 1000)
    assert rate >= 0.02  # and the test is not void


def test_null_rate_of_welch_and_permutation_with_unequal_arms():
    """The small arm has the large spread: Welch keeps 5 % (400 repeats), studentizing mends most of a permutation."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(0, 3, (400, 5)), rng.normal(0, 1, (400, 12))
    plain, welch, studentized = [], [], []
    for a, b in zip(x, y, strict=True):
        welch.append(t_test(a, b) <= 0.05)
        studentized.append(permutation_test_two_sample(a, b, n_resamples=499) <= 0.05)
        pool = rng.permuted(np.tile(np.concatenate([a, b]), (499, 1)), axis=1)
        means = pool[:, :5].mean(axis=1) - pool[:, 5:].mean(axis=1)
        plain.append((1 + np.sum(means >= a.mean() - b.mean())) / 500 <= 0.05)
    assert np.mean(welch) <= 0.05 + binomial_tolerance(0.05, 400)
    assert np.mean(plain) > np.mean(studentized) + 0.03


def test_null_rate_of_permutation_with_equal_arms():
    v = np.random.default_rng(8).exponential(size=(400, 10))
    rate = np.mean([permutation_test_two_sample(row[:5], row[5:], n_resamples=499) <= 0.05 for row in v])
    assert 0.02 <= rate <= 0.05 + binomial_tolerance(0.05, 400)


def test_null_rate_of_page():
    for seeds, levels in ((6, 4), (20, 3)):
        v = np.random.default_rng(7).normal(size=(400, seeds, levels))
        assert np.mean([page_trend(rows).p_value <= 0.05 for rows in v]) <= 0.05 + binomial_tolerance(0.05, 400)


def test_page_is_exact_by_enumeration():
    v = np.array([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]])
    orders = list(itertools.permutations([1, 2, 3]))
    totals = [sum(np.dot([1, 2, 3], r) for r in rows) for rows in itertools.product(orders, repeat=3)]
    observed = sum(np.dot([1, 2, 3], sps.rankdata(row)) for row in v)
    assert page_trend(v).p_value == pytest.approx(np.mean(np.array(totals) >= observed))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: t_test([1.0]), "at least 2 are needed"),
        (lambda: t_test([1.0, 1.0, 1.0]), "all values are equal"),
        (lambda: t_test([1.0, np.nan]), "not finite"),
        (lambda: t_test([[1.0, 2.0], [3.0, 4.0]]), "the seed is the unit of replication"),
        (lambda: paired_difference([1, 2, 3], [1, 2]), "belong together one by one"),
        (lambda: page_trend([[1, 2], [2, 3]]), "seeds, ordered levels"),
        (lambda: page_trend([[1, 2, np.nan], [2, 3, 4]]), "finite"),
        (lambda: sign_flip_interval([1, 2], 95), "above 0 and below 1"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        call()
