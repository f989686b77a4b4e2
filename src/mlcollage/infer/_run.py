"""The loop that HMC and NUTS share: find a step size, warm up, draw."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlcollage._checks import choice, integer, probability
from mlcollage.errors import InvalidInput
from mlcollage.infer.adaptation import DualAveraging, RunningVariance, mass_windows
from mlcollage.infer.chains import Chains, Info
from mlcollage.infer.density import LogDensity, State, normal

_STUCK = 0.05  # mean acceptance below which a run is warned of
DIVERGENCE = 1000.0  # energy error beyond which a trajectory has left the level set, as in Stan

Mass = Literal["diagonal"] | Tensor | None  # learned, given, or the identity
Progress = Callable[[int, int], None]  # iterations done, and in all
Store = Callable[[Tensor], Tensor | None]  # what is kept of positions (chains, dim)
# (state, step size (groups,), mass (groups, dim) or None, iteration, whether in warm-up) to the next state
Transition = Callable[[State, Tensor, Tensor | None, int, bool], tuple[State, Info]]


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run that do not depend on the kernel."""

    draws: int
    warmup: int
    thin: int
    step_size: float | Tensor | None
    target_accept: float
    mass: Mass
    pooled: bool
    progress: Progress | None

    def __post_init__(self) -> None:
        (
            integer("draws", self.draws, least=1),
            integer("warmup", self.warmup, least=0),
            integer("thin", self.thin, least=1),
        )
        probability("target_accept", self.target_accept)
        if isinstance(self.mass, str):  # a tensor is checked where the chains' shape is known
            choice("mass", self.mass, ("diagonal",))
        if self.step_size is None and self.warmup < 10:
            raise InvalidInput(
                f"warmup={self.warmup} is too short to adapt a step size; give at least 10 iterations, or step_size."
            )


def kinetic(momentum: Tensor, mass: Tensor | None) -> Tensor:
    """Kinetic energy p' M^-1 p / 2 of each chain in float64, (chains,)."""
    p = momentum.double()
    return 0.5 * (p.square() if mass is None else p.square() / mass).sum(dim=1)


def draw_momentum(position: Tensor, mass: Tensor | None, generator: torch.Generator) -> Tensor:
    """Momentum p ~ N(0, M), (chains, dim)."""
    p = normal(position.shape, position, generator)
    return p if mass is None else p * mass.sqrt()


def check_mass(mass: Tensor | None, position: Tensor) -> Tensor | None:
    """A diagonal as (groups, dim), on the chains' device."""
    if mass is None:
        return None
    dim = position.shape[1]
    mass = torch.as_tensor(mass, dtype=position.dtype, device=position.device)
    if mass.shape not in ((dim,), (1, dim), position.shape):
        raise InvalidInput(f"mass has shape {tuple(mass.shape)}; the diagonal, shape ({dim},), is needed.")
    if not bool((mass > 0).all() and mass.isfinite().all()):
        raise InvalidInput("mass must be positive and finite in every dimension.")
    return mass.reshape(-1, dim)


def check_step_size(step_size: float | Tensor, position: Tensor) -> Tensor:
    """A step size as (groups,), on the chains' device."""
    step = torch.as_tensor(step_size, dtype=position.dtype, device=position.device).reshape(-1)
    if len(step) not in (1, len(position)) or not bool((step > 0).all() and step.isfinite().all()):
        raise InvalidInput(f"step_size={step_size} must be positive and finite: one number, or one per chain.")
    return step


def first_step_size(
    density: LogDensity, state: State, mass: Tensor | None, guess: Tensor, pooled: bool, generator: torch.Generator
) -> Tensor:
    """A step size, (groups,), at which one leapfrog step is accepted about 80 % of the time.

    Doubled or halved from ``guess`` until acceptance crosses .8 (Hoffman and Gelman 2014, algorithm 4), with one draw
    of the momentum for all tries.
    """
    p0 = draw_momentum(state.position, mass, generator)
    before = state.log_prob.double() - kinetic(p0, mass)

    def accept(step: Tensor) -> Tensor:
        """Acceptance probability of one leapfrog step, (groups,)."""
        eps = step[:, None].to(p0.dtype)  # (groups, 1) beside positions (chains, dim)
        half = p0 + 0.5 * eps * state.gradient
        q = state.position + eps * (half if mass is None else half / mass)
        value, gradient = density(q)
        after = value.double() - kinetic(half + 0.5 * eps * gradient, mass)
        chance = (after - before).nan_to_num(nan=-torch.inf, posinf=-torch.inf).clamp(max=0).exp()
        return chance.mean(dim=0, keepdim=True) if pooled else chance

    # all groups at once, (groups,): each goes on in its direction until it has crossed .8
    step, done = guess, torch.zeros_like(guess, dtype=torch.bool)
    rising = accept(step) > 0.8
    for _ in range(100):  # a factor of 2^100 either way covers any sensible scale
        trial = torch.where(done, step, torch.where(rising, 2 * step, step / 2))
        high = accept(trial) > 0.8
        step = torch.where(done | (rising & ~high), step, trial)
        done |= rising != high
        if bool(done.all()):
            return step
    raise InvalidInput(
        "no step size fits: one leapfrog step is accepted at every size (the density is flat or improper), or at none "
        "(log_prob and its gradient do not belong together); check log_prob, or give step_size."
    )


