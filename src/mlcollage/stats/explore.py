r"""Pictures that are tests: simultaneous bands, critical differences, lineups, and the plots of paired results.

Every function draws on the matplotlib ``Axes`` it is given, in the colors and sizes that are set there, and returns
what it computed; the numbers behind a picture are functions of their own. A. Gelman and A. Vehtari, "What are the most
important statistical ideas of the past 50 years?", JASA 2021, idea 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats as sps

from mlcollage._checks import integer, probability
from mlcollage.errors import InvalidInput
from mlcollage.stats._values import Floats, Rng, finite, levels, pair, sample, table

if TYPE_CHECKING:
    from mlcollage.stats.simulation import SBCResult

_QUIET = "0.45"  # the gray of what is not data


def _colors(colors: Sequence[str] | None, lines: int) -> Sequence[str]:
    """One color per line: the given ones, or matplotlib's cycle."""
    if colors is not None and len(colors) < lines:
        raise InvalidInput(f"{len(colors)} colors were given for {lines} lines.")
    return [f"C{i}" for i in range(lines)] if colors is None else colors


def _span(values: Floats) -> tuple[float, float]:
    """Ends of an axis that shows all values, a twentieth of their range beyond them."""
    margin = 0.05 * float(np.ptp(values) or 1.0)
    return float(values.min()) - margin, float(values.max()) + margin


