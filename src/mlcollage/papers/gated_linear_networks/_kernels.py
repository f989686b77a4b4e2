"""The online loops, compiled: one pass over a chunk for one head, with everything fused and no array made per sample.

The loops read tuples of arrays whose names and shapes stand below. Every function has one specialization per
floating-point type (all weights of a head lie in one flat array, so the number of layers is data and not part of the
type), is cached on disk where the installation or the user's cache folder can be written, and
releases the interpreter lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])
Named = TypeVar("Named", bound=tuple)

# No nnan/ninf: infinities of exp() at the far tails are meant, and they divide to exact zeros.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_HASH = np.uint64(0x9E3779B97F4A7C15)


class Samples(NamedTuple):
    """A chunk of the stream, as one head reads it. Targets and rates are empty where nothing is learned."""

    base: Array  # (n, 1 + d): logit(p_0), the bias first; Gaussian network (n, 3 + d): means, the three biases first
    targets: Array  # (n,): x
    rates: Array  # (n,): eta_t
    rows: Array  # (n, neurons) int32: number of the row w_c(z) that each neuron's context selects


class Rows(NamedTuple):
    """Weight rows of one head, of all its layers."""

    start: Array  # (rows,) int64: where a row begins in `weights`; it is as long as its neuron has inputs
    weights: Array  # (total,): the rows, one after the other
    counts: Array  # (rows,) int64: samples that each row was updated on


class LazyRows(NamedTuple):
    """Which contexts have rows: an open-addressing hash table from (neuron, context) to a row's number."""

    slots: Array  # (a power of two,) int32: a row's number, -1 where free
    keys: Array  # (capacity,) int64: neuron * 2**m + context of each row
    used: Array  # (2,) int64: rows and weights in use
    layer: Array  # (neurons,) int32: layer of each neuron
    fans: Array  # (layers,) int64: inputs of a neuron
    initial: Array  # (layers,): starting weight


class Mixing(NamedTuple):
    """Constants of Bernoulli neurons, all in the weights' type: a constant of another type would widen the loop."""

    bias: Any  # logit of the constant input beta
    limit: Any  # logit(1 - eps), the clip of a probability as a clip of its logit
    box: Any  # b, the bound of a weight
    one: Any
    zero: Any


class Product(NamedTuple):
    """Constants of Gaussian neurons, all in the weights' type."""

    low: Any  # smallest precision, 1 / sigma_max^2
    high: Any  # largest precision, 1 / sigma_min^2
    box: Any  # bound of a weight
    longest: Any  # longest step in units of the neuron's inverse information
    one: Any
    zero: Any


def plain(named: Named) -> Named:
    """The same values as a plain tuple: numba takes those in a third of the time, which counts for single samples."""
    return cast(Named, tuple(named))


def _compile(**options: Any) -> Callable[[Function], Function]:
    """``numba.njit`` that is cached where any cache folder can be written, and plainly compiled where none can."""

    def decorate(function: Function) -> Function:
        try:
            return numba.njit(nogil=True, error_model="numpy", cache=True, **options)(function)
        except RuntimeError:  # "no locator available": a read-only installation and no user cache
            return numba.njit(nogil=True, error_model="numpy", **options)(function)

    return decorate


@_compile()
def _take_in(moments: Array, j: int, value: float, most: float, memory: float) -> None:
    """Welford's update of column ``j`` of ``moments (3, d)``: count, mean, sum of squared deviations.

    The count stops at ``memory``, from which on older samples fade. A value counts as at most
    ``max(most, sqrt(count))`` deviations away: one that comes once in so many samples can be no further. So a single
    value of any size less than doubles the sum of squares once ``count >= most**2``.
    """
    count, mean, square = moments[0, j], moments[1, j], moments[2, j]
    if count >= memory:
        square *= (memory - 1.0) / count
        count = memory - 1.0
    delta = value - mean
    largest = max(most * most / max(count, 1.0), 1.0) * square
    if square > 0.0 and delta * delta > largest:
        delta = math.copysign(math.sqrt(largest), delta)
    count += 1.0
    moments[0, j] = count
    moments[1, j] = mean + delta / count
    moments[2, j] = square + delta * (delta - delta / count)


