"""Stages of a pipeline whose cost is known: asleep for 10 ms forward and 20 ms backward, or with real products."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage.nn.init import seeded

from ..stage import StageParts
from ..synthesizer import SyntheticGradient

WIDTH, CLASSES, ROWS = 16, 4, 32


class _Nap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        time.sleep(ctx.backward_seconds)
        return grads[0], None, None


class SleepingBlock(nn.Module):
    """A block that takes its time: 10 ms forward and 20 ms backward for a batch of ``ROWS``, less for parts of it."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        """Sleep, then what is inside; the first stage's input is given a gradient so that it sleeps backward too."""
        share = len(x) / ROWS
        out: Tensor = _Nap.apply(x if x.requires_grad else x.requires_grad_(), 0.01 * share, 0.02 * share)
        return self.inside(out)


def sleeping_stage(rank: int, stages: int = 2) -> StageParts:
    """A stage that sleeps."""
    with seeded(rank):
        last = rank == stages - 1
        block = SleepingBlock(nn.Linear(WIDTH, CLASSES) if last else nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))
    return _parts(block, last, WIDTH)


def working_stage(rank: int, stages: int = 2, *, width: int = 512, layers: int = 3) -> StageParts:
    """A stage with real products: some layers of equal width."""
    with seeded(rank):
        last = rank == stages - 1
        inside = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]
        block = nn.Sequential(*inside, *([nn.Linear(width, CLASSES)] if last else []))
    return _parts(block, last, width)


def _parts(block: nn.Module, last: bool, width: int) -> StageParts:
    made = None
    if not last:
        with seeded(0):
            made = SyntheticGradient(width, CLASSES)
    optimizer = None if made is None else torch.optim.SGD(made.parameters(), lr=min(0.02, 0.5 / width))
    return StageParts(block, torch.optim.SGD(block.parameters(), lr=0.05), made, optimizer)


def batches(count: int, seed: int, size: int = ROWS, width: int = WIDTH) -> list[tuple[Tensor, Tensor]]:
    """Classes around random centers."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, width, generator=g)
    labels = [torch.randint(CLASSES, (size,), generator=g) for _ in range(count)]
    return [(centers[y] + 0.5 * torch.randn(size, width, generator=g), y) for y in labels]
