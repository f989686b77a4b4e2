"""The slide: a title band, the idea, one dominant picture, a few small ones, and the headline verdicts.

Two layouts of one content: 16 by 9 (1600 by 900 pixels; PNGs are 1920 wide) and, for feeds that show upright pictures,
1080 by 1350.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mlcollage.collage import theme
from mlcollage.collage.cards import GAP as CARD_GAP
from mlcollage.collage.cards import draw_cards, headlines
from mlcollage.collage.check import check_layout
from mlcollage.collage.content import MOST_ALT, Card, Panel, Slide
from mlcollage.collage.fitting import Box
from mlcollage.collage.sheet import Sheet
from mlcollage.collage.svg import finish
from mlcollage.collage.text import balance, drawable, fit, width
from mlcollage.errors import InvalidInput

__all__ = ["build_figure", "build_portrait", "check_layout", "describe", "render_slide"]

WIDTH, HEIGHT = 1600.0, 900.0
MARGIN, GAP = 30.0, 16.0
IDEA, SIDE = 410.0, 390.0  # widths of the idea and of the small pictures; the dominant one takes what is left
FOOT = 42.0
PORTRAIT = (1080.0, 1350.0)
FORMATS = ("svg", "png", "pdf", "portrait")
PNG_DPI = 120  # 1920 pixels for 16 inches


def render_slide(
    slide: Slide, folder: str | os.PathLike[str], formats: Sequence[str] = FORMATS, *, scale: int = 1
) -> dict[str, Path]:
    """Draw a slide and write it as ``<slug>.svg``, ``.png``, ``.pdf`` and ``<slug>-portrait.png``.

    Parameters
    ----------
    slide
        What to draw.
    folder
        Where to write; made if it is not there. Each file is replaced in one step, never left half written.
    formats
        Any of ``"svg"``, ``"png"``, ``"pdf"`` (16 by 9) and ``"portrait"`` (a PNG of 1080 by 1350 for feeds).
    scale
        1 gives PNGs of 1920 by 1080 and 1080 by 1350, 2 twice that.

    Returns
    -------
    dict of str to Path
        The files written. The same slide gives the same files, byte for byte.

    Raises
    ------
    InvalidInput
        For an unknown format, a scale below one, or a panel without room for its picture.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise InvalidInput(f"format {unknown[0]!r} is not one of {', '.join(FORMATS)}.")
    if scale < 1:
        raise InvalidInput(f"scale={scale} must be a whole number of at least 1 (1 gives 1920 x 1080 pixels).")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    slide = drawable(slide)
    with theme.style():
        wide = build_figure(slide) if set(formats) - {"portrait"} else None
        pictures = {
            n: _encode(wide, slide, n, PNG_DPI * scale) for n in formats if wide is not None and n != "portrait"
        }
        if "portrait" in formats:
            pictures["portrait"] = _encode(build_portrait(slide), slide, "png", 100 * scale)
    written = {}
    for name, content in pictures.items():
        path = target / (f"{slide.slug}-portrait.png" if name == "portrait" else f"{slide.slug}.{name}")
        half = path.with_name(f".{path.name}.{os.getpid()}")
        half.write_bytes(content)
        half.replace(path)
        written[name] = path
    return written


def _encode(figure: Figure, slide: Slide, name: str, dpi: int) -> bytes:
    file = io.BytesIO()
    metadata: dict[str, dict[str, Any]] = {
        "svg": {"Date": None, "Creator": "mlcollage"},
        "png": {"Software": None, "Title": slide.title, "Description": describe(slide)},
        "pdf": {"CreationDate": None, "Creator": "mlcollage", "Producer": None, "Title": slide.title},
    }
    figure.savefig(file, format=name, dpi=dpi if name == "png" else 100, metadata=metadata[name])
    if name == "svg":
        return finish(file.getvalue().decode(), slide.title, describe(slide)).encode()
    return file.getvalue()


def title_of(slide: Slide, panel: Panel) -> str:
    """The finding of the claim that the panel shows, or the panel's own title."""
    found = {card.id: card.finding for card in slide.cards}
    if panel.claim and panel.claim not in found:
        raise InvalidInput(f"panel {panel.title!r} shows claim {panel.claim!r}, which the study does not have.")
    return found.get(panel.claim, "") or panel.title


