"""What this process may use of the machine: its processors and its memory, in a container too."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def available_cores(groups: Path = _GROUPS) -> int:
    """Processors for this process: those it may use, and its share in a container (control groups 2 and 1)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((groups / f).read_text("ascii") for f in files).split()
            if quota not in ("max", "-1"):
                count = min(count, max(1, int(quota) // int(period)))
    return count


def memory_limit_of_container(groups: Path = _GROUPS) -> float | None:
    """Megabytes that all processes of the container may take together; None where there is no limit."""
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            given = (groups / file).read_text("ascii").strip()
            if given != "max" and int(given) < 2**60:
                return int(given) / 2**20
    return None
