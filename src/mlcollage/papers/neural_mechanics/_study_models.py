"""What the study trains and on what: its own networks on Fashion-MNIST, or the user's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sized
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from mlcollage.data.workload import Labeled, Workload, arrays
from mlcollage.lab.run import Run
from mlcollage.nn.mlp import MLP
from mlcollage.nn.vgg import VGG

__all__ = ["Task", "make_task", "row_transformer"]

Factory = Callable[[], nn.Module]


class Task(NamedTuple):
    """Training data and the networks by name, each made afresh by a call."""

    x: Tensor
    y: Tensor
    classes: int
    networks: Mapping[str, Factory]
    own: bool  # whether the networks are the study's own


def make_task(run: Run, workload: Workload | None) -> Task:
    """Data and networks of a run."""
    limit = run.integer("samples")
    if run.text("data") == "tiny_imagenet":
        from mlcollage.data import tiny_imagenet

        images, held = tiny_imagenet.load()
        x, y = _sample(Labeled(images, held, len(images.classes)), limit)
        return _task(_standard(x), y, len(images.classes), run)
    if workload is None:
        from mlcollage.data import fashion_mnist

        pixels, labels, *_ = fashion_mnist.load(limit=limit)
        x = torch.from_numpy(pixels).reshape(-1, 1, 28, 28)
        size = run.integer("pixels")
        x = F.adaptive_avg_pool2d(x, size) if size < 28 else F.pad(x, (2, 2, 2, 2))
        return _task(_standard(x), torch.from_numpy(labels), 10, run)
    x, y = _sample(workload, limit)
    if workload.model is not None:
        return Task(x, y, workload.num_classes, {"user": workload.model}, own=False)
    return _task(_standard(x), y, workload.num_classes, run)


def _sample(workload: Workload, limit: int) -> tuple[Tensor, Tensor]:
    """So many training samples, drawn once and for all: files are often sorted by class."""
    count = len(cast(Sized, workload.train))
    chosen = np.random.default_rng(0).permutation(count)[:limit]
    X, y = arrays(Subset(workload.train, chosen.tolist()))
    return torch.from_numpy(X), torch.from_numpy(y)


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std().clamp(min=1e-12)


def _task(x: Tensor, y: Tensor, classes: int, run: Run) -> Task:
    shape = tuple(x.shape[1:])
    if run.settings.get("network") == "vgg":
        return Task(x, y, classes, _vggs(shape, classes), own=True)
    if len(shape) == 3 and min(shape[1:]) >= 8:
        make = functools.partial(_cnn, shape, classes, run.integer("width"))
    else:
        make = functools.partial(_mlp, shape, classes)
    networks = {"plain": functools.partial(make, norm=False), "norm": functools.partial(make, norm=True)}
    return Task(x, y, classes, networks, own=True)


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
