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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlcollage._checks import integer, positive, real
from mlcollage.errors import InvalidInput
from mlcollage.infer import _run
from mlcollage.infer._run import DIVERGENCE, Progress, Save, Store
from mlcollage.infer.adaptation import check_step_size, one_step
from mlcollage.infer.chains import Chains, Info
from mlcollage.infer.compiled import CompiledIteration
from mlcollage.infer.density import Generator, LogDensity, LogProb, State, start
from mlcollage.infer.metric import Metric
from mlcollage.infer.warmup import Mass, RunSettings, Stage

Steps = int | tuple[int, int]  # a number, or (least, most)
_SHORT, _EARLY, _LONG = (3, 9), 60, 1000  # steps by default; at most before a mass is learned, and after
_MOST_STEPS = 1_000_000  # of one trajectory: beyond it a step size or a length is wrong


class Stepper(NamedTuple):
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
    mass: Tensor | Metric | None = None,
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
        Diagonal, (dim,) or (groups, dim), or matrix, (groups, dim, dim); None for the identity.

    Examples
    --------
    >>> density = LogDensity(lambda x: -0.5 * x.square().sum(dim=1))
    >>> begin = init(torch.tensor([[1.0]], dtype=torch.float64), density)
    >>> end, p = leapfrog(begin, torch.zeros(1, 1, dtype=torch.float64), density, step_size=0.01, steps=157)
    >>> round(float(end.position), 2), round(float(p), 2)  # a quarter turn
    (0.0, -1.0)
    """
    density, metric = LogDensity.of(log_prob), Metric.of(mass, state.position)
    return _integrate(state, momentum, density, step_size, steps, metric)


def _integrate(
    state: State,
    momentum: Tensor,
    density: LogDensity,
    step_size: float | Tensor,
    steps: int,
    metric: Metric,
    turned: Tensor | None = None,
) -> tuple[State, Tensor]:
    """Leapfrog steps; ``turned`` (chains,) bool, if given, is set where a trajectory moves towards its start."""
    # step sizes as (groups, 1), beside positions, momenta and gradients (chains, dim)
    eps = torch.as_tensor(step_size, dtype=state.position.dtype, device=state.position.device).reshape(-1, 1)
    p = torch.addcmul(momentum, eps, state.gradient, value=0.5)  # the first half-kick, out of place
    # (groups, 1) or (groups, dim); a dense mass costs a matrix product a step
    drift = eps if metric.dense or metric.inverse is None else eps * metric.inverse
    q = torch.addcmul(state.position, drift, metric.velocity(p) if metric.dense else p)
    for _ in range(steps - 1):  # neighboring half-kicks as one; in place from here on, and no values
        p.addcmul_(eps, density.gradient(q))
        q.addcmul_(drift, metric.velocity(p) if metric.dense else p)
        if turned is not None:
            turned |= ((q - state.position) * p).sum(dim=1) < 0
    value, gradient = density(q)
    p.addcmul_(eps, gradient, value=0.5)
    return State(q, value, gradient), p


def update(
    state: State,
    log_prob: LogProb | LogDensity,
    *,
    step_size: float | Tensor,
    steps: int,
    mass: Tensor | Metric | None = None,
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
        Diagonal, (dim,) or (groups, dim), or matrix, (groups, dim, dim); None for the identity.
    metropolis
        If False, every proposal of finite energy is accepted (the paper's burn-in; biased).
    generator
        On the chains' device.

    Returns
    -------
    State, Info
        Where a chain rejected, its state is the old one.
    """
    metric = Metric.of(mass, state.position)
    p0 = metric.draw(state.position, generator)
    end, p1 = leapfrog(state, p0, log_prob, step_size=step_size, steps=steps, mass=metric)
    return _accept(state, p0, end, p1, metric, steps, metropolis, generator)


