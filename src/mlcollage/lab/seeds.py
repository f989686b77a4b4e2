"""Which seeds count: those that were run and lost their value, those that repeat another, and in what units they are.

A seed whose run crashed, or gave NaN, is not a seed that was never run: what made it fail may be what the claim is
about. The judge counts it against the claim. A seed that repeats another in every number is the same run twice, and
counts once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd

from mlcollage.lab.claim import Claim
from mlcollage.lab.evidence import Evidence, Failure
from mlcollage.lab.run import Run

_IDENTITY = {"study", "experiment", "scale", "workload", "run", "seed", "value"}
_OFF_GRID = 2  # equal numbers that are no simple fraction: not by chance
_ON_GRID = 6  # equal numbers that are (accuracies on a small test set) ...
_CHANCE = 1e-3  # ... and how probable all of them may be by chance
_LARGEST_SET = 20_000  # examples of a test set whose accuracies are known as fractions


def plural(count: int) -> str:
    """The ending of a noun."""
    return "" if count == 1 else "s"


def listed(values: Iterable[object]) -> str:
    """Names in one line."""
    return ", ".join(str(v) for v in values)


def relevant_failures(claim: Claim, evidence: Evidence) -> list[Failure]:
    """Failed runs that could have fed the claim."""
    return [f for f in evidence.failures if _could_feed(claim, evidence, f.run)]


def awaited_runs(claim: Claim, evidence: Evidence) -> list[Run]:
    """Runs that are neither finished nor failed and that the claim needs, as far as one can tell."""
    arms = set(getattr(claim.estimand, "arms", ()))
    there = set(evidence.table["arm"]) if len(evidence.table) else set()
    # Where one of its arms is not there yet, or it does not name them, any experiment may bring what it needs.
    feeding = _feeding(claim, evidence) if arms and arms <= there else None
    return [
        run
        for run in evidence.waiting
        if _could_feed(claim, evidence, run) and (not feeding or run.experiment in feeding)
    ]


def _could_feed(claim: Claim, evidence: Evidence, run: Run) -> bool:
    """Whether a run is of the claim's arms, or of an arm name that no row carries (replicas)."""
    arms = getattr(claim.estimand, "arms", ())
    # A run of an arm that nothing else has measured may be the claim's arm under the name of its experiment.
    measured = set(evidence.table["arm"]) if len(evidence.table) else set()
    return not arms or run.arm in arms or run.arm not in measured


def _feeding(claim: Claim, evidence: Evidence) -> set[str] | None:
    """Experiments whose rows the claim reads; None if the table does not say."""
    table = evidence.table
    if "experiment" not in table.columns:
        return None
    # Estimands that are plain functions say neither; then all arms and metrics may matter.
    arms, metric = getattr(claim.estimand, "arms", ()), getattr(claim.estimand, "metric", None)
    rows = table[table["arm"].isin(arms)] if arms else table
    if metric is not None:
        rows = rows[rows["metric"] == metric]
    return set(rows["experiment"])


def lost_seeds(claim: Claim, evidence: Evidence, table: pd.DataFrame) -> tuple[list[int], ...]:
    """Seeds that were run for the claim and have no value: NaN, or none because a run failed.

    Not lost are seeds whose run is not finished yet, and those that an arm was never given.

    Parameters
    ----------
    claim, evidence
        What is judged.
    table
        What the estimand gave: a row per seed.

    Returns
    -------
    tuple of lists of int
        One list; for two arms that are not paired one for each.
    """
    unpaired = table.shape[1] == 2 and not claim.paired
    groups = [[c] for c in table.columns] if unpaired else [list(table.columns)]
    measured = table.attrs.get("measured")
    if measured is None:  # a row that is there was computed, unless the estimand says that it could not be
        lacking = set(table.attrs.get("lacking", ()))
        measured = dict.fromkeys(table.columns, set(table.index) - lacking)
    feeding = _feeding(claim, evidence)
    failures = [
        f for f in relevant_failures(claim, evidence) if feeding is None or not feeding or f.run.experiment in feeding
    ]
    runs = [r for r in evidence.runs if feeding is None or r.experiment in feeding]

    def was_run(seed: int, arm: object) -> bool:
        """Whether all that the arm needs was run with this seed, with or without success."""
        if not evidence.runs:
            return not evidence.missing
        arms = getattr(claim.estimand, "arms", ())
        tried: dict[tuple[str, str], set[int]] = {}
        for run in [*runs, *(f.run for f in failures)]:
            tried.setdefault((run.experiment, run.arm), set()).update(run.seeds)
        named = {key for key in tried if key[1] == arm} or {key for key in tried if key[1] in arms} or set(tried)
        return bool(named) and all(seed in tried[key] for key in named)

    found = []
    for group in groups:
        finite = pd.DataFrame(np.isfinite(table[group].to_numpy()), index=table.index, columns=group)
        lost = set()
        for seed in table.index[~finite.all(axis=1)]:
            for column in group:
                if not finite.at[seed, column] and (
                    seed in measured[column] or (not unpaired and was_run(seed, column))
                ):
                    lost.add(seed)
        complete = set(table.index[finite.all(axis=1)])
        for failure in failures:
            if not unpaired or failure.run.arm == group[0] or failure.run.arm not in table.columns:
                lost |= set(failure.run.seeds) - complete
        found.append(sorted(lost))
    return tuple(found)


