"""Two methods on several data sets: every number against one computed by hand, and what a table may look like."""

import numpy as np
import pandas as pd
import pytest

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.lab import Claim, Difference, Status, compare, judge_table
from mlcollage.stats.adaptive import holm
from mlcollage.stats.bootstrap import t_interval
from mlcollage.stats.causal import sign_flip_test, t_test

SETS = ("digits", "wine", "iris", "yeast")
EFFECTS = (0.03, 0.02, 0.0, -0.03)


def rows(seeds=6, noise=0.005, sets=SETS, effects=EFFECTS) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    found = []
    for name, effect in zip(sets, effects, strict=True):
        base = 0.8 + 0.05 * rng.normal(size=seeds)
        for seed in range(seeds):
            found.append((name, "old", seed, base[seed]))
            found.append((name, "new", seed, base[seed] + effect + noise * rng.normal()))
    return pd.DataFrame(found, columns=["dataset", "method", "seed", "value"])


def differences(df: pd.DataFrame, name: str) -> np.ndarray:
    wide = df[df["dataset"] == name].pivot(index="seed", columns="method", values="value")
    return (wide["new"] - wide["old"]).to_numpy()


def test_each_data_set_has_its_paired_test_and_holms_correction():
    df = rows()
    found = compare(df, treatment="new", control="old")
    d = [differences(df, name) for name in SETS]
    p = [t_test(x) for x in d]
    assert found.table["effect"].tolist() == pytest.approx([x.mean() for x in d])
    assert found.table[["low", "high"]].to_numpy() == pytest.approx(np.array([t_interval(x) for x in d]))
    assert found.table["p_value"].tolist() == pytest.approx(p)
    assert found.table["p_holm"].tolist() == pytest.approx(holm(p).tolist())
    assert found.table["verdict"].tolist() == ["better", "better", "open", "worse"]
    assert found.table["seeds"].tolist() == [6] * 4
    means = df.groupby(["dataset", "method"])["value"].mean()
    assert found.table.loc["wine", "control"] == pytest.approx(means["wine", "old"])


def test_the_data_set_is_the_unit_of_the_whole():
    df = rows()
    found = compare(df, treatment="new", control="old")
    effects = np.array([differences(df, name).mean() for name in SETS])
    assert found.over_sets == pytest.approx((effects.mean(), *t_interval(effects)))
    assert found.p_value == sign_flip_test(effects)
    assert found.wins == int((effects > 0).sum())
    low, high = found.pooled.next_workload
    assert low < found.pooled.population[1] < found.pooled.population[2] < high
    assert 0.5 < found.pooled.next_probability < found.pooled.probability < 1
    shrunken = found.table["shrunken"]
    assert (abs(shrunken - effects.mean()) < abs(effects - effects.mean()) + 1e-3).all()


def test_the_answer_reads_as_text_and_draws():
    found = compare(rows(), treatment="new", control="old", factor=100, unit="pts", digits=1)
    text = str(found)
    assert text.splitlines()[0] == "new against old, paired by seed"
    assert "better (6 seeds, p =" in text
    assert "of 4 data sets: ahead on" in text
    assert "the next data set: [" in text
    ax = found.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == list(SETS)
    assert ax.get_xlabel() == "new − old (pts)"


def test_lower_may_be_better_and_a_margin_can_be_ruled_out():
    df = rows()
    df["value"] = 1 - df["value"]
    errors = compare(df, treatment="new", control="old", higher_is_better=False)
    assert errors.table["verdict"].tolist() == ["better", "better", "open", "worse"]
    assert errors.table["p_value"].tolist() == pytest.approx(
        compare(rows(), treatment="new", control="old").table["p_value"].tolist()
    )
    assert errors.p_value == compare(rows(), treatment="new", control="old").p_value
    with_margin = compare(rows(), treatment="new", control="old", margin=0.015)
    assert with_margin.table["verdict"].tolist() == ["better", "better", "not by the margin", "not by the margin"]


