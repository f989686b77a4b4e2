"""Runs as Slurm jobs: with a stand-in for Slurm everywhere, and with a Slurm of one node where it can be started."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlcollage.errors import InvalidInput, StoreError, UnknownName
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.engines import get_engine, read_settings
from mlcollage.lab.node import JobEnded, carry_out, fingerprint_of, order_for, sent_variables
from mlcollage.lab.node import main as node_main
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.running import run_missing, run_study
from mlcollage.lab.slurm import SlurmEngine, SlurmSettings, Submitit
from mlcollage.lab.store import Store

FAST = {"poll_seconds": 0.1, "visible_seconds": 0.2, "environment": ("PROBE_*",)}


class Standin:
    """Carries jobs out here while they are submitted, or lets them die in the ways that a test asks for."""

    def __init__(self, *, dies: dict[int, str] | None = None, starts: bool = True, apart: bool = False) -> None:
        self.dies = dies or {}  # number of the job, in the order of submission -> how Slurm says that it ended
        self.starts, self.apart = starts, apart
        self.jobs: list[str] = []
        self.asked: list[dict] = []
        self.names: list[str] = []
        self.cancelled: list[str] = []
        self.end: dict[str, str] = {}
        self.deaf = 0  # questions that are not answered

    def submit(self, name, folder, tasks, ask):
        self.names.append(name)
        self.asked.append(dict(ask))
        ids = []
        for k in tasks:
            job = f"{100 + len(self.jobs)}"
            ids.append(job)
            if (end := self.dies.get(len(self.jobs))) is not None:
                self.end[job] = end
                (folder / f"said-{k}.jsonl").write_text(
                    json.dumps({"host": "node", "refused": ""})
                    + "\n"
                    + "".join(
                        json.dumps({"run": Run.from_dict(r).id, "kind": "started"}) + "\n"
                        for r in json.loads((folder / f"order-{k}.json").read_text())["runs"]
                    )
                )
            elif self.apart:
                command = [sys.executable, "-m", "mlcollage.lab.node", str(folder), str(k)]
                subprocess.run(command, stderr=subprocess.DEVNULL, check=True)
            elif self.starts:
                node_main(str(folder), k)
            self.jobs.append(job)
        return ids

    def states(self):
        if self.deaf:
            self.deaf -= 1
            return None
        return {} if self.starts else dict.fromkeys(self.jobs, ("PENDING", "Resources"))

    def ends(self, ids):
        return {job: self.end[job] for job in ids if job in self.end}

    def cancel(self, ids):
        self.cancelled += ids


@pytest.fixture
def seeds(probe, monkeypatch):
    monkeypatch.setenv("PROBE_SEEDS", "3")


def engine(cluster, **settings) -> SlurmEngine:
    return SlurmEngine(SlurmSettings(**{**FAST, **settings}), cluster)


def test_several_runs_share_a_job_and_are_told_apart(seeds, tmp_path, monkeypatch):
    """A job holds runs that succeed, raise and are killed: each is its own process."""
    monkeypatch.setenv("PROBE_ARMS", "ok,raise,kill")
    monkeypatch.setenv("PROBE_SEEDS", "1")
    cluster, events = Standin(apart=True), []
    evidence = run_study(
        "probe", "smoke", store=tmp_path / "s", engine=engine(cluster, array_size=1), on_event=events.append
    )
    assert len(cluster.jobs) == 1
    assert [run.arm for run in evidence.runs] == ["ok"]
    reasons = {f.run.arm: f.reason for f in evidence.failures}
    assert "the loss is not a number" in reasons["raise"]
    assert "SIGKILL" in reasons["kill"]
    kinds = [e.kind for e in events]
    assert (kinds.count("done"), kinds.count("failed")) == (1, 2)
    (note,) = [n for n in Store(tmp_path / "s").notes("probe") if n["arm"] == "raise"]
    assert "RuntimeError" in note["log"]  # the end of what the run printed, kept in the store
    assert note["host"]


def test_the_first_job_answers_before_the_others_are_submitted(seeds, tmp_path):
    cluster = Standin()
    evidence = run_study("probe", "smoke", store=tmp_path / "s", engine=engine(cluster, runs_per_job=1))
    assert len(evidence.runs) == 3
    assert [name[-2:] for name in cluster.names] == ["-0", "-1"]
    assert len(set(cluster.names)) == 2


def test_what_a_node_lost_is_tried_again_and_counted(seeds, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_SEEDS", "1")
    cluster, events = Standin(dies={0: "NODE_FAIL", 1: "PREEMPTED"}), []
    store = Store(tmp_path / "s")
    evidence = run_study("probe", "smoke", store=store, engine=engine(cluster), on_event=events.append)
    assert len(evidence.runs) == 1
    assert [e.kind for e in events if e.kind not in ("queued", "started")] == ["interrupted", "interrupted", "done"]
    assert not store.interruptions(evidence.runs[0])  # forgotten with the success


def test_the_third_time_it_is_a_failure_with_its_history(seeds, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_SEEDS", "1")
    cluster = Standin(dies=dict.fromkeys(range(9), "NODE_FAIL"))
    evidence = run_study("probe", "smoke", store=tmp_path / "s", engine=engine(cluster))
    assert len(cluster.jobs) == 3
    assert evidence.failures[0].reason.startswith("interrupted 3 times (ended with its job 100, NODE_FAIL")
    assert len(Store(tmp_path / "s").failure_record(evidence.failures[0].run)["history"]) == 3


@pytest.mark.parametrize(
    ("end", "said"), [("OUT_OF_MEMORY", "raise memory_gb"), ("TIMEOUT", "within the job's 60 minutes")]
)
def test_memory_and_time_are_the_runs_own_failures(seeds, tmp_path, monkeypatch, end, said):
    monkeypatch.setenv("PROBE_SEEDS", "1")
    cluster = Standin(dies={0: end})
    evidence = run_study("probe", "smoke", store=tmp_path / "s", engine=engine(cluster))
    assert said in evidence.failures[0].reason
    assert len(cluster.jobs) == 1


def test_a_slurm_that_does_not_answer_says_nothing_of_the_jobs(seeds, tmp_path):
    cluster = Standin()
    cluster.deaf = 5
    evidence = run_study("probe", "smoke", store=tmp_path / "s", engine=engine(cluster))
    assert len(evidence.runs) == 3
    assert len(cluster.jobs) == 3  # the first, and the two that waited for its answer


def test_a_later_command_waits_for_the_jobs_of_an_earlier_one(seeds, tmp_path):
    """The driver is gone after submission: nothing is submitted twice, and only own jobs are cancelled."""
    cluster, store, study = Standin(starts=False), Store(tmp_path / "s"), BoundStudy("probe", Scale.SMOKE)
    runs = study.runs()

    def stop(event):
        raise KeyboardInterrupt

    first = engine(cluster, array_size=1)
    with pytest.raises(KeyboardInterrupt):
        first.execute(study, runs, store, stop)
    assert len(cluster.jobs) == 1
    events, looked = [], []

    def look(event):
        events.append(event)
        looked.append(event.reason)
        if len(looked) == 1:  # the job begins now, as Slurm would begin it
            folder = next((tmp_path / "s" / "jobs" / "probe").iterdir())
            node_main(str(folder), 0)

    evidence = run_missing(study, store, engine(cluster, array_size=1), on_event=look)
    assert len(evidence.runs) == 3
    assert len(cluster.jobs) == 1
    assert "Resources" in looked[0]  # why it was queued


def test_ctrl_c_says_what_becomes_of_the_jobs(seeds, tmp_path):
    study, store = BoundStudy("probe", Scale.SMOKE), Store(tmp_path / "s")
    for on_stop, said in (("leave", "go on; the same command waits"), ("cancel", "1 jobs were cancelled")):
        cluster = Standin(starts=False)
        session_engine = engine(cluster, on_stop=on_stop, array_size=1)
        calls = []

        def stop(event, calls=calls):
            calls.append(event)
            if event.reason == "Resources":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt, match=said):
            session_engine.execute(study, study.runs(), Store(tmp_path / on_stop), stop)
        assert cluster.cancelled == ([] if on_stop == "leave" else ["100"])
    assert not store.tried("probe")


def test_a_node_with_other_code_refuses(seeds, tmp_path):
    study, store = BoundStudy("probe", Scale.SMOKE), Store(tmp_path / "s")
    order = {**order_for(study, study.runs(), store).to_dict(), "code": "of yesterday"}
    said = []
    carry_out(order, said.append)
    assert "is not the one that sent them" in said[0]["refused"]
    evidence = study.evidence(store)
    assert len(evidence.failures) == 3
    assert not evidence.runs


def test_an_edit_of_the_study_is_another_fingerprint(probe):
    import mlcollage.lab.node as node

    study = BoundStudy("probe", Scale.SMOKE)
    before = fingerprint_of(study)
    node._hash_of.cache_clear()
    assert fingerprint_of(study) == before
    file = probe / "probe_paper" / "study.py"
    file.write_text(file.read_text() + "\n# edited\n")
    node._hash_of.cache_clear()
    assert fingerprint_of(study) != before


def test_a_node_that_says_nothing_is_named(seeds, tmp_path):
    class Mute(Standin):
        def submit(self, name, folder, tasks, ask):
            return ["7"]

    with pytest.raises(StoreError, match=r"job 7 ended .* without a word from the node: does it see"):
        run_study("probe", "smoke", store=tmp_path / "s", engine=engine(Mute(), array_size=1))


def test_a_job_that_is_asked_to_end_leaves_its_run_missing(seeds, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "slow")
    monkeypatch.setenv("PROBE_SEEDS", "1")
    monkeypatch.setenv("PROBE_SLEEP", "60")
    study, store = BoundStudy("probe", Scale.SMOKE), Store(tmp_path / "s")
    order = order_for(study, study.runs(), store, environment=["PROBE_*"]).to_dict()

    def warn(fact):
        if fact.get("kind") == "started":
            signal.alarm(0)
            os.kill(os.getpid(), signal.SIGUSR2)

    with pytest.raises(JobEnded):
        carry_out(order, warn)
    (run,) = study.runs()
    assert "SIGUSR2" in store.interruptions(run)[0]["reason"]
    assert store.failure(run) is None
    assert study.evidence(store).missing == 1


def test_only_what_was_asked_for_is_sent(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("MLCOLLAGE_STORE", "x")
    monkeypatch.setenv("MY_DATA", "y")
    assert {"CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "HOME", "MY_DATA"}.isdisjoint(sent_variables())
    assert {"MLCOLLAGE_STORE", "MY_DATA"} <= set(sent_variables(["MY_*"]))


def test_settings_come_from_a_file_and_options_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mlcollage.toml").write_text('[slurm]\npartition = "cpu"\nminutes = 30\n[slurm.extra]\nreservation = "r"\n')
    given = read_settings("slurm", ["partition=gpu", "memory_gb=2.5", "environment=A,B_*"])
    settings = get_engine("slurm", **given).settings
    assert (settings.partition, settings.minutes, settings.memory_gb) == ("gpu", 30, 2.5)
    assert (settings.environment, settings.extra) == (("A", "B_*"), {"reservation": "r"})
    with pytest.raises(UnknownName, match="did you mean 'partition'"):
        read_settings("slurm", ["partitions=gpu"])
    with pytest.raises(InvalidInput, match="must be a number, not 'long'"):
        read_settings("slurm", ["minutes=long"])
    with pytest.raises(InvalidInput, match="NAME=VALUE"):
        read_settings("slurm", ["gpu"])
    with pytest.raises(UnknownName, match="engine local has no settings"):
        get_engine("local", **read_settings("local", ["partition=gpu"]))


def test_runs_are_packed_and_what_they_need_is_asked_for(seeds, tmp_path, monkeypatch):
    import dataclasses

    from mlcollage.lab.resources import Resources

    study = BoundStudy("probe", Scale.SMOKE)
    (experiment,) = study.study.experiments
    heavy = dataclasses.replace(experiment, resources=Resources(cpus=2, gpus=1, memory_gb=4, minutes=90))
    monkeypatch.setattr(
        BoundStudy, "study", property(lambda self: dataclasses.replace(self.__dict__["_s"], experiments=(heavy,)))
    )
    object.__setattr__(study, "_s", study.__dict__.get("_s") or _declared(study))
    cluster = Standin(starts=False)

    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine(cluster, array_size=2).execute(study, study.runs(), Store(tmp_path), stop)
    (ask,) = cluster.asked
    assert (ask["cpus_per_task"], ask["gpus_per_node"], ask["mem"], ask["time"]) == (2, 1, "3815MB", 91)
    orders = sorted(tmp_path.glob("jobs/probe/*/order-*.json"))
    assert [len(json.loads(f.read_text())["runs"]) for f in orders] == [2, 1]


def _declared(study):
    return study.paper.module("study").STUDY


# --- with Slurm -------------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).parents[2] / "tools" / "slurm_here.sh"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A Slurm of one node; its settings are found by SLURM_CONF."""
    pytest.importorskip("submitit", reason="submitit is not installed (extra slurm)")
    folder = tmp_path_factory.mktemp("slurm")
    done = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode == 3:
        pytest.skip(f"Slurm cannot be started here: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin")
        yield folder
    subprocess.run([SCRIPT, "stop", folder], check=False, timeout=60)


