"""What is run and what is claimed of the Deep Bootstrap framework (Nakkiran, Neyshabur, Sedghi, ICLR 2021).

Claims, margins and settings were written before the runs with the study's seeds. Claims about "the networks" take the
worst or the mean over whatever networks were run, so that they can be asked of a user's own model as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from mlcollage.data.workload import Workload
from mlcollage.lab.claim import Claim
from mlcollage.lab.estimand import Difference, Level, PerSeed
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale

VERSION = 1
SLUG = "deep_bootstrap"
FITTED = ("mlp128", "cnn", "resnet", "user")  # networks of an ordinary size, trained in an ordinary way
SWEEP = ("mlp128", "user")  # run with four sample sizes


def _of(rows: pd.DataFrame, metric: str, arms: tuple[str, ...] | None = None) -> pd.DataFrame:
    """Values by arm and n."""
    rows = rows[(rows["metric"] == metric) & rows["n"].notna()]
    if arms is not None:
        rows = rows[rows["arm"].isin(arms)]
    if rows.empty:
        raise LookupError(f"no {metric} of {', '.join(arms or ('any arm',))}")
    return rows.pivot(index="arm", columns="n", values="value")


def _largest_n(table: pd.DataFrame) -> pd.Series:
    return table[table.columns.max()].dropna()


def worst_gap(rows: pd.DataFrame) -> float:
    """Largest bootstrap error of any step up to T, of any fitted network, at the largest n."""
    return float(_largest_n(_of(rows, "largest_gap", FITTED)).max())


def gap_and_classical_gap(rows: pd.DataFrame) -> dict[str, float]:
    """Bootstrap error and generalization gap at T (or at the end), means over networks at the smallest common n."""
    names = ("gap_at_stop", "classical_gap_at_stop")
    tables = [_of(rows, name, FITTED).dropna(axis="columns") for name in names]
    return {name: float(table[table.columns.min()].mean()) for name, table in zip(names, tables, strict=True)}


def rank_correlation(rows: pd.DataFrame) -> float:
    """Spearman's correlation, over networks, of final soft-errors in the two worlds at the largest n."""
    real, ideal = (_largest_n(_of(rows, name)) for name in ("final_real", "final_ideal"))
    plain = [a for a in real.index if a in _PLAIN]
    if len(plain) < 5:
        raise LookupError(f"{len(plain)} networks; five are needed to rank them")
    return float(real[plain].corr(ideal[plain], method="spearman"))


def width_agreement(rows: pd.DataFrame) -> float:
    """Kendall's tau of the two worlds' rankings of the three widths, at the largest n."""
    real, ideal = (_largest_n(_of(rows, name, _WIDTHS)) for name in ("final_real", "final_ideal"))
    if len(real) < 3:
        raise LookupError("not all three widths were run")
    return float(real.corr(ideal, method="kendall"))


def departures(rows: pd.DataFrame) -> dict[str, float]:
    """Step at which each n leaves the ideal path (the last step if it never does), in order of n."""
    return _by_n(rows, "departure_step")


def final_gaps(rows: pd.DataFrame) -> dict[str, float]:
    """Final bootstrap error of each n, in order of n."""
    return _by_n(rows, "final_gap")


def _by_n(rows: pd.DataFrame, metric: str) -> dict[str, float]:
    table = _of(rows, metric, SWEEP)
    means = table.mean(axis="index").sort_index()
    return {f"n={n:.0f}": float(value) for n, value in zip(means.index, means, strict=True)}


def convolution_advantage(rows: pd.DataFrame) -> float:
    """MLP minus CNN in final soft-error at the largest n: the smaller of the advantages in the two worlds."""
    gains = []
    for world in ("final_real", "final_ideal"):
        values = _largest_n(_of(rows, world, ("mlp128", "cnn")))
        gains.append(values["mlp128"] - values["cnn"])
    return float(min(gains))


def _augmentation(rows: pd.DataFrame, metric: str) -> float:
    table = _of(rows, metric, ("cnn", "cnn_shift")).dropna(axis="columns")
    smallest = table[table.columns.min()]
    return float(smallest["cnn_shift"] - smallest["cnn"])


def shift_trade(rows: pd.DataFrame) -> float:
    """What shifting adds to the final train soft-error, minus what it adds to the ideal soft-error (smallest n)."""
    return _augmentation(rows, "final_train") - _augmentation(rows, "final_ideal")


def shift_gain(rows: pd.DataFrame) -> float:
    """What shifting takes off the real soft-error at the smallest n."""
    return -_augmentation(rows, "final_real")


_WIDTHS = ("mlp8", "mlp32", "mlp128")
_PLAIN = (*_WIDTHS, "mlp128_slow", "cnn", "resnet", "vit", "user")

