"""The online loops, compiled: one pass over a chunk for one head, with everything fused and nothing allocated.

Every function has one specialization per floating-point type (all weights of a head lie in one flat array, so the
number of layers is data and not part of the type), is cached on disk where the installation or the user's cache folder
can be written, and releases the interpreter lock. :mod:`.kernels_numpy` holds the same functions without a compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])

# No nnan/ninf: infinities of exp() at the far tails are meant, and they divide to exact zeros.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_HASH = np.uint64(0x9E3779B97F4A7C15)


def _compile(**options: Any) -> Callable[[Function], Function]:
    """``numba.njit`` that is cached where any cache folder can be written, and plainly compiled where none can."""

    def decorate(function: Function) -> Function:
        try:
            return numba.njit(nogil=True, error_model="numpy", cache=True, **options)(function)
        except RuntimeError:  # "no locator available": a read-only installation and no user cache
            return numba.njit(nogil=True, error_model="numpy", **options)(function)

    return decorate


@_compile()
def standardize(x, moments, seen, learn, offset, limit, bias, base, side):  # type: ignore[no-untyped-def]
    """Welford's mean and variance; ``side = (x - mean) / (std + offset)`` (0 over 0 is 0), ``base = [bias, clip]``."""
    n, d = x.shape
    count = seen[0]
    for i in range(n):
        if learn:
            count += 1.0
            inverse = 1.0 / count
            for j in range(d):
                delta = x[i, j] - moments[0, j]
                mean = moments[0, j] + delta * inverse
                moments[0, j] = mean
                moments[1, j] += delta * (x[i, j] - mean)
        inverse = 1.0 / max(count, 1.0)
        base[i, 0] = bias
        for j in range(d):
            scale = math.sqrt(moments[1, j] * inverse) + offset
            value = (x[i, j] - moments[0, j]) / scale if scale > 0.0 else 0.0
            side[i, j] = value
            base[i, j + 1] = min(max(value, -limit), limit)
    seen[0] = count


@_compile()
def pack(projected, column, side, tolerances, planes, offsets, first, bits, contexts):  # type: ignore[no-untyped-def]
    """Bits of the half-spaces, packed to one integer a neuron.

    ``projected`` comes from a matrix product whose rounding depends on its shape and on the number of threads. Where a
    projection is closer to its threshold than that rounding can be, it is computed again in a fixed order in float64,
    so that a bit depends on the sample and on the hyperplane alone.
    """
    n, neurons = contexts.shape
    width = neurons * bits
    codes = np.empty(width, np.int32)
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
                        exact += np.float64(planes[column + h, c]) * np.float64(side[i, c])
                    codes[h] = power[h] if exact > threshold[h] else 0
        for k in range(neurons):
            index = first[k]
            for j in range(bits):
                index += codes[k * bits + j]
            contexts[i, k] = index


@_compile()
def hash_rows(keys, start, stop, slots):  # type: ignore[no-untyped-def]
    """Enter rows ``start .. stop - 1`` into an empty open-addressing table."""
    mask = np.uint64(slots.shape[0] - 1)
    for row in range(start, stop):
        place = ((np.uint64(keys[row]) * _HASH) >> np.uint64(20)) & mask
        while slots[place] >= 0:
            place = (place + np.uint64(1)) & mask
        slots[place] = row


@_compile()
def find_rows(contexts, start, bits, slots, keys, row_start, used, fans, layer, weights, initial, allocate, rows):  # type: ignore[no-untyped-def]
    """Row of every context from an open-addressing table; a context seen for the first time is given a row.

    Stops before the first sample for which the arrays might be too small and returns its number, so that the caller
    grows them and calls again. Contexts never seen are sent to the untrained row of their layer when not allocating.
    """
    n, neurons = contexts.shape
    mask = np.uint64(slots.shape[0] - 1)
    widest = 0
    for fan in fans:
        widest = max(widest, fan)
    for i in range(start, n):
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
                    row_start[row] = used[1]
                    for c in range(fans[layer[k]]):
                        weights[used[1] + c] = initial[layer[k]]
                    used[0] += 1
                    used[1] += fans[layer[k]]
            rows[i, k] = row
    return n


