"""What is run and what is claimed of synthetic gradients (Czarnecki et al. and Jaderberg et al., ICML 2017).

Claims, margins and settings were written before the runs with the study's seeds. Every rule of credit assignment is
tuned over the same learning rates on validation samples. On a user's workload the rules are compared on their data and,
where it can be cut, on their network.
"""

from __future__ import annotations

from typing import Any

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Scale, Study

from . import experiments as runs
from .claims import CLAIMS

_SMALL: dict[str, Any] = {"train": 200, "test": 200, "batch": 32}
_WIDE: dict[str, Any] = {"train": 60_000, "test": 10_000}


def _experiment(run: Any, settings: Any, smoke: Any, full: Any, paper: Any, **options: Any) -> Experiment:
    """An experiment named as its function and its only arm; the settings of the scale quick are the defaults."""
    scales = {
        Scale.SMOKE: settings(**smoke), Scale.QUICK: settings(), Scale.FULL: settings(**full),
        Scale.PAPER: settings(**paper),
    }  # fmt: skip
    return Experiment(run.__name__, run, arms=(run.__name__,), settings=scales, **options)


STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 5, Scale.FULL: 10, Scale.PAPER: 10},
    experiments=(
        _experiment(
            runs.rules,
            runs.Rules,
            _SMALL | {"val": 60, "widths": (16, 16), "steps": 12},
            {"train": 50_000, "val": 5000, "test": 10_000, "steps": 4000, "lrs": (3e-4, 1e-3, 3e-3)},
            {
                "train": 50_000, "val": 10_000, "test": 10_000, "widths": (256,) * 4, "batch": 256, "steps": 500_000,
                "lrs": (1e-5, 3e-5, 1e-4),
            },
            workloads=(Labeled,),
            adapt=runs.on_workload,
        ),
        _experiment(
            runs.depth,
            runs.Depth,
            _SMALL | {"width": 16, "steps": 10, "points": 40},
            {"train": 50_000, "test": 10_000, "steps": 4000, "points": 300},
            _WIDE | {"width": 256, "batch": 256, "steps": 100_000, "points": 300},
        ),
        _experiment(
            runs.linear,
            runs.Linear,
            {"steps": 60, "deep_steps": 20},
            {"steps": 6000, "deep_steps": 6000},
            {"steps": 20_000, "deep_steps": 20_000},
        ),
        _experiment(runs.remember, runs.Remember, {"rows": 8, "updates": 8}, {"updates": 1000}, {"updates": 4000}),
        _experiment(
            runs.times,
            runs.Times,
            _SMALL | {"widths": (16, 16), "updates": 6},
            {"train": 50_000, "test": 10_000, "widths": (128,) * 4, "updates": 2000},
            _WIDE | {"widths": (256,) * 4, "updates": 100_000},
        ),
        _experiment(
            runs.processes,
            runs.Processes,
            {"batches": 6},
            {"batches": 200},
            {"batches": 1000},
            seeds={Scale.SMOKE: 1, Scale.QUICK: 3},
        ),
    ),
)  # fmt: skip
