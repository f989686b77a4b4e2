"""Which pipeline is tried next: the portfolio, then by turns expected improvement and a random draw (section 2.1.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from .policy import Policy
from .space import Config, SearchSpace, config_id
from .surrogate import ForestImprovement
from .trials import PipelineTrial


@dataclass(frozen=True)
class Proposal:
    """A pipeline to try: what, who proposed it, and its budget in percent."""

    config: Config
    origin: str
    budget: float


class Surrogate(Protocol):
    """Proposes the most promising configuration, given those that were tried."""

    def propose(self, configs: Sequence[Config], losses: ArrayLike, rng: np.random.Generator) -> Config:
        """A configuration that was not tried."""


class SearchPlan:
    """The order of trials; it depends on the seed and on the trials so far, and on nothing else.

    Under successive halving pipelines come in brackets of 16: all get 6.25 % of their iterations, the best 4 of them
    25 %, the best one all.

    Parameters
    ----------
    space
        Where proposals come from.
    policy
        Its allocation.
    portfolio
        Pipelines that come first.
    seed
        Of the proposals.
    surrogate
        Who proposes by expected improvement; a :class:`ForestImprovement` by default.
    """

    def __init__(
        self,
        space: SearchSpace,
        policy: Policy,
        portfolio: Sequence[Config],
        seed: int,
        surrogate: Surrogate | None = None,
    ) -> None:
        self.space, self.policy, self.portfolio, self.seed = space, policy, list(portfolio), seed
        self.surrogate: Surrogate = ForestImprovement(space) if surrogate is None else surrogate

    def next(self, trials: Sequence[PipelineTrial], count: int = 1) -> list[Proposal]:
        """The next proposals, ``count`` of them where they do not depend on each other's results."""
        schedule = self.policy.schedule
        if len(schedule) == 1:
            return [self._new(list(trials), len(trials) + i, 100.0) for i in range(count)]
        done, place = list(trials), 0
        while True:  # brackets that are over
            runners: list[PipelineTrial] = []
            for k, (size, budget) in enumerate(schedule):
                of_rung = done[place : place + size]
                if len(of_rung) < size:
                    return self._rung(done[: place + len(of_rung)], runners, k, size, budget, of_rung, count)
                place, runners = place + size, of_rung

    def _rung(
        self,
        done: list[PipelineTrial],
        before: list[PipelineTrial],
        k: int,
        size: int,
        budget: float,
        begun: list[PipelineTrial],
        count: int,
    ) -> list[Proposal]:
        if k == 0:
            number = sum(t.budget == budget for t in done)
            return [self._new(done, number + i, budget) for i in range(min(count, size - len(begun)))]
        ranked = sorted(before, key=lambda t: np.inf if t.loss is None else t.loss)[:size]
        rest = ranked[len(begun) : len(begun) + count]
        return [Proposal(t.config, t.origin, budget) for t in rest]

    def _new(self, trials: list[PipelineTrial], number: int, budget: float) -> Proposal:
        """The pipeline of this number; earlier ones are known or being fitted."""
        if number < len(self.portfolio):
            return Proposal(self.portfolio[number], "portfolio", budget)
        rng = np.random.default_rng([self.seed, number])
        known = self._surrogate_trials(trials)
        if (number - len(self.portfolio)) % 2 == 0 and len(known) >= 3:
            worst = max((t.loss for t in known if t.loss is not None), default=1.0)
            losses = [worst if t.loss is None else t.loss for t in known]
            return Proposal(self.surrogate.propose([t.config for t in known], losses, rng), "search", budget)
        tried = {config_id(t.config) for t in trials}
        for _ in range(100):
            config = self.space.sample(rng)
            if config_id(config) not in tried:
                break
        return Proposal(config, "random", budget)

    def _surrogate_trials(self, trials: list[PipelineTrial]) -> list[PipelineTrial]:
        """Trials of the highest budget of which there are enough: half as many as hyperparameters."""
        enough = len(self.space.parameters) / 2
        for _, budget in reversed(self.policy.schedule):
            found = [t for t in trials if t.budget == budget]
            if len(found) >= enough or budget == self.policy.schedule[0][1]:
                return found
        return list(trials)
