"""Everything measured for one study at one scale on one workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.lab.run import Run, Scale


@dataclass(frozen=True)
class Failure:
    """A run that gave no result, and why."""

    run: Run
    reason: str


@dataclass
class Evidence:
    """What a study's claims are judged by and its slide is drawn from.

    Parameters
    ----------
    study, scale, workload
        What was measured.
    table
        One row per number: ``experiment, arm, seed, metric, step, value, run`` and the study's free columns.
        A free column that a row does not use is missing (NaN) there.
    runs
        The finished runs.
    failures
        Runs that failed, with the reason. They are never dropped silently.
    info
        One dictionary per finished run: package versions, device, seconds, peak memory, date.
    waiting
        Runs that are neither finished nor failed; damaged ones count as not finished.
    damaged
        Finished runs whose files cannot be read, with the reason.
    registered
        None, or how many seeds (0, 1, ...) the study registered, where the table may also hold seeds that were added
        after a look at the results. The judge then uses tests that stay valid under such looks.
    """

    study: str
    scale: Scale
    workload: str
    table: pd.DataFrame
    runs: Sequence[Run] = ()
    failures: Sequence[Failure] = ()
    info: Sequence[dict[str, Any]] = ()
    waiting: Sequence[Run] = ()
    damaged: Sequence[Failure] = ()
    registered: int | None = None
    load_array: Callable[[str, str], npt.NDArray[Any]] | None = field(default=None, repr=False)

    @property
    def missing(self) -> int:
        """How many runs are neither finished nor failed."""
        return len(self.waiting)

    def select(
        self, metric: str | None = None, *, arm: str | Sequence[str] | None = None, **where: object
    ) -> pd.DataFrame:
        """Rows of a metric and arm(s) whose other columns equal ``where``.

        Raises
        ------
        UnknownName
            If no row is left; the message lists what there is.
        """
        # Each filter says what there was before it, since a slip in a name is likelier than a metric that was lost.
        t = self.table
        if metric is not None:
            t = t[t["metric"] == metric]
            if t.empty:
                raise UnknownName(
                    f"no metric {metric!r} was measured; there are: {', '.join(sorted(set(self.table['metric'])))}."
                )
        if arm is not None:
            arms = [arm] if isinstance(arm, str) else list(arm)
            there = sorted(set(t["arm"]))
            t = t[t["arm"].isin(arms)]
            if t.empty:
                raise UnknownName(f"metric {metric!r} has no arm {', '.join(arms)}; there are: {', '.join(there)}.")
        for column, value in where.items():
            if column not in t.columns:
                raise UnknownName(f"the measurements have no column {column!r}; there are: {', '.join(t.columns)}.")
            t = t[t[column] == value]
        if t.empty:
            raise UnknownName(f"no row of {metric!r} ({arm!r}) has {where}.")
        return t

    def by_seed(self, metric: str, *, arm: str | None = None, **where: object) -> pd.Series[float]:
        """One value for each seed, in the order of the seeds, so that the difference of two arms is paired.

        Raises
        ------
        UnknownName
            If nothing like it was measured.
        InvalidInput
            If a seed has several values: name the step or the level that is meant.

        Examples
        --------
        >>> from mlcollage.lab import Evidence, Scale
        >>> rows = [{"arm": a, "seed": s, "metric": "error", "step": 0, "value": v}
        ...         for a, values in {"new": (0.2, 0.3), "old": (0.4, 0.6)}.items() for s, v in enumerate(values)]
        >>> evidence = Evidence("demo", Scale.QUICK, "digits", pd.DataFrame(rows))
        >>> (evidence.by_seed("error", arm="new") - evidence.by_seed("error", arm="old")).round(3).tolist()
        [-0.2, -0.3]
        """
        rows = self.select(metric, arm=arm, **where)
        found = rows.set_index("seed")["value"].astype(float).sort_index()
        if found.index.has_duplicates:
            twice = found.index[found.index.duplicated()][0]
            raise InvalidInput(
                f"seed {twice} has several values of {metric!r}; name a step, an arm or a level so that one is left."
            )
        return found

    def across_seeds(
        self, metric: str, *, over: str = "step", arm: str | None = None, level: float = 0.95, **where: object
    ) -> pd.DataFrame:
        """Mean over seeds and its Student t interval at each value of a column, for a curve with a band.

        Returns
        -------
        DataFrame
            Index: the sorted values of ``over``; columns ``mean, lo, hi, seeds``. With one seed the interval is the
            value itself.
        """
        from mlcollage.stats.bootstrap import t_interval

        rows = self.select(metric, arm=arm, **where)  # one row per seed and value of `over`
        found = {}
        for key, values in rows.groupby(over)["value"]:
            x = values.to_numpy(dtype=float)  # (seeds,)
            lo, hi = t_interval(x, level) if len(x) > 1 and np.ptp(x) > 0 else (float(x.mean()),) * 2
            found[key] = {"mean": float(x.mean()), "lo": lo, "hi": hi, "seeds": len(x)}
        return pd.DataFrame.from_dict(found, orient="index").sort_index()

    def array(self, run: Run | str, name: str) -> npt.NDArray[Any]:
        """A named array that a run stored."""
        if self.load_array is None:
            raise UnknownName(f"this evidence holds no arrays, so not {name!r} either.")
        # Read when a picture asks for it: arrays are large, and verdicts need none.
        return np.asarray(self.load_array(run if isinstance(run, str) else run.id, name))

    def find_runs(
        self, *, experiment: str | None = None, arm: str | None = None, seed: int | None = None, **settings: object
    ) -> list[Run]:
        """Finished runs of this experiment and arm, that measured this seed, with these settings."""
        return [
            r
            for r in self.runs
            if (experiment is None or r.experiment == experiment)
            and (arm is None or r.arm == arm)
            and (seed is None or seed in r.seeds)
            and all(r.settings.get(k) == v for k, v in settings.items())
        ]

    @property
    def seeds(self) -> int:
        """Number of different seeds in the table."""
        return int(self.table["seed"].nunique()) if len(self.table) else 0
