"""The claims, written before the runs, and the functions that compute what they are about."""

from __future__ import annotations

from functools import partial

import pandas as pd

from mlcollage.lab import Claim, Difference, Level, PerSeed

SHORT, LONG = 4, 16
"""Numbers of evaluated pipelines that claims name; the paper's are ten and sixty minutes."""


def value(rows: pd.DataFrame, metric: str, arm: str, **keys: float | str) -> float:
    """One number of one seed."""
    found = rows[(rows["metric"] == metric) & (rows["arm"] == arm)]
    for name, level in keys.items():
        found = found[found[name] == level]
    if len(found) != 1:
        raise LookupError(f"{len(found)} values of {metric} of {arm} at {keys}")
    return float(found["value"].iloc[0])


def short_portfolio_and_long_search(rows: pd.DataFrame) -> dict[str, float]:
    """Loss of the portfolio after 4 pipelines, and of the search from scratch after 16."""
    return {
        f"portfolio, {SHORT} pipelines": value(rows, "loss", "portfolio", evaluated=SHORT),
        f"search, {LONG} pipelines": value(rows, "loss", "search", evaluated=LONG),
    }


def ensemble_and_single(rows: pd.DataFrame) -> dict[str, float]:
    """Balanced error on test rows of the ensemble, and of the best single pipeline."""
    return {
        "ensemble": value(rows, "balanced_error", "both", model="ensemble"),
        "best single": value(rows, "balanced_error", "both", model="single"),
    }


_points = partial(Claim, factor=100.0, unit="pts", digits=1)
_at = {"evaluated": 8}

