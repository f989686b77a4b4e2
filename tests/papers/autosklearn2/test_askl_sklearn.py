"""The estimators: scikit-learn's contract, hard limits, resuming, tables as they are, refusals."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections import defaultdict
from functools import partial

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pytest
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.utils.estimator_checks import check_estimator

from mlcollage.errors import InvalidInput
from mlcollage.papers.autosklearn2 import AutoClassifier, AutoRegressor, Hyperparameter, Policy, SearchSpace
from mlcollage.papers.autosklearn2.evaluation import make_splits
from mlcollage.papers.autosklearn2.machine import available_cores, memory_limit_of_container
from mlcollage.papers.autosklearn2.rows import TableRows
from mlcollage.papers.autosklearn2.search import SearchPlan
from mlcollage.papers.autosklearn2.space import pipeline_space
from mlcollage.papers.autosklearn2.surrogate import ForestImprovement
from mlcollage.papers.autosklearn2.trials import PipelineTrial
from mlcollage.papers.autosklearn2.worker import FitProblem, Worker

QUICK = {"max_trials": 2, "isolation": "none", "random_state": 0, "include": ["sgd"], "portfolio": None}
LINEAR = {"learner": "sgd", "sgd:tol": 0.1, "rescaling": "standardize"}


def small(kind=AutoClassifier, **changes):
    return kind(60, **{**QUICK, **changes})


@pytest.fixture(scope="module")
def wine():
    return load_wine(return_X_y=True)


# What a search with held-out rows cannot promise: a weight is not a number of copies, for copies may be held out.
_NOT_PROMISED = dict.fromkeys(
    ("check_sample_weight_equivalence_on_dense_data", "check_sample_weight_equivalence_on_sparse_data"),
    "rows are held out at random; a weight of 2 is not two rows there",
)


@pytest.mark.parametrize("kind", [AutoClassifier, AutoRegressor])
def test_the_contract_of_scikit_learn(kind):
    estimator = kind(60, max_trials=1, isolation="none", include=["sgd"], portfolio=[LINEAR], random_state=0)
    estimator.set_params(ensemble_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(estimator, expected_failed_checks=_NOT_PROMISED, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in found if r["status"] == "failed"}
    assert not failed


def test_a_fixed_number_of_trials_is_repeated_exactly(wine):
    X, y = wine
    runs = [small(max_trials=6).fit(X, y) for _ in range(2)]
    assert [t.config for t in runs[0]._trials] == [t.config for t in runs[1]._trials]
    np.testing.assert_array_equal(runs[0].predict_proba(X), runs[1].predict_proba(X))
    assert runs[0].leaderboard()["loss"].is_monotonic_increasing
    assert len(runs[0].cv_results_["params"]) == 6
    other = small(max_trials=6, random_state=1).fit(X, y)
    assert [t.config for t in other._trials] != [t.config for t in runs[0]._trials]


def test_a_mixed_table_with_gaps_dates_and_text_labels():
    rng = np.random.default_rng(0)
    n = 150
    frame = pd.DataFrame(
        {
            "amount": np.where(rng.random(n) < 0.1, np.nan, rng.lognormal(size=n)),
            "city": rng.choice(["Bern", "Rome", None], n),
            "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 300, n), unit="D"),
            "member": pd.array(rng.choice([True, False], n), dtype="boolean"),
            "note": [f"text {i}" for i in range(n)],
        }
    )
    y = np.where(frame["city"].eq("Bern") | frame["member"], "yes", "no")
    model = small(include=["extra_trees"], portfolio=None).fit(frame, y)
    assert set(model.predict(frame)) <= {"yes", "no"}
    assert model.score(frame, y) > 0.9
    assert any("'note' has another text in every row" in note for note in model.notes_)
    again = model.predict_proba(frame[frame.columns[::-1]])
    np.testing.assert_array_equal(again, model.predict_proba(frame))
    np.testing.assert_allclose(model.predict_proba(pa.Table.from_pandas(frame)), again)
    assert "loss of a constant prediction 0.5" in model.report()
    model.refit(frame, y)
    assert model.score(frame, y) > 0.9


def test_groups_weights_and_indexes_are_by_position(wine):
    X, y = wine
    frame = pd.DataFrame(X, index=np.random.default_rng(0).permutation(len(X)))
    series = pd.Series(y, index=frame.index[::-1])
    groups = pd.Series(np.arange(len(y)) // 3)
    weight = np.ones(len(y))
    weight[:5] = 0
    model = small(policy=Policy("cv", 3)).fit(frame, series, groups=groups, sample_weight=weight)
    assert model.score(X, y) > 0.8
    # Labels that belong to groups cannot be learned: held-out groups show it.
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(40), 12)
    rows = rng.normal(size=(40, 4))[group] + 0.01 * rng.normal(size=(480, 4))
    label = rng.integers(0, 2, 40)[group]
    one = small(max_trials=1, include=["extra_trees"])
    losses = [one.fit(rows, label, **k).best_trial_.loss for k in ({}, {"groups": group})]
    assert losses[0] < 0.1 < 0.3 < losses[1]


def test_copies_stay_on_one_side():
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(150, 3)), 2, axis=0)
    y = np.repeat(rng.integers(0, 2, 150), 2)
    model = small(max_trials=1, include=["extra_trees"]).fit(X, y)
    assert model.best_trial_ is None or model.best_trial_.loss > 0.3
    assert any("150 rows are copies" in note for note in model.notes_)


def test_successive_halving_promotes_the_best(wine):
    X, y = wine
    sh = Policy(allocation="sh")
    model = small(max_trials=23, policy=sh, include=["sgd"]).fit(X, y)
    budgets = [t.budget for t in model._trials]
    assert budgets == [6.25] * 16 + [25.0] * 4 + [100.0] + [6.25] * 2
    losses = [t.loss for t in model._trials[:16]]
    best = [model._trials[i].name for i in np.argsort(losses, kind="stable")[:4]]
    assert [t.name for t in model._trials[16:20]] == best


@pytest.fixture(scope="module")
def problem(wine):
    X, y = wine
    splits = make_splits(Policy(), y, "classification")
    return FitProblem("classification", TableRows.of(X), y, 3, splits, None, 0)


# A configuration that calls a function when its learner is asked for: it hangs, takes memory, or dies.
_BOMBS = {
    "time": partial(time.sleep, 60),
    "memory": partial(bytearray, 20 * 2**30),
    "crash": os.abort,
}


def test_a_bad_pipeline_costs_its_own_limit_and_no_more(problem):
    config = pipeline_space().only(["sgd"]).default()
    for fate, bomb in _BOMBS.items():
        worker = Worker(500)
        worker.give(problem)
        try:
            assert worker.wait_ready(60)
            start = time.monotonic()
            messages = list(worker.run(defaultdict(bomb), 100.0, 1.0))
            assert messages[-1].what == fate, messages[-1].text
            assert time.monotonic() - start < 20
            assert worker.alive  # another process takes its place
            start = time.monotonic()
            assert worker.wait_ready(30)
            assert time.monotonic() - start < 20
            assert [m.what for m in worker.run(config, 1.0, 30.0)][-1] == "end"
            if fate == "crash":
                assert "SIGABRT" in messages[-1].text
        finally:
            worker.kill()


def _grandchild():
    subprocess.Popen(["sleep", "4321.5"], start_new_session=False)
    time.sleep(60)


def test_a_worker_runs_under_a_daemon_in_a_thread_and_its_children_end_with_it(problem, monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    monkeypatch.setattr(sys, "stdin", None)
    config, found = pipeline_space().only(["sgd"]).default(), []

    def in_thread():
        worker = Worker(500)
        worker.give(problem)
        try:
            assert worker.wait_ready(60)
            found.append([m.what for m in worker.run(config, 1.0, 30.0)][-1])
            found.append([m.what for m in worker.run(defaultdict(_grandchild), 100.0, 1.0)][-1])
        finally:
            worker.kill()

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join(120)
    assert found == ["end", "time"]
    end = time.monotonic() + 5
    while _sleepers() and time.monotonic() < end:
        time.sleep(0.05)
    assert not _sleepers()


def _sleepers():
    return [
        p for p in psutil.process_iter(["cmdline", "status"])
        if p.info["cmdline"] == ["sleep", "4321.5"] and p.info["status"] != psutil.STATUS_ZOMBIE
    ]  # fmt: skip


def test_a_fit_in_processes_keeps_its_budget_and_leaves_none_behind(wine):
    X, y = wine
    before = set(psutil.Process().children(recursive=True))
    seen = []
    model = AutoClassifier(
        100,
        per_run_limit=30,
        max_trials=4,
        include=["sgd"],
        portfolio=[LINEAR],
        n_jobs=2,
        random_state=0,
        callbacks=[lambda e: seen.append(e.estimator.predict(X[:2]).shape)],
    ).fit(X, y)
    assert model.fit_seconds_ < 102
    assert not [p for p in psutil.Process().children(recursive=True) if p not in before and p.is_running()]
    assert model.ensemble_
    assert set(seen) == {(2,)}
    assert model.score(X, y) > 0.85


SCRIPT = """
import os, signal, sys
from sklearn.datasets import load_wine
from mlcollage.papers.autosklearn2 import AutoClassifier
X, y = load_wine(return_X_y=True)
def die(event):
    if event.trial.number == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
