"""MuJoCo's boxes: replays, grasps, what falls off, and a simulation that gives up."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from mlcollage._random import generator
from mlcollage.data.goal_tasks import check_world
from mlcollage.errors import InvalidInput
from mlcollage.papers.asymmetric_self_play import (
    ASPConfig,
    AsymmetricSelfPlay,
    GoalVerdict,
    MujocoTabletop,
    at_goal,
    certify,
    tabletop_holdouts,
)

STILL = [5, 5, 5, 5, 10]


@pytest.fixture(scope="module")
def world():
    return MujocoTabletop(2, threads=1)


def acted(world, state, *steps):
    for choices, times in steps:
        for _ in range(times):
            state = world.step(state, torch.tensor([choices]).expand(len(state), -1))
    return state


def above(world, box=0):
    """The gripper over a box that stands straight."""
    state = world.initial(1, generator(1))
    joints, _, boxes, _ = world._parts(state)
    boxes[:, box, 3:] = torch.tensor([1.0, 0, 0, 0])
    joints[:, :2], joints[:, 2:4] = boxes[:, box, :2], 0.0
    return state


def test_replays_are_exact_and_boxes_at_rest_stay(world):
    check_world(world)
    found = certify(world, games=6, steps=8)
    assert found.deviation == 0.0
    assert found.still_goals == 0


def test_rows_do_not_depend_on_their_neighbors_or_threads(world):
    state = world.initial(5, generator(2))
    actions = torch.randint(11, (4, 5, 5), generator=generator(3))
    two = MujocoTabletop(2, threads=2)
    together = alone = threaded = state
    for action in actions:
        together, threaded = world.step(together, action), two.step(threaded, action)
        alone = torch.cat([world.step(alone[i : i + 1], action[i : i + 1]) for i in range(5)])
    assert torch.equal(together, alone)
    assert torch.equal(together, threaded)


def test_a_box_is_grasped_and_lifted(world):
    state = acted(world, above(world), ([5, 5, 0, 5, 10], 12), ([5, 5, 5, 5, 0], 6), ([5, 5, 10, 5, 0], 8))
    assert float(world.achieved(state)[0, 0, 2]) > 0.1
    dropped = acted(world, state, ([5, 5, 5, 5, 10], 15))
    assert float(world.achieved(dropped)[0, 0, 2]) == pytest.approx(0.025, abs=0.01)


def test_goals_on_the_table_in_the_air_and_turned(world):
    sets = tabletop_holdouts(world)
    assert set(sets) == {"push", "flip", "pick", "stack"}
    for name, goals in sets.items():
        state, goal = goals(32, generator(4))
        assert not bool(at_goal(world.distance(world.achieved(state), goal), world.thresholds).all(-1).any()), name
    state, goal = sets["flip"](8, generator(4))
    turned = world.distance(world.achieved(state), goal)[:, 0, 1]
    torch.testing.assert_close(turned, torch.full((8,), torch.pi / 2, dtype=torch.float64))


def test_flipped_boxes_lie_flat(world):
    """In scipy's rotation matrices one of the body's axes is vertical."""
    _, goal = tabletop_holdouts(world)["flip"](32, generator(4))
    vertical = Rotation.from_quat(goal[:, 0, 3:].numpy(), scalar_first=True).as_matrix()[:, 2]
    assert np.abs(np.abs(vertical).max(1) - 1).max() < 1e-9
    assert np.abs(vertical).argmax(1).tolist() == [1] * 32  # on a side, and not as they stood


FRAMES = """
import torch
from mlcollage.papers.asymmetric_self_play import ASPConfig, AsymmetricSelfPlay, MujocoTabletop, episode_page
from mlcollage.errors import InvalidInput
world = MujocoTabletop(threads=1)
try:
    picture = world.frame(world.initial(1, torch.Generator().manual_seed(0))[0])
    print("drawn", picture.shape, picture.dtype, picture.std() > 10)
except InvalidInput as error:
    print("refused", "MUJOCO_GL" in str(error))
game = AsymmetricSelfPlay(world, ASPConfig(envs=2, alice_steps=2, bob_steps=2, embed=(4,), hidden=()))
text = episode_page(game, "episode.html", games=1).read_text()
print("frames" if "data:image/jpeg;base64," in text else "from above")
"""


@pytest.mark.parametrize("gl", ["osmesa", "egl", "disabled"])
def test_frames_are_drawn_or_refused_and_the_page_falls_back(gl, tmp_path):
    """In a process of its own, since MuJoCo takes its OpenGL when it is imported."""
    environment = {**os.environ, "MUJOCO_GL": gl}
    found = subprocess.run(
        [sys.executable, "-c", FRAMES], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if found.returncode and gl != "disabled":
        # the import itself fails where this OpenGL is not installed
        assert "OpenGL" in found.stderr or "EGL" in found.stderr or "GL" in found.stderr, found.stderr
        return
    said = found.stdout.splitlines()
    assert said in (["drawn (240, 320, 3) uint8 True", "frames"], ["refused True", "from above"]), found.stderr
    assert gl != "disabled" or said[0] == "refused True"


def test_what_leaves_the_table_is_off_it(world):
    state = world.initial(2, generator(5))
    world._parts(state)[2][0, 1, 0] = 0.4
    assert world.off_table(state).tolist() == [[False, True], [False, False]]
    assert world.out_of_zone(state)[0].tolist() == [False, True]


def test_a_simulation_that_gives_up_is_told_and_teaches_nothing(world):
    state = world.initial(3, generator(6))
    world._parts(state)[3][1] = 1e12  # a box at an absurd speed: MuJoCo resets itself
    after = acted(world, state, (STILL, 1))
    assert torch.isfinite(after).all(1).tolist() == [True, False, True]
    assert torch.isfinite(acted(world, after, (STILL, 1))).all(1).tolist() == [True, False, True]


class Breaks(MujocoTabletop):
    """Gives up on one side of the table, from the second step on."""

    def step(self, state, action):
        after = super().step(state, action)
        after[(after[:, 1] > 0) & (after[:, 0] > 0.015)] = torch.nan
        return after


@pytest.mark.parametrize("ends", ["end", "go_on"])
def test_a_broken_game_does_not_reach_a_network(ends):
    sizes = {"envs": 8, "alice_steps": 3, "bob_steps": 3, "embed": (8,), "hidden": (8,)}
    config = ASPConfig(**sizes, store_invalid=True, turn_end=ends, bob_timeout=ends)
    game = AsymmetricSelfPlay(Breaks(1, threads=1, substeps=5), config)
    seen = []
    for _ in range(3):
        seen += game.turn().verdict.flatten().tolist()
    assert GoalVerdict.INVALID_NOT_FINITE in seen
    for side in (game.alice, game.bob):
        for p in (*side.policy.parameters.values(), *side.value.parameters.values()):
            assert bool(torch.isfinite(p).all())


def test_sizes_are_checked():
    for wrong in ({"boxes": 9}, {"threshold": 0.5}, {"symmetry": "round"}, {"substeps": 0}):
        with pytest.raises(InvalidInput, match=next(iter(wrong))):
            MujocoTabletop(**wrong)
