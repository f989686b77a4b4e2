"""The claims, written before the runs, and the functions that compute what they are about."""

from __future__ import annotations

from functools import partial

import pandas as pd

from mlcollage.lab import Claim, Difference, Level, PerSeed, Scale, Trend, one_value

ALPHAS = (-5.0, -2.0, 0.0, 1.0, 3.0)
"""The grid of the scale quick, which every scale contains: claims name its values."""


def value(rows: pd.DataFrame, metric: str, alpha: float, arm: str = "penalty") -> float:
    """One number of one seed."""
    return one_value(rows, metric, arm, alpha=alpha)


def chosen_on_validation(rows: pd.DataFrame) -> dict[str, float]:
    """Test accuracy of the negative alpha of the best validation accuracy, and of alpha = 0."""
    val = rows[(rows["metric"] == "val_accuracy") & (rows["arm"] == "penalty") & (rows["alpha"] < 0)]
    # The choice is made on validation accuracy, so that the test accuracy is not that of a maximum.
    best = float(val["alpha"].to_numpy()[val["value"].to_numpy().argmax()])
    return {"chosen alpha < 0": value(rows, "test_accuracy", best), "alpha = 0": value(rows, "test_accuracy", 0.0)}


def selectivity_factor(rows: pd.DataFrame) -> float:
    """How many times smaller the mean index is at alpha = -5 than at 0."""
    return value(rows, "si", 0.0) / max(value(rows, "si", -5.0), 1e-9)


