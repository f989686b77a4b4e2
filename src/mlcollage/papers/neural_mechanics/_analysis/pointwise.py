"""Rules of the operations that treat each entry alone, move entries about, or reduce over axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .carriers import Shift, joined, lifted, moved
from .degrees import Degree, Ids, Part, aligned, changed, compress, merge, reshape_ids, scaled
from .walk import RULES, SAME, Value, Walk, letters, opaque, rule, sizes

SMALL_CONSTANT = 1e-2  # a positive constant below this, added to a norm, is an epsilon
LARGEST_LABELS = 20_000_000


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    """The number that a tensor is filled with, as a number."""
    return value.fill if isinstance(value, Value) and value.fill is not None else value


def _minus_infinity(value: Any) -> bool:
    """Whether a softmax does not see an entry that is filled with this number, whatever is added."""
    return _is_number(value) and value < -1e4


def _blind(value: Any) -> bool:
    """Whether a filled-in number has any degree: zero, or an infinity that a softmax does not see."""
    return _is_number(value) and (value == 0 or math.isinf(value))


# --- entry by entry -------------------------------------------------------------------------------------------------


@rule(*SAME, shifts=True)
def _same(walk: Walk, x: Value, *args: Any, **kwargs: Any) -> Value:
    return replace(x, shape=walk.shape)


@rule("neg", shifts=True)
def _neg(walk: Walk, x: Value) -> Value:
    return Value(walk.shape, x.degree, x.root, scaled(x.shift, -1.0))


@rule("full", "scalar_tensor", "full_like", "new_full", "zeros", "ones", "zeros_like", "ones_like", "new_zeros",
      "new_ones", shifts=True)  # fmt: skip
def _filled(walk: Walk, *args: Any, **kwargs: Any) -> Value:
    fill = {"zeros": 0.0, "ones": 1.0}.get(walk.operator.removeprefix("new_").removesuffix("_like"))
    if fill is None:
        fill = next((x for x in reversed(args) if _is_number(x)), None)
    return Value(walk.shape, fill=fill)


@rule("relu", "leaky_relu", "abs", "threshold_zero")
def _homogeneous(walk: Walk, x: Value, *args: Any, **kwargs: Any) -> Degree:
    return walk.diagonal(x.degree)


@rule("dropout", "native_dropout", "feature_dropout", shifts=True)
def _dropout(walk: Walk, x: Value, p: float, train: bool, *args: Any) -> Any:
    shape = walk.shape[0] if isinstance(walk.shape, list) else walk.shape
    if not (train and p > 0):
        return [x] if isinstance(walk.shape, list) else x
    axes = letters(shape)
    # the noise is drawn anew at every call
    out = Value(shape, walk.diagonal(x.degree), shift=walk.through(x, axes, axes, walk.new(), sizes(x, axes)))
    return [out] if isinstance(walk.shape, list) else out


@rule("prelu", "_prelu_kernel")
def _prelu(walk: Walk, x: Value, weight: Value, *args: Any) -> Degree:
    walk.fix(weight)
    return walk.diagonal(x.degree)


@rule("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(walk: Walk, x: Value, low: Any = None, high: Any = None, **kwargs: Any) -> Degree:
    low, high = _number(low), _number(high)
    # Cutting off at 0 is homogeneous, any other limit is not.
    if walk.operator == "clamp_max":
        low, high = None, low
    guard = _is_number(low) and 0 < low <= SMALL_CONSTANT and high is None  # such as norm.clamp_min(1e-12)
    if guard:
        walk.eps(x.degree)
    elif walk.operator == "hardtanh" or low not in (None, 0) or high not in (None, 0):
        return opaque(walk, x)
    return walk.diagonal(x.degree)


@rule("add", "sub", "rsub", shifts=True)
def _add(walk: Walk, a: Any, b: Any, alpha: Any = 1, **kwargs: Any) -> Any:
    of_a, of_b = (-alpha, 1) if walk.operator == "rsub" else (1, -alpha if walk.operator == "sub" else alpha)
    if not isinstance(a, Value):  # a number minus a tensor
        a, b, of_a, of_b = b, a, of_b, of_a
    b = _number(b)
    if isinstance(b, Value):
        return Value(walk.shape, walk.match(a, b), shift=walk.sum_of((a, of_a), (b, of_b)))
    shift = walk.sum_of((a, of_a))
    if not _is_number(b):
        return opaque(walk, a)
    if 0 < abs(b) <= SMALL_CONSTANT:
        walk.eps(a.degree)
    elif b:  # x + c grows by d (x + c) - c d
        shift = merge([*shift, *lifted(aligned(a.degree, len(walk.shape)), -of_b * b)])
    return Value(walk.shape, aligned(a.degree, len(walk.shape)), a.root, shift)


@rule("maximum", "minimum", shifts=True)
def _extremum(walk: Walk, a: Value, b: Value) -> Any:
    for x, bound in ((a, _number(b)), (b, _number(a))):
        if _is_number(bound):  # as the clamp that it is
            walk.still(x)
            return _clamp(walk, x, *((bound, None) if walk.operator == "maximum" else (None, bound)))
    return _chosen(walk, a, b, walk.number((walk.operator, a.key, b.key)))


def _chosen(walk: Walk, a: Value, b: Value, choice: int) -> Value:
    """Entries of a where a choice is 1, of b where it is 0: b's shift, and the choice times what a's has more."""
    more = Value(walk.shape, shift=walk.sum_of((a, 1), (b, -1)))
    shift = merge([*walk.sum_of((b, 1)), *_times(walk, more, Value(walk.shape, key=choice))])
    return Value(walk.shape, walk.diagonal(walk.match(a, b)), shift=shift)


@rule("where", shifts=True)
def _where(walk: Walk, condition: Value, a: Any = None, b: Any = None) -> Any:
    branches = [value for value in (a, b) if isinstance(value, Value) and _number(value) is value]
    numbers = [_number(value) for value in (a, b) if _is_number(_number(value))]
    walk.fix(condition)
    if len(branches) == 2:
        return _chosen(walk, branches[0], branches[1], condition.key)
    if not all(_blind(number) or _minus_infinity(number) for number in numbers):
        return opaque(walk, *branches)
    if any(number and not math.isinf(number) for number in numbers):  # a finite number, of degree zero
        walk.fix_degree(*branches)
    x = branches[0] if branches else Value(walk.shape)
    shift = walk.sum_of((x, 1)) if all(map(_minus_infinity, numbers)) else _times(walk, x, condition)
    return Value(walk.shape, walk.diagonal(aligned(x.degree, len(walk.shape))), shift=shift)


@rule("masked_fill", shifts=True)
def _masked_fill(walk: Walk, x: Value, mask: Value, value: Any) -> Any:
    return _where(walk, mask, value, x)


def _times(walk: Walk, x: Value, factor: Value, coef: float = 1.0) -> Shift:
    """The shift of x times a tensor, entry by entry."""
    axes, own, other = letters(walk.shape), letters(x.shape), letters(factor.shape)
    return walk.through(x, own, axes, factor, sizes(factor, other), coef=coef)


@rule("mul", "div", shifts=True)
def _mul(walk: Walk, a: Any, b: Any, **kwargs: Any) -> Any:
    if kwargs.get("rounding_mode") is not None:
        return opaque(walk, a, b)
    rank, divided = len(walk.shape), walk.operator == "div"
    if isinstance(b, Value) and not divided and _is_number(_number(a)):
        a, b = b, a
    if isinstance(a, Value) and _is_number(_number(b)):
        factor = 1 / _number(b) if divided else _number(b)
        return Value(walk.shape, aligned(a.degree, rank), a.root, walk.sum_of((a, factor)))
    if divided:
        walk.still(b)
        b = Value(b.shape, scaled(b.degree, -1.0), key=walk.number(("inverse", b.key)))
    if not isinstance(a, Value):  # a number divided by a tensor
        return Value(walk.shape, aligned(b.degree, rank))
    # A factor with several entries acts as a diagonal matrix on the other factor.
    for x, other in ((a, b), (b, a)):
        if _acts_along(x, other, rank):
            walk.diagonal(x.degree)
    degree = merge([*aligned(a.degree, rank), *aligned(b.degree, rank)])
    return Value(walk.shape, degree, shift=(*_times(walk, a, b), *_times(walk, b, a)))


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
    "relu6", "expm1", "log1p", "sin", "cos", "erf", "log_sigmoid_forward", "logsigmoid",
    "atan", "sinh", "cosh",
    "nll_loss_forward", "nll_loss2d_forward", "mse_loss", "huber_loss", "smooth_l1_loss", "binary_cross_entropy",
    "_native_batch_norm_eval", "floor", "ceil", "round", "logical_not", "logical_and", "logical_or", "bitwise_not",
    "bitwise_and", "bitwise_or", "arange", "empty", "fill", "bernoulli",
    "isinf", "isnan", "argmax", "argmin", "one_hot", "linspace", "rand", "randn", "remainder", "fmod",
    "floor_divide", "l1_loss", "kl_div", "binary_cross_entropy_with_logits", "hardshrink", "softshrink", "copysign",
    "polar",
]  # fmt: skip
RULES.update(dict.fromkeys(_SEEN, opaque))


@rule("exp", "log", "log2")
def _exponential(walk: Walk, x: Any) -> Degree:
    """An exp turns shifts into factors, a log factors into shifts; no such law is followed, which is said."""
    entering, coming = ("shift", "scale") if walk.operator == "exp" else ("scale", "shift")
    if isinstance(x, Value) and (x.shift if walk.operator == "exp" else x.degree):
        site = walk.site or "the top"
        note = (
            f"{walk.operator} at {site}: laws that {entering} what enters it and {coming} what comes out were left out"
        )
        walk.notes += [] if note in walk.notes else [note]
    return opaque(walk, x)


@rule("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "logsumexp", shifts=True)
def _softmax(walk: Walk, x: Value, dims: Any, keepdim: Any = False, *args: Any, **kwargs: Any) -> Value:
    """What is added to all scores alike is forgotten; a logsumexp passes it on."""
    rank = len(x.shape)
    axes = {axis % rank for axis in ([dims] if isinstance(dims, int) else dims)} if rank else set()
    walk.fix_degree(x)
    shift = walk.forget(x.shift, axes)
    if walk.operator == "logsumexp":
        return Value(walk.shape, shift=shift if keepdim else moved(shift, lambda ids: ids.squeeze(tuple(axes))))
    return Value(walk.shape, total=(min(axes), 1.0) if axes and "log" not in walk.operator else None)


# --- entries moved about --------------------------------------------------------------------------------------------


@rule(
    "squeeze", "unsqueeze", "transpose", "permute", "t", "expand", "select", "slice", "narrow", "split",
    "split_with_sizes", "unbind", "chunk", "flip", "roll", "repeat", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "swapaxes", "movedim", "diagonal", "unfold", "repeat_interleave", "native_channel_shuffle",
    "expand_as", shifts=True,
)  # fmt: skip
def _by_running(walk: Walk, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the operator on the unknowns themselves; broadcast axes stay stride-0 views where it is a view."""
    if not isinstance(x, Value):
        return opaque(walk, x, *args)
    # Operators that are no views write all entries out, which a large tensor cannot afford.
    if math.prod(x.shape) > LARGEST_LABELS and not all(part.ids.size == 1 for part in (*x.degree, *x.shift)):
        return opaque(walk, x)
    several = isinstance(walk.shape, list)

    def run(k: int) -> Callable[[Ids], Ids]:
        def change(ids: Ids) -> Ids:
            result = walk.target(torch.from_numpy(ids.copy()).expand(x.shape), *args, **kwargs)
            return compress((result[k] if several else result).numpy())

        return change

    if not several:
        return x.moved(run(0), walk.shape)
    return [x.moved(run(k), shape) for k, shape in enumerate(walk.shape)]


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", shifts=True)
def _reshape(walk: Walk, x: Value, *args: Any, **kwargs: Any) -> Value:
    out = x.moved(lambda ids: reshape_ids(ids, x.shape, walk.shape), walk.shape)
    last = x.total is not None and x.total[0] == len(x.shape) - 1 and x.shape[-1:] == walk.shape[-1:]
    return replace(out, total=(len(walk.shape) - 1, x.total[1])) if last and x.total else out


