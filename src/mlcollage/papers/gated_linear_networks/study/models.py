"""The learners of the study: the method, networks trained by backpropagation one sample at a time, and bandit rules.

The baselines are compiled like the method itself, so that a grid of settings costs no more for them than for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from numba import njit

from mlcollage import _checks as checks

from ..sklearn import GLNClassifier

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


class Scaled:
    """An :class:`OnlineMLP` behind fixed standardization: the baselines may know mean and spread beforehand."""

    def __init__(self, X: Array, classes: int, seed: int, **parameters: Any) -> None:
        self.mean, self.scale = X.mean(axis=0), X.std(axis=0) + 1.0
        self.model = OnlineMLP(X.shape[1], classes, seed=seed, **parameters)

    def learn(self, X: Array, y: Array) -> Array:
        """Scores predicted before each sample was learned, ``(n, classes)``."""
        return self.model.learn((X - self.mean) / self.scale, y)

    def scores(self, X: Array) -> Array:
        """Scores of the classes."""
        return self.model.decision_function((X - self.mean) / self.scale)


def learner(arm: str, X: Array, classes: int, seed: int, setting: dict[str, Any], **gated: Any) -> Gated | Scaled:
    """A fresh learner with one setting of its grid; ``gated`` are the method's parameters besides."""
    if arm == "gln":
        return Gated(classes, seed, **{"std_offset": 1.0, **gated, **setting})
    return Scaled(X, classes, seed, **setting)


def best(settings: Sequence[T], score: Callable[[T], float]) -> T:
    """The setting with the highest score, the first of several."""
    return settings[int(np.argmax([score(setting) for setting in settings]))]


def right(scores: Array, y: Array) -> Array:
    """Whether the class with the highest score is the true one, ``(n,)``."""
    return scores.argmax(axis=1) == y


def held_out_accuracy(model: Gated | Scaled, X: Array, y: Array) -> float:
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
    seed
        Seeds the initial weights, N(0, 2 / fan-in).

    Examples
    --------
    >>> X = np.eye(3); y = np.array([0, 1, 2])
    >>> model = OnlineMLP(3, 3, hidden=0, lr=0.5)
    >>> for _ in range(50):
    ...     _ = model.learn(X, y)
    >>> model.predict(X).tolist()
    [0, 1, 2]
    """

    def __init__(
        self, n_inputs: int, n_classes: int, *, hidden: int = 0, lr: float = 0.1, optimizer: str = "sgd", seed: int = 0
    ) -> None:
        checks.choice("optimizer", optimizer, ("sgd", "adam"))
        rng = np.random.default_rng(seed)
        shapes = [(n_classes, n_inputs)] if hidden == 0 else [(hidden, n_inputs), (n_classes, hidden)]
        blocks = [np.append(rng.normal(0, np.sqrt(2 / i), o * i), np.zeros(o)) for o, i in shapes]
        self.theta = np.concatenate(blocks)  # W_1, b_1, W_2, b_2 one after the other (W, b without a hidden layer)
        self.moments = np.zeros((2, self.theta.size))
        self.n_inputs, self.hidden, self.n_classes = n_inputs, hidden, n_classes
        self.lr, self.adam, self.steps = lr, optimizer == "adam", 0

    def learn(self, X: Array, y: Array) -> Array:
        """Learn from the samples in order; returns the logits that were predicted before each was learned."""
        X = np.ascontiguousarray(X, np.float64)
        out = np.empty((len(X), self.n_classes))
        sizes = (self.n_inputs, self.hidden, self.n_classes)
        _pass(self.theta, self.moments, X, y.astype(np.int64), out, *sizes, self.lr, self.adam, self.steps)
        self.steps += len(X)
        return out

    def decision_function(self, X: Array) -> Array:
        """Logits."""
        d, h, k = self.n_inputs, self.hidden, self.n_classes
        x = np.asarray(X, np.float64)
        if h:
            x = np.maximum(x @ self.theta[: h * d].reshape(h, d).T + self.theta[h * d : h * (d + 1)], 0)
        head = self.theta[h * (d + 1) :] if h else self.theta
        width = h or d
        return x @ head[: k * width].reshape(k, width).T + head[k * width :]

    def predict(self, X: Array) -> Array:
        """Most probable class."""
        return np.argmax(self.decision_function(X), axis=1)


@njit(cache=True, nogil=True)
def _pass(theta, moments, X, y, out, d, h, k, lr, adam, steps):  # type: ignore[no-untyped-def]  # pragma: no cover
    width = h if h else d
    head = h * (d + 1) if h else 0
    gradient = np.zeros_like(theta)
    hidden = np.empty(width)
    for n in range(len(X)):
        x = X[n]
        if h:
            hidden[:] = np.maximum(theta[: h * d].reshape(h, d) @ x + theta[h * d : h * (d + 1)], 0.0)
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
                slope = back[j] if hidden[j] > 0 else 0.0
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
            theta -= lr * gradient


class _LinearBandit:
    """Ridge regression of the reward per action, updated by the Sherman-Morrison formula."""

    def __init__(self, n_actions: int, n_features: int, *, ridge: float = 1.0, seed: int = 0) -> None:
        self.inverse = np.repeat(np.eye(n_features)[None] / ridge, n_actions, axis=0)  # A_a^-1
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

    def _best(self, score: Array) -> int:
        ties = np.flatnonzero(score >= score.max() - 1e-12)
        return int(self.rng.choice(ties))


class LinUCB(_LinearBandit):
    """Disjoint LinUCB (Li et al. 2010): play argmax_a theta_a.z + alpha sqrt(z' A_a^-1 z)."""

    def __init__(self, n_actions: int, n_features: int, *, alpha: float = 1.0, seed: int = 0) -> None:
        super().__init__(n_actions, n_features, seed=seed)
        self.alpha = alpha

    def select(self, z: Array) -> int:
        """The action to play."""
        width = np.sqrt(np.einsum("i,aij,j->a", z, self.inverse, z, optimize=False))
        return self._best(self.theta @ z + self.alpha * width)


class EpsilonGreedy(_LinearBandit):
    """Play the best action, a random one with probability epsilon."""

    def __init__(self, n_actions: int, n_features: int, *, epsilon: float = 0.1, seed: int = 0) -> None:
        super().__init__(n_actions, n_features, seed=seed)
        self.epsilon = epsilon

    def select(self, z: Array) -> int:
        """The action to play."""
        if self.rng.random() < self.epsilon:
            return int(self.rng.integers(len(self.theta)))
        return self._best(self.theta @ z)


def grid(arm: str) -> Sequence[dict[str, Any]]:
    """The eight settings over which each online learner is tuned: as many for the method as for the baselines."""
    if arm == "gln":
        return [{"context_dim": m, "learning_rate": lr} for m in (4, 8) for lr in (0.003, 0.01, 0.03, 0.1)]
    rates = {"sgd": (0.003, 0.01, 0.03, 0.1), "adam": (3e-4, 1e-3, 3e-3, 1e-2)}
    hidden = 0 if arm == "linear" else 128
    return [{"hidden": hidden, "optimizer": name, "lr": lr} for name, lrs in rates.items() for lr in lrs]
