r"""Adaptive allocation: which arm to run next.

Ask for an arm, run it, tell the reward; several arms may be asked for before the first reward is told (workers).
Thompson sampling and UCB1 lose little while learning; top-two Thompson sampling finds the best arm. The mean of an
adaptively sampled arm is biased (downward: an arm that starts unluckily is dropped and keeps its bad mean), so an
effect that matters is measured again on fresh seeds. A. Gelman and A. Vehtari, JASA 2021, idea 6.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from mlcollage._checks import choice, probability, real
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.stats._values import Floats, Rng

Reward = Literal["bernoulli", "gaussian"]

_ROUNDS = 500  # joint posterior draws in which top-two looks for a second leader


class Bandit(ABC):
    """What all bandits share: arms, counts, sums, arms asked for and not yet told, and a generator.

    Parameters
    ----------
    arms
        Names, or how many (then 0, 1, ...); at least 2.
    rng
        Seed or generator; the same seed and rewards give the same arms.
    """

    _first = 1  # each arm is asked for this often before anything is compared

    def __init__(self, arms: int | Sequence[Hashable], rng: Rng = 0) -> None:
        self.arms: tuple[Hashable, ...] = tuple(range(arms)) if isinstance(arms, int) else tuple(arms)
        if len(self.arms) < 2 or len(set(self.arms)) != len(self.arms):
            raise InvalidInput(f"arms={arms!r}: at least 2 different arms are needed.")
        self._rng = np.random.default_rng(rng)
        self.counts = np.zeros(len(self.arms), dtype=np.int64)
        self._pending = np.zeros(len(self.arms), dtype=np.int64)
        self._sums = np.zeros(len(self.arms))
        self._squares = np.zeros(len(self.arms))  # about the running mean

    @property
    def means(self) -> Floats:
        """Mean reward of each arm, NaN without rewards; biased downward for arms that were dropped."""
        return np.divide(self._sums, self.counts, out=np.full(len(self.arms), np.nan), where=self.counts > 0)

    def ask(self) -> Hashable:
        """The arm to run next; every arm is tried before they are compared."""
        started = self.counts + self._pending  # (arms,), told or out
        new = int(started.argmin())
        arm = new if started[new] < self._first else self._ready()
        self._pending[arm] += 1
        return self.arms[arm]

    def _ready(self) -> int:
        """Compare what has been told; an arm whose first rewards are still out is left to come in."""
        return self._choose() if (self.counts >= self._first).all() else int((self.counts + self._pending).argmin())

    def tell(self, arm: Hashable, reward: float) -> None:
        """Report the reward of an arm that was asked for."""
        i = self._index(arm)
        if self._pending[i] == 0:
            raise InvalidInput(f"arm {arm!r} was told a reward but not asked for; call ask first, then tell once.")
        value = float(reward)  # a bool counts as 0 or 1
        self._check(value)
        before = self._sums[i] / max(1, self.counts[i])  # the mean so far: Welford's update of the squares needs it
        self._pending[i] -= 1
        self.counts[i] += 1
        self._sums[i] += value
        if self.counts[i] > 1:
            self._squares[i] += (value - before) * (value - self._sums[i] / self.counts[i])

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, the generator included, as plain numbers, lists and mappings.

        Arms asked for and not yet told are forgotten: whoever resumes asks again.
        """
        state = {name: getattr(self, name).tolist() for name in ("counts", "_sums", "_squares")}
        return {"class": type(self).__name__, "rng": self._rng.bit_generator.state, **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, by a bandit with the same settings."""
        if state.get("class") != type(self).__name__ or len(state["counts"]) != len(self.arms):
            raise InvalidInput(
                f"the state is of {state.get('class')} with {len(state.get('counts', ()))} arms; this is "
                f"{type(self).__name__} with {len(self.arms)}."
            )
        self.counts = np.array(state["counts"], dtype=np.int64)
        self._sums, self._squares = np.array(state["_sums"], float), np.array(state["_squares"], float)
        self._pending = np.zeros(len(self.arms), dtype=np.int64)
        self._rng.bit_generator.state = state["rng"]

    def _index(self, arm: Hashable) -> int:
        try:
            return self.arms.index(arm)
        except ValueError:
            raise UnknownName(f"arm {arm!r} does not exist; the arms are {', '.join(map(str, self.arms))}.") from None

    def _check(self, reward: float) -> None:
        real("reward", reward)

    @abstractmethod
    def _choose(self) -> int:
        """Index of the next arm, all having been told at least once."""


class ThompsonSampling(Bandit):
    r"""Thompson sampling: play an arm with the posterior probability that it is best.

    ``bernoulli``: with k successes in n, :math:`\theta \sim \mathrm{Beta}(1 + k, 1 + n - k)`. ``gaussian``: mean and
    variance unknown, prior :math:`p(\theta, \sigma^2) \propto \sigma^{-1}`, after four rewards an arm,

    .. math:: \theta \sim \bar r + \sqrt{\frac{S}{n (n - 2)}} \; t_{n-2}, \qquad S = \sum_i (r_i - \bar r)^2.

    With Jeffreys' prior or the reference prior Thompson sampling can give up a good arm for ever (J. Honda and
    A. Takemura, AISTATS 2014). D. Russo et al., "A Tutorial on Thompson Sampling", 2018.

    Parameters
    ----------
    arms, rng
        As in :class:`Bandit`.
    reward
        ``bernoulli`` (rewards 0 and 1) or ``gaussian`` (any finite number).

    Raises
    ------
    InvalidInput
        On a reward without an ask or outside the support; :class:`~mlcollage.errors.UnknownName` for an unknown arm.

    Examples
    --------
    >>> bandit, rng = ThompsonSampling(["a", "b"], rng=0), np.random.default_rng(1)
    >>> for _ in range(300):
    ...     arm = bandit.ask()
    ...     bandit.tell(arm, rng.random() < {"a": 0.3, "b": 0.6}[arm])
    >>> bool(bandit.counts[1] > 240), bool(bandit.prob_best()[1] > 0.95)
    (True, True)
    """

    def __init__(self, arms: int | Sequence[Hashable], reward: Reward = "bernoulli", rng: Rng = 0) -> None:
        super().__init__(arms, rng)
        self.reward = choice("reward", reward, get_args(Reward))
        self._first = 1 if reward == "bernoulli" else 4

    def prob_best(self, draws: int = 10_000, rng: Rng = 0) -> Floats:
        """Posterior probability that each arm is best, by simulation; stop when one exceeds 0.95, say.

        Like every posterior probability looked at repeatedly, it is no significance level: see
        :class:`~mlcollage.stats.sequential.ConfidenceSequence` for stopping that keeps one.
        """
        if (self.counts < self._first).any():
            raise InvalidInput(f"every arm needs {self._first} reward(s) first; counts are {self.counts.tolist()}.")
        best = self._draws(draws, np.random.default_rng(rng)).argmax(axis=1)
        return np.bincount(best, minlength=len(self.arms)) / draws

    def _draws(self, size: int, rng: np.random.Generator) -> Floats:
        """Draws of the arms' mean rewards, shape ``(size, arms)``."""
        n, shape = self.counts, (size, len(self.arms))  # counts and sums (arms,) broadcast over the draws
        if self.reward == "bernoulli":
            return rng.beta(1 + self._sums, 1 + n - self._sums, shape)
        return self.means + np.sqrt(self._squares / (n - 2) / n) * rng.standard_t(n - 2, shape)

    def _choose(self) -> int:
        return int(self._draws(1, self._rng)[0].argmax())

    def _check(self, reward: float) -> None:
        super()._check(reward)
        if self.reward == "bernoulli" and reward not in (0.0, 1.0):
            raise InvalidInput(f"reward {reward} is neither 0 nor 1; use reward='gaussian' for other numbers.")


