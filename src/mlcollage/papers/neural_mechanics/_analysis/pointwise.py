"""Rules of the operations that treat each entry alone, move entries about, or reduce over axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .degrees import Degree, Ids, Part, aligned, changed, compress, merge, reshape_ids, scaled
from .walk import RULES, Value, Walk, opaque, rule

SMALL_CONSTANT = 1e-2  # a positive constant below this, added to a norm, is an epsilon
LARGEST_LABELS = 20_000_000


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _blind(value: Any) -> bool:
    """Whether a filled-in number has any degree: zero, or an infinity that a softmax does not see."""
    return _is_number(value) and (value == 0 or math.isinf(value))


# --- entry by entry -------------------------------------------------------------------------------------------------


@rule("neg", "clone", "_to_copy", "to", "type_as", "alias", "detach", "contiguous", "lift_fresh_copy", "positive")
def _same(walk: Walk, x: Value, *args: Any, **kwargs: Any) -> Value:
    return walk.view(x)


@rule("relu", "leaky_relu", "abs", "tril", "triu", "threshold_zero")
def _homogeneous(walk: Walk, x: Value, *args: Any, **kwargs: Any) -> Degree:
    return walk.diagonal(x.degree)


@rule("dropout", "native_dropout", "feature_dropout")
def _dropout(walk: Walk, x: Value, p: float, train: bool, *args: Any) -> Degree:
    return walk.diagonal(x.degree) if train and p > 0 else x.degree


@rule("prelu", "_prelu_kernel")
def _prelu(walk: Walk, x: Value, weight: Value, *args: Any) -> Degree:
    walk.fix(weight)
    return walk.diagonal(x.degree)


@rule("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(walk: Walk, x: Value, low: Any = None, high: Any = None, **kwargs: Any) -> Degree:
    # Cutting off at 0 is homogeneous, any other limit is not.
    if walk.operator == "clamp_max":
        low, high = None, low
    guard = _is_number(low) and 0 < low <= SMALL_CONSTANT and high is None  # such as norm.clamp_min(1e-12)
    if guard:
        walk.eps(x.degree)
    elif walk.operator == "hardtanh" or low not in (None, 0) or high not in (None, 0):
        return opaque(walk, x)
    return walk.diagonal(x.degree)


@rule("add", "sub", "rsub")
def _add(walk: Walk, a: Any, b: Any, **kwargs: Any) -> Any:
    if not isinstance(a, Value):  # a number minus a tensor
        a, b = b, a
    if isinstance(b, Value):
        return walk.match(a, b)
    if not _is_number(b) or abs(b) > SMALL_CONSTANT:
        return opaque(walk, a)
    if b != 0:
        walk.eps(a.degree)
    return walk.view(a)


@rule("maximum", "minimum")
def _extremum(walk: Walk, a: Value, b: Value) -> Degree:
    return walk.diagonal(walk.match(a, b))


@rule("where")
def _where(walk: Walk, condition: Value, a: Any = None, b: Any = None) -> Degree:
    branches = [value for value in (a, b) if isinstance(value, Value)]
    if any(_is_number(value) and not _blind(value) for value in (a, b)):
        return opaque(walk, *branches)
    return walk.diagonal(walk.match(*branches))


@rule("masked_fill")
def _masked_fill(walk: Walk, x: Value, mask: Value, value: Any) -> Degree:
    if not _blind(value):
        walk.fix(x, value)
    return walk.diagonal(x.degree)


@rule("mul", "div")
def _mul(walk: Walk, a: Any, b: Any, **kwargs: Any) -> Any:
    if kwargs.get("rounding_mode") is not None:
        return opaque(walk, a, b)
    sign = -1.0 if walk.operator == "div" else 1.0
    if not isinstance(a, Value):
        return scaled(b.degree, sign)
    if not isinstance(b, Value):
        return walk.view(a)
    rank = len(walk.shape)
    # A factor with several entries acts as a diagonal matrix on the other factor.
    for x, other in ((a, b), (b, a)):
        if _acts_along(x, other, rank):
            walk.diagonal(x.degree)
    return merge([*aligned(a.degree, rank), *scaled(aligned(b.degree, rank), sign)])


def _acts_along(x: Value, other: Value, rank: int) -> bool:
    """Whether `other` has several entries along an axis where the degree of `x` differs."""
    pad = rank - len(other.shape)
    return any(axis >= pad and other.shape[axis - pad] > 1 for part in aligned(x.degree, rank) for axis in part.axes)


@rule("pow", "square", "sqrt", "rsqrt", "reciprocal")
def _power(walk: Walk, x: Any, exponent: Any = None, **kwargs: Any) -> Degree:
    exponent = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}.get(walk.operator, exponent)
    if not isinstance(x, Value) or not _is_number(exponent):
        return opaque(walk, x, exponent)
    return scaled(walk.diagonal(x.degree), exponent)


@rule("sign", "heaviside")
def _sign(walk: Walk, x: Value, *args: Any) -> Degree:
    walk.diagonal(x.degree)
    return ()


@rule("gt", "ge", "lt", "le", "eq", "ne")
def _compare(walk: Walk, x: Any, y: Any) -> Degree:
    # The outcome must not change: both sides grow alike, or one side is compared with 0.
    if isinstance(x, Value) and isinstance(y, Value):
        walk.diagonal(walk.match(x, y))
    elif isinstance(x, Value) and y == 0:
        walk.diagonal(x.degree)
    else:
        walk.fix(x, y)
    return ()


# Known operators whose inputs must not change; those that are not listed are also reported.
_SEEN = [
    "gelu", "silu", "sigmoid", "tanh", "softplus", "elu", "selu", "celu", "mish", "hardswish", "hardsigmoid",
    "relu6", "exp", "expm1", "log", "log1p", "log2", "sin", "cos", "erf", "log_sigmoid_forward", "logsigmoid",
    "softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "logsumexp", "atan", "sinh", "cosh",
    "nll_loss_forward", "nll_loss2d_forward", "mse_loss", "huber_loss", "smooth_l1_loss", "binary_cross_entropy",
    "_native_batch_norm_eval", "floor", "ceil", "round", "logical_not", "logical_and", "logical_or", "bitwise_not",
    "bitwise_and", "bitwise_or", "arange", "full", "zeros", "ones", "empty", "scalar_tensor", "fill", "bernoulli",
    "isinf", "isnan", "argmax", "argmin", "sort", "topk", "one_hot", "linspace", "rand", "randn", "remainder", "fmod",
    "floor_divide", "l1_loss", "kl_div", "binary_cross_entropy_with_logits", "hardshrink", "softshrink", "copysign",
    "polar",
]  # fmt: skip
RULES.update(dict.fromkeys(_SEEN, opaque))


# --- entries moved about --------------------------------------------------------------------------------------------


@rule(
    "squeeze", "unsqueeze", "transpose", "permute", "t", "expand", "select", "slice", "narrow", "split",
    "split_with_sizes", "unbind", "chunk", "flip", "roll", "repeat", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "swapaxes", "movedim", "diagonal", "unfold", "repeat_interleave", "native_channel_shuffle",
)  # fmt: skip
def _by_running(walk: Walk, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the operator on the unknowns themselves; broadcast axes stay stride-0 views where it is a view."""
    if not isinstance(x, Value):
        return opaque(walk, x, *args)
    # Operators that are no views write all entries out, which a large tensor cannot afford.
    if math.prod(x.shape) > LARGEST_LABELS and not all(part.ids.size == 1 for part in x.degree):
        return opaque(walk, x)
    several = isinstance(walk.shape, list)
    shapes = walk.shape if several else [walk.shape]
    columns: list[list[Part]] = [[] for _ in shapes]  # by result, its parts
    for part in x.degree:
        results = walk.target(torch.from_numpy(part.ids.copy()).expand(x.shape), *args, **kwargs)
        for column, result in zip(columns, results if several else [results], strict=True):
            column.append(Part(part.coef, compress(result.numpy())))
    values = [Value(shape, tuple(parts), x.root) for shape, parts in zip(shapes, columns, strict=True)]
    return values if several else values[0]


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten")
def _reshape(walk: Walk, x: Value, *args: Any, **kwargs: Any) -> Value:
    return walk.view(x, changed(x.degree, lambda ids: reshape_ids(ids, x.shape, walk.shape)))


