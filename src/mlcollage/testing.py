"""The contract of a study, as checks that any paper's tests can run: built in or a plug-in.

In a test file::

    import pytest
    from mlcollage.testing import study_checks

    @pytest.mark.parametrize("check", study_checks("my_paper"), ids=str)
    def test_the_study(check):
        check()
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlcollage.data.loading import load_workload
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.lab import BoundStudy, Evidence, Run, Scale, Store, run_missing, run_study
from mlcollage.lab.experiment import plain, settings_lines
from mlcollage.lab.publish import draw_slide, make_slide

MOST_HEADLINES = 6
_TIMED = re.compile("second|speed|per_cpu")  # metrics that differ from run to run


@dataclass(frozen=True)
class _Case:
    """What the checks of one study share."""

    slug: str
    workload: str
    beyond_smoke: tuple[str, ...]
    place: Store

    @property
    def bound(self) -> BoundStudy:
        return BoundStudy(self.slug, Scale.SMOKE)

    @property
    def evidence(self) -> Evidence:
        """Of the study's own data at smoke, made once per store."""
        evidence = run_study(self.slug, Scale.SMOKE, store=self.place)
        assert not evidence.failures, "; ".join(f"{f.run}: {f.reason}" for f in evidence.failures)
        return evidence


@dataclass(frozen=True)
class StudyCheck:
    """One promise of a study; call it, with a store that the checks may share, or without."""

    name: str
    slug: str
    workload: str
    beyond_smoke: tuple[str, ...]

    def __call__(self, store: Store | None = None) -> None:
        """Raise ``AssertionError`` where the promise is broken."""
        place = Store(_scratch(self.slug)) if store is None else store
        _CHECKS[self.name](_Case(self.slug, self.workload, self.beyond_smoke, place))

    def __str__(self) -> str:
        return self.name


