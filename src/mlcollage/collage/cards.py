"""The cards at the foot of a slide: each headline with its interval, and one card that counts the other claims."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from mlcollage.collage import theme
from mlcollage.collage.content import Card, IntervalPlot, StatusName
from mlcollage.collage.fitting import Box
from mlcollage.collage.sheet import Sheet
from mlcollage.collage.text import Fitted, balance, fit, width

REST = 206.0  # width of the card that counts the others
GAP = 12.0
SIDES = 31.0  # of a card: what its width has no room for text
MOST = 6
ROW = 21.0  # from line to line in the card that counts the others
_KEY = {"reference": "", "too little to matter": theme.SHADE, "as claimed": theme.CLAIMED}  # of the interval plots
ORDER: tuple[StatusName, ...] = ("supported", "contradicted", "inconclusive", "untested", "pending")


def headlines(cards: Sequence[Card]) -> list[Card]:
    """The claims with a card of their own: the headlines, or the first that were tested if none is marked."""
    marked = [c for c in cards if c.headline]
    if not marked:
        marked = sorted(cards, key=lambda c: c.status in ("untested", "pending"))[:4]
    return marked[:MOST]


def draw_cards(sheet: Sheet, cards: Sequence[Card], left: float, right: float, bottom: float) -> float:
    """One card for each headline, and one for all others, ending at ``bottom``; returns where they begin."""
    chosen = headlines(cards)
    rest = [c for c in cards if c not in chosen]
    room = right - left - (REST + GAP if rest else 0.0)
    wide = (room - GAP * (len(chosen) - 1)) / max(len(chosen), 1)
    titles = [fit(sheet.figure, c.title, wide - SIDES, theme.BODY, lines=4, weight="semibold") for c in chosen]
    titles = [balance(sheet.figure, t, wide - SIDES, weight="semibold") for t in titles]
    facts = max(len(_facts(sheet, c, wide - SIDES)) for c in chosen)
    height = 20.0 * max(len(t.lines) for t in titles) + 22.0 * facts + 100.0
    if rest:  # its counts and the key of the plots lie one below the other
        height = max(height, 36.0 + ROW * len({c.status for c in rest}) + ROW * len(_KEY) + 14.0)
    top = bottom - height
    words = [fit(sheet.figure, _verdict(c), wide - SIDES, theme.VERDICT, weight="bold") for c in chosen]
    # One size for all verdicts, that of the longest word; what is not measured yet may be set smaller.
    size = min((w.size for w, c in zip(words, chosen, strict=True) if c.status != "pending"), default=theme.VERDICT)
    for i, (card, title, word) in enumerate(zip(chosen, titles, words, strict=True)):
        x = left + i * (wide + GAP)
        _draw_card(sheet, card, title, min(size, word.size), Box(x, top, x + wide, bottom))
    if rest:
        _draw_rest(sheet, rest, Box(right - REST, top, right, bottom))
    return top


def _verdict(card: Card) -> str:
    return f"{theme.STATUS_MARKS[card.status]} {theme.STATUS_WORDS[card.status]}"


def _facts(sheet: Sheet, card: Card, room: float) -> list[tuple[str, str]]:
    """Lines of our value, what it must be, and the paper's, each with what stands at its right end."""
    ours = card.ours.replace(", ", ",\u00a0") if card.plot is not None else card.note  # intervals are not broken
    lines = [(line, "") for line in fit(sheet.figure, ours, room, theme.SMALL, lines=3).lines]
    for words in (card.needs, f"paper: {card.paper}" if card.paper else ""):
        if not words:
            continue
        last, beside = lines[-1] if lines else ("", "")
        # Beside the line before where both fit, else below it.
        if last and not beside and width(sheet.figure, f"{last} {words}", theme.SMALL) + 10 <= room:
            lines[-1] = (last, words)
        else:
            lines += [("", line) for line in fit(sheet.figure, words, room, theme.SMALL, lines=2).lines]
    return lines


