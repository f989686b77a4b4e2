"""What is claimed of Bayesian neural-network posteriors (Izmailov et al., ICML 2021).

Claims, margins, grids and seeds were written before the runs with the study's seeds. A seed is a split of the data,
with initializations and chains of its own. The Hamiltonian Monte Carlo sampler is not tuned in the study: trajectory
and temperature follow the paper's rules, prior variance and step size an earlier pilot on one split. Every rival is, on
validation samples that are in neither the training nor the test set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd

from mlcollage.lab import Claim, Difference, Level, PerSeed, Scale, Trend
from mlcollage.lab import one_value as _value

METHODS = ("hmc", "ensemble", "csghmc", "sghmc", "sgld", "mfvi", "sgd")
TEMPERATURES = (0.1, 0.3, 1.0, 3.0)
FRACTIONS = (0.0625, 0.25, 1.0)
FACTORS = (0.3, 1.0, 3.0)  # of the prior variance
NOISES = (0.0, 1.0, 2.0, 4.0)
SHIFT = 2.0  # of NOISES, where the claims on shift are tested


def median_rhat(rows: pd.DataFrame) -> Mapping[str, float]:
    """Medians of split-R-hat over test predictions and over weights."""
    return {space: _value(rows, "rhat_median", "hmc", space=space) for space in ("function", "weight")}


def cooling_gain(rows: pd.DataFrame, arms: Sequence[str] = ("augmented", "plain")) -> Mapping[str, float]:
    """Accuracy at T = 0.1 minus accuracy at T = 1, with augmentation and without."""
    cold, hot = ({arm: _value(rows, "accuracy", arm, temperature=t) for arm in arms} for t in (0.1, 1.0))
    return {arm: cold[arm] - hot[arm] for arm in arms}


def cooling_gain_by_norm(rows: pd.DataFrame) -> Mapping[str, float]:
    """The same with augmentation: batch norm, and filter response norm."""
    return cooling_gain(rows, ("augmented_batchnorm", "augmented"))


def spread_over_priors(rows: pd.DataFrame) -> Mapping[str, float]:
    """Largest minus smallest accuracy over the prior variances: HMC, and the optimum under the same priors."""
    spreads = {}
    for arm in ("prior_hmc", "prior_map"):
        values = [_value(rows, "accuracy", arm, factor=f, family="gaussian") for f in FACTORS]
        spreads[arm] = max(values) - min(values)
    return spreads


def drop_under_shift(rows: pd.DataFrame) -> Mapping[str, float]:
    """Accuracy lost to noise on inputs that were constant in training."""
    return {
        arm: _value(rows, "accuracy", arm, noise=0.0) - _value(rows, "accuracy", arm, noise=SHIFT)
        for arm in ("shift_hmc", "shift_map")
    }


_points = partial(Claim, factor=100, unit="pts", digits=1)  # of accuracy and the like
_small = partial(Claim, digits=3)  # distances and shares well below 1

CLAIMS = (
    _points(
        id="C1",
        title="Averaging posterior draws beats one tuned network",
        sentence="Averaging over HMC's posterior draws is more accurate than one optimum whose weight decay was tuned.",
        source="accuracy tables",
        estimand=Difference("accuracy", "hmc", "sgd"),
        direction="greater",
        margin=0.01,
        headline=True,
        says={
            "supported": "Averaging over HMC's draws beats one optimum by {effect}",
            "contradicted": "Averaging over HMC's draws does not beat one optimum ({effect})",
            "inconclusive": "Whether averaging beats one optimum is open ({effect})",
        },
    ),
    _points(
        id="C1b",
        title="Averaging posterior draws beats a tuned ensemble",
        sentence="Averaging over HMC's posterior draws is more accurate than a deep ensemble whose weight decay was "
        "tuned.",
        source="accuracy tables",
        estimand=Difference("accuracy", "hmc", "ensemble"),
        direction="greater",
        margin=0.01,
        headline=True,
    ),
    _small(
        id="C1c",
        title="Averaging explains labels better than one network",
        sentence="Averaging over HMC's posterior draws has a lower negative log-likelihood per test sample than one "
        "tuned optimum.",
        source="log-likelihood tables",
        estimand=Difference("nll", "hmc", "sgd"),
        direction="less",
        margin=0.02,
        unit="nats",
    ),
    _small(
        id="C2",
        title="Predictions converge faster than weights",
        sentence="The median split-R-hat of test predictions is smaller than that of weights.",
        source="mixing of HMC",
        estimand=PerSeed(median_rhat, "median split-R-hat, predictions minus weights", ("hmc",)),
        direction="less",
        margin=0.005,
    ),
    Claim(
        id="C2b",
        title="Nearly all predictions converge over chains",
        sentence="Split-R-hat is below 1.1 for at least 90% of the test predictions.",
        source="mixing of HMC",
        estimand=Level("rhat_share", "hmc", where={"space": "function"}),
        direction="at_least",
        null=0.9,
        factor=100,
        unit="%",
        bounds=(0, 1),
        digits=1,
    ),
    _small(
        id="C3",
        title="One long chain is as good as many short ones",
        sentence="With equal numbers of gradients, one long chain is as close to an independent reference in total "
        "variation as many short ones.",
        source="many chains against one",
        estimand=Difference("tv", "long_chain", "hmc"),
        direction="within",
        margin=0.02,
    ),
    Claim(
        id="C4",
        title="Longer trajectories give more draws per gradient",
        sentence="Effective samples of the predictions per gradient rise with the trajectory's length, up to a "
        "quarter period of the prior.",
        source="trajectory length",
        estimand=Trend("ess_per_gradient", over="fraction", arm="trajectory"),
        direction="greater",
        margin=0.5,
        test="trend",
        unit="rho",
        headline=True,
        says={
            "supported": "Longer trajectories give more draws: correlation {effect}",
            "contradicted": "Longer trajectories do not give more draws: correlation {effect}",
            "inconclusive": "Whether longer trajectories give more draws is open ({effect})",
        },
    ),
    Claim(
        id="C4b",
        title="Longer trajectories predict better at equal cost",
        sentence="With equal numbers of gradients, the test negative log-likelihood falls with the trajectory's "
        "length.",
        source="trajectory length",
        estimand=Trend("nll", over="fraction", arm="trajectory"),
        direction="less",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    _points(
        id="C5",
        title="Without augmentation, no lower temperature is needed",
        sentence="Without augmentation, accuracy at T = 1 is at most one point below that of the temperature with the "
        "best validation accuracy.",
        source="cold posteriors",
        estimand=Difference("accuracy", "tempered", "tempered_best", treatment_where={"temperature": 1.0}),
        direction="at_least",
        null=-0.01,
        headline=True,
        says={
            "supported": "Without augmentation the posterior needs no cooling: T = 1 is as good as the best",
            "contradicted": "Cooling helps even without augmentation: T = 1 is {effect} below the best",
            "inconclusive": "Whether the posterior needs cooling without augmentation is open ({effect})",
        },
    ),
    _points(
        id="C5b",
        title="Data augmentation makes lower temperatures help",
        sentence="Cooling to T = 0.1 gains more accuracy with random shifts in each minibatch than without them.",
        source="cold posteriors, augmentation",
        estimand=PerSeed(cooling_gain, "accuracy gained by T = 0.1, with − without shifts", ("augmented", "plain")),
        direction="greater",
        margin=0.01,
        headline=True,
    ),
    _points(
        id="C5c",
        title="Batch norm makes lower temperatures help more",
        sentence="With augmentation, cooling to T = 0.1 gains more accuracy with batch norm than with filter response "
        "norm.",
        source="cold posteriors, batch norm",
        estimand=PerSeed(
            cooling_gain_by_norm,
            "accuracy gained by T = 0.1 with shifts, batch norm − filter response norm",
            ("augmented_batchnorm", "augmented"),
        ),
        direction="greater",
        margin=0.01,
        from_scale=Scale.FULL,
    ),
    _points(
        id="C6",
        title="HMC is robust to the scale of its prior",
        sentence="Over a tenfold range of prior variances, the accuracy of HMC varies less than that of the optimum "
        "under the same priors.",
        source="priors",
        estimand=PerSeed(spread_over_priors, "range of accuracy over priors", ("prior_hmc", "prior_map")),
        direction="less",
        margin=0.02,
    ),
    _points(
        id="C6b",
        title="HMC is robust to the family of its prior",
        sentence="A logistic prior of the same variance gives the same accuracy within two points.",
        source="priors",
        estimand=Difference(
            "accuracy",
            "prior_hmc",
            "prior_hmc",
            where={"factor": 1.0},
            treatment_where={"family": "logistic"},
            control_where={"family": "gaussian"},
        ),
        direction="within",
        margin=0.02,
    ),
    _points(
        id="C7",
        title="Averaging fails under noise on once constant inputs",
        sentence="Noise at test time on inputs that were constant in training costs HMC more accuracy than the "
        "optimum.",
        source="covariate shift",
        estimand=PerSeed(drop_under_shift, "accuracy lost to noise, HMC − optimum", ("shift_hmc", "shift_map")),
        direction="greater",
        margin=0.05,
    ),
    _small(
        id="C7b",
        title="Weights on constant inputs keep their prior",
        sentence="The posterior variance of weights on constant inputs equals the prior's within a tenth.",
        source="arXiv 2106.11905",
        estimand=Level("dead_variance_ratio", "shift_hmc"),
        direction="within",
        null=1.0,
        margin=0.1,
        kind="check",
    ),
    _points(
        id="C7c",
        title="A prior shaped by the inputs protects averaging",
        sentence="With a first-layer prior of the inputs' covariance, HMC keeps more of its accuracy "
        "under noise on inputs that were constant in training.",
        source="arXiv 2106.11905",
        estimand=Difference("accuracy", "shift_empcov", "shift_hmc", where={"noise": SHIFT}),
        direction="greater",
        margin=0.05,
    ),
    _small(
        id="C8",
        title="Ensembles are closer to HMC than variational inference",
        sentence="The predictions of a deep ensemble are closer to HMC's in total variation than those of mean-field "
        "variational inference.",
        source="distance to HMC",
        estimand=Difference("tv", "ensemble", "mfvi"),
        direction="less",
        margin=0.02,
    ),
    _small(
        id="C8b",
        title="Ensembles are as close to HMC as Langevin sampling",
        sentence="The predictions of a deep ensemble are as close to HMC's in total variation as those of "
        "stochastic-gradient Langevin dynamics.",
        source="distance to HMC",
        estimand=Difference("tv", "ensemble", "sgld"),
        direction="within",
        margin=0.05,
    ),
    _small(
        id="C9",
        title="HMC detects foreign inputs better than an ensemble",
        sentence="Predictive entropy tells other data from test data better with HMC than with a tuned deep ensemble.",
        source="out-of-distribution detection",
        estimand=Difference("auroc_ood", "hmc", "ensemble"),
        direction="greater",
        margin=0.02,
    ),
    _small(
        id="C9b",
        title="HMC detects foreign inputs better than one network",
        sentence="Predictive entropy tells other data from test data better with HMC than with one tuned optimum.",
        source="out-of-distribution detection",
        estimand=Difference("auroc_ood", "hmc", "sgd"),
        direction="greater",
        margin=0.02,
    ),
    _points(
        id="C9c",
        title="HMC is less overconfident than one network",
        sentence="Mean confidence minus accuracy on the test set is lower for HMC than for one tuned optimum.",
        source="calibration",
        estimand=Difference("overconfidence", "hmc", "sgd"),
        direction="less",
        margin=0.02,
        headline=True,
    ),
)
