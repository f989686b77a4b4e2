"""Pipelines: the space, tables of every kind, and steps that are one fit."""

import datetime
import decimal
import json
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
from sklearn.preprocessing import StandardScaler

from mlcollage.errors import InvalidInput
from mlcollage.papers.autosklearn2 import IterativePipeline, Policy, pipeline_space
from mlcollage.papers.autosklearn2.columns import TableCoder
from mlcollage.papers.autosklearn2.evaluation import evaluate_steps, make_splits, validation_rows
from mlcollage.papers.autosklearn2.measuring import candidates, main, measure
from mlcollage.papers.autosklearn2.rows import TableRows
from mlcollage.papers.autosklearn2.space import config_id
from mlcollage.papers.autosklearn2.tasks import FAMILIES, make_task
from mlcollage.papers.autosklearn2.tensor import PerformanceTensor

SPACE = pipeline_space()
LEARNERS = SPACE["learner"].choices


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 4))
    return TableRows(X, rng.integers(0, 4, size=(120, 2))), (X[:, 0] + X[:, 1] ** 2 > 0.8).astype(np.int64)


def one(learner, kind="classification", **changes):
    space = pipeline_space(kind).only([learner])
    return space._complete({**space.default(), **changes})


@pytest.mark.parametrize("learner", LEARNERS)
def test_doubling_is_one_fit(table, learner):
    rows, y = table
    config = one(learner)
    steps, once = (IterativePipeline(config, "classification", 2, 3).start(rows, y) for _ in range(2))
    for k in (2, 4, 8, 16):
        steps.advance(k)
    if learner in ("sgd", "passive_aggressive"):  # they look whether to stop once a step
        for k in (2, 4, 8):
            once.advance(k)
    np.testing.assert_array_equal(steps.predict(rows), once.advance(16).predict(rows))


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_every_configuration_fits_and_predicts(table, kind):
    rows, y = table
    space, rng = pipeline_space(kind), np.random.default_rng(1)
    numbers = rows.numbers.copy()
    numbers[::7, 1] = np.nan
    rows = TableRows(numbers, rows.codes)
    for _ in range(25):
        config = space.sample(rng)
        p = (
            IterativePipeline(config, kind, 2, 0)
            .start(rows, y if kind == "classification" else numbers[:, 0])
            .advance(4)
        )
        found = p.predict(rows)
        assert np.isfinite(found).all()
        if kind == "classification":
            np.testing.assert_allclose(found.sum(1), 1)


def test_the_space_is_a_bijection_to_the_unit_cube_and_refuses_what_is_not_in_it():
    rng = np.random.default_rng(0)
    for _ in range(50):
        config = SPACE.sample(rng)
        assert SPACE.check(config) == config
        vector = SPACE.vector(config)
        assert ((vector >= 0) & (vector <= 1) | (vector == -1)).all()
        for other in SPACE.neighbors(config, rng):
            SPACE.check(other)
    with pytest.raises(InvalidInput, match="the key 'depth' = 3, which is not in the search space"):
        SPACE.check({"depth": 3})
    with pytest.raises(InvalidInput, match="'sgd:alpha', which has a meaning only where 'learner'"):
        SPACE.check({"learner": "mlp", "sgd:alpha": 0.01})
    with pytest.raises(InvalidInput, match="no learner 'svm'"):
        SPACE.only(["svm"])
    assert "gradient_boosting" not in pipeline_space(sparse=True)["learner"].choices


def test_probabilities_of_classes_that_were_not_seen_are_zero(table):
    rows, y = table
    p = IterativePipeline(one("extra_trees"), "classification", 3).start(rows, 2 * y).advance(8).predict(rows)
    assert p.shape == (120, 3)
    assert (p[:, 1] == 0).all()
    constant = IterativePipeline(one("mlp"), "classification", 3).start(rows, np.ones(120, int)).advance(2)
    assert constant.predict(rows)[:, 1].tolist() == [1.0] * 120


