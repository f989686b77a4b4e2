"""What is run and what is claimed of Bayesian neural-network posteriors (Izmailov et al., ICML 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import replace
from functools import partial
from typing import cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Scale, Study

from ..network import BayesianNetwork
from .claims import CLAIMS
from .data import Sizes
from .experiments import augmentation, methods, settings, shift

_SMOKE = Sizes(
    train=40, validation=40, test=60, step_size=0.02, chains=2, burn_in=2, draws=4, members=2, epochs=6, sg_epochs=4
)
_FULL = Sizes(
    data="fashion_mnist", network="resnet", train=10_000, validation=5000, test=10_000, variance=0.2, step_size=2e-4,
    chains=8, burn_in=20, draws=80, members=20, epochs=60, sg_epochs=200,
)  # fmt: skip
_PAPER = replace(
    _FULL, data="cifar10", train=40_960, validation=9040, step_size=1e-5, chains=3, burn_in=50, draws=240, members=50,
    epochs=500, sg_epochs=10_000,
)  # fmt: skip
_SIZES = {Scale.SMOKE: _SMOKE, Scale.QUICK: Sizes(), Scale.FULL: _FULL, Scale.PAPER: _PAPER}


def _adapted(s: Sizes, workload: Labeled, scale: Scale) -> Sizes:
    """The user's network, or the study's MLP; at most as many samples as the scale says; step sizes are adapted."""
    if workload.model is not None:
        _check(workload.model)
    size, tests = (len(cast(Sized, part)) for part in (workload.train, workload.test))
    held = min(s.validation, size // 3)
    return replace(
        s,
        data="workload",
        network="mlp" if workload.model is None else "user",
        validation=held,
        train=min(s.train, size - held),
        test=min(s.test, tests),
        step_size=None,
    )


def _widened(s: Sizes, workload: Labeled, scale: Scale) -> Sizes | None:
    """A network of the user's has no place for more inputs."""
    return _adapted(s, workload, scale) if workload.model is None else None


def _check(model: Callable[[], nn.Module]) -> None:
    """Refuse a network without a posterior before anything is run; a fresh batch norm has no statistics to fix."""
    network = model().eval()
    for part in network.modules():
        part.training = isinstance(part, _BatchNorm)
    BayesianNetwork(network)


_all = partial(Experiment, arms=("all",), workloads=(Labeled,), adapt=_adapted, settings=_SIZES)
_small = {scale: _SIZES[scale] for scale in (Scale.SMOKE, Scale.QUICK)}
_large = {scale: _SIZES[scale] for scale in (Scale.FULL, Scale.PAPER)}

# the dearest experiments start first
STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 5, Scale.FULL: 5, Scale.PAPER: 3},
    experiments=(
        _all("methods", methods),
        _all("settings", settings),
        _all("shift", shift, settings=_small, adapt=_widened),
        # the larger scales have convolutions, which take no more inputs, but for a workload without a model
        _all("shift_of_workloads", shift, settings=_large, adapt=_widened, own_data=False),
        _all("augmentation", augmentation),
    ),
)
