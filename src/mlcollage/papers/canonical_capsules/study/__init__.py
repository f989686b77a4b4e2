"""What is run and what is claimed of Canonical Capsules (Sun et al., NeurIPS 2021).

Shapes are procedural, poses uniform. At scale quick the two-dimensional study is whole but for ablations and
classification, and the pose path is trained in three dimensions. On a user's point clouds the claims that need the true
pose of a category are left out, and parts are compared where they are known.
"""

from __future__ import annotations

from dataclasses import replace

from mlcollage.data import PointClouds
from mlcollage.lab import Experiment, Scale, Study

from .claims import CLAIMS
from .experiments import (
    ABLATIONS,
    CLASSES,
    PLANAR,
    POSE,
    SPATIAL,
    ablation,
    classes,
    on_workload,
    planar,
    pose,
    spatial,
)
from .models import Training

_SMOKE = Training(shapes=20, test=8, points=32, capsules=4, channels=8, hidden=8, steps=10, batch=8)
_LARGE = {"shapes": 2000, "test": 200, "points": 1024, "capsules": 10, "channels": 128, "hidden": 1280, "batch": 32}
_FULL = Training(**_LARGE, steps=4000, learning_rate=1e-3, equilibrium=1048.576)  # type: ignore[arg-type]
_PAPER = Training(**{**_LARGE, "batch": 16}, steps=100_000, learning_rate=1e-3, equilibrium=1048.576)  # type: ignore[arg-type]
_MANY = ("plane", "chair", "table", "mug", "lamp", "car", "bottle", "bench")


def _with(quick: Training, **changes: object) -> dict[Scale, Training]:
    full, paper = (replace(s, **changes) for s in (_FULL, _PAPER))  # type: ignore[arg-type]
    dim = {"dim": changes["dim"]} if "dim" in changes else {}
    return {Scale.SMOKE: replace(_SMOKE, **dim), Scale.QUICK: quick, Scale.FULL: full, Scale.PAPER: paper}  # type: ignore[arg-type]


def _later(**changes: object) -> dict[Scale, Training]:
    made = _with(_SMOKE, **changes)
    del made[Scale.QUICK]
    if "categories" in changes:
        made[Scale.SMOKE] = replace(_SMOKE, categories=changes["categories"])  # type: ignore[arg-type]
    return made


STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 4, Scale.FULL: 4, Scale.PAPER: 4},
    experiments=(
        Experiment(
            "planar",
            planar,
            arms=tuple(PLANAR),
            settings=_with(Training(steps=300)),
            seeds={Scale.SMOKE: 2, Scale.QUICK: 3, Scale.FULL: 4, Scale.PAPER: 4},
            workloads=(PointClouds,),
            adapt=on_workload,
        ),
        Experiment(
            "pose",
            pose,
            arms=tuple(POSE),
            settings=_with(Training(steps=500, equilibrium=1048.576)),
            workloads=(PointClouds,),
            adapt=on_workload,
        ),
        Experiment(
            "spatial",
            spatial,
            arms=tuple(SPATIAL),
            settings=_with(Training(dim=3, steps=1500), dim=3),
            seeds={Scale.SMOKE: 1, Scale.QUICK: 3, Scale.FULL: 4, Scale.PAPER: 4},
        ),
        Experiment("ablation", ablation, arms=tuple(ABLATIONS), settings=_later()),
        Experiment("classes", classes, arms=CLASSES, settings=_later(categories=_MANY, dim=3)),
    ),
)
