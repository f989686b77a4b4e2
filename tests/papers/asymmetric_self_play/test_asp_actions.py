"""Heads of a policy: choices, continuous actions, an Alice who ends her turn, and the base method of 2017."""

import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Normal

from mlcollage._random import generator
from mlcollage.errors import InvalidInput
from mlcollage.papers.asymmetric_self_play import (
    ASPConfig,
    ASPVectorEnv,
    AsymmetricSelfPlay,
    GoalReachingEnv,
    GymnasiumWorld,
    PlanarPush,
    SetPolicy,
    abc_loss,
    action_logp,
    certify,
    relabel,
    sample_actions,
)
from mlcollage.papers.asymmetric_self_play.heads import stacked_logp
from mlcollage.papers.asymmetric_self_play.turns import alice_turn, stepped

SMALL = ASPConfig(envs=16, alice_steps=5, bob_steps=6, store_invalid=True, embed=(8,), hidden=(8,))


class Cart:
    """A cart on a line that moves by up to one to the left or right; all is worked out by hand."""

    bins = (0,)
    thresholds = (0.5,)

    def initial(self, n, generator):
        return torch.rand(n, 1, generator=generator) * 6 - 3

    def step(self, state, action):
        assert bool((action.abs() <= 1).all())
        return state + action.to(state.dtype)

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


class Steps(Cart):
    bins = (3,)

    def step(self, state, action):
        return state + action.to(state.dtype) - 1


@pytest.mark.parametrize("bins", [(0,), (0, 0, 0), (3, 0), (0, 4, 2, 0)])
def test_log_probabilities_of_continuous_heads_are_those_of_torch(bins):
    draw = generator(1)
    c = bins.count(0)
    out = torch.randn(50, sum(b or 1 for b in bins) + c, generator=draw, dtype=torch.float64)
    action = torch.stack(
        [
            torch.randint(b, (50,), generator=draw).double() if b else torch.randn(50, generator=draw).double()
            for b in bins
        ],
        -1,
    )
    logp, entropy = action_logp(out, action, bins)
    at, number = 0, 0
    expected = spread = torch.zeros(50, dtype=torch.float64)
    for d, b in enumerate(bins):
        if b:
            head = Categorical(logits=out[:, at : at + b])
        else:
            head = Normal(out[:, at], out[:, out.shape[1] - c + number].exp())
            number += 1
        at += b or 1
        expected, spread = expected + head.log_prob(action[:, d]), spread + head.entropy()
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, spread)


def test_continuous_actions_are_drawn_from_their_normal_and_are_not_clipped():
    out = torch.tensor([0.4, -1.0, math.log(0.5), math.log(2.0)], dtype=torch.float64).expand(200_000, 4)
    drawn = sample_actions(out, (0, 0), torch.rand(200_000, 4, generator=generator(2), dtype=torch.float64))
    torch.testing.assert_close(drawn.choice.mean(0), out[0, :2], atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.choice.std(0), out[0, 2:].exp(), atol=0.02, rtol=0)
    assert float(torch.corrcoef(drawn.choice.T)[0, 1].abs()) < 0.01
    assert float(drawn.choice[:, 1].abs().max()) > 5
    share = float((drawn.choice[:, 0] > 0.4 + 0.5 * 1.96).double().mean())
    assert share == pytest.approx(0.025, abs=0.002)
    torch.testing.assert_close(drawn.logp, action_logp(out, drawn.choice, (0, 0))[0])
    assert torch.equal(sample_actions(out[:1], (0, 0)).choice, out[:1, :2])


