"""The learners of the study: the method, networks trained by backpropagation one sample at a time, and bandit rules.

The baselines are compiled like the method itself, so that a grid of settings costs no more for them than for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from numba import njit
from scipy.special import softmax

from mlcollage import _checks as checks

from ..sklearn import GLNClassifier
from .data import Split

Array = npt.NDArray[Any]
T = TypeVar("T")


class Gated:
    """The method: a :class:`GLNClassifier` that knows how many classes there are."""

    def __init__(self, classes: int, seed: int, **parameters: Any) -> None:
        self.model = GLNClassifier(random_state=seed, **parameters)
        self.classes = np.arange(classes)

    def learn(self, X: Array, y: Array) -> Array:
        """Probabilities predicted before each sample was learned, ``(n, classes)``."""
        return self.model.progressive_predict(X, y, classes=self.classes)

    def scores(self, X: Array) -> Array:
        """Probabilities of the classes."""
        return self.model.predict_proba(X)

    def end_task(self, X: Array) -> None:
        """Nothing: the method is not told where a task ends."""

    @property
    def kept(self) -> int:
        """Numbers that learning keeps: weights and hyperplanes."""
        network = self.model.network_
        return sum(table.state()["weights"].size for table in network.heads) + network.contexts.normals.size


class Rival:
    """An :class:`OnlineMLP` as a learner.

    With ``replay``, as many samples are kept (a uniform choice of those met, by reservoir sampling), and each new one
    is followed by ``again`` of them, drawn with replacement.
    """

    def __init__(self, split: Split, seed: int, *, replay: int = 0, again: int = 1, **parameters: Any) -> None:
        self.replay, self.again = replay, again
        self.model = OnlineMLP(split.X.shape[1], split.classes, seed=seed, **parameters)
        self.rng, self.met = np.random.default_rng([seed, 7]), 0
        self.buffer: list[tuple[Array, int]] = []

    def learn(self, X: Array, y: Array) -> Array:
        """Scores predicted before each sample was learned, ``(n, classes)``; those of replayed samples included."""
        if self.replay:
            X, y = (np.array(part) for part in zip(*self._with_replays(X, y), strict=True))
        return self.model.learn(X, y)

    def _with_replays(self, X: Array, y: Array) -> Iterator[tuple[Array, int]]:
        for sample in zip(X, y, strict=True):
            yield sample
            if self.buffer:
                yield from (self.buffer[i] for i in self.rng.integers(len(self.buffer), size=self.again))
            self.met += 1
            place = len(self.buffer) if len(self.buffer) < self.replay else int(self.rng.integers(self.met))
            if place < self.replay:
                self.buffer[place : place + 1] = [sample]

    def end_task(self, X: Array) -> None:
        """Tell the model that a task is over."""
        self.model.consolidate(X)

    def scores(self, X: Array) -> Array:
        """Scores of the classes."""
        return self.model.decision_function(X)

    @property
    def kept(self) -> int:
        """Numbers that learning keeps: weights, with elastic weights their anchor and pull, and replayed samples."""
        weights = self.model.theta.size * (3 if self.model.elastic else 1)
        return weights + self.replay * (self.model.n_inputs + 1)


def inputs(arm: str, split: Split) -> Split:
    """What an arm reads: the method standardizes online, the baselines may know mean and spread beforehand."""
    return split if arm.startswith("gln") else split.standardized()


def learner(arm: str, split: Split, seed: int, setting: dict[str, Any], **gated: Any) -> Gated | Rival:
    """A fresh learner with one setting of its grid; ``gated`` are the method's parameters besides."""
    if arm.startswith("gln"):
        return Gated(split.classes, seed, **{"std_offset": split.offset, **gated, **setting})
    return Rival(split, seed, **setting)


def best(settings: Sequence[T], score: Callable[[T], float]) -> T:
    """The setting with the highest score, the first of several."""
    return settings[int(np.argmax([score(setting) for setting in settings]))]


def right(scores: Array, y: Array) -> Array:
    """Whether the class with the highest score is the true one, ``(n,)``."""
    return scores.argmax(axis=1) == y


def held_out_accuracy(model: Gated | Rival, X: Array, y: Array) -> float:
    """Accuracy on the last 20 % of the samples after one pass over the others."""
    cut = int(0.8 * len(X))
    model.learn(X[:cut], y[:cut])
    return float(right(model.scores(X[cut:]), y[cut:]).mean())


