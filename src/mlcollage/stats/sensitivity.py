r"""How wrong would the assumptions have to be? Refutations and sensitivity bounds of a causal estimate.

A placebo treatment must show no effect, a covariate of pure noise must not move the estimate (A. Sharma and E. Kiciman,
"DoWhy", 2020, sec. 3.4); the E-value and Rosenbaum's bounds say how strong an unobserved common cause would have to be
to explain the estimate away. None of them proves a causal claim; each can break one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats as sps
from scipy.optimize import brentq
from sklearn.base import clone

from mlcollage._checks import choice, integer, probability, real
from mlcollage.errors import InvalidInput
from mlcollage.stats._values import ROUNDING, Floats, Rng, finite, levels, sample
from mlcollage.stats.causal_effects import AverageEffect

_EXACT_PAIRS = 200  # the exact distribution takes n^3 steps; beyond, it is normal to three digits
_LARGEST_GAMMA = 1e6


@dataclass(frozen=True)
class Refutation:
    """An estimate beside the same estimate on tampered data.

    Attributes
    ----------
    estimate, se
        On the data as they are.
    refuted
        Estimates on tampered data, one per repeat.
    expected
        What they should be: 0 for a placebo, ``estimate`` for an irrelevant covariate.
    """

    estimate: float
    se: float
    refuted: Floats
    expected: float

    @property
    def shift(self) -> float:
        """Mean of the refuted estimates minus what was expected, in units of the estimate's standard error."""
        return float((self.refuted.mean() - self.expected) / self.se)

    @property
    def p_value(self) -> float:
        """Share of refuted estimates at least as far from 0 as the estimate: a randomization test, for a placebo."""
        far = np.count_nonzero(np.abs(self.refuted) >= abs(self.estimate))
        return float((1 + far) / (1 + len(self.refuted)))

    @property
    def passed(self) -> bool:
        """Whether the mean lies within one standard error of what was expected, or within its own noise."""
        # a few repeats vary: three standard errors of their mean, in standard errors of the estimate
        noise = 3 * self.refuted.std(ddof=1) / np.sqrt(len(self.refuted)) / self.se
        return abs(self.shift) <= max(1.0, float(noise))


def _refute(
    effect: AverageEffect, X: npt.ArrayLike, a: npt.ArrayLike, y: npt.ArrayLike, repeats: int, tamper: str, rng: Rng
) -> Refutation:
    integer("repeats", repeats, least=2)  # one would not show how the refuted estimates vary
    base = clone(effect).fit(X, a, y)
    # A stream of its own: data drawn by the caller from default_rng(seed) must not come out again as the noise.
    rng = rng if isinstance(rng, np.random.Generator) else np.random.default_rng([rng, 20])
    x, arms = np.asarray(X, dtype=np.float64), np.asarray(a)
    placebos = tamper == "treatment"
    refuted = [
        clone(effect).fit(x, rng.permutation(arms), y).ate_
        if placebos
        else clone(effect).fit(np.column_stack([x, rng.normal(size=len(x))]), arms, y).ate_
        for _ in range(repeats)
    ]
    return Refutation(base.ate_, base.se_, np.array(refuted), 0.0 if placebos else base.ate_)


def placebo(
    effect: AverageEffect, X: npt.ArrayLike, a: npt.ArrayLike, y: npt.ArrayLike, *, repeats: int = 20, rng: Rng = 0
) -> Refutation:
    """Estimate again with the treatment permuted over units: an effect that remains is an error of the analysis.

    Parameters
    ----------
    effect
        Unfitted estimator; it is cloned.
    X, a, y
        As in :meth:`mlcollage.stats.causal_effects.AverageEffect.fit`.
    repeats
        Permutations.
    rng
        Seed or generator of the permutations.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(200, 1))
    >>> a = rng.random(200) < 0.5
    >>> y = a + x[:, 0] + rng.normal(size=200)
    >>> result = placebo(AverageEffect(method="regression"), x, a, y)
    >>> result.passed, round(result.p_value, 3)
    (True, 0.048)
    """
    return _refute(effect, X, a, y, repeats, "treatment", rng)


def random_common_cause(
    effect: AverageEffect, X: npt.ArrayLike, a: npt.ArrayLike, y: npt.ArrayLike, *, repeats: int = 20, rng: Rng = 0
) -> Refutation:
    """Estimate again with one more covariate of pure noise: an estimate that moves is over-fitted or unstable.

    Parameters are those of :func:`placebo`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(200, 1))
    >>> a = rng.random(200) < 0.5
    >>> y = a + x[:, 0] + rng.normal(size=200)
    >>> abs(random_common_cause(AverageEffect(method="regression"), x, a, y).shift) < 0.2
    True
    """
    return _refute(effect, X, a, y, repeats, "covariate", rng)


@dataclass(frozen=True)
class EValue:
    """Strength of confounding that would explain an estimate away, as a risk ratio.

    Attributes
    ----------
    point
        For the estimate.
    interval
        For the end of its interval nearest to no effect; 1 if the interval holds no effect.
    """

    point: float
    interval: float


