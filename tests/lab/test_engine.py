"""The local engine: one process a run, failures stay with their run, nothing finished is lost or done twice."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mlcollage.errors import InvalidInput, StoreError, UnknownName
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.engine import LocalEngine
from mlcollage.lab.engines import get_engine
from mlcollage.lab.run import Scale
from mlcollage.lab.running import run_study
from mlcollage.lab.store import Store

COMMAND = [sys.executable, "-m", "mlcollage.cli", "run", "probe"]


def test_each_run_has_its_own_process_and_one_thread(probe, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("PROBE_LOG", str(log))
    evidence = run_study("probe", "smoke", store=tmp_path / "results")
    assert evidence.select("value")["value"].tolist() == [2.0, 2.01, 2.02]
    assert set(evidence.select("threads")["value"]) == {1.0}
    pids = {line.split()[2] for line in log.read_text().splitlines()}
    assert len(pids) == 3
    assert str(os.getpid()) not in pids
    info = evidence.info[0]
    assert {"seconds", "peak_memory_mb", "device", "versions", "seed", "settings"} <= set(info)
    assert info["versions"]["torch"]
    assert evidence.array(evidence.runs[1], "line").tolist() == [1, 2, evidence.runs[1].seed]


def test_a_run_that_fails_takes_no_other_with_it(probe, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "raise,kill,leave,refuse,ok")
    monkeypatch.setenv("PROBE_SEEDS", "1")
    events = []
    evidence = run_study("probe", "smoke", store=tmp_path, on_event=events.append)
    reasons = {f.run.arm: f.reason for f in evidence.failures}
    assert reasons["raise"].startswith("experiment probe failed with RuntimeError: the loss is not a number (")
    assert reasons["raise"].endswith("probe_paper/study.py, line 38, in probe).")
    assert "SIGKILL" in reasons["kill"]
    assert "exit code 7" in reasons["leave"]
    assert reasons["refuse"] == "the setting is wrong; use another."
    assert [r.arm for r in evidence.runs] == ["ok"]
    assert sorted(e.kind for e in events) == ["done", *["failed"] * 4, *["started"] * 5]


def test_a_run_that_is_ended_from_outside_is_tried_again_and_fails_the_third_time(probe, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "end,ok")
    monkeypatch.setenv("PROBE_SEEDS", "1")
    events = []
    evidence = run_study("probe", "smoke", store=tmp_path, on_event=events.append)
    assert [r.arm for r in evidence.runs] == ["ok"]
    assert [e.kind for e in events if e.run.arm == "end"] == [*["started", "interrupted"] * 2, "started", "failed"]
    assert evidence.failures[0].reason.startswith("interrupted 3 times (ended by signal SIGTERM on ")
    (note,) = Store(tmp_path).notes("probe")
    assert len(note["history"]) == 3


def test_declared_time_and_threads_hold(probe, tmp_path, monkeypatch):
    source = probe / "probe_paper" / "study.py"
    text = source.read_text().replace("arms=arms,", "arms=arms, resources=Resources(cpus=2, minutes=0.05),")
    source.write_text(text.replace("Measurements, Scale, Study", "Measurements, Resources, Scale, Study"))
    monkeypatch.setenv("PROBE_ARMS", "ok,slow")
    monkeypatch.setenv("PROBE_SEEDS", "1")
    monkeypatch.setenv("PROBE_SLEEP", "60")
    evidence = run_study("probe", "smoke", store=tmp_path, workers=1)
    reasons = {f.run.arm: f.reason for f in evidence.failures}
    assert reasons["slow"] == "ended after 0.05 minutes, the time that its experiment declares"
    if evidence.runs:  # three seconds may be too few on a machine that does much else
        assert set(evidence.select("threads")["value"]) == {2.0}


def test_a_run_that_takes_the_memory_is_ended(probe, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "memory,ok")
    monkeypatch.setenv("PROBE_SEEDS", "1")
    share = 1.5e9 / psutil.virtual_memory().available
    evidence = run_study("probe", "smoke", store=tmp_path, engine=LocalEngine(memory_share=share))
    assert [r.arm for r in evidence.runs] == ["ok"]
    assert "of memory" in evidence.failures[0].reason


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here")
def test_a_killed_fork_server_costs_no_run(probe, tmp_path, monkeypatch):
    from multiprocessing import forkserver

    monkeypatch.setenv("PROBE_ARMS", "slow")
    monkeypatch.setenv("PROBE_SLEEP", "1")
    killed = []

    def kill(event):
        if event.kind == "started" and not killed:
            killed.append(forkserver._forkserver._forkserver_pid)
            os.kill(killed[0], signal.SIGKILL)

    evidence = run_study("probe", "smoke", store=tmp_path, on_event=kill)
    assert killed
    assert not evidence.failures
    assert len(evidence.runs) == 3


def test_a_warning_of_a_run_is_one_line_with_its_name(probe, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "warn")
    monkeypatch.setenv("PROBE_SEEDS", "1")
    command = [*COMMAND, "--scale", "smoke", "--store", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if "dead" in line]
    assert said == ["probe/probe/warn seed 0: UserWarning: 0.1 of the units are dead"]


def test_again_runs_only_what_is_missing(probe, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("PROBE_LOG", str(log))
    run_study("probe", "smoke", store=tmp_path / "results")
    monkeypatch.setenv("PROBE_SEEDS", "5")
    evidence = run_study("probe", "smoke", store=tmp_path / "results")
    assert len(evidence.runs) == 5
    assert len(log.read_text().splitlines()) == 5


def test_a_full_disk_stops_the_engine_with_a_sentence(probe, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "disk")
    with pytest.raises(StoreError, match="is full; free space"):
        run_study("probe", "smoke", store=tmp_path)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_nothing_finished_is_lost(probe, tmp_path, monkeypatch, signal_number):
    monkeypatch.setenv("PROBE_ARMS", "slow")
    monkeypatch.setenv("PROBE_SEEDS", "30")
    monkeypatch.setenv("PROBE_SLEEP", "0.6")
    monkeypatch.setenv("PROBE_LOG", str(tmp_path / "log"))
    command = [*COMMAND, "--scale", "smoke", "--workers", "2", "--store", str(tmp_path / "results")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: len(_finished(tmp_path)) >= 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal_number)
    _, stderr = process.communicate(timeout=20)
    if signal_number == signal.SIGINT:
        assert process.returncode == 130
        assert "runs are kept" in stderr
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "a killed command leaves no run behind"

    kept = {file: file.stat().st_mtime_ns for file in _finished(tmp_path)}
    assert 2 <= len(kept) < 30
    monkeypatch.setenv("PROBE_SLEEP", "0")
    evidence = run_study("probe", "smoke", store=tmp_path / "results")
    assert len(evidence.runs) == 30
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())


def test_two_commands_on_one_store_share_the_work(probe, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "slow")
    monkeypatch.setenv("PROBE_SEEDS", "8")
    monkeypatch.setenv("PROBE_LOG", str(tmp_path / "log"))
    command = [*COMMAND, "--scale", "smoke", "--workers", "2", "--store", str(tmp_path / "results"), "--json"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.wait(timeout=60) for p in processes] == [0, 0]
    executed = [line.rsplit(" ", 1)[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(executed) == [f"slow {seed}" for seed in range(8)]
    assert len(_finished(tmp_path)) == 8


SCRIPT = """
from mlcollage.lab.running import run_study

