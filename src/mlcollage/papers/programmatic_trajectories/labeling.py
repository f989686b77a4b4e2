"""Labeling functions: programs from tracks to macro-intents, one label a frame."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage._users import users_code
from mlcollage.errors import InvalidInput

__all__ = [
    "ABSTAIN",
    "GridIntent",
    "LabelingFunction",
    "Stationary",
    "Threshold",
    "Window",
    "labeling_function",
]

ABSTAIN = -1
"""The label of a frame about which a function says nothing."""

_TIE = 1e-5  # of the threshold: steps this near to it are counted, since their label depends on the dtype


class LabelingFunction:
    """Base of all labeling functions; call one with tracks and get a label for each frame.

    Parameters
    ----------
    name
        How tables call it.
    classes
        Number of labels, 0 to ``classes - 1``; :data:`ABSTAIN` is allowed in addition.
    per_agent
        Whether each agent has labels of its own; otherwise one label holds for all agents of a frame.
    """

    def __init__(self, name: str, classes: int, per_agent: bool) -> None:
        self.name, self.classes, self.per_agent = name, checks.integer("classes", classes, least=2), per_agent

    def __call__(self, X: NDArray, mask: NDArray | None = None, fps: float | None = None) -> NDArray[np.int64]:
        """Label tracks.

        Parameters
        ----------
        X
            Positions (N, T, K, D), or (T, D) of one track.
        mask
            True where an agent was seen, (N, T, K) or (T,); frames that are not finite count as not seen.
        fps
            Frames a second, for functions with a threshold per second; refused if it disagrees with the function's own
            by over 1 %.

        Returns
        -------
        labels
            (N, T, K), or (T,) for one track; :data:`ABSTAIN` where an agent was not seen.

        Raises
        ------
        InvalidInput
            If shapes do not fit, or the function returns what no label can be.
        """
        x, seen, single = tracks(X, mask)
        labels = self._labels(x, seen, None if fps is None else checks.positive("fps", fps))
        if not self.per_agent:
            labels = np.broadcast_to(labels[..., None], seen.shape)
        labels = labels.copy() if seen.all() else np.where(seen, labels, ABSTAIN)
        return labels[0, :, 0] if single else labels

    def _labels(self, x: NDArray, seen: NDArray, fps: float | None) -> NDArray:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, classes={self.classes})"


def tracks(X: Any, mask: Any = None) -> tuple[NDArray[np.float64], NDArray[np.bool_], bool]:
    """Positions (N, T, K, D) in double precision, who was seen (N, T, K), and whether one track (T, D) was given.

    Raises
    ------
    InvalidInput
        If the rank is neither 4 nor 2, there is no frame, or the mask has another shape.
    """
    try:
        x = np.asarray(X, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInput(
            f"tracks must be an array of numbers of shape (N, T, K, 2); got {type(X).__name__}."
        ) from None
    if x.ndim not in (2, 4):
        raise InvalidInput(
            f"tracks must be (N, T, K, 2): sequences, frames, agents, coordinates, or (T, 2) for one track; got "
            f"{x.shape}."
        )
    single = x.ndim == 2
    x = x[None, :, None] if single else x
    if 0 in x.shape:
        raise InvalidInput(f"tracks of shape {x.shape} hold no frame.")
    finite = np.isfinite(x)
    # A reduction over an axis of two is slow.
    seen: NDArray[np.bool_] = np.asarray(functools.reduce(np.logical_and, np.moveaxis(finite, -1, 0)))
    if mask is not None:
        m = np.asarray(mask, dtype=bool)
        m = m[None, :, None] if single and m.ndim == 1 else m
        if m.shape != seen.shape:
            raise InvalidInput(f"the mask of tracks {x.shape} must have shape {seen.shape}; got {m.shape}.")
        seen = seen & m
    return x, seen, single


def grid_of(grid: Any) -> GridIntent:
    """The cells that were given, or those of the paper."""
    if grid is not None and not isinstance(grid, GridIntent):
        raise InvalidInput(f"grid must be a GridIntent; got {grid!r}.")
    return GridIntent() if grid is None else grid


def filled(x: NDArray, seen: NDArray) -> NDArray:
    """Positions with straight lines over the frames that were not seen, the nearest seen one at the ends.

    Agents that are never seen become 0. x is (N, T, K, D), seen (N, T, K).
    """
    if seen.all():
        return x
    n, t, k, _ = x.shape
    frames = np.arange(t)[None, :, None]
    before = np.maximum.accumulate(np.where(seen, frames, -1), 1)
    after = np.minimum.accumulate(np.where(seen, frames, t)[:, ::-1], 1)[:, ::-1]
    low = np.clip(np.where(before < 0, after, before), 0, t - 1)
    high = np.clip(np.where(after >= t, before, after), 0, t - 1)
    values = np.where(seen[..., None], x, 0.0)
    rows, agents = np.arange(n)[:, None, None], np.arange(k)[None, None]
    start, end = values[rows, low, agents], values[rows, high, agents]
    share = np.where(high > low, (frames - low) / np.maximum(high - low, 1), 0.0)[..., None]
    return np.where(seen[..., None], values, start + share * (end - start))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile it, cached where a cache folder can be written."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # no folder to cache in
        return numba.njit(function)


@_compiled
def next_rests(
    x: NDArray, rate: float, threshold: float, cell: float, border: NDArray, rows: int, tie: float, out: NDArray
) -> int:
    """Write into ``out`` (N, T, K) the cell where each agent next rests; return how many steps are at the threshold.

    One scan from the last frame to the first: a frame that is still and followed by one that is not gives its cell.
    Squares are compared; the root is taken only near the threshold, where the last digits decide.
    """
    ties = 0
    square = (threshold / rate) ** 2
    low, high = square * (1.0 - 3.0 * tie), square * (1.0 + 3.0 * tie)
    for n in range(x.shape[0]):
        for k in range(x.shape[2]):
            label, after = -1, True
            for t in range(x.shape[1] - 1, -1, -1):
                px, py = x[n, t, k, 0], x[n, t, k, 1]
                last = t == x.shape[1] - 1
                still = last
                if not last:
                    dx, dy = x[n, t + 1, k, 0] - px, x[n, t + 1, k, 1] - py
                    away = dx * dx + dy * dy
                    still = away < square
                    if low < away < high:
                        speed = np.sqrt(away) * rate
                        still = speed < threshold
                        ties += abs(speed / threshold - 1.0) < tie
                if last or (still and not after):
                    a = min(max(px, 0.0), border[0])
                    b = min(max(py, 0.0), border[1])
                    label = int(np.floor(a / cell)) * rows + int(np.floor(b / cell))
                out[n, t, k], after = label, still
    return ties


def _next_anchor(cells: NDArray, anchor: NDArray) -> NDArray:
    """Each frame's label is the cell of the next anchor at or after it; the last frame must be one. All (N, T, K)."""
    t = cells.shape[1]
    frames = np.arange(t)[None, :, None]
    at = np.minimum.accumulate(np.where(anchor, frames, t - 1)[:, ::-1], 1)[:, ::-1]
    return np.take_along_axis(cells, at, 1)