@functools.cache
def _scratch(slug: str) -> Path:
    """A folder for this process and study, gone when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix=f"{slug}-")
    _FOLDERS.append(folder)
    return Path(folder.name)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def study_checks(slug: str, *, workload: str = "digits", beyond_smoke: Sequence[str] = ()) -> list[StudyCheck]:
    """All checks of a study.

    Parameters
    ----------
    slug
        Which paper.
    workload
        A workload on which the study is run at scale smoke, if it takes any; of a kind that it takes.
    beyond_smoke
        Ids of claims whose estimand needs more data than scale smoke gives.
    """
    return [StudyCheck(name, slug, workload, tuple(beyond_smoke)) for name in _CHECKS]


def check_study(
    slug: str, *, workload: str = "digits", beyond_smoke: Sequence[str] = (), store: Store | None = None
) -> None:
    """Run all checks of a study, one after the other; see :func:`study_checks`."""
    for check in study_checks(slug, workload=workload, beyond_smoke=beyond_smoke):
        check(store)


def _claims_are_complete(case: _Case) -> None:
    study = case.bound.study
    assert study.claims, "a study claims something"
    headlines = [c.id for c in study.headlines]
    assert 1 <= len(headlines) <= MOST_HEADLINES, f"mark three to six claims as headlines; these are: {headlines}"
    for c in study.claims:
        assert c.sentence.endswith("."), f"claim {c.id}: its sentence ends with a full stop"
        assert c.title[0].isupper() or not c.title[0].isalpha(), f"claim {c.id}: its title is a sentence"
        assert "memory" not in c.paper_value, f"claim {c.id}: leave out a value that cannot be pointed to"
    assert len({c.title for c in study.claims}) == len(study.claims), "no two claims share a title"


def _settings_are_documented_and_plain(case: _Case) -> None:
    for e in case.bound.study.experiments:
        for settings in e.settings.values():
            kind = type(settings)
            bare = [name for name, _, comment in settings_lines(settings) if not comment]
            assert not bare, f"{kind.__name__} of experiment {e.name}: no comment on {', '.join(bare)}"
            made_up = f"{kind.__name__}("  # a dataclass without a docstring gets its signature
            assert kind.__doc__, f"{kind.__name__} has no docstring"
            assert not kind.__doc__.startswith(made_up), f"{kind.__name__} has no docstring"
            run = Run(case.slug, e.name, e.arms[0], 0, plain(settings))
            again = Run.from_dict(json.loads(json.dumps(run.to_dict())))
            assert again.id == run.id
            assert e.task(again).settings == settings, f"settings of experiment {e.name} change on their way to a run"


def _every_scale_has_distinct_runs(case: _Case) -> None:
    for scale in Scale:
        runs = BoundStudy(case.slug, scale).runs()
        assert len({run.id for run in runs}) == len(runs)
        assert [run.id for run in BoundStudy(case.slug, scale).runs()] == [run.id for run in runs]


def _added_seeds_are_new(case: _Case) -> None:
    bound = case.bound
    registered = {(r.experiment, r.arm, seed) for r in bound.runs() for seed in r.seeds}
    for run in bound.more_runs(bound.batch(0)):
        assert set(run.seeds) <= set(bound.batch(0))
        assert not registered & {(run.experiment, run.arm, seed) for seed in run.seeds}


def _all_runs_finish_and_are_not_run_again(case: _Case) -> None:
    evidence = case.evidence
    assert not evidence.missing
    assert len(evidence.runs) == len(case.bound.runs())

    class Refusing:
        def execute(self, study: Any, runs: Sequence[Run], store: Any, on_event: Any) -> None:
            raise AssertionError(f"{len(runs)} finished runs would be run again")

    run_missing(case.bound, case.place, Refusing())


def _a_run_alone_gives_the_same_numbers(case: _Case) -> None:
    """The last run of each experiment, here and now, without those before it; global random states stay untouched."""
    import torch

    case.evidence  # noqa: B018 (makes the runs)
    last = {run.experiment: run for run in case.bound.runs()}
    for run in last.values():
        states = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the run's own process
        try:
            here = case.bound.measure(run).table
        finally:
            torch.set_num_threads(threads)
        assert np.array_equal(states[0], np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
        assert torch.equal(states[1], torch.get_rng_state()), f"{run} drew from torch's global generator"
        stored = case.place.table(run)
        assert list(here["metric"]) == list(stored["metric"])
        same = ~here["metric"].str.contains(_TIMED)
        np.testing.assert_allclose(here["value"][same], stored["value"][same], rtol=1e-5, atol=1e-8, err_msg=str(run))


def _claims_find_what_they_are_about(case: _Case) -> None:
    evidence = case.evidence
    measured = set(evidence.table["arm"])
    for claim in case.bound.claims:
        slips = case.bound.misspelled_arms(claim, evidence)
        assert not slips, f"claim {claim.id}: {slips[0]}"
        if claim.id in case.beyond_smoke or (not claim.due_at(Scale.QUICK) and not _arms(claim) <= measured):
            continue
        try:
            table = claim.estimand(evidence)
        except UnknownName as error:
            raise AssertionError(f"claim {claim.id} finds nothing: {error}") from error
        except InvalidInput:  # too few values at this scale
            continue
        assert isinstance(table, pd.DataFrame), f"claim {claim.id}"


def _arms(claim: Any) -> set[str]:
    return set(getattr(claim.estimand, "arms", ()))


def _the_slide_draws_and_says_what_it_shows(case: _Case) -> None:
    evidence = case.evidence
    verdicts = case.bound.judge(evidence)
    slide = make_slide(case.bound, evidence, verdicts)
    shown = {c.id for c in case.bound.claims}
    for panel in (slide.collage.idea, slide.collage.main, *slide.collage.panels):
        assert len(panel.alt) > 20, f"panel {panel.title!r} needs a text alternative with its main numbers"
        assert not panel.claim or panel.claim in shown, (
            f"panel {panel.title!r} shows claim {panel.claim}: no such claim"
        )
    with tempfile.TemporaryDirectory() as folder:
        _, files = draw_slide(case.bound, evidence, verdicts, Path(folder), ("svg",))
        assert files["svg"].read_text("utf-8").lstrip().startswith("<")


def _the_slide_is_made_while_runs_are_missing(case: _Case) -> None:
    evidence = case.evidence
    names = sorted({run.experiment for run in evidence.runs})
    for kept in [[n for n in names if n != name] for name in names] + [[name] for name in names]:
        if not kept or kept == names:
            continue
        part = dataclasses.replace(
            evidence,
            table=evidence.table[evidence.table["experiment"].isin(kept)],
            runs=[r for r in evidence.runs if r.experiment in kept],
            waiting=[r for r in evidence.runs if r.experiment not in kept],
        )
        try:
            make_slide(case.bound, part, case.bound.judge(part))
        except Exception as error:
            raise AssertionError(
                f"with the runs of {', '.join(kept)} alone the slide is not drawn ({error}); a panel that needs others "
                "is made by measured_panel, and raises LookupError where they are missing"
            ) from error


def _a_user_s_workload_runs_or_is_refused(case: _Case) -> None:
    bound = BoundStudy(case.slug, Scale.SMOKE, case.workload)
    kinds = tuple({kind for e in bound.study.experiments for kind in e.workloads})
    if not isinstance(load_workload(case.workload), kinds):
        try:
            bound.runs()
        except InvalidInput:
            assert not kinds, f"give study_checks a workload of the kind {kinds[0].__name__}, which the study takes"
            return
        raise AssertionError("no experiment takes this kind of workload, and it was accepted")
    evidence = run_study(case.slug, Scale.SMOKE, workload=case.workload, store=case.place)
    assert not evidence.failures, "; ".join(f"{f.run}: {f.reason}" for f in evidence.failures)
    assert evidence.workload != "default"
    assert not {r.id for r in evidence.runs} & {r.id for r in case.bound.runs()}
    quick = dataclasses.replace(bound, scale=Scale.QUICK).judge(dataclasses.replace(evidence, scale=Scale.QUICK))
    assert set(quick) == {c.id for c in bound.claims}
    make_slide(bound, evidence, bound.judge(evidence))


_CHECKS: dict[str, Callable[[_Case], None]] = {
    function.__name__.lstrip("_"): function
    for function in (
        _claims_are_complete,
        _settings_are_documented_and_plain,
        _every_scale_has_distinct_runs,
        _added_seeds_are_new,
        _all_runs_finish_and_are_not_run_again,
        _a_run_alone_gives_the_same_numbers,
        _claims_find_what_they_are_about,
        _the_slide_draws_and_says_what_it_shows,
        _the_slide_is_made_while_runs_are_missing,
        _a_user_s_workload_runs_or_is_refused,
    )
}
