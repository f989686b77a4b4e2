"""What is run and what is claimed of the eight statistical ideas.

A seed is a block of simulated repetitions, independent of the other blocks. On a user's workload (classification data)
only the paired seeds are run: what a pairing is worth depends on the data. The other experiments need a known truth.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

from mlcollage.data import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.lab import Scale, Study
from mlcollage.lab.experiment import Experiment, Measure, each_seed

from . import experiments as of
from .claims import CLAIMS


def _blocks(measure: Measure[Any], smoke: object, quick: object, full: object | None = None, **more: Any) -> Experiment:
    """An experiment that measures five seeds per run, which pays for the imports once; ``full`` defaults to quick."""
    large = quick if full is None else full
    settings = {Scale.SMOKE: smoke, Scale.QUICK: quick, Scale.FULL: large, Scale.PAPER: large}
    name = measure.__name__
    return Experiment(name, each_seed(measure), arms=(name,), settings=settings, block=5, **more)


def _on_workload(settings: of.Paired, workload: Labeled, scale: Scale) -> of.Paired:
    samples = sum(len(cast(Sized, part)) for part in (workload.train, workload.test))
    if samples < 10:
        raise InvalidInput(f"the workload has {samples} samples; at least 10 are needed to train and to test.")
    return settings


STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 10, Scale.FULL: 40, Scale.PAPER: 40},
    experiments=(
        _blocks(of.causal, of.Causal(units=200, repeats=2), of.Causal(), of.Causal(repeats=50)),
        _blocks(
            of.paired,
            of.Paired(replicas=6, train=60, test=200, width=4, steps=15),
            of.Paired(),
            workloads=(Labeled,),
            adapt=_on_workload,
        ),
        _blocks(
            of.coverage, of.Coverage(repeats=5, resamples=49), of.Coverage(), of.Coverage(repeats=400, resamples=999)
        ),
        _blocks(of.descent, of.Descent(test=100), of.Descent()),
        _blocks(of.pooling, of.Pooling(repeats=2), of.Pooling(), of.Pooling(repeats=100)),
        # version 2: warm-up in Stan's windows
        _blocks(of.sampler, of.Sampler(chains=4, draws=40, warmup=40), of.Sampler(), version=2),
        _blocks(
            of.calibration,
            of.Calibration(simulations=40, ranks=10, warmup=20, thin=1),
            of.Calibration(),
            of.Calibration(simulations=600, ranks=100, warmup=250, thin=8),
            version=2,
        ),
        _blocks(
            of.adaptive,
            of.Adaptive(pulls=100, repeats=2, races=3, peeks=20, sequences=20),
            of.Adaptive(),
            of.Adaptive(repeats=20, races=400, sequences=2000),
        ),
        _blocks(of.robust, of.Robust(repeats=10), of.Robust(), of.Robust(repeats=5000)),
        _blocks(
            of.explore,
            of.Explore(repeats=2, replicates=40, lineups=3),
            of.Explore(),
            of.Explore(repeats=50, replicates=500, lineups=400),
        ),
        _blocks(
            of.judging,
            of.Judging(studies=2, odd=1),
            of.Judging(),
            of.Judging(studies=250, odd=250),
            version=2,  # odd nulls; a judge that looks at shape and losses
        ),
    ),
)
