r"""Decisions under a budget of seeds: power, the seeds a claim needs, equivalence, and many claims at once.

A. Gelman and A. Vehtari, "What are the most important statistical ideas of the past 50 years?", JASA 2021, idea 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import stats as sps

from mlcollage._checks import choice, integer, positive, probability, real
from mlcollage.errors import InvalidInput
from mlcollage.stats._values import Floats
from mlcollage.stats.causal import t_test

Design = Literal["paired", "one_sample", "unpaired"]
Goal = Literal["difference", "equivalence"]
_MOST = 10**9  # seeds beyond which a design is hopeless


def _check_design(effect: float, sd: float, rho: float, alpha: float, design: str, goal: str) -> None:
    positive("the size of effect", abs(effect)), positive("sd", sd), probability("alpha", alpha)
    choice("design", design, get_args(Design)), choice("goal", goal, get_args(Goal))
    real("rho", rho, least=-1, below=1)  # at 1 the paired differences do not vary
    if design != "paired" and rho != 0:
        raise InvalidInput(f"rho={rho} belongs to a paired design; design is {design!r}.")


def power(
    effect: float,
    sd: float,
    n: int,
    rho: float = 0.0,
    *,
    alpha: float = 0.05,
    design: Design = "paired",
    goal: Goal = "difference",
) -> float:
    r"""Probability that a one-sided t test at level ``alpha`` detects ``effect`` with ``n`` seeds.

    .. math:: \Pr\big[T'_{\nu}(\delta) > t_{\nu,\,1-\alpha}\big], \qquad \delta = \frac{|\theta|}{\sigma_d} \sqrt n,

    with :math:`T'` the noncentral t. ``paired``: :math:`\sigma_d = \sigma \sqrt{2 (1 - \rho)}`, :math:`\nu = n - 1`.
    ``unpaired``: :math:`\sigma_d = \sigma \sqrt 2`, n seeds in each arm, :math:`\nu = 2n - 2`. ``one_sample``:
    :math:`\sigma_d = \sigma` is the standard deviation of the tested values (or of observed differences) itself.
    For ``goal="equivalence"`` ``effect`` is the margin and the true effect zero; both one-sided tests must reject,
    which happens with probability at least :math:`2 \Pr[\cdot] - 1`, the bound returned.

    Parameters
    ----------
    effect
        Smallest effect that matters, in metric units; its sign is ignored.
    sd
        Standard deviation over seeds of one arm (of the tested values if ``one_sample``).
    n
        Seeds (in each arm), at least 2.
    rho
        Correlation between paired arms.

    Examples
    --------
    >>> round(power(0.01, 0.02, 10), 2), round(power(0.01, 0.02, 10, rho=0.9), 2)
    (0.27, 0.95)
    """
    _check_design(effect, sd, rho, alpha, design, goal)
    integer("n", n, least=2)
    # degrees of freedom, noncentrality and critical value of the t test
    df = 2 * n - 2 if design == "unpaired" else n - 1
    delta = abs(effect) / _spread(sd, rho, design) * np.sqrt(n)
    critical = float(sps.t.isf(alpha, df))
    if delta < 30 or critical <= 0:
        one_sided = float(sps.nct.sf(critical, df, delta))
    else:  # the noncentral t underflows here; only its denominator still varies
        one_sided = float(sps.chi2.cdf(df * (delta / critical) ** 2, df))
    return one_sided if goal == "difference" else max(0.0, 2 * one_sided - 1)


def required_seeds(
    effect: float,
    sd: float,
    rho: float = 0.0,
    alpha: float = 0.05,
    power: float = 0.8,
    *,
    design: Design = "paired",
    goal: Goal = "difference",
) -> int:
    """Smallest number of seeds (in each arm) whose :func:`power` is at least ``power``.

    Parameters
    ----------
    effect, sd, rho, alpha, design, goal
        As in :func:`power`.
    power
        Wanted probability of detecting ``effect``.

    Raises
    ------
    InvalidInput
        If the effect is zero, the standard deviation is not positive, or more than 10^9 seeds would be needed.

    Examples
    --------
    Pairing with correlation 0.9 needs a tenth of the variance:

    >>> required_seeds(0.01, 0.02), required_seeds(0.01, 0.02, rho=0.9)
    (51, 7)
    """
    probability("power", power)
    _check_design(effect, sd, rho, alpha, design, goal)

    # The normal approximation needs fewer seeds than the t test, by a few: walk up from it.
    wanted = power if goal == "difference" else (1 + power) / 2
    z = sps.norm.isf(alpha) + sps.norm.ppf(wanted)
    approximate = float(max(z, 0) * _spread(sd, rho, design) / effect) ** 2
    if approximate > _MOST:
        raise InvalidInput(f"an effect of {effect} with sd {sd} would need more than {_MOST:.0e} seeds.")
    n = max(2, int(approximate))
    while _power(effect, sd, n, rho, alpha=alpha, design=design, goal=goal) < power:
        n += 1
    return n


def _spread(sd: float, rho: float, design: Design) -> float:
    """Standard deviation of what is tested."""
    return sd * float(np.sqrt({"paired": 2 * (1 - rho), "one_sample": 1, "unpaired": 2}[design]))


_power = power  # the argument of required_seeds has the field's name for it too


def tost(
    x: npt.ArrayLike, y: npt.ArrayLike | None = None, *, low: float, high: float, test: Callable[..., float] = t_test
) -> float:
    r"""Two one-sided tests of equivalence: p value of "the effect lies outside ``(low, high)``".

    .. math:: p = \max\{ p(\theta \le \text{low}),\; p(\theta \ge \text{high}) \}.

    At level .05 it rejects exactly if the 90 % interval lies inside the bounds. A large p value of a difference test
    shows nothing of the kind. D. J. Schuirmann, J. Pharmacokinetics and Biopharmaceutics 1987.

    Parameters
    ----------
    x
        Values or paired differences.
    y
        The control arm if the design is not paired.
    low, high
        Bounds between which effects do not matter, in metric units.
    test
        One-sided test with the arguments ``null`` and ``alternative``.

    Examples
    --------
    >>> d = [0.001, -0.002, 0.000, 0.002, -0.001, 0.001]
    >>> tost(d, low=-0.005, high=0.005) < 0.001
    True
    """
    if not low < high:
        raise InvalidInput(f"equivalence bounds must satisfy low < high; they are {low} and {high}.")
    arms = (x,) if y is None else (x, y)
    return max(test(*arms, null=low, alternative="greater"), test(*arms, null=high, alternative="less"))


def holm(p_values: Sequence[float] | Floats) -> Floats:
    r"""Holm's adjusted p values: rejecting those <= alpha keeps the chance of any false rejection at alpha.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min\{1, (m - j + 1) p_{(j)}\}.

    Needs no independence. S. Holm, Scandinavian Journal of Statistics 1979.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise InvalidInput(f"p values must lie in [0, 1]; got {p.tolist()}.")
    # the i-th smallest of m is multiplied by m - i + 1; the maximum so far keeps the order of the p values
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate((p.size - np.arange(p.size)) * p[order]))
    return adjusted
