"""The store keeps a run whole or not at all."""

import errno
import json
import os
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

from mlcollage.errors import InvalidInput, StoreError, UnknownName
from mlcollage.lab.doctor import examine
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.store import DamagedRun, Store

RUN = Run("demo", "stream", "gln", 3, {"lr": 0.1}, Scale.QUICK)


def measured() -> Measurements:
    m = Measurements()
    m.add("accuracy", 0.9, step=10, task=2)
    m.add("accuracy", 0.8, step=10, task=2, seed=7, arm="mlp")
    m.array("image", np.arange(6.0).reshape(2, 3))
    return m


def test_what_is_committed_is_read_back(tmp_path):
    store = Store(tmp_path)
    assert not store.has(RUN)
    store.commit(RUN, measured(), {"seconds": 1.5})
    assert store.has(RUN)
    table = store.table(RUN)
    assert table[["arm", "seed", "metric", "step", "value", "task"]].values.tolist() == [
        ["gln", 3, "accuracy", 10, 0.9, 2],
        ["mlp", 7, "accuracy", 10, 0.8, 2],
    ]
    np.testing.assert_array_equal(store.array(RUN, "image"), np.arange(6.0).reshape(2, 3))
    assert store.info(RUN)["seconds"] == 1.5
    assert Run.from_dict({k: store.info(RUN)[k] for k in RUN.to_dict()}) == RUN


