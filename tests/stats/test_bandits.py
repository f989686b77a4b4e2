"""Bandits: posteriors in closed form, regret and identification by simulation, resuming."""

import json

import numpy as np
import pytest
from scipy import integrate
from scipy import stats as sps

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.stats.bandits import UCB1, EpsilonGreedy, ThompsonSampling, TopTwoThompson

CHANCES = (0.5, 0.45, 0.4, 0.4, 0.35)


def play(bandit, chances, pulls, rng) -> float:
    """Expected regret of the arms played."""
    for _ in range(pulls):
        arm = bandit.ask()
        bandit.tell(arm, float(rng.random() < chances[arm]))
    return float((max(chances) - np.array(chances)) @ bandit.counts)


def told(bandit, rewards: dict) -> None:
    """Ask until each arm has had its rewards."""
    left = {arm: list(values) for arm, values in rewards.items()}
    while any(left.values()):
        arm = bandit.ask()
        bandit.tell(arm, left[arm].pop(0)) if left[arm] else bandit.tell(arm, 0.0)


def test_regret_of_thompson_is_far_below_uniform_play_and_of_ucb_too():
    """20 repeats of 1,000 pulls of five close arms: uniform play would lose 80."""
    regrets = {"thompson": [], "ucb": [], "greedy": []}
    for seed in range(20):
        rng = np.random.default_rng(100 + seed)
        regrets["thompson"].append(play(ThompsonSampling(5, rng=seed), CHANCES, 1000, rng))
        regrets["ucb"].append(play(UCB1(5, rng=seed), CHANCES, 1000, rng))
        regrets["greedy"].append(play(EpsilonGreedy(5, rng=seed), CHANCES, 1000, rng))
    mean = {name: np.mean(values) for name, values in regrets.items()}
    assert mean["thompson"] < 0.6 * 80
    assert mean["greedy"] < 0.8 * 80  # not separable from Thompson sampling at this horizon
    assert mean["thompson"] < mean["ucb"] < 80


def test_thompson_plays_an_arm_with_the_probability_that_it_is_best():
    bandit = ThompsonSampling(["a", "b"], rng=0)
    told(bandit, {"a": [1, 1, 0, 1], "b": [0, 1, 0]})
    k, n = bandit._sums, bandit.counts
    a, b = (sps.beta(1 + k[i], 1 + n[i] - k[i]) for i in range(2))
    exact = integrate.quad(lambda t: a.pdf(t) * b.cdf(t), 0, 1)[0]
    assert bandit.prob_best(40_000)[0] == pytest.approx(exact, abs=0.01)
    asked = [bandit.ask() for _ in range(4000)]
    assert np.mean([arm == "a" for arm in asked]) == pytest.approx(exact, abs=0.03)


def test_gaussian_thompson_draws_from_the_posterior():
    """Against the mean and sigma^2 on a grid, with the prior proportional to 1 / sigma."""
    bandit = ThompsonSampling(2, "gaussian", rng=1)
    rewards = {0: [0.3, 1.2, -0.4, 0.8, 2.0], 1: [5.0, 6.0, 7.0, 5.5, 6.5]}
    told(bandit, rewards)
    x = np.array(rewards[0])[: bandit.counts[0]]
    mu, log_v = np.meshgrid(np.linspace(-8, 10, 1200), np.linspace(-5, 9, 600))
    v = np.exp(log_v)
    log_p = -0.5 * log_v - 0.5 * len(x) * log_v - 0.5 * ((x[:, None, None] - mu) ** 2).sum(axis=0) / v + log_v
    p = np.exp(log_p - log_p.max())
    marginal = p.sum(axis=0) / p.sum()
    draws = bandit._draws(60_000, np.random.default_rng(2))[:, 0]
    for q in (-0.5, 0.5, 1.5):
        assert (draws < q).mean() == pytest.approx(marginal[mu[0] < q].sum(), abs=0.01)


def test_gaussian_moments_are_exact_for_large_offsets():
    bandit = ThompsonSampling(2, "gaussian")
    values = 1e6 + np.random.default_rng(3).normal(size=40)
    for value in values:
        arm = bandit.ask()
        bandit.tell(arm, value)
    both = [bandit._squares[i] / bandit.counts[i] for i in range(2)]
    assert all(0.3 < v < 3 for v in both)


