"""A month as a post: Markdown and pictures for a blog, a repository or a newsletter."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mlcollage.collage import theme
from mlcollage.collage.content import SERIES, ClaimRow, Entry
from mlcollage.collage.digest import month_name
from mlcollage.errors import InvalidInput

SHEET = (1600, 900)  # pixels of the contact sheet
TEASER = (1200, 630)  # what link previews show
GAP = 16
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def write_post(month: str, entries: Sequence[Entry], folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``<month>.md``, a PNG of each slide, a contact sheet of them and a teaser picture.

    Parameters
    ----------
    month
        Such as ``"2021-09"``.
    entries
        Papers of that month; those that were not measured get their paragraph without a picture.
    folder
        Where to write; made if it is not there.

    Returns
    -------
    list of Path
        The Markdown file first, then the pictures.

    Raises
    ------
    InvalidInput
        If no paper of the month was measured.
    """
    chosen = sorted((e for e in entries if e.month == month), key=lambda e: e.number or 0)
    slides = {e.slug: e.slide_svg.with_suffix(".png") for e in chosen if e.slide_svg is not None}
    if not slides:
        raise InvalidInput(
            f"no paper of {month} was measured, so there is nothing to post; run `mlcollage digest {month}`."
        )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    pictures = []
    for slug, png in slides.items():
        pictures.append(target / f"{slug}.png")
        with Image.open(png) as picture:
            picture.convert("RGB").save(pictures[-1])
    pictures += [target / f"{month}-sheet.png", target / f"{month}-teaser.png"]
    for size, path in zip((SHEET, TEASER), pictures[-2:], strict=True):
        _sheet(list(slides.values()), size).save(path)
    text = target / f"{month}.md"
    text.write_text(_markdown(month, chosen, set(slides)), "utf-8")
    return [text, *pictures]


def _sheet(slides: Sequence[Path], size: tuple[int, int]) -> Image.Image:
    """The slides of a month side by side, as large as they fit."""
    columns = math.ceil(math.sqrt(len(slides)))
    rows = math.ceil(len(slides) / columns)
    across, down = ((length - GAP * (count + 1)) / count for length, count in zip(size, (columns, rows), strict=True))
    width = int(min(across, down * 16 / 9))
    height = width * 9 // 16
    left = (size[0] - columns * width - (columns - 1) * GAP) // 2
    top = (size[1] - rows * height - (rows - 1) * GAP) // 2
    sheet = Image.new("RGB", size, theme.BAND)
    for i, path in enumerate(slides):
        with Image.open(path) as picture:
            small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + (i % columns) * (width + GAP), top + (i // columns) * (height + GAP)))
    return sheet


def _markdown(month: str, entries: Sequence[Entry], drawn: set[str]) -> str:
    ideas = [e.tagline or e.title for e in entries]
    count = NUMBERS[len(entries)] if len(entries) < len(NUMBERS) else str(len(entries))
    parts = [
        f"# ML collage, {month_name(month)}: {'; '.join(_plain(i) for i in ideas)}",
        f"{count.capitalize()} papers, each with one picture. Every number was measured again, by code that you can "
        "run; the claims, their tests and the smallest effects that matter were written down before the runs. A "
        "verdict speaks of the data, the network and the scale that the picture names.",
        f"![Contact sheet of the slides of {month_name(month)}]({month}-sheet.png)",
        *(_paper(e, e.slug in drawn) for e in entries),
        "## Reproduce it",
        "```console\n$ pip install mlcollage\n$ mlcollage digest " + month + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _paper(entry: Entry, drawn: bool) -> str:
    links = [f"[arXiv {entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})"] if entry.arxiv else []
    links += [f"[the authors' code]({entry.official_code})"] if entry.official_code else []
    place = f" · collage {entry.number} of {SERIES}" if entry.number is not None else ""
    parts = [
        f"## {_plain(entry.title)}",
        f"*{_plain(entry.authors)} · {_plain(entry.venue)}*{place}" + "".join(f" · {link}" for link in links),
    ]
    if entry.finding:
        parts.append(f"**{_plain(entry.finding)}.**")
    parts += [_plain(p.strip()) for p in re.split(r"\n\s*\n", entry.summary) if p.strip()]
    if drawn:
        parts.append(f"![{_plain(entry.slide_alt)}]({entry.slug}.png)")
    parts.append("\n".join(_verdict(row) for row in entry.claims if row.headline) or "It is not measured yet.")
    if entry.usage:
        parts.append(f"```python\n{entry.usage.strip()}\n```")
    parts.append(f"`mlcollage run {entry.slug}`")
    return "\n\n".join(p for p in parts if p)


def _verdict(row: ClaimRow) -> str:
    word = f"{theme.STATUS_MARKS[row.status]} {theme.STATUS_WORDS[row.status]}"
    paper = f"; the paper: {_plain(row.paper)}" if row.paper else ""
    return f"- {word}: {_plain(row.title)} ({_plain(row.ours)}{paper})"


def _plain(text: str) -> str:
    """The text as Markdown shows it letter by letter, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
