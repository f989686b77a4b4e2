"""The study's three experiments: small and large learning rates, a grid of both, and wrong labels.

Coefficients are chosen on a validation split before anything else, by trainings of their own seeds, with the same
number of trainings for every method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import torch.nn.functional as F
from torch import nn

from mlcollage._random import derive
from mlcollage.lab import Measurements, Task
from mlcollage.measure import fisher_trace, hessian_trace

from .data import SeedData, Settings, seed_data
from .records import Recorder, evaluation_steps, tail
from .training import Training

TUNING_SEED = 10_000
"""Trainings that choose coefficients have seeds from here on, which no study uses."""


@dataclass(frozen=True)
class Clean(Settings):
    """Small and large learning rate on true labels."""

    tuning_seeds: int = 2  # trainings per coefficient
    tuning_steps: int = 1000  # steps of a training that chooses, at the small learning rate
    small_steps: int = 2400  # steps of a training at the small learning rate
    grid: tuple[float, ...] = (0.1, 0.3, 1.0)  # coefficients of FP to choose from
    label_draws: int = 200  # draws of all labels, for the mean of the mini-batch estimate of Tr(F)
    vectors: int = 10  # random vectors for the trace of the Hessian


@dataclass(frozen=True)
class Grid(Settings):
    """Learning rates and batch sizes on true labels."""

    small_steps: int = 2400  # steps at a tenth of the large learning rate; fewer at larger ones
    points: tuple[tuple[float, float], ...] = (  # shares of the large learning rate and of the batch size
        (0.1, 1.0),
        (0.2, 1.0),
        (0.33, 1.0),
        (0.66, 1.0),
        (1.0, 1.0),
        (2.0, 1.0),
        (1.0, 0.5),
    )


@dataclass(frozen=True)
class WrongLabels(Settings):
    """One method on labels of which a part is wrong, at a third of the large learning rate."""

    method: str = "fp"  # none, gpx, gp, fp, gpr, trf, sam or mixup
    grid: tuple[float, ...] = (0.3, 1.0, 3.0)  # its coefficients to choose from
    tuning_seeds: int = 2  # trainings per coefficient
    steps: int = 1000  # steps of every training
    wrong: float = 0.3  # share of wrong labels, in training and in validation


S = TypeVar("S", bound=Settings)


class _Bench(Generic[S]):
    """What the trainings of one run share, and how they are tuned."""

    def __init__(self, task: Task[S], wrong: float = 0.0) -> None:
        self.s, self.task, self.wrong = task.settings, task, wrong
        self.m = Measurements()
        (first,) = (d.problem for d in self.data_of([TUNING_SEED]))
        self.batch = max(2, min(self.s.batch, len(first.train.x) // 4))
        # GPx is a derivative by the input: its coefficient goes with the inputs' variance.
        self.unit = {"gpx": float(first.train.x.var())}
        # Train losses at which traces and ends are compared, as shares of the loss at chance.
        self.losses = {f"{when}_loss": c * math.log(first.num_classes) for when, c in (("early", 0.5), ("late", 0.1))}

    @cached_property
    def data(self) -> list[SeedData]:
        """Data of the task's seeds."""
        return self.data_of(self.task.seeds)

    def data_of(self, seeds: Sequence[int]) -> list[SeedData]:
        """Data of each seed; equal seeds share them."""
        task, wrong = self.task, self.wrong
        made = {i: seed_data(self.s, i, wrong=wrong, workload=task.workload, device=task.device) for i in set(seeds)}
        return [made[seed] for seed in seeds]

    def training(self, method: str, lr: float, coefficient: float = 0.0, *, batch: int | None = None) -> Training:
        """One of the task's seeds, with a coefficient in the unit of its grid."""
        given = [coefficient * self.unit.get(method, 1.0)] * len(self.data)
        size = self.batch if batch is None else batch
        return Training(method, self.data, self.task.seeds, lr, given, batch=size, interval=self.s.interval)

    def follow(
        self,
        training: Training,
        steps: int,
        at: set[int],
        probe: Callable[[Recorder, int], None] | None = None,
        *,
        ratio: bool = False,
    ) -> Recorder:
        """Train up to ``steps``, measure at the steps ``at``, and call ``probe`` after each measurement."""
        recorder = Recorder(training.data, training.seeds, self.s.traced, ratio=ratio)
        for t in training.run(steps):
            if t in at:
                recorder.measure(training.replicas, t)
                if probe is not None:
                    probe(recorder, t)
        return recorder

    def record(
        self,
        arm: str,
        training: Training,
        steps: int,
        keys: Mapping[str, float | str],
        probe: Callable[[Recorder, int], None] | None = None,
        *,
        also: Collection[int] = (),
        ratio: bool = False,
    ) -> None:
        """Follow a training and write its curves as those of an arm; ``also`` are further steps to measure at."""
        at = evaluation_steps(steps, self.s.evaluations) | set(also)
        self.follow(training, steps, at, probe, ratio=ratio).write(self.m, arm, keys, **self.losses)

    def tune(self, method: str, grid: Sequence[float], lr: float, steps: int, seeds: int) -> float:
        """The coefficient of the best validation accuracy over the last tenth, mean over seeds of its own."""
        if len(grid) == 1:
            return grid[0]
        return self._best(method, grid, [c for c in grid for _ in range(seeds)], lr, steps)

    def learning_rate(self) -> float:
        """The large learning rate: as registered, or (on a user's workload) the best on validation of a coarse grid."""
        if self.s.lr is not None:
            return self.s.lr
        rates = (0.01, 0.0316, 0.1, 0.316)
        return self._best("none", rates, [0.0] * len(rates), rates, self.s.large_steps, name="lr")

    def _best(
        self,
        method: str,
        candidates: Sequence[float],
        coefficients: Sequence[float],
        lr: float | Sequence[float],
        steps: int,
        *,
        name: str | None = None,
    ) -> float:
        """The candidate of the best validation accuracy over the last tenth, each with as many trainings."""
        each = len(coefficients) // len(candidates)
        seeds = [TUNING_SEED + i for _ in candidates for i in range(each)]
        given = [c * self.unit.get(method, 1.0) for c in coefficients]
        training = Training(method, self.data_of(seeds), seeds, lr, given, batch=self.batch, interval=self.s.interval)
        at = tail(steps)
        found = np.nan_to_num(self.follow(training, steps, at).last("val_accuracy", len(at)))  # 0 where one diverged
        scores = found.reshape(len(candidates), each).mean(1)
        for candidate, score in zip(candidates, scores, strict=True):
            self.m.add("tuning_accuracy", float(score), coefficient=candidate, method=name or method)
        return candidates[int(scores.argmax())]


