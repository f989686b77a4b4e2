"""Values that are equal but for rounding are ties, in every test that looks at ranks or signs."""

import numpy as np
import pytest

from mlcollage.errors import InvalidInput
from mlcollage.stats._resample import codes
from mlcollage.stats._values import difference, finite, levels, sample, table
from mlcollage.stats.causal import page_trend, paired_difference, sign_flip_test
from mlcollage.stats.explore import critical_difference
from mlcollage.stats.robust import prob_improvement
from mlcollage.stats.sensitivity import rosenbaum_p
from mlcollage.stats.sequential import sequential_sign_interval, sequential_sign_test

# a sum in another order: 0.6 and 0.6000000000000001
ONE, OTHER = 0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1
SEEDS = np.full(10, 1.0)


def test_rounding_is_there_to_be_tolerated():
    assert 0 < abs(ONE - OTHER) < 1e-15


def test_levels_are_ranks_with_ties_up_to_rounding():
    assert levels(np.array([ONE, 0.1, OTHER, 0.7])).tolist() == [2, 1, 2, 3]
    assert levels(np.array([[3.0, 1.0], [2.0, 2.0]])).tolist() == [[2, 1], [1, 1]]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 7))
    assert (levels(x) == x.argsort(axis=1).argsort(axis=1) + 1).all()


def test_differences_of_equal_values_are_zero():
    assert difference([ONE, 2.0, 1e-30], [OTHER, 1.0, 2e-30]).tolist() == [0.0, 1.0, -1e-30]


def test_arms_that_are_equal_do_not_improve():
    found = prob_improvement(SEEDS * max(ONE, OTHER), SEEDS * min(ONE, OTHER))
    assert found.probability == 0.5


def test_equal_levels_have_no_trend():
    values = np.outer(SEEDS, sorted([ONE, OTHER, ONE]))
    values[:, 2] = max(ONE, OTHER)
    found = page_trend(values)
    assert found.p_value > 0.5
    assert (found.correlations == 0).all()


def test_equal_arms_have_no_sign():
    arms = SEEDS * max(ONE, OTHER), SEEDS * min(ONE, OTHER)
    assert sequential_sign_test(*arms) == 1.0
    assert sequential_sign_test(arms[0], null=float(arms[1][0])) == 1.0
    assert sign_flip_test(arms[0], null=float(arms[1][0])) == 1.0
    assert paired_difference(*arms).equivalent_seeds == np.inf
    assert sequential_sign_interval(np.concatenate(arms)) == (ONE, ONE)


def test_equal_methods_share_a_rank():
    scores = np.outer(SEEDS, [max(ONE, OTHER), min(ONE, OTHER), ONE])
    found = critical_difference(scores)
    assert found.ranks.tolist() == [2.0, 2.0, 2.0]
    assert found.p_value == 1.0


def test_signed_ranks_with_ties_by_hand():
    """|d| tie at 0.3: ranks 2.5, 2.5, 1, 4, and T = 7.5; all 16 sign patterns are counted."""
    split = [0.1 + 0.2, -0.3, 0.1, 0.4]
    tied = [3.0, -3.0, 1.0, 4.0]
    assert rosenbaum_p(split) == rosenbaum_p(tied)
    ranks, signs = np.array([2.5, 2.5, 1.0, 4.0]), np.array(np.meshgrid(*[[0, 1]] * 4)).reshape(4, -1)
    assert rosenbaum_p(split) == pytest.approx(np.mean(ranks @ signs >= 7.5))
    assert rosenbaum_p([1.0, 1e-17]) == rosenbaum_p([1.0, 0.0]) == 0.5


@pytest.mark.parametrize("values", ["abc", [[1.0, 2.0], [3.0]], [1.0 + 1j, 2.0], [object(), 1.0]])
def test_what_is_no_real_number_is_refused_in_a_sentence(values):
    for use in (sample, finite, lambda x: table(x, "x", "rows, columns")):
        with pytest.raises(InvalidInput, match="x must hold real numbers"):
            use(values)


def test_an_infinite_difference_is_no_tie():
    assert difference([np.inf, 1.0, -np.inf], [1.0, np.inf, 0.0]).tolist() == [np.inf, -np.inf, -np.inf]


@pytest.mark.parametrize("labels", [["a", None, "b", "a"], [0.0, np.nan, 1.0, 0.0]])
def test_a_value_without_a_label_is_in_no_unit(labels):
    with pytest.raises(InvalidInput, match="unit lacks a label at position 1"):
        codes(labels, 4, "unit")
    assert codes(["b", 1, "b", 1], 4, "unit").tolist() == [0, 1, 0, 1]