def real(**settings) -> SlurmEngine:
    return SlurmEngine(SlurmSettings(**{**FAST, "visible_seconds": 3.0, "poll_seconds": 1.0, **settings}))


@pytest.mark.engines
def test_jobs_of_slurm_fill_the_store_as_local_processes_do(slurm, probe, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "ok,raise")
    monkeypatch.setenv("PROBE_SEEDS", "2")
    events = []
    evidence = run_study("probe", "smoke", store=tmp_path / "s", engine=real(array_size=2), on_event=events.append)
    local = run_study("probe", "smoke", store=tmp_path / "l")
    assert evidence.table.drop(columns="run").equals(local.table.drop(columns="run"))
    assert [f.run for f in evidence.failures] == [f.run for f in local.failures]
    assert evidence.info[0]["host"]
    assert {e.kind for e in events} >= {"queued", "started", "done", "failed"}
    (note, _) = Store(tmp_path / "s").notes("probe")
    assert note["job"]


@pytest.mark.engines
def test_a_cancelled_job_of_slurm_is_tried_again(slurm, probe, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "slow")
    monkeypatch.setenv("PROBE_SEEDS", "1")
    monkeypatch.setenv("PROBE_SLEEP", "4")
    cancelled, events = [], []

    def on_event(event):
        events.append(event.kind)
        if event.kind == "started" and not cancelled:
            ids = list(Submitit().states())
            cancelled.extend(ids)
            subprocess.run(["scancel", *ids], check=True)

    evidence = run_study("probe", "smoke", store=tmp_path / "s", engine=real(), on_event=on_event)
    assert cancelled
    assert "interrupted" in events
    assert len(evidence.runs) == 1


