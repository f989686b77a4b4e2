r"""Full-batch Hamiltonian Monte Carlo over the weights of a network, as in the paper's section 3.

Momentum :math:`m \sim N(0, I)` is drawn, :math:`L = \lceil \tau / \epsilon \rceil` leapfrog steps

.. math:: m \leftarrow m + \frac{\epsilon}{2} \nabla \log p(w \mid D), \quad w \leftarrow w + \epsilon m, \quad
    m \leftarrow m + \frac{\epsilon}{2} \nabla \log p(w \mid D)

follow the gradient of all data, and the end is accepted with probability :math:`\min(1, e^{-\Delta H})`; a rejected
step repeats the old weights. The sampler itself is :mod:`mlcollage.infer.hmc`.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.infer import LogDensity, Unhealthy
from mlcollage.infer import hmc as sampler
from mlcollage.infer._run import Mass

from .checkpoint import Checkpoint, Progressed
from .density import PosteriorDensity, largest_curvature
from .keeping import Keeper, Store, sample_stats
from .method import CountFrom0, CountFrom1, Method, Positive, Probability, Progress, Share, Target
from .posterior import Posterior

_STUCK = 0.05  # mean acceptance below which a run deserves a word
_MOST_STEPS = 1_000_000  # of one trajectory


@dataclass(frozen=True, kw_only=True, eq=False)
class HMC(Method):
    r"""Full-batch Hamiltonian Monte Carlo, with all chains as one batch: the paper's reference.

    Parameters
    ----------
    chains
        Chains, side by side; 3 in the paper.
    draws
        Kept draws of each chain; 240 for CIFAR-10 in the paper.
    burn_in
        First iterations, without a Metropolis test: they leave the initialization; 50 in the paper. With
        ``step_size=None`` each takes a quarter of the leapfrog's stability limit at the curvature it meets.
    warmup
        Further iterations, with the test, that are not kept; they adapt the step size if none is given.
    step_size
        :math:`\epsilon` of the leapfrog, :math:`10^{-5}` in the paper; None adapts it to ``target_accept`` and then
        holds it fixed.
    trajectory_length
        :math:`\tau = \epsilon L`; ``"prior"`` is :math:`\frac{\pi}{2} s \sqrt T` with s the prior's (largest) standard
        deviation, a quarter of the prior's period (section 3). An iteration takes
        :math:`\lceil \tau / \epsilon \rceil` gradients of all data.
    temperature
        T; divides the whole log-density (section 7). 1 is the posterior.
    target_accept
        Acceptance, between 0 and 1, that adaptation aims at.
    jitter
        Relative width of a uniform jitter of the step size and so of the length, in [0, 1). None in the paper; a nearly
        Gaussian posterior may resonate with a fixed length, and never forget its start, unless there is some.
    mass
        None for the identity, as in the paper; otherwise as in :func:`mlcollage.infer.hmc.sample`.
    thin
        Iterations per kept draw.
    store
        ``"params"`` keeps the draws, ``"predictions"`` only the running predictions at the inputs ``at``, a function
        of positions (chains, P) what it returns of each draw (None: nothing).
    at
        Inputs (n, ...) whose predictions are averaged on the way.
    checkpoint
        A folder: every ``checkpoint_every`` draws the run's state is written, and a run with the same folder, data and
        settings goes on from there, to the same numbers.
    checkpoint_every
        Draws between writes.

    Raises
    ------
    InvalidInput
        For settings out of range.

    Warns
    -----
    UserWarning
        When hardly any proposal was accepted, with a step size that the measured curvature allows.

    Examples
    --------
    >>> HMC(chains=2, draws=50, step_size=0.01).settings()["draws"]
    50
    """

    name = "hmc"
    chains: CountFrom1 = 4
    draws: CountFrom1 = 100
    burn_in: CountFrom0 = 10
    warmup: CountFrom0 = 40
    step_size: Positive | None = None
    trajectory_length: Positive | Literal["prior"] = "prior"
    temperature: Positive = 1.0
    target_accept: Probability = 0.8
    jitter: Share = 0.0
    mass: Mass = None
    thin: CountFrom1 = 1
    store: Store = "params"
    at: Any = None
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: CountFrom1 = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is None and self.warmup < 10:
            raise InvalidInput(f"warmup={self.warmup} is too short to adapt a step size; give at least 10.")

    def run(self, target: Target) -> Posterior:
        """Leave the initialization, warm up and draw; called by ``BayesianNetwork.fit``."""
        length = self._length(target)
        keeper = Keeper(target, self.store, self.at)
        settings = {k: v for k, v in self.settings().items() if not k.startswith("checkpoint")}
        settings["trajectory_length"] = length
        folder = None if self.checkpoint is None else Checkpoint(self.checkpoint, target, keeper, settings)
        # a run that was killed goes on from its last block, with the generator where it was
        run = folder.read() if folder else None
        if run is None:
            run = Progressed(self._burn_in(target, length), self.step_size, self.mass)
        while run.draws < self.draws:
            before = run.draws
            # without a folder one block holds all draws
            self._draw(target, run, length, keeper, self.checkpoint_every if folder else self.draws)
            if folder:
                folder.write(run, before)
        stats = sample_stats(run.runs)
        _say_if_stuck(stats, target.density, run, self.temperature)
        return keeper.posterior(self, stats, settings)

    def _length(self, target: Target) -> float:
        if self.trajectory_length != "prior":
            return self.trajectory_length
        # where scales differ, the widest parameter sets the pace
        scale = float(target.density.prior.sd().max())
        if not math.isfinite(scale):
            raise InvalidInput("the prior has no variance to take a trajectory length from; give trajectory_length.")
        return sampler.prior_period(scale, self.temperature)

    def _burn_in(self, target: Target, length: float) -> Tensor:
        """Leave the initialization, without a Metropolis test: positions (chains, P)."""
        tempered = LogDensity(target.density, self.temperature)
        state = sampler.init(target.starts(self.chains), tempered)
        progress = self._progress(target, 0)
        for i in range(self.burn_in):
            # half over the root of the curvature is a quarter of the stability limit
            step = self.step_size or 0.5 / math.sqrt(float(largest_curvature(tempered, state.position).max()))
            step = min(step, length)  # at least one step
            steps = math.ceil(length / step - 1e-9)  # L, not one more by rounding
            if steps > _MOST_STEPS:
                raise InvalidInput(f"a trajectory of {length:.3g} takes {steps:,} steps of {step:.3g}; shorten it.")
            state, _ = sampler.update(
                state, tempered, step_size=step, steps=steps, metropolis=False, generator=target.generator
            )
            if progress:
                progress(i + 1, self.burn_in)
        return state.position

    def _draw(self, target: Target, run: Progressed, length: float, keeper: Keeper, most: int) -> None:
        """Go on for at most so many draws; the first time, warm up before."""
        # warm-up belongs to the first block; the later ones have its step size and mass
        first = run.draws == 0
        done = self.burn_in + (0 if first else self.warmup + run.draws * self.thin)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Unhealthy)  # of a part of the run; said below of all of it
            drawn = sampler.sample(
                target.density, run.position, draws=min(most, self.draws - run.draws),
                warmup=self.warmup if first else 0, trajectory=length, jitter=self.jitter, step_size=run.step_size,
                target_accept=self.target_accept, mass=run.mass, temperature=self.temperature, thin=self.thin,
                store=keeper, generator=target.generator, progress=self._progress(target, done),
            )  # fmt: skip
        run.position, run.step_size, run.mass = drawn.state.position, drawn.step_size, drawn.mass
        run.draws += drawn.accept.shape[1]
        run.runs.append(drawn)

    def _progress(self, target: Target, done: int) -> Progress | None:
        """Progress of a part of the run, as that of all its iterations."""
        tell, total = target.progress, self.burn_in + self.warmup + self.draws * self.thin
        return None if tell is None else lambda i, _: tell(done + i, total)


def _say_if_stuck(stats: dict[str, Tensor], density: PosteriorDensity, run: Progressed, temperature: float) -> None:
    rate = float(stats["accept_prob"].mean())
    if rate >= _STUCK:
        return
    # a temperature divides the curvature; the leapfrog is stable up to 2 over its root
    top = float(largest_curvature(density, run.position).max()) / temperature
    limit = 2 / math.sqrt(top) if top > 0 else math.inf
    what = "every proposal was rejected" if rate < 1e-6 else f"only {rate:.1%} of the proposals were accepted"
    warnings.warn(
        f"{what}, at step size {float(torch.as_tensor(run.step_size).max()):.3g}; the curvature here, {top:.3g}, makes "
        f"steps beyond {limit:.2g} unstable: give step_size={0.25 * limit:.1g} or less, or None to adapt it.",
        stacklevel=4,
    )
