"""What is measured: portfolios and policies on tasks that were held out, and real fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score

from mlcollage.data.workload import Labeled, arrays
from mlcollage.errors import InvalidInput
from mlcollage.lab import Measurements, Task
from mlcollage.papers.autosklearn2.official import OfficialSelectorData
from mlcollage.papers.autosklearn2.policy import Policy
from mlcollage.papers.autosklearn2.portfolio import PortfolioBuilder
from mlcollage.papers.autosklearn2.replay import simulate
from mlcollage.papers.autosklearn2.selector import PolicySelector
from mlcollage.papers.autosklearn2.shipped import official_selector_data, shipped_tensor
from mlcollage.papers.autosklearn2.sklearn import AutoClassifier
from mlcollage.papers.autosklearn2.space import pipeline_space
from mlcollage.papers.autosklearn2.surrogate import ForestImprovement
from mlcollage.papers.autosklearn2.tasks import FAMILIES, make_task
from mlcollage.papers.autosklearn2.tensor import PerformanceTensor

RUNS = (1, 2, 4, 8, 16)
"""After how many evaluated pipelines losses are compared."""
MADE_FROM = 1000  # numbers of the tasks for real fits start here: none of them is in the tensor


@dataclass(frozen=True)
class Replays:
    """Replays on the tensor that comes with the package."""

    groups: int = 12  # groups of tasks, of which each seed holds out one
    orders: int = 200  # random orders that are averaged
    searches: int = 2  # searches from scratch that are averaged
    time_orders: int = 50  # random orders that are averaged where time counts
    time_limit: float = 0.5  # processor's seconds of all fits, where time counts
    cutoff: float = 0.05  # processor's seconds of one fit, where time counts


@dataclass(frozen=True)
class Policies:
    """The authors' losses of eight policies on 208 tasks."""

    folds: int = 20  # groups of tasks, of which each seed holds out one
    trees: int = 20  # of each of the selector's forests
    small: int = 5000  # rows below which a task is small
    large: int = 20_000  # rows from which on it is large


@dataclass(frozen=True)
class Fits:
    """Real fits of generated tasks that are not in the tensor, or of the user's table."""

    trials: int = 12  # pipelines
    most_rows: int = 300  # training rows of a generated task, at most
    share: float = 6.25  # percent of the iterations, the first rung of successive halving


def held_out(count: int, groups: int, seed: int) -> NDArray[np.int64]:
    """Numbers of the tasks of a seed's group; seeds beyond the number of groups get other groups."""
    turn, place = divmod(seed, groups)
    order = np.arange(count) if turn == 0 else np.random.default_rng(turn).permutation(count)
    return np.asarray(order[place::groups], np.int64)


def replays(task: Task[Replays]) -> Measurements:
    """Losses after 1, 2, 4, ... pipelines on held-out tasks."""
    m, tensor = Measurements(), shipped_tensor()
    for seed in task.seeds:
        out = held_out(len(tensor.tasks), task.settings.groups, seed)
        rest = np.setdiff1d(np.arange(len(tensor.tasks)), out)
        losses = np.mean([_losses(task, tensor, int(t), rest, seed) for t in out], axis=0)
        for runs, loss in zip(RUNS, losses, strict=True):
            m.add("loss", loss, seed=seed, evaluated=runs)
        if task.arm == "portfolio":
            built = PortfolioBuilder(8).fit(tensor.of_tasks(rest))
            m.add("bound_gap", built.trajectory_[-1] - built.bound_, seed=seed)
    if task.arm == "portfolio" and 0 in task.seeds:
        builder = PortfolioBuilder(16).fit(tensor)
        m.array("trajectory", builder.trajectory_)
        m.array("picks", np.array(builder.portfolio_))
        m.array("final", _final(tensor.normalize(), tensor.last))
    return m


def _final(losses: NDArray[np.float64], last: NDArray[np.int64]) -> NDArray[np.float64]:
    """Losses (tasks, candidates) at the end of each curve."""
    return np.take_along_axis(losses, last[:, :, None], 2)[:, :, 0]


