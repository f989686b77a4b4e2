"""Which axes of a layer's output count its examples and its units: found out, not guessed from the number of axes.

A convolution puts its channels on axis 1, a linear map its features on the last one. What follows (activations,
normalizations, pooling, permutations, reshapes, sums of branches) moves that axis in a way that is known. Where it is
lost, the answer is None: better asked than guessed. The examples are on the axis that is longer by one when the model
is run on three of them in place of two.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.measure._examples import moves_rows
from mlcollage.measure.grad_norms import arguments, graph_nodes
from mlcollage.measure.layer_tap import Layers, LayerTap, hookable, layers_of


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
    """The unit axis of the output of each layer, from one forward pass that leaves nothing behind.

    Parameters
    ----------
    model
        Any module, in any mode: running statistics and random numbers are put back.
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
    network = hookable(model, "unit_axes")
    calls: dict[str, set[int | None]] = {}
    for name, (shape, axis) in _trace(network, layers, *arguments(x))[0].items():
        if "[" not in name:
            calls.setdefault(name.split("#")[0], set()).add(1 if axis is None and len(shape) == 2 else axis)
    # Called several times, on different kinds of tensors, a layer has no one axis.
    names = [name for name in layers_of(network, layers) if name in calls]
    return {name: calls[name].pop() if len(calls[name]) == 1 else None for name in names}


