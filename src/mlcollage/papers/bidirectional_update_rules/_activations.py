"""Activation functions with their derivatives, by name, and the modules that stand for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Activation(NamedTuple):
    """A function of each number, its derivative there, and the bounds that outputs saturate at."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    bounds: tuple[float, float] | None = None


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _positive(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _dsilu(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _dsigmoid(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _dgelu(x: Tensor) -> Tensor:
    return _normal_cdf(x) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _identity(x: Tensor) -> Tensor:
    return x


def _dtanh(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x) ** 2


def _relu_tanh(x: Tensor) -> Tensor:
    return torch.tanh(x).relu()


def _drelu_tanh(x: Tensor) -> Tensor:
    return _positive(x) * _dtanh(x)


def _delu(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), torch.exp(x.clamp(max=0)))


def _dleaky(x: Tensor, slope: float) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), torch.full_like(x, slope))


# Functions with names of their own, so that networks can be pickled by those who want to.
ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(_identity, torch.ones_like),
    "tanh": Activation(torch.tanh, _dtanh, (-1.0, 1.0)),
    "relu_tanh": Activation(_relu_tanh, _drelu_tanh, (-1.0, 1.0)),
    "sigmoid": Activation(torch.sigmoid, _dsigmoid, (0.0, 1.0)),
    "relu": Activation(torch.relu, _positive),
    "silu": Activation(F.silu, _dsilu),
    "gelu": Activation(F.gelu, _dgelu),
    "softplus": Activation(F.softplus, torch.sigmoid),
    "elu": Activation(F.elu, _delu),
}
"""The activations that settings may name; ``relu_tanh`` is relu(tanh(x)), the official code's."""


def of_module(module: nn.Module) -> Activation | None:
    """The activation that a module is, or None."""
    if type(module) is nn.LeakyReLU:
        slope = float(module.negative_slope)
        return Activation(partial(F.leaky_relu, negative_slope=slope), partial(_dleaky, slope=slope))
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    if (isinstance(module, nn.ELU) and module.alpha != 1.0) or (
        isinstance(module, nn.Softplus) and (module.beta, module.threshold) != (1.0, 20.0)
    ):
        return None
    name = _MODULES.get(type(module))
    return None if name is None else ACTIVATIONS[name]


_MODULES: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Softplus: "softplus",
    nn.ELU: "elu",
    nn.Identity: "identity",
}
