"""Refutations and sensitivity bounds: brute force, scipy, published examples, and planted errors they must catch."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps
from sklearn.tree import DecisionTreeRegressor

from mlcollage.errors import InvalidInput
from mlcollage.stats.causal_effects import AverageEffect
from mlcollage.stats.sensitivity import (
    e_value,
    placebo,
    random_common_cause,
    rosenbaum_gamma,
    rosenbaum_p,
)


def study(seed=0, n=300, effect=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    a = (rng.random(n) < 1 / (1 + np.exp(-x[:, 0]))).astype(int)
    return x, a, effect * a + x.sum(axis=1) + rng.normal(size=n)


@pytest.mark.parametrize("method", ["aipw", "regression"])
def test_a_real_effect_survives_and_its_placebo_is_zero(method):
    effect = AverageEffect(method=method)
    fake = placebo(effect, *study(), repeats=12)
    assert fake.passed
    assert fake.p_value == pytest.approx(1 / 13)  # no permutation comes near the estimate
    assert abs(fake.refuted.mean()) < 0.15
    noise = random_common_cause(effect, *study(), repeats=6)
    assert noise.passed
    assert noise.expected == noise.estimate == pytest.approx(1, abs=0.4)
    assert abs(noise.shift) < 0.3


def test_without_an_effect_the_placebo_is_as_large():
    assert placebo(AverageEffect(method="regression"), *study(1, effect=0.0), repeats=40).p_value > 0.05


def test_refutation_says_when_an_analysis_fails():
    """An estimator that reports an effect whatever the treatment is caught by the placebo."""

    class Optimist(AverageEffect):
        def fit(self, X, a, y, **_):
            super().fit(X, a, y)
            self.ate_ += 1.0
            return self

    assert not placebo(Optimist(method="regression"), *study(2), repeats=8).passed


def test_noise_covariates_are_not_the_callers_own_numbers():
    """Data drawn with the same seed must not come out again as the irrelevant covariate (it would be collinear)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 1))
    a = np.arange(50) % 2
    result = random_common_cause(AverageEffect(method="regression"), x, a, x[:, 0] + a, repeats=2, rng=0)
    np.testing.assert_allclose(result.refuted, 1.0)


def test_the_estimator_passed_stays_unfitted():
    effect = AverageEffect(outcome=DecisionTreeRegressor(max_depth=2, random_state=0))
    placebo(effect, *study(3, 100), repeats=2)
    assert not hasattr(effect, "ate_")
    with pytest.raises(InvalidInput, match="repeats must be a whole number of at least 2"):
        placebo(effect, *study(3, 100), repeats=1)


def test_e_values_are_the_published_ones():
    # VanderWeele and Ding 2017: breastfeeding and infant death 3.9 (1.8, 8.7) -> 7.26 and 3.0
    value = e_value(3.9, (1.8, 8.7))
    assert value.point == pytest.approx(7.26, abs=0.005)
    assert value.interval == pytest.approx(3.0)
    # protective effects are inverted, an interval over 1 needs no confounder, no effect neither
    assert e_value(0.8).point == pytest.approx(e_value(1.25).point)
    assert e_value(1.2, (0.9, 1.6)).interval == 1.0
    assert e_value(0.5, (0.3, 0.9)).interval == pytest.approx(e_value(0.9).point)
    assert e_value(0.0, scale="standardized").point == 1.0
    assert e_value(0.5, scale="standardized").point == pytest.approx(e_value(np.exp(0.455)).point)


@settings(deadline=None)
@given(rr=st.floats(1.01, 50))
def test_the_e_value_explains_the_estimate_away(rr):
    """Confounding of strength E on both sides biases a risk ratio by the bounding factor E^2 / (2E - 1) = RR."""
    e = e_value(rr).point
    assert e * e / (2 * e - 1) == pytest.approx(rr)


@pytest.mark.parametrize("alternative", ["greater", "less"])
def test_no_hidden_bias_is_wilcoxon(alternative):
    d = np.random.default_rng(0).normal(0.3, 1, 15)
    expected = sps.wilcoxon(d, alternative=alternative, method="exact").pvalue
    assert rosenbaum_p(d, alternative=alternative) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(d=st.lists(st.integers(-4, 4), min_size=1, max_size=8), gamma=st.floats(1, 6))
def test_hidden_bias_counts_all_patterns(d, gamma):
    """Ties and zeros included: the sum over all 2^n assignments, each positive with probability gamma / (1 + gamma)."""
    x = np.array([v for v in d if v], dtype=float)
    if not len(x):
        assert rosenbaum_p(d, gamma) == 1.0
        return
    ranks, pi = sps.rankdata(np.abs(x)), gamma / (1 + gamma)
    observed = ranks[x > 0].sum()
    total = 0.0
    for signs in itertools.product((0, 1), repeat=len(x)):
        if np.dot(signs, ranks) >= observed - 1e-9:
            total += pi ** sum(signs) * (1 - pi) ** (len(x) - sum(signs))
    assert rosenbaum_p(d, gamma) == pytest.approx(total)


def test_the_normal_form_continues_the_exact_one():
    rng = np.random.default_rng(1)
    d = rng.normal(0.2, 1, 200)
    exact = rosenbaum_p(d, 1.2)
    more = rosenbaum_p(np.append(d, 1e-9), 1.2)  # 201 pairs, the last of rank 1
    assert more == pytest.approx(exact, rel=0.05)


def test_gamma_is_where_significance_ends():
    d = np.random.default_rng(2).normal(1, 1, 25)
    gamma = rosenbaum_gamma(d, 0.05)
    assert gamma > 2
    assert rosenbaum_p(d, gamma) == pytest.approx(0.05, abs=1e-6)
    assert rosenbaum_gamma(-d, alternative="less") == pytest.approx(gamma)
    assert np.isnan(rosenbaum_gamma(-d))
    all_up = rosenbaum_gamma(np.arange(1.0, 6))  # p = (gamma / (1 + gamma))^5
    assert (all_up / (1 + all_up)) ** 5 == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rosenbaum_p([1.0, 2.0], 0.5), "at least 1"),
        (lambda: rosenbaum_p([1.0], alternative="both"), "alternative must be one of 'greater', 'less'"),
        (lambda: rosenbaum_gamma([1.0], alpha=2), "alpha must be a finite number above 0 and below 1"),
        (lambda: rosenbaum_p([np.nan]), "not finite"),
        (lambda: e_value(-0.3), "must be positive"),
        (lambda: e_value(2.0, (2.5, 3.0)), r"the interval \(2\.5, 3\.0\) does not hold the estimate 2\.0\."),
        (lambda: e_value(2.0, scale="odds"), "scale must be one of 'risk_ratio', 'standardized'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
