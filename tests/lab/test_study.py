"""A study joins what is run and claimed to a workload; its verdicts say what is outside of it."""

import dataclasses

import numpy as np
import pytest

from mlcollage.errors import InvalidInput, UserCodeError
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.claim import Claim, Status
from mlcollage.lab.estimand import Difference, Level, PerSeed
from mlcollage.lab.experiment import Experiment
from mlcollage.lab.judge import judge
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.running import run_study
from mlcollage.lab.store import Store
from mlcollage.testing import study_checks


def at_least(name: str, estimand, **kw) -> Claim:
    return Claim(name, name, f"Claim {name}.", "here", estimand, "at_least", null=1.9, **kw)


IN = at_least("IN", Level("value", "ok"))
OUT = at_least("OUT", Level("other_experiment", "ok"))
OUT_ARM = at_least("OUT_ARM", Difference("value", "other", "ok"))
OUT_SEED = at_least("OUT_SEED", PerSeed(lambda rows: rows.set_index("arm")["value"]["other"], "of another arm"))
LATER = at_least("LATER", Level("other_experiment", "ok"), from_scale=Scale.FULL)


@pytest.fixture
def claims(probe):
    import probe_paper.study as module

    module.CLAIMS = (OUT, IN, OUT_ARM, OUT_SEED, LATER)
    return module


def test_claims_outside_a_users_workload_are_untested_and_leave_holms_family(claims, tmp_path):
    evidence = run_study("probe", "quick", workload="iris", store=tmp_path)
    verdicts = BoundStudy("probe", Scale.QUICK, "iris").judge(evidence)
    assert list(verdicts) == ["OUT", "IN", "OUT_ARM", "OUT_SEED", "LATER"]
    for name in ("OUT", "OUT_ARM", "OUT_SEED"):
        assert (verdicts[name].status, verdicts[name].reason) == (Status.UNTESTED, "not part of this workload")
        assert verdicts[name].workload == evidence.workload
    assert verdicts["LATER"].reason == "not tested at this scale"
    alone = judge([IN], evidence)["IN"]
    assert verdicts["IN"].status is Status.SUPPORTED
    assert verdicts["IN"].p_holm == alone.p_holm == alone.p_value


def test_while_runs_failed_or_are_missing_a_claim_that_lacks_something_stays_in_the_family(
    claims, tmp_path, monkeypatch
):
    monkeypatch.setenv("PROBE_ARMS", "ok,raise")
    evidence = run_study("probe", "quick", workload="iris", store=tmp_path)
    verdicts = BoundStudy("probe", Scale.QUICK, "iris").judge(evidence)
    for name in ("OUT", "OUT_ARM", "OUT_SEED"):
        assert verdicts[name].status is Status.INCONCLUSIVE
    assert verdicts["IN"].p_holm == pytest.approx(min(1, 4 * verdicts["IN"].p_value))
    monkeypatch.setenv("PROBE_ARMS", "ok")
    unfinished = dataclasses.replace(evidence, failures=[], waiting=[f.run for f in evidence.failures[:1]])
    assert BoundStudy("probe", Scale.QUICK, "iris").judge(unfinished)["OUT_SEED"].status is Status.PENDING


def test_on_the_studys_own_data_a_wrong_metric_is_no_excuse(claims, tmp_path):
    evidence = run_study("probe", "quick", store=tmp_path)
    claims.CLAIMS = (OUT, IN)
    verdicts = BoundStudy("probe").judge(evidence)
    assert verdicts["OUT"].status is Status.INCONCLUSIVE
    assert "no metric 'other_experiment'" in verdicts["OUT"].reason
    claims.CLAIMS = (OUT_SEED, IN)
    with pytest.raises(UserCodeError, match="the estimand of claim OUT_SEED failed with KeyError"):
        BoundStudy("probe").judge(evidence)


def test_an_arm_that_the_scale_leaves_out_is_said(claims, tmp_path):
    evidence = run_study("probe", "quick", store=tmp_path)
    claims.CLAIMS = (OUT_ARM, IN)
    verdict = BoundStudy("probe").judge(evidence)["OUT_ARM"]
    assert (verdict.status, verdict.reason) == (Status.UNTESTED, "not part of the study at this scale")


