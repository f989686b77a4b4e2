r"""Bootstrap intervals: Student's t and bootstrap-t for means of a few seeds, and one front for all the bootstraps.

Which one to use. Measured coverage of nominal 95 % intervals of a mean (tests/stats/test_bootstrap.py repeats it):
with five normal values the percentile and BCa bootstraps cover about 84 %, Student's t and bootstrap-t about 95 %;
with five lognormal values all fall short, bootstrap-t least. So below about 20 seeds use :func:`t_interval`, or
:func:`bootstrap_t_interval` if the values are skewed, and resample the replication unit (the seed), never
evaluation episodes. :func:`bootstrap_ci` takes any statistic, clusters, data sets with seeds in them, and strata;
:func:`wild_bootstrap` a coefficient of a regression. A. Gelman and A. Vehtari, "What are the most important
statistical ideas of the past 50 years?", JASA 2021, idea 2; B. Efron and R. J. Tibshirani, "An Introduction to the
Bootstrap", 1993, ch. 12-14.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import stats as sps

from mlcollage._checks import choice, integer
from mlcollage.errors import InvalidInput
from mlcollage.stats._resample import CHUNK, Evaluator, Statistic, Units, blocks, codes
from mlcollage.stats._values import Alternative, Floats, Rng, by_side, finite, is_constant, sample, tail

Method = Literal["bootstrap-t", "bca", "basic", "percentile", "bayes"]

_RADEMACHER = np.array([-1.0, 1.0])
_WEBB = np.sqrt([0.5, 1.0, 1.5, 0.5, 1.0, 1.5]) * np.array([-1, -1, -1, 1, 1, 1])
_NESTED = 25  # resamples of a resample: enough for a standard error (Efron and Tibshirani, sec. 6.4)
_LEAST = 4  # with three values, one resample in nine has no variance, so the 2.5 % ends are infinite


def resample_counts(n: int, n_boot: int, rng: Rng) -> npt.NDArray[np.int64]:
    """How often each of ``n`` units enters each of ``n_boot`` resamples, shape ``(n_boot, n)``.

    ``counts @ x / n`` are the resampled means: one matrix product instead of a gather, for any statistic that is a
    function of means.

    Examples
    --------
    >>> counts = resample_counts(5, 1000, rng=0)
    >>> counts.shape, bool((counts.sum(axis=1) == 5).all())
    ((1000, 5), True)
    """
    integer("n", n, least=1), integer("n_boot", n_boot, least=1)
    return np.random.default_rng(rng).multinomial(n, np.full(n, 1 / n), size=n_boot)


def _error(a: Floats, b: Floats | None) -> tuple[float, float, float]:
    """Estimate, standard error and degrees of freedom: Student's, or with two arms those of Welch and Satterthwaite."""
    va = a.var(ddof=1) / len(a)
    if b is None:
        return float(a.mean()), float(np.sqrt(va)), float(len(a) - 1)
    vb = b.var(ddof=1) / len(b)
    parts = va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)
    df = (va + vb) ** 2 / parts if parts > 0 else len(a) + len(b) - 2.0
    return float(a.mean() - b.mean()), float(np.sqrt(va + vb)), float(df)


def t_interval(x: npt.ArrayLike, level: float = 0.95, *, y: npt.ArrayLike | None = None) -> tuple[float, float]:
    r"""Student's interval of a mean, or Welch's of ``mean(x) - mean(y)``.

    .. math:: \bar x \pm t_{n-1,\, 1 - \alpha/2} \; s / \sqrt n.

    Parameters
    ----------
    x, y
        One value per seed, shapes ``(n,)``, ``(m,)``, at least two each.
    level
        Two-sided coverage.

    Examples
    --------
    >>> low, high = t_interval([1.2, 0.8, 1.9, 0.4, 1.1])
    >>> round(low, 3), round(high, 3)
    (0.392, 1.768)
    """
    estimate, se, df = _error(sample(x), None if y is None else sample(y, "y"))
    half = float(sps.t.ppf(1 - tail(level), df)) * se
    return estimate - half, estimate + half


