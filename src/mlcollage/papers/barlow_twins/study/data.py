"""What the study learns from: views that share latent numbers, or views of a user's rows or images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlcollage._random import generator
from mlcollage._users import users_code
from mlcollage.data import Labeled, problem
from mlcollage.errors import InvalidInput
from mlcollage.nn import MLP, ConvNet
from mlcollage.train import two_view_augment

LATENT, NUISANCE, INPUTS = 8, 16, 64  # numbers that the views share, numbers that they do not, columns of x
LOUD = 1.5  # standard deviation of the nuisance, in that of the latent numbers
CLASSES = 4  # the label is the largest of the first so many latent numbers
WIDTH = 64  # of the representation
_CHUNK = 256  # rows that are drawn at one time, whatever the batch
NOISE, SWAP = 0.3, 0.2  # changes of a user's table: noise in standard deviations, share of entries swapped


@dataclass(frozen=True)
class Probed:
    """What representations are judged on: rows to fit a probe on, and rows to test it on, for each seed (R, n, ...)."""

    x: Tensor
    target: Tensor  # latent numbers (R, n, 8), or labels (R, n)
    y: Tensor  # labels (R, n)
    x_test: Tensor
    target_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class Source:
    """Views and probes of a block of seeds.

    Parameters
    ----------
    views
        ``views(n)`` gives the next batch of each seed, two tensors (R, n, ...).
    probed
        Rows with targets.
    encoder
        Makes a fresh network from a row to a representation (64,).
    stacked
        Whether the seeds' networks are trained as one; None finds out.
    """

    views: Callable[[int], tuple[Tensor, Tensor]]
    probed: Probed
    encoder: Callable[[], nn.Module]
    stacked: bool | None = True


class _World:
    """One seed's generator of views: x = W2 tanh(W1 [s, n]), with latent s and nuisance n."""

    def __init__(self, seed: int, fresh: int) -> None:
        draw = generator(seed, 0)
        hidden = LATENT + NUISANCE
        self.w1 = torch.randn(hidden, INPUTS, generator=draw) / hidden**0.5
        self.w2 = torch.randn(INPUTS, INPUTS, generator=draw) / INPUTS**0.5
        self.fresh, self.stream = fresh, generator(seed, 1)
        self.left: list[Tensor] = []

    def inputs(self, s: Tensor, nuisance: Tensor) -> Tensor:
        return torch.tanh(torch.cat([s, LOUD * nuisance], 1) @ self.w1) @ self.w2

    def views(self, n: int) -> tuple[Tensor, Tensor]:
        # Drawn in chunks of one size, so that all batch sizes see the same samples in the same order.
        while sum(len(part) for part in self.left) < n:
            drawn = torch.randn(_CHUNK, LATENT + 2 * NUISANCE, generator=self.stream)
            s, first, second = drawn.split([LATENT, NUISANCE, NUISANCE], 1)
            second = torch.cat([second[:, : self.fresh], first[:, self.fresh :]], 1)
            self.left.append(torch.cat([self.inputs(s, first), self.inputs(s, second)], 1))
        rows = torch.cat(self.left)
        self.left = [rows[n:]]
        a, b = rows[:n].split(INPUTS, 1)
        return a, b

    def labeled(self, n: int, key: int) -> tuple[Tensor, Tensor]:
        drawn = torch.randn(n, LATENT + NUISANCE, generator=generator(key, 2))
        s, nuisance = drawn.split([LATENT, NUISANCE], 1)
        return self.inputs(s, nuisance), s


