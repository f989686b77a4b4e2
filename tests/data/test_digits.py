"""The digits of scikit-learn, scaled and split."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mlcollage.data.digits import load_digits_split
from mlcollage.errors import InvalidInput


def test_every_digit_is_in_one_part_once():
    x, y, xt, yt = load_digits_split(seed=3, test_size=500)
    assert x.shape == (1297, 64)
    assert xt.shape == (500, 64)
    assert x.dtype == np.float32
    assert y.dtype == np.int64
    ours = np.c_[np.concatenate([x, xt]) * 16, np.concatenate([y, yt])]
    theirs = np.c_[load_digits().data, load_digits().target]
    np.testing.assert_array_equal(np.unique(ours, axis=0), np.unique(theirs, axis=0))
    assert len(ours) == len(theirs)


def test_the_split_is_seeded_and_keeps_the_class_proportions():
    first, again, other = load_digits_split(1), load_digits_split(1), load_digits_split(2)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], other[0])
    assert np.ptp(np.bincount(first[3])) <= 6


@pytest.mark.parametrize("size", [0, 1797, 0.3, True])
def test_a_test_size_that_leaves_nothing_is_refused(size):
    with pytest.raises(InvalidInput, match="of at least 10 and at most 1787"):
        load_digits_split(test_size=size)
