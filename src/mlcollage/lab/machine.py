"""The machine as a run sees it: cores and memory that one may use, and which processes are provably gone."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def host() -> str:
    """Name of this host, for people; Slurm's name of the node inside a job."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@cache
def place() -> str:
    """Where process ids mean something: host, start of its system, and the container's name space of process ids.

    Two containers of one host may share the host's name and the number of a process; they do not share this.
    """
    parts = [socket.gethostname()]
    for file in (_PROC / "sys/kernel/random/boot_id", _PROC / "self/ns/pid"):
        with suppress(OSError):
            parts.append(os.readlink(file) if file.is_symlink() else file.read_text("utf-8").strip())
    name = re.sub(r"[^A-Za-z0-9-]", "-", parts[0])[:40]
    return f"{name}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:8]}"


def started(pid: int) -> str:
    """When a process of this place was started, as the system counts; "" if there is no such process."""
    # Ticks since the system's start: unlike a time of day, they do not move when the clock is set.
    if (_PROC / "self/stat").exists():
        try:
            return (_PROC / str(pid) / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19]
        except (OSError, IndexError):
            return ""
    import psutil

    try:
        return str(int(psutil.Process(pid).create_time()))
    except psutil.NoSuchProcess:
        return ""


def writer_name() -> str:
    """A name that no other writer has: place, process, its start, and something random."""
    return f"{place()}.{os.getpid()}.{started(os.getpid())}.{secrets.token_hex(4)}"


def writer_is_dead(name: str) -> bool:
    """Whether the process that made up a name with :func:`writer_name` is provably gone."""
    try:
        where, pid, start, _ = name.split(".")
        number = int(pid)
    except ValueError:  # of an older version: nothing is known of its host
        return False
    # What runs elsewhere, in another container, or ran before this system's start, cannot be looked at from here.
    return where == place() and started(number) != start


def cores() -> int:
    """Cores that this process may use: its mask, its cgroup's quota, and what Slurm gave to the task."""
    mask = getattr(os, "sched_getaffinity", None)
    found = [len(mask(0)) if mask is not None else os.cpu_count() or 1]
    if (quota := _cpu_quota()) is not None:
        found.append(quota)
    if (given := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        found.append(int(given))
    return max(1, min(found))


def memory() -> int:
    """Bytes that new processes may take: what the host has available, or what is left of the cgroup's limit."""
    import psutil

    found = [int(psutil.virtual_memory().available), *_memory_left()]
    if (given := os.environ.get("SLURM_MEM_PER_NODE", "")).isdigit() and int(given):
        found.append(int(given) << 20)  # in MiB
    return max(0, min(found))


def _own_cgroups() -> list[Path]:
    """Folders of this process's cgroups, from its own up to the root; of version 2, or of each controller of 1."""
    folders: list[Path] = []
    with suppress(OSError):
        for line in (_PROC / "self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            root = _CGROUPS / controllers if controllers else _CGROUPS
            own = root / path.lstrip("/")
            folders += [f for f in (own, *own.parents) if f == root or root in f.parents]
    return folders


def _cpu_quota() -> int | None:
    """Whole cores that the quotas allow; a limit of any parent holds too."""
    found = []
    for folder in _own_cgroups():
        with suppress(OSError, ValueError):
            if (folder / "cpu.max").exists():
                limit, period = (folder / "cpu.max").read_text("utf-8").split()
            else:
                limit, period = ((folder / f"cpu.cfs_{n}_us").read_text("utf-8").strip() for n in ("quota", "period"))
            if limit not in ("max", "-1"):
                found.append(max(1, int(limit) // int(period)))
    return min(found, default=None)


def _memory_left() -> list[int]:
    found = []
    for folder in _own_cgroups():
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):
                text = (folder / limit).read_text("utf-8").strip()
                if text != "max" and int(text) < 1 << 60:  # version 1 writes a number near 2**63 for no limit
                    found.append(int(text) - int((folder / used).read_text("utf-8")))
    return found
