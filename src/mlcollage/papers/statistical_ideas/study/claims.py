"""What is claimed of the eight statistical ideas; written, with margins and sizes, before the runs.

The paper is a review and measures nothing. Each of its ideas is put here as statements about textbook problems whose
truth is known, so that the tools of ``mlcollage.stats`` and ``mlcollage.infer``, which judge all other studies, are
themselves judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import pandas as pd

from mlcollage.lab import Claim, Difference, Level, PerSeed, Scale, Trend

UNITS = 100  # training units of the double-descent bench; the peak is expected where features equal them
MOST = 3000  # features of its largest model


def _beyond_and_classical(rows: pd.DataFrame) -> Mapping[str, float]:
    errors = rows[(rows["metric"] == "test_error") & (rows["arm"] == "min_norm")].set_index("features")["value"]
    return {"beyond": float(errors.loc[MOST]), "classical": float(errors[errors.index < UNITS].min())}


# what several claims share: how an effect is printed, for some also its direction and the smallest that matters
_share = partial(Claim, factor=100, unit="%", digits=0, bounds=(0, 1))
_smaller = partial(Claim, direction="less", unit="log ratio")
_unbiased = partial(Claim, direction="within", margin=0.1, digits=3)
_trend = partial(Claim, margin=0.5, test="trend", unit="rho")
_pooled = partial(Claim, direction="less", margin=0.5, unit="points")
_pulls = partial(Claim, unit="pulls", digits=0)

CLAIMS = (
    Claim(
        id="C1",
        title="The plain difference of arms is biased by confounding",
        sentence="Where treatment depends on covariates, the difference of the arms' means misses the true average "
        "effect of 1 by more than a tenth of it.",
        source="idea 1, causal inference",
        estimand=Level("bias", "naive"),
        direction="greater",
        margin=0.1,
    ),
    Claim(
        id="C1b",
        title="Paired seeds share noise, so fewer seeds are needed",
        sentence="Networks trained on digits with and without weight decay from the same seed (initialization, order "
        "of the data, split) have positively correlated test accuracies, so that pairing needs fewer seeds.",
        source="idea 1, potential outcomes",
        estimand=Level("pair_correlation", "weight_decay"),
        direction="greater",
        margin=0.1,
    ),
    _unbiased(
        id="C1c",
        title="Doubly robust weighting (AIPW) removes the bias",
        sentence="Cross-fitted augmented inverse-propensity weighting misses the true effect by less than a tenth on "
        "average.",
        source="idea 1, causal inference",
        estimand=Level("bias", "aipw"),
        headline=True,
    ),
    _unbiased(
        id="C1d",
        title="AIPW stays unbiased with a wrong propensity model",
        sentence="Cross-fitted AIPW misses the true effect by less than a tenth on average with a propensity model "
        "that ignores all covariates, too.",
        source="idea 1, double robustness",
        estimand=Level("bias", "aipw_wrong_propensity"),
    ),
    _unbiased(
        id="C1e",
        title="AIPW stays unbiased with a wrong outcome model",
        sentence="Cross-fitted AIPW misses the true effect by less than a tenth on average with an outcome model "
        "that misses the curvature, too.",
        source="idea 1, double robustness",
        estimand=Level("bias", "aipw_wrong_outcome"),
    ),
    _share(
        id="C1f",
        title="AIPW intervals hold the true effect about 95% of the time",
        sentence="The 95% intervals of cross-fitted AIPW hold the true effect in 92% to 97% of repetitions.",
        source="idea 1, causal inference",
        estimand=Level("effect_coverage", "aipw"),
        direction="within",
        null=0.945,
        margin=0.025,
        digits=1,
        from_scale=Scale.FULL,
    ),
    _share(
        id="C2",
        title="Percentile intervals are too short for few seeds",
        sentence="The 95% percentile bootstrap interval of the mean of five normal values holds the truth in at most "
        "90% of samples.",
        source="idea 2, bootstrap",
        estimand=Level("coverage", "percentile", where={"population": "normal", "n": 5}),
        direction="at_most",
        null=0.90,
        digits=1,
        headline=True,
        says={
            "supported": "With five seeds a percentile interval covers {effect}, not 95%",
            "contradicted": "With five seeds a percentile interval covers as it should: {effect}",
            "inconclusive": "How well a percentile interval covers with five seeds is open ({effect})",
        },
    ),
    _share(
        id="C2b",
        title="BCa bootstrap intervals are too short for 5 seeds",
        sentence="The 95% bias-corrected and accelerated (BCa) bootstrap interval of the mean of five normal values "
        "holds the truth in at most 90% of samples.",
        source="idea 2, bootstrap",
        estimand=Level("coverage", "bca", where={"population": "normal", "n": 5}),
        direction="at_most",
        null=0.90,
        digits=1,
    ),
    _share(
        id="C2c",
        title="Bootstrap-t intervals cover 95% with only 5 seeds",
        sentence="The studentized bootstrap covers the mean of five normal values in 95% of samples, give or take "
        "three points.",
        source="idea 2, bootstrap",
        estimand=Level("coverage", "bootstrap_t", where={"population": "normal", "n": 5}),
        direction="within",
        null=0.95,
        margin=0.03,
        digits=1,
    ),
    _trend(
        id="C2d",
        title="Percentile intervals cover better as seeds are added",
        sentence="The coverage of the percentile interval rises with the number of values (5, 10, 30).",
        source="idea 2, bootstrap",
        estimand=Trend("coverage", over="n", arm="percentile", where={"population": "normal"}),
        direction="greater",
    ),
    Claim(
        id="C3",
        title="Test error peaks where features equal training units",
        sentence="The test error of the interpolating fit of least norm is at least five times as large with as many "
        "features as training units (100) as with thirty times as many.",
        source="idea 3, overparameterized models",
        estimand=Difference(
            "test_error",
            "min_norm",
            "min_norm",
            treatment_where={"features": UNITS},
            control_where={"features": MOST},
            log=True,
        ),
        direction="at_least",
        null=math.log(5),
        unit="log ratio",
        headline=True,
    ),
    Claim(
        id="C3b",
        title="Far beyond the peak, error is below the classical best",
        sentence="With 3,000 features the interpolating fit has a smaller test error than the best fit with fewer "
        "features than training units.",
        source="idea 3, overparameterized models",
        estimand=PerSeed(_beyond_and_classical, "test error at 3,000 features − least one below 100", ("descent",)),
        direction="less",
        margin=0.05,
    ),
    _trend(
        id="C3c",
        title="A tuned ridge has no peak as features are added",
        sentence="The test error of a ridge whose penalty is chosen by leave-one-out falls with the number of "
        "features.",
        source="idea 3, regularization",
        estimand=Trend("test_error", over="features", arm="ridge"),
        direction="less",
    ),
    _pooled(
        id="C4",
        title="Partial pooling is closer to the truth than no pooling",
        sentence="Over 8 or 20 groups and three spreads of their effects, partial pooling estimates the true effects "
        "with a smaller root mean squared error than each group alone (noise as in the eight schools).",
        source="idea 4, multilevel models",
        estimand=Difference("mean_effect_error", "partial", "none"),
        headline=True,
    ),
    _pooled(
        id="C4b",
        title="Partial pooling is closer than complete pooling",
        sentence="In the same simulations, partial pooling has a smaller root mean squared error than complete "
        "pooling.",
        source="idea 4, multilevel models",
        estimand=Difference("mean_effect_error", "partial", "complete"),
    ),
    Claim(
        id="C5",
        title="The HMC sampler agrees with exact quadrature",
        sentence="Posterior means of the eight schools by Hamiltonian Monte Carlo lie within a tenth of a posterior "
        "standard deviation of those by quadrature, all ten at once.",
        source="idea 5, generic computation",
        estimand=Level("quadrature_error", "non_centered"),
        direction="at_most",
        null=0.1,
        unit="sd",
        digits=3,
        kind="check",
    ),
    Claim(
        id="C5b",
        title="The non-centered form mixes better for a small spread",
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
    _share(
        id="C5c",
        title="Calibration checks accept the correct sampler",
        sentence="Simulation-based calibration at level 1% rejects the sampler in at most a quarter of the blocks.",
        source="idea 5 with 2, simulation",
        estimand=Level("rejected", "correct"),
        direction="at_most",
        null=0.25,
        kind="check",
    ),
    _share(
        id="C5d",
        title="Calibration checks catch broken samplers",
        sentence="Simulation-based calibration rejects at least nine in ten of the mutants: the sampler without the "
        "Jacobian of the log spread, with the prior's scale doubled, and without the Metropolis test.",
        source="idea 5, unit tests for statistics",
        estimand=Level("mutation_score", "mutants"),
        direction="at_least",
        null=0.9,
        headline=True,
    ),
    _pulls(
        id="C6",
        title="Thompson sampling wastes fewer pulls than taking turns",
        sentence="Over 2,000 pulls of five arms with success rates .5, .45, .4, .4 and .35, Thompson sampling regrets "
        "less than pulling evenly.",
        source="idea 6, adaptive decisions",
        estimand=Difference("regret", "thompson", "uniform"),
        direction="less",
        margin=50,
    ),
    _pulls(
        id="C6b",
        title="Thompson and epsilon-greedy do equally well at 2,000 pulls",
        sentence="Over those 2,000 pulls, the regret of Thompson sampling is within 30 of that of epsilon-greedy with "
        "one pull in ten at random.",
        source="idea 6, adaptive decisions",
        estimand=Difference("regret", "thompson", "epsilon_greedy"),
        direction="within",
        margin=30,
    ),
    _share(
        id="C6c",
        title="Successive halving finds the best of 27 configurations",
        sentence="Successive halving ends with the best of 27 simulated learning curves, or one within a point of "
        "it, in at least 90% of repetitions, on less than a third of the budget.",
        source="idea 6, adaptive decisions",
        estimand=Level("found_best", "halving"),
        direction="at_least",
        null=0.9,
    ),
    _share(
        id="C6d",
        title="Repeating a t test after every seed finds false effects",
        sentence="A t test at level 5% repeated after every seed, from the fifth to the hundredth, calls an absent "
        "effect present in at least 10% of studies.",
        source="idea 6, sequential decisions",
        estimand=Level("false_positive", "peeking"),
        direction="at_least",
        null=0.10,
        digits=1,
        headline=True,
        says={
            "supported": "Test after each seed, and {effect} of studies find an effect that is not there",
            "contradicted": "Testing after each seed finds false effects in only {effect} of studies",
            "inconclusive": "How often testing after each seed finds false effects is open ({effect})",
        },
    ),
    _share(
        id="C6e",
        title="A confidence sequence may be checked after every seed",
        sentence="A 95% confidence sequence, looked at after every seed, calls an absent effect present in at most 5% "
        "of studies.",
        source="idea 6, sequential decisions",
        estimand=Level("false_positive", "confidence_sequence"),
        direction="at_most",
        null=0.05,
        digits=1,
    ),
    _smaller(
        id="C7",
        title="The interquartile mean beats the mean on heavy tails",
        sentence="Of 20 values of Student's t with 2 degrees of freedom, the interquartile mean has a smaller root "
        "mean squared error than the mean.",
        source="idea 7, robust inference",
        estimand=Difference("rmse", "iqm", "mean", where={"population": "t2"}, log=True),
        margin=0.2,
    ),
    _smaller(
        id="C7b",
        title="The interquartile mean beats the mean under outliers",
        sentence="With a tenth of 20 normal values drawn with ten times the spread, the interquartile mean has a "
        "smaller root mean squared error than the mean.",
        source="idea 7, robust inference",
        estimand=Difference("rmse", "iqm", "mean", where={"population": "contaminated"}, log=True),
        margin=0.2,
    ),
    _smaller(
        id="C7c",
        title="The mean beats the median on clean normal data",
        sentence="Of 20 normal values, the mean has a smaller root mean squared error than the median.",
        source="idea 7, robust inference",
        estimand=Difference("rmse", "mean", "median", where={"population": "clean"}, log=True),
        margin=0.1,
    ),
    _share(
        id="C8",
        title="Predictive checks tell four look-alike data sets apart",
        sentence="Of four data sets with the same moments (line, curve, outlier, lever), predictive checks of a "
        "linear model flag the last three and not the first, in at least 80% of repetitions.",
        source="idea 8, exploratory analysis",
        estimand=Level("right_flags", "checks"),
        direction="at_least",
        null=0.8,
    ),
    _share(
        id="C8b",
        title="A crashed seed stands out in a lineup of plots",
        sentence="One crashed seed in thirty stands out of a lineup of twenty plots in more than 80% of repetitions.",
        source="idea 8, exploratory analysis",
        estimand=Level("lineup_detection", "crash"),
        direction="at_least",
        null=0.8,
    ),
    _share(
        id="C9",
        title="The judge seldom supports a claim about nothing",
        sentence="In simulated studies of three claims without any effect, the judge calls at most 5% of the claims "
        "supported.",
        source="outlook, tests of statistics",
        estimand=Level("supported_rate", "null"),
        direction="at_most",
        null=0.05,
        digits=1,
        kind="check",
    ),
    _share(
        id="C9b",
        title="The judge finds an effect as often as it promises",
        sentence="With the number of seeds it recommends for 80% power, the judge supports an effect of the smallest "
        "size that matters in at least 75% of simulated studies.",
        source="outlook, tests of statistics",
        estimand=Level("supported_rate", "effect"),
        direction="at_least",
        null=0.75,
        kind="check",
    ),
)