@_compile(fastmath=_FAST)
def run_bernoulli(  # type: ignore[no-untyped-def]
    base, fan, targets, rates, rows, row_start, weights, counts, sizes, constants, official, learn, buffers, logits
):
    """One head, one sample after the other: dot, sigmoid and update of each selected row in one visit.

    The update of a neuron touches its own row only and reads the layer's inputs, so doing it at once leaves the
    forward pass with the weights from before the step in every layer.
    """
    bias, limit, bound, one, zero = constants[0], constants[1], constants[2], constants[3], constants[4]
    for i in range(base.shape[0]):
        values = base[i, :fan]
        width = fan
        neuron = 0
        for layer in range(sizes.shape[0]):
            out = buffers[layer & 1]
            out[0] = bias
            for k in range(sizes[layer]):
                r = rows[i, neuron]
                row = weights[row_start[r] : row_start[r] + width]
                a = zero
                for c in range(width):
                    a += row[c] * values[c]
                logits[i, neuron] = a
                out[k + 1] = min(max(a, -limit), limit)
                if learn:
                    counts[r] += 1
                    step = rates[i] * (one / (one + math.exp(-a)) - targets[i])
                    if official and abs(a) > limit:
                        step = zero
                    for c in range(width):
                        row[c] = min(max(row[c] - step * values[c], -bound), bound)
                neuron += 1
            width = sizes[layer] + 1
            values = out[:width]


@_compile()
def running_moments(y, moments, seen, scaled, before):  # type: ignore[no-untyped-def]
    """Standardize a stream of targets by Welford's moments; ``before`` gets mean and deviation from before each one."""
    for i in range(y.shape[0]):
        deviation = math.sqrt(moments[1, 0] / max(seen[0], 1.0))
        before[0, i] = moments[0, 0]
        before[1, i] = deviation if deviation > 0.0 else 1.0
        seen[0] += 1.0
        delta = y[i] - moments[0, 0]
        moments[0, 0] += delta / seen[0]
        moments[1, 0] += delta * (y[i] - moments[0, 0])
        deviation = math.sqrt(moments[1, 0] / seen[0])
        scaled[i] = (y[i] - moments[0, 0]) / deviation if deviation > 0.0 else 0.0


@_compile(fastmath=_FAST)
def run_gaussian(  # type: ignore[no-untyped-def]
    base, targets, rates, rows, row_start, weights, counts, sizes, constants, official, learn, buffers, out
):
    """One pass of the Gaussian network; ``out[i]`` gets the mean and the precision of every neuron."""
    low, high, bound, one, zero = constants[0], constants[1], constants[2], constants[3], constants[4]
    longest = constants[5]
    half = one / (one + one)
    for i in range(base.shape[0]):
        width = base.shape[1]
        for c in range(width):
            buffers[0, 0, c] = base[i, c]
            buffers[0, 1, c] = one
        neuron = 0
        for layer in range(sizes.shape[0]):
            mean, precision = buffers[layer & 1, 0, :width], buffers[layer & 1, 1, :width]
            following = buffers[(layer + 1) & 1]
            for c in range(3):
                following[0, c] = base[i, c]
                following[1, c] = one
            square = zero
            weighted = zero
            moment = zero
            for c in range(width):
                squared = precision[c] * precision[c]
                square += squared
                weighted += squared * mean[c]
                moment += squared * mean[c] * mean[c]
            for k in range(sizes[layer]):
                r = rows[i, neuron]
                row = weights[row_start[r] : row_start[r] + width]
                tau = zero
                total = zero
                for c in range(width):
                    tau += row[c] * precision[c]
                    total += row[c] * precision[c] * mean[c]
                inside = min(max(tau, low), high)
                shift = (tau - inside) / square
                mu = (total - shift * weighted) / inside
                out[i, 0, neuron] = mu
                out[i, 1, neuron] = inside
                following[0, k + 3] = mu
                following[1, k + 3] = inside
                if learn:
                    counts[r] += 1
                    error = targets[i] - mu
                    common = half * error * error - half / inside
                    along = zero
                    if official and shift != zero:
                        for c in range(width):
                            along += precision[c] * precision[c] * (common - error * (mean[c] - mu))
                        along /= square
                    spread = max(moment - (mu + mu) * weighted + mu * mu * square, zero)
                    information = (spread + square * (one / inside + error * error)) / inside
                    step = min(rates[i], longest / information)
                    kept = zero if official else shift
                    for c in range(width):
                        slope = common - error * (mean[c] - mu) - along
                        row[c] = min(max(row[c] - precision[c] * (kept + step * slope), -bound), bound)
                neuron += 1
            width = sizes[layer] + 3