CLAIMS = (
    _points(
        id="C1",
        title="A quarter of the fits is enough with a portfolio",
        headline=True,
        sentence="On tasks that it was not learned from, the portfolio has a lower loss after 4 pipelines than"
        " a search from scratch after 16, or is at most 2 points of the task's range behind.",
        source="Table 3",
        paper_value="3.58 in 10 minutes against 7.17 in 60",
        estimand=PerSeed(
            short_portfolio_and_long_search,
            "normalized loss: portfolio after 4 pipelines minus search after 16",
            ("portfolio", "search"),
        ),
        direction="at_most",
        null=0.02,
        says={
            "supported": "Four pipelines of the portfolio do what sixteen of a search do",
            "contradicted": "Four pipelines of the portfolio are {effect} behind sixteen of a search",
            "inconclusive": "Whether four pipelines of the portfolio do what sixteen of a search do is open ({effect})",
        },
    ),
    _points(
        id="C2",
        title="A portfolio beats a search from scratch",
        headline=True,
        sentence="After 8 pipelines the portfolio's loss is lower than that of a search from scratch, on tasks"
        " that it was not learned from.",
        source="Table 2",
        paper_value="3.70 against 5.98 (hold-out, 10 minutes)",
        estimand=Difference("loss", "portfolio", "search", where=_at),
        direction="less",
        margin=0.01,
        says={
            "supported": "After eight pipelines a portfolio is {effect} ahead of a search",
            "contradicted": "After eight pipelines a portfolio is not ahead of a search ({effect})",
            "inconclusive": "Whether a portfolio is ahead of a search after eight pipelines is open ({effect})",
        },
    ),
    _points(
        id="C2b",
        title="A portfolio beats a random order",
        sentence="After 8 pipelines the portfolio's loss is lower than the mean over random orders of the same "
        "candidates.",
        source="our control",
        estimand=Difference("loss", "portfolio", "random", where=_at),
        direction="less",
        margin=0.01,
    ),
    _points(
        id="C2c",
        title="A portfolio beats the best of the nearest tasks",
        sentence="After 8 pipelines the portfolio's loss is lower than that of the best pipelines of the tasks"
        " with the most similar numbers of rows and columns.",
        source="Table 2",
        paper_value="3.70 against 5.29 (hold-out, 10 minutes)",
        estimand=Difference("loss", "portfolio", "nearest", where=_at),
        direction="less",
        margin=0.01,
    ),
    _points(
        id="C2d",
        title="A portfolio carries over to other kinds of tasks",
        sentence="After 8 pipelines a portfolio that was learned from the five other families of tasks has a "
        "lower loss than the mean over random orders.",
        source="our control",
        estimand=Difference("loss", "other_families", "random", where=_at),
        direction="less",
        margin=0.01,
    ),
    _points(
        id="C2e",
        title="Greedy picks are close to the best there can be",
        sentence="On the tasks that it was learned from, a portfolio of 8 loses at most 5 points more than any"
        " portfolio of 8 can, by the bound that is computed from the tensor.",
        source="Sec. 3.2",
        estimand=Level("bound_gap", "portfolio"),
        direction="at_most",
        null=0.05,
    ),
    _points(
        id="C3",
        title="No single policy is the best for all tasks",
        headline=True,
        sentence="On the authors' 208 tasks the best policy of each task has a lower loss than the policy that"
        " is best on the other tasks, by more than 2 points of the range.",
        source="Sec. 5.2",
        estimand=Difference("policy_loss", "oracle", "single_best"),
        direction="less",
        margin=0.02,
        says={
            "supported": "Choosing the right policy for each task could gain {effect}",
            "contradicted": "The best policy of each task gains less than 2 points ({effect})",
            "inconclusive": "What the best policy of each task gains is open ({effect})",
        },
    ),
    _points(
        id="C3b",
        title="Small tasks want cross-validation",
        sentence="On the authors' tasks with fewer than 5,000 rows ten folds have a lower loss than hold-out.",
        source="Sec. 5.2",
        estimand=Difference("policy_loss", "ten_folds_small", "holdout_small"),
        direction="less",
        margin=0.01,
    ),
    _points(
        id="C3c",
        title="Large tasks want hold-out",
        sentence="On the authors' tasks with 20,000 rows and more hold-out has a lower loss than ten folds.",
        source="Sec. 5.2",
        estimand=Difference("policy_loss", "holdout_large", "ten_folds_large"),
        direction="less",
        margin=0.01,
    ),
    _points(
        id="C4",
        title="The selector beats the single best policy",
        headline=True,
        sentence="On the authors' tasks, held out in turn, the policies that the selector picks have a lower "
        "loss than the policy that is best on the other tasks.",
        source="Table 8",
        paper_value="3.58 against 3.69, not significant",
        estimand=Difference("policy_loss", "selected", "single_best"),
        direction="less",
        margin=0.005,
        says={
            "supported": "The selector gains {effect} over the single best policy",
            "contradicted": "The selector gains nothing that matters over the single best policy ({effect})",
            "inconclusive": "Whether the selector gains over the single best policy is open ({effect})",
        },
    ),
    _points(
        id="C5",
        title="Results of fits that were stopped help",
        sentence="With little time, a random order has a lower loss if pipelines that were stopped count with their "
        "last step.",
        source="Table 10",
        paper_value="18.10 against 5.29 (10 minutes)",
        estimand=Difference("timed_loss", "intermittent", "bare"),
        direction="less",
        margin=0.02,
    ),
    _points(
        id="C5b",
        title="In the same time a portfolio gets further",
        headline=True,
        sentence="With little time, and stopped fits counted, the portfolio has a lower loss than a random order.",
        source="Table 10",
        paper_value="5.29 against 3.70 (10 minutes)",
        estimand=Difference("timed_loss", "portfolio_timed", "intermittent"),
        direction="less",
        margin=0.02,
        says={
            "supported": "In the same seconds the portfolio is {effect} ahead of a random order",
            "contradicted": "In the same seconds the portfolio is not ahead of a random order ({effect})",
            "inconclusive": "Whether the portfolio is ahead in the same seconds is open ({effect})",
        },
    ),
    _points(
        id="C6",
        title="An ensemble beats its best member",
        headline=True,
        sentence="In real fits the ensemble's balanced error on test rows is lower than that of the pipeline "
        "with the best validation loss.",
        source="Table 12",
        paper_value="3.58 against 5.01 (10 minutes)",
        estimand=PerSeed(ensemble_and_single, "balanced error: ensemble minus best single pipeline", ("both",)),
        direction="less",
        margin=0.002,
        says={
            "supported": "The ensemble's balanced error is {effect} lower than its best member's",
            "contradicted": "The ensemble is no better than its best member ({effect})",
            "inconclusive": "Whether the ensemble beats its best member is open ({effect})",
        },
    ),
    _points(
        id="L1",
        title="Starting from the portfolio pays in real fits",
        sentence="In real fits with equally many pipelines, the portfolio followed by a search has a lower "
        "balanced error on test rows than a search from scratch.",
        source="our control",
        estimand=Difference("balanced_error", "both", "scratch", where={"model": "ensemble"}),
        direction="less",
        margin=0.005,
    ),
)
