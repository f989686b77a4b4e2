"""What the study measures while networks train, and the numbers that its claims are about."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mlcollage.lab.measurements import Measurements

from .labels import derive
from .training import Stack

__all__ = ["Problem", "Recorder", "evaluation_steps", "summarize", "tail"]


@dataclass(frozen=True)
class Problem:
    """Data of one seed; labels of training and validation may be wrong, those of the test set are not."""

    x: Tensor
    y: Tensor
    wrong: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor

    def to(self, device: str) -> Problem:
        """The same data on a device."""
        return Problem(*(getattr(self, f.name).to(device) for f in fields(self)))


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
    """Measures a stack of networks, one row of the curves a replica.

    Parameters
    ----------
    problems, seeds
        One a replica.
    trace_size
        Training samples on which Tr(F) is drawn.
    """

    def __init__(self, problems: list[Problem], seeds: Sequence[int], trace_size: int) -> None:
        self.problems, self.seeds, self.trace_size = problems, seeds, trace_size
        self.rows: list[dict[str, float]] = []

    def measure(self, stack: Stack, step: int, *, ratio: bool = False) -> None:
        """Loss, accuracies and Tr(F) of every replica; with ``ratio`` also gradient norms at wrong and right labels."""
        from mlcollage.measure.fisher import fisher_trace

        for r, p in enumerate(self.problems):
            model = stack.module(r)
            with torch.no_grad():
                train, val, test = (model(x) for x in (p.x, p.x_val, p.x_test))
            right = train.argmax(1) == p.y
            row = {
                "replica": r,
                "step": step,
                "train_loss": float(F.cross_entropy(train, p.y)),
                "val_accuracy": _share(val.argmax(1) == p.y_val),
                "test_accuracy": _share(test.argmax(1) == p.y_test),
                "fit_right": _share(right[~p.wrong]),
                "fit_wrong": _share(right[p.wrong]),
            }
            if math.isfinite(row["train_loss"]):
                source = derive(self.seeds[r], 7, step)
                row["trace"] = fisher_trace(model, p.x[: self.trace_size], method="mc", generator=source).value
                if ratio and bool(p.wrong.any()):
                    row["norm_log_ratio"] = _norm_ratio(model, p)
            self.rows.append(row)

    def curves(self, replica: int) -> pd.DataFrame:
        """One row an evaluation."""
        table = pd.DataFrame([row for row in self.rows if row["replica"] == replica])
        return table.drop(columns="replica").sort_values("step").reset_index(drop=True)

    def last(self, metric: str, evaluations: int = 1) -> npt.NDArray[np.float64]:
        """Means of the latest values of every replica."""
        n = len(self.problems)
        return np.array([row[metric] for row in self.rows[-n * evaluations :]]).reshape(evaluations, n).mean(0)

    def write(
        self, m: Measurements, arm: Callable[[int], str], keys: Callable[[int], Mapping[str, float | str]]
    ) -> None:
        """All curves, each replica under its arm and keys (its seed among them)."""
        for row in self.rows:
            r = int(row["replica"])
            for metric, value in row.items():
                if metric not in ("replica", "step") and math.isfinite(value):
                    m.add(metric, value, step=int(row["step"]), arm=arm(r), **keys(r))


def _share(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else math.nan


def _norm_ratio(model: torch.nn.Module, p: Problem, most: int = 500) -> float:
    """Logarithm of the mean gradient norm at wrong labels over that at right ones."""
    from mlcollage.measure.grad_norms import per_example_grad_sqnorm

    squares = per_example_grad_sqnorm(model, F.cross_entropy, p.x[:most], p.y[:most], reduction="mean")
    norms, wrong = squares.detach().sqrt(), p.wrong[:most]
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