def _draw_card(sheet: Sheet, card: Card, title: Fitted, size: float, box: Box) -> None:
    name = f"claim-{card.id}"
    color = theme.STATUS_COLORS[card.status]
    _frame(sheet, box, name, color)
    left, room = box.left + 19, box.width - SIDES
    sheet.block(left, box.top + 8, title, 20.0, f"{name}-text", weight="semibold")
    y = box.bottom - 26
    sheet.write(left, y, _verdict(card), size, f"{name}-text", weight="bold", color=color)
    facts = _facts(sheet, card, room)
    y -= 28 + 22 * (len(facts) - 1)
    for i, (ours, paper) in enumerate(facts):
        sheet.write(left, y + 22 * i, ours, theme.SMALL, f"{name}-text")
        muted = {"ha": "right" if ours else "left", "color": theme.MUTED}
        sheet.write(left + (room if ours else 0), y + 22 * i, paper, theme.SMALL, f"{name}-text", **muted)
    if card.plot is not None:
        draw_interval(sheet, card.plot, Box(left + 4, y - 44, left + room - 4, y - 16), color)


def draw_interval(sheet: Sheet, plot: IntervalPlot, box: Box, color: str) -> None:
    """The interval with its estimate, the reference value as a line, and what is claimed or too small as shades."""
    place = math.log if plot.log else float
    values = (plot.estimate, plot.lo, plot.hi, plot.reference, plot.margin_from, plot.margin_to)
    e, lo, hi, reference, start, stop = (place(v) for v in values)
    least, most = min(e, lo, reference, start), max(e, hi, reference, stop)
    if plot.claimed is not None:  # beyond the edge of what is claimed there is something to see, too
        beyond = 0.14 * (most - least)
        edges = [place(v) for v in plot.claimed if math.isfinite(v)]
        least, most = min([least, *(v - beyond for v in edges)]), max([most, *(v + beyond for v in edges)])
    span = (most - least) or 1.0

    def x(value: float) -> float:
        return box.left + box.width * (0.04 + 0.92 * (value - least) / span if most > least else 0.5)

    middle = (box.top + box.bottom) / 2
    if plot.claimed is not None:
        a, b = (x(place(v)) if math.isfinite(v) else math.nan for v in plot.claimed)
        claimed = Box(box.left if math.isnan(a) else a, box.top + 3, box.right if math.isnan(b) else b, box.bottom - 3)
        sheet.rectangle(claimed, theme.CLAIMED, zorder=-1.1)
    if stop > start and (plot.claimed is None or (plot.margin_from, plot.margin_to) != tuple(plot.claimed)):
        shade = Box(x(start), box.top + 3, x(stop), box.bottom - 3)
        sheet.rectangle(shade, theme.SHADE, zorder=-1.0)
    sheet.line((x(reference), x(reference)), (box.top, box.bottom), theme.INK, 1.4, solid_capstyle="butt", zorder=0)
    if hi > lo:
        sheet.line((x(lo), x(hi)), (middle, middle), color, 3.2, zorder=1)
    sheet.line((x(e), x(e)), (middle, middle), color, 0.0, marker="o", markersize=9.0, markeredgewidth=0, zorder=2)


def _draw_rest(sheet: Sheet, rest: Sequence[Card], box: Box) -> None:
    name = "claim-rest"
    _frame(sheet, box, name, theme.GRAYS[0])
    left, y = box.left + 19, box.top + 9
    head = f"{len(rest)} more claim{'s' if len(rest) > 1 else ''}"
    sheet.write(left, y + 11, head, theme.BODY, f"{name}-text", weight="semibold")
    counts = Counter(c.status for c in rest)
    y += 29
    for status in ORDER:
        if counts[status]:
            words = f"{theme.STATUS_MARKS[status]} {counts[status]} {theme.STATUS_WORDS[status]}"
            sheet.write(left, y + 11, words, theme.SMALL, f"{name}-text", color=theme.STATUS_COLORS[status])
            y += ROW
    y = box.bottom - 19 - ROW * (len(_KEY) - 1)
    sheet.line((left + 3, left + 3), (y - 8, y + 8), theme.INK, 1.4, solid_capstyle="butt", zorder=0)
    for words, color in _KEY.items():
        if color:
            sheet.rectangle(Box(left - 3, y - 7, left + 9, y + 7), color)
        sheet.write(left + 18, y, words, theme.SMALL, f"{name}-text", color=theme.MUTED)
        y += ROW


def _frame(sheet: Sheet, box: Box, name: str, color: str) -> None:
    card = sheet.card(box, name, radius=9.0)
    bar = sheet.rectangle(Box(box.left, box.top, box.left + 7, box.bottom), color)
    bar.set_clip_path(card)
