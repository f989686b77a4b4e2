"""What the panels of many slides draw: courses with their intervals, rows and columns of dots, and their words.

Values come from :meth:`mlcollage.lab.Evidence.across_seeds` (a table with columns ``mean``, ``lo``, ``hi`` over some
quantity) or, seed by seed, from :meth:`mlcollage.lab.Evidence.by_seed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.ticker import NullLocator

from mlcollage.collage import theme
from mlcollage.errors import InvalidInput

DASHED = (0, (3, 2))  # a second line of one color: context, theory, a peer

Colors = str | Mapping[str, str]


def course(
    ax: Axes,
    table: pd.DataFrame,
    color: str,
    name: str = "",
    *,
    dots: bool = False,
    dashed: bool = False,
    interval: bool = True,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> None:
    """Means as a line over the table's index, in their interval, with a name at the right end.

    Parameters
    ----------
    table
        Columns ``mean``, ``lo`` and ``hi``, shape (n,) each, over an increasing index.
    name
        Printed at the last point; nothing is printed without it.
    dots
        Whether the points are marked: where only few were measured.
    dashed, interval
        A dashed line, and one without its interval, for what is there to compare with.
    bounds
        Lowest and highest value that the quantity can have, where the interval stops.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"mean": [2.0, 1.0], "lo": [1.5, 0.8], "hi": [2.5, 1.2]}, index=[10, 100])
    >>> ax = Figure().add_subplot()
    >>> course(ax, table, theme.PALETTE["blue"], "loss")
    >>> ax.lines[0].get_ydata().tolist(), ax.texts[0].get_text()
    ([2.0, 1.0], 'loss')
    """
    x, y = table.index.to_numpy(dtype=float), table["mean"].to_numpy(dtype=float)  # (n,) each
    if interval:
        theme.band(ax, x, table["lo"].clip(*bounds), table["hi"].clip(*bounds), color)
    ax.plot(x, y, marker="o" if dots else "", color=color, linestyle=DASHED if dashed else "-")
    if name:
        theme.label_line_end(ax, float(x[-1]), float(y[-1]), name, color)


def rows(ax: Axes, values: Mapping[str, npt.ArrayLike], colors: Colors, *, reference: float | None = None) -> None:
    """Named rows, the first on top: each with its seeds as pale dots, their mean and its 95% interval.

    Parameters
    ----------
    values
        Name of a row to its values, one a seed.
    colors
        One color, or one for each name.
    reference
        Value of a vertical line that the rows are compared with, e.g. 0 for differences.
    """
    _dots(ax, values, colors, horizontal=True)
    if reference is not None:
        ax.axvline(reference, color=theme.LINE, linewidth=1.6, zorder=1)
    ax.set_yticks(range(len(values)), list(values))
    ax.set_ylim(len(values) - 0.4, -0.6)
    theme.tidy(ax, grid="x", ticks=4)
    ax.tick_params(axis="y", length=0)


def columns(ax: Axes, values: Mapping[str, npt.ArrayLike], colors: Colors, *, reference: float | None = None) -> None:
    """The same as :func:`rows` upright: named columns from left to right, for levels that have an order."""
    _dots(ax, values, colors, horizontal=False)
    if reference is not None:
        ax.axhline(reference, color=theme.LINE, linewidth=1.6, zorder=1)
    ax.set_xticks(range(len(values)), list(values))
    ax.set_xlim(-0.6, len(values) - 0.4)
    theme.tidy(ax, grid="y", ticks=4)


def _dots(ax: Axes, values: Mapping[str, npt.ArrayLike], colors: Colors, *, horizontal: bool) -> None:
    if not values:
        raise InvalidInput("there is nothing to draw: values is empty; give a name and its values for each row.")
    for place, (name, seeds) in enumerate(values.items()):
        x = np.asarray(seeds, dtype=float)  # (seeds,)
        lo, hi = theme.mean_interval(x)
        color = colors if isinstance(colors, str) else colors[name]
        theme.dots_with_interval(ax, place, x.mean(), lo, hi, color, seeds=[x], horizontal=horizontal)


def log_steps(ax: Axes, ticks: Sequence[float] | None = None, text: str = "{:,g}") -> None:
    """A logarithmic x axis whose ticks are written out; by default the powers of ten that it shows.

    Call it after the lines are drawn.
    """
    ax.set_xscale("log")
    shown = list(ticks or ())
    if not shown:
        lo, hi = sorted(float(v) for v in (ax.dataLim.x0, ax.dataLim.x1))
        powers = 10.0 ** np.arange(-12, 13)
        # In less than two decades 2 and 5 are needed too, and in less than that the ends.
        for candidates in (powers, np.multiply.outer(powers, (1, 2, 5)).ravel(), np.array([lo, hi])):
            shown = [float(v) for v in candidates if lo * 0.999 <= v <= hi * 1.001]
            if len(shown) > 1:
                break
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(shown, [text.format(v) for v in shown])


def color_scale(ax: Axes, colors: Colormap, limits: tuple[float, float], text: str = "{:+.2g}") -> None:
    """A narrow axes as the key of an image's colors: a strip with its two ends, and 0 if it lies between them."""
    lo, hi = limits
    ax.imshow(np.linspace(hi, lo, 64)[:, None], cmap=colors, vmin=lo, vmax=hi, aspect="auto", extent=(0, 1, lo, hi))
    ticks = [lo, 0.0, hi] if lo < 0 < hi else [lo, hi]
    ax.yaxis.tick_right()
    ax.set(xticks=[], yticks=ticks)
    ax.set_yticklabels(["0" if v == 0 else text.format(v).replace("-", "−") for v in ticks])
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)


def listed(values: Mapping[str, npt.ArrayLike], text: str = "{:.2f}") -> str:
    """Names with the means of their values, for a text alternative.

    Examples
    --------
    >>> listed({"early": [60.0, 62.0], "late": [70.0]}, "{:.1f}%")
    'early 61.0%, late 70.0%'
    """
    means = {name: float(np.mean(np.asarray(v, dtype=float))) for name, v in values.items()}
    return ", ".join(f"{name} {text.format(mean)}" for name, mean in means.items())


def from_to(tables: Mapping[str, pd.DataFrame], text: str = "{:.2f}") -> str:
    """Names with the first and the last mean of their courses, for a text alternative.

    Examples
    --------
    >>> from_to({"test": pd.DataFrame({"mean": [0.9, 0.5, 0.25]})})
    'test 0.90 to 0.25'
    """
    ends = {name: (text.format(t["mean"].iloc[0]), text.format(t["mean"].iloc[-1])) for name, t in tables.items()}
    return ", ".join(f"{name} {first} to {last}" for name, (first, last) in ends.items())
