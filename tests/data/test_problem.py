"""One way from a workload to a problem: the right rows, standardized by the right ones, and three refusals."""

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from mlcollage.data.fresh_networks import fresh
from mlcollage.data.loading import load_workload
from mlcollage.data.problem import moments, problem, refuse_shared, shared_samples
from mlcollage.data.workload import Labeled, arrays
from mlcollage.errors import InvalidInput, UnknownName

RNG = np.random.default_rng(0)
X, Y = RNG.normal(3, 2, (60, 2, 3)).astype(np.float32), np.arange(60) % 3
TX, TY = RNG.normal(3, 2, (30, 2, 3)).astype(np.float32), np.arange(30) % 3


def mine(model=None, test=TX):
    made = Labeled.from_arrays(X, Y, test, TY[: len(test)], 3, name="mine")
    return Labeled(made.train, made.test, 3, model, name="mine")


def never():
    raise AssertionError("the study's own data were loaded beside a workload")


def net(shape=(2, 3), classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), classes), nn.BatchNorm1d(classes))


def test_rows_come_in_the_order_of_the_generator_and_nothing_else_is_drawn():
    rng, truth = np.random.default_rng(5), np.random.default_rng(5)
    p = problem(mine(), never, rng=rng, train=30, validation=10, test=12, standardize="none")
    order, tested = truth.permutation(60), truth.permutation(30)
    for part, x, y in [
        (p.train, X[order[:30]], Y[order[:30]]),
        (p.validation, X[order[30:40]], Y[order[30:40]]),
        (p.test, TX[tested[:12]], TY[tested[:12]]),
    ]:
        np.testing.assert_array_equal(part.x, x)
        np.testing.assert_array_equal(part.y, y)
        assert (part.x.dtype, part.y.dtype) == (torch.float32, torch.int64)
    assert rng.integers(2**40) == truth.integers(2**40)
    assert p.num_classes == 3
    assert p.shape == (2, 3)
    assert p.device == torch.device("cpu")


def test_without_a_generator_and_without_drawing_tests_rows_keep_their_order():
    p = problem(mine(), never, train=7, validation=3, test=4, standardize="none")
    np.testing.assert_array_equal(p.train.x, X[:7])
    np.testing.assert_array_equal(p.validation.x, X[7:10])
    np.testing.assert_array_equal(p.test.x, TX[:4])
    rng, truth = np.random.default_rng(1), np.random.default_rng(1)
    p = problem(mine(), never, rng=rng, train=7, test=4, draw_test=False, standardize="none")
    np.testing.assert_array_equal(p.train.x, X[truth.permutation(60)[:7]])
    np.testing.assert_array_equal(p.test.x, TX[:4])
    assert rng.integers(2**40) == truth.integers(2**40)


def test_sizes_are_at_most_and_a_share_leaves_some_to_validate_on():
    p = problem(mine(), never, validation=5)
    assert [len(part.y) for part in (p.train, p.validation, p.test)] == [55, 5, 30]
    p = problem(mine(), never, train=1000, validation=50, test=99, share=0.7)
    assert [len(part.y) for part in (p.train, p.validation, p.test)] == [42, 18, 30]
    p = problem(mine(), never, train=5, test=0)
    assert p.test.x.shape == (0, 2, 3)
    with pytest.raises(InvalidInput, match="mine has too few samples: none is left for the validation set"):
        problem(mine(), never, train=60, validation=5)
    with pytest.raises(InvalidInput, match="none is left for the training set"):
        problem(mine(), never, validation=70)
    with pytest.raises(InvalidInput, match="train must be a whole number of at least 0"):
        problem(mine(), never, train=-1)