def _losses(task: Task[Replays], tensor: PerformanceTensor, t: int, rest: NDArray[np.int64], seed: int) -> Any:
    """Losses on one task after the numbers of pipelines that are compared."""
    one, known, most = tensor.of_tasks([t]), tensor.of_tasks(rest), RUNS[-1]
    rng = np.random.default_rng([seed, t])
    if task.arm == "portfolio":
        orders = [PortfolioBuilder(most).fit(known).portfolio_]
    elif task.arm == "other_families":
        kept = [i for i in rest if tensor.tasks[i].split("-")[0] != tensor.tasks[t].split("-")[0]]
        orders = [PortfolioBuilder(most).fit(tensor.of_tasks(kept)).portfolio_]
    elif task.arm == "random":
        orders = [rng.permutation(tensor.shape[1])[:most].tolist() for _ in range(task.settings.orders)]
    elif task.arm == "nearest":
        orders = [_nearest(known, np.asarray(one.meta_features)[0], most)]
    else:
        orders = [_searched(one, most, rng) for _ in range(task.settings.searches)]
    full = [_filled(order, tensor.shape[1], most) for order in orders]
    return simulate(one, full, runs=most).after[:, 0, [k - 1 for k in RUNS]].mean(0)


def _filled(order: list[int], count: int, most: int) -> list[int]:
    """An order of full length: a portfolio that reached a loss of 0 early is followed by the other candidates."""
    return [*order, *(c for c in range(count) if c not in order)][:most]


def _nearest(known: PerformanceTensor, meta: NDArray[np.float64], most: int) -> list[int]:
    """Best pipelines of the tasks with the most similar numbers of rows and columns."""
    sizes = np.log(np.asarray(known.meta_features))
    distance = (np.abs(sizes - np.log(meta)) / (sizes.std(0) + 1e-12)).sum(1)
    best = _final(known.normalize(), known.last).argmin(1)
    return list(dict.fromkeys(int(best[i]) for i in np.argsort(distance, kind="stable")))[:most]


def _searched(one: PerformanceTensor, most: int, rng: np.random.Generator) -> list[int]:
    """Order of a search among the candidates: three at random, then expected improvement and random in turn."""
    space = pipeline_space()
    search = ForestImprovement(space)
    valid = _final(one.valid, one.last)[0]
    order: list[int] = rng.permutation(len(valid))[:3].tolist()
    while len(order) < most:
        rest = [c for c in range(len(valid)) if c not in order]
        if len(order) % 2:
            place = search.rank(
                [dict(one.configs[c]) for c in order], valid[order], [dict(one.configs[c]) for c in rest], rng
            )
        else:
            place = int(rng.integers(len(rest)))
        order.append(rest[place])
    return order


def timed(task: Task[Replays]) -> Measurements:
    """Losses on held-out tasks within a limit of time, with and without results of fits that were stopped."""
    m, tensor, s = Measurements(), shipped_tensor(), task.settings
    for seed in task.seeds:
        out = held_out(len(tensor.tasks), s.groups, seed)
        rest = np.setdiff1d(np.arange(len(tensor.tasks)), out)
        rng = np.random.default_rng(seed)
        limits: dict[str, Any] = {"time_limit": s.time_limit, "cutoff": s.cutoff}
        if task.arm == "portfolio_timed":
            orders = [PortfolioBuilder(32, **limits).fit(tensor.of_tasks(rest)).portfolio_]
        else:
            orders = [rng.permutation(tensor.shape[1])[:32].tolist() for _ in range(s.time_orders)]
        played = ends_only(tensor) if task.arm == "bare" else tensor
        m.add("timed_loss", simulate(played.of_tasks(out), orders, **limits).loss.mean(), seed=seed)
    return m


def ends_only(tensor: PerformanceTensor) -> PerformanceTensor:
    """The tensor without learning curves: a fit that is stopped leaves nothing."""
    at = tensor.last[:, :, None]
    low = np.nanmin(tensor.test, axis=(1, 2))
    high = np.nanmax(tensor.test, axis=(1, 2))
    ends = {name: np.take_along_axis(getattr(tensor, name), at, 2) for name in ("valid", "test", "runtime")}
    # Losses stay in the units of the whole tensor.
    ends["test"] = (ends["test"] - low[:, None, None]) / np.where(high > low, high - low, 1.0)[:, None, None]
    return _Normalized(**ends, tasks=tensor.tasks, configs=tensor.configs, budgets=[100.0])


