r"""Simulation-based calibration: does a sampler, with its model, give the posterior it claims to give?

Draw :math:`\theta_i \sim p(\theta)`, data :math:`y_i \sim p(y \mid \theta_i)`, and L posterior draws
:math:`\theta_{i1}, \dots, \theta_{iL}`. If all is right, the rank of each :math:`f(\theta_i, y_i)` among
:math:`f(\theta_{i1}, y_i), \dots` is uniform on 0..L, for every quantity f. S. Talts et al., "Validating Bayesian
Inference Algorithms with Simulation-Based Calibration", 2018; M. Modrák et al., "Simulation-Based Calibration Checking
for Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity", Bayesian Analysis 2023.

All simulated data sets are fitted as one batch: a chain of :func:`mlcollage.infer.hmc.sample` each, with
``pooled=False``, so that hundreds of fits take seconds. :func:`mlcollage.stats.simulation.sbc_uniformity` judges the
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.infer.chains import Chains
from mlcollage.infer.density import Generator, torch_generator
from mlcollage.stats.simulation import sbc_ranks

__all__ = ["sbc"]

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
    for name, value, least in (("n_sims", n_sims, 1), ("n_ranks", n_ranks, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidInput(f"{name}={value!r} must be an integer of at least {least}.")
    if not quantities:
        raise InvalidInput("quantities is empty; name at least one function of (theta, data) to rank.")
    generator = torch_generator(generator)
    theta = prior(n_sims, generator)
    if theta.ndim != 2 or len(theta) != n_sims:
        raise InvalidInput(f"prior returned shape {tuple(theta.shape)}; ({n_sims}, dim) is needed.")
    data = simulate(theta, generator)
    kept = n_ranks - 1
    fitted = fit(data, kept, generator)
    draws = fitted.draws if isinstance(fitted, Chains) else fitted
    if draws.ndim != 3 or (len(draws), draws.shape[2]) != theta.shape or draws.shape[1] < kept:
        raise InvalidInput(
            f"fit returned draws of shape {tuple(draws.shape)}; ({n_sims}, at least {kept}, {theta.shape[1]}) is "
            "needed."
        )
    every = draws.shape[1] // kept
    draws = draws[:, every - 1 : every * kept : every]
    return {name: _ranks(name, f, theta, draws, data, generator) for name, f in quantities.items()}


def _ranks(
    name: str, quantity: Quantity, theta: Tensor, draws: Tensor, data: Any, generator: torch.Generator
) -> npt.NDArray[np.int64]:
    truth = _value(name, quantity, theta, data)
    values = torch.stack([_value(name, quantity, draws[:, i], data) for i in range(draws.shape[1])], dim=1)
    for_ties = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return sbc_ranks(truth.cpu().numpy(), values.cpu().numpy(), rng=for_ties)[:, 0]


def _value(name: str, quantity: Quantity, theta: Tensor, data: Any) -> Tensor:
    value = quantity(theta, data)
    if value.shape != (len(theta),):
        raise InvalidInput(f"quantity {name!r} returned shape {tuple(value.shape)}; ({len(theta)},) is needed.")
    if not bool(value.isfinite().all()):
        raise InvalidInput(f"quantity {name!r} is not finite for some draw; it cannot be ranked.")
    return value
