"""Proof that goals can be reached: Alice's actions, taken again from where Bob begins, must end where she ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage.data.goal_tasks import GoalWorld, check_members
from mlcollage.errors import InvalidInput

from .goals import GoalVerdict, validate_goal
from .inputs import flags, floats, same_shape
from .turns import present_of, rows_of, stepped

__all__ = ["Certificate", "certify", "coverage_entropy"]


class Certificate(NamedTuple):
    """What a replay showed."""

    games: int
    deviation: float  # largest distance of an object from where it was the first time, over its threshold
    step: int  # the step in which that was
    object: int  # the object
    still_goals: int | None  # valid goals of an Alice who does nothing, out of ``games``; None if she cannot do nothing
    moved: float  # furthest that random actions moved an object, over its threshold


_FAR = 1_000.0  # thresholds; who moves objects further at random has another unit than the threshold


def certify(
    world: GoalWorld, *, games: int = 16, steps: int = 20, seed: int = 0, idle: Sequence[float] | None = None
) -> Certificate:
    """Check that a world is fit for the game: replays reproduce goals, and nothing moves by itself.

    Random actions are taken twice from the same start states. Goals are solvable if both courses stay within the
    thresholds of each other at every step.

    Parameters
    ----------
    world
        Any :class:`~mlcollage.data.GoalWorld`.
    games, steps
        How many courses of how many steps.
    seed
        Which start states and actions.
    idle
        The choices, one of each dimension, that do nothing. By default the world's attribute ``idle``, if it has one
        (None there: nothing does), or else the middle ones, where all numbers of choices are odd, and 0 of continuous
        dimensions.

    Returns
    -------
    Certificate
        Largest deviation, in units of the threshold, and where. Look at ``moved`` too: below 1 random actions have set
        no goal; give Alice more steps, or look at the units.

    Raises
    ------
    InvalidInput
        If a replay ends beyond the threshold or is seen in another way, numbers are not finite, actions that do nothing
        give valid goals, or objects typically move by more than 1,000 thresholds (millimeters, perhaps); also for
        what is no world.

    Examples
    --------
    >>> from mlcollage.papers.asymmetric_self_play import Grasp25D
    >>> certify(Grasp25D()).deviation
    0.0
    """
    check_members(world)
    checks.integer("games", games, least=1), checks.integer("steps", steps, least=1)
    draw = generator(seed, 21)
    start = world.initial(games, draw)
    actions = torch.stack([_drawn(b, (steps, games), draw) for b in world.bins], -1)  # (T, n, D)
    actions = actions.to(start.device)
    (first, seen), (again, seen_again) = (_course(world, start, actions) for _ in range(2))
    if not bool(torch.isfinite(first).all()):
        raise InvalidInput("random actions lead to NaN or infinity; the world must keep its numbers finite.")
    limits = torch.tensor(world.thresholds, dtype=torch.float64, device=start.device)
    gap = torch.stack([world.distance(a, b).double() for a, b in zip(first, again, strict=True)]) / limits
    worst = int(gap.argmax())  # of (T, n, K, M)
    t, _, k, _ = (int(i) for i in torch.unravel_index(torch.tensor(worst), gap.shape))
    deviation = float(gap.max())
    if deviation >= 1:
        raise InvalidInput(
            f"the task is not deterministic: replayed, object {k} is {deviation:.3g} thresholds from where it was at "
            f"step {t + 1}. States must hold everything: activations, controls, solver warm start, mocap poses, "
            "controller integrators, a grasp, step counters, randomized masses and the random generator."
        )
    if not torch.allclose(seen, seen_again, rtol=1e-3, atol=1e-3):
        raise InvalidInput(
            "replayed, objects are where they were, but what the policies see is not: by up to "
            f"{float((seen - seen_again).abs().max()):.3g}. States must hold step counters, stacked frames and running "
            "normalizers of wrappers too."
        )
    moves = torch.stack([world.distance(a, world.achieved(start)).double() for a in first]) / limits  # (T, n, K, M)
    typical = float(moves.amax((0, 2, 3)).median())
    if typical > _FAR:
        raise InvalidInput(
            f"random actions move objects by {typical:.3g} thresholds, as a rule; thresholds "
            f"{tuple(world.thresholds)} and distances must have the same units (meters and radians, say, not "
            "millimeters and degrees)."
        )
    return Certificate(games, deviation, t + 1, k, _still(world, start, steps, idle), float(moves.max()))


def _drawn(choices: int, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    if choices:
        return torch.randint(choices, shape, generator=draw)
    return 2 * torch.rand(*shape, generator=draw) - 1


def _course(world: GoalWorld, start: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """What goals are about, and what Alice sees, after each step."""
    state, course, seen = start.clone(), [], []
    for action in actions:
        state = stepped(world, state, action)
        course.append(world.achieved(state))
        seen.append(rows_of(world, state))
    return torch.stack(course), torch.stack(seen)


def _still(world: GoalWorld, start: Tensor, steps: int, idle: Sequence[float] | None) -> int | None:
    """Valid goals of an Alice who does nothing; only worlds in which she can are asked."""
    middle = None if any(b and b % 2 == 0 for b in world.bins) else [b // 2 for b in world.bins]
    nothing = idle if idle is not None else getattr(world, "idle", middle)
    if nothing is None:
        return None
    if len(nothing) != len(world.bins):
        raise InvalidInput(f"idle has {len(nothing)} choices; expected one for each of {tuple(world.bins)}.")
    chosen = [
        checks.integer("idle", i, least=0, most=b - 1) if b else checks.real("idle", i, least=-1, most=1)
        for i, b in zip(nothing, world.bins, strict=True)
    ]
    dtype = torch.get_default_dtype() if 0 in world.bins else torch.long
    action = torch.tensor(chosen, dtype=dtype, device=start.device).expand(len(start), -1)
    end = start
    for _ in range(steps):
        end = stepped(world, end, action)
    moved = world.distance(world.achieved(end), world.achieved(start))
    verdict = validate_goal(
        moved,
        world.thresholds,
        off_table=world.off_table(end),
        out_of_zone=world.out_of_zone(end),
        present=present_of(world, end),
    )
    valid = int((verdict <= GoalVerdict.OUT_OF_ZONE).sum())
    if valid:
        raise InvalidInput(
            f"an Alice who does nothing gets {valid} valid goals of {len(start)}: objects move by themselves, up to "
            f"{float(moved.max()):.3g}. Let them settle for some steps in initial, and keep them from overlapping."
        )
    return valid


def coverage_entropy(goals: Tensor, cell: float, mask: Tensor | None = None) -> float:
    r"""How widely goals are spread: the entropy in bits of their places on a grid.

    .. math:: H = -\sum_c p_c \log_2 p_c

    Parameters
    ----------
    goals
        (n, K, G): K objects a goal.
    cell
        Width of a cell of the grid, in the units of the goals: the threshold is a natural choice.
    mask
        (n,) bool: goals to count, the valid ones.

    Returns
    -------
    float
        Between 0 (always the same place) and :math:`\log_2 n`.

    Raises
    ------
    InvalidInput
        For goals that are not (n, K, G), masks that are not bool, no goal, and goals with NaN.

    Examples
    --------
    >>> coverage_entropy(torch.tensor([[[0.0]], [[0.0]], [[1.0]], [[1.0]]]), cell=0.1)
    1.0
    """
    checks.positive("cell", cell)
    floats(goals=goals)
    flags(mask=mask)
    if goals.ndim != 3:
        raise InvalidInput(f"goals have shape {tuple(goals.shape)}; expected (n, K, G), K objects a goal.")
    same_shape("goals", goals.shape[:1], mask=mask)
    kept = goals if mask is None else goals[mask]
    if not len(kept):
        raise InvalidInput("there is no goal to count.")
    if not bool(torch.isfinite(kept).all()):
        raise InvalidInput("goals hold NaN or infinity; give a mask of the valid ones.")
    cells = (kept.double() / cell).round().flatten(1)
    count = torch.unique(cells, dim=0, return_counts=True)[1].double()
    p = count / count.sum()
    return abs(float(-(p * p.log2()).sum()))
