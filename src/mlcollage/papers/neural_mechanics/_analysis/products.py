"""Rules of the operations that mix channels or normalize them: linear maps, products, norms, embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .degrees import Degree, Ids, Part, aligned, along, changed, merge, overlapping, reshape_ids
from .walk import Value, Walk, batch_statistics, convolution_groups, rule, statistics_axes

CONVOLUTIONS = (*(f"conv{k}d" for k in (1, 2, 3)), *(f"conv_transpose{k}d" for k in (1, 2, 3)), "convolution")


def _joint(value: Value, letters: str, every: str) -> list[Part]:
    """Parts of a tensor whose axes are `letters`, laid out over all axes of a product, in the order `every`."""
    order = sorted(range(len(letters)), key=lambda axis: every.index(letters[axis]))
    new = [axis for axis, letter in enumerate(every) if letter not in letters]  # of size 1
    return list(changed(value.degree, lambda ids: np.expand_dims(ids.transpose(order), new)))


def contract(walk: Walk, a: Value, la: str, b: Value, lb: str, lo: str) -> Degree:
    r"""Degree of :math:`y_o = \sum_k a_{..k} b_{k..}` in einsum letters: ``d(y) = d(a) + d(b)`` for every k.

    A parameter's degree is a sum over its axes that is defined up to a constant moved from one axis to another; its
    first product fixes that constant.
    """
    every = "".join(dict.fromkeys(la + lb))
    summed = {every.index(letter) for letter in every if letter not in lo}
    # Each entry of a batch axis is a product of its own: parts that share only such axes are independent.
    batch = {every.index(letter) for letter in every if letter in la and letter in lb and letter in lo}
    roots = {value.root for value in (a, b) if value.root is not None}
    pinned = not roots <= walk.used
    # parts of both factors over all axes of the product, batch, free and summed ones
    parts = _joint(a, la, every) + _joint(b, lb, every)
    out: list[Part] = []
    level: list[Part] = []  # constants, which the first equation takes in where a parameter is pinned
    if pinned:  # so that the output has the degree that the parameter's output axis names
        level = [part for part in parts if not part.axes]
        parts = [part for part in parts if part.axes]
        if not any(part.axes & summed for part in parts):
            out, level = level, []
    for axes, members in overlapping(parts, batch):
        for part in members:
            _note_blocks(walk, part, summed, batch)
        if not axes & summed:
            out += members
            continue
        shape = np.broadcast_shapes(*(part.ids.shape for part in members))
        kept = [size if axis not in summed else 1 for axis, size in enumerate(shape)]
        if pinned and all(size == 1 or axis in batch for axis, size in enumerate(kept)):
            walk.equal((*members, *level))
            walk.used |= roots
            level = []
            continue
        # Σ members does not depend on the summed axes: it is the degree of the result
        result = Part(1.0, walk.system.fresh(kept))
        walk.equal(tuple(members), (result,))
        out.append(result)
    wanted = [every.index(letter) for letter in lo]
    return changed(merge(out + level), lambda ids: _laid_out(ids, wanted))


def _laid_out(ids: Ids, wanted: Sequence[int]) -> Ids:
    """The axes `wanted`, in this order; the others, along which nothing differs, are dropped."""
    left = [axis for axis in range(ids.ndim) if axis in wanted]
    dropped = tuple(axis for axis in range(ids.ndim) if axis not in wanted)
    return ids.squeeze(dropped).transpose([left.index(axis) for axis in wanted])


def _note_blocks(walk: Walk, part: Part, summed: set[int], batch: set[int]) -> None:
    """For matrix laws: laws of one sum, and of one batch entry (a head), belong together; others do not mix."""
    axes = part.axes
    if len(axes - batch) > 1:  # its unknowns lie in a grid, which no matrix acts on from one side
        walk.diagonal((part,))
        return
    heads = axes & batch
    if not axes & summed and not heads:
        return
    # a number for each entry of the batch axes, the same along the others
    sizes = [size if axis in heads else 1 for axis, size in enumerate(part.ids.shape)]
    index = np.arange(math.prod(sizes)).reshape(sizes)
    walk.tokens.append((part.ids.ravel(), np.broadcast_to(index, part.ids.shape).ravel()))


def _with_bias(walk: Walk, degree: Degree, axis: int, bias: Any) -> Degree:
    """Adding a bias along `axis` of the result: it has the degree of what it is added to."""
    if not isinstance(bias, Value):
        return degree
    walk.equal(degree, along(bias.degree, axis, len(walk.shape)))
    return degree if bias.degree else ()  # a constant bias has degree zero, and so has the result


@rule("linear")
def _linear(walk: Walk, x: Value, weight: Value, bias: Any = None) -> Degree:
    letters = "abcdefghij"[: len(x.shape) - 1]
    if len(weight.shape) == 1:  # a dot product
        return contract(walk, x, letters + "k", weight, "k", letters)
    return _with_bias(walk, contract(walk, x, letters + "k", weight, "ok", letters + "o"), -1, bias)


def _dropped(value: Value, degree: Degree, keep: int) -> Value:
    """The first `keep` axes; the degree has size 1 along the others."""
    return Value(value.shape[:keep], changed(degree, lambda ids: ids.reshape(ids.shape[:keep])), value.root)


def _regrouped(value: Value, *shape: int) -> Value:
    return Value(shape, changed(value.degree, lambda ids: reshape_ids(ids, value.shape, shape)), value.root)


@rule(*CONVOLUTIONS)
def _convolve(walk: Walk, x: Value, weight: Value, bias: Any = None, *rest: Any, **kwargs: Any) -> Degree:
    groups = convolution_groups(walk.operator, (x, weight, bias, *rest), kwargs)
    transposed = "transpose" in walk.operator or (walk.operator == "convolution" and rest[3])
    spatial = len(weight.shape) - 2
    lead = len(x.shape) - spatial  # 2 with a batch axis, 1 without
    # A kernel meets all positions alike: only the channel axes are left, x (n, in) and weight (out, in / groups) or,
    # transposed, (in, out / groups). Then groups become a batch axis of an ordinary product.
    x = _dropped(x, walk.uniform(x, range(lead, len(x.shape))), lead)
    weight = _dropped(weight, walk.uniform(weight, range(2, spatial + 2)), 2)
    first, second = weight.shape
    weight = _regrouped(weight, groups, first // groups, second)
    x = _regrouped(x, *x.shape[:-1], groups, x.shape[-1] // groups)
    n = "n" if lead == 2 else ""
    degree = contract(walk, x, n + "gc", weight, "gco" if transposed else "goc", n + "go")
    channels = second * groups if transposed else first
    flat = _regrouped(Value((*x.shape[:-2], groups, channels // groups), degree), *x.shape[:-2], channels)
    degree = changed(flat.degree, lambda ids: ids.reshape(ids.shape + (1,) * spatial))
    return _with_bias(walk, degree, lead - 1, bias)


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(walk: Walk, a: Value, b: Value) -> Degree:
    rank_a, rank_b = len(a.shape), len(b.shape)
    lead_a, lead_b = max(rank_a - 2, 0), max(rank_b - 2, 0)
    most = max(lead_a, lead_b)
    batch = "cdefghpqrs"[:most]
    i, j = "i" if rank_a > 1 else "", "j" if rank_b > 1 else ""
    return contract(walk, a, batch[most - lead_a :] + i + "k", b, batch[most - lead_b :] + "k" + j, batch + i + j)


@rule("addmm", "baddbmm", "addbmm", "addmv")
def _addmm(walk: Walk, bias: Value, a: Value, b: Value, beta: Any = 1, alpha: Any = 1) -> Degree:
    return walk.match(bias, Value(walk.shape, _matmul(walk, a, b)))


@rule("embedding")
def _embedding(walk: Walk, weight: Value, index: Value, *args: Any, **kwargs: Any) -> Degree:
    # A token's row is its output: the degree that differs over tokens is the one that is fixed at zero.
    if weight.root is not None and weight.root not in walk.used:
        walk.used.add(weight.root)
        for part in weight.degree:
            if part.axes == {0}:
                walk.equal((part,))
    degree = walk.uniform(weight, [0])
    return merge(changed(degree, lambda ids: ids.reshape((1,) * (len(walk.shape) - 1) + ids.shape[1:])))


@rule("scaled_dot_product_attention")
def _attention(
    walk: Walk, q: Value, k: Value, v: Value, mask: Any = None, dropout: float = 0.0, causal: bool = False,
    **kwargs: Any,
) -> Degree:  # fmt: skip
    if kwargs.get("enable_gqa"):
        k, v = (_repeated(value, q.shape[-3]) for value in (k, v))
    heads = "abcdef"[: len(q.shape) - 2]
    walk.equal(contract(walk, q, heads + "td", k, heads + "sd", heads + "ts"))  # a softmax sees all scores
    walk.fix(mask)
    weights = Value((*q.shape[:-1], k.shape[-2]))
    return contract(walk, weights, heads + "ts", v, heads + "sd", heads + "td")


def _repeated(value: Value, heads: int) -> Value:
    """Heads shared by groups of queries, written out."""
    axis = len(value.shape) - 3
    count = heads // value.shape[axis]
    degree = changed(value.degree, lambda ids: np.repeat(ids, count, axis) if ids.shape[axis] > 1 else ids)
    return Value((*value.shape[:axis], heads, *value.shape[axis + 1 :]), degree)


# --- norms ----------------------------------------------------------------------------------------------------------


def _normalize(walk: Walk, x: Value, axes: Sequence[int]) -> None:
    """A norm forgets the degree of its input, which must be the same over the axes that it normalizes."""
    degree = walk.uniform(x, axes)
    walk.diagonal(x.degree)
    walk.eps(degree)


def _affine(walk: Walk, weight: Any, bias: Any, axis: int | None = None) -> Degree:
    """After a normalization: the degree of the gain, along `axis` or over the last axes, and the bias has it too."""
    shape = walk.shape[0] if isinstance(walk.shape, list) else walk.shape

    def laid(value: Any) -> Degree:
        if not isinstance(value, Value):
            return ()
        return aligned(value.degree, len(shape)) if axis is None else along(value.degree, axis, len(shape))

    degree = walk.diagonal(laid(weight))
    if not isinstance(bias, Value):
        return degree
    walk.equal(degree, laid(bias))
    return degree if bias.degree else ()


@rule("layer_norm", "rms_norm")
def _layer_norm(walk: Walk, x: Value, shape: Sequence[int], weight: Any = None, bias: Any = None, *args: Any) -> Degree:
    _normalize(walk, x, range(len(x.shape) - len(shape), len(x.shape)))
    return _affine(walk, weight, bias)  # of rms_norm, the fourth argument is its epsilon


@rule("group_norm")
def _group_norm(walk: Walk, x: Value, groups: int, weight: Any = None, bias: Any = None, *args: Any) -> Degree:
    grouped = _regrouped(x, x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    walk.diagonal(x.degree)
    _normalize(walk, grouped, range(2, len(grouped.shape)))
    return _affine(walk, weight, bias, 1)


@rule(
    "instance_norm", "batch_norm", "_native_batch_norm_legit_functional", "_native_batch_norm_legit",
    "native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_with_update_functional",
    "_batch_norm_with_update",
)  # fmt: skip
def _batch_norm(walk: Walk, x: Value, weight: Any, bias: Any, *rest: Any) -> Degree:
    if batch_statistics(walk.operator, rest):
        _normalize(walk, x, statistics_axes(walk.operator, len(x.shape)))
    else:
        walk.notes.append(f"{walk.site}: a batch norm in evaluation mode has no scale law; call model.train() first")
        walk.fix(x)
    return _affine(walk, weight, bias, 1)


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(walk: Walk, v: Value, g: Value, dim: int = 0) -> Any:
    """W = g v / ‖v‖: the direction's degree is forgotten, slice by slice; the second result is ‖v‖."""
    degree = walk.diagonal(walk.uniform(v, [axis for axis in range(len(v.shape)) if axis != dim % len(v.shape)]))
    return [g.degree, degree] if isinstance(walk.shape, list) else g.degree
