"""What the networks share: checks of their arguments, nonlinearities by name, and the record of activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mlcollage.errors import InvalidInput, UnknownName

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
    if name not in ACTIVATIONS:
        raise UnknownName(f"activation {name!r} is not known; choose one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]()


def keep(record: dict[str, Tensor] | None, name: str, value: Tensor) -> Tensor:
    """Write ``value`` under ``name`` if activations were asked for; returns ``value`` itself."""
    if record is not None:
        record[name] = value
    return value


def as_size(value: Any, what: str, least: int = 1) -> int:
    """``value`` as an int of at least ``least``, or one sentence that says what is wrong."""
    try:
        size = int(value.__index__())
    except (AttributeError, TypeError):
        raise InvalidInput(f"{what} must be a whole number of at least {least}, not {value!r}.") from None
    if size < least or isinstance(value, bool):
        raise InvalidInput(f"{what} must be a whole number of at least {least}, not {value!r}.")
    return size


def as_sizes(values: Any, what: str, *, empty: bool = False) -> tuple[int, ...]:
    """A tuple of positive ints."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InvalidInput(f"{what} must be a tuple of positive whole numbers such as (64, 64), not {values!r}.")
    if not values and not empty:
        raise InvalidInput(f"{what} must name at least one size, not {values!r}.")
    return tuple(as_size(v, f"each of {what}") for v in values)


def as_image_shape(in_shape: Any) -> tuple[int, int, int]:
    """``in_shape`` as (channels, height, width)."""
    shape = as_sizes(in_shape, "in_shape")
    if len(shape) != 3:
        raise InvalidInput(
            f"in_shape must be (channels, height, width) without the batch, such as (3, 32, 32), not {shape}; "
            "an MLP takes inputs of any shape."
        )
    return shape[0], shape[1], shape[2]


def check_input(x: Tensor, in_shape: tuple[int, ...]) -> None:
    """Refuse a batch whose samples do not have the shape the network was made for."""
    if x.shape[1:] != in_shape:
        raise InvalidInput(
            f"the network was made for a batch of samples of shape {in_shape}, but got an input of shape "
            f"{tuple(x.shape)}; reshape the data or build the network with in_shape={tuple(x.shape[1:])}."
        )