def _resampled_moments(x: Floats, n_boot: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Mean minus the sample's mean, and squared standard error, of each resample, (n_boot,) each."""
    n = len(x)
    centered = x - x.mean()  # the second moment below then loses no digits
    counts = resample_counts(n, n_boot, rng)  # (n_boot, n): moments of all resamples are two products with it
    mean = counts @ centered / n
    variance = (counts @ centered**2 / n - mean**2) / (n - 1)
    variance[variance <= 1e-12 * centered.var()] = 0.0  # what rounding leaves of a resample of equal values
    return mean, variance


def _roots(shift: Floats, variance: Floats) -> Floats:
    """Studentized roots (theta* - theta) / se*; infinite, with the right sign, where se* is zero, and 0 for 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        roots = shift / np.sqrt(variance)
    return np.where(np.isnan(roots), 0.0, roots)


def _ends(roots: Floats, miss: float, estimate: float, se: float) -> tuple[float, float]:
    """Interval from roots. Quantiles are roots themselves: infinite ones cannot be interpolated."""
    low, high = np.quantile(roots, [miss, 1 - miss], method="inverted_cdf")
    return float(estimate - high * se), float(estimate - low * se)


def _studentized_mean(x: npt.ArrayLike, y: npt.ArrayLike | None, n_boot: int, rng: Rng) -> tuple[float, float, Floats]:
    """Estimate, standard error and roots (n_boot,) of a mean, or of a difference of means, arms resampled apart."""
    arms = [sample(x, least=_LEAST)] if y is None else [sample(x, least=_LEAST), sample(y, "y", least=_LEAST)]
    if all(map(is_constant, arms)):
        raise InvalidInput("all values are equal, so there is no standard error to studentize by; use sign_flip_test.")
    generator = np.random.default_rng(rng)
    shift, variance = _resampled_moments(arms[0], n_boot, generator)
    if len(arms) == 2:
        shift_y, variance_y = _resampled_moments(arms[1], n_boot, generator)
        shift, variance = shift - shift_y, variance + variance_y
    estimate, se, _ = _error(arms[0], arms[1] if len(arms) == 2 else None)
    return estimate, se, _roots(shift, variance)


def bootstrap_t_interval(
    x: npt.ArrayLike, level: float = 0.95, n_boot: int = 9999, rng: Rng = 0, *, y: npt.ArrayLike | None = None
) -> tuple[float, float]:
    r"""Studentized bootstrap interval of a mean, or of ``mean(x) - mean(y)`` with the arms resampled separately.

    .. math:: t^* = \frac{\bar x^* - \bar x}{s^* / \sqrt n}, \qquad
        \big[\bar x - t^*_{1-\alpha/2}\, s/\sqrt n,\;\; \bar x - t^*_{\alpha/2}\, s/\sqrt n\big].

    Parameters
    ----------
    x, y
        One value per seed, at least four each.
    level
        Two-sided coverage.
    n_boot
        Number of resamples.
    rng
        Generator or seed; the same seed gives the same interval.

    Raises
    ------
    InvalidInput
        With fewer than four values, or values that are all equal.

    Examples
    --------
    >>> low, high = bootstrap_t_interval([1.2, 0.8, 1.9, 0.4, 1.1, 0.9, 1.4, 3.0])
    >>> bool(low < 1.3375 < high), bool(high - 1.3375 > 1.3375 - low)  # longer on the side of the long tail
    (True, True)
    """
    miss = tail(level)
    estimate, se, roots = _studentized_mean(x, y, n_boot, rng)
    return _ends(roots, miss, estimate, se)


def bootstrap_t_test(
    x: npt.ArrayLike,
    y: npt.ArrayLike | None = None,
    *,
    null: float = 0.0,
    alternative: Alternative = "greater",
    n_boot: int = 9999,
    rng: Rng = 0,
) -> float:
    r"""Test that inverts :func:`bootstrap_t_interval`: :math:`p = (1 + \#\{t^* \ge t\}) / (1 + B)`.

    Examples
    --------
    >>> bootstrap_t_test([1.2, 0.8, 1.9, 0.4, 1.1, 0.9, 1.4, 3.0]) < 0.01
    True
    """
    estimate, se, roots = _studentized_mean(x, y, n_boot, rng)
    t = (estimate - null) / se
    above, below = ((1 + np.count_nonzero(extreme)) / (1 + n_boot) for extreme in (roots >= t, roots <= t))
    return by_side(alternative, above, below)


@dataclass(frozen=True)
class BootstrapInterval:
    """Result of :func:`bootstrap_ci`.

    Attributes
    ----------
    low, high
        Ends of the interval.
    estimate
        The statistic of the data.
    se
        Standard deviation of the resampled statistic.
    method, level, units
        How it was made: the method, the two-sided level, and the number of units resampled.
    """

    low: float
    high: float
    estimate: float
    se: float
    method: Method
    level: float
    units: int


def bootstrap_ci(
    x: npt.ArrayLike,
    stat: Statistic | Literal["mean"] = "mean",
    method: Method = "bootstrap-t",
    *,
    unit: npt.ArrayLike | tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    strata: npt.ArrayLike | None = None,
    n_boot: int = 9999,
    level: float = 0.95,
    rng: Rng = 0,
) -> BootstrapInterval:
    r"""Bootstrap interval of any statistic, resampling seeds, clusters, data sets and then seeds, or within strata.

    With :math:`\hat\theta` the estimate, :math:`\theta^*_q` the q-quantile of the resampled statistic and
    :math:`\alpha` the miss rate:

    - ``percentile``: :math:`[\theta^*_{\alpha/2}, \theta^*_{1-\alpha/2}]`;
    - ``basic``: :math:`[2\hat\theta - \theta^*_{1-\alpha/2}, 2\hat\theta - \theta^*_{\alpha/2}]`;
    - ``bca``: percentiles at :math:`\Phi\big(z_0 + (z_0 + z_q) / (1 - a (z_0 + z_q))\big)`, with :math:`z_0` from the
      share of resamples below the estimate (ties count half) and a from the skewness of the jackknife;
    - ``bootstrap-t``: as :func:`bootstrap_t_interval`; the error of each resample comes from its moments if ``stat``
      is the mean, otherwise from 25 resamples of the resample;
    - ``bayes``: quantiles under weights :math:`w \sim \mathrm{Dirichlet}(1, \ldots, 1)` over the units (D. B. Rubin,
      Annals of Statistics 1981).

    B. Efron and R. J. Tibshirani, 1993, ch. 12-14; A. C. Davison and D. V. Hinkley, "Bootstrap Methods and their
    Application", 1997, sec. 3.8 and 5.3.

    Parameters
    ----------
    x
        Values, shape ``(n,)``, finite.
    stat
        ``"mean"`` (computed from counts, one matrix product), or a function of a vector of values. If it takes the
        keyword ``axis``, it is called once for many resamples. For ``bayes`` it takes the keyword ``weights``.
    method
        Below about 20 units only ``bootstrap-t`` covers nearly what it says.
    unit
        What is resampled. Default: each value is a unit (a seed). Labels, one per value: units are resampled whole,
        with all their values (the cluster bootstrap: right if units are drawn from a population and the question is
        about new ones). A pair ``(outer, inner)`` of labels: outer units (data sets) and, within each drawn one, its
        inner units (seeds) anew. That counts the variance within outer units twice, so it is wider than the cluster
        bootstrap, and safe.
    strata
        Labels, one per value: units are resampled within each stratum, whose size stays (tasks that are fixed, seeds
        within them random).
    n_boot
        Number of resamples B.
    level
        Two-sided coverage.
    rng
        Generator or seed; the same seed gives the same interval.

    Raises
    ------
    InvalidInput
        If values are not finite or all equal, labels do not fit, there are too few units, or the method cannot be used
        with the statistic.

    Warns
    -----
    UserWarning
        Below ten units the methods other than ``bootstrap-t`` cover about 85 % at nominal 95 %, below five 80 %.

    Examples
    --------
    >>> x = [1.2, 0.8, 1.9, 0.4, 1.1, 0.9, 1.4, 3.0]
    >>> ci = bootstrap_ci(x)
    >>> bool(ci.low < ci.estimate < ci.high), ci.units
    (True, 8)
    >>> short = bootstrap_ci(x, method="percentile")  # too narrow below about 20 values
    >>> short.high - short.low < 0.75 * (ci.high - ci.low)
    True

    Two data sets with four seeds each: the sample of data sets has size two, and the interval says so.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     ci = bootstrap_ci(x, np.median, "percentile", unit=[0, 0, 0, 0, 1, 1, 1, 1])
    >>> ci.units
    2
    """
    miss, values = tail(level), sample(x)
    choice("method", method, get_args(Method)), integer("n_boot", n_boot, least=1)
    if is_constant(values):
        raise InvalidInput("all values are equal, so the bootstrap distribution is a single point.")
    units = Units.of(len(values), unit, strata)
    units.check(method, _LEAST if method == "bootstrap-t" else 2)
    generator = np.random.default_rng(rng)
    evaluate = Evaluator(values, stat)
    estimate = float(evaluate(np.ones((1, len(values)), dtype=np.int64))[0])  # each value once: the data
    if method == "bootstrap-t":
        low, high, se = _studentized(evaluate, units, estimate, n_boot, miss, generator)
        return BootstrapInterval(low, high, estimate, se, method, level, units.n_units)

    def resampled(size: int) -> Floats:
        """The statistic of so many resamples, (size,)."""
        if method == "bayes":
            return evaluate.weighted(units.dirichlet(size, generator))
        if method == "bca":  # from counts, so that resamples equal to the data tie with the estimate exactly
            return evaluate(units.counts(size, generator))
        return evaluate.resampled(units, size, generator)

    theta = np.concatenate([resampled(size) for size in blocks(n_boot, len(values))])  # (n_boot,)
    levels = np.array([miss, 1 - miss])
    if method == "bca":
        levels = _bca_levels(theta, estimate, evaluate(units.jackknife()), units, levels)
    low, high = np.quantile(theta, levels)
    if method == "basic":
        low, high = 2 * estimate - high, 2 * estimate - low
    return BootstrapInterval(float(low), float(high), estimate, _sd(theta), method, level, units.n_units)


def _sd(theta: Floats) -> float:
    return float(theta.std(ddof=1)) if len(theta) > 1 else 0.0


def _bca_levels(theta: Floats, estimate: float, jack: Floats, units: Units, levels: Floats) -> Floats:
    """Quantile levels of BCa, defined also where the textbook's are 0 / 0: no skewness, all resamples on a side."""
    below = np.mean(theta < estimate) + 0.5 * np.mean(theta == estimate)
    bias = sps.norm.ppf(np.clip(below, 0.5 / len(theta), 1 - 0.5 / len(theta)))
    # acceleration: skewness of the jackknife (units,) about the mean of each stratum
    sizes = np.bincount(units.stratum)
    means = np.bincount(units.stratum, jack) / sizes
    pull = ((sizes - 1) / sizes)[units.stratum] * (means[units.stratum] - jack)
    spread = float((pull**2).sum())
    scale = np.finfo(float).eps * max(abs(estimate), float(np.abs(jack).max()))
    a = float((pull**3).sum()) / (6 * spread**1.5) if spread > len(pull) * scale**2 else 0.0
    z = bias + sps.norm.ppf(levels)
    stretch = 1 - a * z  # not positive where the acceleration is too strong: the level is then 0 or 1
    moved = np.where(stretch > 0, z / np.where(stretch > 0, stretch, 1.0), np.sign(z) * np.inf)
    return np.asarray(sps.norm.cdf(bias + moved), dtype=np.float64)


def _studentized(
    evaluate: Evaluator, units: Units, estimate: float, n_boot: int, miss: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Ends of the bootstrap-t interval, and the standard deviation of the resampled statistic."""
    parts = [_with_variance(evaluate, units, size, rng) for size in blocks(n_boot, len(units.row_unit))]
    theta, variances = (np.concatenate(part) for part in zip(*parts, strict=True))  # (n_boot,) each
    spread = _sd(theta)
    variance = spread**2
    if evaluate.is_mean:
        variance = float(_ratio_variance(np.ones((1, units.n_units)), evaluate.x, units, np.array([estimate]))[0])
    if variance <= 0:
        raise InvalidInput("the statistic does not vary over resamples, so there is no error to studentize by.")
    variances = np.where(variances <= 1e-12 * variance, 0.0, variances)  # what rounding leaves where units agree
    return *_ends(_roots(theta - estimate, variances), miss, estimate, float(np.sqrt(variance))), spread


def _with_variance(evaluate: Evaluator, units: Units, n_boot: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """The statistic of resamples, and the variance of each as estimated from that resample, (n_boot,) each."""
    draws = units.draws(n_boot, rng)
    tally = units.tally(draws)
    theta = evaluate(tally[:, units.row_unit])
    if evaluate.is_mean:
        return theta, _ratio_variance(tally, evaluate.x, units, theta)
    return theta, _nested_variance(evaluate, units, draws, rng)


def _ratio_variance(tally: npt.NDArray, x: Floats, units: Units, theta: Floats) -> Floats:
    r"""Linearized variance of a mean over units, :math:`\frac{G}{G-1} \sum_g c_g (S_g - n_g \theta)^2 / n^2`.

    Within strata the residuals are centered first, G then being the stratum's number of units. ``tally`` (resamples,
    units) holds the counts c, ``theta`` (resamples,) the means.
    """
    center = x.mean()
    sums = np.bincount(units.row_unit, x - center)  # S_g, counted from the center so that squares lose no digits
    sizes = np.bincount(units.row_unit).astype(np.float64)  # n_g
    shift = theta - center
    total = tally @ sizes
    variance = np.zeros(len(theta))
    for s in range(int(units.stratum.max()) + 1):
        mine = units.stratum == s
        g, c, u, m = int(mine.sum()), tally[:, mine], sums[mine], sizes[mine]
        # first and second moment of the residuals u - m * shift, expanded so that each is a product with the counts
        first = c @ u - shift * (c @ m)
        second = c @ u**2 - 2 * shift * (c @ (u * m)) + shift**2 * (c @ m**2)
        variance += g / (g - 1) * np.maximum(second - first**2 / g, 0.0)
    return variance / total**2


def _nested_variance(
    evaluate: Evaluator, units: Units, draws: npt.NDArray[np.int64], rng: np.random.Generator
) -> Floats:
    """Variance of the statistic over resamples of each resample; ``draws`` (resamples, units)."""
    variances = np.empty(len(draws))
    step = max(1, CHUNK // (_NESTED * len(units.row_unit)))  # resamples at once, by memory
    for start in range(0, len(draws), step):
        part = draws[start : start + step]
        again = units.draws(len(part) * _NESTED, rng)  # slots of a resample, drawn once more
        inner = np.take_along_axis(np.repeat(part, _NESTED, axis=0), again, axis=1)
        theta = evaluate(units.tally(inner)[:, units.row_unit]).reshape(len(part), _NESTED)
        variances[start : start + step] = theta.var(axis=1, ddof=1)
    return variances


@dataclass(frozen=True)
class WildBootstrap:
    """What :func:`wild_bootstrap` gives: the coefficient, its robust error, a two-sided p value and an interval."""

    estimate: float
    se: float
    p_value: float
    low: float
    high: float


def wild_bootstrap(
    design: npt.ArrayLike,
    y: npt.ArrayLike,
    column: int,
    *,
    cluster: npt.ArrayLike | None = None,
    null: float = 0.0,
    level: float = 0.95,
    n_boot: int = 1999,
    rng: Rng = 0,
) -> WildBootstrap:
    r"""Wild bootstrap of one coefficient of a least-squares fit whose errors differ in size or are correlated.

    With the null imposed, :math:`\tilde u` the residuals of the fit with :math:`\beta_k = \theta_0` and one random
    weight v per cluster,

    .. math:: y^*_i = x_i \tilde\beta + v_{g(i)} \tilde u_i, \qquad
        p = \frac{1 + \#\{|t^*| \ge |t|\}}{1 + B},

    with t from cluster-robust errors (HC1 without clusters). v is :math:`\pm 1`, or Webb's six points below twelve
    clusters. The interval holds the :math:`\theta_0` that are not rejected, found with the same weights. A. C. Cameron,
    J. B. Gelbach and D. L. Miller, Review of Economics and Statistics 2008.

    Parameters
    ----------
    design
        Regressors, intercept included, shape ``(n, p)``, of full rank.
    y
        Outcome, shape ``(n,)``.
    column
        k, the coefficient asked about.
    cluster
        Labels, one per row: rows of a cluster (a data set) may be correlated. Default: every row by itself.
    null
        :math:`\theta_0` of the p value.
    level
        Coverage of the interval.
    n_boot, rng
        B, and generator or seed.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=40)
    >>> fit = wild_bootstrap(np.column_stack([np.ones(40), x]), 2 * x + x * rng.normal(size=40), column=1)
    >>> bool(fit.low < 2 < fit.high), fit.p_value < 0.01
    (True, True)
    """
    alpha = 2 * tail(level)
    matrix, outcome, groups = _regression(design, y, column, cluster)
    n, p = matrix.shape
    g = int(groups.max()) + 1
    # Rademacher weights of few clusters have few patterns, and so few possible p values; Webb's six points have more
    values = np.random.default_rng(rng).choice(_RADEMACHER if g >= 12 else _WEBB, size=(n_boot, g))
    weights = np.vstack([np.ones((1, g)), values])[:, groups]  # (1 + n_boot, n), row 0 is the data
    others = np.linalg.qr(np.delete(matrix, column, axis=1))[0]  # basis of the other columns, (n, p - 1)
    full = np.linalg.qr(matrix)[0]  # of all columns, (n, p)
    pull = np.linalg.pinv(matrix)[column]  # the coefficient is pull @ y, (n,)
    member = np.eye(g)[groups]  # (n, g)

    # Everything is linear in y - theta x_k, so the two parts below give t at any theta without another fit
    def parts(vector: Floats) -> tuple[Floats, Floats]:
        """Of weighted null residuals: the shift of the coefficient, and the score of each cluster."""
        v = weights * (vector - others @ (others.T @ vector))  # (1 + n_boot, n)
        return v @ pull, ((v - (v @ full) @ full.T) * pull) @ member

    (shift_y, score_y), (shift_x, score_x) = parts(outcome), parts(matrix[:, column])
    small = g / (g - 1) * (n - 1) / (n - p) if cluster is not None else n / (n - p)

    def p_value(theta: float) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.abs(shift_y - theta * shift_x) / np.sqrt(((score_y - theta * score_x) ** 2).sum(axis=1))
        return float((1 + np.count_nonzero(t[1:] >= t[0] * (1 - 1e-9))) / (1 + n_boot))

    estimate = float(pull @ outcome)
    residual = outcome - full @ (full.T @ outcome)
    se = float(np.sqrt(small * (((pull * residual) @ member) ** 2).sum()))
    if se <= 1e-12 * float(np.abs(outcome).max()) * float(np.abs(pull).sum()):
        raise InvalidInput("the fit is perfect, so there are no residuals to resample.")
    low, high = (_inverted(p_value, estimate, side * se, alpha) for side in (-1, 1))
    return WildBootstrap(estimate, se, p_value(null), low, high)


def _regression(
    design: npt.ArrayLike, y: npt.ArrayLike, column: int, cluster: npt.ArrayLike | None
) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    outcome, matrix = sample(y, "y"), finite(design, "design")
    n = len(outcome)
    if matrix.ndim != 2 or len(matrix) != n:
        raise InvalidInput(f"design has shape {matrix.shape}; ({n}, p) was expected.")
    if matrix.shape[1] >= n or np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        raise InvalidInput(f"design of shape {matrix.shape} is not of full rank with rows to spare; drop a column.")
    integer("column", column, least=0, most=matrix.shape[1] - 1)
    groups = np.arange(n) if cluster is None else codes(cluster, n, "cluster")
    if groups.max() < 4:
        raise InvalidInput(f"there are {groups.max() + 1} clusters; the wild bootstrap needs at least 5.")
    return matrix, outcome, groups


def _inverted(p_value: Callable[[float], float], start: float, step: float, alpha: float) -> float:
    """Where a p value that falls from 1 at ``start`` crosses ``alpha`` in the direction of ``step``."""
    inside, outside = 0.0, 1.0  # in steps from the start; doubled until outside, then bisected
    while p_value(start + outside * step) > alpha:
        inside, outside = outside, 2 * outside
        if outside > 2**20:
            return float(np.copysign(np.inf, step))
    for _ in range(40):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if p_value(start + middle * step) > alpha else (inside, middle)
    return start + outside * step
