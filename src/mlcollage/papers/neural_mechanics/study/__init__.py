"""What is run and what is claimed of neural mechanics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Scale, Study

from .bench import Common
from .claims import CLAIMS
from .experiments import Laws, Training, check_laws, train_networks

S = TypeVar("S", bound=Common)


def on_workload(settings: S, workload: Labeled, scale: Scale) -> S:
    """The study's networks on the user's data, or, if the workload has a model, that model.

    A user's model is trained at the study's learning rates times the largest of 1, 0.3, 0.1, ... at which it does not
    diverge.
    """
    return replace(settings, data="workload", network="user" if workload.model is not None else "cnn")


def _experiment(name: str, measure: Callable[..., Any], settings: Mapping[Scale, S]) -> Experiment[S]:
    return Experiment(name, measure, arms=(name,), settings=settings, workloads=(Labeled,), adapt=on_workload)


_SMALL: dict[str, Any] = {"samples": 128, "width": 2, "steps": 12, "batch_size": 16}
_FEW: dict[str, Any] = {"warm_steps": 2, "batches": 2, "flow_samples": 16, "flow_time": 0.2, "ledger_steps": 8}
_VGG: dict[str, Any] = {"network": "vgg", "samples": 60_000, "pixels": 32, "steps": 2000, "batch_size": 256, "every": 5}
_TINY_IMAGENET = {**_VGG, "data": "tiny_imagenet", "samples": 100_000, "pixels": 64, "steps": 39_000, "every": 100}
_BEYOND: dict[Scale, dict[str, Any]] = {Scale.QUICK: {}, Scale.FULL: _VGG, Scale.PAPER: _TINY_IMAGENET}

STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 5, Scale.FULL: 5, Scale.PAPER: 3},
    experiments=(
        _experiment(
            "training",
            train_networks,
            {Scale.SMOKE: Training(**_SMALL), **{scale: Training(**more) for scale, more in _BEYOND.items()}},
        ),
        _experiment(
            "laws",
            check_laws,
            {Scale.SMOKE: Laws(**_SMALL, **_FEW), **{scale: Laws(**more) for scale, more in _BEYOND.items()}},
        ),
    ),
)
