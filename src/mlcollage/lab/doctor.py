"""What this machine offers, and what is amiss."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

__all__ = ["Check", "examine"]

_EXTRAS = {
    "river": ("river", "RiverGLN and the benchmarks"),
    "datasets": ("hub", "workloads from the Hugging Face hub"),
    "playwright": ("dev", "tests of the pages"),
}


@dataclass(frozen=True)
class Check:
    """One finding: ``ok``, ``note`` (works without) or ``problem`` (does not work until mended)."""

    name: str
    state: Literal["ok", "note", "problem"]
    detail: str


def examine(store: Path) -> Iterator[Check]:
    """Look at Python, torch, cores, memory, the results folder, data and optional packages."""
    import psutil

    yield Check("python", "ok", platform.python_version())
    yield _torch()
    memory = psutil.virtual_memory()
    detail = f"{os.cpu_count()} cores, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free"
    yield Check("machine", "ok" if memory.available > 2e9 else "problem", detail)
    yield _results(store)
    yield _fashion_mnist()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    yield Check(
        "browser", "ok" if browser else "note", browser or "none found; only the tests of the pages need Chromium"
    )
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
    nearest = next(p for p in (store.absolute(), *store.absolute().parents) if p.exists())
    free = shutil.disk_usage(nearest).free / 1e9
    if not os.access(nearest, os.W_OK):
        return Check("results", "problem", f"{store} cannot be written; choose another folder with --store")
    runs = sum(1 for _ in store.glob("runs/*/*/run.json"))
    state: Literal["ok", "problem"] = "ok" if free > 0.5 else "problem"
    return Check("results", state, f"{store}: {runs} finished runs, {free:.1f} GB free")


def _fashion_mnist() -> Check:
    from mlcollage.data.fashion_mnist import find

    folder = find()
    if folder is None:
        return Check(
            "fashion_mnist", "note", "not found; `mlcollage data prepare` fetches it, generated data is used without"
        )
    return Check("fashion_mnist", "ok", str(folder))
