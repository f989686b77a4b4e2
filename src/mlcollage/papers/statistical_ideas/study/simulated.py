"""One repetition of each simulation: data whose truth is known, and what the tools make of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats as sps
from scipy.special import expit
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures

from mlcollage.lab import Claim, Evidence, Scale, Status, judge
from mlcollage.stats import (
    AverageEffect,
    Bandit,
    ConfidenceSequence,
    Lineup,
    SuccessiveHalving,
    hajek,
    mad,
    posterior_predictive_check,
)

Array = npt.NDArray[Any]
Interval = tuple[float, float]
PROBABILITIES = np.array([0.5, 0.45, 0.4, 0.4, 0.35])  # success rates of the bandit's arms


def holds(interval: Interval, truth: float) -> bool:
    """Whether an interval holds the truth."""
    return interval[0] <= truth <= interval[1]


# --- idea 1: causal inference -----------------------------------------------------------------------------------------


def confounded(n: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    r"""Units whose treatment depends on what their outcome depends on; the average effect is 1.

    .. math:: \operatorname{logit} e = .8 x_1 - .6 x_2 + .4 x_1 x_2, \qquad y = a + 2 x_1 + x_2^2 + \epsilon.
    """
    x = rng.normal(size=(n, 3))
    e = expit(0.8 * x[:, 0] - 0.6 * x[:, 1] + 0.4 * x[:, 0] * x[:, 1])
    a = rng.random(n) < e
    return x, a, a + 2 * x[:, 0] + x[:, 1] ** 2 + rng.normal(size=n)


def effects(x: Array, a: Array, y: Array) -> dict[str, tuple[float, Interval]]:
    """Estimates and intervals of every estimator; the right models are fitted once and shared."""
    squares = partial(PolynomialFeatures, 2, include_bias=False)
    outcome = make_pipeline(squares(), LinearRegression())
    aipw = AverageEffect(outcome, make_pipeline(squares(), LogisticRegression(max_iter=1000))).fit(x, a, y)
    fitted = {
        "naive": AverageEffect(method="naive").fit(x, a, y),
        "regression": AverageEffect(method="regression").fit(x, a, y),
        "aipw": aipw,
        "aipw_wrong_propensity": AverageEffect(outcome).fit(x, a, y, known_propensity=np.full(len(a), a.mean())),
        "aipw_wrong_outcome": AverageEffect(LinearRegression()).fit(x, a, y, known_propensity=aipw.propensity_),
    }
    assert aipw.propensity_ is not None
    ipw = hajek(a, y, aipw.propensity_)
    return {"ipw": (ipw.ate, ipw.ci), **{name: (m.ate_, m.ci_) for name, m in fitted.items()}}


# --- idea 6: adaptive decisions ---------------------------------------------------------------------------------------


def regret(policy: Bandit | None, pulls: int, rng: np.random.Generator) -> Array:
    """Expected regret so far, after each pull; without a policy arms take turns."""
    lost = PROBABILITIES.max() - PROBABILITIES
    chosen = np.arange(pulls) % len(lost)
    if policy is not None:
        success = rng.random((pulls, len(lost))) < PROBABILITIES
        for t in range(pulls):
            arm = policy.ask()
            assert isinstance(arm, int)
            policy.tell(arm, float(success[t, arm]))
            chosen[t] = arm
    return np.cumsum(lost[chosen])


def race(rng: np.random.Generator) -> tuple[bool, float]:
    """Successive halving over 27 learning curves a + b r^-c with noise: found the best to a point; share spent."""
    a, b, c = rng.uniform(0.05, 0.5, 27), rng.uniform(0.3, 0.4, 27), rng.uniform(0.8, 1.2, 27)
    search = SuccessiveHalving(range(27), eta=3, min_r=1, max_r=27, maximize=False)
    while (trial := search.ask()) is not None:
        i, r = trial.index, trial.resource
        search.tell(trial, float(a[i] + b[i] * r ** -c[i] + 0.005 * rng.normal()))
    final = a + b * 27.0**-c
    return bool(final[search.best.index] <= final.min() + 0.01), search.spent / 27**2


def peeks(x: Array) -> tuple[float, float]:
    """Share of null sequences that a repeated t test, and a confidence sequence, ever call an effect."""
    n = np.arange(1, x.shape[1] + 1)
    mean, square = x.cumsum(axis=1) / n, (x**2).cumsum(axis=1)  # so far, (sequences, looks)
    late = slice(4, None)  # from the fifth seed on
    error = np.sqrt((square[:, late] - n[late] * mean[:, late] ** 2) / (n[late] - 1) / n[late])
    rejected = np.abs(mean[:, late]) / error > sps.t.ppf(0.975, n[late] - 1)
    sequence = ConfidenceSequence("t", alpha=0.05)
    missed = np.zeros(len(x), dtype=bool)
    for column in x.T:  # one more value of all sequences
        sequence.update(column)
        low, high = sequence.interval()
        missed |= (low > 0) | (high < 0)
    return float(rejected.any(axis=1).mean()), float(missed.mean())


# --- idea 8: exploratory analysis -------------------------------------------------------------------------------------


def anscombe_like(n: int, rng: np.random.Generator) -> dict[str, tuple[Array, Array]]:
    """Four data sets (x, y) with the same means, variances, slope and correlation, of which one is a noisy line.

    After F. J. Anscombe, "Graphs in statistical analysis", American Statistician 1973.
    """
    x = rng.normal(size=n)
    lever = 0.05 * rng.normal(size=n)
    lever[0] = 5.0
    shapes = {
        "line": (x, rng.normal(size=n)),
        "curve": (x, x**2 + 0.1 * rng.normal(size=n)),
        "outlier": (x, 0.1 * rng.normal(size=n) + 3.0 * (np.arange(n) == 0)),
        "lever": (lever, rng.normal(size=n)),
    }
    made = {}
    for name, (at, noise) in shapes.items():
        z = (at - at.mean()) / at.std()
        # what the line leaves of the noise, scaled so that y has variance 1 and correlation 0.8 with x
        rest = noise - noise.mean() - z * (z @ noise) / n
        made[name] = (z, 0.8 * z + 0.6 * rest / rest.std())
    return made


def flagged(x: Array, y: Array, replicates: int, rng: np.random.Generator) -> bool:
    """Whether predictive checks of a normal linear model of y on normal x flag anything, at 5 % together."""
    n = len(x)
    q, _ = np.linalg.qr(np.column_stack([np.ones(n), x]))  # basis of the lines, (n, 2)
    bend = x**2 - q @ (q.T @ x**2)
    # draws of the posterior under a flat prior, (replicates, n): sigma, the line, and new noise
    sigma = np.sqrt(np.sum((y - q @ (q.T @ y)) ** 2) / rng.chisquare(n - 2, size=(replicates, 1)))
    line = (q.T @ y + sigma * rng.normal(size=(replicates, 2))) @ q.T
    made_y = line + sigma * rng.normal(size=(replicates, n))

    def residual(v: Array) -> Array:
        rest = v - q @ (q.T @ v)
        return np.asarray(rest / rest.std())

    def bent(v: Array) -> float:
        return float(abs(residual(v) @ bend) / np.linalg.norm(bend))

    def farthest(v: Array) -> float:
        return float(np.abs(residual(v)).max())

    def lever(v: Array) -> float:
        return float(np.abs(v - v.mean()).max() / v.std())

    checks = (
        posterior_predictive_check(made_y, y, {"bent": bent, "farthest": farthest}, rng=rng),
        posterior_predictive_check(rng.normal(size=(replicates, n)), x, {"lever": lever}, rng=rng),
    )
    return any(check.flagged(0.05 / 3) for check in checks)


def stands_out(drop: float, rng: np.random.Generator) -> bool:
    """Whether the plot of 30 accuracies, one of them lower by ``drop``, has the deepest gap of twenty plots."""
    seeds = rng.normal(0.9, 0.01, 30)
    seeds[0] -= drop
    center, scale = float(np.median(seeds)), mad(seeds)
    panels = [rng.normal(center, scale, 30) for _ in range(19)]
    position = int(rng.integers(20))
    panels.insert(position, seeds)
    shown = Lineup(20, position + 1, tuple(panels))
    return shown.p_value(lambda v: float((np.median(v) - v.min()) / mad(v))) <= 0.05


# --- the judge itself -------------------------------------------------------------------------------------------------


def _skewed(n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Lognormal, the tail against the claim; mean 0, as all below."""
    return np.exp(0.5) - rng.lognormal(size=n)


