"""What is run and what is claimed of the Deep Bootstrap framework (Nakkiran, Neyshabur, Sedghi, ICLR 2021).

Claims, margins and settings were written before the runs with the study's seeds. One run trains one network in both
worlds and at all n, for one seed; the most expensive networks come first. A user's workload is taken as a large finite
set: each stream makes one pass over its training data. With a model of its own only that model is trained (SGD with
momentum 0.9 and learning rate 0.1), else an MLP and, for images, a convolutional network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Scale, Study

from .claims import CLAIMS, SWEEP
from .experiments import LeastSquares, Worlds, least_squares, on_workload, worlds

_BASE = {
    Scale.SMOKE: Worlds(n=(32, 128), steps=24, batch_size=16, evaluations=4, test_size=100),
    Scale.QUICK: Worlds(),
    Scale.FULL: Worlds(
        data="standard32", n=(10_000, 50_000), steps=8000, batch_size=128, evaluations=24, test_size=5000
    ),
    Scale.PAPER: Worlds(
        data="cifar5m", n=(10_000, 50_000), steps=39_000, batch_size=128, evaluations=24, test_size=10_000
    ),
}
_FOUR_SIZES = {
    Scale.SMOKE: (16, 32, 64, 128),
    Scale.QUICK: (500, 1000, 2000, 4000),
    Scale.FULL: (5000, 10_000, 25_000, 50_000),
    Scale.PAPER: (5000, 10_000, 25_000, 50_000),
}
_STEPS_SHARE = {"resnet": 0.5, "vit": 0.75}  # of the most expensive networks: they are not run to convergence
_ON_WORKLOADS = ("user", "cnn", "mlp128")
_VARIANTS: dict[str, dict[str, Any]] = {
    "cnn_shift": {"architecture": "cnn", "augment": "shift"},
    "cnn_occlude": {"architecture": "cnn", "augment": "occlude"},
    "mlp128_noise": {"architecture": "mlp128", "label_noise": 0.2},
    "cnn_pretrained": {"architecture": "cnn", "pretrain_steps": 4000},
    "mlp128_mse": {"architecture": "mlp128", "loss": "mse"},
}
_NOT_OF_CIFAR = ("mlp128_noise", "cnn_pretrained", "mlp128_mse")  # it has no label noise and no second alphabet
_FROM_FULL = ("cnn_pretrained", "mlp128_mse")


def _network(arm: str, scale: Scale) -> Worlds:
    base = _BASE[scale]
    steps = int(base.steps * _STEPS_SHARE.get(arm, 1.0))
    return replace(base, architecture=arm, n=_FOUR_SIZES[scale] if arm in SWEEP else base.n, steps=steps)


def _variant(arm: str, scale: Scale) -> Worlds:
    base, own = _BASE[scale], _VARIANTS[arm]
    return replace(base, n=base.n[:1] if "augment" in own else base.n, **own)


def _scales_of(arm: str) -> Iterator[Scale]:
    for scale in Scale:
        early = arm in _FROM_FULL and scale.rank < Scale.FULL.rank
        if not early and not (arm in _NOT_OF_CIFAR and scale is Scale.PAPER):
            yield scale


STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 5, Scale.FULL: 5, Scale.PAPER: 10},
    experiments=(
        *(
            Experiment(
                arm,
                worlds,
                arms=(arm,),
                settings={scale: _network(arm, scale) for scale in Scale},
                version=2,  # the largest gap is taken in either direction
                own_data=arm != "user",
                workloads=(Labeled,) if arm in _ON_WORKLOADS else (),
                adapt=on_workload,
            )
            for arm in ("user", "vit", "resnet", "cnn", "mlp128", "mlp128_slow", "mlp32", "mlp8")
        ),
        *(
            Experiment(
                arm, worlds, arms=(arm,), settings={scale: _variant(arm, scale) for scale in _scales_of(arm)}, version=2
            )
            for arm in _VARIANTS
        ),
        Experiment(
            "least_squares",
            least_squares,
            arms=("least_squares",),
            settings={scale: LeastSquares(steps=50 if scale is Scale.SMOKE else 2000) for scale in Scale},
        ),
    ),
)
