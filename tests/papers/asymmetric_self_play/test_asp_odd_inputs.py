"""What users hand in: shapes that would broadcast, masks of whole numbers, NaN in padding, broken files and worlds."""

import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch

from mlcollage.errors import InvalidInput, MLCollageError, UserCodeError
from mlcollage.papers.asymmetric_self_play import (
    ASPConfig,
    ASPParallelEnv,
    ASPVectorEnv,
    AsymmetricSelfPlay,
    GoalReachingEnv,
    GymnasiumWorld,
    PlanarPush,
    SetPolicy,
    SetValue,
    abc_loss,
    action_logp,
    alice_reward,
    at_goal,
    certify,
    coverage_entropy,
    disc_holdouts,
    episode_page,
    euler_to_quaternion,
    gae,
    load_robogym_state,
    ppo_loss,
    quaternion_multiply,
    relabel,
    rotation_distance,
    sample_actions,
    standardize_advantages,
    time_rewards,
    validate_goal,
)

TINY = ASPConfig(
    envs=6, alice_steps=3, bob_steps=4, goals=2, store_invalid=True, snapshot_every=1, embed=(4,), hidden=()
)
ROW, COLUMN, NO = torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, dtype=torch.bool)
ONES = torch.tensor([1, 0, 1])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ppo_loss(ROW, ROW, COLUMN), "advantages has shape"),
        (lambda: ppo_loss(ROW, ROW, ROW, values=COLUMN, returns=ROW), "values has shape"),
        (lambda: ppo_loss(ROW, ROW, ROW, entropy=COLUMN), "entropy has shape"),
        (lambda: ppo_loss(ROW, ROW, ROW, returns=ROW), "give values"),
        (lambda: abc_loss(ROW, [0.0, 0.0, 0.0]), "tensor"),
        (lambda: abc_loss(ROW, ROW, dim=5), "dim"),
        (lambda: gae(ROW[:0], ROW[:0], NO[:0]), "steps come first"),
        (lambda: gae(ONES, ONES, NO), "floating"),
        (lambda: gae(ROW, ROW, ONES), "bool"),
        (lambda: gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3).bool(), next_value=COLUMN), "next_value"),
        (lambda: standardize_advantages(ROW, ONES), "bool"),
        (lambda: at_goal(torch.zeros(2, 0, 1), (0.1,)), "every goal"),
        (lambda: at_goal(torch.zeros(2, 1, 0), ()), "every goal"),
        (lambda: at_goal(torch.zeros(1, 3, 1), (0.1,), ONES[None]), "bool"),
        (lambda: validate_goal(COLUMN[..., None], (0.1,), off_table=COLUMN, out_of_zone=NO[:, None]), "off_table"),
        (lambda: alice_reward(ONES, ONES), "bob_solved must be bool"),
        (lambda: alice_reward(ONES, NO[:, None]), "must agree"),
        (lambda: time_rewards(ONES, ONES, ONES, most=5), "bool"),
        (lambda: time_rewards(ONES + 9, ONES, NO, most=5), "most is 5"),
        (lambda: action_logp(torch.zeros(1, 5), torch.zeros(1, 2).long(), (2, 2)), "logits"),
        (lambda: action_logp(torch.zeros(1, 4), torch.zeros(1, 1).long(), (2, 2)), "one for each head"),
        (lambda: sample_actions(torch.zeros(2, 4), (2, 2), torch.rand(4)), "noise"),
        (lambda: SetPolicy(1, 2, 5), "bins"),
        (lambda: SetPolicy(1, 2, (5,), embed=64), "embed"),
        (lambda: ASPConfig(store_invalid="no"), "store_invalid"),
        (lambda: ASPConfig(hidden=64), "hidden"),
        (lambda: ASPConfig(embed=()), "embed"),
        (lambda: coverage_entropy(torch.zeros(3, 1, 1), 0.1, ONES), "bool"),
        (lambda: coverage_entropy(torch.full((3, 1, 1), math.nan), 0.1), "NaN"),
        (lambda: coverage_entropy(ROW, 0.1), "expected"),
        (lambda: rotation_distance(torch.tensor([1, 0, 0, 0]), torch.tensor([1, 0, 0, 0])), "floating"),
        (lambda: quaternion_multiply(ROW, ROW), "quaternions"),
        (lambda: euler_to_quaternion(ROW[:2]), "angles"),
        (lambda: load_robogym_state(None), "path"),
    ],
)
def test_what_would_be_read_in_another_way_is_refused(call, says):
    with pytest.raises(InvalidInput, match=says):
        call()


