"""What is run and what is claimed of meta-learned bidirectional update rules.

Claims, margins, grids and numbers of seeds were written before the runs with the study's seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Measurements, Scale, Study, Task

from . import experiments
from .claims import CLAIMS, VARIANTS
from .experiments import Evolve, Identity, Meta, Race, Stay, Transfer, Turning, UsersModel, on_workload

S = TypeVar("S", bound=Any)


def _experiment(
    measure: Callable[[Task[S]], Measurements],
    arms: tuple[str, ...],
    *,
    smoke: S,
    quick: S,
    full: S | None = None,
    **options: Any,
) -> Experiment[S]:
    """An experiment called as its function; at full and paper as at quick where nothing else is said."""
    large = quick if full is None else full
    settings = {Scale.SMOKE: smoke, Scale.QUICK: quick, Scale.FULL: large, Scale.PAPER: large}
    return Experiment(measure.__name__, measure, arms=arms, settings=settings, block=None, **options)


def _again(measure: Callable[[Task[S]], Measurements], arms: tuple[str, ...], **options: Any) -> Experiment[S]:
    """A replication, with seeds of its own."""
    return replace(_experiment(measure, arms, **options), name=f"{measure.__name__}_again")


def _seeds(quick: int) -> dict[Scale, int]:
    return {Scale.SMOKE: 2, Scale.QUICK: quick, Scale.FULL: quick, Scale.PAPER: quick}


_NEW = 1000  # first seed of the replications
_USERS: dict[str, Any] = {"workloads": (Labeled,), "adapt": on_workload}
_ARMS = ("k8", "deep", "k4", "k2", "oja", "synapse_norm", "no_norm", "asym_multi_random", "sym_single_backprop")
_OTHERS = ("forward_norm", "backward_norm", *(v for v in VARIANTS if v not in (*_ARMS, "sym_multi_random")))
_SMOKE = Meta(members=2, updates=2, unroll=3, batch_size=16, hidden=6, episodes=1, tests=1, long=20)
_LARGE = Meta(data="fashion_mnist", members=8, updates=600, unroll=10, batch_size=64, hidden=64)

STUDY = Study(
    claims=CLAIMS,
    seeds=_seeds(8),
    experiments=(
        _experiment(
            experiments.race,
            ("blur", "sgd", "sgd_bn", "adam"),
            smoke=Race(hidden=6, horizons=(1, 2, 5, 10, 100), batch_size=16, budget=2, tuning_seeds=1),
            quick=Race(),
            full=Race(data="fashion_mnist", hidden=64),
            seeds=_seeds(16),
            **_USERS,
        ),
        _experiment(
            experiments.users_model,
            ("blur", "sgd"),
            smoke=UsersModel(horizons=(1, 2, 5, 10, 100), batch_size=16, budget=1),
            quick=UsersModel(),
            own_data=False,
            seeds=_seeds(8),
            **_USERS,
        ),
        _experiment(
            experiments.evolve,
            ("cmaes",),
            smoke=Evolve(particles=4, updates=2, unroll=3, batch_size=16, test_size=32, replicas=1, hidden=6, tests=1),
            quick=Evolve(),
            full=Evolve(data="fashion_mnist", particles=80, updates=400, unroll=15, batch_size=128, hidden=512),
            **_USERS,
        ),
        _experiment(experiments.meta_train, _ARMS, smoke=_SMOKE, quick=Meta(), full=_LARGE, **_USERS),
        Experiment(
            "variants",
            experiments.meta_train,
            arms=_OTHERS,
            settings={Scale.FULL: _LARGE, Scale.PAPER: _LARGE},
            block=None,
        ),
        _experiment(
            experiments.transfer, ("shipped", "untrained"), smoke=Transfer(untrained=3, steps=3), quick=Transfer()
        ),
        _experiment(
            experiments.stay,
            ("lasting", "ordinary"),
            smoke=Stay(horizons=(20, 60, 200, 600), hidden=4, batch_size=16),
            quick=Stay(),
            seeds=_seeds(32),
        ),
        _again(
            experiments.race,
            ("blur", "sgd", "sgd_bn"),
            smoke=Race(hidden=6, horizons=(5,), batch_size=16, budget=2, tuning_seeds=1, first_seed=_NEW),
            quick=Race(horizons=(5,), first_seed=_NEW),
            seeds=_seeds(72),
        ),
        _again(
            experiments.transfer,
            ("shipped", "untrained"),
            smoke=Transfer(untrained=3, steps=3, first_seed=_NEW),
            quick=Transfer(first_seed=_NEW),
            seeds=_seeds(24),
        ),
        _experiment(
            experiments.turning, ("learned", "backprop"), smoke=Turning(sizes=(3, 3, 2), rows=8), quick=Turning()
        ),
        _experiment(experiments.identity, ("backprop",), smoke=Identity(steps=5), quick=Identity(), seeds=_seeds(20)),
    ),
)