class LayerUnits:
    """Outputs of a model's layers as (N, U, *positions), whatever the order of their axes.

    The axes are found at the first batch, by two passes over two and three examples that nothing else sees: hooks of
    others do not run, and buffers and random numbers are put back. Of layers that see windows of an example as rows of
    their own, as a Swin transformer's do, three more passes prove whose rows are whose: two examples change places,
    and a third comes in.

    Parameters
    ----------
    model, layers
        As for :class:`~mlcollage.measure.layer_tap.LayerTap`, whose names are used.
    unit_axis
        The axis of the units in the layers' own outputs, where it is known better: for all layers, or by name or
        pattern, such as ``{"*.act": -1}``.
    batch_dim
        Dimension of the examples in the model's inputs.

    Raises
    ------
    InvalidInput
        When called, for a layer whose rows do not belong to examples or whose units are not known and not given; in
        :meth:`look`, if no output of the model follows the examples.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU())
    >>> units = LayerUnits(model)
    >>> x = torch.ones(4, 2, 20)
    >>> units.look(x)
    >>> tuple(units("1", model(x)).shape)
    (4, 6, 18)
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = "*",
        *,
        unit_axis: int | Mapping[str, int] | None = None,
        batch_dim: int = 0,
    ) -> None:
        self.model, self.layers = hookable(model, "LayerUnits"), layers
        self.batch_dim = checks.integer("batch_dim", batch_dim, least=0)
        given = {"*": unit_axis} if isinstance(unit_axis, int) else dict(unit_axis or {})
        names = layers_of(self.model, layers)
        for pattern, axis in given.items():
            checks.integer("unit_axis", axis)
            if not any(named(pattern, name) for name in names):
                raise UnknownName(f"unit_axis names {pattern!r}; the layers are {', '.join(names)}.")
        self._given = given
        self._found: dict[str, tuple[int | None, int | None]] | None = None  # axes of examples and of units
        # axis of rows that belong to windows, the windows of an example, and whether examples come first
        self._windows: dict[str, tuple[int, int, bool]] = {}
        self._why = ""

    @torch.compiler.disable
    def look(self, *args: Any, **kwargs: Any) -> None:
        """Find the axes, once, from what the model is called with."""
        if self._found is not None:
            return
        tensor = next(_tensors((args, kwargs)), None)
        size = tensor.shape[self.batch_dim] if tensor is not None and tensor.ndim > self.batch_dim else 0
        self._found = {}
        if not size:
            self._why = "; its inputs are not tensors with examples"
            return
        try:
            two, three = (
                _trace(self.model, self.layers, *_first((args, kwargs), n, size, self.batch_dim)) for n in (2, 3)
            )
        except Exception as error:  # whatever a model does on a batch of another size
            self._why = f"; it does not run on two or three examples ({str(error).strip().splitlines()[0]})"
            return
        outputs = [_grown(a, b) for a, b in zip(two[1], three[1], strict=False) if a]
        if outputs and all(axis is None for axis in outputs):
            raise InvalidInput(
                f"no output of the model has as many rows as its inputs along dimension {self.batch_dim}, so the "
                "examples lie elsewhere: give batch_dim (1 for sequence-first models)."
            )
        cut = {n: _cut(shape, three[0][n][0]) for n, (shape, _) in two[0].items() if n in three[0]}
        if any(cut.values()) and size > 1:
            self._windows = _proved(self.model, self.layers, (args, kwargs), size, self.batch_dim, cut)
        for name, (shape, units) in two[0].items():
            examples = _grown(shape, three[0][name][0]) if name in three[0] else None
            if len(shape) == 2 and examples is not None:
                units = 1 - examples
            self._found[name] = (examples, None if units == examples else units)

    def __call__(self, name: str, h: Tensor, *, places: bool = False) -> Tensor | None:
        """The output of a layer as (N, U, *positions), a view; None of a second output of a layer without units.

        Of a layer that sees windows of its input as examples of their own, windows are the first positions. Their
        places are lost, so that it is refused if ``places`` matter, as they do to masks.
        """
        examples, units = (self._found or {}).get(name, (self.batch_dim if h.ndim == 2 and self._why else None, None))
        given = [axis for pattern, axis in self._given.items() if named(pattern, name)]
        if given:
            units = given[0] + h.ndim if given[0] < 0 else given[0]
        if name in self._windows:
            axis, count, ahead = self._windows[name]
            units = 1 - axis if units is None and h.ndim == 2 else units
            if units is not None and not (0 <= units < h.ndim and units != axis):
                raise InvalidInput(f"unit_axis={units} is no axis of units of layer {name!r}, {tuple(h.shape)}.")
            if places:
                raise InvalidInput(
                    f"layer {name!r} gives {tuple(h.shape)}, {count} windows of each example, whose places in the "
                    "example are not known, so no mask and no targets of positions fit it: leave the layer out."
                )
            if h.shape[axis] % count:
                raise InvalidInput(
                    f"layer {name!r} gave {count} windows of each example at first and now {tuple(h.shape)}: give "
                    "inputs of one size."
                )
            examples = axis if ahead else axis + 1
            units = units + 1 if units is not None and units > axis else units
            h = h.unflatten(axis, (-1, count) if ahead else (count, -1))
        elif given and units is not None:
            examples = self.batch_dim if examples is None and self._why else examples
            if not 0 <= units < h.ndim or units == examples:
                raise InvalidInput(
                    f"unit_axis={given[0]} is no axis of units of layer {name!r}, which gives {tuple(h.shape)} with "
                    f"the examples on axis {examples}."
                )
        elif units is None and examples is not None and h.ndim == 2:
            units = 1 - examples
        if "[" in name and (units is None or examples is None):
            return None
        if examples is None:
            raise InvalidInput(
                f"layer {name!r} gives {tuple(h.shape)}, of which no axis belongs to the examples of the batch"
                f"{self._why}: leave the layer out."
            )
        if units is None:
            raise InvalidInput(
                f"which axis of layer {name!r}, which gives {tuple(h.shape)}, counts its units cannot be told from the "
                f"model{self._why}: give it as unit_axis=1, or by name as unit_axis={{{name.split('#')[0]!r}: -1}}."
            )
        return h.movedim((examples, units), (0, 1))


def named(pattern: str, name: str) -> bool:
    """Is the layer ``name``, such as ``"block.relu#1"``, the one of this name or of this pattern?"""
    return pattern == name or fnmatchcase(name, pattern) or fnmatchcase(name.split("#")[0], pattern)


def _grown(two: tuple[int, ...], three: tuple[int, ...]) -> int | None:
    """The one axis that has 2 entries of two examples and 3 of three."""
    if len(two) != len(three):
        return None
    axes = [k for k, pair in enumerate(zip(two, three, strict=True)) if pair[0] != pair[1]]
    return axes[0] if len(axes) == 1 and (two[axes[0]], three[axes[0]]) == (2, 3) else None


def _cut(two: tuple[int, ...], three: tuple[int, ...]) -> tuple[int, int] | None:
    """The one axis that has 2n rows of two examples and 3n of three, n > 1, and n."""
    axes = [k for k, pair in enumerate(zip(two, three, strict=False)) if pair[0] != pair[1]]
    if len(two) != len(three) or len(axes) != 1:
        return None
    count, rest = divmod(two[axes[0]], 2)
    return (axes[0], count) if rest == 0 and count > 1 and three[axes[0]] == 3 * count else None


def _proved(
    network: nn.Module, layers: Layers, x: Any, size: int, dim: int, cut: Mapping[str, tuple[int, int] | None]
) -> dict[str, tuple[int, int, bool]]:
    """Axis of rows, rows of each example, and whether examples come first, where passes prove it.

    Two examples that change places must change all of their rows and nothing else, and a third must change none of
    them. In evaluation mode, since noise and statistics of the batch would hide it.
    """
    passes: list[dict[str, Tensor]] = []
    with _evaluation(network):
        for order in ((0, 1), (1, 0), (0, 1, -1)):
            kept: dict[str, Tensor] = {}
            with (
                _apart(network),
                torch.enable_grad(),
                LayerTap(network, layers, consume=kept.__setitem__, detach=False),
            ):
                args, kwargs = pytree.tree_map(_followed, _first(x, len(order), size, dim, order))
                network(*args, **kwargs)
            passes.append({name: kept[name] for name, found in cut.items() if found is not None and name in kept})
    # rows that the data choose, as h[mask] does, may belong otherwise in the next batch
    still = {name for name, h in passes[0].items() if h.requires_grad and not moves_rows(graph_nodes([h]))}
    passes = [{name: h.detach() for name, h in kept.items() if name in still} for kept in passes]
    proved: dict[str, tuple[int, int, bool]] = {}
    for name, plain in passes[0].items():
        axis, count = cut[name] or (0, 0)
        fits = []
        for ahead in (True, False):
            # the examples in front: (2, n, ...), (2, n, ...) and (3, n, ...)
            first, swapped, more = (
                h.unflatten(axis, (-1, count) if ahead else (count, -1)).movedim(axis if ahead else axis + 1, 0)
                for h in (plain, passes[1][name], passes[2][name])
            )
            same = _near(first.flip(0), swapped) and _near(first, more[:2]) and not _near(first, swapped)
            fits += [ahead] * same
        if len(fits) == 1:
            proved[name] = (axis, count, fits[0])
    return proved


def _followed(value: Any) -> Any:
    """Floating-point inputs with a gradient, so that a graph is recorded for a frozen model too."""
    grows = isinstance(value, Tensor) and value.is_floating_point()
    # no leaf, since what is looked up in leaves are tables of parameters
    return value.detach().requires_grad_().clone() if grows else value


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether tensors agree but for rounding, which depends on the size of a batch."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()) if a.is_floating_point() else 0)


@contextmanager
def _evaluation(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode is put back."""
    modes = [(m, m.training) for m in network.modules()]
    try:
        network.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _first(x: Any, count: int, size: int, dim: int, order: Sequence[int] | None = None) -> Any:
    """The first ``count`` of ``size`` examples, repeated if there are fewer; or those in this order."""
    if isinstance(x, Mapping):
        return {name: _first(v, count, size, dim, order) for name, v in x.items()}
    if isinstance(x, tuple | list):
        return tuple(_first(v, count, size, dim, order) for v in x)
    if isinstance(x, Tensor) and x.ndim > dim and x.shape[dim] == size:
        return x.index_select(dim, torch.as_tensor(order or range(count), device=x.device) % size)
    return x


