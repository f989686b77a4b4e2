"""Puts axes into a box so that their ticks, labels and direct labels stay inside it too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from mlcollage.collage.text import wrap
from mlcollage.collage.theme import spread_labels

ROUNDS = 4  # ticks change with the size of the axes, so measuring is repeated
LABEL_SHARE = 0.37  # of a panel's width, for labels at the ends of lines
TOUCH = {"x": 6.0, "y": -3.0}  # pixels between tick labels; line boxes are taller than the digits in them
SMALLEST, SMALLEST_DRAWING = 0.1, 0.5  # share of a panel that axes and drawings keep, whatever their labels need
BETWEEN = 16.0  # pixels between neighboring axes, after their labels


@dataclass(frozen=True)
class Box:
    """A rectangle in slide pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """From left to right."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """From top to bottom."""
        return self.bottom - self.top

    def fraction(self, width: float, height: float) -> tuple[float, float, float, float]:
        """Left, bottom, width, height as fractions of a slide, as matplotlib wants them."""
        return self.left / width, 1 - self.bottom / height, self.width / width, self.height / height


def fit_axes(axes: Sequence[Axes], box: Box) -> None:
    """Set the positions of all axes of a panel so that everything they draw fills the box and stays in it.

    Axes of one plain grid (``subplots``, ``add_gridspec``) keep their rows, columns and ratios, and get the margins
    that their labels need. Axes placed in another way are moved and scaled together.
    """
    if not axes:
        return
    root = axes[0].get_figure(root=True)
    assert root is not None
    height = float(root.bbox.height)
    room = Bbox([[box.left, height - box.bottom], [box.right, height - box.top]])
    specs = [ax.get_subplotspec() for ax in axes]
    # Axes of one grid share rows and columns, whose sizes can be solved for; others are moved and scaled together.
    one_grid = all(s is not None and s is s.get_topmost_subplotspec() for s in specs) and (
        len({id(s.get_gridspec()) for s in specs if s is not None}) == 1
    )
    grids = [s.get_gridspec() for s in specs if s is not None] if one_grid else []
    across, down = max((g.ncols for g in grids), default=1), max((g.nrows for g in grids), default=1)
    for ax in axes:
        _break_labels(root, ax, box.width / across, box.height / down)
    if len(axes) == 1 and _beside_ticks(axes[0], room):
        return
    _settle(axes, room, one_grid)


def _settle(axes: Sequence[Axes], room: Bbox, one_grid: bool) -> None:
    for _ in range(ROUNDS):
        for ax in axes:
            spread_labels(ax)
        if one_grid or len(axes) == 1:
            _fit_grid(axes, room)
        else:
            _fit_together(axes, room)
        for ax in axes:
            _thin_ticks(ax)
    for ax in axes:
        spread_labels(ax)


def _beside_ticks(ax: Axes, room: Bbox) -> bool:
    """Put the name of the x axis at the right end of the tick labels, where there is room, to make the axes taller."""
    label = ax.xaxis.label
    if not (label.get_text() and ax.axison and ax.xaxis.get_visible()):
        return False
    renderer, below = ax.get_figure(root=True).canvas.get_renderer(), label.get_transform()  # type: ignore[union-attr]
    label.set_visible(False)
    _settle([ax], room, one_grid=True)
    label.set_visible(True)
    ticks = [t.get_window_extent(renderer) for t in ax.get_xticklabels() if t.get_visible() and t.get_text()]
    shown = [b for b in ticks if b.width > 0 and ax.bbox.x0 - 2 <= (b.x0 + b.x1) / 2 <= ax.bbox.x1 + 2]
    if shown and "\n" not in label.get_text():
        row = Bbox.union(shown)
        x, y = ax.transAxes.inverted().transform((room.x1, (row.y0 + row.y1) / 2))
        label.set(ha="right", va="center")
        ax.xaxis.set_label_coords(float(x), float(y))  # shares of the axes, valid at any resolution
        place = label.get_window_extent(renderer).padded(2.0)
        others = [t.get_window_extent(renderer) for t in ax.texts]
        if place.x0 > row.x1 + BETWEEN and not any(place.overlaps(o) for o in others):
            return True
    label.set(ha="center", va="top", x=0.5, transform=below)
    ax.xaxis._autolabelpos = True  # type: ignore[attr-defined]  # centered below the ticks again
    return False


def _break_labels(root: Figure, ax: Axes, across: float, down: float) -> None:
    """Wrap the names of axes to the panel, and line-end labels that would leave too little of it to the lines."""
    rooms: list[tuple[Text, float]] = [(ax.xaxis.label, across), (ax.yaxis.label, 0.8 * down)]
    rooms += [(label, LABEL_SHARE * across) for label in ax.texts if label.get_gid() == "line-end"]
    for label, room in rooms:
        size, weight = float(label.get_fontsize()), str(label.get_fontweight())
        label.set_text("\n".join(wrap(root, label.get_text(), room, size, weight)))
        label.set_linespacing(1.1)


def _thin_ticks(ax: Axes) -> None:
    """Fewer ticks while their labels touch; ticks that were set one by one are left as they are."""
    renderer = ax.get_figure(root=True).canvas.get_renderer()  # type: ignore[union-attr]
    for axis, way in ((ax.xaxis, "x"), (ax.yaxis, "y")):
        locator = axis.get_major_locator()
        if not isinstance(locator, MaxNLocator) or not axis.get_visible() or not ax.axison:
            continue
        for count in (5, 4, 3, 2):
            boxes = [t.get_window_extent(renderer) for t in axis.get_ticklabels() if t.get_visible() and t.get_text()]
            ends = sorted((getattr(b, f"{way}0"), getattr(b, f"{way}1")) for b in boxes if b.width > 0)
            if all(b[0] - a[1] > TOUCH[way] for a, b in itertools.pairwise(ends)):
                break
            locator.set_params(nbins=count)


def _extents(ax: Axes) -> tuple[Bbox, Bbox]:
    """The data area and everything drawn, in pixels."""
    renderer = ax.get_figure(root=True).canvas.get_renderer()  # type: ignore[union-attr]
    ax.apply_aspect()
    inner = Bbox(ax.bbox.get_points())
    outer = ax.get_tightbbox(renderer)
    # The tight box may be smaller than the axes, where these are turned off.
    return inner, inner if outer is None else Bbox.union([inner, outer])


def _place(ax: Axes, pixels: Bbox) -> None:
    parent = ax.get_figure(root=False)
    assert parent is not None
    ax.set_position(Bbox(parent.transSubfigure.inverted().transform(pixels.get_points())))


def _fit_grid(axes: Sequence[Axes], room: Bbox) -> None:
    """Rows and columns as in the axes' grid; each line between them as wide as its labels need."""
    spec = axes[0].get_subplotspec()
    if spec is None or len(axes) == 1:
        rows, columns, heights, widths = 1, 1, np.ones(1), np.ones(1)
        cells = [(0, 1, 0, 1)] * len(axes)
    else:
        grid = spec.get_gridspec()
        rows, columns = grid.nrows, grid.ncols
        heights, widths = np.asarray(grid.get_height_ratios(), float), np.asarray(grid.get_width_ratios(), float)
        every = [ax.get_subplotspec() for ax in axes]
        cells = [(s.rowspan.start, s.rowspan.stop, s.colspan.start, s.colspan.stop) for s in every if s is not None]
    # Pixels that labels and ticks need beyond the axes, the most in each column and row.
    left, right, top, bottom = np.zeros(columns), np.zeros(columns), np.zeros(rows), np.zeros(rows)
    for ax, (r0, r1, c0, c1) in zip(axes, cells, strict=True):
        inner, outer = _extents(ax)
        left[c0] = max(left[c0], inner.x0 - outer.x0)
        right[c1 - 1] = max(right[c1 - 1], outer.x1 - inner.x1)
        top[r0] = max(top[r0], outer.y1 - inner.y1)
        bottom[r1 - 1] = max(bottom[r1 - 1], inner.y0 - outer.y0)
    least = SMALLEST if any(ax.axison for ax in axes) else SMALLEST_DRAWING
    x0, x1 = _tracks(room.x0, room.width, left, right, widths, least)
    y0, y1 = _tracks(0.0, room.height, top, bottom, heights, least)
    for ax, (r0, r1, c0, c1) in zip(axes, cells, strict=True):
        _place(ax, Bbox([[x0[c0], room.y1 - y1[r1 - 1]], [x1[c1 - 1], room.y1 - y0[r0]]]))