@rule("cat", "stack")
def _cat(walk: Walk, values: Sequence[Value], dim: int = 0) -> Degree:
    values = [value for value in values if math.prod(value.shape)]
    rank = len(walk.shape)
    axis = dim % rank
    if walk.operator == "stack":
        values = [
            Value((*v.shape[:axis], 1, *v.shape[axis:]), changed(v.degree, lambda ids: np.expand_dims(ids, axis)))
            for v in values
        ]
    pieces = [_one_array(walk, value) for value in values]
    shape = [max(ids.shape[k] for ids in pieces) for k in range(rank)]  # the axes that any piece depends on
    joined = [
        np.broadcast_to(ids, [*shape[:axis], value.shape[axis], *shape[axis + 1 :]])
        for ids, value in zip(pieces, values, strict=True)
    ]
    return merge([Part(1.0, compress(np.concatenate(joined, axis)))])


def _one_array(walk: Walk, value: Value) -> Ids:
    """One array of unknowns for a degree that is a sum of parts (new unknowns where it is one)."""
    zero: Ids = np.zeros((1,) * len(value.shape), dtype=np.int64)
    if not value.degree:
        return zero
    if len(value.degree) == 1 and value.degree[0].coef == 1.0:
        return value.degree[0].ids
    shape = np.broadcast_shapes(*(part.ids.shape for part in value.degree))
    if math.prod(shape) > LARGEST_LABELS:
        walk.fix(value)
        return zero
    ids = walk.system.fresh(shape)
    walk.equal(value.degree, (Part(1.0, ids),))
    return ids


