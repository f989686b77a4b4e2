"""Rules of the operations that mix channels or normalize them: linear maps, products, norms, embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .carriers import moved, varying
from .degrees import Degree, Ids, Part, changed, merge, overlapping, reshape_ids
from .walk import Convolution, Value, Walk, batch_statistics, letters, rule, sizes, statistics_axes

CONVOLUTIONS = (*(f"conv{k}d" for k in (1, 2, 3)), *(f"conv_transpose{k}d" for k in (1, 2, 3)), "convolution")


def _joint(value: Value, names: str, every: str) -> list[Part]:
    """Parts of a tensor whose axes are `names`, laid out over all axes of a product, in the order `every`."""
    order = sorted(range(len(names)), key=lambda axis: every.index(names[axis]))
    new = [axis for axis, letter in enumerate(every) if letter not in names]  # of size 1
    return list(changed(value.degree, lambda ids: np.expand_dims(ids.transpose(order), new)))


def contract(walk: Walk, a: Value, la: str, b: Value, lb: str, lo: str) -> Value:
    """The product of two tensors in einsum letters: degrees add, and each shift is multiplied by the other tensor."""
    known = {**dict(zip(la, a.shape, strict=True)), **dict(zip(lb, b.shape, strict=True))}
    shape = tuple(known[letter] for letter in lo)
    shift = merge([*_multiplied(walk, a, la, b, lb, lo), *_multiplied(walk, b, lb, a, la, lo)])
    return Value(shape, _contracted(walk, a, la, b, lb, lo), shift=shift)


def _multiplied(walk: Walk, x: Value, lx: str, factor: Value, lf: str, lo: str) -> tuple[Part, ...]:
    varies = {letter: size for letter, size in sizes(factor, lf).items() if letter in lo}
    gone, known = {letter for letter in lx if letter not in lo}, factor.total
    total = known[1] if known is not None and gone == {lf[known[0]]} else None
    return walk.through(x, lx, lo, factor, varies, total)


def _contracted(walk: Walk, a: Value, la: str, b: Value, lb: str, lo: str) -> Degree:
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


def _with_bias(walk: Walk, x: Value, axis: int, bias: Any) -> Value:
    """Adding a bias along `axis` of the result: it has the degree of what it is added to."""
    if not isinstance(bias, Value):
        return x
    laid = bias.along(axis, len(x.shape))
    walk.equal(x.degree, laid.degree)
    # a constant bias has degree zero, and so has the result
    return replace(x, degree=x.degree if bias.degree else (), shift=merge([*x.shift, *laid.shift]))


@rule("linear", shifts=True)
def _linear(walk: Walk, x: Value, weight: Value, bias: Any = None) -> Value:
    names = letters(x.shape[:-1], skip="ko")
    if len(weight.shape) == 1:  # a dot product
        return contract(walk, x, names + "k", weight, "k", names)
    return _with_bias(walk, contract(walk, x, names + "k", weight, "ok", names + "o"), -1, bias)


def _dropped(value: Value, degree: Degree, keep: int) -> Value:
    """The first `keep` axes; the degree has size 1 along the others."""
    return Value(value.shape[:keep], changed(degree, lambda ids: ids.reshape(ids.shape[:keep])), value.root)


def _regrouped(value: Value, *shape: int) -> Value:
    return value.moved(lambda ids: reshape_ids(ids, value.shape, shape), shape)


@rule(*CONVOLUTIONS, shifts=True)
def _convolve(walk: Walk, x: Value, weight: Value, bias: Any = None, *rest: Any, **kwargs: Any) -> Value:
    options = Convolution.of(walk.operator, (x, weight, bias, *rest), kwargs)
    groups, transposed = options.groups, options.transposed
    spatial = len(weight.shape) - 2
    lead = len(x.shape) - spatial  # 2 with a batch axis, 1 without
    shift = _convolved_shift(walk, x, weight, options, repr((rest, kwargs)))
    # A kernel meets all positions alike: only the channel axes are left, x (n, in) and weight (out, in / groups) or,
    # transposed, (in, out / groups). Then groups become a batch axis of an ordinary product.
    x = _dropped(x, walk.uniform(x, range(lead, len(x.shape))), lead)
    weight = _dropped(weight, walk.uniform(weight, range(2, spatial + 2)), 2)
    first, second = weight.shape
    weight = _regrouped(weight, groups, first // groups, second)
    x = _regrouped(x, *x.shape[:-1], groups, x.shape[-1] // groups)
    n = "n" if lead == 2 else ""
    degree = _contracted(walk, x, n + "gc", weight, "gco" if transposed else "goc", n + "go")
    channels = second * groups if transposed else first
    flat = _regrouped(Value((*x.shape[:-2], groups, channels // groups), degree), *x.shape[:-2], channels)
    degree = changed(flat.degree, lambda ids: ids.reshape(ids.shape + (1,) * spatial))
    return _with_bias(walk, Value(walk.shape, degree, shift=shift), lead - 1, bias)


def _convolved_shift(walk: Walk, x: Value, weight: Value, options: Convolution, how: str) -> tuple[Part, ...]:
    """The shift of a convolution: a product of weights (g, o, k) and patches (n, g, k, q), with all of space in q."""
    lead = len(x.shape) - len(weight.shape) + 2
    *batch, channels = x.shape[:lead]
    n, groups, places = "n" * len(batch), options.groups, math.prod(walk.shape[lead:])
    first, second = weight.shape[:2]
    kernel = _regrouped(weight, groups, first // groups, second, math.prod(weight.shape[2:]))
    order, outputs = ("gkop", second) if options.transposed else ("gokp", first // groups)
    varies = dict(zip(n + "gq", (*batch, groups, places), strict=True))
    shift = [*walk.through(kernel, order, n + "goq", ("patches", x.key, how), varies)]
    patches = _regrouped(x, *batch, groups, channels // groups, math.prod(x.shape[lead:]))
    for part in patches.shift:
        # what is the same everywhere stays so, unless it meets zeros around the edge
        uneven = options.padded or part.ids.shape[-1] > 1 or lead + 1 in varying(part)
        varies = {"g": groups, "o": outputs, "q": places if uneven else 1}
        alone = replace(patches, shift=(part,))
        shift += walk.through(alone, n + "gkp", n + "goq", ("kernel", weight.key, how), varies)
    return _regrouped(Value((*batch, groups, outputs, places), shift=merge(shift)), *walk.shape).shift


@rule("matmul", "mm", "bmm", "mv", "dot", shifts=True)
def _matmul(walk: Walk, a: Value, b: Value) -> Value:
    rank_a, rank_b = len(a.shape), len(b.shape)
    lead_a, lead_b = max(rank_a - 2, 0), max(rank_b - 2, 0)
    most = max(lead_a, lead_b)
    batch = "cdefghpqrs"[:most]
    i, j = "i" if rank_a > 1 else "", "j" if rank_b > 1 else ""
    out = contract(walk, a, batch[most - lead_a :] + i + "k", b, batch[most - lead_b :] + "k" + j, batch + i + j)
    return replace(out, shape=walk.shape)


@rule("addmm", "baddbmm", "addbmm", "addmv", shifts=True)
def _addmm(walk: Walk, bias: Value, a: Value, b: Value, beta: Any = 1, alpha: Any = 1) -> Value:
    product = _matmul(walk, a, b)
    return Value(walk.shape, walk.match(bias, product), shift=walk.sum_of((bias, beta), (product, alpha)))


@rule("embedding", shifts=True)
def _embedding(
    walk: Walk, weight: Value, index: Value, padding: int = -1, by_frequency: bool = False, sparse: bool = False
) -> Value:
    if by_frequency:  # what torch gives is not the gradient
        walk.notes.append(f"{walk.site}: scale_grad_by_freq changes the gradient; its weights were held fixed")
        walk.fix(weight)
    # A token's row is its output: the degree that differs over tokens is the one that is fixed at zero.
    if weight.root is not None and weight.root not in walk.used:
        walk.used.add(weight.root)
        for part in weight.degree:
            if part.axes == {0}:
                walk.equal((part,))
    if padding >= 0 and bool(walk.weights[weight.root or ""][padding].any()):  # a constant that is not zero
        walk.fix_degree(weight)
    degree = walk.uniform(weight, [0])
    degree = merge(changed(degree, lambda ids: ids.reshape((1,) * (len(walk.shape) - 1) + ids.shape[1:])))
    # a product with rows of zeros and a one
    names = letters(index.shape, skip="vf")
    shift = walk.through(weight, "vf", names + "f", index, sizes(index, names), total=1.0)
    return Value(walk.shape, degree, shift=shift)


@rule("scaled_dot_product_attention", shifts=True)
def _attention(
    walk: Walk, q: Value, k: Value, v: Value, mask: Any = None, dropout: float = 0.0, causal: bool = False,
    **kwargs: Any,
) -> Value:  # fmt: skip
    if kwargs.get("enable_gqa"):
        k, v = (_repeated(value, q.shape[-3]) for value in (k, v))
    heads = letters(q.shape[:-2], skip="tds")
    scores = contract(walk, q, heads + "td", k, heads + "sd", heads + "ts")
    if isinstance(mask, Value):
        walk.fix_degree(mask)
        scores = replace(scores, shift=merge([*scores.shift, *mask.broadcast(len(scores.shape)).shift]))
    walk.equal(scores.degree)  # a softmax sees all scores, but not what is added to all of a query's
    walk.forget(scores.shift, [len(scores.shape) - 1])
    total = None if dropout else (len(scores.shape) - 1, 1.0)
    weights = Value(scores.shape, total=total, key=walk.number(("weights", q.key, k.key)))
    return contract(walk, weights, heads + "ts", v, heads + "sd", heads + "td")


def _repeated(value: Value, heads: int) -> Value:
    """Heads shared by groups of queries, written out."""
    axis = len(value.shape) - 3
    count = heads // value.shape[axis]
    shape = (*value.shape[:axis], heads, *value.shape[axis + 1 :])
    return value.moved(lambda ids: np.repeat(ids, count, axis) if ids.shape[axis] > 1 else ids, shape)


# --- norms ----------------------------------------------------------------------------------------------------------


def _normalize(walk: Walk, x: Value, axes: Sequence[int]) -> None:
    """A norm forgets the degree of its input, which must be the same over the axes that it normalizes."""
    degree = walk.uniform(x, axes)
    walk.diagonal(x.degree)
    walk.eps(degree)


def _affine(walk: Walk, x: Value, weight: Any, bias: Any, axis: int | None = None) -> Any:
    """After a normalization of x: the degree of the gain, along `axis` or over the last axes; the bias has it too."""
    several = isinstance(walk.shape, list)
    shape = walk.shape[0] if several else walk.shape
    rank = len(shape)

    def spread(value: Any) -> Value:
        if not isinstance(value, Value):
            return Value((1,) * rank)
        return value.broadcast(rank) if axis is None else value.along(axis, rank)

    gain, offset = spread(weight), spread(bias)
    degree = walk.diagonal(gain.degree)
    if isinstance(bias, Value):
        walk.equal(degree, offset.degree)
        degree = degree if bias.degree else ()
    names = letters(shape)
    by_gain = walk.through(gain, names, names, ("normalized", walk.site, x.key), sizes(Value(shape), names))
    out = Value(shape, degree, shift=merge([*by_gain, *offset.shift]))
    return [out] if several else out


@rule("layer_norm", "rms_norm", shifts=True)
def _layer_norm(walk: Walk, x: Value, shape: Sequence[int], weight: Any = None, bias: Any = None, *args: Any) -> Value:
    axes = range(len(x.shape) - len(shape), len(x.shape))
    _normalize(walk, x, axes)
    if walk.operator == "rms_norm":
        walk.still(x)
        return _affine(walk, x, weight, None)  # its fourth argument is the epsilon
    walk.forget(x.shift, axes)
    out = _affine(walk, x, weight, bias)
    bare = len(axes) == 1 and weight is None and bias is None
    return replace(out, total=(axes[0], 0.0)) if bare else out


@rule("group_norm", shifts=True)
def _group_norm(walk: Walk, x: Value, groups: int, weight: Any = None, bias: Any = None, *args: Any) -> Value:
    grouped = _regrouped(x, x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    walk.diagonal(x.degree)
    _normalize(walk, grouped, range(2, len(grouped.shape)))
    walk.forget(grouped.shift, range(2, len(grouped.shape)))
    return _affine(walk, x, weight, bias, 1)


@rule(
    "instance_norm", "batch_norm", "_native_batch_norm_legit_functional", "_native_batch_norm_legit",
    "native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_with_update_functional",
    "_batch_norm_with_update", shifts=True,
)  # fmt: skip
def _batch_norm(walk: Walk, x: Value, weight: Any, bias: Any, *rest: Any) -> Any:
    if batch_statistics(walk.operator, rest):
        axes = statistics_axes(walk.operator, len(x.shape))
        _normalize(walk, x, axes)
        walk.forget(x.shift, axes)
        return _affine(walk, x, weight, bias, 1)
    walk.notes.append(f"{walk.site}: a batch norm in evaluation mode has no scale law; call model.train() first")
    walk.fix_degree(x)
    out = _affine(walk, x, weight, bias, 1)
    names = letters(x.shape)  # a product with a number for each channel
    shift = walk.through(x, names, names, ("gain", walk.site), {names[1]: x.shape[1]})
    several = isinstance(out, list)
    first = out[0] if several else out
    first = replace(first, shift=merge([*first.shift, *shift]))
    return [first] if several else first


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(walk: Walk, v: Value, g: Value, dim: int = 0) -> Any:
    """W = g v / ‖v‖: the direction's degree is forgotten, slice by slice; the second result is ‖v‖."""
    degree = walk.diagonal(walk.uniform(v, [axis for axis in range(len(v.shape)) if axis != dim % len(v.shape)]))
    return [g.degree, degree] if isinstance(walk.shape, list) else g.degree


