"""Vector environments of others, in all three of their ways to reset; images."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from mlcollage.errors import InvalidInput
from mlcollage.papers.asymmetric_self_play import (
    ASPConfig,
    ASPVectorEnv,
    AsymmetricSelfPlay,
    GymnasiumWorld,
    PlanarPush,
    VectorSteps,
    disc_holdouts,
    gae,
)


class Count(gymnasium.Env):
    """Counts its steps from a random start; ends at the third, or is cut at the fifth."""

    observation_space = gymnasium.spaces.Box(-999, 999, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, cut):
        self.cut, self.buffer = cut, np.zeros(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.buffer[:] = self.np_random.integers(100), 0
        return self.buffer.copy(), {}

    def step(self, action):
        self.buffer[1] += 1
        ended = not self.cut and self.buffer[1] == 3
        return self.buffer.copy(), float(action), ended, self.cut and self.buffer[1] == 5, {}


def course(mode, steps=14):
    envs = VectorSteps(SyncVectorEnv([lambda: Count(False), lambda: Count(True)], autoreset_mode=mode))
    seen, found = envs.reset(seed=3), []
    for _ in range(steps):
        taken = envs.step(np.array([1, 1]))
        found.append((seen, taken))
        seen = taken.observation
    return found


def real_steps(found, i):
    return [
        (*seen[i].tolist(), *t.last[i].tolist(), t.reward[i], bool(t.terminated[i]), bool(t.truncated[i]))
        for seen, t in found
        if t.real[i]
    ]


@pytest.mark.parametrize("i", [0, 1])
def test_all_three_ways_give_the_same_transitions(i):
    ways = [real_steps(course(mode), i) for mode in AutoresetMode]
    shortest = min(map(len, ways))
    assert shortest >= 10
    assert ways[0][:shortest] == ways[1][:shortest] == ways[2][:shortest]
    for before, after, *_ in ((r[:2], r[2:4]) for r in ways[0]):
        assert after == (before[0], before[1] + 1)  # the true last observation, never that of the next episode


def test_rows_that_a_reset_took_are_marked_and_no_others():
    found = course(AutoresetMode.NEXT_STEP)
    phantom = np.stack([~t.real for _, t in found])
    assert np.flatnonzero(phantom[:, 0]).tolist() == [3, 7, 11]
    assert np.flatnonzero(phantom[:, 1]).tolist() == [5, 11]
    assert not any(t.terminated[~t.real].any() or t.truncated[~t.real].any() for _, t in found)
    assert all(t.real.all() for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED) for _, t in course(mode))


def test_advantages_of_real_rows_do_not_depend_on_the_way():
    """Values are a function of observations; the recursion is cut where an episode ends."""

    def value(rows):
        return torch.from_numpy(np.stack(rows)).double() @ torch.tensor([0.01, 0.2], dtype=torch.float64)

    found = []
    for mode in AutoresetMode:
        rows = course(mode, 24)
        flags = [
            torch.from_numpy(np.stack([getattr(t, name) for _, t in rows])) for name in ("terminated", "truncated")
        ]
        real = torch.from_numpy(np.stack([t.real for _, t in rows]))
        reward = torch.from_numpy(np.stack([t.reward for _, t in rows]))
        advantages, _ = gae(
            reward,
            value([seen for seen, _ in rows]),
            flags[0],
            truncated=flags[1],
            final_values=value([t.last for _, t in rows]),
            next_value=value([rows[-1][1].observation])[0],
            gamma=0.9,
            lam=0.8,
        )
        found.append([advantages[real[:, i], i][:10] for i in range(2)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_what_does_not_say_how_it_resets_is_refused():
    envs = SyncVectorEnv([lambda: Count(False)])
    envs.metadata = {"render_modes": []}
    with pytest.raises(InvalidInput, match="does not say how it resets"):
        VectorSteps(envs)
    with pytest.raises(InvalidInput, match="SyncVectorEnv"):
        VectorSteps(Count(False))
    with pytest.raises(InvalidInput, match="reset before"):
        VectorSteps(SyncVectorEnv([lambda: Count(False)])).step(np.array([0]))
    with pytest.raises(InvalidInput, match="vector environment"):
        GymnasiumWorld(lambda: SyncVectorEnv([lambda: Count(False)]), lambda seen: seen, threshold=0.1)


def test_our_own_vector_environment_and_one_of_dictionaries():
    world = PlanarPush()
    steps = VectorSteps(ASPVectorEnv(world, disc_holdouts(world)["push"], 3, bob_steps=2))
    first = steps.reset(seed=1)
    still = np.full((3, 2), 2)
    steps.step(still)
    taken = steps.step(still)
    assert taken.truncated.all()
    np.testing.assert_array_equal(taken.last, first)
    assert not np.array_equal(taken.observation, first)

    class Named(Count):
        observation_space = gymnasium.spaces.Dict({"place": Count.observation_space})

        def reset(self, **kwargs):
            seen, info = super().reset(**kwargs)
            return {"place": seen}, info

        def step(self, action):
            seen, *rest = super().step(action)
            return {"place": seen}, *rest

    named = VectorSteps(SyncVectorEnv([lambda: Named(False)], autoreset_mode=AutoresetMode.SAME_STEP))
    named.reset(seed=0)
    last = [named.step(np.array([0])) for _ in range(3)][-1]
    assert last.last["place"][0, 1] == 3.0
    assert last.observation["place"][0, 1] == 0.0


class OneBuffer(Count):
    def reset(self, **kwargs):
        super().reset(**kwargs)
        return self.buffer, {}

    def step(self, action):
        return self.buffer, *super().step(action)[1:]


def test_last_observations_that_a_reset_overwrote_are_told():
    steps = VectorSteps(SyncVectorEnv([lambda: OneBuffer(False)], autoreset_mode=AutoresetMode.SAME_STEP))
    steps.reset(seed=0)
    for _ in range(2):
        steps.step(np.array([0]))
    with pytest.warns(UserWarning, match="same buffer"):
        steps.step(np.array([0]))


# -- images ---------------------------------------------------------------------------------------------------------


class Camera(gymnasium.Env):
    """A dot on a picture of 8 by 6 pixels, in a dictionary beside its place."""

    observation_space = gymnasium.spaces.Dict(
        {
            "pixels": gymnasium.spaces.Box(0, 255, (8, 6, 3), np.uint8),
            "place": gymnasium.spaces.Box(-99, 99, (2,), np.float64),
        }
    )
    action_space = gymnasium.spaces.Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.integers(0, [8, 6])
        return self.seen(), {}

    def seen(self):
        pixels = np.zeros((8, 6, 3), np.uint8)
        pixels[int(self.x[0]) % 8, int(self.x[1]) % 6] = 255
        return {"pixels": pixels, "place": self.x.astype(float)}

    def step(self, action):
        self.x = self.x + [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)][action]
        return self.seen(), 0.0, False, False, {}

    def get_state(self):
        return self.x

    def set_state(self, state):
        self.x = np.array(state).astype(int)


def test_images_are_refused_or_taken_through_an_encoder_of_one_s_own():
    def objects(seen):
        return seen["place"][None]

    with pytest.raises(InvalidInput, match=r"images \(8, 6, 3\) of uint8"):
        GymnasiumWorld(Camera, objects, threshold=0.5)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten())

    def encode(seen):
        with torch.no_grad():
            return net(torch.from_numpy(seen["pixels"]).permute(2, 0, 1)[None].float() / 255)[0]

    world = GymnasiumWorld(Camera, objects, threshold=0.5, encode=encode)
    state = world.initial(3, torch.Generator().manual_seed(0))
    robot, _ = world.observe(state)
    assert robot.shape == (3, 2 * 6 * 4)
    env = Camera()
    for row, kept in zip(robot, state, strict=True):
        env.set_state(kept[:2].numpy())
        torch.testing.assert_close(row.float(), encode(env.seen()))
    AsymmetricSelfPlay(world, ASPConfig(envs=3, alice_steps=3, bob_steps=3, store_invalid=True)).turn()
    with pytest.raises(InvalidInput, match="flat array"):
        GymnasiumWorld(Camera, objects, threshold=0.5, encode=lambda seen: seen["pixels"])
