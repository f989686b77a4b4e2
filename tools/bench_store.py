"""Time and memory of a store with very many runs: what is missing, evidence, verdicts.

A study without effect: two arms, one number a run. Results are written as the store writes them, only without waiting
for the disk after each. Each size is measured in a process of its own, so that its peak memory is its own::

    python tools/bench_store.py 12500 25000 50000 100000
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlcollage.lab import BoundStudy, Claim, Difference, Experiment, Measurements, Scale, Store, Study
from mlcollage.lab.claim import fingerprint
from mlcollage.lab.run import Run


@dataclass(frozen=True)
class Coin:
    """Settings of the study without effect."""

    flips: int = 1  # how often


def flip(task) -> Measurements:
    """One normal number, whatever the arm."""
    m = Measurements()
    m.add("value", _values()[task.seed % 1000])
    return m


def _values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=1000)


CLAIM = Claim("C1", "a beats b", "Arm a is larger.", "none", Difference("value", "a", "b"), "greater", margin=0.5)


def study_of(runs: int) -> BoundStudy:
    """A study with that many runs, which no package declares."""
    seeds = dict.fromkeys(Scale, runs // 2)
    experiment = Experiment("coin", flip, arms=("a", "b"), settings=dict.fromkeys(Scale, Coin()))
    declared = Study(claims=(CLAIM,), seeds=seeds, experiments=(experiment,))
    bound = object.__new__(BoundStudy)
    for name, value in {"slug": "null_study", "scale": Scale.QUICK, "workload_spec": None}.items():
        object.__setattr__(bound, name, value)
    bound.__dict__["paper"] = SimpleNamespace(module=lambda room: SimpleNamespace(STUDY=declared))
    return bound


def fill(store: Store, runs: list[Run], claims: str) -> None:
    """Write what `commit` would write."""
    rng = np.random.default_rng(1)
    for run in runs:
        folder = store.folder(run)
        folder.mkdir(parents=True)
        identity = {
            "study": run.study, "experiment": run.experiment, "arm": run.arm, "seed": run.seed,
            "scale": str(run.scale), "workload": run.workload, "run": run.id,
        }  # fmt: skip
        row = {**identity, "metric": "value", "step": 0, "value": float(rng.normal())}
        pq.write_table(pa.Table.from_pylist([row]), folder / "measurements.parquet")
        known = {"seconds": 1.0, "device": "cpu", "claims": claims, "versions": {"torch": "2"}}
        text = {"id": run.id, **run.to_dict(), "rows": 1, "arrays": [], **known}
        (folder / "run.json").write_text(json.dumps(text, indent=1))


@contextmanager
def timed(found: dict[str, float], name: str) -> Iterator[None]:
    """Seconds of the block, under its name."""
    begin = time.perf_counter()
    yield
    found[name] = round(time.perf_counter() - begin, 2)


def measure(folder: str, runs: int) -> dict[str, float]:
    """Seconds of each part, and the peak of memory."""
    found: dict[str, float] = {"runs": runs}
    study, store = study_of(runs), Store(folder)
    with timed(found, "list the runs"):
        registered = study.runs()
        _ = [run.id for run in registered]
    with timed(found, "what is missing"):
        missing = store.missing(registered)
    assert not missing
    with timed(found, "evidence"):
        evidence = study.evidence(store)
    assert len(evidence.table) == runs
    with timed(found, "judge"):
        verdict = study.judge(evidence)["C1"]
    assert verdict.seeds == runs // 2, verdict.reason
    found["peak memory, MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    return found


def main() -> None:
    """Print a row for each number of runs."""
    if sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
        return
    sizes = sorted(int(word) for word in sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        rows, done = [], 0
        largest = study_of(sizes[-1]).runs()
        by_seed = sorted(largest, key=lambda run: run.seed)  # the runs of a smaller study come first
        for size in sizes:
            fill(Store(folder), by_seed[done:size], fingerprint((CLAIM,)))
            done = size
            command = [sys.executable, __file__, "--one", folder, str(size)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(str(value) for value in row.values()))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {Path(__file__).name} RUNS ...")
    main()