@rule("cat", "stack", shifts=True)
def _cat(walk: Walk, values: Sequence[Value], dim: int = 0) -> Value:
    values = [value for value in values if math.prod(value.shape)]
    rank = len(walk.shape)
    axis = dim % rank
    if walk.operator == "stack":
        new = (*values[0].shape[:axis], 1, *values[0].shape[axis:])
        values = [value.moved(lambda ids: np.expand_dims(ids, axis), new) for value in values]
    pieces = [_one_array(walk, value) for value in values]
    shape = [max(ids.shape[k] for ids in pieces) for k in range(rank)]  # the axes that any piece depends on
    pieces = [
        np.broadcast_to(ids, [*shape[:axis], value.shape[axis], *shape[axis + 1 :]])
        for ids, value in zip(pieces, values, strict=True)
    ]
    degree = merge([Part(1.0, compress(np.concatenate(pieces, axis)))])
    return Value(walk.shape, degree, shift=joined([(v.shift, v.shape[axis]) for v in values], axis))


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


@rule("constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d", shifts=True)
def _pad(walk: Walk, x: Value, widths: Sequence[int], value: Any = 0, *args: Any) -> Any:
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

    axes = letters(walk.shape)
    varies = {axes[axis]: walk.shape[axis] for axis in padded}
    shift = walk.through(_flat(walk, x, padded), axes, axes, ("pad", str(widths)), varies)
    return Value(walk.shape, changed(x.degree, pad), shift=shift)


