"""The training loop: random motions, steps that are skipped whole where a number is not finite, and a report."""

from __future__ import annotations

import math
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
    undefined
        Share of the last step's views whose poses determined no rotation.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    skipped: int = 0
    undefined: float = 0.0


def train_capsules(
    model: CanonicalCapsules,
    clouds: Tensor | Sequence[Tensor],
    *,
    steps: int,
    batch_size: int = 16,
    n_points: int | None = None,
    learning_rate: float = 1e-3,
    drops: Sequence[float] = (0.45, 0.9),
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
    steps
        Steps, each on a batch.
    batch_size
        Clouds of a step, 16 as in the paper; at most S, and at least 2.
    n_points
        Points that are drawn anew from each cloud at each step; by default as many as the smallest cloud has.
    learning_rate, drops
        1e-3, divided by 10 at these shares of the steps: 0.45 and 0.9, near the paper's 200 and 400 of 450 epochs.
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
    smallest = min(len(cloud) for cloud in clouds)
    n = smallest if n_points is None else checks.integer("n_points", n_points, least=1)
    if n > smallest:
        raise InvalidInput(f"n_points={n} points cannot be drawn from a cloud of {smallest}; ask for fewer.")
    size = min(size, len(clouds))
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InvalidInput("no parameter of the model requires a gradient; model.requires_grad_() makes them.")
    optimizer = torch.optim.Adam(parameters, lr=rate)
    device = parameters[0].device
    draw = generator(seed, 17)
    report, in_a_row, mode = TrainingReport(), 0, model.training
    order: list[int] = []
    model.train()
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.1 ** sum(step >= drop * steps for drop in drops)
            if len(order) < size:
                order = torch.randperm(len(clouds), generator=draw).tolist()
            chosen, order = order[:size], order[size:]
            batch = torch.stack([_points(clouds[i], n, draw) for i in chosen]).to(device)
            found = _step(model, batch, optimizer, parameters, draw)
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
            report.undefined = float((~model(batch).pose.defined).float().mean())
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


def _points(cloud: Tensor, n: int, draw: torch.Generator) -> Tensor:
    if len(cloud) == n:
        return cloud
    return cloud[torch.randperm(len(cloud), generator=draw)[:n].to(cloud.device)]


def _step(
    model: CanonicalCapsules,
    batch: Tensor,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    draw: torch.Generator,
) -> dict[str, float] | None:
    """One step, or None, with everything as before, if a number is not finite."""
    kept = [b.clone() for b in model.buffers()]
    optimizer.zero_grad(set_to_none=True)
    losses = model(batch, losses=True, generator=draw)
    losses["total"].backward()
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    values = torch.stack([v.detach() for v in losses.values()]).tolist()
    if not all(map(math.isfinite, values)) or not bool(torch.stack(norms).isfinite().all()):
        with torch.no_grad():
            for buffer, old in zip(model.buffers(), kept, strict=True):
                buffer.copy_(old)
        return None
    optimizer.step()
    return dict(zip(losses, values, strict=True))
