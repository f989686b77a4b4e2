"""Type, palette and spacing of the slides, and the few drawing idioms that every panel uses.

Everything here works on Figure and Axes objects; matplotlib's global state is touched only inside
:func:`style`, which puts it back. Sizes are points on a slide of 16 by 9 inches: 12.6 points are
17.5 pixels of 1600, or 10.5 pixels of 960, and nothing on a slide is set smaller.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from cycler import cycler
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, MaxNLocator
from scipy.optimize import isotonic_regression

from mlcollage.errors import InvalidInput

FONTS = Path(__file__).parent / "fonts"
FAMILY = "MLCollage Sans"
FALLBACK = "DejaVu Sans"  # bundled with matplotlib; has the signs that Inter lacks

PAPER = "#FBFAF6"  # the slide's ground
CARD = "#FFFFFF"
WASH = "#F4F2EB"  # a quiet field inside a card, e.g. behind an equation
RULE = "#E1DED4"  # card borders
SHADE = "#E6E1D3"  # effects too small to matter
CLAIMED = "#CFE9DA"  # effects that a claim asserts
LINE = "#98A1AA"  # axes
GRID = "#ECEAE3"
INK = "#17212B"
MUTED = "#535E69"
BAND = "#18232E"  # the title band
BAND_MUTED = "#B9C4CE"

MIN_SIZE = 12.6
SMALL = 12.6
BODY = 13.3
PANEL_TITLE = 15.2
SLIDE_TITLE = 29.0
FINDING = 21.5  # the sentence above the dominant picture: 9 pixels where a slide is shown 480 wide
VERDICT = 20.0  # 8 pixels where a slide is shown 480 wide
# What is drawn in the dominant picture is read from afar.
LARGE_PICTURE: dict[Any, Any] = {
    "font.size": 16.0,
    "axes.labelsize": 15.0,
    "axes.titlesize": 16.0,
    "xtick.labelsize": 15.0,
    "ytick.labelsize": 15.0,
    "legend.fontsize": 15.0,
    "lines.linewidth": 3.6,
    "lines.markersize": 9.0,
}

# Okabe and Ito's colors (https://jfly.uni-koeln.de/color/), told apart with every common kind of color vision;
# their yellow is left out because it does not show on white.
PALETTE: Mapping[str, str] = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#2B3641",
}
GRAYS = ("#7C8791", "#A5AEB6", "#5E6973", "#C0C7CD")

STATUS_COLORS: Mapping[str, str] = {
    "supported": "#0B7A4B",
    "contradicted": "#B5390A",
    "inconclusive": "#866200",
    "untested": "#626D78",
    "pending": "#626D78",
}
STATUS_MARKS: Mapping[str, str] = {
    "supported": "✓",
    "contradicted": "✗",
    "inconclusive": "≈",
    "untested": "○",
    "pending": "◌",
}
STATUS_WORDS: Mapping[str, str] = {
    "supported": "supported",
    "contradicted": "contradicted",
    "inconclusive": "inconclusive",
    "untested": "not tested",
    "pending": "not measured yet",
}

_RC: dict[str, Any] = {
    "font.family": [FAMILY, FALLBACK],
    "font.size": SMALL,
    "mathtext.fontset": "stix",
    "text.color": INK,
    "text.hinting": "none",
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.linewidth": 1.0,
    "axes.labelcolor": MUTED,
    "axes.labelsize": SMALL,
    "axes.labelpad": 4.0,
    "axes.titlesize": BODY,
    "axes.titleweight": "semibold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=list(PALETTE.values())),
    "axes.xmargin": 0.03,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.size": 3.5,
    "ytick.major.size": 3.5,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "lines.linewidth": 2.5,
    "lines.markersize": 6.0,
    "lines.solid_capstyle": "round",
    "lines.dash_capstyle": "round",
    "patch.linewidth": 0.0,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "image.interpolation": "nearest",
    "figure.dpi": 100.0,
    "figure.facecolor": PAPER,
    "savefig.dpi": "figure",
    "savefig.facecolor": "auto",
    "svg.fonttype": "none",
    "svg.hashsalt": "mlcollage",
    "pdf.fonttype": 42,
}
_NOT_LOOKS = (
    "backend",
    "interactive",
    "toolbar",
    "webagg",
    "keymap",
    "animation",
    "date",
    "tk.",
    "macosx",
    "docstring",
)


@functools.cache
def register_fonts() -> None:
    """Make the shipped faces known to matplotlib, under their own family name; done once."""
    for path in sorted(FONTS.glob("*.ttf")):
        font_manager.fontManager.addfont(path)


class _NoFallbackWeight(logging.Filter):
    """Drops the note that the fallback face has no semibold; its bold is what we want there."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "Failed to find font weight" not in record.getMessage()


