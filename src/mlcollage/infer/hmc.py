r"""Hamiltonian Monte Carlo with chains as the leading dimension: one batched computation for all of them.

With momentum :math:`p \sim N(0, M)` and :math:`H(q, p) = -\log \pi(q)/T + \frac{1}{2} p^\top M^{-1} p`, an iteration
takes L leapfrog steps

.. math::
    p \leftarrow p + \frac{\epsilon}{2} \nabla \log \pi(q)/T, \quad
    q \leftarrow q + \epsilon M^{-1} p, \quad
    p \leftarrow p + \frac{\epsilon}{2} \nabla \log \pi(q)/T

and accepts where they end with probability :math:`\min(1, e^{-\Delta H})`; a rejected step repeats the old state.
Neighboring half-kicks are merged, so an iteration costs L gradients. R. M. Neal, "MCMC using Hamiltonian dynamics",
2011; P. Izmailov et al., "What Are Bayesian Neural Network Posteriors Really Like?", ICML 2021, section 3.

:func:`sample` does a whole run. :func:`build` (or :func:`init` and :func:`update`) gives one iteration over explicit
state, to drive step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlcollage._checks import integer, positive, real
from mlcollage.errors import InvalidInput
from mlcollage.infer._run import (
    DIVERGENCE,
    Mass,
    Progress,
    RunSettings,
    Store,
    check_mass,
    check_step_size,
    draw_momentum,
    kinetic,
    run,
)
from mlcollage.infer.chains import Chains, Info
from mlcollage.infer.density import Generator, LogDensity, LogProb, State, start, torch_generator

Steps = int | tuple[int, int]  # a number, or (least, most)
_MOST_STEPS = 1_000_000  # of one trajectory: beyond it a step size or a length is wrong


class Sampler(NamedTuple):
    """One iteration of a sampler over explicit state.

    Attributes
    ----------
    init
        ``init(position) -> State``, with the checks of a run's start.
    update
        ``update(state, generator) -> (State, Info)``.
    """

    init: Callable[[Tensor], State]
    update: Callable[[State, torch.Generator], tuple[State, Info]]


def prior_period(scale: float, temperature: float = 1.0) -> float:
    r"""Length after which draws from a Gaussian prior are independent: a quarter of the trajectory's period.

    .. math:: \tau = \frac{\pi}{2} \, s \, \sqrt T

    For the density :math:`N(0, s^2 I)` and unit mass a trajectory of this length ends at a draw that is independent of
    its start. Izmailov et al. 2021, section 3.

    Parameters
    ----------
    scale
        Standard deviation :math:`s > 0` of an isotropic Gaussian prior.
    temperature
        :math:`T > 0`.

    Examples
    --------
    >>> round(prior_period((1 / 5) ** 0.5), 4)
    0.7025
    """
    return math.pi / 2 * positive("scale", scale) * math.sqrt(positive("temperature", temperature))


def init(position: Tensor, log_prob: LogProb | LogDensity) -> State:
    """The state at ``position`` (chains, dim), checked: right shapes, finite log-density and gradient.

    Raises
    ------
    InvalidInput
        Naming the chains that start where the density or its gradient is not finite.
    """
    return start(LogDensity.of(log_prob), position)


def leapfrog(
    state: State,
    momentum: Tensor,
    log_prob: LogProb | LogDensity,
    *,
    step_size: float | Tensor,
    steps: int,
    mass: Tensor | None = None,
) -> tuple[State, Tensor]:
    """L leapfrog steps: where all chains end, and with what momentum.

    Reversible (negate the momentum, go again, be back) and volume preserving; the energy error is of order
    ``step_size ** 2``.

    Parameters
    ----------
    state
        Where to begin.
    momentum
        (chains, dim).
    log_prob
        See :mod:`mlcollage.infer.density`.
    step_size
        One number, or one per chain, (chains,).
    steps
        L, at least 1.
    mass
        Diagonal, (dim,) or (groups, dim); None for the identity.

    Examples
    --------
    >>> density = LogDensity(lambda x: -0.5 * x.square().sum(dim=1))
    >>> begin = init(torch.tensor([[1.0]], dtype=torch.float64), density)
    >>> end, p = leapfrog(begin, torch.zeros(1, 1, dtype=torch.float64), density, step_size=0.01, steps=157)
    >>> round(float(end.position), 2), round(float(p), 2)  # a quarter turn
    (0.0, -1.0)
    """
    density = LogDensity.of(log_prob)
    # step sizes as (groups, 1), beside positions, momenta and gradients (chains, dim)
    eps = torch.as_tensor(step_size, dtype=state.position.dtype, device=state.position.device).reshape(-1, 1)
    drift = eps if mass is None else eps / mass  # (groups, 1) or (groups, dim)
    p = torch.addcmul(momentum, eps, state.gradient, value=0.5)  # the first half-kick, out of place
    q = torch.addcmul(state.position, drift, p)
    for _ in range(steps - 1):  # neighboring half-kicks as one; in place from here on, and no values
        p.addcmul_(eps, density.gradient(q))
        q.addcmul_(drift, p)
    value, gradient = density(q)
    p.addcmul_(eps, gradient, value=0.5)
    return State(q, value, gradient), p


def update(
    state: State,
    log_prob: LogProb | LogDensity,
    *,
    step_size: float | Tensor,
    steps: int,
    mass: Tensor | None = None,
    metropolis: bool = True,
    generator: torch.Generator,
) -> tuple[State, Info]:
    r"""One iteration of all chains: fresh momentum, L leapfrog steps, Metropolis test.

    The energy difference is taken in float64 and the kinetic part element by element,
    :math:`\frac{1}{2} \sum (p' - p)(p' + p) / M`, so that it keeps its digits where the energies themselves are large.

    Parameters
    ----------
    state
        From :func:`init` or the update before.
    log_prob
        The same function as the state was made with.
    step_size
        One number, or one per chain.
    steps
        L.
    mass
        Diagonal, (dim,) or (groups, dim); None for the identity.
    metropolis
        If False, every proposal of finite energy is accepted (the paper's burn-in; biased).
    generator
        On the chains' device.

    Returns
    -------
    State, Info
        Where a chain rejected, its state is the old one.
    """
    p0 = draw_momentum(state.position, mass, generator)
    end, p1 = leapfrog(state, p0, log_prob, step_size=step_size, steps=steps, mass=mass)
    return _accept(state, p0, end, p1, mass, steps, metropolis, generator)


def _accept(
    old: State,
    p0: Tensor,
    new: State,
    p1: Tensor,
    mass: Tensor | None,
    steps: int,
    metropolis: bool,
    generator: torch.Generator,
) -> tuple[State, Info]:
    # change of the kinetic energy, element by element, which keeps its digits; everything below is (chains,)
    change = (p1.double() - p0.double()) * (p1.double() + p0.double())
    change = 0.5 * (change if mass is None else change / mass).sum(dim=1)
    # a trajectory that left the range of numbers has an infinite error, and is rejected
    error = (change - (new.log_prob.double() - old.log_prob.double())).nan_to_num(nan=math.inf, neginf=math.inf)
    accept = (-error).clamp(max=0).exp()
    # drawn also where it is not used, so that the stream of numbers does not depend on the setting
    chance = torch.rand(accept.shape, dtype=accept.dtype, device=accept.device, generator=generator)
    accepted = chance < accept if metropolis else error.isfinite()
    before = kinetic(p0, mass) - old.log_prob.double()
    info = Info(
        accept=accept,
        accepted=accepted,
        energy=torch.where(accepted, before + error, before),
        error=error,
        diverging=error > DIVERGENCE,
        steps=torch.full_like(accepted, steps, dtype=torch.int64),
    )
    return new.where(accepted, old), info


def build(
    log_prob: LogProb,
    *,
    step_size: float | Tensor,
    steps: int,
    mass: Tensor | None = None,
    temperature: float = 1.0,
    metropolis: bool = True,
) -> Sampler:
    """HMC with fixed settings, as a pair of functions over explicit state.

    Parameters
    ----------
    log_prob, step_size, steps, mass, metropolis
        See :func:`update`.
    temperature
        Samples ``log_prob / temperature``.

    Examples
    --------
    >>> sampler = build(lambda x: -0.5 * x.square().sum(dim=1), step_size=0.5, steps=5)
    >>> state, generator = sampler.init(torch.zeros(8, 3)), torch.Generator().manual_seed(0)
    >>> for _ in range(10):
    ...     state, info = sampler.update(state, generator)
    >>> state.position.shape, bool(info.accept.mean() > 0.8)
    (torch.Size([8, 3]), True)
    """
    density = LogDensity(log_prob, temperature)
    low, high = _steps_range(steps)
    if low != high:
        raise InvalidInput("build takes one number of steps; to jitter it, call update with another number each time.")

    def start_at(position: Tensor) -> State:
        # settings can be checked only once the shape of the chains is known
        state = start(density, position)
        check_step_size(step_size, state.position)
        check_mass(mass, state.position)
        return state

    def advance(state: State, generator: torch.Generator) -> tuple[State, Info]:
        return update(
            state, density, step_size=step_size, steps=low, mass=mass, metropolis=metropolis, generator=generator
        )

    return Sampler(start_at, advance)


def sample(
    log_prob: LogProb,
    init: Tensor | Any,
    *,
    draws: int = 1000,
    warmup: int = 500,
    steps: Steps | None = None,
    trajectory: float | None = None,
    jitter: float = 0.0,
    step_size: float | Tensor | None = None,
    target_accept: float = 0.8,
    mass: Mass = "diagonal",
    temperature: float = 1.0,
    metropolis_burn_in: bool = True,
    pooled: bool = True,
    thin: int = 1,
    store: Store | None = None,
    generator: Generator = 0,
    progress: Progress | None = None,
) -> Chains:
    r"""Warm up, then draw from a density with as many chains as ``init`` has rows.

    Parameters
    ----------
    log_prob
        Positions (chains, dim) to log-densities (chains,), or to a pair with the gradient; see
        :mod:`mlcollage.infer.density`.
    init
        Where the chains start, (chains, dim): a tensor of float64 (or float32), or an array, which becomes float64.
    draws, warmup
        Kept draws of each chain, and iterations before them.
    steps
        Leapfrog steps: a number, or (least, most) for a uniform draw each iteration, shared by all chains. By
        default (3, 9): with an adapted step size and mass, about one standard deviation's quarter period up to a
        whole one. Jitter avoids the resonances of a fixed length.
    trajectory
        Instead of ``steps``, the length :math:`\tau = \epsilon L`; takes :math:`L = \lceil \tau / \epsilon \rceil`.
        See :func:`prior_period` for the rule of Izmailov et al. Lengths are in units of :math:`\sqrt M`, so combine
        it with ``mass=None`` for that rule.
    jitter
        Relative width of a uniform jitter of the step size, in [0, 1); drawn for each chain and iteration.
    step_size
        One number, or one per chain, kept throughout; None adapts it to ``target_accept`` by dual averaging during
        warm-up and then holds it fixed.
    target_accept
        Acceptance that adaptation aims at.
    mass
        ``"diagonal"`` learns one over the variance in doubling windows of warm-up; None is the identity; a tensor
        (dim,) is used as it is.
    temperature
        Samples ``log_prob / temperature``.
    metropolis_burn_in
        If False, warm-up accepts every proposal of finite energy, as Izmailov et al. do to leave the initialization.
    pooled
        True: all chains sample one density, and step size and mass are learned from all of them. False: each chain
        has a density of its own (e.g. its own simulated data set) and learns for itself.
    thin
        Iterations per kept draw.
    store
        What to keep of a position, e.g. predictions: (chains, dim) to (chains, ...). By default the position. A
        function that returns None keeps nothing: ``store=stream.update`` feeds a
        :class:`~mlcollage.infer.diagnostics.Streaming` instead.
    generator
        A torch.Generator on the chains' device, or a seed. The same seed gives the same draws.
    progress
        Called as ``progress(iterations done, iterations in all)``.

    Returns
    -------
    Chains

    Raises
    ------
    InvalidInput
        For shapes, starts or settings that cannot work.

    Examples
    --------
    Two correlated Gaussians of very different scale:

    >>> covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64) * torch.tensor([[1.0, 10], [10, 100]])
    >>> precision = torch.linalg.inv(covariance)
    >>> chains = sample(lambda x: -0.5 * ((x @ precision) * x).sum(dim=1), torch.zeros(32, 2, dtype=torch.float64),
    ...                  draws=200, warmup=200, generator=1)
    >>> chains.draws.shape
    torch.Size([32, 200, 2])
    >>> torch.cov(chains.draws.reshape(-1, 2).T).round().tolist()
    [[1.0, 9.0], [9.0, 99.0]]
    """
    density = LogDensity(log_prob, temperature)
    plan = RunSettings(draws, warmup, thin, step_size, target_accept, mass, pooled, progress)
    real("jitter", jitter, least=0, below=1)
    state = start(density, init)
    generator = torch_generator(generator, state.position.device)
    count = _counts(steps, trajectory, warmup + draws * thin, pooled, generator)

    def transition(state: State, step: Tensor, mass: Tensor | None, at: int, warming: bool) -> tuple[State, Info]:
        n = count(at, step)
        if jitter:  # makes the step sizes (groups,) one per chain
            noise = torch.rand(len(state.position), dtype=step.dtype, device=step.device, generator=generator)
            step = step * (1 + jitter * (2 * noise - 1))
        metropolis = metropolis_burn_in or not warming
        return update(state, density, step_size=step, steps=n, mass=mass, metropolis=metropolis, generator=generator)

    return run(density, state, transition, plan, store, generator)


def _steps_range(steps: Steps) -> tuple[int, int]:
    pair = steps if isinstance(steps, tuple) else (steps, steps)
    if len(pair) != 2:
        raise InvalidInput(f"steps={steps!r} must be a whole number or a pair (least, most) of them.")
    low = integer("steps", pair[0], least=1, most=_MOST_STEPS)
    return low, integer("the most steps", pair[1], least=low, most=_MOST_STEPS)


def _counts(
    steps: Steps | None, trajectory: float | None, iterations: int, pooled: bool, generator: torch.Generator
) -> Callable[[int, Tensor], int]:
    """Number of leapfrog steps at an iteration, given the step size."""
    if steps is not None and trajectory is not None:
        raise InvalidInput("give either steps or trajectory: the one follows from the other by the step size.")
    if trajectory is None:
        low, high = _steps_range((3, 9) if steps is None else steps)
        # drawn beforehand, since reading one number from a device in each iteration would wait for it
        drawn = torch.randint(low, high + 1, (iterations,), generator=generator, device=generator.device).tolist()
        return lambda at, step: drawn[at]
    positive("trajectory", trajectory)
    if not pooled:
        raise InvalidInput("trajectory needs pooled=True, since all chains take the same number of steps; give steps.")

    def by_length(at: int, step: Tensor) -> int:
        n = math.ceil(trajectory / float(step.max()) - 1e-9)  # a length that is a whole number of steps stays one
        if n > _MOST_STEPS:
            raise InvalidInput(
                f"a trajectory of {trajectory} takes {n:,} steps of {float(step.max()):.3g}; shorten it, or check the "
                "scale of the parameters."
            )
        return max(n, 1)

    return by_length
