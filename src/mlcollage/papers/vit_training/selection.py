r"""Choosing among the runs of a sweep, and what a cheap choice costs (sections 4.4 and 4.5 of the paper).

A table has a row for each fine-tuning run. Columns have the names of the released ``index.csv``: what was pre-trained
(``name``, ``ds``, ``aug``, ``wd``, ``do``, ``sd``, ...), ``final_val`` of pre-training, ``adapt_ds``, and
``adapt_final_val`` and ``adapt_final_test`` of fine-tuning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.stats._values import Rng

Rule = Literal["upstream", "downstream", "oracle"]
_RULES = ("upstream", "downstream", "oracle")
_SCORES = ("final_val", "adapt_final_val", "adapt_final_test")
# Columns that are no setting of a run.
_OUTCOMES = (*_SCORES, "best_val", "final_test", "adapt_best_val", "seed", "seconds", "error", "rung")


def select_best(
    df: pd.DataFrame, rule: Rule = "upstream", *, by: Sequence[str] = ("name", "adapt_ds"), allow_leak: bool = False
) -> pd.DataFrame:
    """One fine-tuning run for each architecture and task, by a rule.

    Parameters
    ----------
    df
        Runs of a sweep.
    rule
        ``"upstream"``, the paper's: the pre-training run with the highest ``final_val``, and of its fine-tuning runs
        that with the highest ``adapt_final_val``: only one pre-trained model is fine-tuned. ``"downstream"``: the
        highest ``adapt_final_val`` of all, for which every model is. ``"oracle"``: the highest ``adapt_final_test``,
        which no one can know; it is optimistic by itself.
    by
        Columns of what is chosen for.
    allow_leak
        Use ``final_val`` although a column ``val_in_pretraining`` says that its rows were trained on.

    Returns
    -------
    pandas.DataFrame
        A row for each group. ``attrs["dropped"]`` tells how many rows had a score that is missing or infinite, or an
        ``error``, and ``attrs["ties"]`` the groups in which others had the same best score: the first is taken.

    Raises
    ------
    InvalidInput
        If a column is missing, no row has scores, shares and per cent are mixed, or validation rows were trained on.

    Examples
    --------
    >>> runs = pd.DataFrame({
    ...     "name": "S/16", "adapt_ds": "pets", "aug": ["none", "light1", "medium1"], "final_val": [0.46, 0.47, 0.45],
    ...     "adapt_final_val": [0.90, 0.91, 0.93], "adapt_final_test": [0.89, 0.92, 0.93]})
    >>> [select_best(runs, rule)["aug"].item() for rule in ("upstream", "downstream", "oracle")]
    ['light1', 'medium1', 'medium1']
    """
    checks.choice("rule", rule, _RULES)
    by = _groups(by)
    needed = {"upstream": _SCORES[:2], "downstream": _SCORES[1:2], "oracle": _SCORES[2:]}[rule]
    table = _checked(df, by, needed)
    kept = _finished(table, needed)
    if rule == "upstream" and not allow_leak and _leaked(kept):
        raise InvalidInput(
            "final_val was measured on rows that pre-training saw (val_in_pretraining): it favors runs that memorize. "
            "Use other rows, as the paper does with ImageNetV2, or allow_leak=True."
        )
    _warn_of_seeds(kept)
    rows, ties = [], []
    for key, group in kept.groupby(by, sort=True, dropna=False):
        for score in needed:
            best = group[group[score] == group[score].max()]
            # Several fine-tuning runs of one pre-trained model share its score: no tie.
            others = best.drop(columns=[c for c in best if str(c).startswith("adapt_")]).drop_duplicates()
            if len(others if score == "final_val" else best) > 1:
                ties.append(key)
            group = best if score != "final_val" else _same_model(best)
        rows.append(group.iloc[0])
    out = pd.DataFrame(rows).reset_index(drop=True)
    out.attrs.update(dropped=len(table) - len(kept), ties=ties)
    return out


def selection_regret(
    df: pd.DataFrame,
    score: str = "adapt_final_test",
    *,
    by: Sequence[str] = ("name", "adapt_ds"),
    allow_leak: bool = False,
) -> pd.DataFrame:
    r"""What choosing by upstream or downstream validation costs, and how the two rankings agree.

    .. math:: \mathrm{regret} = \max_r s_r - s_{\hat r}

    Parameters
    ----------
    df
        Runs of a sweep.
    score
        Column s that counts in the end.
    by
        Columns of what is chosen for.
    allow_leak
        As for :func:`select_best`.

    Returns
    -------
    pandas.DataFrame
        A row for each group: ``upstream`` and ``downstream`` (regrets), ``difference`` (the downstream rule's score
        minus the upstream rule's: what fine-tuning every model gains), ``kendall`` (rank correlation of ``final_val``
        with ``score``, NaN of fewer than three models) and ``models``.

    Examples
    --------
    >>> runs = pd.DataFrame({
    ...     "name": "S/16", "adapt_ds": "pets", "aug": ["none", "light1", "medium1"], "final_val": [0.46, 0.47, 0.45],
    ...     "adapt_final_val": [0.90, 0.91, 0.93], "adapt_final_test": [0.89, 0.92, 0.93]})
    >>> selection_regret(runs).round(2)[["upstream", "downstream", "difference", "models"]].values.tolist()
    [[0.01, 0.0, 0.01, 3.0]]
    """
    by = _groups(by)
    scores = list(dict.fromkeys([*_SCORES[:2], score]))
    table = _finished(_checked(df, by, scores), scores)
    rows: list[dict[str, Any]] = []
    for key, group in table.groupby(by, sort=True, dropna=False):
        found = {
            rule: float(select_best(group, rule, by=by, allow_leak=allow_leak)[score].iloc[0])  # type: ignore[arg-type]
            for rule in _RULES[:2]
        }
        best = float(group[score].max())
        rows.append(
            {
                **dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True)),
                **{rule: best - value for rule, value in found.items()},
                "difference": found["downstream"] - found["upstream"],
                "kendall": rank_agreement(group["final_val"], group[score]),
                "models": len(group),
            }
        )
    return pd.DataFrame(rows)


def rank_agreement(a: Any, b: Any) -> float:
    """Kendall's tau-b of two rows of scores; NaN of fewer than three pairs, or if one is constant.

    Examples
    --------
    >>> round(rank_agreement([1, 2, 3], [10, 30, 20]), 4)
    0.3333
    """
    first, second = np.asarray(a, float), np.asarray(b, float)
    if first.ndim != 1 or first.shape != second.shape:
        raise InvalidInput(f"scores of shapes {first.shape} and {second.shape} are not pairs.")
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(stats.kendalltau(first, second).statistic)


def random_search_curve(
    df: pd.DataFrame,
    n: int = 1000,
    *,
    val: str = "adapt_final_val",
    test: str = "adapt_final_test",
    cost: str | None = None,
    band: tuple[float, float] = (0.05, 0.95),
    rng: Rng = 0,
) -> pd.DataFrame:
    """What a random search over finished runs finds, by budget: the picture of Fig. 2.

    Runs are drawn without replacement; after each, the one of highest validation score so far is what one would use.

    Parameters
    ----------
    df
        Finished runs.
    n
        Simulated searches.
    val, test
        Columns to choose by and to report.
    cost
        Column of each run's cost, positive; None: each costs 1. Budgets are then those that the searches reach, at
        most 200 of them.
    band
        Quantiles of the band.
    rng
        Seed or generator of the draws.

    Returns
    -------
    pandas.DataFrame
        ``budget``, ``median``, ``low``, ``high`` and ``searches`` (that have finished a run within the budget).

    Examples
    --------
    >>> runs = pd.DataFrame({"adapt_final_val": [0.1, 0.5, 0.9], "adapt_final_test": [0.1, 0.5, 0.9]})
    >>> random_search_curve(runs, 500)["median"].tolist()
    [0.5, 0.9, 0.9]
    """
    n = checks.integer("n", n, least=1)
    low, high = (checks.real("each of band", b, least=0, most=1) for b in band)
    if low >= high:
        raise InvalidInput(f"band={band} must be (low, high), such as (0.05, 0.95).")
    columns = [val, test, *([] if cost is None else [cost])]
    table = _finished(_checked(df, (), columns), columns[:2])
    scores, outcomes = table[val].to_numpy(float), table[test].to_numpy(float)
    costs = np.ones(len(table)) if cost is None else table[cost].to_numpy(float)
    if not (np.isfinite(costs) & (costs > 0)).all():
        raise InvalidInput(f"{cost!r} must be positive and finite in every row.")
    order = np.argsort(np.random.default_rng(rng).random((n, len(table))), axis=1)  # (n, runs)
    spent = costs[order].cumsum(1)
    drawn = scores[order]
    best = np.maximum.accumulate(drawn, 1)
    # Place of the run that leads after each: the last one that was strictly better than all before it.
    leads = np.concatenate([np.ones((n, 1), bool), drawn[:, 1:] > best[:, :-1]], 1)
    leader = np.maximum.accumulate(leads * np.arange(len(table)), 1)
    found = np.take_along_axis(outcomes[order], leader, 1)  # (n, runs): test score after each
    budgets = np.unique(spent.round(12))
    if len(budgets) > 200:
        budgets = np.quantile(budgets, np.linspace(0, 1, 200))
    rows = []
    for budget in budgets:
        done = (spent <= budget * (1 + 1e-12)).sum(1)  # runs finished by each search
        values = found[done > 0, done[done > 0] - 1]
        if len(values):
            a, m, b = np.quantile(values, [low, 0.5, high])
            rows.append({"budget": float(budget), "median": m, "low": a, "high": b, "searches": len(values)})
    return pd.DataFrame(rows)


def pareto(df: pd.DataFrame, cost: str, score: str) -> pd.DataFrame:
    """Rows that no other beats: none is as cheap and as good, and better in one of the two; cheapest first.

    Rows with the same cost and score stay or go together.

    Parameters
    ----------
    df
        Models, say, with a cost that should be low and a score that should be high.
    cost, score
        Columns.

    Examples
    --------
    >>> models = pd.DataFrame({"gmacs": [1.1, 1.3, 4.6, 4.4], "top1": [79.6, 78.2, 83.7, 83.6]})
    >>> pareto(models, "gmacs", "top1")["top1"].tolist()
    [79.6, 83.6, 83.7]
    """
    table = _finished(_checked(df, (), [cost, score]), [cost, score])
    table = table.sort_values([cost, score], ascending=[True, False], kind="stable")
    costs, scores = table[cost].to_numpy(float), table[score].to_numpy(float)
    new = scores > np.r_[-np.inf, np.maximum.accumulate(scores)[:-1]]
    same = np.r_[False, (np.diff(costs) == 0) & (np.diff(scores) == 0)]
    lead = np.maximum.accumulate(np.where(same, 0, np.arange(len(table))))  # the first of the rows that are equal
    return table[new[lead]]


def _groups(by: Sequence[str]) -> list[str]:
    names = [by] if isinstance(by, str) else list(by)
    if not names:
        raise InvalidInput("by must name at least one column of what is chosen for, such as 'name'.")
    return names


def _same_model(best: pd.DataFrame) -> pd.DataFrame:
    """Fine-tuning runs of the first pre-trained model of several with one score."""
    upstream = [str(c) for c in best if not str(c).startswith("adapt_") and c not in ("val_in_pretraining",)]
    first = best.iloc[0]
    same = np.ones(len(best), bool)
    for column in upstream:
        same &= (best[column] == first[column]).to_numpy() | (best[column].isna() & pd.isna(first[column])).to_numpy()
    return best[same]


def _finished(table: pd.DataFrame, scores: Sequence[str]) -> pd.DataFrame:
    """Rows whose scores are finite and that report no error."""
    good = np.isfinite(table[list(scores)].to_numpy(float, na_value=np.nan)).all(1)
    if "error" in table:
        good &= (table["error"].isna() | (table["error"] == "")).to_numpy(bool)
    if not good.any():
        raise InvalidInput(f"no row has finite {' and '.join(scores)}.")
    return table[good]


def _leaked(table: pd.DataFrame) -> bool:
    if "val_in_pretraining" not in table:
        return False
    known = table["val_in_pretraining"].dropna()
    if not known.isin([True, False]).all():
        raise InvalidInput(f"'val_in_pretraining' must be True or False in each row, not {known.iloc[0]!r}.")
    return bool(known.astype(bool).any())


def _warn_of_seeds(table: pd.DataFrame) -> None:
    """Of runs that differ in their seed only, the best is the luckiest."""
    settings = [c for c in table if c not in _OUTCOMES]
    if "seed" in table and settings and table.astype(dict.fromkeys(settings, str)).duplicated(settings).any():
        warnings.warn(
            "some runs differ in their seed only: the best of them is the luckiest; average the scores of each "
            "setting first, with groupby.",
            stacklevel=3,
        )


def _checked(df: pd.DataFrame, groups: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    """The table, with the columns that are grouped by and those that must be numbers."""
    if not isinstance(df, pd.DataFrame):
        raise InvalidInput(f"a pandas DataFrame of runs is needed, not {type(df).__name__}.")
    missing = [c for c in (*groups, *numbers) if c not in df]
    if missing:
        raise InvalidInput(f"the table of runs has no column {', '.join(map(repr, missing))}; it has {list(df)[:12]}.")
    if df.empty:
        raise InvalidInput("the table of runs is empty.")
    for column in numbers:
        if not pd.api.types.is_numeric_dtype(df[column]):
            raise InvalidInput(f"{column!r} must be numbers, not {df[column].dtype}.")
    for column in (c for c in numbers if c in _SCORES):
        values = df[column].to_numpy(float, na_value=np.nan)
        values = np.abs(values[np.isfinite(values)])
        # 0.481 beside 47.9: the second would always win.
        if len(values) and values.max() > 1.5 and ((values > 0) & (values < 1)).any():
            raise InvalidInput(f"{column!r} mixes shares and per cent ({values.min():g} to {values.max():g}); use one.")
    return df
