"""What an engine is, and the one for this machine.

An engine only executes: what is missing, and what is tried again, is decided in :mod:`mlcollage.lab.running`. Engines
of clusters start the local one on their nodes (:mod:`mlcollage.lab.node`).
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from mlcollage.errors import InvalidInput, StoreError
from mlcollage.lab import machine
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.resources import Resources
from mlcollage.lab.run import Run
from mlcollage.lab.store import ATTEMPTS, Store
from mlcollage.lab.worker import EXIT_DISK, EXIT_FAILED, THREAD_VARIABLES
from mlcollage.lab.worker import main as worker_main

# Imported once, before runs are forked: two seconds each run would otherwise spend. torch imports _dynamo with the
# first optimizer. Importing them starts no Python thread and does not touch a GPU, so that forking afterwards is safe.
# Studies are not among them: the server outlives an edit of a study in a notebook, and would go on with the old one.
_PRELOADED = ("mlcollage.lab.worker", "torch", "torch._dynamo", "numba", "scipy.optimize", "scipy.stats", "sklearn.svm")
# Signals by which a system, a person or a cluster ends what runs; the rest tell of the run itself.
_FROM_OUTSIDE = {int(getattr(signal, n)) for n in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, n)}
_NO_EXIT_CODE = 255  # what multiprocessing reports when the server that forked a process is gone
_PAUSES = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between attempts to start a process after the server was killed


@dataclass(frozen=True)
class Event:
    """Something happened to a run.

    ``queued`` (a cluster has it; ``reason`` is the cluster's), ``started``, ``done``, ``failed``, ``waiting`` (another
    command has it), or ``interrupted``: something outside ended it, it is missing and will be tried again.
    """

    kind: Literal["queued", "started", "done", "failed", "waiting", "interrupted"]
    run: Run
    reason: str = ""
    seconds: float = 0.0


class Engine(Protocol):
    """Executes runs somewhere: processes here, a Ray cluster, Slurm jobs.

    An engine calls :func:`mlcollage.lab.worker.execute` for each run (or starts something that does), holds the
    store's lock of a run while it works on it, and writes down failures with ``store.record_failure``, and what was
    not the run's fault with ``store.record_interruption``.
    """

    def execute(self, study: BoundStudy, runs: Sequence[Run], store: Store, on_event: Callable[[Event], None]) -> None:
        """Execute the runs; return when each is finished, failed, interrupted or finished by someone else."""
        ...


@dataclass
class _Job:
    run: Run
    process: Any
    lock: ExitStack
    started: float
    needs: Resources
    limit: float  # bytes of resident memory
    log: Path | None = None
    peak: float = 0.0  # bytes when last seen
    over: str = ""  # why we ended it


@dataclass
class LocalEngine:
    """Each run in its own process with one BLAS thread.

    Processes are forked from a server that has imported torch once, so a run costs milliseconds to start.
    A run that raises, is killed or takes too much memory is recorded as failed and the others go on.

    Parameters
    ----------
    workers
        Cores to use, which is processes at a time where a run needs one; default all that this process may use.
    memory_share
        A run is ended when its resident memory passes this share of the memory that was available at the start, or
        what its experiment declares.
    environment
        Variables of the runs' environment; default this process's, all of them.
    log_folder
        Where to put what runs print, in a file each that is removed when its run ends; default standard error.
    """

    workers: int | None = None
    memory_share: float = 0.8
    poll_seconds: float = 0.1
    environment: Mapping[str, str] | None = None
    log_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InvalidInput(f"workers={self.workers} must be at least 1.")

    def execute(self, study: BoundStudy, runs: Sequence[Run], store: Store, on_event: Callable[[Event], None]) -> None:
        """Execute the runs (see :class:`Engine`)."""
        needs = {e.name: e.resources for e in study.study.experiments}
        limit = machine.memory() * self.memory_share
        session = _Session(study, store, on_event, _context(), self, needs, limit, deque(runs))
        try:
            while session.queue or session.jobs:
                busy = session.start()
                # Ends of processes wake us at once; the timeout is for memory, and for runs of other commands.
                session.wait(timeout=0.5 if busy else self.poll_seconds)
        finally:
            session.close()


@dataclass
class _Session:
    """One call of ``execute``: what waits, what runs, and what has been said of it."""

    study: BoundStudy
    store: Store
    on_event: Callable[[Event], None]
    context: Any  # of multiprocessing
    engine: LocalEngine
    needs: Mapping[str, Resources]  # of each experiment
    limit: float  # bytes of resident memory that a run may take
    queue: deque[Run]
    jobs: list[_Job] = field(default_factory=list)
    announced: set[Run] = field(default_factory=set)  # that another command is measuring
    again: set[Run] = field(default_factory=set)  # whose server was killed, once

    def start(self) -> bool:
        """Fill free places; returns True if all that is left is being done by another command."""
        cores = self.engine.workers or machine.cores()
        for _ in range(len(self.queue)):
            run = self.queue[0]
            needs = self.needs.get(run.experiment, Resources())
            taken = sum(job.needs.cpus for job in self.jobs)
            if self.jobs and taken + needs.cpus > cores:  # one that needs more than there is runs alone
                return False
            self.queue.popleft()
            lock = ExitStack()  # held until the run's process has ended, so that no other command begins the run
            if not lock.enter_context(self.store.claim(run)):
                self.queue.append(run)
                if run not in self.announced:
                    self.announced.add(run)
                    self.on_event(Event("waiting", run, f"{self.store.holder(run)} is measuring it"))
                continue
            if self.store.has(run):  # finished by another command since we looked
                lock.close()
                self.on_event(Event("done", run))
                continue
            self.jobs.append(self._job(run, needs, lock))
            self.on_event(Event("started", run))
        return bool(self.queue) and not self.jobs

    def _job(self, run: Run, needs: Resources, lock: ExitStack) -> _Job:
        root = str(self.store.root.absolute())  # the process may have another current folder
        environment = dict(os.environ if self.engine.environment is None else self.engine.environment)
        log = None if self.engine.log_folder is None else self.engine.log_folder / f"{run.id}.log"
        what = (self.study.slug, run.to_dict(), self.study.workload_spec, root, environment, os.getcwd(), needs.cpus)
        process = _started(self.context, (*what, None if log is None else str(log)), needs.cpus)
        declared = float("inf") if needs.memory_gb is None else needs.memory_gb * 1e9
        return _Job(run, process, lock, time.monotonic(), needs, min(self.limit, declared), log)

    def wait(self, timeout: float) -> None:
        """Wait for a process to end, then end those that take too much and finish those that have ended."""
        connection.wait([job.process.sentinel for job in self.jobs], timeout=timeout)
        for job in list(self.jobs):
            self._watch(job)
            if job.process.exitcode is None:
                continue
            self.jobs.remove(job)
            if _server_is_gone(job, self.store) and job.run not in self.again:
                self.again.add(job.run)  # it was not the run's fault; multiprocessing starts a new server
                self.queue.appendleft(job.run)
                job.lock.close()
            else:
                self._finish(job)

    def close(self) -> None:
        """End what still runs: after Ctrl-C, or an error such as a full disk."""
        for job in self.jobs:
            job.process.kill()
            job.process.join()
            job.lock.close()

    def _watch(self, job: _Job) -> None:
        import psutil

        try:
            used = psutil.Process(job.process.pid).memory_info().rss
        except psutil.Error:  # it has just ended
            return
        job.peak = max(job.peak, used)
        if used > job.limit:
            job.over = (
                f"ended because it took more than {job.limit / 1e9:.1f} GB of memory; use fewer workers, a smaller "
                "scale, or a machine or job with more memory"
            )
        elif job.needs.minutes is not None and time.monotonic() - job.started > 60 * job.needs.minutes:
            job.over = f"ended after {job.needs.minutes:g} minutes, the time that its experiment declares"
        if job.over:
            job.process.kill()
            job.process.join()

    def _finish(self, job: _Job) -> None:
        seconds = time.monotonic() - job.started
        code, store = job.process.exitcode, self.store
        with job.lock:  # let go of in any case
            if code == EXIT_DISK:  # every further run would fail in the same way
                raise StoreError(f"the disk of {store.root} is full; free space and run again: finished runs are kept.")
            if code == 0 and store.appears(job.run):
                _removed(job.log)
                self.on_event(Event("done", job.run, seconds=seconds))
                return
            more: dict[str, object] = {
                "host": machine.host(),
                "job": os.environ.get("SLURM_JOB_ID", ""),
                "peak_memory_mb": round(job.peak / 1e6, 1),
                "log": last_lines(job.log),
            }
            _removed(job.log)
            if not job.over and code is not None and -code in _FROM_OUTSIDE:
                reason = f"ended by signal {signal.Signals(-code).name} on {machine.host()}"
                if store.record_interruption(job.run, reason, more) < ATTEMPTS:
                    self.on_event(Event("interrupted", job.run, reason, seconds))
                    return
            elif code != EXIT_FAILED or store.failure(job.run) is None:  # it died before it could say why
                store.record_failure(job.run, _why(job), more=more)
            elif more["log"]:
                store.amend_failure(job.run, {"log": more["log"]})
            failure = store.failure(job.run)
            self.on_event(Event("failed", job.run, failure.reason if failure else "unknown", seconds))


def last_lines(file: Path | None, lines: int = 50, most: int = 20_000) -> str:
    """The last lines of a log, at most so many bytes of it; "" if there is none."""
    if file is None:
        return ""
    with suppress(OSError), file.open("rb") as handle:
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - most))
        return "\n".join(handle.read().decode("utf-8", "replace").splitlines()[-lines:])
    return ""


def _removed(log: Path | None) -> None:
    if log is not None:
        with suppress(OSError):
            log.unlink()


def _started(context: Any, arguments: tuple[Any, ...], threads: int) -> Any:
    """A process that works on a run; if the server was killed in the meantime, multiprocessing starts a new one."""

    def start() -> Any:
        process = context.Process(target=worker_main, args=arguments, daemon=True)
        with _thread_environment(threads), _without_main():
            process.start()
        return process

    # A server that was killed closes its socket a moment before the system reports its end, and until then
    # multiprocessing takes it for alive: so we ask again, a little later each time, for about three seconds.
    for pause in _PAUSES:
        try:
            return start()
        except (OSError, EOFError):
            time.sleep(pause)
    return start()


def _server_is_gone(job: _Job, store: Store) -> bool:
    """Whether the server that processes are forked from was killed: its pipe then ends without an exit code.

    The run's own process may still live. It is ended, so that nobody works on the run twice.
    """
    # The exit code alone does not tell it: we kill runs over the memory limit ourselves.
    if job.process.exitcode != _NO_EXIT_CODE or job.over or store.has(job.run):
        return False
    with suppress(ProcessLookupError):
        os.kill(job.process.pid, signal.SIGKILL)
    return True


def _why(job: _Job) -> str:
    code = job.process.exitcode
    if job.over:
        return job.over
    if code == -getattr(signal, "SIGKILL", 9):  # Windows has no such signal
        return (
            "killed (SIGKILL; by a person, or by the system for want of memory): when last seen it had taken "
            f"{job.peak / 1e9:.1f} GB of the {job.limit / 1e9:.1f} GB that it might take"
        )
    if code is not None and code < 0:  # multiprocessing's way to say which signal it was
        return f"killed by signal {signal.Signals(-code).name}"
    return f"its process ended with exit code {code} and left no result"


def _context() -> Any:
    """Fork from a clean server where there is one: starting a run then costs no imports."""
    if "forkserver" not in mp.get_all_start_methods():  # Windows: each run imports torch anew
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    # A fork of the command itself would copy its threads' locks; a server without threads is safe to fork from.
    context.set_forkserver_preload(list(_PRELOADED))
    with _thread_environment(1), _interrupts_held():
        forkserver.ensure_running()
    return context


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal; one that is started meanwhile never sees it, the parent does after.

    The server would otherwise print a traceback if it is interrupted during its imports.
    """
    resource_tracker.ensure_running()  # the server needs it, and starting it would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _thread_environment(threads: int) -> Iterator[None]:
    """BLAS libraries read these when they are loaded, so they must be set before a process starts."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep the user's script out of the processes of runs.

    multiprocessing would import it again in each of them, and a script that calls ``run_study`` without asking
    ``if __name__ == "__main__"`` would start itself for ever. A run needs nothing from it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
