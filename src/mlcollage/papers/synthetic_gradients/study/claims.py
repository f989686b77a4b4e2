"""The claims, written before the runs, and the functions that compute what they are about."""

from __future__ import annotations

from functools import partial

import pandas as pd

from mlcollage.lab import Claim, Difference, Level, PerSeed, Trend

DEPTHS = (2, 4, 8)
"""Of the scale quick; claims name them."""
EXACT = 1e-12


def of(rows: pd.DataFrame, metric: str, arm: str) -> pd.DataFrame:
    """The rows of one metric and arm."""
    found = rows[(rows["metric"] == metric) & (rows["arm"] == arm)]
    if found.empty:
        raise LookupError(f"no {metric} of {arm}")
    return found


def mean(rows: pd.DataFrame, metric: str, arm: str) -> float:
    """Mean over layers or cuts."""
    return float(of(rows, metric, arm)["value"].mean())


def largest_gap(rows: pd.DataFrame) -> float:
    """The larger gap of both dimensions, squared loss."""
    return float(of(rows, "gap", "mse")["value"].max())


def representations_apart(rows: pd.DataFrame) -> dict[str, float]:
    """Distance of dissimilarity matrices from backpropagation's: synthetic gradients, and another seed."""
    return {arm: 1 - mean(rows, "similarity_to_bp", arm) for arm in ("cdni", "other")}


def spread_apart(rows: pd.DataFrame) -> dict[str, float]:
    """How much the similarity of first and last layer differs from backpropagation's, in either direction."""
    bp = mean(rows, "first_to_last", "bp")
    return {arm: abs(mean(rows, "first_to_last", arm) - bp) for arm in ("cdni", "other")}


def probe_gain(rows: pd.DataFrame, arm: str) -> float:
    """Accuracy of the last layer's probe minus the first's."""
    layers = of(rows, "probe", arm).sort_values("layer")["value"].to_numpy()
    return float(layers[-1] - layers[0])


def probes_apart(rows: pd.DataFrame) -> dict[str, float]:
    """How much the probes' gain with depth differs from backpropagation's, in either direction."""
    bp = probe_gain(rows, "bp")
    return {arm: abs(probe_gain(rows, arm) - bp) for arm in ("cdni", "other")}


def worst_error(rows: pd.DataFrame) -> float:
    """Relative squared error of synthetic gradients, mean over cuts."""
    return mean(rows, "relative_error", "cdni")


def mean_cosine(rows: pd.DataFrame) -> float:
    """Cosine of synthetic and true gradients, mean over cuts."""
    return mean(rows, "cosine", "cdni")


_points = partial(Claim, factor=100.0, unit="pts", digits=1)
_more, _more_points = (partial(kind, direction="greater") for kind in (Claim, _points))

