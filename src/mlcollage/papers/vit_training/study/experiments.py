"""The study's experiment: upstream runs that differ in data, length and AugReg, and their transfer to other tasks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import nn

from mlcollage.data import Labeled
from mlcollage.data.problem import problem
from mlcollage.errors import InvalidInput
from mlcollage.lab import Measurements, Scale, Task

from ..selection import rank_agreement, selection_regret
from . import world
from .models import Arm, accuracies, network, train
from .world import Rows

AUGMENTATIONS = {"none": (0.0, 0.0), "light": (1.0, 0.0), "medium": (2.0, 0.2)}  # strength, and mixup's alpha
REGULARIZED = 0.1  # dropout and stochastic depth of the regularized arm
SCRATCH_AT = (50, 100, 200, 400)  # steps of training from scratch
TRANSFER_AT = (25, 50)  # steps of fine-tuning


@dataclass(frozen=True)
class Sweep:
    """Upstream and downstream training of a small vision transformer."""

    small: int = 300  # training samples of the small set
    large: int = 3000  # and of the large one, ten times as many
    val: int = 500  # upstream validation samples
    test: int = 1500  # test samples of every task
    short: int = 400  # steps of a short run
    long: int = 1600  # and of a long one, four times the compute
    batch: int = 32  # samples per step
    lr: float = 3e-3  # peak rate of AdamW
    decay: float = 0.1  # decoupled weight decay of kernels
    patch: int = 4  # samples or pixels in a patch
    width: int = 32  # numbers of a token
    depth: int = 2  # blocks
    heads: int = 2  # attention heads
    downstream: bool = True  # transfer to other tasks, and the comparison of patches with widths
    target: int = 100  # training samples of a downstream task
    tuning: int = 50  # steps of fine-tuning
    coarse_width: int = 48  # width with patches of twice the size
    thin_width: int = 16  # width with patches of the ordinary size, about as fast


def on_workload(s: Sweep, workload: Labeled, scale: Scale) -> Sweep:
    """Sizes that the user's data allow; refuses those that the study has no use for."""
    size, tests = (len(cast(Sized, part)) for part in (workload.train, workload.test))
    if workload.num_classes < 2 or size < 100 or tests < 20:
        raise InvalidInput(
            f"the study needs 2 classes, 100 training and 20 test samples at least; {workload.name} has "
            f"{workload.num_classes}, {size} and {tests}."
        )
    val = min(s.val, size // 5)
    large = min(s.large, size - val)
    # The share of a tenth is kept; everything downstream is about the study's own tasks.
    return dataclasses.replace(
        s, large=large, small=max(8, large // 10), val=val, test=min(s.test, tests), downstream=False
    )


@dataclass(frozen=True)
class _Data:
    small: Rows
    large: Rows
    val: Rows
    test: Rows
    classes: int


def _data(task: Task[Sweep]) -> _Data:
    s, seed = task.settings, task.seed
    if task.workload is None:
        small, large, val, test = (world.draw(seed, k, n) for k, n in enumerate((s.small, s.large, s.val, s.test)))
        return _Data(small, large, val, test, world.CLASSES)
    p = problem(
        task.workload,
        lambda: task.workload,
        rng=np.random.default_rng([seed, 31]),
        train=s.large,
        validation=s.val,
        test=s.test,
        draw_test=False,
        standardize="sample",
    )
    large, val, test = (Rows(*(t.cpu() for t in part)) for part in (p.train, p.validation, p.test))
    if large.x.ndim != 4:
        raise InvalidInput(
            f"a vision transformer takes images (channels, height, width); samples of {task.workload.name} have shape "
            f"{tuple(large.x.shape[1:])}."
        )
    return _Data(Rows(large.x[: s.small], large.y[: s.small]), large, val, test, p.num_classes)


def _maker(task: Task[Sweep], shape: tuple[int, ...], classes: int, **more: Any) -> Any:
    s = task.settings
    patch = more.pop("patch", s.patch)
    if shape[1] > 1 and (shape[1] % patch or shape[2] % patch):  # the largest patch up to it that tiles the images
        patch = max(p for p in range(1, patch + 1) if shape[1] % p == 0 and shape[2] % p == 0)
    sizes = {"patch": patch, "width": s.width, "depth": s.depth, "heads": s.heads, **more}
    return partial(network, shape, classes, init="reference", pool="mean", **sizes)


@dataclass(frozen=True)
class _Run:
    """An upstream model of a seed, under which keys it is recorded, and how good it is on new and on seen rows."""

    seed: int
    keys: dict[str, Any]
    val: float
    leaked: float
    model: nn.Module


def sweep(task: Task[Sweep]) -> Measurements:
    """All upstream runs of a block of seeds, trained together, and what becomes of them downstream."""
    s, m = task.settings, Measurements()
    data = {seed: _data(dataclasses.replace(task, seeds=(seed,))) for seed in task.seeds}
    first = data[task.seeds[0]]
    shape = tuple(first.small.x.shape[1:])
    options: dict[str, Any] = {"batch": s.batch, "lr": s.lr, "decay": s.decay, "classes": first.classes}
    make = _maker(task, shape, first.classes)
    runs: list[_Run] = []

    def upstream(
        seeds: Sequence[int], steps: int, names: dict[str, tuple[str, ...]], made: Any, kind: str = ""
    ) -> None:
        which = [(seed, size, name) for seed in seeds for size, every in names.items() for name in every]
        arms = [Arm(name, getattr(data[seed], size), seed, *AUGMENTATIONS[name]) for seed, size, name in which]
        replicas = train(arms, made, steps=steps, **options)
        test, val = (accuracies(replicas, [getattr(data[arm.seed], part) for arm in arms]) for part in ("test", "val"))
        for r, (seed, size, name) in enumerate(which):
            length = "short" if steps == s.short else "long"
            keys: dict[str, Any] = {"arm": "sweep", "aug": kind or name, "data": size, "length": length}
            seen = Rows(arms[r].data.x[: s.val], arms[r].data.y[: s.val])  # a validation set seen in pre-training
            model = replicas.module(r)
            leaked = _accuracy(model, seen)
            found = {"accuracy": test[r], "val_accuracy": val[r], "leaked_accuracy": leaked}
            m.add_all(found, seed=seed, **keys)
            runs.append(_Run(seed, keys, val[r], leaked, model))

    both = ("none", "light")
    upstream(task.seeds, s.short, {"small": (*both, "medium"), "large": (*both, "medium")}, make)
    upstream(task.seeds, s.long, {"small": both, "large": both}, make)
    regularized = _maker(task, shape, first.classes, dropout=REGULARIZED, stochastic_depth=REGULARIZED)
    for seed in task.seeds:  # by itself, since the draws of dropout are those of the whole stack
        upstream([seed], s.short, {"small": ("none",)}, regularized, "regularized")
    if s.downstream:
        _transfer(task, m, shape, runs)
        _patches(task, m, data)
    return m


@torch.no_grad()
def _accuracy(model: nn.Module, data: Rows) -> float:
    return float((model(data.x).argmax(1) == data.y).float().mean())


def _transfer(task: Task[Sweep], m: Measurements, shape: tuple[int, ...], runs: list[_Run]) -> None:
    """Every upstream model is fine-tuned on three unlike tasks; the best one's course against training from scratch."""
    s = task.settings
    rows = []
    for name in world.TASKS:
        few, val_rows, test_rows = (
            {seed: world.draw(seed, k, n, name) for seed in task.seeds}
            for k, n in ((10, s.target), (11, s.val), (12, s.test))
        )
        classes = max(int(part.y.max()) for part in test_rows.values()) + 1
        make = _maker(task, shape, classes)
        arms = [Arm(run.keys["aug"], few[run.seed], run.seed, start=run.model) for run in runs]
        tuned = train(arms, make, steps=s.tuning, batch=s.batch, lr=s.lr, decay=0.0, classes=classes)
        val, test = (accuracies(tuned, [part[run.seed] for run in runs]) for part in (val_rows, test_rows))
        number = dict.fromkeys(task.seeds, 0)
        for k, run in enumerate(runs):
            m.add("transfer_accuracy", test[k], seed=run.seed, **{**run.keys, "arm": "transfer"}, task=name)
            rows.append(
                {
                    "name": "vit",
                    "seed": run.seed,
                    "run": number[run.seed],  # in the order of training
                    "adapt_ds": name,
                    "final_val": run.val,
                    "leaked": run.leaked,
                    "adapt_final_val": val[k],
                    "adapt_final_test": test[k],
                }
            )
            number[run.seed] += 1
        if name == world.TASKS[0]:
            best = {seed: max((r for r in runs if r.seed == seed), key=lambda run: run.val) for seed in task.seeds}
            _course(task, m, make, few, test_rows, {seed: run.model for seed, run in best.items()}, classes)
    frame = pd.DataFrame(rows)
    for seed in task.seeds:
        table = frame[frame["seed"] == seed]
        for _, row in selection_regret(table.drop(columns="seed")).iterrows():
            keys: dict[str, Any] = {"arm": "selection", "task": str(row["adapt_ds"]), "seed": seed}
            m.add_all({k: float(row[k]) for k in ("upstream", "downstream", "difference")}, **keys)
        mean = table.groupby("run")[["final_val", "leaked", "adapt_final_test"]].mean()  # over the tasks
        for kind, column in (("clean", "final_val"), ("leaked", "leaked")):
            found = rank_agreement(mean[column], mean["adapt_final_test"])
            m.add("rank_agreement", found, arm="selection", validation=kind, seed=seed)


def _course(
    task: Task[Sweep],
    m: Measurements,
    make: Any,
    data: dict[int, Rows],
    test: dict[int, Rows],
    best: dict[int, nn.Module],
    classes: int,
) -> None:
    """Test accuracy by steps of fine-tuning, and of training from scratch with the light augmentation."""
    s = task.settings
    options: dict[str, Any] = {"batch": s.batch, "lr": s.lr, "classes": classes}
    kinds = {
        "transfer": ([Arm("none", rows, seed, start=best[seed]) for seed, rows in data.items()], TRANSFER_AT, 0.0),
        "scratch": (
            [Arm("light", rows, seed, *AUGMENTATIONS["light"]) for seed, rows in data.items()],
            SCRATCH_AT,
            s.decay,
        ),
    }
    for arm, (how, places, decay) in kinds.items():
        for steps in places if s.short >= 100 else places[:1]:
            replicas = train(how, make, steps=steps, decay=decay, **options)
            for seed, found in zip(data, accuracies(replicas, list(test.values())), strict=True):
                m.add("course", found, step=steps, arm=arm, seed=seed)


def _patches(task: Task[Sweep], m: Measurements, data: dict[int, _Data]) -> None:
    """Patches of twice the size against a thinner model that is about as fast, and how fast both are here."""
    s = task.settings
    first = data[task.seeds[0]]
    shape = tuple(first.small.x.shape[1:])
    kinds = {"coarse": {"patch": 2 * s.patch, "width": s.coarse_width}, "thin": {"width": s.thin_width}}
    trained = {}
    for arm, sizes in kinds.items():
        trained[arm] = train(
            [Arm("none", d.large, seed) for seed, d in data.items()],
            _maker(task, shape, first.classes, **sizes),
            steps=s.short,
            batch=s.batch,
            lr=s.lr,
            decay=s.decay,
            classes=first.classes,
        )
        for seed, found in zip(data, accuracies(trained[arm], [d.test for d in data.values()]), strict=True):
            m.add("accuracy", found, arm=arm, seed=seed)
    for r, seed in enumerate(data):
        for arm, speed in _speeds({arm: replicas.module(r) for arm, replicas in trained.items()}, shape).items():
            m.add("series_per_second", speed, arm=arm, seed=seed)


@torch.no_grad()
def _speeds(models: dict[str, nn.Module], shape: tuple[int, ...]) -> dict[str, float]:
    """Series per CPU second, measured in turns, so that other load on the machine falls on all alike."""
    x, seconds = torch.zeros(256, *shape), {arm: [] for arm in models}  # type: ignore[var-annotated]
    for turn in range(21):
        for arm, model in models.items():
            start = time.process_time()
            model(x)
            if turn:  # the first warms up
                seconds[arm].append(time.process_time() - start)
    return {arm: 256 / max(float(np.median(values)), 1e-9) for arm, values in seconds.items()}
