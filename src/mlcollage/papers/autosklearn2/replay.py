"""Plays a portfolio on measured losses: thousands of AutoML runs in a second (section 3.2, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .policy import Policy
from .tensor import PerformanceTensor

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Curves:
    """What the compiled player reads: validation losses, normalized test losses, run times, places on the curves."""

    valid: FloatArray
    test: FloatArray
    runtime: FloatArray
    last: IntArray
    rungs: IntArray
    sizes: IntArray
    bracket: int
    initial: FloatArray
    limit: float


def curves_of(
    tensor: PerformanceTensor, policy: Policy, time_limit: float | None, initial_loss: ArrayLike | None, pick_on: str
) -> _Curves:
    """Bring a tensor into the form that the player reads; refuses one with gaps."""
    checks.choice("pick_on", pick_on, ("valid", "test"))
    limit = np.inf if time_limit is None else checks.positive("time_limit", time_limit)
    if not isinstance(tensor, PerformanceTensor):
        raise InvalidInput(f"expected a PerformanceTensor, not {type(tensor).__name__}; make one of your losses.")
    if 0 in tensor.shape:
        raise InvalidInput(f"the tensor is empty: {tensor.shape[0]} tasks, {tensor.shape[1]} candidates.")
    last = tensor.last
    if (last < 0).any():
        t, c = np.argwhere(last < 0)[0]
        raise InvalidInput(
            f"candidate {c} was not measured on task {tensor.tasks[t]!r}; use tensor.complete(), or measure the rest."
        )
    test = tensor.normalize()
    schedule = policy.schedule
    initial = np.ones(len(tensor.tasks)) if initial_loss is None else np.asarray(initial_loss, np.float64)
    if initial.shape != (len(tensor.tasks),):
        raise InvalidInput(f"initial_loss has shape {initial.shape}; expected {(len(tensor.tasks),)}, one for a task.")
    if not np.isfinite(initial).all():
        raise InvalidInput("initial_loss must be finite numbers; 1 where nothing is there yet.")
    return _Curves(
        np.nan_to_num(test if pick_on == "test" else tensor.valid, nan=1.0),
        np.nan_to_num(test, nan=1.0),
        np.zeros_like(test) if time_limit is None else np.nan_to_num(tensor.runtime, nan=np.inf),
        last,
        tensor.rung_index([budget for _, budget in schedule]),
        np.array([size for size, _ in schedule], np.int64),
        schedule[0][0],
        initial,
        limit,
    )


@numba.njit(cache=True)
def _run(valid, test, runtime, end, left):  # type: ignore[no-untyped-def]
    """One run with ``left`` seconds: validation loss, test loss, seconds spent."""
    if left > runtime[end]:
        return valid[end], test[end], runtime[end]
    if left <= runtime[0]:
        return 1.0, 1.0, left
    at = 0
    while at < end and runtime[at + 1] < left:
        at += 1
    return valid[at], test[at], left


@numba.njit(cache=True)
def _play(valid, test, runtime, last, rungs, sizes, bracket, initial, limit, cutoff, sequence, seen):  # type: ignore[no-untyped-def]
    """The loss of a sequence of candidates on one task; ``seen`` gets the loss after each run that was begun."""
    best, loss, spent, count = np.inf, 1.0, 0.0, 0
    for start in range(0, len(sequence), bracket):
        runners = sequence[start : start + bracket]
        for k in range(len(sizes)):
            # A rung that would sort out nobody is left out: few members start higher.
            if k + 1 < len(sizes) and sizes[k + 1] >= len(runners):
                continue
            scores = np.ones(len(runners))
            for i in range(len(runners)):
                if spent >= limit:
                    return min(loss, initial), spent, count
                c = runners[i]
                end = min(rungs[c, k], last[c])
                v, t, s = _run(valid[c], test[c], runtime[c], end, min(cutoff, limit - spent))
                spent += s
                scores[i] = v
                if v < best:
                    best, loss = v, t
                if count < len(seen):
                    seen[count] = min(loss, initial)
                count += 1
            if k + 1 < len(sizes):
                runners = runners[np.argsort(scores, kind="mergesort")[: sizes[k + 1]]]
    return min(loss, initial), spent, count


@numba.njit(cache=True)
def _play_all(valid, test, runtime, last, rungs, sizes, bracket, initial, limit, cutoff, sequences, seen):  # type: ignore[no-untyped-def]
    """Losses (sequences, tasks); ``seen`` is (sequences, tasks, runs)."""
    out = np.empty((len(sequences), len(valid)))
    spent = np.empty((len(sequences), len(valid)))
    for s in range(len(sequences)):
        for t in range(len(valid)):
            row = seen[s, t] if seen.shape[2] else np.empty(0)
            out[s, t], spent[s, t], n = _play(
                valid[t],
                test[t],
                runtime[t],
                last[t],
                rungs,
                sizes,
                bracket,
                initial[t],
                limit,
                cutoff,
                sequences[s],
                row,
            )
            if n > 0:
                for i in range(n, len(row)):
                    row[i] = row[n - 1]
    return out, spent


def play_all(
    c: _Curves, sequences: IntArray, cutoff: float, runs: int = 0
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Losses and seconds ``(sequences, tasks)``, and the losses after each run ``(sequences, tasks, runs)``."""
    seen = np.ones((len(sequences), len(c.valid), runs))
    loss, spent = _play_all(
        c.valid, c.test, c.runtime, c.last, c.rungs, c.sizes, c.bracket, c.initial, c.limit, cutoff, sequences, seen
    )
    return loss, spent, seen