def test_padding_with_nan_reaches_no_gradient_of_the_losses():
    real = torch.tensor([True, True, False])
    new, values = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    bad = torch.tensor([1.0, 2.0, math.nan])
    terms = ppo_loss(new, bad, bad, values=values, returns=bad, values_old=bad, mask=real, eps=0.2)
    terms.total.backward()
    ratio = torch.tensor([-1.0, -2.0]).exp()  # both advantages are positive, so that nothing is clipped below
    torch.testing.assert_close(new.grad, torch.cat((-ratio * bad[:2] / 2, ROW[:1])))
    assert bool(torch.isfinite(values.grad).all())
    assert bool(torch.isfinite(terms.total))


@pytest.mark.parametrize("clip", ["upper", "two_sided", "none"])
def test_ratios_beyond_the_range_of_float32_give_no_nan(clip):
    new = torch.zeros(2, requires_grad=True)
    old = torch.tensor([-200.0, 0.0])
    (abc_loss(new, old, clip=clip) + ppo_loss(new, old, torch.ones(2)).total).backward()
    assert bool(torch.isfinite(new.grad).all())


def test_forbidden_choices_add_nothing_to_the_entropy_and_get_no_gradient():
    for bins in ((3,), (3, 2)):
        logits = torch.tensor([[0.0, -math.inf, 0.0, 1.0, 1.0]])[:, : sum(bins)].requires_grad_()
        logp, entropy = action_logp(logits, torch.zeros(1, len(bins)).long(), bins)
        (logp + entropy).sum().backward()
        assert float(entropy.detach()) == pytest.approx(len(bins) * math.log(2))
        assert bool(torch.isfinite(logits.grad).all())
        assert float(logits.grad[0, 1]) == 0


def test_padded_objects_may_hold_nan():
    policy = SetPolicy(1, 3, (3,))
    one, two = torch.tensor([[0.5, 1, 0.2, 0.3]]), torch.tensor([[0.5, 1, 0.2, 0.3, 0, math.nan, math.nan]])
    assert torch.equal(policy(one), policy(two))
    policy(two).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in policy.parameters())


def test_no_turn_to_relabel_gives_padding_only():
    found = relabel(
        PlanarPush(), torch.zeros(4, 5, 4), torch.zeros(3, 5, 2).long(), torch.zeros(5, 1, 2), torch.zeros(5) > 0
    )
    assert found.x.shape == (3, 11)
    assert not bool(found.mask.any())
    assert float(abc_loss(torch.zeros(3), torch.zeros(3), found.mask)) == 0
    with pytest.raises(InvalidInput, match="in this world"):
        relabel(
            PlanarPush(), torch.zeros(4, 5, 4), torch.zeros(3, 5, 2).long(), torch.zeros(5, 2, 2), torch.zeros(5) > 0
        )


def test_damaged_compressed_archives_are_refused(tmp_path):
    file = tmp_path / "state.npz"
    np.savez_compressed(
        file, obj_pos=np.random.default_rng(0).random((50, 3)), obj_quat=np.tile([1.0, 0, 0, 0], (50, 1))
    )
    whole, refused = file.read_bytes(), 0
    for at in range(30, len(whole), 41):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            load_robogym_state(file)
        except MLCollageError:
            refused += 1
    assert refused > 10
    np.save(tmp_path / "one.npy", np.zeros((3, 3)))
    with pytest.raises(InvalidInput, match="one array"):
        load_robogym_state(tmp_path / "one.npy")


# -- worlds ---------------------------------------------------------------------------------------------------------


