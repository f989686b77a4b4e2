"""Measures a tensor of losses: ``python -m mlcollage.papers.autosklearn2.measuring FOLDER``.

One file is written for each finished task, under a temporary name first; a killed command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .evaluation import evaluate_steps, make_splits, validation_rows
from .metrics import METRICS
from .policy import POLICIES, Policy
from .portfolio import PortfolioBuilder
from .shipped import official_portfolio
from .space import Config, config_id, pipeline_space
from .tasks import FAMILIES, TableTask, make_task
from .tensor import PerformanceTensor

LIMIT = 32
"""Iterations of a full fit when the tensor is measured; a learner's own are 512 and more."""


def candidates(count: int = 120, seed: int = 0) -> list[Config]:
    """Candidate pipelines: half of them are the best pipelines of searches, the others are drawn at random.

    The first half come from the authors' searches: members of their portfolios, taken in turn from the eight policies.
    Both kinds alternate, so that every first part of the list has both.
    """
    found: dict[str, Config] = {}
    for place in range(32):
        for policy in POLICIES:
            config = official_portfolio(policy).configs[place]
            found.setdefault(config_id(config), config)
    known = list(found.values())[: count // 2]
    rng, space = np.random.default_rng(seed), pipeline_space()
    drawn = [space.sample(rng) for _ in range(count - len(known))]
    mixed = [c for pair in zip(known, drawn, strict=False) for c in pair]
    return mixed + drawn[len(known) :]


def measure_task(
    task: TableTask,
    configs: Sequence[Config],
    *,
    policy: Policy = POLICIES[0],
    iterations: int = LIMIT,
    seconds: float = 0.3,
) -> pd.DataFrame:
    """One row for each candidate and step: validation and test loss, and the processor's seconds so far.

    A fit ends after ``seconds``; what is not reached is missing. A pipeline that stopped by itself has fewer steps too;
    ``done`` says so. A pipeline that fails, or does not end its first step, has the loss 1.
    """
    splits = make_splits(policy, task.y, "classification", seed=0)
    y_valid = task.y[validation_rows(splits)]
    loss = METRICS["balanced_accuracy"].loss
    failed = {"iterations": 2, "valid": 1.0, "test": 1.0, "done": True}
    rows: list[dict[str, Any]] = []
    for config in configs:
        start, name = time.process_time(), config_id(config)
        common = {"task": task.name, "candidate": name}
        try:
            with np.errstate(all="ignore"):
                for step in evaluate_steps(
                    config, "classification", task.rows, task.y, splits,
                    n_classes=task.n_classes, iterations=iterations,
                    go_on=partial(_within, start + seconds),
                ):  # fmt: skip
                    spent = time.process_time() - start
                    test = np.mean([m.predict(task.test_rows) for m in step.models], axis=0)
                    valid, tested = loss(y_valid, step.valid, None), loss(task.y_test, test, None)
                    found = {"iterations": step.iterations, "valid": valid, "test": tested, "seconds": spent}
                    rows.append({**common, **found, "done": step.done})
        except (ValueError, ArithmeticError, IndexError, MemoryError):
            rows.append({**common, **failed, "seconds": time.process_time() - start})
        if not rows or rows[-1]["candidate"] != name:  # not one step in time
            rows.append({**common, **failed, "seconds": time.process_time() - start})
    return pd.DataFrame(rows)


def _within(end: float) -> bool:
    return time.process_time() < end


def task_names(count: int) -> list[str]:
    """Names of tasks, in turn from the six families."""
    return [f"{FAMILIES[i % len(FAMILIES)]}-{i // len(FAMILIES)}" for i in range(count)]


def measure(
    folder: str | Path,
    *,
    tasks: int = 120,
    count: int = 120,
    most_rows: int = 300,
    policy: Policy = POLICIES[0],
    seconds: float = 0.3,
    known: Sequence[str] = (),
    say: Any = print,
) -> None:
    """Measure the tasks that the folder does not hold yet, each into a file of its own.

    Parameters
    ----------
    folder
        Where the files go.
    tasks, count
        How many tasks and candidates.
    most_rows
        Most training rows of a task.
    policy
        How a pipeline is scored; its allocation does not matter.
    seconds
        Processor's seconds that a fit may take.
    known
        Names of tasks that were measured elsewhere; they are left out.
    say
        Called with a line for each task.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    configs = candidates(count)
    for name in task_names(tasks):
        file = place / f"{name}.parquet"
        if file.exists() or name in known:
            continue
        start = time.process_time()
        task = make_task(name, most_rows=most_rows)
        table = measure_task(task, configs, policy=policy, seconds=seconds)
        table["columns"], table["rows"], table["classes"] = (*task.meta_features, task.n_classes)
        temporary = place / f".{name}.{os.getpid()}"
        table.to_parquet(temporary, index=False)
        temporary.replace(file)
        say(f"{name}: {len(task.y)} rows, {task.meta_features[0]} columns, {time.process_time() - start:.0f} s")


def gather(folder: str | Path, count: int = 120) -> PerformanceTensor:
    """The tasks of a folder that are finished, as a tensor."""
    named = {config_id(c): c for c in candidates(count)}
    return PerformanceTensor.from_folder(folder, named, LIMIT).complete()


def write_portfolios(tensor: PerformanceTensor, file: str | Path) -> None:
    """Learn portfolios of 32 for both allocations and write them down, so that a fit need not learn them."""
    ways = (Policy(), Policy(allocation="sh"))
    found = {policy.allocation: PortfolioBuilder(32, policy).fit(tensor).configs_ for policy in ways}
    Path(file).write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def main(arguments: Iterable[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Measure losses of candidate pipelines on many tasks; resumes.")
    parser.add_argument("folder", help="where the results of each task go")
    parser.add_argument("--tasks", type=int, default=120)
    parser.add_argument("--candidates", type=int, default=120)
    parser.add_argument("--most-rows", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=0.3, help="processor's seconds of a fit, at most")
    parser.add_argument("--folds", type=int, default=0, help="folds of a cross-validation; 0: a third is held out")
    parser.add_argument("--known", help="a tensor's file: its tasks are not measured again, and lead the gathered ones")
    parser.add_argument("--gather", help="a file: write what is there as a tensor, and portfolios.json beside it")
    parser.add_argument("--rescale", action="store_true", help="bring the seconds to the speed of the known ones")
    given = parser.parse_args(None if arguments is None else list(arguments))
    known = PerformanceTensor.load(given.known) if given.known else None
    if given.gather:
        found = gather(given.folder, given.candidates)
        tensor = found if known is None else known.joined(found, rescale=given.rescale)
        tensor.save(given.gather)
        write_portfolios(tensor, Path(given.gather).with_name("portfolios.json"))
        return
    policy = Policy("cv", given.folds) if given.folds else POLICIES[0]
    measure(
        given.folder,
        tasks=given.tasks,
        count=given.candidates,
        most_rows=given.most_rows,
        policy=policy,
        seconds=given.seconds,
        known=() if known is None else known.tasks,
        say=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
