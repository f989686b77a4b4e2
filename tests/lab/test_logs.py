"""`mlcollage logs`: why runs failed is one command away."""

import json
import sys

import pytest

from mlcollage import cli
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.engine import Event, last_lines
from mlcollage.lab.run import Scale
from mlcollage.lab.store import Store


def call(monkeypatch, capfd, *words) -> str:
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["mlcollage", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    return capfd.readouterr().out


def test_failures_are_listed_and_one_is_shown_whole(probe, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    store, runs = Store("results"), BoundStudy("probe", Scale.SMOKE).runs()
    assert "nothing is noted of any run of probe" in call(monkeypatch, capfd, "logs", "probe")
    more = {"host": "node3", "job": "12_4", "peak_memory_mb": 512.0, "log": "epoch 1\nloss nan"}
    store.record_failure(runs[0], "the loss is not a number", "Traceback: here", more)
    whole = call(monkeypatch, capfd, "logs", "probe")
    first = f"{runs[0].id} failed probe/ok seed 0 (smoke), on node3, job 12_4, peak 512 MB: the loss is not a number"
    assert whole.splitlines()[0] == first
    assert "Traceback: here" in whole
    assert "loss nan" in whole
    store.record_interruption(runs[1], "its node died")
    listed = call(monkeypatch, capfd, "logs", "probe").splitlines()
    assert [line.split()[:2] for line in listed[:2]] == [[runs[0].id, "failed"], [runs[1].id, "interrupted"]]
    assert "loss nan" not in "\n".join(listed)
    assert "loss nan" in call(monkeypatch, capfd, "logs", "probe", runs[0].id[:5])
    notes = json.loads(call(monkeypatch, capfd, "logs", "probe", "--json"))
    assert [note["kind"] for note in notes] == ["failed", "interrupted"]


def test_the_end_of_a_log_is_short(tmp_path):
    file = tmp_path / "log"
    file.write_text("\n".join(f"line {k} " + "x" * 1000 for k in range(1000)))
    end = last_lines(file)
    assert end.splitlines()[-1].startswith("line 999")
    assert len(end) <= 20_000
    assert last_lines(None) == last_lines(tmp_path / "none") == ""


def test_the_progress_says_what_runs_wait_for(probe):
    runs = BoundStudy("probe", Scale.SMOKE).runs()
    tally = cli._Tally()
    for run in runs:
        tally.add(Event("queued", run, "Resources"))
    assert tally.line() == "3 queued (Resources)"
    tally.add(Event("started", runs[0]))
    tally.add(Event("interrupted", runs[1], "PREEMPTED"))
    tally.add(Event("waiting", runs[2], "process 7 on node3 is measuring it"))
    assert tally.line() == "1 running, 1 waiting (process 7 on node3 is measuring it), interrupted 1 times"
    tally.add(Event("done", runs[0]))
    assert tally.line().startswith("1 waiting")
