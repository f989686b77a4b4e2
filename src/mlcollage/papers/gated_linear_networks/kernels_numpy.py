"""The loops of :mod:`.kernels_numba` in numpy alone: the same functions and results (to rounding), but slower."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def standardize(
    x: Array,
    moments: Array,
    seen: Array,
    learn: bool,
    offset: float,
    limit: float,
    bias: float,
    base: Array,
    side: Array,
) -> None:
    """Welford's mean and variance; ``side = (x - mean) / (std + offset)`` (0 over 0 is 0), ``base = [bias, clip]``."""
    base[:, 0] = bias
    for i, sample in enumerate(x):
        if learn:
            seen[0] += 1.0
            delta = sample - moments[0]
            moments[0] += delta * (1.0 / seen[0])
            moments[1] += delta * (sample - moments[0])
        scale = np.sqrt(moments[1] * (1.0 / max(seen[0], 1.0))) + offset
        side[i] = np.where(scale > 0, sample - moments[0], 0) / np.where(scale > 0, scale, 1)
    np.clip(side, -limit, limit, out=base[:, 1:])


def pack(
    projected: Array,
    column: int,
    side: Array,
    tolerances: Array,
    planes: Array,
    offsets: Array,
    first: Array,
    bits: int,
    contexts: Array,
) -> None:
    """Bits of the half-spaces, packed to one integer a neuron; near ties are computed again in a fixed order."""
    columns = slice(column, column + contexts.shape[1] * bits)
    threshold = offsets[columns]
    margin = projected[:, columns] - threshold
    inside = margin > 0
    near = np.abs(margin) <= tolerances[:, None]
    for i, h in zip(*np.nonzero(near), strict=True):
        exact = np.cumsum(planes[column + h].astype(np.float64) * side[i].astype(np.float64))
        inside[i, h] = (exact[-1] if exact.size else 0.0) > threshold[h]
    powers = 1 << np.arange(bits, dtype=np.int64)
    contexts[:] = first + inside.reshape(len(contexts), -1, bits) @ powers


def hash_rows(keys: Array, start: int, stop: int, slots: Array) -> None:
    """Enter rows ``start .. stop - 1`` into an empty open-addressing table."""
    mask = len(slots) - 1
    for row in range(start, stop):
        place = (((int(keys[row]) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF) >> 20) & mask
        while slots[place] >= 0:
            place = (place + 1) & mask
        slots[place] = row


def find_rows(
    contexts: Array,
    start: int,
    bits: int,
    slots: Array,
    keys: Array,
    row_start: Array,
    used: Array,
    fans: Array,
    layer: Array,
    weights: Array,
    initial: Array,
    allocate: bool,
    rows: Array,
) -> int:
    """Row of every context; see :func:`.kernels_numba.find_rows`. The hash table itself (``slots``) is kept alike."""
    n, neurons = contexts.shape
    mask = len(slots) - 1
    for i in range(start, n):
        full = (
            used[0] + neurons > len(keys)
            or 2 * (used[0] + neurons) > len(slots)
            or used[1] + neurons * fans.max() > len(weights)
        )
        if allocate and full:
            return i
        for k in range(neurons):
            key = (k << bits) | int(contexts[i, k])
            place = (((key * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF) >> 20) & mask
            while slots[place] >= 0 and keys[slots[place]] != key:
                place = (place + 1) & mask
            row = slots[place]
            if row < 0:
                row = layer[k]
                if allocate:
                    row = used[0]
                    slots[place], keys[row], row_start[row] = row, key, used[1]
                    weights[used[1] : used[1] + fans[layer[k]]] = initial[layer[k]]
                    used[0] += 1
                    used[1] += fans[layer[k]]
            rows[i, k] = row
    return n


def run_bernoulli(
    base: Array,
    fan: int,
    targets: Array,
    rates: Array,
    rows: Array,
    row_start: Array,
    weights: Array,
    counts: Array,
    sizes: Array,
    constants: Array,
    official: bool,
    learn: bool,
    buffers: Array,
    logits: Array,
) -> None:
    """One head, one sample after the other, all neurons of a layer at once; ``buffers`` is not used."""
    bias, limit, bound, one, _ = constants
    ends = np.cumsum(sizes)
    for i in range(len(base)):
        values = base[i, :fan]
        for end, size in zip(ends, sizes, strict=True):
            selected = rows[i, end - size : end]
            where = row_start[selected][:, None] + np.arange(len(values))
            chosen = weights[where]
            a = chosen @ values
            logits[i, end - size : end] = a
            if learn:
                counts[selected] += 1
                with np.errstate(over="ignore"):
                    step = rates[i] * (one / (one + np.exp(-a)) - targets[i])
                if official:
                    step = np.where(np.abs(a) > limit, 0, step)
                weights[where] = np.clip(chosen - step[:, None] * values, -bound, bound)
            values = np.concatenate([[bias], np.clip(a, -limit, limit)]).astype(base.dtype)


def running_moments(y: Array, moments: Array, seen: Array, scaled: Array, before: Array) -> None:
    """Standardize a stream of targets by Welford's moments; ``before`` gets mean and deviation from before each one."""
    for i, value in enumerate(y):
        before[:, i] = moments[0, 0], np.sqrt(moments[1, 0] / max(seen[0], 1.0)) or 1.0
        seen[0] += 1.0
        delta = value - moments[0, 0]
        moments[0, 0] += delta / seen[0]
        moments[1, 0] += delta * (value - moments[0, 0])
        deviation = np.sqrt(moments[1, 0] / seen[0])
        scaled[i] = (value - moments[0, 0]) / deviation if deviation > 0 else 0.0


def run_gaussian(
    base: Array,
    targets: Array,
    rates: Array,
    rows: Array,
    row_start: Array,
    weights: Array,
    counts: Array,
    sizes: Array,
    constants: Array,
    official: bool,
    learn: bool,
    buffers: Array,
    out: Array,
) -> None:
    """One pass of the Gaussian network, all neurons of a layer at once; ``buffers`` is not used."""
    low, high, bound, _, _, longest = constants
    ends = np.cumsum(sizes)
    for i in range(len(base)):
        mean, precision = base[i], np.ones_like(base[i])
        for end, size in zip(ends, sizes, strict=True):
            mine = slice(end - size, end)
            selected = rows[i, mine]
            where = row_start[selected][:, None] + np.arange(len(mean))
            chosen = weights[where]
            tau = chosen @ precision
            inside = np.clip(tau, low, high)
            shift = (tau - inside) / (precision @ precision)
            projected = chosen - shift[:, None] * precision
            mu = projected @ (precision * mean) / inside
            out[i, 0, mine], out[i, 1, mine] = mu, inside
            if learn:
                counts[selected] += 1
                error = (targets[i] - mu)[:, None]
                squared = precision**2
                spread = np.sum(squared * (mean - mu[:, None]) ** 2, axis=1)
                information = (spread + squared.sum() * (1 / inside + error[:, 0] ** 2)) / inside
                step = np.minimum(rates[i], longest / information)[:, None]
                slope = precision * (0.5 * error**2 - 0.5 / inside[:, None] - error * (mean - mu[:, None]))
                if official:
                    along = (slope @ precision / (precision @ precision))[:, None] * precision
                    slope -= np.where(shift[:, None] != 0, along, 0)
                start = chosen if official else projected
                weights[where] = np.clip(start - step * slope, -bound, bound)
            mean = np.concatenate([base[i, :3], mu])
            precision = np.concatenate([np.ones(3, base.dtype), inside])
