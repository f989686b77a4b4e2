"""Losses of a model, and their first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage.errors import InvalidInput

Loss = Callable[[nn.Module], Tensor]


def loss_value(loss: Loss, model: nn.Module) -> Tensor:
    """``loss(model)`` as a tensor of shape (); refuses what is not one finite number that depends on parameters."""
    value = loss(model)
    if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value).all()):
        shown = tuple(value.shape) if isinstance(value, Tensor) and value.numel() != 1 else value
        raise InvalidInput(f"loss(model) must be one finite number; got {shown}.")
    if not value.requires_grad:
        raise InvalidInput("loss(model) does not depend on the parameters through autograd; return the loss itself.")
    return value.reshape(())


def derivatives(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], along: Sequence[Tensor] | None = None, **options: Any
) -> list[Tensor]:
    """``torch.autograd.grad`` with zeros where no output depends on an input, and where there is no output.

    With ``is_grads_batched`` the vectors `along` and the results have a leading axis.
    """
    try:
        none = (None,) * len(inputs)
        found = torch.autograd.grad(outputs, inputs, along, allow_unused=True, **options) if outputs else none
    except NotImplementedError as reason:
        raise InvalidInput(f"the loss has no second derivative: {str(reason).splitlines()[0]}") from reason
    lead = along[0].shape[:1] if along is not None and options.get("is_grads_batched") else ()
    return [x.new_zeros((*lead, *x.shape)) if d is None else d for d, x in zip(found, inputs, strict=True)]