@pytest.mark.parametrize(("statistics", "ddof"), [("population", 0), ("sample", 1)])
def test_all_parts_are_standardized_by_all_entries_of_the_training_inputs(statistics, ddof):
    p = problem(mine(), never, rng=np.random.default_rng(2), train=20, validation=9, standardize=statistics)
    order = np.random.default_rng(2).permutation(60)
    column = X[order[:20]].astype(np.float64).reshape(-1, 1)
    scaler = StandardScaler().fit(column)
    factor = np.sqrt(1 - ddof / len(column))  # StandardScaler divides by the population's deviation
    for part, x in [(p.train, X[order[:20]]), (p.validation, X[order[20:29]])]:
        truth = scaler.transform(x.reshape(-1, 1)).reshape(x.shape) * factor
        np.testing.assert_allclose(part.x, truth, atol=1e-5)
    np.testing.assert_array_equal(p.standardize(X[order[:20]]), p.train.x)
    assert (p.center, p.spread) == moments(X[order[:20]], statistics)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("statistics", "ddof"), [("population", 0), ("sample", 1)])
def test_the_features_of_a_users_table_are_standardized_each_by_itself(statistics, ddof, factor):
    """One deviation for all made of income in dollars and age in years one feature, and constants."""
    rng = np.random.default_rng(0)
    x = (factor * (rng.normal(size=(90, 3)) * [1, 1000, 0] + [0, 500, 7])).astype(np.float32)
    table = Labeled.from_arrays(x[:60], Y, x[60:], TY, 3, name="table")
    p = problem(table, never, train=40, validation=20, standardize=statistics)
    scaler = StandardScaler().fit(x[:40].astype(np.float64))
    shrink = np.sqrt(1 - ddof / 40)
    for part, rows in ((p.train, x[:40]), (p.validation, x[40:60]), (p.test, x[60:])):
        np.testing.assert_allclose(part.x, scaler.transform(rows) * shrink, atol=1e-5)
    np.testing.assert_array_equal(p.standardize(x[:40]), p.train.x)
    own = problem(None, lambda: table, train=40, standardize=statistics)
    assert isinstance(own.center, float), "a study's own data keep the relation of their entries"


def test_constant_inputs_do_not_explode():
    constant = np.full((50, 7), 0.1, dtype=np.float32)
    assert moments(constant, "population")[1] == 1
    assert moments(constant, "sample")[1] == 1
    assert moments(constant, "none") == (0, 1)
    with pytest.raises(UnknownName, match="standardize must be one of"):
        problem(mine(), never, standardize="minmax")


def test_a_users_model_gets_inputs_as_they_are_unless_asked():
    plain, asked = problem(mine(net), never), problem(mine(net), never, standardize_users=True)
    np.testing.assert_array_equal(plain.train.x, X)
    assert abs(float(asked.train.x.mean())) < 1e-5
    assert plain.users_model
    assert plain.make_model is net
    assert problem(None, lambda: mine()).users_model is False


def test_the_studys_model_is_made_for_the_shape_and_the_classes():
    p = problem(None, mine, flat=True, model=net)
    assert p.train.x.shape == (60, 6)
    assert p.make_model()(p.train.x).shape == (60, 3)
    assert p.make_model() is not p.make_model()
    with pytest.raises(InvalidInput, match="has no network"):
        problem(None, mine).make_model()


class Slow(Dataset):
    """Counts what is read."""

    def __init__(self, x, y):
        self.x, self.y, self.read = torch.from_numpy(x), y, []

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        self.read.append(index)
        return self.x[index], int(self.y[index])


def test_only_the_rows_that_are_drawn_are_read():
    train, test = Slow(X, Y), Slow(TX, TY)
    problem(Labeled(train, test, 3), never, rng=np.random.default_rng(0), train=4, validation=2, test=3)
    order = np.random.default_rng(0).permutation(60)
    assert train.read == order[:6].tolist()
    assert len(test.read) == 3


# --- networks ---------------------------------------------------------------------------------------------------------

ONE = net()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.own = nn.Linear(2, 2), nn.Linear(2, 2)
        self.own.weight = ONE[1].weight


