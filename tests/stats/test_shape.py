"""Skewness, outlying values and Hall's t, against their formulas, other libraries and simulation."""

import numpy as np
import pytest
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.stats.causal import t_test
from mlcollage.stats.shape import outlying, skewed_t_test, skewness, skewness_p

CRASH = np.array([1.0, 1.2, 0.9, 1.1, -3.0])


def test_skewness_by_hand():
    c = CRASH - CRASH.mean()
    n = len(c)
    g = (c**3).mean() / (c**2).mean() ** 1.5
    assert skewness(CRASH) == pytest.approx(g * np.sqrt(n * (n - 1)) / (n - 2))
    assert skewness(-CRASH) == pytest.approx(-skewness(CRASH))
    assert skewness([0.1 + 0.2, 0.3, 0.3]) == 0.0


@pytest.mark.parametrize("n", [5, 12, 150])
def test_skewness_p_is_uniform_for_normal_values(n):
    x = np.random.default_rng(0).normal(3.0, 2.0, (400, n))
    p = np.array([skewness_p(row) for row in x])
    assert sps.kstest(p, "uniform").pvalue > 0.01


def test_outlying_is_grubbs_test():
    """The largest studentized deviation against Grubbs's critical value (1950), here for n = 8 at 1 %: 2.274."""
    n, critical = 8, 2.274
    rest = np.array([-1.0, -0.6, -0.2, 0.1, 0.4, 0.5, 0.8])
    found = []
    for far in np.linspace(1, 8, 200):
        x = np.append(rest, far)
        g = np.abs(x - x.mean()).max() / x.std(ddof=1)
        found.append(bool(outlying(x).any()) == (g > critical))
        assert outlying(x)[:-1].sum() == 0
    assert np.mean(found) > 0.99  # the table has three digits
    assert n == len(x)


def test_outlying_among_values_that_agree():
    assert outlying([0.1 + 0.2, 0.3, 0.3, 0.3, 0.2]).tolist() == [False] * 4 + [True]
    assert not outlying([0.3] * 5).any()
    assert not outlying([0.1 + 0.2, 0.3, 0.3, 0.3, 0.3]).any()
    assert not outlying([1.0, 2.0, 900.0]).any()


def test_outlying_keeps_its_level():
    x = np.random.default_rng(1).normal(size=(4000, 6))
    assert np.mean([outlying(row, 0.05).any() for row in x]) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 4000)


def test_halls_t_is_the_t_test_without_skewness_and_stricter_with_a_tail_against_the_claim():
    even = np.array([-1.0, 0.0, 1.0]) + 0.5
    assert skewed_t_test(even) == pytest.approx(t_test(even))
    assert skewed_t_test(CRASH + 2) > t_test(CRASH + 2)
    assert skewed_t_test(-CRASH, alternative="less") == pytest.approx(skewed_t_test(CRASH))
    with pytest.raises(InvalidInput, match="all values are equal"):
        skewed_t_test([1.0, 1.0, 1.0])


def test_halls_t_is_monotone():
    p = [skewed_t_test(CRASH, null=null) for null in np.linspace(-20, 5, 200)]
    assert (np.diff(p) >= -1e-12).all()


def test_halls_t_errs_less_with_a_tail_down():
    """Lognormal differences of mean 0, tail down, n = 20: t supports about 17 %."""
    rng = np.random.default_rng(2)
    x = np.exp(0.5) - np.exp(rng.normal(size=(2000, 20)))
    plain, corrected = (np.mean([test(row) <= 0.05 for row in x]) for test in (t_test, skewed_t_test))
    assert plain > 0.14
    assert corrected < 0.12
