"""Approximate posteriors against exact ones: discrete data matched exactly, and conjugate normals."""

import numpy as np
import pytest
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.stats.likelihood_free import abc_rejection


def flat(n, rng):
    return rng.uniform(size=(n, 1))


def normal(n, rng):
    return rng.normal(0, 2, size=(n, 1))


def mean_of_ten(theta, rng):
    return theta + rng.normal(0, 10**-0.5, theta.shape)


def test_exact_matches_give_the_exact_posterior():
    """Seven of ten successes, flat prior: Beta(8, 4)."""
    found = abc_rejection(flat, lambda p, rng: rng.binomial(10, p), [7], tolerance=0, n_sims=40_000)
    assert sps.kstest(found.theta[:, 0], sps.beta(8, 4).cdf).pvalue > 0.01
    assert found.acceptance == pytest.approx(1 / 11, abs=0.01)
    assert found.mean()[0] == pytest.approx(8 / 12, abs=0.01)
    assert found.quantile(0.9)[0] == pytest.approx(sps.beta(8, 4).ppf(0.9), abs=0.02)
    np.testing.assert_allclose(found.weights.sum(), 1)


def test_a_small_tolerance_approaches_the_conjugate_posterior():
    precision = 10 + 1 / 4
    exact = sps.norm(10 * 1.5 / precision, precision**-0.5)
    found = abc_rejection(normal, mean_of_ten, [1.5], n_sims=100_000, keep=0.005)
    assert found.mean()[0] == pytest.approx(exact.mean(), abs=0.04)
    assert found.sd()[0] == pytest.approx(exact.std(), rel=0.1)
    assert len(found.theta) == pytest.approx(500, abs=1)
    assert found.distances.max() == found.tolerance


def test_regression_makes_up_for_a_large_tolerance():
    precision = 10 + 1 / 4
    wide = abc_rejection(normal, mean_of_ten, [1.5], n_sims=20_000, keep=0.4)
    adjusted = abc_rejection(normal, mean_of_ten, [1.5], n_sims=20_000, keep=0.4, adjust=True)
    assert wide.sd()[0] > 1.8 * precision**-0.5
    assert adjusted.mean()[0] == pytest.approx(15 / precision, abs=0.03)
    assert adjusted.sd()[0] == pytest.approx(precision**-0.5, rel=0.05)


def test_summaries_on_other_scales_change_nothing():
    def two(theta, rng):
        x = theta + rng.normal(size=(len(theta), 20))
        return np.c_[x.mean(1), x.std(1)]

    one = abc_rejection(normal, two, [1.0, 1.0], n_sims=5000, keep=0.05)
    scaled = abc_rejection(normal, lambda t, rng: two(t, rng) * [1, 1000], [1.0, 1000.0], n_sims=5000, keep=0.05)
    np.testing.assert_allclose(scaled.theta, one.theta)
    again = abc_rejection(normal, two, [1.0, 1.0], n_sims=5000, keep=0.05, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(again.theta, one.theta)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: abc_rejection(normal, mean_of_ten, [1.0], n_sims=5), "n_sims must be a whole number of at least 10"),
        (
            lambda: abc_rejection(normal, mean_of_ten, [1.0], keep=0),
            "keep must be a finite number above 0 and at most 1",
        ),
        (
            lambda: abc_rejection(normal, mean_of_ten, [1.0], tolerance=-1),
            "tolerance must be a finite number of at least 0",
        ),
        (lambda: abc_rejection(lambda n, rng: rng.normal(size=n), mean_of_ten, [1.0]), "prior returned shape"),
        (lambda: abc_rejection(normal, mean_of_ten, [1.0, 2.0]), "simulate returned shape"),
        (lambda: abc_rejection(normal, lambda t, rng: t * np.nan, [1.0]), "not finite"),
        (lambda: abc_rejection(normal, mean_of_ten, [900.0], tolerance=0.1), "0 of 20000 simulations come within"),
        (
            lambda: abc_rejection(normal, mean_of_ten, [1.0]).quantile(2),
            "p must be a finite number of at least 0 and at most 1",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()
