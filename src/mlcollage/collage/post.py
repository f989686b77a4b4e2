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
    upright = [png.with_name(f"{png.stem}-portrait.png") for png in slides.values()]
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
    _sheet(list(slides.values()), SHEET, fixed=False).save(pictures[-2])
    # Two or three upright pictures fill the teaser; one or four fill it as slides.
    portraits = len(slides) in (2, 3) and all(path.is_file() for path in upright)
    _sheet(upright if portraits else list(slides.values()), TEASER).save(pictures[-1])
    text = target / f"{month}.md"
    text.write_text(_markdown(month, chosen, set(slides)), "utf-8")
    return [text, *pictures]


def _sheet(slides: Sequence[Path], size: tuple[int, int], *, fixed: bool = True) -> Image.Image:
    """Pictures of one shape side by side, as large as they fit; unless ``fixed``, the sheet is as high as they are."""
    with Image.open(slides[0]) as first:
        shape = first.width / first.height
    # The number of columns that leaves the most room to each.
    columns = max(range(1, len(slides) + 1), key=lambda count: _cell(len(slides), count, size, shape)[0])
    if not fixed and len(slides) > 1:
        columns = math.ceil(math.sqrt(len(slides)))
    rows = math.ceil(len(slides) / columns)
    width, height = _cell(len(slides), columns, size, shape)
    if not fixed:
        size = (size[0], rows * height + (rows + 1) * GAP)
    top = (size[1] - rows * height - (rows - 1) * GAP) // 2
    sheet = Image.new("RGB", size, theme.BAND)
    for i, path in enumerate(slides):
        row, column = divmod(i, columns)
        there = min(columns, len(slides) - row * columns)  # the last row is centered
        left = (size[0] - there * width - (there - 1) * GAP) // 2
        with Image.open(path) as picture:
            small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + column * (width + GAP), top + row * (height + GAP)))
    return sheet


def _cell(count: int, columns: int, size: tuple[int, int], shape: float) -> tuple[int, int]:
    """Width and height of each of ``count`` pictures in so many columns."""
    rows = math.ceil(count / columns)
    across, down = ((length - GAP * (n + 1)) / n for length, n in zip(size, (columns, rows), strict=True))
    width = min(across, down * shape)
    return int(width), int(width / shape)


def _markdown(month: str, entries: Sequence[Entry], drawn: set[str]) -> str:
    ideas = [e.tagline or e.title for e in entries]
    shown, others = ([e for e in entries if (e.slug in drawn) is there] for there in (True, False))
    papers = f"{_number(len(entries)).capitalize()} paper{'s' if len(entries) > 1 else ''}"
    if others:
        papers += f", {_number(len(shown))} of which {'is' if len(shown) == 1 else 'are'} measured here so far"
    parts = [
        f"# ML collage, {month_name(month)}: {'; '.join(_plain(i) for i in ideas)}",
        f"{papers}. {'Each of these has' if others else 'Each has'} one picture. Every number was measured again, by "
        "code that you can run; the claims, their tests and the smallest effects that matter were written down before "
        "the runs. A verdict speaks of the data, the network and the scale that the picture names.",
        f"![Contact sheet of the slides of {month_name(month)}]({month}-sheet.png)",
        *map(_paper, shown),
        *(["## Not measured here yet", "\n".join(map(_waiting, others))] if others else []),
        "## Reproduce it",
        "```console\n$ pip install mlcollage\n$ mlcollage digest " + month + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _links(entry: Entry) -> list[str]:
    links = [f"[arXiv {entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})"] if entry.arxiv else []
    return [*links, *([f"[the authors' code]({entry.official_code})"] if entry.official_code else [])]


def _waiting(entry: Entry) -> str:
    """One line on a paper of the month that has no picture yet."""
    idea = f": {_plain(entry.tagline)}" if entry.tagline else ""
    state = "its study is built and can be run" if entry.state == "built" else "not built yet"
    return "- " + " · ".join([f"**{_plain(entry.title)}**{idea}", _byline(entry), *_links(entry), state])


def _byline(entry: Entry) -> str:
    names = entry.authors.split(", ")
    authors = entry.authors if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} others"
    return f"*{_plain(authors)} · {_plain(entry.venue)}*"


def _paper(entry: Entry) -> str:
    place = f" · collage {entry.number} of {SERIES}" if entry.number is not None else ""
    parts = [
        f"## {_plain(entry.title)}",
        _byline(entry) + place + "".join(f" · {link}" for link in _links(entry)),
    ]
    if entry.finding:
        parts.append(f"**{_plain(entry.finding)}.**")
    parts += [_plain(p.strip()) for p in re.split(r"\n\s*\n", entry.summary) if p.strip()]
    parts.append(f"![{_plain(entry.slide_alt)}]({entry.slug}.png)")
    parts.append("\n".join(_verdict(row) for row in entry.claims if row.headline))
    if entry.usage:
        parts.append(f"On your own data:\n\n```python\n{entry.usage.strip()}\n```")
    parts.append(f"Measure it again: `mlcollage run {entry.slug}`")
    return "\n\n".join(p for p in parts if p)


def _verdict(row: ClaimRow) -> str:
    word = f"{theme.STATUS_MARKS[row.status]} {theme.STATUS_WORDS[row.status]}"
    # A dash stands for a value that is not there; the reason says why.
    ours = row.ours if row.ours != "–" else row.reason
    facts = [ours, row.needs, f"the paper: {row.paper}" if row.paper else ""]
    inside = "; ".join(_plain(f) for f in facts if f)
    return f"- {word}: {_plain(row.title)}" + (f" ({inside})" if inside else "")


def _plain(text: str) -> str:
    """The text as Markdown shows it letter by letter, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
