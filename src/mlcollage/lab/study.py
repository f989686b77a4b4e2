"""A study: what is run and what is claimed, joined to where it runs and where it is kept."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcollage.errors import InvalidInput, MLCollageError
from mlcollage.lab.claim import Claim, Status, Verdict, fingerprint
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.judge import judge
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.paper import Paper, find_paper
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.store import Store

if TYPE_CHECKING:
    from mlcollage.data.workload import Workload
    from mlcollage.lab.engine import Engine, Event

__all__ = ["Study", "run_study"]

_MOST_RUNS = 100_000
_BATCH = 5  # seeds are added so many at a time: runs that hold several seeds can share what they load


@dataclass(frozen=True)
class Study:
    """A paper's study on one workload at one scale.

    The paper's ``study.py`` gives ``VERSION``, ``CLAIMS``, ``runs(scale, workload)`` and
    ``measure(run, workload)``; this class adds what every study needs. If it also gives ``SEEDS`` (how many seeds,
    0, 1, ..., are registered at each scale) and ``runs`` takes a third argument ``seeds``, a range of further seeds,
    then more seeds can be asked of it (:mod:`mlcollage.lab.settle`).

    Parameters
    ----------
    slug
        Which paper.
    scale
        How large.
    workload_spec
        ``None`` for the study's own data, else what :func:`mlcollage.data.workload.load_workload` takes.
    """

    slug: str
    scale: Scale = Scale.QUICK
    workload_spec: str | None = None
    paper: Paper = field(init=False, compare=False)
    _cache: dict[str, Any] = field(init=False, compare=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", Scale(self.scale))
        object.__setattr__(self, "paper", find_paper(self.slug))
        self.paper.module("study")

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The claims, as registered."""
        claims = tuple(self.paper.module("study").CLAIMS)
        ids = [c.id for c in claims]
        if len(set(ids)) != len(ids):
            raise InvalidInput(f"study {self.slug} has two claims with one id among {', '.join(ids)}; rename one.")
        return claims

    @property
    def version(self) -> int:
        """Raised by the study's author when ``measure`` changes meaning; results of older versions are not reused."""
        return int(self.paper.module("study").VERSION)

    @property
    def workload(self) -> Workload | None:
        """The user's workload, loaded once, or None."""
        if self.workload_spec is None:
            return None
        if "workload" not in self._cache:
            from mlcollage.data.workload import load_workload

            self._cache["workload"] = load_workload(self.workload_spec)
        return self._cache["workload"]

    @property
    def workload_name(self) -> str:
        """Name and fingerprint of the workload; ``default`` for the study's own data."""
        workload = self.workload
        if workload is None:
            return "default"
        return f"{workload.name}@{workload.fingerprint[:8]}" if workload.fingerprint else workload.name

    def runs(self) -> list[Run]:
        """All runs of the study, without duplicates, in the order in which they start."""
        if "runs" not in self._cache:
            found = self._collect()
            if not found:
                raise InvalidInput(f"study {self.slug} has no runs at scale {self.scale}; choose another scale.")
            self._cache["runs"] = found
        return list(self._cache["runs"])

    @property
    def seeds(self) -> int | None:
        """How many seeds are registered at this scale; None if the study cannot be asked for further ones."""
        module = self.paper.module("study")
        if not hasattr(module, "SEEDS") or "seeds" not in inspect.signature(module.runs).parameters:
            return None
        return int(module.SEEDS[self.scale])

    def more_runs(self, seeds: range) -> list[Run]:
        """The runs of seeds beyond the registered ones.

        Raises
        ------
        InvalidInput
            If the study repeats a registered run when asked for further seeds.
        """
        found = self._collect(seeds)
        if repeated := set(found) & set(self.runs()):
            raise InvalidInput(
                f"runs() of study {self.slug} repeats {min(map(str, repeated))} when asked for seeds {seeds.start} to "
                f"{seeds.stop - 1}; it must yield runs of those seeds only."
            )
        return found

    def _collect(self, seeds: range | None = None) -> list[Run]:
        identity: dict[str, Any] = {
            "study": self.slug,
            "scale": self.scale,
            "workload": self.workload_name,
            "version": self.version,
        }
        asked = {} if seeds is None else {"seeds": seeds}
        found: Iterator[Run] = self.paper.module("study").runs(self.scale, self.workload, **asked)
        unique = dict.fromkeys(dataclasses.replace(run, **identity) for run in islice(found, _MOST_RUNS + 1))
        if len(unique) > _MOST_RUNS:
            raise InvalidInput(
                f"runs() of study {self.slug} gives more than {_MOST_RUNS:,} runs; let one run train several seeds "
                "or settings."
            )
        return list(unique)

    def measure(self, run: Run) -> Measurements:
        """Execute one run here and now, in this process."""
        result = self.paper.module("study").measure(run, self.workload)
        if not isinstance(result, Measurements):
            raise InvalidInput(
                f"measure() of study {self.slug} returned {type(result).__name__}; it must return Measurements."
            )
        if not len(result):
            raise InvalidInput(f"measure() of study {self.slug} recorded no number for run {run}.")
        return result

    def batch(self, k: int) -> range:
        """The k-th batch of seeds that are added to the registered ones; batches are the same in every command."""
        if self.seeds is None:
            raise InvalidInput(
                f"study {self.slug} cannot add seeds: its study.py needs SEEDS, the number of registered seeds of each "
                "scale, and runs(scale, workload, seeds=None), which yields the runs of any range of seeds."
            )
        return range(self.seeds + k * _BATCH, self.seeds + (k + 1) * _BATCH)

    def added_runs(self, store: Store) -> list[Run]:
        """Runs of added seeds that were made: finished ones, and those that failed."""
        if self.seeds is None:
            return []
        made: list[Run] = []
        k = 0
        while found := [run for run in self.more_runs(self.batch(k)) if store.has(run) or store.failure(run)]:
            made += found
            k += 1
        return made

    def evidence(self, store: Store) -> Evidence:
        """Everything that the store holds for this study, scale and workload, added seeds included."""
        added = self.added_runs(store)
        evidence = store.evidence(
            [*self.runs(), *added], study=self.slug, scale=self.scale, workload=self.workload_name
        )
        return dataclasses.replace(evidence, registered=self.seeds if added else None)

    def judge(self, evidence: Evidence) -> dict[str, Verdict]:
        """A verdict for each claim; says so where claims were changed after runs were made.

        A study may leave experiments out on a user's workload, or where the original data do not allow them. Claims
        about these are ``untested``, "not part of this workload", and do not count in Holm's correction.
        """
        outside = {c.id: c for c in self.claims if self._is_outside(c, evidence)}
        judged = judge([c for c in self.claims if c.id not in outside], evidence)
        where = "this workload" if self.workload_spec else "the study at this scale"
        untested = {
            c.id: Verdict(c, Status.UNTESTED, Scale(evidence.scale), evidence.workload, reason=f"not part of {where}")
            for c in outside.values()
        }
        verdicts = {c.id: (judged | untested)[c.id] for c in self.claims}
        now = fingerprint(self.claims)
        stale = sum(1 for info in evidence.info if info.get("claims") != now)
        if not stale:
            return verdicts
        note = f"the registered claims were changed after {stale} of {len(evidence.info)} runs were made"
        return {k: dataclasses.replace(v, warnings=(*v.warnings, note)) for k, v in verdicts.items()}

    def _is_outside(self, claim: Claim, evidence: Evidence) -> bool:
        """Whether the claim is about something that is not measured on this workload.

        That is so if every run has finished and the claim's estimand still finds no such metric, arm or column (a
        ``LookupError``): on a user's workload, or if arms that it names were not run. Otherwise the estimand is wrong,
        and the judge says so; and while runs are missing or failed, one cannot know.
        """
        due = self.scale is not Scale.SMOKE and self.scale.rank >= Scale(claim.from_scale).rank
        if not due or evidence.missing or evidence.failures or not evidence.runs:
            return False
        named = set(getattr(claim.estimand, "arms", ()))
        if self.workload_spec is None and named <= set(evidence.table["arm"]):
            return False
        try:
            claim.estimand(evidence)
        except LookupError:
            return True
        except MLCollageError:  # the judge says what is wrong
            return False
        return False


def run_study(
    slug: str,
    scale: Scale | str = Scale.QUICK,
    *,
    workload: str | None = None,
    store: Store | Path | str = "results",
    engine: Engine | str = "local",
    workers: int | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Evidence:
    """Run what the store does not hold yet, and return all evidence.

    Parameters
    ----------
    slug
        Which paper.
    scale
        ``smoke``, ``quick``, ``full`` or ``paper``.
    workload
        None for the study's own data, or your own: ``module:function``, a file, a folder.
    store
        Folder of results. Two commands may share one.
    engine
        ``"local"`` or an object with the :class:`~mlcollage.lab.engine.Engine` protocol.
    workers
        Processes at a time; default one a core.
    on_event
        Called in this process as runs start, finish and fail.

    Returns
    -------
    Evidence
        With ``failures`` for runs that failed; the others are unharmed.
    """
    from mlcollage.lab.engine import get_engine

    study = Study(slug, Scale(scale), workload)
    store = store if isinstance(store, Store) else Store(store)
    chosen = get_engine(engine, workers=workers) if isinstance(engine, str) else engine
    todo = [run for run in study.runs() if not store.has(run)]
    if todo:
        chosen.execute(study, todo, store, on_event or (lambda event: None))
    return study.evidence(store)
