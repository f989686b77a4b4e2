"""Fills the tables of papers and of claims in the pages, from each paper's ``paper.toml`` and claims.

``python docs/_site/tables.py`` rewrites what stands between ``<!-- table: ... -->`` and ``<!-- end of table -->`` in
the README and the pages; with ``--check`` it only says which pages are out of date.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from mlcollage.lab.paper import Paper, papers

ROOT = Path(__file__).parents[2]
_REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


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
    return _table(headers, rows)


def table_of_claims(slug: str) -> str:
    """A row per claim: its title (headlines in bold) and the sentence that is tested."""
    rows = []
    for claim in papers()[slug].module("study").STUDY.claims:
        notes = ["a check of the instrument"] if claim.kind == "check" else []
        if claim.from_scale != "quick":
            notes.append(f"from scale `{claim.from_scale}`")
        sentence = claim.sentence + (f" ({'; '.join(notes)})" if notes else "")
        rows.append([claim.id, f"**{claim.title}**" if claim.headline else claim.title, sentence])
    return _table(["claim", "in short", "as tested here"], rows)


def _table(headers: list[str], rows: Iterable[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '∣') for cell in row)} |\n" for row in lines)


def filled(page: Path) -> str:
    """The page's text with its tables as they should be."""

    def fill(match: re.Match[str]) -> str:
        tables = {
            "papers": lambda: table_of_papers(page, long=False),
            "papers_at_length": lambda: table_of_papers(page, long=True),
            "claims": lambda: table_of_claims(page.stem),
        }
        return match[1] + tables[match[2]]() + match[3]

    return _REGION.sub(fill, page.read_text("utf-8"))


def outdated() -> dict[Path, str]:
    """Pages whose tables do not say what is so, with the text that they should have."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {page: text for page in pages if (text := filled(page)) != page.read_text("utf-8")}


def main() -> int:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    check = parser.parse_args().check
    pages = outdated()
    for page, text in pages.items():
        print(f"{page.relative_to(ROOT)} {'is out of date' if check else 'rewritten'}")
        if not check:
            page.write_text(text, "utf-8")
    return int(check and bool(pages))


if __name__ == "__main__":
    sys.exit(main())
