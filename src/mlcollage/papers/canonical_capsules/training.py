"""The training loop: random motions, steps that are skipped whole where a number is not finite, and a report."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage.errors import InvalidInput

from ._clouds import check_type
from .model import CanonicalCapsules

__all__ = ["TrainingReport", "train_capsules"]

_PATIENCE = 10  # skipped steps in a row after which training stops


@dataclass
class TrainingReport:
    """How a training went.

    Attributes
    ----------
    losses
        Of each step that was done: names with lists of unweighted losses, and ``total``.
    skipped
        Steps that were left out because the loss or a gradient was not finite.
    undefined, mirrored
        Shares of the last step's clouds whose poses determined no rotation, and whose mirror image would have fitted
        better.
    empty
        Capsules that had less than 1 % of the points in the mean of the last step's clouds.
    spread
        Root mean squared distance of the poses from their mean there, in radii of the clouds; near 0 all lie together.
    points, radii
        Least and largest number of points, and distance of a point from its cloud's mean.
    seed
        Of order, points and motions.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    skipped: int = 0
    undefined: float = 0.0
    mirrored: float = 0.0
    empty: int = 0
    spread: float = 0.0
    points: tuple[int, int] = (0, 0)
    radii: tuple[float, float] = (0.0, 0.0)
    seed: int = 0

    def __str__(self) -> str:
        total = self.losses.get("total", [])
        last = f", loss {total[0]:.3g} to {total[-1]:.3g}" if total else ""
        return (
            f"{len(total)} steps{last}, {self.skipped} skipped, seed {self.seed}; clouds of {self.points[0]:,} to "
            f"{self.points[1]:,} points and radius {self.radii[0]:.3g} to {self.radii[1]:.3g}. At the end "
            f"{self.undefined:.0%} of the poses were not determined and {self.mirrored:.0%} fitted better mirrored, "
            f"{self.empty} capsules were nearly empty, and places were {self.spread:.2g} radii apart."
        )


