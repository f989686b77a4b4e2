"""Estimands: which numbers of the evidence a claim is about.

An estimand is a function of the evidence that gives a DataFrame with one row per seed (the index) and one column per
arm. One column is a level, two are treatment and control, more are the ordered levels of a trend. The classes below
cover the usual cases; they describe themselves (for the digest, and for the fingerprint that shows a later change of a
claim) and refuse evidence with several rows where one per seed is expected. A seed that lacks a value is a row with
NaN: the judge reports it. What else a reader must know stands in ``table.attrs["notes"]``; ``attrs["measured"]`` holds
the seeds of each column, which tells a NaN that was measured from an unpaired arm's own set of seeds;
``attrs["lacking"]`` those for which something that is needed is not there.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from mlcollage.errors import InvalidInput, MLCollageError, UnknownName
from mlcollage.lab.evidence import Evidence

At = int | Literal["last", "first", "mean", "max", "min"]
_SUMMARIES: dict[str, Callable[..., Any]] = {"mean": np.mean, "max": np.max, "min": np.min}
_RESERVED = {"arm", "seed", "metric", "step", "value", "run"}  # columns that every table has


def _listed(values: Sequence[object], most: int = 4) -> str:
    text = ", ".join(str(v) for v in values[:most])
    return text if len(values) <= most else f"{text} and {len(values) - most} more"


def _check(at: object, *wheres: Mapping[str, object]) -> None:
    for where in wheres:
        if reserved := [key for key in where if key in _RESERVED]:
            raise InvalidInput(f"where={dict(where)} may only name the study's free columns, not {reserved[0]!r}.")
    if at not in ("last", "first", "mean", "max", "min") and (isinstance(at, bool) or not isinstance(at, int)):
        raise InvalidInput(f"at={at!r} must be a step (int) or one of 'last', 'first', 'mean', 'max', 'min'.")


def _when(at: At, where: Mapping[str, object], log: bool = False) -> str:
    text = f"at step {at}" if isinstance(at, int) else f"{at} step" if at in ("last", "first") else f"{at} over steps"
    if where:
        text += ", where " + ", ".join(f"{k}={v!r}" for k, v in sorted(where.items()))
    return text + (", logarithms" if log else "")


def _one_per_seed(rows: pd.DataFrame, metric: str, name: object, at: At, notes: list[str]) -> pd.Series:
    """One value per seed from the rows of one arm (or level); ``at`` says which step."""
    # Two values for one seed and step would be averaged, or one of them taken, without anybody noticing.
    repeated = rows[rows.duplicated(["seed", "step"])]
    if len(repeated):
        seed, step = repeated.iloc[0][["seed", "step"]]
        count = int(((rows["seed"] == seed) & (rows["step"] == step)).sum())
        # The free columns in which the rows differ are what the claim forgot to fix.
        free = [c for c in rows.columns if c not in _RESERVED and rows[c].nunique(dropna=False) > 1]
        hint = f" They differ in {_listed(free)}: fix it with where={{...}}." if free else ""
        raise InvalidInput(
            f"metric {metric!r} of {name} has {count} rows for seed {seed} at step {step}, where one was expected."
            f"{hint} If they are episodes or batches, average them inside the run: the seed is the unit of replication."
        )
    if isinstance(at, int):
        rows = rows[rows["step"] == at]
        if rows.empty:
            raise InvalidInput(f"metric {metric!r} of {name} was not measured at step {at}.")
        return rows.set_index("seed")["value"]
    # Each seed's own last step: seeds may have stopped at different ones, which is noted below.
    by_seed = rows.sort_values("step").groupby("seed")
    if at in ("last", "first"):
        picked = by_seed.nth(-1 if at == "last" else 0)  # a row of the table, with its step
        steps = picked["step"]
        if steps.nunique() > 1:
            notes.append(f"the {at} step of {name} is not the same in all seeds ({steps.min()} to {steps.max()})")
        return picked.set_index("seed")["value"]
    # A NaN at any step must show in the summary: pandas would skip it.
    summary = _SUMMARIES[at]
    return pd.Series({seed: float(summary(of_seed["value"].to_numpy())) for seed, of_seed in by_seed})


def _measured(
    evidence: Evidence, metric: str, at: At, sides: Iterable[tuple[str, str, Mapping[str, object]]], log: bool = False
) -> pd.DataFrame:
    """One row per seed, one column for each side: its name, its arm, and the values of free columns."""
    notes: list[str] = []
    columns = {
        name: _one_per_seed(evidence.select(metric, arm=arm, **where), metric, name, at, notes)
        for name, arm, where in sides
    }
    table = _gather(columns, notes)
    if not log:
        return table
    if (table <= 0).any().any():
        raise InvalidInput(f"metric {metric!r} has values <= 0, which have no logarithm; use log=False.")
    logarithms = table.apply(np.log)
    logarithms.attrs = table.attrs  # pandas drops them
    return logarithms


def _gather(columns: Mapping[Any, pd.Series], notes: list[str]) -> pd.DataFrame:
    # A row for each seed of any column; NaN where a column lacks it.
    table = pd.DataFrame(dict(columns)).sort_index().astype(np.float64)
    table.index.name = "seed"
    table.attrs["notes"] = list(dict.fromkeys(notes))
    # A NaN in a column may be a seed that this arm was never given; these seeds were.
    table.attrs["measured"] = {name: tuple(sorted(values.index)) for name, values in columns.items()}
    return table


@dataclass(frozen=True)
class Difference:
    """Treatment minus control, seed by seed: columns ``[treatment, control]``.

    Parameters
    ----------
    metric
        Name of the metric.
    treatment, control
        Names of the arms. The same arm twice is allowed if the ``where`` of the two differ.
    at
        A step, or ``"last"``, ``"first"`` (each seed's own), ``"mean"`` (area under the curve, for even steps),
        ``"max"``, ``"min"`` over steps.
    where
        Values of free columns for both arms.
    treatment_where, control_where
        Further ones for one arm.
    log
        Compare logarithms: the effect is then a log ratio.

    Raises
    ------
    UnknownName
        When called, if the metric, an arm or a column is not in the evidence.
    InvalidInput
        When called, if a seed has several rows where one is expected.

    Examples
    --------
    >>> from mlcollage.lab.run import Scale
    >>> table = pd.DataFrame({"arm": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1], "metric": "accuracy", "step": 9,
    ...                       "value": [0.9, 0.8, 0.7, 0.7]})
    >>> estimand = Difference("accuracy", "a", "b")
    >>> estimand(Evidence("demo", Scale.QUICK, "digits", table)).to_numpy().tolist()
    [[0.9, 0.7], [0.8, 0.7]]
    >>> estimand.describe()
    'accuracy: a − b, last step'
    """

    metric: str
    treatment: str
    control: str
    at: At = "last"
    where: Mapping[str, object] = field(default_factory=dict)
    treatment_where: Mapping[str, object] = field(default_factory=dict)
    control_where: Mapping[str, object] = field(default_factory=dict)
    log: bool = False

    def __post_init__(self) -> None:
        _check(self.at, self.where, self.treatment_where, self.control_where)
        first, second = self._wheres()
        if self.treatment == self.control and first == second:
            raise InvalidInput(f"treatment and control are both {self.treatment!r} under the same conditions.")

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms the estimand needs."""
        return (self.treatment, self.control)

    def __call__(self, evidence: Evidence) -> pd.DataFrame:
        """One row per seed, two columns."""
        sides = zip(self._names(), self.arms, self._wheres(), strict=True)
        return _measured(evidence, self.metric, self.at, sides, self.log)

    def _wheres(self) -> list[dict[str, object]]:
        return [{**self.where, **own} for own in (self.treatment_where, self.control_where)]

    def _names(self) -> tuple[str, str]:
        # One arm under two conditions, such as a metric at two widths: the conditions then name the columns.
        if self.treatment != self.control:
            return self.treatment, self.control
        a, b = (
            ", ".join([self.treatment, *(f"{k}={v}" for k, v in sorted(where.items()))])
            for where in (self.treatment_where, self.control_where)
        )
        return a, b

    def describe(self) -> str:
        """One line for the digest and the claim's fingerprint."""
        a, b = (
            arm + (f" ({', '.join(f'{k}={v!r}' for k, v in sorted(where.items()))})" if where else "")
            for arm, where in ((self.treatment, self.treatment_where), (self.control, self.control_where))
        )
        return f"{self.metric}: {a} − {b}, {_when(self.at, self.where, self.log)}"

    def __hash__(self) -> int:
        return hash(self.describe())


