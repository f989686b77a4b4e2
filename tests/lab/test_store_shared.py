"""A store that several hosts share: names, locks, late and lost replies, attempts; and what a machine offers."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlcollage.errors import StoreError
from mlcollage.lab import locks, machine
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.store import ATTEMPTS, Store

RUN = Run("demo", "stream", "gln", 3, {"lr": 0.1}, Scale.QUICK)


def measured(value: float = 0.9) -> Measurements:
    m = Measurements()
    m.add("accuracy", value)
    return m


def refuse(code: int):
    def flock(*args):
        raise OSError(code, os.strerror(code))

    return flock


# --- two writers ------------------------------------------------------------------------------------------------------


def test_a_draft_of_another_host_is_left_alone(tmp_path, monkeypatch):
    """Two hosts write one run at once, both with this process's number; neither touches the other's draft."""
    ours, theirs = Store(tmp_path), Store(tmp_path)
    flush, second = [], []

    def in_the_middle(file: Path) -> None:
        if not flush:  # we are writing: now the other host writes the same run, from beginning to end
            flush.append(file)
            with pytest.MonkeyPatch.context() as other:
                other.setattr(machine, "place", lambda: "elsewhere-12345678")
                theirs.commit(RUN, measured(0.5), {"seconds": 2})
            second.append(file.exists())

    monkeypatch.setattr("mlcollage.lab.store._flush_to_disk", in_the_middle)
    ours.commit(RUN, measured(0.9), {"seconds": 1})
    assert second == [True]  # our draft was not removed under our hands
    assert ours.info(RUN)["seconds"] == 2  # the loser of the rename has succeeded
    assert ours.table(RUN)["value"].tolist() == [0.5]
    assert not list((tmp_path / "drafts").iterdir())


def test_only_the_drafts_of_provably_dead_processes_are_removed(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import mlcollage.lab.machine as m; print(m.writer_name())"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    place, pid, start, _ = machine.writer_name().split(".")
    names = {
        dead: False,
        f"{place}.{pid}.{start}.aaaa": True,  # alive: this process
        f"{place}.{pid}.1.aaaa": False,  # its number was given to us later
        f"elsewhere-00000000.{pid}.1.aaaa": True,  # nobody here can tell
        "4242": True,  # of an older version
    }
    for name in names:
        (tmp_path / "drafts" / f"{RUN.id}.{name}").mkdir(parents=True)
    (tmp_path / "drafts" / f"other.{dead}").mkdir()
    Store(tmp_path).commit(RUN, measured(), {})
    left = {folder.name for folder in (tmp_path / "drafts").iterdir()}
    assert left == {f"{RUN.id}.{name}" for name, kept in names.items() if kept} | {f"other.{dead}"}


def test_a_finished_result_that_this_client_does_not_see_yet_is_not_touched(tmp_path, monkeypatch):
    """A client remembers for a minute that a name was not there."""
    store = Store(tmp_path)
    store.commit(RUN, measured(), {"seconds": 1})
    monkeypatch.setattr(Store, "has", lambda self, run: False)
    assert store.appears(RUN)
    store.commit(RUN, measured(), {"seconds": 2})
    assert store.info(RUN)["seconds"] == 1
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EIO, errno.ESTALE])
def test_a_rename_whose_reply_was_lost_has_succeeded(tmp_path, monkeypatch, code):
    rename = Path.rename

    def lost(self, target):
        rename(self, target)
        raise OSError(code, "lost")

    store = Store(tmp_path)
    monkeypatch.setattr(Path, "rename", lost)
    store.commit(RUN, measured(), {"seconds": 1})
    assert store.info(RUN)["seconds"] == 1


def test_a_rename_that_failed_is_said_without_advice_to_delete(tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StoreError, match="check the disk or the share and run again") as caught:
        Store(tmp_path).commit(RUN, measured(), {})
    assert "delete" not in str(caught.value)


def test_what_is_set_aside_twice_is_kept_twice(tmp_path):
    store = Store(tmp_path)
    for k in range(3):
        store.commit(RUN, measured(k), {"seconds": k})
        store.set_aside(RUN)
    seconds = [json.loads(f.read_text())["seconds"] for f in sorted(tmp_path.glob("damaged/demo/*/run.json"))]
    assert seconds == [0, 1, 2]


# --- locks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_lock_that_fails_is_a_sentence_about_locks(tmp_path, monkeypatch, code):
    monkeypatch.setattr("fcntl.flock", refuse(code))
    sentence = r"gave no lock .* the results in it are unharmed"
    with pytest.raises(StoreError, match=sentence) as caught, Store(tmp_path).claim(RUN):
        pass
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_flock_a_lease_is_held(tmp_path, monkeypatch, code):
    monkeypatch.setattr("fcntl.flock", refuse(code))
    store = Store(tmp_path)
    with store.claim(RUN) as mine, Store(tmp_path).claim(RUN) as theirs:
        assert (mine, theirs) == (True, False)
        assert f"process {os.getpid()} on" in store.holder(RUN)
    with Store(tmp_path).claim(RUN) as again:
        assert again
    other = Run("demo", "stream", "gln", 4)
    with store.claim(other):
        pass
    # What the first try left is empty and no marker; the second run does not try again.
    assert [f.read_text() for f in (tmp_path / "locks").iterdir() if other.id in f.name] == []
    assert {f.read_text() for f in (tmp_path / "locks").iterdir()} == {""}


def test_a_lease_that_nobody_touches_is_taken_over(tmp_path, monkeypatch):
    """Its holder died on another host: only that nothing moves for a while tells."""
    monkeypatch.setattr("fcntl.flock", refuse(errno.ENOSYS))
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.6)
    file = tmp_path / "locks" / f"{RUN.id}.lease"
    store = Store(tmp_path)
    with store.claim(RUN):
        marker = file.read_text()
    file.write_text("".join("host=elsewhere\n" if x.startswith("host=") else x for x in marker.splitlines(True)))
    end, got = time.monotonic() + 10, False
    while not got and time.monotonic() < end:
        with store.claim(RUN) as got:
            pass
        time.sleep(0.05)
    assert got


def test_the_holder_of_a_lock_is_named_and_its_file_goes(tmp_path):
    store, file = Store(tmp_path), tmp_path / "locks" / f"{RUN.id}.lock"
    assert store.holder(RUN) == "another command"
    with store.claim(RUN):
        assert f"process {os.getpid()} on {machine.host()}, since" in store.holder(RUN)
        assert file.exists()
    assert not file.exists()


def test_a_lock_file_that_was_tidied_away_is_no_lock(tmp_path, monkeypatch):
    """Between our opening it and our locking it, someone removed the file: another may hold a new one."""
    import fcntl

    flock, tidied = fcntl.flock, []

    def tidy(descriptor, operation):
        if operation & fcntl.LOCK_EX and not tidied:
            tidied.append(1)
            shutil.rmtree(tmp_path / "locks")
        return flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", tidy)
    store = Store(tmp_path)
    with store.claim(RUN):
        pass
    with store.claim(RUN) as mine:
        assert mine
        assert (tmp_path / "locks" / f"{RUN.id}.lock").exists()


# --- what is missing, and attempts ------------------------------------------------------------------------------------


def test_one_listing_tells_what_is_missing(tmp_path, monkeypatch):
    store, runs = Store(tmp_path), [Run("demo", "stream", "gln", seed) for seed in range(200)]
    for run in runs[:5]:
        store.commit(run, measured(), {})
    calls = []
    monkeypatch.setattr(os, "listdir", lambda folder, old=os.listdir: calls.append(folder) or old(folder))
    monkeypatch.setattr(Path, "exists", lambda self: pytest.fail("asked for one run"))
    assert store.missing(runs) == runs[5:]
    assert len(calls) == 1


def test_a_folder_that_was_replaced_is_listed_again(tmp_path, monkeypatch):
    store, listdir, failed = Store(tmp_path), os.listdir, []
    store.commit(RUN, measured(), {})

    def stale(folder):
        if not failed:
            failed.append(folder)
            raise OSError(errno.ESTALE, "Stale file handle")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", stale)
    assert store.missing([RUN]) == []


def test_interruptions_are_counted_and_the_third_is_a_failure(tmp_path):
    store = Store(tmp_path)
    store.record_failure(RUN, "of an earlier try")
    counts = [store.record_interruption(RUN, f"node {k} died") for k in range(ATTEMPTS - 1)]
    assert counts == [1, 2]
    assert store.failure(RUN) is None  # missing, not failed
    assert store.interrupted([RUN]) == [RUN]
    assert store.evidence([RUN], study="demo", scale=Scale.QUICK, workload="default").missing == 1
    assert store.record_interruption(RUN, "pre-empted") == ATTEMPTS
    assert store.failure(RUN).reason == "interrupted 3 times (node 0 died; node 1 died; pre-empted)"
    assert not store.interrupted([RUN])  # counted anew from here
    store.commit(RUN, measured(), {})
    assert not store.notes("demo")


def test_a_folder_without_its_description_is_damage_and_not_missing_for_ever(tmp_path):
    store = Store(tmp_path)
    store.commit(RUN, measured(), {})
    (store.folder(RUN) / "run.json").unlink()
    evidence = store.evidence([RUN], study="demo", scale=Scale.QUICK, workload="default")
    assert [f.run for f in evidence.damaged] == [RUN]
    assert evidence.missing == 1


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cg")
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    folder = tmp_path / "cg" / "job" / "step"
    folder.mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/job/step\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    return folder


def test_cores_are_those_of_the_mask_the_quota_and_slurm(cgroup, monkeypatch):
    assert machine.cores() == 64
    (cgroup / "cpu.max").write_text("max 100000\n")
    (cgroup.parent / "cpu.max").write_text("800000 100000\n")  # a parent's limit holds too
    assert machine.cores() == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert machine.cores() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert machine.cores() == 4


def test_memory_is_what_is_left_of_the_limit(cgroup):
    (cgroup.parent / "memory.max").write_text(str(3 << 20))
    (cgroup.parent / "memory.current").write_text(str(1 << 20))
    assert machine.memory() == 2 << 20


def test_limits_of_the_first_version_of_cgroups(cgroup, tmp_path):
    (tmp_path / "proc" / "self" / "cgroup").write_text("5:memory:/job\n4:cpu,cpuacct:/job\n")
    for part, files in {
        "memory": {"memory.limit_in_bytes": "4096", "memory.usage_in_bytes": "1024"},
        "cpu,cpuacct": {"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"},
    }.items():
        (tmp_path / "cg" / part / "job").mkdir(parents=True)
        for name, text in files.items():
            (tmp_path / "cg" / part / "job" / name).write_text(text)
    assert (machine.cores(), machine.memory()) == (2, 3072)
