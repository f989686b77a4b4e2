"""Runs as tasks of a Ray cluster: one that is started here, or a running one.

A task starts a process for its run, as everywhere: what a run leaves behind (memory, seeds, types) ends with it.
Ray itself never tries a run again; what a lost node held is missing, and is tried again by the lab.
"""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mlcollage._checks import integer, positive, real
from mlcollage.errors import InvalidInput, MissingDependency, RunFailed, StoreError
from mlcollage.lab import machine
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.engine import Event
from mlcollage.lab.node import carry_out, order_for
from mlcollage.lab.resources import Resources
from mlcollage.lab.run import Run
from mlcollage.lab.store import ATTEMPTS, Store


@dataclass(frozen=True)
class RaySettings:
    """How a Ray cluster is reached or started.

    Parameters
    ----------
    address
        ``host:6379`` or ``ray://host:10001`` of a running cluster; "" starts one here, for this command only. A cluster
        is never joined because a variable or a file of someone names it.
    cpus, gpus
        Of a cluster that is started here; default the cores that this process may use, and no GPU.
    per_slot
        Tasks in flight for each run that fits into the cluster at a time.
    environment
        Variables to send beside ``MLCOLLAGE_*`` and ``PYTHONPATH``; a name may end in a star.
    visible_seconds
        How long a result is waited for after its task has ended: a network share may show it late.
    """

    engine: ClassVar[str] = "ray"
    address: str = ""
    cpus: int | None = None
    gpus: int = 0
    per_slot: int = 2
    environment: tuple[str, ...] = ()
    visible_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.cpus is not None:
            integer("cpus", self.cpus, least=1)
        integer("gpus", self.gpus, least=0)
        integer("per_slot", self.per_slot, least=1)
        real("visible_seconds", self.visible_seconds, least=0)
        object.__setattr__(self, "environment", tuple(self.environment))


@dataclass
class RayEngine:
    """Each run as a task of Ray, in a process of its own on its node.

    Parameters
    ----------
    settings
        Where the cluster is.
    poll_seconds
        Between two looks at what has ended.
    say
        Is told which cluster is used.
    """

    settings: RaySettings = field(default_factory=RaySettings)
    poll_seconds: float = 1.0
    say: Callable[[str], None] = lambda sentence: None

    def __post_init__(self) -> None:
        positive("poll_seconds", self.poll_seconds)

    def execute(self, study: BoundStudy, runs: Sequence[Run], store: Store, on_event: Callable[[Event], None]) -> None:
        """Execute the runs (see :class:`~mlcollage.lab.engine.Engine`)."""
        with _cluster(self.settings, self.say) as ray:
            session = _Session(ray, self, study, store, on_event, deque(runs))
            session.check()
            try:
                while session.queue or session.flying or session.unseen:
                    session.send()
                    session.receive()
            finally:
                session.close()


