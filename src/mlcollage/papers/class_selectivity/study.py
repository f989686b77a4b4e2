"""What is run and what is claimed of class selectivity (Leavitt and Morcos, ICLR 2021).

Claims, margins and settings were written before the runs with the study's seeds. The dossier's pilot numbers, which
came from other seeds, are named on the paper's page where a choice followed them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import pandas as pd

from mlcollage.data.workload import Workload
from mlcollage.errors import InvalidInput
from mlcollage.lab.claim import Claim
from mlcollage.lab.estimand import Difference, Level, PerSeed, Trend
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale

VERSION = 1
SLUG = "class_selectivity"
ALPHAS = (-5.0, -2.0, 0.0, 1.0, 3.0)
"""The grid of the scale quick, which every scale contains: claims name its values."""


def value(rows: pd.DataFrame, metric: str, alpha: float, arm: str = "penalty") -> float:
    """One number of one seed."""
    found = rows[(rows["metric"] == metric) & (rows["arm"] == arm) & (rows["alpha"] == alpha)]["value"]
    if len(found) != 1:
        raise LookupError(f"{len(found)} values of {metric} of {arm} at alpha={alpha:g}")
    return float(found.iloc[0])


def chosen_on_validation(rows: pd.DataFrame) -> dict[str, float]:
    """Test accuracy of the negative alpha of the best validation accuracy, and of alpha = 0."""
    val = rows[(rows["metric"] == "val_accuracy") & (rows["arm"] == "penalty") & (rows["alpha"] < 0)]
    best = float(val["alpha"].to_numpy()[val["value"].to_numpy().argmax()])
    return {"chosen alpha < 0": value(rows, "test_accuracy", best), "alpha = 0": value(rows, "test_accuracy", 0.0)}


def selectivity_factor(rows: pd.DataFrame) -> float:
    """How many times smaller the mean index is at alpha = -5 than at 0."""
    return value(rows, "si", 0.0) / max(value(rows, "si", -5.0), 1e-9)


def cost_by_direction(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy lost for each unit of selectivity, upwards and downwards: least-squares slopes through alpha = 0."""
    table = rows[(rows["arm"] == "penalty") & rows["metric"].isin(("si", "test_accuracy"))]
    table = table.pivot(index="alpha", columns="metric", values="value")
    moved = table["si"] - table["si"][0.0]
    lost = table["test_accuracy"][0.0] - table["test_accuracy"]
    cost = {}
    for name, side in (("up", table.index > 0), ("down", table.index < 0)):
        cost[name] = float((lost[side] * moved[side].abs()).sum() / (moved[side] ** 2).sum())
    return cost


def by_depth(rows: pd.DataFrame) -> dict[str, float]:
    """Mean index of each layer of the plain network, in order."""
    found = rows[(rows["metric"] == "layer_si") & (rows["arm"] == "penalty") & (rows["alpha"] == 0)]
    if len(found) < 3:
        raise LookupError(f"{len(found)} layers; three are needed for a trend")
    return {f"layer {int(row['layer'])}": float(row["value"]) for _, row in found.sort_values("layer").iterrows()}


def early_dimensions(rows: pd.DataFrame) -> float:
    """Spearman's correlation over alphas of the first layer's index and the share of its dimensions in use."""
    si = rows[(rows["metric"] == "layer_si") & (rows["layer"] == 1)].set_index("alpha")["value"]
    used = rows[(rows["metric"] == "dimensions") & (rows["of"] == "acts")].set_index("alpha")["value"]
    if len(si) < 3 or used.nunique() < 2:
        raise LookupError(f"{len(si)} alphas with {used.nunique()} different counts of dimensions")
    return float(si.corr(used, method="spearman"))


def hostile_and_noisy_dimensions(rows: pd.DataFrame) -> dict[str, float]:
    """Share of the first layer's dimensions that a perturbation moves, mean over alphas."""
    moved = rows[rows["metric"] == "dimensions"]
    return {of: float(moved.loc[moved["of"] == of, "value"].mean()) for of in ("fgsm", "noise")}


_ACCURACY = {"factor": 100.0, "unit": "pts", "digits": 1}