AutoClassifier(60, max_trials=6, isolation="none", include=["sgd"], portfolio=None, random_state=0, folder=sys.argv[1],
               callbacks=[die]).fit(X, y)
"""


def test_a_killed_fit_goes_on_to_the_same_history(wine, tmp_path):
    X, y = wine
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    code = subprocess.run([sys.executable, str(script), str(tmp_path / "run"), "2"], capture_output=True).returncode
    assert code == -9
    history = tmp_path / "run" / "history.jsonl"
    assert len(history.read_text().splitlines()) == 4
    with history.open("a") as stream:
        stream.write('{"number": 3, "con')  # a line that was being written
    same = {"max_trials": 6, "include": ["sgd"]}
    model = small(folder=tmp_path / "run", **same).fit(X, y)
    whole = small(**same).fit(X, y)
    assert [t.config for t in model._trials] == [t.config for t in whole._trials]
    assert [t.loss for t in model._trials] == [t.loss for t in whole._trials]
    np.testing.assert_allclose(model.predict_proba(X), whole.predict_proba(X))
    assert any("cut off" in note for note in model.notes_)
    assert [json.loads(line).get("number") for line in history.read_text().splitlines()] == [None, *range(6)]
    with pytest.raises(InvalidInput, match="holds a run on other data or with other settings"):
        small(folder=tmp_path / "run", **same).fit(X[1:], y[1:])


def test_ctrl_c_keeps_what_was_found(wine):
    X, y = wine

    def interrupt(event):
        if event.trial.number == 1:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted"):
        model = small(max_trials=9, callbacks=[interrupt]).fit(X, y)
    assert model.interrupted_
    assert len(model._trials) == 2
    assert model.score(X, y) > 0.6
    assert len(small(max_trials=9, callbacks=[lambda e: True]).fit(X, y)._trials) == 1


def test_noise_gives_the_constant_with_a_warning():
    rng = np.random.default_rng(3)
    X, y = rng.normal(size=(60, 2)), np.array([0] * 58 + [1] * 2)
    with pytest.warns(UserWarning, match="no pipeline beat a constant prediction"):
        model = small(metric="accuracy", max_trials=1, include=["extra_trees"]).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X[:2]), [[58 / 60, 2 / 60]] * 2)


def branin(c):
    x, y = 15 * c["x"] - 5, 15 * c["y"]
    return (y - 5.1 / (4 * np.pi**2) * x**2 + 5 / np.pi * x - 6) ** 2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(x) + 10


def test_expected_improvement_beats_random_search():
    space = SearchSpace((Hyperparameter("x"), Hyperparameter("y")))
    search = ForestImprovement(space, n_random=60, trees=6)
    gains = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tried = [space.sample(rng) for _ in range(8)]
        losses = [branin(c) for c in tried]
        for _ in range(32):
            tried.append(search.propose(tried, losses, rng))
            losses.append(branin(tried[-1]))
        at_random = min(branin(space.sample(rng)) for _ in range(40))
        gains.append(np.log(at_random) - np.log(min(losses)))
    assert np.mean(gains) / (np.std(gains, ddof=1) / np.sqrt(20)) > 3


def test_every_second_proposal_after_the_portfolio_is_random():
    space = pipeline_space().only(["sgd"])
    rng = np.random.default_rng(0)
    portfolio = [space.sample(rng) for _ in range(3)]
    plan, trials = SearchPlan(space, Policy(), portfolio, 0), []
    for i in range(9):
        (p,) = plan.next(trials)
        trials.append(PipelineTrial(i, p.config, p.origin, p.budget, loss=float(i)))
    assert [t.origin for t in trials] == ["portfolio"] * 3 + ["search", "random"] * 3
    assert [t.config for t in trials[:3]] == portfolio


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_budget": 0}, "time_budget must be a finite number above 0"),
        ({"per_run_limit": 100}, "per_run_limit=100 is more than time_budget=60"),
        ({"policy": "cv"}, "policy must be 'auto' or a Policy"),
        ({"metric": "f2"}, "metric must be one of"),
        ({"metric": "r2"}, "the metric 'r2' is for regression"),
        ({"include": ["svm"]}, "no learner 'svm'"),
        ({"portfolio": [{"learner": "sgd", "sgd:alpha": 9}]}, "pipeline 0 of the portfolio has 'sgd:alpha' = 9"),
        ({"portfolio": [LINEAR, LINEAR]}, "pipelines 0 and 1 of the portfolio are the same"),
        ({"memory_limit_mb": 0.001}, "memory_limit_mb is 0; a fit needs three times X"),
        ({"callbacks": [3]}, "callbacks must be functions"),
        ({"callbacks": len}, "callbacks must be a list"),
        ({"include": "sgd"}, "include must be a list"),
        ({"categorical": "ab"}, "categorical must be a list"),
        ({"random_state": "x"}, "random_state must be a whole number"),
        ({"policy": Policy("cv", 200)}, "needs 200 at least"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(wine, settings, message):
    with pytest.raises(InvalidInput, match=message):
        clone(small()).set_params(**settings).fit(*wine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, y: (X, np.where(np.arange(len(y)) < 2, np.nan, y)), "2 labels are missing"),
        (lambda X, y: (X, np.zeros(len(y))), "only one class"),
        (lambda X, y: (np.where(X > 14, np.inf, X), y), "infinity"),
        (lambda X, y: (X[:3], y[:3]), "a fit needs 4 at least"),
        (lambda X, y: (X, None), "y is None"),
    ],
)
def test_data_that_cannot_be_used_are_refused(wine, change, message):
    X, y = change(*wine)
    with pytest.raises(ValueError, match=message):
        small().fit(X, y)
    with pytest.raises(InvalidInput, match="groups has 2 entries"):
        small().fit(*wine, groups=[1, 2])
    with pytest.raises(InvalidInput, match="sample_weight must be finite"):
        small().fit(*wine, sample_weight=-np.ones(len(wine[1])))


@pytest.mark.parametrize(
    "labels",
    [
        pd.Series([1, 5, 9] * 20, dtype="Int64"),
        pd.Series([1, 5, 9] * 20, dtype="int16[pyarrow]"),
        pd.Series([True, False, False] * 20, dtype="boolean"),
        pd.Series([2**62, 2**62 + 1, 0] * 20, dtype="Int64"),
        pa.array(["a", "b", "a"] * 20),
    ],
)
def test_labels_come_back_in_the_type_that_they_have(labels):
    X = np.random.default_rng(0).normal(size=(60, 2))
    model = small(max_trials=1).fit(X, labels)
    values = labels.to_pylist() if isinstance(labels, pa.Array) else labels.tolist()
    assert model.classes_.tolist() == sorted(set(values))
    assert {type(v) for v in model.predict(X).tolist()} == {type(values[0])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": np.eye(3)[np.arange(60) % 3]}, "for one-hot labels give y.argmax"),
        ({"y": np.array([1, "a"] * 30, object)}, "labels are of the types int, str"),
        ({"y": np.arange(60)}, "a class of its own"),
        ({"y": np.array([np.inf, 1.0] * 30)}, "infinity in 30 rows"),
        ({"y": np.linspace(0, 1, 60)}, "Unknown label type"),
        ({"groups": 3}, "groups must be one value for each row"),
        ({"groups": [None, *"abcde" * 11, *"abcd"]}, "groups has no value in 1 rows"),
        ({"sample_weight": ["a"] * 60}, "sample_weight must be finite"),
        ({"sample_weight": np.ones(5)}, "sample_weight has 5 entries"),
        ({"sample_weight": np.full(60, 1e308)}, "their sum must be finite"),
    ],
)
def test_columns_beside_the_table_that_cannot_be_used_are_refused(changes, message):
    given = {"y": np.arange(60) % 2, **changes}
    with pytest.raises(InvalidInput, match=message):
        small().fit(np.random.default_rng(0).normal(size=(60, 2)), **given)


def test_held_out_rows_without_weight_are_refused(wine):
    X, y = wine
    held = []
    small(callbacks=[lambda e: held.append(e.estimator._problem.splits[0][1])]).fit(X, y)
    weight = np.ones(len(y))
    weight[held[0]] = 0
    with pytest.raises(InvalidInput, match="held out have the weight 0"):
        small().fit(X, y, sample_weight=weight)


def test_a_history_that_cannot_be_written_costs_no_model(wine, tmp_path):
    X, y = wine
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match="cannot be written .* The fit goes on"):
        model = small(folder=run, max_trials=3, callbacks=[lambda e: shutil.rmtree(run, ignore_errors=True)]).fit(X, y)
    assert len(model._trials) == 3
    assert model.ensemble_


def test_another_loss_of_the_same_name_does_not_go_on(wine, tmp_path):
    def first():
        def loss(y, p, weight):
            return float((p.argmax(1) != y).mean())

        return loss

    def second():
        def loss(y, p, weight):
            return float((p.argmax(1) != y).mean() ** 2)

        return loss

    small(folder=tmp_path, metric=first()).fit(*wine)
    assert len(small(folder=tmp_path, metric=first(), max_trials=3).fit(*wine)._trials) == 3
    with pytest.raises(InvalidInput, match="other settings"):
        small(folder=tmp_path, metric=second()).fit(*wine)


def test_a_column_that_is_the_target_is_named(wine):
    X, y = wine
    with pytest.warns(UserWarning, match="the column 13 of X is the target itself"):
        model = small().fit(np.column_stack([X, y]), y)
    assert any("target itself" in note for note in model.notes_)


def test_a_regressor_with_its_own_portfolio():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 4))
    y = 1000 + 50 * X[:, 0] + 5 * rng.normal(size=200)
    model = AutoRegressor(60, max_trials=3, isolation="none", random_state=0).fit(X, y)
    assert model.score(X, y) > 0.8
    for metric in ("mse", "mae"):
        assert small(AutoRegressor, metric=metric, include=["extra_trees"]).fit(X, y).score(X, y) > 0.5


def test_columns_that_give_the_target_away_and_ids_are_named(wine):
    X, y = wine
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"row": np.arange(len(y)), "noise": rng.normal(size=len(y)), "kind": rng.choice(["a", "b"], len(y))}
    )
    with pytest.warns(UserWarning, match="'row' alone predicts the target"):  # the rows are sorted by class
        notes = small(max_trials=1).fit(frame, y).notes_
    assert any("'row' counts the rows" in note for note in notes)
    frame["told"] = np.array(["low", "mid", "high"])[y]
    with pytest.warns(UserWarning, match="'told' alone predicts the target"):
        small(max_trials=1).fit(frame.drop(columns="row"), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small(max_trials=1).fit(X, y).notes_ == []
        shuffled = frame.drop(columns="told").assign(row=rng.permutation(len(y)))
        assert len(small(max_trials=1).fit(shuffled, y).notes_) == 1


def test_processors_and_memory_are_those_of_the_container(tmp_path):
    count = len(os.sched_getaffinity(0))
    assert available_cores(tmp_path) == count
    assert memory_limit_of_container(tmp_path) is None
    (tmp_path / "cpu.max").write_text("50000 100000\n")  # half a processor
    (tmp_path / "memory.max").write_text(f"{2**31}\n")
    assert available_cores(tmp_path) == 1
    assert memory_limit_of_container(tmp_path) == 2048
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_cores(tmp_path) == count
    assert memory_limit_of_container(tmp_path) is None
    old = tmp_path / "old"
    for folder in ("cpu", "memory"):
        (old / folder).mkdir(parents=True)
    (old / "cpu/cpu.cfs_quota_us").write_text("100000")
    (old / "cpu/cpu.cfs_period_us").write_text("100000")
    (old / "memory/memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert available_cores(old) == 1
    assert memory_limit_of_container(old) is None


def test_more_memory_than_the_container_has_is_noted(wine, monkeypatch):
    X, y = wine
    monkeypatch.setattr("mlcollage.papers.autosklearn2.sklearn.memory_limit_of_container", lambda: 1000.0)
    assert any("the container has 1,000 MB" in note for note in small(max_trials=1).fit(X, y).notes_)


def test_a_fit_that_a_limit_ended_is_not_called_repeatable(wine):
    X, y = wine
    model = small(max_trials=2).fit(X, y)
    assert model.repeatable_
    assert "a repetition may differ" not in model.report()
    cut = small(max_trials=2, per_run_limit=1e-4).fit(X, y)
    assert not cut.repeatable_
    assert "2 fits were ended by a limit of time" in cut.report()
    assert not small(max_trials=9, callbacks=[lambda e: True]).fit(X, y).repeatable_


def test_no_rows_weightless_classes_and_one_group_get_a_sentence(wine):
    X, y = wine
    weight = np.where(y == 2, 0.0, 1.0)
    model = small(max_trials=1).fit(pd.DataFrame(X), y, sample_weight=weight)
    assert "classes whose rows all have the weight 0: 2." in model.notes_
    with pytest.raises(InvalidInput, match="X has no rows"):
        model.predict(pd.DataFrame(X[:0]))
    with pytest.raises(InvalidInput, match=r"there are 1 groups, and holdout.*give smaller groups"):
        small().fit(X, y, groups=np.zeros(len(y)))
