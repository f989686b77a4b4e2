"""Intervals over examples: bootstrap weights, Wilson's limits, and the delete-a-group jackknife."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import scipy.stats
import torch
from torch import Tensor

from mlcollage import _random

Floats = npt.NDArray[np.float64]
GROUPS = 8
RESAMPLES = 1000


def weights(n: int, seed: int, resamples: int = RESAMPLES) -> Floats:
    """How often each of n examples is drawn in each resample, (resamples, n)."""
    rng = np.random.default_rng(_random.derive(seed, n))
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def ends(draws: npt.ArrayLike) -> tuple[float, float]:
    """The middle 95% of resampled values, those that are no numbers left out."""
    low, high = np.nanquantile(np.asarray(draws, dtype=np.float64), [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: npt.ArrayLike) -> tuple[float, float]:
    """Student's 95% interval of a mean; NaN for a single value."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return math.nan, math.nan
    half = float(scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return float(x.mean()) - half, float(x.mean()) + half


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n.

    Examples
    --------
    >>> low, high = wilson(0.5, 100)
    >>> round(low, 3), round(high, 3)
    (0.404, 0.596)
    """
    found = scipy.stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def jackknife(
    measure: Callable[[Tensor], Mapping[str, float]], n: int, seed: int, groups: int = GROUPS
) -> dict[str, tuple[float, float]]:
    r"""95% intervals over examples of smooth statistics: each is measured again without one of some groups.

    .. math:: s^2 = \frac{G - 1}{G} \sum_g (\theta_{-g} - \bar\theta)^2

    Parameters
    ----------
    measure
        From the rows that stay, (m,), to values by name.
    n
        Number of examples.
    seed
        Deals them to the groups.
    groups
        G.

    Returns
    -------
    dict
        Half-widths around nothing: (low, high) offsets to add to each estimate.
    """
    order = _random.permutation(n, seed, n)
    found: dict[str, list[float]] = {}
    for g in range(groups):
        keep = order[torch.arange(n) % groups != g].sort().values
        for name, value in measure(keep).items():
            found.setdefault(name, []).append(value)
    out = {}
    for name, values in found.items():
        x = np.array(values)
        half = math.nan
        if len(x) == groups and np.isfinite(x).all():
            error = math.sqrt((groups - 1) / groups * float(((x - x.mean()) ** 2).sum()))
            half = float(scipy.stats.t.ppf(0.975, groups - 1)) * error
        out[name] = (-half, half)
    return out