class OnlineMLP:
    r"""Softmax classifier with at most one hidden ReLU layer, trained by SGD or Adam, one sample per step.

    logits = W_2 relu(W_1 x + b_1) + b_2, or W x + b without a hidden layer; cross-entropy loss.

    Parameters
    ----------
    n_inputs, n_classes
        Sizes.
    hidden
        Hidden units; 0 is multinomial logistic regression.
    lr
        Step size.
    optimizer
        ``"sgd"`` or ``"adam"`` (beta 0.9, 0.999).
    dropout
        Probability with which a hidden unit is left out while learning; the others are scaled up.
    elastic
        Strength lambda of elastic weight consolidation (Kirkpatrick et al. 2017), with SGD only: after each task that
        :meth:`consolidate` is told of, the loss gains (lambda / 2) sum_i F_i (theta_i - theta*_i)^2 with the Fisher
        information F of all tasks so far and the weights theta* after the last. Its step is implicit, so that no
        strength makes it diverge.
    seed
        Seeds the initial weights, N(0, 2 / fan-in).

    Examples
    --------
    >>> X = np.eye(3); y = np.array([0, 1, 2])
    >>> model = OnlineMLP(3, 3, hidden=0, lr=0.5)
    >>> for _ in range(50):
    ...     _ = model.learn(X, y)
    >>> model.decision_function(X).argmax(axis=1).tolist()
    [0, 1, 2]
    """

    def __init__(
        self,
        n_inputs: int,
        n_classes: int,
        *,
        hidden: int = 0,
        lr: float = 0.1,
        optimizer: str = "sgd",
        dropout: float = 0.0,
        elastic: float = 0.0,
        seed: int = 0,
    ) -> None:
        checks.choice("optimizer", optimizer, ("sgd", "adam"))
        rng = np.random.default_rng(seed)
        shapes = [(n_classes, n_inputs)] if hidden == 0 else [(hidden, n_inputs), (n_classes, hidden)]
        blocks = [np.append(rng.normal(0, np.sqrt(2 / i), o * i), np.zeros(o)) for o, i in shapes]
        self.theta = np.concatenate(blocks)  # W_1, b_1, W_2, b_2 one after the other (W, b without a hidden layer)
        self.moments = np.zeros((2, self.theta.size))
        self.n_inputs, self.hidden, self.n_classes = n_inputs, hidden, n_classes
        self.lr, self.adam, self.steps = lr, optimizer == "adam", 0
        self.dropout, self.elastic, self.rng = dropout, elastic, rng
        self.anchor, self.pull = self.theta.copy(), np.zeros_like(self.theta)  # theta* and lambda F

    def learn(self, X: Array, y: Array) -> Array:
        """Learn from the samples in order; returns the logits that were predicted before each was learned."""
        X = np.ascontiguousarray(X, np.float64)
        out = np.empty((len(X), self.n_classes))
        sizes = (self.n_inputs, self.hidden, self.n_classes)
        keep = np.ones((1, self.hidden or self.n_inputs))  # factors of the hidden units; one row serves all samples
        if self.dropout:
            keep = (self.rng.random((len(X), self.hidden)) >= self.dropout) / (1 - self.dropout)
        state = (self.theta, self.moments, self.anchor, self.pull)
        _pass(*state, X, y.astype(np.int64), keep, out, *sizes, self.lr, self.adam, self.steps)
        self.steps += len(X)
        return out

    def consolidate(self, X: Array) -> None:
        """A task is over: pull the weights, from now on, to where they are, as strongly as its samples need them.

        F is the mean over the samples of the squared gradient, in expectation over labels that the model draws.
        """
        if not self.elastic:
            return
        hidden, weights, logits = self._forward(X)  # (n, h), (k, h), (n, k)
        p = softmax(logits, axis=1)
        head = p - p**2  # E delta_c^2, the variance of the label's indicator
        back = (p @ weights**2 - (p @ weights) ** 2) * (hidden > 0)  # E of the squared gradient at each hidden unit
        parts = [back.T @ X**2, back.sum(axis=0), head.T @ hidden**2, head.sum(axis=0)]
        self.pull += self.elastic * np.concatenate([part.ravel() for part in parts[0 if self.hidden else 2 :]]) / len(X)
        self.anchor[:] = self.theta

    def _forward(self, X: Array) -> tuple[Array, Array, Array]:
        """Hidden units (the inputs without a hidden layer), weights of the read-out, logits."""
        d, h, k = self.n_inputs, self.hidden, self.n_classes
        x = np.asarray(X, np.float64)
        if h:
            x = np.maximum(x @ self.theta[: h * d].reshape(h, d).T + self.theta[h * d : h * (d + 1)], 0)
        head = self.theta[h * (d + 1) :] if h else self.theta
        weights = head[:-k].reshape(k, h or d)
        return x, weights, x @ weights.T + head[-k:]

    def decision_function(self, X: Array) -> Array:
        """Logits."""
        return self._forward(X)[2]