@dataclass(frozen=True)
class Level:
    """The value of one arm, seed by seed: one column.

    Parameters
    ----------
    metric, at, where, log
        As in :class:`Difference`.
    arm
        Name of the arm.

    Examples
    --------
    >>> Level("identity_error", "exact", at="max").describe()
    'identity_error: exact, max over steps'
    """

    metric: str
    arm: str
    at: At = "last"
    where: Mapping[str, object] = field(default_factory=dict)
    log: bool = False

    def __post_init__(self) -> None:
        _check(self.at, self.where)

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms the estimand needs."""
        return (self.arm,)

    def __call__(self, evidence: Evidence) -> pd.DataFrame:
        """One row per seed, one column."""
        return _measured(evidence, self.metric, self.at, [(self.arm, self.arm, self.where)], self.log)

    def describe(self) -> str:
        """One line for the digest and the claim's fingerprint."""
        return f"{self.metric}: {self.arm}, {_when(self.at, self.where, self.log)}"

    def __hash__(self) -> int:
        return hash(self.describe())


@dataclass(frozen=True)
class Trend:
    """Values along ordered levels, seed by seed: one column per level, in order.

    Parameters
    ----------
    metric
        Name of the metric.
    over
        A free column whose values are the levels (or ``"step"``), or the ordered names of arms.
    arm
        The arm, if ``over`` is a column; ``None`` if the metric has one arm only.
    levels
        Which values of the column, in order; default all, sorted.
    at, where
        As in :class:`Difference`; ``at`` is not used over steps.

    Raises
    ------
    UnknownName, InvalidInput
        As in :class:`Difference`.

    Examples
    --------
    >>> Trend("accuracy", over="width", arm="gln").describe()
    'accuracy over width: gln, last step'
    >>> Trend("accuracy", over=("k2", "k4", "k8")).describe()
    'accuracy over arms: k2 → k4 → k8, last step'
    """

    metric: str
    over: str | Sequence[str]
    arm: str | None = None
    levels: Sequence[str | int | float | bool] | None = None
    at: At = "last"
    where: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.at, self.where)
        if isinstance(self.over, str):
            # Seeds are what a trend is tested over, and a metric's value cannot be its own level.
            if self.over in _RESERVED - {"step"}:
                raise InvalidInput(f"over={self.over!r} must be a free column, 'step', or the ordered names of arms.")
        else:
            object.__setattr__(self, "over", tuple(self.over))  # a list would have no hash, and could be changed later
            if self.arm is not None or self.levels is not None:
                raise InvalidInput("a trend over arms takes neither arm nor levels: over=(...) orders the arms.")
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(self.levels))
        order = self.levels if isinstance(self.over, str) else self.over
        # Of two levels every order is a trend.
        if order is not None and (len(order) < 3 or len(set(order)) < len(order)):
            raise InvalidInput(f"a trend needs at least 3 different ordered levels; got {list(order)}.")

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms the estimand needs; empty if it takes the only one there is."""
        if not isinstance(self.over, str):
            return tuple(self.over)
        return () if self.arm is None else (self.arm,)

    def __call__(self, evidence: Evidence) -> pd.DataFrame:
        """One row per seed, one column per level."""
        if not isinstance(self.over, str):
            return _measured(evidence, self.metric, self.at, [(arm, arm, self.where) for arm in self.over])
        notes: list[str] = []
        columns: dict[Any, pd.Series] = {}
        rows = evidence.select(self.metric, arm=self.arm, **self.where)
        if self.over not in rows.columns:
            raise UnknownName(
                f"metric {self.metric!r} has no column {self.over!r}; it has {_listed(list(rows.columns), 20)}."
            )
        if self.arm is None and rows["arm"].nunique() > 1:
            raise InvalidInput(f"metric {self.metric!r} has the arms {_listed(sorted(set(rows['arm'])))}; name one.")
        levels = self.levels if self.levels is not None else sorted(rows[self.over].dropna().unique().tolist())
        for level in levels:
            of_level = rows[rows[self.over] == level]
            if of_level.empty:
                raise InvalidInput(f"metric {self.metric!r} was not measured at {self.over}={level!r}.")
            at: At = "last" if self.over == "step" else self.at  # a level is then one step, which is its last
            columns[level] = _one_per_seed(of_level, self.metric, f"{self.over}={level}", at, notes)
        return _gather(columns, notes)

    def describe(self) -> str:
        """One line for the digest and the claim's fingerprint."""
        when = _when(self.at, self.where)
        if not isinstance(self.over, str):
            return f"{self.metric} over arms: {' → '.join(self.over)}, {when}"
        order = "" if self.levels is None else f" ({' → '.join(map(str, self.levels))})"
        return f"{self.metric} over {self.over}{order}: {self.arm or 'the only arm'}, {when}"

    def __hash__(self) -> int:
        return hash(self.describe())


