"""Lines, bands and labels of the curves in :class:`~mlcollage.papers.deep_bootstrap.result.BootstrapResult`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {"loss": "loss", "error": "error", "soft_error": "soft-error"}
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito, color-blind safe


def cycle(count: int) -> list[str]:
    """So many colors."""
    return [_COLORS[i % len(_COLORS)] for i in range(count)]


def new_axes(ax: Axes | None) -> Axes:
    """The axes that were given, or those of a new figure, which pyplot does not know of."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(6, 4), layout="constrained").add_subplot()


def band(ax: Axes, rows: pd.DataFrame, column: str, color: str, label: str) -> tuple[Any, Any]:
    """Mean over seeds with its Student interval, labeled at the end of the line; gives the line's points."""
    from scipy import stats

    groups = rows.groupby("step")[column]
    mean, count = groups.mean(), groups.count()
    half = stats.t.ppf(0.975, (count - 1).clip(lower=1)) * groups.std().fillna(0) / np.sqrt(count)
    ax.plot(mean.index, mean, color=color, label=label)
    if (count > 1).any():
        ax.fill_between(mean.index, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
    return mean.index.to_numpy(), mean.to_numpy()


def finish(ax: Axes, steps: pd.Series, ylabel: str) -> None:
    """Scales, frame and labels of curves over steps."""
    first = steps[steps > 0].min()
    ax.set_xscale("symlog", linthresh=max(float(first), 1.0), linscale=0.5)  # step 0 has a place too
    ax.set(xlabel="step", ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    # The lines set the frame: the interval of two seeds can be many times as wide as all there is to see.
    ends = [float(f(np.asarray(line.get_ydata(), dtype=float))) for line in ax.lines for f in (np.nanmin, np.nanmax)]
    pad = 0.06 * ((max(ends) - min(ends)) or 1.0)
    ax.set_ylim(min(ends) - pad, max(ends) + pad)
    _label_ends(ax)


def _label_ends(ax: Axes) -> None:
    """Names beside the ends of their lines, pushed apart where they would overlap."""
    named = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    low, high = ax.get_ylim()
    floor = -math.inf
    for line in sorted(named, key=lambda e: float(np.asarray(e.get_ydata())[-1])):
        x, y = (float(np.asarray(v)[-1]) for v in line.get_data())
        floor = max(y, floor + 0.055 * (high - low))
        where = {"textcoords": ax.get_yaxis_transform(), "va": "center", "fontsize": "small"}
        ax.annotate(str(line.get_label()), (x, y), (1.02, floor), color=str(line.get_color()), **where)  # type: ignore[arg-type]
