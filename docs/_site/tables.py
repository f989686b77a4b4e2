"""Fills the tables of papers and of claims in the pages, from ``paper.toml``, the claims and what was measured.

``python docs/_site/tables.py`` rewrites what stands between ``<!-- table: ... -->`` and ``<!-- end of table -->`` in
the README and the pages; with ``--check`` it only says which pages are out of date. With ``--record STORE`` it first
takes the verdicts and slides of a store with runs at scale quick: verdicts go to ``measured.json`` beside this file,
slides to ``docs/img/``. A claim that was changed since is marked as such.
"""

import argparse
import io
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image, ImageColor

from mlcollage.collage import theme
from mlcollage.collage.slide import short_alternative, title_of
from mlcollage.errors import InvalidInput
from mlcollage.lab.audit import audit
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.claim import Claim, Status, fingerprint
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.paper import Paper, papers
from mlcollage.lab.publish import draw_slide
from mlcollage.lab.run import Scale
from mlcollage.lab.store import Store

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "img"
RECORD = Path(__file__).with_name("measured.json")
MONTHS = {"2021-03": "March 2021", "2021-05": "May 2021", "2021-06": "June 2021", "2021-09": "September 2021"}
_CHANGED = "changed since it was measured"
MOST_BYTES = 200_000  # of a picture
SIZES = {"png": (1440, 810), "portrait": (720, 900)}
_REGION = re.compile(r"(<!-- table: (\w+)(?: (\w+))? -->\n).*?(<!-- end of table -->)", re.DOTALL)


def ours() -> list[Paper]:
    """The papers of the reading lists, built in or planned; none of plug-ins."""
    return [p for p in papers().values() if p.package is None or p.package.startswith("mlcollage.")]


def table_of_papers(page: Path, *, long: bool) -> str:
    """A row per paper; ``long`` adds the authors and the paper in one line."""
    pages = ROOT / "docs" / "papers"
    folder = "" if page.parent == pages else "docs/papers/"
    headers = ["month", "paper", *(["authors", "in one line"] if long else []), "arXiv", "state"]
    rows = []
    for p in ours():
        title = f"[{p.title}]({folder}{p.slug}.md)" if p.built else p.title
        more = [p.short_authors, p.tagline] if long else []
        arxiv = f"[{p.arxiv}](https://arxiv.org/abs/{p.arxiv})"
        rows.append([p.month, title, *more, arxiv, "**built**" if p.built else "planned"])
    return _cards(_table(headers, rows)) if long else _table(headers, rows)


def table_of_claims(slug: str) -> str:
    """A row per claim: its title (headlines in bold), the sentence that is tested, what came out and the verdict."""
    record = measured().get(slug, {})
    rows, verdicts = [], []
    for claim in papers()[slug].module("study").STUDY.claims:
        notes = ["a check of the instrument"] if claim.kind == "check" else []
        if claim.from_scale != "quick":
            notes.append(f"from scale `{claim.from_scale}`")
        sentence = claim.sentence + (f" ({'; '.join(notes)})" if notes else "")
        title = f"**{claim.title}.**" if claim.headline else f"{claim.title}."
        effect, status = _outcome(claim, record.get("claims", {}))
        verdicts.append(status)
        ours = effect + (f" (paper: {claim.paper_value})" if claim.paper_value else "")
        changed = claim.id in record.get("claims", {}) and status is Status.PENDING
        rows.append(
            [claim.id, f"{title} {sentence}", ours or "–", f"{status.mark} {_CHANGED if changed else status.words}"]
        )
    table = _table(["claim", "as tested here", "measured [95% interval]", "verdict"], rows)
    return f"{_summary(slug, record, verdicts)}\n\n{_cards(table)}\n"


def _outcome(claim: Claim, record: dict[str, Any]) -> tuple[str, Status]:
    """What was recorded for a claim that asserts what it did then."""
    found = record.get(claim.id, {})
    if found.get("fingerprint") != fingerprint((claim,)):
        return "", Status.PENDING
    effect = re.sub(r"\[.*\]", lambda interval: interval[0].replace(" ", "&nbsp;"), found["effect"])
    return effect, Status(found["status"])


def _summary(slug: str, record: dict[str, Any], verdicts: list[Status]) -> str:
    if not record:
        return f"Not measured yet; `mlcollage run {slug}` does it."
    counts = Counter(verdicts)
    tally = ", ".join(f"{counts[status]} {status.words}" for status in Status if counts[status])
    failed = f" {record['failed']} runs failed." if record["failed"] else ""
    return (
        f"Measured at scale `{record['scale']}` with {record['seeds']} seeds on {record['date']}: {tally}.{failed} "
        f"Data: {record['data']}. Network: {record['network']}. Headlines are bold."
    )


