"""A study at one scale on one workload: which runs that makes, what they measured, and the verdicts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from mlcollage._users import users_code
from mlcollage.errors import InvalidInput, MLCollageError
from mlcollage.lab.claim import Claim, Status, Verdict, fingerprint
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.judge import claim_table, judge
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.paper import Paper, find_paper
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.store import Store
from mlcollage.lab.study import Study

if TYPE_CHECKING:
    from mlcollage.data.workload import Workload

_MOST_RUNS = 100_000  # a slip in a study, such as seeds and arms swapped, must not fill the memory first
_BATCH = 5  # seeds are added so many at a time: runs that hold several seeds can share what they load


@dataclass(frozen=True)
class BoundStudy:
    """A paper's study, bound to a scale and a workload.

    Parameters
    ----------
    slug
        Which paper.
    scale
        How large.
    workload_spec
        ``None`` for the study's own data, else what :func:`mlcollage.data.load_workload` takes.

    Raises
    ------
    UnknownName
        If there is no such paper, or it is not built yet.
    """

    slug: str
    scale: Scale = Scale.QUICK
    workload_spec: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", Scale(self.scale))
        _ = self.paper

    @cached_property
    def paper(self) -> Paper:
        """Identity of the paper."""
        paper = find_paper(self.slug)
        paper.module("study")
        return paper

    @property
    def study(self) -> Study:
        """The study as its author declared it."""
        with users_code(f"STUDY of {self.slug}"):
            declared = getattr(self.paper.module("study"), "STUDY", None)
        if not isinstance(declared, Study):
            raise InvalidInput(f"the study of {self.slug} must define STUDY, a mlcollage.lab.Study.")
        return declared

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The claims, as registered."""
        return self.study.claims

    @cached_property
    def workload(self) -> Workload | None:
        """The user's workload, loaded once, or None."""
        if self.workload_spec is None:
            return None
        from mlcollage.data.loading import load_workload

        # Only here, since it imports torch; the command line needs names of papers at once.
        workload = load_workload(self.workload_spec)
        kinds = {kind for e in self.study.experiments for kind in e.workloads}
        if not isinstance(workload, tuple(kinds)):
            takes = " or ".join(sorted(k.__name__ for k in kinds)) or "no workload but its own data"
            raise InvalidInput(f"study {self.slug} takes {takes}; {self.workload_spec} is {type(workload).__name__}.")
        return workload

    @property
    def workload_name(self) -> str:
        """Name and fingerprint of the workload; ``default`` for the study's own data."""
        workload = self.workload
        if workload is None:
            return "default"
        # The fingerprint goes into the ids of runs: a file that was changed is another workload, and is measured anew.
        return f"{workload.name}@{workload.fingerprint[:8]}" if workload.fingerprint else workload.name

    @property
    def seeds(self) -> int:
        """How many seeds are registered at this scale."""
        return self.study.seeds[self.scale]

    def runs(self) -> list[Run]:
        """The registered runs, in the order in which they start."""
        return list(self._registered)

    @cached_property
    def _registered(self) -> tuple[Run, ...]:
        found = self._multiply(None)
        if not found:
            raise InvalidInput(
                f"study {self.slug} has no runs at scale {self.scale} on {self.workload_name}; choose another scale "
                "or workload."
            )
        return found

    def batch(self, k: int) -> range:
        """The k-th batch of seeds that are added to the registered ones; batches are the same in every command."""
        return range(self.seeds + k * _BATCH, self.seeds + (k + 1) * _BATCH)

    def more_runs(self, seeds: range) -> list[Run]:
        """The runs of seeds beyond the registered ones; pictures are not drawn again."""
        return list(self._multiply(seeds))

    def _multiply(self, seeds: range | None) -> tuple[Run, ...]:
        """Experiments times arms times seeds: those given, or the registered ones of each experiment."""
        runs = (
            run
            for e in self.study.experiments
            if seeds is None or not e.once  # a picture is drawn once; more seeds would not change it
            for run in e.runs(
                self.slug,
                self.scale,
                e.registered(self.scale, self.seeds) if seeds is None else seeds,
                workload=self.workload,
                name=self.workload_name,
            )
        )
        found = tuple(islice(runs, _MOST_RUNS + 1))  # one more than allowed tells that there are too many
        if len(found) > _MOST_RUNS:
            raise InvalidInput(
                f"study {self.slug} has more than {_MOST_RUNS:,} runs at scale {self.scale}; let one run measure a "
                "block of seeds."
            )
        return found

    def added_runs(self, store: Store) -> list[Run]:
        """Runs of added seeds that were made: finished ones, and those that failed."""
        made: list[Run] = []
        tried = store.tried(self.slug)
        k = 0
        # Batches are added in order, so the first one of which nothing was tried ends the search. Failed runs count:
        # their seeds are missing values, and to forget them would favor the seeds that went well.
        while found := [run for run in self.more_runs(self.batch(k)) if run.id in tried]:
            made += found
            k += 1
        return made

    def measure(self, run: Run) -> Measurements:
        """Execute one run here and now, in this process."""
        experiment = self.study.experiment(run.experiment)
        workload = self.workload
        with users_code(f"experiment {run.experiment}"):
            result = experiment.measure(experiment.task(run, workload=workload, device=device_at(self.scale)))
        where = f"experiment {run.experiment} of study {self.slug}"
        if not isinstance(result, Measurements):
            raise InvalidInput(f"{where} returned {type(result).__name__}; it must return Measurements.")
        if not len(result):
            raise InvalidInput(f"{where} recorded no number for run {run}.")
        return result

    def evidence(self, store: Store) -> Evidence:
        """Everything that the store holds for this study, scale and workload, added seeds included."""
        added = self.added_runs(store)
        evidence = store.evidence(
            [*self._registered, *added], study=self.slug, scale=self.scale, workload=self.workload_name
        )
        # With added seeds the number of seeds depended on results: the judge must use tests that allow for that.
        return dataclasses.replace(evidence, registered=self.seeds if added else None)

    def judge(self, evidence: Evidence) -> dict[str, Verdict]:
        """A verdict for each claim; says so where claims were changed after runs were made.

        A study may leave experiments out on a user's workload, or where the original data do not allow them. Claims
        about these are ``untested``, "not part of this workload", and do not count in Holm's correction.
        """
        # Left out before judging, so that Holm's correction is over the claims that are tested.
        outside = {c.id: c for c in self.claims if self._is_outside(c, evidence)}
        judged = judge([c for c in self.claims if c.id not in outside], evidence)
        where = "this workload" if self.workload_spec else "the study at this scale"
        untested = {
            c.id: Verdict(
                c,
                Status.UNTESTED,
                Scale(evidence.scale),
                evidence.workload,
                reason=f"not part of {where}",
                warnings=self.misspelled_arms(c, evidence),
            )
            for c in outside.values()
        }
        verdicts = {c.id: (judged | untested)[c.id] for c in self.claims}
        now = fingerprint(self.claims)
        # Each run holds the fingerprint of the claims at its time.
        stale = sum(1 for info in evidence.info if info.get("claims") != now)
        notes = [*_differing(evidence)]
        if stale:
            notes.append(f"the registered claims were changed after {stale} of {len(evidence.info)} runs were made")
        return {k: dataclasses.replace(v, warnings=(*v.warnings, *notes)) for k, v in verdicts.items()}

    def misspelled_arms(self, claim: Claim, evidence: Evidence) -> tuple[str, ...]:
        """A sentence for each arm of a claim that no experiment lists and no run recorded, but nearly."""
        # Runs may record arms that no experiment lists, so it is known only when they are done.
        there = set(evidence.table["arm"])
        known = there.union(*(e.arms for e in self.study.experiments))
        near = {
            a: get_close_matches(a, there, n=1, cutoff=0.9)
            for a in getattr(claim.estimand, "arms", ())
            if a not in known
        }
        return tuple(
            f"no run recorded the arm {arm!r}; did you mean {like[0]!r}?" for arm, like in near.items() if like
        )

    def _is_outside(self, claim: Claim, evidence: Evidence) -> bool:
        """Whether the claim is about something that is not measured on this workload.

        That is so if every run has finished and the claim's estimand still finds no such metric, arm or column (a
        ``LookupError``): on a user's workload, or if arms that it names were not run. Otherwise the estimand is wrong,
        and the judge says so; and while runs are missing or failed, one cannot know.
        """
        if not claim.due_at(self.scale) or evidence.missing or evidence.failures or not evidence.runs:
            return False
        named = set(getattr(claim.estimand, "arms", ()))
        # All of its arms are there: a metric that is not is a mistake in the estimand, which the judge reports.
        if self.workload_spec is None and named <= set(evidence.table["arm"]):
            return False
        try:
            claim_table(claim, evidence)
        except MLCollageError as error:  # where it is no LookupError, the judge says what is wrong
            return isinstance(error, LookupError) or isinstance(error.__cause__, LookupError)
        return False


def _differing(evidence: Evidence) -> Iterator[str]:
    """A sentence where runs were measured on unlike devices, or with other versions of what computes."""
    kinds: dict[str, Callable[..., Any]] = {"on devices": lambda info: info.get("device")}
    for package in ("torch", "numpy"):
        kinds[f"with versions of {package}"] = lambda info, p=package: (info.get("versions") or {}).get(p)
    for what, of in kinds.items():
        counts = Counter(str(found) for info in evidence.info if (found := of(info)))
        if len(counts) > 1:
            listed = ", ".join(f"{value}: {times}" for value, times in counts.most_common(4))
            yield f"the runs were measured {what} that differ ({listed} runs)"


def device_at(scale: Scale) -> str:
    """``"cuda"`` where there is a GPU, at the scales full and paper; else ``"cpu"``."""
    # Results of smoke and quick must not depend on whether a machine has a GPU.
    if scale.rank < Scale.FULL.rank:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
