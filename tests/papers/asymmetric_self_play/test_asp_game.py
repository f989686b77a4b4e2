"""The game: turns, accounting, demonstrations, snapshots, stacked seeds, replays."""

import dataclasses
import math

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
    Grasp25D,
    GraspAndTurn,
    PlanarPush,
    SetPolicy,
    action_logp,
    block_holdouts,
    certify,
    coverage_entropy,
    disc_holdouts,
    relabel,
    rotation_distance,
)
from mlcollage.papers.asymmetric_self_play.turns import alice_turn, bob_turn, rows_of

SMALL = ASPConfig(envs=24, alice_steps=6, bob_steps=8, store_invalid=True, snapshot_every=2, embed=(8,), hidden=(8,))


class Line:
    """A cart on a line that moves by one to the left or right, or stays: everything can be worked out by hand."""

    bins = (3,)
    thresholds = (0.5,)

    def initial(self, n, generator):
        return torch.randint(-3, 4, (n, 1), generator=generator).float()

    def step(self, state, action):
        return state + action.float() - 1

    def observe(self, state):
        return state[:, :0], torch.stack((torch.ones_like(state), state / 10), -1)

    def achieved(self, state):
        return state[:, :, None]

    def distance(self, achieved, goal):
        return (achieved - goal).abs()

    def off_table(self, state):
        return state.abs() > 200

    def out_of_zone(self, state):
        return state.abs() > 100


class Scripted(torch.nn.Module):
    """A policy that always takes one action."""

    def __init__(self, choice, bins=3):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(bins))
        self.choice = choice

    def forward(self, x):
        logits = torch.full_like(self.weight, -50.0)
        logits[self.choice] = 50.0
        return (logits + self.weight).expand(*x.shape[:-1], -1)


def scripted(alice, bob, **settings):
    """A game of two scripted sides; rows of Bob are longer."""
    config = dataclasses.replace(SMALL, **{"past_opponent": 0.0, "learn_alice": False, "lr": 1e-9, **settings})
    return AsymmetricSelfPlay(Line(), config, policy=lambda robot, f, bins: Scripted(alice if f == 2 else bob))


def test_the_worlds_are_fit_for_the_game():
    for world in (Grasp25D(), Grasp25D(2), GraspAndTurn(), GraspAndTurn(2), PlanarPush(), PlanarPush(3), Line()):
        check_world(world)
        found = certify(world)
        assert found.deviation == 0.0
        assert found.still_goals == 0


def test_bob_who_does_what_alice_did_reaches_five_goals_and_the_game_begins_anew():
    game = scripted(2, 2)
    for turn in range(1, 6):
        found = game.turn()
        assert bool((found.verdict <= GoalVerdict.OUT_OF_ZONE).all())
        assert bool(found.solved.all())
        assert bool((found.bob_steps == 6).all())
        assert bool((game._over == (turn == 5)).all())
        assert int(found.gauges["demos"]) == 0
    again = game.turn()
    assert bool((again.start.abs() <= 3).all())


def test_after_a_failure_bob_plays_no_more_and_all_later_goals_count_for_alice():
    game = scripted(2, 0)
    for turn in range(5):
        found = game.turn()
        assert bool((found.played == (turn == 0)).all())
        assert not bool(found.solved.any())
        # demonstrations keep coming in, also of goals that Bob was not asked for
        assert int(found.gauges["demos"]) == 24
    assert bool(game.turn().played.all())


def test_an_invalid_goal_ends_the_game_and_bob_is_not_asked():
    game = scripted(1, 2)
    found = game.turn()
    assert bool((found.verdict == GoalVerdict.INVALID_UNMOVED).all())
    assert not bool(found.played.any())
    assert bool(game._over.all())
    assert int(found.gauges["demos"]) == 0
    assert int(game.steps) == 24 * 6


def test_a_goal_that_is_invalid_on_turn_two():
    game = scripted(2, 2)
    game.turn()
    game._alice_state = torch.full_like(game._alice_state, 199.0)
    found = game.turn()
    assert bool((found.verdict == GoalVerdict.INVALID_OFF_TABLE).all())
    assert bool(game._over.all())