class _Normalized(PerformanceTensor):
    """A tensor whose test losses are normalized already."""

    def normalize(self) -> NDArray[np.float64]:
        """As they are."""
        return self.test


def policies(task: Task[Policies]) -> Measurements:
    """Losses of policies on held-out tasks of the authors, in units of the range of the eight."""
    m, data, s = Measurements(), official_selector_data(), task.settings
    low, high = data.losses.min(1, keepdims=True), data.losses.max(1, keepdims=True)
    loss = (data.losses - low) / np.where(high > low, high - low, 1.0)
    by_rows = np.argsort(data.meta_features[:, 1], kind="stable")  # every group has small and large tasks
    for seed in task.seeds:
        out = by_rows[held_out(len(loss), s.folds, seed)]
        rest = np.setdiff1d(np.arange(len(loss)), out)
        selector = PolicySelector.of_official(_part(data, rest), n_estimators=s.trees, random_state=seed)
        picks = selector.predict(data.meta_features[out])
        best = int(loss[rest].mean(0).argmin())
        rows = data.meta_features[out, 1]
        found = {"selected": loss[out, picks], "single_best": loss[out, best], "oracle": loss[out].min(1)}
        for name, chosen in (("small", rows < s.small), ("large", rows >= s.large)):
            found[f"holdout_{name}"], found[f"ten_folds_{name}"] = loss[out[chosen], 0], loss[out[chosen], 3]
        for arm, values in found.items():
            if len(values):
                m.add("policy_loss", values.mean(), arm=arm, seed=seed)
    return m


def _part(data: OfficialSelectorData, index: NDArray[np.int64]) -> OfficialSelectorData:
    parts = {name: getattr(data, name)[index] for name in ("meta_features", "losses", "minima", "maxima")}
    return replace(data, **parts, tasks=tuple(data.tasks[i] for i in index))


def fits(task: Task[Fits]) -> Measurements:
    """Balanced error on test rows of the ensemble and of the best single pipeline, after equally many pipelines."""
    m, s = Measurements(), task.settings
    for seed in task.seeds:
        X, y, X_test, y_test = _table(task.workload, s, seed)
        portfolio = None if task.arm == "scratch" else "default"
        count = s.trials
        model = AutoClassifier(
            3600,
            max_trials=count,
            portfolio=portfolio,
            policy=Policy(allocation="sh", min_budget=s.share) if s.share < 100 else Policy(),
            isolation="none",
            random_state=seed,
        )
        if task.arm == "both":
            from mlcollage.papers.autosklearn2.shipped import default_portfolio

            half = default_portfolio(Policy(allocation="sh"))[: max(1, count // 2)]
            model.set_params(portfolio=list(half))
        model.fit(X, y)
        m.add("balanced_error", _error(y_test, model.predict(X_test)), seed=seed, model="ensemble")
        best = model.best_trial_
        if model.ensemble_ and best is not None:
            model.ensemble_ = [(1.0, best)]
        m.add("balanced_error", _error(y_test, model.predict(X_test)), seed=seed, model="single")
    return m


def _error(y: NDArray, predicted: NDArray) -> float:
    return 1.0 - float(balanced_accuracy_score(y, predicted))


def _table(workload: Labeled | None, s: Fits, seed: int) -> tuple[Any, Any, Any, Any]:
    """A generated task, or a random half of the user's training rows (2,000 at most) and their test rows."""
    if workload is None:
        t = make_task(f"{FAMILIES[seed % len(FAMILIES)]}-{MADE_FROM + seed // len(FAMILIES)}", most_rows=s.most_rows)
        X, X_test = (np.hstack([r.numbers, r.codes]) for r in (t.rows, t.test_rows))
        return X, t.y, X_test, t.y_test
    X, y = (np.asarray(a) for a in arrays(workload.train))
    X_test, y_test = (np.asarray(a) for a in arrays(workload.test))
    if X.ndim != 2:
        X, X_test = X.reshape(len(X), -1), X_test.reshape(len(X_test), -1)
    if len(X) < 20:
        raise InvalidInput(f"the fits need 20 training rows at least; {workload.name} has {len(X)}.")
    kept = np.random.default_rng(seed).permutation(len(X))[: min(2000, max(20, len(X) // 2))]
    return X[kept], y[kept], X_test[:2000], y_test[:2000]
