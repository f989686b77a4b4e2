"""What is run and what is claimed of Gated Linear Networks.

Eleven claims after Veness et al. (AAAI 2021), the Gaussian network (Budden et al. 2020) and the bandit (Sezener et al.
2020). Claims, margins and grids were written before the runs with the study's seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlcollage.data.workload import Workload
from mlcollage.lab.claim import Claim
from mlcollage.lab.estimand import Difference, Level, Trend
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale

VERSION = 1
SLUG = "gated_linear_networks"
FORGET_ARMS = ("gln_m1", "gln_m2", "gln_m4", "gln_m8")

CLAIMS = (
    Claim(
        id="C1",
        title="Beats a one-pass MLP",
        sentence="After a single online pass, a GLN is more accurate on test data than an MLP trained by "
        "backpropagation one sample at a time, both tuned over eight settings.",
        source="one-pass MNIST",
        paper_value="98%",
        estimand=Difference("accuracy", "gln", "mlp"),
        direction="greater",
        margin=0.02,
        factor=100,
        unit="pts",
        digits=1,
    ),
    Claim(
        id="C1b",
        title="Beats a one-pass linear net",
        sentence="After a single online pass, a GLN is more accurate on test data than multinomial logistic "
        "regression trained one sample at a time, both tuned over eight settings.",
        source="one-pass MNIST",
        estimand=Difference("accuracy", "gln", "linear"),
        direction="greater",
        margin=0.02,
        factor=100,
        unit="pts",
        digits=1,
    ),
    Claim(
        id="C2",
        title="Learns sooner than an MLP",
        sentence="Over the first fifth of the stream, a GLN predicts more of the coming samples right than an MLP; "
        "each is tuned for just that.",
        source="data efficiency",
        estimand=Difference("early_accuracy", "gln", "mlp"),
        direction="greater",
        margin=0.02,
        factor=100,
        unit="pts",
        digits=1,
    ),
    Claim(
        id="C3",
        title="Forgets less than an MLP",
        sentence="After four permuted tasks, one pass each, a GLN with 8 half-spaces a neuron is more accurate over "
        "all four than an MLP that was tuned for that.",
        source="permuted MNIST figure",
        estimand=Difference("average_accuracy", "gln_m8", "mlp"),
        direction="greater",
        margin=0.10,
        factor=100,
        unit="pts",
        digits=1,
    ),
    Claim(
        id="C3b",
        title="More half-spaces, less lost",
        sentence="What is left of the first task's accuracy after the fourth rises with the number of half-spaces "
        "a neuron (1, 2, 4, 8).",
        source="permuted MNIST figure",
        estimand=Trend("retention", over=FORGET_ARMS),
        direction="greater",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C4",
        title="Capacity grows with size",
        sentence="The share of random labels of uniform noise that a GLN can learn rises with its number of neurons.",
        source="Fig. 2",
        estimand=Trend("memorized", over="size", arm="gln"),
        direction="greater",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C5",
        title="Read-out is exactly linear",
        sentence="Where no clip is active, the output's logit equals the saliency (the product of the selected weight "
        "matrices) times the base logits, to 1e-10 in double precision, on every test sample.",
        source="interpretability",
        estimand=Level("linearity_residual", "gln"),
        direction="at_most",
        null=1e-10,
        test="exact",
    ),
    Claim(
        id="C6",
        title="Depth sharpens predictions",
        sentence="The output neurons predict the class with a smaller log-loss on test data than the neurons of the "
        "first layer do on average.",
        source="every neuron predicts",
        estimand=Difference("layer_log_loss", "gln", "gln", treatment_where={"layer": 3}, control_where={"layer": 1}),
        direction="less",
        margin=0.005,
        unit="nats",
        digits=3,
    ),
    Claim(
        id="C7",
        title="Regret grows sub-linearly",
        sentence="The regret of a neuron with step size proportional to 1/sqrt(t), against the best fixed weights a "
        "context in hindsight, grows more slowly than t: the slope of log regret over log t is below 1.",
        source="local regret bound",
        paper_value="O(√T)",
        estimand=Level("regret_slope", "neuron"),
        direction="at_most",
        null=1.0,
    ),
    Claim(
        id="C8",
        title="Better density than linear",
        sentence="Sixty-four chained GLNs describe binarized digits in fewer nats an image, after one pass, than "
        "logistic autoregression trained the same way.",
        source="2017 report, binarized MNIST",
        estimand=Difference("nats", "gln_density", "autoregression"),
        direction="less",
        margin=0.5,
        unit="nats",
    ),
    Claim(
        id="C9",
        title="Regression is competitive",
        sentence="After one online pass, the Gaussian GLN's root mean squared error is at most 10% above that of batch "
        "Bayesian ridge regression (geometric mean over diabetes, friedman1 and a noisy sine).",
        source="Gaussian GLN, UCI table",
        estimand=Difference("mean_log_rmse", "gaussian_gln", "bayesian_ridge"),
        direction="at_most",
        null=0.0953,
        unit="log ratio",
        digits=3,
    ),
    Claim(
        id="C10",
        title="Bandit beats LinUCB",
        sentence="On digits as a contextual bandit, GLCB plays fewer wrong actions than LinUCB; each rule's "
        "exploration constant is chosen among four.",
        source="GLCB ranking",
        paper_value="first of 10",
        estimand=Difference("bandit_regret", "glcb", "linucb"),
        direction="less",
        margin=25,
        unit="errors",
        digits=0,
    ),
    Claim(
        id="C11",
        title="One pass near batch SVM",
        sentence="A single pass of a GLN is at most 3 points less accurate than a support vector machine tuned on all "
        "data (mean over breast cancer, digits, iris and wine).",
        source="UCI table",
        estimand=Difference("mean_table_accuracy", "gln", "svm"),
        direction="at_least",
        null=-0.03,
        factor=100,
        unit="pts",
        digits=1,
    ),
)

_QUICK: Mapping[str, Any] = {
    "seeds": 10,
    "stream": {"data": "digits", "train": 1257, "test": 540, "hidden": "50-25"},
    "forget": {"data": "digits", "train": 1257, "test": 540, "hidden": "50-25", "tasks": 4},
    "capacity": {"samples": 300, "inputs": 32, "classes": 10, "passes": 20, "sizes": "1-2-4-8-16-32"},
    "regret": {"data": "digits", "train": 1257, "test": 540, "horizon": 8000},
    "density": {"data": "digits", "train": 1257, "test": 540},
    "regression": {"train": 1000, "hidden": "16-8"},
    "bandit": {"data": "digits", "train": 1257, "test": 540, "tuning": 500, "horizon": 1500},
    "tables": {"hidden": "50-25", "limit": 0},
    "surface": {"train": 3000},
}
_SMOKE: Mapping[str, Any] = {
    "seeds": 2,
    "stream": {"data": "digits", "train": 150, "test": 60, "hidden": "4-2"},
    "forget": {"data": "digits", "train": 100, "test": 50, "hidden": "4-2", "tasks": 2},
    "capacity": {"samples": 30, "inputs": 8, "classes": 3, "passes": 2, "sizes": "1-2-4"},
    "regret": {"data": "digits", "train": 200, "test": 50, "horizon": 200},
    "density": {"data": "digits", "train": 60, "test": 20},
    "regression": {"train": 80, "hidden": "4-2"},
    "bandit": {"data": "digits", "train": 200, "test": 50, "tuning": 20, "horizon": 60},
    "tables": {"hidden": "4-2", "limit": 90},
    "surface": {"train": 300},
}
_FULL: Mapping[str, Any] = {
    **_QUICK,
    "stream": {"data": "fashion_mnist", "train": 60_000, "test": 10_000, "hidden": "100-100"},
    "forget": {"data": "fashion_mnist", "train": 20_000, "test": 2000, "hidden": "50-25", "tasks": 8},
}
_SETTINGS = {Scale.SMOKE: _SMOKE, Scale.QUICK: _QUICK, Scale.FULL: _FULL, Scale.PAPER: _FULL}
SEEDS = {scale: int(settings["seeds"]) for scale, settings in _SETTINGS.items()}
_ARMS: Mapping[str, tuple[str, ...]] = {
    "forget": ("gln_m8", "gln_m4", "gln_m2", "gln_m1", "mlp"),
    "stream": ("gln", "mlp", "linear"),
    "tables": ("boosting", "gln", "svm", "batch_mlp"),
    "capacity": ("gln", "mlp"),
    "regret": ("neuron",),
    "density": ("gln_density", "autoregression", "independent"),
    "regression": ("gaussian_gln", "bayesian_ridge"),
    "bandit": ("glcb", "linucb", "epsilon_greedy"),
    "surface": ("surface",),
}
_ON_THE_USERS_DATA = ("stream", "forget")


def runs(scale: Scale, workload: Workload | None, seeds: range | None = None) -> Iterator[Run]:
    """One run an experiment, arm and seed, the longest first.

    On a user's workload (classification data), the stream and the forgetting experiments are run; the other
    experiments are about data of their own.
    """
    settings = _SETTINGS[scale]
    for experiment, arms in _ARMS.items():
        if workload is not None and experiment not in _ON_THE_USERS_DATA:
            continue
        for arm in arms:
            # The decision surface is a picture: it is drawn once, and never by further seeds.
            surface = range(1 if seeds is None else 0)
            for seed in surface if experiment == "surface" else seeds or range(SEEDS[scale]):
                own = settings[experiment] if workload is None else {**settings[experiment], "data": "workload"}
                yield Run(SLUG, arm, seed, {"experiment": experiment, **own})


def measure(run: Run, workload: Workload | None) -> Measurements:
    """Execute the run's experiment."""
    from .experiments import EXPERIMENTS

    return EXPERIMENTS[str(run.settings["experiment"])](run, workload)
