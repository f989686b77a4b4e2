"""What the study trains and on what: its own networks on Fashion-MNIST, or the user's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.data.problem import Problem, problem
from mlcollage.data.workload import Labeled
from mlcollage.lab.experiment import Task
from mlcollage.nn.mlp import MLP
from mlcollage.nn.vgg import VGG

__all__ = ["Common", "Setup", "make_setup", "row_transformer"]

Factory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Common:
    """Data, networks and training that both experiments share."""

    data: str = "fashion_mnist"  # fashion_mnist, tiny_imagenet or workload
    network: str = "cnn"  # cnn, vgg or user
    samples: int = 8192  # training samples
    pixels: int = 14  # height and width of Fashion-MNIST: averaged, or padded to 32
    width: int = 8  # channels of the first convolution
    steps: int = 250  # updates of each training
    batch_size: int = 128  # samples per update
    lr: float = 0.1  # of SGD without momentum
    momenta: tuple[tuple[float, float, float], ...] = (
        (0.9, 0.1, 1e-3),
        (0.99, 0.02, 1e-2),
    )  # momentum, learning rate and weight decay of each training with momentum
    every: int = 1  # steps per record of the tracker


class Setup(NamedTuple):
    """Training data and the networks by name, each made afresh by a call."""

    x: Tensor
    y: Tensor
    classes: int
    networks: Mapping[str, Factory]
    own: bool  # whether the networks are the study's own


def make_setup(task: Task[Any]) -> Setup:
    """Data and networks of a task."""
    s: Common = task.settings
    own = task.workload is None and s.data != "tiny_imagenet"
    # The user's samples are drawn once and for all, the same for every seed: files are often sorted by class.
    rng = None if own else np.random.default_rng(0)
    p = problem(task.workload, functools.partial(_default, s), rng=rng, train=s.samples, test=0, standardize="sample")
    x, y = p.train
    if p.users_model:
        return Setup(x, y, p.num_classes, {"user": p.make_model}, own=False)
    return Setup(x, y, p.num_classes, _networks(p, s), own=True)


def _default(s: Common) -> Labeled:
    if s.data == "tiny_imagenet":
        from mlcollage.data import tiny_imagenet

        images, held = tiny_imagenet.load()
        return Labeled(images, held, len(images.classes))
    from mlcollage.data import fashion_mnist

    pixels, labels, *_ = fashion_mnist.load(limit=s.samples)
    x = torch.from_numpy(pixels).reshape(-1, 1, 28, 28)
    x = F.adaptive_avg_pool2d(x, s.pixels) if s.pixels < 28 else F.pad(x, (2, 2, 2, 2))
    return Labeled.from_arrays(x.numpy(), labels, x.numpy(), labels, 10)


def _networks(p: Problem, s: Common) -> Mapping[str, Factory]:
    """One without and one with batch norm."""
    shape = tuple(p.train.x.shape[1:])
    if s.network == "vgg":
        return _vggs(shape, p.num_classes)
    if len(shape) == 3 and min(shape[1:]) >= 8:
        make = functools.partial(_cnn, shape, p.num_classes, s.width)
    else:
        make = functools.partial(_mlp, shape, p.num_classes)
    return {"plain": functools.partial(make, norm=False), "norm": functools.partial(make, norm=True)}


def _mlp(shape: tuple[int, ...], classes: int, norm: bool) -> nn.Module:
    return MLP(shape, classes, (64, 64), norm="batch" if norm else None)


def _vggs(shape: tuple[int, ...], classes: int) -> dict[str, Factory]:
    """The paper's: VGG-16 at its size, without and with batch norm."""
    image = (shape[0], shape[1], shape[2])
    small = {} if min(image[1:]) >= 64 else {"depth": 11, "width": 0.25, "classifier": (64,), "dropout": 0.0}
    return {
        "plain": lambda: VGG(image, classes, **small),  # type: ignore[arg-type]
        "norm": lambda: VGG(image, classes, norm="batch", **small),  # type: ignore[arg-type]
    }


def _cnn(shape: tuple[int, ...], classes: int, width: int, norm: bool) -> nn.Module:
    """Two convolutions with pooling, a hidden layer, a softmax; batch norm after the convolutions if asked."""
    channels, height, breadth = shape
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, width), (width, 2 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1)]
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    features = 2 * width * (height // 4) * (breadth // 4)
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(features, 4 * width), nn.ReLU(), nn.Linear(4 * width, classes)
    )


class _Rows(nn.Module):
    """A transformer block on the rows of an image: attention with biases, then a SwiGLU, both after a layer norm."""

    def __init__(self, features: int, classes: int, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(features, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.flatten(1, -2))
        a = self.norm1(h)
        q, k, v = (
            layer(a).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        b = self.norm2(h)
        h = h + self.down(F.silu(self.gate(b)) * self.up(b))
        return self.head(h.mean(dim=1))


def row_transformer(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The study's small transformer; inputs (rows, features) or images, whose rows are the tokens."""
    return _Rows(shape[-1], classes)