CLAIMS = (
    Claim(
        id="C1",
        title="The knob works both ways",
        sentence="Mean class selectivity on the test set rises with alpha.",
        source="selectivity against alpha",
        estimand=Trend("si", over="alpha", arm="penalty", levels=ALPHAS),
        direction="greater",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C2",
        title="Less of it, more accurate",
        sentence="With the short training, the negative alpha that is best on a validation set gives a higher test "
        "accuracy than alpha = 0.",
        source="abstract",
        paper_value="1–2 pts",
        estimand=PerSeed(
            chosen_on_validation, "test accuracy: alpha < 0 chosen on the validation set, minus alpha = 0", ("penalty",)
        ),
        direction="greater",
        margin=0.01,
        **cast(Any, _ACCURACY),
    ),
    Claim(
        id="C2b",
        title="also after longer training",
        sentence="With the longer training too, alpha = -2 gives a higher test accuracy than alpha = 0.",
        source="abstract",
        paper_value="1–2 pts",
        estimand=Difference(
            "test_accuracy", "long", "long", treatment_where={"alpha": -2.0}, control_where={"alpha": 0.0}
        ),
        direction="greater",
        margin=0.01,
        **cast(Any, _ACCURACY),
    ),
    Claim(
        id="C3",
        title="It can fall 2.5-fold",
        sentence="At alpha = -5 the mean class selectivity is at most 1/2.5 of what it is at alpha = 0.",
        source="abstract",
        paper_value="2.5 times",
        estimand=PerSeed(selectivity_factor, "SI at alpha = 0 over SI at alpha = -5", ("penalty",)),
        direction="at_least",
        null=2.5,
        unit="x",
    ),
    Claim(
        id="C3b",
        title="at no cost in accuracy",
        sentence="At alpha = -5 the test accuracy is at most 1 point below that at alpha = 0.",
        source="abstract",
        paper_value="no loss",
        estimand=Difference(
            "test_accuracy", "penalty", "penalty", treatment_where={"alpha": -5.0}, control_where={"alpha": 0.0}
        ),
        direction="at_least",
        null=-0.01,
        **cast(Any, _ACCURACY),
    ),
    Claim(
        id="C4",
        title="Hardly any costs 2 pts",
        sentence="With an alpha so negative that hardly any selectivity is left (after a warm-up), the test accuracy "
        "is at most 3 points below that at alpha = 0.",
        source="abstract",
        paper_value="about -2 pts",
        estimand=Difference("test_accuracy", "strong", "penalty", control_where={"alpha": 0.0}),
        direction="at_least",
        null=-0.03,
        from_scale=Scale.FULL,
        **cast(Any, _ACCURACY),
    ),
    Claim(
        id="C5",
        title="More selectivity harms",
        sentence="At alpha = +3 the test accuracy is lower than at alpha = 0.",
        source="accuracy against alpha",
        estimand=Difference(
            "test_accuracy", "penalty", "penalty", treatment_where={"alpha": 3.0}, control_where={"alpha": 0.0}
        ),
        direction="less",
        margin=0.01,
        **cast(Any, _ACCURACY),
    ),
    Claim(
        id="C5b",
        title="even a little more",
        sentence="At alpha = +1 the test accuracy is lower than at alpha = 0.",
        source="accuracy against alpha",
        estimand=Difference(
            "test_accuracy", "penalty", "penalty", treatment_where={"alpha": 1.0}, control_where={"alpha": 0.0}
        ),
        direction="less",
        margin=0.01,
        **cast(Any, _ACCURACY),
    ),
    Claim(
        id="C6",
        title="Up costs more than down",
        sentence="A unit of selectivity more costs more accuracy than a unit less.",
        source="accuracy against alpha",
        estimand=PerSeed(cost_by_direction, "accuracy lost per unit of SI, upwards minus downwards", ("penalty",)),
        direction="greater",
        margin=0.1,
    ),
    Claim(
        id="C7",
        title="Not hidden by a rotation: -",
        sentence="By CCA, which does not see affine maps, a network trained with alpha = -5 lies farther from a plain "
        "one of another seed than two plain ones lie from each other.",
        source="off-axis analysis, CCA",
        estimand=Level("cca_ratio", "penalty", where={"alpha": -5.0}),
        direction="greater",
        null=1.0,
        margin=0.05,
        unit="x",
    ),
    Claim(
        id="C7b",
        title="Not hidden by a rotation: +",
        sentence="The same holds of a network trained with alpha = +3.",
        source="off-axis analysis, CCA",
        estimand=Level("cca_ratio", "penalty", where={"alpha": 3.0}),
        direction="greater",
        null=1.0,
        margin=0.05,
        unit="x",
    ),
    Claim(
        id="C8",
        title="The off-axis bound follows",
        sentence="The selectivity of a middle layer's most selective rotation, on samples it was not fitted to, rises "
        "with alpha.",
        source="off-axis analysis, upper bound",
        estimand=Trend("si_bound", over="alpha", arm="penalty", levels=ALPHAS),
        direction="greater",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C9",
        title="Dead units do not explain it",
        sentence="With leaky ReLUs, which cannot die, alpha = +3 lowers the test accuracy too.",
        source="controls, leaky ReLU",
        estimand=Difference(
            "test_accuracy", "leaky", "leaky", treatment_where={"alpha": 3.0}, control_where={"alpha": 0.0}
        ),
        direction="less",
        margin=0.01,
        **cast(Any, _ACCURACY),
    ),
    Claim(
        id="C10",
        title="Selectivity grows with depth",
        sentence="In the plain network mean class selectivity rises from layer to layer.",
        source="layerwise profiles",
        estimand=PerSeed(by_depth, "mean SI of each layer, alpha = 0", ("penalty",)),
        direction="greater",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C11",
        title="Noise: less is more robust",
        sentence="Accuracy under Gaussian noise falls as alpha rises.",
        source="follow-up, arXiv 2010.07693",
        estimand=Trend("noise_accuracy", over="alpha", arm="penalty", levels=ALPHAS),
        direction="less",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C11b",
        title="Attacks: more resists",
        sentence="Accuracy under an attack by one signed gradient step rises as alpha rises.",
        source="follow-up, arXiv 2010.07693",
        estimand=Trend("fgsm_accuracy", over="alpha", arm="penalty", levels=ALPHAS),
        direction="greater",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C12",
        title="Selective, fewer dimensions",
        sentence="Over alphas, the first layer uses the fewer dimensions (components for 95 % of the variance), the "
        "more selective it is.",
        source="follow-up, arXiv 2010.07693",
        estimand=PerSeed(early_dimensions, "Spearman correlation of SI and dimensions, first layer", ("penalty",)),
        direction="less",
        margin=0.3,
        unit="rho",
    ),
    Claim(
        id="C12b",
        title="Attacks move more axes",
        sentence="What an attack changes in the first layer fills more dimensions than what Gaussian noise changes.",
        source="follow-up, arXiv 2010.07693",
        estimand=PerSeed(
            hostile_and_noisy_dimensions, "share of dimensions moved: attack minus noise, first layer", ("penalty",)
        ),
        direction="greater",
        margin=0.05,
    ),
    Claim(
        id="C13",
        title="Early suppression hurts more",
        sentence="Discouraging selectivity in the first third of training only gives a lower accuracy than doing so in "
        "the other two thirds only.",
        source="follow-up of 2023",
        estimand=Difference("test_accuracy", "early", "late"),
        direction="less",
        margin=0.005,
        from_scale=Scale.FULL,
        **cast(Any, _ACCURACY),
    ),
    Claim(
        id="C14",
        title="True beats shuffled labels",
        sentence="At alpha = -2 the penalty gives a higher test accuracy with the true labels than with labels that "
        "are shuffled in each batch.",
        source="our control",
        estimand=Difference("test_accuracy", "penalty", "shuffled", where={"alpha": -2.0}),
        direction="greater",
        margin=0.005,
        **cast(Any, _ACCURACY),
    ),
    Claim(
        id="C14b",
        title="and lowers it by meaning",
        sentence="At alpha = -2 mean class selectivity is lower with the true than with shuffled labels.",
        source="our control",
        estimand=Difference("si", "penalty", "shuffled", where={"alpha": -2.0}),
        direction="less",
        margin=0.05,
    ),
    Claim(
        id="C14c",
        title="and harms by meaning",
        sentence="At alpha = +3 the penalty gives a lower test accuracy with the true labels than with labels that are "
        "shuffled in each batch.",
        source="our control",
        estimand=Difference("test_accuracy", "penalty", "shuffled", where={"alpha": 3.0}),
        direction="less",
        margin=0.005,
        **cast(Any, _ACCURACY),
    ),
)

