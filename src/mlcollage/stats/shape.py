r"""Do a few values look like those a t test was made for? Skewness, outlying values, and a t test that allows for both.

Student's t keeps its level for values that are normal, or symmetric with heavy tails. With a long tail on one side it
does not: of ten differences from a lognormal distribution of mean 0, tail down, it calls a fifth positive. From few
values a tail can be seen only if one of them lies in it; what no value shows, no test can know.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import stats as sps

from mlcollage._checks import choice, probability
from mlcollage.errors import InvalidInput
from mlcollage.stats._values import ROUNDING, Alternative, Floats, by_side, is_constant, sample

_DRAWN = 100  # values up to which the null distribution of the skewness is simulated; beyond, scipy's is accurate
_SAMPLES = 9999


def skewness(x: npt.ArrayLike) -> float:
    r"""Sample skewness, bias-adjusted for normal values; negative with a tail to the left, 0 if all values agree.

    .. math:: G = \frac{\sqrt{n (n - 1)}}{n - 2} \cdot \frac{m_3}{m_2^{3/2}}, \qquad
        m_k = \frac1n \sum_i (x_i - \bar x)^k.

    Parameters
    ----------
    x
        Values, shape ``(n,)``, at least three.

    Examples
    --------
    >>> round(skewness([1.0, 1.2, 0.9, 1.1, -3.0]), 2)
    -2.21
    """
    values = sample(x, least=3)
    if is_constant(values):
        return 0.0
    return float(sps.skew(values, bias=False))


@lru_cache(maxsize=128)
def _of_normal_values(n: int) -> Floats:
    """Absolute skewness of samples of n normal values, sorted, (_SAMPLES,)."""
    x = np.random.default_rng([n, 3]).normal(size=(_SAMPLES, n))
    return np.sort(np.abs(sps.skew(x, axis=1, bias=False)))


def skewness_p(x: npt.ArrayLike) -> float:
    """Share of samples of as many normal values that are at least as skewed, to either side.

    By 9,999 fixed simulated samples up to 100 values, by D'Agostino's approximation beyond.

    Examples
    --------
    >>> skewness_p([1.0, 1.2, 0.9, 1.1, -3.0]) < 0.01, skewness_p([1.0, 1.2, 0.9, 1.1, 0.6]) > 0.1
    (True, True)
    """
    values = sample(x, least=3)
    if is_constant(values):
        return 1.0
    if len(values) > _DRAWN:
        return float(sps.skewtest(values).pvalue)
    drawn = _of_normal_values(len(values))
    above = _SAMPLES - int(np.searchsorted(drawn, abs(skewness(values)) * (1 - ROUNDING)))
    return (1 + above) / (1 + _SAMPLES)


def outlying(x: npt.ArrayLike, level: float = 0.01) -> npt.NDArray[np.bool_]:
    r"""Which values lie too far from all the others, each compared with the mean and spread of the rest.

    .. math:: t_i = \frac{x_i - \bar x_{-i}}{s_{-i} \sqrt{1 + 1/(n - 1)}} \sim t_{n-2}, \qquad
        \text{outlying if } n \Pr[|t_{n-2}| \ge |t_i|] \le \text{level}.

    Grubbs's test, one value at a time. Where all the others agree, a value that does not is outlying.

    Parameters
    ----------
    x
        Values, shape ``(n,)``.
    level
        Probability that any of n normal values is called outlying, at most. With fewer than four values none is.

    Examples
    --------
    >>> outlying([1.0, 1.2, 0.9, 1.1, -3.0]).tolist()
    [False, False, False, False, True]
    """
    values = sample(x, least=1)
    probability("level", level)
    n = len(values)
    if n < 4 or is_constant(values):
        return np.zeros(n, dtype=np.bool_)
    centered = values - np.median(values)
    rest = (centered.sum() - centered) / (n - 1)  # mean of the others, (n,)
    squares = np.maximum((centered**2).sum() - centered**2 - (n - 1) * rest**2, 0.0)
    squares[squares <= (ROUNDING * np.abs(values).max()) ** 2 * n] = 0.0
    with np.errstate(divide="ignore"):
        t = np.abs(centered - rest) / np.sqrt(squares / (n - 2) * (1 + 1 / (n - 1)))
    return np.asarray(n * 2 * sps.t.sf(t, n - 2) <= level)


def skewed_t_test(x: npt.ArrayLike, *, null: float = 0.0, alternative: Alternative = "greater") -> float:
    r"""A t test of one mean that allows for skewness: Hall's monotone transformation of t.

    .. math:: h(t) = t + \frac{G t^2}{3 \sqrt n} + \frac{G^2 t^3}{27 n} + \frac{G}{6 \sqrt n}, \qquad
        t = \frac{\bar x - \theta_0}{s / \sqrt n},

    compared with Student's t of n - 1 degrees of freedom; G is :func:`skewness`. It removes the first term of the
    error that skewness makes, not all of it. P. Hall, JRSS B 1992, sec. 2.

    Parameters
    ----------
    x
        Values or paired differences, shape ``(n,)``, at least three.
    null, alternative
        As in :func:`mlcollage.stats.causal.t_test`.

    Raises
    ------
    InvalidInput
        If the variance is zero.

    Examples
    --------
    The one low value makes the mean less sure than a t test has it, whose p value is .015:

    >>> round(skewed_t_test([1.1, 1.3, 0.9, 1.2, 1.0, 1.1, -0.9]), 1)
    0.2
    """
    choice("alternative", alternative, ("greater", "less", "two-sided"))
    values = sample(x, least=3)
    if is_constant(values):
        raise InvalidInput("all values are equal, so a t test would give p = 0; use sign_flip_test instead.")
    n, g = len(values), skewness(values)
    root = np.sqrt(n)
    t = root * (values.mean() - null) / values.std(ddof=1)
    h = t + g * t**2 / (3 * root) + g**2 * t**3 / (27 * n) + g / (6 * root)
    return by_side(alternative, float(sps.t.sf(h, n - 1)), float(sps.t.cdf(h, n - 1)))
