"""The study's arms: which network is trained how, in which world, and what is recorded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlcollage.data.glyphs import GlyphWorld
from mlcollage.data.workload import Workload
from mlcollage.data.world import DataWorld
from mlcollage.errors import InvalidInput
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run
from mlcollage.nn.convnet import ConvNet
from mlcollage.nn.mlp import MLP
from mlcollage.nn.resnet import ResNet
from mlcollage.nn.vit import ViT
from mlcollage.train.schedules import cosine

from .framework import DeepBootstrap
from .result import BootstrapResult
from .worlds import FiniteAsIdeal, cifar5m

__all__ = ["ARCHITECTURES", "linear_regression", "train_worlds"]


@dataclass(frozen=True)
class Architecture:
    """A network and how it is trained: the procedure F of the paper, one for all worlds."""

    make: Callable[[Any, int], nn.Module]
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    warmup: int = 0


def _mlp(width: int, lr: float) -> Architecture:
    """Three layers with BatchNorm, as the paper's MLPs; SGD without momentum."""
    return Architecture(
        lambda shape, k: MLP(shape, k, widths=(width,) * 3, norm="batch"), partial(torch.optim.SGD, lr=lr)
    )


_MOMENTUM = partial(torch.optim.SGD, momentum=0.9)
ARCHITECTURES: Mapping[str, Architecture] = {
    "mlp8": _mlp(8, 0.1),
    "mlp32": _mlp(32, 0.1),
    "mlp128": _mlp(128, 0.1),
    "mlp128_slow": _mlp(128, 0.01),
    "cnn": Architecture(
        lambda s, k: ConvNet(s, k, widths=(16, 32, 64), strides=(2, 2, 1)),
        partial(_MOMENTUM, lr=0.1),
    ),
    "resnet": Architecture(
        lambda s, k: ResNet(s, k, width=8, stem_stride=2),
        partial(_MOMENTUM, lr=0.05),
    ),
    "vit": Architecture(
        lambda s, k: ViT(s, k, patch_size=s[-1] // 2, dim=48, depth=2, pool="mean"),
        partial(torch.optim.AdamW, lr=3e-3),
        warmup=30,
    ),
}


def _shift(x: Tensor, generator: torch.Generator, most: int = 2) -> Tensor:
    """Each image moved by up to two pixels each way; what enters repeats the edge."""
    n, _, h, w = x.shape
    move = torch.randint(-most, most + 1, (2, n, 1), generator=generator, device=generator.device).to(x.device)
    rows = (torch.arange(h, device=x.device) + move[0]).clamp(0, h - 1)
    columns = (torch.arange(w, device=x.device) + move[1]).clamp(0, w - 1)
    index = torch.arange(n, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _occlude(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half the width and height of each image, anywhere, set to the image's mean."""
    n, _, h, w = x.shape
    corner = torch.rand((2, n, 1), generator=generator, device=generator.device).to(x.device)
    rows = torch.arange(h, device=x.device) - (corner[0] * (h // 2)).long()
    columns = torch.arange(w, device=x.device) - (corner[1] * (w // 2)).long()
    hidden = ((rows >= 0) & (rows < h // 2))[:, :, None] & ((columns >= 0) & (columns < w // 2))[:, None, :]
    return torch.where(hidden[:, None], x.mean(dim=(1, 2, 3), keepdim=True), x)


AUGMENTATIONS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {"shift": _shift, "occlude": _occlude}


def _world(run: Run, workload: Workload | None) -> DataWorld:
    data = run.text("data")
    if data == "workload":
        assert workload is not None
        return FiniteAsIdeal(workload.train, num_classes=workload.num_classes, test=workload.test, seed=0)
    if data == "cifar5m":
        folder = os.environ.get("MLCOLLAGE_DATA")
        if not folder:
            raise InvalidInput(
                "scale paper needs CIFAR-5m: put its six files into $MLCOLLAGE_DATA/cifar5m and set MLCOLLAGE_DATA."
            )
        return cifar5m(Path(folder) / "cifar5m")
    noise = float(run.settings.get("label_noise") or 0.0)
    alphabet = int(run.settings.get("alphabet") or 0)
    return GlyphWorld.preset(data, label_noise=noise, alphabet_seed=alphabet)


def _model_fn(run: Run, world: DataWorld, workload: Workload | None) -> Callable[[], nn.Module]:
    if run.settings["architecture"] == "user":
        assert workload is not None
        assert workload.model is not None
        return workload.model
    architecture = ARCHITECTURES[run.text("architecture")]
    pretrained = _pretrained(run, world, architecture) if run.settings.get("pretrain_steps") else None

    def make() -> nn.Module:
        network = architecture.make(world.shape, world.num_classes)
        if pretrained is not None:
            body = {k: v for k, v in pretrained.items() if not k.startswith("head")}
            network.load_state_dict(body, strict=False)
        return network

    return make


def _standardize(run: Run, world: DataWorld) -> Callable[[Tensor], Tensor] | None:
    """Mean 0 and deviation 1 over the test block; a user's own model gets the inputs as they are."""
    if run.settings["architecture"] == "user":
        return None
    x, _ = world.fixed(min(1000, run.integer("test_size")), split="test").tensors
    mean, std = float(x.mean()), float(x.std())
    return lambda batch: (batch - mean) / std


def _pretrained(run: Run, world: DataWorld, architecture: Architecture) -> dict[str, Tensor]:
    """Weights after training on another alphabet, for the claim on pre-training."""
    from mlcollage.nn.init import build
    from mlcollage.train.loop import steps

    other, transform = GlyphWorld.preset(run.text("data"), alphabet_seed=1), _standardize(run, world)
    assert transform is not None
    network = build(lambda: architecture.make(world.shape, world.num_classes), run.seed)
    total, batch = run.integer("pretrain_steps"), run.integer("batch_size")
    stream = ((transform(x), y) for x, y in (other.batch(t, batch) for t in range(total)))
    for _ in steps(
        network, stream, architecture.optimizer(network.parameters()), schedule=cosine(total), max_steps=total
    ):
        pass
    return network.state_dict()


def train_worlds(run: Run, workload: Workload | None) -> Measurements:
    """Train one network in the Ideal World and in the Real Worlds of all n, for one seed."""
    s = run.settings
    world = _world(run, workload)
    steps = run.integer("steps")
    known = ARCHITECTURES.get(run.text("architecture"), ARCHITECTURES["cnn"])
    study = DeepBootstrap(
        _model_fn(run, world, workload),
        world,
        n=[int(n) for n in run.text("n").split("-")],
        steps=steps,
        batch_size=run.integer("batch_size"),
        optimizer_fn=known.optimizer,
        schedule=cosine(steps, warmup=min(known.warmup, steps // 4)),
        loss=str(s.get("loss") or "cross_entropy"),
        transform=_standardize(run, world),
        augment=AUGMENTATIONS[run.text("augment")] if s.get("augment") else None,
        eval_at=run.integer("evaluations"),
        seeds=[run.seed],
        test_size=run.integer("test_size"),
        train_size=1000,
    )
    m = Measurements()
    _record(m, study.run())
    if run.seed == 0 and run.arm == "mlp128" and isinstance(world, GlyphWorld):
        images, labels = world.fixed(400, split="test").tensors
        chosen = [np.flatnonzero(labels.numpy() == c)[:4] for c in range(min(world.num_classes, 10))]
        m.array("examples", np.stack([images[i].numpy() for i in chosen if len(i) == 4]))
    return m


def _record(m: Measurements, result: BootstrapResult) -> None:
    metric = "soft_error" if result.curves["soft_error"].notna().any() else "error"
    curves = result.curves.assign(n=result.curves["n"].replace(math.inf, 0).astype(int))
    rows: list[dict[str, Any]] = curves.to_dict("records")  # type: ignore[assignment]
    for row in rows:
        for name in ("soft_error", "error", "loss"):
            if math.isfinite(row[name]):
                m.add(name, row[name], **{key: row[key] for key in ("step", "world", "n", "split")})
    end, at_t, most = (
        result.gap(metric, at=at).set_index("n").astype(float, errors="ignore") for at in ("end", "T", "max")
    )
    classical_end, classical_t = (result.generalization_gap(metric, at=at).set_index("n") for at in ("end", "T"))
    for n in result.n:
        converged = bool(np.isfinite(float(at_t["gap"][n])))
        there, classical = (at_t, classical_t) if converged else (end, classical_end)
        values = {
            "final_real": end["real"][n],
            "final_ideal": end["ideal"][n],
            "final_gap": end["gap"][n],
            "final_train": classical_end["train"][n],
            "largest_gap": most["gap"][n],
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


def linear_regression(run: Run, workload: Workload | None) -> Measurements:
    """Where the claim must fail: least squares with more features than samples, by gradient descent.

    y = x.w + 0.5 noise, x standard normal in d dimensions, |w| = 1. The Real World descends on its n samples, the
    Ideal World on fresh batches of the same size; test error is |w - w_t|^2 + 0.25, exactly.
    """
    d, n, steps, lr = run.integer("dimension"), run.integer("n_samples"), run.integer("steps"), run.real("lr")
    rng = np.random.default_rng([run.seed, 7])
    truth = rng.normal(size=d) / np.sqrt(d)

    def draw() -> tuple[Any, Any]:
        x = rng.normal(size=(n, d))
        return x, x @ truth + 0.5 * rng.normal(size=n)

    fixed = draw()
    real, ideal = np.zeros(d), np.zeros(d)
    m = Measurements()
    marks = set(np.unique(np.geomspace(1, steps, 16).astype(int)).tolist())
    for t in range(1, steps + 1):
        for w, (x, y) in ((real, fixed), (ideal, draw())):
            w -= lr * x.T @ (x @ w - y) / len(x)
        if t in marks:
            errors = [float(((w - truth) ** 2).sum() + 0.25) for w in (real, ideal)]
            m.add("regression_error", errors[0], step=t, world="real")
            m.add("regression_error", errors[1], step=t, world="ideal")
            m.add("regression_gap", errors[0] - errors[1], step=t)
    return m
