"""Effects of a claim on several workloads are pooled exactly, from what the store holds."""

import dataclasses
import json
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats as sps

from mlcollage import cli
from mlcollage.errors import InvalidInput
from mlcollage.lab.claim import Claim
from mlcollage.lab.estimand import Difference, Level, Trend
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.pool import draw_forest, pool, pool_claim
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.store import Store

CLAIM = Claim("C1", "A beats B", "A beats B.", "", Difference("m", "a", "b"), "greater", margin=0.1, unit="pts")


def evidence(columns: dict[str, np.ndarray]) -> Evidence:
    rows = [
        {"arm": arm, "seed": seed, "metric": "m", "step": 0, "value": v}
        for arm, values in columns.items()
        for seed, v in enumerate(values)
    ]
    return Evidence("demo", Scale.QUICK, "w", pd.DataFrame(rows, columns=["arm", "seed", "metric", "step", "value"]))


def with_effects(effects, sd: float, n: int, rng) -> dict[str, Evidence]:
    found = {}
    for k, effect in enumerate(effects):
        base = 5 * rng.normal(size=n)
        found[f"w{k}"] = evidence({"a": base + effect + sd * rng.normal(size=n), "b": base})
    return found


def test_pooled_effects_are_nearer_the_truth_and_intervals_hold_it():
    """Eight workloads of spread 1 around 2, standard errors of 1; over 40 repetitions."""
    rng = np.random.default_rng(0)
    alone, pooled, held, mu_held = [], [], [], []
    for _ in range(40):
        truth = rng.normal(2.0, 1.0, 8)
        p = pool_claim(CLAIM, with_effects(truth, 2.0, 4, rng))
        t = p.workloads
        alone.append(((t["estimate"] - truth) ** 2).mean())
        pooled.append(((t["shrunken"] - truth) ** 2).mean())
        held.append(((t["shrunken_low"] <= truth) & (truth <= t["shrunken_high"])).mean())
        mu_held.append(p.population[1] <= 2.0 <= p.population[2])
    assert np.mean(pooled) < 0.75 * np.mean(alone)
    assert np.mean(held) >= 0.88  # 94 % over 1,200 intervals; these are 320, eight at a time correlated
    assert np.mean(mu_held) >= 0.95 - 3 * np.sqrt(0.0475 / 40)


def test_given_the_spread_the_pooled_mean_is_the_precision_weighted_one():
    """Where tau is negligible, the population effect is the classical fixed-effect estimate."""
    rng = np.random.default_rng(1)
    data = {**with_effects([1.0], 0.01, 50, rng), "wide": with_effects([1.0], 3.0, 50, rng)["w0"]}
    p = pool_claim(dataclasses.replace(CLAIM, margin=1.0), data)
    precise, wide = p.workloads["shrunken"]
    assert precise == pytest.approx(1.0, abs=0.01)
    assert abs(wide - 1.0) < abs(p.workloads.loc["wide", "estimate"] - 1.0)
    assert p.tau[1] >= 0


def test_the_standard_error_is_as_wide_as_students_interval():
    x = np.array([1.0, 2.0, 4.0])
    p = pool_claim(dataclasses.replace(CLAIM, estimand=Level("m", "a")), {k: evidence({"a": x}) for k in "uv"})
    row = p.workloads.iloc[0]
    low, high = sps.t.interval(0.95, 2, x.mean(), sps.sem(x))
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert row["se"] * sps.norm.ppf(0.975) == pytest.approx((high - low) / 2)
    assert (row["seeds"], row["estimate"]) == (3, pytest.approx(x.mean()))


def test_effects_are_counted_from_the_reference_value():
    """Moving data and reference by the same amount moves everything that is a level, and no probability."""
    rng = np.random.default_rng(2)
    values = {f"w{k}": rng.normal(0.1 * k, 0.2, 6) for k in range(4)}
    for direction in ("at_least", "at_most", "within", "greater", "less"):
        claim = dataclasses.replace(CLAIM, estimand=Level("m", "a"), direction=direction)
        here = pool_claim(claim, {k: evidence({"a": v}) for k, v in values.items()})
        moved = dataclasses.replace(claim, null=7.0)
        there = pool_claim(moved, {k: evidence({"a": v + 7.0}) for k, v in values.items()})
        np.testing.assert_allclose(there.population, np.add(here.population, 7.0))
        np.testing.assert_allclose(there.tau, here.tau)
        assert there.probability == pytest.approx(here.probability)
        np.testing.assert_allclose(there.workloads["shrunken"], here.workloads["shrunken"] + 7.0)
    assert pool_claim(dataclasses.replace(claim, direction="less"), {
        k: evidence({"a": v - 3.0}) for k, v in values.items()
    }).probability > 0.99  # fmt: skip