def _accept(
    old: State,
    p0: Tensor,
    new: State,
    p1: Tensor,
    metric: Metric,
    steps: int,
    metropolis: bool,
    generator: torch.Generator,
) -> tuple[State, Info]:
    # change of the kinetic energy, element by element, which keeps its digits; everything below is (chains,)
    a, b = p1.double(), p0.double()
    change = 0.5 * ((a - b) * metric.velocity(p1 + p0 if metric.dense else a + b)).sum(dim=1)
    # a trajectory that left the range of numbers has an infinite error, and is rejected
    rise = change - (new.log_prob.double() - old.log_prob.double())
    error = torch.where(rise.isfinite(), rise, math.inf)
    accept = (-error).clamp(max=0).exp()
    # drawn also where it is not used, so that the stream of numbers does not depend on the setting
    chance = torch.rand(accept.shape, dtype=accept.dtype, device=accept.device, generator=generator)
    accepted = chance < accept if metropolis else error.isfinite()
    before = metric.kinetic(p0) - old.log_prob.double()
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
    mass: Tensor | Metric | None = None,
    temperature: float = 1.0,
    metropolis: bool = True,
) -> Stepper:
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
        Metric.of(mass, state.position)
        return state

    def advance(state: State, generator: torch.Generator) -> tuple[State, Info]:
        return update(
            state, density, step_size=step_size, steps=low, mass=mass, metropolis=metropolis, generator=generator
        )

    return Stepper(start_at, advance)


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
    mass: Mass = "auto",
    temperature: float = 1.0,
    metropolis_burn_in: bool = True,
    pooled: bool = True,
    thin: int = 1,
    compile: bool = False,
    store: Store | None = None,
    generator: Generator = 0,
    progress: Progress | None = None,
    resume: Mapping[str, Any] | None = None,
    save: Save | None = None,
    save_every: int = 100,
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
        default (3, 9), about one standard deviation's quarter period up to a whole one where step size and mass fit;
        and where warm-up finds that trajectories turn later, after R steps, (R / 4, R). R is at most 1,000, about the
        2^10 of NUTS; more than 256 steps on average are warned of. Jitter avoids the resonances of a fixed length.
    trajectory
        Instead of ``steps``, the length :math:`\tau = \epsilon L`; takes :math:`L = \lceil \tau / \epsilon \rceil`.
        See :func:`prior_period` for the rule of Izmailov et al. Lengths are in units of :math:`\sqrt M`, so combine
        it with ``mass=None`` for that rule.
    jitter
        Relative width of a uniform jitter of the step size, in [0, 1); drawn for each chain and iteration.
    step_size
        One number, or one per chain, kept throughout; None adapts it to ``target_accept`` during warm-up (see
        :mod:`mlcollage.infer.warmup`) and then holds it fixed.
    target_accept
        Acceptance that adaptation aims at.
    mass
        ``"diagonal"`` learns one over the variances in the windows of warm-up, ``"dense"`` the inverse covariance,
        ``"auto"`` the latter in up to 100 dimensions where a window has 50 draws for each, over all chains. None is
        the identity; a tensor, (dim,) or (dim, dim), is used as it is.
    temperature
        Samples ``log_prob / temperature``.
    metropolis_burn_in
        If False, warm-up accepts every proposal of finite energy, as Izmailov et al. do to leave the initialization.
    pooled
        True: all chains sample one density, and mass and final step size are learned from all of them. False: each
        chain has a density of its own (e.g. its own simulated data set) and learns for itself.
    thin
        Iterations per kept draw.
    compile
        True: trace ``log_prob`` once and compile whole iterations (:mod:`mlcollage.infer.compiled`), which takes ten
        seconds to a minute and gives the same draws, up to rounding, which a long warm-up amplifies: it may settle on
        another step size. ``log_prob`` must be a function of the position alone, in torch operations without branches
        on values; where it cannot be compiled, a warning says why and the run goes on without.
    store
        What to keep of a position, e.g. predictions: (chains, dim) to (chains, ...). By default the position. A
        function that returns None keeps nothing: ``store=stream.update`` feeds a
        :class:`~mlcollage.infer.diagnostics.Streaming` instead.
    generator
        A torch.Generator on the chains' device, or a seed. The same seed gives the same draws.
    progress
        Called as ``progress(iterations done, iterations in all)``.
    resume
        What ``save`` was called with, to go on from there to the same numbers, with the same density and settings;
        ``draws`` may be more. ``init`` only says how many chains there are.
    save
        Called with the run's state, a flat dictionary of tensors and numbers, every ``save_every`` iterations of
        warm-up, every ``save_every`` draws and after the last one.
    save_every
        At least 1.

    Returns
    -------
    Chains

    Raises
    ------
    InvalidInput
        For shapes, starts or settings that cannot work.

    Warns
    -----
    UserWarning
        Where ``compile=True`` has no effect, and why. And one sentence for each thing found by
        :meth:`Chains.health <mlcollage.infer.Chains.health>`: chains that hardly move, divergences and log-densities
        that were not finite, R-hat above 1.01, and trajectories of more than 256 steps that warm-up found.

    Examples
    --------
    Two correlated Gaussians of very different scale:

    >>> covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64) * torch.tensor([[1.0, 10], [10, 100]])
    >>> precision = torch.linalg.inv(covariance)
    >>> chains = sample(lambda x: -0.5 * ((x @ precision) * x).sum(dim=1), torch.zeros(32, 2, dtype=torch.float64),
    ...                  draws=200, warmup=200, generator=1)
    >>> chains.draws.shape
    torch.Size([32, 200, 2])
    >>> (torch.cov(chains.draws.reshape(-1, 2).T) / covariance).round(decimals=1).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    if steps is not None and trajectory is not None:
        raise InvalidInput("give either steps or trajectory: the one follows from the other by the step size.")
    if trajectory is not None and not pooled:
        raise InvalidInput("trajectory needs pooled=True, since all chains take the same number of steps; give steps.")
    settings = RunSettings(draws, warmup, thin, step_size, target_accept, mass, pooled, trajectory is not None)
    real("jitter", jitter, least=0, below=1)
    length = _Jittered(steps) if trajectory is None else _Length(positive("trajectory", trajectory))

    def kernel(density: LogDensity, g: torch.Generator) -> _Kernel:
        compiled = CompiledIteration(density, settings.learns_dense) if compile else None
        return _Kernel(density, g, length, jitter, metropolis_burn_in, compiled)

    return _run.sample(
        log_prob, init, settings, kernel,
        temperature=temperature, store=store, generator=generator, progress=progress, resume=resume, save=save,
        save_every=save_every,
    )  # fmt: skip


