"""What is run and what is claimed of Barlow Twins (Zbontar, Jing, Misra, LeCun and Deny, ICML 2021).

Claims, margins, grids and settings were written before the runs with the study's seeds; the paper's page says which
choices followed pilots with other seeds. On a user's workload views are made of their rows (noise and swapped entries),
of their images (crops, flips, colors) or by the workload's own function, the score is the accuracy of a linear probe,
and the claims on shared nuisance and on the algebra are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Scale, Study

from .claims import CLAIMS
from .experiments import NUISANCES, VARIANTS, Algebra, algebra, nuisance, on_workload, training
from .models import Training

_SMOKE: Mapping[str, Any] = {"samples": 128, "batch": 32, "fit": 80, "test": 60, "shots": 5, "supervised_steps": 3}
_FULL: Mapping[str, Any] = {"samples": 409_600, "fit": 5000, "test": 10_000}
_SETTINGS = {
    Scale.SMOKE: Training(**_SMOKE),
    Scale.QUICK: Training(),
    Scale.FULL: Training(**_FULL),
    Scale.PAPER: Training(**{**_FULL, "samples": 4_096_000}),
}

STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 8, Scale.FULL: 8, Scale.PAPER: 8},
    experiments=(
        Experiment(
            "training",
            training,
            arms=(*VARIANTS, "supervised"),
            settings=_SETTINGS,
            block=None,
            workloads=(Labeled,),
            adapt=on_workload,
        ),
        Experiment("nuisance", nuisance, arms=tuple(NUISANCES), settings=_SETTINGS, block=None),
        Experiment(
            "algebra",
            algebra,
            arms=("algebra",),
            settings={scale: Algebra() for scale in Scale},
        ),
    ),
)
