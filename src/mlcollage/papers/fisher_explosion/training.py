r"""Plain SGD of several networks at once, with the penalties and rivals of the study.

Replica r has its own seed, data, learning rate and coefficient. Logits of all replicas come from one ``torch.vmap``;
the rest is ordinary automatic differentiation of sums over replicas, whose gradient with respect to stacked parameters
is each replica's own. Networks that cannot be stacked are called one by one, with the same results. Dropout in stacked
networks depends on which replicas are trained together; nothing else does.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mlcollage.errors import InvalidInput
from mlcollage.nn.init import build, seeded
from mlcollage.train.mixup import mixup_batch, soft_cross_entropy
from mlcollage.train.replicas import stackable

from .labels import sample_labels, stream

__all__ = ["METHODS", "Cells", "Stack", "train"]

METHODS = ("none", "gpx", "gp", "fp", "gpr", "trf", "sam", "mixup")
_LABELS = {"gpx": "true", "gp": "true", "fp": "model", "trf": "model", "gpr": "uniform"}


@dataclass(frozen=True)
class Cells:
    """What is trained together: R replicas of one method.

    Parameters
    ----------
    method
        One of :data:`METHODS`.
    seeds
        One a replica: initialization, order of the data and drawn labels. Equal seeds share them.
    lr
        Learning rates, one a replica.
    coefficient
        Of the penalty on penalized steps; rho of SAM; alpha of mixup. One a replica.
    interval, start, stop
        When penalties are active, as in :class:`~mlcollage.papers.fisher_explosion.FisherPenalty`.
    """

    method: str
    seeds: tuple[int, ...]
    lr: tuple[float, ...]
    coefficient: tuple[float, ...]
    interval: int = 10
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidInput(f"method={self.method!r} is not known; choose one of {', '.join(METHODS)}.")
        if not len(self.seeds) == len(self.lr) == len(self.coefficient) > 0:
            raise InvalidInput("Cells needs one seed, learning rate and coefficient for each replica.")

    def active(self, step: int) -> bool:
        """Whether the 0-based step is penalized."""
        inside = step >= self.start and (self.stop is None or step < self.stop)
        return inside and (step - self.start) % self.interval == 0


@dataclass
class Stack:
    """Parameters and buffers of R networks of one architecture, each (R, ...)."""

    model: nn.Module
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    stacked: bool
    _tried: bool = field(default=False, repr=False)

    @classmethod
    def build(
        cls, model_fn: Callable[[], nn.Module], seeds: Sequence[int], device: torch.device | str | None = None
    ) -> Stack:
        """Replica r starts as ``build(model_fn, seeds[r])``."""
        models = [build(model_fn, seed).to(device) for seed in seeds]

        def gather(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {k: torch.stack([s[k].detach() for s in states]) for k in states[0]}

        parameters = gather([dict(m.named_parameters()) for m in models])
        trainable = {k for k, p in models[0].named_parameters() if p.requires_grad}
        for name, p in parameters.items():
            p.requires_grad_(name in trainable)
        return cls(
            models[0], parameters, gather([dict(m.named_buffers()) for m in models]), stackable(models[0]) is None
        )

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    @property
    def trainable(self) -> list[Tensor]:
        """Stacked parameters that require gradients."""
        return [p for p in self.parameters.values() if p.requires_grad]

    def __call__(self, x: Tensor, *, moved: Sequence[Tensor] | None = None, training: bool = True) -> Tensor:
        """Logits (R, B, C) of inputs (R, B, ...); in evaluation mode, of inputs (B, ...) that all replicas share.

        ``moved`` stands in for the trainable parameters (SAM). Networks that ``torch.vmap`` turns out not to run are
        called one by one from then on.
        """
        parameters = dict(self.parameters)
        if moved is not None:
            parameters |= dict(zip((k for k, p in self.parameters.items() if p.requires_grad), moved, strict=True))
        self.model.train(training)
        shared = not training

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.model, (parameters, buffers), (x,))

        if self.stacked:
            kept = {k: b.clone() for k, b in self.buffers.items()}
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    return vmap(one, in_dims=(0, 0, None if shared else 0), randomness="different")(
                        parameters, self.buffers, x
                    )
            except RuntimeError:
                if self._tried:
                    raise
                self.stacked, self.buffers = False, kept
            finally:
                self._tried = True
        rows = []
        for r in range(len(self)):
            buffers = {k: b[r].clone() for k, b in self.buffers.items()}
            rows.append(one({k: p[r] for k, p in parameters.items()}, buffers, x if shared else x[r]))
            for k, b in buffers.items():
                self.buffers[k][r] = b
        return torch.stack(rows)

    @torch.no_grad()
    def logits(self, x: Tensor, batch_size: int = 2000) -> Tensor:
        """Logits (R, n, C) of inputs (n, ...) in evaluation mode."""
        return torch.cat([self(part, training=False) for part in x.split(batch_size)], 1)

    def copy(self) -> Stack:
        """One that shares nothing with this."""
        parameters = {k: p.detach().clone().requires_grad_(p.requires_grad) for k, p in self.parameters.items()}
        buffers = {k: b.clone() for k, b in self.buffers.items()}
        return Stack(self.model, parameters, buffers, self.stacked, self._tried)

    def module(self, r: int) -> nn.Module:
        """Replica r as an ordinary network, sharing nothing with the stack, in evaluation mode."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_((self.parameters if name in self.parameters else self.buffers)[name][r])
        return model.eval()


