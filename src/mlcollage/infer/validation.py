r"""Tests of samplers with their models, against the truth of simulated parameters and data.

**Simulation-based calibration** (:func:`sbc`) asks whether a whole run gives the posterior that it claims to give.

Draw :math:`\theta_i \sim p(\theta)`, data :math:`y_i \sim p(y \mid \theta_i)`, and L posterior draws
:math:`\theta_{i1}, \dots, \theta_{iL}`. If all is right, the rank of each :math:`f(\theta_i, y_i)` among
:math:`f(\theta_{i1}, y_i), \dots` is uniform on 0..L, for every quantity f. S. Talts et al., "Validating Bayesian
Inference Algorithms with Simulation-Based Calibration", 2018; M. Modrák et al., "Simulation-Based Calibration Checking
for Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity", Bayesian Analysis 2023.

All simulated data sets are fitted as one batch: a chain of :func:`mlcollage.infer.hmc.sample` each, with
``pooled=False``, so that hundreds of fits take seconds. :func:`mlcollage.stats.simulation.sbc_uniformity` judges the
ranks.

**Geweke's joint-distribution test** (:func:`geweke`) asks whether one transition leaves the posterior as it is.

Draw :math:`\theta_0 \sim p(\theta)` and :math:`y_0 \sim p(y \mid \theta_0)`: a draw of the joint distribution. Then
alternate

.. math:: \theta_{t+1} \sim K(\theta \mid \theta_t, y_t), \qquad y_{t+1} \sim p(y \mid \theta_{t+1}).

If the kernel K leaves :math:`p(\theta \mid y)` invariant, :math:`(\theta_t, y_t)` is a draw of the joint distribution
at every t; if it samples anything else, or the model it samples is not the one that was simulated, the pairs drift away
from it. J. Geweke, "Getting It Right: Joint Distribution Tests of Posterior Simulators", JASA 2004.

Many independent chains run side by side, one per row, and their last states are compared with fresh draws of the joint
distribution: two independent samples, so that the p-values are exact, without an estimate of autocorrelation (A. Gandy
and J. Scott, "Unit Testing for MCMC and other Monte Carlo Methods", 2020). A kernel needs not have converged for this,
or ever to converge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor

from mlcollage._checks import integer
from mlcollage.errors import InvalidInput
from mlcollage.infer.chains import Chains
from mlcollage.infer.density import Generator, torch_generator
from mlcollage.stats.adaptive import holm
from mlcollage.stats.simulation import sbc_ranks

Floats = npt.NDArray[np.float64]
Quantity = Callable[[Tensor, Any], Tensor]


def sbc(
    prior: Callable[[int, torch.Generator], Tensor],
    simulate: Callable[[Tensor, torch.Generator], Any],
    fit: Callable[[Any, int, torch.Generator], Tensor | Chains],
    quantities: Mapping[str, Quantity],
    n_sims: int = 600,
    n_ranks: int = 100,
    generator: Generator = 0,
) -> dict[str, npt.NDArray[np.int64]]:
    r"""Ranks of true quantities among their posterior draws.

    .. math:: r_i = \#\{l : f(\theta_{il}, y_i) < f(\theta_i, y_i)\}, \quad \text{ties broken at random.}

    Parameters
    ----------
    prior
        ``prior(n_sims, generator)``: true parameters, (n_sims, dim).
    simulate
        ``simulate(theta, generator)``: a data set for each row, in any form that ``fit`` and ``quantities`` take.
    fit
        ``fit(data, L, generator)``: posterior draws (n_sims, draws, dim) for each data set, or
        :class:`~mlcollage.infer.chains.Chains`, in the coordinates of ``prior``. They should be nearly independent
        (thin them in the sampler); more than L draws are thinned evenly.
    quantities
        Name to ``f(theta, data)``: (n_sims, dim) and the data to (n_sims,). Rank every parameter, and the
        log-likelihood: a wrong prior or a missing Jacobian often leaves single parameters uniform.
    n_sims, n_ranks
        Simulated data sets, and possible ranks, L + 1: the truth is ranked among L = ``n_ranks - 1`` draws. A number
        with many divisors bins well.
    generator
        A torch.Generator, or a seed.

    Returns
    -------
    dict of str to ndarray
        For each quantity its ranks, (n_sims,), integers from 0 to ``n_ranks - 1``.

    Raises
    ------
    InvalidInput
        If prior, fit or a quantity returns another shape than promised, too few draws, or values that are not finite.

    Examples
    --------
    A normal mean with prior N(0, 1) and one observation; its posterior is N(y/2, 1/2).

    >>> def fit(y, draws, generator):
    ...     return y[:, None] / 2 + 0.5**0.5 * torch.randn(len(y), draws, 1, generator=generator)
    >>> ranks = sbc(
    ...     prior=lambda n, generator: torch.randn(n, 1, generator=generator),
    ...     simulate=lambda theta, generator: theta + torch.randn(theta.shape, generator=generator),
    ...     fit=fit,
    ...     quantities={"mu": lambda theta, y: theta[:, 0]},
    ...     n_sims=500,
    ... )
    >>> bool(abs(ranks["mu"].mean() - 49.5) < 5)
    True
    """
    integer("n_sims", n_sims, least=1), integer("n_ranks", n_ranks, least=2)
    if not quantities:
        raise InvalidInput("quantities is empty; name at least one function of (theta, data) to rank.")
    generator = torch_generator(generator)
    # true parameters (n_sims, dim), a data set for each, and the posterior's draws (n_sims, draws, dim)
    theta = _parameters("prior", prior(n_sims, generator), n_sims)
    data = simulate(theta, generator)
    kept = n_ranks - 1
    fitted = fit(data, kept, generator)
    draws = fitted.draws if isinstance(fitted, Chains) else fitted
    if draws.ndim != 3 or (len(draws), draws.shape[2]) != theta.shape or draws.shape[1] < kept:
        raise InvalidInput(
            f"fit returned draws of shape {tuple(draws.shape)}; ({n_sims}, at least {kept}, {theta.shape[1]}) is "
            "needed."
        )
    every = draws.shape[1] // kept  # keep the last of every so many
    draws = draws[:, every - 1 : every * kept : every]
    return {name: _ranks(name, f, theta, draws, data, generator) for name, f in quantities.items()}


def _ranks(
    name: str, quantity: Quantity, theta: Tensor, draws: Tensor, data: Any, generator: torch.Generator
) -> npt.NDArray[np.int64]:
    """Ranks of one quantity, (n_sims,); ``draws`` (n_sims, kept, dim)."""
    truth = _value(name, quantity, theta, data)
    values = np.stack([_value(name, quantity, draws[:, i], data) for i in range(draws.shape[1])], axis=1)
    for_ties = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return sbc_ranks(truth, values, rng=for_ties)[:, 0]


@dataclass(frozen=True)
class GewekeResult:
    """How far q quantities after the kernel's steps are from fresh draws of the joint distribution.

    Attributes
    ----------
    names : tuple of str
        Of the quantities.
    z : ndarray
        (q,), difference of the means in standard errors: Geweke's statistic. Positive where the kernel's are higher.
    z_p_values : ndarray
        (q,), two-sided.
    p_values : ndarray
        (q,), of the two-sample Kolmogorov-Smirnov test, which sees more than the mean.
    """

    names: tuple[str, ...]
    z: Floats
    z_p_values: Floats
    p_values: Floats

    def passed(self, alpha: float = 0.01) -> bool:
        """Whether no test rejects at ``alpha`` after Holm's correction over both tests of all quantities."""
        return bool((holm(np.concatenate([self.p_values, self.z_p_values])) > alpha).all())

    def __str__(self) -> str:
        rows = zip(self.names, self.z, self.p_values, strict=True)
        return "\n".join(f"{name}: z = {z:+.1f}, KS p = {p:.2g}" for name, z, p in rows)