CLAIMS = (
    Claim(
        id="C1",
        title="A linear network reaches the optimum without backprop",
        headline=True,
        sentence="With squared loss and a linear synthesizer that sees the target, the loss of a linear network ends "
        "within 1e-12 of the global optimum, in 2 and in 100 dimensions.",
        source="theorem 1",
        estimand=PerSeed(largest_gap, "loss minus the optimum, the larger of 2 and 100 dimensions", ("mse",)),
        direction="at_most",
        null=EXACT,
        test="exact",
    ),
    Claim(
        id="C2",
        title="So does a linear network of ten layers",
        sentence="The same holds of ten linear layers in 2 dimensions with one synthesizer behind the fifth.",
        source="theorem 2",
        estimand=Level("gap", "deep"),
        direction="at_most",
        null=EXACT,
        test="exact",
    ),
    _more(
        id="C3",
        title="With log loss a linear synthesizer leaves a gap",
        sentence="With the log loss the gap to the optimum after the same training is larger in 100 than in 2 "
        "dimensions.",
        source="section 3",
        estimand=Difference("gap", "log", "log", treatment_where={"dim": 100}, control_where={"dim": 2}),
        margin=0.01,
        digits=3,
    ),
    Claim(
        id="C4",
        title="A synthesizer that sees no target learns nothing",
        sentence="Without the target as its input the synthesizer at the output leaves a gap of at least 0.05 in 100 "
        "dimensions.",
        source="section 3",
        estimand=Level("gap", "blind", where={"dim": 100}),
        direction="at_least",
        null=0.05,
    ),
    _more_points(
        id="C5",
        title="Synthetic gradients train the layers below them",
        headline=True,
        sentence="Four hidden layers that are all cut, with synthesizers that see the label, classify better than if "
        "only the last layer is trained.",
        source="feed-forward experiments",
        estimand=Difference("test_accuracy", "cdni", "none"),
        margin=0.05,
        says={
            "supported": "Cut behind every layer, the network still learns: {0}, against {1} with untrained layers",
            "contradicted": "Synthetic gradients add little to untrained layers: {0} against {1}",
            "inconclusive": "Synthetic gradients reach {0}, untrained layers {1}: not settled",
        },
    ),
    _points(
        id="C5b",
        title="They come within 4 points of backpropagation",
        headline=True,
        sentence="With labels, the test accuracy of the network that is cut everywhere is at most 4 points below that "
        "of backpropagation, each at its best learning rate.",
        source="feed-forward experiments",
        estimand=Difference("test_accuracy", "cdni", "bp"),
        direction="at_least",
        null=-0.04,
    ),
    _more_points(
        id="C5c",
        title="A synthesizer that sees the label is better",
        sentence="Synthesizers that see the label give a higher accuracy than those that do not.",
        source="feed-forward experiments",
        estimand=Difference("test_accuracy", "cdni", "dni"),
        margin=0.03,
    ),
    _more(
        id="C6",
        title="Layers represent otherwise than after backprop",
        headline=True,
        sentence="The dissimilarity matrices of a network's layers differ more between synthetic gradients and "
        "backprop of one initialization than between two networks trained by backprop from different seeds.",
        source="representations",
        says={
            "supported": "Layers represent otherwise than another seed's do",
            "contradicted": "Layers represent as another seed's do",
            "inconclusive": "Whether layers represent otherwise is open",
        },
        estimand=PerSeed(representations_apart, "1 - correlation with backprop's matrices: SG minus another seed"),
        margin=0.02,
        digits=3,
    ),
    _more(
        id="C6b",
        title="Processing is spread differently over the layers",
        sentence="The similarity of the first and the last layer's matrices differs from backprop's, in whichever "
        "direction, by more than two seeds of backprop differ.",
        source="representations",
        estimand=PerSeed(spread_apart, "difference in first-to-last similarity: SG minus another seed"),
        margin=0.03,
        digits=3,
    ),
    _more_points(
        id="C6c",
        title="What a probe gains with depth is different",
        sentence="The gain of a linear probe from the first to the last layer differs from backprop's, in whichever "
        "direction, by more than two seeds of backprop differ.",
        source="representations",
        estimand=PerSeed(probes_apart, "difference in the probes' gain: SG minus another seed"),
        margin=0.01,
    ),
    Claim(
        id="C7",
        title="The synthetic gradient is a poor copy of the true one",
        sentence="At the end of training the squared error of synthetic gradients, mean over cuts, is at least a tenth "
        "of the squared true gradient.",
        source="gradient alignment",
        estimand=PerSeed(worst_error, "relative squared error, mean over cuts", ("cdni",)),
        direction="at_least",
        null=0.1,
    ),
    Claim(
        id="C7b",
        title="It points in the direction of the true gradient",
        sentence="The cosine of synthetic and true gradients, mean over samples and cuts, is at least 0.2.",
        source="gradient alignment",
        estimand=PerSeed(mean_cosine, "cosine, mean over cuts", ("cdni",)),
        direction="at_least",
        null=0.2,
        bounds=(-1.0, 1.0),
    ),
    _more(
        id="C8",
        title="More cuts in a deeper network learn more slowly",
        sentence="With a cut behind every layer, what is lacking to backpropagation's accuracy after equal training "
        "grows with the number of layers.",
        source="depth experiments",
        estimand=Trend("shortfall", over="depth", arm="cdni", levels=DEPTHS),
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    _more_points(
        id="C8b",
        title="One cut costs less than a cut behind every layer",
        sentence="Of eight hidden layers with one cut in the middle the accuracy is higher than with a cut behind "
        "each.",
        source="depth experiments",
        estimand=Difference("depth_accuracy", "one_cut", "cdni", where={"depth": DEPTHS[-1]}),
        margin=0.02,
    ),
    _more_points(
        id="C9",
        title="Synthetic gradients carry credit beyond the chunk",
        headline=True,
        sentence="A recurrent network trained in chunks of 2 steps recalls a bit over 13 steps sooner with synthetic "
        "gradients than without: its accuracy, mean over training, is higher.",
        source="recurrent experiments",
        estimand=Difference("recall", "dni", "bptt"),
        margin=0.05,
    ),
    _more_points(
        id="C9b",
        title="A tenth of the synthetic gradient carries credit too",
        sentence="The same holds if the injected gradient is scaled by 0.1.",
        source="recurrent experiments",
        estimand=Difference("recall", "dni_tenth", "bptt"),
        margin=0.05,
    ),
    _points(
        id="C10",
        title="Layers may be updated at random times",
        sentence="If each part is updated in a random quarter of the steps, accuracy after equally many updates is at "
        "most 3 points lower.",
        source="random update times",
        estimand=Difference(
            "times_accuracy", "cdni", "cdni", treatment_where={"probability": 0.25}, control_where={"probability": 1.0}
        ),
        direction="at_least",
        null=-0.03,
    ),
    Claim(
        id="C11",
        title="Two processes do at least 1.6 times the steps of one",
        headline=True,
        sentence="Two processes with equal stages do at least 1.6 times as many steps per second decoupled as when one "
        "batch at a time goes up and down.",
        source="argument for decoupling",
        estimand=Level("speedup", "dni"),
        direction="at_least",
        null=1.6,
        unit="×",
        says={
            "supported": "Nobody waits: two processes do {0} the steps",
            "contradicted": "Two processes do only {0} the steps",
            "inconclusive": "Two processes do {0} the steps: not settled",
        },
    ),
    _more_points(
        id="C12",
        title="The slope of a predicted loss is a worse teacher",
        sentence="Critics, which predict the loss, give a lower accuracy than synthesizers, which predict its "
        "gradient.",
        source="discussion",
        estimand=Difference("test_accuracy", "cdni", "critic"),
        margin=0.03,
    ),
)
