"""The claims, written before the runs, and the functions that compute what they are about."""

from __future__ import annotations

from functools import partial

import pandas as pd

from mlcollage.lab import Claim, Difference, PerSeed, one_value


def value(rows: pd.DataFrame, metric: str, arm: str = "sweep", **keys: str) -> float:
    """One number of one seed."""
    return one_value(rows, metric, arm, **keys)


def gain(rows: pd.DataFrame, data: str, length: str) -> float:
    """Test accuracy with the light augmentation minus that without."""
    with_it, without = (value(rows, "accuracy", aug=aug, data=data, length=length) for aug in ("light", "none"))
    return with_it - without


def midway(rows: pd.DataFrame) -> dict[str, float]:
    """Augmented on the small set, and half of the way from the small to the large set without it; long runs."""
    small, large = (value(rows, "accuracy", aug="none", data=data, length="long") for data in ("small", "large"))
    return {
        "augmented": value(rows, "accuracy", aug="light", data="small", length="long"),
        "half of ten times the data": (small + large) / 2,
    }


def small_and_large(rows: pd.DataFrame) -> dict[str, float]:
    """What the light augmentation gains on the small and on the large set, in long runs."""
    return {"small data": gain(rows, "small", "long"), "large data": gain(rows, "large", "long")}


def longer(rows: pd.DataFrame) -> dict[str, float]:
    """What the light augmentation gains on the large set in long and in short runs."""
    return {"long": gain(rows, "large", "long"), "short": gain(rows, "large", "short")}


def augmented_and_regularized(rows: pd.DataFrame) -> dict[str, float]:
    """Short runs on the small set: the augmentation that is best on validation data, and the regularized one."""
    names = ("light", "medium")
    val = [value(rows, "val_accuracy", aug=name, data="small", length="short") for name in names]
    # The choice is made on validation accuracy, so that the test accuracy is not that of a maximum.
    chosen = names[val.index(max(val))]
    return {
        "augmentation": value(rows, "accuracy", aug=chosen, data="small", length="short"),
        "dropout and stochastic depth": value(rows, "accuracy", aug="regularized", data="small", length="short"),
    }


def transferred(rows: pd.DataFrame) -> dict[str, float]:
    """Mean accuracy over the downstream tasks after pre-training on the large and on the small set, long and plain."""
    kept = rows[(rows["metric"] == "transfer_accuracy") & (rows["aug"] == "none") & (rows["length"] == "long")]
    means = kept.groupby("data")["value"].mean()
    return {"large": float(means["large"]), "small": float(means["small"])}


def cheap_choice(rows: pd.DataFrame) -> float:
    """What fine-tuning every model gains over fine-tuning the upstream best one, mean over the tasks."""
    kept = rows[(rows["metric"] == "difference") & (rows["arm"] == "selection")]
    if kept.empty:
        raise LookupError("no selection")
    return float(kept["value"].mean())


def agreement(rows: pd.DataFrame) -> dict[str, float]:
    """Rank correlation of upstream validation with downstream accuracy, of clean and of seen validation rows."""
    return {kind: value(rows, "rank_agreement", "selection", validation=kind) for kind in ("clean", "leaked")}


def courses(rows: pd.DataFrame) -> dict[str, float]:
    """After the longest fine-tuning, and after the longest training from scratch."""
    found = rows[rows["metric"] == "course"]
    ends = {arm: found[found["arm"] == arm].sort_values("step") for arm in ("transfer", "scratch")}
    return {arm: float(table["value"].iloc[-1]) for arm, table in ends.items()}


_accuracy = partial(Claim, factor=100.0, unit="pts", digits=1)

