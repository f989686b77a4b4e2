"""A plug-in paper whose runs succeed, raise, are killed or eat memory; the studies at smoke scale; gloo; a browser."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlcollage.lab.running import run_study
from mlcollage.lab.store import Store

STUDY = """
import os
import signal
import time
import warnings
from dataclasses import dataclass

from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.lab import Claim, Experiment, Level, Measurements, Scale, Study

CLAIMS = (
    Claim("C1", "Two is two", "The value of ok is at least two.", "here", Level("value", "ok"), "at_least", null=1.5),
    Claim(
        "C2", "Only at full", "Needs a GPU.", "there", Level("value", "ok"), "greater", margin=1, from_scale="full",
        headline=True,
    ),
)


@dataclass(frozen=True)
class Probe:
    \"\"\"What is probed.\"\"\"

    classes: int = 0  # of the workload


def on_workload(settings, workload, scale):
    return Probe(workload.num_classes)


def probe(task):
    log = os.environ.get("PROBE_LOG")
    if log:
        with open(log, "a") as handle:
            handle.write(f"{task.arm} {task.seed} {os.getpid()}\\n")
    if task.arm == "raise":
        raise RuntimeError("the loss is not a number")
    if task.arm == "refuse":
        raise InvalidInput("the setting is wrong; use another.")
    if task.arm == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.arm == "leave":
        os._exit(7)
    if task.arm == "disk":
        os._exit(28)
    if task.arm == "memory":
        hoard = bytearray(os.urandom(1 << 20)) * 3000
        time.sleep(30)
        return hoard
    if task.arm == "end":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    if task.arm == "noisy":
        print("something that a library prints")
    if task.arm == "warn":
        for share in (0.1, 0.2):
            warnings.warn(f"{share} of the units are dead")
    if task.arm == "slow":
        time.sleep(float(os.environ.get("PROBE_SLEEP", "0.2")))
    measured = Measurements()
    measured.add("value", 2.0 + 0.01 * task.seed, step=5)
    measured.add("threads", _threads())
    measured.array("line", [1.0, 2.0, task.seed])
    return measured


def _threads():
    import torch

    return torch.get_num_threads()


def experiments():
    arms = tuple(os.environ.get("PROBE_ARMS", "ok").split(","))
    settings = dict.fromkeys(Scale, Probe())
    return (Experiment("probe", probe, arms=arms, settings=settings, workloads=(Labeled,), adapt=on_workload),)


def __getattr__(name):  # made anew for each test's environment
    if name != "STUDY":
        raise AttributeError(name)
    seeds = dict.fromkeys(Scale, int(os.environ.get("PROBE_SEEDS", "3")))
    return Study(claims=CLAIMS, seeds=seeds, experiments=globals()["experiments"]())
"""

SLIDE = """
from mlcollage.collage.content import Collage, Panel


def collage(evidence, verdicts):
    values = evidence.select("value", arm="ok")["value"]

    def draw(ax):
        ax.plot(range(len(values)), values)

    panel = Panel("Values", draw, "A line of values.", "one a seed")
    return Collage("a tagline", Panel("The idea", draw, "A line."), panel, [panel, panel], "the probe", "no network")
"""

IDENTITY = """
slug = "probe"
title = "A probe of the lab"
authors = ["Nobody"]
month = "2021-05"
venue = "Tests"
arxiv = ""
ideas = ["explore"]
"""

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)

# Takes out the code blocks and reference entries that show no kind of element which was not there before.
ONE_OF_EACH = """() => {
  const seen = new Set();
  for (const part of document.querySelectorAll("pre, .doc-object")) {
    const kinds = [...part.querySelectorAll("[class]")].map((e) => e.tagName + e.className).filter((k) => !seen.has(k));
    if (!kinds.length && seen.size) part.remove();
    kinds.forEach((kind) => seen.add(kind));
  }
}"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the plug-in for this test; gives the folder it lies in."""
    site = tmp_path / "site"
    package = site / "probe_paper"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "study.py").write_text(STUDY)
    (package / "slide.py").write_text(SLIDE)
    (package / "paper.toml").write_text(IDENTITY)
    info = site / "probe_paper-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: probe-paper\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[mlcollage.papers]\nprobe = probe_paper\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
    importlib.invalidate_caches()
    for name in [n for n in sys.modules if n.startswith("probe_paper")]:
        monkeypatch.delitem(sys.modules, name)
    return site


@pytest.fixture(scope="session")
def smoke_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Store]:
    """``smoke_store("gated_linear_networks", ...)``: a store with these studies' runs at smoke scale, made once."""
    base = tmp_path_factory.getbasetemp()
    # Processes of pytest-xdist share one store, as any commands may.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke-results"

    def store_of(*slugs: str) -> Store:
        for slug in slugs:
            run_study(slug, "smoke", store=folder)
        return Store(folder)

    return store_of


