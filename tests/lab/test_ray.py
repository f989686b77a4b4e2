"""Runs as tasks of Ray: with a stand-in everywhere, and with a cluster of several raylets where Ray is installed."""

import contextlib
import sys
import types

import pytest

from mlcollage.errors import InvalidInput, MissingDependency
from mlcollage.lab import ray as our_ray
from mlcollage.lab.engines import get_engine
from mlcollage.lab.node import carry_out
from mlcollage.lab.ray import RayEngine, RaySettings
from mlcollage.lab.resources import Resources
from mlcollage.lab.running import run_study


class RayError(Exception):
    pass


class RayTaskError(RayError):
    cause = None


class OutOfMemoryError(RayError):
    pass


class Ref:
    def __init__(self, order, end) -> None:
        self.order, self.end = order, end


class Standin:
    """Tasks that are carried out at once, here, or end as a test asks for."""

    exceptions = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError, OutOfMemoryError=OutOfMemoryError)

    def __init__(self, ends=(), cpus=2.0) -> None:
        self.ends = list(ends)  # of the first tasks
        self.cpus = cpus
        self.options: list[dict] = []
        self.most = self.flying = 0
        self.cancelled: list[object] = []

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": self.cpus, "memory": 4e9}}, {"Alive": False, "Resources": {}}]

    def remote(self, **options):
        self.options.append(options)

        def submit(order):
            self.flying += 1
            self.most = max(self.most, self.flying)
            return Ref(order, self.ends.pop(0) if self.ends else None)

        return lambda function: types.SimpleNamespace(remote=submit)

    def wait(self, tasks, timeout):
        return tasks[:1], tasks[1:]

    def get(self, task):
        self.flying -= 1
        if task.end is not None:
            raise task.end
        carry_out(task.order)

    def cancel(self, task, force):
        self.cancelled.append(task)


@pytest.fixture
def standin(monkeypatch):
    def use(stand_in):
        monkeypatch.setattr(our_ray, "_cluster", lambda settings, say: contextlib.nullcontext(stand_in))
        return stand_in

    return use


SETTINGS = RaySettings(environment=("PROBE_*",), visible_seconds=0.2)


def test_ray_repeats_nothing_and_a_lost_task_is_tried_again_by_the_lab(probe, tmp_path, monkeypatch, standin):
    monkeypatch.setenv("PROBE_ARMS", "ok,raise")
    monkeypatch.setenv("PROBE_SEEDS", "1")
    ray, events = standin(Standin([RayError("the node died")])), []
    evidence = run_study("probe", "smoke", store=tmp_path, engine=RayEngine(SETTINGS), on_event=events.append)
    assert [run.arm for run in evidence.runs] == ["ok"]
    assert "the loss is not a number" in evidence.failures[0].reason
    assert [e.kind for e in events].count("interrupted") == 1
    assert len(ray.options) == 3
    assert all(o["max_retries"] == 0 and o["retry_exceptions"] is False for o in ray.options)


def test_want_of_memory_and_our_own_mistakes_are_failures(probe, tmp_path, monkeypatch, standin):
    monkeypatch.setenv("PROBE_SEEDS", "3")
    standin(Standin([OutOfMemoryError("x"), RayTaskError("ModuleNotFoundError: no module"), None]))
    evidence = run_study("probe", "smoke", store=tmp_path, engine=RayEngine(SETTINGS))
    reasons = {f.run.seed: f.reason for f in evidence.failures}
    assert "want of memory" in reasons[0]
    assert "ModuleNotFoundError" in reasons[1]
    assert len(evidence.runs) == 1


def test_few_tasks_are_in_flight(probe, tmp_path, monkeypatch, standin):
    monkeypatch.setenv("PROBE_SEEDS", "40")
    gone = [RayTaskError("no")] * 40
    ray = standin(Standin(gone))
    evidence = run_study("probe", "smoke", store=tmp_path, engine=RayEngine(SETTINGS))
    assert len(evidence.failures) == 40
    assert ray.most == 4  # two for each of two cores


def test_what_no_node_can_meet_is_refused_at_once(probe, tmp_path, monkeypatch, standin):
    ray = standin(Standin(cpus=0.5))
    with pytest.raises(InvalidInput, match=r"can run experiment probe: it needs CPU 1 \(largest node: 0.5\)"):
        run_study("probe", "smoke", store=tmp_path, engine=RayEngine(SETTINGS))
    assert not ray.options


def test_without_ray_its_extra_is_named(probe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"mlcollage\[ray\]"):
        run_study("probe", "smoke", store=tmp_path, engine="ray")


def test_settings_and_what_a_run_asks_for():
    assert get_engine("ray", workers=3, address="head:6379").settings.cpus == 3
    assert our_ray._request(Resources(cpus=2, gpus=1, memory_gb=4)) == {"CPU": 2, "GPU": 1, "memory": 4e9}


# --- with Ray ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ray(monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}.items():
        monkeypatch.setenv(name, value)
    yield ray
    ray.shutdown()


@pytest.mark.engines
def test_a_ray_that_is_started_here_fills_the_store_as_local_processes_do(ray, probe, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "ok,raise,kill")
    monkeypatch.setenv("PROBE_SEEDS", "1")
    monkeypatch.setenv("RAY_ADDRESS", "a-stranger:6379")
    said = []
    engine = RayEngine(RaySettings(cpus=2, environment=("PROBE_*",)), say=said.append)
    evidence = run_study("probe", "smoke", store=tmp_path / "s", engine=engine)
    local = run_study("probe", "smoke", store=tmp_path / "l")
    assert evidence.table.equals(local.table)
    assert [f.run for f in evidence.failures] == [f.run for f in local.failures]
    assert said == ["Ray started here, 2 cores; it ends with this command"]
    assert not ray.is_initialized()


@pytest.mark.engines
def test_a_raylet_that_is_killed_in_the_middle_costs_an_attempt(ray, probe, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PROBE_ARMS", "slow")
    monkeypatch.setenv("PROBE_SEEDS", "4")
    monkeypatch.setenv("PROBE_SLEEP", "8")
    monkeypatch.setenv("PROBE_LOG", str(tmp_path / "log"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    killed, events, receive = [], [], our_ray._Session.receive

    def receive_and_kill(session):
        """A task says nothing until it ends; what has begun is in the probe's log."""
        begun = (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
        if len(begun) >= 2 and not killed:
            killed.append(cluster.remove_node(second, allow_graceful=False))
        receive(session)

    monkeypatch.setattr(our_ray._Session, "receive", receive_and_kill)
    engine = RayEngine(RaySettings(environment=("PROBE_*",)))
    try:
        evidence = run_study("probe", "smoke", store=tmp_path / "s", engine=engine, on_event=events.append)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed
    assert "interrupted" in [e.kind for e in events]
    assert len(evidence.runs) == 4
    assert not evidence.failures
