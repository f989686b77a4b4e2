r"""The No-U-Turn sampler: trajectories that end themselves, with chains as the leading dimension.

Multinomial sampling along the trajectory, biased progressive sampling between doublings, and the generalized U-turn
criterion: with :math:`\rho = \sum p` over a stretch of the trajectory, the stretch has turned when

.. math::
    p_-^\top M^{-1} \rho \le 0 \quad \text{or} \quad p_+^\top M^{-1} \rho \le 0,

checked for the whole and for every balanced sub-stretch, and, as in Stan since 2019, for each half together with the
first point of the other: without that, a stretch of a whole period passes where its halves just end too soon.
M. Betancourt, "A Conceptual Introduction to Hamiltonian Monte Carlo", 2017, appendix A; M. D. Hoffman and A. Gelman,
JMLR 2014. The trees are built without recursion, with one stored checkpoint per level (D. Phan et al., "Composable
Effects for Flexible and Accelerated Probabilistic Programming in NumPyro", 2019), so that all chains take each leapfrog
step in one call.

Chains wait for the longest trajectory of the iteration, so for many chains :func:`mlcollage.infer.hmc.sample` with a
jittered number of steps does more with a gradient; NUTS is for single problems whose right length is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlcollage._checks import integer
from mlcollage.infer import _run
from mlcollage.infer._run import DIVERGENCE, Progress, Save, Store
from mlcollage.infer.adaptation import one_step
from mlcollage.infer.chains import Chains, Info
from mlcollage.infer.density import Generator, LogDensity, LogProb, State
from mlcollage.infer.hmc import leapfrog
from mlcollage.infer.metric import Metric
from mlcollage.infer.warmup import Mass, RunSettings, Stage

_EARLY = 6  # doublings at most, before a mass is learned


@dataclass
class _Phase:
    """Points in phase space, one per chain."""

    state: State
    momentum: Tensor

    def where(self, mask: Tensor, other: _Phase) -> _Phase:
        """These points where ``mask`` holds, the others elsewhere."""
        return _Phase(self.state.where(mask, other.state), _rows(mask, self.momentum, other.momentum))


@dataclass
class _Tree:
    """A stretch of trajectory: its proposal, the log of its weight, the sum of its momenta."""

    proposal: _Phase
    weight: Tensor
    rho: Tensor


def _rows(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows of a (chains, dim) where ``mask`` (chains,) holds, of b elsewhere."""
    return torch.where(mask[:, None], a, b)


@dataclass(frozen=True)
class _Checkpoint:
    """An even leaf: its momentum, that of the leaf before, and the sum of momenta before it."""

    momentum: Tensor
    before: Tensor
    rho: Tensor


def _checkpoints(leaf: int) -> tuple[int, int]:
    """Levels of the balanced stretches that end at an odd leaf (least, most); for an even one the level to store at.

    Leaf 5 = 101b closes the stretch (4, 5), leaf 7 = 111b closes (6, 7), (4..7) and (0..7).
    """
    most = (leaf >> 1).bit_count()
    closed = (~leaf & (leaf + 1)).bit_length() - 1  # trailing ones
    return most - closed + 1, most