@dataclass
class _Session:
    ray: Any
    engine: RayEngine
    study: BoundStudy
    store: Store
    on_event: Callable[[Event], None]
    queue: deque[Run]
    flying: dict[Any, Run] = field(default_factory=dict)
    unseen: dict[Run, tuple[float, str]] = field(default_factory=dict)  # ended, when, and how; no result yet
    noted: dict[Run, int] = field(default_factory=dict)  # interruptions when it was sent

    @property
    def needs(self) -> Mapping[str, Resources]:
        return {e.name: e.resources for e in self.study.study.experiments}

    def _need(self, run: Run) -> Resources:
        return self.needs.get(run.experiment, Resources())

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def check(self) -> None:
        """Refuse at once what no node can meet: Ray would wait for ever."""
        nodes = self._nodes()
        for name in {run.experiment for run in self.queue}:
            asked = _request(self.needs.get(name, Resources()))
            if not any(all(node.get(k, 0) >= v for k, v in asked.items()) for node in nodes):
                largest = {k: max((node.get(k, 0) for node in nodes), default=0) for k in asked}
                wanted = ", ".join(f"{k} {v:g} (largest node: {largest[k]:g})" for k, v in asked.items())
                raise InvalidInput(f"no node of the Ray cluster can run experiment {name}: it needs {wanted}.")

    def send(self) -> None:
        """Keep a few tasks in flight: 100,000 at once would stall the cluster's head."""
        slots = sum(int(node.get("CPU", 0)) for node in self._nodes())
        most = max(1, self.engine.settings.per_slot * slots)
        while self.queue and len(self.flying) < most:
            run = self.queue.popleft()
            need = self._need(run)
            order = order_for(
                self.study,
                [run],
                self.store,
                environment=self.engine.settings.environment,
                cores=need.cpus,
                gpus=need.gpus,
            )
            self.noted[run] = len(self.store.interruptions(run))
            self.store.forget_failure(run)
            # A task that is tried again by Ray would repeat a failure four times, or for ever.
            asked = _request(need)
            task = self.ray.remote(
                num_cpus=asked.pop("CPU"),
                num_gpus=asked.pop("GPU", 0),
                memory=int(asked.pop("memory", 0)) or None,
                max_retries=0,
                retry_exceptions=False,
            )(_task)
            self.flying[task.remote(order.to_dict())] = run
            self.on_event(Event("queued", run, "sent to Ray"))

    def receive(self) -> None:
        """Settle what has ended."""
        if self.flying:
            ended, _ = self.ray.wait(list(self.flying), timeout=self.engine.poll_seconds)
            for task in ended:
                run = self.flying.pop(task)
                self.unseen[run] = (time.monotonic(), self._end_of(task))
        elif self.unseen:
            time.sleep(min(self.engine.poll_seconds, 0.2))
        for run in list(self.unseen):
            self._settle(run)

    def _end_of(self, task: Any) -> str:
        """What ended a task; empty if it returned."""
        try:
            self.ray.get(task)
        except self.ray.exceptions.OutOfMemoryError:
            return "memory"
        except self.ray.exceptions.RayTaskError as error:  # raised by our own code on the node
            return f"raised {str(error.cause or error).strip().splitlines()[-1]}"
        except self.ray.exceptions.RayError as error:
            return f"lost with its node ({type(error).__name__})"
        return ""

    def _settle(self, run: Run) -> None:
        since, end = self.unseen[run]
        if self.store.appears(run):
            event = Event("done", run)
        elif (failure := self.store.failure(run)) is not None:
            event = Event("failed", run, failure.reason)
        elif len(history := self.store.interruptions(run)) > self.noted[run]:  # noted on the node
            event = Event("interrupted", run, str(history[-1]["reason"]))
        elif not end and time.monotonic() - since < self.engine.settings.visible_seconds:
            return
        elif end.startswith("lost"):
            times = self.store.record_interruption(run, end)
            event = Event("interrupted" if times < ATTEMPTS else "failed", run, end)
        else:
            need = self._need(run).memory_gb
            asked = f"{need:g} GB asked for" if need else "none asked for"
            reason = {
                "memory": f"Ray ended it for want of memory on its node ({asked}); declare memory_gb in the experiment",
                "": "its task ended and left no result; do all nodes see the store?",
            }.get(end, f"its task {end}")
            self.store.record_failure(run, reason)
            event = Event("failed", run, reason)
        del self.unseen[run]
        self.on_event(event)

    def close(self) -> None:
        """End what is still in flight: a task of a shared cluster would go on without us."""
        for task in self.flying:
            with suppress(Exception):  # its node may be gone
                self.ray.cancel(task, force=True)


def _task(order: dict[str, Any]) -> str:
    """On a node: carry out an order; gives the name of its host."""
    carry_out(order)
    return machine.host()


def _request(need: Resources) -> dict[str, float]:
    asked: dict[str, float] = {"CPU": need.cpus}
    if need.gpus:
        asked["GPU"] = need.gpus
    if need.memory_gb:
        asked["memory"] = need.memory_gb * 1e9
    return asked


@contextmanager
def _cluster(settings: RaySettings, say: Callable[[str], None]) -> Iterator[Any]:
    """Ray, connected: to the cluster that was named, to one that this process has already joined, or to a new one."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependency("engine ray needs Ray; pip install 'mlcollage[ray]'.") from error
    if ray.is_initialized():  # by the caller, who knows which cluster that is
        yield ray
        return
    # A stranger's cluster must not be joined because a variable names it.
    named = os.environ.pop("RAY_ADDRESS", None)
    # Short: names of sockets lie in it, and may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp" if Path("/tmp").is_dir() else None))
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
    try:
        if settings.address:
            try:
                ray.init(address=settings.address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise StoreError(f"there is no Ray cluster at {settings.address} ({error}); name another.") from error
            nodes = [node for node in ray.nodes() if node["Alive"]]
            cores = sum(int(node["Resources"].get("CPU", 0)) for node in nodes)
            say(f"Ray at {settings.address}: {len(nodes)} nodes, {cores} cores; joined as {getpass.getuser()}")
        else:
            cores = settings.cpus or machine.cores()
            try:
                ray.init(address="local", num_cpus=cores, num_gpus=settings.gpus, _temp_dir=str(folder), **quiet)
            except Exception as error:  # Ray raises the bare type where its own processes do not answer
                raise RunFailed(f"Ray did not start here: {str(error).strip().splitlines()[0]}") from error
            say(f"Ray started here, {cores} cores; it ends with this command")
        yield ray
    finally:
        with suppress(Exception):
            ray.shutdown()
        if named is not None:
            os.environ["RAY_ADDRESS"] = named
        shutil.rmtree(folder, ignore_errors=True)
