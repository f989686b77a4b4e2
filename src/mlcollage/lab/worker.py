"""What happens inside the process of one run, whatever engine started it."""

from __future__ import annotations

import errno
import os
import platform
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import wait
from multiprocessing.process import parent_process
from pathlib import Path
from typing import Any

from mlcollage import __version__
from mlcollage._users import described
from mlcollage.errors import InvalidInput, MLCollageError, StoreError
from mlcollage.lab.bound import BoundStudy, device_at
from mlcollage.lab.claim import fingerprint
from mlcollage.lab.machine import host
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.store import Store

EXIT_FAILED = 3
EXIT_DISK = 28  # as ENOSPC; a full disk cannot hold a record of the failure, so the exit code says it
# Parallel runs, each with threads for all cores, would be many times slower than one thread each; and sums of other
# numbers of threads are rounded in another order.
_LIBRARIES = ("OMP", "MKL", "OPENBLAS", "NUMBA")
THREAD_VARIABLES = (*(f"{library}_NUM_THREADS" for library in _LIBRARIES), "VECLIB_MAXIMUM_THREADS")
_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "pandas", "numba")


def execute(study: BoundStudy, run: Run, store: Store) -> None:
    """Measure one run and commit it; exceptions pass through.

    Raises
    ------
    InvalidInput
        If the workload is no longer the one that the run was made for.
    """
    # The name holds a fingerprint of the file. Checked here too: this process loads the workload by itself.
    if study.workload_name != run.workload:
        raise InvalidInput(
            f"the workload {study.workload_spec} is now {study.workload_name}, no longer {run.workload}: its file was "
            "changed after the command began; run the command again."
        )
    started = datetime.now(UTC)
    clock, processor = time.perf_counter(), time.process_time()  # the load of other runs shows in the first only
    measurements = study.measure(run)
    info = {
        "claims": fingerprint(study.claims),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 3),
        "cpu_seconds": round(time.process_time() - processor, 3),
        "peak_memory_mb": _peak_memory_mb(),
        "device": _device(run.scale),
        "host": host(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {"mlcollage": __version__, **{p: version(p) for p in _PACKAGES}},
    }
    store.commit(run, measurements, info)


def main(
    slug: str,
    spec: dict[str, Any],
    workload: str | None,
    root: str,
    environment: dict[str, str],
    folder: str,
    threads: int = 1,
    log: str | None = None,
) -> None:
    """Body of a run's own process: its threads, gone with its parent, failures written down.

    ``folder`` becomes the current one; what is printed goes to the file ``log``, by default to standard error.
    """
    _own_signals()
    if log is not None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    os.dup2(2, 1)  # what a study or a user's model prints must not end up between the command's JSON
    _die_with_parent()
    # The process was forked from a server that may be older than the parent's present environment.
    os.environ.update({**environment, **dict.fromkeys(THREAD_VARIABLES, str(threads))})
    _prefer_this_process_when_memory_runs_out()
    os.chdir(folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # so that --workload module:function finds modules beside the user
    run = Run.from_dict(spec)
    store = Store(root)
    _say_warnings_once(run)
    try:
        _limit_threads(threads)
        execute(BoundStudy(slug, run.scale, workload), run, store)
    except BaseException as error:  # also SystemExit
        if isinstance(error, StoreError) and error.errno == errno.ENOSPC:
            os._exit(EXIT_DISK)  # not sys.exit: the server's own handlers must not run in its fork
        reason = str(error) if isinstance(error, MLCollageError) else described(error)
        if log is not None:
            traceback.print_exc()
        more = {"host": host(), "job": os.environ.get("SLURM_JOB_ID", ""), "peak_memory_mb": _peak_memory_mb()}
        store.record_failure(run, reason, traceback.format_exc(), more)
        os._exit(EXIT_FAILED)


def _own_signals() -> None:
    """The system's handlers, in a session of its own: warnings to a job reach whoever is to handle them."""
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if hasattr(os, "setsid"):
        with suppress(OSError):
            os.setsid()


def _say_warnings_once(run: Run) -> None:
    """Give each warning in one line that names the run; the same one with other numbers is not said again."""
    said: set[tuple[str, int]] = set()

    def say(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if (filename, lineno) not in said:
            said.add((filename, lineno))
            print(f"{run}: {category.__name__}: {message}", file=sys.stderr, flush=True)

    warnings.showwarning = say  # type: ignore[assignment]


def _limit_threads(threads: int) -> None:
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads)


def _die_with_parent() -> None:
    """End this process when the command that wants its result is killed."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    # The sentinel becomes ready when the parent has ended, whatever ended it.
    threading.Thread(target=watch, daemon=True).start()


def _prefer_this_process_when_memory_runs_out() -> None:
    """Ask Linux to end a run, not the command that runs it, when the machine's memory is gone."""
    # 1000 is the largest score: this process is the first that the kernel ends.
    file = Path("/proc/self/oom_score_adj")
    if file.exists() and os.access(file, os.W_OK):
        file.write_text("1000")


def _peak_memory_mb() -> float:
    if sys.platform == "win32":
        import psutil

        return round(psutil.Process().memory_info().peak_wset / 1e6, 1)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, in kilobytes elsewhere
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)


def _device(scale: Scale) -> str:
    """What runs of this scale use, which may be less than what the machine has."""
    import torch

    return torch.cuda.get_device_name() if device_at(scale) == "cuda" else "cpu"