def test_a_goal_that_is_met_at_the_start_costs_no_step():
    game = scripted(2, 0)
    world, state = Line(), torch.zeros(1, 4, 1)
    playing = torch.ones(1, 4, dtype=torch.bool)
    found = bob_turn(world, game.bob, state, world.achieved(state[0])[None], playing, 8, (0,))
    assert bool(found.solved.all())
    assert int(found.steps.sum()) == 0
    assert not found.x


def test_solved_games_stay_as_they_were_and_are_not_counted():
    game = scripted(2, 2)
    world, state = Line(), torch.zeros(1, 3, 1)
    goal = torch.tensor([2.0, 5.0, -4.0])[None, :, None, None]
    playing = torch.tensor([[True, True, True]])
    found = bob_turn(world, game.bob, state, goal, playing, 8, (0,))
    assert found.states[0, :, 0].tolist() == [2.0, 5.0, 8.0]
    assert found.steps[0].tolist() == [2, 5, 8]
    assert found.solved[0].tolist() == [True, True, False]
    assert sum(int(real.sum()) for _, real in found.row_of) == 15
    assert found.reward.sum(0)[0].tolist() == [6.0, 6.0, 0.0]
    assert found.reward[1, 0, 0] == 6.0


def test_demonstrations_pair_actions_with_the_states_before_them():
    game = scripted(2, 0)
    world, start = Line(), torch.tensor([[[0.0], [1.0], [2.0]]])
    turn = alice_turn(world, game.alice, start, 4, (0,))
    goal = world.achieved(turn.states[-1][0])[None]
    demos = relabel(world, turn.states, turn.index, goal, torch.tensor([[True, False, True]]))
    assert bool(demos.mask.all())
    rows = demos.x[0].view(4, 2, 4)  # there, place / 10, goal, goal - place
    for k, first in enumerate((0.0, 2.0)):
        place = torch.arange(4.0) + first
        expected = torch.stack((torch.ones(4), place / 10, torch.full((4,), first + 4), first + 4 - place), 1)
        torch.testing.assert_close(rows[:, k], expected)
    assert bool((demos.choice == 2).all())
    with pytest.raises(InvalidInput, match="pair"):
        relabel(world, turn.states[:-1], turn.index, goal, torch.tensor([[True, False, True]]))


def test_turns_of_seeds_with_different_numbers_of_demonstrations_are_padded():
    game = scripted(2, 0)
    turn = alice_turn(Line(), game.alice, torch.zeros(1, 3, 1), 4, (0,))
    states, index = (t.expand(-1, 2, *t.shape[2:]) for t in (turn.states, turn.index))
    goal = Line().achieved(turn.states[-1][0]).expand(2, 3, 1, 1)
    wanted = torch.tensor([[True, True, False], [False, False, True]])
    found = relabel(Line(), states, index, goal, wanted)
    assert found.mask.sum(1).tolist() == [8, 4]
    alone = relabel(Line(), states[:, 1], index[:, 1], goal[1], wanted[1])
    torch.testing.assert_close(found.x[1][found.mask[1]], alone.x)


def test_seeds_learn_stacked_as_they_learn_alone():
    config = dataclasses.replace(SMALL, past_opponent=0.3)
    stacked = AsymmetricSelfPlay(Grasp25D(), config, seeds=(3, 4, 5))
    alone = AsymmetricSelfPlay(Grasp25D(), config, seeds=(4,))
    for _ in range(4):
        a, b = stacked.turn(), alone.turn()
        assert torch.equal(a.verdict[1], b.verdict[0])
        assert torch.equal(a.solved[1], b.solved[0])
    assert int(stacked.steps[1]) == int(alone.steps[0])
    for side, other in ((stacked.alice, alone.alice), (stacked.bob, alone.bob)):
        for name, p in side.policy.parameters.items():
            torch.testing.assert_close(p[1], other.policy.parameters[name][0], rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_numbers_and_global_states_are_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    runs = []
    for _ in range(2):
        game = AsymmetricSelfPlay(PlanarPush(), SMALL, seeds=(7,))
        game.fit(600)
        runs.append(game.evaluate(disc_holdouts(PlanarPush()), n=8))
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0].equals(runs[1])


