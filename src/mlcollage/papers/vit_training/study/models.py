"""Training of many small vision transformers as one stacked model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.nn import ViT, build
from mlcollage.train import Replicas, cosine

from .world import Rows, changed


@dataclass(frozen=True)
class Arm:
    """One way to train: what is changed in training, and on how much data."""

    name: str
    data: Rows = field(repr=False)
    seed: int = 0  # of weights, batches and changes
    strength: float = 0.0  # of augment
    alpha: float = 0.0  # of mixup
    start: nn.Module | None = field(default=None, repr=False)  # weights to start from, a new head aside


def kernels(model: nn.Module) -> list[bool]:
    """Which parameters have weight decay: those of linear layers that are no bias."""
    held = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return [id(p) in held for p in model.parameters()]


def train(
    arms: Sequence[Arm],
    make: Callable[[], nn.Module],
    *,
    steps: int,
    batch: int,
    lr: float,
    decay: float,
    classes: int,
    watch: dict[int, Callable[[int, Replicas], None]] | None = None,
) -> Replicas:
    """All arms for the same number of steps, as one stacked model.

    Arms of one seed start from the same weights, and those with equally many samples see the same batches. What is
    drawn for a seed depends on the arms of that seed only, so that more seeds in the stack change nothing (dropout
    aside, whose draws are those of the whole stack). AdamW, a warm-up of a tenth and a cosine to 0, gradient norms
    clipped at 1, softmax cross-entropy.
    """
    decayed = kernels(build(make, arms[0].seed))

    def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        if len(parameters) != len(decayed):  # the trial of whether it works element by element
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, foreach=True)
        groups = [
            {"params": [p for p, d in zip(parameters, decayed, strict=True) if d == kind], "weight_decay": wd}
            for kind, wd in ((True, decay), (False, 0.0))
        ]
        return torch.optim.AdamW(groups, lr=lr, foreach=True)  # bit for bit the same, with fewer calls

    replicas = Replicas(make, [arm.seed for arm in arms], optimizer=optimizer)
    with torch.no_grad():
        for r, arm in enumerate(arms):
            for name, value in dict(arm.start.named_parameters()).items() if arm.start is not None else ():
                if not name.startswith("head."):
                    replicas.parameters[name][r].copy_(value)
    schedule = cosine(steps, warmup=max(1, steps // 10))
    changes = {a.seed: torch.Generator().manual_seed(a.seed * 7919 + 1) for a in arms}
    orders = {(a.seed, len(a.data.x)): torch.Generator().manual_seed(a.seed * 7919 + 2) for a in arms}
    for step in range(steps):
        rows = {key: torch.randint(key[1], (batch,), generator=g) for key, g in orders.items()}
        x, y = _batches(arms, [rows[arm.seed, len(arm.data.x)] for arm in arms], classes, changes)
        replicas.step(x, y, loss=F.cross_entropy, lr_factor=schedule(step), clip_norm=1.0, in_dims=(0, 0))
        if watch and step + 1 in watch:
            watch[step + 1](step + 1, replicas)
    return replicas


def _batches(
    arms: Sequence[Arm], rows: Sequence[Tensor], classes: int, changes: Mapping[int, torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Samples (R, b, C, H, W) and soft labels (R, b, classes): drawn arm by arm, changed in one pass over all."""
    b = len(rows[0])
    x = torch.stack([arm.data.x[i] for arm, i in zip(arms, rows, strict=True)])
    y = F.one_hot(torch.stack([arm.data.y[i] for arm, i in zip(arms, rows, strict=True)]), classes).float()
    uniform, weights = {}, {}
    for r, arm in enumerate(arms):
        if arm.strength:
            uniform[r] = torch.rand(4, b, generator=changes[arm.seed])
        if arm.alpha:
            # One weight for the batch, at least a half; sums of uniform draws are not Beta, hence numpy's by torch's.
            weights[r] = _beta(arm.alpha, changes[arm.seed])
    if uniform:
        moved = list(uniform)
        strength = [arms[r].strength for r in moved for _ in range(b)]
        x[moved] = changed(x[moved].flatten(0, 1), strength, torch.cat(list(uniform.values()), 1)).view_as(x[moved])
    for r, weight in weights.items():
        x[r] = weight * x[r] + (1 - weight) * x[r].roll(1, 0)
        y[r] = weight * y[r] + (1 - weight) * y[r].roll(1, 0)
    return x, y


def _beta(alpha: float, generator: torch.Generator) -> float:
    seed = int(torch.randint(0, 2**63 - 1, (1,), generator=generator))
    drawn = float(np.random.default_rng(seed).beta(alpha, alpha))
    return max(drawn, 1 - drawn)


@torch.no_grad()
def accuracies(replicas: Replicas, data: Sequence[Rows]) -> list[float]:
    """Share of correct answers of each replica on its rows, equally many for all."""
    x, y = (torch.stack(part) for part in zip(*data, strict=True))
    found = replicas.predict(x, batch_size=256, in_dim=0).argmax(-1)  # (R, n)
    return [float(v) for v in (found == y).float().mean(1)]


def network(
    shape: tuple[int, ...], classes: int, *, patch: int, width: int, depth: int, heads: int, **more: Any
) -> ViT:
    """A small vision transformer with the reference's numerics, for series (1, 1, w) or images."""
    sides = (1 if shape[1] == 1 else patch, patch)
    return ViT(
        (shape[0], shape[1], shape[2]),
        classes,
        patch_size=sides,
        dim=width,
        depth=depth,
        heads=heads,
        gelu="tanh",
        **more,
    )
