r"""The eight schools: the model on which samplers, pooling and calibration are tried, with three bugs to put into it.

.. math:: y_j \sim \mathrm{N}(\theta_j, s_j^2), \qquad \theta_j = \mu + \tau z_j, \qquad z_j \sim \mathrm{N}(0, 1),
    \qquad \mu \sim \mathrm{N}(0, 5^2), \qquad \tau \sim \text{half-normal}(5).

Positions hold :math:`(\mu, \log \tau, z_1, \dots, z_8)`, or :math:`\theta` in place of z in the centered form. D. B.
Rubin, Journal of Educational Statistics 1981.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from mlcollage.infer import Unhealthy, hmc

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
SCALE = 5.0
MUTANTS = ("no_jacobian", "wrong_prior", "no_metropolis")
QUANTITIES = ("mu", "tau", "theta", "log_likelihood")

Density = Callable[[Tensor], tuple[Tensor, Tensor]]
Fit = Callable[[Tensor, int, torch.Generator], Tensor]


def non_centered(y: Tensor, s: Tensor, *, jacobian: float = 1.0, tau_scale: float = SCALE) -> Density:
    """Log-density and gradient over (mu, log tau, z), shapes (chains,) and (chains, 10).

    ``jacobian=0`` forgets the Jacobian of log tau and ``tau_scale`` is the prior's scale: two bugs to be caught. ``y``
    is (8,), or (chains, 8) with a data set a chain; ``s`` is (8,).
    """

    def density(x: Tensor) -> tuple[Tensor, Tensor]:
        mu, tau, z = x[:, :1], x[:, 1:2].exp(), x[:, 2:]  # (chains, 1), (chains, 1), (chains, 8)
        residual, k = (y - mu - tau * z) / s, (tau / tau_scale) ** 2
        value = (-0.5 * (mu / SCALE) ** 2 - 0.5 * k + jacobian * x[:, 1:2])[:, 0]
        # the gradient by hand: of the likelihood through theta, and of the priors
        pull = residual / s
        by_mu = pull.sum(1, keepdim=True) - mu / SCALE**2
        by_log_tau = jacobian - k + tau * (pull * z).sum(1, keepdim=True)
        gradient = torch.cat([by_mu, by_log_tau, tau * pull - z], dim=1)
        return value - 0.5 * (z.square() + residual.square()).sum(1), gradient

    return density


def centered(y: Tensor, s: Tensor) -> Density:
    """Log-density and gradient over (mu, log tau, theta): the same posterior, whose funnel samplers stick in."""

    def density(x: Tensor) -> tuple[Tensor, Tensor]:
        mu, tau, theta = x[:, :1], x[:, 1:2].exp(), x[:, 2:]
        # distances from the mean and from the data, in standard deviations, (chains, 8); the half-normal's exponent
        away, residual, k = (theta - mu) / tau, (y - theta) / s, (tau / SCALE) ** 2
        groups = theta.shape[1]
        value = (-0.5 * (mu / SCALE) ** 2 - 0.5 * k + (1 - groups) * x[:, 1:2])[:, 0]
        by_mu = (away / tau).sum(1, keepdim=True) - mu / SCALE**2
        by_log_tau = 1 - groups - k + away.square().sum(1, keepdim=True)
        gradient = torch.cat([by_mu, by_log_tau, residual / s - away / tau], dim=1)
        return value - 0.5 * (away.square() + residual.square()).sum(1), gradient

    return density


def prior(n: int, generator: torch.Generator) -> Tensor:
    """Draws of (mu, log tau, z) from the prior, (n, 10)."""
    x = torch.randn(n, 10, dtype=torch.float64, generator=generator)
    return torch.cat([SCALE * x[:, :1], (SCALE * x[:, 1:2].abs()).log(), x[:, 2:]], dim=1)


def effects(x: Tensor) -> Tensor:
    """The schools' effects theta of non-centered positions, (n, 8)."""
    return x[:, :1] + x[:, 1:2].exp() * x[:, 2:]


def simulator(s: Tensor) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Data sets (n, 8) given positions, with errors ``s``."""

    def simulate(x: Tensor, generator: torch.Generator) -> Tensor:
        theta = effects(x)
        return theta + s * torch.randn(theta.shape, dtype=theta.dtype, generator=generator)

    return simulate


def by_sampler(s: Tensor, *, warmup: int, thin: int, mutant: str = "") -> Fit:
    """A function that fits many data sets as one batch, by the sampler as it is or with a bug.

    ``mutant`` is ``no_jacobian``, ``wrong_prior``, ``no_metropolis``, or empty for the correct sampler.
    """
    bugs: dict[str, dict[str, float]] = {"no_jacobian": {"jacobian": 0.0}, "wrong_prior": {"tau_scale": 2 * SCALE}}

    def fit(y: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        start = 0.5 * torch.randn(len(y), 10, dtype=torch.float64, generator=generator)
        if mutant == "no_metropolis":
            return _without_metropolis(non_centered(y, s), start, draws, thin, generator)
        density = non_centered(y, s, **bugs.get(mutant, {}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Unhealthy)  # what the ranks of calibration find out
            return hmc.sample(
                density, start, draws=draws, warmup=warmup, thin=thin, steps=(3, 7), pooled=False, generator=generator
            ).draws

    return fit


def _without_metropolis(density: Density, start: Tensor, draws: int, thin: int, generator: torch.Generator) -> Tensor:
    """A sampler whose author forgot to reject, at a step size where that matters."""
    sampler = hmc.build(density, step_size=0.9, steps=4, metropolis=False)
    state, kept = sampler.init(start), []
    for i in range(draws * thin):
        state, _ = sampler.update(state, generator)
        if i % thin == thin - 1:  # the last of every so many
            kept.append(state.position)
    return torch.stack(kept, dim=1)


def _log_likelihood(s: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: -0.5 * ((y - effects(x)) / s).square().sum(1)


def quantities(s: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is ranked: a bug that leaves one of these uniform shows in another."""
    return {
        "mu": lambda x, y: x[:, 0],
        "tau": lambda x, y: x[:, 1].exp(),
        "theta": lambda x, y: effects(x)[:, 0],
        "log_likelihood": _log_likelihood(s),
    }
