"""What is claimed of the Fisher explosion, and from which numbers it is judged."""

from __future__ import annotations

from functools import partial

import pandas as pd

from mlcollage.errors import UnknownName
from mlcollage.lab import Claim, Difference, Level, PerSeed


def _value(rows: pd.DataFrame, metric: str, arm: str) -> float:
    found = rows[(rows["metric"] == metric) & (rows["arm"] == arm)]
    if found.empty:
        raise UnknownName(f"no {metric} of {arm} was measured.")
    return float(found["value"].iloc[-1])


def grid_correlation(rows: pd.DataFrame) -> float:
    """Spearman's correlation, over settings, of the early trace and the test accuracy at one train loss."""
    rows = rows[rows["arm"] == "grid"]
    columns = {
        metric: rows[rows["metric"] == metric].set_index("point")["value"]
        for metric in ("early_trace", "accuracy_at_loss")
    }
    both = pd.DataFrame(columns).dropna()
    if len(both) < 5:
        raise UnknownName(f"{len(both)} settings reached both train losses; five are needed to rank them.")
    return float(both["early_trace"].corr(both["accuracy_at_loss"], method="spearman"))


def half_closed(rows: pd.DataFrame) -> float:
    """Accuracy of the penalized small learning rate minus the middle between small and large."""
    small, large, fp = (_value(rows, "final_accuracy", arm) for arm in ("small", "large", "small_fp"))
    return fp - (small + large) / 2


def memorization(rows: pd.DataFrame) -> float:
    """What FP takes off the fitted share of wrong labels beyond what it takes off right ones, means over training."""
    wrong, right = (
        _value(rows, metric, "noise_fp") - _value(rows, metric, "noise_none") for metric in ("area_wrong", "area_right")
    )
    return wrong - right


def sampled_against_true(rows: pd.DataFrame) -> float:
    """Mean of FP and GPr minus GP, final accuracy with wrong labels."""
    fp, gpr, gp = (_value(rows, "final_accuracy", f"noise_{name}") for name in ("fp", "gpr", "gp"))
    return (fp + gpr) / 2 - gp


def _flatter(rows: pd.DataFrame, arm: str) -> float:
    """Relative difference of Tr(H): (arm - small) / (|arm| + |small|)."""
    a, b = (_value(rows, "hessian_trace", name) for name in (arm, "small"))
    return (a - b) / (abs(a) + abs(b))


def flatter_large(rows: pd.DataFrame) -> float:
    """Relative difference of Tr(H) at equal train loss: large minus small learning rate."""
    return _flatter(rows, "large")


def flatter_fp(rows: pd.DataFrame) -> float:
    """Relative difference of Tr(H) at equal train loss: with minus without FP, small learning rate."""
    return _flatter(rows, "small_fp")


_accuracy = partial(Claim, factor=100, unit="pts", digits=1)