def test_evaluation_changes_nothing():
    game = AsymmetricSelfPlay(PlanarPush(), SMALL, seeds=(1,))
    game.turn()
    kept, steps = game.snapshot(), game.steps.clone()
    table = game.evaluate(disc_holdouts(PlanarPush()), n=16)
    assert torch.equal(steps, game.steps)
    assert all(torch.equal(p, game.bob.policy.parameters[name]) for name, p in kept.bob.items())
    assert table["rate"].tolist() == [table["successes"].iloc[0] / 16]
    assert (table["low"] <= table["rate"]).all()
    assert (table["rate"] <= table["high"]).all()


def test_snapshots_share_nothing_with_the_policies():
    game = AsymmetricSelfPlay(PlanarPush(), SMALL, seeds=(1,))
    x = torch.randn(1, 5, 7)
    kept = game.snapshot()
    before = game.alice.act(x, parameters=kept.alice)[0]
    for _ in range(3):
        game.turn()
    assert torch.equal(game.alice.act(x, parameters=kept.alice)[0], before)
    assert not torch.equal(game.alice.act(x)[0], before)


def test_a_share_of_games_has_a_past_opponent_and_rows_of_the_past_side_are_not_learned():
    game = AsymmetricSelfPlay(PlanarPush(), dataclasses.replace(SMALL, past_opponent=1.0), seeds=(1,))
    assert game._past() == (0, 0, None)
    for _ in range(2):
        game.turn()
    past_alice, past_bob, old = game._past()
    assert (past_alice, past_bob) == (12, 12)
    for name, p in old.alice.items():
        assert torch.equal(p, game.pool[0].alice[name])
    learned = []
    update = game.alice.update
    game.alice.update = lambda rows, turn: learned.append(rows.mask.view(1, 6, 24).any(1)) or update(rows, turn)
    game.turn()
    assert not bool(learned[0][0, :12].any())
    assert bool(learned[0][0, 12:].any())


def test_the_pool_is_thinned_out_evenly():
    game = AsymmetricSelfPlay(PlanarPush(), dataclasses.replace(SMALL, snapshot_every=1, snapshots=4), seeds=(1,))
    first = None
    for _ in range(12):
        game.turn()
        first = first or game.pool[0]
    assert len(game.pool) <= 4
    assert game.pool[0] is first


def test_the_first_ratio_of_an_update_is_one():
    game = AsymmetricSelfPlay(Grasp25D(), SMALL, seeds=(1, 2))
    for _ in range(6):
        game.turn()
    assert game.health()["first_ratio"].dropna().max() < 1e-4


def test_without_demonstrations_or_rows_networks_stay_finite():
    game = AsymmetricSelfPlay(Grasp25D(), dataclasses.replace(SMALL, envs=2, alice_steps=1), seeds=(1,))
    for _ in range(10):
        game.turn()
    for p in (*game.bob.policy.parameters.values(), *game.alice.value.parameters.values()):
        assert bool(torch.isfinite(p).all())


def test_cloning_alone_teaches_bob_what_alice_does():
    world = Line()
    config = dataclasses.replace(SMALL, learn_alice=False, past_opponent=0.0, lr=1e-2)
    game = AsymmetricSelfPlay(
        world, config, policy=lambda robot, f, bins: Scripted(2) if f == 2 else SetPolicy(robot, f, bins)
    )
    state = torch.zeros(1, 1)
    x = rows_of(world, state, world.achieved(state) + 6)
    before = float(action_logp(game.bob.act(x[None])[0], torch.tensor([[[2]]]), (3,))[0])
    for _ in range(8):
        game.turn()
    after = float(action_logp(game.bob.act(x[None])[0], torch.tensor([[[2]]]), (3,))[0])
    assert after > before + 0.3


def test_bob_learns_to_walk_to_goals_on_a_line():
    game = AsymmetricSelfPlay(Line(), ASPConfig(envs=64, alice_steps=5, bob_steps=8, store_invalid=True), seeds=(0,))

    def goals(n, generator):
        state = Line().initial(n, generator)
        return state, Line().achieved(state) + 3

    start = float(game.evaluate({"three": goals}, n=64)["rate"].iloc[0])
    game.fit(8_000)
    assert float(game.evaluate({"three": goals}, n=64, greedy=True)["rate"].iloc[0]) > max(0.9, start)