def test_scaling_and_weights_are_what_they_say(table):
    rows, y = table
    p = IterativePipeline(one("sgd", rescaling="standardize", encoding="none"), "classification", 2).start(rows, y)
    expected = StandardScaler().fit_transform(rows.numbers)
    np.testing.assert_allclose(p.preparation.transform(rows)[:, :4], expected)
    # TableRows of weight 2 count as two rows, rows of weight 0 as none (a forest of deep trees without bootstrap).
    config = one("extra_trees", **{"extra_trees:min_samples_leaf": 1})
    w = (np.arange(120) % 2).astype(float)
    a = IterativePipeline(config, "classification", 2).start(rows, y, w).advance(64).predict(rows)
    assert (a[w > 0].argmax(1) == y[w > 0]).all()


def test_the_same_values_are_the_same_rows_whatever_their_type():
    text = ["b", "a", None, "b"]
    frames = [pd.DataFrame({"c": pd.Series(text, dtype=t)}) for t in ("object", "str", "string", "category")]
    frames.append(pd.DataFrame({"c": pd.Series(text, dtype=pd.CategoricalDtype(["z", "b", "a"], ordered=True))}))
    for frame in frames:
        assert TableCoder().fit(frame).transform(frame).codes.ravel().tolist() == [2, 1, 0, 2]
    numbers = [1, None, 3, 2]
    for dtype in ("float64", "Int64", "Float64", "object", "float64[pyarrow]"):
        frame = pd.DataFrame({"n": pd.Series(numbers, dtype=dtype)})
        np.testing.assert_array_equal(TableCoder().fit(frame).transform(frame).numbers.ravel(), [1, np.nan, 3, 2])
    exact = pd.DataFrame({"n": [decimal.Decimal("1.5"), decimal.Decimal(2)]})
    assert TableCoder().fit(exact).transform(exact).numbers.ravel().tolist() == [1.5, 2.0]


def test_categories_are_known_by_value_not_by_code():
    train = pd.DataFrame({"c": pd.Categorical(["a", "b", "c"] * 10), "k": [1, 2, 3] * 10})
    coder = TableCoder(categorical=["k"]).fit(train)
    later = pd.DataFrame({"k": [3.0, 2.0], "c": pd.Categorical(["c", "b"])})  # another order, floats, fewer levels
    assert coder.transform(later).codes.tolist() == [[3, 3], [2, 2]]
    with pytest.warns(UserWarning, match="'c' has 1 values that were not seen"):
        assert coder.transform(pd.DataFrame({"c": ["q"], "k": [1]})).codes.tolist() == [[-1, 1]]
    with pytest.raises(InvalidInput, match="lacks the column 'k'"):
        coder.transform(train[["c"]])


def test_dates_have_one_unit_and_gaps_are_missing():
    days = [datetime.datetime(2020, 1, 1), None, datetime.datetime(2020, 1, 3)]
    found = []
    for unit in ("s", "us", "ns"):
        frame = pd.DataFrame({"d": pd.Series(days, dtype=f"datetime64[{unit}]"), "x": [1.0, 2, 3]})
        found.append(TableCoder().fit(frame).transform(frame).numbers)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert found[0][2, 0] - found[0][0, 0] == 2
    assert np.isnan(found[0][1, :4]).all()


