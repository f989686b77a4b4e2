"""What the networks share: the way through their layers, the record of activations, checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

Record = dict[str, Tensor] | None  # activations by name in order of execution; None if they were not asked for

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
}


def make_activation(name: str) -> nn.Module:
    """The nonlinearity called ``name``; never in place, so that the activation before it stays readable."""
    return ACTIVATIONS[checks.choice("activation", name, ACTIVATIONS)]()


def keep(record: Record, name: str, value: Tensor) -> Tensor:
    """Write ``value`` under ``name`` if activations were asked for; returns ``value`` itself."""
    if record is not None:
        record[name] = value
    return value


class Block(nn.Module):
    """A part of a network that records the activations inside it by itself; by default all its layers in turn."""

    def forward(self, x: Tensor, record: Record = None, name: str = "") -> Tensor:
        return through(self, [layer for layer, _ in self.named_children()], x, record, name)


def through(module: nn.Module, layers: Sequence[str], x: Tensor, record: Record, name: str = "") -> Tensor:
    """The output of some layers of a module in turn; each one's is recorded under its path from the whole network."""
    for key in layers:
        # A block is given its path, since it alone knows which of its parts are worth a name.
        layer, path = module.get_submodule(key), f"{name}.{key}" if name else key
        x = layer(x, record, path) if isinstance(layer, Block) else keep(record, path, layer(x))
    return x


class Network(nn.Module):
    """Features, and a linear ``head`` that makes logits of them."""

    head: nn.Linear

    def __init__(self, in_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.in_shape = in_shape  # of one sample
        self.num_classes = checks.integer("num_classes", num_classes, least=1)

    def forward(self, x: Tensor, activations: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Logits (batch, classes) of x (batch, *in_shape); with ``activations=True`` also the activations by name."""
        if not isinstance(x, Tensor):
            raise InvalidInput(f"the network takes a tensor, not {type(x).__name__}; torch.as_tensor makes one.")
        if x.shape[1:] != self.in_shape:
            raise InvalidInput(
                f"the network was made for a batch of samples of shape {self.in_shape}, but got an input of shape "
                f"{tuple(x.shape)}; reshape the data or build the network with in_shape={tuple(x.shape[1:])}."
            )
        # A dictionary of this call alone, so that networks keep no state and work under torch.vmap and torch.compile.
        record: Record = {} if activations else None
        logits = keep(record, "logits", self.head(self.features(x, record)))
        return logits if record is None else (logits, record)

    def features(self, x: Tensor, record: Record = None) -> Tensor:
        """What the head sees, (batch, features): the output of all layers but the head in turn."""
        return through(self, [name for name, _ in self.named_children() if name != "head"], x, record)


def cut_normal_(tensor: Tensor, std: float) -> None:
    """Fill with draws from a normal distribution, those beyond two standard deviations drawn again."""
    # torch's own default cuts at the values -2 and 2, whatever the deviation.
    nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


def wide(x: Tensor) -> Tensor:
    """The numbers of x in at least float32, for sums over many numbers."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def as_sizes(name: str, values: Any, *, empty: bool = False) -> tuple[int, ...]:
    """A tuple of positive ints."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InvalidInput(f"{name} must be a tuple of positive whole numbers such as (64, 64), not {values!r}.")
    if not values and not empty:
        raise InvalidInput(f"{name} must name at least one size, not {values!r}.")
    return tuple(checks.integer(f"each of {name}", v, least=1) for v in values)


def as_image_shape(in_shape: Any) -> tuple[int, int, int]:
    """``in_shape`` as (channels, height, width)."""
    shape = as_sizes("in_shape", in_shape)
    if len(shape) != 3:
        raise InvalidInput(
            f"in_shape must be (channels, height, width) without the batch, such as (3, 32, 32), not {shape}; "
            "an MLP takes inputs of any shape."
        )
    return shape[0], shape[1], shape[2]
