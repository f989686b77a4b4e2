"""The study's three experiments: small and large learning rates, a grid of both, and wrong labels.

Coefficients are chosen on a validation split before anything else, by trainings of their own seeds, with the same
number of trainings for every method. Validation labels are as wrong as the training labels: a user has no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.data.label_noise import add_label_noise
from mlcollage.data.workload import Workload, arrays, load_workload
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale
from mlcollage.nn.convnet import ConvNet
from mlcollage.nn.mlp import MLP

from .labels import derive
from .records import Problem, Recorder, evaluation_steps, summarize, tail
from .training import Cells, Stack, train

__all__ = ["EXPERIMENTS", "TUNING_SEED", "Setting", "base_data", "problem"]

TUNING_SEED = 10_000
"""Trainings that choose coefficients have seeds from here on, which no study uses."""


@dataclass(frozen=True)
class Base:
    """All images and labels, before a seed takes its part."""

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    x_test: npt.NDArray[np.float32]
    y_test: npt.NDArray[np.int64]
    classes: int
    scale: bool


@dataclass
class Setting:
    """A run's settings, data and model, with what its trainings share."""

    run: Run
    workload: Workload | None

    def __post_init__(self) -> None:
        self.device = "cuda" if self.run.scale.rank >= Scale.FULL.rank and torch.cuda.is_available() else "cpu"
        self.base = base_data(self.run, self.workload)
        self.seeds = [self.run.seed + i for i in range(self.run.integer("seeds"))]
        first = problem(self.base, self.run, TUNING_SEED, 0.0)
        self.batch = max(2, min(self.run.integer("batch_size"), len(first.x) // 4))
        self.spread = float(first.x.var())
        shape, classes = tuple(first.x.shape[1:]), self.base.classes
        self.model_fn: Callable[[], nn.Module] = partial(_network, self.run.text("network"), shape, classes)
        if self.workload is not None and self.workload.model is not None:
            self.model_fn = self.workload.model
        self.early_loss, self.late_loss = 0.5 * math.log(classes), 0.1 * math.log(classes)

    def problems(self, seeds: Sequence[int], noise: float) -> list[Problem]:
        """Data of each seed; equal seeds share them."""
        made = {seed: problem(self.base, self.run, seed, noise).to(self.device) for seed in set(seeds)}
        return [made[seed] for seed in seeds]

    def train(
        self,
        cells: Cells,
        problems: list[Problem],
        steps: int,
        *,
        stack: Stack | None = None,
        first: int = 0,
        at: set[int] | None = None,
        recorder: Recorder | None = None,
        batch: int | None = None,
        probe: Callable[[Stack, int], None] | None = None,
        ratio: bool = False,
    ) -> tuple[Stack, Recorder]:
        """Train, evaluating at the steps ``at`` (default: the tail)."""
        stack = stack or Stack.build(self.model_fn, cells.seeds, self.device)
        recorder = recorder or Recorder(problems, cells.seeds, self.run.integer("trace_size"))
        x, y = torch.stack([p.x for p in problems]), torch.stack([p.y for p in problems])
        size = self.batch if batch is None else batch
        for t in train(stack, x, y, cells, steps=steps, batch_size=size, classes=self.base.classes, first=first):
            if t in (at or tail(steps)):
                recorder.measure(stack, t, ratio=ratio)
                if probe is not None:
                    probe(stack, t)
        return stack, recorder

    def tune(self, method: str, grid: Sequence[float], lr: float, steps: int, noise: float, m: Measurements) -> float:
        """The coefficient of the best validation accuracy over the last tenth, mean over seeds of its own."""
        if len(grid) == 1:
            return grid[0]
        seeds = [TUNING_SEED + i for i in range(self.run.integer("tuning_seeds"))]
        every = [(c, s) for c in grid for s in seeds]
        cells = Cells(
            method,
            tuple(s for _, s in every),
            (lr,) * len(every),
            tuple(self.scaled(method, c) for c, _ in every),
            self.run.integer("interval"),
        )
        problems = self.problems(cells.seeds, noise)
        _, recorder = self.train(cells, problems, steps)
        scores = np.nan_to_num(recorder.last("val_accuracy", len(tail(steps)))).reshape(len(grid), len(seeds)).mean(1)
        for c, score in zip(grid, scores, strict=True):
            m.add("tuning_accuracy", float(score), coefficient=c, method=method)
        return grid[int(scores.argmax())]

    def scaled(self, method: str, coefficient: float) -> float:
        """GPx is a derivative by the input: its coefficient goes with the inputs' variance."""
        return coefficient * self.spread if method == "gpx" else coefficient

    def learning_rate(self, m: Measurements) -> float:
        """The large learning rate: as registered, or (on a user's workload) the best on validation of a coarse grid."""
        given = self.run.settings.get("lr")
        if given is not None:
            return float(given)
        steps = self.run.integer("large_steps")
        rates = (0.01, 0.0316, 0.1, 0.316)
        seeds = tuple(TUNING_SEED for _ in rates)
        cells = Cells("none", seeds, rates, (0.0,) * len(rates))
        _, recorder = self.train(cells, self.problems(seeds, 0.0), steps)
        scores = np.nan_to_num(recorder.last("val_accuracy", len(tail(steps))))
        for rate, score in zip(rates, scores, strict=True):
            m.add("tuning_accuracy", float(score), coefficient=rate, method="lr")
        return rates[int(scores.argmax())]


@cache
def _pooled_fashion() -> Base:
    from mlcollage.data.fashion_mnist import load

    x, y, x_test, y_test = load()

    def pool(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return images.reshape(-1, 1, 14, 2, 14, 2).mean((3, 5))

    return Base(pool(x), y, pool(x_test), y_test, 10, True)


def base_data(run: Run, workload: Workload | None) -> Base:
    """Fashion-MNIST at 14 x 14, another built-in source, or the user's data, of which a part is used."""
    own = workload is not None and workload.model is not None
    if workload is None and run.text("data") != "fashion_14":
        workload = load_workload(run.text("data"))
    if workload is not None:
        most = 10 * (run.integer("train_size") + run.integer("val_size"))
        x, y = arrays(workload.train, most)
        x_test, y_test = arrays(workload.test, 5 * run.integer("test_size"))
        return Base(x, y, x_test, y_test, workload.num_classes, not own)
    return _pooled_fashion()


def problem(base: Base, run: Run, seed: int, noise: float) -> Problem:
    """A seed's training, validation and test samples; own networks get them standardized by the training part."""
    rng = np.random.default_rng([seed, 11])
    order = rng.permutation(len(base.x))
    n = min(run.integer("train_size"), int(0.7 * len(order)))
    part, held = order[:n], order[n : n + run.integer("val_size")]
    tested = rng.permutation(len(base.x_test))[: run.integer("test_size")]
    mean, std = (base.x[part].mean(), base.x[part].std() + 1e-8) if base.scale else (0.0, 1.0)

    def images(values: npt.NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(((values - mean) / std).astype(np.float32))

    y, wrong = add_label_noise(base.y[part], noise, num_classes=base.classes, rng=rng)
    y_val, _ = add_label_noise(base.y[held], noise, num_classes=base.classes, rng=rng)
    return Problem(
        images(base.x[part]),
        torch.from_numpy(y),
        torch.from_numpy(wrong),
        images(base.x[held]),
        torch.from_numpy(y_val),
        images(base.x_test[tested]),
        torch.from_numpy(base.y_test[tested].astype(np.int64)),
    )


def _network(name: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The study's own networks, without batch norm."""
    if name == "convnet" and len(shape) == 3:
        return ConvNet(shape, classes, (32, 64, 128), norm=None)
    return MLP(shape, classes, (128, 128))


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split("-")]


def _write(
    m: Measurements, recorder: Recorder, seeds: Sequence[int], arm: str, s: Setting, **keys: str | float
) -> None:
    recorder.write(m, lambda r: arm, lambda r: {"seed": seeds[r], **keys})
    for r, seed in enumerate(seeds):
        values = summarize(recorder.curves(r), early_loss=s.early_loss, late_loss=s.late_loss)
        for metric, value in values.items():
            m.add(metric, value, step=0, arm=arm, seed=seed, **keys)


# --- small and large learning rates, without label noise --------------------------------------------------------------


def clean(run: Run, workload: Workload | None) -> Measurements:
    """Small and large learning rate, with and without the Fisher penalty, early and late; flatness and the identity."""
    m, s = Measurements(), Setting(run, workload)
    large = s.learning_rate(m)
    small = large / 10
    long, short, interval = run.integer("small_steps"), run.integer("large_steps"), run.integer("interval")
    grid = _floats(run.text("fp_grid"))
    alpha = s.tune("fp", grid, small, run.integer("tuning_steps"), 0.0, m)
    alpha_large = s.tune("fp", grid, large, short, 0.0, m)
    seeds, problems, n = s.seeds, s.problems(s.seeds, 0.0), len(s.seeds)
    count = run.integer("evaluations")
    q = long // 4
    kept: dict[tuple[str, int], nn.Module] = {}
    branches: dict[str, Stack] = {}

    def one(arm: str, method: str, lr: float, coefficient: float, steps: int, branch_at: int | None = None) -> None:
        cells = Cells(method, tuple(seeds), (lr,) * n, (coefficient,) * n, interval)
        recorder = Recorder(problems, seeds, run.integer("trace_size"))
        at = evaluation_steps(steps, count) | ({branch_at} if branch_at else set())

        def probe(stack: Stack, t: int) -> None:
            for r in np.flatnonzero(recorder.last("train_loss") <= s.late_loss):
                kept.setdefault((arm, int(r)), stack.module(int(r)))
            if t == branch_at:
                branches[arm] = stack.copy()
            if arm == "small" and t in (min(at), q, steps):
                _identity(m, stack, problems, seeds, t, run)

        s.train(cells, problems, steps, at=at, recorder=recorder, probe=probe)
        _write(m, recorder, seeds, arm, s, experiment="clean", lr=lr, coefficient=coefficient)

    one("small", "none", small, 0.0, long, branch_at=long - q)
    one("large", "none", large, 0.0, short)
    one("small_fp", "fp", small, alpha, long, branch_at=q)
    one("large_fp", "fp", large, alpha_large, short)
    for arm, start, begin, method in (("early_fp", "small_fp", q, "none"), ("late_fp", "small", long - q, "fp")):
        cells = Cells(method, tuple(seeds), (small,) * n, (alpha,) * n, interval)
        at = {t for t in evaluation_steps(long, count) if t > begin}
        _, recorder = s.train(cells, problems, long, stack=branches[start], first=begin, at=at)
        _write(m, recorder, seeds, arm, s, experiment="clean", lr=small, coefficient=alpha)
    _flatness(m, kept, problems, seeds, run)
    return m


def _identity(m: Measurements, stack: Stack, problems: list[Problem], seeds: list[int], t: int, run: Run) -> None:
    """B |mean gradient|^2 against the exact trace of one batch: relative error of the mean over many label draws."""
    from mlcollage.measure.fisher import fisher_trace

    for r, p in enumerate(problems):
        model, x = stack.module(r), p.x[: run.integer("batch_size")]
        exact = fisher_trace(model, x, method="exact").value
        draws = run.integer("identity_draws")
        found = fisher_trace(
            model, x, method="minibatch", draws=draws, generator=derive(seeds[r], 8, t), batch_size=len(x)
        )
        one = fisher_trace(model, x, method="minibatch", generator=derive(seeds[r], 9, t), batch_size=len(x))
        values = {
            "identity_error": found.value / exact - 1,
            "identity_noise": found.stderr * math.sqrt(draws) / exact,
            "identity_one_draw": one.value / exact,
        }
        m.add_all(values, step=t, arm="small", seed=seeds[r], experiment="clean")


def _flatness(
    m: Measurements, kept: dict[tuple[str, int], nn.Module], problems: list[Problem], seeds: list[int], run: Run
) -> None:
    """Trace of the Hessian of the training loss, where the loss first fell below the late threshold."""
    from mlcollage.measure.hessian import hessian_trace

    for (arm, r), model in kept.items():
        if arm not in ("small", "large", "small_fp"):
            continue
        p = problems[r]
        found = hessian_trace(
            model, F.cross_entropy, [(p.x, p.y)], n_vectors=run.integer("vectors"), generator=derive(seeds[r], 10)
        )
        values = {"hessian_trace": found.value, "hessian_stderr": found.stderr}
        m.add_all(values, arm=arm, seed=seeds[r], experiment="clean")


# --- learning rates and batch sizes -----------------------------------------------------------------------------------


def grid(run: Run, workload: Workload | None) -> Measurements:
    """Early trace and test accuracy at equal train loss, over learning rates and batch sizes."""
    m, s = Measurements(), Setting(run, workload)
    large = s.learning_rate(m)
    problems, n = s.problems(s.seeds, 0.0), len(s.seeds)
    for point in run.text("points").split("-"):
        factor, share = (float(v) for v in point.split("x"))
        lr, batch = large * factor, max(2, int(s.batch * share))
        # Measured in pilots: the time to one train loss goes about as this power of the learning rate.
        steps = max(20, int(run.integer("small_steps") * (10 * factor) ** -0.7))
        cells = Cells("none", tuple(s.seeds), (lr,) * n, (0.0,) * n)
        _, recorder = s.train(
            cells, problems, steps, at=evaluation_steps(steps, run.integer("evaluations")), batch=batch
        )
        _write(m, recorder, s.seeds, "grid", s, experiment="grid", lr=lr, batch=batch, point=point)
    return m


# --- wrong labels -----------------------------------------------------------------------------------------------------


def noise(run: Run, workload: Workload | None) -> Measurements:
    """One method on labels of which a part is wrong; for FP also only early, and only late."""
    m, s = Measurements(), Setting(run, workload)
    lr = s.learning_rate(m) / 3
    rate, steps, interval = run.real("noise"), run.integer("noise_steps"), run.integer("interval")
    method = run.text("method")
    chosen = s.tune(method, _floats(run.text("grid")), lr, steps, rate, m)
    seeds, problems, n = s.seeds, s.problems(s.seeds, rate), len(s.seeds)
    at = evaluation_steps(steps, run.integer("evaluations"))
    q = steps // 4
    cells = Cells(method, tuple(seeds), (lr,) * n, (s.scaled(method, chosen),) * n, interval)
    branches: dict[int, Stack] = {}

    def probe(stack: Stack, t: int) -> None:
        if t == q:
            branches[t] = stack.copy()

    timed = at | {q} if method == "fp" else at
    _, recorder = s.train(cells, problems, steps, at=timed, probe=probe, ratio=method == "none")
    keys: dict[str, str | float] = {"experiment": "noise", "lr": lr, "coefficient": chosen}
    _write(m, recorder, seeds, run.arm, s, **keys)
    if method != "fp":
        return m
    plain = replace(cells, method="none")
    _, recorder = s.train(plain, problems, steps, stack=branches[q], first=q, at={t for t in at if t > q})
    _write(m, recorder, seeds, "noise_early_fp", s, **keys)
    stack, _ = s.train(plain, problems, steps - q)
    _, recorder = s.train(cells, problems, steps, stack=stack, first=steps - q, at={t for t in at if t > steps - q})
    _write(m, recorder, seeds, "noise_late_fp", s, **keys)
    return m


EXPERIMENTS: dict[str, Callable[[Run, Workload | None], Measurements]] = {
    "clean": clean,
    "grid": grid,
    "noise": noise,
}
