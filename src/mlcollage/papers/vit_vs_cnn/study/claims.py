"""The claims, written before the runs with the study's seeds, and the functions that compute what they are about."""

from __future__ import annotations

from functools import partial
from math import log

import pandas as pd

from mlcollage.lab import Claim, Difference, Level, PerSeed, Scale


def _by_step(rows: pd.DataFrame, metric: str, arm: str) -> list[float]:
    found = rows[(rows["metric"] == metric) & (rows["arm"] == arm)].sort_values("step")["value"]
    if len(found) < 3:
        raise LookupError(f"{len(found)} steps of {metric} of {arm}; three are needed")
    return [float(v) for v in found]


def early_field(rows: pd.DataFrame) -> dict[str, float]:
    """Share of the image that the first block's middle unit answers to."""
    return {arm: _by_step(rows, "field", arm)[0] for arm in ("vit", "cnn")}


def field_growth(rows: pd.DataFrame) -> float:
    """What the residual network's field gains from its first block to its last."""
    areas = _by_step(rows, "field", "cnn")
    return areas[-1] - areas[0]


def settling(rows: pd.DataFrame) -> dict[str, float]:
    """Similarity of a network of few images to one of all: mean of the lower third of blocks, and of the upper."""
    found = _by_step(rows, "settled", "few")
    third = max(1, len(found) // 3)
    return {"lower third": sum(found[:third]) / third, "upper third": sum(found[-third:]) / third}


def head_spread(rows: pd.DataFrame) -> dict[str, float]:
    """Deviation of attention distances between heads, mean of the first two blocks and of the last two."""
    found = _by_step(rows, "head_sd", "vit")
    return {"first two blocks": sum(found[:2]) / 2, "last two blocks": sum(found[-2:]) / 2}


def class_token_phase(rows: pd.DataFrame) -> float:
    """Logarithm of the ratio of the class token over that of patches, first half of the sums minus second half."""
    found = _by_step(rows, "class_over_patch", "vit")
    half = len(found) // 2
    return sum(found[:half]) / half - sum(found[half:]) / (len(found) - half)


_difference = partial(Claim, unit="", digits=2)
_accuracy = partial(Claim, factor=100.0, unit="pts", digits=1)

CLAIMS = (
    Claim(
        id="C1",
        title="A ViT is more uniform from bottom to top than a ResNet",
        headline=True,
        sentence="The mean CKA of the first quarter of layers with the last quarter is higher in the vision "
        "transformer than in the residual network.",
        source="Fig. 1",
        estimand=Difference("uniformity", "vit", "cnn"),
        direction="greater",
        margin=0.1,
        says={
            "supported": "The ViT's first and last layers are alike, the ResNet's are not: uniformity {0} and {1}",
            "contradicted": "The trained ViT is no more uniform than the ResNet here: uniformity {0} and {1}",
            "inconclusive": "Whether the trained ViT is more uniform is open: uniformity {0} and {1}",
        },
    ),
    Claim(
        id="C1b",
        title="Training makes a ViT less uniform, not more",
        headline=True,
        sentence="An untrained vision transformer is more uniform than the same one after training.",
        source="our control",
        estimand=Difference("uniformity", "vit untrained", "vit"),
        direction="greater",
        margin=0.05,
        says={
            "supported": "The ViT is uniform before training, {0}, not after, {1}",
            "contradicted": "Training does not make the ViT less uniform: {0} before, {1} after",
            "inconclusive": "What training does to uniformity is open: {0} before, {1} after",
        },
    ),
    Claim(
        id="C1c",
        title="Even untrained, a ViT is more uniform than a ResNet",
        sentence="Before training, the vision transformer is more uniform than the residual network.",
        source="our control",
        estimand=Difference("uniformity", "vit untrained", "cnn untrained"),
        direction="greater",
        margin=0.1,
    ),
    Claim(
        id="C2",
        title="Half a ResNet does what a ViT does in its first layers",
        sentence="The lower half of the residual network's layers is most like layers in the lowest quarter of the "
        "vision transformer, on average over these layers.",
        source="Fig. 2",
        estimand=Level("matched_depth", "vit", where={"half": "lower"}),
        direction="at_most",
        null=0.25,
        bounds=(0.0, 1.0),
    ),
    _difference(
        id="C6",
        title="A ViT's first block sees more of the image than a ResNet's",
        sentence="The effective receptive field of the first block covers a larger share of the image in the vision "
        "transformer than in the residual network.",
        source="Fig. 6",
        estimand=PerSeed(early_field, "share of pixels above 5 % of the maximum, first block", ("vit", "cnn")),
        direction="greater",
        margin=0.1,
    ),
    _difference(
        id="C6b",
        title="A ResNet's receptive field grows from block to block",
        sentence="The effective receptive field of the residual network covers a larger share of the image in its last "
        "block than in its first.",
        source="Fig. 6",
        estimand=PerSeed(field_growth, "share of pixels above 5 % of the maximum, last minus first block", ("cnn",)),
        direction="greater",
        margin=0.3,
    ),
    Claim(
        id="C7",
        title="Skip connections carry more in a ViT than in a ResNet",
        headline=True,
        sentence="The norm of the skip over that of the branch, a geometric mean over residual sums, is higher in the "
        "vision transformer than in the residual network.",
        source="Fig. 7",
        estimand=Difference("skip_ratio", "vit", "cnn", log=True),
        direction="greater",
        margin=log(1.5),
        says={
            "supported": "The ViT's skips carry {effect} as much, beside their branches, as the ResNet's",
            "contradicted": "The ViT's skips carry no more than the ResNet's: {effect}",
            "inconclusive": "Whether the ViT's skips carry more is open: {effect}",
        },
    ),
    Claim(
        id="C9",
        title="Without one skip a ViT falls into two parts",
        headline=True,
        sentence="A vision transformer that was trained without the skips of one block in the middle has less similar "
        "layers before and after this block than one with all skips.",
        source="Fig. 8",
        estimand=Difference("across", "vit", "cut"),
        direction="greater",
        margin=0.05,
        says={
            "supported": "Cut one block's skips, and similarity across it falls from {0} to {1}",
            "contradicted": "Cutting one block's skips does not split the network: {0} and {1}",
            "inconclusive": "Whether cutting one block's skips splits the network is open: {0} and {1}",
        },
    ),
    _accuracy(
        id="C9b",
        title="Without one skip a ViT loses accuracy",
        sentence="A vision transformer that was trained without the skips of one block in the middle has a lower test "
        "accuracy.",
        source="Section 5",
        estimand=Difference("accuracy", "cut", "vit"),
        direction="less",
        margin=0.01,
    ),
    _difference(
        id="C10",
        title="Deep tokens of a ViT know where they are",
        headline=True,
        sentence="In the last block, CKA with the own patch minus that with other patches is larger for tokens of the "
        "vision transformer than for places of the residual network.",
        source="Fig. 9",
        estimand=Difference("localization", "vit", "cnn"),
        direction="greater",
        margin=0.05,
        says={
            "supported": "Last-block tokens still know their patch: localization {0}, ResNet {1}",
            "contradicted": "Last-block tokens know their patch no better than a ResNet's places: {0} and {1}",
            "inconclusive": "Whether tokens know their patch better than a ResNet's places is open: {0} and {1}",
        },
    ),
    _difference(
        id="C10b",
        title="A class token lets other tokens keep their place",
        sentence="Tokens of the last block are better localized in a vision transformer with a class token than in one "
        "that averages its tokens.",
        source="Fig. 10",
        estimand=Difference("localization", "vit", "gap"),
        direction="greater",
        margin=0.05,
    ),
    _accuracy(
        id="C11",
        title="Patch tokens know the class if they are averaged",
        sentence="Linear probes on single patch tokens of the last block are more accurate in a vision transformer "
        "that averages its tokens than in one with a class token.",
        source="Fig. 11",
        estimand=Difference("token_probe", "gap", "vit"),
        direction="greater",
        margin=0.05,
    ),
    _difference(
        id="C12",
        title="With little data, lower layers settle first",
        headline=True,
        sentence="A vision transformer that was trained on a tenth of the images is more similar to one trained on all "
        "in its lower third of blocks than in its upper third.",
        source="Fig. 12",
        estimand=PerSeed(
            settling, "CKA of each block, a tenth of the images with all: lower minus upper third", ("few",)
        ),
        direction="greater",
        margin=0.05,
    ),
    _difference(
        id="C14",
        title="An MLP-Mixer resembles a ViT more than a ResNet",
        sentence="The mean CKA of the blocks of an MLP-Mixer with those of the vision transformer is higher than with "
        "those of the residual network.",
        source="appendix",
        estimand=Difference("likeness", "vit", "cnn"),
        direction="greater",
        margin=0.05,
    ),
    Claim(
        id="C3",
        title="Low layers mix local and global heads",
        sentence="Mean attention distances differ more between the heads of the first two blocks than between those of "
        "the last two.",
        source="Fig. 3",
        estimand=PerSeed(head_spread, "standard deviation of attention distance between heads, pixels", ("vit",)),
        direction="greater",
        margin=0.5,
        unit="px",
        from_scale=Scale.FULL,
    ),
    Claim(
        id="C8",
        title="The skip carries the class token first, patches later",
        sentence="The skip ratio of the class token over that of patch tokens is higher in the first half of residual "
        "sums than in the second.",
        source="Fig. 7",
        estimand=PerSeed(class_token_phase, "log ratio of class token to patches, first minus second half", ("vit",)),
        direction="greater",
        margin=log(1.2),
        log_ratio=True,
        from_scale=Scale.FULL,
    ),
)
