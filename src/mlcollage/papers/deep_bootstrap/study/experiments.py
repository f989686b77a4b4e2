"""The study's experiments: which network is trained how, in which world, and what is recorded."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from mlcollage.data import DataWorld, GlyphWorld, Labeled
from mlcollage.data.fresh_networks import fresh
from mlcollage.data.problem import moments
from mlcollage.errors import InvalidInput
from mlcollage.lab import Measurements, Scale, Task
from mlcollage.nn import build
from mlcollage.train import cosine, steps

from ..framework import DeepBootstrap
from ..result import BootstrapResult
from ..worlds import FiniteAsIdeal, cifar5m
from .models import ARCHITECTURES, AUGMENTATIONS, Architecture


@dataclass(frozen=True)
class Worlds:
    """One network in the Ideal World, and in the Real Worlds of all n."""

    architecture: str = "mlp128"  # which network: a key of ARCHITECTURES, or "user" for the workload's own
    data: str = "easy16"  # a preset of GlyphWorld, "cifar5m", or "workload"
    n: tuple[int, ...] = (1000, 4000)  # sample sizes of the Real Worlds
    steps: int = 800  # updates in each world
    batch_size: int = 64  # samples per update
    evaluations: int = 14  # logarithmically spaced
    test_size: int = 1500  # samples of the test block
    augment: str | None = None  # "shift" or "occlude", in both worlds
    label_noise: float = 0.0  # share of wrong labels
    loss: str = "cross_entropy"  # or "mse"
    pretrain_steps: int = 0  # updates on another alphabet before


@dataclass(frozen=True)
class LeastSquares:
    """Linear regression by gradient descent with more features than samples."""

    dimension: int = 200  # features
    n: int = 50  # samples of the Real World, and of each fresh batch
    steps: int = 2000  # updates
    lr: float = 0.05  # learning rate


def on_workload(s: Worlds, workload: Labeled, scale: Scale) -> Worlds | None:
    """One pass over the user's training samples; their model, or else an MLP and for images a CNN."""
    if (workload.model is not None) != (s.architecture == "user"):
        return None
    if workload.model is not None:
        fresh(workload.model)
    elif s.architecture == "cnn" and len(workload.train[0][0].shape) != 3:
        return None
    size, tests = (len(cast(Sized, part)) for part in (workload.train, workload.test))
    batch = min(s.batch_size, max(2, size // 40))  # BatchNorm needs two samples
    most = min(s.steps, size // batch)  # updates of one pass, since no sample may come twice in the Ideal World
    sizes = sorted({max(batch, most * batch // k) for k in (32, 16, 8, 4)})
    return dataclasses.replace(
        s, data="workload", n=tuple(sizes), steps=most, batch_size=batch, test_size=min(s.test_size, tests)
    )


def _world(task: Task[Worlds]) -> DataWorld:
    s, workload = task.settings, task.workload
    if workload is not None:
        return FiniteAsIdeal(workload.train, num_classes=workload.num_classes, test=workload.test, seed=0)
    if s.data == "cifar5m":
        folder = os.environ.get("MLCOLLAGE_DATA")
        if not folder:
            raise InvalidInput("scale paper needs CIFAR-5m; put its six files into cifar5m in MLCOLLAGE_DATA.")
        return cifar5m(Path(folder) / "cifar5m")
    return GlyphWorld.preset(s.data, label_noise=s.label_noise)


def _model_fn(task: Task[Worlds], world: DataWorld) -> Callable[[], nn.Module]:
    if task.settings.architecture == "user":
        return cast(Callable[[], nn.Module], task.workload.model)
    architecture = ARCHITECTURES[task.settings.architecture]
    pretrained = _pretrained(task, world, architecture) if task.settings.pretrain_steps else None

    def make() -> nn.Module:
        network = architecture.make(world.shape, world.num_classes)
        if pretrained is not None:
            # The other alphabet has other classes: the last layer starts afresh.
            body = {k: v for k, v in pretrained.items() if not k.startswith("head")}
            network.load_state_dict(body, strict=False)
        return network

    return make


def _standardize(s: Worlds, world: DataWorld) -> Callable[[Tensor], Tensor] | None:
    """Mean 0 and deviation 1 over the test block; a user's own model gets the inputs as they are."""
    if s.architecture == "user":
        return None
    mean, std = moments(world.fixed(min(1000, s.test_size), split="test").tensors[0])
    return lambda batch: (batch - mean) / std


def _pretrained(task: Task[Worlds], world: DataWorld, architecture: Architecture) -> dict[str, Tensor]:
    """Weights after training on another alphabet, for the claim on pre-training."""
    s = task.settings
    other, transform = GlyphWorld.preset(s.data, alphabet_seed=1), _standardize(s, world)
    assert transform is not None
    network = build(lambda: architecture.make(world.shape, world.num_classes), task.seed)
    total = s.pretrain_steps
    stream = ((transform(x), y) for x, y in (other.batch(t, s.batch_size) for t in range(total)))
    optimizer = architecture.optimizer(network.parameters())
    for _ in steps(network, stream, optimizer, schedule=cosine(total), max_steps=total):
        pass
    return network.state_dict()


def worlds(task: Task[Worlds]) -> Measurements:
    """Train one network in the Ideal World and in the Real Worlds of all n, for one seed."""
    s, world = task.settings, _world(task)
    known = ARCHITECTURES.get(s.architecture, ARCHITECTURES["cnn"])  # a user's network is trained as the CNN is
    framework = DeepBootstrap(
        _model_fn(task, world),
        world,
        n=s.n,
        steps=s.steps,
        batch_size=s.batch_size,
        optimizer_fn=known.optimizer,
        schedule=cosine(s.steps, warmup=min(known.warmup, s.steps // 4)),
        loss=s.loss,
        transform=_standardize(s, world),
        augment=None if s.augment is None else AUGMENTATIONS[s.augment],
        eval_at=s.evaluations,
        seeds=task.seeds,
        test_size=s.test_size,
        train_size=1000,
        device=task.device,
    )
    m = Measurements()
    _record(m, framework.run())
    if task.seed == 0 and task.arm == "mlp128" and isinstance(world, GlyphWorld):
        images, labels = world.fixed(400, split="test").tensors
        chosen = [np.flatnonzero(labels.numpy() == c)[:4] for c in range(min(world.num_classes, 10))]
        m.array("examples", np.stack([images[i].numpy() for i in chosen if len(i) == 4]))
    return m


def _record(m: Measurements, result: BootstrapResult) -> None:
    metric = "soft_error" if result.curves["soft_error"].notna().any() else "error"
    # Stored as an integer, 0 for the Ideal World: infinity is no number to select rows by.
    curves = result.curves.assign(n=result.curves["n"].replace(math.inf, 0).astype(int))
    rows: list[dict[str, Any]] = curves.to_dict("records")  # type: ignore[assignment]
    for row in rows:
        for name in ("soft_error", "error", "loss"):
            if math.isfinite(row[name]):  # squared loss has no soft-error
                m.add(name, row[name], **{key: row[key] for key in ("step", "world", "n", "split")})
    end, at_t = (result.gap(metric, at=at).set_index("n").astype(float, errors="ignore") for at in ("end", "T"))
    gaps = result.gaps(metric)
    classical_end, classical_t = (result.generalization_gap(metric, at=at).set_index("n") for at in ("end", "T"))
    for n in result.n:
        converged = bool(np.isfinite(float(at_t["gap"][n])))  # else the end stands in for T
        there, classical = (at_t, classical_t) if converged else (end, classical_end)
        last = float(there["step"][n])
        values = {
            "final_real": end["real"][n],
            "final_ideal": end["ideal"][n],
            "final_gap": end["gap"][n],
            "final_train": classical_end["train"][n],
            "largest_gap": float(gaps["gap"][(gaps["n"] == n) & (gaps["step"] <= last)].abs().max()),  # either way
            "gap_at_stop": there["gap"][n],
            "real_at_stop": there["real"][n],
            "ideal_at_stop": there["ideal"][n],
            "classical_gap_at_stop": classical["gap"][n],
            "converged": float(converged),
        }
        for rule in ("train_error", "train_loss"):
            t = result.stopping_time(n, rule, seed=result.seeds[0])
            values[f"stop_{rule}"] = math.nan if t is None else t
        left = result.departure_step(n, metric, seed=result.seeds[0])
        values["departure_step"] = int(result.settings["steps"]) if left is None else left
        values["departed"] = float(left is not None)
        m.add_all(values, n=n)


def least_squares(task: Task[LeastSquares]) -> Measurements:
    """Where the claim must fail: least squares with more features than samples, by gradient descent.

    y = x.w + 0.5 noise, x standard normal in d dimensions, |w| = 1. The Real World descends on its n samples, the
    Ideal World on fresh batches of the same size; test error is |w - w_t|^2 + 0.25, exactly.
    """
    s = task.settings
    rng = np.random.default_rng([task.seed, 7])  # draws the truth, the fixed set and each fresh batch in turn
    truth = rng.normal(size=s.dimension) / np.sqrt(s.dimension)

    def draw() -> tuple[Any, Any]:
        x = rng.normal(size=(s.n, s.dimension))
        return x, x @ truth + 0.5 * rng.normal(size=s.n)

    fixed = draw()
    real, ideal = np.zeros(s.dimension), np.zeros(s.dimension)
    m = Measurements()
    marks = set(np.unique(np.geomspace(1, s.steps, 16).astype(int)).tolist())
    for t in range(1, s.steps + 1):
        for w, (x, y) in ((real, fixed), (ideal, draw())):
            # The gradient of half the mean squared error; in place, w is one of the two vectors (d,).
            w -= s.lr * x.T @ (x @ w - y) / len(x)
        if t in marks:
            errors = [float(((w - truth) ** 2).sum() + 0.25) for w in (real, ideal)]
            m.add("regression_error", errors[0], step=t, world="real")
            m.add("regression_error", errors[1], step=t, world="ideal")
            m.add("regression_gap", errors[0] - errors[1], step=t)
    return m