def _tally(slug: str) -> str:
    """How many of a paper's claims have each verdict, in words."""
    found = measured().get(slug, {}).get("claims", {})
    counts = Counter(_outcome(claim, found)[1] for claim in papers()[slug].module("study").STUDY.claims)
    return ", ".join(f"{counts[status]} {status.words}" for status in Status if counts[status])


def contact_sheet(page: Path) -> str:
    """All slides, a column a month; each leads to the paper's page."""
    up = "docs/" if page.parent == ROOT else ""
    columns = [
        [
            f"[{_slide(p.slug, page)}]({up}papers/{p.slug}.md)"
            for p in ours()
            if p.month == month and _slide(p.slug, page)
        ]
        for month in MONTHS
    ]
    return _table(list(MONTHS.values()), [list(row) for row in zip_longest(*columns, fillvalue="")])


def gallery(page: Path) -> str:
    """Each slide with its finding, its verdicts and the command that measures it again, month by month."""
    parts = []
    for month, words in MONTHS.items():
        cards = []
        for p in ours():
            record = measured().get(p.slug)
            if p.month != month or record is None:
                continue
            seconds = record.get("cpu_seconds")
            cost = f" ({_minutes(seconds)} on one core)" if seconds else ""
            about = f"**{record['finding'].rstrip('.')}.** [{p.title}](papers/{p.slug}.md): {_tally(p.slug)}."
            again = f"`mlcollage run {p.slug}`{cost}"
            cards.append(f"<div markdown>\n\n{_slide(p.slug, page)}\n\n{about}\n\n{again}\n\n</div>\n")
        parts.append(f"## {words}\n\n" + '<div class="gallery" markdown>\n\n' + "\n".join(cards) + "\n</div>\n")
    return "\n".join(parts)


def times() -> str:
    """What each study took when it was recorded, the longest first, and its longest experiment."""
    rows, total = [], 0.0
    for slug, found in sorted(measured().items(), key=lambda item: -item[1].get("cpu_seconds", 0.0)):
        if "cpu_seconds" in found:
            total += found["cpu_seconds"]
            name, seconds = max(found["experiments"].items(), key=lambda item: item[1])
            cells = [f"`{slug}`", str(found["runs"]), f"{found['cpu_seconds']:.0f}", f"`{name}` ({seconds:.0f})"]
            rows.append(cells)
    rows.append(["**together**", "", f"**{total:.0f}**", ""])
    return _table(["study", "runs", "processor seconds", "longest experiment (seconds)"], rows)


def audits() -> str:
    """How far the verdicts of each study can be trusted."""
    found = {slug: entry["audit"] for slug, entry in sorted(measured().items()) if entry.get("audit")}
    headers = ["study", "claims permuted", "any supported by chance", "kept when swapped", "headlines with 80 % power"]
    return _table(headers, [[f"[`{slug}`](papers/{slug}.md)", *cells] for slug, cells in found.items()])


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def slide_of(slug: str, page: Path) -> str:
    """The slide, drawn from the runs that were recorded."""
    picture = _slide(slug, page)
    return f"{picture}\n" if picture else ""


def _slide(slug: str, page: Path) -> str:
    record = measured().get(slug)
    if record is None:
        return ""
    up = "docs/" if page.parent == ROOT else "../" * (len(page.relative_to(ROOT / "docs").parts) - 1)
    alt = record["alt"].replace("[", "(").replace("]", ")").replace('"', "'")
    return f"![{alt}]({up}img/{slug}.png)"


def measured() -> dict[str, Any]:
    """What was recorded of each paper."""
    found: dict[str, Any] = json.loads(RECORD.read_text("utf-8")) if RECORD.is_file() else {}
    return found


