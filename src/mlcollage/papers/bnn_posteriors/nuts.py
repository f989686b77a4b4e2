"""The no-U-turn sampler over the weights of a small network: trajectories that end themselves.

M. D. Hoffman and A. Gelman, "The No-U-Turn Sampler", JMLR 2014. The sampler itself is :mod:`mlcollage.infer.nuts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mlcollage.infer import nuts as sampler
from mlcollage.infer._run import Mass

from .keeping import Keeper, sample_stats
from .method import CountFrom0, CountFrom1, Positive, Probability, Target
from .sampler import Sampler, Save, State


@dataclass(frozen=True, kw_only=True, eq=False)
class NUTS(Sampler):
    """The no-U-turn sampler, with all chains as one batch; not in the paper.

    Chains wait for the longest trajectory of an iteration, so for many chains :class:`HMC` does more with a gradient.

    Parameters
    ----------
    chains, draws, thin, store, at, checkpoint, checkpoint_every
        As in :class:`~mlcollage.papers.bnn_posteriors.sampler.Sampler`.
    warmup
        First iterations, which adapt step size and mass and are not kept.
    step_size
        Of the leapfrog; None adapts it to ``target_accept``.
    target_accept
        Acceptance, between 0 and 1, that adaptation aims at.
    mass
        ``"diagonal"`` learns it, None is the identity, a tensor (P,) is used as it is.
    max_depth
        Doublings of a trajectory at most; it has up to ``2 ** max_depth`` points.
    temperature
        T; divides the whole log-density.
    """

    name = "nuts"
    draws: CountFrom1 = 500
    warmup: CountFrom0 = 500
    step_size: Positive | None = None
    target_accept: Probability = 0.8
    mass: Mass = "diagonal"
    max_depth: CountFrom1 = 8
    temperature: Positive = 1.0

    def _sample(
        self, target: Target, keeper: Keeper, state: State | None, save: Save, every: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        start = target.starts(self.chains) if state is None else state["position"]
        # kept by the keeper; what is returned holds how the sampler fared
        drawn = sampler.sample(
            target.density, start, draws=self.draws, warmup=self.warmup, step_size=self.step_size,
            target_accept=self.target_accept, mass=self.mass, max_depth=self.max_depth, temperature=self.temperature,
            thin=self.thin, store=keeper, generator=target.generator, progress=target.progress,
            resume=state, save=save, save_every=every,
        )  # fmt: skip
        return sample_stats(drawn), {}
