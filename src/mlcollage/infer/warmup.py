r"""Warm-up: a step size by dual averaging, and a mass from the covariance of the positions.

The scheme is Stan's. A fast interval leaves the starts while the step size adapts; slow windows, each twice as long as
the one before, end with a new mass, shrunk as in Stan, and a new search for the step size; a last fast interval settles
the step size (Stan Reference Manual, "HMC algorithm parameters"). Of 1,000 iterations: 75, then 25, 50, 100, 200 and
500, then 50. Two things are added where a mass is learned. Before all, chains whose log-density is so low that no step
conserves their energy fall towards the bulk (:func:`~mlcollage.infer.adaptation.approach`). And the fast interval does
not keep the unit mass, but takes one from gradients every 15 iterations
(:func:`~mlcollage.infer.adaptation.first_inverse_mass`), so that windows begin at about the right scales.

Chains of one density (``pooled``) that are lost when the fast interval or a window ends go on from where another chain
is. Lost is a chain in a region that, as a Gaussian mode, has less than exp(-20 - dim) of the mass that the median chain
sees around it: a plateau that takes a million steps to cross, or a minor mode that chains fall into from far away.
Modes that matter keep their chains.

All through warm-up each chain has a step size of its own, so that one that starts badly comes in at its own pace and
does not slow or freeze the others. When all sample the same density (``pooled``), the mass is learned from the draws
of all, without those of stragglers, and in the end they share a step size, except a chain that needs less than half of
the others'. Otherwise, as in simulation-based calibration, each chain learns for itself.

:class:`WarmUp` holds all of it. ``state_dict()`` is a flat dictionary of tensors and numbers, and
``load_state_dict()`` goes on from it, also in the middle of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mlcollage._checks import choice, integer, probability
from mlcollage.errors import InvalidInput
from mlcollage.infer.adaptation import (
    DualAveraging,
    RunningVariance,
    check_step_size,
    first_inverse_mass,
    first_step_size,
    mass_windows,
)
from mlcollage.infer.density import State
from mlcollage.infer.metric import Metric

Stage = Literal["fast", "warm", "draw"]  # the first fast interval, the rest of warm-up, or after it
Mass = Literal["auto", "diagonal", "dense"] | Tensor | None  # learned, given, or the identity
OneStep = Callable[[State, Metric], Callable[[Tensor], Tensor]]


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
    one_step: bool = False  # the chains share a step size all through warm-up, since their trajectories have one length

    def __post_init__(self) -> None:
        (
            integer("draws", self.draws, least=1),
            integer("warmup", self.warmup, least=0),
            integer("thin", self.thin, least=1),
        )
        probability("target_accept", self.target_accept)
        if isinstance(self.mass, str):  # a tensor is checked where the chains' shape is known
            choice("mass", self.mass, ("auto", "diagonal", "dense"))
        if self.step_size is None and self.warmup < 10:
            raise InvalidInput(
                f"warmup={self.warmup} is too short to adapt a step size; give at least 10 iterations, or step_size."
            )

    @property
    def learns_mass(self) -> bool:
        """Whether warm-up learns the mass."""
        return isinstance(self.mass, str)

    @property
    def learns_dense(self) -> bool:
        """Whether the mass that it learns may be dense."""
        return isinstance(self.mass, str) and self.mass != "diagonal"


_STRETCH = 15  # iterations of the fast interval after which it takes a new mass
MOST_DENSE = 100  # dimensions up to which "auto" may learn a dense mass
_DRAWS_PER_DIMENSION = 50  # draws behind a covariance, correlated as they are, before "auto" trusts it


class WarmUp:
    """Step size and mass, as far as they are learned.

    Parameters
    ----------
    settings
        What the run was asked for.
    state
        Where the chains start.
    one_step
        A state and a mass to acceptances by step size, as :func:`mlcollage.infer.adaptation.one_step` of a density.

    Attributes
    ----------
    at : int
        Iterations done.
    step : Tensor
        (groups,), the step size to take next.
    metric : Metric
        The mass to take next.
    moved : Tensor
        (chains,) bool, which chains were lost and set to where others are.
    """

    def __init__(self, settings: RunSettings, state: State, one_step: OneStep):
        self.settings, self.windows = settings, [] if not settings.learns_mass else mass_windows(settings.warmup)
        self._one_step = one_step
        self.at = 0
        given = None if isinstance(settings.mass, str) else settings.mass
        self.metric = Metric.of(given, state.position)
        self._dense = settings.mass == "dense" or (settings.mass == "auto" and state.position.shape[1] <= MOST_DENSE)
        self._forget()
        self.rule: DualAveraging | None = None
        self.moved = torch.zeros_like(state.log_prob, dtype=torch.bool)  # (chains,), which were lost, and set elsewhere
        self.slow: Tensor | None = None  # (chains,) bool, in the last interval: which keep a step size of their own
        if settings.step_size is not None:
            self.step = check_step_size(settings.step_size, state.position)
        else:
            # the first guess is 1: right for a density of unit scale, a few doublings away from others
            groups = 1 if settings.one_step else len(state.position)
            self.step = state.log_prob.new_ones(groups, dtype=torch.float64)
            self._search(state)

    def _forget(self) -> None:
        # of positions and gradients, and of the log-density
        self._position, self._gradient = RunningVariance(self._dense), RunningVariance(self._dense)
        self._height = RunningVariance()

    def _search(self, state: State) -> None:
        self.step = first_step_size(self._one_step(state, self.metric), self.step)
        if self.slow is not None:  # the others go on together
            self.step = torch.where(self.slow, self.step, self.step[~self.slow].median())
        self.rule = DualAveraging(self.step, self.settings.target_accept)

    @property
    def stage(self) -> Stage:
        """Where the next iteration is."""
        if self.at >= self.settings.warmup:
            return "draw"
        return "fast" if self.windows and self.at < self.windows[0].start else "warm"

    def update(self, state: State, accept: Tensor, generator: torch.Generator) -> State:
        """Learn from an iteration that led to ``state`` with acceptances (chains,); where the chains go on from."""
        if self.rule is not None:
            if self.settings.one_step:
                accept = accept.mean(dim=0, keepdim=True)
            elif self.slow is not None:
                accept = torch.where(self.slow, accept, accept[~self.slow].mean())
            self.rule.update(accept)
            self.step = self.rule.step_size
        if self.windows and self.at < self.windows[-1].stop:
            self._position.update(state.position)
            self._gradient.update(state.gradient)
            self._height.update(state.log_prob[:, None])
            early = self.stage == "fast"
            left = self.windows[0].start - self.at - 1  # of the fast interval
            if (early and (left == 0 or (left % _STRETCH == 0 and self._position.count >= _STRETCH))) or any(
                self.at == window[-1] for window in self.windows
            ):  # a new mass makes the step size learned so far wrong: search anew
                self.metric = Metric((self._first() if early else self._inverse_mass()).to(state.position))
                lost = None if early and left else self._lost()
                if lost is not None:
                    state = self._moved(state, lost, generator)
                self._forget()
                if self.rule is not None:
                    if self.at == self.windows[-1][-1] and self.settings.pooled and not self.settings.one_step:
                        averaged = self.rule.averaged
                        self.slow = averaged < averaged.median() / 2
                        if lost is not None:
                            self.slow &= ~lost
                    self._search(state)
        self.at += 1
        if self.at == self.settings.warmup and self.rule is not None:
            self.step = self._settled(self.rule.averaged)
        return state

    def _inverse_mass(self) -> Tensor:
        pooled = self.settings.pooled
        arrived = self._arrived() if pooled else None
        enough = _DRAWS_PER_DIMENSION * self._position.mean.shape[1]
        if self.settings.mass == "auto" and self._position.draws(pooled, arrived) < enough:
            return self._position.diagonal().inverse_mass(pooled, arrived, self._scales())
        return self._position.inverse_mass(pooled, arrived, self._scales())

    def _scales(self) -> Tensor:
        """The variances taken so far, (groups, dim)."""
        inverse = self.metric.inverse
        if inverse is None:
            return torch.ones_like(self._position.mean[:1])
        return inverse.diagonal(dim1=1, dim2=2) if self.metric.dense else inverse

    def _first(self) -> Tensor:
        pooled, x, g = self.settings.pooled, self._position, self._gradient
        arrived = self._arrived() if pooled else None
        if x.draws(pooled, arrived) < 3 * x.mean.shape[1]:
            x, g = x.diagonal(), g.diagonal()
        return first_inverse_mass(x.within(pooled, arrived), g.within(pooled, arrived), self._scales())

    def _below(self) -> Tensor:
        """Chains whose log-density was below the median chain's by 5 standard deviations, (chains,)."""
        # within a chain at rest the log-density has a standard deviation of sqrt(dim / 2)
        sd = self._height.variance(pooled=False).sqrt().median()
        height = self._height.mean[:, 0]
        return height < height.median() - 5 * sd

    def _arrived(self) -> Tensor | None:
        """Chains that are where most are, (chains,): not stragglers, whose log-density is far below; None for all."""
        return None if self._height.count < 2 else ~self._below()

    def _lost(self) -> Tensor | None:
        """Chains, (chains,), in a region that holds no part of the posterior's mass; None where there are none.

        A Gaussian mode holds the mass exp(mean of the log-density + entropy), the entropy being half of the log
        determinant of the covariance, but for a constant.
        """
        if not self.settings.pooled or self._height.count < 2:
            return None
        x, dim = self._position, self._position.mean.shape[1]
        if x.dense and x.count > 4 * dim:
            entropy = 0.5 * torch.linalg.slogdet(x.variance(pooled=False))[1]
        else:
            entropy = 0.5 * x.diagonal().variance(pooled=False).log().sum(dim=1)
        mass = self._height.mean[:, 0] + entropy
        # a scale may be seen short by a factor of e in each dimension, and a mode of e^-20 is none
        lost = self._below() & (mass < mass.median() - (20 + dim))
        return lost if bool(lost.any()) else None

    def _moved(self, state: State, lost: Tensor, generator: torch.Generator) -> State:
        """The state with each lost chain where another one is, drawn from those that are not lost."""
        others = (~lost).nonzero()[:, 0]
        pick = torch.randint(len(others), lost.shape, device=lost.device, generator=generator)
        here = torch.where(lost, others[pick], torch.arange(len(lost), device=lost.device))
        self.moved = self.moved | lost
        if len(self.step) > 1:  # its step size is right for where it was
            self.step = torch.where(lost, self.step[~lost].median(), self.step)
        return State(state.position[here], state.log_prob[here], state.gradient[here])

    def _settled(self, step: Tensor) -> Tensor:
        """The step size to draw with: shared, but for chains that need less than half of it."""
        if not self.settings.pooled or len(step) == 1:
            return step
        if self.slow is None:  # no last interval: the mass was not learned
            shared = step.log().median().exp()
            step = torch.where(step < shared / 2, step, shared)
        return step[:1] if bool((step == step[0]).all()) else step

    def state_dict(self) -> dict[str, Any]:
        """Everything, as a flat dictionary of tensors and numbers."""
        state: dict[str, Any] = {"at": self.at, "step": self.step, "moved": self.moved}
        if self.settings.learns_mass and self.metric.inverse is not None:
            state["inverse_mass"] = self.metric.inverse
        if self.slow is not None:
            state["slow"] = self.slow
        for name, part in self._parts().items():
            state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        return state

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"position": self._position, "gradient": self._gradient, "height": self._height}
        return parts | ({} if self.rule is None else {"rule": self.rule})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.at, self.step = int(state["at"]), state["step"]
        if "inverse_mass" in state:
            self.metric = Metric(state["inverse_mass"])
        self.slow, self.moved = state.get("slow"), state.get("moved", self.moved)
        for name, part in self._parts().items():
            part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