def test_unpaired_arms_and_trends_have_effects_too():
    rng = np.random.default_rng(3)
    unpaired = dataclasses.replace(CLAIM, paired=False)
    data = {k: evidence({"a": rng.normal(1.0, 1, 6), "b": rng.normal(0, 2, 9)}) for k in "uv"}
    row = pool_claim(unpaired, data).workloads.iloc[0]
    table = data["u"].table
    a, b = (table.loc[table["arm"] == arm, "value"] for arm in "ab")
    assert (row["low"], row["high"]) == pytest.approx(sps.ttest_ind(a, b, equal_var=False).confidence_interval(0.95))
    assert row["seeds"] == 6
    trend = dataclasses.replace(CLAIM, estimand=Trend("m", over=("a", "b", "c")), test="trend")
    data = {k: evidence({arm: i + rng.normal(size=8) for i, arm in enumerate("abc")}) for k in "uv"}
    p = pool_claim(trend, data)
    levels = data["u"].table.pivot(index="seed", columns="arm", values="value")
    rho = [sps.spearmanr([0, 1, 2], row).statistic for row in levels.to_numpy()]
    assert p.workloads.loc["u", "estimate"] == pytest.approx(np.mean(rho))


def test_workloads_without_an_effect_or_an_error_are_left_out_with_the_reason():
    rng = np.random.default_rng(4)
    data = with_effects([1.0, 1.2], 0.5, 5, rng)
    data["one"] = evidence({"a": np.array([1.0]), "b": np.array([0.0])})
    data["equal"] = evidence({"a": np.ones(4), "b": np.zeros(4)})
    data["other"] = evidence({"z": np.ones(4)})
    p = pool_claim(CLAIM, data)
    assert list(p.workloads.index) == ["w0", "w1"]
    assert "1 seed with all values" in p.left_out["one"]
    assert "agree" in p.left_out["equal"]
    assert "has no arm a" in p.left_out["other"]
    alone = pool_claim(CLAIM, {k: data[k] for k in ("w0", "equal")})
    assert (alone.population, alone.tau, alone.probability) == (None, None, None)
    assert alone.workloads["shrunken"].isna().all()
    json.dumps(alone.to_dict(), allow_nan=False)


# --- from the store, and on the command line --------------------------------------------------------------------------

STUDY = """
import numpy as np

CLAIMS = (
    Claim("C1", "Positive", "It is positive.", "", Level("value", "ok"), "greater", margin=0.5, factor=100, unit="%"),
    Claim("C2", "One", "It is one.", "here", Level("one", "ok"), "within", null=1.0, margin=0.5, test="exact"),
    Claim("C3", "Later", "Needs a GPU.", "there", Level("value", "ok"), "greater", margin=1, from_scale="full"),
)


def probe(task):
    measured = Measurements()
    classes = task.settings.classes
    measured.add("value", (classes or 1.0) + np.random.default_rng([task.seed, classes]).normal())
    measured.add("one", 1.0)
    return measured
"""


@pytest.fixture
def study(probe, monkeypatch):
    monkeypatch.setenv("PROBE_SEEDS", "4")
    file = probe / "probe_paper" / "study.py"
    file.write_text(file.read_text() + STUDY)
    return probe


def call(monkeypatch, capfd, *words) -> tuple[int, str, str]:
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["mlcollage", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capfd.readouterr()
    return int(end.value.code or 0), out, err


def test_a_study_run_on_three_workloads_is_pooled_on_the_command_line(study, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capfd, "pool", "probe")
    assert code == 2
    assert "holds results of none" in err
    call(monkeypatch, capfd, "run", "probe")
    assert "only of default" in call(monkeypatch, capfd, "pool", "probe")[2]
    for workload in ("iris", "digits"):
        assert call(monkeypatch, capfd, "run", "probe", "--workload", workload)[0] == 0
    code, out, _ = call(monkeypatch, capfd, "pool", "probe", "--json")
    (claim,) = json.loads(out)
    assert (code, claim["id"]) == (0, "C1")
    assert [w["workload"].split("@")[0] for w in claim["workloads"]] == ["default", "digits", "iris"]
    truth = dict(zip(("default", "digits", "iris"), (1.0, 10.0, 3.0), strict=True))
    for row, effect in zip(claim["workloads"], truth.values(), strict=True):
        assert row["low"] <= effect <= row["high"]
        assert row["seeds"] == 4
    code, out, _ = call(monkeypatch, capfd, "pool", "probe", "--out", "pictures/forest.svg")
    assert "C1 · Positive" in out
    assert "all workloads: " in out
    assert "between workloads: sd" in out
    assert (tmp_path / "pictures" / "forest.svg").read_text().count("<svg") == 1
    assert "must end in .svg, .png, .pdf" in call(monkeypatch, capfd, "pool", "probe", "-o", "forest.gif")[2]
    assert "nothing to pool" in call(monkeypatch, capfd, "pool", "probe", "--scale", "smoke")[2]


def test_other_scales_and_versions_are_left_alone(study, tmp_path):
    store = Store(tmp_path / "s")
    rng = np.random.default_rng(5)

    def commit(**identity):
        for seed in range(4):
            measured = Measurements()
            measured.add("value", rng.normal())
            store.commit(Run("probe", "probe", "ok", seed, {}, **identity), measured, {})

    commit(workload="u")
    commit(workload="v", version=2)
    commit(workload="w", scale=Scale.FULL)
    with pytest.raises(InvalidInput, match="only of u"):
        pool("probe", store=store)
    commit(workload="x")
    (found,) = pool("probe", store=store)
    assert list(found.workloads.index) == ["u", "x"]


def test_a_forest_needs_something_pooled(tmp_path):
    data = with_effects([1.0], 0.5, 5, np.random.default_rng(6))
    with pytest.raises(InvalidInput, match="nothing to draw"):
        draw_forest([pool_claim(CLAIM, data)], tmp_path / "forest.png")