@pytest.mark.engines
def test_a_killed_command_leaves_jobs_that_the_next_one_waits_for(slurm, probe, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "slow")
    monkeypatch.setenv("PROBE_SEEDS", "2")
    monkeypatch.setenv("PROBE_SLEEP", "3")
    monkeypatch.setenv("PROBE_LOG", str(tmp_path / "log"))
    options = ["array_size=1", "poll_seconds=1", "visible_seconds=3", "environment=PROBE_*"]
    settings = [word for option in options for word in ("--set", option)]
    command = [sys.executable, "-m", "mlcollage.cli", "run", "probe", "--scale", "smoke", "--engine", "slurm"]
    process = subprocess.Popen([*command, *settings, "--store", str(tmp_path / "s")], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 100
    while not list(tmp_path.glob("s/jobs/probe/*/job.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.kill()
    process.communicate()
    before = set(Submitit().states() or {})
    assert before  # the job goes on
    evidence = run_study("probe", "smoke", store=tmp_path / "s", engine=real(array_size=1))
    assert len(evidence.runs) == 2
    assert len(list((tmp_path / "s" / "jobs" / "probe").iterdir())) == 1  # no second submission
    assert len((tmp_path / "log").read_text().splitlines()) == 2  # nothing was measured twice


@pytest.mark.engines
def test_what_slurm_refuses_is_one_sentence(slurm, probe, tmp_path):
    with pytest.raises(StoreError, match=r"Slurm takes no jobs: .*partition"):
        run_study("probe", "smoke", store=tmp_path / "s", engine=real(partition="nowhere"))


@pytest.mark.engines
def test_the_largest_array_is_what_slurm_says(slurm):
    assert Submitit().largest_array() == 100