print("the script runs")
evidence = run_study("probe", "smoke", store="results", workers=2)
print(len(evidence.runs), [f.reason for f in evidence.failures])
"""


@pytest.mark.parametrize("way", ["file", "stdin", "-c"])
def test_a_plain_script_needs_no_main_guard(probe, tmp_path, way):
    """multiprocessing would import the script again in every run; runs do not need it."""
    (tmp_path / "mine.py").write_text(SCRIPT)
    words = {"file": ["mine.py"], "stdin": ["-"], "-c": ["-c", SCRIPT]}[way]
    done = subprocess.run(
        [sys.executable, *words], input=SCRIPT, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.stdout.splitlines() == ["the script runs", "3 []"], done.stderr


def test_where_there_is_no_fork_processes_are_spawned(probe, tmp_path, monkeypatch):
    """As on Windows: no fork server, no SIGKILL."""
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setenv("PROBE_ARMS", "ok,raise,leave")
    monkeypatch.setenv("PROBE_SEEDS", "1")
    monkeypatch.delattr(signal, "SIGKILL")
    evidence = run_study("probe", "smoke", store=tmp_path / "results", workers=2)
    assert [r.arm for r in evidence.runs] == ["ok"]
    reasons = {f.run.arm: f.reason for f in evidence.failures}
    assert reasons["raise"].startswith("experiment probe failed with RuntimeError: the loss is not a number (")
    assert "exit code 7" in reasons["leave"]


def test_the_fork_server_has_imported_what_every_run_needs(probe, tmp_path):
    """Measured as what a run finds already imported: a second study finds it too."""
    source = probe / "probe_paper" / "study.py"
    text = source.read_text().replace(
        '"threads", _threads()',
        '"preloaded", {"torch._dynamo", "numba", "scipy.optimize"} <= set(__import__("sys").modules)',
    )
    source.write_text(text)
    evidence = run_study("probe", "smoke", store=tmp_path / "results")
    assert set(evidence.select("preloaded")["value"]) == {1.0}


def test_unknown_engines_and_bad_worker_counts():
    with pytest.raises(UnknownName, match="available: local"):
        get_engine("sge")
    with pytest.raises(InvalidInput, match="at least 1"):
        LocalEngine(workers=0)


def test_claims_changed_after_the_runs_are_reported(probe, tmp_path):
    store = Store(tmp_path)
    run_study("probe", "quick", store=store)
    study = BoundStudy("probe", Scale.QUICK)
    verdicts = study.judge(study.evidence(store))
    assert verdicts["C1"].status == "supported"
    assert verdicts["C2"].status == "untested"
    assert not any("were changed" in w for w in verdicts["C1"].warnings)
    import probe_paper.study as module

    module.CLAIMS = module.CLAIMS[:1]
    changed = study.judge(study.evidence(store))
    assert any("claims were changed after 3 of 3 runs" in w for w in changed["C1"].warnings)


def _finished(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "results").glob("runs/probe/*/run.json"))


def _wait_for(condition, process, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "the command did not get that far"
        time.sleep(0.02)