def _flat(walk: Walk, x: Value, axes: Iterable[int]) -> Value:
    """The tensor with a shift that is the same along the axes, and of size 1 there."""
    return replace(x, shift=walk.forget(x.shift, [axis % len(x.shape) for axis in axes]))


@rule("cumsum", "triu", "tril", shifts=True)
def _along_one(walk: Walk, x: Value, dim: int = 0, *args: Any, **kwargs: Any) -> Value:
    axes = letters(x.shape)
    degree = walk.uniform(x, [dim]) if walk.operator == "cumsum" else walk.diagonal(x.degree)
    return Value(walk.shape, degree, shift=walk.through(x, axes, axes, (walk.operator, dim), sizes(x, axes)))


def _picked(walk: Walk, x: Value, axis: int, index: Value) -> Value:
    """Entries of one axis, picked by an index: a product with rows of zeros and a one, which sum to 1."""
    before = letters(x.shape)
    new = letters(index.shape, skip=before)
    after = before[:axis] + new + before[axis + 1 :]
    shift = walk.through(x, before, after, index, sizes(index, new), total=1.0)
    degree = changed(
        walk.uniform(x, [axis]), lambda ids: ids.reshape((*ids.shape[:axis], *(1,) * len(new), *ids.shape[axis + 1 :]))
    )
    return Value(walk.shape, degree, shift=shift)