CLAIMS = (
    _accuracy(
        id="C1",
        title="Augmentation and compute replace ten times the data",
        headline=True,
        sentence="A small vision transformer trained on 300 series with light augmentation for 1600 steps is at most 2 "
        "points worse than one trained on 3000 series without it for 400 steps.",
        source="Fig. 1",
        paper_value="about 10 times the data",
        estimand=Difference(
            "accuracy",
            "sweep",
            "sweep",
            treatment_where={"aug": "light", "data": "small", "length": "long"},
            control_where={"aug": "none", "data": "large", "length": "short"},
        ),
        direction="at_least",
        null=-0.02,
        says={
            "supported": "Augmentation and four times the steps on 300 series reach {0}; ten times the data {1}",
            "contradicted": "300 series with augmentation and four times the steps reach {0}; ten times the data {1}",
            "inconclusive": "300 augmented series reach {0}, ten times the data {1}: open which is better",
        },
    ),
    _accuracy(
        id="C1b",
        title="Augmentation gives half of what tenfold data gives",
        sentence="At 1600 steps light augmentation on 300 series beats the middle between 300 and 3000 series "
        "without it.",
        source="Fig. 1",
        estimand=PerSeed(midway, "accuracy on 300 augmented series minus the middle of 300 and 3000", ("sweep",)),
        direction="greater",
        margin=0.02,
    ),
    _accuracy(
        id="C2",
        title="Augmentation helps small data more than large data",
        headline=True,
        sentence="At 1600 steps the gain by light augmentation is larger on 300 series than on 3000.",
        source="Fig. 4",
        estimand=PerSeed(small_and_large, "gain by light augmentation: small minus large set, long", ("sweep",)),
        direction="greater",
        margin=0.03,
        says={
            "supported": "Light augmentation changes accuracy by {0} on 300 series and by {1} on 3000",
            "contradicted": "Light augmentation changes accuracy alike: by {0} on 300 series, by {1} on 3000",
            "inconclusive": "Augmentation changes accuracy by {0} on 300 series, by {1} on 3000: open if they differ",
        },
    ),
    _accuracy(
        id="C2b",
        title="With ten times the data at equal steps augmentation hurts",
        sentence="On 3000 series and at 1600 steps light augmentation lowers the test accuracy.",
        source="Fig. 4",
        estimand=Difference(
            "accuracy",
            "sweep",
            "sweep",
            where={"data": "large", "length": "long"},
            treatment_where={"aug": "light"},
            control_where={"aug": "none"},
        ),
        direction="less",
        margin=0.02,
    ),
    _accuracy(
        id="C2c",
        title="More compute makes augmentation of large data pay",
        sentence="On 3000 series the gain by light augmentation is larger at 1600 steps than at 400.",
        source="Fig. 4",
        estimand=PerSeed(longer, "gain by light augmentation on the large set: long minus short", ("sweep",)),
        direction="greater",
        margin=0.02,
    ),
    _accuracy(
        id="C3",
        title="Augmentation helps more than regularization",
        headline=True,
        sentence="On 300 series and at 400 steps the augmentation that is best on validation data gives a higher test "
        "accuracy than dropout and stochastic depth of 0.1.",
        source="Fig. 7",
        estimand=PerSeed(
            augmented_and_regularized, "test accuracy: chosen augmentation minus regularization, 300 series", ("sweep",)
        ),
        direction="greater",
        margin=0.02,
        says={
            "supported": "Augmentation reaches {0}, dropout with stochastic depth {1}",
            "contradicted": "On 300 series augmentation reaches {0}, no more than dropout and stochastic depth, {1}",
            "inconclusive": "On 300 series augmentation reaches {0}, regularization {1}: open which is better",
        },
    ),
    _accuracy(
        id="C4",
        title="Transfer beats training from scratch at an eighth of cost",
        headline=True,
        sentence="On a new task with 100 labeled series, 50 steps of fine-tuning the best pre-trained model give a "
        "higher test accuracy than 400 steps of training from scratch with light augmentation.",
        source="Fig. 2",
        paper_value="about 100 times cheaper",
        estimand=PerSeed(
            courses, "test accuracy: longest fine-tuning minus longest training from scratch", ("transfer", "scratch")
        ),
        direction="greater",
        margin=0.02,
        says={
            "supported": "50 steps of fine-tuning reach {0}, 400 steps from scratch {1}",
            "contradicted": "On a new task 50 steps of fine-tuning reach {0} only, 400 steps from scratch {1}",
            "inconclusive": "50 steps of fine-tuning reach {0}, 400 from scratch {1}: open which is better",
        },
    ),
    _accuracy(
        id="C5",
        title="Pre-training on more data transfers better",
        headline=True,
        sentence="Mean accuracy over three other tasks is higher after pre-training on 3000 series than on 300, at "
        "1600 steps and without augmentation.",
        source="Fig. 3",
        paper_value="+2 to +6 pts (VTAB-natural)",
        estimand=PerSeed(transferred, "accuracy over three tasks: large minus small upstream set", ("transfer",)),
        direction="greater",
        margin=0.02,
        says={
            "supported": "Pre-trained on 3000 series a model reaches {0} on other tasks, on 300 series {1}",
            "contradicted": "Pre-trained on 3000 series a model reaches {0} on other tasks, no more than on 300, {1}",
            "inconclusive": "Pre-trained on 3000 series: {0} on other tasks, on 300: {1}; open which is better",
        },
    ),
    _accuracy(
        id="C6",
        title="Fine-tuning only the upstream best costs little",
        headline=True,
        sentence="Fine-tuning all eleven models and choosing by validation gains at most 2 points over fine-tuning "
        "only the one that is best upstream, mean over three tasks.",
        source="Fig. 5",
        paper_value="most within ±0.8 pts",
        estimand=PerSeed(cheap_choice, "test accuracy: downstream choice minus upstream choice", ("selection",)),
        direction="at_most",
        null=0.02,
        says={
            "supported": "Fine-tuning all models changes accuracy by {effect} against the upstream best alone",
            "contradicted": "Fine-tuning only the upstream best costs {effect}",
            "inconclusive": "Fine-tuning only the upstream best costs {effect}: open whether that is below 2 points",
        },
    ),
    Claim(
        id="C7",
        title="Validation rows seen in pre-training mislead",
        sentence="Upstream accuracy on rows that pre-training has seen ranks the models less like their downstream "
        "accuracy than accuracy on new rows does.",
        source="Fig. 5",
        estimand=PerSeed(agreement, "Kendall's tau with downstream accuracy: new rows minus seen rows", ("selection",)),
        direction="greater",
        margin=0.1,
        unit="tau",
        bounds=(-2.0, 2.0),
    ),
    _accuracy(
        id="C8",
        title="A larger patch beats a thinner model of equal speed",
        sentence="With patches of 8 samples and width 48 a model is more accurate than with patches of 4 and width 16, "
        "which is about as fast.",
        source="Fig. 6",
        paper_value="79.6 against 78.2 % (S/32 and Ti/16, 384 px)",
        estimand=Difference("accuracy", "coarse", "thin"),
        direction="greater",
        margin=0.02,
    ),
    Claim(
        id="C8b",
        title="The two models of C8 are equally fast within 15 percent",
        sentence="Series per second of the model with large patches and of the thin one differ by less than 15 percent "
        "on this machine.",
        source="Fig. 6",
        estimand=Difference("series_per_second", "coarse", "thin", log=True),
        direction="within",
        margin=0.14,
        kind="check",
    ),
)