class _Trajectory:
    """One iteration of all chains."""

    def __init__(
        self, state: State, density: LogDensity, step_size: Tensor, metric: Metric, generator: torch.Generator
    ):
        self.density, self.step_size, self.metric, self.generator = density, step_size, metric, generator
        p = metric.draw(state.position, generator)  # (chains, dim); all flags and weights below are (chains,)
        here = _Phase(state, p)
        self.zero = self.log_weight(here)  # log weights count from the starting point's
        self.left, self.right = here, here  # ends of the trajectory in time
        self.tree = _Tree(here, torch.zeros_like(self.zero), p)
        # which chains still double; whether any step diverged; sum of acceptances, largest error and count of steps
        self.active = torch.ones_like(self.zero, dtype=torch.bool)
        self.diverging = torch.zeros_like(self.active)
        self.accept, self.worst = torch.zeros_like(self.zero), torch.zeros_like(self.zero)
        self.steps = torch.zeros_like(self.zero, dtype=torch.int64)

    def log_weight(self, phase: _Phase) -> Tensor:
        return phase.state.log_prob.double() - self.metric.kinetic(phase.momentum)

    def chance(self) -> Tensor:
        z = self.zero
        return torch.rand(z.shape, dtype=z.dtype, device=z.device, generator=self.generator)

    def turning(self, a: Tensor, b: Tensor, rho: Tensor) -> Tensor:
        """Whether a stretch with momenta ``a`` and ``b`` at its ends, summing to ``rho``, has turned."""
        velocity = self.metric.velocity(rho)
        return ((a * velocity).sum(dim=1) <= 0) | ((b * velocity).sum(dim=1) <= 0)

    def joined(self, ends: tuple[Tensor, Tensor], middle: tuple[Tensor, Tensor], rho: tuple[Tensor, Tensor]) -> Tensor:
        """Whether two neighboring stretches have turned together, or one of them with the first point of the other."""
        (a, b), (last, first), (rho_a, rho_b) = (
            ends,
            middle,
            rho,
        )  # momenta (chains, dim), in the order of time or against
        return (
            self.turning(a, b, rho_a + rho_b)
            | self.turning(a, first, rho_a + first)
            | self.turning(last, b, last + rho_b)
        )

    def double(self, depth: int) -> None:
        """Extend the active chains, each in a direction of its own, by as many points as they have."""
        forward = self.chance() < 0.5
        # the end to extend from, and the other one
        near, far = self.right.where(forward, self.left), self.left.where(forward, self.right)
        step = torch.where(forward, 1.0, -1.0).to(self.step_size) * self.step_size  # (chains,), negative backward
        edge, first, branch, whole = self._branch(near, step, depth)
        # a half that turned or diverged on its way is thrown away as a whole
        self.right = edge.where(whole & forward, self.right)
        self.left = edge.where(whole & ~forward, self.left)
        tree = self.tree
        # biased progressive sampling: the new half is preferred, which moves the proposal away from the start
        take = whole & (self.chance().log() < branch.weight - tree.weight)
        turned = self.joined((far.momentum, edge.momentum), (near.momentum, first), (tree.rho, branch.rho))
        rho = _rows(whole, tree.rho + branch.rho, tree.rho)
        weight = torch.where(whole, torch.logaddexp(tree.weight, branch.weight), tree.weight)
        self.tree = _Tree(branch.proposal.where(take, tree.proposal), weight, rho)
        self.active = whole & ~turned

    def _branch(self, edge: _Phase, step: Tensor, depth: int) -> tuple[_Phase, Tensor, _Tree, Tensor]:
        """Up to ``2 ** depth`` steps from ``edge``: last point, first momentum, stretch, and which chains got there."""
        first = edge.momentum
        tree = _Tree(edge, torch.full_like(self.zero, -math.inf), torch.zeros_like(first))
        stored: dict[int, _Checkpoint] = {}
        going = self.active.clone()
        # chains that have turned or diverged stand still; the others take the step, all in one call
        for leaf in range(2**depth):
            before = edge.momentum
            state, p = leapfrog(edge.state, before, self.density, step_size=step, steps=1, mass=self.metric)
            edge = _Phase(state, p).where(going, edge)
            first = first if leaf else edge.momentum
            # log weight of the new leaf, minus its energy error; nothing where the energy is not a number
            weight = (self.log_weight(edge) - self.zero).nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
            self._count(going, weight)
            going = going & (weight > -DIVERGENCE)
            # multinomial sampling: the new leaf is the proposal in proportion to its weight
            total = torch.logaddexp(tree.weight, weight)
            take = going & (self.chance().log() < weight - total)
            least, most = _checkpoints(leaf)
            if leaf % 2 == 0:  # it begins stretches that later odd leaves close
                stored[most] = _Checkpoint(edge.momentum, before, tree.rho)
            rho = _rows(going, tree.rho + edge.momentum, tree.rho)
            if leaf % 2:  # it closes one or more balanced stretches
                going = going & ~self._turned(stored, least, most, _Checkpoint(edge.momentum, before, tree.rho), rho)
            tree = _Tree(edge.where(take, tree.proposal), torch.where(going, total, tree.weight), rho)
            if not bool(going.any()):  # reading a flag waits for the device, once per leaf
                break
        return edge, first, tree, going

    def _turned(self, stored: dict[int, _Checkpoint], least: int, most: int, here: _Checkpoint, rho: Tensor) -> Tensor:
        """Whether any balanced stretch that ends at this odd leaf has turned; its second half begins a level up."""
        turned = torch.zeros_like(self.active)
        for level in range(least, most + 1):
            # the stretch's first leaf, and the first of its second half
            begin, second = stored[level], here if level == most else stored[level + 1]
            turned = turned | self.joined(
                (begin.momentum, here.momentum),
                (second.before, second.momentum),
                (second.rho - begin.rho, rho - second.rho),
            )
        return turned

    def _count(self, going: Tensor, weight: Tensor) -> None:
        self.steps += going
        self.accept += torch.where(going, weight.clamp(max=0).exp(), 0.0)
        self.worst = torch.where(going, torch.maximum(self.worst, -weight), self.worst)
        self.diverging |= going & (weight <= -DIVERGENCE)

    def result(self, old: State) -> tuple[State, Info]:
        proposal = self.tree.proposal
        # the proposal may be the starting point itself
        moved = (proposal.state.position != old.position).any(dim=1)
        info = Info(
            accept=self.accept / self.steps,
            accepted=moved,
            energy=-self.log_weight(proposal),
            error=self.worst,
            diverging=self.diverging,
            steps=self.steps,
        )
        return proposal.state, info