def test_what_was_drawn_is_kept_and_what_goes_to_the_world_is_clipped():
    """The hard case: N(0, 1), raw 1.8, limit 1 has log-probability -2.5389, and not that of the clipped action."""
    world = Cart()
    after = stepped(world, torch.zeros(1, 1), torch.tensor([[1.8]]))
    assert after.item() == 1.0
    logp = float(action_logp(torch.zeros(1, 2), torch.tensor([[1.8]]), (0,))[0])
    assert logp == pytest.approx(-2.5389, abs=1e-4)
    game = AsymmetricSelfPlay(world, SMALL)
    with torch.no_grad():
        turn = alice_turn(world, game.alice, game._alice_state, 5, (0,))
    moved = turn.states[1:] - turn.states[:-1]
    torch.testing.assert_close(moved, turn.index.clamp(-1, 1), atol=1e-5, rtol=0)
    assert float(turn.index.abs().max()) > 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: action_logp(torch.zeros(1, 2), torch.zeros(1, 1).long(), (0,)), "floating-point"),
        (lambda: action_logp(torch.zeros(1, 3), torch.zeros(1, 1), (3,)), "whole"),
        (lambda: action_logp(torch.zeros(1, 1), torch.zeros(1, 1), (0,)), "log-standard deviation"),
        (lambda: SetPolicy(1, 2, (1, 3)), "one choice"),
        (lambda: SetPolicy(1, 2, (-1,)), "bins"),
    ],
)
def test_outputs_and_actions_of_the_other_kind_are_refused(call, says):
    with pytest.raises(InvalidInput, match=says):
        call()


def test_the_learner_s_own_gradient_is_that_of_single_operations():
    logits = torch.randn(2, 7, 10, generator=generator(3), dtype=torch.float64).requires_grad_()
    index = torch.randint(5, (2, 7, 2), generator=generator(4))
    weights = torch.randn(2, 2, 7, generator=generator(5), dtype=torch.float64)
    grads = []
    for f in (action_logp, stacked_logp):
        logp, entropy = f(logits, index, (5, 5))
        grads.append(torch.autograd.grad((weights[0] * logp + weights[1] * entropy).sum(), logits)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: stacked_logp(z, index, (5, 5)), logits)


def test_the_cloning_term_of_densities_has_the_gradient_of_its_formula():
    mean = torch.tensor([0.3, -0.2], dtype=torch.float64).requires_grad_()
    action, old = torch.tensor([[0.5], [1.8]], dtype=torch.float64), torch.tensor([-1.0, -3.0], dtype=torch.float64)
    out = torch.stack((mean, torch.zeros(2, dtype=torch.float64)), 1)
    loss = abc_loss(action_logp(out, action, (0,))[0], old)
    loss.backward()
    density = torch.exp(-0.5 * (action[:, 0] - mean.detach()).square()) / math.sqrt(2 * math.pi)
    ratio = density / old.exp()
    expected = torch.where(ratio < 1.2, -ratio * (action[:, 0] - mean.detach()) / 2, torch.zeros(2).double())
    torch.testing.assert_close(mean.grad, expected)


def test_bob_learns_with_continuous_actions():
    def goals(n, generator):
        state = Cart().initial(n, generator)
        return state, Cart().achieved(state) + 3

    game = AsymmetricSelfPlay(Cart(), ASPConfig(envs=64, alice_steps=5, bob_steps=8, store_invalid=True), seeds=(0,))
    start = float(game.evaluate({"three": goals}, n=64)["rate"].iloc[0])
    game.fit(12_000)
    assert float(game.evaluate({"three": goals}, n=64, greedy=True)["rate"].iloc[0]) > max(0.9, start)
    assert game.health()["first_ratio"].dropna().max() < 1e-4
    assert float(certify(Cart()).deviation) == 0.0


class Tank(gymnasium.Env):
    """Bounds that are not symmetric, in an environment of a user's own."""

    observation_space = gymnasium.spaces.Box(-99, 99, (2,), np.float64)
    action_space = gymnasium.spaces.Box(np.array([0.0, -2.0]), np.array([0.2, 2.0]), dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 2)
        return self.x.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x = self.x + action
        return self.x.copy(), 0.0, False, False, {}

    def get_state(self):
        return self.x

    def set_state(self, state):
        self.x = np.array(state)


def test_a_box_of_a_user_s_stays_continuous_and_is_scaled_once():
    world = GymnasiumWorld(Tank, lambda seen: seen[None], threshold=0.3, bins=0)
    assert world.bins == (0, 0)
    assert world.idle == (-1.0, 0.0)
    state = world.initial(3, generator(0))
    after = stepped(world, state, torch.tensor([[-1.0, 1.0], [0.0, 0.5], [7.0, -7.0]]))
    expected = state.new_tensor([[0.0, 2.0], [0.1, 1.0], [0.2, -2.0]])
    torch.testing.assert_close(after[:, :2] - state[:, :2], expected)
    assert certify(world, games=4, steps=5).still_goals == 0
    game = AsymmetricSelfPlay(world, dataclasses.replace(SMALL, envs=4))
    game.turn()
    with pytest.raises(InvalidInput, match="bins=1"):
        GymnasiumWorld(Tank, lambda seen: seen[None], threshold=0.3, bins=1)


