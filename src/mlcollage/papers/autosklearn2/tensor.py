"""Losses of many pipelines on many tasks after more and more iterations: what is learned from (section 3)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from mlcollage.errors import InvalidInput, MissingFile

from .space import config_id

FloatArray = NDArray[np.float64]
_ARRAYS = ("valid", "test", "runtime")


@dataclass(frozen=True, eq=False, repr=False)
class PerformanceTensor:
    """Losses and run times of candidates on tasks.

    Parameters
    ----------
    valid, test
        ``(tasks, candidates, points)``: loss on validation and on test rows at each point of the learning curve. A
        curve that ended early is NaN afterwards. A failed run has the loss 1. A pair that was not measured is all NaN;
        see :meth:`complete`.
    runtime
        The same shape: seconds from the start of the fit to this point; cumulative.
    tasks
        Names.
    configs
        The candidates' configurations.
    budgets
        ``(points,)``, or ``(candidates, points)`` where curves differ: percent of the iterations, NaN where a
        candidate has no such point.
    meta_features
        ``(tasks, 2)``: number of columns and of rows; None where they are not known.

    Raises
    ------
    InvalidInput
        If shapes do not agree, or a loss is infinite.

    Examples
    --------
    >>> loss = np.array([[[0.4, 0.2], [0.3, 0.3]], [[0.5, 0.5], [0.6, 0.1]]])
    >>> tensor = PerformanceTensor(loss, loss, np.ones_like(loss), ["a", "b"], [{"k": 1}, {"k": 2}], [50, 100])
    >>> tensor.normalize()[0].round(2).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """

    valid: FloatArray
    test: FloatArray
    runtime: FloatArray
    tasks: Sequence[str]
    configs: Sequence[Mapping[str, Any]]
    budgets: ArrayLike
    meta_features: FloatArray | None = None
    budget_table: FloatArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        shape = self.valid.shape
        if len(shape) != 3:
            raise InvalidInput(f"valid must be (tasks, candidates, points), not {shape}.")
        for name in ("test", "runtime"):
            if getattr(self, name).shape != shape:
                raise InvalidInput(f"{name} is {getattr(self, name).shape}, and valid is {shape}; they must agree.")
            if np.isinf(getattr(self, name)).any():
                raise InvalidInput(f"{name} has infinite values; give a failed run the loss 1.")
        spent = np.where(np.isfinite(self.valid) & np.isfinite(self.test), self.runtime, 0.0)
        so_far = np.where(spent > 0, spent, 0.0)
        if np.isnan(spent).any() or (spent < 0).any():
            raise InvalidInput("runtime must be seconds of at least 0 wherever valid and test have a loss.")
        if (so_far < np.maximum.accumulate(so_far, axis=2) * (1 - 1e-9))[np.isfinite(self.valid + self.test)].any():
            raise InvalidInput("runtime must be seconds from the start of the fit, so it cannot fall along a curve.")
        if (len(self.tasks), len(self.configs)) != shape[:2]:
            raise InvalidInput(
                f"there are {len(self.tasks)} tasks and {len(self.configs)} configurations for losses of shape {shape}."
            )
        budgets = np.asarray(self.budgets, np.float64)
        if budgets.shape not in ((shape[2],), shape[1:]):
            raise InvalidInput(f"budgets are {budgets.shape}; expected {(shape[2],)} or {shape[1:]}.")
        object.__setattr__(self, "budget_table", np.broadcast_to(budgets, shape[1:]).copy())
        if self.meta_features is not None and np.shape(self.meta_features) != (shape[0], 2):
            raise InvalidInput(f"meta_features are {np.shape(self.meta_features)}; expected {(shape[0], 2)}.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of tasks, candidates and points."""
        return self.valid.shape

    @property
    def last(self) -> NDArray[np.int64]:
        """``(tasks, candidates)``: the last point of each curve; -1 where nothing was measured."""
        finite = np.isfinite(self.valid) & np.isfinite(self.test)
        return np.where(finite.any(2), self.shape[2] - 1 - finite[:, :, ::-1].argmax(2), -1)

    @property
    def measured(self) -> float:
        """Share of the pairs of task and candidate that were measured."""
        return float((self.last >= 0).mean())

    def __repr__(self) -> str:
        tasks, candidates, points = self.shape
        return (
            f"PerformanceTensor({tasks} tasks, {candidates} candidates, {points} points, {self.measured:.0%} measured)"
        )

    def complete(self) -> PerformanceTensor:
        """Only tasks for which every candidate was measured, so that a tensor in the making can be used."""
        return self.of_tasks(np.flatnonzero((self.last >= 0).all(1)))

    def of_tasks(self, index: ArrayLike) -> PerformanceTensor:
        """The part with these tasks, by number."""
        at = np.asarray(index)
        at = np.flatnonzero(at) if at.dtype == bool else at.astype(np.int64)
        if at.size and (at.min() < 0 or at.max() >= self.shape[0]):
            raise InvalidInput(f"of_tasks takes numbers from 0 to {self.shape[0] - 1}, not {at.tolist()[:5]}.")
        meta = None if self.meta_features is None else np.asarray(self.meta_features)[at]
        parts = {name: getattr(self, name)[at] for name in _ARRAYS}
        return replace(self, **parts, tasks=[self.tasks[int(i)] for i in at], meta_features=meta)

    def joined(self, other: PerformanceTensor, *, rescale: bool = False) -> PerformanceTensor:
        """Join the tasks of another tensor, which has the same candidates and points, to those of this one.

        Parameters
        ----------
        other
            Its candidates may be in another order; they are found by their configurations.
        rescale
            Bring the other's seconds to the speed of the machine that measured this one: they are divided by the median
            ratio, over candidates, of the median seconds of a fit.

        Raises
        ------
        InvalidInput
            If a task is in both, or candidates or budgets differ.

        Examples
        --------
        >>> loss = np.array([[[0.4], [0.2]]])
        >>> a = PerformanceTensor(loss, loss, np.ones_like(loss), ["a"], [{"k": 1}, {"k": 2}], [100])
        >>> b = PerformanceTensor(loss, loss, np.ones_like(loss), ["b"], [{"k": 2}, {"k": 1}], [100])
        >>> a.joined(b).tasks, a.joined(b).valid[1, :, 0].tolist()
        (['a', 'b'], [0.2, 0.4])
        """
        if not isinstance(other, PerformanceTensor):
            raise InvalidInput(f"joined takes a PerformanceTensor, not {type(other).__name__}.")
        if twice := sorted(set(self.tasks) & set(other.tasks)):
            raise InvalidInput(f"the task {twice[0]!r} is in both tensors; leave it out of one with of_tasks.")
        names = [config_id(c) for c in other.configs]
        mine = [config_id(c) for c in self.configs]
        if sorted(names) != sorted(mine):
            raise InvalidInput(
                f"the tensors have other candidates: {len(set(mine) ^ set(names))} are in one of them only; measure "
                "the same ones on every task."
            )
        order = [names.index(name) for name in mine]
        if not np.array_equal(self.budget_table, other.budget_table[order], equal_nan=True):
            raise InvalidInput("the tensors have losses at other budgets; measure the same points of the curves.")
        arrays = {n: getattr(other, n)[:, order] for n in _ARRAYS}
        if rescale:
            took = [np.nanmedian(np.nanmax(a, axis=2), axis=0) for a in (arrays["runtime"], self.runtime)]
            ratio = float(np.nanmedian(took[0] / np.where(took[1] > 0, took[1], np.nan)))
            if not 0 < ratio < np.inf:
                raise InvalidInput("seconds cannot be compared, for one of the tensors has none; leave out rescale.")
            arrays["runtime"] = arrays["runtime"] / ratio
        parts: dict[str, Any] = {n: np.concatenate([getattr(self, n), a]) for n, a in arrays.items()}
        known = [t.meta_features for t in (self, other) if t.meta_features is not None]
        meta = np.concatenate(known) if len(known) == 2 else None
        return replace(self, **parts, tasks=[*self.tasks, *other.tasks], meta_features=meta)

    def normalize(self) -> FloatArray:
        r"""Test losses in units of the task: :math:`(L - \min) / (\max - \min)` over all candidates and points.

        Returns
        -------
        ndarray of shape (tasks, candidates, points)
            A task on which all are equal has zeros.
        """
        with np.errstate(all="ignore"):
            low = np.nanmin(self.test, axis=(1, 2), keepdims=True)
            span = np.nanmax(self.test, axis=(1, 2), keepdims=True) - low
        return (self.test - low) / np.where(span > 0, span, 1.0)

    def rung_index(self, budgets: Sequence[float]) -> NDArray[np.int64]:
        """``(candidates, rungs)``: the point of the curve at each budget, or the nearest one below it.

        Raises
        ------
        InvalidInput
            If a candidate has no point at or below a budget.
        """
        found = np.empty((self.shape[1], len(budgets)), np.int64)
        for k, budget in enumerate(budgets):
            fits = self.budget_table <= budget * (1 + 1e-9)
            if not fits.any(1).all():
                lowest = float(np.nanmin(self.budget_table))
                raise InvalidInput(f"no point of the curves is at or below {budget:g}%; the first is at {lowest:g}%.")
            found[:, k] = np.where(fits, np.nan_to_num(self.budget_table, nan=-1.0), -1.0).argmax(1)
        return found

    def save(self, path: str | Path) -> None:
        """Write a Parquet file: a row for each point that was measured, names and configurations as metadata."""
        t, c, r = np.nonzero(np.isfinite(self.valid))
        table = pa.table(
            {
                "task": pa.array(t.astype(np.int32)),
                "candidate": pa.array(c.astype(np.int32)),
                "point": pa.array(r.astype(np.int16)),
                **{name: getattr(self, name)[t, c, r] for name in _ARRAYS},
            }
        )
        facts = {
            "shape": list(self.shape),
            "tasks": list(self.tasks),
            "configs": [dict(config) for config in self.configs],
            "budgets": [[None if np.isnan(b) else float(b) for b in row] for row in self.budget_table],
            "meta_features": None if self.meta_features is None else np.asarray(self.meta_features).tolist(),
        }
        pq.write_table(table.replace_schema_metadata({"tensor": json.dumps(facts)}), path, compression="zstd")

    @classmethod
    def load(cls, path: str | Path) -> PerformanceTensor:
        """Read a file of :meth:`save`.

        Raises
        ------
        MissingFile, InvalidInput
            If there is no such file, or it is something else.
        """
        if not Path(path).exists():
            raise MissingFile(f"there is no file {path}; expected a tensor that PerformanceTensor.save wrote.")
        try:
            table = pq.read_table(path)
            facts = json.loads((table.schema.metadata or {})[b"tensor"])
        except (pa.ArrowInvalid, KeyError, json.JSONDecodeError) as error:
            raise InvalidInput(f"{path} is no file of PerformanceTensor.save; give one that is.") from error
        columns = {name: table[name].to_numpy() for name in table.column_names}
        at = columns["task"], columns["candidate"], columns["point"]
        arrays = {}
        for name in _ARRAYS:
            arrays[name] = np.full(facts["shape"], np.nan)
            arrays[name][at] = columns[name]
        budgets = np.array(facts["budgets"], dtype=np.float64)
        meta = None if facts["meta_features"] is None else np.array(facts["meta_features"], np.float64)
        return cls(**arrays, tasks=facts["tasks"], configs=facts["configs"], budgets=budgets, meta_features=meta)

    @classmethod
    def from_folder(cls, folder: str | Path, configs: Mapping[str, Mapping[str, Any]], limit: int) -> PerformanceTensor:
        """Gather the files that :mod:`~mlcollage.papers.autosklearn2.measuring` wrote so far.

        Parameters
        ----------
        folder
            With one file for each task.
        configs
            Candidates by name.
        limit
            Iterations that are 100 %.
        """
        files = sorted(Path(folder).glob("*.parquet"), key=lambda f: (int(f.stem.split("-")[1]), f.stem))
        if not files:
            raise MissingFile(f"the folder {folder} holds no measured task yet; run the command that measures.")
        tables = [pd.read_parquet(file) for file in files]
        steps = sorted({int(i) for t in tables for i in t["iterations"]})
        names = list(configs)
        shape = len(files), len(names), len(steps)
        arrays = {name: np.full(shape, np.nan) for name in ("valid", "test", "seconds")}
        for i, table in enumerate(tables):
            known = table[table["candidate"].isin(names)]
            c = [names.index(name) for name in known["candidate"]]
            r = [steps.index(int(k)) for k in known["iterations"]]
            for name, values in arrays.items():
                values[i, c, r] = known[name].to_numpy()
        meta = np.array([[t["columns"].iloc[0], t["rows"].iloc[0]] for t in tables], np.float64)
        budgets = [100.0 * step / limit for step in steps]
        tasks = [f.stem for f in files]
        return cls(arrays["valid"], arrays["test"], arrays["seconds"], tasks, list(configs.values()), budgets, meta)