@_compile()
def standardize(
    x: Array,
    moments: Array,
    learn: bool,
    offset: float,
    limit: float,
    bias: float,
    most: float,
    memory: float,
    base: Array,
    side: Array,
) -> None:
    """``side = (x - mean) / (std + offset)`` within ``most`` (0 over 0 is 0), ``base = [bias, clip]``.

    NaN is a missing value, which counts as the mean. ``x`` and ``side`` are ``(n, d)``, ``base`` is ``(n, 1 + d)``;
    ``moments`` as in :func:`_take_in`.
    """
    n, d = x.shape
    for i in range(n):
        base[i, 0] = bias
        for j in range(d):
            value = 0.0
            if not math.isnan(x[i, j]):
                if learn:
                    _take_in(moments, j, x[i, j], most, memory)
                scale = math.sqrt(moments[2, j] / max(moments[0, j], 1.0)) + offset
                if scale > 0.0:
                    value = min(max((x[i, j] - moments[1, j]) / scale, -most), most)
            side[i, j] = value
            base[i, j + 1] = min(max(value, -limit), limit)


@_compile()
def pack(
    projected: Array,
    column: int,
    side: Array,
    tolerances: Array,
    normals: Array,
    offsets: Array,
    first: Array,
    bits: int,
    contexts: Array,
) -> None:
    """``contexts[i, k] = first[k] + sum_j 2^j [v_kj . z_i > b_kj]``, for the neurons of one head.

    ``projected (n, >= column + neurons * bits)`` holds the products ``v . z`` from ``column`` on, ``side (n, D)`` the
    ``z``, ``normals`` and ``offsets`` the ``v`` and ``b``, ``contexts`` is ``(n, neurons)``.

    The products come from a matrix product whose rounding depends on its shape and on the number of threads. Where one
    is closer to its threshold than that rounding can be (``tolerances (n,)``), it is computed again in a fixed order in
    float64, so that a bit depends on the sample and on the hyperplane alone.
    """
    n, neurons = contexts.shape
    width = neurons * bits
    codes = np.empty(width, np.int32)  # 2^j where the sample is on the positive side, else 0
    power = np.empty(width, np.int32)
    for h in range(width):
        power[h] = 1 << (h % max(bits, 1))
    threshold = offsets[column : column + width]
    for i in range(n):
        margins = projected[i, column : column + width]
        tolerance = tolerances[i]
        near = 0
        for h in range(width):  # two plain loops, which vectorize
            margin = margins[h] - threshold[h]
            codes[h] = power[h] if margin > 0 else 0
            near += 1 if abs(margin) <= tolerance else 0
        if near:
            for h in range(width):
                if abs(margins[h] - threshold[h]) <= tolerance:
                    exact = 0.0
                    for c in range(side.shape[1]):
                        exact += np.float64(normals[column + h, c]) * np.float64(side[i, c])
                    codes[h] = power[h] if exact > threshold[h] else 0
        for k in range(neurons):
            index = first[k]
            for j in range(bits):
                index += codes[k * bits + j]
            contexts[i, k] = index


@_compile()
def hash_rows(keys: Array, start: int, stop: int, slots: Array) -> None:
    """Enter rows ``start .. stop - 1`` into an empty open-addressing table (:class:`LazyRows`)."""
    mask = np.uint64(slots.shape[0] - 1)
    for row in range(start, stop):
        place = ((np.uint64(keys[row]) * _HASH) >> np.uint64(20)) & mask
        while slots[place] >= 0:
            place = (place + np.uint64(1)) & mask
        slots[place] = row