def train_capsules(
    model: CanonicalCapsules,
    clouds: Tensor | Sequence[Tensor],
    *,
    features: Tensor | Sequence[Tensor] | None = None,
    steps: int,
    batch_size: int = 16,
    n_points: int | None = None,
    learning_rate: float = 1e-3,
    drops: Sequence[float] = (0.45, 0.9),
    crop: float = 0.0,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> TrainingReport:
    """Train with Adam on random motions of the clouds; the model is left in its mode, on its device.

    Parameters
    ----------
    model
        Any :class:`CanonicalCapsules`.
    clouds
        (S, N, D), or S clouds (N_i, D) of different size.
    features
        Of the points of each cloud, (S, N, F) or S of (N_i, F), for a model that was made for them.
    steps
        Steps, each on a batch.
    batch_size
        Clouds of a step, 16 as in the paper; at most S, and at least 2.
    n_points
        Points that are drawn anew from each cloud at each step; by default as many as the smallest cloud has (with
        ``crop``, keeps).
    learning_rate, drops
        1e-3, divided by 10 at these shares of the steps: 0.45 and 0.9, near the paper's 200 and 400 of 450 epochs.
    crop
        Largest share of a cloud's points that is cut off on one side, 0 by default: for a model of partial scans. The
        side, and the share up to this one, are drawn anew for each cloud at each step; both views are cut alike.
    seed
        Of order, points and motions.
    on_step
        Called with the number of steps done, after each.

    Returns
    -------
    TrainingReport

    Raises
    ------
    InvalidInput
        For settings out of range, fewer than two clouds, clouds that the model refuses, and ten steps in a row whose
        loss or gradient is not finite.

    Warns
    -----
    UserWarning
        For clouds whose radius is outside 0.1 to 10: losses have units, and their weights are for radii about 1.

    Notes
    -----
    A skipped step leaves nothing behind: running statistics of batch norms, which the forward pass has changed already,
    are put back.

    Examples
    --------
    >>> from mlcollage.data.shapes import procedural_shapes
    >>> shapes = torch.from_numpy(procedural_shapes("plane", 32, 48, dim=2).points)
    >>> model = CanonicalCapsules(dim=2, capsules=4, channels=8, points=48, hidden=16)
    >>> len(train_capsules(model, shapes, steps=2).losses["total"])
    2
    """
    steps = checks.integer("steps", steps, least=1)
    size = checks.integer("batch_size", batch_size, least=2)
    rate = checks.positive("learning_rate", learning_rate)
    if not isinstance(drops, Sequence):
        raise InvalidInput(f"drops must be a sequence of shares of the steps, such as (0.45, 0.9); got {drops!r}.")
    for drop in drops:
        checks.probability("a drop", drop)
    if len(clouds) < 2:
        raise InvalidInput(f"training takes two clouds at least, since batch norm compares them; got {len(clouds)}.")
    clouds = _of_one_type(clouds, model)
    told = _features_of(features, clouds)
    smallest = min(len(cloud) for cloud in clouds)
    most = smallest - math.floor(checks.real("crop", crop, least=0, most=0.9) * smallest)
    n = most if n_points is None else checks.integer("n_points", n_points, least=1)
    if n > most:
        rest = f" of which crop={crop:g} leaves {most}" if crop else ""
        raise InvalidInput(f"n_points={n} points cannot be drawn from a cloud of {smallest}{rest}; ask for fewer.")
    size = min(size, len(clouds))
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InvalidInput("no parameter of the model requires a gradient; model.requires_grad_() makes them.")
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=_fuses(parameters))
    device = parameters[0].device
    draw = generator(seed, 17)
    report, in_a_row, mode = _facts(clouds, seed), 0, model.training
    order: list[int] = []
    model.train()
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.1 ** sum(step >= drop * steps for drop in drops)
            if len(order) < size:
                order = torch.randperm(len(clouds), generator=draw).tolist()
            chosen, order = order[:size], order[size:]
            rows = [_rows(clouds[i], n, crop, draw) for i in chosen]
            batch = torch.stack([_taken(clouds[i], row) for i, row in zip(chosen, rows, strict=True)]).to(device)
            seen = None
            if told is not None:
                seen = torch.stack([_taken(told[i], row) for i, row in zip(chosen, rows, strict=True)]).to(device)
            found = _step(model, batch, seen, optimizer, parameters, draw)
            if found is None:
                report.skipped, in_a_row = report.skipped + 1, in_a_row + 1
                if in_a_row == _PATIENCE:
                    raise InvalidInput(
                        f"the loss or its gradient was not finite in {_PATIENCE} steps in a row (step {step + 1}); "
                        "lower the learning rate, and look whether the clouds are about a unit in radius."
                    )
                continue
            in_a_row = 0
            for name, value in found.items():
                report.losses.setdefault(name, []).append(value)
            if on_step is not None:
                on_step(step + 1)
        with torch.no_grad():
            model.eval()
            _look(report, model(batch, features=seen), batch)
    finally:
        model.train(mode)
    return report


def _of_one_type(clouds: Any, model: CanonicalCapsules) -> list[Tensor]:
    """Clouds as they are drawn from: tensors (N_i, D), without a gradient, in the type of the network."""
    for i, cloud in enumerate(clouds):
        if not isinstance(cloud, Tensor) or not cloud.is_floating_point() or cloud.ndim != 2:
            what = f"{cloud.dtype} {tuple(cloud.shape)}" if isinstance(cloud, Tensor) else type(cloud).__name__
            raise InvalidInput(
                f"cloud {i} must be a floating tensor (N, {model.dim}); got {what}. torch.from_numpy makes one of an "
                "array."
            )
        if cloud.shape[1] != model.dim:
            raise InvalidInput(f"cloud {i} has {cloud.shape[1]} coordinates, and the model was made for {model.dim}.")
        check_type(cloud, next(model.parameters()))
    return [cloud.detach() for cloud in clouds]