def test_payoff_of_scripted_sides():
    game = scripted(2, 2)
    first = game.snapshot()
    payoff = game.payoff_matrix([first, first], n=8)
    assert payoff.shape == (1, 2, 2)
    assert np.array_equal(payoff, np.ones((1, 2, 2)))
    with pytest.raises(InvalidInput, match="two snapshots"):
        game.payoff_matrix([first])


def test_direct_training_uses_the_given_goals_and_counts_bob_s_steps_only():
    world = Grasp25D()
    game = AsymmetricSelfPlay(world, SMALL, seeds=(0,), goals=block_holdouts(world)["push"])
    found = game.turn()
    assert bool((found.verdict == -1).all())
    assert int(game.steps) == int(found.bob_steps.sum())


@pytest.mark.parametrize("settings", [{"reward": "time"}, {"turn_end": "go_on", "bob_timeout": "go_on"}])
def test_other_rewards_and_ends_run(settings):
    game = AsymmetricSelfPlay(PlanarPush(), dataclasses.replace(SMALL, **settings), seeds=(0, 1))
    for _ in range(4):
        game.turn()
    assert bool(torch.isfinite(torch.tensor(game.health()["entropy"].dropna().to_numpy())).all())


def test_grasped_blocks_are_lifted_fall_and_stack():
    world = Grasp25D(2)
    state = torch.tensor([[0.0, 0, 0, 0, -1, 0.05, 0, 0, 0.3, 0, 0]])
    close, lift, right, open_ = ([2, 2, 2, 4], [2, 2, 4, 2], [4, 2, 2, 2], [2, 2, 2, 0])
    for action in (close, lift, right, right):
        state = world.step(state, torch.tensor([action]))
    torch.testing.assert_close(world.achieved(state)[0, 0], torch.tensor([0.3, 0, 0.15]))
    assert world.observe(state)[0][0, 3:].tolist() == [1.0, 1.0]
    state = world.step(state, torch.tensor([open_]))
    torch.testing.assert_close(world.achieved(state)[0, 0], torch.tensor([0.3, 0, world.size]))
    assert world.observe(state)[0][0, 3:].tolist() == [0.0, 0.0]


def test_held_blocks_turn_with_the_gripper_and_come_to_rest_on_a_face():
    world = GraspAndTurn()
    state = world.initial(64, generator(3))
    state[:, 5:8] = state[:, :3] * torch.tensor([1.0, 1.0, 0.0])  # each block under its gripper
    state[:, 2] = 0.0
    first = world.achieved(state)
    still, up = torch.full((64, 6), 2), torch.full((64, 6), 2)
    close, open_, tilt = still.clone(), still.clone(), still.clone()
    close[:, 3], open_[:, 3], up[:, 2], tilt[:, 5] = 4, 0, 4, 4
    for action in (close, up, tilt, tilt):
        state = world.step(state, action)
    held = world.achieved(state)
    torch.testing.assert_close(rotation_distance(held[:, 0, 3:], first[:, 0, 3:]), torch.full((64,), math.pi / 2))
    state = world.step(state, open_)
    after = world.achieved(state)[:, 0]
    assert bool((after[:, 2] == 0).all())
    # an independent truth: in scipy's rotation matrices one body axis is vertical, and no rest is nearer
    matrices = Rotation.from_quat(after[:, 3:].numpy(), scalar_first=True).as_matrix()
    assert np.abs(np.abs(matrices[:, 2]).max(1) - 1).max() < 1e-5
    change = rotation_distance(after[:, 3:], held[:, 0, 3:])
    steepest = np.abs(Rotation.from_quat(held[:, 0, 3:].numpy(), scalar_first=True).as_matrix()[:, 2]).max(1)
    np.testing.assert_allclose(change.numpy(), np.arccos(np.clip(steepest, -1, 1)), atol=2e-3)
    goals = block_holdouts(world)
    assert sorted(goals) == ["flip", "pick", "push"]
    for name in goals:
        start, goal = goals[name](32, generator(4))
        apart = world.distance(world.achieved(start), goal)[:, 0]
        assert bool(((apart[:, 0] < 1e-6) == (name == "flip")).all())
        assert bool(((apart[:, 1] > 1.5) == (name == "flip")).all())
        up_axis = Rotation.from_quat(goal[:, 0, 3:].numpy(), scalar_first=True).as_matrix()[:, 2]
        assert np.abs(np.abs(up_axis).max(1) - 1).max() < 1e-5  # all goals lie flat