@rule("index_select", shifts=True)
def _index_select(walk: Walk, x: Value, dim: int, index: Value) -> Value:
    return _picked(walk, x, dim % len(x.shape), index)


@rule("gather", shifts=True)
def _gather(walk: Walk, x: Value, dim: int, index: Value, **kwargs: Any) -> Value:
    axis = dim % max(len(x.shape), 1)
    if any(size != x.shape[k] for k, size in enumerate(index.shape) if k != axis):
        walk.take_for_alike(x)
        x = _flat(walk, x, range(len(x.shape)))
    before = letters(x.shape)
    after = before[:axis] + "A" + before[axis + 1 :]
    shift = walk.through(x, before, after, index, sizes(index, after), 1.0)
    return Value(walk.shape, walk.uniform(x, range(len(x.shape))), shift=shift)


@rule("index", shifts=True)
def _index(walk: Walk, x: Value, indices: Sequence[Any]) -> Value:
    places = [axis for axis, index in enumerate(indices) if index is not None]
    # Which entries are taken is not known here, so that the degree must not differ along the indexed axes.
    if len(places) != 1 or not isinstance(indices[places[0]], Value):
        everything = range(len(x.shape))
        walk.take_for_alike(x)
        degree = walk.uniform(Value(x.shape, walk.uniform(x, places)), everything)
        value = Value(x.shape, degree, shift=_flat(walk, x, everything).shift)
        return value.moved(lambda ids: ids.reshape((1,) * len(walk.shape)), walk.shape)
    return _picked(walk, x, places[0], indices[places[0]])


@rule("view_as_complex")
def _to_complex(walk: Walk, x: Value) -> Degree:
    return changed(walk.uniform(x, [-1]), lambda ids: ids[..., 0])


@rule("view_as_real")
def _to_real(walk: Walk, x: Value) -> Degree:
    return changed(x.degree, lambda ids: ids[..., None])


# --- sums over axes -------------------------------------------------------------------------------------------------


