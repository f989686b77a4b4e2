"""Plain SGD of several networks at once, by the public classes: Replicas with FisherPenalty, SAM or mixup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _random
from mlcollage.errors import UnknownName
from mlcollage.train import SAM, Replicas, mixup_batch, soft_cross_entropy

from .._gradients import nll
from ..penalty import FisherPenalty
from .data import SeedData

PENALTIES: Mapping[str, Mapping[str, Any]] = {
    "gpx": {"labels": "true", "wrt": "input", "normalize": "batch"},
    "gp": {"labels": "true"},
    "fp": {"labels": "model"},
    "gpr": {"labels": "uniform"},
    "trf": {"labels": "model", "estimator": "per_example"},
}
METHODS = ("none", *PENALTIES, "sam", "mixup")


def parameters_in_graph(model: nn.Module, x: Tensor) -> list[str]:
    """Names of the trainable parameters that the logits depend on; a user's network may have others."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(model(x).sum(), list(named.values()), allow_unused=True)
    return [name for name, gradient in zip(named, found, strict=True) if gradient is not None]


class Training:
    """R replicas that are trained together by one method, each on its own data.

    Parameters
    ----------
    method
        One of :data:`METHODS`.
    data
        One for each replica.
    seeds
        One for each replica: initialization, order of the data and drawn labels. Equal seeds share them.
    lr
        Learning rate, or one for each replica.
    coefficients
        Of the penalty on penalized steps; rho of SAM; alpha of mixup. One for each replica.
    batch
        B.
    interval
        Steps between two penalized ones.
    replicas
        A branch of another training to go on from; None starts afresh.
    """

    def __init__(
        self,
        method: str,
        data: Sequence[SeedData],
        seeds: Sequence[int],
        lr: float | Sequence[float],
        coefficients: Sequence[float],
        *,
        batch: int,
        interval: int,
        replicas: Replicas | None = None,
    ) -> None:
        if method not in METHODS:
            raise UnknownName(f"method {method!r} is not known; choose one of {', '.join(METHODS)}.")
        self.method, self.data, self.seeds, self.lr = method, list(data), tuple(seeds), lr
        self.coefficients, self.batch, self.interval = tuple(coefficients), batch, interval
        first = self.data[0].problem
        if replicas is None:
            sam = {"optimizer": SAM, "base_optimizer": torch.optim.SGD, "rho": self.coefficients}
            own: dict[str, Any] = sam if method == "sam" else {}
            replicas = Replicas(first.make_model, self.seeds, lr=lr, device=first.device, stacked=None, **own)
        self.replicas, self.penalty = replicas, None
        if method in PENALTIES:
            used = parameters_in_graph(replicas.module(0), first.train.x[:2])
            self.penalty = FisherPenalty(
                replicas, self.coefficients, interval=interval, generator=self.seeds, params=used, **PENALTIES[method]
            )
            self.penalty.steps = replicas.steps_done
        self._x = torch.stack([d.problem.train.x for d in self.data])  # (R, n, ...)
        self._y = torch.stack([d.problem.train.y for d in self.data])  # (R, n)

    def branch(self, method: str, coefficients: Sequence[float] | None = None) -> Training:
        """The same networks as they are now, to go on with another method; shares nothing with this training."""
        return Training(
            method,
            self.data,
            self.seeds,
            self.lr,
            self.coefficients if coefficients is None else coefficients,
            batch=self.batch,
            interval=self.interval,
            replicas=self.replicas.copy(),
        )

    def run(self, steps: int) -> Iterator[int]:
        """Train up to so many updates since the start; yields the number of updates done after each."""
        n, first = self._x.shape[1], self.replicas.steps_done
        rows = torch.arange(len(self.seeds), device=self._x.device)[:, None]  # (R, 1)
        for t in range(first, steps):
            epoch, i = divmod(t, n // self.batch)
            if i == 0 or t == first:
                orders = [_random.permutation(n, seed, 2, epoch) for seed in self.seeds]
                order = torch.stack(orders).to(self._x.device)  # (R, n)
            index = order[:, i * self.batch : (i + 1) * self.batch]  # (R, B)
            self._update(self._x[rows, index], self._y[rows, index])
            yield t + 1

    def _update(self, x: Tensor, y: Tensor) -> None:
        """One update on batches x (R, B, ...) with labels y (R, B)."""
        replicas, penalty = self.replicas, self.penalty
        if self.method == "mixup":
            classes, t = self.data[0].problem.num_classes, replicas.steps_done
            mixed = [
                mixup_batch(x[r], y[r], alpha, classes, generator=_random.generator(seed, 3, t))
                for r, (seed, alpha) in enumerate(zip(self.seeds, self.coefficients, strict=True))
            ]
            targets = torch.stack([m.y for m in mixed])  # (R, B, C)
            replicas.step(torch.stack([m.x for m in mixed]), targets, loss=soft_cross_entropy, in_dims=(0, 0))
            return
        x.requires_grad_(penalty is not None and penalty.wrt == "input" and penalty.active)

        def objective() -> Tensor:
            logits = replicas(x, in_dim=0)  # (R, B, C)
            losses = nll(logits, y)
            if penalty is None:
                return losses
            return losses + penalty(logits, x, y if penalty.labels == "true" else None)

        replicas.update(objective)
