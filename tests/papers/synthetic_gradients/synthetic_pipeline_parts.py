"""Stages for the tests of pipelines, in a module that other processes can import."""

import os
import time

import torch
from torch import nn

from mlcollage.papers.synthetic_gradients import StageParts, SyntheticGradient

WIDTH, CLASSES = 12, 3


def batches(n=24, size=16, last=None):
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, WIDTH, generator=g)
    found = []
    for i in range(n):
        rows = last if last and i == n - 1 else size
        y = torch.randint(CLASSES, (rows,), generator=g)
        found.append((centers[y] + 0.5 * torch.randn(rows, WIDTH, generator=g), y))
    return found


def parts(rank, stages=2, lr=0.05, bump=0.0):
    torch.manual_seed(rank)
    if rank == stages - 1:
        block = nn.Linear(WIDTH, CLASSES)
        return StageParts(block, torch.optim.SGD(block.parameters(), lr=lr))
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    made = SyntheticGradient(WIDTH, CLASSES)
    sgd = torch.optim.SGD(block.parameters(), lr=lr)
    return StageParts(block, sgd, made, torch.optim.SGD(made.parameters(), lr=0.02))


def two(rank):
    return parts(rank, 2)


def three(rank):
    return parts(rank, 3)


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(0.01)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        time.sleep(0.02)
        return g


class Sleeping(nn.Module):
    """10 ms forward, 20 ms backward, whatever it computes."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(Slow.apply(x))


def sleeping(rank):
    made = parts(rank, 2)
    made.block = Sleeping(made.block)
    return made


class Dying(nn.Module):
    """Ends its process at a step."""

    def __init__(self, inside, step):
        super().__init__()
        self.inside, self.left = inside, step

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            os._exit(9)
        return self.inside(x)


def dying_last(rank):
    made = parts(rank, 3)
    if rank == 2:
        made.block = Dying(made.block, 5)
    return made


def raising(rank):
    if rank == 1:
        raise ValueError("no data on this machine")
    return parts(rank, 2)


def dropping(rank):
    """With random numbers and moments of Adam, which a file must hold too."""
    made = parts(rank, 2)
    if rank == 0:
        made.block = nn.Sequential(made.block, nn.Dropout(0.3))
    made.optimizer = torch.optim.Adam(made.block.parameters(), lr=0.01)
    return made


def dropping_and_dying(rank):
    made = dropping(rank)
    made.block = Dying(made.block, 7) if rank == 1 else made.block
    if rank == 1:  # names of parameters are those of the healthy one
        made.block.state_dict = made.block.inside.state_dict
    return made


class Transposed(nn.Module):
    """Tokens to bfloat16 activations (B, units, T) that are not contiguous."""

    def __init__(self):
        super().__init__()
        self.embed, self.map = nn.Embedding(9, 8), nn.Linear(8, 8).bfloat16()

    def forward(self, x):
        return self.map(self.embed(x).bfloat16()).transpose(1, 2)


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(8, CLASSES).bfloat16()

    def forward(self, h):
        return self.map(h.mean(2)).float()


class Synthesizing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = SyntheticGradient(8, CLASSES)

    def forward(self, h, context):
        return self.inside(h.transpose(1, 2).float(), context).transpose(1, 2)


def tokens(rank):
    torch.manual_seed(rank)
    block = Pooled() if rank else Transposed()
    sgd = torch.optim.SGD(block.parameters(), lr=0.1)
    if rank:
        return StageParts(block, sgd)
    made = Synthesizing()
    return StageParts(block, sgd, made, torch.optim.SGD(made.parameters(), lr=0.02))
