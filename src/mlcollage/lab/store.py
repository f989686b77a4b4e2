"""Where results are kept: one folder a run, complete or not there at all.

Layout, readable with any Parquet tool (``duckdb "select * from 'results/runs/**/measurements.parquet'"``)::

    results/
        runs/<study>/<run id>/run.json               what was run, with which versions, how long
        runs/<study>/<run id>/measurements.parquet   study, experiment, arm, seed, metric, step, value, ...
        runs/<study>/<run id>/arrays.npz             named arrays, if any
        failed/<study>/<run id>.json                 why a run failed, until it succeeds
        interrupted/<study>/<run id>.json            runs that something outside ended, until they succeed
        damaged/<study>/<run id>                     what could not be read and was measured again
        locks/, drafts/                              what is being worked on
        jobs/<study>/                                jobs of a cluster that work on it

Any number of hosts may share a store. That results stay whole rests on names that no two writers share and on renames;
locks only save work. Nothing that may hold a result is ever deleted.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mlcollage.errors import InvalidInput, MLCollageError, StoreError, UnknownName
from mlcollage.lab import machine
from mlcollage.lab.evidence import Evidence, Failure
from mlcollage.lab.locks import Locks
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale

# A file that is missing, unreadable, or a folder, on a disk that works; None: what Arrow raises.
_DAMAGE = (None, errno.ENOENT, errno.EIO, errno.EISDIR, errno.ENOTDIR)
ATTEMPTS = 3  # times that something outside may end a run before it counts as failed
_READERS = 8  # threads
_IDENTITY = ["study", "experiment", "arm", "seed", "scale", "workload", "run"]  # columns of every stored table, first


class DamagedRun(StoreError):
    """A finished run whose files cannot be read any more."""


class Store:
    """A folder of results that any number of processes may share.

    A run's folder is written under a temporary name and renamed when complete, so a reader never sees half a result,
    whatever is killed when. A lock per run, freed by the system when its holder dies, keeps two commands
    from doing the same work.

    Parameters
    ----------
    root
        The folder; made when the first result is written.
    """

    def __init__(self, root: Path | str = "results") -> None:
        self.root = Path(root)
        self._locks = Locks(self.root / "locks")
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"{self.root} is a file; name a folder for the results.")

    def folder(self, run: Run) -> Path:
        """Where the run's result is or would be."""
        return self.root / "runs" / run.study / run.id

    def has(self, run: Run) -> bool:
        """Whether the run is finished."""
        # A run is renamed into its place whole, so that one of its files tells that all are there.
        return (self.folder(run) / "run.json").exists()

    def appears(self, run: Run) -> bool:
        """Whether the run is finished, by what the server says now.

        A client of a network share may remember for a minute that a name was not there; listing the folders asks anew.
        """
        if self.has(run):
            return True
        folder = self.folder(run)
        return folder.name in _names(folder.parent) and "run.json" in _names(folder)

    def ids(self, study: str) -> set[str]:
        """Ids of all runs of a study that have a folder: one listing, however many there are."""
        return _names(self.root / "runs" / study)

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Those of the runs that are not finished, by one listing per study."""
        there = {study: self.ids(study) for study in {run.study for run in runs}}
        return [run for run in runs if run.id not in there[run.study]]

    def failed(self, study: str) -> set[str]:
        """Ids of all runs of a study whose failure was noted."""
        return self._noted("failed", study)

    def interrupted(self, runs: Sequence[Run]) -> list[Run]:
        """Those of the runs of which an attempt was ended from outside, since they last failed or were finished."""
        noted = {study: self._noted("interrupted", study) for study in {run.study for run in runs}}
        return [run for run in runs if run.id in noted[run.study]]

    def tried(self, study: str) -> set[str]:
        """Ids of all runs of a study that were finished, failed or interrupted."""
        return self.ids(study) | self.failed(study) | self._noted("interrupted", study)

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Hold the run's lock; gives False if another process holds it."""
        with _explain(self.root):
            lock = self._locks.hold(run.id)  # the caller takes another run instead of waiting
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def holder(self, run: Run) -> str:
        """Who holds the run's lock: process, host, job, since when; "another command" if that is not known."""
        return self._locks.holder(run.id) or "another command"

    def commit(self, run: Run, measurements: Measurements, info: Mapping[str, Any]) -> None:
        """Write a finished run: all of it or nothing.

        Raises
        ------
        StoreError
            If the disk is full or the folder cannot be written; nothing half-written stays.
        """
        # A run is there whole or not at all: written elsewhere on the same disk, then renamed. No other writer has the
        # draft's name, also not one on another host that could not see our lock.
        draft = self.root / "drafts" / f"{run.id}.{machine.writer_name()}"
        try:
            with _explain(self.root):
                for name in _names(draft.parent):  # of processes that were killed
                    owned, _, writer = name.partition(".")
                    if owned == run.id and machine.writer_is_dead(writer):
                        shutil.rmtree(draft.parent / name, ignore_errors=True)
                # It may be there already: a server that made it and lost the reply is asked again by the client.
                draft.mkdir(parents=True, exist_ok=True)
                _write_table(draft / "measurements.parquet", run, measurements.table)
                if measurements.arrays:
                    # Without pickle, objects are refused here: what is pickled is never loaded.
                    np.savez_compressed(draft / "arrays.npz", allow_pickle=False, **measurements.arrays)
                # What else there must be, so that what is lost later is missed.
                there = {"rows": len(measurements), "arrays": sorted(measurements.arrays)}
                text = json.dumps({"id": run.id, **run.to_dict(), **there, **info}, indent=1)
                (draft / "run.json").write_text(text, "utf-8")
                for file in draft.iterdir():
                    # Renamed before its content is on the disk, a run could be empty after a power cut.
                    _flush_to_disk(file)
                self._publish(run, draft)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # ours alone
        with _explain(self.root):
            for note in ("failed", "interrupted"):
                self._note(note, run).unlink(missing_ok=True)

    def _publish(self, run: Run, draft: Path) -> None:
        """Rename a complete draft to the run's place; another's complete result there is as good as ours."""
        target = self.folder(run)
        for _ in range(3):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                draft.rename(target)
            except OSError as error:
                # A server may have renamed and lost the reply: the outcome counts, not the error.
                if self.appears(run):
                    return
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                self.set_aside(target)  # someone deleted run.json: the rest would be in the way forever
            else:
                _flush_folder(target.parent)
                return
        raise StoreError(f"something puts incomplete results of {run} into {target} again and again; look who does.")

    def record_failure(self, run: Run, reason: str, detail: str = "", more: Mapping[str, object] | None = None) -> None:
        """Note why a run failed; it is tried again by the next command and forgotten when it succeeds.

        ``detail`` is the traceback; ``more`` holds what else is known: host, job, memory, the log's last lines.
        """
        self._write_note("failed", run, {"reason": reason, "detail": detail, **(more or {})})
        with _explain(self.root):
            self._note("interrupted", run).unlink(missing_ok=True)

    def amend_failure(self, run: Run, more: Mapping[str, object]) -> None:
        """Add what else is known to the note of a failure."""
        self._write_note("failed", run, {**self.failure_record(run), **more})

    def record_interruption(self, run: Run, reason: str, more: Mapping[str, object] | None = None) -> int:
        """Note that something outside ended a run, such as a node that died; gives how often that has happened.

        The run is missing then and is tried again. After the third time it counts as failed.
        """
        before = self.interruptions(run)
        history = [*before, {"reason": reason, "host": machine.host(), **(more or {})}]
        if len(history) < ATTEMPTS:
            self._write_note("interrupted", run, {"history": history})
            self.forget_failure(run)  # of an earlier try
        else:
            listed = "; ".join(dict.fromkeys(str(attempt["reason"]) for attempt in history))
            self.record_failure(run, f"interrupted {len(history)} times ({listed})", more={"history": history})
        return len(history)

    def interruptions(self, run: Run) -> list[dict[str, Any]]:
        """What ended the run's earlier attempts from outside, since it last failed or was finished."""
        history = self._read_note("interrupted", run).get("history", [])
        return [dict(attempt) for attempt in history] if isinstance(history, list) else []

    def forget_failure(self, run: Run) -> None:
        """Remove the note of an earlier failure: the run is being tried again, elsewhere."""
        with _explain(self.root):
            self._note("failed", run).unlink(missing_ok=True)

    def _write_note(self, kind: str, run: Run, content: Mapping[str, object]) -> None:
        file = self._note(kind, run)
        with _explain(self.root):
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(f".{machine.writer_name()}")
            draft.write_text(json.dumps({**run.to_dict(), **content}, indent=1), "utf-8")
            draft.replace(file)  # whole or not at all, as for a run

    def _read_note(self, kind: str, run: Run) -> dict[str, Any]:
        try:
            return dict(json.loads(self._note(kind, run).read_text("utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError):
            return {"reason": f"unknown ({kind}/{run.study}/{run.id}.json cannot be read)"}

    def failure(self, run: Run) -> Failure | None:
        """Why the run failed the last time, or None."""
        if not self._note("failed", run).exists() or self.has(run):  # one before it was finished no longer counts
            return None
        return Failure(run, str(self._read_note("failed", run).get("reason", "unknown")))

    def failure_record(self, run: Run) -> dict[str, Any]:
        """All that was noted when the run failed: reason, traceback, host, job, memory, log; empty if it did not."""
        return self._read_note("failed", run)

    def notes(self, study: str) -> list[dict[str, Any]]:
        """What was noted of a study's failed and interrupted runs, each with its ``id`` and ``kind``."""
        found = []
        for kind in ("failed", "interrupted"):
            for name in sorted(self._noted(kind, study) - self.ids(study)):
                with suppress(OSError, ValueError, TypeError):
                    note = dict(json.loads((self.root / kind / study / f"{name}.json").read_text("utf-8")))
                    reason = note.get("reason") or (note.get("history") or [{}])[-1].get("reason", "unknown")
                    found.append({**note, "id": name, "kind": kind, "reason": reason})
        return found

    def _note(self, kind: str, run: Run) -> Path:
        return self.root / kind / run.study / f"{run.id}.json"

    def _noted(self, kind: str, study: str) -> set[str]:
        return {name.removesuffix(".json") for name in _names(self.root / kind / study) if name.endswith(".json")}

    def finished(self, study: str) -> list[Run]:
        """All finished runs of a study: every scale, workload and version."""
        return [run for _, run in self.all_finished(study) if run is not None]

    def table(self, run: Run) -> pd.DataFrame:
        """The run's rows."""
        file = self.folder(run) / "measurements.parquet"
        with self._reading(run, file):
            table = pd.read_parquet(file)
            # The file may be whole and yet be another's, or have been edited.
            lacking = {*_IDENTITY, "metric", "step", "value"} - set(table.columns)
            if lacking:
                raise ValueError(f"it lacks the columns {', '.join(sorted(lacking))}")
            if not (table["run"] == run.id).all():
                raise ValueError("it holds the rows of another run")
            if (rows := self.info(run).get("rows", len(table))) != len(table):
                raise ValueError(f"it holds {len(table)} of {rows} rows")
            numbers = (table["seed"], table["step"], table["value"])
            if len(table) and not all(map(pd.api.types.is_numeric_dtype, numbers)):
                raise ValueError("its seeds, steps and values are not all numbers")
            return table

    def info(self, run: Run) -> dict[str, Any]:
        """What is known of how the run was made: versions, device, seconds, memory, date."""
        file = self.folder(run) / "run.json"
        with self._reading(run, file):
            info = dict(json.loads(file.read_text("utf-8")))
            if info.get("id") != run.id:
                raise ValueError("it does not describe this run")
            return info

    def array(self, run: Run, name: str) -> npt.NDArray[Any]:
        """A named array of the run."""
        file = self.folder(run) / "arrays.npz"
        if not file.exists() and not self.info(run).get("arrays"):
            raise UnknownName(f"run {run} stored no arrays, so no {name!r} either.")
        with self._reading(run, file), np.load(file, allow_pickle=False) as arrays:
            if name not in arrays:
                raise UnknownName(f"run {run} has no array {name!r}; there are: {', '.join(arrays)}.")
            return np.asarray(arrays[name])

    @contextmanager
    def _reading(self, run: Run, file: Path) -> Iterator[None]:
        """What can be wrong with a file of a finished run, as one sentence."""
        try:
            yield
        except MLCollageError:
            raise
        except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            # The rest may be cured without measuring.
            if isinstance(error, OSError) and error.errno not in _DAMAGE:
                raise _as_store_error(error, self.root, file) from error  # permissions, a share that is gone
            raise DamagedRun(
                f"{file.name} of run {run} in {self.root} is damaged ({type(error).__name__}: {_first_line(error)}); "
                f"`mlcollage run {run.study}` measures it again, `mlcollage doctor` lists all such runs."
            ) from error

    def damage(self, run: Run, *, thorough: bool = False) -> str:
        """Why a finished run cannot be used, or "" if it can.

        ``thorough`` also reads every array; else only whether the file of arrays is whole is looked at.
        """
        try:
            self._whole(run, thorough)
        except DamagedRun as error:
            return str(error)
        return ""

    def _whole(self, run: Run, thorough: bool = False) -> tuple[dict[str, Any], pd.DataFrame]:
        """What is known of the run, and its rows, if all of its files are there."""
        info, table, arrays = self.info(run), self.table(run), self.folder(run) / "arrays.npz"
        if arrays.exists() or info.get("arrays"):
            with self._reading(run, arrays), zipfile.ZipFile(arrays) as archive:
                if thorough and (bad := archive.testzip()) is not None:
                    raise ValueError(f"{bad} fails its checksum")
        return info, table

    def set_aside(self, damaged: Run | Path) -> Path:
        """Move a damaged run, or the folder of one that cannot be read, out of the way; it is then measured again.

        What was set aside before stays: ``<run id>.1`` and so on.
        """
        folder = damaged if isinstance(damaged, Path) else self.folder(damaged)
        target = self.root / "damaged" / folder.parent.name / folder.name
        with _explain(self.root):
            target.parent.mkdir(parents=True, exist_ok=True)
            there = _names(target.parent)
            for name in (folder.name, *(f"{folder.name}.{k}" for k in range(1, 1000))):
                if name in there:
                    continue
                try:
                    folder.rename(target.with_name(name))  # all of it or nothing
                except OSError as error:
                    if not folder.exists():  # done, by us and without a reply, or by another command
                        break
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                    continue
                return target.with_name(name)
        return target

    def all_finished(self, study: str = "*") -> Iterator[tuple[Path, Run | None]]:
        """The folder of every finished run of every study, or of one; and the run, None where that cannot be read."""
        # Also folders without a run.json: a run is renamed into its place whole, so somebody deleted it.
        for folder in sorted(f for f in (self.root / "runs").glob(f"{study}/*") if f.is_dir()):
            run: Run | None = None
            with suppress(ValueError, KeyError, TypeError, OSError, MLCollageError):
                run = _run_of(folder / "run.json")
            yield folder, run if run is not None and self.folder(run) == folder else None

    def evidence(self, runs: Sequence[Run], *, study: str, scale: Scale, workload: str) -> Evidence:
        """What is there of these runs, as one table; failed and missing runs are said."""
        runs = list(runs)
        absent = set(self.missing(runs))
        found, damaged = self._read([run for run in runs if run not in absent])
        failed = {study: self.failed(study) for study in {run.study for run in absent}}
        noted = [run for run in runs if run in absent and run.id in failed[run.study]]
        failures = [f for run in noted if (f := self.failure(run)) is not None]
        done = [run for run, _, _ in found]
        ended = {run.id for run in done} | {f.run.id for f in failures}
        by_id = {run.id: run for run in done}
        return Evidence(
            study=study,
            scale=scale,
            workload=workload,
            table=_joined([rows for _, _, rows in found]),
            runs=done,
            failures=failures,
            info=[info for _, info, _ in found],
            waiting=[
                run for run in runs if run.id not in ended
            ],  # damaged ones among them: they will be measured again
            damaged=damaged,
            load_array=lambda run_id, name: self.array(by_id[run_id], name),  # evidence itself knows no folder
        )

    def _read(self, runs: Sequence[Run]) -> tuple[list[tuple[Run, dict[str, Any], pa.Table]], list[Failure]]:
        """Description and rows of each run, and those of which they cannot be read."""

        def read(run: Run) -> tuple[dict[str, Any], pa.Table] | Failure:
            try:
                return self._quick(run) or self._checked(run)
            except DamagedRun as error:
                return Failure(run, str(error))

        # On a network share most of the time is waiting; on a disk of this machine it is decoding.
        with ThreadPoolExecutor(min(_READERS, max(1, len(runs) // 100))) as pool:
            answers = list(zip(runs, pool.map(read, runs), strict=True))
        return (
            [(run, *answer) for run, answer in answers if not isinstance(answer, Failure)],
            [answer for _, answer in answers if isinstance(answer, Failure)],
        )

    def _checked(self, run: Run) -> tuple[dict[str, Any], pa.Table]:
        info, rows = self._whole(run)
        return info, pa.Table.from_pandas(rows, preserve_index=False)

    def _quick(self, run: Run) -> tuple[dict[str, Any], pa.Table] | None:
        """As :meth:`_whole` finds them, if nothing is unusual; None if the run must be looked at more closely."""
        folder = self.folder(run)
        try:
            info = json.loads((folder / "run.json").read_bytes())
            rows = pq.ParquetFile(folder / "measurements.parquet").read(use_threads=False)
            names = rows.column_names
            if info["arrays"]:
                zipfile.ZipFile(folder / "arrays.npz").close()  # reads its table of contents, at its end
            usual = (
                info["id"] == run.id
                and len(rows) == info["rows"]
                and names[:10] == [*_IDENTITY, "metric", "step", "value"]
                and [str(rows.schema.field(n).type) for n in ("seed", "step", "value")] == ["int64", "int64", "double"]
                and rows.column("run").unique().to_pylist() == [run.id]
            )
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, zipfile.BadZipFile):
            return None
        return (info, rows) if usual else None


def _joined(tables: Sequence[pa.Table]) -> pd.DataFrame:
    """One table of many, in their order; a column that one lacks is missing (NaN) there."""
    if not tables:
        return pd.DataFrame(columns=[*_IDENTITY, "metric", "step", "value"])
    # Tables with the same columns, mostly all, are joined at once: a frame for each would cost a millisecond each.
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for k, table in enumerate(tables):
        groups.setdefault(tuple((f.name, str(f.type)) for f in table.schema), []).append(k)
    frames = []
    for members in groups.values():
        schema = tables[members[0]].schema  # its notes for pandas hold for all: names and types are the same
        frame = pa.concat_tables([tables[k].cast(schema) for k in members]).to_pandas()
        frame.index = pd.Index(np.repeat(members, [len(tables[k]) for k in members]))
        frames.append(frame)
    # Columns in the order in which the tables name them first, rows in the order of the tables.
    joined = frames[0] if len(frames) == 1 else pd.concat(frames).sort_index(kind="stable")
    return joined.reset_index(drop=True)


def _names(folder: Path) -> set[str]:
    """Names in a folder, asked of the server; none if there is no folder."""
    for _ in range(2):
        try:
            return set(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return set()
        except OSError as error:
            if error.errno != errno.ESTALE:  # the folder was replaced since this client last saw it: look again
                raise
    return set()


def _write_table(file: Path, run: Run, rows: pd.DataFrame) -> None:
    identity = {
        "study": run.study,
        "experiment": run.experiment,
        "scale": str(run.scale),
        "workload": run.workload,
        "run": run.id,
    }
    table = rows.assign(**identity)
    for column, value in (("arm", run.arm), ("seed", run.seed)):
        # A run of several seeds or arms has written them into its rows.
        table[column] = table[column].where(table[column].notna(), value) if column in table else value
    table["seed"] = table["seed"].astype("int64")
    if clash := sorted(set(identity) & set(rows.columns)):
        raise InvalidInput(f"measurements may not use the columns {', '.join(clash)}; rename them in the experiment.")
    first = [*_IDENTITY, "metric", "step", "value"]
    table[[*first, *(c for c in table if c not in first)]].to_parquet(file, index=False)


def _flush_to_disk(file: Path) -> None:
    with file.open("r+b") as handle:  # Windows flushes only what is open for writing
        os.fsync(handle.fileno())


def _flush_folder(folder: Path) -> None:
    """The rename itself, where the system can: else a power cut may lose it, and the run is missing."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _run_of(file: Path) -> Run:
    """The run that a ``run.json`` describes."""
    content = dict(json.loads(file.read_text("utf-8")))
    return Run.from_dict({k: v for k, v in content.items() if k in Run.__dataclass_fields__})


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no details"])[0][:200]


@contextmanager
def _explain(root: Path) -> Iterator[None]:
    """Turn the system's errors into sentences that say what to do."""
    try:
        yield
    except MLCollageError:
        raise
    except OSError as error:
        raise _as_store_error(error, root, None) from error


def _as_store_error(error: OSError, root: Path, file: Path | None) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        nearest = next(p for p in (root, *root.absolute().parents) if p.exists())
        free = shutil.disk_usage(nearest).free / 1e6
        text = f"the disk of {root} is full ({free:.0f} MB free); free space and run again: finished runs are kept."
        return StoreError(errno.ENOSPC, text)
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return StoreError(
            f"{error.filename or root} cannot be written ({error.strerror}); choose another folder with --store."
        )
    return StoreError(
        f"{file or error.filename or root} cannot be read or written ({error.strerror or error}); check the disk or "
        "the share and run again, or choose another folder with --store: what is finished stays."
    )