def geweke(
    prior: Callable[[int, torch.Generator], Tensor],
    simulate: Callable[[Tensor, torch.Generator], Any],
    transition: Callable[[Tensor, Any, torch.Generator], Tensor],
    quantities: Mapping[str, Quantity] | None = None,
    *,
    n_chains: int = 2000,
    n_steps: int = 20,
    generator: Generator = 0,
) -> GewekeResult:
    r"""Compare what a kernel does to the joint distribution of parameters and data with that distribution.

    Parameters
    ----------
    prior
        ``prior(n, generator)``: parameters, (n, dim).
    simulate
        ``simulate(theta, generator)``: a data set for each row, in any form that the others take.
    transition
        ``transition(theta, data, generator)``: one step of the kernel from each row of ``theta``, given the data set of
        that row, (n, dim). For samplers with settings, settings that are fixed: what adapts while it runs is not
        tested by this, nor exact.
    quantities
        Name to ``f(theta, data)``, (n, dim) and the data to (n,). By default each parameter and its square. Add the
        log-likelihood: it sees what single parameters do not.
    n_chains
        Independent chains; errors are found at about 3 / sqrt(n_chains) standard deviations and beyond.
    n_steps
        Steps of each chain: enough for a wrong kernel to lead away.
    generator
        A torch.Generator, or a seed.

    Returns
    -------
    GewekeResult

    Raises
    ------
    InvalidInput
        If a function returns another shape than promised or values that are not finite.

    Examples
    --------
    A normal mean with prior N(0, 1), one observation, and the exact draw from its posterior N(y/2, 1/2); then one that
    forgets the root.

    >>> def normal(mean, variance):
    ...     return lambda theta, y, g: mean(y) + variance * torch.randn(theta.shape, generator=g)
    >>> def test(variance):
    ...     return geweke(
    ...         prior=lambda n, g: torch.randn(n, 1, generator=g),
    ...         simulate=lambda theta, g: theta + torch.randn(theta.shape, generator=g),
    ...         transition=normal(lambda y: y / 2, variance),
    ...     )
    >>> test(0.5**0.5).passed(), test(0.5).passed()
    (True, False)
    """
    integer("n_chains", n_chains, least=10), integer("n_steps", n_steps, least=1)
    if quantities is not None and not quantities:
        raise InvalidInput("quantities is empty; name at least one function of (theta, data), or leave it out.")
    generator = torch_generator(generator)
    # two independent samples of the joint distribution, of which one goes through the kernel
    fresh = _parameters("prior", prior(n_chains, generator), n_chains)
    fresh_data = simulate(fresh, generator)
    theta = _parameters("prior", prior(n_chains, generator), n_chains, fresh.shape[1])
    data = simulate(theta, generator)
    for _ in range(n_steps):  # the kernel, then new data given where it went
        theta = _parameters("transition", transition(theta, data, generator), n_chains, fresh.shape[1])
        data = simulate(theta, generator)
    chosen = _moments(fresh.shape[1]) if quantities is None else quantities
    there = {name: _value(name, f, fresh, fresh_data) for name, f in chosen.items()}
    here = {name: _value(name, f, theta, data) for name, f in chosen.items()}
    return _compare(here, there)


