"""Learns which pipelines to try first: the greedy portfolio (section 3.2, Algorithm 1)."""

from __future__ import annotations

import heapq
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .policy import Policy
from .replay import _Curves, curves_of, play_all, whole_numbers
from .tensor import PerformanceTensor

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class PortfolioBuilder:
    r"""Greedy construction of a portfolio from a tensor of losses.

    .. math:: c^* = \arg\min_{c \notin P} \frac{1}{|D|} \sum_d L_d(P + [c])

    :math:`L_d(P)` is the normalized test loss on task d that playing P in order reaches (see :func:`simulate`). It
    stops at ``size``, or when the mean loss is 0. The loss of the best member, as an oracle would pick it, is monotone
    and submodular, so greedy reaches at least 63 % of the possible gain; :attr:`bound_` says how much better any
    portfolio of this size could be on these tasks, which is usually far less.

    Parameters
    ----------
    size
        Number of pipelines, at most; 32 in the paper.
    policy
        Full budget by default; under successive halving brackets are played.
    time_limit
        Seconds for the whole portfolio; None: run times do not count.
    cutoff
        Seconds for one run; ``"search"`` tries a grid and keeps the best (needs ``time_limit``).
    cutoff_grid
        ``"sqrt2"``: the limit divided by powers of :math:`\sqrt{2}`. ``"official"``: whole seconds, as the official
        code has them, which knows no cut-off below a second.
    pick_on
        Which loss chooses the member that counts: ``"valid"`` as it is in practice, or ``"test"``.
    initial_loss
        ``(tasks,)``: normalized loss that is there already.
    lazy
        Evaluate only candidates that can still be the best one. It gives the same portfolio where the loss is
        submodular (``pick_on="test"``, full budget, no time limit), and is refused elsewhere.

    Attributes
    ----------
    portfolio_ : list of int
        Candidates in the order of their picks.
    configs_ : list of dict
        Their configurations.
    trajectory_ : ndarray of shape (k,)
        Mean loss after each pick.
    task_loss_ : ndarray of shape (k, tasks)
        Loss on each task after each pick.
    bound_ : float
        No portfolio of this many members has a lower mean loss on these tasks.
    cutoff_ : float
        Seconds for a run.
    cutoff_scores_ : dict
        Mean loss of the portfolio for each cut-off that was tried.

    Examples
    --------
    >>> loss = np.array([[[0.1], [0.9], [0.4]], [[0.9], [0.1], [0.4]], [[0.2], [0.8], [0.4]]])
    >>> tensor = PerformanceTensor(loss, loss, np.ones_like(loss), ["a", "b", "c"], [{"k": i} for i in range(3)], [100])
    >>> builder = PortfolioBuilder(2).fit(tensor)
    >>> builder.portfolio_, builder.trajectory_.round(3).tolist(), builder.bound_
    ([0, 1], [0.333, 0.0], 0.0)
    """

    def __init__(
        self,
        size: int = 32,
        policy: Policy | None = None,
        *,
        time_limit: float | None = None,
        cutoff: float | Literal["search"] | None = None,
        cutoff_grid: Literal["sqrt2", "official"] = "sqrt2",
        pick_on: Literal["valid", "test"] = "valid",
        initial_loss: ArrayLike | None = None,
        lazy: bool = False,
    ) -> None:
        self.size = checks.integer("size", size, least=1)
        self.policy = Policy() if policy is None else policy
        self.time_limit = time_limit
        self.cutoff = cutoff
        self.cutoff_grid = checks.choice("cutoff_grid", cutoff_grid, ("sqrt2", "official"))
        self.pick_on = pick_on
        self.initial_loss = initial_loss
        self.lazy = lazy
        if cutoff == "search" and time_limit is None:
            raise InvalidInput("cutoff='search' needs time_limit, the seconds of the whole portfolio.")
        if lazy and (self.policy.allocation == "sh" or time_limit is not None or pick_on == "valid"):
            raise InvalidInput(
                "lazy=True needs full budget, no time limit and pick_on='test'; elsewhere it is not exact."
            )

    def fit(self, tensor: PerformanceTensor, order: ArrayLike | None = None) -> PortfolioBuilder:
        """Build the portfolio.

        Parameters
        ----------
        tensor
            Without gaps; see :meth:`PerformanceTensor.complete`.
        order
            Order in which candidates are tried; the first of several equally good ones is taken. As numbered by
            default.
        """
        curves = curves_of(tensor, self.policy, self.time_limit, self.initial_loss, self.pick_on)
        count = tensor.shape[1]
        tried = np.arange(count) if order is None else whole_numbers(order, "order")
        if sorted(tried.tolist()) != list(range(count)):
            raise InvalidInput(f"order must hold every number from 0 to {count - 1} once.")
        if self.cutoff == "search":
            grid = self._grid(curves)
            found = [(self._greedy(curves, tried, c), c) for c in grid]
            self.cutoff_scores_ = {c: float(losses[-1].mean()) for (_, losses), c in found}
            (picks, losses), self.cutoff_ = min(found, key=lambda f: float(f[0][1][-1].mean()))
        else:
            self.cutoff_ = np.inf if self.cutoff is None else checks.positive("cutoff", self.cutoff)
            self.cutoff_scores_ = {}
            picks, losses = self._greedy(curves, tried, self.cutoff_)
        self.portfolio_ = [int(c) for c in picks]
        self.configs_: list[dict[str, Any]] = [dict(tensor.configs[c]) for c in picks]
        self.task_loss_ = losses
        self.trajectory_ = losses.mean(1)
        self.bound_ = self._lower_bound(curves)
        return self

    def _greedy(self, c: _Curves, tried: IntArray, cutoff: float) -> tuple[list[int], FloatArray]:
        if self.lazy:
            return self._lazy(c, tried)
        if self.policy.allocation == "full" and c.limit == np.inf and cutoff == np.inf:
            return self._incremental(c, tried)
        picks: list[int] = []
        losses = []
        for _ in range(min(self.size, len(tried))):
            rest = np.array([k for k in tried if k not in picks], np.int64)
            sequences = np.column_stack([np.tile(np.array(picks, np.int64), (len(rest), 1)), rest])
            found, _, _ = play_all(c, np.ascontiguousarray(sequences), cutoff)
            means = found.mean(1)
            best = int(means.argmin())
            picks.append(int(rest[best]))
            losses.append(found[best])
            if means[best] == 0:
                break
        return picks, np.array(losses)

    def _ends(self, c: _Curves) -> tuple[FloatArray, FloatArray]:
        """Losses (tasks, candidates) at the end of each curve."""
        at = c.last[:, :, None]
        return tuple(np.take_along_axis(a, at, 2)[:, :, 0] for a in (c.valid, c.test))  # type: ignore[return-value]

    def _incremental(self, c: _Curves, tried: IntArray) -> tuple[list[int], FloatArray]:
        """Full budget: only the lowest validation loss so far, and its test loss, need be kept for each task."""
        valid, test = (np.ascontiguousarray(a[:, tried].T) for a in self._ends(c))  # (candidates, tasks)
        best, loss = np.full(valid.shape[1], np.inf), np.ones(valid.shape[1])
        free, picks, losses = np.ones(len(tried), bool), [], []
        for _ in range(min(self.size, len(tried))):
            after = np.minimum(np.where(valid < best, test, loss), c.initial)
            means = np.where(free, after.mean(1), np.inf)
            k = int(means.argmin())
            loss = np.where(valid[k] < best, test[k], loss)
            best = np.minimum(best, valid[k])
            free[k] = False
            picks.append(int(tried[k]))
            losses.append(after[k])
            if means[k] == 0:
                break
        return picks, np.array(losses)

    def _lazy(self, c: _Curves, tried: IntArray) -> tuple[list[int], FloatArray]:
        """A gain can only shrink as the portfolio grows, so an old gain is a bound on the new one."""
        test = np.ascontiguousarray(self._ends(c)[1][:, tried].T)
        loss = np.minimum(np.ones(test.shape[1]), c.initial)
        heap = [(-np.inf, k, -1) for k in range(len(tried))]  # minus the gain, place, size at which it was computed
        picks: list[int] = []
        losses = []
        while len(picks) < min(self.size, len(tried)):
            fresh: list[tuple[float, int]] = []
            while heap and (not fresh or heap[0][0] <= min(fresh)[0] + 1e-12):
                _, k, _ = heapq.heappop(heap)
                fresh.append((float(np.minimum(loss, test[k]).mean() - loss.mean()), k))
            # Means, not differences, decide: so that ties are those of the plain form.
            k = min((float(np.minimum(loss, test[j]).mean()), j) for _, j in fresh)[1]
            for gain, j in fresh:
                if j != k:
                    heapq.heappush(heap, (gain, j, len(picks)))
            loss = np.minimum(loss, test[k])
            picks.append(int(tried[k]))
            losses.append(loss)
            if loss.mean() == 0:
                break
        return picks, np.array(losses)

    def _grid(self, c: _Curves) -> list[float]:
        """Cut-offs that are tried."""
        finite = c.runtime[np.isfinite(c.runtime)]
        longest, limit = float(finite.max()), c.limit
        if self.cutoff_grid == "sqrt2":
            shortest = float(finite[finite > 0].min()) if (finite > 0).any() else limit
            grid = [limit * 2 ** (-e / 2) for e in range(64)]
            return [g for g in grid if g > shortest and g * 2**-0.5 <= longest][::-1] or [limit]
        values = {int(2 ** (e / 2)) for e in range(64) if int(2 ** (e / 2)) <= limit / 2}
        every = {*map(float, values), limit / 2, limit} | ({longest + 1} if longest + 1 < limit else set())
        ordered, kept = sorted(every), []
        for value, following in zip(ordered, [*ordered[1:], np.inf], strict=True):
            if value * self.size < limit and following * self.size < limit:
                continue
            kept.append(value)
            if value > longest:
                break
        return kept

    def _lower_bound(self, c: _Curves) -> float:
        """The lowest mean loss that any portfolio of the same size can have on these tasks.

        With O(P) the loss if the best point of any member counted, a portfolio's loss is at least O of it; and by
        submodularity O of any k members is at least O(S) minus the k largest gains over S, for every S: here the first
        picks.
        """
        top = c.rungs[:, -1] if c.limit == np.inf else np.full(c.test.shape[1], c.test.shape[2] - 1)
        played = np.zeros(c.test.shape, bool)
        if c.limit == np.inf:
            for k in range(c.rungs.shape[1]):
                at = np.minimum(c.rungs[:, k][None], c.last)
                np.put_along_axis(played, at[:, :, None], True, 2)
        else:
            played = np.arange(c.test.shape[2])[None, None] <= np.minimum(top[None], c.last)[:, :, None]
        reach = np.where(played, c.test, np.inf).min(2).T  # (candidates, tasks)
        loss = np.minimum(np.ones(reach.shape[1]), c.initial)
        size, bounds = len(self.portfolio_), []
        for step in range(size + 1):
            gains = np.sort(loss.mean() - np.minimum(loss, reach).mean(1))[::-1]
            bounds.append(float(loss.mean() - gains[:size].sum()))
            if step < size:
                loss = np.minimum(loss, reach[self.portfolio_[step]])
        return max(0.0, float(np.minimum(np.minimum(np.ones(reach.shape[1]), c.initial), reach.min(0)).mean()), *bounds)
