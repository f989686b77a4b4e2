"""One page of paper: its figure, and what is written and drawn on it in pixels from the top left corner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Affine2D

from mlcollage._users import users_code
from mlcollage.collage import theme
from mlcollage.collage.content import Panel
from mlcollage.collage.fitting import Box, fit_axes
from mlcollage.collage.text import Fitted, balance, fit
from mlcollage.errors import InvalidInput

PAD = 18.0  # between the edge of a card and what is in it


@dataclass
class Sheet:
    """A figure of ``width`` by ``height`` pixels at 100 dots per inch; all lengths below are such pixels."""

    width: float
    height: float
    figure: Figure = field(init=False)

    def __post_init__(self) -> None:
        self.figure = Figure(figsize=(self.width / 100, self.height / 100), dpi=100, facecolor=theme.PAPER)
        FigureCanvasAgg(self.figure)

    @property
    def pixels(self) -> Any:
        """Transform from pixels (y upwards) that is valid at any resolution."""
        return Affine2D().scale(1 / self.width, 1 / self.height) + self.figure.transFigure

    def card(self, box: Box, name: str, radius: float = 12.0) -> FancyBboxPatch:
        """A white field with a thin edge; texts whose name begins with ``name`` must stay in it."""
        patch = FancyBboxPatch(
            (box.left, self.height - box.bottom),
            box.width,
            box.height,
            boxstyle=f"round,pad=0,rounding_size={radius}",
            transform=self.pixels,
            facecolor=theme.CARD,
            edgecolor=theme.RULE,
            linewidth=1.0,
            zorder=-2,
        )
        patch.set_gid(f"card-{name}")
        return self.figure.add_artist(patch)  # type: ignore[return-value]

    def rectangle(self, box: Box, color: str, zorder: float = -1.0, name: str = "") -> Rectangle:
        """A filled rectangle."""
        patch = Rectangle(
            (box.left, self.height - box.bottom),
            box.width,
            box.height,
            transform=self.pixels,
            facecolor=color,
            zorder=zorder,
        )
        if name:
            patch.set_gid(name)
        return self.figure.add_artist(patch)  # type: ignore[return-value]

    def line(self, x: tuple[float, float], y: tuple[float, float], color: str, width: float, **looks: Any) -> None:
        """A straight line, or with ``marker=`` points."""
        ends = [self.height - v for v in y]
        self.figure.add_artist(Line2D(x, ends, transform=self.pixels, color=color, linewidth=width, **looks))

    def write(self, x: float, y: float, text: str, size: float, name: str, **looks: Any) -> Text:
        """One line whose letters are centered on ``y`` (downwards)."""
        looks = {"ha": "left", "color": theme.INK} | looks
        down = size * 0.5  # Inter's capitals are 0.73 em high: 0.36 em, in pixels, below the middle
        artist = self.figure.text(
            x / self.width, 1 - (y + down) / self.height, text, fontsize=size, va="baseline", **looks
        )
        artist.set_gid(name)
        return artist

    def block(self, x: float, top: float, fitted: Fitted, pitch: float, name: str, **looks: Any) -> float:
        """Lines of text from ``top`` down, ``pitch`` pixels each; returns where they end."""
        for i, line in enumerate(fitted.lines):
            self.write(x, top + pitch * (i + 0.5), line, fitted.size, name, **looks)
        return top + pitch * len(fitted.lines)

    def panel(self, panel: Panel, title: str, box: Box, name: str, *, large: bool = False) -> None:
        """A card with a title, a subtitle and the picture; ``large`` for the one that is read from afar."""
        self.card(box, name)
        room, y = box.width - 2 * PAD, box.top + 14.0
        size = theme.FINDING if large else theme.PANEL_TITLE
        smallest = 0.8 * size if large else theme.BODY
        head = fit(self.figure, title, room, size, lines=2, weight="bold", smallest=smallest)
        if head.cut:
            head = fit(self.figure, title, room, size, lines=3, weight="bold", smallest=smallest)
        head = balance(self.figure, head, room, weight="bold")
        y = self.block(box.left + PAD, y, head, head.size * 1.68, f"{name}-head", weight="bold")
        if panel.subtitle:
            below = fit(self.figure, panel.subtitle, room, theme.BODY if large else theme.SMALL, lines=4)
            below = balance(self.figure, below, room)
            y = self.block(box.left + PAD, y + 3, below, 22.0, f"{name}-head", color=theme.MUTED)
        inner = Box(box.left + PAD, y + 10.0, box.right - PAD, box.bottom - 14.0)
        if inner.height < 60:
            raise InvalidInput(f"panel {title!r}: no room is left under its title and subtitle; shorten them.")
        with mpl.rc_context(dict(theme.LARGE_PICTURE) if large else {}):
            self._picture(panel, inner, name)

    def _picture(self, panel: Panel, inner: Box, name: str) -> None:
        if panel.own_axes:
            grid = self.figure.add_gridspec(
                3,
                3,
                left=0,
                right=1,
                bottom=0,
                top=1,
                wspace=0,
                hspace=0,
                width_ratios=[inner.left, inner.width, self.width - inner.right],
                height_ratios=[inner.top, inner.height, self.height - inner.bottom],
            )
            part = self.figure.add_subfigure(grid[1, 1], facecolor="none")
            part.set_gid(name)
            with users_code(f"drawing panel {panel.title!r}"):
                panel.draw(part)  # type: ignore[arg-type]
            fit_axes(part.axes, inner)
            return
        axes: Axes = self.figure.add_axes(inner.fraction(self.width, self.height))
        axes.set_gid(name)
        if name == "idea":
            axes.set_axis_off()
        with users_code(f"drawing panel {panel.title!r}"):
            panel.draw(axes)  # type: ignore[arg-type]
        fit_axes([axes], inner)
