"""Running a study: what is missing is measured, and seeds are added until the verdicts are settled, if one asks for it.

Looking at the results and adding seeds until something is significant makes an ordinary test reject sooner or later.
Here every look is at anytime-valid p values (:mod:`mlcollage.stats.sequential`): whatever the rule by which one stops,
the chance that a claim without effect is ever called supported stays below its alpha, after Holm's correction over the
claims. The price is power: a settled verdict takes about twice the seeds of a test whose number of seeds was fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from mlcollage.errors import InvalidInput
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.claim import Claim, Status
from mlcollage.lab.engine import Engine, Event
from mlcollage.lab.engines import get_engine
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.procedures import ANYTIME
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.store import Store

TIMES = 4
"""Seeds at most, as a multiple of those registered, unless the caller says otherwise."""

OnEvent = Callable[[Event], None]


def run_missing(
    study: BoundStudy, store: Store, engine: Engine, runs: Sequence[Run] | None = None, on_event: OnEvent | None = None
) -> Evidence:
    """Execute what the store does not hold yet of these runs, by default of the registered ones; return all evidence.

    This is the one place where runs are handed to an engine. Finished runs that turn out to be damaged are set aside
    and measured again.
    """
    wanted = study.runs() if runs is None else list(runs)

    def execute(todo: list[Run]) -> Evidence:
        # What something outside ended (a node that died, a job that was pre-empted) is missing and tried again. The
        # store counts how often, and calls the third time a failure; so this comes to an end.
        while todo:
            before = sum(len(store.interruptions(run)) for run in store.interrupted(todo))
            engine.execute(study, todo, store, on_event or (lambda event: None))
            failed = store.failed(study.slug)
            left = [run for run in store.missing(todo) if run.id not in failed]
            after = sum(len(store.interruptions(run)) for run in store.interrupted(left))
            if len(left) == len(todo) and after <= before:  # an engine that leaves runs to another command
                break
            todo = left
        return study.evidence(store)

    # Damage shows when evidence is read, so whole runs are not read twice to look for it.
    evidence = execute(store.missing(wanted))
    if not evidence.damaged:
        return evidence
    for failure in evidence.damaged:
        store.set_aside(failure.run)  # not deleted: somebody may want to know what happened to the disk
    return execute([failure.run for failure in evidence.damaged])


def run_study(
    slug: str,
    scale: Scale | str = Scale.QUICK,
    *,
    workload: str | None = None,
    store: Store | Path | str = "results",
    engine: Engine | str = "local",
    workers: int | None = None,
    on_event: OnEvent | None = None,
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
        ``"local"``, ``"slurm"``, ``"ray"``, or an object with the :class:`~mlcollage.lab.engine.Engine` protocol.
    workers
        Processes at a time; default one per core.
    on_event
        Called in this process as runs start, finish and fail.

    Returns
    -------
    Evidence
        With ``failures`` for runs that failed; the others are unharmed.
    """
    study, place, chosen = _prepare(slug, scale, workload, store, engine, workers)
    return run_missing(study, place, chosen, on_event=on_event)


def run_until_settled(
    slug: str,
    scale: Scale | str = Scale.QUICK,
    *,
    workload: str | None = None,
    store: Store | Path | str = "results",
    engine: Engine | str = "local",
    workers: int | None = None,
    max_seeds: int | None = None,
    on_event: OnEvent | None = None,
) -> Evidence:
    """As :func:`run_study`, then seeds are added until all verdicts are settled.

    Parameters
    ----------
    slug, scale, workload, store, engine, workers, on_event
        As in :func:`run_study`.
    max_seeds
        As in :func:`settle`.

    Returns
    -------
    Evidence
        Judge it with ``BoundStudy(slug, scale, workload).judge(evidence)``.
    """
    study, place, chosen = _prepare(slug, scale, workload, store, engine, workers)
    check_settling(study, max_seeds)
    run_missing(study, place, chosen, on_event=on_event)
    return settle(study, place, chosen, max_seeds=max_seeds, on_event=on_event)


