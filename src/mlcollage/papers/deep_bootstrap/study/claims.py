"""The claims, written before the runs, and the functions that compute what they are about.

Claims about "the networks" take the worst or the mean over whatever networks were run, so that they can be asked of a
user's own model as well.
"""

from __future__ import annotations

from functools import partial

import pandas as pd

from mlcollage.lab import Claim, Difference, Level, PerSeed, Scale

FITTED = ("mlp128", "cnn", "resnet", "user")  # networks of an ordinary size, trained in an ordinary way
SWEEP = ("mlp128", "user")  # run with four sample sizes
WIDTHS = ("mlp8", "mlp32", "mlp128")
PLAIN = (*WIDTHS, "mlp128_slow", "cnn", "resnet", "vit", "user")


def _of(rows: pd.DataFrame, metric: str, arms: tuple[str, ...] | None = None) -> pd.DataFrame:
    """Values by arm and n."""
    rows = rows[(rows["metric"] == metric) & rows["n"].notna()]
    if arms is not None:
        rows = rows[rows["arm"].isin(arms)]
    if rows.empty:
        raise LookupError(f"no {metric} of {', '.join(arms or ('any arm',))}")
    return rows.pivot(index="arm", columns="n", values="value")  # NaN where an arm was not run with that n


def _largest_n(table: pd.DataFrame) -> pd.Series:
    return table[table.columns.max()].dropna()


def worst_gap(rows: pd.DataFrame) -> float:
    """Largest difference of the worlds, in either direction, at any step up to T, of any network, at the largest n."""
    return float(_largest_n(_of(rows, "largest_gap", PLAIN)).max())


def gap_and_classical_gap(rows: pd.DataFrame) -> dict[str, float]:
    """Bootstrap error and generalization gap at T (or at the end), means over networks at the smallest common n."""
    names = ("gap_at_stop", "classical_gap_at_stop")
    tables = [_of(rows, name, FITTED).dropna(axis="columns") for name in names]  # sizes that all networks have
    return {name: float(table[table.columns.min()].mean()) for name, table in zip(names, tables, strict=True)}


def rank_correlation(rows: pd.DataFrame) -> float:
    """Spearman's correlation, over networks, of final soft-errors in the two worlds at the largest n."""
    real, ideal = (_largest_n(_of(rows, name)) for name in ("final_real", "final_ideal"))
    plain = [a for a in real.index if a in PLAIN]  # without augmentation, label noise and the like
    if len(plain) < 5:
        raise LookupError(f"{len(plain)} networks; five are needed to rank them")
    return float(real[plain].corr(ideal[plain], method="spearman"))


def width_agreement(rows: pd.DataFrame) -> float:
    """Kendall's tau of the two worlds' rankings of the three widths, at the largest n."""
    real, ideal = (_largest_n(_of(rows, name, WIDTHS)) for name in ("final_real", "final_ideal"))
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
    means = table.mean(axis="index").sort_index()  # by n; over arms, of which there is usually one
    return {f"n={n:.0f}": float(value) for n, value in zip(means.index, means, strict=True)}


def convolution_advantage(rows: pd.DataFrame) -> float:
    """MLP minus CNN in final soft-error at the largest n: the smaller of the advantages in the two worlds."""
    gains = []
    for world in ("final_real", "final_ideal"):
        values = _largest_n(_of(rows, world, ("mlp128", "cnn")))
        gains.append(values["mlp128"] - values["cnn"])
    return float(min(gains))


def _augmentation(rows: pd.DataFrame, metric: str) -> float:
    table = _of(rows, metric, ("cnn", "cnn_shift")).dropna(axis="columns")  # n of both
    smallest = table[table.columns.min()]
    return float(smallest["cnn_shift"] - smallest["cnn"])


def shift_trade(rows: pd.DataFrame) -> float:
    """What shifting adds to the final train soft-error, minus what it adds to the ideal soft-error (smallest n)."""
    return _augmentation(rows, "final_train") - _augmentation(rows, "final_ideal")


def shift_gain(rows: pd.DataFrame) -> float:
    """What shifting takes off the real soft-error at the smallest n."""
    return -_augmentation(rows, "final_real")


def noisy_gap(rows: pd.DataFrame) -> float:
    """Final bootstrap error with wrong labels, at the smallest n."""
    return float(_of(rows, "final_gap", ("mlp128_noise",)).iloc[0].dropna().iloc[0])


def squared_loss_gap(rows: pd.DataFrame) -> float:
    """Final difference of hard errors after training by squared error, at the largest n."""
    return float(_largest_n(_of(rows, "final_gap", ("mlp128_mse",))).iloc[0])


_error = partial(Claim, digits=3)  # of errors, which are shares