# --- recurrent layers -----------------------------------------------------------------------------------------------


@rule("lstm", "gru", "rnn_tanh", "rnn_relu", shifts=True)
def _recurrent(
    walk: Walk, x: Value, start: Any, weights: Sequence[Value], biases: bool, layers: int, dropout: float, train: bool,
    both: bool, batch_first: bool,
) -> list[Value]:  # fmt: skip
    """One step of every layer: the state that goes in has the degree of the state that comes out."""
    states = start if isinstance(start, list) else [start]
    per, directions = (4 if biases else 2), (2 if both else 1)
    packed = getattr(walk.target, "_overloadname", "") == "data"
    if packed or len(weights) != per * layers * directions:
        walk.hold_fixed(f"{walk.operator} with {'packed sequences' if packed else 'projections'}")
        walk.fix(x, states, weights, biases)
        return []
    last: list[Value] = []
    for layer in range(layers):
        places = [per * (layer * directions + k) for k in range(directions)]
        out = [_step(walk, x, states, *weights[at : at + per]) for at in places]
        last += [replace(value, shape=(1, *walk.shape[1][1:])) for value in out]
        joint = (*x.shape[:-1], sum(value.shape[-1] for value in out))
        x = walk.call(None, "cat", joint, [out, -1], {})
    return [x, walk.call(None, "cat", walk.shape[1], [last, 0], {})]