@contextmanager
def style() -> Iterator[None]:
    """Within it, matplotlib draws in the collage's style; the user's ``rcParams`` are put back after.

    The style starts from matplotlib's own defaults, so a user's ``matplotlibrc`` does not change a slide.

    Examples
    --------
    >>> import matplotlib as mpl
    >>> before = mpl.rcParams["font.family"]
    >>> with style():
    ...     mpl.rcParams["font.family"]
    ['MLCollage Sans', 'DejaVu Sans']
    >>> mpl.rcParams["font.family"] == before
    True
    """
    register_fonts()
    # A user's matplotlibrc must not change a slide, so matplotlib's defaults come first.
    looks: dict[Any, Any] = {k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith(_NOT_LOOKS)}
    log, quiet = logging.getLogger("matplotlib.font_manager"), _NoFallbackWeight()
    # The fallback font has no semibold; matplotlib would say so for every character.
    log.addFilter(quiet)
    try:
        with mpl.rc_context(looks | _RC):
            yield
    finally:
        log.removeFilter(quiet)


# --- color -----------------------------------------------------------------------------------------------------------


def arm_colors(names: Sequence[str], *, muted: Sequence[str] = ()) -> dict[str, str]:
    """Colors of a study's arms: call it once a slide and hand the result to every panel.

    Parameters
    ----------
    names
        The arms in order of importance; the n-th gets the palette's n-th color. At most seven.
    muted
        Arms that are context only (peers, chance, earlier variants): grays. At most four.

    Raises
    ------
    InvalidInput
        If there are more arms than colors that can be told apart, or an arm is named twice.

    Examples
    --------
    >>> arm_colors(["gln", "mlp"], muted=["chance"])
    {'gln': '#0072B2', 'mlp': '#D55E00', 'chance': '#7C8791'}
    """
    every = [*names, *muted]
    if len(set(every)) != len(every):
        raise InvalidInput(f"arms {every} name one arm twice; give each arm once so that it has one color.")
    if len(names) > len(PALETTE) or len(muted) > len(GRAYS):
        raise InvalidInput(
            f"{len(names)} arms and {len(muted)} muted arms cannot be told apart by color; "
            f"use at most {len(PALETTE)} and {len(GRAYS)}, or draw some in panels of their own."
        )
    return dict(zip(names, PALETTE.values(), strict=False)) | dict(zip(muted, GRAYS, strict=False))


def _luminance(color: str) -> float:
    c = np.asarray(to_rgb(color))
    # sRGB to light, and the weights of WCAG 2 for red, green and blue.
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(a: str, b: str = CARD) -> float:
    """WCAG contrast ratio of two colors, from 1 to 21.

    Examples
    --------
    >>> round(contrast("#000000", "#FFFFFF"), 1)
    21.0
    """
    lo, hi = sorted((_luminance(a), _luminance(b)))
    return (hi + 0.05) / (lo + 0.05)


def ink(color: str, ground: str = CARD) -> str:
    """The color, darkened until text in it can be read on the ground (contrast at least 4.5).

    Examples
    --------
    >>> contrast(ink(PALETTE["orange"])) >= 4.5
    True
    """
    rgb = np.asarray(to_rgb(color))
    for keep in np.linspace(1.0, 0.0, 41):
        dark = to_hex(tuple(rgb * keep))
        if contrast(dark, ground) >= 4.5:  # WCAG's least for small text
            return dark
    return INK


def tint(color: str, strength: float = 0.18) -> str:
    """The color mixed with white; opaque, so that it prints and overlaps well."""
    return to_hex(tuple(1 - strength * (1 - np.asarray(to_rgb(color)))))


def sequential(color: str = PALETTE["blue"]) -> LinearSegmentedColormap:
    """Color map from near white through the color to a dark shade of it."""
    # From a tint to a shade through the color itself: lightness rises in one direction, as it must for values.
    dark = to_hex(tuple(np.asarray(to_rgb(color)) * 0.62))
    return LinearSegmentedColormap.from_list("collage", [tint(color, 0.07), tint(color, 0.55), color, dark])


# --- axes -------------------------------------------------------------------------------------------------------------


def tidy(ax: Axes, *, grid: str = "", ticks: int = 5) -> Axes:
    """Light axes: no top and right spines, few ticks, a faint grid on ``grid`` (``"x"``, ``"y"``, ``"both"``).

    Ticks that were set one by one are left as they are.
    """
    ax.spines[["top", "right"]].set_visible(False)
    if grid:
        ax.grid(axis=grid)  # type: ignore[arg-type]
        ax.tick_params(axis=grid, length=0)  # type: ignore[arg-type]
    for axis, scale in ((ax.xaxis, ax.get_xscale()), (ax.yaxis, ax.get_yscale())):
        if scale == "linear" and not isinstance(axis.get_major_locator(), FixedLocator):
            axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    return ax