def _prepare(
    slug: str,
    scale: Scale | str,
    workload: str | None,
    store: Store | Path | str,
    engine: Engine | str,
    workers: int | None,
) -> tuple[BoundStudy, Store, Engine]:
    chosen = get_engine(engine, workers=workers) if isinstance(engine, str) else engine
    return BoundStudy(slug, Scale(scale), workload), store if isinstance(store, Store) else Store(store), chosen


def check_settling(study: BoundStudy, max_seeds: int | None = None) -> int:
    """The largest number of seeds to go to.

    Raises
    ------
    InvalidInput
        If the scale gives no verdicts, or ``max_seeds`` leaves no room for more seeds.
    """
    if study.scale is Scale.SMOKE:
        raise InvalidInput("scale smoke gives no verdicts that could be settled; use quick or larger.")
    first = study.batch(0)  # the seeds that would be added first
    most = TIMES * first.start if max_seeds is None else max_seeds
    if max_seeds is not None and most < first.stop:
        raise InvalidInput(
            f"max_seeds={most}: {study.slug} registers {first.start} seeds at scale {study.scale}, adds "
            f"{len(first)} at a time, and so needs at least {first.stop}."
        )
    return most


def open_claims(study: BoundStudy, evidence: Evidence) -> list[Claim]:
    """Claims that more seeds could settle: inconclusive ones with a p value and an anytime-valid test."""
    return [
        v.claim
        for v in study.judge(evidence).values()
        if v.status is Status.INCONCLUSIVE and v.p_value is not None and v.claim.test in ANYTIME
    ]


def next_runs(study: BoundStudy, evidence: Evidence, claims: Sequence[Claim], seeds: range) -> list[Run]:
    """Runs of these seeds that the claims need.

    Needed is what fed the claim so far: a run whose experiment and arm are those of a finished run with rows of the
    claim's arms (and of its metric, if its estimand names one). A claim whose estimand names no arms needs all.
    """
    candidates = study.more_runs(seeds)
    # Rows name the run that they came from; arms of one name may occur in several experiments.
    kind = {run.id: (run.experiment, run.arm) for run in evidence.runs}
    needed: set[Run] = set()
    for claim in claims:
        table, arms = evidence.table, getattr(claim.estimand, "arms", ())
        if arms:
            table = table[table["arm"].isin(arms)]
        if metric := getattr(claim.estimand, "metric", ""):
            table = table[table["metric"] == metric]
        fed = {kind[run] for run in table["run"].unique()}
        # Nothing found, for instance because all rows come from pictures: run everything rather than nothing.
        needed |= {run for run in candidates if (run.experiment, run.arm) in fed} or set(candidates)
    return [run for run in candidates if run in needed]  # in the order in which they start


def settle(
    study: BoundStudy,
    store: Store,
    engine: Engine,
    *,
    max_seeds: int | None = None,
    on_round: Callable[[list[Claim], range, list[Run]], None] | None = None,
    on_event: OnEvent | None = None,
) -> Evidence:
    """Add batches of seeds while a claim is open; the registered runs must have been made.

    Parameters
    ----------
    study, store, engine
        What is run, where results are kept, and who executes. Runs that fail stay failed in this call.
    max_seeds
        Go to so many seeds at most (registered ones included); default four times the registered number.
    on_round
        Called with the open claims, the seeds and the runs before each batch.
    on_event
        Called as runs start, finish and fail.

    Returns
    -------
    Evidence
        Marked so that the judge uses anytime-valid tests, even if no seed had to be added.
    """
    most, k = check_settling(study, max_seeds), 0
    while True:
        # From the first look on, even before a seed was added: whether one is added depends on this very verdict.
        evidence = dataclasses.replace(study.evidence(store), registered=study.seeds)
        seeds = study.batch(k)
        claims = open_claims(study, evidence)
        if not claims or seeds.stop > most:  # a batch is added whole or not at all
            return evidence
        todo = store.missing(next_runs(study, evidence, claims, seeds))
        if todo and on_round is not None:
            on_round(claims, seeds, todo)
        run_missing(study, store, engine, todo, on_event)
        k += 1