def shared_latent(seeds: Sequence[int], fit: int, test: int, fresh: int = NUISANCE) -> Source:
    """Views that share eight latent numbers; the rest of what they are made of is drawn anew in each.

    ``fresh`` is how many of the sixteen nuisance numbers differ between the views; the others are shared, as if an
    augmentation left them alone. Rows to be judged on always vary in all.
    """
    worlds = [_World(seed, fresh) for seed in seeds]

    def views(n: int) -> tuple[Tensor, Tensor]:
        pairs = [world.views(n) for world in worlds]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])

    parts = []
    for world, seed in zip(worlds, seeds, strict=True):
        x, s = world.labeled(fit + test, seed)
        parts.append((x, s, s[:, :CLASSES].argmax(1)))
    x, s, y = (torch.stack(part) for part in zip(*parts, strict=True))
    probed = Probed(x[:, :fit], s[:, :fit], y[:, :fit], x[:, fit:], s[:, fit:], y[:, fit:])
    return Source(views, probed, partial(MLP, (INPUTS,), WIDTH, widths=(256,), norm="batch"))


def of_workload(workload: Labeled, seeds: Sequence[int], fit: int, test: int) -> Source:
    """Views of a user's rows or images, and their labels to be judged on."""
    shape = tuple(workload.train[0][0].shape)
    images = len(shape) == 3
    p = problem(
        workload,
        lambda: workload,
        rng=np.random.default_rng(0),
        train=None,
        test=test,
        standardize="none" if images else "population",
    )
    x, y = p.train
    change = _users(workload) if workload.views is not None else _of_images(shape) if images else _of_rows(x)
    draws = [generator(seed, 3) for seed in seeds]

    def views(n: int) -> tuple[Tensor, Tensor]:
        pairs = []
        for draw in draws:
            rows = torch.randperm(len(x), generator=draw)[:n]
            pairs.append(change(x[rows], draw))
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])

    picked = [torch.randperm(len(x), generator=generator(seed, 4))[:fit] for seed in seeds]
    many = len(seeds)
    fits = torch.stack([x[i] for i in picked]), torch.stack([y[i] for i in picked])
    tests = p.test.x.expand(many, *p.test.x.shape), p.test.y.expand(many, -1)
    probed = Probed(fits[0], fits[1], fits[1], tests[0], tests[1], tests[1])
    return Source(views, probed, partial(_encoder, workload, shape), None)


def _users(workload: Labeled) -> Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]:
    views: Any = workload.views

    def change(x: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        with users_code("the workload's views(x, generator)"):
            pair = views(x, draw)
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and pair[0].shape == pair[1].shape == x.shape):
            raise InvalidInput(f"the workload's views(x, generator) must return two tensors of shape {tuple(x.shape)}.")
        return pair[0].float(), pair[1].float()

    return change


def _of_images(shape: tuple[int, ...]) -> Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]:
    color = shape[0] == 3
    changes: dict[str, Any] = {"scale": (0.3, 1.0), "blur": 0.0} if not color else {}
    return two_view_augment((shape[1], shape[2]), shape[0], "cifar" if color else "gray", **changes)


def _of_rows(x: Tensor) -> Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]:
    spread = x.std(0)  # of each feature: noise must mean the same in all

    def once(rows: Tensor, draw: torch.Generator) -> Tensor:
        other = x[torch.randint(len(x), rows.shape, generator=draw), torch.arange(x.shape[1])]
        kept = torch.rand(rows.shape, generator=draw) >= SWAP
        return torch.where(kept, rows, other) + NOISE * spread * torch.randn(rows.shape, generator=draw)

    return lambda rows, draw: (once(rows, draw), once(rows, draw))


def _encoder(workload: Labeled, shape: tuple[int, ...]) -> nn.Module:
    """The user's network without its last linear layer, or one for their inputs."""
    if workload.model is None:
        if len(shape) == 3 and min(shape[1:]) >= 8:
            return ConvNet((shape[0], shape[1], shape[2]), WIDTH, (16, 32, 64), strides=(1, 2, 2))
        return MLP(shape, WIDTH, widths=(256,), norm="batch")
    model = workload.model()
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not last or not last[-1]:
        raise InvalidInput(
            f"the workload's {type(model).__name__} has no nn.Linear inside of it whose inputs could be taken for the "
            "representation; give a network that ends with one."
        )
    parent, _, child = last[-1].rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return model
