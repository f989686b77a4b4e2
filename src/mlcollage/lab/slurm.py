"""Runs as Slurm jobs, submitted through submitit.

A job carries out an order of runs (:mod:`mlcollage.lab.node`). What is finished is known from the store, what is still
to come from ``squeue``, and only what neither knows is asked of ``sacct``; silence never means that a run failed. The
ids of jobs are kept in the store, so that a later command waits for jobs that an earlier one submitted.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from mlcollage._checks import choice, integer, positive, real
from mlcollage.errors import MissingDependency, StoreError
from mlcollage.lab import machine
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.engine import Event, last_lines
from mlcollage.lab.node import main as node_main
from mlcollage.lab.node import order_for
from mlcollage.lab.resources import Resources
from mlcollage.lab.run import Run
from mlcollage.lab.store import ATTEMPTS, Store

# What Slurm and MPI tell a job of itself; handed on, they pin all new jobs to the cores of the job that submits them.
_OF_A_JOB = ("SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMIX_", "PMI2_", "OMPI_", "SUBMITIT_")
_FIRST_LOOKS = 1.0  # seconds between two looks at a store in the first minute


@dataclass(frozen=True)
class SlurmSettings:
    """What jobs ask of Slurm.

    Parameters
    ----------
    partition, account, qos, constraint
        As ``sbatch`` takes them; "" leaves the choice to Slurm.
    minutes
        Time limit of a job. Runs that do not fit are done by the next one.
    cpus
        Cores of a job; it executes as many runs at a time as fit. Default: what one run needs.
    gpus
        GPUs of a job, where its experiment declares none.
    memory_gb
        Memory of a job; default what its runs declare, or Slurm's own.
    array_size
        Jobs of one submission at most; cut to what Slurm allows (``MaxArraySize``).
    runs_per_job
        Default 0: so few that all runs fit into one submission.
    parallel
        Jobs of one submission at a time.
    environment
        Variables to send beside ``MLCOLLAGE_*`` and ``PYTHONPATH``; a name may end in a star. They are written into
        the store.
    on_stop
        What Ctrl-C does to jobs: ``leave`` (the same command goes on with them) or ``cancel``.
    poll_seconds
        Between two questions to Slurm.
    visible_seconds
        How long the result of a job that has ended is waited for: a network share may show it late.
    extra
        Further options of ``sbatch``, e.g. ``{"reservation": "class"}``.
    """

    engine: ClassVar[str] = "slurm"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    minutes: int = 60
    cpus: int | None = None
    gpus: int = 0
    memory_gb: float | None = None
    array_size: int = 1000
    runs_per_job: int = 0
    parallel: int = 256
    environment: tuple[str, ...] = ()
    on_stop: Literal["leave", "cancel"] = "leave"
    poll_seconds: float = 30.0
    visible_seconds: float = 120.0
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, least in (("minutes", 1), ("gpus", 0), ("array_size", 1), ("runs_per_job", 0), ("parallel", 1)):
            integer(name, getattr(self, name), least=least)
        if self.cpus is not None:
            integer("cpus", self.cpus, least=1)
        if self.memory_gb is not None:
            positive("memory_gb", self.memory_gb)
        choice("on_stop", self.on_stop, ("leave", "cancel"))
        positive("poll_seconds", self.poll_seconds)
        real("visible_seconds", self.visible_seconds, least=0)
        object.__setattr__(self, "environment", tuple(self.environment))


class Cluster(Protocol):
    """The four things that are asked of Slurm."""

    def submit(self, name: str, folder: Path, tasks: Sequence[int], ask: Mapping[str, Any]) -> list[str]:
        """Start jobs under a name, one for each order of the folder that is listed; gives their ids."""
        ...

    def states(self) -> dict[str, tuple[str, str]] | None:
        """State and reason of this user's jobs that have not ended, by id; None if Slurm does not answer."""
        ...

    def ends(self, ids: Sequence[str]) -> dict[str, str]:
        """How jobs ended, as far as Slurm remembers."""
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel these jobs and no others."""
        ...


class Submitit:
    """Slurm's commands, and submitit for submissions."""

    def submit(self, name: str, folder: Path, tasks: Sequence[int], ask: Mapping[str, Any]) -> list[str]:
        """See :class:`Cluster`."""
        try:
            import submitit
        except ImportError as error:
            raise MissingDependency("engine slurm needs submitit; pip install 'mlcollage[slurm]'.") from error
        for attempt in range(3):
            try:
                with _without_a_jobs_variables():
                    executor = submitit.SlurmExecutor(folder=folder / "log", max_num_timeout=0)
                    executor.update_parameters(job_name=name, **ask)
                    jobs = executor.map_array(node_main, [str(folder)] * len(tasks), list(tasks))
                return [str(job.job_id) for job in jobs]
            except (OSError, RuntimeError, submitit.core.utils.FailedJobError) as error:
                said = str(error.__cause__ or error).strip()
                # The answer may have been lost and not the submission: what has our unique name is ours, and is ended.
                if shutil.which("scancel") is not None:
                    _told(["scancel", f"--name={name}", f"--user={getpass.getuser()}"])
                if "timed out" not in said.lower() or attempt == 2:
                    last = str(error).strip().splitlines()[-1:] or [said]
                    raise StoreError(f"Slurm takes no jobs: {last[0]}; look at the engine's settings.") from error
                time.sleep(5.0 * 2**attempt)
        raise AssertionError

    def states(self) -> dict[str, tuple[str, str]] | None:
        """See :class:`Cluster`."""
        text = _told(["squeue", f"--user={getpass.getuser()}", "--array", "--noheader", "--format=%i|%T|%r"])
        if text is None:
            return None
        rows = (line.strip().split("|") for line in text.splitlines() if line.count("|") == 2)
        return {i: (state, reason) for i, state, reason in rows}

    def ends(self, ids: Sequence[str]) -> dict[str, str]:
        """See :class:`Cluster`."""
        found: dict[str, str] = {}
        since = "--starttime=now-7days"  # without it, jobs of yesterday are not found
        text = _told(["sacct", "--jobs=" + ",".join(ids), "--noheader", "--parsable2", "--format=JobID,State", since])
        for line in (text or "").splitlines():
            job, _, state = line.partition("|")
            if job in ids:
                found[job] = state.split()[0] if state else ""
        # Without accounting, the controller remembers for some minutes.
        for job in [i for i in ids if i not in found][:20]:
            if hit := re.search(r"JobState=(\w+)", _told(["scontrol", "show", "job", job, "--oneliner"]) or ""):
                found[job] = hit[1]
        return found

    def cancel(self, ids: Sequence[str]) -> None:
        """See :class:`Cluster`."""
        for start in range(0, len(ids), 500):
            _told(["scancel", *ids[start : start + 500]])

    def largest_array(self) -> int | None:
        """How many jobs one array may have, if Slurm says so."""
        hit = re.search(r"MaxArraySize\s*=\s*(\d+)", _told(["scontrol", "show", "config"]) or "")
        return max(1, int(hit[1]) - 1) if hit else None  # the largest index is one less