def _summed(x: Value, dims: Any) -> list[int]:
    """The axes that a reduction sums over; none given, or none listed: all."""
    rank = len(x.shape)
    axes = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return [axis % rank for axis in axes] if rank else []


def _reduced(walk: Walk, x: Value, dims: Any, keepdim: bool) -> Degree:
    axes = _summed(x, dims)
    degree = walk.uniform(x, axes)
    return degree if keepdim or not axes else changed(degree, lambda ids: ids.squeeze(tuple(axes)))


@rule("sum", "mean", "amax", "amin", "nansum", shifts=True)
def _reduce(walk: Walk, x: Value, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """A sum passes on the sum of shifts; an extremum, the shift of the entry that it takes."""
    axes, names = _summed(x, dims), letters(x.shape)
    after = "".join(names[axis] for axis in range(len(x.shape)) if axis not in axes)
    shape = walk.shape[0] if isinstance(walk.shape, list) else walk.shape
    shift = x.shift
    if axes and walk.operator in ("sum", "mean", "nansum"):
        count = math.prod(x.shape[axis] for axis in axes)
        mean = Value(x.shape, shift=walk.averaged(x.shift, axes))
        shift = walk.through(mean, names, after, "sum", {}, 1.0, 1.0 if walk.operator == "mean" else count)
    elif axes:
        taken = {letter: size for letter, size in sizes(x, names).items() if letter in after}
        shift = walk.through(x, names, after, (walk.operator, x.key), taken, 1.0)
    if keepdim and axes:
        shift = moved(shift, lambda ids: np.expand_dims(ids, tuple(sorted(axes))))
    return Value(shape, _reduced(walk, x, dims, keepdim), shift=shift)


@rule("max", "min", "median", shifts=True)
def _max(walk: Walk, x: Value, dim: Any = None, keepdim: bool = False) -> Any:
    if isinstance(dim, Value):
        return _extremum(walk, x, dim)
    out = _reduce(walk, x, dim, keepdim)
    return [out] if isinstance(walk.shape, list) else out


@rule("var", "std", "var_mean", "std_mean", shifts=True)
def _var(walk: Walk, x: Value, dims: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    x = _flat(walk, x, _summed(x, dims))
    degree = _reduced(walk, x, dims, keepdim)
    spread = scaled(degree, 2.0 if walk.operator.startswith("var") else 1.0)
    if not isinstance(walk.shape, list):
        return spread
    mean = x.shift if keepdim else moved(x.shift, lambda ids: ids.squeeze(tuple(_summed(x, dims))))
    return [spread, Value(walk.shape[1], degree, shift=mean)]


@rule("linalg_vector_norm", "norm")
def _norm(walk: Walk, x: Value, order: Any = 2, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Degree:
    return _reduced(walk, x, dims, keepdim)


_POOLS = (
    "max_pool{}d", "avg_pool{}d", "lp_pool{}d", "adaptive_avg_pool{}d", "_adaptive_avg_pool{}d",
    "adaptive_max_pool{}d", "max_pool{}d_with_indices", "upsample_nearest{}d", "upsample_linear{}d",
    "upsample_bilinear{}d", "upsample_bicubic{}d",
)  # fmt: skip


@rule(*(name.format(spatial) for name in _POOLS for spatial in (1, 2, 3)), shifts=True)
def _pool(walk: Walk, x: Value, *args: Any, **kwargs: Any) -> Any:
    several = isinstance(walk.shape, list)
    shape = walk.shape[0] if several else walk.shape
    count = next(k for k in (1, 2, 3) if f"{k}d" in walk.operator)
    space = range(len(x.shape) - count, len(x.shape))
    degree = walk.uniform(x, space)
    if "max" in walk.operator or "lp" in walk.operator:
        degree = walk.diagonal(degree)
    if "lp" in walk.operator:
        walk.still(x)
    # with zeros around the edge, and for what differs over space, every position of the result is its own function
    edge = walk.operator.startswith("avg") and len(args) > 2 and any(np.ravel(args[2]))
    before = letters(x.shape)
    new = letters(shape[-count:], skip=before)
    how = (walk.operator, x.key if "max" in walk.operator else repr(args))
    varies = dict(zip(new, shape[-count:], strict=True))
    shift = walk.through(x, before, before[:-count] + new, how, varies, None if edge else 1.0)
    out = Value(shape, degree, shift=shift)
    return [out] if several else out