def _compare(here: Mapping[str, Floats], there: Mapping[str, Floats]) -> GewekeResult:
    z = np.array([_z(here[name], there[name]) for name in here])
    p = np.array([stats.ks_2samp(here[name], there[name]).pvalue for name in here])
    return GewekeResult(tuple(here), z, np.asarray(2 * stats.norm.sf(np.abs(z))), p)


def _z(a: Floats, b: Floats) -> float:
    spread = float(np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a)))
    difference = float(a.mean() - b.mean())
    return difference / spread if spread > 0 else 0.0 if difference == 0 else float(np.copysign(np.inf, difference))


def _moments(dim: int) -> dict[str, Quantity]:
    def power(i: int, k: int) -> Quantity:
        return lambda theta, data: theta[:, i] ** k

    return {f"theta_{i + 1}{'' if k == 1 else '^2'}": power(i, k) for k in (1, 2) for i in range(dim)}


def _parameters(what: str, theta: Tensor, n: int, dim: int | None = None) -> Tensor:
    """Parameters as a user's function returned them, (n, dim), checked."""
    if theta.ndim != 2 or len(theta) != n or (dim is not None and theta.shape[1] != dim):
        wanted = f"({n}, {'dim' if dim is None else dim})"
        raise InvalidInput(f"{what} returned shape {tuple(theta.shape)}; {wanted} is needed.")
    if not bool(theta.isfinite().all()):
        raise InvalidInput(f"{what} returned parameters that are not finite.")
    return theta


def _value(name: str, quantity: Quantity, theta: Tensor, data: Any) -> Floats:
    """A quantity of each row, (n,), checked."""
    value = quantity(theta, data)
    if value.shape != (len(theta),):
        raise InvalidInput(f"quantity {name!r} returned shape {tuple(value.shape)}; ({len(theta)},) is needed.")
    if not bool(value.isfinite().all()):
        raise InvalidInput(f"quantity {name!r} is not finite for some draw; it cannot be compared.")
    return value.detach().cpu().double().numpy()