def test_an_arm_that_is_nearly_one_is_said(claims, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "baseline,ok")
    evidence = run_study("probe", "quick", store=tmp_path)
    claims.CLAIMS = (at_least("SLIP", Difference("value", "baselin", "ok")), IN)
    verdict = BoundStudy("probe").judge(evidence)["SLIP"]
    assert verdict.status is Status.UNTESTED
    assert verdict.warnings[0] == "no run recorded the arm 'baselin'; did you mean 'baseline'?"
    check = next(c for c in study_checks("probe") if c.name == "claims_find_what_they_are_about")
    with pytest.raises(AssertionError, match="claim SLIP: no run recorded the arm 'baselin'"):
        check(Store(tmp_path / "other"))


def test_two_claims_with_one_id(claims):
    claims.CLAIMS = (IN, IN)
    with pytest.raises(InvalidInput, match="two claims with one id, IN; rename one"):
        _ = BoundStudy("probe").claims


def test_a_study_with_too_many_runs_or_none_is_refused(claims, monkeypatch):
    monkeypatch.setattr("mlcollage.lab.bound._MOST_RUNS", 2)
    with pytest.raises(InvalidInput, match="more than 2 runs at scale quick; let one run measure a block"):
        BoundStudy("probe").runs()
    only_full = Experiment("probe", claims.probe, arms=("ok",), settings={Scale.FULL: claims.Probe()})
    claims.experiments = lambda: (only_full,)
    with pytest.raises(InvalidInput, match="no runs at scale quick"):
        BoundStudy("probe").runs()


def test_thousands_of_runs_are_planned_and_looked_up_quickly(claims, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_SEEDS", "5000")
    evidence = BoundStudy("probe").evidence(Store(tmp_path))
    assert evidence.missing == 5000


def test_runs_carry_the_studys_identity_and_the_settings_of_the_workload(claims):
    runs = BoundStudy("probe", Scale.SMOKE, "wine").runs()
    assert [(r.study, r.experiment, r.seed, r.scale, r.workload, r.version) for r in runs] == [
        ("probe", "probe", seed, Scale.SMOKE, "wine", 1) for seed in (0, 1, 2)
    ]
    assert dict(runs[0].settings) == {"classes": 3}
    with pytest.raises(InvalidInput, match="seed of run probe/probe/ok must be a whole number"):
        Run("probe", "probe", "ok", 0.5)


def test_a_study_that_takes_no_workload_says_so(claims):
    bare = Experiment("probe", claims.probe, arms=("ok",), settings=dict.fromkeys(Scale, claims.Probe()))
    claims.experiments = lambda: (bare,)
    with pytest.raises(InvalidInput, match="takes no workload but its own data; wine is Labeled"):
        BoundStudy("probe", Scale.SMOKE, "wine").runs()


def test_a_measure_that_returns_nothing_is_said(claims):
    def with_measure(measure):
        claims.experiments = lambda: (
            Experiment("probe", measure, arms=("ok",), settings=dict.fromkeys(Scale, claims.Probe())),
        )
        study = BoundStudy("probe")
        study.measure(study.runs()[0])

    with pytest.raises(InvalidInput, match="experiment probe of study probe returned dict; it must return Measurem"):
        with_measure(lambda task: {"value": 1})
    with pytest.raises(InvalidInput, match="recorded no number"):
        with_measure(lambda task: Measurements())


def test_a_workload_whose_file_changes_is_another_workload(probe, user_workloads, tmp_path):
    spec = user_workloads["npz"]
    first = run_study("probe", "smoke", workload=spec, store=tmp_path)
    with np.load(spec) as archive:
        arrays = {k: archive[k] for k in archive.files}
    np.savez(spec, **{**arrays, "y": arrays["y"][::-1]})
    second = run_study("probe", "smoke", workload=spec, store=tmp_path)
    assert first.workload != second.workload
    assert not {r.id for r in first.runs} & {r.id for r in second.runs}


def test_a_workload_that_changes_while_runs_are_waiting_spoils_none(probe, user_workloads, tmp_path):
    spec = user_workloads["npz"]
    study = BoundStudy("probe", Scale.SMOKE, spec)
    runs = study.runs()
    with np.load(spec) as archive:
        arrays = {k: archive[k] for k in archive.files}
    np.savez(spec, **{**arrays, "y": arrays["y"][::-1]})
    from mlcollage.lab.engine import LocalEngine

    store = Store(tmp_path)
    LocalEngine().execute(study, runs, store, lambda event: None)
    evidence = study.evidence(store)
    assert not evidence.runs
    assert all("was changed after the command began" in f.reason for f in evidence.failures)