# --- small and large learning rates, without label noise --------------------------------------------------------------


def clean(task: Task[Clean]) -> Measurements:
    """Small and large learning rate, with and without the Fisher penalty, early and late; flatness and the identity."""
    bench, s = _Bench(task), task.settings
    large = bench.learning_rate()
    small, q = large / 10, s.small_steps // 4
    alpha = bench.tune("fp", s.grid, small, s.tuning_steps, s.tuning_seeds)
    alpha_large = bench.tune("fp", s.grid, large, s.large_steps, s.tuning_seeds)
    kept: dict[tuple[str, int], nn.Module] = {}
    branches: dict[str, Training] = {}

    def arm(name: str, method: str, lr: float, coefficient: float, steps: int, branch_at: int | None = None) -> None:
        training = bench.training(method, lr, coefficient)
        identity_at = {min(evaluation_steps(steps, s.evaluations)), q, steps} if name == "small" else set()

        def probe(recorder: Recorder, t: int) -> None:
            for r in np.flatnonzero(recorder.last("train_loss") <= bench.losses["late_loss"]):
                kept.setdefault((name, int(r)), training.replicas.module(int(r)))
            if t == branch_at:
                branches[name] = training.branch("none" if method == "fp" else "fp", [alpha] * len(task.seeds))
            if t in identity_at:
                _identity(bench, training, t)

        also = identity_at | ({branch_at} if branch_at is not None else set())
        bench.record(name, training, steps, {"lr": lr, "coefficient": coefficient}, probe, also=also)

    arm("small", "none", small, 0.0, s.small_steps, branch_at=s.small_steps - q)
    arm("large", "none", large, 0.0, s.large_steps)
    arm("small_fp", "fp", small, alpha, s.small_steps, branch_at=q)
    arm("large_fp", "fp", large, alpha_large, s.large_steps)
    for name, start in (("early_fp", "small_fp"), ("late_fp", "small")):
        bench.record(name, branches[start], s.small_steps, {"lr": small, "coefficient": alpha})
    _flatness(bench, kept)
    return bench.m