_COMMON: Mapping[str, Any] = {"alphas": "-5,-2,0,1,3", "shuffled": "-2,3", "long": "-2,0", "leaky": "0,3", "lr": 0.1}
_QUICK: Mapping[str, Any] = {
    **_COMMON,
    "train": 4096,
    "val": 1000,
    "test": 2500,
    "pool": True,
    "widths": "16,32,32,64",
    "batch": 128,
    "epochs": 3.0,
    "long_epochs": 8.0,
    "search": 50,
}
_SMOKE: Mapping[str, Any] = {
    **_QUICK,
    "train": 256,
    "val": 100,
    "test": 300,
    "widths": "4,8,8,8",
    "batch": 64,
    "epochs": 1.0,
    "long_epochs": 2.0,
    "search": 2,
}
_FULL: Mapping[str, Any] = {
    **_QUICK,
    "alphas": "-5,-2,-1,-0.5,0,0.5,1,2,3",
    "shuffled": "-5,-2,-1,1,3",
    "train": 20_000,
    "val": 5000,
    "test": 10_000,
    "pool": False,
    "widths": "32,64,64,128",
    "epochs": 12.0,
    "long_epochs": 30.0,
    "search": 200,
    "strong": -20.0,
}
_PAPER: Mapping[str, Any] = {**_FULL, "train": 50_000, "epochs": 60.0, "long_epochs": 120.0}
_SETTINGS = {Scale.SMOKE: _SMOKE, Scale.QUICK: _QUICK, Scale.FULL: _FULL, Scale.PAPER: _PAPER}
SEEDS = {Scale.SMOKE: 2, Scale.QUICK: 5, Scale.FULL: 6, Scale.PAPER: 20}
_USER_LR = 0.05  # networks that we do not know; gradients are clipped besides


