"""Where results are kept: one folder a run, complete or not there at all.

Layout, readable with any Parquet tool (``duckdb "select * from 'results/runs/**/measurements.parquet'"``)::

    results/
        runs/<study>/<run id>/run.json               what was run, with which versions, how long
        runs/<study>/<run id>/measurements.parquet   study, experiment, arm, seed, metric, step, value, ...
        runs/<study>/<run id>/arrays.npz             named arrays, if any
        failed/<study>/<run id>.json                 why a run failed, until it succeeds
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

__all__ = ["Store"]

_IDENTITY = ["study", "experiment", "arm", "seed", "scale", "workload", "run"]


class Store:
    """A folder of results that any number of processes may share.

    A run's folder is written under a temporary name and renamed when complete, so a reader never sees half a result,
    whatever is killed when. A lock a run, freed by the system when its holder dies, keeps two commands
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
                lock.acquire(timeout=0)
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
        draft = self.root / "drafts" / f"{run.id}.{os.getpid()}"
        try:
            with _explain(self.root):
                for leftover in draft.parent.glob(f"{run.id}.*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                draft.mkdir(parents=True)
                _write_table(draft / "measurements.parquet", run, measurements.table)
                if measurements.arrays:
                    np.savez_compressed(draft / "arrays.npz", allow_pickle=False, **measurements.arrays)
                text = json.dumps({"id": run.id, **run.to_dict(), **info}, indent=1)
                (draft / "run.json").write_text(text, "utf-8")
                for file in draft.iterdir():
                    _flush_to_disk(file)
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists() and not self.has(run):
                    shutil.rmtree(target)  # someone deleted run.json: the rest would be in the way for ever
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
            draft.replace(file)

    def failure(self, run: Run) -> Failure | None:
        """Why the run failed the last time, or None."""
        file = self._failure(run)
        if self.has(run) or not file.exists():
            return None
        return Failure(run, str(_read_json(file).get("reason", "unknown")))

    def _failure(self, run: Run) -> Path:
        return self.root / "failed" / run.study / f"{run.id}.json"

    def finished(self, study: str) -> list[Run]:
        """All finished runs of a study: every scale, workload and version."""
        files = sorted((self.root / "runs" / study).glob("*/run.json"))
        names = Run.__dataclass_fields__
        return [Run.from_dict({k: v for k, v in _read_json(file).items() if k in names}) for file in files]

    def table(self, run: Run) -> pd.DataFrame:
        """The run's rows."""
        file = self.folder(run) / "measurements.parquet"
        with _explain(self.root, file):
            return pd.read_parquet(file)

    def info(self, run: Run) -> dict[str, Any]:
        """What is known of how the run was made: versions, device, seconds, memory, date."""
        return _read_json(self.folder(run) / "run.json")

    def array(self, run: Run, name: str) -> npt.NDArray[Any]:
        """A named array of the run."""
        file = self.folder(run) / "arrays.npz"
        if not file.exists():
            raise UnknownName(f"run {run} stored no arrays, so no {name!r} either.")
        with _explain(self.root, file), np.load(file, allow_pickle=False) as arrays:
            if name not in arrays:
                raise UnknownName(f"run {run} has no array {name!r}; there are: {', '.join(arrays)}.")
            return np.asarray(arrays[name])

    def evidence(self, runs: Sequence[Run], *, study: str, scale: Scale, workload: str) -> Evidence:
        """What is there of these runs, as one table; failed and missing runs are said."""
        done = [run for run in runs if self.has(run)]
        tables = [self.table(run) for run in done]
        empty = pd.DataFrame(columns=[*_IDENTITY, "metric", "step", "value"])
        table = pd.concat(tables, ignore_index=True) if tables else empty
        failures = [f for run in runs if (f := self.failure(run)) is not None]
        by_id = {run.id: run for run in done}
        return Evidence(
            study=study,
            scale=scale,
            workload=workload,
            table=table,
            runs=done,
            failures=failures,
            info=[self.info(run) for run in done],
            missing=len(runs) - len(done) - len(failures),
            load_array=lambda run_id, name: self.array(by_id[run_id], name),
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
        table[column] = table[column].where(table[column].notna(), value) if column in table else value
    table["seed"] = table["seed"].astype("int64")
    if clash := sorted(set(identity) & set(rows.columns)):
        raise InvalidInput(
            f"measurements may not use the column names {', '.join(clash)}; rename them in the experiment."
        )
    first = [*_IDENTITY, "metric", "step", "value"]
    table[[*first, *(c for c in table if c not in first)]].to_parquet(file, index=False)


def _flush_to_disk(file: Path) -> None:
    with file.open("r+b") as handle:  # Windows flushes only what is open for writing
        os.fsync(handle.fileno())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} cannot be read ({error}); delete its folder and run again.") from error
    return dict(content)


@contextmanager
def _explain(root: Path, file: Path | None = None) -> Iterator[None]:
    """Turn the system's errors into sentences that say what to do."""
    try:
        yield
    except MLCollageError:
        raise
    except OSError as error:
        raise _as_store_error(error, root, file) from error
    except ValueError as error:
        if file is None:
            raise
        raise StoreError(f"{file} is damaged ({error}); delete the folder {file.parent} and run again.") from error


def _as_store_error(error: OSError, root: Path, file: Path | None) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        nearest = next(p for p in (root, *root.absolute().parents) if p.exists())
        free = shutil.disk_usage(nearest).free / 1e6
        text = (
            f"the disk of {root} is full ({free:.0f} MB free); free some space and run again: finished runs are kept."
        )
        return StoreError(errno.ENOSPC, text)
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return StoreError(
            f"{error.filename or root} cannot be written ({error.strerror}); choose another folder with --store."
        )
    return StoreError(f"{file or error.filename or root} cannot be read or written ({error}); delete it and run again.")
