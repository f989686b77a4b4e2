"""What the two worlds measured: curves, stopping times, gaps and their pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput, MissingFile, UnknownName

from ._drawing import LABELS, band, cycle, finish, new_axes
from .metrics import METRICS, bootstrap_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rule = Literal["train_error", "train_loss", "budget"]
COLUMNS = ("world", "n", "seed", "step", "split", *METRICS)
RULES: Mapping[Rule, float] = {"train_error": 0.01, "train_loss": 0.01, "budget": 0.0}
"""The three stopping rules and their thresholds: train error <= 1 %, train loss < 0.01, the whole budget."""

_IDEAL = "#222222"
_META_KEY = b"mlcollage.deep_bootstrap"


@dataclass
class BootstrapResult:
    """Curves of the Real and Ideal Worlds and what follows from them.

    Parameters
    ----------
    curves
        One row per evaluation, with the columns ``world`` ("real" or "ideal"), ``n`` (float; the Ideal World has
        ``inf``), ``seed``, ``step`` (updates done), ``split`` ("train" or "test"; the Ideal World has no train set),
        ``loss``, ``error``, ``soft_error`` (NaN where the metric has no meaning).
    settings
        How they were made: ``steps``, ``batch_size``, ``loss`` and so on; plain scalars and lists.

    Examples
    --------
    >>> rows = [("ideal", math.inf, 0, t, "test", e, e, e) for t, e in [(0, 0.9), (10, 0.3), (20, 0.2)]]
    >>> rows += [("real", 100, 0, t, "test", e, e, e) for t, e in [(0, 0.9), (10, 0.3), (20, 0.25)]]
    >>> rows += [("real", 100, 0, t, "train", e, e, e) for t, e in [(0, 0.9), (10, 0.2), (20, 0.005)]]
    >>> result = BootstrapResult(pd.DataFrame(rows, columns=COLUMNS), {"steps": 20})
    >>> result.stopping_time(100)
    20
    >>> result.gap("soft_error", at="T")[["n", "seed", "step", "gap", "status"]]
           n  seed  step   gap     status
    0  100.0     0    20  0.05  converged
    """

    curves: pd.DataFrame
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [c for c in COLUMNS if c not in self.curves.columns]
        if missing:
            raise InvalidInput(f"the curves lack the columns {', '.join(missing)}; they need {', '.join(COLUMNS)}.")
        # n is a float, since the Ideal World's is infinite.
        kinds = {"n": "float64", "seed": "int64", "step": "int64", **dict.fromkeys(METRICS, "float64")}
        self.curves = self.curves.astype(kinds).reset_index(drop=True)

    @property
    def n(self) -> tuple[int, ...]:
        """Sample sizes of the Real Worlds, ascending."""
        return tuple(int(v) for v in sorted(self.curves.loc[self.curves["world"] == "real", "n"].unique()))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds, ascending."""
        return tuple(int(v) for v in sorted(self.curves["seed"].unique()))

    def select(
        self, world: str, split: str = "test", *, n: float | None = None, seed: int | None = None
    ) -> pd.DataFrame:
        """Rows of one world and split, and of one n and seed if given, in the order of steps."""
        c = self.curves
        c = c[(c["world"] == world) & (c["split"] == split)]
        if n is not None:
            if n not in set(c["n"]):
                raise UnknownName(f"no {world} world with n={n} was run; there are: {', '.join(map(str, self.n))}.")
            c = c[c["n"] == n]
        if seed is not None:
            if seed not in set(c["seed"]):
                raise UnknownName(f"seed {seed} was not run; there are: {', '.join(map(str, self.seeds))}.")
            c = c[c["seed"] == seed]
        return c.sort_values(["n", "seed", "step"], ignore_index=True)

    # ---- stopping times -------------------------------------------------------------------------------------------

    def stopping_time(
        self, n: int, rule: Rule = "train_error", *, seed: int | None = None, threshold: float | None = None
    ) -> int | None:
        """T(n): the first evaluated step at which the Real World has converged on its train set.

        Parameters
        ----------
        n
            Sample size.
        rule
            ``"train_error"`` (train error <= 0.01), ``"train_loss"`` (train loss < 0.01) or
            ``"budget"`` (the last step).
        seed
            One repetition; None (default) applies the rule to the train curve averaged over the seeds.
        threshold
            Another threshold than the rule's.

        Returns
        -------
        int or None
            None: not converged within the steps that were run. Nothing is extrapolated.
        """
        checks.choice("rule", rule, RULES)
        metric = "loss" if rule == "train_loss" else "error"
        split = "test" if rule == "budget" else "train"
        rows = self.select("real", split, n=n, seed=seed)
        if rule == "budget":
            # The step that every seed reached; None for a run that was cut short of the steps it was to make.
            last = int(rows.groupby("seed")["step"].max().min())
            return last if last == self.settings.get("steps", last) else None
        if rows[metric].isna().all():
            raise InvalidInput(f"this run has no train {metric} for rule {rule!r}; use 'train_loss' or 'budget'.")
        counts = rows.groupby("step")["seed"].size()
        mean = rows.groupby("step")[metric].mean()[counts == counts.max()]  # steps that all seeds reached
        limit = RULES[rule] if threshold is None else threshold
        reached = mean.index[(mean < limit) if rule == "train_loss" else (mean <= limit)]
        return int(reached[0]) if len(reached) else None

    def stopping_times(self, rule: Rule | None = None) -> pd.DataFrame:
        """T(n) of each n, seed and rule (default: all three): ``n, seed, rule, T``, ``status``."""
        regression = self.curves["error"].isna().all()  # it has no error to stop at
        names: list[Rule] = [name for name in RULES if not (regression and name == "train_error")]
        rows = []
        for name, n, seed in product(names if rule is None else (rule,), self.n, self.seeds):
            t = self.stopping_time(n, name, seed=seed)
            rows.append({"n": n, "seed": seed, "rule": name, "T": t, "status": _status(t, name)})
        table = pd.DataFrame(rows, columns=["n", "seed", "rule", "T", "status"])
        return table.astype({"T": "Int64"})  # pandas' integer that may be missing

    # ---- gaps -----------------------------------------------------------------------------------------------------

    def gaps(self, metric: str = "soft_error") -> pd.DataFrame:
        """The bootstrap error at every evaluated step: ``n, seed, step, real, ideal, gap``."""
        self._check_metric(metric)
        keys = ["seed", "step"]
        real = self.select("real")[["n", *keys, metric]].rename(columns={metric: "real"})
        ideal = self.select("ideal")[[*keys, metric]].rename(columns={metric: "ideal"})
        # One ideal run serves every n of its seed; steps after an early stop of the real run have no partner.
        both = real.merge(ideal, on=keys, how="inner")
        both["gap"] = bootstrap_error(both["real"], both["ideal"])
        return both.sort_values(["n", *keys], ignore_index=True)

    def gap(self, metric: str = "soft_error", *, at: str | int = "T", rule: Rule = "train_error") -> pd.DataFrame:
        """The bootstrap error of each n and seed at one time.

        Parameters
        ----------
        metric
            ``"soft_error"`` (default), ``"error"`` or ``"loss"``.
        at
            ``"T"``: the seed's own stopping time T(n); ``"max"``: the largest gap at any evaluated step t <= T(n)
            (all steps if T was not reached, as they all lie before it); ``"end"``: the last step; or a step.
        rule
            Stopping rule of ``"T"`` and ``"max"``.

        Returns
        -------
        DataFrame
            ``n, seed, step, real, ideal, gap, status``; a seed that has not converged has missing values at ``"T"``
            and the status "not converged".
        """
        return self._read(self.gaps(metric), at, rule)

    def generalization_gap(
        self, metric: str = "soft_error", *, at: str | int = "T", rule: Rule = "train_error"
    ) -> pd.DataFrame:
        """Test minus train in the Real World (the classical gap): ``n, seed, step, train, test, gap, status``."""
        self._check_metric(metric)
        keys = ["n", "seed", "step"]
        test = self.select("real")[[*keys, metric]].rename(columns={metric: "test"})
        both = self.select("real", "train")[[*keys, metric]].rename(columns={metric: "train"}).merge(test, on=keys)
        both["gap"] = both["test"] - both["train"]
        return self._read(both[[*keys, "train", "test", "gap"]], at, rule)

    def _read(self, table: pd.DataFrame, at: str | int, rule: Rule) -> pd.DataFrame:
        """The row of each n and seed at the time ``at``, with its status; missing values where there is no such time.

        The table has ``n, seed, step``, two errors and their ``gap``.
        """
        columns = list(table.columns)
        rows = []
        for key, group in table.groupby(["n", "seed"]):
            n, seed = (int(cast(float, k)) for k in key)
            t, status = self._time(n, seed, at, rule, group["step"])
            if at == "max":  # up to T, or everywhere if T was not reached
                until = group if t is None else group[group["step"] <= t]
                row = until.iloc[int(until["gap"].to_numpy().argmax())]
            elif t is None:
                row = pd.Series({**dict.fromkeys(columns, math.nan), "step": None})
            else:
                row = group[group["step"] == t].iloc[0]
            # A row of a table is a Series of floats, so n and seed are put back as whole numbers.
            rows.append({**row[columns].to_dict(), "n": n, "seed": seed, "status": status})
        found = pd.DataFrame(rows, columns=[*columns, "status"])
        return found.astype({"n": "float64", "seed": "int64", "step": "Int64"})

    def departure_step(
        self,
        n: int,
        metric: str = "soft_error",
        *,
        threshold: float = 0.02,
        consecutive: int = 3,
        seed: int | None = None,
    ) -> int | None:
        """The first step from which the bootstrap error exceeds ``threshold`` at ``consecutive`` evaluations in a row.

        Parameters
        ----------
        n, metric
            Sample size and metric.
        threshold, consecutive
            0.02 and 3 by default.
        seed
            One repetition; None (default) uses the gap averaged over the seeds.

        Returns
        -------
        int or None
            None: the Real World never leaves the Ideal path within the steps that were run.
        """
        checks.integer("consecutive", consecutive, least=1)
        gaps = self.gaps(metric)
        self.select("real", n=n, seed=seed)  # names what there is if n or seed was not run
        gaps = gaps[(gaps["n"] == n) & (gaps["seed"] == seed if seed is not None else True)]
        mean = gaps.groupby("step")["gap"].mean()
        run = 0  # evaluations above the threshold so far
        for i, above in enumerate(mean.to_numpy() > threshold):
            run = run + 1 if above else 0
            if run == consecutive:
                return int(mean.index[i - consecutive + 1])
        return None

    def compare(
        self, other: BootstrapResult, metric: str = "soft_error", *, at: str | int = "end", rule: Rule = "train_error"
    ) -> pd.DataFrame:
        """Another run (architecture, optimizer, augmentation) beside this one, in both worlds.

        Parameters
        ----------
        other
            A result with the same n and seeds, at least in part.
        metric, at, rule
            As in :meth:`gap`; at ``"T"`` each run is read at its own stopping time.

        Returns
        -------
        DataFrame
            ``n, seed, real, real_other, real_difference, ideal, ideal_other, ideal_difference, agree``: differences are
            other minus this, ``agree`` tells whether both worlds prefer the same run.
        """
        if at == "max":
            raise InvalidInput("compare reads both runs at one time; use at='T', 'end' or a step.")
        keys = ["n", "seed"]
        mine, theirs = (r.gap(metric, at=at, rule=rule)[[*keys, "real", "ideal"]] for r in (self, other))
        both = mine.merge(theirs, on=keys, suffixes=("", "_other"))
        if both.empty:
            raise InvalidInput(f"the runs share no n and seed: {self.n}, {self.seeds} and {other.n}, {other.seeds}.")
        for world in ("real", "ideal"):
            both[f"{world}_difference"] = both[f"{world}_other"] - both[world]
        both["agree"] = np.sign(both["real_difference"]) == np.sign(both["ideal_difference"])
        order = [f"{world}{part}" for world in ("real", "ideal") for part in ("", "_other", "_difference")]
        return both[[*keys, *order, "agree"]]

    def _check_metric(self, metric: str) -> None:
        checks.choice("metric", metric, METRICS)
        if self.curves[metric].isna().all():
            raise InvalidInput(
                f"this run has no {metric}: it was trained with loss={self.settings.get('loss')!r}, whose outputs are "
                f"not {'class probabilities' if metric == 'soft_error' else 'classes'}; use another metric."
            )

    def _time(self, n: int, seed: int, at: str | int, rule: Rule, steps: pd.Series) -> tuple[int | None, str]:
        """The step that ``at`` means for one n and seed, and whether it had converged by then."""
        if at in ("T", "max"):
            t = self.stopping_time(n, rule, seed=seed)
            return t, _status(t, rule)
        if at == "end":
            return int(steps.max()), "end"  # of this lane, which may have stopped early
        if isinstance(at, str) or at not in set(steps):
            shown = ", ".join(map(str, sorted(set(steps))))
            raise InvalidInput(f"at={at!r} was not evaluated for n={n}; use 'T', 'max', 'end' or a step: {shown}.")
        return int(at), "step"

    # ---- files ----------------------------------------------------------------------------------------------------

    def to_parquet(self, file: Path | str) -> None:
        """Write the curves, with the settings in the schema's metadata; any Parquet tool reads it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pandas(self.curves, preserve_index=False)
        meta = {**(table.schema.metadata or {}), _META_KEY: json.dumps(self.settings).encode()}
        pq.write_table(table.replace_schema_metadata(meta), Path(file))

    @classmethod
    def from_parquet(cls, file: Path | str) -> BootstrapResult:
        """Inverse of :meth:`to_parquet`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(file).is_file():
            raise MissingFile(f"there is no file {file}.")
        try:
            table = pq.read_table(Path(file))
        except pa.ArrowInvalid as reason:
            raise InvalidInput(f"{file} is not a Parquet file: {reason}") from None
        settings = json.loads((table.schema.metadata or {}).get(_META_KEY, b"{}"))
        return cls(table.to_pandas(), settings)

    def to_arviz(self) -> Any:
        """The curves as ``arviz.InferenceData``: the seeds are the draws of one chain.

        Group ``posterior`` has, for each metric that was measured, ``real_<metric>``, ``train_<metric>`` and
        ``gap_<metric>`` with dimensions ``(chain, draw, n, step)`` and ``ideal_<metric>`` with ``(chain, draw, step)``;
        steps after an early stop are NaN. So ``arviz.hdi`` and ``arviz.summary`` give intervals over the seeds.
        """
        import arviz

        steps = sorted(self.curves["step"].unique())
        columns = pd.Index(steps, name="step")
        data: dict[str, npt.NDArray[np.float64]] = {}  # (chain, draw, [n,] step)
        dims: dict[str, list[str]] = {}
        for metric in (m for m in METRICS if not self.curves[m].isna().all()):
            ideal = self.select("ideal").pivot_table(index="seed", columns="step", values=metric)
            # The chain is one, so [None] in front of (seeds, steps).
            data[f"ideal_{metric}"] = ideal.reindex(index=list(self.seeds), columns=columns).to_numpy(float)[None]
            dims[f"ideal_{metric}"] = ["step"]
            for name, split in (("real", "test"), ("train", "train")):
                wide = self.select("real", split).pivot_table(index=["seed", "n"], columns="step", values=metric)
                grid = pd.MultiIndex.from_product([self.seeds, self.n])  # the rows of the cube, n fastest
                cube = wide.reindex(index=grid, columns=columns).to_numpy(float)
                data[f"{name}_{metric}"] = cube.reshape(1, len(self.seeds), len(self.n), len(steps))
                dims[f"{name}_{metric}"] = ["n", "step"]
            data[f"gap_{metric}"] = data[f"real_{metric}"] - data[f"ideal_{metric}"][:, :, None]  # one ideal for all n
            dims[f"gap_{metric}"] = ["n", "step"]
        return arviz.from_dict(posterior=data, coords={"n": list(self.n), "step": steps}, dims=dims)

    # ---- pictures -------------------------------------------------------------------------------------------------

    def plot_curves(self, ax: Axes | None = None, *, metric: str = "soft_error", rule: Rule = "train_error") -> Axes:
        """Test curves of all worlds (mean and 95 % interval over seeds), train dashed, T(n) marked."""
        self._check_metric(metric)
        ax = new_axes(ax)
        for n, color in self._colors():
            step, mean = band(ax, self.select("real", n=n), metric, color, f"real, n = {n:,}")
            train = (
                self.select("real", "train", n=n).groupby("step")[metric].mean()
            )  # without a band, which would hide the others
            ax.plot(train.index, train, color=color, linestyle=(0, (4, 2)), linewidth=1)
            t = self.stopping_time(n, rule) if not self.curves["error"].isna().all() else None
            if t is not None:
                ax.plot([t], [np.interp(t, step, mean)], "o", color=color, markeredgecolor="white", zorder=5)
        band(ax, self.select("ideal"), metric, _IDEAL, "ideal")
        finish(ax, self.curves["step"], LABELS[metric])
        ax.set_title("solid: test, dashed: train, dot: converged", fontsize="small", loc="left")
        return ax

    def plot_gap(self, ax: Axes | None = None, *, metric: str = "soft_error") -> Axes:
        """The bootstrap error over time for each n (mean and 95 % interval over seeds)."""
        gaps = self.gaps(metric)
        ax = new_axes(ax)
        ax.axhline(0, color=_IDEAL, linewidth=0.8)
        for n, color in self._colors():
            band(ax, gaps[gaps["n"] == n], "gap", color, f"n = {n:,}")
        finish(ax, self.curves["step"], f"bootstrap error ({LABELS[metric]})")
        return ax

    def plot_scatter(
        self,
        ax: Axes | None = None,
        *,
        metric: str = "soft_error",
        at: str | int = "T",
        rule: Rule = "train_error",
        others: Mapping[str, BootstrapResult] | None = None,
        name: str | None = None,
    ) -> Axes:
        """Real against Ideal World, one point per n and seed, with the diagonal; ``others`` adds named runs."""
        ax = new_axes(ax)
        runs = {name or "this run": self, **(others or {})}
        highest = 0.0
        for (label, result), color in zip(runs.items(), cycle(len(runs)), strict=True):
            points = result.gap(metric, at=at, rule=rule)
            ax.scatter(points["ideal"], points["real"], color=color, s=22, label=label, zorder=3)
            highest = float(np.nanmax([highest, *points["real"], *points["ideal"]]))
        top = 1.08 * highest or 1.0
        ax.plot([0, top], [0, top], color=_IDEAL, linewidth=0.8)
        ax.set(
            xlim=(0, top),
            ylim=(0, top),
            xlabel=f"ideal {LABELS[metric]}",
            ylabel=f"real {LABELS[metric]}",
            aspect="equal",
        )
        if len(runs) > 1:
            ax.legend(frameon=False, fontsize="small")
        return ax

    def _colors(self) -> list[tuple[int, str]]:
        return list(zip(self.n, cycle(len(self.n)), strict=True))


def _status(t: int | None, rule: Rule) -> str:
    if rule == "budget":
        return "budget"
    return "not converged" if t is None else "converged"