def cost_by_direction(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy lost for each unit of selectivity, upwards and downwards: least-squares slopes through alpha = 0."""
    table = rows[(rows["arm"] == "penalty") & rows["metric"].isin(("si", "test_accuracy"))]
    table = table.pivot(index="alpha", columns="metric", values="value")
    moved = table["si"] - table["si"][0.0]  # by alpha
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


def _over_alpha(metric: str) -> Trend:
    return Trend(metric, over="alpha", arm="penalty", levels=ALPHAS)


def _against_0(alpha: float, arm: str = "penalty") -> Difference:
    """Test accuracy at alpha minus that at 0."""
    return Difference("test_accuracy", arm, arm, treatment_where={"alpha": alpha}, control_where={"alpha": 0.0})


_accuracy = partial(Claim, factor=100.0, unit="pts", digits=1)
_trend = partial(Claim, margin=0.5, test="trend", unit="rho")

CLAIMS = (
    _trend(
        id="C1",
        title="A penalty turns class selectivity up and down",
        headline=True,
        sentence="Mean class selectivity on the test set rises with alpha.",
        source="selectivity against alpha",
        estimand=_over_alpha("si"),
        direction="greater",
    ),
    _accuracy(
        id="C2",
        title="Less class selectivity gives higher test accuracy",
        headline=True,
        sentence="With the short training, the negative alpha that is best on a validation set gives a higher test "
        "accuracy than alpha = 0.",
        source="abstract",
        paper_value="1–2 pts",
        estimand=PerSeed(
            chosen_on_validation, "test accuracy: alpha < 0 chosen on the validation set, minus alpha = 0", ("penalty",)
        ),
        direction="greater",
        margin=0.01,
    ),
    _accuracy(
        id="C2b",
        title="Less class selectivity helps after long training too",
        sentence="With the longer training too, alpha = -2 gives a higher test accuracy than alpha = 0.",
        source="abstract",
        paper_value="1–2 pts",
        estimand=_against_0(-2.0, "long"),
        direction="greater",
        margin=0.01,
    ),
    Claim(
        id="C3",
        title="Class selectivity can be cut to two fifths",
        sentence="At alpha = -5 the mean class selectivity is at most 1/2.5 of what it is at alpha = 0.",
        source="abstract",
        paper_value="2.5 times",
        estimand=PerSeed(selectivity_factor, "SI at alpha = 0 over SI at alpha = -5", ("penalty",)),
        direction="at_least",
        null=2.5,
        unit="×",
    ),
    _accuracy(
        id="C3b",
        title="Strongly reduced class selectivity costs no accuracy",
        headline=True,
        sentence="At alpha = -5 the test accuracy is at most 1 point below that at alpha = 0.",
        source="abstract",
        paper_value="no loss",
        estimand=_against_0(-5.0),
        direction="at_least",
        null=-0.01,
    ),
    _accuracy(
        id="C4",
        title="Nearly no class selectivity costs 3 points at most",
        sentence="With an alpha so negative that hardly any selectivity is left (after a warm-up), the test accuracy "
        "is at most 3 points below that at alpha = 0.",
        source="abstract",
        paper_value="about -2 pts",
        estimand=Difference("test_accuracy", "strong", "penalty", control_where={"alpha": 0.0}),
        direction="at_least",
        null=-0.03,
        from_scale=Scale.FULL,
    ),
    _accuracy(
        id="C5",
        title="More class selectivity lowers test accuracy",
        headline=True,
        sentence="At alpha = +3 the test accuracy is lower than at alpha = 0.",
        source="accuracy against alpha",
        estimand=_against_0(3.0),
        direction="less",
        margin=0.01,
        says={
            "supported": "Promoting class selectivity costs {effect} of accuracy",
            "contradicted": "Promoting class selectivity does no harm here ({effect})",
            "inconclusive": "Whether promoting class selectivity costs accuracy is open ({effect})",
        },
    ),
    _accuracy(
        id="C5b",
        title="Even slightly more class selectivity lowers accuracy",
        sentence="At alpha = +1 the test accuracy is lower than at alpha = 0.",
        source="accuracy against alpha",
        estimand=_against_0(1.0),
        direction="less",
        margin=0.01,
    ),
    Claim(
        id="C6",
        title="Raising class selectivity costs more than lowering it",
        sentence="A unit of selectivity more costs more accuracy than a unit less.",
        source="accuracy against alpha",
        estimand=PerSeed(cost_by_direction, "accuracy lost per unit of SI, upwards minus downwards", ("penalty",)),
        direction="greater",
        margin=0.1,
    ),
    Claim(
        id="C7",
        title="Lowering class selectivity does more than rotate layers",
        headline=True,
        sentence="By CCA, which does not see affine maps, a network trained with alpha = -5 lies farther from a plain "
        "one of another seed than two plain ones lie from each other.",
        source="off-axis analysis, CCA",
        estimand=Level("cca_ratio", "penalty", where={"alpha": -5.0}),
        direction="greater",
        null=1.0,
        margin=0.05,
        unit="×",
        says={
            "supported": "Less selective networks differ by more than an affine map: {effect}",
            "contradicted": "Less selective networks differ by no more than an affine map: {effect}",
            "inconclusive": "Whether more than an affine map changes is open: {effect}",
        },
    ),
    Claim(
        id="C7b",
        title="Raising class selectivity does more than rotate layers",
        sentence="The same holds of a network trained with alpha = +3.",
        source="off-axis analysis, CCA",
        estimand=Level("cca_ratio", "penalty", where={"alpha": 3.0}),
        direction="greater",
        null=1.0,
        margin=0.05,
        unit="×",
    ),
    _trend(
        id="C8",
        title="A layer's most selective rotation follows the penalty",
        sentence="The selectivity of a middle layer's most selective rotation, on samples it was not fitted to, rises "
        "with alpha.",
        source="off-axis analysis, upper bound",
        estimand=_over_alpha("si_bound"),
        direction="greater",
        says={
            "supported": "No rotation hides it: the best one follows α, correlation {effect}",
            "contradicted": "The most selective rotation does not follow α: correlation {effect}",
            "inconclusive": "Whether selectivity hides off the axes is open: correlation {effect}",
        },
    ),
    _accuracy(
        id="C9",
        title="More class selectivity harms even if units cannot die",
        sentence="With leaky ReLUs, which cannot die, alpha = +3 lowers the test accuracy too.",
        source="controls, leaky ReLU",
        estimand=_against_0(3.0, "leaky"),
        direction="less",
        margin=0.01,
    ),
    _trend(
        id="C10",
        title="Class selectivity grows with depth",
        sentence="In the plain network mean class selectivity rises from layer to layer.",
        source="layerwise profiles",
        estimand=PerSeed(by_depth, "mean SI of each layer, alpha = 0", ("penalty",)),
        direction="greater",
    ),
    _trend(
        id="C11",
        title="Less selective networks withstand noise better",
        sentence="Accuracy under Gaussian noise falls as alpha rises.",
        source="follow-up, arXiv 2010.07693",
        estimand=_over_alpha("noise_accuracy"),
        direction="less",
    ),
    _trend(
        id="C11b",
        title="More selective networks withstand attacks better",
        sentence="Accuracy under an attack by one signed gradient step rises as alpha rises.",
        source="follow-up, arXiv 2010.07693",
        estimand=_over_alpha("fgsm_accuracy"),
        direction="greater",
    ),
    Claim(
        id="C12",
        title="More selective layers use fewer dimensions",
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
        title="Attacks disturb more dimensions than noise does",
        sentence="What an attack changes in the first layer fills more dimensions than what Gaussian noise changes.",
        source="follow-up, arXiv 2010.07693",
        estimand=PerSeed(
            hostile_and_noisy_dimensions, "share of dimensions moved: attack minus noise, first layer", ("penalty",)
        ),
        direction="greater",
        margin=0.05,
    ),
    _accuracy(
        id="C13",
        title="Suppressing selectivity early hurts more than late",
        sentence="Discouraging selectivity in the first third of training only gives a lower accuracy than doing so in "
        "the other two thirds only.",
        source="follow-up of 2023",
        estimand=Difference("test_accuracy", "early", "late"),
        direction="less",
        margin=0.005,
        from_scale=Scale.FULL,
    ),
    _accuracy(
        id="C14",
        title="The penalty helps more with true than shuffled labels",
        sentence="At alpha = -2 the penalty gives a higher test accuracy with the true labels than with labels that "
        "are shuffled in each batch.",
        source="our control",
        estimand=Difference("test_accuracy", "penalty", "shuffled", where={"alpha": -2.0}),
        direction="greater",
        margin=0.005,
    ),
    Claim(
        id="C14b",
        title="True labels lower selectivity more than shuffled ones",
        sentence="At alpha = -2 mean class selectivity is lower with the true than with shuffled labels.",
        source="our control",
        estimand=Difference("si", "penalty", "shuffled", where={"alpha": -2.0}),
        direction="less",
        margin=0.05,
    ),
    _accuracy(
        id="C14c",
        title="Raising selectivity harms more with true labels",
        sentence="At alpha = +3 the penalty gives a lower test accuracy with the true labels than with labels that are "
        "shuffled in each batch.",
        source="our control",
        estimand=Difference("test_accuracy", "penalty", "shuffled", where={"alpha": 3.0}),
        direction="less",
        margin=0.005,
    ),
)
