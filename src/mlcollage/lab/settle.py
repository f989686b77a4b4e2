"""Adding seeds until the verdicts are settled, only where one is still open, and without inflating errors.

Looking at the results and adding seeds until something is significant makes an ordinary test reject sooner or later.
Here every look is at anytime-valid p values (:mod:`mlcollage.stats.sequential`): whatever the rule by which one stops,
the chance that a claim without effect is ever called supported stays below its alpha, after Holm's correction over the
claims. The price is power: a settled verdict takes about twice the seeds of a test whose number of seeds was fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlcollage.errors import InvalidInput
from mlcollage.lab.claim import Claim, Status
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.procedures import ANYTIME
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.store import Store
from mlcollage.lab.study import Study

if TYPE_CHECKING:
    from mlcollage.lab.engine import Engine, Event

__all__ = ["check_settling", "next_runs", "open_claims", "run_until_settled", "settle"]

TIMES = 4
"""Seeds at most, as a multiple of those registered, unless the caller says otherwise."""


def check_settling(study: Study, max_seeds: int | None = None) -> int:
    """The largest number of seeds to go to.

    Raises
    ------
    InvalidInput
        If the scale gives no verdicts, the study cannot add seeds, or ``max_seeds`` leaves no room for any.
    """
    if study.scale is Scale.SMOKE:
        raise InvalidInput("scale smoke gives no verdicts that could be settled; use quick or larger.")
    first = study.batch(0)
    most = TIMES * first.start if max_seeds is None else max_seeds
    if max_seeds is not None and most < first.stop:
        raise InvalidInput(
            f"max_seeds={most}: {study.slug} registers {first.start} seeds at scale {study.scale}, adds "
            f"{len(first)} at a time, and so needs at least {first.stop}."
        )
    return most


def open_claims(study: Study, evidence: Evidence) -> list[Claim]:
    """Claims that more seeds could settle: inconclusive ones with a p value and an anytime-valid test."""
    return [
        v.claim
        for v in study.judge(evidence).values()
        if v.status is Status.INCONCLUSIVE and v.p_value is not None and v.claim.test in ANYTIME
    ]


def next_runs(study: Study, evidence: Evidence, claims: Sequence[Claim], seeds: range) -> list[Run]:
    """Runs of these seeds that the claims need.

    Needed is what fed the claim so far: a run whose arm and settings are those of a finished run with rows of the
    claim's arms (and of its metric, if its estimand names one). A claim whose estimand names no arms needs all.
    """
    candidates = study.more_runs(seeds)
    kind = {run.id: (run.arm, tuple(run.settings.items())) for run in evidence.runs}
    needed: dict[Run, None] = {}
    for claim in claims:
        table, arms = evidence.table, getattr(claim.estimand, "arms", ())
        if arms:
            table = table[table["arm"].isin(arms)]
        if metric := getattr(claim.estimand, "metric", ""):
            table = table[table["metric"] == metric]
        fed = {kind[run] for run in table["run"].unique()}
        same = [run for run in candidates if (run.arm, tuple(run.settings.items())) in fed]
        # settings may name the seeds that a run holds; the arm is then what tells
        same = same or [run for run in candidates if run.arm in {arm for arm, _ in fed}]
        needed |= dict.fromkeys(same or candidates)
    return [run for run in candidates if run in needed]


def settle(
    study: Study,
    store: Store,
    execute: Callable[[list[Run]], None],
    *,
    max_seeds: int | None = None,
    on_round: Callable[[list[Claim], range], None] | None = None,
) -> Evidence:
    """Add batches of seeds while a claim is open; the registered runs must have been made.

    Parameters
    ----------
    study, store
        What is run, and where results are kept.
    execute
        Executes the runs it is given; those that fail stay failed in this call.
    max_seeds
        Go to so many seeds at most (registered ones included); default four times the registered number.
    on_round
        Called with the open claims and the seeds before each batch.

    Returns
    -------
    Evidence
        Marked so that the judge uses anytime-valid tests, even if no seed had to be added.
    """
    most, k = check_settling(study, max_seeds), 0
    while True:
        evidence = dataclasses.replace(study.evidence(store), registered=study.seeds)
        seeds = study.batch(k)
        claims = open_claims(study, evidence)
        if not claims or seeds.stop > most:
            return evidence
        todo = [run for run in next_runs(study, evidence, claims, seeds) if not store.has(run)]
        if todo:
            if on_round is not None:
                on_round(claims, seeds)
            execute(todo)
        k += 1


def run_until_settled(
    slug: str,
    scale: Scale | str = Scale.QUICK,
    *,
    workload: str | None = None,
    store: Store | Path | str = "results",
    engine: Engine | str = "local",
    workers: int | None = None,
    max_seeds: int | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Evidence:
    """As :func:`~mlcollage.lab.study.run_study`, then seeds are added until all verdicts are settled.

    Parameters
    ----------
    slug, scale, workload, store, engine, workers, on_event
        As in :func:`~mlcollage.lab.study.run_study`.
    max_seeds
        As in :func:`settle`.

    Returns
    -------
    Evidence
        Judge it with ``Study(slug, scale, workload).judge(evidence)``.
    """
    from mlcollage.lab.engine import get_engine

    study = Study(slug, Scale(scale), workload)
    check_settling(study, max_seeds)
    store = store if isinstance(store, Store) else Store(store)
    chosen = get_engine(engine, workers=workers) if isinstance(engine, str) else engine

    def execute(runs: list[Run]) -> None:
        chosen.execute(study, runs, store, on_event or (lambda event: None))

    if todo := [run for run in study.runs() if not store.has(run)]:
        execute(todo)
    return settle(study, store, execute, max_seeds=max_seeds)