def update(
    state: State,
    log_prob: LogProb | LogDensity,
    *,
    step_size: float | Tensor,
    mass: Tensor | Metric | None = None,
    max_depth: int = 10,
    generator: torch.Generator,
) -> tuple[State, Info]:
    """One iteration of all chains.

    Parameters
    ----------
    state
        From :func:`mlcollage.infer.hmc.init` or the update before.
    log_prob
        The same function as the state was made with.
    step_size
        One number, or one per chain.
    mass
        Diagonal, (dim,) or (groups, dim), or matrix, (groups, dim, dim); None for the identity.
    max_depth
        A trajectory has at most ``2 ** max_depth - 1`` steps.
    generator
        On the chains' device.

    Examples
    --------
    >>> from mlcollage.infer import hmc
    >>> density = LogDensity(lambda x: -0.5 * x.square().sum(dim=1))
    >>> state = hmc.init(torch.zeros(4, 2), density)
    >>> state, info = update(state, density, step_size=0.5, generator=torch.Generator().manual_seed(0))
    >>> bool((info.steps < 16).all())
    True
    """
    density, metric = LogDensity.of(log_prob), Metric.of(mass, state.position)
    step = torch.as_tensor(step_size, dtype=torch.float64, device=state.position.device).reshape(-1)
    trajectory = _Trajectory(state, density, step.expand(len(state.position)), metric, generator)
    for depth in range(max_depth):
        trajectory.double(depth)
        if not bool(trajectory.active.any()):
            break
    return trajectory.result(state)


def sample(
    log_prob: LogProb,
    init: Tensor | Any,
    *,
    draws: int = 1000,
    warmup: int = 500,
    step_size: float | Tensor | None = None,
    target_accept: float = 0.8,
    mass: Mass = "auto",
    max_depth: int = 10,
    temperature: float = 1.0,
    pooled: bool = True,
    thin: int = 1,
    store: Store | None = None,
    generator: Generator = 0,
    progress: Progress | None = None,
    resume: Mapping[str, Any] | None = None,
    save: Save | None = None,
    save_every: int = 100,
) -> Chains:
    """Warm up, then draw; everything but ``max_depth`` as in :func:`mlcollage.infer.hmc.sample`.

    Parameters
    ----------
    log_prob, init, draws, warmup, step_size, target_accept, mass, temperature, pooled, thin, store, generator, \
    progress, resume, save, save_every
        See :func:`mlcollage.infer.hmc.sample`.
    max_depth
        Doublings of a trajectory, 1 to 20; ``2 ** max_depth - 1`` steps at most.

    Returns
    -------
    Chains

    Raises
    ------
    InvalidInput
        For shapes, starts or settings that cannot work.

    Examples
    --------
    >>> chains = sample(lambda x: -0.5 * x.square().sum(dim=1), torch.zeros(8, 3, dtype=torch.float64), draws=100,
    ...                  warmup=100)
    >>> chains.draws.shape, bool((chains.draws.std() - 1).abs() < 0.1)
    (torch.Size([8, 100, 3]), True)
    """
    integer("max_depth", max_depth, least=1, most=20)
    settings = RunSettings(draws, warmup, thin, step_size, target_accept, mass, pooled)
    return _run.sample(
        log_prob, init, settings, lambda density, g: _Kernel(density, g, max_depth), temperature=temperature,
        store=store, generator=generator, progress=progress, resume=resume, save=save, save_every=save_every,
    )  # fmt: skip


class _Kernel:
    """An iteration of NUTS in a run; it remembers nothing."""

    chooses_steps = True

    def __init__(self, density: LogDensity, generator: torch.Generator, max_depth: int):
        self.density, self.generator, self.max_depth = density, generator, max_depth

    def __call__(self, state: State, step: Tensor, metric: Metric, stage: Stage) -> tuple[State, Info]:
        # before a mass is learned long trajectories are not worth their price
        g, depth = self.generator, min(self.max_depth, _EARLY) if stage == "fast" else self.max_depth
        return update(state, self.density, step_size=step, mass=metric, max_depth=depth, generator=g)

    def one_step(self, state: State, metric: Metric) -> Callable[[Tensor], Tensor]:
        return one_step(self.density, state, metric, self.generator)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