def e_value(
    estimate: float,
    ci: tuple[float, float] | None = None,
    *,
    scale: Literal["risk_ratio", "standardized"] = "risk_ratio",
) -> EValue:
    r"""E-value: the least strength of an unobserved common cause that could explain the estimate away.

    .. math:: E = RR + \sqrt{RR (RR - 1)}, \qquad RR \approx \exp(0.91\, d) \text{ for a standardized difference } d,

    RR below 1 being inverted. A confounder explains the estimate only if it is associated with treatment *and* with
    outcome by risk ratios of at least E each, beyond the covariates. T. VanderWeele and P. Ding, Annals of Internal
    Medicine 2017.

    Parameters
    ----------
    estimate, ci
        Risk ratio, or mean difference divided by the outcome's standard deviation, and its interval.
    scale
        Which of the two.

    Returns
    -------
    EValue
        Without ``ci`` its ``interval`` is that of the estimate.

    Examples
    --------
    Breastfeeding and infant death, RR 3.9 (1.8, 8.7), the paper's example:

    >>> value = e_value(3.9, (1.8, 8.7))
    >>> round(value.point, 2), round(value.interval, 2)
    (7.26, 3.0)
    """
    choice("scale", scale, ("risk_ratio", "standardized"))
    low, high = (estimate, estimate) if ci is None else ci
    values = finite([estimate, low, high], "estimate and interval")
    if not low <= estimate <= high:
        raise InvalidInput(f"the interval ({low}, {high}) does not hold the estimate {estimate}.")
    if scale == "risk_ratio" and values.min() <= 0:
        raise InvalidInput(f"risk ratios must be positive; got {values.min()}. Is this a difference?")
    ratio, low, high = np.exp(0.91 * values) if scale == "standardized" else values

    def strength(rr: float) -> float:
        """The E-value of a risk ratio; one below 1 counts as its inverse."""
        rr = 1 / rr if rr < 1 else rr
        return float(rr + np.sqrt(rr * (rr - 1)))

    # the end of the interval that is nearer to a risk ratio of 1, which needs no confounder at all
    nearest = 1.0 if low <= 1 <= high else float(low if low > 1 else high)
    return EValue(strength(float(ratio)), strength(nearest))


def rosenbaum_p(d: npt.ArrayLike, gamma: float = 1.0, *, alternative: Literal["greater", "less"] = "greater") -> float:
    r"""Largest p value of Wilcoxon's signed-rank test if hidden bias is at most :math:`\Gamma`.

    If within a pair one unit's odds of treatment are up to :math:`\Gamma` times the other's, the chance that a
    difference is positive under the sharp null is at most :math:`\pi = \Gamma / (1 + \Gamma)`, and

    .. math:: p^+ = \Pr\Big[\sum_i q_i B_i \ge T\Big], \qquad B_i \sim \text{Bernoulli}(\pi),

    with q the ranks of :math:`|d|` (mid-ranks where tied, zeros left out) and T the observed sum. :math:`\Gamma = 1`
    is the test of a randomized study. Exact up to 200 pairs, normal beyond. P. Rosenbaum, "Observational Studies",
    2002, sec. 4.3.

    Parameters
    ----------
    d
        Treatment minus control within matched pairs, shape ``(n,)``.
    gamma
        Bound on the ratio of odds, at least 1.
    alternative
        The direction of the effect that is claimed.

    Examples
    --------
    >>> d = [0.3, 0.1, 0.4, 0.2, 0.5, 0.6, 0.7, -0.05]
    >>> round(rosenbaum_p(d), 4), round(rosenbaum_p(d, 2.0), 4)
    (0.0078, 0.0585)
    """
    real("gamma", gamma, least=1), choice("alternative", alternative, ("greater", "less"))
    x = sample(d, "d", least=1) * (1 if alternative == "greater" else -1)
    x = x[np.abs(x) > ROUNDING * np.abs(x).max()]  # zeros, also those that rounding left
    if not len(x):
        return 1.0
    pi = gamma / (1 + gamma)  # largest chance that a pair's difference is positive under the null
    doubled = np.rint(2 * sps.rankdata(levels(np.abs(x)))).astype(int)  # mid-ranks are multiples of a half
    observed = int(doubled[x > 0].sum())
    if len(x) > _EXACT_PAIRS:
        mean, variance = pi * doubled.sum(), pi * (1 - pi) * (doubled**2).sum()
        return float(sps.norm.sf((observed - mean) / np.sqrt(variance)))
    # distribution of the doubled sum, one pair after the other: each adds its rank with probability pi, or nothing
    mass = np.zeros(int(doubled.sum()) + 1)
    mass[0] = 1.0
    for q in doubled:
        moved = np.zeros_like(mass)
        moved[q:] = mass[: len(mass) - q]
        mass = (1 - pi) * mass + pi * moved
    return float(min(1.0, mass[observed:].sum()))


def rosenbaum_gamma(
    d: npt.ArrayLike, alpha: float = 0.05, *, alternative: Literal["greater", "less"] = "greater"
) -> float:
    r"""Largest hidden bias :math:`\Gamma` under which the effect stays significant; NaN if it never is.

    Examples
    --------
    >>> d = [0.3, 0.1, 0.4, 0.2, 0.5, 0.6, 0.7, -0.05]
    >>> round(rosenbaum_gamma(d), 2)
    1.87
    """
    probability("alpha", alpha)
    if rosenbaum_p(d, alternative=alternative) > alpha:
        return float("nan")

    def excess(log_gamma: float) -> float:
        return rosenbaum_p(d, float(np.exp(log_gamma)), alternative=alternative) - alpha

    return float(np.exp(brentq(excess, 0.0, np.log(_LARGEST_GAMMA), xtol=1e-9)))
