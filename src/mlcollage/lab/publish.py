"""Evidence and verdicts become slides and digest pages."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcollage._users import users_code
from mlcollage.collage.content import Card, ClaimRow, Collage, Entry, IntervalPlot, Slide
from mlcollage.collage.digest import render_index, render_month
from mlcollage.collage.slide import FORMATS, describe, render_slide, short_alternative, title_of
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.claim import Claim, Status, Verdict
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.paper import Paper, papers
from mlcollage.lab.store import Store

_FORMAT_NAMES = {"portrait": "upright, for feeds"}
_DIRECTIONS = {
    "greater": "is greater than",
    "less": "is less than",
    "within": "equals",
    "at_most": "is at most",
    "at_least": "is at least",
}


@dataclass(frozen=True)
class Published:
    """What came out of one study: the files of its slide and its entry in a digest."""

    files: Mapping[str, Path]
    entry: Entry
    verdicts: Mapping[str, Verdict]


def slide_name(study: BoundStudy) -> str:
    """File name without ending: slug, scale and, for the user's own data, the workload."""
    workload = "" if study.workload_spec is None else "-" + study.workload_name
    return f"{study.slug}-{study.scale}" + "".join(c if c.isalnum() or c in "-_" else "-" for c in workload)


def make_slide(study: BoundStudy, evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Slide:
    """Join the paper's panels to its identity, the verdict strip and the foot.

    Raises
    ------
    UnknownName
        If nothing has been measured.
    """
    if not evidence.runs:
        again = f" --workload {study.workload_spec}" if study.workload_spec else ""
        raise UnknownName(
            f"nothing is measured for {study.slug} at scale {study.scale}; "
            f"run `mlcollage run {study.slug} --scale {study.scale}{again}` first."
        )
    paper = study.paper
    with users_code(f"the slide of {study.slug}"):
        collage = paper.module("slide").collage(evidence, verdicts)
    if not isinstance(collage, Collage):
        raise InvalidInput(f"the slide of {study.slug} returned {type(collage).__name__}; it must return a Collage.")
    arxiv = f"  ·  arXiv {paper.arxiv}" if paper.arxiv else ""
    return Slide(
        slug=paper.slug,
        title=paper.title,
        byline=f"{paper.short_authors}  ·  {paper.venue}{arxiv}",
        month=paper.month,
        collage=collage,
        cards=[_card(v) for v in verdicts.values()],
        foot_left=_foot_left(study, evidence, verdicts, collage),
        foot_right=_foot_right(evidence),
        number=paper.number,
    )


def _card(verdict: Verdict) -> Card:
    claim = verdict.claim
    note = f"only {verdict.seeds} seeds" if 0 < verdict.seeds < 5 and claim.test != "exact" else ""
    if verdict.status is Status.UNTESTED:
        note = "not in this workload" if "workload" in verdict.reason else "not at this scale"
    if verdict.status is Status.PENDING:
        note = verdict.reason
    # "rho" and "tau" would need a key; what they are stands behind the interval.
    effect = re.sub(r"^(\S+) (?:rho|tau)\b(.*)", "\\1\\2 rank\u00a0correlation", verdict.effect)
    ours = effect or note or verdict.reason
    return Card(
        claim.id,
        claim.title,
        "" if claim.paper_value.endswith("%") and claim.unit != "%" else claim.paper_value,  # the same unit, or none
        ours,
        verdict.status.value,
        note,
        claim.headline,
        finding=verdict.finding,
        plot=_interval_plot(verdict),
        needs=re.sub(r" (?:rho|tau)\b", "", _needed(verdict)),
    )


def _needed(verdict: Verdict) -> str:
    return (_beside_the_picture(verdict) or _needs(verdict.claim)) if verdict.effect else ""


def _needs(claim: Claim) -> str:
    """What the effect must be, where its sign does not say so: a limit, or the range of an equivalence."""
    null, margin = claim.null, claim.margin
    if claim.direction == "within":
        ends = (claim.format_limit(v) for v in (null - margin, null + margin))
        return "needs {} to {}".format(*ends)
    sign = {"at_most": "≤", "at_least": "≥"}.get(claim.direction, "")
    return f"needs {sign} {claim.format_limit(null)}" if sign else ""


def _beside_the_picture(verdict: Verdict) -> str:
    """Why the verdict is not the one that its interval suggests, since tests are one-sided and share their errors."""
    plot = _interval_plot(verdict)
    if plot is None or (suggested := _suggested(plot, verdict.claim.direction)) is verdict.status:
        return ""
    if "shape of few seeds" in verdict.reason:
        return "too few seeds for their spread"
    if verdict.status is Status.INCONCLUSIVE and suggested is Status.CONTRADICTED:
        return "but not ruled out"
    p = re.search(r"\(p = (\S+) ", verdict.reason)
    if p is None:
        return ""
    return f"p = {p[1]} over all claims" if verdict.status is Status.INCONCLUSIVE else f"one-sided p = {p[1]}"


def _suggested(plot: IntervalPlot, direction: str) -> Status:
    """What someone concludes who sees the interval, the reference and what is claimed."""
    start, stop = plot.claimed or (plot.reference, plot.reference)
    if direction in ("greater", "less"):
        beyond = plot.lo > plot.reference if direction == "greater" else plot.hi < plot.reference
        reaches = plot.hi >= start and plot.lo <= stop
        if reaches:
            return Status.SUPPORTED if beyond else Status.INCONCLUSIVE
        return Status.CONTRADICTED
    if start <= plot.lo and plot.hi <= stop:
        return Status.SUPPORTED
    return Status.CONTRADICTED if plot.hi < start or plot.lo > stop else Status.INCONCLUSIVE


def _interval_plot(verdict: Verdict) -> IntervalPlot | None:
    """The effect against what it is judged by, in the units in which it is printed."""
    claim = verdict.claim
    if verdict.estimate is None:
        return None
    ends = verdict.interval or (verdict.estimate, verdict.estimate)
    reach = {"greater": (0.0, 1.0), "less": (-1.0, 0.0), "within": (-1.0, 1.0)}.get(claim.direction, (0.0, 0.0))
    at = [claim.null + side * claim.margin for side in reach] if claim.test != "exact" else [claim.null] * 2
    if claim.test == "exact" and claim.direction == "within":
        at = [claim.null - claim.margin, claim.null + claim.margin]
    lo, hi = sorted(map(claim.shown, ends))
    a, b = sorted(map(claim.shown, at))
    # What the claim asserts: effects that matter, or what lies on the allowed side of a limit.
    claimed = {"greater": (b, math.inf), "less": (-math.inf, a), "at_least": (b, math.inf), "at_most": (-math.inf, a)}
    return IntervalPlot(
        claim.shown(verdict.estimate),
        lo,
        hi,
        claim.shown(claim.null),
        a,
        b,
        log=claim.is_ratio,
        claimed=claimed.get(claim.direction, (a, b)),
    )


def _foot_left(study: BoundStudy, evidence: Evidence, verdicts: Mapping[str, Verdict], collage: Collage) -> str:
    seeds = sorted({v.seeds for v in verdicts.values() if v.seeds})
    spread = f"{seeds[0]}–{seeds[-1]}" if len(seeds) > 1 else str(seeds[0] if seeds else evidence.seeds)
    data = collage.data if study.workload_spec is None else f"workload {study.workload_name}"
    parts = [data, collage.network, f"{evidence.scale} scale", f"{spread} seeds"]
    if evidence.failures:
        parts.append(f"{len(evidence.failures)} runs failed")
    if evidence.missing:
        every = len(evidence.runs) + len(evidence.failures) + evidence.missing
        parts.append(f"{evidence.missing} of {every} runs not finished")
    else:
        parts.append("bands and bars: 95% intervals")
    return "  ·  ".join(parts)


def _foot_right(evidence: Evidence) -> str:
    ids = sorted(run.id for run in evidence.runs)
    date = max((str(i.get("started", ""))[:10] for i in evidence.info), default="")
    machines = sorted({str(i.get("machine", "")) for i in evidence.info})
    return "  ·  ".join([f"{len(ids)} runs {ids[0][:6]}–{ids[-1][:6]}", *machines, date])


def draw_slide(
    study: BoundStudy,
    evidence: Evidence,
    verdicts: Mapping[str, Verdict],
    folder: Path,
    formats: Sequence[str] = FORMATS,
) -> tuple[Slide, dict[str, Path]]:
    """Render the slide as ``folder/<name>.svg`` and so on; see :func:`slide_name`."""
    slide = make_slide(study, evidence, verdicts)
    rendered = render_slide(slide, folder, formats=tuple(formats))
    name = slide_name(study)
    return slide, {
        kind: path.replace(path.with_name(path.name.replace(slide.slug, name, 1))) for kind, path in rendered.items()
    }


def publish_study(study: BoundStudy, store: Store, folder: Path) -> Published:
    """Judge what the store holds, render the slide and prepare the digest's entry.

    Writes ``folder/slides/<name>.svg`` (``.png``, ``.pdf``), ``folder/data/<name>.parquet`` (every number) and
    ``folder/data/<name>-verdicts.json``.
    """
    evidence = study.evidence(store)
    verdicts = study.judge(evidence)
    slide, files = draw_slide(study, evidence, verdicts, folder / "slides")
    name = slide_name(study)
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    evidence.table.to_parquet(data / f"{name}.parquet", index=False)
    text = json.dumps([v.to_dict() for v in verdicts.values()], indent=1)
    (data / f"{name}-verdicts.json").write_text(text, "utf-8")
    links = [
        ("every number (Parquet)", f"data/{name}.parquet"),
        ("verdicts (JSON)", f"data/{name}-verdicts.json"),
        *((f"slide ({_FORMAT_NAMES.get(kind, kind.upper())})", f"slides/{path.name}") for kind, path in files.items()),
    ]
    entry = Entry(
        **_identity(study.paper),
        state="measured",
        finding=title_of(slide, slide.collage.main),
        slide_svg=files["svg"],
        slide_alt=short_alternative(slide),
        description=describe(slide),
        picture=f"slides/{files['png'].name}",
        claims=[_row(v) for v in verdicts.values()],
        data_links=links,
        foot=f"{slide.foot_left}  ·  {slide.foot_right}",
    )
    return Published(files, entry, verdicts)


def _row(verdict: Verdict) -> ClaimRow:
    claim = verdict.claim
    p = verdict.p_holm if verdict.p_holm is not None else verdict.p_value
    return ClaimRow(
        id=claim.id,
        sentence=claim.sentence,
        source=claim.source,
        paper=claim.paper_value,
        estimand=_estimand(claim),
        test=verdict.test or claim.test.replace("_", "-"),
        smallest_effect=claim.format_limit(claim.margin) if claim.margin else "–",
        ours=verdict.effect or "–",
        seeds=verdict.seeds,
        p_value="–" if p is None else ("< 0.001" if p < 0.001 else f"{p:.3f}"),
        status=verdict.status.value,
        reason=verdict.reason,
        warnings=verdict.warnings,
        title=claim.title,
        finding=verdict.finding,
        headline=claim.headline,
        needs=re.sub(r" (?:rho|tau)\b", "", _needed(verdict)),
    )


def _estimand(claim: Claim) -> str:
    """What is compared with what limit, in one line; the hash of the source, part of the fingerprint, is left out."""
    describe = getattr(claim.estimand, "describe", None)
    what = (claim.to_dict()["estimand"] if describe else claim.estimand.__doc__ or claim.estimand.__name__).strip()
    what = re.sub(r" \[source \w+\]", "", what.splitlines()[0]).rstrip(".")
    limit = "0" if claim.null == 0 else claim.format_limit(claim.null)
    return f"{what}; {_DIRECTIONS[claim.direction]} {limit}"


def _identity(paper: Paper) -> dict[str, Any]:
    return {
        "slug": paper.slug,
        "title": paper.title,
        "authors": ", ".join(paper.authors),
        "venue": paper.venue,
        "month": paper.month,
        "arxiv": paper.arxiv,
        "ideas": paper.ideas,
        "summary": paper.summary,
        "usage": paper.usage,
        "number": paper.number,
        "tagline": paper.tagline,
        "official_code": paper.official_code,
    }


def with_planned(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """An entry for each paper there is: those given, and the others as built or planned."""
    return {
        slug: entries.get(slug) or Entry(**_identity(paper), state="built" if paper.built else "planned")
        for slug, paper in papers().items()
    }


def write_pages(entries: Mapping[str, Entry], folder: Path) -> list[Path]:
    """Write ``index.html`` and one page per month; papers without an entry are shown as built or planned."""
    shown = with_planned(entries)
    folder.mkdir(parents=True, exist_ok=True)
    pages = {
        f"{month}.html": render_month(month, [e for e in shown.values() if e.month == month])
        for month in _months(shown)
    }
    pages["index.html"] = render_index(list(shown.values()))
    for name, html in pages.items():
        draft = folder / f".{name}.{os.getpid()}"
        draft.write_text(html, "utf-8")
        draft.replace(folder / name)
    return [folder / name for name in pages]


def _months(entries: Mapping[str, Entry]) -> list[str]:
    return sorted({e.month for e in entries.values()})
