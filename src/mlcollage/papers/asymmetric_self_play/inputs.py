"""What a user's tensors must be: refused in one sentence where they are something else, and never broadcast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput

__all__ = ["flags", "floats", "same_shape"]


def floats(**values: Any) -> None:
    """Tensors of floating-point numbers; None is left out.

    Examples
    --------
    >>> floats(rewards=torch.zeros(3, dtype=torch.float64), values=None)
    """
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise InvalidInput(f"{name} must be a tensor, not a {type(value).__name__}; give torch.as_tensor({name}).")
        if not value.is_floating_point():
            raise InvalidInput(f"{name} must hold floating-point numbers, not {value.dtype}; give {name}.float().")


def flags(**values: Any) -> None:
    """Tensors of bool; None is left out. Ones and zeros would be read as indices, or turned round to -1 and -2.

    Examples
    --------
    >>> flags(mask=torch.tensor([True, False]))
    """
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise InvalidInput(f"{name} must be a tensor of bool, not a {type(value).__name__}.")
        if value.dtype != torch.bool:
            raise InvalidInput(f"{name} must be bool (True or False); it is {value.dtype}. Give {name}.bool().")


def same_shape(of: str, shape: torch.Size, **values: Tensor | None) -> None:
    """Tensors of one shape; None is left out. A column (N, 1) beside rows (N,) would quietly become (N, N).

    Examples
    --------
    >>> same_shape("rewards", torch.Size([3]), values=torch.zeros(3))
    """
    for name, value in values.items():
        if value is not None and value.shape != shape:
            raise InvalidInput(f"{name} has shape {tuple(value.shape)} and {of} {tuple(shape)}; they must agree.")
