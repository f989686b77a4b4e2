"""What is run and what is claimed of the eight statistical ideas.

The paper is a review and measures nothing. Each of its ideas is put here as statements about textbook problems whose
truth is known, so that the tools of ``mlcollage.stats`` and ``mlcollage.infer``, which judge all other studies, are
themselves judged. A seed is a block of simulated repetitions, independent of the other blocks. Claims, margins and
sizes were written before the runs with the study's seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from mlcollage.data.workload import Workload
from mlcollage.lab.claim import Claim
from mlcollage.lab.estimand import Difference, Level, PerSeed, Trend
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale

VERSION = 1
SLUG = "statistical_ideas"
MUTANTS = ("no_jacobian", "wrong_prior", "no_metropolis")
FEATURES = (10, 30, 60, 100, 160, 300, 1000, 3000)
UNITS = 100  # training units of the double-descent bench; the peak is expected where features equal them


def _beyond_and_classical(rows: pd.DataFrame) -> Mapping[str, float]:
    errors = rows[(rows["metric"] == "test_error") & (rows["arm"] == "min_norm")].set_index("features")["value"]
    return {"beyond": float(errors.loc[max(FEATURES)]), "classical": float(errors[errors.index < UNITS].min())}


CLAIMS = (
    Claim(
        id="C1",
        title="A naive contrast is biased",
        sentence="Where treatment depends on covariates, the difference of the arms' means misses the true average "
        "effect of 1 by more than a tenth of it.",
        source="idea 1, causal inference",
        estimand=Level("bias", "naive"),
        direction="greater",
        margin=0.1,
    ),
    Claim(
        id="C1b",
        title="Paired seeds save seeds",
        sentence="Networks trained on digits with and without weight decay from the same seed (initialization, order "
        "of the data, split) have positively correlated test accuracies, so that pairing needs fewer seeds.",
        source="idea 1, potential outcomes",
        estimand=Level("pair_correlation", "weight_decay"),
        direction="greater",
        margin=0.1,
    ),
    Claim(
        id="C1c",
        title="AIPW is unbiased",
        sentence="Cross-fitted augmented inverse-propensity weighting misses the true effect by less than a tenth on "
        "average.",
        source="idea 1, causal inference",
        estimand=Level("bias", "aipw"),
        direction="within",
        margin=0.1,
        digits=3,
    ),
    Claim(
        id="C1d",
        title="Wrong propensity is fine",
        sentence="It does so too with a propensity model that ignores all covariates.",
        source="idea 1, double robustness",
        estimand=Level("bias", "aipw_wrong_propensity"),
        direction="within",
        margin=0.1,
        digits=3,
    ),
    Claim(
        id="C1e",
        title="So is a wrong outcome",
        sentence="It does so too with an outcome model that misses the curvature.",
        source="idea 1, double robustness",
        estimand=Level("bias", "aipw_wrong_outcome"),
        direction="within",
        margin=0.1,
        digits=3,
    ),
    Claim(
        id="C1f",
        title="AIPW intervals cover",
        sentence="Its 95% intervals hold the true effect in 92% to 97% of repetitions.",
        source="idea 1, causal inference",
        estimand=Level("effect_coverage", "aipw"),
        direction="within",
        null=0.945,
        margin=0.025,
        factor=100,
        unit="%",
        digits=1,
        from_scale=Scale.FULL,
    ),
    Claim(
        id="C2",
        title="Percentile misses at 5 seeds",
        sentence="The 95% percentile bootstrap interval of the mean of five normal values holds the truth in at most "
        "90% of samples.",
        source="idea 2, bootstrap",
        estimand=Level("coverage", "percentile", where={"population": "normal", "n": 5}),
        direction="at_most",
        null=0.90,
        factor=100,
        unit="%",
        digits=1,
    ),
    Claim(
        id="C2b",
        title="So does BCa",
        sentence="So does the bias-corrected and accelerated bootstrap interval.",
        source="idea 2, bootstrap",
        estimand=Level("coverage", "bca", where={"population": "normal", "n": 5}),
        direction="at_most",
        null=0.90,
        factor=100,
        unit="%",
        digits=1,
    ),
    Claim(
        id="C2c",
        title="Bootstrap-t holds at 5 seeds",
        sentence="The studentized bootstrap covers the mean of five normal values in 95% of samples, give or take "
        "three points.",
        source="idea 2, bootstrap",
        estimand=Level("coverage", "bootstrap_t", where={"population": "normal", "n": 5}),
        direction="within",
        null=0.95,
        margin=0.03,
        factor=100,
        unit="%",
        digits=1,
    ),
    Claim(
        id="C2d",
        title="Only asymptotically nominal",
        sentence="The coverage of the percentile interval rises with the number of values (5, 10, 30).",
        source="idea 2, bootstrap",
        estimand=Trend("coverage", over="n", arm="percentile", where={"population": "normal"}),
        direction="greater",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C3",
        title="Error peaks at P = n",
        sentence="The test error of the interpolating fit of least norm is at least five times as large with as many "
        "features as training units (100) as with thirty times as many.",
        source="idea 3, overparameterized models",
        estimand=Difference(
            "test_error",
            "min_norm",
            "min_norm",
            treatment_where={"features": UNITS},
            control_where={"features": max(FEATURES)},
            log=True,
        ),
        direction="at_least",
        null=math.log(5),
        unit="log ratio",
    ),
    Claim(
        id="C3b",
        title="Beyond it, below the classic",
        sentence="With 3,000 features the interpolating fit has a smaller test error than the best fit with fewer "
        "features than training units.",
        source="idea 3, overparameterized models",
        estimand=PerSeed(_beyond_and_classical, "test error at 3,000 features − least one below 100", ("descent",)),
        direction="less",
        margin=0.05,
    ),
    Claim(
        id="C3c",
        title="A tuned ridge has no peak",
        sentence="The test error of a ridge whose penalty is chosen by leave-one-out falls with the number of "
        "features.",
        source="idea 3, regularization",
        estimand=Trend("test_error", over="features", arm="ridge"),
        direction="less",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C4",
        title="Partial beats no pooling",
        sentence="Over 8 or 20 groups and three spreads of their effects, partial pooling estimates the true effects "
        "with a smaller root mean squared error than each group alone (noise as in the eight schools).",
        source="idea 4, multilevel models",
        estimand=Difference("mean_effect_error", "partial", "none"),
        direction="less",
        margin=0.5,
        unit="points",
    ),
    Claim(
        id="C4b",
        title="And beats complete pooling",
        sentence="And with a smaller one than complete pooling.",
        source="idea 4, multilevel models",
        estimand=Difference("mean_effect_error", "partial", "complete"),
        direction="less",
        margin=0.5,
        unit="points",
    ),
    Claim(
        id="C5",
        title="Sampler meets quadrature",
        sentence="Posterior means of the eight schools by Hamiltonian Monte Carlo lie within a tenth of a posterior "
        "standard deviation of those by quadrature, all ten at once.",
        source="idea 5, generic computation",
        estimand=Level("quadrature_error", "non_centered"),
        direction="at_most",
        null=0.1,
        unit="sd",
        digits=3,
    ),
    Claim(
        id="C5b",
        title="Non-centering helps",
        sentence="With small true spread, the same sampler has more effective draws of the log spread in the "
        "non-centered than in the centered form.",
        source="idea 5, generic computation",
        estimand=Difference("ess_share", "non_centered", "centered"),
        direction="greater",
        margin=0.05,
        factor=100,
        unit="% of draws",
        digits=0,
    ),
    Claim(
        id="C5c",
        title="SBC passes the sampler",
        sentence="Simulation-based calibration at level 1% rejects the sampler in at most a quarter of the blocks.",
        source="idea 5 with 2, simulation",
        estimand=Level("rejected", "correct"),
        direction="at_most",
        null=0.25,
        factor=100,
        unit="%",
        digits=0,
    ),
    Claim(
        id="C5d",
        title="SBC catches mutants",
        sentence="It rejects at least nine in ten of the mutants: the sampler without the Jacobian of the log spread, "
        "with the prior's scale doubled, and without the Metropolis test.",
        source="idea 5, unit tests for statistics",
        estimand=Level("mutation_score", "mutants"),
        direction="at_least",
        null=0.9,
        factor=100,
        unit="%",
        digits=0,
    ),
    Claim(
        id="C6",
        title="Thompson beats uniform",
        sentence="Over 2,000 pulls of five arms with success rates .5, .45, .4, .4 and .35, Thompson sampling regrets "
        "less than pulling evenly.",
        source="idea 6, adaptive decisions",
        estimand=Difference("regret", "thompson", "uniform"),
        direction="less",
        margin=50,
        unit="pulls",
        digits=0,
    ),
    Claim(
        id="C6b",
        title="Thompson ties greedy here",
        sentence="At that horizon, its regret is within 30 of that of epsilon-greedy with one pull in ten at random.",
        source="idea 6, adaptive decisions",
        estimand=Difference("regret", "thompson", "epsilon_greedy"),
        direction="within",
        margin=30,
        unit="pulls",
        digits=0,
    ),
    Claim(
        id="C6c",
        title="Halving finds the best of 27",
        sentence="Successive halving ends with the best of 27 simulated learning curves, or one within a point of "
        "it, in at least 90% of repetitions, on less than a third of the budget.",
        source="idea 6, adaptive decisions",
        estimand=Level("found_best", "halving"),
        direction="at_least",
        null=0.9,
        factor=100,
        unit="%",
        digits=0,
    ),
    Claim(
        id="C6d",
        title="Peeking cheats a t test",
        sentence="A t test at level 5% repeated after every seed, from the fifth to the hundredth, calls an absent "
        "effect present in at least 10% of studies.",
        source="idea 6, sequential decisions",
        estimand=Level("false_positive", "peeking"),
        direction="at_least",
        null=0.10,
        factor=100,
        unit="%",
        digits=1,
    ),
    Claim(
        id="C6e",
        title="A sequence may be peeked at",
        sentence="A 95% confidence sequence, looked at as often, does so in at most 5%.",
        source="idea 6, sequential decisions",
        estimand=Level("false_positive", "confidence_sequence"),
        direction="at_most",
        null=0.05,
        factor=100,
        unit="%",
        digits=1,
    ),
    Claim(
        id="C7",
        title="IQM wins on heavy tails",
        sentence="Of 20 values of Student's t with 2 degrees of freedom, the interquartile mean has a smaller root "
        "mean squared error than the mean.",
        source="idea 7, robust inference",
        estimand=Difference("rmse", "iqm", "mean", where={"population": "t2"}, log=True),
        direction="less",
        margin=0.2,
        unit="log ratio",
    ),
    Claim(
        id="C7b",
        title="IQM wins under outliers",
        sentence="So too with a tenth of the values drawn with ten times the spread.",
        source="idea 7, robust inference",
        estimand=Difference("rmse", "iqm", "mean", where={"population": "contaminated"}, log=True),
        direction="less",
        margin=0.2,
        unit="log ratio",
    ),
    Claim(
        id="C7c",
        title="The mean wins on clean data",
        sentence="Of 20 normal values, the mean has a smaller root mean squared error than the median.",
        source="idea 7, robust inference",
        estimand=Difference("rmse", "mean", "median", where={"population": "clean"}, log=True),
        direction="less",
        margin=0.1,
        unit="log ratio",
    ),
    Claim(
        id="C8",
        title="Checks tell Anscombe's apart",
        sentence="Of four data sets with the same moments (line, curve, outlier, lever), predictive checks of a "
        "linear model flag the last three and not the first, in at least 80% of repetitions.",
        source="idea 8, exploratory analysis",
        estimand=Level("right_flags", "checks"),
        direction="at_least",
        null=0.8,
        factor=100,
        unit="%",
        digits=0,
    ),
    Claim(
        id="C8b",
        title="A lineup finds a crash",
        sentence="One crashed seed in thirty stands out of a lineup of twenty plots in more than 80% of repetitions.",
        source="idea 8, exploratory analysis",
        estimand=Level("lineup_detection", "crash"),
        direction="at_least",
        null=0.8,
        factor=100,
        unit="%",
        digits=0,
    ),
    Claim(
        id="C9",
        title="The judge keeps its level",
        sentence="In simulated studies of three claims without any effect, the judge calls at most 5% of the claims "
        "supported.",
        source="outlook, tests of statistics",
        estimand=Level("supported_rate", "null"),
        direction="at_most",
        null=0.05,
        factor=100,
        unit="%",
        digits=1,
    ),
    Claim(
        id="C9b",
        title="And has the power it says",
        sentence="With the number of seeds it recommends for 80% power, the judge supports an effect of the smallest "
        "size that matters in at least 75% of simulated studies.",
        source="outlook, tests of statistics",
        estimand=Level("supported_rate", "effect"),
        direction="at_least",
        null=0.75,
        factor=100,
        unit="%",
        digits=0,
    ),
)

_QUICK: Mapping[str, Any] = {
    "causal": {"units": 1000, "repeats": 10},
    "paired": {"replicas": 20, "train": 400, "test": 500, "width": 16, "steps": 120},
    "coverage": {"repeats": 80, "resamples": 399},
    "descent": {"units": UNITS, "inputs": 30, "noise": 0.5, "test": 1000},
    "pooling": {"repeats": 15},
    "sampler": {"chains": 16, "draws": 300, "warmup": 200},
    "calibration": {"simulations": 200, "ranks": 50, "warmup": 150, "thin": 4},
    "adaptive": {"pulls": 2000, "repeats": 4, "races": 40, "peeks": 100, "sequences": 200},
    "robust": {"repeats": 300, "values": 20},
    "explore": {"repeats": 5, "points": 40, "replicates": 200, "lineups": 30},
    "judging": {"studies": 25},
}
_SMOKE: Mapping[str, Any] = {
    "causal": {"units": 200, "repeats": 2},
    "paired": {"replicas": 6, "train": 60, "test": 200, "width": 4, "steps": 15},
    "coverage": {"repeats": 5, "resamples": 49},
    "descent": {"units": UNITS, "inputs": 30, "noise": 0.5, "test": 100},
    "pooling": {"repeats": 2},
    "sampler": {"chains": 4, "draws": 40, "warmup": 40},
    "calibration": {"simulations": 40, "ranks": 10, "warmup": 20, "thin": 1},
    "adaptive": {"pulls": 100, "repeats": 2, "races": 3, "peeks": 20, "sequences": 20},
    "robust": {"repeats": 10, "values": 20},
    "explore": {"repeats": 2, "points": 40, "replicates": 40, "lineups": 3},
    "judging": {"studies": 2},
}
_FULL: Mapping[str, Any] = {
    **_QUICK,
    "causal": {"units": 1000, "repeats": 50},
    "coverage": {"repeats": 400, "resamples": 999},
    "pooling": {"repeats": 100},
    "calibration": {"simulations": 600, "ranks": 100, "warmup": 250, "thin": 8},
    "adaptive": {"pulls": 2000, "repeats": 20, "races": 400, "peeks": 100, "sequences": 2000},
    "robust": {"repeats": 5000, "values": 20},
    "explore": {"repeats": 50, "points": 40, "replicates": 500, "lineups": 400},
    "judging": {"studies": 250},
}
_SETTINGS = {Scale.SMOKE: _SMOKE, Scale.QUICK: _QUICK, Scale.FULL: _FULL, Scale.PAPER: _FULL}
SEEDS = {Scale.SMOKE: 2, Scale.QUICK: 10, Scale.FULL: 40, Scale.PAPER: 40}
_PER_RUN = 5  # blocks measured in one run, which pays for the imports once


def runs(scale: Scale, workload: Workload | None, seeds: range | None = None) -> Iterator[Run]:
    """One run an experiment and five blocks, whose seeds follow the run's; rows name what is compared as arms.

    On a user's workload (classification data) only the paired seeds are run: what a pairing is worth depends on the
    data. The other experiments need a known truth.
    """
    blocks = seeds or range(SEEDS[scale])
    for experiment, settings in _SETTINGS[scale].items():
        if workload is not None and experiment != "paired":
            continue
        for first in blocks[::_PER_RUN]:
            count = min(_PER_RUN, blocks.stop - first)
            yield Run(SLUG, experiment, first, {"experiment": experiment, "blocks": count, **settings})


def measure(run: Run, workload: Workload | None) -> Measurements:
    """Execute the run's experiment for each of its blocks; arrays are named by their block."""
    from .experiments import EXPERIMENTS

    experiment, m = EXPERIMENTS[run.text("experiment")], Measurements()
    for block in range(run.seed, run.seed + run.integer("blocks")):
        found = experiment(dataclasses.replace(run, seed=block), workload)
        for row in found.table.to_dict("records"):
            keys = {str(k): v for k, v in row.items() if k not in ("metric", "step", "value") and pd.notna(v)}
            m.add(row["metric"], row["value"], step=row["step"], seed=block, **keys)
        for name, values in found.arrays.items():
            m.array(f"{name}.{block}", values)
    return m