class Walker(gymnasium.Env):
    """A point that walks on a line; the first of five actions does nothing."""

    observation_space = gymnasium.spaces.Box(-99, 99, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.dead, self.count, self.x = False, 0, self.np_random.uniform(-1, 1, 2)
        return self.x.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x = self.x + (0, 0.2, -0.2, 0.4, -0.4)[int(np.ravel(action)[0])]
        return self.x.copy(), 0.0, False, False, {}

    def get_state(self):
        return self.x

    def set_state(self, state):
        self.x = np.array(state)


class Starts(Walker):
    action_space = gymnasium.spaces.MultiDiscrete([[3, 3], [3, 3]], start=[[1, 1], [1, 1]])


class Drill(Walker):
    action_space = gymnasium.spaces.Box(0, 0.2, (1,), np.float32)

    def step(self, action):
        self.x = self.x + float(action[0])
        return self.x.copy(), 0.0, False, False, {}


class Ends(Walker):
    def step(self, action):
        assert not self.dead, "stepped after its end"
        seen, *rest = super().step(action)
        self.dead = bool(abs(self.x[0]) > 1)
        return seen, rest[0], self.dead, *rest[2:]


class Blinks(Walker):
    def step(self, action):
        seen, *rest = super().step(action)
        seen[0] = math.nan if self.x[0] > 0.5 else seen[0]
        return seen, *rest


class Counts(Walker):
    observation_space = gymnasium.spaces.Box(-99, 99, (3,), np.float64)

    def reset(self, *, seed=None, options=None):
        seen, info = super().reset(seed=seed)
        return np.append(seen, 0.0), info

    def step(self, action):
        seen, *rest = super().step(action)
        self.count += 1
        return np.append(seen, self.count), *rest


def world_of(kind, objects=lambda seen: seen[None, :2], **settings):
    return GymnasiumWorld(kind, objects, threshold=0.3, **settings)


def test_multi_discrete_actions_keep_start_and_shape():
    world = world_of(Starts)
    state = world.initial(2, torch.Generator().manual_seed(0))
    assert world.bins == (3, 3, 3, 3)
    after = world.step(state, torch.tensor([[0, 0, 0, 0], [2, 2, 2, 2]]))
    torch.testing.assert_close(after[:, :2] - state[:, :2], state.new_tensor([[0.2, 0.2], [0.4, 0.4]]))


def test_what_does_nothing_is_not_guessed():
    assert certify(world_of(Walker)).still_goals is None
    assert certify(world_of(Walker, idle=(0,))).still_goals == 0
    with pytest.raises(InvalidInput, match="does nothing"):
        certify(world_of(Walker), idle=(1,))
    drill = world_of(Drill)  # 0 is its lowest choice, and the middle one drills
    assert drill.idle == (0,)
    assert certify(drill).still_goals == 0
    with pytest.raises(InvalidInput, match="whole numbers"):
        world_of(Walker, idle=(7,))


def test_an_ended_environment_is_reset_before_another_state_is_set():
    game = AsymmetricSelfPlay(world_of(Ends), dataclasses.replace(TINY, alice_steps=8))
    for _ in range(3):
        game.turn()
    assert int(game.health()["off_table"].sum()) > 0


def test_nan_of_an_environment_ends_the_goal_and_reaches_no_network():
    game = AsymmetricSelfPlay(world_of(Blinks), TINY)
    for _ in range(3):
        game.turn()
    assert int(game.health()["not_finite"].sum()) > 0
    for replicas in (game.alice.policy, game.alice.value, game.bob.policy, game.bob.value):
        assert all(bool(torch.isfinite(p).all()) for p in replicas.parameters.values())


class Blind(PlanarPush):
    """Its states are finite, what is seen of them is not always."""

    def observe(self, state):
        robot, objects = super().observe(state)
        return torch.where(state[:, :1] > 0.2, math.nan, robot), objects


def test_nan_that_is_seen_on_the_way_ends_the_turn():
    world = Blind()
    world.initial = lambda n, generator: PlanarPush.initial(world, n, generator) - 0.5
    game = AsymmetricSelfPlay(world, dataclasses.replace(TINY, envs=24, alice_steps=12))
    for _ in range(3):
        game.turn()
    assert int(game.health()["not_finite"].sum()) > 0
    for replicas in (game.alice.policy, game.alice.value, game.bob.policy, game.bob.value):
        assert all(bool(torch.isfinite(p).all()) for p in replicas.parameters.values())


def test_hidden_counters_in_observations_and_other_units_are_found():
    with pytest.raises(InvalidInput, match="step counters"):
        certify(world_of(Counts))
    with pytest.raises(InvalidInput, match="units"):
        certify(GymnasiumWorld(Walker, lambda seen: 1e5 * seen[None], threshold=0.3))
    assert certify(world_of(Walker)).moved > 1
    with pytest.raises(InvalidInput, match="GymnasiumWorld"):
        certify(Walker())
    with pytest.raises(InvalidInput, match="is a class"):
        certify(PlanarPush)


def test_environments_that_change_what_they_give_are_refused():
    calls = []

    def objects(seen):
        calls.append(0)
        return np.zeros((1 + len(calls) % 2, 2))

    with pytest.raises(InvalidInput, match="must stay the same"):
        world_of(Walker, objects).initial(3, torch.Generator())
    with pytest.raises(InvalidInput, match="make must be a function"):
        world_of(Walker())


# -- the game -------------------------------------------------------------------------------------------------------


class Raises(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        raise ValueError("a bug of mine")


def with_layer(layer):
    return lambda robot, features, bins: torch.nn.Sequential(SetPolicy(robot, features, bins), layer(sum(bins)))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"seeds": ()}, "seeds"),
        ({"seeds": 3}, "seeds"),
        ({"config": {"envs": 3}}, "ASPConfig"),
        ({"device": "gpu"}, "device"),
        ({"policy": with_layer(lambda n: torch.nn.Dropout(0.1))}, "Dropout"),
        ({"policy": with_layer(torch.nn.BatchNorm1d)}, "BatchNorm1d"),
        ({"policy": lambda robot, f, bins: SetPolicy(robot, f, bins).bfloat16()}, "float32"),
        ({"policy": lambda robot, f, bins: SetPolicy(robot, f, (3,))}, r"expected \(2, 10\)"),
        (
            {"value": lambda robot, f: torch.nn.Sequential(SetValue(robot, f), torch.nn.Flatten(0))},
            r"expected \(2, 1\)",
        ),
        ({"policy": lambda robot, f, bins: Raises()}, "a bug of mine"),
    ],
)
def test_games_that_cannot_be_played_are_refused_before_the_first_turn(given, says):
    with pytest.raises(MLCollageError, match=says):
        AsymmetricSelfPlay(PlanarPush(), **{"config": TINY, **given})


