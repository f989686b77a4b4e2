r"""Intervals for means of a few seeds: Student's t, bootstrap-t, and percentile and BCa bootstraps for contrast.

Which one to use. Measured coverage of nominal 95 % intervals of a mean (tests/stats/test_bootstrap.py repeats it):
with five normal values the percentile and BCa bootstraps cover about 84 %, Student's t and bootstrap-t about 95 %;
with five lognormal values all fall short, bootstrap-t least. So below about 20 seeds use :func:`t_interval`, or
:func:`bootstrap_t_interval` if the values are skewed, and resample the replication unit (the seed), never
evaluation episodes. A. Gelman and A. Vehtari, "What are the most important statistical ideas of the past 50 years?",
JASA 2021, idea 2; B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 12-14.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.stats._values import Floats, is_constant, sample
from mlcollage.stats.causal import Alternative

__all__ = [
    "bca_interval",
    "bootstrap_t_interval",
    "bootstrap_t_test",
    "percentile_interval",
    "resample_counts",
    "t_interval",
]

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
    centred = x - x.mean()  # the second moment below then loses no digits
    counts = resample_counts(n, n_boot, rng)
    mean = counts @ centred / n
    variance = (counts @ centred**2 / n - mean**2) / (n - 1)
    variance[variance <= 1e-12 * centred.var()] = 0.0
    return mean, variance


def _roots(a: Floats, b: Floats | None, n_boot: int, rng: np.random.Generator | int) -> Floats:
    """Studentised roots (theta* - theta) / se*; infinite, with the right sign, where se* is zero."""
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
        raise InvalidInput("all values are equal, so there is no standard error to studentise by; use sign_flip_test.")
    return a, b


def bootstrap_t_interval(
    x: npt.ArrayLike,
    level: float = 0.95,
    n_boot: int = 9999,
    rng: np.random.Generator | int = 0,
    *,
    y: npt.ArrayLike | None = None,
) -> tuple[float, float]:
    r"""Studentised bootstrap interval of a mean, or of ``mean(x) - mean(y)`` with the arms resampled separately.

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