class GridIntent(LabelingFunction):
    r"""The cell of a grid that an agent is in: class :math:`\lfloor x / c\rfloor\, n_y + \lfloor y / c\rfloor`.

    Positions outside are clamped into the border cells, as in the paper; :meth:`clamped` says how many were.

    Parameters
    ----------
    cell
        Edge of a cell, in the tracks' unit: 5 feet by default.
    extent
        Size of the grid along x and y from (0, 0): (45, 50) feet, the left half-court, by default.
    margin
        Positions are clamped to [0, extent - margin].

    Examples
    --------
    >>> grid = GridIntent()
    >>> grid.classes, grid(np.array([[2.5, 25.0], [44.0, -3.0], [np.nan, 1.0]])).tolist()
    (90, [5, 80, -1])
    """

    def __init__(self, cell: float = 5.0, extent: tuple[float, float] = (45.0, 50.0), margin: float = 1e-4) -> None:
        self.cell = checks.positive("cell", cell)
        self.extent = tuple(checks.positive("extent", e) for e in extent)
        self.margin = checks.real("margin", margin, above=0, below=self.cell)
        if len(self.extent) != 2:
            raise InvalidInput(f"extent must be (length, width); got {extent!r}.")
        self.shape = tuple(math.ceil(e / self.cell - 1e-9) for e in self.extent)
        super().__init__("cell", self.shape[0] * self.shape[1], True)

    def _labels(self, x: NDArray, seen: NDArray, fps: float | None) -> NDArray:
        return self.cells(np.where(seen[..., None], x, 0.0))

    def cells(self, x: NDArray) -> NDArray[np.int64]:
        """Classes (...) of positions (..., 2); :data:`ABSTAIN` where one is NaN."""
        x = np.asarray(x)
        if x.shape[-1:] != (2,):
            raise InvalidInput(f"a grid of cells takes positions (x, y); got {x.shape[-1:] or 'a number'}.")
        known = ~np.isnan(x).any(-1)
        inside = np.clip(np.where(known[..., None], x, 0.0), 0.0, np.array(self.extent) - self.margin)
        i, j = np.moveaxis(np.floor(inside / self.cell).astype(np.int64), -1, 0)
        return np.where(known, i * self.shape[1] + j, ABSTAIN)

    def centers(self) -> NDArray[np.float64]:
        """Middle of each cell, (classes, 2)."""
        i, j = np.divmod(np.arange(self.classes), self.shape[1])
        return (np.stack([i, j], 1) + 0.5) * self.cell

    def clamped(self, X: NDArray, mask: NDArray | None = None) -> float:
        """Share of seen positions outside of the grid, which are moved into a border cell."""
        x, seen, _ = tracks(X, mask)
        outside = ((x < 0) | (x > np.array(self.extent))).any(-1)
        return float((outside & seen).sum() / max(seen.sum(), 1))

    def check_units(self, X: NDArray, mask: NDArray | None = None) -> None:
        """Refuse tracks that cannot be in the grid's unit.

        Raises
        ------
        InvalidInput
            If over 20 % of the positions must be clamped, or agents that move all stay in one cell.
        """
        share = self.clamped(X, mask)
        x, seen, _ = tracks(X, mask)
        used = len(np.unique(self(x, seen)[seen])) if seen.any() else 0
        low, high = (f(np.where(seen[..., None], x, np.nan), axis=(0, 1, 2)) for f in (np.nanmin, np.nanmax))
        if share > 0.2 or (used == 1 and bool((high - low > 0).any())):
            raise InvalidInput(
                f"{share:.0%} of the positions lie outside of the grid of {self.extent[0]:g} x {self.extent[1]:g} and "
                f"{used} of {self.classes} cells are used; x runs from {low[0]:g} to {high[0]:g} and y from {low[1]:g} "
                f"to {high[1]:g}: give tracks and grid in one unit, with the same origin."
            )


