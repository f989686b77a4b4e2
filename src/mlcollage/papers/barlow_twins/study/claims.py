"""The claims, written before the runs, and the functions that compute what they are about."""

from __future__ import annotations

from functools import partial

import pandas as pd

from mlcollage.lab import Claim, Difference, Level, PerSeed, Trend
from mlcollage.lab import one_value as value

WIDTHS, BATCHES, WEIGHTS, FRESH = (8, 32, 128), (32, 64, 256), (0.25, 1.0, 4.0), (4, 8, 16)
"""The grids that claims name: width, batch and factor on the weight as they are called at scale quick."""
ASYMMETRIC = ("stop_gradient", "predictor", "predictor_and_stop")


def cost_of_small_batches(rows: pd.DataFrame) -> dict[str, float]:
    """Score at the largest batch minus that at the smallest, by method."""
    return {
        name: value(rows, "score", f"{arm}_batch", batch=256) - value(rows, "score", f"{arm}_batch", batch=32)
        for name, arm in (("InfoNCE", "infonce"), ("Barlow Twins", "barlow"))
    }


def gain_of_width(rows: pd.DataFrame) -> dict[str, float]:
    """Score with embeddings of 128 columns minus that with 32, by method."""
    return {
        name: value(rows, "score", f"{arm}_width", width=128) - value(rows, "score", f"{arm}_width", width=32)
        for name, arm in (("Barlow Twins", "barlow"), ("InfoNCE", "infonce"))
    }


def symmetric_and_best_asymmetric(rows: pd.DataFrame) -> dict[str, float]:
    """Score of the symmetric network, and the best of the three asymmetric ones."""
    return {
        "symmetric": value(rows, "score", "barlow"),
        "best asymmetric": max(value(rows, "score", arm) for arm in ASYMMETRIC),
    }


def range_over_weights(rows: pd.DataFrame) -> dict[str, float]:
    """Largest minus smallest score over the weights, and what leaving the term out costs."""
    scores = [value(rows, "score", "weight", weight=w) for w in WEIGHTS]
    without = value(rows, "score", "barlow") - value(rows, "score", "invariance")
    return {"range over weights": max(scores) - min(scores), "cost of no redundancy term": without}


_points = partial(Claim, factor=100.0, unit="pts", digits=1)
_trend = partial(Claim, margin=0.5, test="trend", unit="rho")

