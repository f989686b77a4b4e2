r"""Full-batch Hamiltonian Monte Carlo over the weights of a network, as in the paper's section 3.

Momentum :math:`m \sim N(0, I)` is drawn, :math:`L = \lceil \tau / \epsilon \rceil` leapfrog steps

.. math:: m \leftarrow m + \frac{\epsilon}{2} \nabla \log p(w \mid D), \quad w \leftarrow w + \epsilon m, \quad
    m \leftarrow m + \frac{\epsilon}{2} \nabla \log p(w \mid D)

follow the gradient of all data, and the end is accepted with probability :math:`\min(1, e^{-\Delta H})`; a rejected
step repeats the old weights. The sampler itself is :mod:`mlcollage.infer.hmc`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.infer import LogDensity
from mlcollage.infer import hmc as sampler
from mlcollage.infer._run import Mass
from mlcollage.infer.health import STUCK

from .density import largest_curvature
from .keeping import Keeper, sample_stats
from .method import CountFrom0, Positive, Probability, Share, Target
from .sampler import Sampler, Save, State

_MOST_STEPS = 1_000_000  # of one trajectory


@dataclass(frozen=True, kw_only=True, eq=False)
class HMC(Sampler):
    r"""Full-batch Hamiltonian Monte Carlo, with all chains as one batch: the paper's reference.

    Parameters
    ----------
    chains, draws, thin, store, at, checkpoint, checkpoint_every
        As in :class:`~mlcollage.papers.bnn_posteriors.sampler.Sampler`; 3 chains of 240 draws in the paper, for
        CIFAR-10.
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

    Raises
    ------
    InvalidInput
        For settings out of range.

    Warns
    -----
    Unhealthy
        As in the other samplers; where a chain hardly moved, with a step size that the measured curvature allows.

    Examples
    --------
    >>> HMC(chains=2, draws=50, step_size=0.01).settings()["draws"]
    50
    """

    name = "hmc"
    burn_in: CountFrom0 = 10
    warmup: CountFrom0 = 40
    step_size: Positive | None = None
    trajectory_length: Positive | Literal["prior"] = "prior"
    temperature: Positive = 1.0
    target_accept: Probability = 0.8
    jitter: Share = 0.0
    mass: Mass = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is None and self.warmup < 10:
            raise InvalidInput(f"warmup={self.warmup} is too short to adapt a step size; give at least 10.")

    def _sample(
        self, target: Target, keeper: Keeper, state: State | None, save: Save, every: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        length, tell = self._length(target), target.progress
        total = self.burn_in + self.warmup + self.draws * self.thin
        position = self._burn_in(target, length, state, save, every)
        drawn = sampler.sample(
            target.density, position, draws=self.draws, warmup=self.warmup, trajectory=length, jitter=self.jitter,
            step_size=self.step_size, target_accept=self.target_accept, mass=self.mass,
            temperature=self.temperature, thin=self.thin, store=keeper, generator=target.generator,
            progress=None if tell is None else lambda i, _: tell(self.burn_in + i, total),
            resume=None if state is None or "burnt_in" in state else state, save=save, save_every=every,
        )  # fmt: skip
        stats = sample_stats(drawn)
        return stats, {"trajectory_length": length, **self._remedy(target, drawn.state.position, stats)}

    def _length(self, target: Target) -> float:
        if self.trajectory_length != "prior":
            return self.trajectory_length
        # where scales differ, the widest parameter sets the pace
        scale = float(target.density.prior.sd().max())
        if not math.isfinite(scale):
            raise InvalidInput("the prior has no variance to take a trajectory length from; give trajectory_length.")
        return sampler.prior_period(scale, self.temperature)

    def _burn_in(self, target: Target, length: float, state: State | None, save: Save, every: int) -> Tensor:
        """Leave the initialization, without a Metropolis test: positions (chains, P)."""
        if state is not None and "burnt_in" not in state:
            return state["position"]
        tempered, done = LogDensity(target.density, self.temperature), state["burnt_in"] if state else 0
        here = sampler.init(state["position"] if state else target.starts(self.chains), tempered)
        for i in range(done, self.burn_in):
            # half over the root of the curvature is a quarter of the stability limit
            step = self.step_size or 0.5 / math.sqrt(float(largest_curvature(tempered, here.position).max()))
            step = min(step, length)  # at least one step
            steps = math.ceil(length / step - 1e-9)  # L, not one more by rounding
            if steps > _MOST_STEPS:
                raise InvalidInput(f"a trajectory of {length:.3g} takes {steps:,} steps of {step:.3g}; shorten it.")
            here, _ = sampler.update(
                here, tempered, step_size=step, steps=steps, metropolis=False, generator=target.generator
            )
            if target.progress:
                target.progress(i + 1, self.burn_in + self.warmup + self.draws * self.thin)
            if (i + 1) % every == 0:
                numbers = target.generator.get_state()
                save({"position": here.position, "burnt_in": i + 1, "drawn": 0, "generator": numbers})
        return here.position

    def _remedy(self, target: Target, position: Tensor, stats: dict[str, Tensor]) -> dict[str, str]:
        """What to do where a chain hardly moved, from the curvature where it stands."""
        if bool((stats["accept_prob"].mean(dim=1) >= STUCK).all()):
            return {}
        # a temperature divides the curvature; the leapfrog is stable up to 2 over its root
        top = float(largest_curvature(target.density, position).max()) / self.temperature
        limit = 2 / math.sqrt(top) if top > 0 else math.inf
        unstable = f"the curvature here, {top:.3g}, makes steps beyond {limit:.2g} unstable"
        return {"remedy": f"{unstable}: give step_size={0.25 * limit:.1g} or less, or None to adapt it"}