@rule("constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d")
def _pad(walk: Walk, x: Value, widths: Sequence[int], value: Any = 0, *args: Any) -> Degree:
    if walk.operator in ("constant_pad_nd", "pad") and value not in (0, None, 0.0):
        return opaque(walk, x)
    rank = len(walk.shape)
    padded = {rank - 1 - k // 2: (widths[k], widths[k + 1]) for k in range(0, len(widths), 2)}

    def pad(ids: Ids) -> Ids:
        for axis, (before, after) in padded.items():
            if ids.shape[axis] > 1:  # a zero has any degree: new unknowns
                shape = ids.shape
                new = [walk.system.fresh([*shape[:axis], width, *shape[axis + 1 :]]) for width in (before, after)]
                ids = np.concatenate([new[0], ids, new[1]], axis)
        return ids

    return changed(x.degree, pad)


@rule("index_select", "cumsum")
def _along_one(walk: Walk, x: Value, dim: int, *args: Any, **kwargs: Any) -> Degree:
    return walk.uniform(x, [dim])


@rule("gather")
def _gather(walk: Walk, x: Value, dim: int, index: Value, **kwargs: Any) -> Degree:
    return walk.uniform(x, range(len(x.shape)))


@rule("index")
def _index(walk: Walk, x: Value, indices: Sequence[Any]) -> Degree:
    places = [axis for axis, index in enumerate(indices) if index is not None]
    # Which entries are taken is not known here, so that the degree must not differ along the indexed axes.
    if len(places) != 1 or not isinstance(indices[places[0]], Value):
        degree = walk.uniform(Value(x.shape, walk.uniform(x, places)), range(len(x.shape)))
        return changed(degree, lambda ids: ids.reshape((1,) * len(walk.shape)))
    axis, new = places[0], len(indices[places[0]].shape)  # the axes of the index take the place of one axis
    return changed(
        walk.uniform(x, places), lambda ids: ids.reshape((*ids.shape[:axis], *(1,) * new, *ids.shape[axis + 1 :]))
    )


@rule("view_as_complex")
def _to_complex(walk: Walk, x: Value) -> Degree:
    return changed(walk.uniform(x, [-1]), lambda ids: ids[..., 0])


@rule("view_as_real")
def _to_real(walk: Walk, x: Value) -> Degree:
    return changed(x.degree, lambda ids: ids[..., None])


# --- sums over axes -------------------------------------------------------------------------------------------------


@rule("sum", "mean", "amax", "amin", "nansum")
def _reduce(walk: Walk, x: Value, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Degree:
    rank = len(x.shape)
    axes = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    axes = [axis % rank for axis in axes] if rank else []
    degree = walk.uniform(x, axes)
    return degree if keepdim or not axes else changed(degree, lambda ids: ids.squeeze(tuple(axes)))


@rule("max", "min", "median")
def _max(walk: Walk, x: Value, dim: Any = None, keepdim: bool = False) -> Degree:
    return _extremum(walk, x, dim) if isinstance(dim, Value) else _reduce(walk, x, dim, keepdim)


@rule("var", "std", "var_mean", "std_mean")
def _var(walk: Walk, x: Value, dims: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    mean = _reduce(walk, x, dims, keepdim)
    spread = scaled(mean, 2.0 if walk.operator.startswith("var") else 1.0)
    return [spread, mean] if isinstance(walk.shape, list) else spread


@rule("linalg_vector_norm", "norm")
def _norm(walk: Walk, x: Value, order: Any = 2, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Degree:
    return _reduce(walk, x, dims, keepdim)


_POOLS = (
    "max_pool{}d", "avg_pool{}d", "lp_pool{}d", "adaptive_avg_pool{}d", "_adaptive_avg_pool{}d",
    "adaptive_max_pool{}d", "max_pool{}d_with_indices", "upsample_nearest{}d", "upsample_linear{}d",
    "upsample_bilinear{}d", "upsample_bicubic{}d",
)  # fmt: skip


@rule(*(name.format(spatial) for name in _POOLS for spatial in (1, 2, 3)))
def _pool(walk: Walk, x: Value, *args: Any, **kwargs: Any) -> Degree:
    spatial = next(k for k in (1, 2, 3) if f"{k}d" in walk.operator)
    degree = walk.uniform(x, range(len(x.shape) - spatial, len(x.shape)))
    return walk.diagonal(degree) if "max" in walk.operator else degree
