"""The digest pages: one self-contained HTML file a month, and an index of all papers.

A page is one file: pictures, type, style and script are inside it, and a content security policy keeps it from
loading anything else. Without a script everything is shown; the script adds full screen, copying and filters.
"""

from __future__ import annotations

import base64
import calendar
import functools
import html
import io
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from pygments.lexers.python import PythonLexer
from pygments.token import Comment, Keyword, Number, Operator, String

from mlcollage.collage import theme
from mlcollage.collage.content import SERIES, Entry
from mlcollage.collage.svg import font_face
from mlcollage.errors import InvalidInput, MissingFile

HERE = Path(__file__).parent
# The eight ideas of Gelman and Vehtari's review, in its order; papers name them by the keys.
IDEAS: Mapping[str, str] = {
    "causal": "causal inference",
    "bootstrap": "bootstrap and simulation",
    "regularize": "regularization",
    "multilevel": "multilevel models",
    "compute": "generic computation",
    "adaptive": "adaptive decisions",
    "robust": "robust inference",
    "explore": "exploratory analysis",
}
STATES = {"measured": "measured", "built": "built, not measured here yet", "planned": "not built yet"}
ORDER = ("supported", "contradicted", "inconclusive", "untested", "pending")
SHOWN = ("measured", "built", "planned")  # what can be looked at comes first
NUMBERS = {1: "One", 2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six", 8: "Eight", 12: "Twelve", 16: "Sixteen"}
# Characters that most pages have between them, so that the pages of one digest can share their fonts.
USUAL = frozenset(map(chr, (*range(0x20, 0x7F), *range(0xA0, 0x100), *range(0x3B1, 0x3CA)))) | frozenset(
    "–—‘’“”…←→−≈≠≤≥∑∞△○✓✗ΔΣΩĆćČčĞğŁłŃńŐőŘřŚśŞşŠšŽž"
)
THUMBNAIL = (720, 405)
PORTRAIT = (864, 1080)  # of the upright slide, which phones show: sharp at 432 points


@dataclass(frozen=True)
class _View:
    """An entry and what the templates derive from it."""

    entry: Entry
    slide: str
    portrait: str
    thumbnail: str
    tally: Sequence[tuple[str, int]]
    code: Markup

    # Templates read the entry's own fields through the view.
    def __getattr__(self, name: str) -> Any:
        return getattr(self.entry, name)

    @property
    def place(self) -> str:
        """Place in the series."""
        return "" if self.entry.number is None else f"Collage {self.entry.number} of {SERIES}"

    @property
    def paragraphs(self) -> list[str]:
        return [p.strip() for p in re.split(r"\n\s*\n", self.entry.summary) if p.strip()]

    @property
    def found(self) -> list[str]:
        """Verdicts that occur, for the filter; ``none`` when there are none yet."""
        return [status for status, _ in self.tally] or ["none"]


def render_month(month: str, entries: Sequence[Entry], *, index_page: str | None = "index.html") -> str:
    """The page of one month.

    Parameters
    ----------
    month
        Such as ``"2021-05"``.
    entries
        The papers, in the order of the page; those of other months are left out.
    index_page
        Where the index is, seen from this page; ``None`` leaves the link out.

    Returns
    -------
    str
        A complete HTML document. The same entries give the same text.

    Raises
    ------
    InvalidInput
        For a month that is not written YYYY-MM or has no paper, or a link that a page must not hold.
    MissingFile
        For a slide that is not there.

    Examples
    --------
    >>> entry = Entry("demo", "A Title", "A. Author", "Venue", "2021-05", "1910.01526", ["causal"], "planned")
    >>> page = render_month("2021-05", [entry])
    >>> "A Title" in page, "not built yet" in page, "<script src" in page
    (True, True, False)
    """
    name = month_name(month)
    chosen = [_view(e) for e in _by_state(entries) if e.month == month]
    if not chosen:
        there = ", ".join(sorted({e.month for e in entries})) or "none"
        raise InvalidInput(f"no paper belongs to the month {month}; the months given are: {there}.")
    return render_template(
        "month.html.j2",
        title=f"ML collage {month}",
        description=f"{name}: " + ", ".join(v.title for v in chosen),
        preview=_preview(chosen),
        month_name=name,
        count_word=NUMBERS.get(len(chosen), str(len(chosen))),
        entries=chosen,
        index_page=index_page,
    )


def render_index(entries: Sequence[Entry], *, month_page: str | None = "{month}.html") -> str:
    """The page of all papers, with filters by month, idea and verdict.

    Parameters
    ----------
    entries
        All papers, those not built yet included; they are shown by month, in the given order.
    month_page
        Where the page of a month is, seen from the index; ``None`` leaves these links out.

    Examples
    --------
    >>> entry = Entry("demo", "A Title", "A. Author", "Venue", "2021-05", "1910.01526", ["causal"], "planned")
    >>> 'href="2021-05.html#demo"' in render_index([entry])
    True
    """
    if not entries:
        raise InvalidInput("an index needs at least one paper; the list is empty.")
    views = [_view(e, slide=False) for e in _by_state(entries)]
    months = sorted({v.month for v in views})
    totals: Counter[str] = Counter(row.status for v in views for row in v.claims)
    # A filter that nothing passes is not offered.
    found = [s for s in (*ORDER, "none") if any(s in v.found for v in views)]
    words: dict[str, str] = {s: f"{theme.STATUS_MARKS[s]} {theme.STATUS_WORDS[s]}" for s in ORDER}
    used = {idea for v in views for idea in v.ideas}
    ideas = [i for i in IDEAS if i in used] + sorted(used - set(IDEAS))
    return render_template(
        "index.html.j2",
        title="ML collage",
        description=f"{len(views)} deep-learning papers, their methods, claims and measurements",
        preview=_preview(views),
        count_word=NUMBERS.get(len(views), str(len(views))),
        entries=views,
        measured=sum(v.state == "measured" for v in views),
        totals=[(s, totals[s]) for s in ORDER if totals[s]],
        months=[(m, month_name(m), [v for v in views if v.month == m]) for m in months],
        month_pages={} if month_page is None else {m: month_page.format(month=m) for m in months},
        filters=[
            ("month", "Month", [(m, m) for m in months]),
            ("idea", "Idea", [(i, IDEAS.get(i, i)) for i in ideas]),
            ("verdict", "Verdict", [(s, words.get(s, "no verdict yet")) for s in found]),
        ],
    )


def _by_state(entries: Sequence[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda e: SHOWN.index(e.state))


def _preview(views: Sequence[_View]) -> str:
    """Address of the picture that a link to the page shows."""
    return next((v.picture for v in views if v.picture), "")


def month_name(month: str) -> str:
    """``"2021-05"`` as ``"May 2021"``."""
    if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", month):
        raise InvalidInput(f"month {month!r} is not written as a year and a month, such as '2021-05'.")
    return f"{calendar.month_name[int(month[5:])]} {month[:4]}"


# --- one paper --------------------------------------------------------------------------------------------------------


def _view(entry: Entry, *, slide: bool = True) -> _View:
    for label, target in entry.data_links:
        bare = re.sub(r"[\x00-\x20\x7f-\xa0]", "", target)  # browsers ignore these, also within a scheme
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", bare)
        if scheme and scheme.group(1).lower() not in ("http", "https"):
            raise InvalidInput(
                f"the link {label!r} of {entry.slug} goes to {target!r}; use a relative path or http(s)."
            )
    counts: Counter[str] = Counter(row.status for row in entry.claims)
    tally = [(status, counts[status]) for status in ORDER if counts[status]]
    picture = portrait = thumbnail = ""
    if entry.slide_svg is not None:
        if not entry.slide_svg.is_file():
            raise MissingFile(f"the slide of {entry.slug} is not at {entry.slide_svg}; render it before the page.")
        thumbnail = _thumbnail(entry.slide_svg)
        # Pages hold everything, so that a single file can be mailed; the index has the small pictures only.
        if slide:
            picture = data_uri(entry.slide_svg.read_bytes(), "image/svg+xml")
            upright = entry.slide_svg.with_name(f"{entry.slide_svg.stem}-portrait.png")
            portrait = webp(upright, PORTRAIT) if upright.is_file() else ""
    return _View(entry, picture, portrait, thumbnail, tally, _highlight(entry.usage))


def data_uri(content: bytes, kind: str) -> str:
    """A file as an address that a page can hold."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _thumbnail(svg: Path) -> str:
    """A small picture from the PNG beside the SVG; without one the SVG itself, which is several times larger."""
    png = svg.with_suffix(".png")
    if not png.is_file():
        return data_uri(svg.read_bytes(), "image/svg+xml")
    return webp(png, THUMBNAIL)


def webp(png: Path, size: tuple[int, int]) -> str:
    """A PNG as a smaller WebP of this size, as an address that a page can hold."""
    file = io.BytesIO()
    with Image.open(png) as picture:
        picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(file, "WEBP", quality=82, method=6)
    return data_uri(file.getvalue(), "image/webp")


_KINDS = {Keyword: "kw", Operator.Word: "kw", String: "str", Number: "num", Comment: "com"}


def _highlight(code: str) -> Markup:
    """Python source with its keywords, strings, numbers and comments marked; other text as it is."""
    tokens = PythonLexer(stripnl=False, ensurenl=False).get_tokens(code.strip("\n"))
    kinds = ((next((css for kind, css in _KINDS.items() if found in kind), ""), text) for found, text in tokens)
    out = []
    for css, part in itertools.groupby(kinds, key=lambda pair: pair[0]):  # a string is a token for each of its parts
        text = html.escape("".join(text for _, text in part))
        out.append(f'<span class="{css}">{text}</span>' if css else text)
    return Markup("".join(out))


# --- the page ---------------------------------------------------------------------------------------------------------


@functools.cache
def _environment() -> Environment:
    loader = FileSystemLoader(HERE / "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@functools.cache
def _css() -> str:
    css = (HERE / "assets" / "page.css").read_text("utf-8")
    dark = (HERE / "assets" / "dark.css").read_text("utf-8")
    rules = (
        f'@media screen and (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {{\n{dark}}} }}\n'
        f'@media screen {{ :root[data-theme="dark"] {{\n{dark}}} }}'
    )
    return css.replace("/*dark*/", rules)


def _icon() -> str:
    tiles = "".join(
        f'<rect x="{1 + 8 * (i % 2)}" y="{1 + 8 * (i // 2)}" width="6" height="6" fill="{theme.PALETTE[name]}"/>'
        for i, name in enumerate(("sky", "orange", "green", "purple"))
    )
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{tiles}</svg>'
    return base64.b64encode(svg.encode()).decode()


def render_template(template: str, **fields: Any) -> str:
    """A page from one of the templates, with the style, the script and the fonts inside."""
    # Autoescaping is on: titles, sentences and messages are data. Markup() marks our own CSS, JavaScript and colored
    # code as what needs none.
    page = (
        _environment()
        .get_template(template)
        .render(
            css=Markup(_css()),
            js=Markup((HERE / "assets" / "page.js").read_text("utf-8")),
            icon=_icon(),
            marks=theme.STATUS_MARKS,
            words=theme.STATUS_WORDS,
            idea_names=IDEAS,
            states=STATES,
            **fields,
        )
    )
    # Only characters that the page shows are embedded; pictures are left out, since they hold fonts of their own.
    characters = "".join(sorted(set(html.unescape(re.sub(r"data:[^\"']*", "", page))) | USUAL))
    faces = [("normal", 400), ("italic", 400), ("normal", 600), ("normal", 700)]
    fonts = "".join(font_face((theme.FAMILY, slant, weight), characters) for slant, weight in faces)
    return page.replace("/*fonts*/", fonts, 1)