def copied_seeds(claim: Claim, evidence: Evidence, table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The estimand's table without seeds that repeat an earlier one in every number, and a sentence on each.

    All numbers of the claim's arms are compared, not only those the claim is about. A number that is the same for all
    seeds shows nothing; at least two others must agree that are no simple fractions, or so many of those that chance
    is ruled out.

    Returns
    -------
    DataFrame
        The table, a seed less for each copy. Arms that are not paired lose their copies one by one.
    list of str
        What was left out.
    """
    unpaired = table.shape[1] == 2 and not claim.paired
    arms = tuple(getattr(claim.estimand, "arms", ()))
    groups: list[tuple[list[Hashable], tuple[str, ...]]] = [(list(table.columns), arms)]
    if unpaired:
        groups = [([c], (str(c),) if c in arms else arms) for c in table.columns]
    notes: list[str] = []
    kept, attrs = table.copy(), dict(table.attrs)  # pandas may drop attrs on the way
    for columns, of_arms in groups:
        part = table[columns].dropna()
        twins = part.index[part.duplicated(keep=False)]
        if len(twins) < 2 or evidence.table.empty:
            continue
        for copy, (original, count) in _repeats(evidence.table, of_arms, list(twins)).items():
            whose = f" of {columns[0]}" if unpaired else ""
            notes.append(f"seed {copy}{whose} repeats seed {original} exactly, in all {count} numbers: counted once")
            kept.loc[copy, columns] = np.nan
            before = attrs.get("measured") or dict.fromkeys(table.columns, tuple(table.index))
            attrs["measured"] = {
                c: tuple(s for s in seeds if c not in columns or s != copy) for c, seeds in before.items()
            }
    if notes:
        kept = kept[~(kept.isna().all(axis=1) & ~table.isna().all(axis=1))]
    kept.attrs = attrs
    return kept, notes


def _repeats(rows: pd.DataFrame, arms: Sequence[str], seeds: list[int]) -> dict[int, tuple[int, int]]:
    """For each seed that repeats an earlier one, which, and how many numbers the two share."""
    if arms:
        rows = rows[rows["arm"].isin(arms)]
    keys = [c for c in rows.columns if c not in _IDENTITY]
    if rows.empty:
        return {}
    name = rows.groupby(keys, dropna=False, sort=False).ngroup()
    turn = rows.groupby([name, rows["seed"]]).cumcount()
    wide = pd.Series(rows["value"].to_numpy(), index=[name, turn, rows["seed"]]).unstack()  # (numbers, seeds)
    numbers, matrix = wide.index.get_level_values(0).to_numpy(), wide.to_numpy(dtype=np.float64)
    # the arm and the metric of each number: curves of one metric are one piece of evidence
    first = rows.groupby(name)[["arm", "metric"]].first()
    kind = list(map(tuple, first.loc[numbers].to_numpy()))
    position: dict[Any, int] = {seed: i for i, seed in enumerate(wide.columns)}
    originals: list[int] = []
    found: dict[int, tuple[int, int]] = {}
    for seed in [s for s in position if s in seeds]:
        for other in originals:
            a, b = matrix[:, position[seed]], matrix[:, position[other]]
            if _same_run(a, b, matrix, kind):
                found[seed] = (other, int(np.isfinite(a).sum()))
                break
        else:
            originals.append(seed)
    return found


def _same_run(a: np.ndarray, b: np.ndarray, matrix: np.ndarray, kind: Sequence[tuple[str, str]]) -> bool:
    """Whether two seeds agree in all numbers, and in more than chance explains."""
    if not np.array_equal(a, b, equal_nan=True):
        return False
    off_grid = 0
    chance: dict[tuple[str, str], tuple[float, tuple[int, ...]]] = {}
    for i in map(int, np.flatnonzero(np.isfinite(a))):
        others = matrix[i][np.isfinite(matrix[i])]
        _, ranks, counts = np.unique(others, return_inverse=True, return_counts=True)
        if len(counts) == 1:  # the same for all seeds: deterministic
            continue
        off_grid += not _simple(float(a[i]))
        if off_grid >= _OFF_GRID:
            return True
        # fractions that rank the seeds alike may be one number (an error and an accuracy): one piece of evidence
        order = min(tuple(ranks.tolist()), tuple((ranks.max() - ranks).tolist()))
        often = float(((counts / len(others)) ** 2).sum())  # two seeds agree here anyway
        chance[kind[i]] = min(chance.get(kind[i], (2.0, ())), (often, order))
    apart = {order: often for often, order in chance.values()}
    return len(apart) >= _ON_GRID and float(np.prod(list(apart.values()))) <= _CHANCE


def _simple(value: float) -> bool:
    """Whether a number is a fraction of a test set, or was kept in single precision, where many numbers coincide."""
    if float(np.float32(value)) == value:
        return True
    return abs(float(Fraction(value).limit_denominator(_LARGEST_SET)) - value) <= 4e-16 * abs(value)


def mixed_units(claim: Claim, table: pd.DataFrame, effect: float) -> list[str]:
    """A sentence if percent seem to be compared with fractions, or an effect in percent is printed as a fraction."""
    values = table.to_numpy()
    finite = [column[np.isfinite(column)] for column in values.T]
    if any(not len(column) for column in finite):
        return []
    notes = []
    shares = claim.factor == 100 or claim.unit in ("pts", "%")
    if len(finite) > 1:
        low, *_, high = sorted(finite, key=lambda column: float(np.median(column)))
        fraction = low.min() >= 0 and low.max() <= 1
        middle = float(np.median(low))
        ratio = float(np.median(high)) / middle if middle > 0 else np.inf
        if fraction and high.min() > 1.5 and high.max() <= 100 and (shares or 50 <= ratio <= 1000):
            notes.append(
                f"the values of one arm lie within [0, 1], those of the other between {high.min():.4g} and "
                f"{high.max():.4g}: is one a fraction and the other in percent?"
            )
    if not notes and claim.factor == 100 and abs(effect) > 1.5:
        notes.append(
            f"an effect of {effect:.4g} is printed times 100: are the values in percent already? Then factor must be 1"
        )
    return notes
