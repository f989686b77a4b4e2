"""The contextual bandit: what it believes, how it explores, what it earns."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mlcollage.errors import InvalidInput
from mlcollage.papers.gated_linear_networks import GLNBandit

SMALL = {"hidden_layer_sizes": (4, 4), "context_dim": 2}


def test_pseudo_counts_are_the_power_mean_of_the_visits():
    bandit = GLNBandit(3, 2, aggregation=-0.5, prior_count=2.0, **SMALL)
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(60):
        z = rng.normal(size=2)
        bandit.select(z)
        a = int(rng.integers(3))
        bandit.update(z, a, 1.0)
        seen.append((z, a))
    z = rng.normal(size=2)
    side = bandit._read(z[None])[1]
    visits = bandit.network_.visit_counts(side)[0]
    expected = np.mean((visits + 2.0) ** -0.5, axis=1) ** -2.0
    np.testing.assert_allclose(bandit.pseudo_counts(z), expected)
    assert visits.sum(axis=1).min() > 0
    assert GLNBandit(2, 2, **SMALL).pseudo_counts(z).tolist() == [1.0, 1.0]


def test_bonus_alone_visits_every_action():
    bandit = GLNBandit(5, 2, exploration=10.0, **SMALL)
    z = np.zeros(2)
    played = []
    for _ in range(25):
        played.append(bandit.select(z))
        bandit.update(z, played[-1], 0.5)
    assert np.bincount(played, minlength=5).min() >= 4


def test_tree_gives_the_mean_of_continuous_rewards():
    bandit = GLNBandit(2, 1, tree_depth=3, reward_range=(-2.0, 6.0), learning_rate=0.05, **SMALL)
    rng = np.random.default_rng(0)
    for _ in range(1500):
        z = rng.normal(size=1)
        bandit.select(z)
        bandit.update(z, 0, float(rng.choice([-1.5, 4.5])))
        bandit.update(z, 1, -1.5)
    values = bandit.values([0.3])
    assert values[0] == pytest.approx(1.5, abs=0.6)
    assert values[1] == pytest.approx(-1.5, abs=0.4)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_path_of_a_reward_ends_in_its_bin(depth):
    bandit = GLNBandit(1, 1, tree_depth=depth, **SMALL)
    for leaf in range(2**depth):
        nodes, branches = bandit._path((leaf + 0.5) / 2**depth)
        assert nodes[0] == 0
        assert len(set(nodes)) == depth
        assert int("".join(str(int(b)) for b in branches), 2) == leaf
    assert bandit._path(1.0)[1] == [1.0] * depth


def test_earns_more_than_chance_on_digits_and_repeats_with_its_seed():
    X, y = load_digits(return_X_y=True)
    earned = []
    for _ in range(2):
        bandit = GLNBandit(10, 64, random_state=3)
        total = []
        for z, label in zip(X[:900], y[:900], strict=True):
            a = bandit.select(z)
            bandit.update(z, a, float(a == label))
            total.append(float(a == label))
        earned.append(total)
    assert earned[0] == earned[1]
    assert np.mean(earned[0][-200:]) > 0.7


def test_a_saved_bandit_plays_on_as_it_would_have(tmp_path):
    rng = np.random.default_rng(0)
    Z, R = rng.normal(size=(120, 3)), rng.random((120, 4))

    def play(bandit, steps):
        actions = []
        for i in steps:
            actions.append(bandit.select(Z[i]))
            bandit.update(Z[i], actions[-1], R[i, actions[-1]])
        return actions

    bandit = GLNBandit(4, 3, tree_depth=2, random_state=1, **SMALL)
    play(bandit, range(60))
    bandit.set_params(exploration=0.0, tree_depth=0, n_actions=2, learning_rate=1.0)  # waits for reset()
    bandit.save(tmp_path / "b.npz")
    again = GLNBandit.load(tmp_path / "b.npz")
    assert again.exploration == 0.05
    assert play(bandit, range(60, 120)) == play(again, range(60, 120))
    assert np.array_equal(bandit.values(Z[0]), again.values(Z[0]))
    assert len(bandit.values(Z[0])) == 4
    assert len(bandit.reset().values(Z[0])) == 2
    assert bandit.t_ == 0


@pytest.mark.parametrize(("settings", "largest"), [({}, 4.0), ({"max_deviation": None}, np.inf)])
def test_one_wrong_context_does_not_ruin_the_others(settings, largest):
    bandit, rng = GLNBandit(2, 2, **settings, **SMALL), np.random.default_rng(0)
    for t in range(400):
        z = rng.normal(size=2) * (1e6 if t == 200 else 1)
        bandit.update(z, bandit.select(z), 1.0)
    count, _, square = bandit._inputs_.moments
    deviation = np.sqrt(square / count)
    assert deviation.max() < largest
    assert (deviation.max() > 1e4) == np.isinf(largest)
    assert bandit.health().samples == 400
    assert bandit.health().advice == ""


def test_rewards_may_be_true_and_false():
    one, other = GLNBandit(2, 2, **SMALL), GLNBandit(2, 2, **SMALL)
    one.update(np.ones(2), 1, True)
    other.update(np.ones(2), 1, 1.0)
    assert np.array_equal(one.values(np.ones(2)), other.values(np.ones(2)))


def test_bad_input_is_named():
    bandit = GLNBandit(2, 3, **SMALL)
    for call, message in (
        (lambda: GLNBandit(0, 3), "n_actions"),
        (lambda: GLNBandit(2, 3, exploration=-1), "exploration"),
        (lambda: GLNBandit(2, 3, aggregation=0), "aggregation"),
        (lambda: GLNBandit(2, 3, reward_range=(1, 1)), "reward_range"),
        (lambda: GLNBandit(2, 3, tree_depth=11), "tree_depth"),
        (lambda: GLNBandit(2, 3, learning_rate=0), "learning_rate"),
        (lambda: bandit.select([1.0, 2.0]), "shape"),
        (lambda: bandit.select([1.0, 2.0, np.nan]), "finite"),
        (lambda: bandit.update(np.zeros(3), 2, 1.0), "action"),
        (lambda: bandit.update(np.zeros(3), 0, 1.5), "reward"),
        (lambda: bandit.update(np.zeros(3), 0, float("nan")), "reward"),
    ):
        with pytest.raises(InvalidInput, match=message):
            call()