def test_continuous_worlds_are_environments_of_others():
    def goals(n, generator):
        state = Cart().initial(n, generator)
        return state, Cart().achieved(state) + 1

    env = GoalReachingEnv(Cart(), goals)
    env.reset(seed=0)
    seen = env.step(np.array([0.5], dtype=np.float32))[0]
    assert env.action_space == gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    assert seen["achieved_goal"].shape == (1,)
    envs = ASPVectorEnv(Cart(), goals, 3)
    envs.reset(seed=0)
    with pytest.raises(InvalidInput, match="finite"):
        envs.step(np.full((3, 1), np.nan))

    class Mixed(Cart):
        bins = (0, 3)

        def step(self, state, action):
            return state + action[:, :1]

    with pytest.raises(InvalidInput, match="common space"):
        ASPVectorEnv(Mixed(), goals, 3)


# -- the base method ------------------------------------------------------------------------------------------------


class Timed(torch.nn.Module):
    """Goes to the right, and ends its turn when it has come to a place."""

    def __init__(self, until, robot, features, bins):
        super().__init__()
        self.weight, self.until, self.width = torch.nn.Parameter(torch.zeros(())), until, sum(bins)

    def forward(self, x):
        right = x.new_full((*x.shape[:-1], self.width), -50.0)
        right[..., 2] = 50.0
        if self.width == 5:  # a sixth of its features is where it began
            gone = (x[..., 1] * 10 - x[..., 2]) >= self.until - 0.01
            right[..., 3] = torch.where(gone, -50.0, 50.0)
            right[..., 4] = -right[..., 3]
        return right + self.weight


def timed(mode, until=2, **settings):
    config = dataclasses.replace(
        ASPConfig.base(mode, envs=8, alice_steps=5, bob_steps=6, learn_alice=False), **settings
    )
    return AsymmetricSelfPlay(Steps(), config, policy=lambda r, f, b: Timed(until, r, f, b), seeds=(0,))


def test_alice_ends_her_turn_and_time_is_what_both_took():
    game = timed("repeat")
    earned = []
    update = game.bob.update
    game.bob.update = lambda rows, turn, demos: earned.append(rows) or update(rows, turn, demos)
    found = game.turn()
    assert game.alice.bins == (3, 2)
    assert game.bob.bins == (3,)
    torch.testing.assert_close(found.end - found.start, torch.full((1, 8, 1), 2.0))
    assert bool(found.solved.all())
    assert found.bob_steps.unique().tolist() == [2]
    assert int(game.steps) == 8 * (2 + 2)
    # R_B = -0.01 t_B at the end of his turn, discounted once on the way, from a value of nearly 0
    assert earned[0].mask.sum() == 16


def test_bob_s_limit_is_what_alice_left_of_the_time():
    config = ASPConfig.base(envs=8, alice_steps=5, bob_steps=6, learn_alice=False)

    def policy(robot, features, bins):
        return Timed(2, robot, features, bins) if len(bins) == 2 else Left()

    game = AsymmetricSelfPlay(Steps(), config, policy=policy, seeds=(0,))
    found = game.turn()
    assert not bool(found.solved.any())
    assert found.bob_steps.unique().tolist() == [11 - 2]