def runs(scale: Scale, workload: Workload | None, seeds: range | None = None) -> Iterator[Run]:
    """Two runs a seed: one trains a network for each alpha, with controls, the other longer and with leaky ReLUs.

    On a user's workload their model is trained (SGD, momentum 0.9, peak rate 0.05, gradient norms clipped), on at most
    as many samples as the scale has, and the units of its activation modules are measured. Without a model a
    convolutional network is taken for images, else an MLP. Claims on leaky ReLUs need ReLUs.
    """
    s = dict(_SETTINGS[scale])
    if workload is not None:
        s = _on_workload(s, workload)
    for seed in seeds or range(SEEDS[scale]):
        for arm in ("sweep", "rest"):
            yield Run(SLUG, arm, seed, s)


def _on_workload(s: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """Sizes that the user's data allow; refuses data and models that the study has no use for."""
    from .experiments import check_model

    size, tests = len(workload.train), len(workload.test)  # type: ignore[arg-type]
    if workload.num_classes < 2 or size < 40 or tests < 20:
        raise InvalidInput(
            f"the study needs 2 classes, 40 training and 20 test samples at least; {workload.name} has "
            f"{workload.num_classes}, {size} and {tests}."
        )
    check_model(workload)
    val = min(s["val"], size // 5)
    own = {"data": "workload", "pool": False, "train": min(s["train"], size - val), "val": val}
    own["test"] = min(s["test"], tests)
    if workload.model is not None:
        own |= {"widths": "", "lr": _USER_LR}
    own["batch"] = max(2, min(s["batch"], int(own["train"]) // 8))
    # Small sets get as many updates as the study's own data give.
    updates = s["epochs"] * s["train"] / s["batch"]
    lengthen = max(1.0, updates * own["batch"] / own["train"] / s["epochs"])
    own |= {"epochs": round(s["epochs"] * lengthen, 2), "long_epochs": round(s["long_epochs"] * lengthen, 2)}
    return {**s, **own}


def measure(run: Run, workload: Workload | None) -> Measurements:
    """Train the run's networks and measure them."""
    from .experiments import rest, sweep

    return sweep(run, workload) if run.arm == "sweep" else rest(run, workload)


def arms_of(table: pd.DataFrame, arm: str) -> list[float]:
    """Alphas that an arm was trained with, in order."""
    return sorted(np.unique(table.loc[(table["arm"] == arm) & (table["metric"] == "si"), "alpha"]).tolist())