def test_closed_empty_fingers_push_and_open_ones_do_not():
    world = Grasp25D()
    for closed, place in ((1.0, 0.2 + world.size), (0.0, 0.15)):
        state = torch.tensor([[0.05, 0.0, 0.0, closed, -1.0, 0.15, 0.0, 0.0]])
        end = world.step(state, torch.tensor([[4, 2, 2, 2]]))
        assert float(world.achieved(end)[0, 0, 0]) == pytest.approx(place)


def test_rows_do_not_depend_on_their_neighbors():
    for world in (Grasp25D(2), PlanarPush(2)):
        state = world.initial(16, generator(0))
        action = torch.stack([torch.randint(b, (16,), generator=generator(1)) for b in world.bins], -1)
        together = world.step(state, action)
        for i in range(16):
            assert torch.equal(together[i : i + 1], world.step(state[i : i + 1], action[i : i + 1]))


def test_entropy_of_coverage():
    goals = torch.arange(8.0)[:, None, None]
    assert coverage_entropy(goals, 0.5) == pytest.approx(3.0)
    assert coverage_entropy(goals, 100.0) == 0.0
    assert coverage_entropy(goals, 0.5, torch.arange(8) < 2) == pytest.approx(1.0)
    with pytest.raises(InvalidInput, match="no goal"):
        coverage_entropy(goals[:0], 0.5)


class Forgets(Line):
    """A world whose state does not hold everything."""

    def __init__(self):
        self.count = 0

    def step(self, state, action):
        self.count += 1
        return state + action.float() - 1 + 0.01 * self.count


class Drifts(Line):
    def step(self, state, action):
        return state + action.float()


class InPlace(Line):
    def step(self, state, action):
        state += action.float() - 1
        return state


class Slow(Line):
    def step(self, state, action):
        return state + 0.001 * (action.float() - 1)


@pytest.mark.parametrize(
    ("world", "says"),
    [(Forgets, "everything"), (InPlace, "new tensor"), (lambda: object(), "has no initial"), (lambda: 3, "has no")],
)
def test_worlds_that_do_not_fit_are_refused(world, says):
    with pytest.raises(InvalidInput, match=says):
        AsymmetricSelfPlay(world(), SMALL)


def test_certificates_are_refused_where_they_do_not_hold():
    with pytest.raises(InvalidInput, match="not deterministic"):
        certify(Forgets(), steps=60)
    with pytest.raises(InvalidInput, match="does nothing"):
        certify(Drifts())


def test_an_alice_who_never_moves_anything_is_reported():
    with pytest.raises(InvalidInput, match="0 valid goals"):
        AsymmetricSelfPlay(Slow(), dataclasses.replace(SMALL, envs=4), seeds=(0,)).fit(10_000)


def test_networks_of_both_sides_are_refused():
    shared = SetPolicy(0, 2, (3,))
    with pytest.raises(InvalidInput):
        AsymmetricSelfPlay(Line(), SMALL, policy=lambda robot, f, bins: shared)


@pytest.mark.parametrize(
    "wrong",
    [{"past_opponent": 1.5}, {"gamma": 0.0}, {"goals": 0}, {"beta": -1.0}, {"abc_clip": "lower"}, {"reward": "score"}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        ASPConfig(**wrong)


@pytest.mark.parametrize("world", [Grasp25D, PlanarPush])
def test_sizes_out_of_range_are_refused(world):
    with pytest.raises(InvalidInput, match="threshold"):
        world(threshold=2.0)
    with pytest.raises(InvalidInput, match="stride"):
        world(stride=0.0)
