"""The rules of the game, rotations, hold-out files and networks over sets."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.papers.asymmetric_self_play import (
    GoalVerdict,
    Grasp25D,
    SetPolicy,
    SetValue,
    action_logp,
    alice_reward,
    at_goal,
    block_holdouts,
    euler_to_quaternion,
    load_robogym_state,
    object_rewards,
    parallel_rotations,
    quaternion_conjugate,
    quaternion_multiply,
    rotation_distance,
    sample_actions,
    success_rate,
    time_rewards,
    validate_goal,
)

ROBOGYM = sorted((Path(__file__).parent / "robogym").glob("*.npz"))


def test_rotations_are_the_official_ones(official):
    d = official("rotation")
    q, p = d["q"], d["p"]
    torch.testing.assert_close(quaternion_multiply(q, p), d["mul"], rtol=0, atol=1e-14)
    torch.testing.assert_close(quaternion_conjugate(q), d["conjugate"], rtol=0, atol=1e-14)
    angle = rotation_distance(q, p)
    # arccos, which the official code takes, is inexact for small angles
    torch.testing.assert_close(angle, d["magnitude"], rtol=0, atol=1e-7)
    large = d["magnitude"] > 0.01
    torch.testing.assert_close(angle[large], d["magnitude"][large], rtol=0, atol=1e-13)
    made = euler_to_quaternion(d["euler"])
    same = (made * d["euler2quat"]).sum(-1).abs()
    torch.testing.assert_close(same, torch.ones_like(same), rtol=0, atol=1e-13)


def test_symmetric_bodies_are_the_official_ones(official):
    d = official("goal_rules")
    goal, current = euler_to_quaternion(d["goal_rot"]), euler_to_quaternion(d["cur_rot"])
    for symmetry, tag in (("none", "full"), ("mod90", "mod90"), ("mod180", "mod180")):
        angle = rotation_distance(goal, current, symmetry)
        torch.testing.assert_close(angle, d[f"{tag}_dist_rot"], rtol=0, atol=1e-6)
        place = (d["goal_pos"] - d["cur_pos"]).norm(dim=-1)
        near = at_goal(torch.stack((place, angle), -1), (0.04, 0.2))
        assert torch.equal(near, d[f"{tag}_object_success"])
        assert torch.equal(near.all(-1), d[f"{tag}_all_success"])
    still = euler_to_quaternion(torch.zeros(3, dtype=torch.float64))
    for symmetry, tag in (("none", "full"), ("mod90", "mod90"), ("mod180", "mod180")):
        z = d[f"unittest_{tag}_angle_z"]
        turned = euler_to_quaternion(torch.stack((0 * z, 0 * z, z), -1))
        found = rotation_distance(turned, still.expand_as(turned), symmetry)
        torch.testing.assert_close(found, d[f"unittest_{tag}_expected"], rtol=0, atol=1e-6)


def test_the_official_symmetry_groups_are_ours(official):
    for symmetry, name in (("mod90", "parallel_quat"), ("mod180", "parallel180_quat")):
        theirs, ours = official("rotation")[name], parallel_rotations(symmetry)
        assert len(theirs) == len(ours)
        assert bool(((theirs @ ours.T).abs().amax(1) > 1 - 1e-9).all())


def test_rewards_of_objects_are_the_official_ones(official):
    d = official("goal_rules")
    for s in range(len(d["seq_reward"])):
        goal, current = euler_to_quaternion(d["seq_goal_rot"][s]), euler_to_quaternion(d["seq_rot"][s])
        angle = rotation_distance(goal.expand_as(current), current)
        place = (d["seq_goal_pos"][s] - d["seq_pos"][s]).norm(dim=-1)
        at = at_goal(torch.stack((place, angle), -1), (0.04, 0.2))
        reward = torch.cat((torch.zeros(1), object_rewards(at)))
        torch.testing.assert_close(reward.double(), d["seq_reward"][s].double(), rtol=0, atol=1e-13)
        assert torch.equal(at.all(-1), d["seq_all_success"][s])


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=12))
@settings(max_examples=50, deadline=None)
def test_rewards_telescope(course):
    at = torch.tensor(course)
    reward = object_rewards(at)
    assert float(reward.sum()) == float(at[-1].sum()) - float(at[0].sum())
    assert bool((reward.cumsum(0).abs() <= 3).all())


def test_a_rotation_and_its_negative_are_the_same():
    g = torch.Generator().manual_seed(0)
    q, p = (torch.randn(50, 4, generator=g, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(rotation_distance(q, -p), rotation_distance(q, p), rtol=0, atol=1e-14)
    torch.testing.assert_close(rotation_distance(q, 1.01 * p), rotation_distance(q, p), rtol=0, atol=1e-14)
    small = euler_to_quaternion(torch.tensor([0.0, 0.0, 1e-4]))
    assert float(rotation_distance(small, torch.tensor([1.0, 0, 0, 0]))) == pytest.approx(1e-4, rel=1e-3)
    with pytest.raises(InvalidInput, match="length zero"):
        rotation_distance(torch.zeros(4), torch.ones(4))
    with pytest.raises(InvalidInput, match="w first"):
        rotation_distance(torch.zeros(3), torch.ones(3))


def test_goals_are_judged_in_the_paper_s_order():
    moved = torch.tensor([[[0.5]], [[0.01]], [[0.5]], [[0.5]], [[torch.nan]], [[0.01]], [[0.5]]])
    off = torch.tensor([0, 0, 1, 0, 0, 1, 1], dtype=torch.bool)[:, None]
    out = torch.tensor([0, 0, 0, 1, 0, 0, 1], dtype=torch.bool)[:, None]
    found = validate_goal(moved, (0.04,), off_table=off, out_of_zone=out)
    v = GoalVerdict
    expected = [
        v.VALID,
        v.INVALID_UNMOVED,
        v.INVALID_OFF_TABLE,
        v.OUT_OF_ZONE,
        v.INVALID_NOT_FINITE,
        v.INVALID_UNMOVED,
        v.INVALID_OFF_TABLE,
    ]
    assert found.tolist() == expected
    assert [verdict.playable for verdict in v] == [True, True, False, False, False]


def test_what_is_exactly_at_the_threshold_has_moved_and_is_not_solved():
    gap = torch.tensor([[[0.54 - 0.50]]], dtype=torch.float64)  # .040000000000000036
    no = torch.zeros(1, 1, dtype=torch.bool)
    assert not bool(at_goal(gap, (0.04,)))
    assert validate_goal(gap, (0.04,), off_table=no, out_of_zone=no).tolist() == [GoalVerdict.VALID]


def test_padding_is_solved_but_never_moved_nor_off_the_table():
    distance = torch.tensor([[[0.01], [9.0]]])
    there = torch.tensor([[True, False]])
    assert bool(at_goal(distance, (0.04,), there).all())
    off = torch.tensor([[False, True]])
    verdict = validate_goal(distance, (0.04,), off_table=off, out_of_zone=off, present=there)
    assert verdict.tolist() == [GoalVerdict.INVALID_UNMOVED]


def test_alice_earns_what_the_table_says():
    verdicts = torch.tensor(list(GoalVerdict)).repeat_interleave(2)
    solved = torch.tensor([True, False] * len(GoalVerdict))
    assert alice_reward(verdicts, solved).tolist() == [1.0, 6.0, -2.0, 3.0, *[0.0] * 6]


def test_rewards_by_time():
    a, b = time_rewards(torch.tensor([10, 10]), torch.tensor([4, 40]), torch.tensor([True, False]), most=50, scale=0.5)
    assert a.tolist() == [0.0, 15.0]
    assert b.tolist() == [-2.0, -20.0]


def test_success_rate_counts_no_goal_after_a_failure():
    assert success_rate(2, 1) == pytest.approx(2 / 3)
    assert success_rate(5, 0) == 1.0
    with pytest.raises(InvalidInput, match="no valid goal"):
        success_rate(0, 0)


@pytest.mark.parametrize("file", ROBOGYM, ids=lambda f: f.stem)
def test_robogym_states_are_read(file):
    state = load_robogym_state(file)
    assert state.position.shape == (len(state.quaternion), 3)
    torch.testing.assert_close(state.quaternion.norm(dim=-1), torch.ones(len(state.position), dtype=torch.float64))


def test_there_are_robogym_states():
    assert len(ROBOGYM) == 6


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"obj_pos": np.zeros((2, 3))}, "obj_quat"),
        ({"obj_pos": np.zeros((2, 2)), "obj_quat": np.eye(4)[:2]}, "obj_pos"),
        ({"obj_pos": np.zeros((3, 3)), "obj_quat": np.eye(4)[:2]}, "3 rows"),
        ({"obj_pos": np.full((2, 3), np.nan), "obj_quat": np.eye(4)[:2]}, "NaN"),
        ({"obj_pos": np.full((2, 3), 500.0), "obj_quat": np.eye(4)[:2]}, "millimeters"),
        ({"obj_pos": np.zeros((2, 3)), "obj_quat": 2 * np.eye(4)[:2]}, "length"),
        ({"obj_pos": np.array([{}, {}]), "obj_quat": np.eye(4)[:2]}, "pickled"),
    ],
)
def test_other_files_are_refused_with_their_key(tmp_path, arrays, says):
    np.savez(tmp_path / "state.npz", **arrays)
    with pytest.raises(InvalidInput, match=says):
        load_robogym_state(tmp_path / "state.npz")


def test_damaged_and_missing_files_are_refused(tmp_path):
    (tmp_path / "half.npz").write_bytes(ROBOGYM[0].read_bytes()[:300])
    with pytest.raises(InvalidInput, match="damaged"):
        load_robogym_state(tmp_path / "half.npz")
    with pytest.raises(MissingFile):
        load_robogym_state(tmp_path / "none.npz")
    with np.load(ROBOGYM[0]) as file:
        np.savez(tmp_path / "led.npz", obj_pos=file["obj_pos"][None], obj_quat=file["obj_quat"][None])
    assert len(load_robogym_state(tmp_path / "led.npz").position) == 6


def rows(policy, k, n=33):
    return torch.randn(n, policy.robot + k * policy.features, generator=torch.Generator().manual_seed(k))


def filled(policy, k, n=33):
    x = rows(policy, k, n)
    x[:, policy.robot :].view(n, k, -1)[..., 0] = 1
    return x


def test_exchanging_objects_and_adding_padding_changes_no_bit():
    policy = SetPolicy(3, 6, (5, 5))
    x = filled(policy, 3)
    robot, objects = x[:, :3], x[:, 3:].view(33, 3, 6)
    for order in itertools.permutations(range(3)):
        assert torch.equal(policy(torch.cat((robot, objects[:, order].flatten(1)), 1)), policy(x))
    pad = torch.randn(33, 2, 6)
    pad[..., 0] = 0
    assert torch.equal(policy(torch.cat((robot, objects.flatten(1), pad.flatten(1)), 1)), policy(x))
    assert policy(filled(policy, 7)).shape == (33, 10)


def test_padding_does_not_win_the_maximum():
    value = SetValue(0, 3)
    with torch.no_grad():
        for p in value.embed.parameters():
            p.fill_(-1.0)  # embeddings are negative: zeros of padding would win
    x = torch.tensor([[1.0, 0.5, 0.5]])
    padded = torch.cat((x, torch.zeros(1, 3)), 1)
    assert torch.equal(value(x), value(padded))


def test_log_probabilities_are_those_of_torch_distributions():
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for bins in ((4, 4), (2, 6), (3, 2, 3)):
        noise = torch.rand(40, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        index, logp = sample_actions(logits, bins, noise)
        heads = [torch.distributions.Categorical(logits=part) for part in logits.split(bins, -1)]
        theirs = sum(head.log_prob(index[:, d]) for d, head in enumerate(heads))
        torch.testing.assert_close(logp, theirs)
        entropy = action_logp(logits, index, bins)[1]
        torch.testing.assert_close(entropy, sum(head.entropy() for head in heads))


def test_actions_are_drawn_with_their_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(40_000, 3)
    noise = torch.rand(40_000, 3, generator=torch.Generator().manual_seed(0))
    index = sample_actions(logits, (3,), noise).choice.squeeze(1)
    share = torch.bincount(index, minlength=3) / 40_000
    torch.testing.assert_close(share, torch.tensor([0.0, 1.0, 2.0]).softmax(0), rtol=0, atol=0.01)


def test_holdouts_ask_for_what_they_are_called():
    world = Grasp25D(2)
    sets = block_holdouts(world)
    assert set(sets) == {"push", "pick", "stack"}
    for name, goals in sets.items():
        state, goal = goals(64, torch.Generator().manual_seed(0))
        again = goals(64, torch.Generator().manual_seed(0))
        assert torch.equal(state, again[0])
        assert torch.equal(goal, again[1])
        assert not bool(at_goal(world.distance(world.achieved(state), goal), world.thresholds).all(-1).any()), name
    assert bool((sets["push"](8, torch.Generator())[1][..., 2] == 0).all())
    stacked = sets["stack"](8, torch.Generator())[1]
    torch.testing.assert_close(stacked[:, 0] - stacked[:, 1], torch.tensor([0.0, 0.0, 0.1]).expand(8, 3))