class Stationary(LabelingFunction):
    r"""Where an agent next comes to rest: the paper's best labeling function.

    Frame t is still if :math:`\lVert x_{t+1} - x_t\rVert < \theta`; the last one counts as still. The label is the
    cell at the next frame that is still and followed by one that is not, or at the last frame. Frames that were not
    seen are bridged by a straight line and abstain themselves. Labels look into the future: right for training, not
    for online prediction (``MacroVRNN.sample`` labels from the burn-in only).

    Parameters
    ----------
    grid
        The cells.
    threshold
        Speed below which an agent is still, in units per second, 3.125 ft/s by default.
    fps
        Frames a second; None takes what is given with the tracks.
    per_frame
        ``threshold`` is a step per frame, as in the official code (0.5 ft at its rate).

    Examples
    --------
    >>> walk = np.array([2.5, 2.5, 2.5, 7.0, 12.0, 17.0, 17.0])
    >>> Stationary(threshold=0.5, per_frame=True)(np.stack([walk, np.full(7, 25.0)], 1)).tolist()
    [5, 5, 35, 35, 35, 35, 35]
    """

    def __init__(
        self,
        grid: GridIntent | None = None,
        threshold: float = 3.125,
        *,
        fps: float | None = None,
        per_frame: bool = False,
    ) -> None:
        self.grid = grid_of(grid)
        self.threshold = checks.positive("threshold", threshold)
        self.fps = None if fps is None else checks.positive("fps", fps)
        self.per_frame = per_frame
        self.ties = 0  # steps of the last call whose label hangs on the last digits
        super().__init__("stationary", self.grid.classes, True)

    def _labels(self, x: NDArray, seen: NDArray, fps: float | None) -> NDArray:
        if self.fps is not None and fps is not None and not self.per_frame and abs(self.fps / fps - 1) > 0.01:
            raise InvalidInput(f"{self.name} was made for {self.fps:g} frames a second; these tracks have {fps:g}.")
        rate = 1.0 if self.per_frame else self.fps or fps
        if rate is None:
            raise InvalidInput(
                "a threshold per second needs the frame rate: give fps, or say per_frame=True if the threshold is a "
                "step from frame to frame."
            )
        x = np.ascontiguousarray(filled(x, seen))
        if x.shape[-1] != 2:
            raise InvalidInput(f"a grid of cells takes positions (x, y); got {x.shape[-1]} coordinates.")
        out = np.empty(x.shape[:3], dtype=np.int64)
        border = np.array(self.grid.extent) - self.grid.margin
        self.ties = next_rests(x, rate, self.threshold, self.grid.cell, border, self.grid.shape[1], _TIE, out)
        return out