def _told(command: Sequence[str]) -> str | None:
    """What a command of Slurm prints; None if it does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@contextmanager
def _without_a_jobs_variables() -> Iterator[None]:
    before = {k: v for k, v in os.environ.items() if k.startswith(_OF_A_JOB) and k != "SLURM_CONF"}
    for name in before:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


@dataclass
class _Task:
    """One job and its runs that are not settled yet."""

    name: str  # of the submission
    folder: Path
    number: int  # of the order in its folder
    id: str
    runs: dict[str, Run]
    before: dict[str, int]  # interruptions of each run when it was submitted
    state: str = ""
    gone: float | None = None  # since when Slurm does not list it
    begun: set[str] = field(default_factory=set)
    read: int = 0  # lines of what it said that were read


@dataclass
class SlurmEngine:
    """Packs runs into jobs, submits them, and waits until the store has them.

    Parameters
    ----------
    settings
        What jobs ask for.
    cluster
        Stands in for Slurm in tests.
    """

    settings: SlurmSettings = field(default_factory=SlurmSettings)
    cluster: Cluster = field(default_factory=Submitit)

    def execute(self, study: BoundStudy, runs: Sequence[Run], store: Store, on_event: Callable[[Event], None]) -> None:
        """Execute the runs (see :class:`~mlcollage.lab.engine.Engine`)."""
        session = _Session(self.settings, self.cluster, study, store, on_event)
        session.attach(runs)
        try:
            session.submit([run for run in runs if run.id not in session.covered])
            session.watch()
        except KeyboardInterrupt:
            session.stop()
            raise


@dataclass
class _Session:
    settings: SlurmSettings
    cluster: Cluster
    study: BoundStudy
    store: Store
    on_event: Callable[[Event], None]
    tasks: list[_Task] = field(default_factory=list)
    held_back: list[tuple[str, Path, list[int], dict[int, list[Run]], Mapping[str, Any]]] = field(default_factory=list)
    said: dict[str, tuple[str, str]] = field(default_factory=dict)  # what was last said of each run

    @property
    def covered(self) -> set[str]:
        return {i for task in self.tasks for i in task.runs}

    @property
    def _jobs(self) -> Path:
        return self.store.root / "jobs" / self.study.slug

    # --- submitting ---------------------------------------------------------------------------------------------------

    def attach(self, runs: Sequence[Run]) -> None:
        """Find jobs of earlier commands that still work on these runs."""
        by_id = {run.id: run for run in runs}
        live = None
        for file in sorted(self._jobs.glob("*/job.json")):
            try:
                job = dict(json.loads(file.read_text("utf-8")))
            except (OSError, ValueError):  # being written
                continue
            if job.get("ended"):
                continue
            live = self.cluster.states() if live is None else live
            if live is None:
                raise StoreError(
                    f"{file.parent} names jobs that may still run, and Slurm does not answer (squeue); wait until it "
                    "does, so that nothing is measured twice."
                )
            found = False
            for number, job_id in job["ids"].items():
                if job_id not in live:
                    continue
                found = True
                order = json.loads((file.parent / f"order-{number}.json").read_text("utf-8"))
                mine = {r.id: by_id[r.id] for r in map(Run.from_dict, order["runs"]) if r.id in by_id}
                before = {i: len(self.store.interruptions(run)) for i, run in mine.items()}
                self.tasks.append(_Task(job["name"], file.parent, int(number), job_id, mine, before))
            if not found:
                self._write_job(file.parent, {**job, "ended": True})
        self.tasks = [task for task in self.tasks if task.runs]

    def submit(self, runs: Sequence[Run]) -> None:
        """Pack the runs by what they need; all but the first job of a submission wait until that one has answered."""
        needs = {e.name: e.resources for e in self.study.study.experiments}
        groups: dict[Resources, list[Run]] = {}
        for run in runs:
            groups.setdefault(needs.get(run.experiment, Resources()), []).append(run)
        for need, members in groups.items():
            ask = self._ask(need)
            most = self.settings.array_size
            if (allowed := getattr(self.cluster, "largest_array", lambda: None)()) is not None:
                most = min(most, allowed)
            size = self.settings.runs_per_job or math.ceil(len(members) / most)
            packs = [members[k : k + size] for k in range(0, len(members), size)]
            for start in range(0, len(packs), most):
                self._submit(packs[start : start + most], need, ask)

    def _submit(self, packs: Sequence[Sequence[Run]], need: Resources, ask: Mapping[str, Any]) -> None:
        name = f"mlc-{self.study.slug[:16]}-{secrets.token_hex(4)}"
        folder = self._jobs / name
        folder.mkdir(parents=True)
        gpus = need.gpus or self.settings.gpus
        for k, pack in enumerate(packs):
            order = order_for(
                self.study,
                pack,
                self.store,
                environment=self.settings.environment,
                cores=ask["cpus_per_task"],
                gpus=gpus,
            )
            (folder / f"order-{k}.json").write_text(json.dumps(order.to_dict()), "utf-8")
        packed = {k: list(pack) for k, pack in enumerate(packs)}
        # Before thousands start, one shows that the node sees the store and has the same code.
        self._start(name, folder, [0], packed, ask)
        if len(packed) > 1:
            self.held_back.append((name, folder, [k for k in packed if k], packed, ask))

    def _start(
        self, name: str, folder: Path, numbers: list[int], packs: Mapping[int, Sequence[Run]], ask: Mapping[str, Any]
    ) -> None:
        """Submit these orders; their ids are in the store before anything else is done."""
        known: dict[str, Any] = {"name": name, "user": getpass.getuser(), "host": machine.host(), "ids": {}}
        with suppress(OSError, ValueError):
            known = dict(json.loads((folder / "job.json").read_text("utf-8")))
        # Before the jobs exist: one that fails at once must not have its failure forgotten.
        before = {run.id: len(self.store.interruptions(run)) for k in numbers for run in packs[k]}
        for run in (run for k in numbers for run in packs[k]):
            self.store.forget_failure(run)
        # A unique name for each submission: what it finds is this one.
        ids = self.cluster.submit(f"{name}-{numbers[0]}", folder, numbers, ask)
        known["ids"] = {**known["ids"], **{str(k): i for k, i in zip(numbers, ids, strict=True)}}
        self._write_job(folder, known)
        for k, job_id in zip(numbers, ids, strict=True):
            mine = {run.id: run for run in packs[k]}
            self.tasks.append(_Task(name, folder, k, job_id, mine, before))
            self._say("queued", mine.values(), f"job {job_id}")

    def _write_job(self, folder: Path, job: Mapping[str, Any]) -> None:
        draft = folder / f"job.{machine.writer_name()}"
        draft.write_text(json.dumps(job), "utf-8")
        draft.replace(folder / "job.json")

    def _ask(self, need: Resources) -> dict[str, Any]:
        """What a job asks for, in submitit's words."""
        s = self.settings
        cpus = max(s.cpus or 1, need.cpus)
        memory = s.memory_gb if s.memory_gb is not None else need.memory_gb and need.memory_gb * (cpus // need.cpus)
        ask: dict[str, Any] = {
            "time": max(s.minutes, math.ceil(need.minutes or 0) + 1 if need.minutes else 0),
            "cpus_per_task": cpus,
            "array_parallelism": s.parallel,
            "signal_delay_s": 30,
            # A job that submits jobs runs in its own step; ours need none.
            "use_srun": False,
        }
        for name in ("partition", "account", "qos", "constraint"):
            if getattr(s, name):
                ask[name] = getattr(s, name)
        if gpus := need.gpus or s.gpus:
            ask["gpus_per_node"] = gpus
        if memory:
            ask["mem"] = f"{math.ceil(memory * 1e9 / 2**20)}MB"
        if s.extra:
            ask["additional_parameters"] = dict(s.extra)
        return ask

    # --- watching -----------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Wait until every run is settled."""
        asked, begin = -math.inf, time.monotonic()
        while self.tasks or self.held_back:
            self._read_store()
            if time.monotonic() - asked >= self.settings.poll_seconds:
                asked = time.monotonic()
                self._ask_slurm()
            self._release()
            self.tasks = [task for task in self.tasks if task.runs]
            if self.tasks or self.held_back:
                young = time.monotonic() - begin < 60
                time.sleep(min(self.settings.poll_seconds, _FIRST_LOOKS if young else 5.0))

    def _read_store(self) -> None:
        """What is finished or failed, by two listings; and what jobs said."""
        there, failed = self.store.ids(self.study.slug), self.store.failed(self.study.slug)
        for task in self.tasks:
            self._listen(task)
            for run in [r for i, r in task.runs.items() if i in there or i in failed]:
                del task.runs[run.id]
                if run.id in there:
                    self.on_event(Event("done", run))
                else:
                    failure = self.store.failure(run)
                    self.on_event(Event("failed", run, failure.reason if failure else "unknown"))

    def _listen(self, task: _Task) -> None:
        with suppress(OSError):
            lines = (task.folder / f"said-{task.number}.jsonl").read_text("utf-8").splitlines()
            for line in lines[task.read :]:
                with suppress(ValueError):  # the rest of a line is still to come
                    fact = json.loads(line)
                    if fact.get("run") in task.runs:
                        task.begun.add(fact["run"])
                        self._say(fact["kind"], [task.runs[fact["run"]]], fact.get("reason", ""))
            task.read = len(lines)

    def _ask_slurm(self) -> None:
        states = self.cluster.states()
        if states is None:  # it does not answer, and that says nothing of the jobs
            return
        ended = []
        for task in self.tasks:
            if task.id in states:
                task.state, reason = states[task.id]
                task.gone = None
                if task.state == "PENDING":
                    self._say("queued", task.runs.values(), reason)
            else:
                task.gone = time.monotonic() if task.gone is None else task.gone
                if time.monotonic() - task.gone >= self.settings.visible_seconds:
                    ended.append(task)
        self._read_store()  # what was finished before Slurm forgot the job
        if lost := [task for task in ended if task.runs]:
            ends = self.cluster.ends([task.id for task in lost])
            for task in lost:
                self._account_for(task, ends.get(task.id, ""))

    def _account_for(self, task: _Task, end: str) -> None:
        """A job has ended, and the store has neither result nor failure of these runs."""
        log = last_lines(self._log(task))
        refused = self._answer(task)
        if refused is None and task.number == 0:
            raise StoreError(
                f"job {task.id} ended ({end or 'Slurm does not say how'}) without a word from the node: does it see "
                f"{self.store.root.absolute()} under that name, and can it import mlcollage? Its log:\n{log or 'none'}"
            )
        where = f"job {task.id}, {end or 'of which Slurm tells nothing more'}"
        more = {"job": task.id, "log": log}
        for run in list(task.runs.values()):
            del task.runs[run.id]
            reason = f"ended with its {where}"
            if end == "OUT_OF_MEMORY":
                asked = f"{self.settings.memory_gb:g} GB" if self.settings.memory_gb else "Slurm's default"
                text = f"the job ran out of memory ({asked} was asked for); raise memory_gb ({where})"
                self.store.record_failure(run, text, more=more)
                self.on_event(Event("failed", run, text))
            elif end == "TIMEOUT" and run.id in task.begun and len(self._order(task)) == 1:
                text = f"did not finish within the job's {self.settings.minutes} minutes; raise minutes ({where})"
                self.store.record_failure(run, text, more=more)
                self.on_event(Event("failed", run, text))
            elif run.id in task.begun and len(self.store.interruptions(run)) == task.before[run.id]:
                times = self.store.record_interruption(run, reason, more)
                self.on_event(Event("interrupted" if times < ATTEMPTS else "failed", run, reason))
            else:  # not begun, or noted on the node
                self.on_event(Event("interrupted", run, reason))

    def _order(self, task: _Task) -> list[Any]:
        return list(json.loads((task.folder / f"order-{task.number}.json").read_text("utf-8"))["runs"])

    def _log(self, task: _Task) -> Path | None:
        return next(iter(sorted((task.folder / "log").glob(f"{task.id}_*_log.err"))), None)

    def _answer(self, task: _Task) -> str | None:
        """What a job's node said first: empty if it took the order, a sentence if it refused; None if nothing."""
        with suppress(OSError, ValueError, IndexError):
            first = (task.folder / f"said-{task.number}.jsonl").read_text("utf-8").splitlines()[0]
            return str(json.loads(first)["refused"])
        return None

    def _release(self) -> None:
        """Submit what waited for the answer of its first job."""
        waiting, self.held_back = self.held_back, []
        for k, (name, folder, numbers, packs, ask) in enumerate(waiting):
            refused = self._answer(_Task(name, folder, 0, "", {}, {}))
            if refused is None:
                self.held_back.append(waiting[k])
            elif refused:
                raise StoreError(refused)
            else:
                self._start(name, folder, numbers, packs, ask)

    def _say(self, kind: Any, runs: Any, reason: str) -> None:
        """Say it of each run, once."""
        if kind not in ("queued", "started", "waiting"):
            return
        for run in runs:
            if self.said.get(run.id) != (kind, reason):
                self.said[run.id] = (kind, reason)
                self.on_event(Event(kind, run, reason))

    def stop(self) -> None:
        """Ctrl-C: say what becomes of the jobs."""
        ids = [task.id for task in self.tasks if task.runs]
        counts = Counter(task.name for task in self.tasks if task.runs)
        if not ids:
            return
        if self.settings.on_stop == "cancel":
            self.cluster.cancel(ids)
            text = f"{len(ids)} jobs were cancelled"
        else:
            text = (
                f"{len(ids)} jobs ({', '.join(counts)}) go on; the same command waits for them again, "
                f"`scancel {' '.join(sorted({i.split('_')[0] for i in ids})[:10])}` ends them"
            )
        raise KeyboardInterrupt(text)
