"""Power, required seeds, equivalence and Holm's correction."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from mlcollage.errors import InvalidInput
from mlcollage.stats.adaptive import holm, power, required_seeds, tost
from mlcollage.stats.bootstrap import bootstrap_t_test, t_interval
from mlcollage.stats.causal import sign_flip_test, t_test


@pytest.mark.parametrize("n", [3, 8, 40])
@pytest.mark.parametrize("effect", [0.3, 1.0, 2.5])
def test_power_equals_statsmodels(n, effect):
    one = TTestPower().power(effect, n, 0.05, alternative="larger")
    assert power(effect, 1.0, n, design="one_sample") == pytest.approx(one, abs=1e-6)
    rho = 0.7
    pair = TTestPower().power(effect / np.sqrt(2 * (1 - rho)), n, 0.05, alternative="larger")
    assert power(-effect, 1.0, n, rho) == pytest.approx(pair, abs=1e-6)  # the sign does not matter
    two = TTestIndPower().power(effect, n, 0.05, alternative="larger")
    assert power(effect, 1.0, n, design="unpaired") == pytest.approx(two, abs=1e-6)


def test_power_of_huge_effects_is_one_and_of_tiny_ones_alpha():
    assert power(1e6, 1e-6, 3) == pytest.approx(1.0)
    assert power(29.9, 1.0, 2, alpha=1e-3, design="one_sample") == pytest.approx(
        power(30.1, 1.0, 2, alpha=1e-3, design="one_sample"), rel=0.02
    )
    assert power(1e-9, 1.0, 10) == pytest.approx(0.05, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    effect=st.floats(0.05, 5),
    rho=st.floats(-0.5, 0.95),
    alpha=st.sampled_from([0.01, 0.05]),
    goal=st.sampled_from(["difference", "equivalence"]),
)
def test_required_seeds_are_the_fewest_that_reach_the_power(effect, rho, alpha, goal):
    n = required_seeds(effect, 1.0, rho, alpha, 0.8, goal=goal)
    assert power(effect, 1.0, n, rho, alpha=alpha, goal=goal) >= 0.8
    assert n == 2 or power(effect, 1.0, n - 1, rho, alpha=alpha, goal=goal) < 0.8


def test_required_seeds_of_tiny_effects_take_no_search():
    assert required_seeds(1e-3, 1.0, design="one_sample") == pytest.approx(2.4865**2 * 1e6, rel=1e-3)


def test_required_seeds_deliver_the_power_in_simulation():
    """2,000 paired studies with correlated arms: power 0.8 within 3 binomial standard errors (0.027)."""
    sd, rho, effect = 2.0, 0.6, 1.0
    n = required_seeds(effect, sd, rho)
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(2000, n)) * np.sqrt(rho)
    arms = [sd * (shared + np.sqrt(1 - rho) * rng.normal(size=(2000, n))) for _ in range(2)]
    d = arms[0] + effect - arms[1]
    t = d.mean(axis=1) / (d.std(axis=1, ddof=1) / np.sqrt(n))
    assert np.mean(t >= student.isf(0.05, n - 1)) == pytest.approx(power(effect, sd, n, rho), abs=0.027)


def test_required_seeds_for_equivalence_deliver_the_power():
    """Truth 0, 1,000 studies: TOST succeeds in at least 80 % (the bound is conservative by little)."""
    n = required_seeds(0.5, 1.0, design="one_sample", goal="equivalence")
    d = np.random.default_rng(1).normal(size=(1000, n))
    rate = np.mean([tost(row, low=-0.5, high=0.5) <= 0.05 for row in d])
    assert 0.8 - 0.038 <= rate <= 0.9


def test_pairing_saves_seeds():
    assert required_seeds(0.5, 1.0, rho=0.9) < required_seeds(0.5, 1.0) / 5


def test_tost_equals_statsmodels():
    rng = np.random.default_rng(2)
    x, y = rng.normal(0.1, 1, 9), rng.normal(0, 2, 7)
    assert tost(x, low=-1, high=1.5) == pytest.approx(DescrStatsW(x).ttost_mean(-1, 1.5)[0])
    peer = CompareMeans(DescrStatsW(x), DescrStatsW(y)).ttost_ind(-2, 2, usevar="unequal")[0]
    assert tost(x, y, low=-2, high=2) == pytest.approx(peer)


@pytest.mark.parametrize("seed", range(6))
def test_tost_rejects_exactly_if_the_90_percent_interval_lies_inside(seed):
    x = np.random.default_rng(seed).normal(0, 0.8, 8)
    low, high = t_interval(x, 0.9)
    assert (tost(x, low=-0.7, high=0.7) <= 0.05) == (low > -0.7 and high < 0.7)


@pytest.mark.parametrize("test", [t_test, sign_flip_test, bootstrap_t_test])
def test_tost_null_rate_at_the_margin(test):
    """Truth on the bound: at most 5 % of 500 are called equivalent, within 3 binomial standard errors."""
    d = np.random.default_rng(3).normal(0.8, 0.5, (500, 8))
    rate = np.mean([tost(row, low=-0.8, high=0.8, test=test) <= 0.05 for row in d])
    assert 0.02 <= rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 500)


@settings(max_examples=50, deadline=None)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_equals_its_definition(p):
    order = sorted(range(len(p)), key=lambda i: p[i])
    expected, running = np.empty(len(p)), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        expected[i] = running
    np.testing.assert_allclose(holm(p), expected, atol=1e-12)


def test_holm_equals_statsmodels():
    p = np.random.default_rng(4).uniform(0, 0.2, 9)
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])


def test_holm_of_nothing_is_nothing():
    assert holm([]).shape == (0,)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: required_seeds(0, 1), "the size of effect must be a finite number above 0"),
        (lambda: required_seeds(1, 0), "sd must be a finite number above 0"),
        (lambda: required_seeds(1, 1, rho=1.0), r"rho must be a finite number of at least -1 and below 1"),
        (lambda: required_seeds(1, 1, power=80), "must be a finite number above 0 and below 1"),
        (lambda: required_seeds(1e-9, 1), "more than 1e"),
        (lambda: power(1, 1, 1), "n must be a whole number of at least 2"),
        (lambda: power(1, 1, 5, 0.5, design="unpaired"), "belongs to a paired design"),
        (lambda: power(1, 1, 5, alpha=5), "must be a finite number above 0 and below 1"),
        (lambda: tost([1, 2, 3], low=1, high=1), "low < high"),
        (lambda: holm([0.1, 1.2]), r"\[0, 1\]"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        call()