CLAIMS = (
    Claim(
        id="C1",
        title="Real tracks Ideal until T",
        sentence="With the largest train set, the soft-error of the Real World exceeds that of the Ideal World by at "
        "most 0.05 at every step up to convergence, in every one of the fitted networks.",
        source="Fig. 1",
        estimand=PerSeed(worst_gap, "largest bootstrap error up to T, worst network, largest n", FITTED),
        direction="at_most",
        null=0.05,
        digits=3,
    ),
    Claim(
        id="C1b",
        title="Below the classical gap",
        sentence="When the Real World has fitted its train set (or at the end), the bootstrap error is smaller than "
        "the generalization gap between test and train.",
        source="Fig. 1",
        estimand=PerSeed(gap_and_classical_gap, "bootstrap error minus generalization gap at T, smallest n", FITTED),
        direction="less",
        margin=0.02,
        digits=3,
    ),
    Claim(
        id="C2",
        title="One order of architectures",
        sentence="Networks of different kinds, sizes and learning rates are ranked alike by their soft-errors in the "
        "two worlds: Spearman's correlation is at least 0.8.",
        source="Fig. 2",
        estimand=PerSeed(rank_correlation, "Spearman correlation of real and ideal soft-errors over networks", _PLAIN),
        direction="at_least",
        null=0.8,
        unit="rho",
    ),
    Claim(
        id="C3",
        title="Larger n departs later",
        sentence="The Real World leaves the ideal path later, the more samples it has.",
        source="Fig. 3",
        estimand=PerSeed(departures, "first step with a bootstrap error above 0.02 three times running, by n", SWEEP),
        direction="greater",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C3b",
        title="The gap shrinks with n",
        sentence="The final bootstrap error falls as the number of samples rises.",
        source="Fig. 3",
        estimand=PerSeed(final_gaps, "final bootstrap error by n", SWEEP),
        direction="less",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C4",
        title="Sizes rank alike",
        sentence="Widths from one that cannot fit the train set to one that can are ranked alike in the two worlds: "
        "Kendall's tau is above 0.",
        source="over- and under-parameterized",
        estimand=PerSeed(width_agreement, "Kendall tau of widths 8, 32, 128 between the worlds", _WIDTHS),
        direction="greater",
        margin=0.5,
        unit="tau",
    ),
    Claim(
        id="C5",
        title="Convolution wins online too",
        sentence="A convolutional network has a smaller final soft-error than an MLP in both worlds: what it gains "
        "offline it gains online.",
        source="implicit bias",
        estimand=PerSeed(
            convolution_advantage, "MLP − CNN soft-error, the smaller of the two worlds", ("mlp128", "cnn")
        ),
        direction="greater",
        margin=0.01,
        digits=3,
    ),
    Claim(
        id="C6",
        title="Shifts slow only the fit",
        sentence="Random shifts of the images slow a convolutional network's fit to the train set more than its "
        "learning in the Ideal World.",
        source="augmentation",
        estimand=PerSeed(shift_trade, "added train − added ideal soft-error", ("cnn", "cnn_shift")),
        direction="greater",
        margin=0.01,
        digits=3,
    ),
    Claim(
        id="C6b",
        title="and so help the Real World",
        sentence="Random shifts lower the soft-error of the Real World at the smallest common n.",
        source="augmentation",
        estimand=PerSeed(shift_gain, "real soft-error without − with shifts", ("cnn", "cnn_shift")),
        direction="greater",
        margin=0.01,
        digits=3,
    ),
    Claim(
        id="C7",
        title="Pre-training helps online",
        sentence="Pre-training on another alphabet lowers the final soft-error in the Ideal World.",
        source="pre-training",
        estimand=Difference("final_ideal", "cnn_pretrained", "cnn", where={"n": 10_000}),
        direction="less",
        margin=0.005,
        digits=3,
        from_scale=Scale.FULL,
    ),
    Claim(
        id="C8",
        title="Label noise breaks it",
        sentence="With a fifth of the labels wrong and few samples, the final bootstrap error exceeds 0.05: the claim "
        "has a limit.",
        source="limits",
        estimand=PerSeed(
            lambda rows: float(_of(rows, "final_gap", ("mlp128_noise",)).iloc[0].dropna().iloc[0]),
            "final bootstrap error with 20% label noise, smallest n",
            ("mlp128_noise",),
        ),
        direction="at_least",
        null=0.05,
        digits=3,
    ),
    Claim(
        id="C8b",
        title="and so does convex d > n",
        sentence="In least squares with four times as many features as samples, the final bootstrap error exceeds 0.1 "
        "times the variance of the signal.",
        source="limits",
        estimand=Level("regression_gap", "least_squares"),
        direction="at_least",
        null=0.1,
    ),
    Claim(
        id="C9",
        title="Squared loss, hard error",
        sentence="Trained by squared error, the hard error of the Real World exceeds that of the Ideal World by at "
        "most 0.05 at the end, with the largest train set.",
        source="appendix",
        estimand=PerSeed(
            lambda rows: float(_largest_n(_of(rows, "final_gap", ("mlp128_mse",))).iloc[0]),
            "final difference of hard errors, squared loss, largest n",
            ("mlp128_mse",),
        ),
        direction="at_most",
        null=0.05,
        digits=3,
        from_scale=Scale.FULL,
    ),
)