def record(place: Path) -> None:
    """Keep verdicts and slides of every built paper whose runs at scale quick the store has, all of them."""
    store = Store(place)
    kept = measured()
    for paper in ours():
        if not paper.built:
            continue
        study = BoundStudy(paper.slug, Scale.QUICK)
        evidence = study.evidence(store)
        if not evidence.runs or evidence.missing:
            print(
                f"{paper.slug}: not recorded, {evidence.missing} runs at scale quick are missing; the old record stays"
            )
            continue
        verdicts = study.judge(evidence)
        with tempfile.TemporaryDirectory() as folder:
            slide, files = draw_slide(study, evidence, verdicts, Path(folder), tuple(SIZES))
            for kind, size in SIZES.items():
                name = paper.slug + ("" if kind == "png" else f"-{kind}")
                (PICTURES / f"{name}.png").write_bytes(_small(files[kind], size))
        seeds = sorted({v.seeds for v in verdicts.values() if v.seeds})
        kept[paper.slug] = {
            "scale": str(study.scale),
            "date": max((str(i.get("started", ""))[:10] for i in evidence.info), default=""),
            "seeds": f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(*seeds),
            "failed": len(evidence.failures),
            **_cost(evidence),
            "audit": _audited(study, evidence),
            "data": slide.collage.data,
            "network": slide.collage.network,
            "finding": title_of(slide, slide.collage.main),
            "alt": short_alternative(slide),
            "claims": {
                v.claim.id: {"fingerprint": fingerprint((v.claim,)), "status": str(v.status), "effect": v.effect}
                for v in verdicts.values()
            },
        }
        print(f"{paper.slug}: recorded")
    RECORD.write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def _cost(evidence: Evidence) -> dict[str, Any]:
    """How many runs a study has, and the processor seconds of all and of each experiment."""
    seconds: Counter[str] = Counter()
    for info in evidence.info:
        seconds[info["experiment"]] += info["cpu_seconds"]
    each = {name: round(value, 1) for name, value in sorted(seconds.items())}
    return {"runs": len(evidence.info), "cpu_seconds": round(seconds.total(), 1), "experiments": each}


def _audited(study: BoundStudy, evidence: Evidence) -> list[str]:
    """The study's row on the page "How far to trust this"; none if nothing in it can be permuted."""
    try:
        _, permuted, chance, _, kept, power = audit(study.claims, evidence).cells()
    except InvalidInput:
        return []
    return [permuted, chance, kept, power]


def _small(png: Path, size: tuple[int, int]) -> bytes:
    """A picture of at most 200 kB, with as many colors as that allows."""
    with Image.open(png) as picture:
        resized = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    # The few pixels of a verdict would get the color of another verdict if the palette did not hold their own.
    kept = [
        v for color in (*theme.STATUS_COLORS.values(), theme.CLAIMED, theme.SHADE) for v in ImageColor.getrgb(color)
    ]
    for colors in (256, 192, 128, 96, 64):
        file, palette = io.BytesIO(), Image.new("P", (1, 1))
        found = resized.quantize(colors - len(kept) // 3, dither=Image.Dither.NONE).getpalette() or []
        palette.putpalette([*found[: 3 * colors - len(kept)], *kept])
        resized.quantize(palette=palette, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() <= MOST_BYTES:
            break
    else:
        raise SystemExit(f"{png.name} has more than {MOST_BYTES} bytes even with 64 colors; draw it with less detail")
    return file.getvalue()


def _table(headers: list[str], rows: Iterable[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in row)} |\n" for row in lines)


def _cards(table: str) -> str:
    """The table with the mark that makes each row a card on a phone."""
    return f'<div class="claims" markdown>\n\n{table}\n</div>\n'


def _cell(text: str) -> str:
    return text.replace("|", "∣").replace("<", "&lt;")


def filled(page: Path) -> str:
    """The page's text with its tables as they should be."""

    def fill(match: re.Match[str]) -> str:
        tables = {
            "papers": lambda: table_of_papers(page, long=False),
            "papers_at_length": lambda: table_of_papers(page, long=True),
            "claims": lambda: table_of_claims(match[3] or page.stem),
            "slide": lambda: slide_of(match[3] or page.stem, page),
            "contact_sheet": lambda: contact_sheet(page),
            "gallery": lambda: gallery(page),
            "times": times,
            "audit": audits,
        }
        return match[1] + tables[match[2]]() + match[4]

    return _REGION.sub(fill, page.read_text("utf-8"))


def outdated() -> dict[Path, str]:
    """Pages whose tables do not say what is so, with the text that they should have."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {page: text for page in pages if (text := filled(page)) != page.read_text("utf-8")}


def main() -> int:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    parser.add_argument("--record", type=Path, metavar="STORE", help="first take verdicts and slides from this store")
    options = parser.parse_args()
    check = options.check
    if options.record:
        record(options.record)
    pages = outdated()
    for page, text in pages.items():
        print(f"{page.relative_to(ROOT)} {'is out of date' if check else 'rewritten'}")
        if not check:
            page.write_text(text, "utf-8")
    return int(check and bool(pages))


if __name__ == "__main__":
    sys.exit(main())