@_compile()
def find_rows(contexts: Array, done: int, bits: int, lazy: LazyRows, table: Rows, allocate: bool, rows: Array) -> int:
    """Number of the row of every context, ``(n, neurons)`` both; a context seen for the first time is given a row.

    Begins with sample ``done``, stops before the first sample for which the arrays might be too small and returns its
    number, so that the caller grows them and calls again. Contexts never seen are sent to the untrained row of their
    layer (rows ``0 .. layers - 1``) when not allocating.
    """
    slots, keys, used, layer, fans, initial = lazy
    start, weights, _ = table
    n, neurons = contexts.shape
    mask = np.uint64(slots.shape[0] - 1)
    widest = 0
    for fan in fans:
        widest = max(widest, fan)
    for i in range(done, n):
        if allocate and (
            used[0] + neurons > keys.shape[0]
            or 2 * (used[0] + neurons) > slots.shape[0]
            or used[1] + neurons * widest > weights.shape[0]
        ):
            return i
        for k in range(neurons):
            key = (np.int64(k) << bits) | np.int64(contexts[i, k])
            place = ((np.uint64(key) * _HASH) >> np.uint64(20)) & mask
            while slots[place] >= 0 and keys[slots[place]] != key:
                place = (place + np.uint64(1)) & mask
            row = slots[place]
            if row < 0:
                row = layer[k]
                if allocate:
                    row = used[0]
                    slots[place] = row
                    keys[row] = key
                    start[row] = used[1]
                    for c in range(fans[layer[k]]):
                        weights[used[1] + c] = initial[layer[k]]
                    used[0] += 1
                    used[1] += fans[layer[k]]
            rows[i, k] = row
    return n


@_compile(fastmath=_FAST)
def run_bernoulli(
    samples: Samples,
    table: Rows,
    sizes: Array,
    fan: int,
    constants: Mixing,
    official: bool,
    learn: bool,
    logits: Array,
) -> None:
    """One head, one sample after the other; ``logits (n, neurons)`` gets ``w . logit(p)`` of every neuron.

    ``sizes (layers,)`` are neurons per layer, ``fan`` the inputs of the first layer (the first columns of the base).
    Product, sigmoid and update of a row are done in one visit: the update of a neuron touches its own row only and
    reads the inputs of its layer, so the forward pass still has the weights from before the step in every layer.
    """
    base, targets, rates, rows = samples
    start, weights, counts = table
    bias, limit, box, one, zero = constants
    buffers = np.empty((2, sizes.max() + 1), base.dtype)  # inputs of this layer and of the next, by turns
    for i in range(base.shape[0]):
        logit_p = base[i, :fan]  # (fan,), with the bias
        width = fan
        neuron = 0
        for layer in range(sizes.shape[0]):
            passed_on = buffers[layer & 1]
            passed_on[0] = bias
            for k in range(sizes[layer]):
                r = rows[i, neuron]
                w = weights[start[r] : start[r] + width]  # (width,), a view: written below
                # q = sigmoid(w . logit(p)), and clip(q, eps, 1 - eps) is passed on
                a = zero
                for c in range(width):
                    a += w[c] * logit_p[c]
                logits[i, neuron] = a
                passed_on[k + 1] = min(max(a, -limit), limit)
                if learn:
                    counts[r] += 1
                    # w <- clip(w - eta (q - x) logit(p), -b, b); the official gradient is 0 where q was clipped
                    step = rates[i] * (one / (one + math.exp(-a)) - targets[i])
                    if official and abs(a) > limit:
                        step = zero
                    for c in range(width):
                        w[c] = min(max(w[c] - step * logit_p[c], -box), box)
                neuron += 1
            width = sizes[layer] + 1
            logit_p = passed_on[:width]


@_compile()
def running_moments(y: Array, moments: Array, most: float, memory: float, scaled: Array, before: Array) -> None:
    """Standardize a stream of targets; ``before`` gets mean and deviation from before each one.

    ``y`` and ``scaled`` are ``(n,)``, ``before`` is ``(2, n)``; ``moments (3, 1)`` as in :func:`_take_in`.
    """
    for i in range(y.shape[0]):
        deviation = math.sqrt(moments[2, 0] / max(moments[0, 0], 1.0))
        before[0, i] = moments[1, 0]
        before[1, i] = deviation if deviation > 0.0 else 1.0
        _take_in(moments, 0, y[i], most, memory)
        deviation = math.sqrt(moments[2, 0] / moments[0, 0])
        scaled[i] = min(max((y[i] - moments[1, 0]) / deviation, -most), most) if deviation > 0.0 else 0.0