_Shapes = dict[str, tuple[tuple[int, ...], int | None]]


def _trace(
    network: nn.Module, layers: Layers, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[_Shapes, list[tuple[int, ...]]]:
    """Shape and unit axis of what each call of each layer gives, and the shapes of the model's outputs."""
    found: _Shapes = {}
    axes = UnitAxes()

    def mark(module: nn.Module, args: Any, output: Any) -> None:
        # Functions that torch keeps to itself, such as fused encoders, are known by their module only.
        for i, made in enumerate(_tensors(output)):
            if i == 0 or isinstance(module, nn.RNNBase):
                axes._axes[made] = made.ndim - 1

    def record(name: str, h: Tensor) -> None:
        found[name] = (tuple(h.shape), axes.of(h))

    with _apart(network):
        # The innermost module tells first what it knows, since others build on it.
        handles = [m.register_forward_hook(mark) for m in network.modules() if isinstance(m, _LAST)]
        try:
            with LayerTap(network, layers, consume=record), axes:
                output = network(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return found, [tuple(t.shape) for t in _tensors(output)]


@contextmanager
def _apart(network: nn.Module) -> Iterator[None]:
    """Passes in it leave nothing behind: hooks do not run, and buffers and random numbers are put back."""
    away: dict[str, Callable[[], Any]] = {
        **dict.fromkeys(("_forward_hooks", "_forward_pre_hooks"), OrderedDict),
        "_compiled_call_impl": lambda: None,
    }
    modules = list(network.modules())
    kept = [{name: getattr(m, name) for name in away} for m in modules]
    buffers = [(b, b.detach().clone()) for b in network.buffers()]
    devices = sorted({p.device.index or 0 for p in network.parameters() if p.device.type == "cuda"})
    try:
        for module in modules:
            for name, empty in away.items():
                setattr(module, name, empty())
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, before in zip(modules, kept, strict=True):
            for name, value in before.items():
                setattr(module, name, value)
        with torch.no_grad():
            for buffer, old in buffers:
                if not torch.equal(buffer, old):  # else graphs that hold it stay valid
                    buffer.copy_(old)


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