USER_MODULE = '''
import torch
from torch import nn
from torch.utils.data import TensorDataset

from mlcollage.data.workload import Labeled


class Own(nn.Module):
    """A network that no study has: its width shows in the tests."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 3))

    def forward(self, x):
        return self.body(x)


def make():
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(600, 1, 8, 8, generator=generator)
    y = (3 * x.mean(dim=(1, 2, 3)).sub(0.45).div(0.1).clamp(0, 0.999)).long()
    return Labeled(TensorDataset(x[:500], y[:500]), TensorDataset(x[500:], y[500:]), 3, Own, name="brightness")
'''


@pytest.fixture
def user_workloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a user may bring: a function with a model of its own, images in an .npz file, a CSV table."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "users_own_workloads.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "users_own_workloads", raising=False)
    rng = np.random.default_rng(0)
    y = np.arange(400) % 4
    images = (rng.integers(0, 120, (400, 8, 8)) + 40 * y[:, None, None]).clip(0, 255).astype(np.uint8)
    np.savez(folder / "images.npz", X=images[:300], y=y[:300], X_test=images[300:], y_test=y[300:])
    columns = rng.normal(size=(400, 5)) + y[:, None] * np.eye(5)[0]
    rows = [",".join(map(str, row)) + f",kind{label}" for row, label in zip(columns.round(4), y, strict=True)]
    (folder / "table.csv").write_text("\n".join(["a,b,c,d,e,label", *rows]))
    return {
        "function": "users_own_workloads:make",
        "npz": str(folder / "images.npz"),
        "csv": str(folder / "table.csv"),
    }


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium for the tests that load pages."""
    if os.environ.get("MLCOLLAGE_NO_BROWSER") == "1":
        pytest.skip("MLCOLLAGE_NO_BROWSER=1: the pages were not loaded in a browser.")
    from playwright.sync_api import sync_playwright

    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.fail(
            "no Chromium was found, so the pages cannot be tested; install Chromium or Chrome, "
            "or set MLCOLLAGE_NO_BROWSER=1 to leave these tests out.",
            pytrace=False,
        )
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=program, args=list(BROWSER_FLAGS))
        yield started
        started.close()


@pytest.fixture
def browser_page(browser):
    """Opens pages: ``open(address, width=1280, ...)``; fails the test on console errors, exceptions and requests.

    Requests may go to the disk, and to the server of this machine that the page itself came from.
    """
    contexts, complaints = [], []

    def open_page(address, *, width=1280, height=900, **options):
        local = re.match(r"http://127\.0\.0\.1:\d+/", address)
        allowed = ("file:", "data:", "blob:", *([local[0]] if local else []))
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(180_000)  # ms; a page of the site takes long where other tests use all cores
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith(allowed) else None)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="session")
def violations() -> Callable[..., list[str]]:
    """``violations(page)``: what axe finds wrong with a page, a line each; ``only`` names the rules to apply.

    Parts that repeat others are taken out first: axe would need seconds for the thousands of elements of a long page.
    """

    def find(page, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> list[str]:
        from axe_playwright_python.sync_playwright import Axe

        page.evaluate(ONE_OF_EACH)
        options: dict[str, object] = {"resultTypes": ["violations"]}
        if only:
            options["runOnly"] = list(only)
        if without:
            options["rules"] = {rule: {"enabled": False} for rule in without}
        found = Axe().run(page, options=options).response["violations"]
        return [f"{rule['id']}: {node['target']} {node['html'][:200]}" for rule in found for node in rule["nodes"]]

    return find


@pytest.fixture(scope="session")
def in_processes(tmp_path_factory):
    """``in_processes(file, function, size)``: what ``function(rank, size)`` of a file finds in each of several gloo
    processes, as a list of dictionaries of arrays."""
    script = Path(__file__).with_name("one_of_several.py")

    def run(file, function, size):
        folder = tmp_path_factory.mktemp(function)
        found = [folder / f"{rank}.npz" for rank in range(size)]
        command = [sys.executable, str(script), str(file), function]
        started = [
            subprocess.Popen(
                [*command, str(rank), str(size), str(folder / "store"), str(found[rank])],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            said = [process.communicate(timeout=120)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        assert [process.returncode for process in started] == [0] * size, "\n".join(said)
        return [dict(np.load(path)) for path in found]

    return run


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """The slug of a paper that has only its identity yet."""
    file = tmp_path / "planned.toml"
    file.write_text(
        '[[paper]]\nslug = "one_day"\ntitle = "One Day"\nauthors = ["A. Author"]\nmonth = "2021-09"\n'
        'venue = "Nowhere"\narxiv = ""\nideas = ["robust"]\ntagline = "not yet"\n'
    )
    monkeypatch.setattr("mlcollage.lab.paper._PLANNED", file)
    return "one_day"
