"""Two methods on several data sets with several seeds each, and claims about a table of one's own.

What people have is a table: five seeds, two methods, twenty data sets. :func:`compare` answers what one wants to know
of it: on which data sets the treatment is better, by how much over all, and what to expect of the next one. It is the
judge (paired by seed, Holm's correction over the data sets, lost and copied seeds, skewness) and partial pooling, for
a table that no study made. :func:`judge_table` judges claims about such a table.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mlcollage._checks import positive
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.lab.claim import Claim, Direction, Status, Verdict
from mlcollage.lab.estimand import Difference
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.judge import judge
from mlcollage.lab.pool import PooledClaim, pool_claim
from mlcollage.lab.run import Scale
from mlcollage.stats._values import Alternative, is_constant
from mlcollage.stats.bootstrap import t_interval
from mlcollage.stats.causal import sign_flip_test

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEVEL = 0.95
# Without a margin the claim is at_least 0 (at_most 0): supported is better, contradicted is worse.
_WORDS = {Status.SUPPORTED: "better", Status.CONTRADICTED: "worse", Status.INCONCLUSIVE: "open"}


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; ``print(comparison)`` says it in words.

    Attributes
    ----------
    treatment, control, by
        What was compared, and over what.
    table
        A row per data set (the index): ``seeds``; ``control`` and ``treatment``, their means; ``effect`` with its
        interval ``low``, ``high`` over seeds; ``p_value`` and ``p_holm``, corrected over the data sets, of "better";
        ``verdict``: better, worse (with a margin: "not by the margin") or open; ``shrunken`` with ``shrunken_low`` and
        ``shrunken_high``, the effect in the light of the other data sets.
    verdicts
        The judge's, by data set, with reasons and warnings.
    over_sets
        Mean effect over the data sets, each counted once, with Student's t interval; None below two data sets.
    p_value
        Of "no better on average over data sets like these": exact sign flips of the data sets' effects.
    pooled
        Partial pooling over data sets: ``population``, ``tau`` (their spread), ``next_workload`` and the probabilities;
        None below two data sets.
    wins
        On how many data sets the mean of the treatment is better.
    """

    treatment: str
    control: str
    by: str | None
    table: pd.DataFrame
    verdicts: Mapping[str, Verdict]
    over_sets: tuple[float, float, float] | None = None
    p_value: float | None = None
    pooled: PooledClaim | None = None
    wins: int = 0
    _claim: Claim = field(repr=False, kw_only=True)

    def __str__(self) -> str:
        sets, one = len(self.table), len(self.table) == 1
        show = self._claim.format
        pairing = "paired by seed" if self._claim.paired else "not paired"
        lines = [f"{self.treatment} against {self.control}, {pairing}"]
        width = max(len(str(name)) for name in self.table.index)  # so that the effects stand below each other
        for name, row in self.table.iterrows():
            effect = "no value" if not np.isfinite(row.effect) else show(row.effect)
            span = f" {self._span(row.low, row.high)}" if np.isfinite([row.low, row.high]).all() else ""
            p = f", p = {row.p_holm:.2g}" if np.isfinite(row.p_holm) else ""
            seeds = f"{row.seeds:.0f} seed{'' if row.seeds == 1 else 's'}"
            lines.append(f"  {name:<{width}}  {effect}{span}  {row.verdict} ({seeds}{p})")
        if not one:
            # Both counts: the sign of the mean says little by itself, and the verdicts alone hide which way it leans.
            counts = self.table["verdict"].value_counts()
            said = ", ".join(f"{word} on {n}" for word, n in counts.items())
            lines.append(f"of {sets} data sets: ahead on {self.wins}; after Holm's correction {said}")
        if self.over_sets is not None:
            mean, low, high = self.over_sets
            p = "" if self.p_value is None else f", p = {self.p_value:.2g}"
            lines.append(f"mean over data sets: {show(mean)} {self._span(low, high)}{p}")
        if self.pooled is not None and self.pooled.population is not None and self.pooled.next_workload is not None:
            assert self.pooled.tau is not None
            mean, low, high = self.pooled.population
            lines.append(
                f"pooled: {show(mean)} {self._span(low, high)}, better with probability {self.pooled.probability:.2f}; "
                f"sd between data sets {show(self.pooled.tau[0], signed=False)}"
            )
            lines.append(
                f"the next data set: {self._span(*self.pooled.next_workload)}, better with probability "
                f"{self.pooled.next_probability:.2f}"
            )
        lines += [f"note, {name}: {text}" for name, text in self.notes]
        return "\n".join(lines)

    @property
    def notes(self) -> list[tuple[str, str]]:
        """What a reader must know of the seeds, by data set: few, lost, copied, skewed, or why there is no verdict."""
        found = []
        for name, verdict in self.verdicts.items():
            # The arms carry the data set's name, which stands in front of the note already.
            found += [(name, text.replace(f" ({name})", "")) for text in verdict.warnings]
            if verdict.estimate is None:
                found.append((name, verdict.reason))
        return found

    def _span(self, low: float, high: float) -> str:
        c = self._claim
        return f"[{low * c.factor:.{c.digits}f}, {high * c.factor:.{c.digits}f}]".replace("-", "−")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Forest plot: an effect and its interval per data set, an arrow to the pooled one, a band for the mean.

        Parameters
        ----------
        ax
            Where to draw; default: axes of a new figure, which ``comparison.plot().figure.savefig(...)`` writes.
        """
        from matplotlib.figure import Figure

        from mlcollage.stats.explore import forest

        factor, shown = self._claim.factor, self.table[np.isfinite(self.table["effect"])]
        if shown.empty:
            raise InvalidInput("no data set has an effect, so there is nothing to draw.")
        if ax is None:
            ax = Figure(figsize=(6, 1.2 + 0.3 * len(shown)), layout="constrained").subplots()
        ends = shown[["low", "high"]].to_numpy() * factor
        ends = np.where(np.isnan(ends), [-np.inf, np.inf], ends)  # one seed has no interval: drawn across the panel
        pooled = shown["shrunken"].fillna(shown["effect"]) * factor if shown["shrunken"].notna().any() else None
        forest(ax, [str(name) for name in shown.index], shown["effect"] * factor, ends, shrunken=pooled)
        if self.pooled is not None and self.pooled.population is not None:
            mean, low, high = (v * factor for v in self.pooled.population)
            ax.axvspan(low, high, color="C1", alpha=0.15, linewidth=0, zorder=-1)
            ax.axvline(mean, color="C1", linewidth=1, zorder=-1)
        ax.set_xlabel(f"{self.treatment} − {self.control}" + (f" ({self._claim.unit})" if self._claim.unit else ""))
        ax.spines[["top", "right"]].set_visible(False)
        return ax


def compare(
    df: pd.DataFrame,
    *,
    treatment: str,
    control: str,
    by: str | None = "dataset",
    seed: str = "seed",
    arm: str | None = None,
    value: str = "value",
    metric: str | None = None,
    margin: float | None = None,
    higher_is_better: bool = True,
    paired: bool = True,
    alpha: float = 0.05,
    factor: float = 1.0,
    unit: str = "",
    digits: int = 3,
) -> Comparison:
    """Compare two methods over data sets and seeds: per data set, over all, and what to expect of the next one.

    Per data set: the mean difference within seeds, its t interval, and the judge's verdict, corrected by Holm over the
    data sets. Over all: the mean of the data sets' effects with exact sign flips (the data set is the unit), and
    partial pooling (:func:`mlcollage.lab.pool.pool_claim`), which also says where the effect on the next data set lies.

    Parameters
    ----------
    df
        Long: a row per data set, method and seed. Or wide: a row per data set and seed, a column per method.
    treatment, control
        Names of the methods: values of one column, or names of two columns.
    by
        Column of the data sets; None if there is one.
    seed
        Column of the seeds. Rows of one seed belong together.
    arm
        Column of the methods; default: the one that holds both names.
    value
        Column of the numbers, in the long form.
    metric
        Which rows to take, where a column ``metric`` names several.
    margin
        Smallest effect that matters, in the units of the values. With it a data set can also show that the treatment
        is *not* that much better; without, "worse" is the opposite of "better".
    higher_is_better
        False for losses and errors.
    paired
        False if seeds of the two methods have nothing in common.
    alpha
        One-sided error rate over all data sets.
    factor, unit, digits
        How effects are printed: ``factor=100, unit="pts", digits=1`` for accuracies.

    Returns
    -------
    Comparison
        Readable by ``print``, with ``.table`` and ``.plot()``.

    Raises
    ------
    InvalidInput, UnknownName
        If a column or a method is not there, or a data set has several rows for one method and seed.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> rows = [(d, m, s, 0.8 + 0.02 * (m == "new") + 0.005 * rng.normal())
    ...         for d in ("digits", "wine", "iris") for m in ("old", "new") for s in range(5)]
    >>> df = pd.DataFrame(rows, columns=["dataset", "method", "seed", "value"])
    >>> found = compare(df, treatment="new", control="old", factor=100, unit="pts", digits=1)
    >>> found.table["verdict"].tolist(), found.wins
    (['better', 'better', 'better'], 3)
    """
    table = _tidy(df, treatment, control, by, seed, arm, value, metric)
    treatment, control = str(treatment), str(control)
    # Without a margin the question is whether the difference is on one side of 0; with one, whether it is that large.
    better: Direction = "at_least" if higher_is_better else "at_most"
    if margin is not None:
        positive("margin", margin)
        better = "greater" if higher_is_better else "less"

    def claim(name: str, of_treatment: str, of_control: str) -> Claim:
        return Claim(
            id=name,
            title="The treatment is better",
            sentence=f"{treatment} is better than {control}.",
            source="",
            estimand=Difference("value", of_treatment, of_control),
            direction=better,
            margin=margin or 0.0,
            paired=paired,
            alpha=alpha,
            factor=factor,
            unit=unit,
            digits=digits,
        )

    names = [str(name) for name in pd.unique(table["set"])]
    parts = {name: table[table["set"] == name].drop(columns="set") for name in names}  # each with its own seeds
    # one family: each data set has arms of its own names, so that copies are looked for within it
    apart = pd.concat([rows.assign(arm=rows["arm"] + f" ({name})") for name, rows in parts.items()], ignore_index=True)
    # One call for all data sets: Holm's correction is over all of them.
    verdicts = judge(
        [claim(name, f"{treatment} ({name})", f"{control} ({name})") for name in names],
        Evidence("comparison", Scale.QUICK, "table", apart),
    )
    # Pooled over data sets, each of which has its own table with the plain names of the arms.
    overall = claim("all", treatment, control)
    pooled = (
        pool_claim(overall, {name: Evidence("comparison", Scale.QUICK, name, rows) for name, rows in parts.items()})
        if len(names) > 1
        else None
    )
    found = pd.DataFrame(
        [_row(verdicts[name], parts[name], treatment, control, margin is not None) for name in names],
        index=pd.Index(names, name=by or "dataset"),
    )
    # A data set that could not be pooled has a row of NaN.
    shrunken = ["shrunken", "shrunken_low", "shrunken_high"]
    found[shrunken] = np.nan if pooled is None else pooled.workloads[shrunken].reindex(names)
    effects = found["effect"].dropna().to_numpy()  # (data sets,): one number each, however many seeds it has
    several = len(effects) > 1
    ends = (float(effects[0]),) * 2 if several and is_constant(effects) else t_interval(effects) if several else None
    # A test over data sets asks whether the next data set would show it too; seeds cannot answer that.
    sign: Alternative = "greater" if higher_is_better else "less"
    return Comparison(
        treatment=treatment,
        control=control,
        by=by,
        table=found,
        verdicts=verdicts,
        over_sets=None if ends is None else (float(effects.mean()), *ends),
        p_value=sign_flip_test(effects, sign) if several else None,
        pooled=pooled,
        wins=int((effects > 0).sum() if higher_is_better else (effects < 0).sum()),
        _claim=overall,
    )


def _row(verdict: Verdict, rows: pd.DataFrame, treatment: str, control: str, with_margin: bool) -> dict[str, Any]:
    wide = rows.pivot(index="seed", columns="arm", values="value").replace([np.inf, -np.inf], np.nan)
    # (2,): of the seeds that count, so that the means differ by the effect.
    means = (wide.dropna() if verdict.claim.paired else wide).mean()
    low, high = verdict.interval or (np.nan, np.nan)  # none for one seed, or for seeds that all agree
    effect = verdict.estimate
    if effect is None:  # one seed: a difference without an error
        effect = float(means[treatment] - means[control])
    # With a margin, contradicted means that an effect of that size is ruled out: the treatment need not be worse.
    word = "not by the margin" if with_margin and verdict.status is Status.CONTRADICTED else _WORDS[verdict.status]
    return {
        "seeds": verdict.seeds or int((wide.dropna() if verdict.claim.paired else wide).notna().sum().min()),
        "control": float(means[control]),
        "treatment": float(means[treatment]),
        "effect": effect,
        "low": low,
        "high": high,
        "p_value": np.nan if verdict.p_value is None else verdict.p_value,
        "p_holm": np.nan if verdict.p_holm is None else verdict.p_holm,
        "verdict": word,
    }


def _tidy(
    df: pd.DataFrame,
    treatment: str,
    control: str,
    by: str | None,
    seed: str,
    arm: str | None,
    value: str,
    metric: str | None,
) -> pd.DataFrame:
    """The rows of both methods with the columns set, arm, seed, metric, step, value."""
    if treatment == control:
        raise InvalidInput(f"treatment and control are both {treatment!r}.")
    # Columns before rows, so that a refusal names what is to be corrected first.
    _need(df, [seed, *([] if by is None else [by])])
    if metric is not None:
        _need(df, ["metric"])
        if not (df["metric"] == metric).any():
            raise UnknownName(f"no metric {metric!r}; there are: {_some(df['metric'].unique())}.")
        df = df[df["metric"] == metric]
    elif "metric" in df.columns and df["metric"].nunique() > 1:
        raise InvalidInput(f"the table has the metrics {_some(df['metric'].unique())}; name one with metric=...")
    if arm is None and {treatment, control} <= set(df.columns):
        keys = [seed, *([] if by is None else [by])]
        # A wide table, one column per method, becomes a long one: one row per value.
        df = df[[*keys, treatment, control]].melt(keys, var_name="_arm", value_name="_value")
        arm, value = "_arm", "_value"
    _need(df, [value])
    arm = _arm_column(df, treatment, control, (by, seed, value, "metric")) if arm is None else arm
    _need(df, [arm])
    for name in (treatment, control):
        if not (df[arm] == name).any():
            raise UnknownName(f"column {arm!r} has no {name!r}; there are: {_some(df[arm].unique())}.")
    rows = df[df[arm].isin([treatment, control])]
    numbers = _numbers(rows[value], value)  # NaN stays: a seed without a value counts against the claim
    table = pd.DataFrame(
        {
            "set": "all" if by is None else rows[by].astype(str),
            "arm": rows[arm].astype(str),
            "seed": rows[seed],
            "metric": "value",
            "step": 0,
            "value": numbers,
        }
    )
    _every_row_has(rows, [seed, *([] if by is None else [by])])
    # Episodes or folds as rows would pass for more seeds than there are, and make every p value too small.
    repeated = table[table.duplicated(["set", "arm", "seed"])]
    if len(repeated):
        first = repeated.iloc[0]
        count = int((table[["set", "arm", "seed"]] == first[["set", "arm", "seed"]]).all(axis=1).sum())
        raise InvalidInput(
            f"{first['arm']} has {count} rows for seed {first['seed']} of {first['set']}, where one was expected. "
            "Average what was repeated inside a seed (episodes, folds) first, or name the column that tells data sets "
            "apart: by=..."
        )
    # A data set on which one method was never run would be taken for one where all its seeds were lost.
    alone = table.groupby("set")["arm"].nunique()
    if (alone < 2).any():
        raise InvalidInput(
            f"{_some(alone.index[alone < 2])} {'has' if (alone < 2).sum() == 1 else 'have'} one of the two methods "
            "only; leave such data sets out, or give the missing runs rows with NaN if they failed."
        )
    return table.reset_index(drop=True)


def _need(df: Any, columns: Sequence[Hashable]) -> None:
    if not isinstance(df, pd.DataFrame):
        raise InvalidInput(f"the table is a {type(df).__name__}; expected a pandas DataFrame: pd.DataFrame(...).")
    there = list(df.columns)  # a list, since an index takes no names that have no hash
    if lacking := [c for c in columns if c not in there]:
        hint = " Call df.reset_index() first." if set(map(str, lacking)) & set(map(str, df.index.names)) else ""
        raise UnknownName(f"the table has no column {_some(lacking)}; there are: {_some(there)}.{hint}")
    if twice := [c for c in there if there.count(c) > 1]:
        raise InvalidInput(f"the table has {there.count(twice[0])} columns called {twice[0]!r}; rename or drop one.")


def _every_row_has(rows: pd.DataFrame, columns: Sequence[str]) -> None:
    """Refuse rows without a name or a seed, which pandas drops from groups without a word, and seeds without order."""
    for column in columns:
        lacks = rows[column].isna() | (rows[column].astype(str).str.strip() == "")
        if lacks.any():
            raise InvalidInput(f"row {rows.index[lacks][0]} has no {column!r}; every row needs one.")
    seeds = rows[columns[0]]
    kinds = {isinstance(s, str) for s in seeds}
    if len(kinds) > 1:  # seed 1 and seed "1" would be two
        text = next(s for s in seeds if isinstance(s, str))
        raise InvalidInput(f"column {columns[0]!r} holds numbers and the text {text!r}; write all seeds in one way.")


def _arm_column(df: pd.DataFrame, treatment: str, control: str, others: Sequence[object]) -> str:
    # The column of the methods is the one that holds both names; where two do, nobody but the user knows.
    names = [c for c in df.columns if c not in others and (df[c] == treatment).any() and (df[c] == control).any()]
    if len(names) != 1:
        what = "no column holds" if not names else f"the columns {_some(names)} all hold"
        raise InvalidInput(f"{what} both {treatment!r} and {control!r}; name the column of the methods with arm=...")
    return str(names[0])


def _numbers(column: pd.Series, name: str) -> pd.Series:
    try:
        if pd.api.types.is_complex_dtype(column):
            raise TypeError("numpy would drop the imaginary part")
        return column.astype(np.float64)
    except (TypeError, ValueError):
        bad = column[pd.to_numeric(column, errors="coerce").isna() & column.notna()]
        bad = bad if len(bad) else column  # dates and complex numbers are none that one can compare
        raise InvalidInput(f"column {name!r} must hold numbers; row {bad.index[0]} has {bad.iloc[0]!r}.") from None


def _some(values: Sequence[Any] | pd.Index | np.ndarray, most: int = 8) -> str:
    names = [str(v) for v in values]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def judge_table(df: pd.DataFrame, claims: Sequence[Claim]) -> dict[str, Verdict]:
    """Judge claims about a table of one's own, by the rules of every study.

    Parameters
    ----------
    df
        A row per number: ``arm``, ``seed``, ``metric``, ``value``; ``step`` (default 0) and any other columns, which
        ``where={...}`` of an estimand may name. A run that failed is a row with NaN.
    claims
        What is claimed; all of them, since Holm's correction is over these.

    Returns
    -------
    dict
        Verdicts by claim id; ``verdict.status``, ``verdict.effect``, ``verdict.reason`` and ``verdict.warnings``.

    Raises
    ------
    UnknownName, InvalidInput
        If a column is not there, values are no numbers, or the claims are malformed.

    Examples
    --------
    >>> df = pd.DataFrame({"arm": ["new"] * 6 + ["old"] * 6, "seed": [*range(6), *range(6)], "metric": "accuracy",
    ...                    "value": [0.91, 0.94, 0.90, 0.93, 0.92, 0.93, 0.86, 0.90, 0.84, 0.89, 0.85, 0.88]})
    >>> claim = Claim("C1", "new beats old", "New is more accurate.", "", Difference("accuracy", "new", "old"),
    ...               "greater", margin=0.02, factor=100, unit="pts", digits=1)
    >>> verdict = judge_table(df, [claim])["C1"]
    >>> verdict.status.value, verdict.effect
    ('supported', '+5.2 pts [3.9, 6.4]')
    """
    _need(df, ["arm", "seed", "metric", "value"])
    table = df.reset_index(drop=True)
    table = table.assign(value=_numbers(table["value"], "value"))
    if "step" not in table.columns:
        table["step"] = 0  # a table of final values
    if not pd.api.types.is_integer_dtype(table["step"]):
        table["step"] = _numbers(table["step"], "step")  # as words, step 10 would come before step 9
    _every_row_has(table, ["seed", "arm", "metric", "step"])
    # Scale paper, at which every claim is due.
    return judge(claims, Evidence("table", Scale.PAPER, "table", table))
