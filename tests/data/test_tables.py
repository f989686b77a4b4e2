"""Small tables and permuted tasks."""

import numpy as np
import pytest
from sklearn import datasets

from mlcollage.data.permuted import permutation, permuted
from mlcollage.data.tables import TABLES, load
from mlcollage.errors import InvalidInput, UnknownName


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_what_its_entry_says_and_its_split_is_seeded(name):
    info = TABLES[name]
    x, y, xt, yt = load(name, seed=3)
    assert len(x) + len(xt) == len(y) + len(yt) == info.rows
    assert x.shape[1] == xt.shape[1] == info.features
    assert len(xt) == pytest.approx(info.rows / 4, abs=1)
    if info.task == "classification":
        assert y.dtype == np.int64
        assert set(y) == set(range(len(info.classes)))
        share = np.bincount(y) / len(y) - np.bincount(yt) / len(yt)
        assert np.abs(share).max() < 0.03
    else:
        assert y.dtype == np.float64
    for a, b in zip((x, y, xt, yt), load(name, seed=3), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(x, load(name, seed=4)[0])


def test_no_row_of_a_bundled_table_is_lost_or_doubled():
    x, y, xt, yt = load("wine")
    ours = np.c_[np.concatenate([x, xt]), np.concatenate([y, yt])]
    theirs = np.c_[datasets.load_wine(return_X_y=True)]
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    assert TABLES["iris"].classes == tuple(datasets.load_iris().target_names)
    assert TABLES["breast_cancer"].classes == tuple(datasets.load_breast_cancer().target_names)


def test_generated_tables_follow_their_equations():
    x, y, _, _ = load("friedman1", n=4000, seed=1)
    mean = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    assert (y - mean).std() == pytest.approx(1, abs=0.05)
    assert (y - mean).mean() == pytest.approx(0, abs=0.06)
    x, y, _, _ = load("noisy_sine", n=4000)
    assert (y - np.sin(x[:, 0])).std() == pytest.approx(0.1, abs=0.005)
    assert np.abs(x).max() <= np.pi


def test_permuted_tasks_reorder_features_and_nothing_else():
    x = np.random.default_rng(0).random((5, 4, 6))
    np.testing.assert_array_equal(permuted(x, 0), x)
    other = permuted(x, 2, seed=1)
    assert other.shape == x.shape
    np.testing.assert_array_equal(np.sort(other.reshape(5, -1)), np.sort(x.reshape(5, -1)))
    np.testing.assert_array_equal(other.reshape(5, -1), x.reshape(5, -1)[:, permutation(24, 2, seed=1)])
    orders = {tuple(permutation(24, task, seed=seed)) for task in range(1, 6) for seed in range(3)}
    assert len(orders) == 15


def test_bad_input_gets_one_sentence():
    with pytest.raises(UnknownName, match="'breast_cancer', 'wine', 'iris'"):
        load("boston")
    with pytest.raises(InvalidInput, match="above 0 and below 1"):
        load("iris", test_fraction=1)
    with pytest.raises(InvalidInput, match="only generated tables take n"):
        load("iris", n=10)
    with pytest.raises(InvalidInput, match="at least 4"):
        load("friedman1", n=1)
    with pytest.raises(InvalidInput, match="task must be a whole number of at least 0"):
        permutation(4, -1)
    with pytest.raises(InvalidInput, match="got shape"):
        permuted(np.zeros(3), 1)