_QUICK: Mapping[str, Any] = {
    "seeds": 5,
    "data": "easy16",
    "steps": 800,
    "batch_size": 64,
    "n": "1000-4000",
    "sweep": "500-1000-2000-4000",
    "evaluations": 14,
    "test_size": 1500,
}
_SMOKE: Mapping[str, Any] = {
    **_QUICK,
    "seeds": 2,
    "steps": 24,
    "batch_size": 16,
    "n": "32-128",
    "sweep": "16-32-64-128",
    "evaluations": 4,
    "test_size": 100,
}
_FULL: Mapping[str, Any] = {
    "seeds": 5,
    "data": "standard32",
    "steps": 8000,
    "batch_size": 128,
    "n": "10000-50000",
    "sweep": "5000-10000-25000-50000",
    "evaluations": 24,
    "test_size": 5000,
}
_PAPER: Mapping[str, Any] = {**_FULL, "data": "cifar5m", "steps": 39_000, "seeds": 10, "test_size": 10_000}
_SETTINGS = {Scale.SMOKE: _SMOKE, Scale.QUICK: _QUICK, Scale.FULL: _FULL, Scale.PAPER: _PAPER}
SEEDS = {scale: int(settings["seeds"]) for scale, settings in _SETTINGS.items()}
_STEPS_SHARE = {"resnet": 0.5, "vit": 0.75}  # the dearest networks get fewer steps: they are not run to convergence
_EXTRA: Mapping[str, Mapping[str, Any]] = {
    "cnn_shift": {"architecture": "cnn", "augment": "shift"},
    "cnn_occlude": {"architecture": "cnn", "augment": "occlude"},
    "mlp128_noise": {"architecture": "mlp128", "label_noise": 0.2},
}
_FROM_FULL: Mapping[str, Mapping[str, Any]] = {
    "cnn_pretrained": {"architecture": "cnn", "pretrain_steps": 4000},
    "mlp128_mse": {"architecture": "mlp128", "loss": "mse"},
}


def runs(scale: Scale, workload: Workload | None, seeds: range | None = None) -> Iterator[Run]:
    """One run a network and seed (it trains both worlds and all n), the dearest first.

    A user's workload is taken as a large finite set: each stream makes one pass over its training data. With a model
    of its own only that model is trained (SGD with momentum 0.9 and learning rate 0.1), else an MLP and, for images,
    a convolutional network.
    """
    seeds = seeds or range(SEEDS[scale])
    if workload is not None:
        yield from _on_workload(scale, workload, seeds)
        return
    s = _SETTINGS[scale]
    common = {k: s[k] for k in ("data", "batch_size", "evaluations", "test_size")}
    arms: dict[str, dict[str, Any]] = {}
    for arm in ("vit", "resnet", "cnn", "mlp128", "mlp128_slow", "mlp32", "mlp8"):
        steps = int(s["steps"] * _STEPS_SHARE.get(arm, 1.0))
        arms[arm] = {"architecture": arm, "n": s["sweep"] if arm in SWEEP else s["n"], "steps": steps}
    extra = dict(_EXTRA)
    if scale.rank >= Scale.FULL.rank and s["data"] != "cifar5m":
        extra |= _FROM_FULL
    if s["data"] == "cifar5m":
        del extra["mlp128_noise"]
    for arm, own in extra.items():
        sizes = s["n"].split("-")[0] if "augment" in own else s["n"]
        arms[arm] = {"n": sizes, "steps": s["steps"], **own}
    for arm, own in arms.items():
        for seed in seeds:
            yield Run(SLUG, arm, seed, {**common, **own})
    for seed in seeds:
        steps = 50 if scale is Scale.SMOKE else 2000
        yield Run(SLUG, "least_squares", seed, {"dimension": 200, "n_samples": 50, "steps": steps, "lr": 0.05})


def _on_workload(scale: Scale, workload: Workload, seeds: range) -> Iterator[Run]:
    s = _SETTINGS[scale]
    size = len(workload.train)  # type: ignore[arg-type]
    batch = min(int(s["batch_size"]), max(2, size // 40))  # BatchNorm needs two samples
    steps = min(int(s["steps"]), size // batch)
    sizes = sorted({max(batch, steps * batch // k) for k in (32, 16, 8, 4)})
    arms = ["user"] if workload.model is not None else ["mlp128"]
    if workload.model is None and len(workload.train[0][0].shape) == 3:
        arms.append("cnn")
    for arm in arms:
        for seed in seeds:
            yield Run(
                SLUG,
                arm,
                seed,
                {
                    "architecture": arm,
                    "data": "workload",
                    "n": "-".join(map(str, sizes)),
                    "steps": steps,
                    "batch_size": batch,
                    "evaluations": s["evaluations"],
                    "test_size": int(min(s["test_size"], len(workload.test))),  # type: ignore[arg-type]
                },
            )


def measure(run: Run, workload: Workload | None) -> Measurements:
    """Train the run's network in both worlds and record their difference."""
    from .experiments import linear_regression, train_worlds

    return linear_regression(run, workload) if run.arm == "least_squares" else train_worlds(run, workload)