def _tracks(
    start: float, total: float, before: np.ndarray, after: np.ndarray, ratios: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the columns (or rows) once the margins are taken off and the rest is shared by the ratios."""
    # What labels leave is shared by the ratios; labels that are too long may take all but the least.
    free = max(total - before.sum() - after.sum() - BETWEEN * (len(ratios) - 1), least * total)
    sizes = free * ratios / ratios.sum()
    begins = start + np.cumsum(before) + np.concatenate([[0.0], np.cumsum((sizes + after + BETWEEN)[:-1])])
    return begins, begins + sizes


def _fit_together(axes: Sequence[Axes], room: Bbox) -> None:
    """Move and scale all positions with one linear map, so that the union of what is drawn fills the room."""
    extents = [_extents(ax) for ax in axes]
    inner, outer = Bbox.union([i for i, _ in extents]), Bbox.union([o for _, o in extents])
    target = Bbox(
        [
            [room.x0 + inner.x0 - outer.x0, room.y0 + inner.y0 - outer.y0],
            [room.x1 - (outer.x1 - inner.x1), room.y1 - (outer.y1 - inner.y1)],
        ]
    )
    scale = np.maximum(target.size, 1.0) / np.maximum(inner.size, 1.0)  # (2,): across and down, separately
    for ax in axes:
        parent = ax.get_figure(root=False)
        assert parent is not None
        now = parent.transSubfigure.transform(ax.get_position(original=True).get_points())
        moved = target.min + (now - inner.min) * scale
        _place(ax, Bbox(np.clip(moved, room.min, room.max)))
