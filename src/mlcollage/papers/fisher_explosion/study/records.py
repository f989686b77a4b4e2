"""What the study measures while networks train, and the numbers that its claims are about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage._random import derive
from mlcollage.lab import Measurements
from mlcollage.measure import fisher_trace, per_example_grad_sqnorm
from mlcollage.train import Replicas

from .._gradients import nll
from .data import SeedData


def tail(steps: int) -> set[int]:
    """Four steps in the last tenth of training, over which final values are averaged.

    With a constant learning rate single iterates scatter by more than the effects that are looked for.
    """
    return {steps - round(0.03 * k * steps) for k in range(4)}


def evaluation_steps(steps: int, count: int, first: int = 8) -> set[int]:
    """About ``count`` steps up to ``steps``: a geometric grid, and the tail.

    Examples
    --------
    >>> sorted(evaluation_steps(64, 8))
    [8, 16, 32, 58, 60, 62, 64]
    """
    grid = {round(v) for v in np.geomspace(min(first, steps), steps, max(count - 4, 2))}
    return {t for t in grid if t < 0.85 * steps} | tail(steps)


class Recorder:
    """Measures replicas while they train; one row of the curves per replica and evaluation.

    Parameters
    ----------
    data, seeds
        One for each replica.
    traced
        Training samples on which Tr(F) is drawn.
    ratio
        Also measure gradient norms at wrong and at right labels.
    """

    def __init__(self, data: Sequence[SeedData], seeds: Sequence[int], traced: int, *, ratio: bool = False) -> None:
        self.data, self.seeds, self.traced, self.ratio = list(data), tuple(seeds), traced, ratio
        problems = [d.problem for d in data]
        # Inputs (R, n, ...) and labels (R, n) of the three parts.
        self._parts = [
            tuple(torch.stack(tensors) for tensors in zip(*parts, strict=True))
            for parts in zip(*((p.train, p.validation, p.test) for p in problems), strict=True)
        ]
        self._wrong = torch.stack([d.wrong for d in data])  # (R, n)
        self._rows: list[dict[str, float]] = []

    def measure(self, replicas: Replicas, step: int) -> None:
        """Loss, accuracies and Tr(F) of every replica."""
        logits = [replicas.predict(x, in_dim=0, batch_size=2000) for x, _ in self._parts]  # (R, n, C) each
        right, val, test = (z.argmax(-1) == y for z, (_, y) in zip(logits, self._parts, strict=True))
        columns = {
            "train_loss": nll(logits[0], self._parts[0][1]),
            "val_accuracy": val.double().mean(1),
            "test_accuracy": test.double().mean(1),
            "fit_right": _share(right, ~self._wrong),
            "fit_wrong": _share(right, self._wrong),
        }
        for r, values in enumerate(zip(*(c.tolist() for c in columns.values()), strict=True)):
            row = {"replica": r, "step": step, **dict(zip(columns, values, strict=True)), "trace": math.nan}
            if math.isfinite(row["train_loss"]):
                row |= self._gradients(replicas.module(r), r, step)
            self._rows.append(row)

    def _gradients(self, model: nn.Module, r: int, step: int) -> dict[str, float]:
        d, source = self.data[r], derive(self.seeds[r], 7, step)
        found = {"trace": fisher_trace(model, d.problem.train.x[: self.traced], method="mc", generator=source).value}
        if self.ratio and bool(d.wrong.any()):
            found["norm_log_ratio"] = _norm_ratio(model, d)
        return found

    def curves(self, replica: int) -> pd.DataFrame:
        """One row per evaluation."""
        table = pd.DataFrame([row for row in self._rows if row["replica"] == replica])
        return table.drop(columns="replica").sort_values("step").reset_index(drop=True)

    def last(self, metric: str, evaluations: int = 1) -> npt.NDArray[np.float64]:
        """Means of the latest values of every replica, (R,)."""
        n = len(self.data)
        return np.array([row[metric] for row in self._rows[-n * evaluations :]]).reshape(evaluations, n).mean(0)

    def write(
        self, m: Measurements, arm: str, keys: Mapping[str, float | str], *, early_loss: float, late_loss: float
    ) -> None:
        """All curves and what they come to, each replica under its seed; ``keys`` become columns."""
        for r, seed in enumerate(self.seeds):
            curves = self.curves(r)
            for row in curves.to_dict("records"):
                values = {str(k): v for k, v in row.items() if k != "step" and math.isfinite(v)}
                m.add_all(values, step=int(row["step"]), arm=arm, seed=seed, **keys)
            found = summarize(curves, early_loss=early_loss, late_loss=late_loss)
            m.add_all(found, step=0, arm=arm, seed=seed, **keys)


def _share(hits: Tensor, among: Tensor) -> Tensor:
    """Share of hits among some of the samples, (R,); NaN where there are none."""
    return (hits & among).sum(1) / among.sum(1)


def _norm_ratio(model: nn.Module, data: SeedData, most: int = 500) -> float:
    """Logarithm of the mean gradient norm at wrong labels over that at right ones."""
    x, y = data.problem.train
    squares = per_example_grad_sqnorm(model, F.cross_entropy, x[:most], y[:most], reduction="mean")  # (n,)
    norms, wrong = squares.detach().sqrt(), data.wrong[:most]
    return float((norms[wrong].mean() / norms[~wrong].mean()).log())


def summarize(curves: pd.DataFrame, *, early_loss: float, late_loss: float, fit: float = 0.85) -> dict[str, float]:
    r"""The numbers that claims are about, from one training's curves; what was not reached is left out.

    Parameters
    ----------
    curves
        Columns ``step, train_loss, test_accuracy, val_accuracy, trace, fit_right, fit_wrong``.
    early_loss, late_loss
        :math:`\epsilon`, at which the early trace is read (the loss falls below it for the first time; the logarithm of
        the trace is interpolated between evaluations), and the training loss at which ends are compared.
    fit
        Share of rightly labeled training samples fitted, at which memorization is compared.

    Returns
    -------
    dict
        ``final_accuracy`` and ``final_train_loss`` (means over the last tenth), ``best_accuracy`` (over evaluations, as
        the paper has it), ``stopped_accuracy`` (at the best validation accuracy), ``peak_trace``, ``early_trace``,
        ``early_step``, ``accuracy_at_loss``, ``step_at_loss``, ``accuracy_at_fit``, and ``area_right``,
        ``area_wrong`` (means over training of the fitted shares).

    Examples
    --------
    >>> curves = pd.DataFrame({"step": [10, 20], "train_loss": [2.0, 1.0], "test_accuracy": [0.4, 0.6],
    ...                        "val_accuracy": [0.4, 0.5], "trace": [10.0, 40.0], "fit_right": [0.5, 0.7],
    ...                        "fit_wrong": [0.0, 0.0]})
    >>> found = summarize(curves, early_loss=1.5, late_loss=0.1)
    >>> round(found["early_trace"], 6), "accuracy_at_loss" in found
    (20.0, False)
    """
    c = curves
    end = c[c["step"] > 0.9 * c["step"].iloc[-1]]
    found = {
        "final_accuracy": float(end["test_accuracy"].mean()),
        "best_accuracy": float(c["test_accuracy"].max()),
        "stopped_accuracy": float(c["test_accuracy"].iloc[int(c["val_accuracy"].argmax())]),
        "final_train_loss": float(end["train_loss"].mean()),
        "area_right": _area(c["step"], c["fit_right"]),
        "area_wrong": _area(c["step"], c["fit_wrong"]),
    }
    traced = c["trace"].dropna()
    if len(traced):
        found["peak_trace"] = float(traced.max())
    below = np.flatnonzero(c["train_loss"] <= early_loss)
    if len(below) and below[0] > 0:
        i = int(below[0])
        (high, low), traces = c["train_loss"].iloc[i - 1 : i + 1], c["trace"].iloc[i - 1 : i + 1]
        share = (high - early_loss) / (high - low)
        found["early_trace"] = float(np.exp(np.interp(share, [0, 1], np.log(traces))))
        found["early_step"] = float(np.interp(share, [0, 1], c["step"].iloc[i - 1 : i + 1]))
    below = np.flatnonzero(c["train_loss"] <= late_loss)
    if len(below):
        found["accuracy_at_loss"] = float(c["test_accuracy"].iloc[int(below[0])])
        found["step_at_loss"] = float(c["step"].iloc[int(below[0])])
    fitted = np.flatnonzero(c["fit_right"] >= fit)
    if len(fitted):
        found["accuracy_at_fit"] = float(c["test_accuracy"].iloc[int(fitted[0])])
    return {k: v for k, v in found.items() if math.isfinite(v)}


def _area(step: pd.Series, value: pd.Series) -> float:
    """Mean over training, by the trapezoidal rule from the first evaluation on."""
    if len(step) < 2:
        return float(value.iloc[-1])
    return float(np.trapezoid(value, step) / (step.iloc[-1] - step.iloc[0]))