def _fuses(parameters: Sequence[Tensor]) -> bool:
    """Whether one kernel can step all of them; small tensors otherwise take longer to ask for than to change."""
    kinds = {(p.device.type, p.is_floating_point()) for p in parameters}
    return kinds <= {("cpu", True), ("cuda", True)}


def _features_of(features: Any, clouds: Sequence[Tensor]) -> list[Tensor] | None:
    if features is None:
        return None
    if len(features) != len(clouds):
        raise InvalidInput(f"features are of {len(features)} clouds, and there are {len(clouds)}.")
    for i, (own, cloud) in enumerate(zip(features, clouds, strict=True)):
        if not isinstance(own, Tensor) or own.ndim != 2 or len(own) != len(cloud) or own.dtype != cloud.dtype:
            what = f"{own.dtype} {tuple(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
            raise InvalidInput(
                f"features of cloud {i} must be a tensor ({len(cloud)}, F) of {cloud.dtype}, a row a point; got {what}."
            )
    return [own.detach() for own in features]


def _facts(clouds: Sequence[Tensor], seed: int) -> TrainingReport:
    """A report with what is known of the clouds before training; warns where their size does not fit the losses."""
    sizes = [len(cloud) for cloud in clouds]
    radii = torch.stack([(cloud - cloud.mean(0)).norm(dim=1).max() for cloud in clouds])
    low, high = float(radii.min()), float(radii.max())
    if not (low >= 0.1 and high <= 10):
        warnings.warn(
            f"clouds have radii from {low:.3g} to {high:.3g}, and losses, whose weights are for radii about 1, grow "
            "with their square: divide each cloud by one number (the estimator does).",
            stacklevel=3,
        )
    return TrainingReport(points=(min(sizes), max(sizes)), radii=(low, high), seed=seed)


def _look(report: TrainingReport, out: Any, batch: Tensor) -> None:
    """How the last clouds fared, into the report."""
    attention, theta = out.capsules.attention, out.capsules.theta
    report.undefined = float((~out.pose.defined).float().mean())
    report.mirrored = float(out.pose.mirrored.float().mean())
    report.empty = int((attention.mean((0, 1)) < 0.01).sum())
    apart = (theta - theta.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()  # (B,)
    radius = (batch - batch.mean(1, keepdim=True)).norm(dim=-1).amax(1).clamp_min(torch.finfo(batch.dtype).tiny)
    report.spread = float((apart / radius).mean())


def _rows(cloud: Tensor, n: int, crop: float, draw: torch.Generator) -> Tensor | None:
    """Which points of a cloud are seen; None for all, as they come."""
    if not crop:
        return None if len(cloud) == n else torch.randperm(len(cloud), generator=draw)[:n]
    side = torch.randn(cloud.shape[1], 1, generator=draw, dtype=torch.float64)
    kept = max(n, len(cloud) - math.floor(crop * float(torch.rand((), generator=draw)) * len(cloud)))
    order = (cloud.double().cpu() @ side)[:, 0].argsort()[:kept]
    return order[torch.randperm(kept, generator=draw)[:n]]


def _taken(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows.to(values.device)]


def _step(
    model: CanonicalCapsules,
    batch: Tensor,
    features: Tensor | None,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    draw: torch.Generator,
) -> dict[str, float] | None:
    """One step, or None, with everything as before, if a number is not finite."""
    kept = [b.clone() for b in model.buffers()]
    optimizer.zero_grad(set_to_none=True)
    losses = model(batch, features=features, losses=True, generator=draw)
    losses["total"].backward()
    # The sum of squares is not finite where one number is not.
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    values = torch.stack([*(v.detach() for v in losses.values()), *norms]).tolist()
    if not all(map(math.isfinite, values)):
        with torch.no_grad():
            for buffer, old in zip(model.buffers(), kept, strict=True):
                buffer.copy_(old)
        return None
    optimizer.step()
    return dict(zip(losses, values, strict=False))
