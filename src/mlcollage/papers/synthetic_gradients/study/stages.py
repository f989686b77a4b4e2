"""Stages of a pipeline whose cost is known: sleeping instead of computing, 10 ms forward and 20 ms backward."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage.nn.init import seeded

from ..stage import StageParts
from ..synthesizer import SyntheticGradient

WIDTH, CLASSES = 16, 4


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
    """A block that takes its time."""

    def __init__(self, inside: nn.Module, forward: float = 0.01, backward: float = 0.02) -> None:
        super().__init__()
        self.inside, self.seconds = inside, (forward, backward)

    def forward(self, x: Tensor) -> Tensor:
        """Sleep, then what is inside; the first stage's input is given a gradient so that it sleeps backward too."""
        out: Tensor = _Nap.apply(x if x.requires_grad else x.requires_grad_(), *self.seconds)
        return self.inside(out)


def sleeping_stage(rank: int, stages: int = 2) -> StageParts:
    """A stage of the chain."""
    with seeded(rank):
        last = rank == stages - 1
        block = SleepingBlock(nn.Linear(WIDTH, CLASSES) if last else nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))
        made = None if last else SyntheticGradient(WIDTH, CLASSES)
    optimizer = None if made is None else torch.optim.SGD(made.parameters(), lr=0.02)
    return StageParts(block, torch.optim.SGD(block.parameters(), lr=0.05), made, optimizer)


def batches(count: int, seed: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Classes around random centers."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, WIDTH, generator=g)
    labels = [torch.randint(CLASSES, (size,), generator=g) for _ in range(count)]
    return [(centers[y] + 0.5 * torch.randn(size, WIDTH, generator=g), y) for y in labels]
