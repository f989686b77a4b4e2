"""The path through a network: synapse layers, and what lies fixed between them, with its adjoint."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn import unwrap

from ._activations import ACTIVATIONS, Activation, of_module

SUPPORTED = "Linear, Conv2d, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, Flatten, Identity and " + ", ".join(
    ("Tanh", "Sigmoid", "ReLU", "LeakyReLU", "ELU", "SiLU", "GELU", "Softplus")
)


@dataclass(frozen=True)
class Pool:
    """A pooling between synapse layers; ``max`` follows state 0, and hands on the other states of the same place."""

    kind: str  # max or mean
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the output, from (channels, height, width)."""
        sides = zip(shape[1:], self.kernel, self.stride, self.padding, strict=True)
        return (shape[0], *((n + 2 * p - k) // s + 1 for n, k, s, p in sides))

    def forward(self, t: Tensor, index: Tensor | None = None) -> tuple[Tensor, Any]:
        """From (P, k, B, C, H, W), and what the way back needs; ``index`` are places that were chosen before."""
        lead, (c, h, w) = t.shape[:3], t.shape[3:]
        if self.kind == "max":
            p, k, b = lead
            if index is None:
                first = t[:, 0].reshape(p * b, c, h, w)
                _, index = F.max_pool2d(first, self.kernel, self.stride, self.padding, return_indices=True)
                index = index.reshape(p, 1, b, c, -1)
            out = t.reshape(p, k, b, c, h * w).gather(-1, index.expand(p, k, b, c, index.shape[-1]))
            return out.reshape(p, k, b, *self.shape((c, h, w))), index
        out = F.avg_pool2d(t.reshape(-1, c, h, w), self.kernel, self.stride, self.padding)
        return out.reshape(*lead, *out.shape[1:]), None

    def adjoint(self, g: Tensor, saved: Any, shape: tuple[int, ...]) -> Tensor:
        """Back to ``shape`` = (C, H, W)."""
        lead, (c, h, w) = g.shape[:3], shape
        if self.kind == "max":
            flat = g.reshape(*lead, c, -1)
            out = flat.new_zeros(*lead, c, h * w).scatter_add(-1, saved.expand_as(flat), flat)
            return out.reshape(*lead, c, h, w)
        area = self.kernel[0] * self.kernel[1]
        columns = g.reshape(-1, 1, g.shape[-2] * g.shape[-1]).expand(-1, area, -1) / area
        out = F.fold(columns, (h, w), self.kernel, padding=self.padding, stride=self.stride)
        return out.reshape(*lead, c, h, w)


@dataclass(frozen=True)
class Synapses:
    """A layer of synapses, dense or a convolution, and the neurons above it."""

    name: str  # the user's path to the module, or its number
    inputs: int  # senders of one neuron, without the bias
    outputs: int  # neurons, or channels of a convolution
    bias: bool
    activation: Activation
    own_activation: bool  # whether the user's module gave it, so that the genome's does not apply
    below: tuple[int, ...]  # shape of the layer below, (n,) or (C, H, W), before pooling
    above: tuple[int, ...]  # shape of the neurons, before pooling
    pools: tuple[Pool, ...] = ()
    kernel: tuple[int, int] | None = None  # of a convolution
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    shared: int = -1  # number of the earlier layer whose synapses it uses, or -1
    frozen: tuple[bool, bool] = (False, False)  # weight, bias
    module: nn.Module | None = field(default=None, compare=False, repr=False)

    @property
    def positions(self) -> int:
        """Rows per sample above: 1, or the positions of a convolution."""
        return 1 if self.kernel is None else self.above[1] * self.above[2]

    @property
    def pooled(self) -> tuple[int, ...]:
        """Shape of what the synapses read."""
        shape = self.below
        for pool in self.pools:
            shape = pool.shape(shape)
        return shape

    @property
    def plain(self) -> bool:
        """Whether rows below are read as they are."""
        return self.kernel is None and len(self.below) == 1

    def gather(self, states: Tensor, chosen: Sequence[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """States of the layer below (P, k, rows, n) as the synapses read them, (P, k, R, inputs).

        Beside them what poolings chose; ``chosen`` makes them choose that again.
        """
        if self.plain:
            return states, []
        p, k = states.shape[:2]
        t, saved = _as_images(states, self.below), []
        for i, pool in enumerate(self.pools):
            t, index = pool.forward(t, None if chosen is None else chosen[i])
            saved.append(index)
        if self.kernel is None:  # flattened in C order: channel, row, column
            return t.reshape(p, k, t.shape[2], -1), saved
        columns = F.unfold(
            t.reshape(-1, *t.shape[3:]), self.kernel, self.dilation, self.padding, self.stride
        )  # (P k B, C h w, positions)
        return columns.transpose(1, 2).reshape(p, k, -1, self.inputs), saved

    def scatter(self, message: Tensor, saved: list[Any]) -> Tensor:
        """The adjoint of :meth:`gather`: a message to what the synapses read, as one to the layer below."""
        if self.plain:
            return message
        p, k = message.shape[:2]
        shape = self.pooled
        if self.kernel is None:
            t = message.reshape(p, k, -1, *shape)
        else:
            columns = message.reshape(-1, self.positions, self.inputs).transpose(1, 2)
            t = F.fold(columns, shape[1:], self.kernel, self.dilation, self.padding, self.stride)
            t = t.reshape(p, k, -1, *shape)
        shapes = [self.below][: len(self.pools)]
        for pool in self.pools[:-1]:
            shapes.append(pool.shape(shapes[-1]))
        for pool, chosen, before in reversed(list(zip(self.pools, saved, shapes, strict=True))):
            t = pool.adjoint(t, chosen, before)
        return _as_rows(t)


def _as_images(states: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows of positions (P, k, B H W, C) as (P, k, B, C, H, W)."""
    p, k = states.shape[:2]
    c, h, w = shape
    return states.reshape(p, k, -1, h, w, c).permute(0, 1, 2, 5, 3, 4)


def _as_rows(t: Tensor) -> Tensor:
    p, k, _, c = t.shape[:4]
    return t.permute(0, 1, 2, 4, 5, 3).reshape(p, k, -1, c)


@dataclass(frozen=True)
class Path:
    """All synapse layers, from the input to the logits."""

    input_shape: tuple[int, ...]
    layers: tuple[Synapses, ...]

    @property
    def classes(self) -> int:
        """Neurons of the top layer."""
        return self.layers[-1].outputs

    def read(self, x: Tensor, population: int) -> Tensor:
        """Inputs (P or 1, B, *input_shape) as states (P, 1, rows, n), of which only the first is not zero."""
        x = x.expand(population, *x.shape[1:])
        if len(self.input_shape) == 1:
            return x.unsqueeze(1)
        return _as_rows(x.unsqueeze(1))


def from_sizes(sizes: Sequence[int], activation: Activation, top: Activation) -> Path:
    """Dense layers of so many neurons, the input's first."""
    if len(sizes) < 2:
        raise InvalidInput(f"sizes must name inputs and outputs at least, as (64, 32, 10); got {tuple(sizes)}.")
    n = [checks.integer("each of sizes", size, least=1) for size in sizes]
    layers = []
    for i, (below, above) in enumerate(itertools.pairwise(n)):
        here = activation if i < len(n) - 2 else top
        layers.append(Synapses(str(i), below, above, True, here, False, (below,), (above,)))
    return Path((n[0],), tuple(layers))


def from_module(model: nn.Module, input_shape: Sequence[int] | None) -> Path:
    """The path through a user's ``nn.Sequential``; refuses by name what it cannot follow."""
    model = unwrap(model)
    if not _follows(model, nn.Sequential):
        raise InvalidInput(
            f"a {type(model).__name__} computes in its own forward(), which cannot be followed; give the layers as "
            f"nn.Sequential of {SUPPORTED}."
        )
    modules = list(_leaves(model, ""))
    first = next((m for _, m in modules if isinstance(m, nn.Linear | nn.Conv2d)), None)
    if first is None:
        raise InvalidInput("the model has no Linear or Conv2d, so that there is nothing to learn.")
    shape = _input_shape(first, input_shape)
    layers, pools, seen = list[Synapses](), list[Pool](), dict[int, int]()
    fresh = True  # whether an activation may still follow the last synapses
    for name, module in modules:
        if _follows(module, nn.Linear, nn.Conv2d):
            below = layers[-1].above if layers else shape
            layer = _synapses(name, module, below, tuple(pools), seen.get(id(module), -1))
            seen.setdefault(id(module), len(layers))
            layers.append(layer)
            pools, fresh = [], True
        elif (activation := of_module(module)) is not None:
            if isinstance(module, nn.Identity):
                continue
            if not layers or not fresh or pools:
                raise InvalidInput(
                    f"layer {name!r} ({type(module).__name__}) must directly follow a Linear or Conv2d: neurons have "
                    "one activation, before any pooling."
                )
            layers[-1] = _replace(layers[-1], activation)
            fresh = False
        elif _follows(module, nn.Flatten):
            if module.start_dim != 1 or module.end_dim not in (-1, len(shape)):
                raise InvalidInput(f"layer {name!r}: Flatten must keep the batch and flatten all else.")
        else:
            below = layers[-1].above if layers else shape
            for pool in pools:
                below = pool.shape(below)
            pools.append(_pool(name, module, below))
    if pools:
        raise InvalidInput("the model ends in a pooling; the last layer must be a Linear, whose outputs are logits.")
    if layers[-1].kernel is not None:
        raise InvalidInput("the last layer is a Conv2d; it must be a Linear, whose outputs are the logits.")
    return Path(shape, tuple(layers))


def _replace(layer: Synapses, activation: Activation) -> Synapses:
    return replace(layer, activation=activation, own_activation=True)


def _follows(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these kinds and computes as they do: a subclass may have a forward of its own."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def _leaves(module: nn.Module, path: str) -> Any:
    # lazy layers and old-style weight_norm have hooks too, and are refused in their own words
    if (module._forward_hooks or module._forward_pre_hooks) and not (_lazy(module) or hasattr(module, "weight_g")):
        raise InvalidInput(
            f"{f'layer {path!r}' if path else 'the model'} has a forward hook, which cannot be followed."
        )
    if _follows(module, nn.Sequential):
        for name, child in module._modules.items():
            if child is not None:
                yield from _leaves(child, f"{path}.{name}" if path else name)
    else:
        yield path, module


def _lazy(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.lazy.LazyModuleMixin) and bool(module.has_uninitialized_params())


def _input_shape(first: nn.Module, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is not None:
        return tuple(checks.integer("each of input_shape", n, least=1) for n in given)
    if isinstance(first, nn.Linear) and first.in_features:
        return (first.in_features,)
    raise InvalidInput("a model that begins with a convolution needs input_shape=(channels, height, width).")


def _synapses(name: str, module: nn.Module, below: tuple[int, ...], pools: tuple[Pool, ...], shared: int) -> Synapses:
    if _lazy(module):
        raise InvalidInput(f"layer {name!r} is lazy and has no weights yet; run the model once on a batch.")
    if hasattr(module, "parametrizations") or hasattr(module, "weight_g"):
        raise InvalidInput(f"layer {name!r} has a parametrized weight; remove the parametrization first.")
    weight, bias = module.weight, module.bias
    if weight.is_meta:
        raise InvalidInput(f"layer {name!r} is on the meta device and has no values; make it on a real device.")
    frozen = (not weight.requires_grad, bias is not None and not bias.requires_grad)
    shape = below
    for pool in pools:
        shape = pool.shape(shape)
    common: dict[str, Any] = {"below": below, "pools": pools, "shared": shared, "frozen": frozen, "module": module}
    identity = ACTIVATIONS["identity"]
    if isinstance(module, nn.Linear):
        n = int(torch.Size(shape).numel())
        if n != module.in_features:
            raise InvalidInput(f"layer {name!r} expects {module.in_features} inputs and would get {n}: {shape}.")
        m = module.out_features
        return Synapses(name, n, m, bias is not None, identity, True, above=(m,), **common)
    assert isinstance(module, nn.Conv2d)
    if module.groups != 1 or module.padding_mode != "zeros" or len(shape) != 3 or shape[0] != module.in_channels:
        raise InvalidInput(
            f"layer {name!r}: a Conv2d must have groups=1, padding_mode='zeros' and an input of "
            f"{module.in_channels} channels; got groups={module.groups}, {module.padding_mode!r} and shape {shape}."
        )
    k, s, d = (_pair(v) for v in (module.kernel_size, module.stride, module.dilation))
    p = _padding(name, module, k, d)
    size = ((shape[i + 1] + 2 * p[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i in range(2))
    n, m = shape[0] * k[0] * k[1], module.out_channels
    return Synapses(
        name, n, m, bias is not None, identity, True, above=(m, *size),
        kernel=k, stride=s, padding=p, dilation=d, **common,
    )  # fmt: skip


def _padding(name: str, module: nn.Conv2d, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if any(t % 2 for t in total):
            raise InvalidInput(f"layer {name!r}: padding='same' of an even kernel is lopsided; give a number.")
        return total[0] // 2, total[1] // 2
    return _pair(module.padding)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _pool(name: str, module: Any, below: tuple[int, ...]) -> Pool:
    if not _follows(module, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d):
        hint = {
            nn.Softmax: "; leave it out, feedback is written on logits",
            nn.LogSoftmax: "; leave it out, feedback is written on logits",
            nn.Dropout: "; leave it out",
            nn.BatchNorm1d: "; the genome's own normalization takes its place",
            nn.BatchNorm2d: "; the genome's own normalization takes its place",
        }.get(type(module), "")
        if isinstance(module, nn.Sequential | nn.Linear | nn.Conv2d):
            hint = "; it has a forward() of its own, which cannot be followed"
        raise InvalidInput(f"layer {name!r} is a {type(module).__name__}, supported are {SUPPORTED}{hint}.")
    if len(below) != 3:
        raise InvalidInput(f"layer {name!r} pools images, and its input has shape {below}.")
    if isinstance(module, nn.AdaptiveAvgPool2d):
        out = [n if o is None else o for o, n in zip(_loose_pair(module.output_size), below[1:], strict=True)]
        if any(n % o for n, o in zip(below[1:], out, strict=True)):
            raise InvalidInput(f"layer {name!r}: {below[1:]} cannot be divided into {tuple(out)} equal parts.")
        kernel = (below[1] // out[0], below[2] // out[1])
        return Pool("mean", kernel, kernel)
    if module.ceil_mode or _pair(getattr(module, "dilation", 1)) != (1, 1):
        raise InvalidInput(f"layer {name!r}: ceil_mode and dilation of a pooling are not supported.")
    kernel, padding = _pair(module.kernel_size), _pair(module.padding)
    stride = _pair(module.stride if module.stride is not None else module.kernel_size)
    if isinstance(module, nn.MaxPool2d):
        return Pool("max", kernel, stride, padding)
    if not module.count_include_pad or module.divisor_override is not None:
        raise InvalidInput(f"layer {name!r}: AvgPool2d must count its padding and have no divisor of its own.")
    return Pool("mean", kernel, stride, padding)


def _loose_pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if value is None or isinstance(value, int) else (value[0], value[1])
