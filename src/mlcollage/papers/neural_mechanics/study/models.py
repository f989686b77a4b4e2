"""The study's data, and its own networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.data import Labeled, Problem, problem
from mlcollage.nn import MLP, VGG


def samples(workload: Labeled | None, data: str, count: int, pixels: int) -> Problem:
    """So many standardized training samples: of the user, or of Fashion-MNIST or Tiny ImageNet; the same for all seeds.

    Fashion-MNIST is averaged to `pixels` × `pixels`, or padded to 32 × 32.
    """
    # Files are often sorted by class, so that the first samples would not do; those of Fashion-MNIST are mixed.
    rng = None if workload is None and data == "fashion_mnist" else np.random.default_rng(0)
    default = _tiny_imagenet if data == "tiny_imagenet" else functools.partial(_fashion_mnist, count, pixels)
    return problem(workload, default, rng=rng, train=count, test=0, standardize="sample")


def _tiny_imagenet() -> Labeled:
    from mlcollage.data import tiny_imagenet

    images, held = tiny_imagenet.load()
    return Labeled(images, held, len(images.classes))


def _fashion_mnist(count: int, pixels: int) -> Labeled:
    from mlcollage.data import fashion_mnist

    flat, labels, *_ = fashion_mnist.load(limit=count)
    x = torch.from_numpy(flat).reshape(-1, 1, 28, 28)
    x = F.adaptive_avg_pool2d(x, pixels) if pixels < 28 else F.pad(x, (2, 2, 2, 2))
    return Labeled.from_arrays(x.numpy(), labels, x.numpy(), labels, 10)


def networks(kind: str, shape: tuple[int, ...], classes: int, width: int) -> Mapping[str, Callable[[], nn.Module]]:
    """The two networks of the study, without and with batch norm, each made afresh by a call.

    `kind` is ``vgg``, or ``cnn``: a small convolutional network for images, an MLP for anything else.
    """
    make: Callable[..., nn.Module] = functools.partial(MLP, shape, classes, (64, 64))
    if kind == "vgg":  # the paper's: VGG-16 at its size, a slim VGG-11 for smaller images
        small = {"depth": 11, "width": 0.25, "classifier": (64,), "dropout": 0.0}
        options: dict[str, Any] = {} if min(shape[1:]) >= 64 else small
        make = functools.partial(VGG, shape, classes, **options)  # type: ignore[arg-type]
    elif len(shape) == 3 and min(shape[1:]) >= 8:
        make = functools.partial(_cnn, shape, classes, width)
    return {"plain": functools.partial(make, norm=None), "norm": functools.partial(make, norm="batch")}


def _cnn(shape: tuple[int, ...], classes: int, width: int, norm: str | None) -> nn.Module:
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


class RowTransformer(nn.Module):
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
        """Logits (batch, classes) of images (batch, channels, rows, features) or rows (batch, rows, features)."""
        h = self.embed(x.flatten(1, -2))  # (batch, rows, dim)
        a = self.norm1(h)
        q, k, v = (  # (batch, heads, rows, dim / heads)
            layer(a).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        b = self.norm2(h)
        h = h + self.down(F.silu(self.gate(b)) * self.up(b))
        return self.head(h.mean(dim=1))


def row_transformer(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The study's small transformer; inputs (rows, features) or images, whose rows are the tokens."""
    return RowTransformer(shape[-1], classes)
