r"""Geweke's joint-distribution test: does a transition leave the posterior of its model as it is?

Draw :math:`\theta_0 \sim p(\theta)` and :math:`y_0 \sim p(y \mid \theta_0)`: a draw of the joint distribution. Then
alternate

.. math:: \theta_{t+1} \sim K(\theta \mid \theta_t, y_t), \qquad y_{t+1} \sim p(y \mid \theta_{t+1}).

If the kernel K leaves :math:`p(\theta \mid y)` invariant, :math:`(\theta_t, y_t)` is a draw of the joint distribution
at every t; if it samples anything else, or the model it samples is not the one that was simulated, the pairs drift away
from it. J. Geweke, "Getting It Right: Joint Distribution Tests of Posterior Simulators", JASA 2004.

Many independent chains run side by side, one per row, and their last states are compared with fresh draws of the joint
distribution: two independent samples, so that the p-values are exact, without an estimate of autocorrelation (A. Gandy
and J. Scott, "Unit Testing for MCMC and other Monte Carlo Methods", 2020). A kernel needs not have converged for this,
or ever to converge. :func:`mlcollage.infer.sbc.sbc` asks the other question, whether a whole run arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.infer.density import Generator, torch_generator
from mlcollage.stats.adaptive import holm

__all__ = ["GewekeResult", "geweke"]

Floats = npt.NDArray[np.float64]
Quantity = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class GewekeResult:
    """Result of :func:`geweke`; q quantities.

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
    for name, value, least in (("n_chains", n_chains, 10), ("n_steps", n_steps, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidInput(f"{name}={value!r} must be an integer of at least {least}.")
    if quantities is not None and not quantities:
        raise InvalidInput("quantities is empty; name at least one function of (theta, data), or leave it out.")
    generator = torch_generator(generator)
    fresh = _parameters("prior", prior(n_chains, generator), n_chains, None)
    fresh_data = simulate(fresh, generator)
    theta = _parameters("prior", prior(n_chains, generator), n_chains, fresh.shape[1])
    data = simulate(theta, generator)
    for _ in range(n_steps):
        theta = _parameters("transition", transition(theta, data, generator), n_chains, fresh.shape[1])
        data = simulate(theta, generator)
    chosen = _moments(fresh.shape[1]) if quantities is None else quantities
    there = {name: _value(name, f, fresh, fresh_data) for name, f in chosen.items()}
    here = {name: _value(name, f, theta, data) for name, f in chosen.items()}
    return _compare(here, there)


def _compare(here: Mapping[str, Floats], there: Mapping[str, Floats]) -> GewekeResult:
    from scipy import stats

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


def _parameters(what: str, theta: Tensor, n: int, dim: int | None) -> Tensor:
    wanted = f"({n}, {'dim' if dim is None else dim})"
    if theta.ndim != 2 or len(theta) != n or (dim is not None and theta.shape[1] != dim):
        raise InvalidInput(f"{what} returned shape {tuple(theta.shape)}; {wanted} is needed.")
    if not bool(theta.isfinite().all()):
        raise InvalidInput(f"{what} returned parameters that are not finite.")
    return theta


def _value(name: str, quantity: Quantity, theta: Tensor, data: Any) -> Floats:
    value = quantity(theta, data)
    if value.shape != (len(theta),):
        raise InvalidInput(f"quantity {name!r} returned shape {tuple(value.shape)}; ({len(theta)},) is needed.")
    if not bool(value.isfinite().all()):
        raise InvalidInput(f"quantity {name!r} is not finite for some draw; it cannot be compared.")
    return value.detach().cpu().double().numpy()
