"""Checks of the installation and of a folder of results."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from mlcollage.errors import MLCollageError
from mlcollage.lab import machine
from mlcollage.lab.paper import broken_plugins, papers
from mlcollage.lab.store import Store

_EXTRAS = {
    "river": ("river", "RiverGLN and the benchmarks"),
    "datasets": ("hub", "workloads from the Hugging Face hub"),
    "playwright": ("dev", "tests of the pages"),
}


@dataclass(frozen=True)
class Check:
    """One finding: ``ok``, ``note`` (works without) or ``problem`` (does not work until corrected)."""

    name: str
    state: Literal["ok", "note", "problem"]
    detail: str


def examine(store: Path, *, repair: bool = False) -> Iterator[Check]:
    """Look at Python, torch, cores, memory, the results folder, data and optional packages.

    Every file of the results is read. With ``repair``, damaged runs are set aside.
    """
    import psutil

    yield Check("python", "ok", platform.python_version())
    yield _torch()
    memory = psutil.virtual_memory()
    usable = f"{machine.cores()} of {os.cpu_count()} cores usable"
    detail = f"{usable}, {machine.memory() / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free"
    # 2 GB: torch, and a run of quick size.
    yield Check("machine", "ok" if machine.memory() > 2e9 else "problem", detail)
    yield _results(store)
    yield from _damaged(store, repair)
    yield from _drafts(store, repair)
    yield from _plugins()
    yield _fashion_mnist()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    yield Check("browser", "ok" if browser else "note", browser or "none found; only tests of the pages need it")
    for package, (extra, use) in _EXTRAS.items():
        try:
            yield Check(package, "ok", version(package))
        except PackageNotFoundError:
            yield Check(package, "note", f"not installed; for {use}: pip install 'mlcollage[{extra}]'")


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that cannot be loaded
        return Check("torch", "problem", f"cannot be imported ({error}); install it with -c constraints.txt")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("torch", "ok", f"{torch.__version__}, {', '.join(devices) or 'cpu'}")


def _results(store: Path) -> Check:
    if store.exists() and not store.is_dir():
        return Check("results", "problem", f"{store} is a file; choose a folder with --store")
    # The store may not exist yet; the disk is that of the folder in which it would be made.
    nearest = next(p for p in (store.absolute(), *store.absolute().parents) if p.exists())
    free = shutil.disk_usage(nearest).free / 1e9
    if not os.access(nearest, os.W_OK):
        return Check("results", "problem", f"{store} cannot be written; choose another folder with --store")
    runs = sum(1 for _ in store.glob("runs/*/*/run.json"))
    state: Literal["ok", "problem"] = "ok" if free > 0.5 else "problem"
    return Check("results", state, f"{store}: {runs} finished runs, {free:.1f} GB free")


def _damaged(folder: Path, repair: bool) -> Iterator[Check]:
    if not folder.is_dir():
        return
    store = Store(folder)
    bad: list[str] = []
    for place, run in store.all_finished():
        # Thorough: checksums of arrays, which reading evidence does not look at.
        if run is not None and not store.damage(run, thorough=True):
            continue
        # A run without a readable run.json has no identity left but its folder.
        bad.append(f"{place.parent.name}/{place.name}")
        if repair:
            store.set_aside(place)
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        done = f"set aside in {folder / 'damaged'}; run the study again" if repair else "repair with --repair"
        yield Check("damaged runs", "note" if repair else "problem", f"{shown}: {done}")


def _drafts(folder: Path, repair: bool) -> Iterator[Check]:
    """What killed processes left half-written. Of another host's drafts one cannot know whether it still writes."""
    drafts = sorted((folder / "drafts").glob("*")) if folder.is_dir() else []
    dead = [draft for draft in drafts if machine.writer_is_dead(draft.name.partition(".")[2])]
    for draft in dead if repair else ():
        shutil.rmtree(draft, ignore_errors=True)
    if drafts:
        what = "removed" if repair else "removed with --repair, or when their run is measured"
        detail = f"{len(dead)} of {len(drafts)} were left by processes that were killed ({what})"
        yield Check("drafts", "note", f"{detail}; the others are being written, or lie with another host")


def _plugins() -> Iterator[Check]:
    """Papers of installed packages: whether they are found, and whether their study and slide can be imported."""
    for name, sentence in broken_plugins().items():
        yield Check(f"plug-in {name}", "problem", sentence.rstrip("."))
    for slug, paper in papers().items():
        if not paper.built or paper.built_in:
            continue
        try:
            for room in ("study", "slide"):
                paper.module(room)
        except MLCollageError as error:
            yield Check(f"plug-in {slug}", "problem", str(error).rstrip("."))
        else:
            yield Check(f"plug-in {slug}", "ok", f"{paper.title} ({paper.package})")


def _fashion_mnist() -> Check:
    from mlcollage.data.fashion_mnist import find

    folder = find()
    if folder is None:
        return Check("fashion_mnist", "note", "not found (generated data is used); `mlcollage data prepare` fetches it")
    return Check("fashion_mnist", "ok", str(folder))
