"""What each operation demands of degrees: the algebra by which a graph is walked.

One function per kind of operation, looked up by the operator's name. An operator without a rule is opaque: its inputs
must not change at all (degree zero), which can lose a symmetry but never invents one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mlcollage.papers.neural_mechanics._degrees import (
    Degree,
    Ids,
    Part,
    System,
    aligned,
    compress,
    merge,
    reshape_ids,
)

__all__ = ["DECOMPOSE_NOT", "RULES", "VALUES_UNSEEN", "Value", "Walk"]

SMALL_CONSTANT = 1e-2  # a positive constant below this, added to a norm, is an epsilon
LARGEST_LABELS = 20_000_000


@dataclass
class Value:
    """A tensor in the walk: its shape, its degree, and the parameter that it is a view of."""

    shape: tuple[int, ...]
    degree: Degree = ()
    root: str | None = None
    live: bool = False  # depends on parameters or inputs; a constant has degree zero without saying so


@dataclass
class Walk:
    """State of one walk over a graph."""

    system: System = field(default_factory=System)
    used: set[str] = field(default_factory=set)
    opaque: dict[str, str] = field(default_factory=dict)
    epsilons: list[tuple[str, Ids]] = field(default_factory=list)
    frozen_norms: list[str] = field(default_factory=list)
    site: str = ""
    operator: str = ""

    def eps(self, degree: Degree) -> None:
        """An epsilon at this site breaks the laws of these unknowns a little."""
        self.epsilons += [(self.site, part.ids) for part in degree]

    def diagonal(self, degree: Degree) -> None:
        """Only a diagonal matrix commutes with the operation at this site."""
        self.system.mark(degree, "diagonal")

    def fix(self, *values: Any) -> None:
        """The values must not change under the action."""
        for value in values:
            if isinstance(value, Value):
                self.system.vanish(value.degree, self.site)
            elif isinstance(value, list | tuple):
                self.fix(*value)

    def uniform(self, value: Value, axes: Sequence[int]) -> Degree:
        """The degree must not differ along `axes`; returned with size 1 there."""
        rank = len(value.shape)
        axes = [axis % rank for axis in axes] if rank else []
        touched = [part for part in value.degree if part.axes & set(axes)]
        if not touched:
            return value.degree
        firsts = [Part(part.coef, _first(part.ids, axes)) for part in touched]
        self.system.equate([*touched, *(Part(-part.coef, part.ids) for part in firsts)], self.site)
        self.diagonal(tuple(touched))
        return merge([*(part for part in value.degree if not part.axes & set(axes)), *firsts])

    def match(self, values: Sequence[Value], rank: int) -> Degree:
        """All addends have one degree, entry by entry after broadcasting; returned."""
        live = [value for value in values if value.live]
        if len(live) < len(values):  # a constant has degree zero
            self.fix(*live)
            return ()
        degrees = [aligned(value.degree, rank) for value in live]
        best = min(degrees, key=lambda degree: sum(part.ids.size for part in degree))
        for degree in degrees:
            if degree is not best:
                self.system.equate([*degree, *(Part(-part.coef, part.ids) for part in best)], self.site)
        return best


def _first(ids: Ids, axes: Sequence[int]) -> Ids:
    for axis in axes:
        ids = ids.take([0], axis)
    return ids


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def keep(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return keep


# --- entry by entry -------------------------------------------------------------------------------------------------


@rule("neg", "clone", "_to_copy", "to", "type_as", "alias", "detach", "contiguous", "lift_fresh_copy", "positive")
def _same(walk: Walk, out: Any, x: Value, *args: Any, **kwargs: Any) -> Any:
    return Value(out, x.degree, x.root, x.live)


@rule("relu", "leaky_relu", "abs", "tril", "triu", "threshold_zero")
def _homogeneous(walk: Walk, out: Any, x: Value, *args: Any, **kwargs: Any) -> Any:
    walk.diagonal(x.degree)
    return Value(out, x.degree, None, x.live)


@rule("dropout", "native_dropout", "feature_dropout")
def _dropout(walk: Walk, out: Any, x: Value, p: float, train: bool, *args: Any) -> Any:
    if train and p > 0:
        walk.diagonal(x.degree)
    result = Value(x.shape, x.degree, None, x.live)
    return [result, Value(x.shape)] if isinstance(out, list) else result


@rule("prelu", "_prelu_kernel")
def _prelu(walk: Walk, out: Any, x: Value, weight: Value, *args: Any) -> Any:
    walk.fix(weight)
    walk.diagonal(x.degree)
    return Value(out, x.degree, None, x.live)


@rule("clamp", "clamp_min", "hardtanh", "clamp_max")
def _clamp(walk: Walk, out: Any, x: Value, low: Any = None, high: Any = None, **kwargs: Any) -> Any:
    if walk.operator == "clamp_max":
        low, high = None, low
    if low in (None, 0) and high in (None, 0):
        return _homogeneous(walk, out, x)
    if _is_number(low) and 0 < low <= SMALL_CONSTANT and high is None:  # a guard such as norm.clamp_min(1e-12)
        walk.eps(x.degree)
        return _homogeneous(walk, out, x)
    return _opaque(walk, out, x)


@rule("add", "sub", "rsub")
def _add(walk: Walk, out: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if not isinstance(a, Value):
        a, b = b, a
    if _is_number(b):
        if b == 0:
            return _same(walk, out, a)
        if abs(b) <= SMALL_CONSTANT and a.degree:
            walk.eps(a.degree)
            return _same(walk, out, a)
        walk.fix(a)
        return Value(out, (), None, a.live)
    if not (a.live or b.live):
        return Value(out)
    return Value(out, walk.match([a, b], len(out)), None, True)


@rule("maximum", "minimum")
def _extremum(walk: Walk, out: Any, a: Value, b: Value) -> Any:
    degree = walk.match([a, b], len(out)) if a.live or b.live else ()
    walk.diagonal(degree)
    return Value(out, degree, None, a.live or b.live)


@rule("where")
def _where(walk: Walk, out: Any, condition: Value, a: Any = None, b: Any = None) -> Any:
    branches = [value for value in (a, b) if isinstance(value, Value)]
    if len(branches) < 2 and any(_is_number(v) and v != 0 and not math.isinf(v) for v in (a, b)):
        walk.fix(*branches)
        return Value(out, (), None, True)
    live = [value for value in branches if value.live]
    if not live:
        return Value(out)
    degree = walk.match(branches, len(out))
    walk.diagonal(degree)
    return Value(out, degree, None, True)


@rule("masked_fill")
def _masked_fill(walk: Walk, out: Any, x: Value, mask: Value, value: Any) -> Any:
    if not _is_number(value) or (value != 0 and not math.isinf(value)):
        walk.fix(x, value)
    walk.diagonal(x.degree)
    return Value(out, x.degree, None, x.live)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scaled(degree: Degree, factor: float) -> Degree:
    return tuple(Part(part.coef * factor, part.ids) for part in degree)


@rule("mul", "div")
def _mul(walk: Walk, out: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    sign = -1.0 if walk.operator == "div" else 1.0
    if sign < 0 and kwargs.get("rounding_mode") is not None:
        return _opaque(walk, out, a, b)
    if not isinstance(a, Value):
        return Value(out, _scaled(b.degree, sign), None, b.live)
    if not isinstance(b, Value):
        return Value(out, a.degree, a.root, a.live)
    rank = len(out)
    for x, other in ((a, b), (b, a)):
        if _acts_along(x, other, rank):
            walk.diagonal(x.degree)
    parts = [*aligned(a.degree, rank), *_scaled(aligned(b.degree, rank), sign)]
    return Value(out, merge(parts), None, a.live or b.live)


def _acts_along(x: Value, other: Value, rank: int) -> bool:
    """Whether `other` has several entries along an axis where the degree of `x` differs."""
    pad = rank - len(other.shape)
    return any(axis >= pad and other.shape[axis - pad] > 1 for part in aligned(x.degree, rank) for axis in part.axes)


@rule("pow", "square", "sqrt", "rsqrt", "reciprocal")
def _power(walk: Walk, out: Any, x: Any, exponent: Any = None, **kwargs: Any) -> Any:
    fixed = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
    exponent = fixed.get(walk.operator, exponent)
    if not isinstance(x, Value) or not _is_number(exponent):
        return _opaque(walk, out, x, exponent)
    walk.diagonal(x.degree)
    return Value(out, _scaled(x.degree, exponent), None, x.live)


@rule("sign", "heaviside")
def _sign(walk: Walk, out: Any, x: Value, *args: Any) -> Any:
    walk.diagonal(x.degree)
    return Value(out, (), None, x.live)


@rule("gt", "ge", "lt", "le", "eq", "ne")
def _compare(walk: Walk, out: Any, x: Any, y: Any) -> Any:
    if isinstance(x, Value) and isinstance(y, Value):
        if x.degree or y.degree:
            walk.diagonal(walk.match([x, y], len(out)))
    elif isinstance(x, Value) and y == 0:
        walk.diagonal(x.degree)
    else:
        walk.fix(x, y)
    return Value(out)


def _opaque(walk: Walk, out: Any, *args: Any, **kwargs: Any) -> Any:
    """The inputs must not change."""
    walk.fix(args, *kwargs.values())
    live = any(isinstance(value, Value) and value.live for value in _flat([*args, *kwargs.values()]))
    return [Value(shape, live=live) for shape in out] if isinstance(out, list) else Value(out, live=live)


def _flat(values: Sequence[Any]) -> list[Any]:
    return [x for value in values for x in (_flat(value) if isinstance(value, list | tuple) else [value])]


def _shape_only(walk: Walk, out: Any, *args: Any, **kwargs: Any) -> Any:
    """The operator looks at the shape or type of its input, not at its values."""
    return Value(out) if not isinstance(out, list) else [Value(shape) for shape in out]


# fmt: off
VALUES_UNSEEN = frozenset([
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_empty_strided", "sym_size", "_assert_tensor_metadata", "_assert_scalar",
])
RULES.update(dict.fromkeys(VALUES_UNSEEN, _shape_only))
_SEEN = [
    "gelu", "silu", "sigmoid", "tanh", "softplus", "elu", "selu", "celu", "mish", "hardswish", "hardsigmoid",
    "relu6", "exp", "expm1", "log", "log1p", "log2", "sin", "cos", "erf", "log_sigmoid_forward", "logsigmoid",
    "softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "logsumexp", "atan", "sinh", "cosh",
    "nll_loss_forward", "nll_loss2d_forward", "mse_loss", "huber_loss", "smooth_l1_loss", "binary_cross_entropy",
    "_native_batch_norm_eval", "floor", "ceil", "round", "logical_not", "logical_and", "logical_or", "bitwise_not",
    "bitwise_and", "bitwise_or", "arange",
    "full", "zeros", "ones", "empty", "scalar_tensor",
    "fill", "bernoulli", "isinf", "isnan", "argmax", "argmin", "sort", "topk", "one_hot",
    "linspace", "rand", "randn", "remainder", "fmod", "floor_divide",
    "l1_loss", "kl_div", "binary_cross_entropy_with_logits", "hardshrink", "softshrink", "copysign", "polar",
]
# fmt: on
RULES.update(dict.fromkeys(_SEEN, _opaque))


# --- shape only -----------------------------------------------------------------------------------------------------


def _expanded(value: Value, ids: Ids) -> torch.Tensor:
    return torch.from_numpy(ids.copy()).expand(value.shape)


def _by_running(walk: Walk, out: Any, target: Any, x: Value, args: Any, kwargs: Any) -> Any:
    """Run the operator on the unknowns themselves; broadcast axes stay stride-0 views where it is a view."""
    shapes = out if isinstance(out, list) else [out]
    columns: list[list[Part]] = [[] for _ in shapes]
    if math.prod(x.shape) > LARGEST_LABELS and not all(part.ids.size == 1 for part in x.degree):
        return _opaque(walk, out, x)
    for part in x.degree:
        results = target(_expanded(x, part.ids), *args, **kwargs)
        for column, result in zip(columns, results if isinstance(out, list) else [results], strict=True):
            column.append(Part(part.coef, compress(result.numpy())))
    values = [Value(shape, tuple(parts), x.root, x.live) for shape, parts in zip(shapes, columns, strict=True)]
    return values if isinstance(out, list) else values[0]


# fmt: off
VIEWS = frozenset([
    "squeeze", "unsqueeze", "transpose", "permute", "t", "expand", "select", "slice", "narrow", "split",
    "split_with_sizes", "unbind", "chunk", "flip", "roll", "repeat", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "swapaxes", "movedim", "diagonal", "unfold", "repeat_interleave", "native_channel_shuffle",
])
# fmt: on


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten")
def _reshape(walk: Walk, out: Any, x: Value, *args: Any, **kwargs: Any) -> Any:
    degree = tuple(Part(part.coef, reshape_ids(part.ids, x.shape, out)) for part in x.degree)
    return Value(out, degree, x.root, x.live)


@rule("cat", "stack")
def _cat(walk: Walk, out: Any, values: Sequence[Value], dim: int = 0) -> Any:
    values = [value for value in values if math.prod(value.shape)]
    axis = dim % len(out)
    if walk.operator == "stack":
        values = [Value((*v.shape[:axis], 1, *v.shape[axis:]), _stacked(v.degree, axis), None, v.live) for v in values]
    pieces = [walk_sum(walk, value) for value in values]
    shape = [max(ids.shape[k] for ids in pieces) for k in range(len(out))]
    sizes = [value.shape[axis] for value in values]
    joined = np.concatenate(
        [
            np.broadcast_to(ids, [size if k == axis else shape[k] for k in range(len(out))])
            for ids, size in zip(pieces, sizes, strict=True)
        ],
        axis,
    )
    live = any(value.live for value in values)
    return Value(out, merge([Part(1.0, compress(joined))]), None, live)


def _stacked(degree: Degree, axis: int) -> Degree:
    return tuple(Part(part.coef, np.expand_dims(part.ids, axis)) for part in degree)


def walk_sum(walk: Walk, value: Value) -> Ids:
    """One array of unknowns for a degree that is a sum of parts (new unknowns where it is one)."""
    if not value.degree:
        return np.zeros((1,) * len(value.shape), dtype=np.int64)
    if len(value.degree) == 1 and value.degree[0].coef == 1.0:
        return value.degree[0].ids
    shape = np.broadcast_shapes(*(part.ids.shape for part in value.degree))
    if math.prod(shape) > LARGEST_LABELS:
        walk.fix(value)
        return np.zeros((1,) * len(value.shape), dtype=np.int64)
    ids = walk.system.fresh(shape)
    walk.system.equate([*value.degree, Part(-1.0, ids)], walk.site)
    return ids


@rule("constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d")
def _pad(walk: Walk, out: Any, x: Value, widths: Sequence[int], value: Any = 0, *args: Any) -> Any:
    if walk.operator in ("constant_pad_nd", "pad") and value not in (0, None, 0.0):
        return _opaque(walk, out, x)
    rank = len(out)
    padded = {rank - 1 - k // 2: (widths[k], widths[k + 1]) for k in range(0, len(widths), 2)}
    degree = []
    for part in x.degree:
        ids = part.ids
        for axis, (before, after) in padded.items():
            if ids.shape[axis] > 1:  # a zero has any degree: new unknowns
                shape = list(ids.shape)
                new = [walk.system.fresh([*shape[:axis], width, *shape[axis + 1 :]]) for width in (before, after)]
                ids = np.concatenate([new[0], ids, new[1]], axis)
        degree.append(Part(part.coef, ids))
    return Value(out, tuple(degree), None, x.live)


@rule("index_select")
def _index_select(walk: Walk, out: Any, x: Value, dim: int, index: Value) -> Any:
    return Value(out, walk.uniform(x, [dim]), None, x.live)


@rule("gather")
def _gather(walk: Walk, out: Any, x: Value, dim: int, index: Value, **kwargs: Any) -> Any:
    return Value(out, walk.uniform(x, range(len(x.shape))), None, x.live)


@rule("index")
def _index(walk: Walk, out: Any, x: Value, indices: Sequence[Any]) -> Any:
    places = [axis for axis, index in enumerate(indices) if index is not None]
    degree = walk.uniform(x, places)
    if len(places) != 1 or not isinstance(indices[places[0]], Value):
        degree = walk.uniform(Value(x.shape, degree), range(len(x.shape)))
        return Value(out, tuple(Part(p.coef, p.ids.reshape((1,) * len(out))) for p in degree), None, x.live)
    axis, new = places[0], len(indices[places[0]].shape)
    parts = tuple(
        Part(p.coef, p.ids.reshape((*p.ids.shape[:axis], *(1,) * new, *p.ids.shape[axis + 1 :]))) for p in degree
    )
    return Value(out, parts, None, x.live)


@rule("view_as_complex")
def _to_complex(walk: Walk, out: Any, x: Value) -> Any:
    degree = walk.uniform(x, [-1])
    return Value(out, tuple(Part(p.coef, p.ids[..., 0]) for p in degree), None, x.live)


@rule("view_as_real")
def _to_real(walk: Walk, out: Any, x: Value) -> Any:
    return Value(out, tuple(Part(p.coef, p.ids[..., None]) for p in x.degree), None, x.live)


# --- sums over axes -------------------------------------------------------------------------------------------------


def _reduced(walk: Walk, out: Any, x: Value, dims: Any, keepdim: bool) -> Value:
    rank = len(x.shape)
    axes = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    axes = [axis % rank for axis in axes] if rank else []
    degree = walk.uniform(x, axes)
    if not keepdim:
        degree = tuple(Part(p.coef, p.ids.squeeze(tuple(axes)) if axes else p.ids) for p in degree)
    return Value(out, degree, None, x.live)


@rule("sum", "mean", "amax", "amin", "nansum")
def _sum(walk: Walk, out: Any, x: Value, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    return _reduced(walk, out, x, dims, keepdim)


@rule("max", "min", "median")
def _max(walk: Walk, out: Any, x: Value, dim: Any = None, keepdim: bool = False) -> Any:
    if isinstance(dim, Value):
        return _extremum(walk, out, x, dim)
    first = _reduced(walk, out[0] if isinstance(out, list) else out, x, dim, keepdim)
    return [first, Value(out[1])] if isinstance(out, list) else first


@rule("var", "std", "var_mean", "std_mean")
def _var(walk: Walk, out: Any, x: Value, dims: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    shapes = out if isinstance(out, list) else [out]
    mean = _reduced(walk, shapes[-1], x, dims, keepdim)
    power = 2.0 if walk.operator.startswith("var") else 1.0
    spread = Value(shapes[0], _scaled(mean.degree, power), None, x.live)
    return [spread, mean] if isinstance(out, list) else spread


@rule("linalg_vector_norm", "norm")
def _norm(walk: Walk, out: Any, x: Value, order: Any = 2, dims: Any = None, keepdim: bool = False, **kw: Any) -> Any:
    return _reduced(walk, out, x, dims, keepdim)


@rule("cumsum")
def _cumsum(walk: Walk, out: Any, x: Value, dim: int, **kwargs: Any) -> Any:
    return Value(out, walk.uniform(x, [dim]), None, x.live)


def _pool(spatial: int) -> Rule:
    def run(walk: Walk, out: Any, x: Value, *args: Any, **kwargs: Any) -> Any:
        degree = walk.uniform(x, range(len(x.shape) - spatial, len(x.shape)))
        if "max" in walk.operator:
            walk.diagonal(degree)
        if isinstance(out, list):
            return [Value(out[0], degree, None, x.live), *(Value(shape) for shape in out[1:])]
        return Value(out, degree, None, x.live)

    return run


for _k in (1, 2, 3):
    for _name in (
        f"max_pool{_k}d",
        f"avg_pool{_k}d",
        f"adaptive_avg_pool{_k}d",
        f"_adaptive_avg_pool{_k}d",
        f"adaptive_max_pool{_k}d",
        f"max_pool{_k}d_with_indices",
        f"upsample_nearest{_k}d",
        f"lp_pool{_k}d",
    ):
        RULES[_name] = _pool(_k)
for _name, _k in (("upsample_bilinear2d", 2), ("upsample_bicubic2d", 2), ("upsample_linear1d", 1)):
    RULES[_name] = _pool(_k)


def resolve(name: str) -> Rule | None:
    """The rule of an operator by its name without namespace, in-place underscore or overload."""
    return RULES.get(name) or (RULES.get(name[:-1]) if name.endswith("_") else None)


def apply_rule(walk: Walk, target: Any, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Outputs of one operator for the given inputs; opaque where there is no rule."""
    name = target._schema.name.split("::")[-1]
    walk.operator = name.rstrip("_") if name not in RULES else name
    if name in VIEWS:
        if isinstance(args[0], Value):
            return _by_running(walk, out, target, args[0], args[1:], kwargs)
        return _opaque(walk, out, *args)
    found = resolve(name)
    live = any(isinstance(value, Value) and value.degree for value in _flat([*args, *kwargs.values()]))
    if found is None and live:
        walk.opaque.setdefault(name, walk.site)
    return (found or _opaque)(walk, out, *args, **kwargs)


# fmt: off
DECOMPOSE_NOT = frozenset([
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "batch_norm", "instance_norm", "layer_norm", "rms_norm", "group_norm", "scaled_dot_product_attention",
    "softmax", "log_softmax", "dropout", "matmul", "embedding", "max_pool1d", "max_pool2d", "max_pool3d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "pixel_shuffle", "lstm", "gru", "rnn_tanh", "rnn_relu", "silu",
    "gelu", "addmm", "mm", "bmm", "linalg_vector_norm", "prelu",
])
# fmt: on