class Table(nn.Module):
    TABLE = torch.arange(3.0)

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.register_buffer("places", self.TABLE)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: ONE, "hands out the same Sequential at every call"),
        (lambda: nn.Sequential(ONE), "networks that share '0.1.weight' at every call"),
        (Tied, "share 'own.weight'"),
        (Table, "share 'places'"),
        (lambda: None, r"must return a torch.nn.Module; got NoneType"),
        (lambda: nn.Linear(2), "failed with TypeError"),
    ],
)
def test_a_model_that_hands_out_the_same_network_twice_is_refused_once_per_problem(model, message):
    with pytest.raises(InvalidInput, match=message):
        problem(mine(model), never, train=5, test=5)


@pytest.mark.parametrize(
    "model",
    [
        net,
        lambda: copy.deepcopy(ONE),
        nn.Identity,  # nothing to share
        lambda: nn.LazyLinear(3),  # no memory yet
        lambda: nn.Sequential(*itertools.repeat(nn.Linear(2, 2), 3)),  # tied within itself
    ],
)
def test_fresh_models_pass_and_leave_the_random_state(model):
    before = torch.random.get_rng_state()
    assert fresh(model) is model
    assert torch.equal(before, torch.random.get_rng_state())


# --- test samples that were trained on --------------------------------------------------------------------------------


def test_shared_samples_are_counted_as_a_set_would():
    train, test = RNG.integers(0, 3, (40, 4)).astype(np.float32), RNG.integers(0, 3, (25, 4)).astype(np.float32)
    known = {tuple(row) for row in train.tolist()}
    assert shared_samples(train, test) == sum(tuple(row) in known for row in test.tolist()) > 0
    assert shared_samples(np.float32([[0.0]]), np.float32([[-0.0]])) == 1


@pytest.mark.parametrize("columns", [2, 4, 8])
def test_duplicates_of_independent_rows_are_not_refused(columns):
    """Tables of a few yes-or-no columns share most rows, whichever way they are split."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        rows = (rng.random((250, columns)) < 0.3).astype(np.float32)
        refuse_shared(rows[:200], rows[200:])


@pytest.mark.parametrize("tests", [4, 20, 1000])
def test_more_than_one_in_a_hundred_of_distinct_rows_is_refused(tests):
    rows = np.random.default_rng(0).random((2000, 3)).astype(np.float32)
    train, test = rows[:1000], rows[1000:][:tests].copy()
    allowed = next(k for k in range(tests + 1) if binom.sf(k, tests, 0.01) <= 1e-6)
    test[:allowed] = train[:allowed]
    refuse_shared(train, test)
    test[: allowed + 1] = train[: allowed + 1]
    with pytest.raises(InvalidInput, match=f"{allowed + 1} of {tests} test samples of mine are also training"):
        refuse_shared(train, test, "mine")


def test_a_workload_is_compared_as_a_whole_and_the_studys_own_data_are_never_refused():
    leaking = mine(test=X[:30])
    with pytest.raises(InvalidInput, match="30 of 30 test samples of mine"):
        problem(leaking, never, rng=np.random.default_rng(0), train=3, test=3)
    assert problem(None, lambda: leaking).shared == 30
    assert problem(leaking, never, test=0).shared == 0


@pytest.mark.parametrize("spec", ["digits", "mnist1d", "breast_cancer", "wine", "iris", "glyphs:easy16?n=500&test=300"])
def test_built_in_workloads_pass(spec):
    workload = load_workload(spec)
    shared = shared_samples(arrays(workload.train)[0], arrays(workload.test)[0])
    p = problem(workload, never)
    assert p.shared == shared == (spec == "iris")


def test_arrays_of_chosen_rows():
    data = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    for dataset in (data, Slow(X, Y)):
        np.testing.assert_array_equal(arrays(dataset, [5, 0, 5])[0], X[[5, 0, 5]])
        np.testing.assert_array_equal(arrays(dataset, 9)[1], Y[:9])
    with pytest.raises(InvalidInput, match="nothing is left"):
        arrays(data, [])
