r"""Summaries that a few bad values cannot move, and verdicts under every defensible choice.

With a crashed seed among twenty the mean says little; on clean normal data it is the best there is. Measured root mean
squared error at n = 20 (``tests/stats/test_robust.py`` repeats it): data from Student's t with 2 degrees of freedom:
mean .82, median .31, interquartile mean .30; 10 % contamination with standard deviation 10: .75, .30, .27.

A. Gelman and A. Vehtari, "What are the most important statistical ideas of the past 50 years?", JASA 2021, idea 7;
P. J. Huber and E. Ronchetti, "Robust Statistics", 2009, ch. 3-4.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats as sps
from scipy.optimize import brentq

from mlcollage._checks import integer, positive, probability, real
from mlcollage.errors import InvalidInput, MLCollageError
from mlcollage.stats._values import ROUNDING, Floats, Rng, difference, finite, is_constant, pair, sample, tail

_TOLERANCE = 1e-10  # of a location, in scales
_ITERATIONS = 500  # far more than reweighting needs


def trimmed_mean(x: npt.ArrayLike, cut: float = 0.1) -> float:
    """Mean of what remains after the share ``cut`` of values at *each* end is left out.

    Parameters
    ----------
    x
        Values of any shape, pooled.
    cut
        Share at each end, in [0, 0.5); floor(cut * n) values are left out.

    Examples
    --------
    >>> trimmed_mean([1.0, 2.0, 3.0, 4.0, 100.0], cut=0.2)
    3.0
    """
    return float(sps.trim_mean(finite(x), real("cut", cut, least=0, below=0.5), axis=None))


def iqm(scores: npt.ArrayLike) -> float:
    """Interquartile mean: the mean of the middle half, over all seeds and tasks at once.

    R. Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", NeurIPS 2021, sec. 4.3.

    Parameters
    ----------
    scores
        Shape ``(seeds,)`` or ``(seeds, tasks)``; tasks must share a scale (normalized scores).

    Examples
    --------
    >>> iqm([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1000.0])
    3.5
    """
    return trimmed_mean(scores, 0.25)


def mad(x: npt.ArrayLike, *, normal: bool = True) -> float:
    r"""Median absolute deviation from the median; scaled by 1.4826 to estimate the sd of normal data by default.

    Examples
    --------
    >>> mad([1.0, 2.0, 3.0, 4.0, 100.0], normal=False)
    1.0
    """
    return float(sps.median_abs_deviation(finite(x), axis=None, scale="normal" if normal else 1.0))


def _location(x: npt.ArrayLike, weight: Callable[[Floats], Floats]) -> float:
    """M-estimate of location by iteratively reweighted means from the median, scale fixed at the MAD."""
    values = finite(x).ravel()
    center, scale = float(np.median(values)), mad(values)
    if scale <= ROUNDING * np.abs(values).max():  # more than half the values agree: nothing to measure the rest by
        return center
    for _ in range(_ITERATIONS):  # the weights psi(u) / u of each value, and the mean under them
        w = weight((values - center) / scale)
        moved = float(w @ values / w.sum())
        if abs(moved - center) <= _TOLERANCE * scale:
            return moved
        center = moved
    return center


def huber(x: npt.ArrayLike, c: float = 1.345) -> float:
    r"""Huber's location: values beyond c scales count as if they lay at c.

    .. math:: \sum_i \psi\Big(\frac{x_i - \hat\mu}{s}\Big) = 0, \qquad \psi(u) = \max(-c, \min(c, u)),

    with s the (normal-consistent) MAD, held fixed. c = 1.345 keeps 95 % efficiency on normal data. If more than half
    of the values agree, s is 0 and the median is returned. P. J. Huber, Annals of Mathematical Statistics 1964.

    Examples
    --------
    >>> round(huber([1.0, 2.0, 3.0, 4.0, 100.0]), 2)
    3.0
    """
    positive("c", c)
    return _location(x, lambda u: c / np.maximum(np.abs(u), c))


def tukey_biweight(x: npt.ArrayLike, c: float = 4.685) -> float:
    r"""Tukey's biweight location: values beyond c scales do not count at all.

    .. math:: \psi(u) = u (1 - (u/c)^2)^2 \text{ for } |u| \le c, \text{ else } 0,

    solved from the median with the MAD as scale, like :func:`huber`; 95 % efficient on normal data at c = 4.685.

    Examples
    --------
    >>> round(tukey_biweight([1.0, 2.0, 3.0, 4.0, 100.0]), 2)
    2.5
    """
    real("c", c, least=1)  # below 0.67 the values next to the median may all be left out
    return _location(x, lambda u: np.clip(1 - (u / c) ** 2, 0, None) ** 2)


def median_of_means(x: npt.ArrayLike, blocks: int = 5, *, rng: Rng = 0) -> float:
    r"""Median of the means of random blocks: the mean of heavy-tailed data, with a normal-like guarantee.

    With :math:`k = \lceil 8 \ln(1/\delta) \rceil` blocks the error exceeds :math:`\sigma\sqrt{32 \ln(1/\delta)/n}`
    with probability at most :math:`\delta`, if only the variance is finite (G. Lugosi and S. Mendelson, "Mean
    estimation and regression under heavy-tailed distributions", 2019, theorem 2). Fewer than half of the blocks may
    hold outliers.

    Parameters
    ----------
    x
        Values, shape ``(n,)``.
    blocks
        Number of blocks, 1 (the mean) to n (the median); their sizes differ by at most one.
    rng
        Generator or seed of the split.

    Examples
    --------
    >>> bool(median_of_means([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1000.0]) < 10)
    True
    """
    values = sample(x, least=1)
    integer("blocks", blocks, least=1, most=len(values))
    # blocks are drawn at random, since values may be sorted
    parts = np.array_split(np.random.default_rng(rng).permutation(values), blocks)
    return float(np.median([part.mean() for part in parts]))


def hodges_lehmann(x: npt.ArrayLike, y: npt.ArrayLike | None = None) -> float:
    r"""Hodges-Lehmann estimate of location, or of the shift between two arms.

    .. math:: \operatorname{median}_{i \le j} \frac{x_i + x_j}{2}, \qquad
        \operatorname{median}_{i, j} (x_i - y_j).

    The estimates that belong to Wilcoxon's signed-rank and rank-sum tests; 95.5 % efficient on normal data, and up to
    29 % (one arm) of arbitrary values do no harm. J. L. Hodges and E. L. Lehmann, Annals of Math. Statistics 1963.

    Examples
    --------
    >>> hodges_lehmann([1.0, 2.0, 3.0, 4.0, 100.0]), hodges_lehmann([1.0, 2.0, 9.0], [0.0, 1.0])
    (3.0, 1.5)
    """
    a = sample(x, least=1)
    if y is not None:
        return float(np.median(a[:, None] - sample(y, "y", least=1)))  # all (n, m) differences
    i, j = np.triu_indices(len(a))  # all pairs, each value with itself too
    return float(np.median((a[i] + a[j]) / 2))


@dataclass(frozen=True)
class Line:
    """A straight line with an interval of its slope."""

    slope: float
    intercept: float
    slope_interval: tuple[float, float]


def theil_sen(x: npt.ArrayLike, y: npt.ArrayLike, level: float = 0.95) -> Line:
    """Theil-Sen line: the median of the slopes between all pairs of points, through the medians (scipy's).

    Parameters
    ----------
    x, y
        Shape ``(n,)``; at least two different x.
    level
        Coverage of the slope's interval (P. K. Sen, JASA 1968).

    Examples
    --------
    >>> line = theil_sen([0, 1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0, 50.0])
    >>> line.slope, line.intercept
    (1.0, 0.0)
    """
    a, b = pair(x, y)
    if is_constant(a):
        raise InvalidInput("all x are equal, so no slope can be drawn.")
    result = sps.theilslopes(b, a, alpha=probability("level", level))
    return Line(float(result.slope), float(result.intercept), (float(result.low_slope), float(result.high_slope)))


def optimality_gap(scores: npt.ArrayLike, target: float = 1.0) -> float:
    r"""How far scores fall short of a target on average: :math:`\mathrm{E}[\max(\text{target} - x, 0)]`.

    Scores beyond the target earn nothing. Agarwal et al., NeurIPS 2021, sec. 4.3.

    Examples
    --------
    >>> round(optimality_gap([0.5, 0.9, 3.0]), 2)
    0.2
    """
    return float(np.maximum(real("target", target) - finite(scores, "scores"), 0).mean())


@dataclass(frozen=True)
class Improvement:
    """P(X > Y) + P(X = Y) / 2 and its interval; 0.5 means neither arm tends to be better."""

    probability: float
    interval: tuple[float, float]


def prob_improvement(x: npt.ArrayLike, y: npt.ArrayLike, level: float = 0.95) -> Improvement:
    r"""Probability that a run of one arm beats a run of the other, averaged over tasks.

    .. math:: \hat\theta = \frac1{mn} \sum_{i,j} \big(1[x_i > y_j] + \tfrac12 1[x_i = y_j]\big) = \frac{U}{mn}.

    The interval holds the :math:`\theta` with :math:`|\hat\theta - \theta| \le z \sqrt{V(\theta)}`,

    .. math:: V(\theta) = \frac{\theta (1 - \theta)}{mn}
        \Big[1 + (N - 1)\Big(\frac{1 - \theta}{2 - \theta} + \frac{\theta}{1 + \theta}\Big)\Big],
        \quad N = \frac{m + n}{2}

    (R. Newcombe, Statistics in Medicine 2006, method 5), which unlike a bootstrap does not shrink to a point when all
    runs of one arm win. Agarwal et al., NeurIPS 2021, sec. 4.3, use the same estimate.

    Over T tasks the run is the unit: what makes a run good may make it good at all tasks, so T tasks are worth between
    one task and T. With :math:`p_i` the share of wins of run i over all runs of the other arm and all tasks,

    .. math:: V_\text{runs} = \frac{s^2(p_x)}{m} + \frac{s^2(p_y)}{n}, \qquad
        T_\text{eff} = \min\big(T, \max(1, V(\hat\theta) / V_\text{runs})\big)

    (E. DeLong, D. DeLong and D. Clarke-Pearson, Biometrics 1988), the variance :math:`V(\theta)` is divided by
    :math:`T_\text{eff}`, and z is Student's quantile with Welch's degrees of freedom.

    Parameters
    ----------
    x, y
        Scores, larger is better, shapes ``(seeds,)`` or ``(seeds, tasks)`` with the same tasks in both.

    Examples
    --------
    >>> result = prob_improvement([3.0, 4.0, 5.0, 6.0, 7.0], [1.0, 2.0, 3.0, 2.5, 1.5])
    >>> result.probability, [round(end, 2) for end in result.interval]
    (0.98, [0.62, 1.0])
    """
    a, b = (v[:, None] if v.ndim == 1 else v for v in (finite(x, "x"), finite(y, "y")))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InvalidInput(f"x {a.shape} and y {b.shape} must be (seeds,) or (seeds, tasks) with the same tasks.")
    m, n, tasks = len(a), len(b), a.shape[1]
    if min(m, n) < 2:
        raise InvalidInput(f"{m} and {n} seeds; at least 2 in each arm are needed for an interval.")
    wins = np.sign(difference(a[:, None, :], b[None, :, :]))  # (m, n, tasks): 1, 0 and -1
    share = float((1 + wins.mean()) / 2)
    z = float(sps.norm.isf(tail(level)))

    def variance(theta: float) -> float:
        """Of the estimate from one task, if theta is the truth."""
        weight = 1 + ((m + n) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return theta * (1 - theta) * weight / (m * n)

    worth = 1.0  # independent tasks
    if tasks > 1:
        of_run = [wins.mean(axis=(1, 2)) / 2, wins.mean(axis=(0, 2)) / 2]  # (m,) and (n,), shares of wins less a half
        parts = [float(p.var(ddof=1)) / len(p) for p in of_run]
        if sum(parts) > 0:  # otherwise nothing shows that runs vary less than one task says
            worth = float(np.clip(variance(share) / sum(parts), 1.0, tasks))
            df = sum(parts) ** 2 / sum(v**2 / (len(p) - 1) for v, p in zip(parts, of_run, strict=True))
            z = float(sps.t.isf(tail(level), df))

    def distance(theta: float) -> float:
        """From the estimate, in excess of what the variance at theta allows."""
        return abs(theta - share) - z * float(np.sqrt(variance(theta) / worth))

    edge = 1e-12  # a sure probability is a root itself; the other one is wanted
    low = brentq(distance, 0.0, min(share, 1 - edge)) if share > 0 else 0.0
    high = brentq(distance, max(share, edge), 1.0) if share < 1 else 1.0
    return Improvement(share, (float(low), float(high)))


@dataclass(frozen=True)
class Multiverse:
    """Verdicts under all combinations of choices.

    Attributes
    ----------
    table
        A row per combination: the choices, ``verdict``, and what else the verdict function returned.
    choices
        Names of the columns that are choices.
    """

    table: pd.DataFrame
    choices: tuple[str, ...]

    @property
    def shares(self) -> dict[str, float]:
        """Share of combinations that give each verdict, the most frequent first."""
        return {str(k): float(v) for k, v in self.table["verdict"].value_counts(normalize=True).items()}

    @property
    def agreement(self) -> float:
        """Share of the most frequent verdict: 1 if no choice matters."""
        return max(self.shares.values())

    @property
    def influence(self) -> dict[str, float]:
        """For each choice, by how much the share of the most frequent verdict differs between its options."""
        # whether each row gives the usual verdict, averaged over the rows of each option
        usual = self.table["verdict"] == next(iter(self.shares))
        return {c: float(np.ptp(usual.groupby(self.table[c].astype(str)).mean())) for c in self.choices}


def multiverse(verdict: Callable[..., Any], choices: Mapping[str, Sequence[Any]]) -> Multiverse:
    """Give one verdict under every combination of defensible choices.

    S. Steegen et al., "Increasing transparency through a multiverse analysis", Perspectives on Psychological Science
    2016.

    Parameters
    ----------
    verdict
        Called with one option of each choice by name. Returns the verdict (printed by its ``value`` if it is an enum),
        or a mapping with the key ``verdict`` and anything else worth a column. An error of this package becomes the
        verdict "not testable", with its sentence in the column ``reason``.
    choices
        Options by name, the preferred one first.

    Examples
    --------
    >>> d = [0.3, 0.1, 0.4, -0.1, 0.2, 9.0]
    >>> def verdict(summary, least):
    ...     return "supported" if summary(d) > least else "inconclusive"
    >>> result = multiverse(verdict, {"summary": [np.mean, np.median, iqm], "least": [0.1, 0.5]})
    >>> result.shares["supported"].__round__(2), result.influence["least"].__round__(2)
    (0.67, 0.67)
    """
    if not choices or not all(len(options) for options in choices.values()):
        raise InvalidInput("choices must name at least one choice, each with at least one option.")
    reserved = {"verdict", "reason"} & set(choices)
    if reserved:
        raise InvalidInput(f"a choice may not be called {reserved.pop()!r}: that is a column of the result.")
    labels = {name: _labels(options) for name, options in choices.items()}
    rows = []
    for picks in itertools.product(*(range(len(options)) for options in choices.values())):
        chosen = {name: choices[name][i] for name, i in zip(choices, picks, strict=True)}
        try:  # data that cannot be tested one way is a finding, not a crash
            found = verdict(**chosen)
        except MLCollageError as error:
            found = {"verdict": "not testable", "reason": str(error)}
        row = dict(found) if isinstance(found, Mapping) else {"verdict": found}
        if "verdict" not in row or set(row) & set(choices):
            raise InvalidInput("the verdict function must return a verdict, or a mapping with 'verdict' and new names.")
        row["verdict"] = str(getattr(row["verdict"], "value", row["verdict"]))
        rows.append({**{name: labels[name][i] for name, i in zip(choices, picks, strict=True)}, **row})
    return Multiverse(pd.DataFrame(rows), tuple(choices))


def _labels(options: Sequence[Any]) -> list[Any]:
    """Options as they stand in the table: functions by name, numbered where names repeat (lambdas)."""
    names = [getattr(option, "__name__", option) for option in options]
    return [f"{n} {i + 1}" if isinstance(n, str) and names.count(n) > 1 else n for i, n in enumerate(names)]
