"""Which axis of a layer's output counts its units: followed from what made it, not guessed from the number of axes.

A convolution puts its channels on axis 1, a linear map its features on the last one. What follows (activations,
normalizations, pooling, permutations, reshapes, sums of branches) moves that axis in a way that is known. Where it is
lost, the answer is None: better asked than guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from mlcollage.measure.grad_norms import call
from mlcollage.measure.layer_tap import Layers, hookable, layers_of


class UnitAxes(TorchFunctionMode):
    """A context in which the unit axis of every activation is followed through the functions that make it.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU())
    >>> with UnitAxes() as axes:
    ...     out = model(torch.ones(4, 2, 20))
    >>> axes.of(out)
    1
    """

    def __init__(self) -> None:
        super().__init__()
        self._axes = WeakTensorKeyDictionary()

    def of(self, acts: Tensor) -> int | None:
        """The axis of the units of a tensor made in this context; None if that is not known."""
        return self._axes.get(acts)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in (*_tensors(args), *_tensors(kwargs)) if self.of(t) is not None]
        before = [(self._axes[t], tuple(t.shape), t.stride()) for t in inputs]  # in-place functions change them
        out = func(*args, **kwargs)
        for made in _tensors(out):
            axis = _of_layer(func, made, args, kwargs)
            if axis is None and before and func not in _LOSES:
                found = {_moved(func, made, *known, args, kwargs) for known in before}
                found.discard(None)
                axis = found.pop() if len(found) == 1 else None
            if axis is not None:
                self._axes[made] = axis
            else:
                self._axes.pop(made, None)
        return out


def unit_axes(model: nn.Module, x: Any, layers: Layers = "*") -> dict[str, int | None]:
    """The unit axis of the output of each layer, from one forward pass.

    Parameters
    ----------
    model
        Any module; in evaluation mode if the pass must not change running statistics.
    x
        A batch of inputs: a tensor, a tuple of arguments or a dict of named ones. One example is enough.
    layers
        As for :class:`~mlcollage.measure.layer_tap.LayerTap`.

    Returns
    -------
    dict of str to int or None
        By path, for layers that the pass calls; None where the axis is not known and must be given. Of an output with
        several tensors it is that of the first.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3))
    >>> unit_axes(model, torch.ones(4, 2, 20))
    {'0': 1, '1': 1, '2': 1, '3': 1, '4': 1}
    """
    found: dict[str, int | None] = {}
    axes = UnitAxes()
    network = hookable(model, "unit_axes")

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            first = next(_tensors(output), None)
            if first is None:
                return
            axis = axes.of(first)
            if axis is None and (isinstance(module, _LAST) or first.ndim == 2):
                axis = first.ndim - 1
            # Functions that torch keeps to itself, such as fused encoders, are known by their module only.
            if axis is not None:
                axes._axes[first] = axis
            known = found.setdefault(name, axis)
            if known != axis:  # called several times, on different kinds of tensors
                found[name] = None

        return record

    wanted = layers_of(network, layers)
    # All modules tell what they know, the innermost first, since others build on it.
    names = {name: m for name, m in network.named_modules() if name in wanted or isinstance(m, _LAST)}
    handles = [m.register_forward_hook(hook(name)) for name, m in names.items()]
    try:
        with torch.no_grad(), axes:
            call(network, x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in wanted if name in found}


_LAST = (nn.Linear, nn.Embedding, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _of_layer(func: Callable, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The axis that a layer of weights puts its units on; None for other functions."""
    if func in _CONVOLUTIONS:  # without a dimension of examples there is one dimension less
        return 1 if out.ndim == int(func.__name__[-2]) + 2 else None
    if func in _CHANNELS:
        return 1 if out.ndim > 1 else None
    weight = kwargs.get("weight", kwargs.get("other", args[-1] if args else None))
    matrix = func in _PRODUCTS and isinstance(weight, nn.Parameter) and weight.ndim == 2
    return out.ndim - 1 if (func in _FEATURES or matrix) and out.ndim > 1 else None


def _moved(
    func: Callable,
    out: Tensor,
    axis: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> int | None:
    """Where ``axis`` of an input, of this shape and stride, is in the output."""
    size, new = shape[axis], tuple(out.shape)
    if func in _RESHAPES:  # the same size, and as much behind it: the same numbers
        behind = math.prod(shape[axis + 1 :])
        return _only(j for j, n in enumerate(new) if n == size and math.prod(new[j + 1 :]) == behind)
    if func in _TURNS:  # a view: the step from one unit to the next stays
        return _only(j for j, n in enumerate(new) if (n, out.stride(j)) == (size, stride[axis]))
    if func in _REDUCES:
        dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        gone = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims or range(len(shape)))}
        if axis in gone:
            return None
        return axis if len(new) == len(shape) else axis - sum(d < axis for d in gone)
    if func is Tensor.__getitem__ and len(new) < len(shape):  # some axes are gone
        return _only(j for j, n in enumerate(new) if (n, out.stride(j)) == (size, stride[axis]))
    # Elementwise, pooling, padding, joined or cut: the axes are the same ones.
    return axis if len(new) == len(shape) and (new == shape or func in _KEEPS) else None


def _only(places: Iterator[int]) -> int | None:
    found = list(places)
    return found[0] if len(found) == 1 else None


def _named(names: str, *homes: Any) -> set[Any]:
    return {getattr(home, name) for home in homes for name in names.split() if hasattr(home, name)}


_CONVOLUTIONS = _named("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", F, torch)
_CHANNELS = _named("batch_norm group_norm instance_norm", F, torch)
_FEATURES = _named("linear embedding bilinear", F, torch) | {torch.addmm}
_PRODUCTS = _named("matmul mm __matmul__", torch, Tensor)
# Not elementwise, though shapes may be the same: what comes out belongs to other axes.
_LOSES = _PRODUCTS | _named("__rmatmul__ bmm baddbmm einsum tensordot outer cdist", torch, Tensor)
_RESHAPES = _named("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel", torch, Tensor)
_TURNS = _named("permute transpose movedim moveaxis swapaxes swapdims t", torch, Tensor) | {
    vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT")
}
_REDUCES = _named("mean sum amax amin std var median logsumexp", torch, Tensor)
_KEEPS = _named(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate "
    "pad glu cat concat chunk split narrow expand repeat __getitem__",
    F,
    torch,
    Tensor,
)
