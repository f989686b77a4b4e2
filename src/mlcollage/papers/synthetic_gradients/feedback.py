"""Feedback alignment: layers whose backward pass goes through a fixed random matrix in the place of their weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage._random import generator
from mlcollage.errors import InvalidInput

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, back: Tensor) -> Tensor:
        ctx.save_for_backward(x, back)
        ctx.bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, back = ctx.saved_tensors
        g = grads[0]
        below = g @ back.to(g.dtype) if ctx.needs_input_grad[0] else None  # (..., in), of the fixed matrix
        rows = g.flatten(0, -2) if g.ndim > 1 else g[None]
        own = rows.T @ x.reshape(len(rows), -1).to(g.dtype) if ctx.needs_input_grad[1] else None
        return below, own, rows.sum(0) if ctx.bias else None, None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, back: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(x, weight, back)
        ctx.layer, ctx.bias = layer, bias is not None
        return layer._conv_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, back = ctx.saved_tensors
        c, axes = ctx.layer, weight.ndim - 2
        sizes = [weight.shape[0]] if ctx.bias else None
        rest = (c.stride, c.padding, c.dilation, False, [0] * axes, c.groups)
        run = torch.ops.aten.convolution_backward
        below = (
            run(grads[0], x, back.to(x.dtype), None, *rest, [True, False, False])[0]
            if ctx.needs_input_grad[0]
            else None
        )
        _, own, bias = run(grads[0], x, weight, sizes, *rest, [False, True, ctx.bias])
        return below, own, bias, None, None


def feedback_weights(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A fixed random matrix B, shaped like the weight, for each Linear and convolution of a model.

    Parameters
    ----------
    model
        Any module. Attention and recurrent layers compute inside themselves and keep their true backward pass.
    seed
        Of the draws, which are normal with variance 1 / fan-in.

    Raises
    ------
    InvalidInput
        For a model without such layers, and convolutions whose padding is not zeros of a number.

    Examples
    --------
    >>> list(feedback_weights(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))))
    ['0', '2']
    """
    found = {}
    for i, (name, layer) in enumerate(_layers(model)):
        if isinstance(layer, _CONVS) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            raise InvalidInput(
                f"feedback alignment needs convolutions padded by a number of zeros; {name!r} has "
                f"padding={layer.padding!r}, padding_mode={layer.padding_mode!r}."
            )
        weight = layer.weight
        draws = torch.randn(weight.shape, generator=generator(seed, 71, i)) / math.sqrt(weight[0].numel())
        found[name] = draws.to(weight)
    if not found:
        raise InvalidInput(
            "feedback alignment replaces the backward pass of Linear and Conv layers; the model has none."
        )
    return found


@contextmanager
def feedback_alignment(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    r"""Inside, gradients go through a layer as :math:`g B` in the place of :math:`g W`; its own is :math:`g^\top x`.

    Forward passes inside are as ever; their backward pass may be run outside. With B = W the gradients are those of
    backpropagation.

    Parameters
    ----------
    model
        Any module.
    weights
        Of :func:`feedback_weights`.

    References
    ----------
    Lillicrap et al., "Random synaptic feedback weights support error backpropagation for deep learning", 2016.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> with feedback_alignment(model, feedback_weights(model)):
    ...     model(torch.ones(5, 3)).sum().backward()
    """
    changed = []
    try:
        for name, layer in _layers(model):
            if name in weights and "forward" not in layer.__dict__:
                layer.__dict__["forward"] = partial(_forward, layer, weights[name])
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.__dict__["forward"]


def _forward(layer: Any, back: Tensor, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return _Linear.apply(x, layer.weight, layer.bias, back)
    return _Conv.apply(x, layer.weight, layer.bias, back, layer)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        if type(layer) in (nn.Linear, *_CONVS):
            yield name, layer