class _Kernel:
    """An iteration of HMC in a run, and the number of its steps."""

    def __init__(
        self,
        density: LogDensity,
        generator: torch.Generator,
        length: _Jittered | _Length,
        jitter: float,
        metropolis_burn_in: bool,
        compiled: CompiledIteration | None = None,
    ):
        self.density, self.generator, self.length = density, generator, length
        self.jitter, self.metropolis_burn_in = jitter, metropolis_burn_in
        self.compiled = compiled

    @property
    def chooses_steps(self) -> bool:
        return self.length.learns

    def __call__(self, state: State, step: Tensor, metric: Metric, stage: Stage) -> tuple[State, Info]:
        n, warming = self.length.steps(step, stage, self.generator), stage != "draw"
        if self.jitter:  # makes the step sizes (groups,) one per chain
            g = self.generator
            noise = torch.rand(len(state.position), dtype=step.dtype, device=step.device, generator=g)
            step = step * (1 + self.jitter * (2 * noise - 1))
        metropolis = self.metropolis_burn_in or not warming
        if self.compiled is not None:
            made = self.compiled(state, step, n, metric, metropolis, self.generator)
            if made is not None:
                if warming and self.length.learns:
                    self.length.learn(float(made[2].double().mean()))
                return made[:2]
        p0 = metric.draw(state.position, self.generator)
        turned = None
        if warming and self.length.learns:
            turned = torch.zeros(len(p0), dtype=torch.bool, device=p0.device)
        end, p1 = _integrate(state, p0, self.density, step, n, metric, turned)
        if turned is not None:
            self.length.learn(float(turned.double().mean()))
        return _accept(state, p0, end, p1, metric, n, metropolis, self.generator)

    def one_step(self, state: State, metric: Metric) -> Callable[[Tensor], Tensor]:
        made = None if self.compiled is None else self.compiled.one_step(state, metric, self.generator)
        return one_step(self.density, state, metric, self.generator) if made is None else made

    def state_dict(self) -> dict[str, Any]:
        return self.length.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.length.load_state_dict(state)


class _Length:
    """Steps of a trajectory of given length."""

    learns = False

    def __init__(self, trajectory: float):
        self.trajectory = trajectory

    def steps(self, step: Tensor, stage: Stage, generator: torch.Generator) -> int:
        n = math.ceil(self.trajectory / float(step.max()) - 1e-9)  # a whole number of steps stays one
        if n > _MOST_STEPS:
            raise InvalidInput(
                f"a trajectory of {self.trajectory} takes {n:,} steps of {float(step.max()):.3g}; shorten it, or check "
                "the scale of the parameters."
            )
        return max(n, 1)

    def learn(self, turned: float) -> None:
        """Nothing: the length is given."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class _Jittered:
    r"""A random number of steps; without a range, warm-up learns after how many half of the chains have turned.

    A trajectory has turned when it moves towards its start, :math:`(q_L - q_0)^\top p_L < 0`. Until the mass is
    learned, posteriors of unequal scales need trajectories far longer than afterwards.
    """

    def __init__(self, steps: Steps | None):
        self.low, self.high = _steps_range(_SHORT if steps is None else steps)
        self.learns = steps is None
        self.reach, self.settled = math.log(self.high), math.log(self.high)  # of now, and of late, as logarithms

    def steps(self, step: Tensor, stage: Stage, generator: torch.Generator) -> int:
        low, high = self.low, self.high
        if self.learns:
            drawing = stage == "draw"
            reach = math.exp(self.settled if drawing else self.reach)
            reach = min(reach, _EARLY) if stage == "fast" else reach
            least, most = (reach / 4, reach) if drawing else (reach / 2, 1.5 * reach)
            low, high = max(low, round(least)), max(high, round(most))
        if low == high:
            return low
        return int(torch.randint(low, high + 1, (), generator=generator, device=generator.device))

    def learn(self, turned: float) -> None:
        """Take in which share of the chains has turned."""
        self.reach = min(max(self.reach + 0.4 * (0.5 - turned), math.log(self.high)), math.log(_LONG))
        self.settled += 0.05 * (self.reach - self.settled)

    def state_dict(self) -> dict[str, Any]:
        return {"reach": self.reach, "settled": self.settled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reach, self.settled = float(state["reach"]), float(state["settled"])


def _steps_range(steps: Steps) -> tuple[int, int]:
    pair = steps if isinstance(steps, tuple) else (steps, steps)
    if len(pair) != 2:
        raise InvalidInput(f"steps={steps!r} must be a whole number or a pair (least, most) of them.")
    low = integer("steps", pair[0], least=1, most=_MOST_STEPS)
    return low, integer("the most steps", pair[1], least=low, most=_MOST_STEPS)