class TopTwoThompson(ThompsonSampling):
    r"""Top-two Thompson sampling: the leader of a posterior draw with probability beta, else its challenger.

    Draws are repeated until another arm leads; that challenger gets the other :math:`1 - \beta` of the runs, so that
    the posterior of "which arm is best" concentrates fast, where Thompson sampling stops testing the runner-up. For
    finding the best arm, not for rewards on the way. D. Russo, Operations Research 2020.

    Parameters
    ----------
    arms, reward, rng
        As in :class:`ThompsonSampling`.
    beta
        Share of the leader; 1/2 is never far from best.

    Examples
    --------
    >>> bandit, rng = TopTwoThompson(3, "gaussian", rng=0), np.random.default_rng(1)
    >>> for _ in range(150):
    ...     arm = bandit.ask()
    ...     bandit.tell(arm, rng.normal([0.0, 0.5, 1.0][arm]))
    >>> int(bandit.prob_best().argmax())
    2
    """

    def __init__(
        self, arms: int | Sequence[Hashable], reward: Reward = "bernoulli", beta: float = 0.5, rng: Rng = 0
    ) -> None:
        super().__init__(arms, reward, rng)
        self.beta = probability("beta", beta)

    def _choose(self) -> int:
        draws = self._draws(_ROUNDS, self._rng)
        leaders = draws.argmax(axis=1)  # of each joint draw, (_ROUNDS,); the first one's leader is Thompson's choice
        if self._rng.random() < self.beta:
            return int(leaders[0])
        # the first joint draw that another arm leads names the challenger
        others = np.flatnonzero(leaders != leaders[0])
        if len(others):
            return int(leaders[others[0]])
        return int(np.argsort(draws[0])[-2])  # nobody else ever leads: the second of this draw


