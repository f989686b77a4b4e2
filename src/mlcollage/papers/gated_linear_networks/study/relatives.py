"""Experiments on the method's relatives: a single neuron's regret, the density, the Gaussian network, the bandit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from mlcollage.lab import Measurements, Task

from ..bandit import GLNBandit
from ..network import GatedNetwork
from ..sklearn import GLNDensity, GLNRegressor
from .data import Split, classification_data
from .models import LinearBandit, best

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Regret:
    """One neuron on a long stream of digits, odd against even."""

    train: int = 1257  # digits that the stream draws from
    horizon: int = 8000  # steps


def regret(task: Task[Regret]) -> Measurements:
    """A single gated neuron against the best fixed weights per context, found in hindsight by convex optimization."""
    horizon = task.settings.horizon
    split = classification_data(task.seed, task.settings.train).standardized()
    rng = np.random.default_rng([task.seed, 4])
    draw = rng.integers(len(split.X), size=horizon)
    side = split.X[draw]
    target = (split.y[draw] % 2).astype(float)  # odd against even
    network = GatedNetwork((1,), side.shape[1], side.shape[1], context_dim=2, dtype="float64", seed=task.seed)
    network.add_heads(1)
    limit = network.limit
    base = np.column_stack([np.full(horizon, network.bias), np.clip(side, -limit, limit)])
    predicted = network.learn(base, side, target[:, None], rate=lambda t: 0.1 / np.sqrt(t))[:, 0]
    online = np.cumsum(_log_loss(predicted, target))
    context = network.context_indices(side)[:, 0, 0]
    m = Measurements()
    times = np.unique(np.geomspace(horizon / 16, horizon, 9).astype(int))
    gaps = []
    for t in times:
        best = sum(_best_fixed_loss(base[:t][context[:t] == c], target[:t][context[:t] == c]) for c in range(4))
        gaps.append(online[t - 1] - best)
        m.add("regret", gaps[-1], step=int(t))
    positive = np.maximum(gaps, 1e-9)
    m.add("regret_slope", float(np.polyfit(np.log(times), np.log(positive), 1)[0]))
    return m


def _log_loss(a: Array, x: Array) -> Array:
    return np.logaddexp(0, a) - x * a


def _best_fixed_loss(inputs: Array, target: Array, box: float = 200.0) -> float:
    """Smallest total log-loss of fixed weights inside the box."""
    from scipy.optimize import minimize

    if not len(inputs):
        return 0.0

    def objective(w: Array) -> tuple[float, Array]:
        a = inputs @ w
        return float(_log_loss(a, target).sum()), inputs.T @ (expit(a) - target)

    start = np.zeros(inputs.shape[1])
    return float(minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(-box, box)] * len(start)).fun)


@dataclass(frozen=True)
class Density:
    """One pass over binarized digits."""

    train: int = 1257  # digits learned from, each once
    test: int = 540  # digits whose code length is measured
    hidden: tuple[int, ...] = (16, 8)  # neurons per layer of the GLN, for each pixel


def density(task: Task[Density]) -> Measurements:
    """Nats per image of binarized digits, predicted pixel after pixel in one pass."""
    X, _, X_test, *_ = classification_data(task.seed, task.settings.train, task.settings.test)
    middle = X.max() / 2
    bits, test = (middle < X).astype(int), (X_test > middle).astype(int)
    m = Measurements()
    if task.arm == "independent":
        p = (bits.sum(axis=0) + 1) / (len(bits) + 2)
        m.add("nats", float(-(test * np.log(p) + (1 - test) * np.log1p(-p)).sum(axis=1).mean()))
        return m
    hidden: tuple[int, ...] = () if task.arm == "autoregression" else task.settings.hidden
    context_dim = 0 if task.arm == "autoregression" else 4
    rates = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
    cut = int(0.8 * len(bits))

    def fit(rate: float, data: Array) -> GLNDensity:
        model = GLNDensity(hidden, context_dim=context_dim, learning_rate=rate, random_state=task.seed)
        return model.fit(data)

    rate = best(rates, lambda rate: float(fit(rate, bits[:cut]).score_samples(bits[cut:]).mean()))
    m.add("nats", float(-fit(rate, bits).score_samples(test).mean()))
    return m


@dataclass(frozen=True)
class Regression:
    """Diabetes, friedman1 and a noisy sine; 30 % of each is tested on."""

    samples: int = 1000  # of friedman1 and of the sine
    hidden: tuple[int, ...] = (16, 8)  # neurons per layer of the Gaussian network


def regression(task: Task[Regression]) -> Measurements:
    """Root mean squared error of standardized targets on three data sets.

    Each method is tuned over as many settings on the last 20 % of the training data, then fitted to all of it.
    """
    m, errors = Measurements(), []
    for name, split in _regression_sets(task).items():
        X, _, X_test, *_ = split.standardized()
        y, y_test = ((part - split.y.mean()) / split.y.std() for part in (split.y, split.y_test))
        cut = int(0.8 * len(X))

        def minus_error(
            setting: dict[str, Any], X: Array = X, y: Array = y, cut: int = cut
        ) -> float:  # as arguments: a closure would see the next data set
            model = _regressor(task, setting).fit(X[:cut], y[:cut])
            return -float(np.mean((model.predict(X[cut:]) - y[cut:]) ** 2))

        settings = _REGRESSION_GRIDS[task.arm]
        model = _regressor(task, best(settings, minus_error) if len(settings) > 1 else settings[0]).fit(X, y)
        errors.append(float(np.sqrt(np.mean((model.predict(X_test) - y_test) ** 2))))
        m.add("rmse", errors[-1], data=name)
    m.add("mean_log_rmse", float(np.mean(np.log(errors))))
    return m


_REGRESSION_GRIDS: dict[str, list[dict[str, Any]]] = {
    "gaussian_gln": [{"context_dim": k, "learning_rate": lr} for k in (1, 2, 4, 6) for lr in (0.01, 0.03, 0.1)],
    "bayesian_ridge": [{}],  # chooses its penalty itself
    "boosting": [{"learning_rate": lr, "max_leaf_nodes": k} for lr in (0.03, 0.1, 0.3) for k in (4, 8, 16, 31)],
    "knn": [{"n_neighbors": k, "weights": w} for k in (3, 5, 8, 12, 20, 40) for w in ("uniform", "distance")],
}


def _regressor(task: Task[Regression], setting: dict[str, Any]) -> Any:
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.linear_model import BayesianRidge
    from sklearn.neighbors import KNeighborsRegressor

    if task.arm == "gaussian_gln":
        return GLNRegressor(hidden_layer_sizes=task.settings.hidden, random_state=task.seed, **setting)
    if task.arm == "boosting":
        return HistGradientBoostingRegressor(max_iter=100, early_stopping=False, random_state=task.seed, **setting)
    return {"bayesian_ridge": BayesianRidge, "knn": KNeighborsRegressor}[task.arm](**setting)


def _regression_sets(task: Task[Regression]) -> dict[str, Split]:
    from sklearn.datasets import load_diabetes, make_friedman1
    from sklearn.model_selection import train_test_split

    rng = np.random.default_rng([task.seed, 5])
    n = task.settings.samples
    x = rng.uniform(-3, 3, (n, 1))
    sets = {
        "diabetes": load_diabetes(return_X_y=True),
        "friedman1": make_friedman1(n, noise=1.0, random_state=task.seed),
        "sine": (x, np.sin(2 * x[:, 0]) + rng.normal(0, 0.2, n)),
    }
    splits = {name: train_test_split(*data, test_size=0.3, random_state=task.seed) for name, data in sets.items()}
    return {name: Split(X, y, X_test, y_test) for name, (X, X_test, y, y_test) in splits.items()}


@dataclass(frozen=True)
class Bandit:
    """Digits as a contextual bandit."""

    train: int = 1257  # digits that contexts are drawn from
    tuning: int = 500  # steps that each exploration constant is tried for
    horizon: int = 1500  # steps that are judged


def bandit(task: Task[Bandit]) -> Measurements:
    """Digits as a contextual bandit: the reward is 1 for the right class, and only the played action's is seen."""
    s = task.settings
    split = classification_data(task.seed, s.train).standardized()
    n_actions, horizon, y = split.classes, s.horizon, split.y
    X = np.column_stack([split.X, np.ones(len(y))])
    rng = np.random.default_rng([task.seed, 6])
    rehearsal, play = rng.integers(len(X), size=s.tuning), rng.integers(len(X), size=horizon)

    def curve_of(constant: float, draw: Array) -> Array:
        return _play(_policy(task, constant, n_actions, X.shape[1]), X[draw], y[draw])

    constant = best(_BANDIT_CONSTANTS[task.arm], lambda constant: -curve_of(constant, rehearsal)[-1])
    curve = curve_of(constant, play)
    m = Measurements()
    m.add("chosen_exploration", constant)
    m.add("bandit_regret", float(curve[-1]), step=horizon)
    for t in np.linspace(0, horizon, 21).astype(int)[1:-1]:
        m.add("bandit_regret", float(curve[t - 1]), step=int(t))
    return m


_BANDIT_CONSTANTS = {
    "glcb": (0.0, 0.03, 0.1, 0.3),
    "linucb": (0.0, 0.1, 0.3, 1.0),
    "epsilon_greedy": (0.0, 0.02, 0.05, 0.1),
}


def _policy(task: Task[Bandit], constant: float, n_actions: int, n_features: int) -> Any:
    if task.arm == "glcb":
        return GLNBandit(n_actions, n_features, exploration=constant, context_dim=4, random_state=task.seed)
    rule = {"linucb": "alpha", "epsilon_greedy": "epsilon"}[task.arm]
    return LinearBandit(n_actions, n_features, seed=task.seed, **{rule: constant})


def _play(policy: Any, X: Array, y: Array) -> Array:
    """Cumulative number of wrong actions, ``(steps,)``."""
    wrong = np.empty(len(X))
    for t, (z, label) in enumerate(zip(X, y, strict=True)):
        action = int(policy.select(z))
        policy.update(z, action, float(action == label))
        wrong[t] = action != label
    return np.cumsum(wrong)
