"""Posterior marginals, exact or sampled, behind one small interface: mean, sd, quantile, cdf."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.interpolate import CubicSpline, PPoly
from scipy.special import ndtr

from mlcollage._checks import probability
from mlcollage.stats._values import Floats


class Marginal(Protocol):
    """A marginal distribution, or a vector of them."""

    @property
    def mean(self) -> Floats:
        """Posterior mean."""
        ...

    @property
    def sd(self) -> Floats:
        """Posterior standard deviation."""
        ...

    def cdf(self, x: npt.ArrayLike) -> Floats:
        """P(value <= x)."""
        ...

    def quantile(self, p: float) -> Floats:
        """Smallest x with cdf(x) >= p."""
        ...


@dataclass(frozen=True)
class NormalMixture:
    """Mixture of normals over nodes; ``weights`` (G,), ``means`` and ``sds`` (G,) or, a vector of them, (G, J)."""

    weights: Floats
    means: Floats
    sds: Floats

    @property
    def mean(self) -> Floats:
        return self.weights @ self.means

    @property
    def sd(self) -> Floats:
        return np.sqrt(self.weights @ (self.sds**2 + (self.means - self.mean) ** 2))

    def cdf(self, x: npt.ArrayLike) -> Floats:
        below = self.weights @ ndtr((np.asarray(x, dtype=np.float64) - self.means) / self.sds)
        return np.clip(below, 0.0, 1.0)  # weights add up to 1 but for rounding

    def quantile(self, p: float) -> Floats:
        probability("p", p)
        heavy = self.weights > 1e-10 * self.weights.max()  # the others cannot move a quantile, only widen the search
        # bounds beyond any quantile, one per marginal
        part = NormalMixture(self.weights[heavy], self.means[heavy], self.sds[heavy])
        low = (part.means - 40 * part.sds).min(axis=0)
        high = (part.means + 40 * part.sds).max(axis=0)
        return _bisect(part.cdf, low, high, p)


def _bisect(cdf: Callable[[Floats], Floats], low: Floats, high: Floats, p: float) -> Floats:
    for _ in range(70):  # halvings, which leave nothing of a double's digits; elementwise for a vector of marginals
        middle = (low + high) / 2
        below = cdf(middle) < p
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class GridDensity:
    """Density of a positive quantity on an even grid of its logarithm; ``weights`` sum to 1."""

    log_nodes: Floats
    weights: Floats

    @property
    def mean(self) -> Floats:
        return np.asarray(self.weights @ np.exp(self.log_nodes))

    @property
    def sd(self) -> Floats:
        return np.sqrt(self.weights @ (np.exp(self.log_nodes) - self.mean) ** 2)

    def cdf(self, x: npt.ArrayLike) -> Floats:
        with np.errstate(divide="ignore"):
            t = np.log(np.maximum(np.asarray(x, dtype=np.float64), 0.0))
        return self._cdf_of_log(np.clip(t, self.log_nodes[0], self.log_nodes[-1]))

    def quantile(self, p: float) -> Floats:
        probability("p", p)
        return np.exp(_bisect(self._cdf_of_log, self.log_nodes[0], self.log_nodes[-1], p))

    def _cdf_of_log(self, t: Floats) -> Floats:
        return np.clip(self._integral(t), 0.0, 1.0)

    @cached_property
    def _integral(self) -> PPoly:
        step = self.log_nodes[1] - self.log_nodes[0]  # weights over the step are the density
        return CubicSpline(self.log_nodes, self.weights / step).antiderivative()


@dataclass(frozen=True)
class Draws:
    """Draws, shape ``(chains, draws)`` or ``(chains, draws, J)``."""

    values: Floats

    @property
    def mean(self) -> Floats:
        return self.values.mean(axis=(0, 1))

    @property
    def sd(self) -> Floats:
        return self.values.std(axis=(0, 1))

    def cdf(self, x: npt.ArrayLike) -> Floats:
        return (self.values <= np.asarray(x)).mean(axis=(0, 1))

    def quantile(self, p: float) -> Floats:
        return np.quantile(self.values, probability("p", p), axis=(0, 1))


def draw_from_grid(nodes: Floats, log_density: Floats, rng: np.random.Generator) -> Floats:
    """One draw from each density that is given on an even grid (last axis) and linear between its nodes."""
    p = np.exp(log_density - log_density.max(axis=-1, keepdims=True))
    # first the cell between two nodes, by its mass (trapezoids)
    mass = np.cumsum(p[..., 1:] + p[..., :-1], axis=-1)
    target = rng.random((*p.shape[:-1], 1)) * mass[..., -1:]
    cell = np.minimum((mass < target).sum(axis=-1, keepdims=True), p.shape[-1] - 2)
    p0, p1 = np.take_along_axis(p, cell, -1), np.take_along_axis(p, cell + 1, -1)
    # then the place in the cell, where the density goes from p0 to p1: its distribution function, solved for r
    r = rng.random(p0.shape)
    share = r * (p0 + p1) / (p0 + np.sqrt(p0**2 + r * (p1**2 - p0**2)))
    start = np.take_along_axis(nodes, cell, -1)
    return (start + share * (nodes[..., 1:2] - nodes[..., :1]))[..., 0]
