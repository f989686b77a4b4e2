"""Seeds are added where a verdict is open, and looking at the results as often as one likes makes no more errors."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from mlcollage.errors import InvalidInput
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.claim import Claim, Status, fingerprint
from mlcollage.lab.estimand import Difference, Level, PerSeed, Trend
from mlcollage.lab.evidence import Evidence, Failure
from mlcollage.lab.experiment import Experiment
from mlcollage.lab.judge import judge
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.running import next_runs, open_claims, run_study, run_until_settled
from mlcollage.lab.store import Store

SETTLED = Claim("S", "s", "A beats C.", "", Difference("m", "a", "c"), "greater", margin=0.5)
OPEN = Claim("O", "o", "A beats B.", "", Difference("m", "a", "b"), "greater", margin=0.1)
SKEWED = dataclasses.replace(OPEN, id="K", test="bootstrap_t", margin=0.01)
COUNTED = Claim("E", "e", "A is positive.", "", Level("count", "a"), "greater", test="exact")


def evidence(values: dict[str, np.ndarray], registered: int | None = 5, metric: str = "m") -> Evidence:
    rows = [
        {"arm": arm, "seed": seed, "metric": metric, "step": 0, "value": v, "run": f"{arm}{seed}"}
        for arm, column in values.items()
        for seed, v in enumerate(column)
        if np.isfinite(v)
    ]
    return Evidence("demo", Scale.QUICK, "w", pd.DataFrame(rows), registered=registered)


# --- the judge, while seeds are added ---------------------------------------------------------------------------------


def ever_supported(differences: np.ndarray, *, valid: bool) -> bool:
    """Whether any claim is ever called supported, looked at after every five seeds; a row a claim."""
    something = evidence({"a": np.zeros(5)}, 5 if valid else None)
    for seeds in range(5, differences.shape[1] + 1, 5):
        claims = [
            Claim(f"C{k}", "a claim", "", "", lambda e, v=row[:seeds]: pd.DataFrame({"a": v}), "greater", margin=0.01)
            for k, row in enumerate(differences)
        ]
        if any(v.status is Status.SUPPORTED for v in judge(claims, something).values()):
            return True
    return False


def test_stopping_at_the_first_support_keeps_the_level_over_all_claims_and_a_fixed_test_does_not():
    """60 studies of three claims without effect, looked at after 5, 10, ..., 40 seeds: at most 5 % may err at all."""
    studies = np.random.default_rng(0).normal(size=(60, 3, 40))
    valid = sum(ever_supported(study, valid=True) for study in studies)
    naive = sum(ever_supported(study, valid=False) for study in studies)
    assert valid / 60 <= 0.05 + 3 * np.sqrt(0.0475 / 60)
    assert naive > 6 > valid


def test_verdicts_on_added_seeds_say_that_they_are_anytime_valid():
    rng = np.random.default_rng(1)
    base = rng.normal(size=15)
    seen = evidence({"a": base + 1.0 + 0.3 * rng.normal(size=15), "b": base})
    verdict = judge([OPEN], seen)["O"]
    assert verdict.status is Status.SUPPORTED
    assert verdict.test == "anytime-valid paired t"
    assert "anytime-valid, 15 seeds" in verdict.reason
    assert verdict.seeds_needed is None
    fixed = judge([OPEN], dataclasses.replace(seen, registered=None))["O"]
    assert fixed.p_value < verdict.p_value
    assert verdict.interval[0] < fixed.interval[0] < fixed.interval[1] < verdict.interval[1]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"paired": False}, "anytime-valid two-arm t"),
        ({"test": "sign_flip"}, "anytime-valid paired signs"),
        ({"test": "permutation", "paired": False}, "anytime-valid two-arm signs"),
        ({"direction": "within", "margin": 3.0}, "anytime-valid paired t, two one-sided"),
        ({"direction": "at_least", "null": -0.5}, "anytime-valid paired t"),
    ],
)
def test_every_design_of_a_mean_has_its_anytime_valid_test(change, name):
    rng = np.random.default_rng(2)
    seen = evidence({"a": rng.normal(1.5, 0.5, 30), "b": rng.normal(0.0, 0.5, 30)})
    verdict = judge([dataclasses.replace(OPEN, **change)], seen)["O"]
    assert (verdict.status, verdict.test, verdict.seeds) == (Status.SUPPORTED, name, 30)
    assert np.isfinite(verdict.interval).all()
    mirrored = {"greater": "less", "within": "within", "at_least": "at_most"}[change.get("direction", "greater")]
    swapped = dataclasses.replace(
        OPEN, **{**change, "direction": mirrored, "null": 0.5 if mirrored == "at_most" else 0.0}
    )
    other = dataclasses.replace(swapped, estimand=Difference("m", "b", "a"))
    assert judge([other], seen)["O"].p_value == pytest.approx(verdict.p_value)


def test_trends_are_bets_on_rank_correlations():
    rng = np.random.default_rng(3)
    columns = {name: k + 0.3 * rng.normal(size=20) for k, name in enumerate("abcd")}
    claim = Claim("T", "t", "Rises.", "", Trend("m", over=tuple("abcd")), "greater", margin=0.5, test="trend")
    verdict = judge([claim], evidence(columns))["T"]
    assert (verdict.status, verdict.test) == (Status.SUPPORTED, "anytime-valid rank correlation")
    assert verdict.interval[0] > 0
    falling = judge([dataclasses.replace(claim, direction="less")], evidence(columns))["T"]
    assert falling.status is Status.CONTRADICTED
    flat = {name: rng.normal(size=20) for name in "abcd"}
    assert judge([claim], evidence(flat))["T"].status is not Status.SUPPORTED


def test_a_test_without_an_anytime_valid_version_sees_the_registered_seeds_only():
    rng = np.random.default_rng(4)
    values = {"a": rng.normal(0.5, 1, 40), "b": rng.normal(size=40)}
    verdict = judge([SKEWED], evidence(values))["K"]
    alone = judge([SKEWED], evidence({arm: v[:5] for arm, v in values.items()}, None))["K"]
    assert (verdict.seeds, verdict.p_value, verdict.test) == (5, alone.p_value, alone.test)
    assert any("5 registered seeds" in w and "bootstrap_t" in w for w in verdict.warnings)


def test_seeds_that_were_added_for_other_claims_are_not_missing_from_this_one():
    rng = np.random.default_rng(5)
    c = np.r_[rng.normal(-9, 1, 10), np.full(5, np.nan)]
    seen = evidence({"a": rng.normal(size=15), "b": rng.normal(size=15), "c": c})
    verdicts = judge([SETTLED, OPEN], seen)
    assert (verdicts["S"].seeds, verdicts["S"].warnings) == (10, ())
    assert verdicts["O"].seeds == 15
    # but one in which a run failed is reported
    failed = dataclasses.replace(seen, failures=[Failure(Run("demo", "all", "c", 12), "killed")])
    verdict = judge([SETTLED, OPEN], failed)["S"]
    assert any("seed 12 (c)" in w for w in verdict.warnings)
    assert any(w.startswith("the 1 seed without a value counted against the claim") for w in verdict.warnings)


def test_seeds_that_all_agree_are_counted_as_signs():
    verdict = judge([dataclasses.replace(OPEN, margin=0.1)], evidence({"a": np.ones(12), "b": np.zeros(12)}))["O"]
    assert verdict.status is Status.SUPPORTED
    assert verdict.p_value == pytest.approx(13 / (2**13 - 1))
    assert verdict.interval is None


# --- adding seeds -----------------------------------------------------------------------------------------------------


class Here:
    """An engine without processes; remembers what it was given."""

    def __init__(self, fail=()):
        self.fail, self.rounds = set(fail), []

    def execute(self, study, runs, store, on_event):
        self.rounds.append([(run.arm, run.seed) for run in runs])
        for run in runs:
            if (run.arm, run.seed) in self.fail:
                store.record_failure(run, "the loss is not a number")
            else:
                store.commit(run, study.measure(run), {"claims": fingerprint(study.claims)})


@pytest.fixture
def study(probe, monkeypatch):
    """The plug-in with three arms and five seeds: A beats C plainly, and B by EFFECT."""
    import probe_paper.study as module

    def measure(task):
        rng = np.random.default_rng([10, task.seed, "abc".find(task.arm) + 1])
        m = Measurements()
        m.add("m", {"a": module.EFFECT, "b": 0.0, "c": -3.0, "picture": 0.0}[task.arm] + rng.normal())
        m.add("count", 1.0)
        return m

    monkeypatch.setenv("PROBE_SEEDS", "5")
    settings = dict.fromkeys(Scale, module.Probe())
    module.EFFECT, module.CLAIMS = 0.0, (SETTLED, OPEN, SKEWED, COUNTED)
    module.experiments = lambda: (
        Experiment("compare", measure, arms=tuple("abc"), settings=settings),
        Experiment("picture", measure, arms=("picture",), settings=settings, once=True),
    )
    return module


def test_only_arms_of_open_claims_get_seeds_and_it_ends_at_the_largest_number(study, tmp_path):
    engine = Here()
    found = run_until_settled("probe", store=tmp_path, engine=engine, max_seeds=16)
    assert len(engine.rounds[0]) == 16
    first, *rest = engine.rounds[1:]
    assert first == [(arm, seed) for arm in "abc" for seed in range(5, 10)]  # five seeds settle nothing by themselves
    assert rest == [[(arm, seed) for arm in "ab" for seed in range(10, 15)]]  # 15 to 19 would pass 16
    verdicts = BoundStudy("probe").judge(found)
    assert [v.status.value for v in verdicts.values()] == ["supported", "inconclusive", "inconclusive", "supported"]
    assert {k: v.seeds for k, v in verdicts.items()} == {"S": 10, "O": 15, "K": 5, "E": 15}
    # what was added stays part of the evidence, and is judged the same way by every later command
    again = BoundStudy("probe").evidence(Store(tmp_path))
    assert again.registered == 5
    assert BoundStudy("probe").judge(again) == verdicts
    # going on starts where it ended
    further = Here()
    run_until_settled("probe", store=tmp_path, engine=further, max_seeds=20)
    assert further.rounds == [[(arm, seed) for arm in "ab" for seed in range(15, 20)]]


def test_a_real_effect_stops_early(study, tmp_path):
    study.EFFECT = 3.0
    engine = Here()
    found = run_until_settled("probe", store=tmp_path, engine=engine, max_seeds=100)
    assert BoundStudy("probe").judge(found)["O"].status is Status.SUPPORTED
    assert found.seeds <= 15
    assert open_claims(BoundStudy("probe"), found) == []
    quiet = Here()
    run_until_settled("probe", store=tmp_path, engine=quiet, max_seeds=100)
    assert quiet.rounds == []


def test_by_default_it_goes_to_four_times_the_registered_seeds(study, tmp_path):
    found = run_until_settled("probe", store=tmp_path, engine=Here())
    assert set(found.table["seed"]) == set(range(20))


def test_failed_runs_are_not_tried_again_and_are_reported(study, tmp_path):
    engine = Here(fail=[("b", 7)])
    found = run_until_settled("probe", store=tmp_path, engine=engine, max_seeds=15)
    assert sum(("b", 7) in r for r in engine.rounds) == 1
    verdict = BoundStudy("probe").judge(found)["O"]
    assert verdict.seeds == 14
    assert any("b seed 7: the loss is not a number" in w for w in verdict.warnings)


def test_runs_whose_rows_name_other_arms_are_found_by_what_fed_the_claim(study, tmp_path):
    """One run holds several seeds and arms."""

    def measure(task):
        m = Measurements()
        for seed in task.seeds:
            rng = np.random.default_rng([seed, len(task.arm)])
            for arm in "ab":
                m.add("m" if task.arm == "networks" else "other", rng.normal(), arm=arm, seed=seed)
        return m

    settings = dict.fromkeys(Scale, study.Probe())
    study.CLAIMS = (OPEN,)
    study.experiments = lambda: (
        Experiment("training", measure, arms=("networks", "tables"), settings=settings, block=None),
    )
    engine = Here()
    found = run_until_settled("probe", store=tmp_path, engine=engine, max_seeds=10)
    assert engine.rounds == [[("networks", 0), ("tables", 0)], [("networks", 5)]]
    assert BoundStudy("probe").judge(found)["O"].seeds == 10
    any_arm = dataclasses.replace(OPEN, estimand=PerSeed(lambda rows: rows["value"].mean(), "mean of all"))
    study.CLAIMS = (any_arm,)
    needed = next_runs(BoundStudy("probe"), found, [any_arm], range(10, 15))
    assert [run.arm for run in needed] == ["networks", "tables"]


def test_what_cannot_be_settled_is_refused_in_one_sentence(study, tmp_path):
    with pytest.raises(InvalidInput, match="scale smoke gives no verdicts"):
        run_until_settled("probe", "smoke", store=tmp_path, engine=Here())
    with pytest.raises(
        InvalidInput, match="registers 5 seeds at scale quick, adds 5 at a time, and so needs at least 10"
    ):
        run_until_settled("probe", store=tmp_path, engine=Here(), max_seeds=9)


def test_without_added_seeds_the_registered_tests_judge(study, tmp_path):
    found = run_study("probe", store=tmp_path, engine=Here())
    assert found.registered is None
    assert BoundStudy("probe").judge(found)["O"].test == "paired t"