CLAIMS = (
    _error(
        id="C1",
        title="Reused data teach like fresh data until they are fitted",
        headline=True,
        sentence="With the largest train set, the soft-errors of the Real and the Ideal World differ by at most 0.05, "
        "in either direction, at every step up to convergence (or the last one), in each of the networks: MLPs of "
        "three widths and two learning rates, a CNN, a ResNet and a ViT.",
        source="Fig. 1",
        estimand=PerSeed(worst_gap, "largest |bootstrap error| up to T, worst network, largest n", PLAIN),
        direction="at_most",
        null=0.05,
        says={
            "supported": "Until they are fitted, reused images teach like fresh ones, to {effect} of soft error",
            "contradicted": "A network parts from its fresh twin by {effect} before its images are fitted",
            "inconclusive": "Until images are fitted, the worst network strays {effect} from its twin: not settled",
        },
    ),
    _error(
        id="C1b",
        title="Reusing data costs less than the train-test gap",
        sentence="When the Real World has fitted its train set (or at the end), the bootstrap error is smaller than "
        "the generalization gap between test and train.",
        source="Fig. 1",
        estimand=PerSeed(gap_and_classical_gap, "bootstrap error minus generalization gap at T, smallest n", FITTED),
        direction="less",
        margin=0.02,
    ),
    Claim(
        id="C2",
        title="Networks rank alike on reused and on fresh data",
        headline=True,
        sentence="Networks of different kinds, sizes and learning rates are ranked alike by their soft-errors in the "
        "two worlds: Spearman's correlation is at least 0.8.",
        source="Fig. 2",
        estimand=PerSeed(rank_correlation, "Spearman correlation of real and ideal soft-errors over networks", PLAIN),
        direction="at_least",
        null=0.8,
        unit="rho",
        says={
            "supported": "Networks rank alike on reused and fresh data: correlation {effect}",
            "contradicted": "Networks rank differently on reused and fresh data: correlation {effect}",
            "inconclusive": "Whether networks rank alike is open: correlation {effect}",
        },
    ),
    Claim(
        id="C3",
        title="With more samples, reused data stay like fresh for longer",
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
        title="The cost of reusing data falls with more samples",
        sentence="The final bootstrap error falls as the number of samples rises.",
        source="Fig. 3",
        estimand=PerSeed(final_gaps, "final bootstrap error by n", SWEEP),
        direction="less",
        margin=0.5,
        test="trend",
        unit="rho",
        says={
            "supported": "With few samples reuse costs {0} of soft error, with many {last}",
            "contradicted": "The cost of reuse does not fall with more samples ({effect})",
            "inconclusive": "Whether the cost of reuse falls with more samples is open ({effect})",
        },
    ),
    Claim(
        id="C4",
        title="Network sizes rank alike on reused and on fresh data",
        headline=True,
        sentence="Widths from one that cannot fit the train set to one that can are ranked alike in the two worlds: "
        "Kendall's tau is above 0.",
        source="over- and under-parameterized",
        estimand=PerSeed(width_agreement, "Kendall tau of widths 8, 32, 128 between the worlds", WIDTHS),
        direction="greater",
        margin=0.5,
        unit="tau",
    ),
    _error(
        id="C5",
        title="Convolution helps on reused and on fresh data",
        headline=True,
        sentence="A convolutional network has a smaller final soft-error than an MLP in both worlds: what it gains "
        "offline it gains online.",
        source="implicit bias",
        estimand=PerSeed(
            convolution_advantage, "MLP − CNN soft-error, the smaller of the two worlds", ("mlp128", "cnn")
        ),
        direction="greater",
        margin=0.01,
    ),
    _error(
        id="C6",
        title="Random image shifts slow fitting more than learning",
        headline=True,
        sentence="Random shifts of the images slow a convolutional network's fit to the train set more than its "
        "learning in the Ideal World.",
        source="augmentation",
        estimand=PerSeed(shift_trade, "added train − added ideal soft-error", ("cnn", "cnn_shift")),
        direction="greater",
        margin=0.01,
        says={
            "supported": "Image shifts slow fitting more than learning, by {effect}",
            "contradicted": "Image shifts do not slow fitting more than learning ({effect})",
            "inconclusive": "Whether image shifts slow fitting more than learning is open ({effect})",
        },
    ),
    _error(
        id="C6b",
        title="Random image shifts lower the error on reused data",
        sentence="Random shifts lower the soft-error of the Real World at the smallest common n.",
        source="augmentation",
        estimand=PerSeed(shift_gain, "real soft-error without − with shifts", ("cnn", "cnn_shift")),
        direction="greater",
        margin=0.01,
    ),
    _error(
        id="C7",
        title="Pre-training lowers the error on fresh data",
        sentence="Pre-training on another alphabet lowers the final soft-error in the Ideal World.",
        source="pre-training",
        estimand=Difference("final_ideal", "cnn_pretrained", "cnn", where={"n": 10_000}),
        direction="less",
        margin=0.005,
        from_scale=Scale.FULL,
    ),
    _error(
        id="C8",
        title="With wrong labels, reused data fall behind fresh data",
        sentence="With a fifth of the labels wrong and few samples, the final bootstrap error exceeds 0.05: the claim "
        "has a limit.",
        source="limits",
        estimand=PerSeed(noisy_gap, "final bootstrap error with 20% label noise, smallest n", ("mlp128_noise",)),
        direction="at_least",
        null=0.05,
    ),
    Claim(
        id="C8b",
        title="In over-parameterized least squares reused data fall behind",
        sentence="In least squares with four times as many features as samples, the final bootstrap error exceeds 0.1 "
        "times the variance of the signal.",
        source="limits",
        estimand=Level("regression_gap", "least_squares"),
        direction="at_least",
        null=0.1,
    ),
    _error(
        id="C9",
        title="Squared loss: reused data end close to fresh data",
        sentence="Trained by squared error, the hard error of the Real World exceeds that of the Ideal World by at "
        "most 0.05 at the end, with the largest train set.",
        source="appendix",
        estimand=PerSeed(squared_loss_gap, "final difference of hard errors, squared loss, largest n", ("mlp128_mse",)),
        direction="at_most",
        null=0.05,
        from_scale=Scale.FULL,
    ),
)