@_compile(fastmath=_FAST)
def run_gaussian(
    samples: Samples, table: Rows, sizes: Array, constants: Product, official: bool, learn: bool, out: Array
) -> None:
    """One pass of the Gaussian network; ``out (n, 2, neurons)`` gets the mean and the precision of every neuron.

    ``samples.base`` holds the means of the three bias Gaussians and of the base Gaussians, all of variance 1.
    """
    base, targets, rates, rows = samples
    start, weights, counts = table
    low, high, box, longest, one, zero = constants
    half = one / (one + one)
    # (this layer's and the next one's inputs, means and precisions, inputs)
    buffers = np.empty((2, 2, max(base.shape[1], sizes.max() + 3)), base.dtype)
    for i in range(base.shape[0]):
        width = base.shape[1]
        for c in range(width):
            buffers[0, 0, c] = base[i, c]
            buffers[0, 1, c] = one
        neuron = 0
        for layer in range(sizes.shape[0]):
            mean, precision = buffers[layer & 1, 0, :width], buffers[layer & 1, 1, :width]  # mu_i, lambda_i
            following = buffers[(layer + 1) & 1]
            for c in range(3):
                following[0, c] = base[i, c]
                following[1, c] = one
            square = zero  # |lambda|^2
            weighted = zero  # sum lambda_i^2 mu_i
            moment = zero  # sum lambda_i^2 mu_i^2
            for c in range(width):
                squared = precision[c] * precision[c]
                square += squared
                weighted += squared * mean[c]
                moment += squared * mean[c] * mean[c]
            for k in range(sizes[layer]):
                r = rows[i, neuron]
                w = weights[start[r] : start[r] + width]  # (width,), a view: written below
                tau = zero
                total = zero
                for c in range(width):
                    # Only the official code stores weights outside of the box; it mixes with them inside of it.
                    weighed = min(max(w[c], -box), box) * precision[c]
                    tau += weighed
                    total += weighed * mean[c]
                # Into the bounds along lambda: w - shift lambda has the precision `inside` and the mean mu.
                inside = min(max(tau, low), high)
                if official and tau < zero:
                    inside = high  # 1 / tau, the variance, is below its smallest value: that is what the code asks
                shift = (tau - inside) / square
                mu = (total - shift * weighted) / inside
                out[i, 0, neuron] = mu
                out[i, 1, neuron] = inside
                following[0, k + 3] = mu
                following[1, k + 3] = inside
                if learn:
                    counts[r] += 1
                    # dl/dw_i = lambda_i ( -1/(2 tau) + (x - mu)^2 / 2 - (x - mu)(mu_i - mu) )
                    error = targets[i] - mu
                    common = half * error * error - half / inside
                    along = zero  # the part along lambda, which the official gradient loses in the projection
                    if official and shift != zero:
                        for c in range(width):
                            along += precision[c] * precision[c] * (common - error * (mean[c] - mu))
                        along /= square
                    # sum lambda_i^2 ((mu_i - mu)^2 + 1/tau + (x - mu)^2) / tau bounds the step
                    spread = max(moment - (mu + mu) * weighted + mu * mu * square, zero)
                    information = (spread + square * (one / inside + error * error)) / inside
                    step = min(rates[i], longest / information)
                    for c in range(width):
                        move = step * (common - error * (mean[c] - mu) - along)
                        if official:
                            # Through the clip to the box: no slope outside of it, half of it on its edge.
                            size = abs(w[c])
                            w[c] -= precision[c] * move * (one if size < box else half if size == box else zero)
                        else:
                            w[c] = min(max(w[c] - precision[c] * (shift + move), -box), box)
                neuron += 1
            width = sizes[layer] + 3
