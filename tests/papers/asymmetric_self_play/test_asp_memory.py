"""Policies with a memory: the LSTM itself, demonstrations in Bob's own memory, games that stay together."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.asymmetric_self_play import (
    ASPConfig,
    AsymmetricSelfPlay,
    Grasp25D,
    PlanarPush,
    SetPolicy,
    SetValue,
    abc_loss,
    action_logp,
    ppo_loss,
    relabel,
)
from mlcollage.papers.asymmetric_self_play.turns import alice_turn, bob_turn, rows_of
from mlcollage.train.replicas import Replicas

SMALL = ASPConfig(envs=8, alice_steps=4, bob_steps=5, store_invalid=True, embed=(8,), hidden=(8,), lstm=6)


def rows(n, t, robot=3, features=4, objects=2, dtype=torch.float64):
    x = torch.randn(n, t, robot + objects * features, generator=torch.Generator().manual_seed(n + t), dtype=dtype)
    x[..., robot::features] = 1.0
    return x


def test_the_memory_is_torch_s_lstm():
    policy, x = SetPolicy(3, 4, (5, 5), lstm=7).double(), rows(6, 9)
    reference = nn.LSTM(64, 7, batch_first=True).double()
    with torch.no_grad():
        reference.weight_ih_l0.copy_(policy.input.weight)
        reference.weight_hh_l0.copy_(policy.recurrent.weight)
        reference.bias_ih_l0.copy_(policy.input.bias)
        reference.bias_hh_l0.zero_()
    e = policy.embed(x[..., 3:].unflatten(-1, (2, 4))[..., 1:]).amax(-2)
    hidden = policy.body(torch.cat((x[..., :3], e), -1))
    memory = torch.randn(6, 14, dtype=torch.float64)
    h, c = memory.chunk(2, -1)
    expected, (h, c) = reference(hidden, (h[None].contiguous(), c[None].contiguous()))
    out, after = policy(x, memory)
    torch.testing.assert_close(out, policy.head(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after, torch.cat((h[0], c[0]), -1), rtol=1e-12, atol=1e-12)


def test_step_by_step_is_the_whole_sequence_and_an_episode_begins_empty():
    policy, x = SetPolicy(3, 4, (5,), lstm=7).double(), rows(6, 9)
    whole, _ = policy(x)
    memory, parts = None, []
    for t in range(9):
        out, memory = policy(x[:, t : t + 1], memory)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    begins = torch.zeros(6, 9, dtype=torch.bool)
    begins[:3, 4] = True  # the observation of step 4 is the first of an episode
    found, _ = policy(x, begins=begins)
    torch.testing.assert_close(found[:3, 4:], policy(x[:3, 4:])[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[3:], whole[3:], rtol=1e-12, atol=1e-12)
    shifted, _ = policy(x, begins=begins.roll(1, 1))
    assert float((shifted - found).detach().abs().max()) > 1e-3  # a flag that is off by one is another sequence


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p, x: p(x[:, 0]), r"sequences \(n, T"),
        (lambda p, x: p(x, torch.zeros(9, 14)), "memory has shape"),
        (lambda p, x: p(x.transpose(0, 1), begins=torch.zeros(6, 9, dtype=torch.bool)), "begins has shape"),
        (lambda p, x: p(x, begins=torch.zeros(6, 9)), "bool"),
        (lambda p, x: SetPolicy(3, 4, (5,))(x, torch.zeros(6, 14)), "no memory"),
        (lambda p, x: SetPolicy(3, 4, (5,), lstm=-1), "lstm"),
    ],
)
def test_sequences_whose_layout_does_not_fit_are_refused(call, says):
    with pytest.raises(InvalidInput, match=says):
        call(SetPolicy(3, 4, (5,), lstm=7), rows(6, 9, dtype=torch.float32))


@pytest.mark.parametrize(("lstm", "bins"), list(itertools.product((0, 5), ((5, 5), (0, 0), (0, 3)))))
def test_stacked_networks_give_what_each_gives_alone(lstm, bins):
    made = Replicas(lambda: SetPolicy(3, 4, bins, lstm=lstm).double(), (0, 1, 2), lr=0.1, stacked=True)
    x = rows(6, 4).expand(3, 6, 4, -1) * torch.arange(1, 4)[:, None, None, None]
    x[..., 3::4] = 1.0
    x[1, :, :, 7] = 0.0  # the second object of one network's rows is padding
    x = x if lstm else x.flatten(1, 2)
    found = made._model.stacked(made.parameters, x)
    for r in range(3):
        alone = made.module(r)(x[r])
        for got, expected in zip(found if lstm else (found,), alone if lstm else (alone,), strict=True):
            torch.testing.assert_close(got[r], expected, rtol=1e-12, atol=1e-12)


def test_demonstrations_are_judged_in_bob_s_own_memory_from_their_beginning():
    game = AsymmetricSelfPlay(PlanarPush(), SMALL, seeds=(3, 4))
    start = game._alice_state
    with torch.no_grad():
        alice = alice_turn(game.world, game.alice, start, 4, (0,))
        goal, _ = game._judge(start, alice.states[-1])
        wanted = torch.arange(8).expand(2, 8) % 3 == 0
        found = game._relabel(alice, goal, wanted)
    assert found.steps == 4
    for r in range(2):
        bob = game.bob.policy.module(r)
        real = found.mask[r].view(-1, 4)
        for k, g in enumerate((0, 3, 6)):
            x = torch.stack([rows_of(game.world, s[r, g : g + 1], goal[r, g : g + 1])[0] for s in alice.states[:-1]])
            logits, _ = bob(x[None])
            logp, _ = action_logp(logits[0], alice.index[:, r, g], game.bob.bins)
            torch.testing.assert_close(found.logp[r].view(-1, 4)[k], logp, rtol=1e-5, atol=1e-6)
            assert bool(real[k].all())


def test_bob_acts_in_his_memory_and_keeps_it_where_games_leave_the_batch():
    game = AsymmetricSelfPlay(PlanarPush(), SMALL, seeds=(3,))
    state, playing = game._alice_state, torch.ones(1, 8, dtype=torch.bool)
    goal = game._achieved(state).clone()
    goal[:, 1:] += 0.9  # game 0 is met at once, and the others not
    course = []
    with torch.no_grad():
        turn = bob_turn(game.world, game.bob, state, goal, playing, 5, (0,), course=course)
    assert turn.steps[0].tolist() == [0, *[5] * 7]
    bob, states = game.bob.policy.module(0), [state, *course]
    for g in (1, 7):
        x = torch.stack([rows_of(game.world, s[0, g : g + 1], goal[0, g : g + 1])[0] for s in states[:-1]])
        logits, _ = bob(x[None])
        index = torch.stack(
            [part[0, list(games[0]).index(g)] for part, (games, _) in zip(turn.index, turn.row_of, strict=True)]
        )
        logp = torch.stack(
            [part[0, list(games[0]).index(g)] for part, (games, _) in zip(turn.logp, turn.row_of, strict=True)]
        )
        torch.testing.assert_close(action_logp(logits[0], index, game.bob.bins)[0], logp, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ends", [{}, {"turn_end": "go_on", "bob_timeout": "go_on", "reward": "time"}])
def test_seeds_with_a_memory_learn_stacked_as_they_learn_alone(ends):
    config = dataclasses.replace(SMALL, past_opponent=0.5, snapshot_every=1, **ends)
    stacked = AsymmetricSelfPlay(Grasp25D(), config, seeds=(3, 4))
    alone = AsymmetricSelfPlay(Grasp25D(), config, seeds=(4,))
    for _ in range(4):
        a, b = stacked.turn(), alone.turn()
        assert torch.equal(a.verdict[1], b.verdict[0])
    for side, other in ((stacked.alice, alone.alice), (stacked.bob, alone.bob)):
        for part in ("policy", "value"):
            for name, p in getattr(side, part).parameters.items():
                torch.testing.assert_close(p[1], getattr(other, part).parameters[name][0], rtol=1e-3, atol=1e-4)
    assert stacked.health()["first_ratio"].dropna().max() < 1e-4  # rows are read in the memory that acted


class Remember:
    """A light shows at the first step only which way to go; goals are places two steps to its side."""

    bins = (3,)
    thresholds = (0.5,)

    def initial(self, n, generator):
        side = torch.randint(2, (n, 1), generator=generator).float() * 2 - 1
        return torch.cat((torch.zeros(n, 1), side, torch.zeros(n, 1), torch.rand(n, 1, generator=generator)), 1)

    def step(self, state, action):
        return torch.cat((state[:, :1] + action - 1, state[:, 1:2], state[:, 2:3] + 1, state[:, 3:]), 1)

    def observe(self, state):
        first = (state[:, 2:3] == 0).float()
        return first * state[:, 1:2], torch.stack((torch.ones(len(state), 1), first * 0), -1)

    def achieved(self, state):
        return (state[:, :1] - 2 * state[:, 1:2])[:, :, None]

    def distance(self, achieved, goal):
        return (achieved - goal).abs()

    def off_table(self, state):
        return state[:, :1].abs() > 99

    def out_of_zone(self, state):
        return state[:, :1].abs() > 99


class Blindfold(nn.Module):
    """Sees the light, and nothing of where it is."""

    def __init__(self, lstm, outputs):
        super().__init__()
        make = SetPolicy if outputs else SetValue
        self.inner = (
            make(1, 2, (outputs,), embed=(4,), hidden=(16,), lstm=lstm)
            if outputs
            else make(1, 2, embed=(4,), hidden=(16,), lstm=lstm)
        )
        self.memory_size = self.inner.memory_size

    def forward(self, x, *memory):
        return self.inner(x[..., :3], *memory)


@pytest.mark.parametrize(("lstm", "reached"), [(0, False), (16, True)])
def test_what_was_seen_once_is_remembered_only_with_a_memory(lstm, reached):
    def goals(n, generator):
        state = Remember().initial(n, generator)
        return state, torch.zeros(n, 1, 1)

    config = ASPConfig(envs=64, bob_steps=2, lr=1e-2, epochs=4)
    game = AsymmetricSelfPlay(
        Remember(),
        config,
        policy=lambda robot, f, bins: Blindfold(lstm, 3),
        value=lambda robot, f: Blindfold(lstm, 0),
        goals=goals,
        seeds=(0,),
    )
    for _ in range(40):
        game.turn()
    rate = float(game.evaluate({"sides": goals}, n=256, greedy=True)["rate"].iloc[0])
    assert (rate > 0.95) == reached


def test_the_cloning_term_of_sequences_in_a_ppo_of_one_s_own():
    policy, world = SetPolicy(2, 9, (5, 5), lstm=8), PlanarPush()
    states = [world.initial(6, torch.Generator().manual_seed(0))]
    actions = torch.randint(5, (7, 6, 2), generator=torch.Generator().manual_seed(1))
    for action in actions:
        states.append(world.step(states[-1], action))
    wanted = torch.tensor([True, False, True, True, False, False])
    found = relabel(world, torch.stack(states), actions, world.achieved(states[-1]), wanted)
    # steps come first: to sequences (n, T)
    x, choice, mask = (part.unflatten(0, (7, -1)).transpose(0, 1) for part in found)
    with torch.no_grad():
        old = action_logp(policy(x)[0], choice, (5, 5))[0]
    new = action_logp(policy(x)[0], choice, (5, 5))[0]
    loss = abc_loss(new.flatten(), old.flatten(), mask.flatten())
    (loss + ppo_loss(new.flatten(), old.flatten(), torch.ones(21)).total).backward()
    assert float(loss) == pytest.approx(-1.0)
    assert all(bool(torch.isfinite(p.grad).all()) for p in policy.parameters())
    with pytest.raises(InvalidInput, match="flattened"):
        abc_loss(new, old, mask)


class Odd(nn.Module):
    memory_size = 3

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 10)

    def forward(self, x, memory):
        return self.layer(x)


def test_a_network_that_keeps_its_memory_to_itself_is_refused():
    with pytest.raises(InvalidInput, match="memory"):
        AsymmetricSelfPlay(PlanarPush(), dataclasses.replace(SMALL, lstm=0), policy=lambda r, f, b: Odd())


class Torchs(nn.Module):
    """A user's own nn.LSTM, which no batched product can run."""

    memory_size = 10

    def __init__(self, width, outputs):
        super().__init__()
        self.lstm, self.head = nn.LSTM(width, 5, batch_first=True), nn.Linear(5, outputs)

    def forward(self, x, memory):
        h, c = memory.chunk(2, -1)
        out, (h, c) = self.lstm(x, (h[None].contiguous(), c[None].contiguous()))
        return self.head(out), torch.cat((h[0], c[0]), -1)


def test_a_user_s_own_lstm_learns():
    game = AsymmetricSelfPlay(
        PlanarPush(), dataclasses.replace(SMALL, lstm=0), policy=lambda r, f, b: Torchs(r + f, sum(b)), seeds=(0, 1)
    )
    before = game.snapshot()
    for _ in range(2):
        game.turn()
    assert game.health()["first_ratio"].dropna().max() < 1e-4
    assert not torch.equal(before.alice["head.weight"], game.alice.policy.parameters["head.weight"])


def test_a_training_with_a_memory_goes_on_to_the_same_bits(tmp_path):
    first, again = (AsymmetricSelfPlay(PlanarPush(), SMALL, seeds=(5,)) for _ in range(2))
    first.turn()
    again.resume(first.save(tmp_path / "t.safetensors"))
    assert torch.equal(first.turn().end, again.turn().end)
