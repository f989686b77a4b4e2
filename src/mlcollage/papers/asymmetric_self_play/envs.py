"""The game as environments of others: PettingZoo's parallel one for both sides, Gymnasium's for Bob."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage.data.goal_tasks import GoalSet, GoalWorld, check_world
from mlcollage.errors import InvalidInput, MissingDependency

from .config import ASPConfig
from .goals import GoalVerdict, alice_reward, at_goal, validate_goal
from .gym import checked_actions
from .turns import drawn, present_of, rows_of, stepped

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from pettingzoo import ParallelEnv
except ImportError as error:
    raise MissingDependency("these environments need Gymnasium and PettingZoo: pip install 'mlcollage[rl]'.") from error

__all__ = ["ASPParallelEnv", "ASPVectorEnv", "GoalReachingEnv"]


def _near(world: GoalWorld, state: Tensor, goal: Tensor) -> Tensor:
    """Objects (n, K) at their goals."""
    return at_goal(world.distance(world.achieved(state), goal), world.thresholds, present_of(world, state))


def _box(width: int) -> Any:
    return spaces.Box(-np.inf, np.inf, (width,), np.float32)


def _actions(world: GoalWorld) -> Any:
    """The space of a world's actions."""
    if not any(world.bins):
        return spaces.Box(-1.0, 1.0, (len(world.bins),), np.float32)
    if 0 in world.bins:
        raise InvalidInput(
            f"the world's actions are choices and continuous numbers at once (bins {tuple(world.bins)}), for which "
            "there is no common space; give continuous dimensions bins, such as 11."
        )
    return spaces.MultiDiscrete(list(world.bins))


class ASPParallelEnv(ParallelEnv):
    """One game of Alice and Bob for PettingZoo: train both with any library for several learners.

    Both sides act in every step; the action of the side whose turn it is not is ignored, and its reward is 0. The first
    number of each observation says whether it is one's turn. Episodes end after ``goals`` goals, or an invalid one.
    Bob plays until he fails; from then on all turns are Alice's, who learns of each goal's reward when it is decided.

    Parameters
    ----------
    world
        Any :class:`~mlcollage.data.GoalWorld`.
    config
        ``goals``, ``alice_steps`` and ``bob_steps`` are used.

    Examples
    --------
    >>> from mlcollage.papers.asymmetric_self_play import ASPConfig, PlanarPush
    >>> env = ASPParallelEnv(PlanarPush(), ASPConfig(alice_steps=3, bob_steps=4))
    >>> observations, infos = env.reset(seed=0)
    >>> {name: seen.shape for name, seen in observations.items()}
    {'alice': (8,), 'bob': (12,)}
    """

    metadata = {"name": "asymmetric_self_play_v0", "render_modes": [], "is_parallelizable": True}  # noqa: RUF012

    def __init__(self, world: GoalWorld, config: ASPConfig | None = None) -> None:
        check_world(world)
        self.world, self.config = world, config or ASPConfig()
        self.possible_agents = ["alice", "bob"]
        self.agents: list[str] = []
        self.render_mode = None
        self._seed, self._episode = 0, 0
        self._begin()
        widths = {name: len(seen) for name, seen in self._observations().items()}
        self.observation_spaces = {name: _box(width) for name, width in widths.items()}
        self.action_spaces = {name: _actions(world) for name in self.possible_agents}

    def observation_space(self, agent: str) -> Any:
        """Rows of numbers; Bob's are longer by his goal."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Any:
        """The world's choices."""
        return self.action_spaces[agent]

    def _begin(self) -> None:
        start = self.world.initial(1, generator(self._seed, self._episode, 31))
        self._states = {"alice": start, "bob": start.clone()}
        self._before, self._goal = start.clone(), self.world.achieved(start)
        self._turn, self._time, self._goals, self._failed = "alice", 0, 0, False
        self._verdict = torch.zeros(1, dtype=torch.long)

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start a game; without a seed, the next one."""
        self._episode += 1
        if seed is not None:
            self._seed, self._episode = int(seed), 0
        self._begin()
        self.agents = list(self.possible_agents)
        return self._observations(), {name: {} for name in self.agents}

    def _observations(self) -> dict[str, Any]:
        rows = {
            "alice": rows_of(self.world, self._states["alice"]),
            "bob": rows_of(self.world, self._states["bob"], self._goal),
        }
        return {
            name: np.concatenate(([float(self._turn == name)], row[0].numpy())).astype(np.float32)
            for name, row in rows.items()
        }

    def step(self, actions: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        """One step of the side whose turn it is."""
        rewards, over = {"alice": 0.0, "bob": 0.0}, False
        mover = self._turn
        if not self.agents:
            raise InvalidInput("no game is on: call reset before the first step, and after the last one of a game.")
        if not isinstance(actions, dict) or mover not in actions:
            raise InvalidInput(f"actions must be a dictionary of both sides' actions; it is {mover}'s turn.")
        index = checked_actions(actions[mover], self.world.bins, 1)
        before = _near(self.world, self._states["bob"], self._goal)
        self._states[mover] = stepped(self.world, self._states[mover], index)
        self._time += 1
        if mover == "alice" and self._time == self.config.alice_steps:
            over = self._decide_goal(rewards)
        elif mover == "bob":
            now = _near(self.world, self._states["bob"], self._goal)
            rewards["bob"] = float(now.sum() - before.sum())
            solved = bool(now.all())
            if solved or self._time == self.config.bob_steps:
                over = self._end_turn(rewards, solved)
        observations = self._observations()
        ended = dict.fromkeys(self.agents, over)
        result = (
            observations,
            rewards,
            ended,
            dict.fromkeys(self.agents, False),
            {name: {"goals": self._goals} for name in self.agents},
        )
        if over:
            self.agents = []
        return result

    def _decide_goal(self, rewards: dict[str, float]) -> bool:
        """Alice's turn is over: is it a goal, and does Bob play for it?"""
        state = self._states["alice"]
        self._goal = self.world.achieved(state)
        self._verdict = validate_goal(
            self.world.distance(self._goal, self.world.achieved(self._before)),
            self.world.thresholds,
            off_table=self.world.off_table(state),
            out_of_zone=self.world.out_of_zone(state),
            present=present_of(self.world, state),
        )
        if int(self._verdict) > GoalVerdict.OUT_OF_ZONE:
            return True
        if self._failed:
            return self._end_turn(rewards, False, asked=False)
        if bool(_near(self.world, self._states["bob"], self._goal).all()):
            return self._end_turn(rewards, True, asked=False)
        self._turn, self._time = "bob", 0
        return False

    def _end_turn(self, rewards: dict[str, float], solved: bool, *, asked: bool = True) -> bool:
        rewards["alice"] = float(alice_reward(self._verdict, torch.tensor([solved])))
        rewards["bob"] += 5.0 if solved and asked else 0.0
        self._failed = self._failed or not solved
        self._goals += 1
        self._before, self._turn, self._time = self._states["alice"], "alice", 0
        return self._goals == self.config.goals

    def render(self) -> None:
        """Nothing is drawn."""

    def close(self) -> None:
        """Nothing is held."""