def _identity(bench: _Bench[Clean], training: Training, t: int) -> None:
    """B |mean gradient|^2 against the exact trace of one batch: relative error of the mean over many label draws."""
    draws = bench.s.label_draws
    for r, (seed, d) in enumerate(zip(bench.task.seeds, bench.data, strict=True)):
        model, x = training.replicas.module(r), d.problem.train.x[: bench.s.batch]
        exact = fisher_trace(model, x, method="exact").value
        one, many = (
            fisher_trace(model, x, method="minibatch", draws=k, generator=derive(seed, stream, t), batch_size=len(x))
            for k, stream in ((1, 9), (draws, 8))
        )
        values = {
            "identity_error": many.value / exact - 1,
            "identity_noise": many.stderr * math.sqrt(draws) / exact,
            "identity_one_draw": one.value / exact,
        }
        bench.m.add_all(values, step=t, arm="small", seed=seed)


def _flatness(bench: _Bench[Clean], kept: dict[tuple[str, int], nn.Module]) -> None:
    """Trace of the Hessian of the training loss, where the loss first fell below the late threshold."""
    for (arm, r), model in kept.items():
        if arm not in ("small", "large", "small_fp"):
            continue
        seed, data = bench.task.seeds[r], bench.data[r].problem.train
        found = hessian_trace(
            model, F.cross_entropy, [tuple(data)], n_vectors=bench.s.vectors, generator=derive(seed, 10)
        )
        bench.m.add_all({"hessian_trace": found.value, "hessian_stderr": found.stderr}, arm=arm, seed=seed)


# --- learning rates and batch sizes -----------------------------------------------------------------------------------


def grid(task: Task[Grid]) -> Measurements:
    """Early trace and test accuracy at equal train loss, over learning rates and batch sizes."""
    bench, s = _Bench(task), task.settings
    large = bench.learning_rate()
    for factor, share in s.points:
        lr, batch = large * factor, max(2, int(bench.batch * share))
        # Measured in pilots: the time to one train loss goes about as this power of the learning rate.
        steps = max(20, int(s.small_steps * (10 * factor) ** -0.7))
        keys: dict[str, float | str] = {"lr": lr, "batch": batch, "point": f"{factor:g}x{share:g}"}
        bench.record("grid", bench.training("none", lr, batch=batch), steps, keys)
    return bench.m


# --- wrong labels -----------------------------------------------------------------------------------------------------


def wrong_labels(task: Task[WrongLabels]) -> Measurements:
    """One method on labels of which a part is wrong; for FP also only early, and only late."""
    s = task.settings
    bench = _Bench(task, s.wrong)
    lr, q = bench.learning_rate() / 3, s.steps // 4
    chosen = bench.tune(s.method, s.grid, lr, s.steps, s.tuning_seeds)
    branches: dict[int, Training] = {}
    training = bench.training(s.method, lr, chosen)

    def probe(recorder: Recorder, t: int) -> None:
        if t == q and s.method == "fp":
            branches[t] = training.branch("none")

    keys: dict[str, float | str] = {"lr": lr, "coefficient": chosen}
    also = [q] if s.method == "fp" else []
    bench.record(task.arm, training, s.steps, keys, probe, also=also, ratio=s.method == "none")
    if s.method == "fp":
        bench.record("noise_early_fp", branches[q], s.steps, keys)
        plain = bench.training("none", lr, chosen)
        for _ in plain.run(s.steps - q):
            pass
        bench.record("noise_late_fp", plain.branch("fp"), s.steps, keys)
    return bench.m