class Left(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return (self.weight + self.weight.new_tensor([50.0, -50.0, -50.0])).expand(*x.shape[:-1], -1)


def test_reversed_bob_begins_where_alice_ended_and_goes_back():
    config = ASPConfig.base("reverse", envs=8, alice_steps=5, bob_steps=6, learn_alice=False)

    def policy(robot, features, bins):
        return Timed(2, robot, features, bins) if len(bins) == 2 else Left()

    game = AsymmetricSelfPlay(Steps(), config, policy=policy, seeds=(0,))
    found = game.turn()
    assert bool(found.solved.all())
    torch.testing.assert_close(found.goal[..., 0], found.start)
    torch.testing.assert_close(game._bob_state, found.start)
    assert found.bob_steps.unique().tolist() == [2]
    for wrong in ({"goals": 5}, {"beta": 0.5}):
        with pytest.raises(InvalidInput, match="reversed game"):
            dataclasses.replace(config, **wrong)


def test_log_probabilities_where_alice_stops_are_of_stopping_alone():
    game = AsymmetricSelfPlay(Steps(), dataclasses.replace(SMALL, stop=True, sees_start=True), seeds=(0,))
    with torch.no_grad():
        turn = alice_turn(game.world, game.alice, game._alice_state, 5, (0,))
        logits = game.alice.act(turn.x[0])[0]
    ends = turn.index[0, ..., 1] == 1
    assert bool(ends.any())
    assert not bool(ends.all())
    stop = logits[..., 3:].log_softmax(-1)
    torch.testing.assert_close(turn.logp[0][ends], stop[..., 1][ends])
    move = logits[..., :3].log_softmax(-1).gather(-1, turn.index[0, ..., :1]).squeeze(-1)
    torch.testing.assert_close(turn.logp[0][~ends], (stop[..., 0] + move)[~ends])
    # the joint entropy by brute force over the four outcomes
    p = torch.cat((stop[..., 1:].exp(), stop[..., :1].exp() * logits[..., :3].softmax(-1)), -1)
    torch.testing.assert_close(game.alice.logp(logits, turn.index[0])[1], -(p * p.log()).sum(-1))
    # where she was stays, and the step in which she ends is her last row
    first = turn.index[..., 1].argmax(0)
    stopped = turn.index[..., 1].any(0)
    assert torch.equal(turn.steps, torch.where(stopped, first, torch.full_like(first, 5)))
    assert torch.equal(turn.rows, torch.where(stopped, first + 1, torch.full_like(first, 5)))


def test_stopping_is_no_part_of_a_demonstration():
    game = AsymmetricSelfPlay(Steps(), dataclasses.replace(SMALL, stop=True, sees_start=True), seeds=(0,))
    with torch.no_grad():
        turn = alice_turn(game.world, game.alice, game._alice_state, 5, (0,))
        goal, _ = game._judge(game._alice_state, turn.states[-1])
        found = game._relabel(turn, goal, torch.ones(1, 16, dtype=torch.bool))
    assert found.index.shape[-1] == 1
    assert int(found.mask.sum()) == int(turn.steps.sum())
    lengths = relabel(
        game.world, turn.states[:, 0], turn.index[:, 0, :, :1], goal[0], torch.ones(16) > 0, lengths=turn.steps[0]
    )
    assert torch.equal(lengths.mask, found.mask[0])
    for _ in range(3):
        game.turn()
    assert game.health()["first_ratio"].dropna().max() < 1e-4


@pytest.mark.parametrize("mode", ["repeat", "reverse"])
@pytest.mark.parametrize("lstm", [0, 4])
def test_the_base_method_learns_to_undo_and_to_repeat(mode, lstm):
    game = AsymmetricSelfPlay(PlanarPush(), ASPConfig.base(mode, envs=16, alice_steps=6, bob_steps=8, lstm=lstm))
    for _ in range(3):
        game.turn()
    health = game.health()
    assert (health["alice_steps"] < 6).any()
    for replicas in (game.alice.policy, game.bob.policy):
        assert all(bool(torch.isfinite(p).all()) for p in replicas.parameters.values())


def test_alice_may_end_a_turn_of_continuous_actions():
    game = AsymmetricSelfPlay(Cart(), dataclasses.replace(SMALL, stop=True, sees_start=True), seeds=(0, 1))
    assert game.alice.bins == (0, 2)
    with torch.no_grad():
        turn = alice_turn(game.world, game.alice, game._alice_state, 5, (0,))
        logits = game.alice.act(turn.x[0])[0]  # mean, going on, ending, log-standard deviation
    ends = turn.index[0, ..., 1] == 1
    stop = logits[..., 1:3].log_softmax(-1)
    move = Normal(logits[..., 0], logits[..., 3].exp()).log_prob(turn.index[0, ..., 0])
    torch.testing.assert_close(turn.logp[0], torch.where(ends, stop[..., 1], stop[..., 0] + move))
    for _ in range(3):
        game.turn()
    assert game.health()["first_ratio"].dropna().max() < 1e-4
