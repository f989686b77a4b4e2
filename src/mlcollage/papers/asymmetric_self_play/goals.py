"""The rules of the game: which goals count, when an object is where it should be, and what each side earns."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .inputs import flags, same_shape

__all__ = [
    "GoalVerdict",
    "alice_reward",
    "at_goal",
    "object_rewards",
    "success_rate",
    "time_rewards",
    "validate_goal",
]


class GoalVerdict(IntEnum):
    """What becomes of a goal that Alice set. Invalid goals end the game; Bob plays for the others."""

    VALID = 0
    OUT_OF_ZONE = 1  # valid, but Alice pays for it
    INVALID_UNMOVED = 2
    INVALID_OFF_TABLE = 3
    INVALID_NOT_FINITE = 4  # NaN, infinity, or a simulator that gave up

    @property
    def playable(self) -> bool:
        """Whether Bob plays for it."""
        return self <= GoalVerdict.OUT_OF_ZONE


def at_goal(distance: Tensor, thresholds: Sequence[float], present: Tensor | None = None) -> Tensor:
    """Objects (..., K) at their goals: every measure (..., K, M) strictly below its threshold.

    The comparison is made in float64 and in this one place, so that no object is both unmoved and unsolved. NaN is not
    at its goal. Padding (``present`` False) is always at its goal, so that ``.all(-1)`` asks for the real objects.

    Raises
    ------
    InvalidInput
        For a number of measures that is not that of thresholds, thresholds that are not positive, no object (K = 0),
        and a mask of another shape.

    Examples
    --------
    >>> at_goal(torch.tensor([[[0.03, 0.1], [0.03, 0.3]]]), (0.04, 0.2)).tolist()
    [[True, False]]
    """
    if distance.shape[-1] != len(thresholds):
        raise InvalidInput(f"there are {distance.shape[-1]} measures of distance and {len(thresholds)} thresholds.")
    if not len(thresholds) or 0 in distance.shape[-2:-1]:
        raise InvalidInput(
            f"distances have shape {tuple(distance.shape)}; without an object or a measure every goal would be reached."
        )
    flags(present=present)
    same_shape("distances of objects", distance.shape[:-1], present=present)
    limits = [checks.positive("a threshold", t) for t in thresholds]
    near = (distance.double() < torch.tensor(limits, dtype=torch.float64, device=distance.device)).all(-1)
    return near if present is None else near | ~present


def validate_goal(
    moved: Tensor,
    thresholds: Sequence[float],
    *,
    off_table: Tensor,
    out_of_zone: Tensor,
    present: Tensor | None = None,
    broken: Tensor | None = None,
) -> Tensor:
    """Judge goals, in the paper's order: nothing moved, something off the table, something outside of the zone.

    Parameters
    ----------
    moved
        (n, K, M): how far each object is from where it was before Alice's turn.
    thresholds
        Those of success: an object has moved if it is not :func:`at_goal` with its old place as the goal.
    off_table, out_of_zone
        (n, K) bool.
    present
        (n, K) bool: real objects; by default all.
    broken
        (n,) bool: turns in which the simulator gave up, by its own account.

    Returns
    -------
    Tensor
        (n,) whole numbers, see :class:`GoalVerdict`. Finiteness is looked at first, since NaN compares false.

    Raises
    ------
    InvalidInput
        For shapes that differ, and flags that are not bool.

    References
    ----------
    arXiv:2101.04882, section 3.1 and algorithm 2.

    Examples
    --------
    >>> no = torch.zeros(2, 1, dtype=torch.bool)
    >>> verdicts = validate_goal(torch.tensor([[[0.3]], [[0.01]]]), (0.04,), off_table=no, out_of_zone=no)
    >>> [GoalVerdict(v).name for v in verdicts.tolist()]
    ['VALID', 'INVALID_UNMOVED']
    """
    flags(off_table=off_table, out_of_zone=out_of_zone, present=present, broken=broken)
    there = torch.ones_like(off_table) if present is None else present
    for name, value in (("off_table", off_table), ("out_of_zone", out_of_zone), ("present", there)):
        if value.shape != moved.shape[:-1]:
            raise InvalidInput(f"{name} has shape {tuple(value.shape)}; expected {tuple(moved.shape[:-1])}.")
    finite = (torch.isfinite(moved).all(-1) | ~there).all(-1)
    if broken is not None:
        same_shape("games", finite.shape, broken=broken)
        finite = finite & ~broken
    any_moved = (~at_goal(moved, thresholds) & there).any(-1)
    verdict = torch.full_like(finite, GoalVerdict.VALID, dtype=torch.long)
    # Later lines take precedence.
    verdict[(out_of_zone & there).any(-1)] = GoalVerdict.OUT_OF_ZONE
    verdict[(off_table & there).any(-1)] = GoalVerdict.INVALID_OFF_TABLE
    verdict[~any_moved] = GoalVerdict.INVALID_UNMOVED
    verdict[~finite] = GoalVerdict.INVALID_NOT_FINITE
    return verdict


def object_rewards(at: Tensor, present: Tensor | None = None) -> Tensor:
    r"""Bob's reward for single objects: +1 in the step in which one reaches its goal, -1 when it leaves.

    .. math:: r_t = n_{t+1} - n_t

    where :math:`n_t` is the number of objects at their goals before step t.
    The sum over a turn telescopes to (objects at their goals at its end) - (at its start).

    Parameters
    ----------
    at
        (T + 1, ..., K) bool, before the first step and after each.
    present
        (..., K) bool: real objects.

    Returns
    -------
    Tensor
        (T, ...) float32.

    Examples
    --------
    >>> object_rewards(torch.tensor([[False], [True], [True], [False]])).tolist()
    [1.0, 0.0, -1.0]
    """
    flags(at=at, present=present)
    count = (at if present is None else at & present).sum(-1)
    return (count[1:] - count[:-1]).float()


def alice_reward(
    verdict: Tensor, bob_solved: Tensor, *, valid: float = 1.0, out_of_zone: float = -3.0, unsolved: float = 5.0
) -> Tensor:
    """Alice's reward for a turn, table 1 of the paper: 0, 1, 1 + 5, 1 - 3, 1 - 3 + 5.

    Parameters
    ----------
    verdict
        (n,), see :class:`GoalVerdict`.
    bob_solved
        (n,) bool. A Bob who plays no more, since he failed before in the game, has not solved it.

    Raises
    ------
    InvalidInput
        For a ``bob_solved`` that is not bool or has another shape.
    valid, out_of_zone, unsolved
        1, -3 and 5 in the paper.

    Examples
    --------
    >>> alice_reward(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([True, False, True, False, False])).tolist()
    [1.0, 6.0, -2.0, 3.0, 0.0]
    """
    flags(bob_solved=bob_solved)
    same_shape("verdict", verdict.shape, bob_solved=bob_solved)
    reward = valid + out_of_zone * (verdict == GoalVerdict.OUT_OF_ZONE).float() + unsolved * (~bob_solved).float()
    playable = (verdict >= GoalVerdict.VALID) & (verdict <= GoalVerdict.OUT_OF_ZONE)  # -1 is no Alice
    return torch.where(playable, reward, torch.zeros_like(reward))


def time_rewards(
    alice_steps: Tensor, bob_steps: Tensor, bob_solved: Tensor, *, most: int, scale: float = 0.01
) -> tuple[Tensor, Tensor]:
    r"""Rewards of the base method, by time alone.

    .. math:: R_B = -\gamma \, t_B, \qquad R_A = \gamma \max(0, t_B - t_A)

    with :math:`t_B = t_{\max} - t_A` where Bob fails.

    Parameters
    ----------
    alice_steps, bob_steps
        (n,): :math:`t_A` and :math:`t_B`.
    bob_solved
        (n,) bool.
    most
        :math:`t_{\max}`, steps of both together.
    scale
        :math:`\gamma`, 0.01 by default.

    Returns
    -------
    tuple of Tensor
        Alice's and Bob's, (n,) each.

    Raises
    ------
    InvalidInput
        For shapes that differ, a ``bob_solved`` that is not bool, and an Alice who took more steps than ``most``.

    References
    ----------
    Sukhbaatar et al., "Intrinsic motivation and automatic curricula via asymmetric self-play", ICLR 2018,
    arXiv:1703.05407, equations 1 and 2.

    Examples
    --------
    >>> a, b = time_rewards(torch.tensor([5, 5]), torch.tensor([8, 8]), torch.tensor([True, False]), most=45)
    >>> [round(float(v), 2) for v in (*a, *b)]
    [0.03, 0.35, -0.08, -0.4]
    """
    checks.positive("scale", scale)
    flags(bob_solved=bob_solved)
    same_shape("alice_steps", alice_steps.shape, bob_steps=bob_steps, bob_solved=bob_solved)
    if bool((alice_steps > most).any()):
        raise InvalidInput(f"most is {most}, steps of both sides together, but Alice took {int(alice_steps.max())}.")
    t_a = alice_steps.float()
    t_b = torch.where(bob_solved, bob_steps.float(), most - t_a)
    return scale * (t_b - t_a).clamp(min=0), -scale * t_b


def success_rate(successes: int, failures: int) -> float:
    """Share of goals that Bob reached; a failure ends a game's count, so each game has one failure at most.

    Raises
    ------
    InvalidInput
        For counts below 0, and for no goal at all.

    Examples
    --------
    >>> success_rate(2, 1)  # two reached and the third failed: those after it are not counted
    0.6666666666666666
    """
    checks.integer("successes", successes, least=0)
    checks.integer("failures", failures, least=0)
    if successes + failures == 0:
        raise InvalidInput("there is no valid goal to count; Alice set none, or Bob was never asked.")
    return successes / (successes + failures)