def _disaster(n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A gain of 1 in nine seeds of ten, a loss of 9 in the tenth."""
    return np.where(rng.random(n) < 0.1, -9.0, 1.0) + 0.1 * rng.normal(size=n)


def _crashed(n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Each run of either arm falls to chance in one seed of ten."""
    arms = 0.9 + 0.01 * rng.normal(size=(2, n))
    arms[rng.random((2, n)) < 0.1] = 0.1
    return np.asarray(arms[0] - arms[1])


def _discrete(n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Accuracies on a test set of thirty."""
    return np.diff(rng.binomial(30, 0.95, (2, n)), axis=0)[0] / 30


def _lost(n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Normal, but what lies half a standard deviation below 0 was lost."""
    d = rng.normal(size=n)
    return np.where(d < -0.5, np.nan, d)


ODD_NULLS = {"skewed": _skewed, "disaster": _disaster, "crashed": _crashed, "discrete": _discrete, "lost": _lost}
"""Differences of mean 0 for which the judge's tests were not made, by name."""


def supported(claims: Sequence[Claim], effect: float, rho: float, n: int, rng: np.random.Generator) -> float:
    """Share of claims that the judge supports in one simulated study of paired seeds."""
    pairs = []
    for _ in claims:
        shared = np.sqrt(rho) * rng.normal(size=n)
        pairs.append([shift + shared + np.sqrt(1 - rho) * rng.normal(size=n) for shift in (effect, 0.0)])
    return _share_supported(claims, pairs)


def supported_odd(claims: Sequence[Claim], null: str, n: int, rng: np.random.Generator) -> float:
    """The same of differences from one of :data:`ODD_NULLS`."""
    pairs = []
    for _ in claims:
        control = rng.normal(size=n)
        pairs.append([control + ODD_NULLS[null](n, rng), control])
    return _share_supported(claims, pairs)


def _share_supported(claims: Sequence[Claim], pairs: Sequence[Sequence[npt.NDArray[np.float64]]]) -> float:
    rows = [
        pd.DataFrame({"arm": arm, "seed": range(len(values)), "metric": f"value{i}", "step": 0, "value": values})
        for i, arms in enumerate(pairs)
        for arm, values in zip("ab", arms, strict=True)
    ]
    evidence = Evidence("simulated", Scale.QUICK, "simulated", pd.concat(rows, ignore_index=True))
    return float(np.mean([v.status is Status.SUPPORTED for v in judge(claims, evidence).values()]))
