"""What is run and what is claimed of class selectivity (Leavitt and Morcos, ICLR 2021).

Claims, margins and settings were written before the runs with the study's seeds; the paper's page says which choices
followed pilots with other seeds. On a user's workload their model is trained (SGD, momentum 0.9, peak rate 0.05,
gradient norms clipped), on at most as many samples as the scale has, and the units of its activation modules are
measured. Without a model a convolutional network is taken for images, else an MLP. Claims on leaky ReLUs need ReLUs.
"""

from __future__ import annotations

from typing import Any

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Scale, Study

from .claims import CLAIMS
from .experiments import Controls, Sweep, controls, on_workload, sweep

_SMOKE: dict[str, Any] = {"train": 256, "val": 100, "test": 300, "widths": (4, 8, 8, 8), "batch": 64, "epochs": 1.0}
_FULL: dict[str, Any] = {"train": 20_000, "val": 5000, "test": 10_000, "pool": False, "widths": (32, 64, 64, 128)}
_FINE: dict[str, Any] = {
    "alphas": (-5.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0),
    "shuffled": (-5.0, -2.0, -1.0, 1.0, 3.0),
    "strong": -20.0,
    "search": 200,
}

STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 5, Scale.FULL: 6, Scale.PAPER: 20},
    experiments=(
        Experiment(
            "sweep",
            sweep,
            arms=("sweep",),
            settings={
                Scale.SMOKE: Sweep(**_SMOKE, search=2),
                Scale.QUICK: Sweep(),
                Scale.FULL: Sweep(**_FULL, **_FINE, epochs=12.0),
                Scale.PAPER: Sweep(**{**_FULL, "train": 50_000}, **_FINE, epochs=60.0),
            },
            workloads=(Labeled,),
            adapt=on_workload,
        ),
        Experiment(
            "controls",
            controls,
            arms=("controls",),
            settings={
                Scale.SMOKE: Controls(**_SMOKE, long_epochs=2.0),
                Scale.QUICK: Controls(),
                Scale.FULL: Controls(**_FULL, epochs=12.0, long_epochs=30.0),
                Scale.PAPER: Controls(**{**_FULL, "train": 50_000}, epochs=60.0, long_epochs=120.0),
            },
            workloads=(Labeled,),
            adapt=on_workload,
        ),
    ),
)
