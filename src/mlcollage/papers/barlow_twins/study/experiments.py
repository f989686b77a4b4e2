"""The study's experiments: one network for each variant, all seeds of a variant trained together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mlcollage._random import generator
from mlcollage.data import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.lab import Measurements, Scale, Task
from mlcollage.measure import effective_rank
from mlcollage.train import Replicas

from ..gauge import loss_floor
from ..loss import barlow_twins_loss, standardize
from .data import NUISANCE, Source, of_workload, shared_latent
from .models import Training, Variant, few_label_scores, probe_scores, represent, supervised_scores, train

FRESH = (4, 8, 16)  # of the sixteen nuisance numbers, how many differ between views


def _row(arm: str, **keys: float) -> tuple[str, tuple[tuple[str, float], ...]]:
    return arm, tuple(keys.items())


def _scaled(arm: str, objective: str) -> dict[str, Variant]:
    """Other widths and batches; those of the settings are recorded with them under the names of the curves."""
    base = Variant((_row(arm), _row(f"{arm}_width", width=128), _row(f"{arm}_batch", batch=256)), objective)
    if arm == "barlow":
        base = dataclasses.replace(base, rows=(*base.rows, _row("weight", weight=1.0), _row("fresh", fresh=16)))
    others = {f"{arm}_width_{w}": Variant((_row(f"{arm}_width", width=w),), objective, width=w / 128) for w in (32, 8)}
    small = {f"{arm}_batch_{n}": Variant((_row(f"{arm}_batch", batch=n),), objective, batch=n / 256) for n in (32, 64)}
    return {**small, **others, arm: base}


VARIANTS: dict[str, Variant] = {
    **_scaled("infonce", "infonce"),
    **_scaled("barlow", "barlow"),
    "invariance": Variant((_row("invariance"),), lambd=0.0),
    "redundancy": Variant((_row("redundancy"),), objective="redundancy"),
    "plain_projector": Variant((_row("plain_projector"),), norm=False),
    "feature": Variant((_row("feature"),), normalize="feature"),
    "neither": Variant((_row("neither"),), normalize="none", norm=False),
    "stop_gradient": Variant((_row("stop_gradient"),), stop=True),
    "predictor": Variant((_row("predictor"),), predictor=True),
    "predictor_and_stop": Variant((_row("predictor_and_stop"),), stop=True, predictor=True),
    "weight_low": Variant((_row("weight", weight=0.25),), lambd=0.25),
    "weight_high": Variant((_row("weight", weight=4.0),), lambd=4.0),
    "random": Variant((_row("random"),), objective="none"),
}
NUISANCES = {f"fresh_{k}": Variant((_row("fresh", fresh=k),)) for k in FRESH if k < NUISANCE}


@dataclass(frozen=True)
class Algebra:
    """Random views for the identity of the two forms, and views that are optimized to the floor."""

    rows: int = 48  # N of the identity
    columns: int = 160  # its D
    floor_rows: int = 8  # N of the floor
    floor_columns: int = 24  # its D
    lambd: float = 0.1  # of the floor
    steps: int = 400  # most iterations of the search for the smallest loss


def on_workload(s: Training, workload: Labeled, scale: Scale) -> Training:
    """Sizes that the user's data allow."""
    size, tests = (len(cast(Sized, part)) for part in (workload.train, workload.test))
    if size < 64 or tests < 20:
        raise InvalidInput(
            f"the study needs 64 training and 20 test samples at least; {workload.name} has {size} and {tests}."
        )
    batch = min(s.batch, size // 16 * 16)  # an eighth of it, the smallest batch, has two rows and more
    batch = 1 << (batch.bit_length() - 1)
    if batch < 16:
        raise InvalidInput(f"the study needs batches of 16 rows; {workload.name} has {size} training samples.")
    return dataclasses.replace(s, batch=batch, fit=min(s.fit, size), test=min(s.test, tests))


def _source(task: Task[Training], fresh: int = NUISANCE) -> Source:
    s = task.settings
    if task.workload is None:
        return shared_latent(task.seeds, s.fit, s.test, fresh)
    return of_workload(task.workload, task.seeds, s.fit, s.test)


def training(task: Task[Training]) -> Measurements:
    """One variant: the probe's score, that of a probe with few labels, and what the embedding looks like."""
    m, s, seeds = Measurements(), task.settings, task.seeds
    if task.arm == "supervised":
        for seed, score in zip(seeds, supervised_scores(_source(task), s, seeds, task.device), strict=True):
            m.add("few_label_accuracy", score, arm="supervised", seed=seed)
        return m
    return _measured(task, VARIANTS[task.arm], _source(task))


def nuisance(task: Task[Training]) -> Measurements:
    """Views that share a part of the nuisance, as augmentations do that leave something alone."""
    v = NUISANCES[task.arm]
    return _measured(task, v, _source(task, int(v.rows[0][1][0][1])))


def _measured(task: Task[Training], v: Variant, source: Source) -> Measurements:
    m, s, seeds = Measurements(), task.settings, task.seeds
    plain = task.arm == "barlow"
    look = None
    if plain and 0 in seeds:
        views = _source(task).views(s.batch)

        def look(replicas: Replicas) -> None:
            m.array("correlation_before", _correlation(replicas, views, seeds.index(0)))

    trained = train(source, v, s, seeds, task.device, look)
    if plain and 0 in seeds:
        m.array("correlation_after", _correlation(trained.replicas, views, seeds.index(0)))
        m.array("losses", trained.losses[:, seeds.index(0)])
    scores = probe_scores(trained.replicas, source.probed)
    few = few_label_scores(trained.replicas, source.probed, s.shots, seeds)
    h = represent(trained.replicas, source.probed.x_test)
    for r, seed in enumerate(seeds):
        found = {"score": scores[r], "few_label_accuracy": few[r], "effective_rank": effective_rank(h[r])}
        for arm, levels in v.rows:
            keys: dict[str, Any] = {"arm": arm, "seed": seed, **dict(levels)}
            m.add_all(found, **keys)
    return m


def _correlation(replicas: Replicas, views: tuple[Tensor, Tensor], r: int) -> Tensor:
    """C (D, D) of one network on one batch, in training mode, without an update of running statistics."""
    kept = {name: b.clone() for name, b in replicas.buffers.items()}
    with torch.no_grad():
        a, b = (standardize(replicas(x, in_dim=0)[r].chunk(2, 1)[0]) for x in views)
    for name, buffer in replicas.buffers.items():
        buffer.copy_(kept[name])
    return (a.T @ b / len(a)).cpu()


def algebra(task: Task[Algebra]) -> Measurements:
    """The identity of the direct and the Gram form, and the floor of the loss."""
    m, s = Measurements(), task.settings
    draw = generator(task.seed, 9)
    a, b = (torch.randn(s.rows, s.columns, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    found = {}
    for impl in ("direct", "gram"):
        loss = barlow_twins_loss(a, b, impl=impl)
        found[impl] = [loss.detach(), *torch.autograd.grad(loss, (a, b))]
    gaps = [float((x - y).abs().max() / x.abs().max()) for x, y in zip(*found.values(), strict=True)]
    m.add("identity_gap", max(gaps))
    m.add("floor_ratio", _best(s, draw) / loss_floor(s.floor_rows, s.floor_columns, s.lambd))
    return m


def _best(s: Algebra, draw: torch.Generator) -> float:
    """The smallest loss that a search over the embeddings themselves finds."""
    n = s.floor_rows
    z = torch.randn(2 * n, s.floor_columns, generator=draw, dtype=torch.float64).requires_grad_()
    search = torch.optim.LBFGS([z], max_iter=s.steps, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = barlow_twins_loss(z[:n], z[n:], lambd=s.lambd, eps=1e-12, check=False)
        loss.backward()
        return loss

    search.step(closure)
    return float(closure().detach())