class Window(LabelingFunction):
    """Where an agent is at the end of its window of ``w`` frames, or at the last frame.

    Parameters
    ----------
    w
        Frames of a window; the paper compares 25 and 50.
    grid
        The cells.

    Examples
    --------
    >>> x = np.stack([np.arange(5.0) * 5, np.zeros(5)], 1)
    >>> Window(2)(x).tolist()
    [10, 10, 30, 30, 40]
    """

    def __init__(self, w: int, grid: GridIntent | None = None) -> None:
        self.w = checks.integer("w", w, least=1)
        self.grid = grid_of(grid)
        super().__init__(f"window-{self.w}", self.grid.classes, True)

    def _labels(self, x: NDArray, seen: NDArray, fps: float | None) -> NDArray:
        x = filled(x, seen)
        anchor = np.broadcast_to(((np.arange(x.shape[1]) + 1) % self.w == 0)[None, :, None], x.shape[:3])
        return _next_anchor(self.grid.cells(x), anchor)


class Threshold(LabelingFunction):
    """One label for a whole sequence and all its agents: 1 where a statistic is below a cut, else 0.

    Parameters
    ----------
    statistic
        ``statistic(x)`` gives one number for each sequence, (N,), of tracks (N, T, K, D) whose unseen positions are
        NaN. NaN abstains.
    cut
        Below it the label is 1.
    name
        How tables call it.

    Examples
    --------
    >>> spread = Threshold(lambda x: x.std(axis=(1, 2)).mean(-1), 1.0)
    >>> spread(np.zeros((1, 3, 2, 2))).tolist()
    [[[1, 1], [1, 1], [1, 1]]]
    """

    def __init__(self, statistic: Callable[[NDArray], NDArray], cut: float, name: str = "threshold") -> None:
        self.statistic, self.cut = statistic, checks.real("cut", cut)
        super().__init__(name, 2, False)

    def _labels(self, x: NDArray, seen: NDArray, fps: float | None) -> NDArray:
        with users_code(f"the statistic of {self.name}"):
            value = np.asarray(self.statistic(np.where(seen[..., None], x, np.nan)), dtype=np.float64)
        if value.shape != (len(x),):
            raise InvalidInput(
                f"the statistic of {self.name} must give one number a sequence, ({len(x)},); got {value.shape}."
            )
        label = np.where(np.isnan(value), ABSTAIN, value < self.cut)
        return np.broadcast_to(label[:, None], x.shape[:2])


