"""Diagrams for the idea card: boxes, circles, arrows, tensors, planes and half-spaces on one canvas.

Coordinates are slide pixels from the canvas' top left corner, y downwards; every shape is placed by its center.
The canvas is scaled as a whole to the room there is, text keeps its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Polygon, Rectangle
from matplotlib.text import Text

from mlcollage.collage import theme
from mlcollage.collage.text import fit
from mlcollage.errors import InvalidInput

Point = tuple[float, float]


@dataclass(frozen=True)
class Node:
    """A shape on the canvas: its center and size, and the points where arrows can start."""

    x: float
    y: float
    width: float
    height: float
    round: bool = False

    @property
    def left(self) -> Point:
        """Middle of the left edge."""
        return self.x - self.width / 2, self.y

    @property
    def right(self) -> Point:
        """Middle of the right edge."""
        return self.x + self.width / 2, self.y

    @property
    def top(self) -> Point:
        """Middle of the upper edge."""
        return self.x, self.y - self.height / 2

    @property
    def bottom(self) -> Point:
        """Middle of the lower edge."""
        return self.x, self.y + self.height / 2

    def edge_towards(self, point: Point) -> Point:
        """Where the straight line from the center to a point leaves the shape."""
        dx, dy = point[0] - self.x, point[1] - self.y
        if dx == 0 and dy == 0:
            return self.x, self.y
        if self.round:
            reach = self.width / 2 / float(np.hypot(dx, dy))  # the share of the way to the point at which the edge lies
        else:
            reach = min(self.width / 2 / abs(dx) if dx else np.inf, self.height / 2 / abs(dy) if dy else np.inf)
        return self.x + dx * reach, self.y + dy * reach


class Diagram:
    """Draws on an Axes as on squared paper.

    Parameters
    ----------
    ax
        The Axes that the slide hands to the idea's ``draw``.
    width, height
        Size of the canvas in slide pixels. The idea card has room for about 440 by 440.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from matplotlib.backends.backend_agg import FigureCanvasAgg
    >>> figure = Figure()
    >>> canvas = FigureCanvasAgg(figure)
    >>> d = Diagram(figure.add_subplot(), 300, 120)
    >>> x = d.circle(40, 60, 24, "$x$")
    >>> f = d.box(150, 60, 100, 50, "network")
    >>> _ = d.arrow(x, f)
    >>> _ = d.arrow(f, (280, 60), "$y$")
    >>> f.right
    (200.0, 60)
    """

    def __init__(self, ax: Axes, width: float = 440.0, height: float = 440.0) -> None:
        self.ax, self.width, self.height = ax, float(width), float(height)
        ax.set_xlim(0, self.width)
        ax.set_ylim(self.height, 0)
        ax.set_aspect("equal", anchor="C")
        ax.set_axis_off()
        figure = ax.get_figure(root=True)
        assert isinstance(figure, Figure)
        self._figure = figure
        # Pixels per unit, to know how many letters fit into a shape.
        room = ax.get_window_extent()
        self._scale = min(room.width / self.width, room.height / self.height)
        self._shapes = 0

    # --- shapes -------------------------------------------------------------------------------------------------------

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        *,
        color: str = theme.PALETTE["blue"],
        filled: bool = False,
        dashed: bool = False,
        size: float = theme.BODY,
        radius: float = 8.0,
    ) -> Node:
        """Rounded box with text set to fit: pale with a colored edge, or ``filled`` with the color."""
        patch = FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle=f"round,pad=0,rounding_size={min(radius, width / 2, height / 2)}",
            mutation_aspect=1,
            facecolor=color if filled else theme.tint(color, 0.1),
            edgecolor=color,
            linewidth=1.8,
            linestyle=(0, (3, 2)) if dashed else "-",
            zorder=2,
        )
        self._add(patch)
        self._label(x, y, width - 12, text, color, filled, size, lines=max(1, int(height * self._scale // 23)))
        return Node(float(x), y, width, height)

    def circle(
        self,
        x: float,
        y: float,
        radius: float,
        text: str = "",
        *,
        color: str = theme.PALETTE["blue"],
        filled: bool = True,
        size: float = theme.BODY + 1,
    ) -> Node:
        """Circle with a short text, filled or pale."""
        face = color if filled else theme.tint(color, 0.1)
        self._add(Circle((x, y), radius, facecolor=face, edgecolor=color, linewidth=1.8, zorder=2))
        self._label(x, y, 1.8 * radius, text, color, filled, size, lines=1)
        return Node(float(x), y, 2 * radius, 2 * radius, round=True)

    def field(self, x: float, y: float, width: float, height: float, color: str = theme.WASH) -> Node:
        """A quiet ground to group things on, e.g. under equations."""
        style = "round,pad=0,rounding_size=10"
        patch = FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle=style, facecolor=color, zorder=0.5
        )
        self._add(patch)
        return Node(float(x), y, width, height)

    def tensor(
        self,
        x: float,
        y: float,
        values: npt.ArrayLike,
        *,
        cell: float = 22.0,
        color: str = theme.PALETTE["blue"],
        colors: Colormap | None = None,
        limits: tuple[float, float] | None = None,
        highlight: Sequence[int] = (),
    ) -> Node:
        """Matrix of shape (rows, columns), or a vector as one row, as colored cells.

        With ``highlight`` only those rows are colored and the others are gray.
        """
        m = np.atleast_2d(np.asarray(values, dtype=float))  # (rows, columns); a vector is one row
        if m.ndim != 2 or m.size == 0:
            raise InvalidInput(f"a tensor is drawn from a matrix of shape (rows, columns), not from shape {m.shape}.")
        lo, hi = limits or (float(np.nanmin(m)), float(np.nanmax(m)))
        shades = colors or theme.sequential(color)
        rows, columns = m.shape
        left, top = x - columns * cell / 2, y - rows * cell / 2
        for (i, j), value in np.ndenumerate(m):
            shade: Any = shades((value - lo) / ((hi - lo) or 1.0)) if np.isfinite(value) else "none"
            if highlight and i not in highlight:
                shade = "#DCE1E5"
            corner = (left + j * cell + 1, top + i * cell + 1)
            self.ax.add_patch(Rectangle(corner, cell - 2, cell - 2, facecolor=shade, zorder=2))
        return Node(float(x), y, columns * cell, rows * cell)

    def stack(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        count: int = 4,
        *,
        shift: float = 7.0,
        color: str = theme.PALETTE["blue"],
    ) -> Node:
        """``count`` planes one behind the other, as feature maps are drawn; the front one is lowest."""
        reach = shift * (count - 1)
        for i in range(count):
            corner = (x - (width + reach) / 2 + reach - i * shift, y - (height + reach) / 2 + i * shift)
            face = theme.tint(color, 0.12 + 0.3 * i / max(count - 1, 1))
            self.ax.add_patch(
                Rectangle(corner, width, height, facecolor=face, edgecolor=color, linewidth=1.2, zorder=2)
            )
        return Node(float(x), y, width + reach, height + reach)

    def halfspaces(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        normals: npt.ArrayLike,
        offsets: npt.ArrayLike,
        *,
        colors: Sequence[str] = (),
    ) -> Node:
        """A square of the plane cut by lines ``normal . z = offset``, each region in its own tint.

        Parameters
        ----------
        normals, offsets
            Shapes (k, 2) and (k,), in coordinates from -1 to 1 with the y axis upwards.
        colors
            Tints of the regions, in the order in which the lines cut them; repeated when there are more regions.
        """
        n, b = np.atleast_2d(np.asarray(normals, float)), np.atleast_1d(np.asarray(offsets, float))
        if n.shape != (len(b), 2):
            raise InvalidInput(f"normals have shape {n.shape} and offsets {b.shape}; they must be (k, 2) and (k,).")
        # Polygons in [-1, 1]^2, each (corners, 2); every line cuts all of them in two.
        regions = [np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])]
        for normal, offset in zip(n, b, strict=True):
            halves = [_clip(r, sign * normal, sign * offset) for r in regions for sign in (1.0, -1.0)]
            regions = [h for h in halves if len(h) >= 3]
        blue, red = theme.PALETTE["blue"], theme.PALETTE["vermillion"]
        tints = list(colors) or [theme.tint(blue, s) for s in (0.28, 0.18, 0.1, 0.05)] + [theme.tint(red, 0.18)]
        half = np.array([width / 2, -height / 2])  # y grows downwards on the canvas
        for i, region in enumerate(regions):
            corners = region * half + (x, y)
            self.ax.add_patch(
                Polygon(
                    corners,
                    facecolor=tints[i % len(tints)],
                    edgecolor=theme.INK,
                    linewidth=1.6,
                    joinstyle="round",
                    zorder=1.5,
                )
            )
        return Node(float(x), y, width, height)

    def image(self, x: float, y: float, width: float, height: float, pixels: npt.ArrayLike, **looks: Any) -> Node:
        """An array of shape (h, w) or (h, w, 3) as a picture; ``looks`` go to ``imshow``."""
        extent = (x - width / 2, x + width / 2, y + height / 2, y - height / 2)
        # imshow sets the limits to its picture.
        limits = self.ax.get_xlim(), self.ax.get_ylim()
        self.ax.imshow(np.asarray(pixels), extent=extent, zorder=1.8, **({"cmap": "gray"} | looks))
        self.ax.set_xlim(*limits[0])
        self.ax.set_ylim(*limits[1])
        return Node(float(x), y, width, height)

    def curve(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        values: npt.ArrayLike,
        *,
        color: str = theme.PALETTE["blue"],
    ) -> Node:
        """A small line through ``values`` of shape (n,), scaled to the given size."""
        v = np.asarray(values, dtype=float)
        span = float(np.ptp(v)) or 1.0
        across = np.linspace(x - width / 2, x + width / 2, len(v))
        self.ax.plot(across, y + height / 2 - height * (v - v.min()) / span, color=color, zorder=2)
        return Node(float(x), y, width, height)

    # --- between shapes -----------------------------------------------------------------------------------------------

    def arrow(
        self,
        start: Node | Point,
        end: Node | Point,
        text: str = "",
        *,
        curve: float = 0.0,
        color: str = theme.INK,
        both: bool = False,
        head: bool = True,
        dashed: bool = False,
        side: int = 1,
        width: float = 1.8,
    ) -> FancyArrowPatch:
        """Arrow between two shapes or points, with a text beside its middle.

        Parameters
        ----------
        curve
            0 is straight; positive and negative values bend it to either side.
        both, head
            A head at both ends, or none at all (a line).
        side
            1 puts the text above or to the right of the arrow, -1 on the other side.
        """
        a, b = _center(start), _center(end)
        if isinstance(start, Node):
            a_edge = start.edge_towards(b)
        else:
            a_edge = a
        b_edge = end.edge_towards(a) if isinstance(end, Node) else b
        shape = ("<|-|>" if both else "-|>") if head else "-"
        patch = FancyArrowPatch(
            a_edge,
            b_edge,
            arrowstyle=shape,
            connectionstyle=f"arc3,rad={curve}",
            mutation_scale=16,
            shrinkA=3 if isinstance(start, Node) else 1,
            shrinkB=3 if isinstance(end, Node) else 1,
            color=color,
            linewidth=width,
            linestyle=(0, (3, 2)) if dashed else "-",
            joinstyle="miter",
            clip_on=False,  # a bent arrow may leave the canvas; the slide then makes room for it
            zorder=2.5,
        )
        self.ax.add_patch(patch)
        if text:
            self._beside(a_edge, b_edge, text, curve, color, side)
        return patch

    def line(
        self, start: Node | Point, end: Node | Point, *, color: str = theme.LINE, width: float = 1.4
    ) -> FancyArrowPatch:
        """A plain connection."""
        return self.arrow(start, end, head=False, color=color, width=width)

    def _beside(self, a: Point, b: Point, text: str, curve: float, color: str, side: int) -> None:
        ax, ay, bx, by = *a, *b
        length = float(np.hypot(bx - ax, by - ay)) or 1.0
        # arc3 bends by its control point, at the middle plus curve * (dy, -dx); the apex is half as far.
        mx = (ax + bx) / 2 - curve * (by - ay) / 2
        my = (ay + by) / 2 + curve * (bx - ax) / 2
        nx, ny = -(by - ay) / length, (bx - ax) / length
        if ny > 0 or (ny == 0 and nx < 0):
            nx, ny = -nx, -ny  # points up, or right for a vertical arrow
        nx, ny = nx * side, ny * side
        ha = "center" if abs(nx) < 0.35 else ("left" if nx > 0 else "right")
        va = "center" if abs(ny) < 0.35 else ("bottom" if ny < 0 else "top")
        self.ax.text(
            mx + 7 * nx, my + 7 * ny, text, ha=ha, va=va, color=theme.ink(color), fontsize=theme.SMALL, zorder=4
        )

    # --- words --------------------------------------------------------------------------------------------------------

    def note(
        self, x: float, y: float, text: str, *, color: str = theme.MUTED, room: float | None = None, **looks: Any
    ) -> Text:
        """Text centered on a point (``ha="left"`` and so on go to ``Axes.text``), wrapped to ``room`` where given."""
        size = looks.pop("fontsize", theme.SMALL)
        if room is not None:
            text = fit(self._figure, text, room * self._scale, size, lines=9).text
        looks = {"ha": "center", "va": "center", "linespacing": 1.3, "zorder": 4, **looks}
        return self.ax.text(x, y, text, color=theme.ink(color), fontsize=size, **looks)

    def equation(
        self, x: float, y: float, tex: str, *, size: float = 19.0, room: float | None = None, color: str = theme.INK
    ) -> Text:
        r"""A formula such as ``r"q = \sigma(w \cdot p)"``, in matplotlib's mathtext, centered; shrunk to ``room``."""
        formula = tex if "$" in tex else f"${tex}$"
        wide = (self.width if room is None else room) * self._scale
        size = fit(self._figure, formula, wide, size).size
        return self.ax.text(x, y, formula, ha="center", va="center", color=color, fontsize=size, zorder=4)

    def _add(self, patch: Patch) -> None:
        """Add a shape under a name of its own, so that the layout can be checked: its text must stay in it."""
        self._shapes += 1
        patch.set_gid(f"shape-{self._shapes}")
        self.ax.add_patch(patch)

    def _label(
        self, x: float, y: float, room: float, text: str, color: str, filled: bool, size: float, lines: int
    ) -> None:
        if not text:
            return
        fitted = fit(self._figure, text, room * self._scale, size, lines=lines, weight="semibold")
        shade = (theme.CARD if theme.contrast(theme.CARD, color) >= 3 else theme.INK) if filled else theme.INK
        looks: dict[str, Any] = {
            "ha": "center",
            "va": "center_baseline" if len(fitted.lines) == 1 else "center",
            "linespacing": 1.25,
        }
        words = self.ax.text(x, y, fitted.text, color=shade, fontsize=fitted.size, weight="semibold", zorder=4, **looks)
        words.set_gid(f"in-shape-{self._shapes}")


def _center(end: Node | Point) -> Point:
    return (end.x, end.y) if isinstance(end, Node) else end


def _clip(corners: npt.NDArray[np.float64], normal: npt.NDArray[np.float64], offset: float) -> npt.NDArray[np.float64]:
    """Part of a convex polygon, shape (m, 2), where ``normal . z <= offset`` (Sutherland and Hodgman 1974)."""
    kept: list[npt.NDArray[np.float64]] = []
    for p, q in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        dp, dq = float(p @ normal - offset), float(q @ normal - offset)
        if dp <= 0:
            kept.append(p)
        # The edge crosses the line; the corner is where it does.
        if dp * dq < 0:
            kept.append(p + (q - p) * dp / (dp - dq))
    return np.array(kept)
