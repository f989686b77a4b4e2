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
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.stats._resample import CHUNK, Evaluator, Plan, Statistic, blocks, codes
from mlcollage.stats._values import Floats, is_constant, sample
from mlcollage.stats.causal import Alternative

__all__ = [
    "BootstrapInterval",
    "Method",
    "WildBootstrap",
    "bca_interval",
    "bootstrap_ci",
    "bootstrap_t_interval",
    "bootstrap_t_test",
    "percentile_interval",
    "resample_counts",
    "t_interval",
    "wild_bootstrap",
]

Method = Literal["bootstrap-t", "bca", "basic", "percentile", "bayes"]

_METHODS = ("bootstrap-t", "bca", "basic", "percentile", "bayes")
_RADEMACHER = np.array([-1.0, 1.0])
_WEBB = np.sqrt([0.5, 1.0, 1.5, 0.5, 1.0, 1.5]) * np.array([-1, -1, -1, 1, 1, 1])
_NESTED = 25  # resamples of a resample: enough for a standard error (Efron and Tibshirani, sec. 6.4)
_LEAST = 4  # with three values, one resample in nine has no variance, so the 2.5 % ends are infinite


def resample_counts(n: int, n_boot: int, rng: np.random.Generator | int) -> npt.NDArray[np.int64]:
    """How often each of ``n`` units enters each of ``n_boot`` resamples, shape ``(n_boot, n)``.

    ``counts @ x / n`` are the resampled means: one matrix product instead of a gather, for any statistic that is a
    function of means.

    Examples
    --------
    >>> counts = resample_counts(5, 1000, rng=0)
    >>> counts.shape, bool((counts.sum(axis=1) == 5).all())
    ((1000, 5), True)
    """
    if n < 1 or n_boot < 1:
        raise InvalidInput(f"n={n} units and n_boot={n_boot} resamples must both be at least 1.")
    return np.random.default_rng(rng).multinomial(n, np.full(n, 1 / n), size=n_boot)


def _error(a: Floats, b: Floats | None) -> tuple[float, float, float]:
    """Estimate, standard error and Welch-Satterthwaite degrees of freedom."""
    va = a.var(ddof=1) / len(a)
    if b is None:
        return float(a.mean()), float(np.sqrt(va)), float(len(a) - 1)
    vb = b.var(ddof=1) / len(b)
    parts = va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)
    df = (va + vb) ** 2 / parts if parts > 0 else len(a) + len(b) - 2.0
    return float(a.mean() - b.mean()), float(np.sqrt(va + vb)), float(df)


def _check(level: float) -> float:
    if not 0 < level < 1:
        raise InvalidInput(f"level={level} must lie between 0 and 1, e.g. 0.95.")
    return (1 - level) / 2


def t_interval(x: npt.ArrayLike, level: float = 0.95, *, y: npt.ArrayLike | None = None) -> tuple[float, float]:
    r"""Student's interval of a mean, or Welch's of ``mean(x) - mean(y)``.

    .. math:: \bar x \pm t_{n-1,\, 1 - \alpha/2} \; s / \sqrt n.

    Parameters
    ----------
    x, y
        One value a seed, shapes ``(n,)``, ``(m,)``, at least two each.
    level
        Two-sided coverage.

    Examples
    --------
    >>> low, high = t_interval([1.2, 0.8, 1.9, 0.4, 1.1])
    >>> round(low, 3), round(high, 3)
    (0.392, 1.768)
    """
    estimate, se, df = _error(sample(x), None if y is None else sample(y, "y"))
    half = float(sps.t.ppf(1 - _check(level), df)) * se
    return estimate - half, estimate + half