def forest(
    ax: Axes,
    labels: Sequence[str],
    estimates: npt.ArrayLike,
    intervals: npt.ArrayLike,
    *,
    shrunken: npt.ArrayLike | None = None,
    null: float | None = 0.0,
    color: str = "C0",
    shrunken_color: str = "C1",
) -> None:
    """Forest plot: an estimate and its interval per row, first row on top; arrows to where partial pooling moves them.

    Parameters
    ----------
    ax
        Axes to draw on.
    labels
        One per row.
    estimates, intervals
        Shapes ``(rows,)`` and ``(rows, 2)``; an infinite end runs out of the picture.
    shrunken
        Partially pooled estimates, shape ``(rows,)``.
    null
        Where to draw the line of no effect; None for nowhere.

    Examples
    --------
    >>> ax = Figure().subplots()
    >>> forest(ax, ["A", "B"], [28, 8], [[-2, 58], [-12, 28]], shrunken=[11, 8])
    >>> [t.get_text() for t in ax.get_yticklabels()]
    ['A', 'B']
    """
    x, ends = sample(estimates, "estimates", least=1), np.asarray(intervals, dtype=np.float64)
    if len(labels) != len(x) or ends.shape != (len(x), 2):
        raise InvalidInput(f"{len(labels)} labels, {len(x)} estimates and intervals {ends.shape} do not match.")
    if not ((ends[:, 0] <= x) & (x <= ends[:, 1])).all():
        raise InvalidInput("every estimate must lie inside its interval (low, high).")
    rows = np.arange(len(x))  # heights, the first on top: the axis is turned below
    if null is not None:
        ax.axvline(null, color=_QUIET, linewidth=0.8, zorder=0)
    pooled = x if shrunken is None else pair(shrunken, x, ("shrunken", "estimates"), least=1)[0]
    low, high = _span(np.concatenate([x, pooled, ends[np.isfinite(ends)], [] if null is None else [null]]))
    ax.hlines(rows, np.clip(ends[:, 0], low, None), np.clip(ends[:, 1], None, high), color=color, linewidth=1.5)
    ax.plot(x, rows, "o", color=color, markersize=5)
    if shrunken is not None:
        for row, (start, stop) in enumerate(zip(x, pooled, strict=True)):  # arrows just below their rows
            arrow = {"arrowstyle": "->", "color": shrunken_color, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", xy=(stop, row + 0.25), xytext=(start, row + 0.25), arrowprops=arrow)
        ax.plot(pooled, rows + 0.25, "D", color=shrunken_color, markersize=4)
    ax.set_xlim(low, high)
    ax.set_ylim(len(x) - 0.4, -0.6)
    ax.set_yticks(rows, labels=list(labels))


def slope(
    ax: Axes,
    control: npt.ArrayLike,
    treatment: npt.ArrayLike,
    *,
    labels: tuple[str, str] = ("control", "treatment"),
    color: str = "C0",
    against: str = "C3",
) -> int:
    """Paired slope plot: a line per seed from control to treatment, those that fall in another color and dashed.

    Returns
    -------
    int
        How many seeds rose.

    Examples
    --------
    >>> slope(Figure().subplots(), [1.0, 2.0, 3.0], [2.0, 1.5, 4.0])
    2
    """
    before, after = pair(control, treatment, ("control", "treatment"), least=1)
    for start, stop in zip(before, after, strict=True):
        falls = stop < start  # shown by the dashes too, since color is never the only cue
        ax.plot([0, 1], [start, stop], "--" if falls else "-", color=against if falls else color, marker="o",
                markersize=3, linewidth=1, alpha=0.8)  # fmt: skip
    ax.plot([0, 1], [before.mean(), after.mean()], "-", color="0.1", linewidth=2.5, marker="o", zorder=5)
    ax.set_xlim(-0.25, 1.25)
    ax.set_xticks([0, 1], labels=list(labels))
    return int(np.count_nonzero(after > before))


def ecdf(
    ax: Axes, samples: Mapping[str, npt.ArrayLike], *, band: float | None = 0.95, colors: Sequence[str] | None = None
) -> None:
    r"""Empirical distribution functions, each with a band that holds the whole true function.

    The band is Massart's: :math:`\hat F \pm \sqrt{\ln(2/\alpha) / 2n}`, simultaneous and without assumptions.

    Parameters
    ----------
    ax
        Axes to draw on; lines are labeled for a legend.
    samples
        Values by name.
    band
        Its level; None for no band.
    colors
        One per sample; default: matplotlib's cycle.

    Examples
    --------
    >>> ax = Figure().subplots()
    >>> ecdf(ax, {"new": [1.0, 2.0, 4.0], "old": [0.5, 1.0, 1.5]})
    >>> [line.get_label() for line in ax.get_lines()]
    ['new', 'old']
    """
    if not samples:
        raise InvalidInput("samples is empty; at least one named sample is needed.")
    if band is not None:
        probability("band", band)
    values = {name: np.sort(sample(v, name, least=1)) for name, v in samples.items()}
    low, high = _span(np.concatenate(list(values.values())))
    for (name, x), color in zip(values.items(), _colors(colors, len(values)), strict=False):
        steps = np.concatenate([[low], x, [high]])  # the function jumps at each value and is flat to both ends
        share = np.concatenate([np.arange(len(x) + 1) / len(x), [1.0]])
        ax.plot(steps, share, drawstyle="steps-post", color=color, label=name)
        if band is not None:
            # Massart's constant: the band holds the whole function, whatever it is
            half = np.sqrt(np.log(2 / (1 - band)) / (2 * len(x)))
            ends = np.clip(share - half, 0, 1), np.clip(share + half, 0, 1)
            ax.fill_between(steps, *ends, step="post", color=color, alpha=0.15, linewidth=0)
    ax.set_xlim(low, high)
    ax.set_ylim(0, 1)


@dataclass(frozen=True)
class CriticalDifference:
    """Friedman's test and Nemenyi's critical difference.

    Attributes
    ----------
    ranks
        Mean rank of each method, 1 the best.
    p_value
        Friedman's, of "all methods are alike".
    difference
        Mean ranks further apart than this differ at the level.
    groups
        Largest sets of methods, by position, best first, that do not differ.
    """

    ranks: Floats
    p_value: float
    difference: float
    groups: tuple[tuple[int, ...], ...]


def critical_difference(
    scores: npt.ArrayLike, *, alpha: float = 0.05, higher_is_better: bool = True
) -> CriticalDifference:
    r"""Compare methods over data sets by their ranks: Friedman's test, then Nemenyi's.

    .. math:: CD = q_{\alpha, k} \sqrt{\frac{k (k + 1)}{6 N}},

    with k methods, N data sets and q the upper quantile of the studentized range of k with infinite degrees of
    freedom, divided by the square root of 2. J. Demsar, JMLR 2006, sec. 3.2.2. Every row must be one independent
    data set; seeds of a data set are averaged first.

    Parameters
    ----------
    scores
        Shape ``(data sets, methods)``, at least 2 and 3; ties take mid-ranks.
    alpha
        Level of both tests.

    Examples
    --------
    >>> result = critical_difference([[0.9, 0.8, 0.1], [0.7, 0.8, 0.2], [0.9, 0.6, 0.3], [0.8, 0.7, 0.1]])
    >>> result.ranks.tolist(), round(result.difference, 3), result.groups
    ([1.25, 1.75, 3.0], 1.657, ((0, 1), (1, 2)))
    """
    x = table(scores, "scores", "data sets, methods", rows=2, columns=3)
    probability("alpha", alpha)
    n, k = x.shape
    ranks = sps.rankdata(levels(-x if higher_is_better else x), axis=1)  # 1 the best of each row
    mean = ranks.mean(axis=0)
    tied = bool((np.ptp(ranks, axis=1) == 0).all())
    p_value = 1.0 if tied else float(sps.friedmanchisquare(*ranks.T).pvalue)
    difference = float(sps.studentized_range.isf(alpha, k, np.inf) / np.sqrt(2) * np.sqrt(k * (k + 1) / (6 * n)))
    # from each method, best first, as far as the difference reaches; kept unless inside the group before
    order = np.argsort(mean, kind="stable")
    groups: list[tuple[int, ...]] = []
    reached = 0
    for start in range(k):
        stop = int(np.searchsorted(mean[order], mean[order[start]] + difference, side="right"))
        if stop - start > 1 and stop > reached:
            groups.append(tuple(int(i) for i in order[start:stop]))
        reached = max(reached, stop)
    return CriticalDifference(mean, p_value, difference, tuple(groups))


def cd_diagram(
    ax: Axes, scores: npt.ArrayLike, names: Sequence[str], *, alpha: float = 0.05, higher_is_better: bool = True
) -> CriticalDifference:
    """Critical-difference diagram: methods on an axis of mean ranks, bars over those that do not differ.

    Parameters are those of :func:`critical_difference`; ``names`` has one per method.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> result = cd_diagram(Figure().subplots(), rng.normal(size=(20, 4)) + [0, 0, 0, 2], ["A", "B", "C", "D"])
    >>> int(result.ranks.argmin()), result.p_value < 0.001
    (3, True)
    """
    result = critical_difference(scores, alpha=alpha, higher_is_better=higher_is_better)
    k = len(result.ranks)
    if len(names) != k:
        raise InvalidInput(f"{len(names)} names were given for {k} methods.")
    # the axis of ranks lies at height 0; bars below it, and then the names, the better half on the left
    room = 0.1 + 0.5 * (k - 1)  # for the names
    ax.set_xlim(1 - room, k + room)
    half = (k + 1) // 2
    bars = 0.3 * len(result.groups)
    ax.set_ylim(-(bars + 0.7 * half + 0.5), 1.1)
    ax.axis("off")
    ax.hlines(0, 1, k, color="0.1", linewidth=1)
    for rank in range(1, k + 1):
        ax.vlines(rank, 0, 0.12, color="0.1", linewidth=1)
        ax.text(rank, 0.2, str(rank), ha="center", va="bottom")
    width = min(result.difference, k - 1)
    ax.plot([1, 1 + width], [0.8, 0.8], "-|", color="0.1")
    label = f"CD {result.difference:.2f}" + (" (wider than the axis)" if result.difference > k - 1 else "")
    ax.text(1 + width / 2, 0.85, label, ha="center", va="bottom")
    for level, group in enumerate(result.groups):  # a thick bar over those that do not differ
        ends = result.ranks[list(group)]
        ax.plot([ends.min() - 0.03, ends.max() + 0.03], [-0.2 - 0.3 * level] * 2, color="0.1", linewidth=4,
                solid_capstyle="butt")  # fmt: skip
    for place, method in enumerate(np.argsort(result.ranks, kind="stable")):  # a line from the rank to the name
        left = place < half
        depth = -(bars + 0.4 + 0.7 * (place if left else k - 1 - place))
        rank, edge = result.ranks[method], 0.9 if left else k + 0.1
        ax.plot([rank, rank, edge], [0, depth, depth], color=_QUIET, linewidth=0.8)
        text = f"{names[method]} ({rank:.2f})"
        ax.text(edge + (-0.06 if left else 0.06), depth, text, ha="right" if left else "left", va="center")
    return result


def sbc_ecdf(ax: Axes, result: SBCResult, *, colors: Sequence[str] | None = None) -> dict[str, bool]:
    """Simulation-based calibration: distribution of the ranks minus the uniform one, with its simultaneous band.

    Parameters
    ----------
    ax
        Axes to draw on; lines are labeled for a legend.
    result
        What :func:`mlcollage.stats.simulation.sbc_uniformity` returned.
    colors
        One per quantity; default: matplotlib's cycle.

    Returns
    -------
    dict
        By quantity, whether its ranks stay inside the band everywhere.

    Examples
    --------
    >>> from mlcollage.stats.simulation import sbc_uniformity
    >>> rng = np.random.default_rng(0)
    >>> ranks = {"calibrated": rng.integers(0, 100, 500), "too narrow": np.rint(99 * rng.beta(0.5, 0.5, 500))}
    >>> sbc_ecdf(Figure().subplots(), sbc_uniformity(ranks, 100))
    {'calibrated': True, 'too narrow': False}
    """
    z = result.band.z
    ax.fill_between(z, result.band.lower - z, result.band.upper - z, color="0.5", alpha=0.25, linewidth=0)
    ax.axhline(0, color=_QUIET, linewidth=0.8)
    shown = _colors(colors, len(result.names))
    for name, difference, color in zip(result.names, result.difference, shown, strict=False):
        ax.plot(z, difference, color=color, label=name, linewidth=1.2)
    ax.set_xlim(0, 1)
    ax.set_xlabel("rank / number of ranks")
    ax.set_ylabel("ECDF difference")
    return {name: bool(inside) for name, inside in zip(result.names, result.inside, strict=True)}


def coverage(
    ax: Axes,
    x: npt.ArrayLike,
    hits: Mapping[str, npt.ArrayLike],
    repeats: int,
    *,
    nominal: float = 0.95,
    colors: Sequence[str] | None = None,
) -> dict[str, Floats]:
    """Measured coverage of interval methods against a size, with Wilson's intervals of what was measured.

    Parameters
    ----------
    ax
        Axes to draw on.
    x
        Sizes (numbers of seeds), shape ``(k,)``; drawn on a logarithmic axis.
    hits
        By method, how many of the ``repeats`` intervals held the truth, shape ``(k,)``.
    repeats
        Simulated studies behind each point.
    nominal
        What was promised; drawn as a line.

    Returns
    -------
    dict
        By method, the Wilson interval of each coverage, shape ``(k, 2)``.

    Examples
    --------
    >>> ends = coverage(Figure().subplots(), [5, 10], {"percentile": [835, 911], "t": [940, 964]}, 1000)
    >>> ends["t"].round(3).tolist()
    [[0.924, 0.953], [0.951, 0.974]]
    """
    sizes = sample(x, least=1)
    probability("nominal", nominal)
    if sizes.min() <= 0:
        raise InvalidInput("sizes must be positive: they are drawn on a logarithmic axis.")
    ax.axhline(nominal, color=_QUIET, linewidth=1, linestyle="--")
    found = {}
    for (name, values), color in zip(hits.items(), _colors(colors, len(hits)), strict=False):
        count = sample(values, name, least=1)
        if len(count) != len(sizes) or count.min() < 0 or count.max() > repeats or (count != np.rint(count)).any():
            raise InvalidInput(f"hits of {name} must be {len(sizes)} whole numbers in 0..{repeats}, not shares.")
        # Wilson's intervals, (sizes, 2)
        ends = np.array([sps.binomtest(int(c), repeats).proportion_ci(0.95, "wilson") for c in count])
        ax.plot(sizes, count / repeats, "-o", color=color, markersize=4, label=name)
        ax.vlines(sizes, ends[:, 0], ends[:, 1], color=color, linewidth=1.2)
        found[name] = ends
    ax.set_xscale("log")
    ax.set_xticks(sizes, labels=[f"{s:g}" for s in sizes])
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    return found


@dataclass(frozen=True)
class Lineup:
    """A lineup that was drawn; ``position`` gives the answer away.

    Attributes
    ----------
    n
        Number of panels.
    position
        Panel of the real data, from 1.
    panels
        What was drawn in each panel, in order.
    """

    n: int
    position: int
    panels: tuple[Any, ...]

    def p_value(self, statistic: Callable[[Any], float]) -> float:
        """Exact p value of a statistic in place of a viewer: the real panel's rank from above, ties against it."""
        found = finite([float(statistic(data)) for data in self.panels], "the statistic of the panels")
        return float(np.count_nonzero(found >= found[self.position - 1]) / self.n)


def lineup(
    plot_fn: Callable[[Axes, Any], object],
    null_fn: Callable[[np.random.Generator], Any],
    n: int = 20,
    *,
    data: Any,
    figure: Figure,
    rng: Rng = 0,
) -> Lineup:
    """Hide the plot of the real data among plots of null data: who picks it out has rejected the null at 1 / n.

    A. Buja et al., "Statistical inference for exploratory data analysis and model diagnostics", Philosophical
    Transactions A 2009. Ask viewers who have not seen the data; :func:`lineup_p_value` counts several of them.

    Parameters
    ----------
    plot_fn
        Draws one data set on given axes: ``plot_fn(ax, data)``.
    null_fn
        Draws a data set under the null from a generator: a permutation of labels, a fitted model's simulation.
    n
        Panels, the real one included.
    data
        The real data.
    figure
        Empty figure to draw on.
    rng
        Generator or seed of the position and of the null data.

    Examples
    --------
    >>> crash = np.append(np.random.default_rng(1).normal(size=29), 9.0)
    >>> shown = lineup(lambda ax, x: ax.plot(np.sort(x), "."), lambda rng: rng.normal(size=30), 8,
    ...                data=crash, figure=Figure())
    >>> shown.p_value(np.max)  # the real panel has the largest maximum of 8
    0.125
    """
    integer("n", n, least=2)
    if figure.axes:
        raise InvalidInput("the figure already has axes; a lineup needs an empty one.")
    generator = np.random.default_rng(rng)
    position = int(generator.integers(n))  # drawn before the null data, so that it does not depend on them
    panels = [null_fn(generator) for _ in range(n - 1)]
    panels.insert(position, data)
    columns = int(np.ceil(np.sqrt(n)))
    grid = figure.subplots(-(-n // columns), columns, sharex=True, sharey=True, squeeze=False)
    for i, ax in enumerate(grid.ravel()):
        if i >= n:
            ax.remove()
            continue
        plot_fn(ax, panels[i])
        ax.set_title(str(i + 1), fontsize="small")
        ax.tick_params(labelbottom=False, labelleft=False, length=0)
    return Lineup(n, position + 1, tuple(panels))


def lineup_p_value(found: int, viewers: int, n: int = 20) -> float:
    r"""Chance that ``found`` or more of independent ``viewers`` pick the real panel blindly, Binomial(viewers, 1/n).

    Viewers of the same lineup share its null panels, which makes this somewhat too small for many viewers.

    Examples
    --------
    >>> lineup_p_value(1, 1), round(lineup_p_value(2, 5), 4)
    (0.05, 0.0226)
    """
    integer("found", found, least=0, most=integer("viewers", viewers, least=1)), integer("n", n, least=2)
    return round(float(sps.binom.sf(found - 1, viewers, 1 / n)), 15)
