"""What is run and what is claimed of the Fisher explosion (Jastrzębski et al., ICML 2021).

Claims, margins, grids and seeds were written before the runs with the study's seeds. What followed pilots (seeds from
1000 on) is said on the paper's page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Scale, Study

from .claims import CLAIMS
from .data import Settings
from .experiments import Clean, Grid, WrongLabels, clean, grid, wrong_labels

S = TypeVar("S", bound=Settings)

# What each scale changes, by name; an experiment takes those that it has.
_SMOKE: Mapping[str, Any] = {
    "data": "digits",
    "train": 60,
    "validation": 30,
    "test": 40,
    "traced": 20,
    "batch": 10,
    "evaluations": 4,
    "interval": 4,
    "tuning_seeds": 1,
    "tuning_steps": 8,
    "small_steps": 40,
    "large_steps": 24,
    "steps": 24,
    "label_draws": 4,
    "vectors": 2,
}
_FULL: Mapping[str, Any] = {
    "data": "fashion_mnist",
    "network": "convnet",
    "train": 10_000,
    "validation": 5000,
    "test": 10_000,
    "traced": 1000,
    "lr": None,
    "tuning_seeds": 3,
    "tuning_steps": 6000,
    "small_steps": 12_000,
    "large_steps": 2500,
    "steps": 8000,
    "vectors": 30,
}
_PAPER = {**_FULL, "data": "cifar100", "train": 45_000, "batch": 128}
_SCALES: Mapping[Scale, Mapping[str, Any]] = {
    Scale.SMOKE: _SMOKE,
    Scale.QUICK: {},
    Scale.FULL: _FULL,
    Scale.PAPER: _PAPER,
}
_OWN: Mapping[str, Any] = {  # on a user's workload: any model, of any cost
    "tuning_seeds": 1,
    "tuning_steps": 200,
    "small_steps": 400,
    "large_steps": 150,
    "steps": 300,
    "evaluations": 12,
    "points": ((0.1, 1.0), (0.33, 1.0), (1.0, 1.0), (0.33, 0.5), (1.0, 0.5)),
    "label_draws": 60,
    "vectors": 5,
}
# Grids of three, of which validation picks one: half decades around a pilot's best.
_METHODS: Mapping[str, tuple[float, ...]] = {
    "none": (0.0,),
    "gpx": (3.0, 10.0, 30.0),
    "gp": (0.3, 1.0, 3.0),
    "fp": (0.3, 1.0, 3.0),
    "gpr": (0.3, 1.0, 3.0),
    "trf": (0.01, 0.03, 0.1),
    "sam": (0.1, 0.2, 0.4),
    "mixup": (1.0, 8.0, 32.0),
}


def _changed(settings: S, changes: Mapping[str, Any]) -> S:
    return replace(settings, **{k: v for k, v in changes.items() if hasattr(settings, k)})


def on_workload(settings: S, workload: Labeled, scale: Scale) -> S:
    """The user's data and model, learning rates chosen on validation, and fewer steps at scale quick."""
    changes = _OWN if scale is Scale.QUICK else {}
    return _changed(settings, {**changes, "data": "workload", "lr": None})


def _experiment(name: str, measure: Any, settings: Settings, seeds: Mapping[Scale, int] | None = None) -> Experiment:
    """All seeds of an arm train together, in one run."""
    return Experiment(
        name,
        measure,
        arms=(name,),
        settings={scale: _changed(settings, changes) for scale, changes in _SCALES.items()},
        seeds=seeds,
        block=None,
        workloads=(Labeled,),
        adapt=on_workload,
    )


_FEWER = {Scale.SMOKE: 2, Scale.QUICK: 5, Scale.FULL: 10, Scale.PAPER: 10}
_NOISE = {
    method: _experiment(f"noise_{method}", wrong_labels, WrongLabels(method=method, grid=values), _FEWER)
    for method, values in _METHODS.items()
}

STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 10, Scale.FULL: 10, Scale.PAPER: 10},
    experiments=(
        _experiment("clean", clean, Clean()),
        _NOISE["sam"],
        _NOISE["fp"],
        _experiment("grid", grid, Grid(), _FEWER),
        *(experiment for method, experiment in _NOISE.items() if method not in ("sam", "fp")),
    ),
)