def train(
    stack: Stack, x: Tensor, y: Tensor, cells: Cells, *, steps: int, batch_size: int, classes: int, first: int = 0
) -> Iterator[int]:
    """Train in place; yields the number of updates done after each.

    Parameters
    ----------
    stack
        R networks.
    x, y
        Each replica's own training set: inputs (R, n, ...) and labels (R, n).
    cells
        Method, seeds, learning rates and coefficients.
    steps
        Updates up to which to train (counted from 0, also when ``first`` is not 0).
    batch_size, classes
        B and C.
    first
        Updates done before: order of the data and drawn labels go on from there.
    """
    lr, coefficient = torch.tensor(cells.lr), torch.tensor(cells.coefficient).to(x)
    orders = [_order(seed, x.shape[1], batch_size, first) for seed in cells.seeds]
    for t in range(first, steps):
        index = torch.stack([next(order) for order in orders]).to(x.device)
        rows = torch.arange(len(stack), device=x.device)[:, None]
        with seeded(cells.seeds[0], t):
            gradient = _gradient(stack, x[rows, index], y[rows, index], cells, coefficient, t, classes)
        with torch.no_grad():
            for p, g in zip(stack.trainable, gradient, strict=True):
                p.sub_(_along(lr, g) * g)
        yield t + 1


def _order(seed: int, n: int, batch_size: int, first: int) -> Iterator[Tensor]:
    """Index batches for ever, reshuffled every epoch; starts at batch ``first``."""
    per_epoch = n // batch_size
    epoch = first // per_epoch
    skip = first % per_epoch
    while True:
        order = torch.randperm(n, generator=stream(seed, 2, epoch))
        for i in range(skip, per_epoch):
            yield order[i * batch_size : (i + 1) * batch_size]
        epoch, skip = epoch + 1, 0


def _gradient(
    stack: Stack, x: Tensor, y: Tensor, cells: Cells, coefficient: Tensor, t: int, classes: int
) -> list[Tensor]:
    """Gradient of the sum over replicas of their objectives: each replica's own, (R, ...)."""
    parameters, method = stack.trainable, cells.method
    if method == "mixup":
        mixed = [
            mixup_batch(x[r], y[r], float(a), classes, generator=stream(seed, 3, t))
            for r, (seed, a) in enumerate(zip(cells.seeds, cells.coefficient, strict=True))
        ]
        logits = stack(torch.stack([m.x for m in mixed]))
        losses = [soft_cross_entropy(z, m.y) for z, m in zip(logits, mixed, strict=True)]
        return _grad(torch.stack(losses).sum(), parameters)
    penalized = method in _LABELS and cells.active(t)
    if penalized and method == "gpx":
        x = x.detach().requires_grad_()
    logits = stack(x)
    objective = _losses(logits, y).sum()
    if method == "sam":
        uphill = _grad(objective, parameters)
        norm = torch.stack([g.flatten(1).square().sum(1) for g in uphill]).sum(0).sqrt()
        share = coefficient / (norm + 1e-12)
        moved = [(p + _along(share, g) * g).detach().requires_grad_() for p, g in zip(parameters, uphill, strict=True)]
        return _grad(_losses(stack(x, moved=moved), y).sum(), moved)
    if not penalized:
        return _grad(objective, parameters)
    drawn = _draw(logits, y, _LABELS[method], cells.seeds, t)
    if method == "trf":
        plain = _grad(objective, parameters)
        extra = _trace_gradients(stack, x, drawn, coefficient)
        return [a + b for a, b in zip(plain, extra, strict=True)]
    inner = _losses(logits, drawn).sum()
    if method == "gpx":
        (g,) = torch.autograd.grad(inner, x, create_graph=True)
        squares = g.flatten(1).square().sum(1) * x.shape[1]  # mean over samples of |d loss_i / d x_i|^2
    else:
        found = _grad(inner, parameters, create_graph=True)
        squares = torch.stack([g.flatten(1).square().sum(1) for g in found]).sum(0)
    return _grad(objective + (coefficient * squares).sum(), parameters)


def _grad(value: Tensor, parameters: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return list(found)


def _trace_gradients(stack: Stack, x: Tensor, y: Tensor, coefficient: Tensor) -> list[Tensor]:
    """Gradients of coefficient times the mean squared per-example norm, one network after the other.

    Networks with batch norm are taken at their running statistics: in training mode a single sample has no gradient.
    """
    from mlcollage.measure.grad_norms import per_example_grad_sqnorm

    rows = []
    for r in range(len(stack)):
        model = stack.module(r)
        chosen = [p for p in model.parameters() if p.requires_grad]
        norms = per_example_grad_sqnorm(model, _sum_loss, x[r], y[r], differentiable=True, reduction="sum")
        rows.append(torch.autograd.grad(coefficient[r] * norms.mean(), chosen, allow_unused=True))
    return [
        torch.stack([torch.zeros_like(p[r]) if g is None else g for r, g in enumerate(column)])
        for p, column in zip(stack.trainable, zip(*rows, strict=True), strict=True)
    ]


def _sum_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="sum")


def _draw(logits: Tensor, y: Tensor, source: str, seeds: Sequence[int], t: int) -> Tensor:
    if source == "true":
        return y
    return torch.stack([sample_labels(z, source, stream(s, 0, t)) for z, s in zip(logits, seeds, strict=True)])


def _losses(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each replica, (R,)."""
    r, b, classes = logits.shape
    return F.cross_entropy(logits.reshape(r * b, classes), y.reshape(-1), reduction="none").view(r, b).mean(1)


def _along(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *(1,) * (like.ndim - 1))