def test_wide_tables_and_other_names_give_the_same():
    df = rows()
    long = compare(df, treatment="new", control="old").table
    wide = df.pivot(index=["dataset", "seed"], columns="method", values="value").reset_index()
    pd.testing.assert_frame_equal(compare(wide, treatment="new", control="old").table.loc[long.index], long)
    renamed = df.rename(columns={"dataset": "task", "seed": "run", "method": "model", "value": "score"})
    other = compare(renamed, treatment="new", control="old", by="task", seed="run", value="score")
    pd.testing.assert_frame_equal(other.table.rename_axis("dataset"), long)
    df["metric"] = "accuracy"
    loss = df.assign(metric="loss", value=1.0)
    both = compare(pd.concat([df, loss]), treatment="new", control="old", metric="accuracy")
    pd.testing.assert_frame_equal(both.table, long)
    with pytest.raises(InvalidInput, match="name one with metric"):
        compare(pd.concat([df, loss]), treatment="new", control="old")


def test_failed_runs_count_against_their_data_set_and_copies_once():
    df = rows()
    clean = compare(df, treatment="new", control="old")
    df.loc[(df["dataset"] == "wine") & (df["method"] == "new") & (df["seed"] > 1), "value"] = np.nan
    found = compare(df, treatment="new", control="old")
    assert found.table.loc["wine", "verdict"] == "open"
    assert found.table.loc["wine", "seeds"] == 2
    assert found.table.loc["digits", "effect"] == clean.table.loc["digits", "effect"]
    assert any(name == "wine" and "4 seeds without a value" in text for name, text in found.notes)
    absent = compare(df.dropna(), treatment="new", control="old")  # rows that are not there are no better
    assert absent.table.loc["wine", "p_value"] == found.table.loc["wine", "p_value"]
    copied = rows()
    copied = pd.concat([copied, copied[copied["dataset"] == "iris"].assign(seed=lambda t: t["seed"] + 6)])
    again = compare(copied, treatment="new", control="old")
    assert again.table.loc["iris", "seeds"] == 6
    assert "counted once" in str(again)


def test_one_seed_per_data_set_leaves_the_test_over_data_sets():
    df = rows(seeds=1)
    found = compare(df, treatment="new", control="old")
    assert found.table["verdict"].tolist() == ["open"] * 4
    assert found.p_value == sign_flip_test([differences(df, name)[0] for name in SETS])
    assert "variance not identifiable" in str(found)
    found.plot()


def test_one_data_set_is_a_comparison_too():
    df = rows(sets=("digits",), effects=(0.03,))
    found = compare(df.drop(columns="dataset"), treatment="new", control="old", by=None)
    assert found.table["verdict"].tolist() == ["better"]
    assert (found.pooled, found.over_sets, found.p_value) == (None, None, None)
    assert "next data set" not in str(found)
    found.plot()