CLAIMS = (
    _points(
        id="C1",
        title="Without the redundancy term representations are worse",
        headline=True,
        sentence="With both terms of the loss the linear probe scores higher than with the invariance term alone.",
        source="Table 5",
        paper_value="71.4 against 57.3%",
        estimand=Difference("score", "barlow", "invariance"),
        direction="greater",
        margin=0.02,
        says={
            "supported": "Without the redundancy term the probe loses {effect}",
            "contradicted": "The redundancy term makes no difference that matters here ({effect})",
            "inconclusive": "What the redundancy term adds is open ({effect})",
        },
    ),
    _points(
        id="C1b",
        title="Without the invariance term representations are worse",
        sentence="With both terms the linear probe scores higher than with the redundancy term alone.",
        source="Table 5",
        paper_value="71.4 against 0.1%",
        estimand=Difference("score", "barlow", "redundancy"),
        direction="greater",
        margin=0.02,
    ),
    _points(
        id="C1c",
        title="Training beats an encoder with random weights",
        sentence="The linear probe scores higher on the trained encoder than on the same one with random weights.",
        source="our control",
        estimand=Difference("score", "barlow", "random"),
        direction="greater",
        margin=0.02,
    ),
    _points(
        id="C2",
        title="The projector needs no batch norm",
        sentence="Without batch norms in the projector the probe scores the same, within 2 points.",
        source="Table 5",
        paper_value="71.2 against 71.4%",
        estimand=Difference("score", "plain_projector", "barlow"),
        direction="within",
        margin=0.02,
    ),
    _points(
        id="C2b",
        title="Columns are to be standardized, not rows",
        sentence="The probe scores lower if rows are standardized over features instead of columns over the batch.",
        source="Table 5",
        paper_value="69.8 against 71.4%",
        estimand=Difference("score", "feature", "barlow"),
        direction="less",
        margin=0.01,
    ),
    _points(
        id="C2c",
        title="Without any normalization representations are worse",
        sentence="Without batch norms in the projector and without standardized embeddings the probe scores lower.",
        source="Table 5",
        paper_value="53.4 against 71.4%",
        estimand=Difference("score", "neither", "barlow"),
        direction="less",
        margin=0.02,
    ),
    _points(
        id="C3",
        title="Small batches suit it better than InfoNCE",
        headline=True,
        sentence="From batches of 256 to batches of 32, with equally many samples seen and the learning rate tuned for "
        "each, Barlow Twins loses less of the probe's score than InfoNCE.",
        source="Fig. 2",
        paper_value="about 4 pts at 256 for SimCLR",
        estimand=PerSeed(
            cost_of_small_batches,
            "score lost from batch 256 to 32: InfoNCE minus Barlow Twins",
            ("infonce_batch", "barlow_batch"),
        ),
        direction="greater",
        margin=0.01,
        says={
            "supported": "With batches of 32 instead of 256, Barlow Twins fares {effect} better than InfoNCE",
            "contradicted": "With batches of 32 instead of 256, Barlow Twins fares no better than InfoNCE ({effect})",
            "inconclusive": "Whether small batches suit it better than InfoNCE is open ({effect})",
        },
    ),
    _points(
        id="C3b",
        title="Batches of 32 cost it 5 points at most",
        sentence="With batches of 32 the probe scores at most 5 points lower than with batches of 256.",
        source="Fig. 2",
        paper_value="2.0 pts from 1,024 to 128",
        estimand=Difference(
            "score", "barlow_batch", "barlow_batch", treatment_where={"batch": 32}, control_where={"batch": 256}
        ),
        direction="at_least",
        null=-0.05,
    ),
    _trend(
        id="C4",
        title="Wider embeddings keep helping",
        headline=True,
        sentence="The probe's score rises with the width of the embedding, at the same weight of the redundancy term.",
        source="Fig. 4",
        estimand=Trend("score", over="width", arm="barlow_width", levels=WIDTHS),
        direction="greater",
        says={
            "supported": "Wider embeddings keep helping",
            "contradicted": "Wider embeddings do not help here: correlation {effect}",
            "inconclusive": "Whether wider embeddings help is open: correlation {effect}",
        },
    ),
    _points(
        id="C4b",
        title="Width helps it more than a contrastive loss",
        sentence="From 32 to 128 columns the probe's score rises more for Barlow Twins than for InfoNCE.",
        source="Fig. 4",
        estimand=PerSeed(
            gain_of_width,
            "score gained from 32 to 128 columns: Barlow Twins minus InfoNCE",
            ("barlow_width", "infonce_width"),
        ),
        direction="greater",
        margin=0.01,
    ),
    _trend(
        id="C5",
        title="It depends on what the augmentation changes",
        sentence="The probe's score rises with the number of nuisance factors that differ between the views.",
        source="Fig. 3",
        estimand=Trend("score", over="fresh", arm="fresh", levels=FRESH),
        direction="greater",
    ),
    _points(
        id="C6",
        title="Nothing is gained by treating the views differently",
        headline=True,
        sentence="The symmetric network's probe scores at most 2 points below the best of three asymmetric ones (no "
        "gradient through one view, a predictor on the other, both).",
        source="Table 6",
        paper_value="71.4 against 70.5% at best",
        estimand=PerSeed(
            symmetric_and_best_asymmetric, "score: symmetric minus best asymmetric", ("barlow", *ASYMMETRIC)
        ),
        direction="at_least",
        null=-0.02,
    ),
    _points(
        id="C7",
        title="The weight of the redundancy term hardly matters",
        sentence="Over weights from a quarter to four times the chosen one the probe's score varies less than it falls "
        "without the term.",
        source="Fig. 5",
        estimand=PerSeed(
            range_over_weights,
            "range of the score over weights minus what leaving the term out costs",
            ("weight", "barlow", "invariance"),
        ),
        direction="less",
        margin=0.01,
    ),
    _points(
        id="C8",
        headline=True,
        title="It beats a contrastive loss on a linear probe",
        sentence="At the settings that suit each best the probe scores higher with Barlow Twins than with InfoNCE.",
        source="Table 1",
        paper_value="73.2 against 69.3%",
        estimand=Difference("score", "barlow", "infonce"),
        direction="greater",
        margin=0.01,
    ),
    _points(
        id="C9",
        title="With few labels it beats supervised training",
        headline=True,
        sentence="With ten labels of each class a linear probe on the frozen representation is more accurate than the "
        "same network trained on these labels from scratch.",
        source="Table 2",
        paper_value="55.0 against 25.4%",
        estimand=Difference("few_label_accuracy", "barlow", "supervised"),
        direction="greater",
        margin=0.03,
        says={
            "supported": "With ten labels a class it is {effect} better than supervised training",
            "contradicted": "With ten labels a class it does not beat supervised training ({effect})",
            "inconclusive": "Whether it beats supervised training with few labels is open ({effect})",
        },
    ),
    _points(
        id="C9b",
        title="With few labels it beats random weights",
        sentence="With ten labels of each class a linear probe is more accurate on the trained than on an untrained "
        "encoder.",
        source="our control",
        estimand=Difference("few_label_accuracy", "barlow", "random"),
        direction="greater",
        margin=0.03,
    ),
    _points(
        id="C9c",
        title="With few labels it beats a contrastive loss",
        sentence="With ten labels of each class a linear probe is more accurate on the representation of Barlow Twins "
        "than on that of InfoNCE.",
        source="Table 2",
        paper_value="55.0 against 48.3%",
        estimand=Difference("few_label_accuracy", "barlow", "infonce"),
        direction="greater",
        margin=0.02,
    ),
    Claim(
        id="E1",
        title="The Gram form gives the same loss and gradients",
        sentence="In double precision loss and gradients of the Gram form differ from those of the direct form by at "
        "most 1e-11 of the largest entry.",
        source="our identity",
        estimand=Level("identity_gap", "algebra"),
        direction="at_most",
        null=1e-11,
        test="exact",
        kind="check",
    ),
    Claim(
        id="E2",
        title="A batch of N rows has the loss that we computed",
        sentence="The smallest loss that a search over embeddings of fewer rows than columns finds is the floor in "
        "closed form, within 0.1 %.",
        source="our bound",
        estimand=Level("floor_ratio", "algebra"),
        direction="within",
        null=1.0,
        margin=1e-3,
        test="exact",
        kind="check",
        digits=4,
    ),
)
