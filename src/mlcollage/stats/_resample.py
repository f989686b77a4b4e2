"""Which values enter a resample, as counts, and what a statistic makes of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlcollage.errors import InvalidInput
from mlcollage.stats._values import Floats

Statistic = Callable[..., npt.ArrayLike]
FEW = 10  # units below which a bootstrap without studentizing falls well short of its level
CHUNK = 2**20  # numbers held at once for a statistic that needs the values themselves


def blocks(n_boot: int, width: int) -> Iterator[int]:
    """Sizes of blocks of resamples, small enough to hold a count of each value."""
    step = max(1, 4 * CHUNK // width)
    for start in range(0, n_boot, step):
        yield min(step, n_boot - start)


def codes(labels: npt.ArrayLike, n: int, name: str) -> npt.NDArray[np.int64]:
    """Labels, one per value, as integers from 0."""
    given = np.asarray(labels)
    if given.shape != (n,):
        raise InvalidInput(f"{name} has shape {given.shape}; one label for each of the {n} values was expected.")
    if pd.isna(given).any():
        raise InvalidInput(f"{name} lacks a label at position {int(pd.isna(given).argmax())}; every value needs one.")
    return pd.factorize(given)[0].astype(np.int64)


@dataclass(frozen=True)
class Units:
    """What is resampled: ``row_unit`` (n,) names the unit of each value, ``stratum`` (units,) that of each unit.

    ``inner`` (n,), if not None, names units within units.
    """

    row_unit: npt.NDArray[np.int64]
    stratum: npt.NDArray[np.int64]
    inner: npt.NDArray[np.int64] | None = None

    @staticmethod
    def of(n: int, unit: object, strata: npt.ArrayLike | None) -> Units:
        """Read labels."""
        inner = None
        if isinstance(unit, tuple):
            if len(unit) != 2:
                raise InvalidInput(f"unit is a tuple of {len(unit)}; a pair (outer, inner) of labels was expected.")
            row_unit, within = codes(unit[0], n, "the outer unit"), codes(unit[1], n, "the inner unit")
            # the same inner label in two outer units names two units: number the pairs of labels
            inner = np.unique(np.stack([row_unit, within]), axis=1, return_inverse=True)[1].reshape(n)
        else:
            row_unit = np.arange(n) if unit is None else codes(unit, n, "unit")  # type: ignore[arg-type]
        first = np.unique(row_unit, return_index=True)[1]
        if strata is None:
            return Units(row_unit, np.zeros(len(first), dtype=np.int64), inner)
        stratum = codes(strata, n, "strata")
        if (stratum != stratum[first][row_unit]).any():
            raise InvalidInput("a unit has values in two strata; strata must be made of whole units.")
        return Units(row_unit, stratum[first], inner)

    @property
    def n_units(self) -> int:
        """Units resampled."""
        return len(self.stratum)

    def check(self, method: str, least: int) -> None:
        """Refuse too few units, warn of few."""
        smallest = int(np.bincount(self.stratum).min())
        if smallest < least:
            where = "there are" if (self.stratum == 0).all() else "a stratum has"
            raise InvalidInput(f"{where} {smallest} unit(s) to resample; {method!r} needs at least {least}.")
        if method in ("bayes", "bootstrap-t") and self.inner is not None:
            raise InvalidInput(f"method {method!r} does not resample within units; pass the outer labels only.")
        if method != "bootstrap-t" and self.n_units < FEW:
            covers = "80 %" if self.n_units < 5 else "85 %"
            warnings.warn(
                f"{self.n_units} units: a {method} bootstrap interval covers about {covers} at nominal 95 % with so "
                "few; use t_interval, or method='bootstrap-t'.",
                stacklevel=3,
            )

    def draws(self, n_boot: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """For each place a unit of its stratum, shape ``(n_boot, units)``."""
        sizes = np.bincount(self.stratum)
        if len(sizes) == 1:  # the same numbers as below, five times sooner
            return rng.integers(0, self.n_units, (n_boot, self.n_units))
        # units in order of their stratum: each slot (a unit's place) draws an offset within its stratum's stretch
        order = np.argsort(self.stratum, kind="stable")
        starts = (np.cumsum(sizes) - sizes)[self.stratum]
        return order[starts + rng.integers(0, sizes[self.stratum], (n_boot, self.n_units))]

    def tally(self, draws: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How often each unit was drawn, shape ``(n_boot, units)``."""
        shifted = draws + self.n_units * np.arange(len(draws))[:, None]  # a range of its own for each resample
        return np.bincount(shifted.ravel(), minlength=len(draws) * self.n_units).reshape(len(draws), self.n_units)

    def counts(self, n_boot: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """How often each value enters each resample, shape ``(n_boot, n)``."""
        tally = self.tally(self.draws(n_boot, rng))
        if self.inner is None:
            return tally[:, self.row_unit]
        counts = np.zeros((n_boot, len(self.row_unit)), dtype=np.int64)
        for unit in range(self.n_units):
            rows = np.flatnonzero(self.row_unit == unit)
            names, of_row = np.unique(self.inner[rows], return_inverse=True)
            m = len(names)  # a unit drawn c times is resampled c times: c independent tables of m draws add up
            counts[:, rows] = rng.multinomial(tally[:, unit] * m, np.full(m, 1 / m))[:, of_row]
        return counts

    def dirichlet(self, n_boot: int, rng: np.random.Generator) -> Floats:
        """Bayesian bootstrap weights of the values, mean 1 within each stratum, shape ``(n_boot, n)``."""
        weights = rng.standard_exponential((n_boot, self.n_units))  # normalized exponentials are Dirichlet(1, ..., 1)
        members = np.eye(self.stratum.max() + 1)[self.stratum]  # (units, strata)
        weights *= (members.sum(axis=0) / (weights @ members))[:, self.stratum]
        return weights[:, self.row_unit]

    def jackknife(self) -> npt.NDArray[np.int64]:
        """Counts that leave out one unit each, shape ``(units, n)``."""
        return (self.row_unit != np.arange(self.n_units)[:, None]).astype(np.int64)


class Evaluator:
    """A statistic of resamples that are given as counts, shape ``(resamples, n)``."""

    def __init__(self, x: Floats, stat: Statistic | str) -> None:
        if stat != "mean" and not callable(stat):
            raise InvalidInput(f"stat {stat!r} is neither 'mean' nor a function of the values.")
        self.x, self.stat = x, stat
        self.is_mean = stat == "mean" or stat is np.mean
        self.vectorized = not self.is_mean and _takes(stat, "axis")

    def __call__(self, counts: npt.NDArray[np.int64]) -> Floats:
        if self.is_mean:
            return (counts @ self.x) / counts.sum(axis=1)
        values = np.empty(len(counts))
        # other statistics need the resampled values themselves: some rows of counts at once, to bound memory
        step = max(1, CHUNK // counts.shape[1])
        for start in range(0, len(counts), step):
            part = counts[start : start + step]
            values[start : start + step] = self._part(part)
        if not np.isfinite(values).all():
            raise InvalidInput(
                f"stat is not finite on {np.count_nonzero(~np.isfinite(values))} resample(s), in which values repeat; "
                "use one that is defined there."
            )
        return values

    def _part(self, counts: npt.NDArray[np.int64]) -> Floats:
        sizes = counts.sum(axis=1)
        rows = np.repeat(np.tile(self.x, len(counts)), counts.ravel())  # all resamples, one after the other
        stat = self.stat
        assert callable(stat)
        if self.vectorized and (sizes == sizes[0]).all():
            out = np.asarray(stat(rows.reshape(len(counts), sizes[0]), axis=1), dtype=np.float64)
        else:
            out = np.array([stat(r) for r in np.split(rows, np.cumsum(sizes)[:-1])], dtype=np.float64)
        if out.shape != (len(counts),):
            raise InvalidInput(f"stat returned shape {out.shape[1:]} for a vector of values; one number was expected.")
        return out

    def resampled(self, units: Units, n_boot: int, rng: np.random.Generator) -> Floats:
        """The statistic of so many resamples; a mean of single values needs no counts.

        Equal resamples may then differ by rounding: not for a method that counts ties with the estimate.
        """
        if self.is_mean and units.inner is None and units.n_units == len(self.x):
            by_unit = np.empty_like(self.x)  # labels may have put the units in another order than the values
            by_unit[units.row_unit] = self.x
            return by_unit[units.draws(n_boot, rng)].mean(axis=1)
        return self(units.counts(n_boot, rng))

    def weighted(self, weights: Floats) -> Floats:
        """The statistic under weights of the values, one row each."""
        if self.is_mean:
            return (weights @ self.x) / weights.sum(axis=1)
        if not _takes(self.stat, "weights"):
            raise InvalidInput("method 'bayes' weights the units: stat must be 'mean' or take the keyword 'weights'.")
        stat = self.stat
        assert callable(stat)
        return np.array([stat(self.x, weights=w) for w in weights], dtype=np.float64)


def _takes(stat: object, keyword: str) -> bool:
    try:
        return keyword in inspect.signature(stat).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature
        return False
