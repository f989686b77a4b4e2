"""What a network's first linear map or convolution is given: the inputs that its weights are multiplied with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage.errors import InvalidInput
from mlcollage.nn import unwrap

from .validation import as_inputs


class _Found(Exception):
    """Ends a forward pass whose first layer has been seen."""


def network_of(model: Any) -> nn.Module:
    """The torch module of a network that may be wrapped, or of a ``BayesianNetwork``."""
    network = model if isinstance(model, nn.Module) else getattr(model, "module", model)
    if not isinstance(network, nn.Module):
        raise InvalidInput(f"module is {type(model).__name__}; a torch.nn.Module or a BayesianNetwork is needed.")
    return unwrap(network)


def layer_batches(network: nn.Module, X: Any, batch_size: int) -> Iterator[tuple[str, Tensor, int]]:
    """Name of the first layer's weight, what it meets, (rows, D), and the number of inputs, batch by batch."""
    for batch in as_inputs(X, network).split(batch_size):
        name, seen = layer_inputs(network, batch)
        yield f"{name}.weight" if name else "weight", seen, len(batch)


@torch.no_grad()
def layer_inputs(module: nn.Module, inputs: Tensor) -> tuple[str, Tensor]:
    """Name of the first linear map or convolution that the forward pass meets, and what it is given.

    Parameters
    ----------
    module
        The network. The forward pass ends at that layer, and the network is left as it was.
    inputs
        A batch, as the network takes it.

    Returns
    -------
    str, Tensor
        The layer's name, and (rows, D) in float64: one row per sample for a vector, and several for a sequence, or
        one per patch for a convolution, sample by sample.

    Raises
    ------
    InvalidInput
        If there is no such layer, its inputs are not finite, or it is a convolution with groups or odd padding.

    Examples
    --------
    >>> name, seen = layer_inputs(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.arange(4.0).reshape(1, 2, 2))
    >>> name, seen.tolist()
    ('1', [[0.0, 1.0, 2.0, 3.0]])
    """
    layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)}
    if not layers:
        raise InvalidInput("the module has no linear map or convolution whose inputs could be looked at.")
    found: list[tuple[str, Tensor]] = []

    def catch(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append((name, _patches(layer, args[0])))
        raise _Found

    handles = [layer.register_forward_pre_hook(partial(catch, name)) for name, layer in layers.items()]
    try:
        # the pass ends at the first layer that is called, in whatever order they were made
        with suppress(_Found):
            module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise InvalidInput("the module's forward pass uses none of its linear maps or convolutions.")
    if not bool(found[0][1].isfinite().all()):
        raise InvalidInput("an input of the first layer is not finite; mend the data first.")
    return found[0]


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What each application of the layer's weight is multiplied with, (rows, D), float64."""
    x = x.detach().double()
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    if layer.groups != 1 or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise InvalidInput("the first convolution has groups, or padding other than by a number of zeros.")
    # a line of numbers is an image of height one
    flat = isinstance(layer, nn.Conv1d)
    kernel, dilation, stride = ((1, *v) if flat else v for v in (layer.kernel_size, layer.dilation, layer.stride))
    padding = (0, *layer.padding) if flat else layer.padding
    columns = nn.functional.unfold(x.unsqueeze(2) if flat else x, kernel, dilation, padding, stride)  # (n, D, patches)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])