class UCB1(Bandit):
    r"""UCB1: play the arm with the largest upper confidence bound.

    .. math:: \bar r_i + (b - a) \sqrt{2 \log t \,/\, n_i}

    for rewards in :math:`[a, b]`; regret is logarithmic without a prior, with a large constant. P. Auer,
    N. Cesa-Bianchi and P. Fischer, Machine Learning 2002. Arms asked for and not yet told count as run, so that
    workers spread.

    Parameters
    ----------
    arms, rng
        As in :class:`Bandit`; the generator breaks ties only.
    low, high
        a and b.

    Examples
    --------
    >>> bandit = UCB1(2)
    >>> for _ in range(100):
    ...     arm = bandit.ask()
    ...     bandit.tell(arm, [0.2, 0.9][arm])
    >>> bool(bandit.counts[1] > 80)
    True
    """

    def __init__(self, arms: int | Sequence[Hashable], low: float = 0.0, high: float = 1.0, rng: Rng = 0) -> None:
        if not -np.inf < low < high < np.inf:
            raise InvalidInput(f"bounds of the reward must be finite with low < high; they are {low} and {high}.")
        super().__init__(arms, rng)
        self.low, self.high = low, high

    def _choose(self) -> int:
        n = self.counts + self._pending  # arms that are out count as run
        return _argmax(self.means + (self.high - self.low) * np.sqrt(2 * np.log(n.sum()) / n), self._rng)

    def _check(self, reward: float) -> None:
        super()._check(reward)
        if not self.low <= reward <= self.high:
            raise InvalidInput(
                f"reward {reward} lies outside [{self.low:g}, {self.high:g}]; are they in the same units (percent or "
                "fraction)?"
            )


class EpsilonGreedy(Bandit):
    """Epsilon-greedy: the best mean so far, and with probability epsilon any arm. The baseline.

    Its regret grows linearly, slowly: it beats Thompson sampling at some horizons and loses at long ones.

    Parameters
    ----------
    arms, rng
        As in :class:`Bandit`.
    epsilon
        Share of random arms.

    Examples
    --------
    >>> bandit = EpsilonGreedy(["slow", "fast"], epsilon=0.2)
    >>> for _ in range(100):
    ...     arm = bandit.ask()
    ...     bandit.tell(arm, {"slow": 0.0, "fast": 1.0}[arm])
    >>> bool(bandit.counts[1] > 80)
    True
    """

    def __init__(self, arms: int | Sequence[Hashable], epsilon: float = 0.1, rng: Rng = 0) -> None:
        super().__init__(arms, rng)
        self.epsilon = probability("epsilon", epsilon, inside=False)

    def _choose(self) -> int:
        if self._rng.random() < self.epsilon:
            return int(self._rng.integers(len(self.arms)))
        return _argmax(self.means, self._rng)


def _argmax(values: Floats, rng: np.random.Generator) -> int:
    """The largest, ties broken at random."""
    return int(rng.choice(np.flatnonzero(values == values.max())))
