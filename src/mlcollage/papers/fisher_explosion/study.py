"""What is run and what is claimed of the Fisher explosion (Jastrzębski et al., ICML 2021).

Claims, margins, grids and seeds were written before the runs with the study's seeds. What followed pilots (seeds from
1000 on) is said on the paper's page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from mlcollage.data.workload import Workload
from mlcollage.errors import UnknownName
from mlcollage.lab.claim import Claim
from mlcollage.lab.estimand import Difference, Level, PerSeed
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale

VERSION = 1
SLUG = "fisher_explosion"
METHODS: Mapping[str, str] = {  # grids of three, of which validation picks one; half decades around a pilot's best
    "none": "0",
    "gpx": "3-10-30",
    "gp": "0.3-1-3",
    "fp": "0.3-1-3",
    "gpr": "0.3-1-3",
    "trf": "0.01-0.03-0.1",
    "sam": "0.1-0.2-0.4",
    "mixup": "1-8-32",
}


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


_ACCURACY: Mapping[str, Any] = {"factor": 100, "unit": "pts", "digits": 1}

CLAIMS = (
    Claim(
        id="C1",
        title="Small η: a larger peak",
        sentence="Training with a small learning rate reaches a larger peak of Tr(F) than training with one ten times "
        "as large.",
        source="Fig. 1",
        estimand=Difference("peak_trace", "small", "large", log=True),
        direction="greater",
        margin=0.22,  # a quarter more
        unit="log",
    ),
    Claim(
        id="C1b",
        title="and generalizes worse",
        sentence="Trained until both fit, the small learning rate ends with a lower test accuracy than the large one.",
        source="Fig. 1",
        estimand=Difference("final_accuracy", "small", "large"),
        direction="less",
        margin=0.005,
        **_ACCURACY,
    ),
    Claim(
        id="C2",
        title="Early Tr(F) foretells it",
        sentence="Over learning rates and batch sizes, the trace where the train loss first falls below half its "
        "value at chance is anti-correlated with the test accuracy at one later train loss (settings that never reach "
        "it are left out).",
        source="Fig. 2",
        estimand=PerSeed(grid_correlation, "Spearman correlation of early trace and accuracy at equal loss", ("grid",)),
        direction="less",
        margin=0.2,
        unit="rho",
    ),
    Claim(
        id="C3",
        title="FP helps the small η",
        sentence="The Fisher penalty raises the final test accuracy of the small learning rate.",
        source="Table 1",
        estimand=Difference("final_accuracy", "small_fp", "small"),
        direction="greater",
        margin=0.005,
        **_ACCURACY,
    ),
    Claim(
        id="C3b",
        title="by half of the gap or more",
        sentence="With the Fisher penalty, the small learning rate's final test accuracy lies nearer to that of the "
        "large learning rate, or above it.",
        source="Table 1",
        estimand=PerSeed(half_closed, "FP at small η − middle of small and large", ("small", "large", "small_fp")),
        direction="at_least",
        null=0.0,
        **_ACCURACY,
    ),
    Claim(
        id="C4",
        title="FP helps the large η too",
        sentence="The Fisher penalty raises the final test accuracy of the large learning rate.",
        source="Table 2",
        estimand=Difference("final_accuracy", "large_fp", "large"),
        direction="greater",
        margin=0.005,
        **_ACCURACY,
    ),
    Claim(
        id="C5",
        title="Early is when it matters",
        sentence="The Fisher penalty in the first quarter of training gives a higher final test accuracy than in the "
        "last quarter, at the small learning rate.",
        source="ablation",
        estimand=Difference("final_accuracy", "early_fp", "late_fp"),
        direction="greater",
        margin=0.005,
        **_ACCURACY,
    ),
    Claim(
        id="C5b",
        title="also with wrong labels",
        sentence="With 30% of the labels wrong, the Fisher penalty in the first quarter gives a higher final test "
        "accuracy than in the last quarter.",
        source="ablation",
        estimand=Difference("final_accuracy", "noise_early_fp", "noise_late_fp"),
        direction="greater",
        margin=0.01,
        **_ACCURACY,
    ),
    Claim(
        id="C6",
        title="FP against wrong labels",
        sentence="With 30% of the labels wrong, the Fisher penalty raises the final test accuracy.",
        source="Table 3",
        estimand=Difference("final_accuracy", "noise_fp", "noise_none"),
        direction="greater",
        margin=0.02,
        **_ACCURACY,
    ),
    Claim(
        id="C6b",
        title="It slows memorizing",
        sentence="The Fisher penalty lowers the fitted share of wrong labels, over all of training, by more than that "
        "of right labels.",
        source="Table 3",
        estimand=PerSeed(memorization, "change of fitted wrong − of fitted right labels", ("noise_fp", "noise_none")),
        direction="less",
        margin=0.02,
        **_ACCURACY,
    ),
    Claim(
        id="C6c",
        title="Beats the best step, too",
        sentence="With wrong labels, the best test accuracy over training is higher with the Fisher penalty: its gain "
        "is not only that of stopping early.",
        source="Table 3",
        estimand=Difference("best_accuracy", "noise_fp", "noise_none"),
        direction="greater",
        margin=0.01,
        **_ACCURACY,
    ),
    Claim(
        id="C6d",
        title="and at equal fit",
        sentence="With wrong labels, the test accuracy where 85% of the rightly labeled training images are fitted is "
        "higher with the Fisher penalty.",
        source="Table 3",
        estimand=Difference("accuracy_at_fit", "noise_fp", "noise_none"),
        direction="greater",
        margin=0.01,
        **_ACCURACY,
    ),
    Claim(
        id="C6e",
        title="As good as mixup",
        sentence="With wrong labels, the final test accuracy with the Fisher penalty is at most one point below that "
        "with mixup.",
        source="Table 3",
        estimand=Difference("final_accuracy", "noise_fp", "noise_mixup"),
        direction="at_least",
        null=-0.01,
        **_ACCURACY,
    ),
    Claim(
        id="C7",
        title="Large η ends flatter",
        sentence="At equal train loss, the trace of the Hessian is smaller after training with the large learning "
        "rate.",
        source="Fig. 6",
        estimand=PerSeed(flatter_large, "relative difference of Tr(H), large − small", ("large", "small")),
        direction="less",
        margin=0.1,
    ),
    Claim(
        id="C7b",
        title="FP ends flatter",
        sentence="At equal train loss, the trace of the Hessian is smaller after training with the Fisher penalty.",
        source="Fig. 6",
        estimand=PerSeed(flatter_fp, "relative difference of Tr(H), FP − none", ("small_fp", "small")),
        direction="less",
        margin=0.1,
    ),
    Claim(
        id="C8",
        title="B‖ḡ‖² is an unbiased Tr(F)",
        sentence="B times the squared norm of the mini-batch gradient at drawn labels, averaged over draws, equals the "
        "exact trace to 5%, early, at a quarter and at the end of training.",
        source="appendix",
        estimand=Level("identity_error", "small", at="mean"),
        direction="within",
        margin=0.05,
        factor=100,
        unit="%",
        digits=1,
    ),
    Claim(
        id="C9",
        title="Drawn labels beat true ones",
        sentence="With wrong labels and coefficients tuned alike, penalties at drawn labels (FP, GPr) give a higher "
        "final test accuracy than the one at the data set's labels (GP).",
        source="Tables 1–3",
        estimand=PerSeed(sampled_against_true, "mean of FP and GPr − GP", ("noise_fp", "noise_gpr", "noise_gp")),
        direction="greater",
        margin=0.005,
        **_ACCURACY,
    ),
    Claim(
        id="C10",
        title="Wrong labels pull harder",
        sentence="Without a penalty, gradients at wrong labels are longer than at right ones, on average over "
        "training.",
        source="memorization",
        estimand=Level("norm_log_ratio", "noise_none", at="mean"),
        direction="greater",
        margin=0.1,
        unit="log",
    ),
)

_QUICK: Mapping[str, Any] = {
    "seeds": 10,
    "block": 5,  # seeds of the runs on wrong labels and of the grid
    "data": "fashion_14",
    "network": "mlp",
    "train_size": 1000,
    "val_size": 1000,
    "test_size": 1500,
    "trace_size": 300,
    "batch_size": 100,
    "evaluations": 20,
    "interval": 10,
    "lr": 0.3,
    "tuning_seeds": 2,
    "tuning_steps": 1000,
    "small_steps": 2400,
    "large_steps": 500,
    "noise_steps": 1000,
    "noise": 0.3,
    "fp_grid": "0.1-0.3-1",
    "points": "0.1x1-0.2x1-0.33x1-0.66x1-1x1-2x1-1x0.5",
    "identity_draws": 200,
    "vectors": 10,
}
_SMOKE: Mapping[str, Any] = {
    **_QUICK,
    "seeds": 2,
    "block": 2,
    "data": "digits",
    "train_size": 60,
    "val_size": 30,
    "test_size": 40,
    "trace_size": 20,
    "batch_size": 10,
    "evaluations": 4,
    "interval": 4,
    "tuning_seeds": 1,
    "tuning_steps": 8,
    "small_steps": 40,
    "large_steps": 24,
    "noise_steps": 24,
    "identity_draws": 4,
    "vectors": 2,
}
_FULL: Mapping[str, Any] = {
    **_QUICK,
    "block": 10,
    "data": "fashion_mnist",
    "network": "convnet",
    "train_size": 10_000,
    "val_size": 5000,
    "test_size": 10_000,
    "trace_size": 1000,
    "lr": None,
    "tuning_seeds": 3,
    "tuning_steps": 6000,
    "small_steps": 12_000,
    "large_steps": 2500,
    "noise_steps": 8000,
    "vectors": 30,
}
_PAPER: Mapping[str, Any] = {**_FULL, "data": "cifar100", "train_size": 45_000, "batch_size": 128}
_SETTINGS = {Scale.SMOKE: _SMOKE, Scale.QUICK: _QUICK, Scale.FULL: _FULL, Scale.PAPER: _PAPER}
SEEDS = {scale: int(settings["seeds"]) for scale, settings in _SETTINGS.items()}
_OWN: Mapping[str, Any] = {  # on a user's workload: any model, of any cost; learning rates are found on validation
    "lr": None,
    "block": 5,
    "tuning_seeds": 1,
    "tuning_steps": 200,
    "small_steps": 400,
    "large_steps": 150,
    "noise_steps": 300,
    "evaluations": 12,
    "points": "0.1x1-0.33x1-1x1-0.33x0.5-1x0.5",
    "identity_draws": 60,
    "vectors": 5,
}
_SHARED = (
    *("data", "network", "train_size", "val_size", "test_size", "trace_size"),
    *("batch_size", "evaluations", "interval", "lr", "large_steps"),
)
_OF: Mapping[str, tuple[str, ...]] = {
    "clean": ("tuning_seeds", "tuning_steps", "small_steps", "fp_grid", "identity_draws", "vectors"),
    "grid": ("small_steps", "points"),
    "noise": ("tuning_seeds", "noise_steps", "noise"),
}


def runs(scale: Scale, workload: Workload | None, seeds: range | None = None) -> Iterator[Run]:
    """One run an experiment and method, which trains all its seeds together; the longest first.

    On a user's workload the same experiments are run with the user's data and, if there is one, the user's model
    (else the study's own), with fewer steps at scale quick, and with learning rates chosen on a validation split.
    """
    settings = _SETTINGS[scale]
    if workload is not None:
        settings = {**settings, "lr": None} if scale is not Scale.QUICK else {**settings, **_OWN}
        settings = {**settings, "data": "workload"}
    most = len(seeds) if seeds is not None else int(settings["seeds"])
    first = seeds.start if seeds is not None else 0
    block = most if seeds is not None else min(most, int(settings["block"]))

    def make(arm: str, experiment: str, count: int, **own: Any) -> Run:
        chosen = {k: settings[k] for k in (*_SHARED, *_OF[experiment])}
        return Run(SLUG, arm, first, {"experiment": experiment, "seeds": count, **chosen, **own})

    yield make("clean", "clean", most)
    yield make("noise_sam", "noise", block, method="sam", grid=METHODS["sam"])
    yield make("noise_fp", "noise", block, method="fp", grid=METHODS["fp"])
    yield make("grid", "grid", block)
    for method, grid in METHODS.items():
        if method not in ("sam", "fp"):
            yield make(f"noise_{method}", "noise", block, method=method, grid=grid)


def measure(run: Run, workload: Workload | None) -> Measurements:
    """Execute the run's experiment."""
    from .experiments import EXPERIMENTS

    return EXPERIMENTS[run.text("experiment")](run, workload)
