"""One turn of the game, in lock-step over all games of all seeds: Alice sets a goal, Bob tries to reach it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlcollage._random import generator
from mlcollage._users import users_code
from mlcollage.data.goal_tasks import GoalSet, GoalWorld
from mlcollage.errors import InvalidInput

from .goals import at_goal
from .heads import outputs_of
from .learner import Learner

__all__ = ["AliceTurn", "BobTurn", "alice_turn", "bob_turn", "drawn", "rows_of", "stepped"]


def rows_of(world: GoalWorld, state: Tensor, goal: Tensor | None = None) -> Tensor:
    """What a policy sees of states (n, S): rows ``[robot | object 1 | ...]``; Bob's objects end with their goal.

    Parameters
    ----------
    world
        Any :class:`~mlcollage.data.GoalWorld`.
    state
        (n, S).
    goal
        (n, K, G), or None for Alice, who has none. Its difference to what is achieved is appended too.

    Examples
    --------
    >>> from mlcollage.papers.asymmetric_self_play import Grasp25D
    >>> world, state = Grasp25D(), torch.zeros(4, 8)
    >>> rows_of(world, state).shape, rows_of(world, state, world.achieved(state)).shape
    (torch.Size([4, 13]), torch.Size([4, 19]))
    """
    robot, objects = world.observe(state)
    if goal is not None:
        objects = torch.cat((objects, goal, goal - world.achieved(state)), -1)
    return torch.cat((robot, objects.flatten(1)), 1).to(torch.get_default_dtype())


def present_of(world: GoalWorld, state: Tensor) -> Tensor:
    """Real objects (n, K) bool."""
    return world.observe(state)[1][..., 0] > 0.5


def drawn(world: GoalWorld, goals: GoalSet, n: int, draw: torch.Generator, name: str) -> tuple[Tensor, Tensor]:
    """Draw n start states and goals of a user's set, refused where they do not fit the world."""
    if not callable(goals):
        raise InvalidInput(
            f"{name} must be a function of (n, generator) that gives start states and goals, not a "
            f"{type(goals).__name__}; of a dictionary of sets, take one by its name."
        )
    with users_code(f"{name}, called with (n, generator),"):
        start, goal = goals(n, draw)
        fits = len(start) == len(goal) == n and goal.shape == world.achieved(start).shape
    if not fits:
        raise InvalidInput(
            f"{name} gives states {tuple(start.shape)} and goals {tuple(goal.shape)} for n = {n}; expected (n, S) and "
            "(n, K, G), of K objects as the world has them."
        )
    if not bool(torch.isfinite(start).all() & torch.isfinite(goal).all()):
        raise InvalidInput(f"{name} gives start states or goals with NaN or infinity, which nobody can reach.")
    return start, goal


def stepped(world: GoalWorld, state: Tensor, choice: Tensor) -> Tensor:
    """States (n, S) after actions (n, D): continuous ones are clipped to [-1, 1] on the way, and kept as they are."""
    action = choice.clamp(-1, 1) if choice.is_floating_point() else choice
    if choice.is_floating_point() and any(world.bins):  # choices among continuous numbers are kept as they are
        choices = torch.tensor([b > 0 for b in world.bins], device=choice.device)
        action = torch.where(choices, choice, action)
    with users_code("the world's step"):
        return world.step(state, action)


@dataclass
class AliceTurn:
    """What Alice did: T steps at most of N games for each of R seeds."""

    states: Tensor  # (T + 1, R, N, S); once she has ended her turn, where she was
    x: Tensor  # (T, R, N, F)
    index: Tensor  # (T, R, N, D)
    logp: Tensor  # (T, R, N)
    steps: Tensor  # (R, N) in which she acted
    rows: Tensor  # (R, N) of which she learns: one more where she ended her turn


@dataclass
class BobTurn:
    """What Bob did, in rows of the games that he was still playing; padded to the same number for each seed."""

    states: Tensor  # (R, N, S) at the end
    solved: Tensor  # (R, N) bool
    steps: Tensor  # (R, N) taken
    reward: Tensor  # (T, R, N), of objects, and of the goal in its last step
    row_of: list[tuple[Tensor, Tensor]]  # for each step: games (R, m) and which of them are real
    x: list[Tensor]  # (R, m, F) for each step
    index: list[Tensor]
    logp: list[Tensor]


def _noise(seeds: Sequence[int], key: Sequence[int], shape: Sequence[int], like: Tensor) -> Tensor:
    """Uniform numbers (R, *shape), of which each seed has its own."""
    return torch.stack([torch.rand(*shape, generator=generator(seed, *key)) for seed in seeds]).to(like.device)


