"""What is run and what is claimed of Gated Linear Networks.

Claims after Veness et al. (AAAI 2021), the Gaussian network (Budden et al. 2020) and the bandit (Sezener et al.
2020). Claims, margins and grids were written before the runs with the study's seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Measurements, Scale, Study, Task

from . import experiments, relatives
from .claims import CLAIMS, FORGET_ARMS
from .experiments import Capacity, Forget, Stream, Surface, Tables
from .relatives import Bandit, Density, Regression, Regret

S = TypeVar("S", bound=Any)


def _experiment(
    measure: Callable[[Task[S]], Measurements],
    arms: tuple[str, ...],
    *,
    smoke: S,
    quick: S,
    full: S | None = None,
    **options: Any,
) -> Experiment[S]:
    """An experiment called as its function; at full and paper as at quick where nothing else is said."""
    large = quick if full is None else full
    settings = {Scale.SMOKE: smoke, Scale.QUICK: quick, Scale.FULL: large, Scale.PAPER: large}
    return Experiment(measure.__name__, measure, arms=arms, settings=settings, **options)


def _on_workload(settings: S, workload: Labeled, scale: Scale) -> S:
    """The same settings on a user's data."""
    return dataclasses.replace(settings, data="workload")


_ANY_CLASSES: dict[str, Any] = {"workloads": (Labeled,), "adapt": _on_workload}

STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 10, Scale.FULL: 10, Scale.PAPER: 10},
    experiments=(
        _experiment(
            experiments.forget,
            (*reversed(FORGET_ARMS), "replay", "ewc", "dropout", "mlp"),
            smoke=Forget(train=100, test=50, hidden=(4, 2), tasks=2),
            quick=Forget(),
            full=Forget(data="fashion_mnist", train=20_000, test=2000, tasks=8),
            version=3,
            **_ANY_CLASSES,
        ),
        _experiment(
            experiments.stream,
            ("gln", "mlp", "linear"),
            smoke=Stream(train=150, test=60, hidden=(4, 2)),
            quick=Stream(),
            full=Stream(data="fashion_mnist", train=60_000, test=10_000, hidden=(100, 100)),
            version=2,
            **_ANY_CLASSES,
        ),
        _experiment(
            experiments.tables,
            ("boosting", "gln", "svm", "batch_mlp"),
            smoke=Tables(hidden=(4, 2), limit=90),
            quick=Tables(),
            version=2,
        ),
        _experiment(
            experiments.capacity,
            ("gln", "mlp"),
            smoke=Capacity(samples=30, inputs=8, classes=3, passes=2, sizes=(1, 2, 4)),
            quick=Capacity(),
            version=2,
        ),
        _experiment(relatives.regret, ("neuron",), smoke=Regret(train=200, horizon=200), quick=Regret(), version=2),
        _experiment(
            relatives.density,
            ("gln_density", "autoregression", "independent"),
            smoke=Density(train=60, test=20),
            quick=Density(),
        ),
        _experiment(
            relatives.regression,
            ("boosting", "gaussian_gln", "knn", "bayesian_ridge"),
            smoke=Regression(samples=80, hidden=(4, 2)),
            quick=Regression(),
            version=2,
        ),
        _experiment(
            relatives.bandit,
            ("glcb", "linucb", "epsilon_greedy"),
            smoke=Bandit(train=200, tuning=20, horizon=60),
            quick=Bandit(),
            version=2,
        ),
        _experiment(experiments.surface, ("surface",), smoke=Surface(train=300), quick=Surface(), once=True, version=2),
    ),
)
