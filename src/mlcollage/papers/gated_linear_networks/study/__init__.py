"""What is run and what is claimed of Gated Linear Networks.

Eleven claims after Veness et al. (AAAI 2021), the Gaussian network (Budden et al. 2020) and the bandit (Sezener et al.
2020). Claims, margins and grids were written before the runs with the study's seeds.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from mlcollage.data.workload import Labeled
from mlcollage.lab.experiment import Experiment
from mlcollage.lab.run import Scale
from mlcollage.lab.study import Study

from .claims import CLAIMS, FORGET_ARMS
from .experiments import (
    Capacity,
    Forget,
    Stream,
    Surface,
    Tables,
    capacity,
    forget,
    stream,
    surface,
    tables,
)
from .relatives import Bandit, Density, Regression, Regret, bandit, density, regression, regret

__all__ = ["STUDY"]

S = TypeVar("S")


def _scales(smoke: S, quick: S, full: S | None = None) -> dict[Scale, S]:
    """Settings by scale; full and paper are as quick where nothing else is said."""
    large = quick if full is None else full
    return {Scale.SMOKE: smoke, Scale.QUICK: quick, Scale.FULL: large, Scale.PAPER: large}


def _on_workload(settings: S, workload: Labeled, scale: Scale) -> S:
    """The same settings on a user's data."""
    return dataclasses.replace(settings, data="workload")  # type: ignore[type-var]


STUDY = Study(
    claims=CLAIMS,
    seeds=_scales(2, 10),
    experiments=(
        Experiment(
            "forget",
            forget,
            arms=(*reversed(FORGET_ARMS), "mlp"),
            settings=_scales(
                Forget(train=100, test=50, hidden=(4, 2), tasks=2),
                Forget(),
                Forget(data="fashion_mnist", train=20_000, test=2000, tasks=8),
            ),
            workloads=(Labeled,),
            adapt=_on_workload,
        ),
        Experiment(
            "stream",
            stream,
            arms=("gln", "mlp", "linear"),
            settings=_scales(
                Stream(train=150, test=60, hidden=(4, 2)),
                Stream(),
                Stream(data="fashion_mnist", train=60_000, test=10_000, hidden=(100, 100)),
            ),
            workloads=(Labeled,),
            adapt=_on_workload,
        ),
        Experiment(
            "tables",
            tables,
            arms=("boosting", "gln", "svm", "batch_mlp"),
            settings=_scales(Tables(hidden=(4, 2), limit=90), Tables()),
        ),
        Experiment(
            "capacity",
            capacity,
            arms=("gln", "mlp"),
            settings=_scales(Capacity(samples=30, inputs=8, classes=3, passes=2, sizes=(1, 2, 4)), Capacity()),
        ),
        Experiment("regret", regret, arms=("neuron",), settings=_scales(Regret(train=200, horizon=200), Regret())),
        Experiment(
            "density",
            density,
            arms=("gln_density", "autoregression", "independent"),
            settings=_scales(Density(train=60, test=20), Density()),
        ),
        Experiment(
            "regression",
            regression,
            arms=("gaussian_gln", "bayesian_ridge"),
            settings=_scales(Regression(samples=80, hidden=(4, 2)), Regression()),
        ),
        Experiment(
            "bandit",
            bandit,
            arms=("glcb", "linucb", "epsilon_greedy"),
            settings=_scales(Bandit(train=200, tuning=20, horizon=60), Bandit()),
        ),
        Experiment("surface", surface, arms=("surface",), settings=_scales(Surface(train=300), Surface()), once=True),
    ),
)
