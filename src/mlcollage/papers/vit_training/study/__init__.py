"""What is run and what is claimed of AugReg (Steiner et al., TMLR 2022).

Claims, margins and settings were written before the runs with the study's seeds; the paper's page says which choices
followed pilots with other seeds. On a user's workload of images a small vision transformer is trained on at most as
many samples as the scale has and on a tenth of them, with and without augmentation and regularization; what is claimed
of transfer to the study's own other tasks, of choosing and of patches is not part of it.
"""

from __future__ import annotations

from typing import Any

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Scale, Study

from .claims import CLAIMS
from .experiments import Sweep, on_workload, sweep

_SMOKE: dict[str, Any] = {"small": 40, "large": 400, "val": 40, "test": 100, "short": 8, "long": 16}
_FULL: dict[str, Any] = {"test": 5000, "val": 2000, "batch": 64, "width": 64, "depth": 3, "heads": 4}

STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 8, Scale.FULL: 16, Scale.PAPER: 32},
    experiments=(
        Experiment(
            "sweep",
            sweep,
            arms=("sweep",),
            settings={
                Scale.SMOKE: Sweep(**_SMOKE, target=40, tuning=4),
                Scale.QUICK: Sweep(),
                Scale.FULL: Sweep(**_FULL),
                Scale.PAPER: Sweep(**_FULL, short=4000, long=16_000),
            },
            block=4,  # seeds in one stack, so that eight of them keep two cores busy
            workloads=(Labeled,),
            adapt=on_workload,
        ),
    ),
)