@pytest.mark.parametrize(
    ("change", "kw", "error", "sentence"),
    [
        (lambda t: t, {"treatment": "newer"}, InvalidInput, "no column holds both 'newer' and 'old'"),
        (lambda t: t, {"treatment": "newer", "arm": "method"}, UnknownName, "there are: old, new"),
        (lambda t: t, {"treatment": "old"}, InvalidInput, "both 'old'"),
        (lambda t: t, {"by": "task"}, UnknownName, "no column task; there are: dataset, method, seed, value"),
        (lambda t: t, {"by": None}, InvalidInput, "rows for seed 0"),
        (lambda t: t, {"margin": -1.0}, InvalidInput, "margin must be a finite number above 0"),
        (lambda t: pd.concat([t, t]), {}, InvalidInput, "has 2 rows for seed 0 of digits"),
        (lambda t: t.assign(value="high"), {}, InvalidInput, "column 'value' must hold numbers"),
        (lambda t: t[(t["method"] == "old") | (t["dataset"] != "wine")], {}, InvalidInput, "wine has one of the two"),
        (lambda t: t.assign(seed=None), {}, InvalidInput, "row 0 has no 'seed'; every row needs one"),
        (lambda t: t.assign(dataset=t["dataset"].replace("wine", np.nan)), {}, InvalidInput, "row 12 has no 'dataset'"),
        (lambda t: t.assign(dataset=t["dataset"].replace("wine", "")), {}, InvalidInput, "row 12 has no 'dataset'"),
        (lambda t: t.assign(seed=["0", *t["seed"][1:]]), {}, InvalidInput, "numbers and the text '0'"),
        (lambda t: t.assign(value=t["value"] + 1j), {}, InvalidInput, "column 'value' must hold numbers"),
        (lambda t: t.assign(value=pd.Timestamp("2026-01-01")), {}, InvalidInput, "column 'value' must hold numbers"),
        (lambda t: pd.concat([t, t[["value"]]], axis=1), {}, InvalidInput, "2 columns called 'value'"),
        (lambda t: t.set_index(["dataset", "seed"]), {}, UnknownName, r"Call df.reset_index\(\) first"),
        (lambda t: t.to_dict("list"), {}, InvalidInput, "the table is a dict; expected a pandas DataFrame"),
        (lambda t: t, {"by": ["dataset"]}, UnknownName, "no column"),
        (lambda t: t, {"factor": 0}, InvalidInput, "factor of claim digits must be a finite number above 0"),
        (lambda t: t, {"digits": -1}, InvalidInput, "digits of claim digits must be a whole number"),
        (lambda t: t, {"unit": None}, InvalidInput, "unit of claim 'digits' must be a str"),
        (lambda t: t, {"paired": "no"}, InvalidInput, "paired of claim 'digits' must be a bool"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change, kw, error, sentence):
    with pytest.raises(error, match=sentence):
        compare(change(rows()), **{"treatment": "new", "control": "old", **kw})


# --- claims about one's own table --------------------------------------------------------------------------------


def test_judge_table_gives_the_judges_verdicts():
    df = rows(sets=("digits",), effects=(0.03,)).rename(columns={"method": "arm"}).assign(metric="accuracy")
    claims = [
        Claim("C1", "new beats old", "", "", Difference("accuracy", "new", "old"), "greater", margin=0.01),
        Claim("C2", "old beats new", "", "", Difference("accuracy", "old", "new"), "greater", margin=0.01),
    ]
    verdicts = judge_table(df, claims)
    assert [v.status for v in verdicts.values()] == [Status.SUPPORTED, Status.CONTRADICTED]
    d = differences(df.rename(columns={"arm": "method"}), "digits")
    assert verdicts["C1"].p_value == pytest.approx(t_test(d))
    assert verdicts["C1"].interval == pytest.approx(t_interval(d))
    with pytest.raises(UnknownName, match="no column metric"):
        judge_table(df.drop(columns="metric"), claims)
    with pytest.raises(InvalidInput, match="must hold numbers; row 0 has 'x'"):
        judge_table(df.assign(value="x"), claims)
    with pytest.raises(InvalidInput, match="row 0 has no 'arm'"):
        judge_table(df.assign(arm=None), claims)
    # A generator of claims was used up by their check, and nothing was judged.
    assert judge_table(df, (c for c in claims)) == verdicts
    assert judge_table(df, claims[0])["C1"].estimate == verdicts["C1"].estimate
    with pytest.raises(InvalidInput, match="'C1' is no claim"):
        judge_table(df, ["C1"])


def test_steps_are_numbers():
    df = rows(sets=("digits",), effects=(0.03,)).rename(columns={"method": "arm"}).assign(metric="accuracy", step=9)
    last = df.assign(step=10, value=df["value"] + np.where(df["arm"] == "new", -0.1, 0.0))
    claim = Claim("C1", "new beats old", "", "", Difference("accuracy", "new", "old"), "greater", margin=0.01)
    steps = pd.concat([df, last], ignore_index=True)
    verdict = judge_table(steps, [claim])["C1"]
    # As words, step 10 came before step 9, and 9 was taken for the last.
    assert judge_table(steps.astype({"step": str}), [claim])["C1"] == verdict
    assert verdict.estimate == pytest.approx(differences(df.rename(columns={"arm": "method"}), "digits").mean() - 0.1)
    for step, sentence in ((None, "row 0 has no 'step'"), ("end", "column 'step' must hold numbers; row 0 has 'end'")):
        with pytest.raises(InvalidInput, match=sentence):
            judge_table(steps.assign(step=step), [claim])
