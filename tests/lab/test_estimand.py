"""Estimands pick one number a seed and arm, refuse ambiguity, and describe themselves."""

import pickle

import numpy as np
import pandas as pd
import pytest

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.lab.claim import Claim, fingerprint
from mlcollage.lab.estimand import Difference, Level, PerSeed, Trend, one_value
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.run import Scale


def evidence(table: pd.DataFrame) -> Evidence:
    return Evidence("demo", Scale.QUICK, "digits", table)


@pytest.fixture
def curves() -> Evidence:
    """Arms a and b, seeds 0 to 2, steps 1 to 3, widths 8, 16, 32: value = 100 arm + 10 step + seed + width / 1000."""
    rows = [
        {
            "arm": arm,
            "seed": seed,
            "metric": "score",
            "step": step,
            "value": 100 * (arm == "a") + 10 * step + seed + width / 1000,
            "width": width,
        }
        for arm in "ab"
        for seed in (2, 0, 1)
        for step in (3, 1, 2)
        for width in (32, 8, 16)
    ]
    return evidence(pd.DataFrame(rows))


@pytest.mark.parametrize(
    ("at", "expected"), [("last", 30), ("first", 10), (2, 20), ("mean", 20), ("max", 30), ("min", 10)]
)
def test_difference_takes_the_step_it_is_told(curves, at, expected):
    table = Difference("score", "a", "b", at=at, where={"width": 8})(curves)
    assert table.columns.tolist() == ["a", "b"]
    assert (table.index.tolist(), table.index.name) == ([0, 1, 2], "seed")
    np.testing.assert_allclose(table["b"], expected + np.arange(3) + 0.008)
    np.testing.assert_allclose(table["a"] - table["b"], 100)


def test_difference_of_one_arm_under_two_conditions(curves):
    estimand = Difference("score", "a", "a", treatment_where={"width": 32}, control_where={"width": 8})
    table = estimand(curves)
    assert table.columns.tolist() == ["a, width=32", "a, width=8"]
    np.testing.assert_allclose(table.iloc[:, 0] - table.iloc[:, 1], 0.024)
    assert estimand.describe() == "score: a (width=32) − a (width=8), last step"
    with pytest.raises(InvalidInput, match="both 'a' under the same"):
        Difference("score", "a", "a")


def test_log_gives_log_ratios(curves):
    plain, log = (Difference("score", "a", "b", where={"width": 8}, log=log)(curves) for log in (False, True))
    np.testing.assert_allclose(log, np.log(plain))
    assert log.attrs == plain.attrs
    zero = evidence(curves.table.assign(value=0.0))
    with pytest.raises(InvalidInput, match="no logarithm"):
        Level("score", "a", where={"width": 8}, log=True)(zero)


def test_level_is_one_column(curves):
    table = Level("score", "b", at=1, where={"width": 16})(curves)
    assert table.columns.tolist() == ["b"]
    np.testing.assert_allclose(table["b"], 10.016 + np.arange(3))


def test_trend_over_a_column_sorts_its_levels(curves):
    table = Trend("score", over="width", arm="a")(curves)
    assert table.columns.tolist() == [8, 16, 32]
    np.testing.assert_allclose(table.loc[1], 131 + np.array([8, 16, 32]) / 1000)
    assert Trend("score", over="width", arm="a", levels=(32, 16, 8))(curves).columns.tolist() == [32, 16, 8]


def test_trend_over_steps_and_over_arms(curves):
    steps = Trend("score", over="step", arm="b", where={"width": 8})(curves)
    assert steps.columns.tolist() == [1, 2, 3]
    np.testing.assert_allclose(steps.loc[0], [10.008, 20.008, 30.008])
    more = evidence(pd.concat([curves.table, curves.table[curves.table["arm"] == "a"].assign(arm="c")]))
    assert Trend("score", over=["b", "c", "a"], where={"width": 8})(more).columns.tolist() == ["b", "c", "a"]


def test_trend_of_the_only_arm_needs_no_name(curves):
    only = evidence(curves.table[curves.table["arm"] == "b"])
    assert Trend("score", over="width")(only).shape == (3, 3)
    with pytest.raises(InvalidInput, match="has the arms a, b; name one"):
        Trend("score", over="width")(curves)


def test_a_seed_that_lacks_a_value_stays_as_nan(curves):
    t = curves.table
    table = Difference("score", "a", "b", where={"width": 8})(evidence(t[(t["arm"] == "a") | (t["seed"] != 1)]))
    assert np.isnan(table.loc[1, "b"])
    assert not np.isnan(table.loc[1, "a"])
    assert table.attrs["measured"] == {"a": (0, 1, 2), "b": (0, 2)}


def test_a_nan_at_any_step_shows_in_a_summary(curves):
    t = curves.table.copy()
    t.loc[(t["seed"] == 0) & (t["step"] == 2), "value"] = np.nan
    for at in ("mean", "max", "min"):
        assert np.isnan(Level("score", "a", at=at, where={"width": 8})(evidence(t)).loc[0, "a"])


def test_uneven_last_steps_are_noted(curves):
    t = curves.table
    table = Level("score", "a", where={"width": 8})(evidence(t[~((t["seed"] == 1) & (t["step"] == 3))]))
    assert table.attrs["notes"] == ["the last step of a is not the same in all seeds (2 to 3)"]
    np.testing.assert_allclose(table["a"], [130.008, 121.008, 132.008])


