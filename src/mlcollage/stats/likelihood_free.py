r"""Approximate Bayesian computation: posteriors of models that can be simulated but whose likelihood is unknown.

Draw parameters from the prior, simulate, and keep those whose summaries come near the observed ones. J. Pritchard et
al., Molecular Biology and Evolution 1999; M. Beaumont, W. Zhang and D. Balding, Genetics 2002; A. Gelman and
A. Vehtari, JASA 2021, idea 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlcollage._checks import integer, probability, real
from mlcollage.errors import InvalidInput
from mlcollage.stats._values import Floats, Rng, finite

_LEAST = 10  # draws kept, below which nothing can be said of a posterior


@dataclass(frozen=True)
class AbcPosterior:
    """Draws of an approximate posterior.

    Attributes
    ----------
    theta
        Parameters kept, shape ``(kept, d)``.
    weights
        Of the draws, summing to one; equal without regression.
    distances
        Of their summaries from the observed ones, in robust standard deviations of the simulations.
    tolerance
        Largest distance kept.
    acceptance
        Share of the simulations that was kept.
    """

    theta: Floats
    weights: Floats
    distances: Floats
    tolerance: float
    acceptance: float

    def mean(self) -> Floats:
        """Posterior mean, shape ``(d,)``."""
        return self.weights @ self.theta

    def sd(self) -> Floats:
        """Posterior standard deviation, shape ``(d,)``."""
        return np.sqrt(self.weights @ (self.theta - self.mean()) ** 2)

    def quantile(self, p: float) -> Floats:
        """Weighted quantile of each parameter, shape ``(d,)``."""
        probability("p", p, inside=False)
        # sort each parameter, (kept, d), and take the first draw whose weights so far reach p
        order = np.argsort(self.theta, axis=0)
        ranks = np.cumsum(self.weights[order], axis=0)
        at = np.minimum((ranks < p).sum(axis=0), len(self.theta) - 1)
        return np.take_along_axis(self.theta, np.take_along_axis(order, at[None], axis=0), axis=0)[0]


def abc_rejection(
    prior: Callable[[int, np.random.Generator], npt.ArrayLike],
    simulate: Callable[[Floats, np.random.Generator], npt.ArrayLike],
    observed: npt.ArrayLike,
    *,
    n_sims: int = 20_000,
    keep: float = 0.01,
    tolerance: float | None = None,
    adjust: bool = False,
    rng: Rng = 0,
) -> AbcPosterior:
    r"""Keep the simulations nearest to the data.

    .. math:: \theta \sim p(\theta \mid \rho(s, s_\text{obs}) \le \epsilon), \qquad
        \rho^2 = \sum_k \bigl((s_k - s_{\text{obs}, k}) / \operatorname{mad}_k\bigr)^2,

    which tends to :math:`p(\theta \mid s_\text{obs})` as :math:`\epsilon` tends to 0: the posterior given the data if
    the summaries are sufficient. ``adjust`` corrects the draws by a local linear regression on the summaries, with
    Epanechnikov weights, :math:`\theta - \hat\beta^\top (s - s_\text{obs})` (Beaumont et al. 2002), so that far larger
    tolerances do.

    Parameters
    ----------
    prior
        ``prior(n, generator)``: draws of the parameters, shape ``(n, d)``.
    simulate
        ``simulate(theta, generator)``: summaries of a data set for each row, shape ``(n, k)``.
    observed
        The same summaries of the data, shape ``(k,)``.
    n_sims
        Simulations.
    keep
        Share of them to keep; unused with ``tolerance``.
    tolerance
        Keep those at most so far; 0 keeps exact matches, for discrete summaries.
    adjust
        Whether to correct by regression. Parameters are then taken as unbounded: transform those that are not.
    rng
        Seed or generator.

    Raises
    ------
    InvalidInput
        On shapes that do not fit, simulations that are not finite, or fewer than ten draws kept.

    Examples
    --------
    A normal mean with prior N(0, 1) and ten values of mean 0.8; the posterior is N(0.727, 0.302).

    >>> posterior = abc_rejection(
    ...     prior=lambda n, rng: rng.normal(size=(n, 1)),
    ...     simulate=lambda theta, rng: theta + rng.normal(0, 10**-0.5, theta.shape),
    ...     observed=[0.8],
    ...     adjust=True,
    ... )
    >>> posterior.mean().round(1).tolist(), posterior.sd().round(1).tolist()
    ([0.7], [0.3])
    """
    integer("n_sims", n_sims, least=_LEAST), real("keep", keep, above=0, most=1)
    if tolerance is not None:
        real("tolerance", tolerance, least=0)
    generator, target = np.random.default_rng(rng), finite(observed, "observed")
    theta = np.asarray(prior(n_sims, generator), dtype=np.float64)
    if theta.ndim != 2 or len(theta) != n_sims:
        raise InvalidInput(f"prior returned shape {theta.shape}; ({n_sims}, parameters) is needed.")
    summaries = finite(simulate(theta, generator), "what simulate returned")
    if target.ndim != 1 or summaries.shape != (n_sims, len(target)):
        raise InvalidInput(
            f"simulate returned shape {summaries.shape} and observed has shape {target.shape}; "
            f"({n_sims}, summaries) and (summaries,) are needed."
        )
    away = (summaries - target) / _scales(summaries)  # (n_sims, k), in robust standard deviations
    distances = np.sqrt((away**2).sum(axis=1))
    limit = float(np.quantile(distances, keep, method="inverted_cdf")) if tolerance is None else float(tolerance)
    kept = distances <= limit
    if kept.sum() < _LEAST:
        raise InvalidInput(
            f"{kept.sum()} of {n_sims} simulations come within {limit:.3g} of the data; simulate more, raise the "
            "tolerance, or ask whether the prior can give such data at all."
        )
    # (kept, d) and (kept,)
    values, weights = theta[kept], np.ones(int(kept.sum()))
    if adjust:
        values, weights = _regressed(values, away[kept], distances[kept], limit)
    return AbcPosterior(values, weights / weights.sum(), distances[kept], limit, float(kept.mean()))


def _scales(summaries: Floats) -> Floats:
    """Median absolute deviation of each summary; the standard deviation where most simulations agree."""
    mad = 1.4826 * np.median(np.abs(summaries - np.median(summaries, axis=0)), axis=0)
    sd = summaries.std(axis=0)
    return np.where(mad > 0, mad, np.where(sd > 0, sd, 1.0))


def _regressed(theta: Floats, away: Floats, distances: Floats, limit: float) -> tuple[Floats, Floats]:
    weights = np.maximum(1 - (distances / limit) ** 2, 0.0) if limit > 0 else np.ones(len(theta))
    if (weights > 0).sum() <= away.shape[1] + 1:
        raise InvalidInput(f"{(weights > 0).sum()} draws are too few for {away.shape[1]} summaries; keep more.")
    # weighted least squares of theta (kept, d) on the summaries; the intercept is what is left at the observed ones
    root = np.sqrt(weights)[:, None]
    design = np.column_stack([np.ones(len(away)), away])
    slopes = np.linalg.lstsq(root * design, root * theta, rcond=None)[0][1:]
    return theta - away @ slopes, weights