def short_alternative(slide: Slide) -> str:
    """Text alternative of at most 300 characters: the paper, the finding, the picture; :func:`describe` has all."""
    words = (
        f"{_main(slide.title).rstrip('?')}: {title_of(slide, slide.collage.main).rstrip('.')}. {slide.collage.main.alt}"
    )
    if len(words) <= MOST_ALT:
        return words
    short = words[: MOST_ALT - 1]
    # Whole sentences where one ends in the second half, else whole words.
    ends = [i + 1 for i in range(MOST_ALT // 2, len(short) - 1) if short[i : i + 2] == ". "]
    return short[: ends[-1]] if ends else short.rsplit(" ", 1)[0] + "…"


def describe(slide: Slide) -> str:
    """Text alternative of a whole slide: the idea, each panel, each verdict."""
    c = slide.collage
    parts = [f"{slide.title}, {slide.byline}: {c.tagline}."]
    parts += [f"{title_of(slide, p)}: {p.alt.rstrip('.')}." for p in (c.idea, c.main, *c.panels)]
    for card in slide.cards:
        facts = [theme.STATUS_WORDS[card.status], card.ours, card.paper and f"paper: {card.paper}"]
        facts += [card.note] if card.note != card.ours else []
        parts.append(f"Claim {card.id}, {card.title}: {'; '.join(f for f in facts if f)}.")
    return " ".join(parts)


def build_figure(slide: Slide) -> Figure:
    """Lay the slide out, 16 by 9; call it within :func:`mlcollage.collage.theme.style`.

    Examples
    --------
    >>> from mlcollage.collage.content import Collage, Panel
    >>> idea = Panel("The idea", lambda ax: ax.text(0.5, 0.5, "x", ha="center"), alt="the letter x")
    >>> line = Panel("Loss falls", lambda ax: ax.plot([2, 1]), alt="a falling line", subtitle="loss (nats)")
    >>> slide = Slide("demo", "Demo", "Nobody", "2021-05", Collage("a demo", idea, line, [line], "digits", "MLP"),
    ...               [], "left", "right")
    >>> with theme.style():
    ...     check_layout(build_figure(slide))
    []
    """
    sheet = Sheet(WIDTH, HEIGHT)
    c = slide.collage
    top = _draw_band(sheet, slide) + GAP
    foot_top = HEIGHT - _draw_foot(sheet, slide)
    bottom = foot_top
    if slide.cards:
        bottom = draw_cards(sheet, slide.cards, MARGIN, WIDTH - MARGIN, foot_top) - CARD_GAP
    left, right = MARGIN + IDEA + GAP, WIDTH - MARGIN - SIDE - GAP
    sheet.panel(c.idea, c.idea.title, Box(MARGIN, top, MARGIN + IDEA, bottom), "idea")
    sheet.panel(c.main, title_of(slide, c.main), Box(left, top, right, bottom), "panel-main", large=True)
    each = (bottom - top - GAP * (len(c.panels) - 1)) / len(c.panels)
    for i, panel in enumerate(c.panels):
        y = top + i * (each + GAP)
        sheet.panel(panel, title_of(slide, panel), Box(right + GAP, y, WIDTH - MARGIN, y + each), f"panel-{i + 1}")
    return sheet.figure


def build_portrait(slide: Slide) -> Figure:
    """The finding, the dominant picture, the idea and the headline verdicts on 1080 by 1350 pixels."""
    sheet = Sheet(*PORTRAIT)
    c = slide.collage
    top = _draw_band(sheet, slide) + GAP
    middle = top + 600.0
    bottom = sheet.height - FOOT - 12
    right = sheet.width - MARGIN
    sheet.panel(c.main, title_of(slide, c.main), Box(MARGIN, top, right, middle), "panel-main", large=True)
    across = MARGIN + 460.0
    sheet.panel(c.idea, c.idea.title, Box(MARGIN, middle + GAP, across, bottom), "idea")
    _draw_list(sheet, headlines(slide.cards), Box(across + GAP, middle + GAP, right, bottom))
    foot = fit(sheet.figure, slide.foot_left, sheet.width - 2 * MARGIN, theme.SMALL, lines=2)
    top = sheet.height - 10 - 22.0 * len(foot.lines)
    sheet.block(MARGIN, top, foot, 22.0, "foot-left", color=theme.MUTED)
    return sheet.figure


def _draw_list(sheet: Sheet, cards: Sequence[Card], box: Box) -> None:
    """Each headline with its verdict, large enough to be read on a phone."""
    sheet.card(box, "list")
    left, room = box.left + 38, box.width - 56
    titles = [fit(sheet.figure, c.title, room, 15.5, lines=2, weight="semibold") for c in cards]
    titles = [balance(sheet.figure, t, room, weight="semibold") for t in titles]
    # The same room between all of them, whether their titles take one line or two.
    heights = [27.0 * len(t.lines) + 32.0 for t in titles]
    gap = (box.height - sum(heights)) / (len(cards) + 1) if cards else 0.0
    y = box.top + gap
    for card, title, height in zip(cards, titles, heights, strict=True):
        color = theme.STATUS_COLORS[card.status]
        sheet.rectangle(Box(box.left + 18, y + 2, box.left + 25, y + height - 2), color)
        below = sheet.block(left, y, title, 27.0, "list-text", weight="semibold")
        word = f"{theme.STATUS_MARKS[card.status]} {theme.STATUS_WORDS[card.status]}"
        sheet.write(left, below + 16, word, 17.0, "list-text", weight="bold", color=color)
        beside = width(sheet.figure, word, 17.0, "bold") + 16
        ours = fit(sheet.figure, card.ours, room - beside, 14.0)
        sheet.write(left + beside, below + 16, ours.text, ours.size, "list-text", color=theme.MUTED)
        y += height + gap


# --- band and foot ----------------------------------------------------------------------------------------------------


def _main(title: str) -> str:
    """A title without its subtitle, which follows a colon or a question."""
    return re.split(r": |(?<=\?) ", title)[0]


def _draw_band(sheet: Sheet, slide: Slide) -> float:
    """Draw the title band and return its height."""
    figure, room = sheet.figure, sheet.width - 2 * MARGIN
    label, small = slide.label, 14.2
    label_room = room - width(figure, label, small, "bold") - 72
    title = fit(figure, slide.title, label_room, theme.SLIDE_TITLE, smallest=24.0, weight="bold")
    if (
        title.cut and _main(slide.title) != slide.title
    ):  # the whole title is in the picture's text alternative and on the page
        title = fit(figure, _main(slide.title), label_room, theme.SLIDE_TITLE, smallest=22.0, weight="bold")
    if title.cut:
        lines = 2 if sheet.width > sheet.height else 3
        title = fit(figure, slide.title, label_room, 23.0, lines=lines, smallest=16.0, weight="bold")
    size, tagline = 13.6, slide.collage.tagline
    together = width(figure, slide.byline, size) + width(figure, tagline, size, slant="italic") + 40
    beside = together <= room
    second = fit(figure, slide.byline, room, size)
    third = fit(figure, tagline, room, size, slant="italic")
    pitch = title.size * 1.39 * 1.2
    height = 14 + pitch * len(title.lines) + 27 + (0 if beside else 25) + 11
    sheet.rectangle(Box(0, 0, sheet.width, height), theme.BAND, zorder=-3, name="card-band")
    y = 14 + pitch / 2
    right = sheet.width - MARGIN
    sheet.write(right, y, label, small, "band-label", ha="right", color="#FFFFFF", weight="bold")
    _draw_mark(sheet, right - width(figure, label, small, "bold") - 32, y)
    y = sheet.block(MARGIN, 14, title, pitch, "band-title", color="#FFFFFF", weight="bold") + 14
    sheet.write(MARGIN, y, second.text, second.size, "band-byline", color=theme.BAND_MUTED)
    looks: dict[str, Any] = {"color": "#E4EAEF", "style": "italic"}
    if beside:
        sheet.write(right, y, third.text, third.size, "band-tagline", ha="right", **looks)
    else:
        sheet.write(MARGIN, y + 25, third.text, third.size, "band-tagline", **looks)
    return height


def _draw_mark(sheet: Sheet, x: float, y: float) -> None:
    """Four tiles, one for each paper of a month."""
    for i, name in enumerate(("sky", "orange", "green", "purple")):
        left, top = x + 11.5 * (i % 2), y - 10.5 + 11.5 * (i // 2)
        sheet.rectangle(Box(left, top, left + 9.5, top + 9.5), theme.PALETTE[name], zorder=-2)


def _draw_foot(sheet: Sheet, slide: Slide) -> float:
    """Draw the foot and return its height."""
    room, size = sheet.width - 2 * MARGIN - 30, theme.SMALL
    right = fit(sheet.figure, slide.foot_right, room * 0.5, size)
    left = fit(sheet.figure, slide.foot_left, room - width(sheet.figure, right.text, size), size)
    sheet.write(MARGIN, sheet.height - 21, left.text, size, "foot-left", color=theme.MUTED)
    sheet.write(sheet.width - MARGIN, sheet.height - 21, right.text, size, "foot-right", ha="right", color=theme.MUTED)
    return FOOT