@dataclass(frozen=True)
class PerSeed:
    """Any statistic of one seed's measurements.

    Parameters
    ----------
    function
        Takes all rows of one seed (columns ``arm, metric, step, value`` and the free ones) and gives a number, or a
        mapping of arm to number (two: treatment and control; more: ordered levels).
    description
        What it computes, for the digest. A hash of the function's source goes with it into the fingerprint.
    arms
        Arms it needs, so that failed runs of others are not held against the claim, nor seeds that none of them was
        given; empty: all.

    Notes
    -----
    A ``LookupError`` (``IndexError``, ``KeyError``, an unknown arm) in some seeds means that they lack something: they
    become NaN and are reported. In all seeds it is a defect of the function and is raised.

    Examples
    --------
    >>> from mlcollage.lab.run import Scale
    >>> table = pd.DataFrame({"arm": "a", "seed": [0, 0, 1, 1], "metric": "loss", "step": [0, 1, 0, 1],
    ...                       "value": [2.0, 1.0, 3.0, 1.0]})
    >>> drop = PerSeed(lambda rows: rows["value"].iloc[0] - rows["value"].iloc[-1], "first loss minus last loss")
    >>> drop(Evidence("demo", Scale.QUICK, "digits", table))["value"].tolist()
    [1.0, 2.0]
    """

    function: Callable[[pd.DataFrame], float | Mapping[str, float]]
    description: str
    arms: tuple[str, ...] = ()

    def __call__(self, evidence: Evidence) -> pd.DataFrame:
        """One row per seed, one column per number that the function gives."""
        rows: dict[int, Mapping[str, float]] = {}
        lacking: dict[int, LookupError] = {}
        table = evidence.table
        # A study may give an experiment fewer seeds than others: those without any of its arms are not missing.
        own = table[table["arm"].isin(self.arms)] if self.arms else table  # rows of the arms that are needed
        for seed in sorted(set((table if own.empty else own)["seed"])):
            try:
                # All rows of the seed, not only those of the arms: the function may read what is drawn once for all.
                result = self.function(evidence.table[evidence.table["seed"] == seed])
            except LookupError as error:
                lacking[int(seed)] = error
                continue
            rows[int(seed)] = result if isinstance(result, Mapping) else {"value": float(result)}
        # Some seeds without the metric are data; all of them is a slip in the function or the study.
        if lacking and not rows:
            raise next(iter(lacking.values()))
        table = pd.DataFrame.from_dict(rows, orient="index").astype(np.float64)
        table = table.reindex(sorted({*rows, *lacking}))  # seeds that lack something are rows of NaN
        table.index.name = "seed"
        table.attrs["lacking"] = tuple(lacking)
        table.attrs["notes"] = [
            f"{self.description} cannot be computed for seed {seed}: {_sentence(error)}"
            for seed, error in lacking.items()
        ]
        return table

    def describe(self) -> str:
        """The description and a hash of the source, so that a change of either shows."""
        try:
            # Part of the claim: a changed function is a changed claim, although its description is the same.
            source = inspect.getsource(self.function)
        except (OSError, TypeError):
            source = f"{getattr(self.function, '__module__', '')}.{getattr(self.function, '__qualname__', '')}"
        return f"{self.description} [source {hashlib.sha256(source.encode()).hexdigest()[:8]}]"

    def __hash__(self) -> int:
        return hash(self.describe())


def one_value(rows: pd.DataFrame, metric: str, arm: str, **where: object) -> float:
    """The one number that one seed has of a metric of an arm, for the functions of :class:`PerSeed`.

    Parameters
    ----------
    rows
        Rows of one seed.
    metric, arm
        What was measured, and of which arm.
    **where
        Values of free columns.

    Raises
    ------
    LookupError
        If there is no such row, or more than one; the seed then lacks the number.

    Examples
    --------
    >>> rows = pd.DataFrame({"arm": "net", "metric": "score", "width": [8, 32], "value": [0.5, 0.7]})
    >>> one_value(rows, "score", "net", width=32)
    0.7
    """
    found = rows[(rows["metric"] == metric) & (rows["arm"] == arm)]
    for key, wanted in where.items():
        found = found[found[key] == wanted]
    if len(found) != 1:
        at = f" where {', '.join(f'{k}={v!r}' for k, v in where.items())}" if where else ""
        raise LookupError(f"{len(found)} values of {metric} of {arm}{at}; one was expected")
    return float(found["value"].iloc[0])


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, MLCollageError) else f"{type(error).__name__}: {error}"