def _resampled_moments(x: Floats, n_boot: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Mean minus the sample's mean, and squared standard error, of each resample; zero where all units agree."""
    n = len(x)
    centered = x - x.mean()  # the second moment below then loses no digits
    counts = resample_counts(n, n_boot, rng)
    mean = counts @ centered / n
    variance = (counts @ centered**2 / n - mean**2) / (n - 1)
    variance[variance <= 1e-12 * centered.var()] = 0.0
    return mean, variance


def _roots(a: Floats, b: Floats | None, n_boot: int, rng: np.random.Generator | int) -> Floats:
    """Studentized roots (theta* - theta) / se*; infinite, with the right sign, where se* is zero."""
    generator = np.random.default_rng(rng)
    shift, variance = _resampled_moments(a, n_boot, generator)
    if b is not None:
        shift_b, variance_b = _resampled_moments(b, n_boot, generator)
        shift, variance = shift - shift_b, variance + variance_b
    with np.errstate(divide="ignore", invalid="ignore"):
        roots = shift / np.sqrt(variance)
    return np.where(np.isnan(roots), 0.0, roots)


def _prepare(x: npt.ArrayLike, y: npt.ArrayLike | None) -> tuple[Floats, Floats | None]:
    a, b = sample(x, least=_LEAST), None if y is None else sample(y, "y", least=_LEAST)
    if is_constant(a) and (b is None or is_constant(b)):
        raise InvalidInput("all values are equal, so there is no standard error to studentize by; use sign_flip_test.")
    return a, b


def bootstrap_t_interval(
    x: npt.ArrayLike,
    level: float = 0.95,
    n_boot: int = 9999,
    rng: np.random.Generator | int = 0,
    *,
    y: npt.ArrayLike | None = None,
) -> tuple[float, float]:
    r"""Studentized bootstrap interval of a mean, or of ``mean(x) - mean(y)`` with the arms resampled separately.

    .. math:: t^* = \frac{\bar x^* - \bar x}{s^* / \sqrt n}, \qquad
        \big[\bar x - t^*_{1-\alpha/2}\, s/\sqrt n,\;\; \bar x - t^*_{\alpha/2}\, s/\sqrt n\big].

    Parameters
    ----------
    x, y
        One value a seed, at least four each.
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
    tail = _check(level)
    a, b = _prepare(x, y)
    estimate, se, _ = _error(a, b)
    low, high = np.quantile(_roots(a, b, n_boot, rng), [tail, 1 - tail], method="inverted_cdf")
    return float(estimate - high * se), float(estimate - low * se)


def bootstrap_t_test(
    x: npt.ArrayLike,
    y: npt.ArrayLike | None = None,
    *,
    null: float = 0.0,
    alternative: Alternative = "greater",
    n_boot: int = 9999,
    rng: np.random.Generator | int = 0,
) -> float:
    r"""Test that inverts :func:`bootstrap_t_interval`: :math:`p = (1 + \#\{t^* \ge t\}) / (1 + B)`.

    Examples
    --------
    >>> bootstrap_t_test([1.2, 0.8, 1.9, 0.4, 1.1, 0.9, 1.4, 3.0]) < 0.01
    True
    """
    a, b = _prepare(x, y)
    estimate, se, _ = _error(a, b)
    t, roots = (estimate - null) / se, _roots(a, b, n_boot, rng)
    above = float((1 + np.count_nonzero(roots >= t)) / (1 + n_boot))
    below = float((1 + np.count_nonzero(roots <= t)) / (1 + n_boot))
    return {"greater": above, "less": below}.get(alternative, min(1.0, 2 * min(above, below)))


def _scipy_interval(
    x: npt.ArrayLike, level: float, n_boot: int, rng: np.random.Generator | int, method: str
) -> tuple[float, float]:
    _check(level)
    a = sample(x)
    if is_constant(a):
        raise InvalidInput("all values are equal, so the bootstrap distribution is a single point.")
    generator = np.random.default_rng(rng)
    ends = sps.bootstrap(
        (a,), np.mean, confidence_level=level, n_resamples=n_boot, method=method, random_state=generator
    ).confidence_interval
    return float(ends.low), float(ends.high)


def percentile_interval(
    x: npt.ArrayLike, level: float = 0.95, n_boot: int = 9999, rng: np.random.Generator | int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, for contrast: too narrow below about 20 values.

    Examples
    --------
    >>> low, high = percentile_interval([1.2, 0.8, 1.9, 0.4, 1.1])
    >>> t_low, t_high = t_interval([1.2, 0.8, 1.9, 0.4, 1.1])
    >>> high - low < 0.75 * (t_high - t_low)
    True
    """
    return _scipy_interval(x, level, n_boot, rng, "percentile")


def bca_interval(
    x: npt.ArrayLike, level: float = 0.95, n_boot: int = 9999, rng: np.random.Generator | int = 0
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of a mean, for contrast: as narrow as the percentile one.

    Examples
    --------
    >>> low, high = bca_interval([1.2, 0.8, 1.9, 0.4, 1.1])
    >>> low < 1.08 < high
    True
    """
    return _scipy_interval(x, level, n_boot, rng, "BCa")


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
    rng: np.random.Generator | int = 0,
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
        What is resampled. Default: each value is a unit (a seed). Labels, one a value: units are resampled whole, with
        all their values (the cluster bootstrap: right if units are drawn from a population and the question is about
        new ones). A pair ``(outer, inner)`` of labels: outer units (data sets) and, within each drawn one, its inner
        units (seeds) anew. That counts the variance within outer units twice, so it is wider than the cluster
        bootstrap, and safe.
    strata
        Labels, one a value: units are resampled within each stratum, whose size stays (tasks that are fixed, seeds
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
        Below five units the methods other than ``bootstrap-t`` cover about 80 % at nominal 95 %.

    Examples
    --------
    >>> x = [1.2, 0.8, 1.9, 0.4, 1.1, 0.9, 1.4, 3.0]
    >>> ci = bootstrap_ci(x)
    >>> bool(ci.low < ci.estimate < ci.high), ci.units
    (True, 8)

    Two data sets with four seeds each: the sample of data sets has size two, and the interval says so.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     ci = bootstrap_ci(x, np.median, "percentile", unit=[0, 0, 0, 0, 1, 1, 1, 1])
    >>> ci.units
    2
    """
    tail = _check(level)
    values = sample(x)
    if method not in _METHODS:
        raise InvalidInput(f"method {method!r} is unknown; use one of {', '.join(_METHODS)}.")
    if n_boot < 1:
        raise InvalidInput(f"n_boot={n_boot} resamples must be at least 1.")
    if is_constant(values):
        raise InvalidInput("all values are equal, so the bootstrap distribution is a single point.")
    plan = Plan.of(len(values), unit, strata)
    plan.check(method, _LEAST if method == "bootstrap-t" else 2)
    generator = np.random.default_rng(rng)
    evaluate = Evaluator(values, stat)
    estimate = float(evaluate(np.ones((1, len(values)), dtype=np.int64))[0])
    if method == "bootstrap-t":
        low, high, se = _studentized(evaluate, plan, estimate, n_boot, tail, generator)
    else:
        theta = np.concatenate(
            [
                evaluate.weighted(plan.dirichlet(b, generator))
                if method == "bayes"
                else evaluate(plan.counts(b, generator))
                if method == "bca"
                else evaluate.resampled(plan, b, generator)
                for b in blocks(n_boot, len(values))
            ]
        )
        se = float(theta.std(ddof=1)) if n_boot > 1 else 0.0
        ends = _bca_levels(theta, estimate, evaluate(plan.jackknife()), plan, tail) if method == "bca" else None
        low, high = np.quantile(theta, [tail, 1 - tail] if ends is None else ends)
        if method == "basic":
            low, high = 2 * estimate - high, 2 * estimate - low
    return BootstrapInterval(float(low), float(high), estimate, se, method, level, plan.n_units)


def _bca_levels(theta: Floats, estimate: float, jack: Floats, plan: Plan, tail: float) -> Floats:
    """Quantile levels of BCa, defined also where the textbook's are 0 / 0: no skewness, all resamples on a side."""
    below = np.mean(theta < estimate) + 0.5 * np.mean(theta == estimate)
    share = np.clip(below, 0.5 / len(theta), 1 - 0.5 / len(theta))
    sizes = np.bincount(plan.stratum)
    means = np.bincount(plan.stratum, jack) / sizes
    pull = ((sizes - 1) / sizes)[plan.stratum] * (means[plan.stratum] - jack)
    spread = float((pull**2).sum())
    scale = np.finfo(float).eps * max(abs(estimate), float(np.abs(jack).max()))
    a = float((pull**3).sum()) / (6 * spread**1.5) if spread > len(pull) * scale**2 else 0.0
    z = sps.norm.ppf(share) + sps.norm.ppf([tail, 1 - tail])
    stretch = 1 - a * z
    moved = np.where(stretch > 0, z / np.where(stretch > 0, stretch, 1.0), np.sign(z) * np.inf)
    return np.asarray(sps.norm.cdf(sps.norm.ppf(share) + moved), dtype=np.float64)


def _studentized(
    evaluate: Evaluator, plan: Plan, estimate: float, n_boot: int, tail: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    parts = [_with_variance(evaluate, plan, b, rng) for b in blocks(n_boot, len(plan.row_unit))]
    theta, variances = (np.concatenate(part) for part in zip(*parts, strict=True))
    spread = float(theta.std(ddof=1)) if n_boot > 1 else 0.0
    variance = spread**2
    if evaluate.is_mean:
        variance = float(_ratio_variance(np.ones((1, plan.n_units)), evaluate.x, plan, np.array([estimate]))[0])
    if variance <= 0:
        raise InvalidInput("the statistic does not vary over resamples, so there is no error to studentize by.")
    variances = np.where(variances <= 1e-12 * variance, 0.0, variances)
    with np.errstate(divide="ignore", invalid="ignore"):
        roots = (theta - estimate) / np.sqrt(variances)
    low, high = np.quantile(np.where(np.isnan(roots), 0.0, roots), [tail, 1 - tail], method="inverted_cdf")
    return estimate - float(high) * float(np.sqrt(variance)), estimate - float(low) * float(np.sqrt(variance)), spread


def _with_variance(evaluate: Evaluator, plan: Plan, n_boot: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """The statistic of resamples, and the variance of each as estimated from that resample."""
    draws = plan.draws(n_boot, rng)
    tally = plan.tally(draws)
    theta = evaluate(tally[:, plan.row_unit])
    if evaluate.is_mean:
        return theta, _ratio_variance(tally, evaluate.x, plan, theta)
    return theta, _nested_variance(evaluate, plan, draws, rng)


def _ratio_variance(tally: npt.NDArray, x: Floats, plan: Plan, theta: Floats) -> Floats:
    r"""Linearized variance of a mean over units, :math:`\frac{G}{G-1} \sum_g c_g (S_g - n_g \theta)^2 / n^2`.

    Within strata the residuals are centered first, G then being the stratum's number of units.
    """
    center = x.mean()
    sums = np.bincount(plan.row_unit, x - center)
    sizes = np.bincount(plan.row_unit).astype(np.float64)
    shift = theta - center
    total = tally @ sizes
    variance = np.zeros(len(theta))
    for s in range(int(plan.stratum.max()) + 1):
        mine = plan.stratum == s
        g, c, u, m = int(mine.sum()), tally[:, mine], sums[mine], sizes[mine]
        first = c @ u - shift * (c @ m)
        second = c @ u**2 - 2 * shift * (c @ (u * m)) + shift**2 * (c @ m**2)
        variance += g / (g - 1) * np.maximum(second - first**2 / g, 0.0)
    return variance / total**2


def _nested_variance(evaluate: Evaluator, plan: Plan, draws: npt.NDArray[np.int64], rng: np.random.Generator) -> Floats:
    """Variance of the statistic over resamples of each resample."""
    variances = np.empty(len(draws))
    step = max(1, CHUNK // (_NESTED * len(plan.row_unit)))
    for start in range(0, len(draws), step):
        part = draws[start : start + step]
        again = plan.draws(len(part) * _NESTED, rng)
        inner = np.take_along_axis(np.repeat(part, _NESTED, axis=0), again, axis=1)
        theta = evaluate(plan.tally(inner)[:, plan.row_unit]).reshape(len(part), _NESTED)
        variances[start : start + step] = theta.var(axis=1, ddof=1)
    return variances


@dataclass(frozen=True)
class WildBootstrap:
    """Result of :func:`wild_bootstrap`: the coefficient, its robust error, a two-sided p value and an interval."""

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
    rng: np.random.Generator | int = 0,
) -> WildBootstrap:
    r"""Wild bootstrap of one coefficient of a least-squares fit whose errors differ in size or are correlated.

    With the null imposed, :math:`\tilde u` the residuals of the fit with :math:`\beta_k = \theta_0` and one random
    weight v a cluster,

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
        Labels, one a row: rows of a cluster (a data set) may be correlated. Default: every row by itself.
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
    alpha = 2 * _check(level)
    matrix, outcome, groups = _regression(design, y, column, cluster)
    n, p = matrix.shape
    g = int(groups.max()) + 1
    values = np.random.default_rng(rng).choice(_RADEMACHER if g >= 12 else _WEBB, size=(n_boot, g))
    weights = np.vstack([np.ones((1, g)), values])[:, groups]  # row 0 is the data
    others = np.linalg.qr(np.delete(matrix, column, axis=1))[0]
    full = np.linalg.qr(matrix)[0]
    pull = np.linalg.pinv(matrix)[column]
    member = np.eye(g)[groups]

    def parts(vector: Floats) -> tuple[Floats, Floats]:
        """Of weighted null residuals: the shift of the coefficient, and the score of each cluster."""
        v = weights * (vector - others @ (others.T @ vector))
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
    outcome, matrix = sample(y, "y"), np.asarray(design, dtype=np.float64)
    n = len(outcome)
    if matrix.ndim != 2 or len(matrix) != n or not np.isfinite(matrix).all():
        raise InvalidInput(f"design has shape {matrix.shape}; finite numbers of shape ({n}, p) were expected.")
    if matrix.shape[1] >= n or np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        raise InvalidInput(f"design of shape {matrix.shape} is not of full rank with rows to spare; drop a column.")
    if not 0 <= column < matrix.shape[1]:
        raise InvalidInput(f"column={column} does not exist in a design with {matrix.shape[1]} columns.")
    groups = np.arange(n) if cluster is None else codes(cluster, n, "cluster")
    if groups.max() < 4:
        raise InvalidInput(f"there are {groups.max() + 1} clusters; the wild bootstrap needs at least 5.")
    return matrix, outcome, groups


def _inverted(p_value: Callable[[float], float], start: float, step: float, alpha: float) -> float:
    """Where a p value that falls from 1 at ``start`` crosses ``alpha`` in the direction of ``step``."""
    inside, outside = 0.0, 1.0
    while p_value(start + outside * step) > alpha:
        inside, outside = outside, 2 * outside
        if outside > 2**20:
            return float(np.copysign(np.inf, step))
    for _ in range(40):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if p_value(start + middle * step) > alpha else (inside, middle)
    return start + outside * step
