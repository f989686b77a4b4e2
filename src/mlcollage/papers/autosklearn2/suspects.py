"""Columns that a user should look at before a score is believed: ids, copies of the target, and what gives it away."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score
from sklearn.tree import DecisionTreeClassifier

from .columns import TableCoder
from .rows import TableRows

_MOST_COLUMNS, _MOST_ROWS = 300, 1000


def suspicious_columns(rows: TableRows, y: NDArray, coder: TableCoder) -> list[str]:
    """Notes on columns, for a dense table; what is all but certain is a warning, too."""
    if sp.issparse(rows.numbers):
        return []
    names = coder.names_of_parts()
    notes, strong = [], []
    labels = y.dtype.kind not in "f" and len(np.unique(y)) <= 50
    copies = [
        j for j in range(rows.numbers.shape[1])
        if y.dtype.kind in "fiu" and len(np.unique(y)) >= 3 and np.array_equal(rows.numbers[:, j], y)
    ]  # fmt: skip
    for j in copies:
        strong.append(f"the column {names[j]} of X is the target itself, so the scores say nothing; drop it.")
    for j in range(rows.numbers.shape[1]):
        if j not in copies and _is_id(rows.numbers[:, j]):
            notes.append(
                f"the column {names[j]} counts the rows; if it is a number of the row or an id, drop it, for new rows "
                "have others."
            )
    if labels and len(y) >= 50:
        table = np.hstack([rows.numbers, rows.codes])
        for j in range(min(table.shape[1], _MOST_COLUMNS)):
            if j not in copies and _gives_away(table[:, j], y):
                strong.append(
                    f"the column {names[j]} alone predicts the target nearly without error; check that it is known at "
                    "the time of a prediction."
                )
    for note in strong:
        warnings.warn(note, stacklevel=5)
    return notes + strong


def _is_id(values: NDArray[np.float64]) -> bool:
    """Whole numbers, another one in each row, with hardly a gap between them."""
    if len(values) < 20 or not np.isfinite(values).all() or not (values == np.round(values)).all():
        return False
    return len(np.unique(values)) == len(values) and float(np.ptp(values)) < 2 * len(values)


def _gives_away(values: NDArray[np.float64], y: NDArray) -> bool:
    """Whether a small tree on this column alone has a balanced error below 0.02 on rows that it did not learn from."""
    finite = np.isfinite(values)
    values = np.where(finite, values, (values[finite].min() if finite.any() else 0.0) - 1)
    order = np.random.default_rng(0).permutation(len(y))[:_MOST_ROWS]
    column, labels = np.clip(values[order], -1e30, 1e30)[:, None], y[order]
    if len(np.unique(labels)) < 2:
        return False
    tree = DecisionTreeClassifier(max_leaf_nodes=2 * len(np.unique(y)), class_weight="balanced", random_state=0)
    found, fold = labels.copy(), np.arange(len(order)) % 4
    for k in range(4):
        found[fold == k] = tree.fit(column[fold != k], labels[fold != k]).predict(column[fold == k])
    return float(balanced_accuracy_score(labels, found)) > 0.98
