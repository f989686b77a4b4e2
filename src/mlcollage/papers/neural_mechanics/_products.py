"""Rules of the operations that mix channels or normalize them: linear maps, products, norms, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlcollage.papers.neural_mechanics._degrees import Degree, Part, aligned, merge, reshape_ids
from mlcollage.papers.neural_mechanics._rules import Value, Walk, rule

__all__ = ["contract"]


def _joint(value: Value, letters: str, every: str) -> list[Part]:
    """Parts of a tensor whose axes are `letters`, laid out over all axes of a product, in the order `every`."""
    order = sorted(range(len(letters)), key=lambda axis: every.index(letters[axis]))
    out = []
    for part in value.degree:
        ids = part.ids.transpose(order)
        sizes = dict(zip((letters[axis] for axis in order), ids.shape, strict=True))
        out.append(Part(part.coef, ids.reshape([sizes.get(letter, 1) for letter in every])))
    return out


def _overlapping(parts: Sequence[Part], batch: set[int]) -> list[tuple[frozenset[int], list[Part]]]:
    """Parts that share an axis; batch axes do not count, for one entry of the batch is a product of its own."""
    groups: list[tuple[frozenset[int], list[Part]]] = []
    for part in parts:
        axes, members, rest = part.axes - batch, [part], []
        for other, others in groups:
            if axes & other:
                axes, members = axes | other, others + members
            else:
                rest.append((other, others))
        groups = [*rest, (axes, members)]
    return groups


def contract(walk: Walk, a: Value, la: str, b: Value, lb: str, lo: str) -> Degree:
    r"""Degree of :math:`y_o = \sum_k a_{..k} b_{k..}` in einsum letters: ``d(y) = d(a) + d(b)`` for every k.

    A parameter's degree is a sum over its axes that is defined up to a constant moved from one axis to another; its
    first product fixes that constant.
    """
    every = "".join(dict.fromkeys(la + lb))
    summed = {every.index(letter) for letter in every if letter not in lo}
    batch = {every.index(letter) for letter in every if letter in la and letter in lb and letter in lo}
    pinned = any(value.root is not None and value.root not in walk.used for value in (a, b))
    out: list[Part] = []
    parts = _joint(a, la, every) + _joint(b, lb, every)
    level: list[Part] = []
    if pinned:  # so that the output has the degree that the parameter's output axis names
        level = [part for part in parts if not part.axes]
        parts = [part for part in parts if part.axes]
        if not any(part.axes & summed for part in parts):
            out, level = level, []
    for axes, members in _overlapping(parts, batch):
        for part in members:
            _note_blocks(walk, part, summed, batch)
        if not axes & summed:
            out += members
            continue
        shape = np.broadcast_shapes(*(part.ids.shape for part in members))
        kept = [size if axis not in summed else 1 for axis, size in enumerate(shape)]
        if pinned and all(size == 1 or axis in batch for axis, size in enumerate(kept)):
            walk.system.equate([*members, *level], walk.site)
            walk.used |= {value.root for value in (a, b) if value.root is not None}
            level = []
            continue
        result = Part(1.0, walk.system.fresh(kept))
        walk.system.equate([*members, Part(-1.0, result.ids)], walk.site)
        out.append(result)
    out += level
    wanted = [every.index(letter) if letter in every else -1 for letter in lo]
    laid = []
    for part in merge(out):
        free = [axis for axis in range(len(every)) if axis not in wanted]
        ids = part.ids.squeeze(tuple(free)) if free else part.ids
        left = [axis for axis in range(len(every)) if axis in wanted]
        laid.append(Part(part.coef, ids.transpose([left.index(axis) for axis in wanted])))
    return tuple(laid)


def _note_blocks(walk: Walk, part: Part, summed: set[int], batch: set[int]) -> None:
    """For matrix laws: laws of one sum, and of one batch entry (a head), belong together; others do not mix."""
    axes = part.axes
    if len(axes - batch) > 1:
        walk.diagonal((part,))
        return
    heads = sorted(axes & batch)
    if not axes & summed and not heads:
        return
    index = np.zeros((1,) * part.ids.ndim, dtype=np.int64)
    for axis in heads:
        size = part.ids.shape[axis]
        step = np.arange(size).reshape([size if k == axis else 1 for k in range(part.ids.ndim)])
        index = index * size + step
    walk.system.separate(part.ids, index)


def _with_bias(walk: Walk, degree: Degree, rank: int, axis: int, bias: Any) -> Degree:
    """Adding a bias along `axis`: it has the degree of what it is added to."""
    if not isinstance(bias, Value):
        return degree
    if not bias.live:
        walk.system.vanish(degree, walk.site)
        return ()
    laid = [
        Part(-part.coef, part.ids.reshape([part.ids.size if k == axis else 1 for k in range(rank)]))
        for part in bias.degree
    ]
    walk.system.equate([*degree, *laid], walk.site)
    return degree


@rule("linear")
def _linear(walk: Walk, out: Any, x: Value, weight: Value, bias: Any = None) -> Any:
    letters = "abcdefghij"[: len(x.shape) - 1]
    if len(weight.shape) == 1:
        degree = contract(walk, x, letters + "k", weight, "k", letters)
        return Value(out, degree, None, True)
    degree = contract(walk, x, letters + "k", weight, "ok", letters + "o")
    return Value(out, _with_bias(walk, degree, len(out), len(out) - 1, bias), None, x.live or weight.live)


def _dropped(value: Value, keep: int) -> Value:
    """The first `keep` axes; the degree has size 1 along the others."""
    parts = tuple(Part(p.coef, p.ids.reshape(p.ids.shape[:keep])) for p in value.degree)
    return Value(value.shape[:keep], parts, value.root, value.live)


def _regrouped(value: Value, shape: tuple[int, ...]) -> Value:
    parts = tuple(Part(p.coef, reshape_ids(p.ids, value.shape, shape)) for p in value.degree)
    return Value(shape, parts, value.root, value.live)


def _convolve(walk: Walk, out: Any, x: Value, weight: Value, bias: Any, groups: int, transposed: bool) -> Any:
    spatial = len(weight.shape) - 2
    batched = len(x.shape) == spatial + 2
    lead = len(x.shape) - spatial
    x = _dropped(Value(x.shape, walk.uniform(x, range(lead, len(x.shape))), x.root, x.live), lead)
    kernel = walk.uniform(weight, range(2, spatial + 2))
    weight = _dropped(Value(weight.shape, kernel, weight.root, weight.live), 2)
    first, second = weight.shape
    weight = _regrouped(weight, (groups, first // groups, second))
    x = _regrouped(x, (*x.shape[:-1], groups, x.shape[-1] // groups))
    n = "n" if batched else ""
    degree = contract(walk, x, n + "gc", weight, "gco" if transposed else "goc", n + "go")
    channels = second * groups if transposed else first
    shape = (*x.shape[:-2], groups, channels // groups)
    joined = Value(shape, degree)
    degree = tuple(
        Part(p.coef, p.ids.reshape(p.ids.shape + (1,) * spatial))
        for p in _regrouped(joined, (*shape[:-2], channels)).degree
    )
    return Value(out, _with_bias(walk, degree, len(out), lead - 1, bias), None, x.live or weight.live)


@rule("conv1d", "conv2d", "conv3d")
def _conv(
    walk: Walk, out: Any, x: Value, weight: Value, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    return _convolve(walk, out, x, weight, bias, groups, False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(
    walk: Walk, out: Any, x: Value, weight: Value, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    return _convolve(walk, out, x, weight, bias, groups, True)


@rule("convolution")
def _convolution(
    walk: Walk, out: Any, x: Value, weight: Value, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Any:  # fmt: skip
    return _convolve(walk, out, x, weight, bias, groups, transposed)


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(walk: Walk, out: Any, a: Value, b: Value) -> Any:
    rank_a, rank_b = len(a.shape), len(b.shape)
    batch = "cdefghpqrs"
    lead_a, lead_b = max(rank_a - 2, 0), max(rank_b - 2, 0)
    most = max(lead_a, lead_b)
    la = batch[most - lead_a : most] + ("ik" if rank_a > 1 else "k")
    lb = batch[most - lead_b : most] + ("kj" if rank_b > 1 else "k")
    lo = batch[:most] + ("i" if rank_a > 1 else "") + ("j" if rank_b > 1 else "")
    return Value(out, contract(walk, a, la, b, lb, lo), None, a.live or b.live)


@rule("addmm", "baddbmm", "addbmm", "addmv")
def _addmm(walk: Walk, out: Any, bias: Value, a: Value, b: Value, beta: Any = 1, alpha: Any = 1) -> Any:
    product = _matmul(walk, out, a, b)
    return Value(out, walk.match([bias, product], len(out)), None, True)


@rule("embedding")
def _embedding(walk: Walk, out: Any, weight: Value, index: Value, *args: Any, **kwargs: Any) -> Any:
    if weight.root is not None and weight.root not in walk.used:
        walk.used.add(weight.root)
        for part in weight.degree:
            if part.axes == {0}:
                walk.system.vanish((part,), walk.site)
    degree = walk.uniform(weight, [0])
    parts = tuple(Part(p.coef, p.ids.reshape((1,) * (len(out) - 1) + p.ids.shape[1:])) for p in degree)
    return Value(out, merge(parts), None, weight.live)


@rule("scaled_dot_product_attention")
def _attention(
    walk: Walk, out: Any, q: Value, k: Value, v: Value, mask: Any = None, dropout: float = 0.0, causal: bool = False,
    **kwargs: Any,
) -> Any:  # fmt: skip
    if kwargs.get("enable_gqa"):
        k, v = (_repeated(value, q.shape[-3]) for value in (k, v))
    heads = "abcdef"[: len(q.shape) - 2]
    scores = contract(walk, q, heads + "td", k, heads + "sd", heads + "ts")
    walk.system.vanish(scores, walk.site)
    walk.fix(mask)
    weights = Value((*q.shape[:-1], k.shape[-2]), (), None, True)
    return Value(out, contract(walk, weights, heads + "ts", v, heads + "sd", heads + "td"), None, True)


def _repeated(value: Value, heads: int) -> Value:
    axis = len(value.shape) - 3
    count = heads // value.shape[axis]
    parts = tuple(Part(p.coef, np.repeat(p.ids, count, axis) if p.ids.shape[axis] > 1 else p.ids) for p in value.degree)
    return Value((*value.shape[:axis], heads, *value.shape[axis + 1 :]), parts, None, value.live)


def _affine(walk: Walk, out: Any, weight: Any, bias: Any, axis: int | None) -> Value:
    """After a normalization, which forgets the degree of its input: the degree of the gain, and the bias has it too."""
    live = any(isinstance(value, Value) and value.live for value in (weight, bias))
    if not live:
        return Value(out, (), None, True)
    rank = len(out)

    def laid(value: Value) -> Degree:
        if axis is None:
            return aligned(value.degree, rank)
        return tuple(
            Part(p.coef, p.ids.reshape([p.ids.size if k == axis else 1 for k in range(rank)])) for p in value.degree
        )

    if not isinstance(weight, Value) or not weight.live:
        walk.fix(bias)
        return Value(out, (), None, True)
    degree = laid(weight)
    walk.diagonal(degree)
    if isinstance(bias, Value):
        if not bias.live:
            walk.system.vanish(degree, walk.site)
            degree = ()
        else:
            walk.system.equate([*degree, *(Part(-p.coef, p.ids) for p in laid(bias))], walk.site)
    return Value(out, degree, None, True)


def _normalize(walk: Walk, x: Value, axes: Sequence[int]) -> None:
    degree = walk.uniform(x, axes)
    walk.diagonal(x.degree)
    walk.eps(degree)


@rule("layer_norm")
def _layer_norm(
    walk: Walk, out: Any, x: Value, shape: Sequence[int], weight: Any = None, bias: Any = None, *a: Any
) -> Any:
    _normalize(walk, x, range(len(x.shape) - len(shape), len(x.shape)))
    return _affine(walk, out, weight, bias, None)


@rule("rms_norm")
def _rms_norm(walk: Walk, out: Any, x: Value, shape: Sequence[int], weight: Any = None, *args: Any) -> Any:
    _normalize(walk, x, range(len(x.shape) - len(shape), len(x.shape)))
    return _affine(walk, out, weight, None, None)


@rule("group_norm")
def _group_norm(walk: Walk, out: Any, x: Value, groups: int, weight: Any = None, bias: Any = None, *args: Any) -> Any:
    shape = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    grouped = Value(shape, tuple(Part(p.coef, reshape_ids(p.ids, x.shape, shape)) for p in x.degree))
    walk.diagonal(x.degree)
    _normalize(walk, grouped, range(2, len(shape)))
    return _affine(walk, out, weight, bias, 1)


@rule("instance_norm")
def _instance_norm(
    walk: Walk, out: Any, x: Value, weight: Any = None, bias: Any = None, mean: Any = None, var: Any = None,
    use_input_stats: bool = True, *args: Any,
) -> Any:  # fmt: skip
    if use_input_stats:
        _normalize(walk, x, range(2, len(x.shape)))
    else:
        walk.fix(x)
    return _affine(walk, out, weight, bias, 1)


@rule(
    "batch_norm", "_native_batch_norm_legit_functional", "_native_batch_norm_legit", "native_batch_norm",
    "_native_batch_norm_legit_no_training", "_batch_norm_with_update_functional", "_batch_norm_with_update",
)  # fmt: skip
def _batch_norm(walk: Walk, out: Any, x: Value, weight: Any, bias: Any, *rest: Any) -> Any:
    flags = [value for value in rest if isinstance(value, bool)]
    if "with_update" in walk.operator or (flags and flags[0]):
        _normalize(walk, x, [axis for axis in range(len(x.shape)) if axis != 1])
    else:
        walk.frozen_norms.append(walk.site)
        walk.fix(x)
    shapes = out if isinstance(out, list) else [out]
    first = _affine(walk, shapes[0], weight, bias, 1)
    return [first, *(Value(shape) for shape in shapes[1:])] if isinstance(out, list) else first


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(walk: Walk, out: Any, v: Value, g: Value, dim: int = 0) -> Any:
    """W = g v / ‖v‖: the direction's degree is forgotten, slice by slice."""
    axes = [axis for axis in range(len(v.shape)) if axis != dim % len(v.shape)]
    degree = walk.uniform(v, axes)
    walk.diagonal(degree)
    shapes = out if isinstance(out, list) else [out]
    first = Value(shapes[0], g.degree, None, True)
    return [first, Value(shapes[1], degree, None, True)] if isinstance(out, list) else first
