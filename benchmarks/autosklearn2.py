"""Portfolios, ensembles and real fits: time, how much of a budget goes into fits, and FLAML at the same budget.

``mlcollage bench autosklearn2`` prints the table. Portfolio and ensemble are timed in CPU seconds of one thread. Real
fits have a budget of wall-clock time and one processor: on a machine that does other things too, both systems get less
done.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split

from mlcollage.papers.autosklearn2 import (
    AutoClassifier,
    EnsembleSelection,
    PerformanceTensor,
    PortfolioBuilder,
    simulate,
)

Row = dict[str, Any]


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio; ratios are over the plain loop, or over FLAML."""
    few = dict(list(TABLES.items())[:2])
    return [*_portfolio(), *_ensemble(), *(fits(few, 20.0, range(1)) if quick else fits(TABLES, 60.0, range(5)))]


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _portfolio() -> list[Row]:
    rng = np.random.default_rng(0)
    loss = rng.random((1000, 1000, 1))
    names = [str(i) for i in range(1000)]
    tensor = PerformanceTensor(loss, loss, np.ones_like(loss), names, [{"k": i} for i in range(1000)], [100])
    start = time.process_time()
    builder = PortfolioBuilder(32).fit(tensor)
    rows = [_row("autosklearn2", "portfolio of 32 from 1,000 x 1,000", time.process_time() - start, "s")]
    orders = np.array([rng.permutation(1000)[:32] for _ in range(20)])
    simulate(tensor, orders[:1])  # compile
    start = time.process_time()
    simulate(tensor, orders)
    rows.append(
        _row("autosklearn2", "replayed runs a second", orders.shape[0] * 1000 / (time.process_time() - start), "1/s")
    )
    assert len(builder.portfolio_) == 32
    return rows


def _plain(p: Any, y: Any, size: int) -> list[int]:
    """Ensemble selection as it is usually written."""
    total, picks = np.zeros(p.shape[1:]), []
    for step in range(size):
        losses = [1 - balanced_accuracy_score(y, ((total + q) / (step + 1)).argmax(1)) for q in p]
        picks.append(int(np.argmin(losses)))
        total += p[picks[-1]]
    return picks


def _ensemble() -> list[Row]:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 1000)
    p = rng.dirichlet(np.ones(3), size=(50, 1000)) + 0.3 * np.eye(3)[y]
    start = time.process_time()
    fast = EnsembleSelection(50).fit(p, y)
    ours = time.process_time() - start
    start = time.process_time()
    plain = _plain(p, y, 10)
    theirs = (time.process_time() - start) * 5
    assert fast.indices_[:3].tolist() == plain[:3]
    return [
        _row("autosklearn2", "ensemble of 50 from 50 models, 1,000 rows", ours, "s", theirs / ours),
        _row("plain loop", "the same (10 steps, times 5)", theirs, "s"),
    ]


def _hidden_ratio(seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    X = rng.lognormal(size=(1500, 8))
    return X, (X[:, 0] / X[:, 1] > X[:, 2] / X[:, 3]).astype(int)


TABLES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "wine": lambda s: load_wine(return_X_y=True),
    "hidden ratio": _hidden_ratio,
    "breast_cancer": lambda s: load_breast_cancer(return_X_y=True),
    "digits": lambda s: load_digits(return_X_y=True),
}


def fit_once(table: str, budget: float, seed: int) -> dict[str, float]:
    """Balanced error on the test rows of both systems, percent of the budget in fits, and percent over the budget."""
    X, y = TABLES[table](seed)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, random_state=seed, stratify=y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoClassifier(budget, random_state=seed).fit(X, y)
    found = {
        "ours": 1 - balanced_accuracy_score(y_test, model.predict(X_test)),
        "useful": 100 * model.useful_share_,
        "over": 100 * max(0.0, model.fit_seconds_ / budget - 1),
    }
    if has_flaml():
        found["FLAML"] = _flaml(X, y, X_test, y_test, budget, seed)
    return found


def fits(tables: Iterable[str], budget: float, seeds: Iterable[int]) -> list[Row]:
    """Rows of real fits, means over seeds."""
    rows = []
    for name in tables:
        runs = [fit_once(name, budget, seed) for seed in seeds]
        what = f"{name}, {budget:g} s"
        ours = float(np.mean([r["ours"] for r in runs]))
        peer = float(np.mean([r["FLAML"] for r in runs])) if "FLAML" in runs[0] else None
        rows.append(_row("autosklearn2", f"balanced error on {what}", ours, "", ours / peer if peer else None))
        if peer is not None:
            rows.append(_row("FLAML", f"balanced error on {what}", peer, ""))
        rows.append(_row("autosklearn2", f"share of {what} in fits", float(np.mean([r["useful"] for r in runs])), "%"))
        rows.append(_row("autosklearn2", f"over the budget of {what}", float(np.max([r["over"] for r in runs])), "%"))
    return rows


def has_flaml() -> bool:
    """Whether FLAML and what its AutoML needs are installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return hasattr(importlib.import_module("flaml"), "AutoML")
        except ImportError:
            return False


def _flaml(X: Any, y: Any, X_test: Any, y_test: Any, budget: float, seed: int) -> float:
    from flaml import AutoML

    model = AutoML()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # macro_f1 is FLAML's own metric that is nearest to balanced accuracy; it takes all its learners.
        settings = {"metric": "macro_f1", "time_budget": budget, "n_jobs": 1, "seed": seed, "verbose": 0}
        model.fit(X, y, task="classification", **settings)
    return 1 - balanced_accuracy_score(y_test, model.predict(X_test))