@njit(cache=True, nogil=True)
def _pass(  # type: ignore[no-untyped-def]  # pragma: no cover
    theta, moments, anchor, pull, X, y, keep, out, d, h, k, lr, adam, steps
):
    width = h if h else d
    head = h * (d + 1) if h else 0
    gradient = np.zeros_like(theta)
    hidden = np.empty(width)
    for n in range(len(X)):
        x = X[n]
        if h:
            kept = keep[n % len(keep)]
            hidden[:] = np.maximum(theta[: h * d].reshape(h, d) @ x + theta[h * d : h * (d + 1)], 0.0) * kept
        else:
            hidden[:] = x
        weights = theta[head : head + k * width].reshape(k, width)
        logits = weights @ hidden + theta[head + k * width :]
        out[n] = logits
        delta = np.exp(logits - logits.max())
        delta /= delta.sum()
        delta[y[n]] -= 1.0
        for c in range(k):
            gradient[head + c * width : head + (c + 1) * width] = delta[c] * hidden
        gradient[head + k * width :] = delta
        if h:
            back = weights.T @ delta
            for j in range(h):
                slope = back[j] * kept[j] if hidden[j] > 0 else 0.0
                gradient[j * d : (j + 1) * d] = slope * x
                gradient[h * d + j] = slope
        if adam:
            t = steps + n + 1
            rate, scale = lr / (1 - 0.9**t), 1 / np.sqrt(1 - 0.999**t)
            for i in range(theta.size):
                g = gradient[i]
                m = 0.9 * moments[0, i] + 0.1 * g
                v = 0.999 * moments[1, i] + 0.001 * g * g
                moments[0, i] = m
                moments[1, i] = v
                theta[i] -= rate * m / (np.sqrt(v) * scale + 1e-8)
        else:
            for i in range(theta.size):  # implicit in the pull: exact for its quadratic
                theta[i] = (theta[i] - lr * gradient[i] + lr * pull[i] * anchor[i]) / (1 + lr * pull[i])


class LinearBandit:
    """Ridge regression of the reward per action, updated by the Sherman-Morrison formula, and one of two rules.

    Disjoint LinUCB (Li et al. 2010) plays argmax_a theta_a.z + alpha sqrt(z' A_a^-1 z); with ``epsilon``, the best
    action is played but for a random one with that probability.
    """

    def __init__(
        self, n_actions: int, n_features: int, *, alpha: float = 0.0, epsilon: float = 0.0, seed: int = 0
    ) -> None:
        self.alpha, self.epsilon = alpha, epsilon
        self.inverse = np.repeat(np.eye(n_features)[None], n_actions, axis=0)  # A_a^-1, from a penalty of 1
        self.moment = np.zeros((n_actions, n_features))  # sum of reward times z
        self.theta = np.zeros((n_actions, n_features))  # A_a^-1 times that
        self.rng = np.random.default_rng(seed)

    def update(self, z: Array, action: int, reward: float) -> None:
        """Learn the reward of the action that was played."""
        inverse = self.inverse[action]
        direction = inverse @ z
        inverse -= np.outer(direction, direction) / (1 + z @ direction)
        self.moment[action] += reward * z
        self.theta[action] = inverse @ self.moment[action]

    def select(self, z: Array) -> int:
        """The action to play; ties are broken at random."""
        if self.epsilon and self.rng.random() < self.epsilon:
            return int(self.rng.integers(len(self.theta)))
        score = self.theta @ z
        if self.alpha:
            score += self.alpha * np.sqrt(np.einsum("i,aij,j->a", z, self.inverse, z, optimize=False))
        return int(self.rng.choice(np.flatnonzero(score >= score.max() - 1e-12)))


def grid(arm: str) -> Sequence[dict[str, Any]]:
    """The eight settings over which each online learner is tuned: as many for the method as for the baselines."""
    if arm == "gln":
        return [{"context_dim": m, "learning_rate": lr} for m in (4, 8) for lr in (0.003, 0.01, 0.03, 0.1)]
    rates = {"sgd": (0.003, 0.01, 0.03, 0.1), "adam": (3e-4, 1e-3, 3e-3, 1e-2)}
    own: dict[str, list[dict[str, Any]]] = {  # besides the rates of SGD
        "dropout": [{"dropout": rate} for rate in (0.2, 0.5)],
        "replay": [{"replay": 500, "again": count} for count in (1, 4)],
    }
    if arm in own:
        return [{"hidden": 128, "lr": lr, **more} for more in own[arm] for lr in rates["sgd"]]
    if arm == "ewc":
        return [{"hidden": 128, "lr": lr, "elastic": s} for lr in (0.01, 0.03) for s in (1.0, 10.0, 100.0, 1000.0)]
    hidden = 0 if arm == "linear" else 128
    return [{"hidden": hidden, "optimizer": name, "lr": lr} for name, lrs in rates.items() for lr in lrs]