class GoalReachingEnv(gymnasium.Env):
    """Bob's side as a goal environment: observation, achieved and desired goal, and a reward that can be recomputed.

    Parameters
    ----------
    world
        Any :class:`~mlcollage.data.GoalWorld`.
    goals
        Start states and goals: hold-outs, or those of an Alice.
    bob_steps
        Steps until an episode is truncated.

    Examples
    --------
    >>> from mlcollage.papers.asymmetric_self_play import PlanarPush, disc_holdouts
    >>> env = GoalReachingEnv(PlanarPush(), disc_holdouts(PlanarPush())["push"])
    >>> sorted(env.reset(seed=0)[0])
    ['achieved_goal', 'desired_goal', 'observation']
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, world: GoalWorld, goals: GoalSet, bob_steps: int = 40) -> None:
        check_world(world)
        self.world, self.goals = world, goals
        self.bob_steps = checks.integer("bob_steps", bob_steps, least=1)
        state, goal = drawn(world, goals, 1, generator(0), "goals")
        self._state: Tensor | None = None
        width = goal[0].numel()
        self._shape = goal.shape[1:]
        self.observation_space = spaces.Dict(
            {
                "observation": _box(rows_of(world, state).shape[1]),
                "achieved_goal": _box(width),
                "desired_goal": _box(width),
            }
        )
        self.action_space = _actions(world)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw a start and a goal."""
        super().reset(seed=seed)
        draw = generator(int(self.np_random.integers(2**31)), 32)
        self._state, self._goal = drawn(self.world, self.goals, 1, draw, "goals")
        self._time = 0
        return self._observation(self._state), {}

    def _observation(self, state: Tensor) -> dict[str, Any]:
        parts = {
            "observation": rows_of(self.world, state)[0],
            "achieved_goal": self.world.achieved(state)[0].flatten(),
            "desired_goal": self._goal[0].flatten(),
        }
        return {name: part.numpy().astype(np.float32) for name, part in parts.items()}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One step; the reward is 0 at the goal and -1 elsewhere."""
        if self._state is None:
            raise InvalidInput("no episode is on: call reset before the first step.")
        self._state = stepped(self.world, self._state, checked_actions(action, self.world.bins, 1))
        self._time += 1
        seen = self._observation(self._state)
        reward = float(self.compute_reward(seen["achieved_goal"], seen["desired_goal"], {}))
        solved = reward == 0.0
        return seen, reward, solved, self._time >= self.bob_steps and not solved, {"is_success": solved}

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        """0 where all objects are at their goals, else -1; of one pair or of rows. Reads its arguments only."""
        a, g = (torch.as_tensor(np.asarray(v)).view(-1, *self._shape) for v in (achieved_goal, desired_goal))
        solved = at_goal(self.world.distance(a, g), self.world.thresholds).all(-1)
        reward = solved.numpy().astype(np.float32) - 1
        return reward if np.ndim(achieved_goal) > 1 else reward[0]


class ASPVectorEnv(VectorEnv):
    """Bob's side as a Gymnasium vector environment: n goals at once in one call of the world, no processes.

    Parameters
    ----------
    world
        Any :class:`~mlcollage.data.GoalWorld`.
    goals
        Start states and goals.
    num_envs
        Games at the same time.
    bob_steps
        Steps until a goal counts as failed, which truncates.

    Notes
    -----
    Autoreset is in the same step: the observation is that of the next goal, the true last one stands in
    ``info["final_obs"]``, with the mask ``info["_final_obs"]``.

    Examples
    --------
    >>> from mlcollage.papers.asymmetric_self_play import PlanarPush, disc_holdouts
    >>> envs = ASPVectorEnv(PlanarPush(), disc_holdouts(PlanarPush())["push"], num_envs=3)
    >>> observations, _ = envs.reset(seed=0)
    >>> observations.shape, envs.step(envs.action_space.sample())[1].shape
    ((3, 11), (3,))
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(self, world: GoalWorld, goals: GoalSet, num_envs: int = 16, *, bob_steps: int = 40) -> None:
        check_world(world)
        self.world, self.goals = world, goals
        self.num_envs = checks.integer("num_envs", num_envs, least=1)
        self.bob_steps = checks.integer("bob_steps", bob_steps, least=1)
        self._seed, self._draws = 0, 0
        self._times: Tensor | None = None  # until a reset
        self._state, self._goal = self._fresh()
        width = self._rows().shape[1]
        self.single_observation_space, self.single_action_space = _box(width), _actions(world)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, self.num_envs)

    def _fresh(self) -> tuple[Tensor, Tensor]:
        self._draws += 1
        return drawn(self.world, self.goals, self.num_envs, generator(self._seed, self._draws, 33), "goals")

    def _rows(self) -> Any:
        return rows_of(self.world, self._state, self._goal).numpy().astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Draw new starts and goals for all."""
        if seed is not None:
            if not isinstance(seed, int | np.integer):
                raise InvalidInput("one seed is enough for all copies, whose draws differ; give a whole number.")
            self._seed, self._draws = int(seed), 0
            self.action_space.seed(int(seed))
        self._state, self._goal = self._fresh()
        self._times = torch.zeros(self.num_envs, dtype=torch.long)
        return self._rows(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of all; +-1 for objects that reach or leave their goals, +5 where all are there."""
        if self._times is None:
            raise InvalidInput("no episode is on: call reset before the first step.")
        index = checked_actions(actions, self.world.bins, self.num_envs)
        before = _near(self.world, self._state, self._goal)
        self._state = stepped(self.world, self._state, index)
        self._times = self._times + 1
        now = _near(self.world, self._state, self._goal)
        terminated = now.all(-1)
        truncated = (self._times >= self.bob_steps) & ~terminated
        reward = (now.sum(-1) - before.sum(-1)).double() + 5.0 * terminated
        over = terminated | truncated
        info: dict[str, Any] = {}
        if bool(over.any()):
            info = {"final_obs": self._rows(), "_final_obs": over.numpy(), "is_success": terminated.numpy()}
            state, goal = self._fresh()
            self._state = torch.where(over[:, None], state, self._state)
            self._goal = torch.where(over[:, None, None], goal, self._goal)
            self._times = self._times.masked_fill(over, 0)
        return self._rows(), reward.numpy(), terminated.numpy(), truncated.numpy(), info
