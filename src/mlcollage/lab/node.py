"""What a node of a cluster does with the runs that an engine sends there, and what is sent: an :class:`Order`.

An order is plain data. It carries a fingerprint of the code, so that a job which starts hours later never measures an
edited study under the old study's ids, and only those variables of the environment that were asked for: the rest of the
node's own environment (its GPUs, its scratch space, its libraries) holds.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import mlcollage
from mlcollage.errors import InvalidInput, MLCollageError
from mlcollage.lab import machine
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.engine import Event, LocalEngine
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.store import Store

SENT = ("MLCOLLAGE_*", "PYTHONPATH", "PYTHONHASHSEED")
"""Variables that are always sent along; names may end in a star."""


@dataclass(frozen=True)
class Order:
    """Runs for one node.

    Parameters
    ----------
    study, scale, workload
        What they belong to; ``workload`` as the user named it.
    store, folder
        Absolute paths: the folder of results and the user's current folder, which the node must see under these names.
    runs
        As :meth:`Run.to_dict <mlcollage.lab.run.Run.to_dict>` gives them.
    code
        Fingerprint of mlcollage and of the study (:func:`fingerprint_of`).
    environment
        Variables to set.
    cores
        How many to use; None: all that the job was given.
    gpus
        Without any, the node's GPUs are hidden from the runs.
    """

    study: str
    scale: str
    workload: str | None
    store: str
    folder: str
    runs: Sequence[Mapping[str, Any]]
    code: str
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: int | None = None
    gpus: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        return asdict(self)


def order_for(
    study: BoundStudy,
    runs: Sequence[Run],
    store: Store,
    *,
    environment: Sequence[str] = (),
    cores: int | None = None,
    gpus: int = 0,
) -> Order:
    """The order of these runs; ``environment`` names further variables to send."""
    return Order(
        study=study.slug,
        scale=str(study.scale),
        workload=study.workload_spec,
        store=str(store.root.absolute()),
        folder=os.getcwd(),
        runs=[run.to_dict() for run in runs],
        code=fingerprint_of(study),
        environment=sent_variables(environment),
        cores=cores,
        gpus=gpus,
    )


def sent_variables(names: Sequence[str] = ()) -> dict[str, str]:
    """Those of this process's variables that are sent to nodes."""
    patterns = (*SENT, *names)
    return {k: v for k, v in os.environ.items() if any(fnmatch.fnmatchcase(k, p) for p in patterns)}


def fingerprint_of(study: BoundStudy) -> str:
    """Hash of mlcollage's version and sources and of the sources of the study's package."""
    own = Path(mlcollage.__file__).parent
    package = importlib.import_module(study.paper.package or "mlcollage").__file__
    folders = {own, Path(package).parent if package else own}
    return _hash_of(mlcollage.__version__, tuple(sorted(f for f in folders if f == own or own not in f.parents)))


@cache
def _hash_of(version: str, folders: tuple[Path, ...]) -> str:
    found = hashlib.sha256(version.encode())
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            found.update(f"\n{file.relative_to(folder).as_posix()}\n".encode())
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


class JobEnded(BaseException):
    """The cluster asks this job to end: pre-empted, cancelled, out of time, or its node is drained."""


def carry_out(order: Mapping[str, Any], say: Callable[[dict[str, Any]], None] = lambda fact: None) -> None:
    """Execute the runs of an order (a dictionary) here, each in a process of its own.

    Parameters
    ----------
    order
        What :meth:`Order.to_dict` gave.
    say
        Is given facts for whoever sent the order: first ``{"host": ..., "refused": ""}`` or the sentence why nothing
        is run here; then ``{"run": id, "kind": "started"}`` and so on.

    Raises
    ------
    JobEnded
        If the cluster ends the job. What was running is noted as interrupted.
    """
    what = Order(**order)
    runs, store = [Run.from_dict(run) for run in what.runs], Store(what.store)
    running: set[Run] = set()

    def on_event(event: Event) -> None:
        running.add(event.run) if event.kind == "started" else running.discard(event.run)
        say({"run": event.run.id, "kind": event.kind, "reason": event.reason})

    with _scratch() as scratch, _surroundings(what, scratch):
        try:
            study = _checked(what)
        except MLCollageError as error:
            sentence = f"{machine.host()} refuses these runs: {error}"
            for run in store.missing(runs):
                store.record_failure(run, sentence, more={"host": machine.host(), "job": _job_id()})
            say({"host": machine.host(), "refused": sentence})
            return
        say({"host": machine.host(), "python": platform.python_version(), "refused": ""})
        engine = LocalEngine(workers=what.cores, environment=dict(os.environ), log_folder=scratch)
        try:
            with _ended_by_signals():
                engine.execute(study, store.missing(runs), store, on_event)
        except JobEnded as end:
            for run in running:
                where = f"{machine.host()}, job {_job_id()}" if _job_id() else machine.host()
                store.record_interruption(run, f"{end} on {where}", {"job": _job_id()})
            raise


def main(folder: str, k: int) -> None:
    """Carry out the k-th order of a job's folder; facts are written into files beside it."""
    place = Path(folder)
    order = json.loads((place / f"order-{k}.json").read_text("utf-8"))
    # Attempts of a job that is queued again have one id: what they say is added, nothing is written over.
    with (place / f"said-{k}.jsonl").open("a", encoding="utf-8") as said:

        def say(fact: dict[str, Any]) -> None:
            said.write(json.dumps(fact) + "\n")
            said.flush()

        carry_out(order, say)


def _job_id() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _checked(order: Order) -> BoundStudy:
    """The study, if the code here is that of the command, and the workload can be loaded."""
    study = BoundStudy(order.study, Scale(order.scale), order.workload)
    if (here := fingerprint_of(study)) != order.code:
        raise InvalidInput(
            f"its mlcollage {mlcollage.__version__} or study {order.study} is not the one that sent them ({here}, not "
            f"{order.code}): something was edited, or another version is installed there; run the command again."
        )
    _ = study.workload
    return study


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder of this job on the node's own disk."""
    folder = Path(tempfile.mkdtemp(prefix="mlcollage-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _surroundings(order: Order, scratch: Path) -> Iterator[None]:
    """The user's folder, the variables that were sent, caches that no other job writes to, no GPU that was not asked.

    Everything is put back: a Ray worker may carry out orders of several studies.
    """
    before, folder, path = dict(os.environ), os.getcwd(), list(sys.path)
    os.environ.update(order.environment)
    caches = {"NUMBA_CACHE_DIR": "numba", "MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    os.environ.update({name: str(scratch / part) for name, part in caches.items()})
    if not order.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with suppress(OSError):  # said by what needs a file of it
        os.chdir(order.folder)
    # What Python was told to import from, and modules beside the user.
    new = [order.folder, *filter(None, order.environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:0] = [p for p in new if p not in sys.path]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        os.chdir(folder)
        sys.path[:] = path


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turn a cluster's warning into :class:`JobEnded`; only a main thread can be told."""
    names = [n for n in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, n)]

    def end(number: int, frame: FrameType | None) -> None:
        raise JobEnded(f"asked to end by signal {signal.Signals(number).name}")

    before = {}
    with suppress(ValueError):  # not the main thread
        before = {n: signal.signal(getattr(signal, n), end) for n in names}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(getattr(signal, n), handler or signal.SIG_DFL)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