@dataclass(eq=False, repr=False)
class _Users(LabelingFunction):
    """A user's function of one track (T, D), or of all agents (T, K, D) where labels are shared."""

    function: Callable[..., Any]
    classes: int
    name: str
    per_agent: bool
    ties: int = field(default=0, init=False)

    def _labels(self, x: NDArray, seen: NDArray, fps: float | None) -> NDArray:
        n, t, k, _ = x.shape
        x = np.where(seen[..., None], x, np.nan)
        out = np.full((n, t, k) if self.per_agent else (n, t), ABSTAIN, dtype=np.int64)
        for i in range(n):
            for a in range(k) if self.per_agent else (None,):
                where = f"labeling function {self.name} on track {i}" + ("" if a is None else f", agent {a}")
                if a is not None and not seen[i, :, a].any():
                    continue
                with users_code(where):
                    found = self.function(x[i] if a is None else x[i, :, a])
                if a is None:
                    out[i] = as_labels(found, t, self.classes, where)
                else:
                    out[i, :, a] = as_labels(found, t, self.classes, where)
        return out


def labeling_function(
    *, classes: int, name: str | None = None, per_agent: bool = True
) -> Callable[[Callable[..., Any]], LabelingFunction]:
    """Decorator: make a labeling function of a program for one track.

    Parameters
    ----------
    classes
        Number of labels.
    name
        How tables call it; the function's own name by default.
    per_agent
        The function gets one agent's track (T, D); with False all agents', (T, K, D), and its labels hold for all.
        Frames that were not seen are NaN.

    Returns
    -------
    decorator
        Of a function that returns T labels, or one label for the whole track; :data:`ABSTAIN` where it knows none.

    Raises
    ------
    InvalidInput
        When called: if what the function returns is not such labels. The sentence names function and track.

    Examples
    --------
    >>> @labeling_function(classes=2)
    ... def left(track):
    ...     return track[:, 0] < 20
    >>> left(np.array([[3.0, 1.0], [30.0, 1.0]])).tolist()
    [1, 0]
    """
    checks.integer("classes", classes, least=2)
    return lambda function: _Users(function, classes, name or str(getattr(function, "__name__", "function")), per_agent)


def as_labels(found: Any, frames: int, classes: int, where: str) -> NDArray[np.int64]:
    """What a user's function returned as (frames,) labels; a single one holds for all frames.

    Raises
    ------
    InvalidInput
        If it is no array of whole numbers from -1 to ``classes - 1`` of that length.
    """
    try:
        values = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.full((), np.nan)
    if found is None or not np.isfinite(values).all() or (values != np.floor(values)).any():
        raise InvalidInput(
            f"{where} returned {_short(found)}; expected whole numbers, and {ABSTAIN} where it knows none."
        )
    values = values.reshape(()) if values.shape == (1,) else values
    if values.ndim and values.shape != (frames,):
        raise InvalidInput(
            f"{where} returned shape {values.shape}; expected one label for each of {frames} frames, or one."
        )
    if values.size and (values.min() < ABSTAIN or values.max() >= classes):
        raise InvalidInput(
            f"{where} returned labels from {values.min():g} to {values.max():g}; "
            f"expected 0 to {classes - 1}, or {ABSTAIN}."
        )
    return np.broadcast_to(values, (frames,)).astype(np.int64)


def _short(found: Any) -> str:
    text = repr(found)
    return text if len(text) <= 60 else f"{text[:57]}..."