def test_any_parquet_tool_reads_the_rows(tmp_path):
    Store(tmp_path).commit(RUN, measured(), {})
    (file,) = tmp_path.glob("runs/**/measurements.parquet")
    columns = pyarrow.parquet.read_table(file).column_names
    assert columns[:10] == ["study", "experiment", "arm", "seed", "scale", "workload", "run", "metric", "step", "value"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    store = Store(tmp_path)
    with pytest.raises(StoreError, match=r"is full .* free space and run again") as caught:
        store.commit(RUN, measured(), {})
    assert caught.value.errno == errno.ENOSPC
    assert not store.has(RUN)
    assert not list(tmp_path.glob("drafts/*"))


def test_a_damaged_result_names_the_folder_to_delete(tmp_path):
    store = Store(tmp_path)
    store.commit(RUN, measured(), {})
    (store.folder(RUN) / "measurements.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(StoreError, match="measures it again"):
        store.table(RUN)
    (store.folder(RUN) / "run.json").write_text("{")
    with pytest.raises(StoreError, match="measures it again"):
        store.info(RUN)


def test_pickled_arrays_are_never_loaded(tmp_path):
    store = Store(tmp_path)
    store.commit(RUN, measured(), {})
    np.savez(store.folder(RUN) / "arrays.npz", image=np.array([{"a": 1}], dtype=object))
    with pytest.raises(StoreError, match="damaged"):
        store.array(RUN, "image")
    with pytest.raises(InvalidInput, match="Python objects"):
        Measurements().array("image", np.array([{"a": 1}], dtype=object))


def test_an_unknown_array_lists_what_there_is(tmp_path):
    store = Store(tmp_path)
    store.commit(RUN, measured(), {})
    with pytest.raises(UnknownName, match="there are: image"):
        store.array(RUN, "picture")


def test_only_one_holder_of_a_run_at_a_time(tmp_path):
    with Store(tmp_path).claim(RUN) as mine, Store(tmp_path).claim(RUN) as theirs:
        assert mine
        assert not theirs
    with Store(tmp_path).claim(RUN) as again:
        assert again


def test_the_second_of_two_results_changes_nothing(tmp_path):
    store = Store(tmp_path)
    store.commit(RUN, measured(), {"seconds": 1})
    store.commit(RUN, measured(), {"seconds": 2})
    assert store.info(RUN)["seconds"] == 1


def test_a_failure_is_forgotten_when_the_run_succeeds(tmp_path):
    store = Store(tmp_path)
    store.record_failure(RUN, "out of luck")
    evidence = store.evidence([RUN], study="demo", scale=Scale.QUICK, workload="default")
    assert [f.reason for f in evidence.failures] == ["out of luck"]
    store.commit(RUN, measured(), {})
    assert store.failure(RUN) is None


def test_evidence_counts_what_is_missing_and_selects(tmp_path):
    store = Store(tmp_path)
    store.commit(RUN, measured(), {})
    other = Run("demo", "stream", "gln", 4)
    evidence = store.evidence([RUN, other], study="demo", scale=Scale.QUICK, workload="default")
    assert (len(evidence.runs), evidence.missing, evidence.seeds) == (1, 1, 2)
    assert evidence.select("accuracy", arm="mlp", task=2)["value"].tolist() == [0.8]
    assert evidence.array(RUN, "image").shape == (2, 3)
    with pytest.raises(UnknownName, match="there are: accuracy"):
        evidence.select("loss")
    with pytest.raises(UnknownName, match="there are: gln, mlp"):
        evidence.select("accuracy", arm="svm")


def test_measurements_may_not_shadow_the_identity(tmp_path):
    m = Measurements()
    m.add("accuracy", 1.0, workload="mine")
    with pytest.raises(InvalidInput, match="rename"):
        Store(tmp_path).commit(RUN, m, {})


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        Store(tmp_path / "results")


def test_run_ids_depend_on_everything_and_on_nothing_else():
    base = Run("demo", "stream", "gln", 3, {"lr": 0.1, "m": 4})
    assert base.id == Run("demo", "stream", "gln", 3, {"m": 4, "lr": 0.1}).id
    others = [
        Run("demo2", "stream", "gln", 3, base.settings),
        Run("demo", "forget", "gln", 3, base.settings),
        Run("demo", "stream", "mlp", 3, base.settings),
        Run("demo", "stream", "gln", 3, base.settings, count=2),
        Run("demo", "stream", "gln", 4, base.settings),
        Run("demo", "stream", "gln", 3, {"lr": 0.1, "m": 5}),
        Run("demo", "stream", "gln", 3, base.settings, Scale.FULL),
        Run("demo", "stream", "gln", 3, base.settings, workload="mine"),
        Run("demo", "stream", "gln", 3, base.settings, version=2),
    ]
    assert len({base.id, *(r.id for r in others)}) == 10
    assert Run.from_dict(json.loads(json.dumps(base.to_dict()))) == base
    with pytest.raises(InvalidInput, match="is no plain value"):
        Run("demo", "stream", "gln", 0, {"widths": {1, 2}})


def test_an_empty_evidence_has_the_columns(tmp_path):
    evidence = Store(tmp_path).evidence([RUN], study="demo", scale=Scale.QUICK, workload="default")
    assert isinstance(evidence.table, pd.DataFrame)
    assert {"arm", "seed", "metric", "step", "value"} <= set(evidence.table)
    assert evidence.missing == 1


def test_what_a_deleted_run_json_leaves_behind_is_no_obstacle(tmp_path):
    store = Store(tmp_path)
    store.commit(RUN, measured(), {"seconds": 1})
    (store.folder(RUN) / "run.json").unlink()
    assert not store.has(RUN)
    store.commit(RUN, measured(), {"seconds": 2})
    assert store.info(RUN)["seconds"] == 2


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, "no", str(tmp_path / "locks"))

    store = Store(tmp_path)
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(StoreError, match=r"cannot be written .* choose another folder"), store.claim(RUN):
        pass
    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(StoreError, match="choose another folder with --store"):
        store.commit(RUN, measured(), {})
    with pytest.raises(StoreError, match="choose another folder with --store"):
        store.record_failure(RUN, "why")


# --- all of a run or nothing, and damage afterwards -------------------------------------------------------------------


def _dies_at_step(step: int, folder) -> bool:
    """Commit in a process that is gone at its n-th operation on files; True if it came to the end."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event, args):
            nonlocal seen
            if event in _ON_FILES and str(folder) in str(args[0]):
                seen += 1
                if seen == step:
                    os._exit(9)  # as by kill -9: nothing is cleaned up

        sys.addaudithook(hook)
        Store(folder).commit(RUN, measured(), {})
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


_ON_FILES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.link"}


def test_killed_between_any_two_steps_a_run_is_there_whole_or_not_at_all(tmp_path):
    finished, step = False, 0
    while not finished:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        finished = _dies_at_step(step, folder)
        store = Store(folder)
        if store.has(RUN):
            assert store.damage(RUN, thorough=True) == ""
            assert store.array(RUN, "image").shape == measured().arrays["image"].shape
        else:
            store.commit(RUN, measured(), {})  # what was left behind is in nobody's way
            assert store.has(RUN)
    assert step > 5  # it died at several places


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.iloc[:1], "it holds 1 of 2 rows"),
        (lambda t: pd.concat([t, t]), "it holds 4 of 2 rows"),
        (lambda t: t.drop(columns="value"), "it lacks the columns value"),
        (lambda t: t.assign(run="0123456789ab"), "the rows of another run"),
        (lambda t: t.assign(value="high"), "not all numbers"),
        (lambda t: t.assign(seed="three"), "not all numbers"),
    ],
)
def test_a_table_that_is_whole_but_not_the_runs_is_damage(tmp_path, change, said):
    store = Store(tmp_path)
    store.commit(RUN, measured(), {})
    change(store.table(RUN)).to_parquet(store.folder(RUN) / "measurements.parquet")
    assert said in store.damage(RUN)
    assert store.evidence([RUN], study="demo", scale=Scale.QUICK, workload="default").missing == 1


@pytest.mark.parametrize("text", ["[]", "{}", None, "of another"])
def test_a_description_that_is_not_the_runs_is_damage(tmp_path, text):
    store, other = Store(tmp_path), Run("demo", "stream", "gln", 4, {"lr": 0.1}, Scale.QUICK)
    store.commit(RUN, measured(), {})
    store.commit(other, measured(), {})
    file = store.folder(RUN) / "run.json"
    if text is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_text(text if text != "of another" else (store.folder(other) / "run.json").read_text())
    assert store.damage(RUN)
    assert sorted(run is None for _, run in store.all_finished()) == [False, True]
    assert store.finished("demo") == [other]


def test_what_is_left_of_a_run_without_its_description_is_named_and_set_aside(tmp_path):
    store = Store(tmp_path)
    store.commit(RUN, measured(), {})
    (store.folder(RUN) / "run.json").unlink()
    (found,) = [check for check in examine(tmp_path) if check.name == "damaged runs"]
    assert (found.state, RUN.id in found.detail) == ("problem", True)
    store.commit(RUN, measured(), {})
    assert store.damage(RUN, thorough=True) == ""
    assert (tmp_path / "damaged" / "demo" / RUN.id / "measurements.parquet").exists()


@pytest.mark.parametrize("name", ["measurements.parquet", "arrays.npz", "run.json"])
@pytest.mark.parametrize("how", ["empty", "truncated", "noise", "gone"])
def test_a_damaged_run_is_named_counts_as_missing_and_is_set_aside(tmp_path, name, how):
    store = Store(tmp_path)
    store.commit(RUN, measured(), {})
    file = store.folder(RUN) / name
    whole = file.read_bytes()
    damaged = {"empty": b"", "truncated": whole[: len(whole) // 2], "noise": bytes(len(whole))}
    file.unlink() if how == "gone" else file.write_bytes(damaged[how])
    if name == "run.json" and how == "gone":
        assert not store.has(RUN)
        return
    assert f"{name} of run {RUN} in {tmp_path} is damaged" in store.damage(RUN, thorough=True)
    evidence = store.evidence([RUN], study="demo", scale=Scale.QUICK, workload="default")
    assert (evidence.missing, [f.run for f in evidence.damaged]) == (1, [RUN])
    if name == "arrays.npz":
        with pytest.raises(DamagedRun, match="`mlcollage run demo` measures it again"):
            store.array(RUN, "image")
    aside = store.set_aside(RUN)
    assert aside.exists()
    assert not store.has(RUN)
    store.commit(RUN, measured(), {})
    assert store.damage(RUN, thorough=True) == ""
