"""Mending tracks: agents that were exchanged, tracks that break off and go on under another name, rounded positions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment


def relinked(x: NDArray, factor: float, max_gap: int, reach: float | None) -> tuple[NDArray[np.float64], int, int]:
    """Tracks (N, T, K, D), NaN where not seen, with identities mended; how many swaps and breaks were."""
    out = x.copy()
    swaps = breaks = 0
    step = np.linalg.norm(np.diff(x, axis=1), axis=-1)
    moved = step[np.isfinite(step)]
    usual = float(np.median(moved)) if len(moved) else 0.0
    reach = 3.0 * float(np.quantile(moved, 0.99)) if reach is None and len(moved) else reach or 0.0
    seen = np.isfinite(x).all(-1)
    odd = np.nanmax(np.where(np.isfinite(step), step, -1.0), -1) > factor * usual  # (N, T - 1)
    born = (seen[:, 1:] & ~seen[:, :-1]).any(-1)
    for n in np.flatnonzero((odd | born).any(1)):
        own = out[n]  # (T, K, D), mended frame by frame: what is done at t holds for all later frames
        for t in np.flatnonzero(odd[n] | born[n]) + 1:
            for cycle, to in _exchanged(own[t - 1], own[t], factor, usual):
                own[t:, to] = own[t:, cycle]
                swaps += 1
            for late, early in _continued(own, int(t), factor, max_gap, reach):
                own[t:, [early, late]] = own[t:, [late, early]]
                breaks += 1
    return out, swaps, breaks


def _exchanged(before: NDArray, now: NDArray, factor: float, usual: float) -> Iterator[tuple[list[int], list[int]]]:
    """Groups of agents that moved much less if they had each other's names: columns now, and where they belong."""
    here = np.flatnonzero(np.isfinite(before).all(-1) & np.isfinite(now).all(-1))
    if len(here) < 2:
        return
    cost = np.linalg.norm(before[here][:, None] - now[here][None], axis=-1)
    _, best = linear_sum_assignment(cost)
    left = set(range(len(here)))
    while left:  # each cycle of the exchange is judged by itself
        first = i = left.pop()
        cycle = [i]
        while (i := int(best[i])) != first:
            cycle.append(i)
            left.discard(i)
        alone = float(cost[cycle, cycle].sum())
        if len(cycle) > 1 and alone > factor * usual and float(cost[cycle, best[cycle]].sum()) * factor < alone:
            yield [int(here[best[c]]) for c in cycle], [int(here[c]) for c in cycle]


def _continued(own: NDArray, t: int, factor: float, max_gap: int, reach: float) -> Iterator[tuple[int, int]]:
    """Pairs of an agent that comes at t and the one, gone a little before, whose track it continues."""
    there = np.isfinite(own).all(-1)
    come = np.flatnonzero(there[t] & ~there[t - 1])
    past = there[max(0, t - 1 - max_gap) : t]
    gone = np.flatnonzero(~there[t] & past.any(0))
    if not len(come) or not len(gone):
        return
    age = past[::-1].argmax(0) + 1  # frames since an agent was seen; 1 is the frame before
    last = own[t - age, np.arange(own.shape[1])]
    away = np.linalg.norm(last[gone][:, None] - own[t, come][None], axis=-1)  # (gone, come)
    fits = away <= reach * age[gone][:, None]
    # Whoever returns within reach of the place where it was lost itself keeps its name.
    back = past.any(0)[come] & (np.linalg.norm(last[come] - own[t, come], axis=-1) <= reach * age[come])
    fits[:, back] = False
    rows, columns = linear_sum_assignment(np.where(fits, away, 1e12))
    for i, j in zip(rows, columns, strict=True):
        rivals = fits[:, j].copy()
        rivals[i] = False
        if fits[i, j] and (not rivals.any() or factor * away[i, j] < away[rivals, j].min()):  # alike: none is taken
            yield int(come[j]), int(gone[i])


def resolution(x: NDArray) -> float | None:
    """The grid on which all values lie, or None: the smallest difference, if all others are its multiples."""
    values = np.unique(x[np.isfinite(x)].ravel()[:200_000])
    if len(values) < 3:
        return None
    gaps = np.diff(values)
    tiny = 1e-6 * float(np.abs(values).max())  # two values of single precision that were one number
    gaps = gaps[gaps > max(tiny, 1e-12)]
    if not len(gaps):
        return None
    step = float(gaps.min())
    counts = (values - values[0]) / step
    off = np.abs(counts - np.round(counts)).max()
    # Values of a continuous kind have a smallest difference too, but no other is its multiple.
    return step if off < 0.05 and len(values) < 0.9 * np.isfinite(x).sum() else None
