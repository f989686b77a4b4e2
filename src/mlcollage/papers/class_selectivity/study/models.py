"""The study's networks: which layers are read, and how one is trained with a penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.data import Problem
from mlcollage.errors import InvalidInput
from mlcollage.nn import MLP, ConvNet, build
from mlcollage.train import cosine, epochs, steps

from ..index import Negative
from ..regularizer import Alpha, SelectivityRegularizer

CLIP, WARMUP = 5.0, 0.3
_RECTIFIED = (nn.ReLU, nn.ReLU6)
_OTHERS = (
    *("GELU", "SiLU", "Swish", "Mish", "ELU", "CELU", "SELU", "LeakyReLU", "PReLU", "Softplus", "Tanh", "Hardswish"),
    *("QuickGELU", "GELUActivation", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation"),
    "SiLUActivation",
)


@dataclass(frozen=True)
class Training:
    """Data and training of one network: SGD with momentum 0.9, a warm-up of 30 % and a cosine to 0."""

    train: int = 4096  # training samples, of each seed's own
    val: int = 1000  # samples to choose alpha on
    test: int = 2500  # samples to test on
    pool: bool = True  # whether images of 28 by 28 pixels are averaged to 14 by 14
    widths: tuple[int, ...] = (16, 32, 32, 64)  # channels of the convolutions
    batch: int = 128  # samples per update
    lr: float = 0.1  # peak learning rate
    epochs: float = 3.0  # passes over the training samples


def layers_for(model: nn.Module) -> tuple[tuple[str, ...], Negative]:
    """Paths of the layers whose selectivity is measured, and the sign policy they need.

    ReLUs if there are any, as in the paper; else every other activation module, with negative responses cut off.

    Raises
    ------
    InvalidInput
        If the model has no activation module.
    """
    relus = tuple(name for name, m in model.named_modules() if isinstance(m, _RECTIFIED))
    if relus:
        return relus, "error"
    others = tuple(name for name, m in model.named_modules() if type(m).__name__ in _OTHERS)
    if not others:
        raise InvalidInput(
            f"the workload's {type(model).__name__} has no activation module (nn.ReLU, nn.GELU, ...) whose units could "
            "be measured; functions such as F.relu cannot be read, so use modules."
        )
    return others, "relu"


def leaky(model: nn.Module) -> nn.Module | None:
    """The model with leaky ReLUs (slope 0.01) in place of its ReLUs; None if it has none."""
    found = [name for name, m in model.named_modules() if isinstance(m, _RECTIFIED) and name]
    if not found:
        return None
    for name in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.LeakyReLU(0.01))
    return model


def network(shape: tuple[int, ...], classes: int, widths: tuple[int, ...]) -> nn.Module:
    """A convolutional network for images (channels, height, width), else an MLP."""
    if len(shape) == 3 and min(shape[1:]) >= 8:
        strides = [1 + i % 2 for i in range(len(widths))]
        return ConvNet((shape[0], shape[1], shape[2]), classes, widths, strides=strides)
    return MLP(shape, classes, widths=(64, 64, 64), norm="batch")


@dataclass(frozen=True)
class Trained:
    """A trained network, how to read it, and its training loss at the end."""

    model: nn.Module
    layers: tuple[str, ...]
    negative: Negative
    loss: float


def train(
    p: Problem,
    s: Training,
    alpha: Alpha,
    *,
    seed: int,
    lengthen: float = 1.0,
    shuffle: bool = False,
    leak: bool = False,
) -> Trained:
    """One network with the penalty; initialization and order of the data depend on the seed only.

    So all penalties are compared on pairs. ``lengthen`` multiplies the training length, ``shuffle`` permutes the
    penalty's labels, ``leak`` makes the ReLUs leaky.
    """
    model = build(p.make_model, seed)
    layers, negative = layers_for(model)
    if leak:
        model, negative = leaky(model) or model, "relu"
    model = model.to(p.device)
    x, y = p.train
    batch = min(s.batch, len(x))
    total = round(s.epochs * lengthen * len(x) / batch)
    options: dict[str, Any] = {"num_classes": p.num_classes, "negative": negative}
    if batch < 4 * p.num_classes:  # too few samples per class for an index of the batch alone
        options["memory"] = "ema"
    if shuffle:
        options["shuffle_targets"] = seed
    optimizer = torch.optim.SGD(model.parameters(), lr=s.lr, momentum=0.9)
    last: list[Tensor] = []  # losses of the last ten updates
    with SelectivityRegularizer(model, alpha, layers, **options) as penalty:
        plain = alpha == 0 and not callable(alpha)
        if plain:
            penalty.remove()

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            value = F.cross_entropy(logits, labels)
            last[:] = [*last[-9:], value.detach()]
            return value if plain else value + penalty(labels)

        schedule = cosine(total, warmup=max(1, round(WARMUP * total)) if total > 1 else 0)
        batches = epochs(x, y, batch, generator=seed)
        for _ in steps(
            model, batches, optimizer, loss=loss, schedule=schedule, max_steps=total, clip_norm=CLIP, seed=seed
        ):
            pass
    return Trained(model, layers, negative, float(torch.stack(last).mean()))