CLAIMS = (
    Claim(
        id="C1",
        title="Small learning rates let the Fisher trace grow larger",
        sentence="Training with a small learning rate reaches a larger peak of Tr(F) than training with one ten times "
        "as large.",
        source="Fig. 1",
        estimand=Difference("peak_trace", "small", "large", log=True),
        direction="greater",
        margin=0.22,  # a quarter more
        unit="log",
        headline=True,
        says={
            "supported": "Small steps let the Fisher trace grow {effect} as large",
            "contradicted": "Small steps do not let the Fisher trace grow larger here ({effect})",
            "inconclusive": "Whether small steps let the Fisher trace grow larger is open ({effect})",
        },
    ),
    _accuracy(
        id="C1b",
        title="Small learning rates generalize worse",
        sentence="Trained until both fit, the small learning rate ends with a lower test accuracy than the large one.",
        source="Fig. 1",
        estimand=Difference("final_accuracy", "small", "large"),
        direction="less",
        margin=0.005,
        headline=True,
    ),
    Claim(
        id="C2",
        title="A large Fisher trace early on foretells low accuracy",
        sentence="Over learning rates and batch sizes, the trace where the train loss first falls below half its "
        "value at chance is anti-correlated with the test accuracy at one later train loss (settings that never reach "
        "it are left out).",
        source="Fig. 2",
        estimand=PerSeed(grid_correlation, "Spearman correlation of early trace and accuracy at equal loss", ("grid",)),
        direction="less",
        margin=0.2,
        unit="rho",
    ),
    _accuracy(
        id="C3",
        title="The Fisher penalty helps small learning rates",
        sentence="The Fisher penalty raises the final test accuracy of the small learning rate.",
        source="Table 1",
        estimand=Difference("final_accuracy", "small_fp", "small"),
        direction="greater",
        margin=0.005,
    ),
    _accuracy(
        id="C3b",
        title="The penalty regains half of what small learning rates lose",
        sentence="With the Fisher penalty, the small learning rate's final test accuracy lies nearer to that of the "
        "large learning rate, or above it.",
        source="Table 1",
        estimand=PerSeed(half_closed, "FP at small η − middle of small and large", ("small", "large", "small_fp")),
        direction="at_least",
        null=0.0,
        headline=True,
    ),
    _accuracy(
        id="C4",
        title="The Fisher penalty helps large learning rates too",
        sentence="The Fisher penalty raises the final test accuracy of the large learning rate.",
        source="Table 2",
        estimand=Difference("final_accuracy", "large_fp", "large"),
        direction="greater",
        margin=0.005,
    ),
    _accuracy(
        id="C5",
        title="An early penalty helps more than a late one",
        sentence="The Fisher penalty in the first quarter of training gives a higher final test accuracy than in the "
        "last quarter, at the small learning rate.",
        source="ablation",
        estimand=Difference("final_accuracy", "early_fp", "late_fp"),
        direction="greater",
        margin=0.005,
    ),
    _accuracy(
        id="C5b",
        title="With wrong labels too, an early penalty helps more",
        sentence="With 30% of the labels wrong, the Fisher penalty in the first quarter gives a higher final test "
        "accuracy than in the last quarter.",
        source="ablation",
        estimand=Difference("final_accuracy", "noise_early_fp", "noise_late_fp"),
        direction="greater",
        margin=0.01,
        says={
            "supported": "An early penalty beats a late one by {effect}",
            "contradicted": "Early is not what matters here: a late penalty ends {effect} higher",
            "inconclusive": "Early against late is not settled here: they differ by {effect}",
        },
    ),
    _accuracy(
        id="C6",
        title="The Fisher penalty protects against wrong labels",
        sentence="With 30% of the labels wrong, the Fisher penalty raises the final test accuracy.",
        source="Table 3",
        estimand=Difference("final_accuracy", "noise_fp", "noise_none"),
        direction="greater",
        margin=0.02,
        headline=True,
        says={
            "supported": "With 30% wrong labels the penalty ends at {0}; without it, memorizing costs {effect}",
            "contradicted": "With 30% wrong labels the penalty does not help: {0} with it, {1} without",
            "inconclusive": "With 30% wrong labels the penalty ends at {0}, without it at {1}: not settled",
        },
    ),
    _accuracy(
        id="C6b",
        title="The Fisher penalty slows the memorizing of wrong labels",
        sentence="The Fisher penalty lowers the fitted share of wrong labels, over all of training, by more than that "
        "of right labels.",
        source="Table 3",
        estimand=PerSeed(memorization, "change of fitted wrong − of fitted right labels", ("noise_fp", "noise_none")),
        direction="less",
        margin=0.02,
        headline=True,
    ),
    _accuracy(
        id="C6c",
        title="Against wrong labels, the penalty beats stopping early",
        sentence="With wrong labels, the best test accuracy over training is higher with the Fisher penalty: its gain "
        "is not only that of stopping early.",
        source="Table 3",
        estimand=Difference("best_accuracy", "noise_fp", "noise_none"),
        direction="greater",
        margin=0.01,
    ),
    _accuracy(
        id="C6d",
        title="With wrong labels, the penalty helps at equal fit",
        sentence="With wrong labels, the test accuracy where 85% of the rightly labeled training images are fitted is "
        "higher with the Fisher penalty.",
        source="Table 3",
        estimand=Difference("accuracy_at_fit", "noise_fp", "noise_none"),
        direction="greater",
        margin=0.01,
    ),
    _accuracy(
        id="C6e",
        title="Against wrong labels, the penalty is as good as mixup",
        sentence="With wrong labels, the final test accuracy with the Fisher penalty is at most one point below that "
        "with mixup.",
        source="Table 3",
        estimand=Difference("final_accuracy", "noise_fp", "noise_mixup"),
        direction="at_least",
        null=-0.01,
    ),
    Claim(
        id="C7",
        title="Large learning rates end in flatter minima",
        sentence="At equal train loss, the trace of the Hessian is smaller after training with the large learning "
        "rate.",
        source="Fig. 6",
        estimand=PerSeed(flatter_large, "relative difference of Tr(H), large − small", ("large", "small")),
        direction="less",
        margin=0.1,
    ),
    Claim(
        id="C7b",
        title="The Fisher penalty ends in flatter minima",
        sentence="At equal train loss, the trace of the Hessian is smaller after training with the Fisher penalty.",
        source="Fig. 6",
        estimand=PerSeed(flatter_fp, "relative difference of Tr(H), FP − none", ("small_fp", "small")),
        direction="less",
        margin=0.1,
        headline=True,
    ),
    Claim(
        id="C8",
        title="One mini-batch gradient measures the Fisher trace",
        sentence="B times the squared norm of the mini-batch gradient at drawn labels, averaged over draws, equals the "
        "exact trace to 5%, early, at a quarter and at the end of training.",
        source="appendix",
        estimand=Level("identity_error", "small", at="mean"),
        direction="within",
        margin=0.05,
        factor=100,
        unit="%",
        digits=1,
        kind="check",
    ),
    _accuracy(
        id="C9",
        title="Penalties at drawn labels beat those at true labels",
        sentence="With wrong labels and coefficients tuned alike, penalties at drawn labels (FP, GPr) give a higher "
        "final test accuracy than the one at the data set's labels (GP).",
        source="Tables 1–3",
        estimand=PerSeed(sampled_against_true, "mean of FP and GPr − GP", ("noise_fp", "noise_gpr", "noise_gp")),
        direction="greater",
        margin=0.005,
    ),
    Claim(
        id="C10",
        title="Wrong labels have longer gradients than right ones",
        sentence="Without a penalty, gradients at wrong labels are longer than at right ones, on average over "
        "training.",
        source="memorization",
        estimand=Level("norm_log_ratio", "noise_none", at="mean"),
        direction="greater",
        margin=0.1,
        unit="log",
    ),
)