def band(
    ax: Axes, x: npt.ArrayLike, lo: npt.ArrayLike, hi: npt.ArrayLike, color: str, *, strength: float = 0.17
) -> None:
    """Interval around a line, between ``lo`` and ``hi`` over ``x``, all of shape (n,)."""
    ax.fill_between(np.asarray(x), np.asarray(lo), np.asarray(hi), color=color, alpha=strength, linewidth=0, zorder=1.5)


def line_width() -> float:
    """Width of a line in the picture that is being drawn, in points; the dominant picture has thicker ones."""
    return float(mpl.rcParams["lines.linewidth"])


def mean_interval(values: npt.ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean over seeds; the value itself where seeds do not differ or there is one."""
    from mlcollage.stats.bootstrap import t_interval

    x = np.asarray(values, dtype=float)
    return t_interval(x, level) if len(x) > 1 and np.ptp(x) > 0 else (float(x.mean()), float(x.mean()))


def dots_with_interval(
    ax: Axes,
    positions: npt.ArrayLike,
    estimates: npt.ArrayLike,
    lo: npt.ArrayLike,
    hi: npt.ArrayLike,
    color: str,
    *,
    seeds: Sequence[npt.ArrayLike] = (),
    horizontal: bool = False,
    hollow: bool = False,
) -> None:
    """Estimates as dots on their intervals, with the single seeds beside them where given.

    Parameters
    ----------
    positions, estimates, lo, hi
        Shape (n,): where on the other axis, the estimate, and the two ends of its interval.
    seeds
        n arrays of single values, drawn small and pale, spread by their order.
    horizontal
        Values along x (positions along y).
    hollow
        White dots with a colored edge, e.g. for a second group of the same arm.
    """
    p, m, a, b = (np.atleast_1d(np.asarray(v, dtype=float)) for v in (positions, estimates, lo, hi))  # (n,) each
    if not p.shape == m.shape == a.shape == b.shape:
        raise InvalidInput(
            f"positions, estimates, lo and hi have shapes {p.shape}, {m.shape}, {a.shape}, {b.shape}; they must agree."
        )
    step = float(np.min(np.diff(np.sort(p)))) if len(p) > 1 else 1.0
    for where, values in zip(p, seeds, strict=False):
        v = np.asarray(values, dtype=float).ravel()
        # Spread evenly and not at random: the same data give the same picture.
        side = where + 0.11 * step * np.linspace(-1, 1, len(v)) if len(v) > 1 else np.full(len(v), where)
        xy = (v, side) if horizontal else (side, v)
        ax.plot(*xy, "o", color=color, alpha=0.35, markersize=4.5, markeredgewidth=0, zorder=2)
    draw_interval = ax.hlines if horizontal else ax.vlines
    draw_interval(p, a, b, colors=color, linewidth=2.6, zorder=2.5, capstyle="round")
    face = CARD if hollow else color
    ax.plot(
        *((m, p) if horizontal else (p, m)),
        "o",
        color=color,
        markerfacecolor=face,
        markersize=8,
        zorder=3,
        markeredgewidth=2,
    )


def lollipops(
    ax: Axes,
    names: Sequence[str],
    values: Sequence[float],
    colors: Sequence[str] | str,
    *,
    text: Sequence[str] | str = "{:,.3g}",
    log: bool = False,
) -> None:
    """Named values as dots on thin lines, the first on top, each with its number; the value axis is left out."""
    v = np.asarray(values, dtype=float)
    if log and not np.all(v > 0):
        raise InvalidInput("a logarithmic scale needs positive values; leave log=False or drop the others.")
    y = np.arange(len(v))[::-1]
    shades = [colors] * len(v) if isinstance(colors, str) else list(colors)
    words = [text.format(value) for value in v] if isinstance(text, str) else list(text)
    left = float(v.min()) / 3 if log else min(0.0, float(v.min()))  # a stem from 0, which a logarithmic axis has not
    if log:
        ax.set_xscale("log")
    ax.hlines(y, left, v, colors=RULE, linewidth=2.2, zorder=1)
    for value, row, shade, word in zip(v, y, shades, words, strict=True):
        ax.plot([value], [row], "o", color=shade, markersize=10, zorder=3, clip_on=False)
        ax.annotate(
            word, (value, row), (10, 0), textcoords="offset points", va="center", color=ink(shade), weight="semibold"
        )
    ax.set_yticks(y, names)
    ax.set_ylim(-0.6, len(v) - 0.4)
    ax.set_xlim(left=left)
    ax.tick_params(axis="y", length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.xaxis.set_visible(False)


def heatmap(
    ax: Axes,
    matrix: npt.ArrayLike,
    color: str = PALETTE["blue"],
    *,
    text: str = "",
    limits: tuple[float, float] | None = None,
    labels: tuple[Sequence[str], Sequence[str]] | None = None,
) -> None:
    """Matrix of shape (rows, columns) as colored cells with white gaps; missing (NaN) cells stay empty.

    Parameters
    ----------
    text
        A format such as ``"{:.0f}"`` prints each value in its cell, light or dark, whichever reads better.
    limits
        Values at the two ends of the color map; by default those of the matrix.
    labels
        Names of the rows and of the columns.
    """
    m = np.asarray(matrix, dtype=float)
    if m.ndim != 2:
        raise InvalidInput(f"a heat map needs a matrix of shape (rows, columns), not an array of shape {m.shape}.")
    lo, hi = limits or (float(np.nanmin(m)), float(np.nanmax(m)))
    colors = sequential(color)
    ax.imshow(np.ma.masked_invalid(m), cmap=colors, vmin=lo, vmax=hi, aspect="auto")
    rows, columns = m.shape
    if max(rows, columns) <= 24:  # gaps between finer cells would hide them
        ax.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, colors=CARD, linewidth=1.8)
        ax.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, colors=CARD, linewidth=1.8)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if labels is not None:
        ax.set_yticks(range(rows), labels[0])
        ax.set_xticks(range(columns), labels[1])
    if text:
        for (i, j), value in np.ndenumerate(m):
            if np.isfinite(value):
                ground = to_hex(colors((value - lo) / ((hi - lo) or 1.0)))
                shade = CARD if contrast(CARD, ground) >= contrast(INK, ground) else INK
                ax.text(j, i, text.format(value), ha="center", va="center", color=shade)


def reference_line(ax: Axes, y: float, text: str, color: str = GRAYS[2], *, vertical: bool = False) -> None:
    """Dashed line at a value that others are compared with, named at its end."""
    if vertical:
        ax.axvline(y, color=color, linewidth=1.6, linestyle=(0, (4, 3)), zorder=1.2)
        ax.annotate(
            text,
            (y, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=ink(color),
        )
        return
    ax.axhline(y, color=color, linewidth=1.6, linestyle=(0, (4, 3)), zorder=1.2)
    label = ax.annotate(
        text,
        (1, y),
        (8, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        color=ink(color),
    )
    label.set_gid("line-end")


# --- direct labels ----------------------------------------------------------------------------------------------------


def label_line_end(ax: Axes, x: float, y: float, text: str, color: str, *, weight: str = "semibold") -> Annotation:
    """Name a line at its right end; labels of the same axes are kept apart when the slide is laid out.

    Outside a slide, call :func:`spread_labels` once the figure's size and the axis limits are final.
    """
    label = ax.annotate(
        text,
        (x, y),
        (8, 0),
        textcoords="offset points",
        va="center",
        ha="left",
        color=ink(color),
        weight=weight,
        annotation_clip=False,
    )
    label.set_gid("line-end")
    return label


def spread_labels(ax: Axes, gap: float = 1.0) -> None:
    """Move the line-end labels of an axes up or down by as little as keeps them ``gap`` points apart."""
    labels = [t for t in ax.texts if isinstance(t, Annotation) and t.get_gid() == "line-end"]
    if len(labels) < 2:
        return
    renderer, scale = ax.figure.canvas.get_renderer(), ax.figure.dpi / 72  # type: ignore[attr-defined]
    for label in labels:
        # Back to their own heights: this is called again after the axes have been resized.
        label.xyann = (label.xyann[0], 0.0)
    boxes = [t.get_window_extent(renderer) for t in labels]
    groups: list[list[int]] = []
    for i in sorted(range(len(labels)), key=lambda i: boxes[i].x0):  # only labels that share a column can collide
        mine = next(
            (g for g in groups if any(boxes[i].x0 < boxes[j].x1 and boxes[j].x0 < boxes[i].x1 for j in g)), None
        )
        if mine is None:
            groups.append([i])
        else:
            mine.append(i)
    for group in groups:
        group.sort(key=lambda i: boxes[i].y0 + boxes[i].y1)
        centers = np.array([(boxes[i].y0 + boxes[i].y1) / 2 for i in group])
        heights = np.array([boxes[i].height * 0.86 + gap * scale for i in group])  # line boxes are taller than letters
        for i, shift in zip(group, _apart(centers, heights) - centers, strict=True):
            labels[i].xyann = (labels[i].xyann[0], shift / scale)


def _apart(centers: npt.NDArray[np.float64], heights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Least-squares positions, in the given order, at least half the sum of two neighbors' heights apart.

    With the needed distances taken off, this is isotonic regression.
    """
    offsets = np.concatenate([[0.0], np.cumsum((heights[1:] + heights[:-1]) / 2)])
    return np.asarray(isotonic_regression(centers - offsets).x) + offsets