def test_text_that_is_numbers_is_read_so_only_without_loss():
    frame = pd.DataFrame({"a": ["1", "?", "2.5"], "zip": ["007", "7", "08"], "t": ["1,234", "5", "6"]})
    coder = TableCoder().fit(frame)
    assert [c.kind for c in coder.columns_] == ["number", "category", "category"]
    assert coder.notes_ == ["the column 'a' holds numbers as text; they are read as numbers."]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"c": [[1], [2]]}), "the column 'c' of X holds lists in its cells"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "more than one column called 'a'"),
        (pd.DataFrame({"a": [np.nan, np.nan]}), "no column of X can be used"),
        (pd.DataFrame([[1]], columns=pd.MultiIndex.from_tuples([("a", "b")])), "columns of several levels"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(frame, message):
    with pytest.raises(InvalidInput, match=message):
        TableCoder().fit(frame)
    with pytest.raises(InvalidInput, match="infinity: 1 values of the column 'a'"):
        TableCoder().fit(pd.DataFrame({"a": [1.0, 2.0]})).transform(pd.DataFrame({"a": [np.inf, 1]}))


_DAYS = pd.date_range("2020-02-27", periods=5)


@pytest.mark.parametrize(
    "dates",
    [
        _DAYS,
        _DAYS.astype("datetime64[s]"),
        list(_DAYS.date),
        list(_DAYS.astype(object)),
        [str(d) for d in _DAYS.date],
        [f"{d}T02:00:00+02:00" for d in _DAYS.date],
        _DAYS.to_period("D"),
        pd.Series(_DAYS.date, dtype="date32[pyarrow]"),
        pa.array(_DAYS.date).to_pandas(),
    ],
)
def test_the_same_dates_are_the_same_numbers_whatever_their_type(dates):
    known = TableCoder().fit(pd.DataFrame({"d": _DAYS}))
    coder = TableCoder().fit(pd.DataFrame({"d": dates}))
    for one in (known, coder):
        rows = one.transform(pd.DataFrame({"d": dates}))
        expected = [[18319.0 + i, d.month, d.weekday(), 0] for i, d in enumerate(_DAYS.date)]
        np.testing.assert_allclose(rows.numbers, expected)
    assert any("rows are in the order of the column 'd'" in note for note in coder.notes_)
    gone = coder.transform(pd.DataFrame({"d": [None] * 5}))
    assert np.isnan(gone.numbers).all()


def test_other_values_than_at_fit_are_refused():
    dates, spans = pd.DataFrame({"d": _DAYS}), pd.DataFrame({"d": pd.to_timedelta(range(5), unit="h")})
    for other in (range(5), ["x"] * 5):
        with pytest.raises(InvalidInput, match="'d' held dates at fit"):
            TableCoder().fit(dates).transform(pd.DataFrame({"d": other}))
        with pytest.raises(InvalidInput, match="'d' held durations at fit"):
            TableCoder().fit(spans).transform(pd.DataFrame({"d": other}))
    assert TableCoder().fit(pd.DataFrame({"d": ["2020-02-30", "2020-01-01"]})).columns_[0].kind == "category"


def test_columns_with_numbers_as_names_are_found_by_name_in_tables_and_by_place_in_arrays():
    coder = TableCoder().fit(pd.DataFrame({1: [1.0, 2.0], 0: [3.0, 4.0]}))
    by_name = coder.transform(pd.DataFrame({0: [3.0, 4.0], 1: [1.0, 2.0]}))
    by_place = coder.transform(np.array([[1.0, 3.0], [2.0, 4.0]]))
    np.testing.assert_array_equal(by_name.numbers, [[1, 3], [2, 4]])
    np.testing.assert_array_equal(by_place.numbers, [[1, 3], [2, 4]])
    with pytest.raises(InvalidInput, match="more than one column called 1"):
        coder.transform(pd.DataFrame([[1.0, 2.0, 3.0]], columns=[1, 0, 1]))


def test_large_whole_numbers_are_different_categories():
    values = np.array([2**62, 2**62 + 1, 10**18])
    coder = TableCoder(["k"]).fit(pd.DataFrame({"k": values}))
    assert len(coder.columns_[0].levels) == 3
    huge = pd.DataFrame({"k": pd.Series([10**400, 10**400 + 1], dtype=object)})
    assert len(TableCoder(["k"]).fit(huge).columns_[0].levels) == 2
    with pytest.raises(InvalidInput, match="'k' held numbers at fit"):
        TableCoder().fit(huge).transform(huge)


def test_many_levels_do_not_fill_the_memory():
    frame = pd.DataFrame({"c": [f"v{i % 400}" for i in range(1200)], "x": np.arange(1200.0)})
    rows = TableCoder().fit(frame).transform(frame)
    p = IterativePipeline(one("gradient_boosting", coalescence="none"), "classification", 2).start(
        rows, np.arange(1200) % 2
    )
    assert p.preparation.transform(rows).shape[1] <= 1 + 256


def test_splits_keep_groups_copies_and_rare_classes():
    y = np.array([0] * 30 + [1] * 29 + [2])
    for policy in (Policy(), Policy("cv", 5)):
        splits = make_splits(policy, y, "classification")
        assert all(2 in y[train] for train, _ in splits)
        groups = np.arange(60) // 4
        for train, valid in make_splits(policy, y, "classification", groups=groups):
            assert not set(groups[train]) & set(groups[valid])
        for train, valid in make_splits(policy, y, "regression", groups=groups):
            assert not set(groups[train]) & set(groups[valid])
    assert len(validation_rows(make_splits(Policy("cv", 5), y, "classification"))) == 59  # the single row trains only
    with pytest.raises(InvalidInput, match="there are 2 groups, and 5-fold CV"):
        make_splits(Policy("cv", 5), y, "classification", groups=np.arange(60) % 2)


def test_a_step_that_is_half_done_is_not_given(table):
    rows, y = table
    splits, asked = make_splits(Policy("cv", 3), y, "classification"), []

    def go_on():
        asked.append(1)
        return len(asked) <= 8  # 3 starts, 3 folds of the first step, 2 of the second

    steps = evaluate_steps(SPACE.default(), "classification", rows, y, splits, n_classes=2, go_on=go_on)
    assert [s.iterations for s in steps] == [2]


def test_sparse_rows_are_used_as_they_are(table):
    _, y = table
    X = sp.random(120, 30, 0.2, "csr", rng=0)
    config = pipeline_space(sparse=True).only(["sgd"]).default()
    assert IterativePipeline(config, "classification", 2).start(TableRows.of(X), y).advance(4).predict(
        TableRows.of(X)
    ).shape == (
        120,
        2,
    )


def test_tasks_are_the_same_each_time_and_differ():
    for family in FAMILIES:
        a, b = make_task(f"{family}-1", most_rows=250), make_task(f"{family}-1", most_rows=250)
        np.testing.assert_array_equal(a.rows.numbers, b.rows.numbers)
        assert len(np.unique(a.y)) == a.n_classes >= 2
    assert make_task("graph-1").meta_features != make_task("graph-2").meta_features


def test_measuring_resumes_and_a_tensor_in_the_making_can_be_used(tmp_path):
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure(tmp_path, tasks=2, count=4, most_rows=200, seconds=0.2, say=said.append)
        measure(tmp_path, tasks=2, count=4, most_rows=200, seconds=0.2, say=said.append)
    assert len(said) == 2
    named = {config_id(c): c for c in candidates(4)}
    tensor = PerformanceTensor.from_folder(tmp_path, named, 32)
    assert tensor.shape[:2] == (2, 4)
    assert tensor.measured == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = ["--tasks", "3", "--candidates", "4", "--most-rows", "200", "--seconds", "5"]
        tensor.of_tasks([0]).save(tmp_path / "known.tensor")
        again = tmp_path / "again"
        main([str(again), *one, "--known", str(tmp_path / "known.tensor")])
        assert sorted(f.stem for f in again.glob("*.parquet")) == ["friedman-0", "graph-0"]
        main([str(again), *one, "--known", str(tmp_path / "known.tensor"), "--gather", str(tmp_path / "all.tensor")])
    both = PerformanceTensor.load(tmp_path / "all.tensor")
    assert list(both.tasks) == ["clusters-0", "friedman-0", "graph-0"]
    np.testing.assert_array_equal(both.valid[0], tensor.valid[0])
    assert list(json.loads((tmp_path / "portfolios.json").read_text())) == ["full", "sh"]
    more = PerformanceTensor.from_folder(tmp_path, {config_id(c): c for c in candidates(6)}, 32)
    assert more.measured < 1
    assert len(candidates()) == 120