def test_a_network_that_diverges_is_named():
    game = AsymmetricSelfPlay(PlanarPush(), TINY)
    with torch.no_grad():
        next(iter(game.alice.policy.parameters.values())).fill_(math.nan)
    with pytest.raises(InvalidInput, match=r"Alice's log-probabilities .* in turn 1"):
        game.turn()


def test_networks_in_float64_learn():
    game = AsymmetricSelfPlay(
        PlanarPush(),
        TINY,
        policy=lambda robot, f, bins: SetPolicy(robot, f, bins).double(),
        value=lambda robot, f: SetValue(robot, f).double(),
    )
    game.turn()
    assert {p.dtype for p in game.alice.policy.parameters.values()} == {torch.float64}


@pytest.mark.parametrize(
    ("goals", "says"),
    [
        (lambda n, draw: 1 / 0, "ZeroDivisionError"),
        (lambda n, draw: (torch.zeros(n, 4), torch.zeros(n, 2)), "expected"),
        (lambda n, draw: (torch.zeros(2, 4), torch.zeros(2, 1, 2)), "expected"),
        (lambda n, draw: (torch.zeros(n, 4), torch.full((n, 1, 2), math.nan)), "NaN"),
        ({"push": None}, "must be a function"),
    ],
)
def test_sets_of_goals_that_do_not_fit_are_refused_wherever_they_are_used(goals, says):
    world = PlanarPush()
    for use in (
        lambda: AsymmetricSelfPlay(world, TINY, goals=goals).turn(),
        lambda: AsymmetricSelfPlay(world, TINY).evaluate({"mine": goals}, n=3),
        lambda: GoalReachingEnv(world, goals),
        lambda: ASPVectorEnv(world, goals, 3),
    ):
        with pytest.raises((InvalidInput, UserCodeError), match=says):
            use()


def test_goals_that_are_reached_before_the_first_step_do_not_hang():
    world = PlanarPush()

    def met(n, draw):
        state = world.initial(n, draw)
        return state, world.achieved(state)

    with pytest.raises(InvalidInput, match="before Bob's first step"):
        AsymmetricSelfPlay(world, dataclasses.replace(TINY, epochs=1, minibatches=1), goals=met).fit(10)


def test_snapshots_of_another_game_are_refused():
    game, other = AsymmetricSelfPlay(PlanarPush(), TINY, seeds=(0, 1)), AsymmetricSelfPlay(PlanarPush(), TINY)
    with pytest.raises(InvalidInput, match="another game"):
        game.payoff_matrix([game.snapshot(), other.snapshot()], n=2)
    with pytest.raises(InvalidInput, match="n must"):
        game.payoff_matrix([game.snapshot()] * 2, n=0)


def test_a_resumed_training_goes_on_to_the_same_bits(tmp_path):
    world = PlanarPush()
    whole = AsymmetricSelfPlay(world, TINY, seeds=(0, 1))
    for _ in range(3):
        whole.turn()
    file = whole.save(tmp_path / "new" / "training.safetensors")
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in whole.bob.policy.parameters.items()}
    again = AsymmetricSelfPlay(world, TINY, seeds=(0, 1))
    again.resume(file)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, whole.bob.policy.parameters[k]) for k, v in weights.items())
    for _ in range(3):
        whole.turn(), again.turn()
    for side in ("alice", "bob"):
        for part in ("policy", "value"):
            ours, theirs = (getattr(getattr(g, side), part).parameters for g in (whole, again))
            assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert whole.steps.equal(again.steps)
    assert len(whole.pool) == len(again.pool)
    assert whole.health().equals(again.health())