def test_top_two_finds_the_best_arm_with_more_certainty():
    """30 repeats of 300 pulls: mean posterior probability of the best arm, and the runner-up tried more often."""
    certain = {ThompsonSampling: [], TopTwoThompson: []}
    for cls, probabilities in certain.items():
        for seed in range(30):
            rng = np.random.default_rng(seed)
            bandit = cls(4, "gaussian", rng=seed)
            for _ in range(300):
                arm = bandit.ask()
                bandit.tell(arm, rng.normal((0.35, 0.0, 0.0, 0.0)[arm], 1.0))
            probabilities.append(bandit.prob_best(2000)[0])
    assert np.mean(certain[TopTwoThompson]) > np.mean(certain[ThompsonSampling])
    assert np.mean(certain[TopTwoThompson]) > 0.85


def test_top_two_gives_the_leader_its_share():
    bandit = TopTwoThompson(3, beta=0.7, rng=4)
    rng = np.random.default_rng(5)
    play(bandit, (0.9, 0.5, 0.1), 1500, rng)
    assert bandit.counts[0] / 1500 == pytest.approx(0.7, abs=0.05)


def test_ucb_bound_is_the_formula():
    bandit = UCB1(3, low=-1, high=1)
    told(bandit, {0: [0.5], 1: [0.4], 2: [-1.0]})
    n, means = bandit.counts, bandit.means
    bound = means + 2 * np.sqrt(2 * np.log(n.sum()) / n)
    assert bandit.ask() == int(bound.argmax())


def test_several_workers_may_ask_before_anything_is_told():
    bandit = ThompsonSampling(3, rng=6)
    asked = [bandit.ask() for _ in range(6)]
    assert sorted(asked) == [0, 0, 1, 1, 2, 2]
    for arm in reversed(asked):
        bandit.tell(arm, 1)
    assert bandit.counts.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ThompsonSampling(CHANCES_NAMES, rng=7),
        lambda: TopTwoThompson(CHANCES_NAMES, rng=7),
        lambda: UCB1(CHANCES_NAMES, rng=7),
        lambda: EpsilonGreedy(CHANCES_NAMES, rng=7),
    ],
)
def test_a_bandit_continues_from_its_state(make):
    def run(bandit, rewards):
        arms = []
        for reward in rewards:
            arms.append(bandit.ask())
            bandit.tell(arms[-1], reward)
        return arms

    rewards = (np.random.default_rng(8).random(80) < 0.5).astype(float)
    whole = run(make(), rewards)
    first = make()
    arms = run(first, rewards[:37])
    state = json.loads(json.dumps(first.state_dict()))
    second = make()
    second.load_state_dict(state)
    assert arms + run(second, rewards[37:]) == whole


CHANCES_NAMES = ("a", "b", "c")


def bad_tell(bandit, reward) -> None:
    bandit.tell(bandit.ask(), reward)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: ThompsonSampling(1), "at least 2"),
        (lambda: ThompsonSampling(["a", "a"]), "different arms"),
        (lambda: ThompsonSampling(2, "poisson"), "reward must be one of 'bernoulli', 'gaussian'"),
        (lambda: ThompsonSampling(2).tell(0, 1), "not asked for"),
        (lambda: bad_tell(ThompsonSampling(2), 0.5), "neither 0 nor 1"),
        (lambda: bad_tell(ThompsonSampling(2, "gaussian"), np.nan), "reward must be a finite number"),
        (lambda: ThompsonSampling(2).prob_best(), "reward\\(s\\) first"),
        (lambda: TopTwoThompson(2, beta=1), "beta"),
        (lambda: bad_tell(UCB1(2), 93.0), "percent or fraction"),
        (lambda: UCB1(2, low=1, high=0), "low < high"),
        (lambda: EpsilonGreedy(2, epsilon=2), "epsilon"),
        (lambda: UCB1(2).load_state_dict(UCB1(3).state_dict()), "3 arms"),
        (lambda: UCB1(2).load_state_dict(ThompsonSampling(2).state_dict()), "ThompsonSampling"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        call()


def test_an_unknown_arm_is_named():
    with pytest.raises(UnknownName, match="the arms are a, b"):
        ThompsonSampling(["a", "b"]).tell("c", 1)
