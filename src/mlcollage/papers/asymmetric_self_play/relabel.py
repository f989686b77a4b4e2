"""Hindsight: Alice's steps as Bob would have seen them, with the goal that she reached."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlcollage.data.goal_tasks import GoalWorld
from mlcollage.errors import InvalidInput

from .inputs import flags, same_shape
from .turns import rows_of

__all__ = ["Demonstrations", "relabel"]


class Demonstrations(NamedTuple):
    """What is cloned: observations (..., M, F) with goals, Alice's actions (..., M, D), and which rows are real."""

    x: Tensor
    choice: Tensor
    mask: Tensor


def relabel(
    world: GoalWorld, states: Tensor, actions: Tensor, goal: Tensor, wanted: Tensor, *, lengths: Tensor | None = None
) -> Demonstrations:
    r"""Make demonstrations of turns: :math:`\tau_{BC} = \{(s_t, g = s_T, a_t)\}_{t < T}`.

    Parameters
    ----------
    world
        Gives the observations.
    states
        (T + 1, n, S), or (T + 1, R, n, S) for R seeds: states before each of Alice's actions, and after the last.
    actions
        (T, n, D) or (T, R, n, D).
    goal
        (n, K, G) or (R, n, K, G): what Alice achieved.
    wanted
        (n,) or (R, n) bool: turns to clone, that is, with a valid goal that Bob did not reach.

    lengths
        (n,) or (R, n) whole numbers: steps in which Alice acted, if she may end her turn; what follows is padding.

    Returns
    -------
    Demonstrations
        Rows of all wanted turns, step after step; where there is none, those of one turn, which the mask leaves out.
        Bob's log-probabilities of ``choice`` given ``x``, taken *now*, are the ``logp_old`` of :func:`abc_loss`.

    Raises
    ------
    InvalidInput
        For shapes that do not fit: actions pair with the states before them, so there is one state more; for a
        ``wanted`` that is not bool, and no step.

    References
    ----------
    arXiv:2101.04882, section 3.3.

    Examples
    --------
    >>> from mlcollage.papers.asymmetric_self_play import PlanarPush
    >>> world, states = PlanarPush(), torch.zeros(4, 5, 4)  # three steps of five games
    >>> demos = relabel(world, states, torch.zeros(3, 5, 2).long(), world.achieved(states[-1]),
    ...                 torch.tensor([True, False, True, False, False]))
    >>> demos.x.shape, demos.choice.shape
    (torch.Size([6, 11]), torch.Size([6, 2]))
    """
    flags(wanted=wanted)
    if len(states) != len(actions) + 1 or states.shape[1:-1] != actions.shape[1:-1]:
        raise InvalidInput(
            f"states {tuple(states.shape)} and actions {tuple(actions.shape)} do not pair: expected one state before "
            "each action and one after the last, of the same games."
        )
    if lengths is not None:
        same_shape("wanted", wanted.shape, lengths=lengths)
    if wanted.shape != states.shape[1:-1] or goal.shape[: wanted.ndim] != wanted.shape:
        raise InvalidInput(
            f"goal {tuple(goal.shape)} and wanted {tuple(wanted.shape)} must be of {states.shape[1:-1]}."
        )
    if not len(actions) or 0 in wanted.shape:
        raise InvalidInput(f"actions {tuple(actions.shape)} hold no step of any game: there is nothing to relabel.")
    expected = world.achieved(states[0].flatten(0, -2)[:1]).shape[1:]
    if goal.shape[wanted.ndim :] != expected:
        raise InvalidInput(f"goal has shape {tuple(goal.shape)}; expected {(*wanted.shape, *expected)} in this world.")
    if wanted.ndim == 1:
        several = None if lengths is None else lengths[None]
        found = relabel(world, states[:, None], actions[:, None], goal[None], wanted[None], lengths=several)
        return Demonstrations(*(part[0] for part in found))
    steps, r = actions.shape[:2]
    lanes = torch.arange(r, device=states.device)[:, None]
    most = max(1, int(wanted.sum(1).max()))  # where none is wanted, rows of padding, which keep the widths
    games = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # wanted ones first
    real = wanted.gather(1, games)
    before, goals = states[:-1][:, lanes, games], goal[lanes, games]  # (T, R, m, S), (R, m, K, G)
    x = rows_of(world, before.flatten(0, 2), goals.expand(steps, *goals.shape).flatten(0, 2))
    rows = real[:, None].expand(r, steps, most)
    if lengths is not None:
        rows = rows & (torch.arange(steps, device=states.device)[:, None] < lengths.gather(1, games)[:, None])
    return Demonstrations(
        x.view(steps, r, most, -1).transpose(0, 1).flatten(1, 2),
        actions[:, lanes, games].transpose(0, 1).flatten(1, 2),
        rows.flatten(1),
    )