def test_other_and_damaged_trainings_are_refused_and_change_nothing(tmp_path):
    game = AsymmetricSelfPlay(PlanarPush(), TINY)
    file = game.save(tmp_path / "a.safetensors")
    before = {k: v.clone() for k, v in game.bob.policy.parameters.items()}
    for other, says in (
        (AsymmetricSelfPlay(PlanarPush(), dataclasses.replace(TINY, alice_steps=5)), "alice_steps is 3"),
        (AsymmetricSelfPlay(PlanarPush(2), TINY), "shape of states"),
        (AsymmetricSelfPlay(PlanarPush(threshold=0.2), TINY), "thresholds"),
        (AsymmetricSelfPlay(PlanarPush(), TINY, seeds=(1,)), "seeds"),
        (AsymmetricSelfPlay(PlanarPush(), TINY, policy=SetPolicy), "other layers"),
    ):
        with pytest.raises(InvalidInput, match=says):
            other.resume(file)
        assert other.turns == 0
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(InvalidInput, match="damaged"):
        game.resume(file)
    assert all(torch.equal(v, game.bob.policy.parameters[k]) for k, v in before.items())


def turns_of(**gauges):
    base = {"valid": [0], "out_of_zone": [0], "unmoved": [6], "off_table": [0], "not_finite": [0]}
    base |= {"solve_rate": [math.nan], "entropy": [1.0], "first_ratio": [0.0], "clip_share": [0.0]}
    return [{"turn": i, **base, **{name: [value] for name, value in gauges.items()}} for i in range(6)]


@pytest.mark.parametrize(
    ("gauges", "says"),
    [
        ({}, "0 valid goals in the last 36 games"),
        ({"valid": 3, "solve_rate": 1.0}, "Bob solves all"),
        ({"valid": 3, "solve_rate": 0.0}, "Bob has solved no goal in 6 turns"),
        ({"valid": 3, "not_finite": 1}, "6 of 36 goals had NaN"),
        ({"valid": 3, "entropy": 0.01}, "nearly deterministic"),
        ({"valid": 3, "first_ratio": 0.1}, "acts differently"),
        ({"valid": 3, "clip_share": 0.8}, "80 % of ratios"),
        ({"valid": 3, "solve_rate": 0.5}, None),
    ],
)
def test_health_is_said_in_sentences(gauges, says):
    game = AsymmetricSelfPlay(PlanarPush(), TINY)
    game.history = turns_of(**gauges)
    said = game.diagnosis()
    assert (says is None and not said) or any(says in text and text.startswith("seed 0: ") for text in said)


def test_pages_are_written_into_folders_that_are_made(tmp_path):
    game = AsymmetricSelfPlay(PlanarPush(), TINY)
    assert episode_page(game, tmp_path / "new" / "page.html", games=1).is_file()
    with pytest.raises(InvalidInput, match="is a folder"):
        episode_page(game, tmp_path)


# -- environments of others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [[1.7, 2], [math.nan, 2], [2], [2, 5], [-1, 2], None, "up"])
def test_actions_are_whole_numbers_of_each_dimension(wrong):
    world = PlanarPush()
    both, bob = ASPParallelEnv(world, TINY), GoalReachingEnv(world, disc_holdouts(world)["push"])
    both.reset(seed=0), bob.reset(seed=0)
    for act in (lambda: both.step({"alice": wrong, "bob": [2, 2]}), lambda: bob.step(wrong)):
        with pytest.raises(InvalidInput, match="whole numbers"):
            act()


def test_steps_before_a_reset_and_without_the_mover_are_refused():
    world, push = PlanarPush(), disc_holdouts(PlanarPush())["push"]
    both = ASPParallelEnv(world, TINY)
    for act in (
        lambda: both.step({"alice": [2, 2], "bob": [2, 2]}),
        lambda: GoalReachingEnv(world, push).step([2, 2]),
        lambda: ASPVectorEnv(world, push, 2).step(np.full((2, 2), 2)),
    ):
        with pytest.raises(InvalidInput, match="call reset"):
            act()
    both.reset(seed=0)
    with pytest.raises(InvalidInput, match="it is alice's turn"):
        both.step({"bob": [2, 2]})