def whole_numbers(given: Any, name: str) -> IntArray:
    """Numbers of candidates as integers; 0.5 is none."""
    found = np.asarray(given)
    if found.dtype.kind not in "iu" and not (found.dtype.kind == "f" and bool((found == np.round(found)).all())):
        raise InvalidInput(f"{name} must be numbers of candidates, all of one length, not {found.dtype}.")
    return found.astype(np.int64)


@dataclass(frozen=True, eq=False)
class Replay:
    """What :func:`simulate` gives.

    Parameters
    ----------
    loss
        ``(sequences, tasks)``: the normalized test loss of the pipeline with the lowest validation loss.
    seconds
        ``(sequences, tasks)``: how long the fits took.
    after
        ``(sequences, tasks, runs)``: the loss after each run; empty without ``runs``.
    """

    loss: FloatArray
    seconds: FloatArray
    after: FloatArray


def simulate(
    tensor: PerformanceTensor,
    sequences: Sequence[Any] | IntArray,
    policy: Policy | None = None,
    *,
    time_limit: float | None = None,
    cutoff: float | None = None,
    initial_loss: ArrayLike | None = None,
    pick_on: str = "valid",
    runs: int = 0,
) -> Replay:
    r"""Play sequences of candidates on every task of a tensor, as an AutoML system would.

    .. math:: L_d(P) = \tilde L_d(\arg\min_{c \in P} V_d(c))

    The candidate with the lowest validation loss V counts, the earliest one at a tie, with its normalized test loss.
    Under successive halving candidates play in brackets of 16, in order; a rung that would sort out nobody is left out.
    Each rung pays the time of its whole fit, as in the official simulation.

    Parameters
    ----------
    tensor
        Without gaps.
    sequences
        Numbers of candidates in order, or several such sequences of one length.
    policy
        Only its allocation matters; by default every candidate gets all iterations.
    time_limit
        Seconds for the whole sequence; None: no limit, and run times do not count.
    cutoff
        Seconds for one run, at most. A run that is stopped has the losses of its last point before that.
    initial_loss
        ``(tasks,)``: what is there already; 1 by default.
    pick_on
        ``"valid"``, or ``"test"`` to choose by the test loss itself (an oracle).
    runs
        Give the losses after each of so many runs.

    Returns
    -------
    Replay

    Raises
    ------
    InvalidInput
        If the tensor has gaps, or a sequence names a candidate that is not there.

    Examples
    --------
    >>> loss = np.array([[[0.4], [0.2], [0.3]], [[0.5], [0.6], [0.1]]])
    >>> tensor = PerformanceTensor(loss, loss, np.ones_like(loss), ["a", "b"], [{}] * 3, [100])
    >>> simulate(tensor, [0, 1]).loss.round(2).tolist()
    [[0.0, 0.8]]
    """
    policy = Policy() if policy is None else policy
    curves = curves_of(tensor, policy, time_limit, initial_loss, pick_on)
    try:
        order = np.atleast_2d(whole_numbers(sequences, "sequences"))
    except InvalidInput:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidInput("sequences must be numbers of candidates, all of one length.") from error
    if order.ndim != 2 or order.size == 0 or order.min() < 0 or order.max() >= tensor.shape[1]:
        raise InvalidInput(f"sequences must hold numbers of candidates from 0 to {tensor.shape[1] - 1}, one row each.")
    limit = np.inf if cutoff is None else checks.positive("cutoff", cutoff)
    return Replay(*play_all(curves, np.ascontiguousarray(order), limit, runs))
