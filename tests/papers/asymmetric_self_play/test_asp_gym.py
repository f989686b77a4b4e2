"""Environments of others as worlds, and the game as environments of others."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from pettingzoo.test import api_test, parallel_api_test
from pettingzoo.utils import parallel_to_aec

from mlcollage._random import generator
from mlcollage.data.goal_tasks import check_world
from mlcollage.errors import InvalidInput
from mlcollage.papers.asymmetric_self_play import (
    ASPConfig,
    ASPParallelEnv,
    ASPVectorEnv,
    AsymmetricSelfPlay,
    GoalReachingEnv,
    Grasp25D,
    GymnasiumWorld,
    PlanarPush,
    block_holdouts,
    certify,
    disc_holdouts,
)


class Cart(gymnasium.Env):
    """A cart on a line that a user might have; it hands out one buffer again and again."""

    observation_space = gymnasium.spaces.Dict(
        {
            "z_place": gymnasium.spaces.Box(-50, 50, (1,)),
            "achieved_goal": gymnasium.spaces.Box(-50, 50, (1,)),
            "desired_goal": gymnasium.spaces.Box(-50, 50, (1,)),
        }
    )
    action_space = gymnasium.spaces.Discrete(3, start=-1)

    def __init__(self):
        self.buffer = np.zeros(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.buffer[0] = self.np_random.integers(-5, 6)
        return self.seen(), {}

    def seen(self):
        return {"desired_goal": np.ones(1), "z_place": self.buffer, "achieved_goal": self.buffer}

    def step(self, action):
        self.buffer[0] += action
        return self.seen(), 0.0, bool(abs(self.buffer[0]) > 20), False, {}

    def get_state(self):
        return self.buffer

    def set_state(self, state):
        self.buffer[:] = state


class Box(Cart):
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def step(self, action):
        assert self.action_space.contains(action)
        return super().step(action[0])


def test_a_user_s_environment_is_a_world():
    world = GymnasiumWorld(Cart, threshold=0.5)
    assert world.bins == (3,)
    check_world(world)
    assert certify(world).deviation == 0.0
    start = world.initial(4, generator(0))
    assert torch.equal(start, world.initial(4, generator(0)))
    assert len(start[:, 0].unique()) > 1
    after = world.step(start, torch.tensor([[2], [2], [1], [0]]))
    assert (after[:, 0] - start[:, 0]).tolist() == [1.0, 1.0, 0.0, -1.0]
    # any row can be gone on from, by any copy, and in any order
    again = world.step(start.flip(0), torch.tensor([[0], [1], [2], [2]]))
    assert torch.equal(again.flip(0), after)


def test_neither_side_s_observation_holds_the_desired_goal_and_names_are_in_order():
    world = GymnasiumWorld(Cart, threshold=0.5)
    robot, objects = world.observe(world.initial(2, generator(1)))
    assert robot.shape == (2, 2)  # achieved_goal and z_place
    assert objects.shape == (2, 1, 2)
    assert torch.equal(robot[:, 0], objects[:, 0, 1])


def test_an_episode_that_ends_makes_the_goal_invalid_and_stays():
    world = GymnasiumWorld(Cart, threshold=0.5)
    state = world.initial(1, generator(0))
    for _ in range(40):
        state = world.step(state, torch.tensor([[2]]))
    assert bool(world.off_table(state).all())
    assert float(state[0, 0]) == 21.0


def test_boxes_are_binned_with_a_middle():
    world = GymnasiumWorld(Box, threshold=0.5, bins=5)
    state = world.initial(1, generator(0))
    for choice, move in enumerate((-1.0, -0.5, 0.0, 0.5, 1.0)):
        after = world.step(state, torch.tensor([[choice]]))
        assert float(after[0, 0] - state[0, 0]) == pytest.approx(move)
    with pytest.warns(UserWarning, match="even"):
        GymnasiumWorld(Box, threshold=0.5, bins=4)


def test_self_play_learns_in_a_user_s_environment():
    game = AsymmetricSelfPlay(
        GymnasiumWorld(Cart, threshold=0.5), ASPConfig(envs=8, alice_steps=4, bob_steps=6, store_invalid=True)
    )
    game.fit(600)
    assert game.health()["valid"].sum() > 0


class NoState(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}


class Deaf(Cart):
    def set_state(self, state):
        pass


class Same(Cart):
    def reset(self, *, seed=None, options=None):
        self.buffer[:] = 0
        return self.seen(), {}


class Unbounded(Cart):
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))


def limited():
    return gymnasium.wrappers.TimeLimit(Cart(), 3)


@pytest.mark.parametrize(
    ("make", "says"),
    [(NoState, "get_state and set_state"), (Deaf, "something else"), (Unbounded, "finite bounds")],
)
def test_environments_that_do_not_fit_are_refused(make, says):
    with pytest.raises(InvalidInput, match=says):
        GymnasiumWorld(make, threshold=0.5)


def test_a_time_limit_and_equal_starts_are_refused():
    world = GymnasiumWorld(limited, threshold=0.5)
    state = world.initial(1, generator(0))
    for _ in range(2):
        state = world.step(state, torch.tensor([[1]]))
    with pytest.raises(InvalidInput, match="time limit"):
        world.step(state, torch.tensor([[1]]))
    with pytest.raises(InvalidInput, match="same start"):
        GymnasiumWorld(Same, threshold=0.5).initial(3, generator(0))
    one = Cart()
    with pytest.raises(InvalidInput, match="fresh one"):
        GymnasiumWorld(lambda: one, threshold=0.5).initial(2, generator(0))


def small():
    return ASPParallelEnv(PlanarPush(), ASPConfig(alice_steps=3, bob_steps=4, goals=3))


def test_pettingzoo_s_own_tests_pass(capsys):
    parallel_api_test(small(), num_cycles=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no state() and no render mode
        api_test(parallel_to_aec(small()), num_cycles=100)
    assert "Passed" in capsys.readouterr().out


def test_gymnasium_s_own_test_passes():
    world = Grasp25D()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # boxes without bounds are what they are
        check_env(GoalReachingEnv(world, block_holdouts(world)["pick"]), skip_render_check=True)


def test_rewards_of_the_parallel_game():
    env = small()
    env.reset(seed=0)
    env._states = {name: torch.tensor([[0.0, 0.0, 0.15, 0.0]]) for name in env.agents}
    env._before = env._states["alice"]
    right, still = np.array([4, 2]), np.array([2, 2])
    for _ in range(3):  # Alice pushes the disc by .45 - .05
        seen, rewards, ended, _, _ = env.step({"alice": right, "bob": still})
    assert rewards == {"alice": 0.0, "bob": 0.0}
    assert seen["bob"][0] == 1.0
    total = 0.0
    for _ in range(3):
        seen, rewards, ended, _, _ = env.step({"alice": still, "bob": right})
        total += rewards["bob"]
        if rewards["alice"]:
            break
    assert total == 6.0  # one object, and the goal
    assert rewards["alice"] in (1.0, -2.0)  # he solved it; the zone ends at .5
    assert seen["alice"][0] == 1.0
    assert not any(ended.values())


def test_achieved_rewards_are_recomputed_from_their_arguments():
    world = Grasp25D()
    env = GoalReachingEnv(world, block_holdouts(world)["push"])
    seen, _ = env.reset(seed=1)
    rows = np.stack([seen["achieved_goal"], seen["desired_goal"]])
    assert env.compute_reward(rows, np.stack([seen["desired_goal"]] * 2), {}).tolist() == [-1.0, 0.0]


def test_the_vector_environment_resets_in_the_same_step_and_keeps_the_last_observation():
    world = PlanarPush()
    envs = ASPVectorEnv(world, disc_holdouts(world)["push"], 3, bob_steps=2)
    first, _ = envs.reset(seed=4)
    again, _ = envs.reset(seed=4)
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert envs.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.SAME_STEP
    still = np.full((3, 2), 2)
    _, _, terminated, truncated, info = envs.step(still)
    assert not info
    seen, reward, terminated, truncated, info = envs.step(still)
    assert truncated.all()
    assert not terminated.any()
    assert np.array_equal(info["final_obs"], first)
    assert info["_final_obs"].all()
    assert not np.array_equal(seen, first)
    assert reward.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(InvalidInput, match="whole numbers"):
        envs.step(np.full((3, 2), 7))
