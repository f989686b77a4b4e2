"""Where results are kept: one folder a run, complete or not there at all.

Layout, readable with any Parquet tool (``duckdb "select * from 'results/runs/**/measurements.parquet'"``)::

    results/
        runs/<study>/<run id>/run.json               what was run, with which versions, how long
        runs/<study>/<run id>/measurements.parquet   study, experiment, arm, seed, metric, step, value, ...
        runs/<study>/<run id>/arrays.npz             named arrays, if any
        failed/<study>/<run id>.json                 why a run failed, until it succeeds
        damaged/<study>/<run id>                     what could not be read and was measured again
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from filelock import BaseFileLock, FileLock, Timeout

from mlcollage.errors import InvalidInput, MLCollageError, StoreError, UnknownName
from mlcollage.lab.evidence import Evidence, Failure
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale

# A file that is missing, unreadable, or a folder, on a disk that works; None: what Arrow raises.
_DAMAGE = (None, errno.ENOENT, errno.EIO, errno.EISDIR, errno.ENOTDIR)
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
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"{self.root} is a file; name a folder for the results.")

    def folder(self, run: Run) -> Path:
        """Where the run's result is or would be."""
        return self.root / "runs" / run.study / run.id

    def has(self, run: Run) -> bool:
        """Whether the run is finished."""
        # A run is renamed into its place whole, so that one of its files tells that all are there.
        return (self.folder(run) / "run.json").exists()

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Hold the run's lock; gives False if another process holds it."""
        lock = self._lock(run)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def _lock(self, run: Run) -> BaseFileLock | None:
        folder = self.root / "locks"
        with _explain(self.root):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"{run.id}.lock")
            try:
                lock.acquire(timeout=0)  # the caller takes another run instead of waiting
            except Timeout:  # an OSError too
                return None
        return lock

    def commit(self, run: Run, measurements: Measurements, info: Mapping[str, Any]) -> None:
        """Write a finished run: all of it or nothing.

        Raises
        ------
        StoreError
            If the disk is full or the folder cannot be written; nothing half-written stays.
        """
        target = self.folder(run)
        # A run is there whole or not at all: written elsewhere on the same disk, then renamed.
        draft = self.root / "drafts" / f"{run.id}.{os.getpid()}"
        try:
            with _explain(self.root):
                # Of a process that was killed; nobody else writes this run, since we hold its lock.
                for leftover in draft.parent.glob(f"{run.id}.*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                draft.mkdir(parents=True)
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
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists() and not self.has(run):
                    self.set_aside(target)  # someone deleted run.json: the rest would be in the way forever
                try:
                    draft.rename(target)
                except OSError as error:
                    # Another process finished the same run first: its result is as good as ours.
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        with _explain(self.root):
            self._failure(run).unlink(missing_ok=True)

    def record_failure(self, run: Run, reason: str, detail: str = "") -> None:
        """Note why a run failed; it is tried again by the next command and forgotten when it succeeds."""
        file = self._failure(run)
        with _explain(self.root):
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps({**run.to_dict(), "reason": reason, "detail": detail}, indent=1), "utf-8")
            draft.replace(file)  # whole or not at all, as for a run

    def failure(self, run: Run) -> Failure | None:
        """Why the run failed the last time, or None."""
        file = self._failure(run)
        if self.has(run) or not file.exists():  # a failure before the run was finished no longer counts
            return None
        try:
            reason = str(dict(json.loads(file.read_text("utf-8"))).get("reason", "unknown"))
        except (OSError, ValueError, TypeError):
            reason = f"unknown ({file.name} in {file.parent} cannot be read)"
        return Failure(run, reason)

    def _failure(self, run: Run) -> Path:
        return self.root / "failed" / run.study / f"{run.id}.json"

    def finished(self, study: str) -> list[Run]:
        """All finished runs of a study: every scale, workload and version."""
        return [run for folder, run in self.all_finished() if run is not None and folder.parent.name == study]

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
        """Move a damaged run, or the folder of one that cannot be read, out of the way; it is then measured again."""
        folder = damaged if isinstance(damaged, Path) else self.folder(damaged)
        target = self.root / "damaged" / folder.parent.name / folder.name
        with _explain(self.root):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            folder.replace(target)  # a rename: all of it or nothing
        return target

    def all_finished(self) -> Iterator[tuple[Path, Run | None]]:
        """The folder of every finished run of every study, and the run; None where that cannot be read."""
        # Also folders without a run.json: a run is renamed into its place whole, so somebody deleted it.
        for folder in sorted(f for f in (self.root / "runs").glob("*/*") if f.is_dir()):
            run: Run | None = None
            with suppress(ValueError, KeyError, TypeError, OSError, MLCollageError):
                run = _run_of(folder / "run.json")
            yield folder, run if run is not None and self.folder(run) == folder else None

    def evidence(self, runs: Sequence[Run], *, study: str, scale: Scale, workload: str) -> Evidence:
        """What is there of these runs, as one table; failed and missing runs are said."""
        done, tables, infos, damaged = [], [], [], []
        for run in runs:
            if not self.has(run):
                continue
            try:
                info, rows = self._whole(run)
            except DamagedRun as error:
                damaged.append(Failure(run, str(error)))
                continue
            done.append(run)
            tables.append(rows)
            infos.append(info)
        empty = pd.DataFrame(columns=[*_IDENTITY, "metric", "step", "value"])
        table = pd.concat(tables, ignore_index=True) if tables else empty
        failures = [f for run in runs if (f := self.failure(run)) is not None]
        ended = {run.id for run in done} | {f.run.id for f in failures}
        by_id = {run.id: run for run in done}
        return Evidence(
            study=study,
            scale=scale,
            workload=workload,
            table=table,
            runs=done,
            failures=failures,
            info=infos,
            waiting=[
                run for run in runs if run.id not in ended
            ],  # damaged ones among them: they will be measured again
            damaged=damaged,
            load_array=lambda run_id, name: self.array(by_id[run_id], name),  # evidence itself knows no folder
        )


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
        f"{file or error.filename or root} cannot be read or written ({error.strerror or error}); check the disk, or "
        "choose another folder with --store."
    )