def test_several_rows_a_seed_are_refused_with_the_cause(curves):
    with pytest.raises(InvalidInput, match=r"3 rows for seed . at step .*They differ in width: fix it with where"):
        Difference("score", "a", "b")(curves)
    episodes = evidence(pd.concat([curves.table[curves.table["width"] == 8].drop(columns="width")] * 5))
    with pytest.raises(InvalidInput, match=r"5 rows for seed .* average them inside the run") as caught:
        Level("score", "a", at="mean")(episodes)
    assert "They differ" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Difference("loss", "a", "b"), "no metric 'loss' was measured; there are: score"),
        (lambda: Difference("score", "a", "z", where={"width": 8}), "no arm z; there are: a, b"),
        (lambda: Level("score", "a", where={"depth": 2}), "no column 'depth'"),
        (lambda: Level("score", "a", where={"width": 64}), "no row"),
        (lambda: Trend("score", over="depth", arm="a"), "no column 'depth'"),
    ],
)
def test_what_was_not_measured_is_named(curves, make, sentence):
    with pytest.raises(UnknownName, match=sentence):
        make()(curves)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Level("score", "a", at="final"), "must be a step"),
        (lambda: Level("score", "a", at=True), "must be a step"),
        (lambda: Level("score", "a", where={"arm": "b"}), "free columns, not 'arm'"),
        (lambda: Trend("score", over="value"), "must be a free column"),
        (lambda: Trend("score", over=("a", "b")), "at least 3"),
        (lambda: Trend("score", over=("a", "b", "a")), "at least 3 different"),
        (lambda: Trend("score", over=("a", "b", "c"), arm="a"), "neither arm nor levels"),
    ],
)
def test_malformed_estimands_are_refused_when_written(make, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        make()


def test_steps_and_levels_that_are_not_there(curves):
    with pytest.raises(InvalidInput, match="not measured at step 7"):
        Level("score", "a", at=7, where={"width": 8})(curves)
    with pytest.raises(InvalidInput, match="not measured at width=64"):
        Trend("score", over="width", arm="a", levels=(8, 16, 64))(curves)


def test_per_seed_gives_a_number_or_one_an_arm(curves):
    def spread(rows: pd.DataFrame) -> float:
        return rows["value"].max() - rows["value"].min()

    table = PerSeed(spread, "range of the score")(curves)
    np.testing.assert_allclose(table["value"], 120.024)

    def arms(rows: pd.DataFrame) -> dict[str, float]:
        return rows.groupby("arm")["value"].max().to_dict()

    assert PerSeed(arms, "best score")(curves).columns.tolist() == ["a", "b"]


def test_per_seed_asks_only_seeds_that_were_given_one_of_its_arms(curves):
    """An experiment may have fewer seeds than others of its study: the rest are not missing."""
    t = curves.table
    fewer = evidence(t[(t["arm"] == "b") | (t["seed"] != 1)])

    def first(rows: pd.DataFrame) -> float:
        return rows[rows["arm"] == "a"]["value"].iloc[0]

    table = PerSeed(first, "first score", ("a",))(fewer)
    assert 1 not in table.index
    assert table.notna().all().all()
    assert table.attrs["notes"] == []
    assert 1 in PerSeed(first, "first score", ("a", "b"))(fewer).index


def test_per_seed_reports_seeds_that_lack_something_and_raises_if_all_do(curves):
    t = curves.table

    def first(rows: pd.DataFrame) -> float:
        return rows[rows["arm"] == "a"]["value"].iloc[0]

    table = PerSeed(first, "first score")(evidence(t[(t["arm"] == "b") | (t["seed"] != 1)]))
    assert table.index[table["value"].isna()].tolist() == [1]
    assert "first score cannot be computed for seed 1: IndexError" in table.attrs["notes"][0]
    with pytest.raises(IndexError):
        PerSeed(first, "first score")(evidence(t[t["arm"] == "b"]))


def test_descriptions_tell_estimands_apart_and_make_the_fingerprint():
    estimands = [
        Difference("score", "a", "b"),
        Difference("score", "b", "a"),
        Difference("score", "a", "b", at=3),
        Difference("score", "a", "b", where={"width": 8}),
        Difference("score", "a", "b", log=True),
        Difference("score", "a", "b", treatment_where={"width": 8}),
        Level("score", "a"),
        Trend("score", over="width", arm="a"),
        Trend("score", over="width", arm="a", levels=(8, 16, 32)),
        Trend("score", over=("a", "b", "c")),
        PerSeed(lambda rows: 1.0, "one"),
        PerSeed(lambda rows: 2.0, "one"),
        PerSeed(lambda rows: 1.0, "uno"),
    ]
    prints = {fingerprint((Claim("C1", "a claim", "", "", e, "greater", 1.0),)) for e in estimands}
    assert len(prints) == len({e.describe() for e in estimands}) == len(estimands)


def test_estimands_are_values():
    a = Difference("score", "a", "b", where={"x": 1, "y": 2})
    assert a == Difference("score", "a", "b", where={"y": 2, "x": 1})
    assert hash(a) == hash(Difference("score", "a", "b", where={"y": 2, "x": 1}))
    assert pickle.loads(pickle.dumps(a)) == a  # noqa: S301 - our own bytes: estimands travel to worker processes


def test_one_value_is_exactly_one():
    rows = pd.DataFrame({"arm": ["net", "net", "other"], "metric": "score", "width": [8, 32, 8], "value": [1, 2, 3]})
    assert one_value(rows, "score", "net", width=32) == 2.0
    assert one_value(rows, "score", "other") == 3.0
    with pytest.raises(LookupError, match="2 values of score of net; one"):
        one_value(rows, "score", "net")
    with pytest.raises(LookupError, match="0 values of score of net where width=9; one"):
        one_value(rows, "score", "net", width=9)
