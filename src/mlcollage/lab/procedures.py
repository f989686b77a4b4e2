"""The tests that the judge chooses from, each with the interval that goes with it.

Every one is a function of :mod:`mlcollage.stats`; what is added here is only which belongs to which design, and which
anytime-valid test stands in where seeds were added after a look at the results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mlcollage.stats._values import Floats, is_constant
from mlcollage.stats.bootstrap import bootstrap_t_interval, bootstrap_t_test, t_interval
from mlcollage.stats.causal import page_trend, permutation_test_two_sample, sign_flip_interval, sign_flip_test, t_test
from mlcollage.stats.sequential import (
    ConfidenceSequence,
    sequential_bounded_test,
    sequential_sign_interval,
    sequential_sign_test,
    sequential_t_interval,
    sequential_t_test,
)
from mlcollage.stats.shape import outlying, skewed_t_test, skewness, skewness_p

LEVEL = 0.95  # of every interval that is printed, whatever alpha a claim has
ANYTIME = ("t", "sign_flip", "permutation", "trend")
"""Tests with an anytime-valid version."""

Samples = tuple[Floats, ...]
"""One array (values, differences) or two (unpaired treatment and control)."""


@dataclass(frozen=True)
class Procedure:
    """A test and the interval that goes with it; both take one sample or two."""

    name: str
    p: Callable[..., float]
    interval: Callable[[Samples], tuple[float, float]]


def _of_arms(interval: Callable[..., tuple[float, float]]) -> Callable[[Samples], tuple[float, float]]:
    """The interval of one sample's mean, or of the difference of two samples' means."""
    return lambda samples: interval(samples[0], LEVEL, y=samples[1] if len(samples) == 2 else None)


_t_interval = _of_arms(t_interval)


def _flip_interval(samples: Samples) -> tuple[float, float]:
    return sign_flip_interval(samples[0], LEVEL)


def _in_order(samples: Samples) -> Floats:
    """One series of values: unpaired arms are paired in the order of their seeds."""
    if len(samples) == 1:
        return samples[0]
    # Unpaired arms are compared in the order in which their seeds were run; what is left over must wait.
    n = min(len(s) for s in samples)
    return samples[0][:n] - samples[1][:n]


def _sequence_of_signs(samples: Samples) -> tuple[float, float]:
    return sequential_sign_interval(_in_order(samples), LEVEL)


_SIGN_FLIP = Procedure("exact sign flips", sign_flip_test, _flip_interval)
_PERMUTATION = Procedure("permutation of arms", permutation_test_two_sample, _t_interval)


def mean_procedure(test: str, columns: int, unpaired: bool, anytime: bool) -> Procedure:
    """Test and interval of a mean or of a difference of means."""
    kind = "two-arm " if unpaired else "paired " if columns == 2 else ""
    if anytime and test == "t":  # every other test has one sequential version: signs
        return Procedure(f"anytime-valid {kind}t", sequential_t_test, _of_arms(sequential_t_interval))
    if anytime:
        return Procedure(f"anytime-valid {kind}signs", sequential_sign_test, _sequence_of_signs)
    return {
        "t": Procedure("Welch t" if unpaired else f"{kind}t", t_test, _t_interval),
        "bootstrap_t": Procedure(f"{kind}bootstrap-t", bootstrap_t_test, _of_arms(bootstrap_t_interval)),
        "sign_flip": _SIGN_FLIP,
        "permutation": _PERMUTATION,
    }[test]


def constant_procedure(columns: int, unpaired: bool, anytime: bool) -> Procedure:
    """For seeds that all agree, where a t would be infinite."""
    if anytime:
        return mean_procedure("sign_flip", columns, unpaired, anytime)
    return _PERMUTATION if unpaired else _SIGN_FLIP


def shape_of(samples: tuple[pd.Series, ...]) -> tuple[float | None, list[list[int]]]:
    """What a t test would not expect: the skewness, if it is strong, and the seeds of outlying values.

    Strong is what fewer than one in twenty samples of normal values show. Of two arms, the more skewed counts.
    """
    # Two values always have skewness 0.
    skewed = [skewness(s) for s in samples if len(s) > 2 and skewness_p(s) <= 0.05]
    far = [s.index[outlying(s)].tolist() for s in samples]
    return max(skewed, key=abs, default=None), far


def stricter_tests(
    samples: tuple[pd.Series, ...], skewed: bool, far: list[list[int]]
) -> list[tuple[str, Samples, Callable[..., float]]]:
    """Tests that must agree where seeds are skewed or outlying: name, values, test."""
    tests: list[tuple[str, Samples, Callable[..., float]]] = []
    values = tuple(s.to_numpy() for s in samples)
    if skewed and len(samples) == 1:
        # One sample has a correction of its own; the difference of two skewed arms takes the bootstrap, from four seeds
        # on.
        tests.append(("a t test that allows for skewness", values, skewed_t_test))
    elif skewed and min(map(len, samples)) >= 4:
        tests.append(("bootstrap-t, which allows for skewness", values, bootstrap_t_test))
    if any(far):
        rest = tuple(s.drop(seeds).to_numpy() for s, seeds in zip(samples, far, strict=True))
        tests.append(("a t test without the outlying seeds", rest, _t_of_the_rest))
    return tests


def _t_of_the_rest(*samples: Floats, null: float, alternative: str) -> float:
    """A t test; of values that all agree, whether they lie on the side of the alternative."""
    # What is left may agree exactly, which no t test takes: p is then 0 or 1.
    if all(map(is_constant, samples)):
        effect = float(samples[0].mean() - (samples[1].mean() if len(samples) == 2 else 0.0))
        return float(not (effect > null if alternative == "greater" else effect < null))
    return t_test(*samples, null=null, alternative="greater" if alternative == "greater" else "less")


def against_the_alternative(
    p: Callable[..., float], samples: tuple[pd.Series, ...], lost: tuple[list[int], ...]
) -> Callable[..., float]:
    """The same test with lost seeds counted against its alternative, whatever that is.

    One sample: as far on the other side of the null as the farthest value seen lies from it. Two arms: the least
    favorable value seen in either. They take the places of their seeds, which matters to tests of a sequence.
    """

    def counted(*_: Floats, null: float, alternative: str) -> float:
        up = alternative == "greater"
        if len(samples) == 1:
            far = float((samples[0] - null).abs().max())
            worst = [null - far if up else null + far]
        else:
            x, y = samples[0] - null, samples[1]
            low, high = min(x.min(), y.min()), max(x.max(), y.max())
            # For treatment and control: each the least favorable value that either arm has shown.
            worst = [null + low, high] if up else [null + high, low]
        filled = (
            pd.concat([s, pd.Series(value, seeds, dtype=float)]).sort_index(kind="stable").to_numpy()
            for s, value, seeds in zip(samples, worst, lost, strict=True)
        )
        return p(*filled, null=null, alternative=alternative)

    return counted


def trend_procedure(levels: Floats, rising: bool, anytime: bool) -> tuple[Floats, Procedure, float, Procedure]:
    """Rank correlations of the seeds; test, its p value of support, and what tests against the margin.

    Values along the levels, shape (seeds, levels). The anytime-valid version bets on the correlations, which lie in
    [-1, 1] and have mean 0 where all orders are equally likely.
    """
    page = page_trend(levels, "greater" if rising else "less")
    rho = page.correlations
    if not anytime:
        # Page's test is exact for support; for the margin there is only a t test of the correlations, (seeds,).
        return rho, Procedure("Page trend", t_test, _clipped_t_interval), page.p_value, _SIGN_FLIP
    # Ranks of few levels take few values, far from normal: only the bounds -1 and 1 are used.
    betting = Procedure("anytime-valid rank correlation", _bet_on_correlation, _sequence_of_correlations)
    p = betting.p(rho, null=0.0, alternative="greater" if rising else "less")
    return rho, betting, p, betting


def _clipped_t_interval(samples: Samples) -> tuple[float, float]:
    low, high = _t_interval(samples)
    return max(low, -1.0), min(high, 1.0)  # correlations cannot be larger


def _bet_on_correlation(rho: Floats, *, null: float, alternative: str) -> float:
    return sequential_bounded_test(
        np.clip(rho, -1.0, 1.0),
        low=-1,
        high=1,
        null=null,
        alternative="greater" if alternative == "greater" else "less",
    )


def _sequence_of_correlations(samples: Samples) -> tuple[float, float]:
    # Correlations are bounded, so betting needs no assumption on their distribution.
    sequence = ConfidenceSequence("bounded", alpha=1 - LEVEL, low=-1, high=1)
    for value in np.clip(samples[0], -1.0, 1.0):
        sequence.update(value)
    low, high = sequence.interval()
    return float(low), float(high)
