"""Scores of one pipeline after 2, 4, 8, ... iterations, by hold-out or cross-validation (section 2.1.2, Figure 2).

The folds of a cross-validation go on together, so that there are predictions of every row after each step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import (
    GroupKFold,
    GroupShuffleSplit,
    KFold,
    ShuffleSplit,
    StratifiedGroupKFold,
    StratifiedKFold,
)

from mlcollage.errors import InvalidInput

from .pipeline import FloatArray, IterativePipeline, doubling
from .policy import Policy
from .rows import TableRows
from .space import Kind, Value

Split = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass
class FitStep:
    """What is known of a pipeline after some iterations.

    Parameters
    ----------
    iterations
        Done so far.
    valid
        Predictions of the validation rows: probabilities ``(rows, classes)``, or values ``(rows, 1)``; the rows are
        those of :func:`validation_rows`.
    models
        The fitted pipelines, one for each fold. They go on learning with the next step.
    done
        Whether the learners stopped by themselves, or have all their iterations.
    """

    iterations: int
    valid: FloatArray
    models: list[IterativePipeline]
    done: bool


def make_splits(
    policy: Policy,
    y: NDArray,
    kind: Kind,
    *,
    groups: NDArray | None = None,
    copies: NDArray | None = None,
    seed: int = 0,
) -> list[Split]:
    """Training and validation rows of each fold; classes in proportion, groups whole.

    Parameters
    ----------
    policy
        A third of the rows for ``"holdout"``, else its folds.
    y
        Targets; classes that are rarer than the folds are kept in training where they can be.
    kind
        ``"classification"`` or ``"regression"``.
    groups
        TableRows of one group are on one side.
    copies
        ``(rows,)``: the same number for exact copies, which stay together; used where no groups are given.
    seed
        Of the order.

    Raises
    ------
    InvalidInput
        If there are fewer groups or rows than folds.
    """
    n = len(y)
    if groups is None and copies is not None and len(set(copies.tolist())) < n:
        # Split one row of each set of copies; the others follow it.
        _, first, place = np.unique(copies, return_index=True, return_inverse=True)
        parts = make_splits(policy, y[first], kind, seed=seed)
        return [tuple(np.flatnonzero(np.isin(place, side)) for side in part) for part in parts]  # type: ignore[misc]
    folds = 3 if policy.evaluation == "holdout" else policy.folds
    if groups is not None:
        found = len(np.unique(groups))
        if found < folds:
            few = "give a policy with fewer folds" if policy.evaluation == "cv" and found > 1 else "give smaller groups"
            raise InvalidInput(f"there are {found} groups, and {policy} needs {folds} at least; {few}.")
        if kind == "classification":
            splitter: Any = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        elif policy.evaluation == "holdout":
            splitter = GroupShuffleSplit(1, test_size=1 / 3, random_state=seed)
        else:
            splitter = GroupKFold(folds, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            parts = list(splitter.split(np.zeros(n), y, groups))
    else:
        if n < folds:
            raise InvalidInput(f"there are {n} rows, and {policy} needs {folds} at least.")
        if kind == "classification":
            parts = _stratified(y, folds, seed)
        elif policy.evaluation == "holdout":
            parts = list(ShuffleSplit(1, test_size=1 / 3, random_state=seed).split(np.zeros(n)))
        else:
            parts = list(KFold(folds, shuffle=True, random_state=seed).split(np.zeros(n)))
    return parts[:1] if policy.evaluation == "holdout" else parts


def _stratified(y: NDArray, folds: int, seed: int) -> list[Split]:
    """Stratified folds; a class of one row stays in training in every fold."""
    _, code, counts = np.unique(y, return_inverse=True, return_counts=True)
    single = np.flatnonzero(np.isin(code, np.flatnonzero(counts == 1)))
    rest = np.setdiff1d(np.arange(len(y)), single)
    if len(rest) < folds or counts.max() < folds:
        splitter: Any = KFold(folds, shuffle=True, random_state=seed)
    else:
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes rarer than the folds are named in the report
        parts = list(splitter.split(np.zeros(len(rest)), y[rest]))
    return [(np.sort(np.concatenate([rest[a], single])), rest[b]) for a, b in parts]


def validation_rows(splits: list[Split]) -> NDArray[np.int64]:
    """The rows that are predicted, in the order of :attr:`FitStep.valid`."""
    return np.concatenate([valid for _, valid in splits])


def evaluate_steps(
    config: Mapping[str, Value],
    kind: Kind,
    rows: TableRows,
    y: NDArray,
    splits: list[Split],
    *,
    n_classes: int = 0,
    sample_weight: FloatArray | None = None,
    iterations: int | None = None,
    seed: int = 0,
    go_on: Callable[[], bool] = lambda: True,
) -> Iterator[FitStep]:
    """Fit a pipeline on each fold, step by step; a generator.

    Parameters
    ----------
    config
        The pipeline.
    kind, n_classes
        What is predicted.
    rows, y, sample_weight
        All rows that may be used.
    splits
        Of :func:`make_splits`.
    iterations
        Where to stop; by default the learner's full number.
    seed
        Of the learner.
    go_on
        Asked before each fold of each step; False ends the generator, and a step that is half done is not given.

    Yields
    ------
    FitStep

    Examples
    --------
    >>> from mlcollage.papers.autosklearn2.space import pipeline_space
    >>> X = np.random.default_rng(0).normal(size=(90, 3))
    >>> y = (X[:, 0] > 0).astype(int)
    >>> splits = make_splits(Policy("cv", 3), y, "classification")
    >>> config = pipeline_space().default()
    >>> steps = evaluate_steps(config, "classification", TableRows.of(X), y, splits, n_classes=2, iterations=8)
    >>> [(s.iterations, s.valid.shape, s.done) for s in steps]
    [(2, (90, 2), False), (4, (90, 2), False), (8, (90, 2), True)]
    """
    models: list[IterativePipeline] = []
    for train, _ in splits:
        if not go_on():
            return
        weight = None if sample_weight is None else sample_weight[train]
        models.append(IterativePipeline(config, kind, n_classes, seed).start(rows[train], y[train], weight))
    held = [rows[valid] for _, valid in splits]
    limit = models[0].limit if iterations is None else min(iterations, models[0].limit)
    for step in doubling(limit):
        parts = []
        for model, part in zip(models, held, strict=True):
            if not go_on():
                return
            parts.append(model.advance(step).predict(part))
        done = step >= limit or all(m.done for m in models)
        yield FitStep(step, np.concatenate(parts), models, done)
        if done:
            return
