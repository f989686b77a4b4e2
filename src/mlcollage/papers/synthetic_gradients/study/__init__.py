"""What is run and what is claimed of synthetic gradients (Czarnecki et al. and Jaderberg et al., ICML 2017).

Claims, margins and settings were written before the runs with the study's seeds. Every rule of credit assignment is
tuned over the same learning rates on validation samples. On a user's workload the rules are compared on their data and,
where it can be cut, on their network.
"""

from __future__ import annotations

from typing import Any

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Scale, Study

from .claims import CLAIMS
from .experiments import (
    Depth,
    Linear,
    Processes,
    Remember,
    Rules,
    Times,
    depth,
    linear,
    on_workload,
    processes,
    remember,
    rules,
    times,
)

_SMALL: dict[str, Any] = {"train": 200, "test": 200, "batch": 32}

STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 5, Scale.FULL: 10, Scale.PAPER: 10},
    experiments=(
        Experiment(
            "rules",
            rules,
            arms=("rules",),
            settings={
                Scale.SMOKE: Rules(**_SMALL, val=60, widths=(16, 16), steps=12),
                Scale.QUICK: Rules(),
                Scale.FULL: Rules(train=50_000, val=5000, test=10_000, steps=4000, lrs=(3e-4, 1e-3, 3e-3)),
                Scale.PAPER: Rules(
                    train=50_000,
                    val=10_000,
                    test=10_000,
                    widths=(256,) * 4,
                    batch=256,
                    steps=500_000,
                    lrs=(1e-5, 3e-5, 1e-4),
                ),
            },
            workloads=(Labeled,),
            adapt=on_workload,
        ),
        Experiment(
            "depth",
            depth,
            arms=("depth",),
            settings={
                Scale.SMOKE: Depth(**_SMALL, width=16, steps=10, points=40),
                Scale.QUICK: Depth(),
                Scale.FULL: Depth(train=50_000, test=10_000, steps=4000, points=300),
                Scale.PAPER: Depth(train=60_000, test=10_000, width=256, batch=256, steps=100_000, points=300),
            },
        ),
        Experiment(
            "linear",
            linear,
            arms=("linear",),
            settings={
                Scale.SMOKE: Linear(steps=60, deep_steps=20),
                Scale.QUICK: Linear(),
                Scale.FULL: Linear(steps=6000, deep_steps=6000),
                Scale.PAPER: Linear(steps=20_000, deep_steps=20_000),
            },
        ),
        Experiment(
            "remember",
            remember,
            arms=("remember",),
            settings={
                Scale.SMOKE: Remember(rows=8, updates=8),
                Scale.QUICK: Remember(),
                Scale.FULL: Remember(updates=1000),
                Scale.PAPER: Remember(updates=4000),
            },
        ),
        Experiment(
            "times",
            times,
            arms=("times",),
            settings={
                Scale.SMOKE: Times(**_SMALL, widths=(16, 16), updates=6),
                Scale.QUICK: Times(),
                Scale.FULL: Times(train=50_000, test=10_000, widths=(128,) * 4, updates=2000),
                Scale.PAPER: Times(train=60_000, test=10_000, widths=(256,) * 4, updates=100_000),
            },
        ),
        Experiment(
            "processes",
            processes,
            arms=("processes",),
            settings={
                Scale.SMOKE: Processes(batches=6),
                Scale.QUICK: Processes(),
                Scale.FULL: Processes(batches=200),
                Scale.PAPER: Processes(batches=1000),
            },
            seeds={Scale.SMOKE: 1, Scale.QUICK: 3},
        ),
    ),
)
