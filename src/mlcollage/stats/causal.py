r"""Causal contrasts between arms: paired designs, randomization tests and the t tests they are compared with.

Units are seeds (data order and initialization included), :math:`y_i(1)` and :math:`y_i(0)` their potential outcomes
under treatment and control. A study controls the randomness, so it can observe both for the same seed (common random
numbers) and the estimand :math:`\mathrm{E}[y(1) - y(0)]` is the mean of the differences. A. Gelman and A. Vehtari,
"What are the most important statistical ideas of the past 50 years?", JASA 2021, idea 1.

All tests share one form, ``test(x, ..., null=0.0, alternative="greater") -> p``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats as sps

from mlcollage._checks import choice
from mlcollage.errors import InvalidInput
from mlcollage.stats._values import (
    ROUNDING,
    Alternative,
    Floats,
    Rng,
    by_side,
    difference,
    is_constant,
    levels,
    pair,
    sample,
    table,
    tail,
)

_EXACT = 20  # 2^20 sign patterns take 8 MB; beyond, patterns are drawn


@dataclass(frozen=True)
class PairedDifference:
    """Differences within pairs of runs from the same seed, and what the pairing was worth.

    Attributes
    ----------
    differences
        Treatment minus control, one per seed, shape ``(n,)``.
    mean, sd
        Of the differences.
    correlation
        Between the arms over seeds; the larger, the more a pairing saves. NaN if an arm does not vary.
    equivalent_seeds
        How many seeds per arm an unpaired design would need for the same standard error.
        Infinite if the differences do not vary.
    """

    differences: Floats
    mean: float
    sd: float
    correlation: float
    equivalent_seeds: float

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.differences)


def paired_difference(treatment: npt.ArrayLike, control: npt.ArrayLike) -> PairedDifference:
    r"""Differences within seeds, and what the pairing was worth.

    .. math:: d_i = y_i(1) - y_i(0), \qquad
        \operatorname{Var}(d) = s_1^2 + s_0^2 - 2 \rho s_1 s_0 = 2 s^2 (1 - \rho) \text{ if } s_1 = s_0 = s.

    An unpaired design with :math:`m` seeds per arm has variance :math:`(s_1^2 + s_0^2)/m`, so :math:`n` pairs are worth
    :math:`m = n (s_1^2 + s_0^2) / \operatorname{Var}(d)`.

    Parameters
    ----------
    treatment, control
        One value per seed, in the same order, shape ``(n,)``, n >= 2.

    Raises
    ------
    InvalidInput
        If the lengths differ, a value is not finite, or there are fewer than two pairs.

    Examples
    --------
    >>> pair = paired_difference([0.91, 0.94, 0.90, 0.93], [0.89, 0.93, 0.87, 0.91])
    >>> round(pair.mean, 3), round(pair.correlation, 2), round(pair.equivalent_seeds)
    (0.02, 0.99, 60)
    """
    x, y = pair(treatment, control, ("treatment", "control"))
    d = difference(x, y)
    v, vx, vy = (
        0.0 if is_constant(part, scale) else float(part.var(ddof=1))
        for part, scale in ((d, max(float(np.abs(x).max()), float(np.abs(y).max()))), (x, None), (y, None))
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # an arm without variance has no correlation: NaN
        rho = float(np.cov(x, y)[0, 1] / np.sqrt(vx * vy))
    return PairedDifference(d, float(d.mean()), float(np.sqrt(v)), rho, float(len(d) * (vx + vy) / v) if v else np.inf)


def t_test(
    x: npt.ArrayLike, y: npt.ArrayLike | None = None, *, null: float = 0.0, alternative: Alternative = "greater"
) -> float:
    r"""Student's t test of one mean, or Welch's of the difference of two.

    .. math:: t = \frac{\bar x - \theta_0}{s / \sqrt n}, \qquad
        t = \frac{\bar x - \bar y - \theta_0}{\sqrt{s_x^2 / n + s_y^2 / m}}.

    Parameters
    ----------
    x
        Values or paired differences, shape ``(n,)``.
    y
        The control arm if the design is not paired, shape ``(m,)``.
    null
        :math:`\theta_0`, in the units of ``x``.
    alternative
        ``greater``: the p value of "the effect is not above ``null``"; ``less`` and ``two-sided`` accordingly.

    Raises
    ------
    InvalidInput
        If the variance is zero: t would be infinite and p zero, which no finite sample justifies.

    Examples
    --------
    >>> round(t_test([1.2, 0.8, 1.9, 0.4, 1.1]), 4)
    0.006
    """
    choice("alternative", alternative, ("greater", "less", "two-sided"))  # scipy's refusal does not name the argument
    a = sample(x)
    b = None if y is None else sample(y, "y")
    if is_constant(a) and (b is None or is_constant(b)):
        raise InvalidInput("all values are equal, so a t test would give p = 0; use sign_flip_test instead.")
    if b is None:
        return float(sps.ttest_1samp(a, null, alternative=alternative).pvalue)
    return float(sps.ttest_ind(a - null, b, equal_var=False, alternative=alternative).pvalue)


def _subset_sums(x: Floats) -> Floats:
    """Sums of all subsets, shape (2^n,), the empty one first."""
    sums = np.zeros(1)
    for value in x:  # the subsets of the first k values, and the same with value k + 1
        sums = np.concatenate([sums, sums + value])
    return sums


def _random_subsets(n: int, n_resamples: int, rng: Rng) -> Floats:
    """Indicators of membership, shape (n_resamples, n)."""
    return np.random.default_rng(rng).integers(0, 2, (n_resamples, n)).astype(np.float64)


def sign_flip_test(
    d: npt.ArrayLike, alternative: Alternative = "greater", *, null: float = 0.0, n_resamples: int = 9999, rng: Rng = 0
) -> float:
    r"""Exact randomization test of paired differences by flipping their signs.

    If the arms are exchangeable within a seed, each sign of :math:`d_i - \theta_0` is a fair coin, so

    .. math:: p = 2^{-n} \, \#\Big\{ s \in \{-1, 1\}^n : \sum_i s_i (d_i - \theta_0) \ge \sum_i (d_i - \theta_0) \Big\}.

    All patterns are counted up to n = 20; beyond, :math:`p = (1 + \#) / (1 + B)` over B random ones. Exact for the
    sharp null, and for any distribution of differences symmetric about ``null``. The smallest p value is
    :math:`2^{-n}`: with four seeds nothing is significant at .05.

    Parameters
    ----------
    d
        Differences, one per seed, shape ``(n,)``.
    alternative
        ``greater``, ``less`` or ``two-sided`` (twice the smaller).
    null
        :math:`\theta_0`.
    n_resamples, rng
        B and its generator or seed; used for n > 20 only.

    Examples
    --------
    >>> sign_flip_test([0.3, 0.1, 0.4, 0.2, 0.2])  # every seed improved: 1 / 2^5
    0.03125
    """
    e = difference(sample(d, "d", least=1), null)
    exact = len(e) <= _EXACT
    sums = _subset_sums(e) if exact else _random_subsets(len(e), n_resamples, rng) @ e
    # Flipping the signs of subset S keeps the total at least as large exactly if the sum over S is <= 0.
    tolerance = ROUNDING * float(np.abs(e).sum())
    observed = 0 if exact else 1  # among all patterns the data's own is counted already, among random ones it is not
    above, below = (float((observed + np.count_nonzero(s <= tolerance)) / (observed + len(s))) for s in (sums, -sums))
    return by_side(alternative, above, below)


def sign_flip_interval(
    d: npt.ArrayLike, level: float = 0.95, *, n_resamples: int = 9999, rng: Rng = 0
) -> tuple[float, float]:
    r"""Exact interval: the values of ``null`` that :func:`sign_flip_test` does not reject on either side.

    The test's p value at :math:`\theta` is :math:`2^{-n}(1 + \#\{S : \bar d_S \le \theta\})` over the non-empty subsets
    S, so the ends are order statistics of the subset means (Hartigan's typical values, JASA 1969). Random subsets
    for n > 20. Infinite if n is too small for the level (n < 6 at 95 %).

    Examples
    --------
    >>> low, high = sign_flip_interval([0.3, 0.1, 0.4, 0.2, 0.2, 0.3])
    >>> round(low, 3), round(high, 3)
    (0.1, 0.4)
    """
    x, miss = sample(d, "d", least=1), tail(level)
    if len(x) <= _EXACT:
        sums, sizes = _subset_sums(x), _subset_sums(np.ones_like(x))
    else:
        subsets = _random_subsets(len(x), n_resamples, rng)
        sums, sizes = subsets @ x, subsets.sum(axis=1)
    means = np.sort(sums[sizes > 0] / sizes[sizes > 0])  # the empty subset has none
    k = int(np.floor((1 + len(means)) * miss + 1e-9))  # the k-th mean is the first theta whose p exceeds the miss rate
    return (float(means[k - 1]), float(means[-k])) if k > 0 else (-np.inf, np.inf)


def _welch_statistic(x: Floats, y: Floats, axis: int = -1) -> Floats:
    """Welch's t of many labelings, (labelings, n) and (labelings, m); scipy passes the axis of the values."""
    spread = np.sqrt(x.var(axis=axis, ddof=1) / x.shape[axis] + y.var(axis=axis, ddof=1) / y.shape[axis])
    largest = max(float(np.abs(x).max()), float(np.abs(y).max()), np.finfo(float).tiny)
    return (x.mean(axis=axis) - y.mean(axis=axis)) / (spread + ROUNDING * largest)  # finite when an arm is constant


def permutation_test_two_sample(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    null: float = 0.0,
    alternative: Alternative = "greater",
    n_resamples: int = 9999,
    rng: Rng = 0,
) -> float:
    r"""Permutation test of two independent arms, with Welch's t as statistic.

    Labels of the pooled values :math:`(x - \theta_0, y)` are permuted; all of them if there are at most
    ``n_resamples``, random ones otherwise. Exact if the arms have one distribution under the null; the studentized
    statistic keeps the level asymptotically when only the means agree (E. Chung and J. P. Romano, Annals of
    Statistics 2013, sec. 2).

    Parameters
    ----------
    x, y
        Treatment and control, one value per seed, shapes ``(n,)`` and ``(m,)``, at least two each.
    null, alternative
        As in :func:`t_test`, about mean(x) - mean(y).

    Examples
    --------
    >>> round(permutation_test_two_sample([5.1, 4.9, 5.6, 5.3], [4.1, 4.4, 4.0, 4.8]), 4)  # 1 of 70 labelings
    0.0143
    """
    a, b = sample(x) - null, sample(y, "y")
    result = sps.permutation_test(
        (a, b),
        _welch_statistic,
        permutation_type="independent",
        vectorized=True,
        n_resamples=n_resamples,
        alternative=alternative,
        random_state=np.random.default_rng(rng),
    )
    return float(result.pvalue)


@dataclass(frozen=True)
class PageTrend:
    """Page's test, and the effect size that belongs to it.

    Attributes
    ----------
    statistic
        Page's L.
    p_value
        One-sided.
    correlations
        Spearman's correlation of value and level within each seed, shape ``(n,)``.
    """

    statistic: float
    p_value: float
    correlations: Floats


def page_trend(values: npt.ArrayLike, alternative: Literal["greater", "less"] = "greater") -> PageTrend:
    r"""Page's test that values rise (or fall) along ordered levels, seeds being blocks.

    With :math:`r_{ij}` the rank of level j within seed i, :math:`L = \sum_j j \sum_i r_{ij}`; under the null each
    seed's ranking is uniform on the permutations (E. B. Page, JASA 1963). L is linear in the mean over seeds of
    Spearman's correlation of value and level, which is the effect size returned; a seed in which all levels tie has
    correlation 0. The null distribution is exact up to 30 seeds and 8 levels (scipy decides beyond); ties, which take
    mid-ranks, make the p value conservative.

    Parameters
    ----------
    values
        Shape ``(seeds, levels)``, levels in order; at least 2 seeds and 3 levels, all finite.
    alternative
        ``greater``: rising; ``less``: falling.

    Raises
    ------
    InvalidInput
        On another shape or a value that is not finite.

    Examples
    --------
    >>> trend = page_trend([[1.0, 2.1, 2.9], [0.9, 2.2, 2.0], [1.1, 1.9, 3.2], [0.8, 2.0, 2.4]])
    >>> round(trend.p_value, 4), trend.correlations.tolist()
    (0.0069, [1.0, 0.5, 1.0, 1.0])
    """
    v = table(values, "values", "seeds, ordered levels", rows=2, columns=3)
    n, k = v.shape
    ranks = sps.rankdata(levels(v), axis=1)  # (n, k), mid-ranks where tied up to rounding
    up = choice("alternative", alternative, ("greater", "less")) == "greater"
    result = sps.page_trend_test(
        ranks if up else ranks[:, ::-1],  # falling values rise along the levels in reverse
        ranked=True,
        method="exact" if n <= 30 and k <= 8 else "auto",  # exact within a second
    )
    # Spearman's correlation per seed, (n,): of centered ranks (n, k) and centered levels (k,)
    centered, level = ranks - (k + 1) / 2, np.arange(k) - (k - 1) / 2
    norm = np.sqrt((centered**2).sum(axis=1) * (level**2).sum())
    rho = np.divide(centered @ level, norm, out=np.zeros(n), where=norm > 0)
    return PageTrend(float(result.statistic), float(result.pvalue), rho)