def _step(walk: Walk, x: Value, states: Sequence[Value], w: Value, u: Value, b: Any = None, c: Any = None) -> Value:
    """The new state of one layer, from its input and its own last state."""
    width = u.shape[1]
    shape = (*x.shape[:-1], width)
    relu = walk.operator == "rnn_relu"
    ids = walk.system.fresh((1,) * (len(shape) - 1) + (width,)) if relu else None
    state = Value(shape, (Part(1.0, ids),) if ids is not None else (), key=walk.number(("state", walk.site, w.key)))
    gates = (*x.shape[:-1], w.shape[0])
    new = walk.call(None, "linear", gates, [x, w, b], {})
    old = walk.call(None, "linear", gates, [state, u, c], {})
    if walk.operator == "gru":  # r and z see the sum, the new state sees n's parts apart
        walk.fix_degree(new, old)
        sum_of = merge([*new.shift, *old.shift])
        walk.still(Value(gates, shift=_rows(sum_of, slice(None, 2 * width))))
        walk.still(*(Value(gates, shift=_rows(value.shift, slice(2 * width, None))) for value in (new, old)))
        return Value(shape)
    total = walk.call(None, "add", gates, [new, old], {})
    walk.still(total)
    if not relu:
        walk.fix_degree(total)
        return Value(shape)
    walk.equal(walk.diagonal(total.degree), state.degree)
    for value in states:
        if value.fill != 0:  # the first state is given
            walk.fix_degree(state, value)
    return Value(shape, state.degree)


def _rows(shift: tuple[Part, ...], rows: slice) -> tuple[Part, ...]:
    return moved(shift, lambda ids: ids[..., rows] if ids.shape[-1] > 1 else ids)
