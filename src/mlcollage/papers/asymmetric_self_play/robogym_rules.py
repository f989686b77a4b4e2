"""Rules of robogym's environments: what lies off a table or out of a zone, and how goals of an episode are counted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

__all__ = ["GoalCount", "GoalCounter", "off_table", "zone_excess"]


def off_table(position: Tensor, table: Tensor, half_size: Tensor, margin: float = 0.0) -> Tensor:
    """Objects that have left a table: lower than 0.75 of its height, or beyond its edge along x or y.

    Parameters
    ----------
    position
        (..., 3).
    table, half_size
        (3,): the table's middle and half of its sizes.
    margin
        How far past the edge still counts as on the table.

    Returns
    -------
    Tensor
        (...) bool.

    Examples
    --------
    >>> table, half = torch.tensor([0.0, 0.0, 0.2]), torch.tensor([0.5, 0.5, 0.2])
    >>> off_table(torch.tensor([[0.0, 0.0, 0.4], [0.6, 0.0, 0.4], [0.0, 0.0, 0.2]]), table, half).tolist()
    [False, True, True]
    """
    checks.real("margin", margin, least=0)
    if position.shape[-1:] != (3,):
        raise InvalidInput(f"position must be (..., 3); it is {tuple(position.shape)}.")
    flat, edge = position[..., :2], half_size[:2] + margin
    beyond = (flat > table[:2] + edge) | (flat < table[:2] - edge)
    return beyond.any(-1) | (position[..., 2] < 0.75 * (table[2] + half_size[2]))


def zone_excess(position: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far objects (..., 3) lie outside of a box, along the worst axis; 0 and less is inside.

    robogym counts an object as inside if this is below 0.02.

    Examples
    --------
    >>> zone_excess(torch.tensor([1.5, 0.5, 0.5]), torch.zeros(3), torch.ones(3)).item()
    0.5
    """
    return torch.maximum(low - position, position - high).amax(-1)


class GoalCount(NamedTuple):
    """What a step did to an episode of several goals."""

    reward: float
    success: bool  # the running goal was reached in this step
    goal_reset: bool  # a new goal begins
    done: bool
    trial_success: bool  # done, with all successes that were needed


class GoalCounter:
    """Count the goals of an episode as robogym's environments do: one success a goal, and a time-out ends it all.

    Parameters
    ----------
    max_steps, min_steps
        Steps that a goal may take, and steps before the next one begins, although it was reached.
    successes_needed
        Goals of a trial: 5 there.
    success_reward
        For each: 5 there.
    hold_steps
        Consecutive steps at the goal that make a success.

    Attributes
    ----------
    goals, successes
        Begun and reached so far.
    since_goal
        Steps since the running goal began.
    steps_per_success
        Steps of finished goals over successes; ``max_steps`` before the first.

    Examples
    --------
    >>> counter = GoalCounter(max_steps=3, successes_needed=2)
    >>> [counter.step(at_goal).done for at_goal in (True, False, False, False)]
    [False, False, False, True]
    >>> counter.successes, counter.goals
    (1, 2)
    """

    def __init__(
        self,
        max_steps: int,
        *,
        min_steps: int = 0,
        successes_needed: int = 5,
        success_reward: float = 5.0,
        hold_steps: int = 1,
    ) -> None:
        self.max_steps = checks.integer("max_steps", max_steps, least=1)
        self.min_steps = checks.integer("min_steps", min_steps, least=0, most=max_steps)
        self.successes_needed = checks.integer("successes_needed", successes_needed, least=1)
        self.success_reward = checks.real("success_reward", success_reward)
        self.hold_steps = checks.integer("hold_steps", hold_steps, least=1)
        self.goals, self.successes, self.since_goal = 1, 0, 0
        self._held, self._finished, self._reached, self._done = 0, 0, False, False

    @property
    def steps_per_success(self) -> float:
        """Steps of finished goals over successes so far."""
        return self._finished / self.successes if self.successes else float(self.max_steps)

    def step(self, at_goal: bool) -> GoalCount:
        """Count one step, after which all objects are at their goals or not.

        Raises
        ------
        InvalidInput
            After the end.
        """
        if self._done:
            raise InvalidInput("the episode is over; make a new GoalCounter for the next one.")
        self.since_goal += 1
        self._held = self._held + 1 if at_goal else 0
        success = not self._reached and self._held >= self.hold_steps
        self.successes += success
        self._reached = self._reached or success
        ends = self._reached and self.since_goal >= self.min_steps
        won = ends and self.successes >= self.successes_needed
        timeout = not self._reached and self.since_goal >= self.max_steps
        if ends:
            self._finished += self.since_goal
            self.since_goal, self._held, self._reached = 0, 0, False
            self.goals += not won
        self._done = won or timeout
        return GoalCount(self.success_reward if success else 0.0, success, ends and not won, self._done, won)
