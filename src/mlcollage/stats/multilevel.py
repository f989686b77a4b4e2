r"""Partial pooling of an effect table: what several data sets say together, and about each one.

Effects of data sets :math:`j = 1..J`, each measured with error, are drawn from one population:

.. math::
    y_j \sim \mathrm{N}(\theta_j, s_j^2), \qquad \theta_j = \mu + \tau z_j, \qquad
    \mu \sim \mathrm{N}(0, A^2), \qquad \tau \sim \text{half-normal}(B) \text{ or half-Cauchy}(B),

with z normal or Student's t. The noise is either known (an estimate and its standard error for each data set) or
estimated from seeds, pooled on the log scale: :math:`\log s_j \sim \mathrm{N}(m, \omega^2)`. With known noise and
normal effects the posterior is exact (:meth:`PartialPooling.exact`): :math:`\theta` and :math:`\mu` are integrated
analytically and :math:`\tau` by quadrature, so there is nothing to converge. Otherwise a Gibbs sampler draws
:math:`(\tau, \mu, \theta)` jointly by the same quadrature, given the noise, so it mixes where centered samplers stick.

A. Gelman and A. Vehtari, JASA 2021, idea 4; A. Gelman, Bayesian Analysis 2006 (priors of tau); D. B. Rubin, Journal
of Educational Statistics 1981 (eight schools).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlcollage._checks import choice, integer, positive, real
from mlcollage.errors import InvalidInput
from mlcollage.stats._posterior import Draws, GridDensity, Marginal, NormalMixture, draw_from_grid
from mlcollage.stats._values import Floats, Rng, pair, sample, tail

TauPrior = Literal["half-normal", "half-cauchy"]
Noise = Literal["known", "pooled"]
Dist = Literal["normal", "t"]
_NODES = 2001  # of the final grid of log tau; halving it moves the moments of eight schools by less than 1e-9
_KEEP = 60.0  # nats below the mode at which the grid ends
_INNER = 129  # nodes of the grids inside the Gibbs sampler; the density is linear between them
_ONE = np.ones(1)  # the factor of tau^2 where effects are normal


@dataclass(frozen=True)
class EffectPosterior:
    """Posterior of an effect table.

    Of ``mu``, ``tau``, ``theta`` and ``new`` there are ``mean``, ``sd``, ``quantile(p)`` and ``cdf(x)``.

    Attributes
    ----------
    mu, tau
        Mean and spread of the population of effects.
    theta
        Effects of the data sets; every number is a vector of length J.
    new
        Effect of the next data set from the same population.
    names
        Of the data sets.
    draws
        What was sampled, by name, shapes ``(chains, draws, ...)``: ready for ``arviz.from_dict``. Empty if exact.
    """

    mu: Marginal
    tau: Marginal
    theta: Marginal
    new: Marginal
    names: tuple[str, ...]
    draws: dict[str, Floats] = field(default_factory=dict, repr=False)

    def prob_positive(self) -> float:
        """P(mu > 0)."""
        return 1.0 - float(self.mu.cdf(0.0))

    def rope(self, delta: float) -> float:
        """P(abs(mu) < delta): the effect is in the region of practical equivalence, in units of the effects."""
        positive("delta", delta)
        return float(self.mu.cdf(delta)) - float(self.mu.cdf(-delta))


@dataclass
class PartialPooling:
    r"""Multilevel model of effects over data sets (see the module for the equations).

    Parameters
    ----------
    prior_mu_scale
        A: standard deviation of the prior of the mean effect, in units of the effects.
    tau_scale
        B: scale of the prior of the spread of effects, in the same units.
    tau_prior
        ``half-normal``, or ``half-cauchy`` with its heavy tail.
    noise
        ``known``: ``fit(y, s)`` takes estimates and standard errors. ``pooled``: ``fit(table)`` takes seeds.
    dist
        Effects are ``normal``, or ``t``: Student's with ``df`` degrees of freedom, for populations with outliers.
    df
        Degrees of freedom of ``t``.
    noise_spread
        Scale of the half-normal prior of :math:`\omega`, the spread of log noise over data sets (``pooled`` only).
    chains, draws, warmup
        Of the Gibbs sampler; unused where the posterior is exact.
    rng
        Seed; the same seed gives the same draws.

    Raises
    ------
    InvalidInput
        On scales that are not positive, unknown options, or (from ``fit``) an unusable table.

    Warns
    -----
    UserWarning
        If a prior scale and the data differ by a factor above 100: percent and fraction, most likely.

    Examples
    --------
    Eight schools: effects of coaching with their standard errors.

    >>> y, s = [28, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18]
    >>> model = PartialPooling(prior_mu_scale=5, tau_scale=5, tau_prior="half-cauchy").fit(y, s)
    >>> posterior = model.exact()
    >>> round(float(posterior.mu.mean), 2), round(float(posterior.tau.mean), 2), round(posterior.prob_positive(), 3)
    (4.4, 3.6, 0.908)
    >>> model.shrunken()[["estimate", "shrunken"]].round(1).iloc[0].tolist()
    [28.0, 6.2]
    """

    prior_mu_scale: float
    tau_scale: float
    tau_prior: TauPrior = "half-normal"
    noise: Noise = "known"
    dist: Dist = "normal"
    df: float = 4.0
    noise_spread: float = 0.5
    chains: int = 4
    draws: int = 1000
    warmup: int = 200
    rng: Rng = 0

    def __post_init__(self) -> None:
        for name in ("prior_mu_scale", "tau_scale", "noise_spread"):
            positive(name, getattr(self, name))
        for name, options in (("tau_prior", TauPrior), ("noise", Noise), ("dist", Dist)):
            choice(name, getattr(self, name), get_args(options))
        for name, least in (("chains", 1), ("draws", 1), ("warmup", 0)):
            integer(name, getattr(self, name), least=least)
        real("df", self.df, above=2)  # with 2 or fewer, effects have no variance
        self._data: _Table | None = None
        self._posterior: EffectPosterior | None = None

    def fit(
        self, y: npt.ArrayLike | pd.DataFrame, s: npt.ArrayLike | None = None, names: Sequence[str] | None = None
    ) -> PartialPooling:
        """Read the table; the posterior is computed when first asked for.

        Parameters
        ----------
        y
            ``noise="known"``: effects, shape ``(J,)``. ``noise="pooled"``: a table with the columns ``dataset`` and
            ``value``, a row per seed.
        s
            Standard errors of the effects, shape ``(J,)``; ``noise="known"`` only.
        names
            Of the data sets; default 0, 1, ... With a table, its labels.
        """
        if self.noise == "known":
            if isinstance(y, pd.DataFrame) or s is None:
                raise InvalidInput("noise='known' takes fit(effects, standard_errors); 'pooled' takes a table.")
            self._data = _known(y, s, names)
        else:
            if not isinstance(y, pd.DataFrame) or s is not None or names is not None:
                raise InvalidInput("noise='pooled' takes fit(table) with the columns 'dataset' and 'value'.")
            self._data = _seeds(y)
        self._posterior = None
        self._check_units(self._data)
        return self

    def exact(self) -> EffectPosterior:
        r"""Posterior by quadrature; ``noise="known"`` and ``dist="normal"`` only.

        With :math:`v_j = s_j^2 + \tau^2`, :math:`1/V = \sum_j 1/v_j + 1/A^2` and :math:`\hat\mu = V \sum_j y_j / v_j`,

        .. math:: \log p(\tau \mid y) = \log p(\tau) + \tfrac12 \log V - \tfrac12 \sum_j \log v_j
            - \tfrac12 \sum_j \frac{(y_j - \hat\mu)^2}{v_j} - \frac{\hat\mu^2}{2 A^2} + \text{const},

        and :math:`\mu, \theta_j` and the next effect are Gaussian given :math:`\tau`, so mixtures of Gaussians over the
        nodes (A. Gelman et al., "Bayesian Data Analysis", 3rd ed., sec. 5.4). The trapezoid rule in
        :math:`\log \tau` converges geometrically.
        """
        table = self._fitted()
        if self.noise != "known" or self.dist != "normal":
            raise InvalidInput("exact() needs noise='known' and dist='normal'; use posterior(), which samples.")
        if self._posterior is None:
            self._posterior = self._quadrature(table)
        return self._posterior

    def posterior(self) -> EffectPosterior:
        """The posterior: exact where it can be, sampled otherwise."""
        if self.noise == "known" and self.dist == "normal":
            return self.exact()
        if self._posterior is None:
            self._posterior = self.sample()
        return self._posterior

    def sample(self) -> EffectPosterior:
        """The posterior by Gibbs sampling, whatever the options."""
        return _gibbs(self, self._fitted())

    def shrunken(self, level: float = 0.95) -> pd.DataFrame:
        """Effects before and after pooling, a row per data set.

        Columns: ``estimate``, ``se``, ``shrunken`` (posterior mean), ``sd``, ``low``, ``high`` (central interval),
        ``prob_positive``. With pooled noise ``se`` is the seeds' own standard error (NaN with one seed).
        """
        miss, table, theta = tail(level), self._fitted(), self.posterior().theta
        return pd.DataFrame(
            {
                "estimate": table.y,
                "se": table.se,
                "shrunken": theta.mean,
                "sd": theta.sd,
                "low": theta.quantile(miss),
                "high": theta.quantile(1 - miss),
                "prob_positive": 1 - theta.cdf(0.0),
            },
            index=pd.Index(table.names, name="dataset"),
        )

    def _fitted(self) -> _Table:
        if self._data is None:
            raise InvalidInput("the model has seen no data; call fit first.")
        return self._data

    def _check_units(self, table: _Table) -> None:
        scale = max(float(np.abs(table.y).max()), float(np.nanmedian(table.se)))
        for name in ("prior_mu_scale", "tau_scale"):
            ratio = getattr(self, name) / scale
            if not 0.01 <= ratio <= 100 and scale > 0:
                warnings.warn(
                    f"{name}={getattr(self, name):g} and the effects (about {scale:.3g}) differ by a factor of "
                    f"{max(ratio, 1 / ratio):.3g}; are both in the same units (percent or fraction)?",
                    stacklevel=3,
                )

    def _log_prior(self, tau: Floats) -> Floats:
        if self.tau_prior == "half-cauchy":
            return -np.log1p((tau / self.tau_scale) ** 2)
        return -0.5 * (tau / self.tau_scale) ** 2

    def _quadrature(self, table: _Table) -> EffectPosterior:
        y, v = table.y, table.se**2

        def log_density(t: Floats) -> Floats:
            return _collapsed(y, v, np.exp(t), self.prior_mu_scale)[0] + self._log_prior(np.exp(t)) + t

        # nodes of log tau (G,) and their weights; given a node everything else is Gaussian
        t = _log_grid(log_density, min(self.tau_scale, float(table.se.min())), max(self.tau_scale, np.ptp(y)))
        log_p = log_density(t)
        weights = np.exp(log_p - log_p.max())
        weights /= weights.sum()
        tau = np.exp(t)
        _, m, big_v = _collapsed(y, v, tau, self.prior_mu_scale)  # of mu, (G,)
        mean, var, pull = _given_tau(y, v, tau[:, None], m[:, None])
        return EffectPosterior(
            mu=NormalMixture(weights, m, np.sqrt(big_v)),
            tau=GridDensity(t, weights),
            theta=NormalMixture(weights, mean, np.sqrt(var + pull**2 * big_v[:, None])),
            new=NormalMixture(weights, m, np.sqrt(big_v + tau**2)),
            names=table.names,
        )


@dataclass(frozen=True)
class _Table:
    """Sufficient statistics: means, their standard errors, seeds and within-data-set sums of squares."""

    y: Floats
    se: Floats
    names: tuple[str, ...]
    n: Floats
    squares: Floats


def _known(y: npt.ArrayLike, s: npt.ArrayLike, names: Sequence[str] | None) -> _Table:
    effects, errors = pair(y, s, ("y", "s"))
    if not (errors > 0).all():
        raise InvalidInput(
            f"standard errors must be positive; got {errors.min():g}. A data set without spread over seeds "
            "has no known error: use noise='pooled'."
        )
    labels = tuple(map(str, range(len(effects)) if names is None else names))
    if len(labels) != len(effects):
        raise InvalidInput(f"there are {len(effects)} effects and {len(labels)} names.")
    ones = np.ones(len(effects))
    return _Table(effects, errors, labels, ones, 0 * ones)


def _seeds(table: pd.DataFrame) -> _Table:
    # a row per seed: reduced to what the model needs of each data set
    missing = {"dataset", "value"} - set(table.columns)
    if missing:
        raise InvalidInput(f"the table lacks {', '.join(sorted(missing))}; it needs the columns 'dataset' and 'value'.")
    if "seed" in table and table.duplicated(["dataset", "seed"]).any():
        row = table[table.duplicated(["dataset", "seed"])].iloc[0]
        raise InvalidInput(f"data set {row['dataset']} has seed {row['seed']} twice; average what is repeated in it.")
    values = sample(table["value"].to_numpy(), "the column 'value'")
    of_row = table["dataset"].to_numpy()
    groups = pd.Series(values).groupby(of_row, sort=False)
    n, y = _floats(groups.size()), _floats(groups.mean())
    squares = _floats(((pd.Series(values) - groups.transform("mean")) ** 2).groupby(of_row, sort=False).sum())
    if len(y) < 2:
        raise InvalidInput("the table has one data set; partial pooling needs at least 2.")
    if not (n > 1).any():
        raise InvalidInput("every data set has one seed: no variance can be estimated; add seeds or use noise='known'.")
    if squares.sum() <= 1e-24 * max(float((values**2).sum()), np.finfo(float).tiny):
        raise InvalidInput("the seeds of every data set agree exactly, so there is no noise to estimate.")
    with np.errstate(divide="ignore", invalid="ignore"):  # one seed has no standard error: NaN
        se = np.sqrt(squares / (n - 1) / n)
    return _Table(y, se, tuple(map(str, pd.unique(of_row))), n, squares)


def _floats(series: pd.Series) -> Floats:
    return np.asarray(series, dtype=np.float64)


def _collapsed(y: Floats, v: Floats, tau: Floats, a: float, factor: Floats = _ONE) -> tuple[Floats, Floats, Floats]:
    """Log likelihood of tau with theta and mu integrated out, and mean and variance of mu given tau.

    ``y``, ``v`` (noise variances) and ``factor`` (of tau^2, for Student's t) have shapes ``(..., J)``; ``tau`` and the
    results ``(..., G)``.
    """
    total = v[..., None, :] + factor[..., None, :] * tau[..., :, None] ** 2  # variance of y given mu, (..., G, J)
    precision = 1 / total
    big_v = 1 / (precision.sum(axis=-1) + a**-2)
    m = big_v * (precision * y[..., None, :]).sum(axis=-1)
    square = (precision * (y[..., None, :] - m[..., None]) ** 2).sum(axis=-1)
    return 0.5 * (np.log(big_v) - np.log(total).sum(axis=-1) - square - (m / a) ** 2), m, big_v


def _given_tau(y: Floats, v: Floats, spread: Floats, mu: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean and variance of theta given mu and its prior spread, and how far theta follows mu."""
    keep = spread**2 / (v + spread**2)
    return mu + keep * (y - mu), keep * v, 1 - keep


def _log_grid(log_density: Callable[[Floats], Floats], low: float, high: float) -> Floats:
    """Even grid of log tau that holds all of a density up to exp(-60) of its mode."""
    t = np.arange(np.log(low) - _KEEP - 5, np.log(high) + _KEEP, 0.05)  # coarse, and surely wide enough
    log_p = log_density(t)
    inside = np.flatnonzero(log_p > log_p.max() - _KEEP)
    return np.linspace(t[max(inside[0] - 1, 0)], t[min(inside[-1] + 1, len(t) - 1)], _NODES)


def _gibbs(model: PartialPooling, table: _Table) -> EffectPosterior:
    """Blocked Gibbs: (tau, mu, theta) jointly given noise and scales, then scales, then noise."""
    rng = np.random.default_rng(model.rng)
    shape = (model.chains, len(table.y))  # chains are the leading dimension of everything below
    known = model.noise == "known"
    pooled_sd = 1.0 if known else np.sqrt(table.squares.sum() / (table.n - 1).sum())
    u0 = float(np.log(pooled_sd))
    u = np.broadcast_to(np.log(table.se) if known else np.float64(u0), shape)  # log noise
    factor = np.ones(shape)  # of tau^2: Student's t is a scale mixture of normals
    y = np.broadcast_to(table.y, shape)
    low, high = np.log(min(model.tau_scale, np.exp(u).min())) - 25, np.log(max(model.tau_scale, np.ptp(table.y))) + 12
    kept: dict[str, list[Floats]] = {name: [] for name in ("mu", "tau", "theta", "noise", "new")}
    for step in range(model.warmup + model.draws):
        v = np.exp(2 * u) / table.n  # variances of the data sets' means

        def log_density(t: Floats, v: Floats = v, factor: Floats = factor) -> Floats:
            return _collapsed(y, v, np.exp(t), model.prior_mu_scale, factor)[0] + model._log_prior(np.exp(t)) + t

        # tau, then mu given tau, then theta given both: one joint draw
        tau = np.exp(_draw_log(log_density, low, high, model.chains, rng))
        _, m, big_v = _collapsed(y, v, tau[:, None], model.prior_mu_scale, factor)
        mu = m + np.sqrt(big_v) * rng.standard_normal((model.chains, 1))
        spread = tau[:, None] * np.sqrt(factor)
        _, var, pull = _given_tau(y, v, spread, mu)
        offset = (1 - pull) * (y - mu) + np.sqrt(var) * rng.standard_normal(shape)  # theta - mu, exact near tau = 0
        z = rng.standard_normal(model.chains)  # of the next data set's effect
        if model.dist == "t":
            rate = (model.df + (offset / tau[:, None]) ** 2) / 2
            factor = rate / rng.standard_gamma((model.df + 1) / 2, shape)
            z = rng.standard_t(model.df, model.chains)
        if not known:
            u = _draw_noise(u, table, mu + offset, u0, model.noise_spread, rng)
        if step >= model.warmup:
            now = (mu[:, 0], tau, mu + offset, np.exp(u), mu[:, 0] + tau * z)
            for name, value in zip(kept, now, strict=True):
                kept[name].append(value)
    draws = {name: np.stack(values, axis=1) for name, values in kept.items() if not (known and name == "noise")}
    marginals = {name: Draws(draws[name]) for name in ("mu", "tau", "theta", "new")}
    return EffectPosterior(**marginals, names=table.names, draws=draws)


def _draw_log(
    log_density: Callable[[Floats], Floats], low: float, high: float, chains: int, rng: np.random.Generator
) -> Floats:
    """One draw per chain from a density of a logarithm: a coarse grid finds its mass, a fine one is drawn from."""
    coarse = np.linspace(low, high, _INNER)
    log_p = log_density(np.broadcast_to(coarse, (chains, _INNER)))
    inside = log_p > log_p.max(axis=1, keepdims=True) - 25  # (chains, _INNER); a node more at both ends
    first = np.maximum(inside.argmax(axis=1) - 1, 0)
    last = np.minimum(_INNER - inside[:, ::-1].argmax(axis=1), _INNER - 1)
    t = np.linspace(coarse[first], coarse[last], _INNER, axis=1)
    return draw_from_grid(t, log_density(t), rng)


def _draw_noise(
    u: Floats, table: _Table, theta: Floats, center: float, spread: float, rng: np.random.Generator
) -> Floats:
    r"""Log noise of each data set and its population, given the residuals.

    .. math:: \log p(u_j \mid \cdot) = -n_j u_j - \tfrac12 S_j e^{-2 u_j} - (u_j - m)^2 / (2 \omega^2) + \text{const},
        \qquad S_j = \sum_k (y_{jk} - \theta_j)^2.

    (m, omega) are drawn given u, u given (m, omega), and then both once more given z = (u - m) / omega: alternating
    the two parametrizations mixes whether omega is large or small (Y. Yu and X.-L. Meng, JCGS 2011).
    """
    squares = table.squares + table.n * (table.y - theta) ** 2  # S, (chains, J)
    zero = np.zeros_like(u)
    wide = 10.0  # prior sd of m on the log scale around the pooled estimate: a factor of e^10 either way
    low, high = np.log(spread) - 12, np.log(spread) + 4

    def log_prior(t: Floats) -> Floats:
        return -0.5 * (np.exp(t) / spread) ** 2 + t

    def log_lik(log_noise: Floats) -> Floats:
        each = -table.n * log_noise - 0.5 * squares[:, None] * np.exp(-2 * log_noise)
        return each.sum(axis=-1)

    def given_u(t: Floats) -> Floats:
        return _collapsed(u - center, zero, np.exp(t), wide)[0] + log_prior(t)

    omega = np.exp(_draw_log(given_u, low, high, len(u), rng))[:, None]
    _, m, big_v = _collapsed(u - center, zero, omega, wide)
    m = center + m + np.sqrt(big_v) * rng.standard_normal(m.shape)
    z = (_draw_each(u, squares, table.n, m, omega, rng) - m) / omega

    # u = m + omega z: shift and scale of all log noises at once, given z
    def shift(t: Floats) -> Floats:
        return log_lik(t[..., None] + (omega * z)[:, None]) - 0.5 * ((t - center) / wide) ** 2

    def scale(t: Floats) -> Floats:
        return log_lik(m[..., None] + np.exp(t)[..., None] * z[:, None]) + log_prior(t)

    m = _draw_log(shift, center - 6, center + 6, len(u), rng)[:, None]
    omega = np.exp(_draw_log(scale, low, high, len(u), rng))[:, None]
    return m + omega * z


def _draw_each(u: Floats, squares: Floats, n: Floats, m: Floats, omega: Floats, rng: np.random.Generator) -> Floats:
    """Log noise given (m, omega); concave, so Newton's method finds the mode that the grid surrounds."""
    mode = u.copy()
    for _ in range(30):  # steps of at most 1, which keeps Newton's method from overshooting where the tail is flat
        push = squares * np.exp(-2 * mode)
        mode += np.clip((push - n - (mode - m) / omega**2) / (2 * push + omega**-2), -1, 1)
    sd = 1 / np.sqrt(2 * squares * np.exp(-2 * mode) + omega**-2)
    nodes = mode[..., None] + sd[..., None] * np.linspace(
        -8, 12, _INNER
    )  # (chains, J, _INNER); the right tail is longer
    log_p = (
        -n[:, None] * nodes
        - 0.5 * squares[..., None] * np.exp(-2 * nodes)
        - 0.5 * ((nodes - m[..., None]) / omega[..., None]) ** 2
    )
    return draw_from_grid(nodes, log_p, rng)