def alice_turn(
    world: GoalWorld,
    learner: Learner,
    state: Tensor,
    steps: int,
    key: Sequence[int],
    past: tuple[int, Mapping[str, Tensor]] | None = None,
) -> AliceTurn:
    """Alice acts for ``steps`` steps from states (R, N, S): exactly, unless she may end her turn herself.

    ``past`` is a number of games, the first ones, and the parameters of a snapshot that plays them.
    """
    r, n, s = state.shape
    noise = _noise(learner.seeds, (learner.side, *key), (steps, n, outputs_of(learner.bins)), state)
    start = world.achieved(state.reshape(r * n, s)) if learner.config.sees_start else None
    old = past[0] if past is not None else 0
    memory: Tensor | None = None
    memory_of_past: Tensor | None = None
    acts = torch.ones(r, n, dtype=torch.bool, device=state.device)
    acted, rows = (torch.zeros(r, n, dtype=torch.long, device=state.device) for _ in range(2))
    states: list[Tensor] = [state]
    xs: list[Tensor] = []
    indices: list[Tensor] = []
    logps: list[Tensor] = []
    for t in range(steps):
        x = rows_of(world, state.reshape(r * n, s), start).view(r, n, -1)
        logits, memory = learner.act(x, memory)
        if past is not None and old:
            logits_of_past, memory_of_past = learner.act(x[:, :old], memory_of_past, past[1])
            logits = torch.cat((logits_of_past, logits[:, old:]), 1)
        action = learner.sample(logits, noise[:, t])
        choice = action.choice[..., : len(world.bins)]
        after = stepped(world, state.reshape(r * n, s), choice.reshape(r * n, -1)).view(r, n, s)
        rows += acts
        if learner.stops:
            acts = acts & (action.choice[..., -1] == 0)
            after = torch.where(acts[..., None], after, state)
        acted += acts
        state = after
        for seen, kept in ((state, states), (x, xs), (action.choice, indices), (action.logp, logps)):
            kept.append(seen)
    return AliceTurn(torch.stack(states), torch.stack(xs), torch.stack(indices), torch.stack(logps), acted, rows)


def bob_turn(
    world: GoalWorld,
    learner: Learner,
    state: Tensor,
    goal: Tensor,
    playing: Tensor,
    steps: int,
    key: Sequence[int],
    *,
    parameters: Mapping[str, Tensor] | None = None,
    solved_bonus: float = 5.0,
    greedy: bool = False,
    limits: Tensor | None = None,
    course: list[Tensor] | None = None,
) -> BobTurn:
    """Bob acts from states (R, N, S) in the games that are ``playing`` (R, N) until all objects are at their goals.

    Games that are solved, or at their own one of the ``limits`` (R, N), stop where they are and leave the batch;
    nothing of them is computed, or counted, again. States (R, N, S) after each step are appended to ``course``.
    """
    r, n, s = state.shape
    k = goal.shape[2]
    lanes = torch.arange(r, device=state.device)[:, None]
    there = present_of(world, state.reshape(r * n, s)).view(r, n, k)

    def at(states: Tensor, goals: Tensor, real: Tensor) -> Tensor:
        flat = states.flatten(0, 1)
        near = at_goal(world.distance(world.achieved(flat), goals.flatten(0, 1)), world.thresholds)
        return near.view(*states.shape[:2], k) | ~real

    width = outputs_of(learner.bins)
    noise = None if greedy else _noise(learner.seeds, (learner.side, *key), (steps, n, width), state)
    state, before = state.clone(), at(state, goal, there)
    solved = before.all(-1) & playing
    active = playing & ~solved
    reward = torch.zeros(steps, r, n, device=state.device)
    taken = torch.zeros(r, n, dtype=torch.long, device=state.device)
    memory: Tensor | None = None  # (R, N, size)
    out = BobTurn(state, solved, taken, reward, [], [], [], [])
    for t in range(steps):
        most = int(active.sum(1).max())
        if not most:
            break
        games = (~active).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # (R, m), playing ones first
        real = active.gather(1, games)
        here, wanted = state[lanes, games], goal[lanes, games]
        x = rows_of(world, here.flatten(0, 1), wanted.flatten(0, 1)).view(r, most, -1)
        seen_whole = torch.isfinite(x).all(-1)  # who sees NaN cannot act: the turn is over, and lost
        real = real & seen_whole
        logits, after_step = learner.act(x, None if memory is None else memory[lanes, games], parameters)
        if after_step is not None:
            memory = after_step.new_zeros(r, n, after_step.shape[-1]) if memory is None else memory
            memory[lanes, games] = after_step
        action = learner.sample(logits, None if noise is None else noise[:, t][lanes, games])
        after = stepped(world, here.flatten(0, 1), action.choice.flatten(0, 1)).view(r, most, s)
        after = torch.where(real[..., None], after, here)
        state[lanes, games] = after
        now = at(after, wanted, there[lanes, games])
        gain = (now.sum(-1) - before[lanes, games].sum(-1)).float()
        done = now.all(-1) & real
        reward[t][lanes, games] = torch.where(real, gain + solved_bonus * done.float(), torch.zeros_like(gain))
        before[lanes, games] = torch.where(real[..., None], now, before[lanes, games])
        solved[lanes, games] |= done
        taken[lanes, games] += real.long()
        broken = ~torch.isfinite(after).all(-1)  # a simulator that gave up: the turn is over, and lost
        active[lanes, games] &= seen_whole & ~(done | broken)
        if limits is not None:
            active &= taken < limits
        if course is not None:
            course.append(state.clone())
        out.row_of.append((games, real))
        for seen, kept in ((x, out.x), (action.choice, out.index), (action.logp, out.logp)):
            kept.append(seen)
    return out