def warm_up(
    density: LogDensity, state: State, transition: Transition, plan: RunSettings, generator: torch.Generator
) -> tuple[State, Tensor, Tensor | None]:
    """Run warm-up: the state after it, the step size (groups,) and the mass (groups, dim) to draw with."""
    learn_mass = isinstance(plan.mass, str)
    mass = None if isinstance(plan.mass, str) else check_mass(plan.mass, state.position)
    if plan.step_size is not None:
        rule, step = None, check_step_size(plan.step_size, state.position)
    else:
        # the first guess is 1: right for a density of unit scale, a few doublings away from others
        guess = state.log_prob.new_ones(1 if plan.pooled else len(state.position), dtype=torch.float64)
        step = first_step_size(density, state, mass, guess, plan.pooled, generator)
        rule = DualAveraging(step, plan.target_accept)
    windows, running = mass_windows(plan.warmup) if learn_mass else [], RunningVariance(plan.pooled)
    for i in range(plan.warmup):
        state, info = transition(state, step, mass, i, True)
        if rule is not None:  # (chains,) acceptances become (groups,)
            rule.update(info.accept.mean(dim=0, keepdim=True) if plan.pooled else info.accept)
            step = rule.step_size
        if windows and i in windows[0]:
            running.update(state.position)
            if i == windows[0][-1]:  # a new mass makes the step size learned so far wrong: start that anew
                mass, running, windows = running.mass(), RunningVariance(plan.pooled), windows[1:]
                if rule is not None:
                    step = first_step_size(density, state, mass, step, plan.pooled, generator)
                    rule = DualAveraging(step, plan.target_accept)
        if plan.progress:
            plan.progress(i + 1, plan.warmup + plan.draws * plan.thin)
    return state, step if rule is None else rule.averaged, mass


def run(
    density: LogDensity,
    state: State,
    transition: Transition,
    plan: RunSettings,
    store: Store | None,
    generator: torch.Generator,
) -> Chains:
    """Warm up, then draw with what was learned held fixed."""
    state, step, mass = warm_up(density, state, transition, plan, generator)
    total, at = plan.warmup + plan.draws * plan.thin, plan.warmup
    kept: list[Tensor] = []  # positions (chains, dim), or what the store made of them
    stats: list[tuple[Tensor, ...]] = []
    for _ in range(plan.draws):
        infos = []  # of the iterations that this draw stands for
        for _ in range(plan.thin):
            state, info = transition(state, step, mass, at, False)
            infos.append(info)
            at += 1
            if plan.progress:
                plan.progress(at, total)
        value = state.position if store is None else store(state.position)
        if value is not None:
            kept.append(value)
        stats.append(
            (
                state.log_prob * density.temperature,  # of the density itself
                torch.stack([i.accept for i in infos]).mean(dim=0),
                infos[-1].energy,
                torch.stack([i.diverging for i in infos]).any(dim=0),
                torch.stack([i.steps for i in infos]).sum(dim=0),
            )
        )
    # (chains,) of each draw become (chains, draws)
    log_prob, accept, energy, diverging, steps = (torch.stack(column, dim=1) for column in zip(*stats, strict=True))
    if (rate := float(accept.mean())) < _STUCK:
        warnings.warn(
            f"only {rate:.1%} of the proposals were accepted, at step size {float(step.mean()):.3g}: the chains hardly "
            "moved; give a smaller step_size, or None to adapt it."
        )
    # (chains, draws, ...); without any draw kept, still as many rows as chains
    draws = torch.stack(kept, dim=1) if kept else state.position.new_empty((len(state.position), 0))
    return Chains(draws, log_prob, accept, energy, diverging, steps, step, mass, state)
