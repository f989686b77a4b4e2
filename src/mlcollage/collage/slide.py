"""The slide: a title band, the idea, the measured panels, the verdict strip and a foot, on 16 by 9 inches.

Lengths below are pixels of a slide 1600 wide, measured from its top left corner.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Affine2D

from mlcollage._users import users_code
from mlcollage.collage import theme
from mlcollage.collage.check import check_layout
from mlcollage.collage.content import Chip, Panel, Slide, StatusName
from mlcollage.collage.fitting import Box, fit_axes
from mlcollage.collage.svg import finish
from mlcollage.collage.text import drawable, fit, width
from mlcollage.errors import InvalidInput

__all__ = ["build_figure", "check_layout", "describe", "render_slide"]

WIDTH, HEIGHT = 1600, 900
MARGIN, GAP, PAD = 30.0, 16.0, 18.0
STRIP_GAP, STRIP_MOST, CHIP_PAD, MOST_CELLS = 12.0, 200.0, 29.0, 10
LINE = 24.0  # from one line of small text to the next
FORMATS = ("svg", "png", "pdf")


def render_slide(
    slide: Slide, folder: str | os.PathLike[str], formats: Sequence[str] = FORMATS, *, scale: int = 1
) -> dict[str, Path]:
    """Draw a slide and write it as ``<slug>.svg``, ``.png`` and ``.pdf``.

    Parameters
    ----------
    slide
        What to draw.
    folder
        Where to write; made if it is not there. Each file is replaced in one step, never left half written.
    formats
        Any of ``"svg"``, ``"png"``, ``"pdf"``.
    scale
        PNG pixels per slide pixel: 1 gives 1600 by 900, 2 gives 3200 by 1800.

    Returns
    -------
    dict of str to Path
        The files written. The same slide gives the same files, byte for byte.

    Raises
    ------
    InvalidInput
        For an unknown format, a scale below one, or a number of panels that the slide does not hold.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise InvalidInput(f"format {unknown[0]!r} is not one of {', '.join(FORMATS)}.")
    if scale < 1:
        raise InvalidInput(f"scale={scale} must be a whole number of at least 1 (1 gives 1600 x 900 pixels).")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    slide = drawable(slide)
    with theme.style():
        figure = build_figure(slide)
        pictures = {name: _encode(figure, slide, name, scale) for name in formats}
    written = {}
    for name, content in pictures.items():
        path = target / f"{slide.slug}.{name}"
        half = path.with_name(f".{path.name}.{os.getpid()}")
        half.write_bytes(content)
        half.replace(path)
        written[name] = path
    return written


def _encode(figure: Figure, slide: Slide, name: str, scale: int) -> bytes:
    file = io.BytesIO()
    metadata: dict[str, dict[str, Any]] = {
        "svg": {"Date": None, "Creator": "mlcollage"},
        "png": {"Software": None, "Title": slide.title, "Description": describe(slide)},
        "pdf": {"CreationDate": None, "Creator": "mlcollage", "Producer": None, "Title": slide.title},
    }
    figure.savefig(file, format=name, dpi=100 * scale if name == "png" else 100, metadata=metadata[name])
    if name == "svg":
        return finish(file.getvalue().decode(), slide.title, describe(slide)).encode()
    return file.getvalue()


def describe(slide: Slide) -> str:
    """Text alternative of a whole slide: the idea, each panel, each verdict."""
    parts = [f"{slide.title}, {slide.byline}: {slide.collage.tagline}."]
    parts += [f"{p.title}: {p.alt.rstrip('.')}." for p in (slide.collage.idea, *slide.collage.panels)]
    for chip in slide.chips:
        facts = "; ".join(
            x
            for x in (theme.STATUS_WORDS[chip.status], chip.ours, chip.paper and f"paper: {chip.paper}", chip.note)
            if x
        )
        parts.append(f"Claim {chip.id}, {chip.title}: {facts}.")
    return " ".join(parts)


def build_figure(slide: Slide) -> Figure:
    """Lay the slide out; call it within :func:`mlcollage.collage.theme.style`.

    Examples
    --------
    >>> from mlcollage.collage.content import Collage, Panel
    >>> idea = Panel("The idea", lambda ax: ax.text(0.5, 0.5, "x", ha="center"), alt="the letter x")
    >>> panels = [Panel(f"Panel {i}", lambda ax: ax.plot([1, 2]), alt="a rising line") for i in range(3)]
    >>> slide = Slide("demo", "Demo", "Nobody", "2021-05", Collage("a demo", idea, panels), [], "left", "right")
    >>> with theme.style():
    ...     check_layout(build_figure(slide))
    []
    """
    panels = list(slide.collage.panels)
    rows = _rows_of_panels(panels)
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor=theme.PAPER)
    FigureCanvasAgg(figure)
    top = _draw_band(figure, slide) + GAP
    foot_top = HEIGHT - _draw_foot(figure, slide)
    bottom = foot_top - _draw_strip(figure, slide.chips, foot_top)
    idea_width = 440.0 if max(len(r) for r in rows) > 2 else 480.0
    _draw_panel(figure, slide.collage.idea, Box(MARGIN, top, MARGIN + idea_width, bottom), "idea")
    left, right = MARGIN + idea_width + GAP, WIDTH - MARGIN
    row_height = (bottom - top - GAP * (len(rows) - 1)) / len(rows)
    number = 0
    for r, row in enumerate(rows):
        units = sum(_units(p) for p in row)
        unit = (right - left - GAP * (units - 1)) / units
        x, y = left, top + r * (row_height + GAP)
        for panel in row:
            number += 1
            across = unit * _units(panel) + GAP * (_units(panel) - 1)
            _draw_panel(figure, panel, Box(x, y, x + across, y + row_height), f"panel-{number}")
            x += across + GAP
    return figure


# --- panels -----------------------------------------------------------------------------------------------------------


def _units(panel: Panel) -> int:
    return 2 if panel.wide else 1


def _rows_of_panels(panels: Sequence[Panel]) -> list[list[Panel]]:
    """One or two rows of at most three columns each, as even as the order of the panels allows."""
    total = sum(_units(p) for p in panels)
    if not panels:
        raise InvalidInput("this slide has no panels; give it three to five measured ones.")
    if len(panels) == 1 or total <= 2:
        return [list(panels)]
    splits = []
    for k in range(1, len(panels)):
        upper, lower = sum(_units(p) for p in panels[:k]), sum(_units(p) for p in panels[k:])
        if max(upper, lower) <= 3:
            splits.append((abs(upper - lower), -upper, k))
    if not splits:
        raise InvalidInput(
            f"{len(panels)} panels take {total} columns and do not fit on two rows of three; "
            "use at most six, where a wide panel counts twice."
        )
    k = min(splits)[2]
    return [list(panels[:k]), list(panels[k:])]


def _draw_panel(figure: Figure, panel: Panel, box: Box, name: str) -> None:
    _card(figure, box, f"card-{name}")
    room = box.width - 2 * PAD
    y = box.top + 15.0
    for text, size, weight, color, pitch in (
        (panel.title, theme.PANEL_TITLE, "bold", theme.INK, 27.0),
        (panel.subtitle, theme.SMALL, "normal", theme.MUTED, 23.0),
    ):
        if text:
            lines = 4 if name == "idea" and weight == "normal" else 2
            fitted = fit(figure, text, room, size, lines=lines, weight=weight)
            for line in fitted.lines:
                _write(
                    figure,
                    box.left + PAD,
                    y + pitch / 2,
                    line,
                    fitted.size,
                    f"{name}-head",
                    weight=weight,
                    color=color,
                )
                y += pitch
    inner = Box(box.left + PAD, y + 8.0, box.right - PAD, box.bottom - 14.0)
    if inner.height < 40:
        raise InvalidInput(f"panel {panel.title!r}: no room is left under its title and subtitle; shorten them.")
    if panel.own_axes:
        grid = figure.add_gridspec(
            3,
            3,
            left=0,
            right=1,
            bottom=0,
            top=1,
            wspace=0,
            hspace=0,
            width_ratios=[inner.left, inner.width, WIDTH - inner.right],
            height_ratios=[inner.top, inner.height, HEIGHT - inner.bottom],
        )
        part = figure.add_subfigure(grid[1, 1], facecolor="none")
        part.set_gid(name)
        with users_code(f"drawing panel {panel.title!r}"):
            panel.draw(part)  # type: ignore[arg-type]
        fit_axes(part.axes, inner)
        return
    axes: Axes = figure.add_axes(inner.fraction(WIDTH, HEIGHT))
    axes.set_gid(name)
    if name == "idea":
        axes.set_axis_off()
    with users_code(f"drawing panel {panel.title!r}"):
        panel.draw(axes)  # type: ignore[arg-type]
    fit_axes([axes], inner)


def _card(figure: Figure, box: Box, name: str, radius: float = 12.0) -> FancyBboxPatch:
    patch = FancyBboxPatch(
        (box.left, HEIGHT - box.bottom),
        box.width,
        box.height,
        boxstyle=f"round,pad=0,rounding_size={radius}",
        transform=_pixels(figure),
        facecolor=theme.CARD,
        edgecolor=theme.RULE,
        linewidth=1.0,
        zorder=-2,
    )
    patch.set_gid(name)
    return figure.add_artist(patch)  # type: ignore[return-value]


def _pixels(figure: Figure) -> Any:
    """Transform from slide pixels (y upwards), valid at any resolution."""
    return Affine2D().scale(1 / WIDTH, 1 / HEIGHT) + figure.transFigure


def _write(figure: Figure, x: float, y: float, text: str, size: float, name: str, **looks: Any) -> Text:
    """One line whose letters are centered on ``y`` (downwards)."""
    looks = {"ha": "left", "color": theme.INK} | looks
    down = size * 0.5  # Inter's capitals are 0.73 em high: 0.36 em, in pixels, below the middle
    artist = figure.text(x / WIDTH, 1 - (y + down) / HEIGHT, text, fontsize=size, va="baseline", **looks)
    artist.set_gid(name)
    return artist


# --- band and foot ----------------------------------------------------------------------------------------------------


def _draw_band(figure: Figure, slide: Slide) -> float:
    """Draw the title band and return its height."""
    room = WIDTH - 2 * MARGIN
    label, small = f"ML collage  {slide.month}", 14.2
    label_room = room - width(figure, label, small, "bold") - 72
    title = fit(figure, slide.title, label_room, theme.SLIDE_TITLE, smallest=20.0, weight="bold")
    if title.cut:
        title = fit(figure, slide.title, label_room, 21.0, lines=2, smallest=16.0, weight="bold")
    byline_size, beside = 13.6, True
    tagline = slide.collage.tagline
    while width(figure, slide.byline, byline_size) + width(figure, tagline, byline_size, slant="italic") + 40 > room:
        if byline_size <= theme.MIN_SIZE:
            beside = False
            break
        byline_size -= 0.25
    second = fit(figure, slide.byline, room, byline_size)
    third = fit(figure, tagline, room, byline_size, slant="italic")
    pitch = title.size * 1.39 * 1.2
    height = 16 + pitch * len(title.lines) + 28 + (0 if beside else 26) + 12
    band = Rectangle((0, HEIGHT - height), WIDTH, height, transform=_pixels(figure), facecolor=theme.BAND, zorder=-3)
    band.set_gid("card-band")
    figure.add_artist(band)
    y = 16 + pitch / 2
    _write(figure, WIDTH - MARGIN, y, label, small, "band-label", ha="right", color="#FFFFFF", weight="bold")
    _draw_mark(figure, WIDTH - MARGIN - width(figure, label, small, "bold") - 32, y)
    for line in title.lines:
        _write(figure, MARGIN, y, line, title.size, "band-title", color="#FFFFFF", weight="bold")
        y += pitch
    y += 15 - pitch / 2
    _write(figure, MARGIN, y, second.text, second.size, "band-byline", color=theme.BAND_MUTED)
    looks: dict[str, Any] = {"color": "#E4EAEF", "style": "italic"}
    if beside:
        _write(figure, WIDTH - MARGIN, y, third.text, third.size, "band-tagline", ha="right", **looks)
    else:
        _write(figure, MARGIN, y + 26, third.text, third.size, "band-tagline", **looks)
    return height


def _draw_mark(figure: Figure, x: float, y: float) -> None:
    """Four tiles, one a paper of the month."""
    for i, name in enumerate(("sky", "orange", "green", "purple")):
        corner = (x + 11.5 * (i % 2), HEIGHT - (y - 10.5 + 11.5 * (i // 2)) - 9.5)
        figure.add_artist(
            Rectangle(corner, 9.5, 9.5, transform=_pixels(figure), facecolor=theme.PALETTE[name], zorder=-2)
        )


def _draw_foot(figure: Figure, slide: Slide) -> float:
    """Draw the foot and return its height."""
    room = WIDTH - 2 * MARGIN - 30
    size = theme.SMALL
    right = fit(figure, slide.foot_right, room * 0.5, size)
    left = fit(figure, slide.foot_left, room - width(figure, right.text, size), size)
    looks = {"color": theme.MUTED}
    _write(figure, MARGIN, HEIGHT - 21, left.text, size, "foot-left", **looks)
    _write(figure, WIDTH - MARGIN, HEIGHT - 21, right.text, size, "foot-right", ha="right", **looks)
    return 42.0


# --- the verdict strip ------------------------------------------------------------------------------------------------

ChipLine = list[tuple[str, str, dict[str, Any]]]  # text, "left" or "right", looks


def _draw_strip(figure: Figure, chips: Sequence[Chip], below: float) -> float:
    """Draw the chips so that they end at ``below``; return the height that they and their gaps take.

    Tested claims come first, up to six in a row and ten cells in all. When there are more than six, the claims that
    were not tested share one cell; when that is not enough, so do the last of the supported ones. A contradicted or
    inconclusive claim always has a cell of its own.
    """
    cells = _gather(chips)
    if not cells:
        return 4.0
    rows = -(-len(cells) // 6)
    columns = -(-len(cells) // rows)
    planned: list[tuple[float, list[PlannedChip]]] = []
    for compact in (False, True):
        planned = [
            _plan_row(figure, cells[start : start + columns], columns, compact)
            for start in range(0, len(cells), columns)
        ]
        total = sum(height for height, _ in planned) + STRIP_GAP * (len(planned) - 1)
        if total <= STRIP_MOST:
            break
    y = below - total
    for height, row in planned:
        for name, status, lines, left, wide in row:
            _draw_chip(figure, name, status, lines, Box(left, y, left + wide, y + height))
        y += height + STRIP_GAP
    return total + GAP


PlannedChip = tuple[str, StatusName, Sequence[ChipLine], float, float]  # name, status, lines, left, width
Cell = list[Chip]  # one claim, or several of one status


def _gather(chips: Sequence[Chip]) -> list[Cell]:
    tested = [c for c in chips if c.status != "untested"]
    rest = [c for c in chips if c.status == "untested"]
    single = [*tested, *rest]
    groups: list[Cell] = []
    if len(chips) > 6 and len(rest) > 1:
        single, groups = tested, [rest]
    for status, least in (("supported", 3), ("inconclusive", 1)):
        alike = sorted((c for c in single if c.status == status), key=lambda c: not c.headline)  # headlines stay alone
        together = _surplus(alike, len(single) + len(groups) - MOST_CELLS, least)
        if together:
            single = [c for c in single if c not in together]
            groups.insert(0, together)
    return [[c] for c in single] + groups


def _surplus(chips: list[Chip], surplus: int, least: int) -> Cell:
    """The last chips, which must share a cell to save ``surplus`` cells; ``least`` cells are left if they can be."""
    if surplus <= 0 or len(chips) < 2:
        return []
    keep = max(len(chips) - surplus - 1, min(least, len(chips)) - 1)
    together = chips[keep:]
    return together if len(together) > 1 else []


def _plan_row(figure: Figure, row: Sequence[Cell], columns: int, compact: bool) -> tuple[float, list[PlannedChip]]:
    """Height and cells of one row; its last cell fills what the others leave."""
    across = (WIDTH - 2 * MARGIN - STRIP_GAP * (columns - 1)) / columns
    last = across if len(row[-1]) == 1 else WIDTH - 2 * MARGIN - (len(row) - 1) * (across + STRIP_GAP)
    planned: list[PlannedChip] = []
    most = 2
    for i, cell in sorted(enumerate(row), key=lambda item: len(item[1])):  # lists take the height of the others
        wide = last if i == len(row) - 1 else across
        if len(cell) == 1:
            lines = _chip_lines(figure, cell[0], wide - CHIP_PAD, compact)
        else:
            lines = _shared_lines(figure, cell, wide - CHIP_PAD, max(most - compact, 2))
        most = max(most, len(lines))
        name = cell[0].id if len(cell) == 1 else f"all-{cell[0].status}"
        planned.append((name, cell[0].status, lines, MARGIN + i * (across + STRIP_GAP), wide))
    return most * LINE + 16, planned


def _chip_lines(figure: Figure, chip: Chip, room: float, compact: bool) -> list[ChipLine]:
    """The lines of one chip: id and title, our value, the verdict and the paper's value; ``compact`` takes three."""
    size = theme.SMALL
    title = fit(figure, f"{chip.id} {chip.title}", room, 13.2, lines=2, weight="semibold")
    quiet = chip.status == "untested"
    looks = {"fontsize": title.size, "weight": "semibold", "color": theme.MUTED if quiet else theme.INK}
    lines: list[ChipLine] = [[(line, "left", looks)] for line in title.lines]
    if chip.ours and not quiet:
        ours = fit(figure, chip.ours, room, size)
        lines.append([(ours.text, "left", {"fontsize": ours.size})])
    verdict = _verdict(chip.status)
    aside = chip.note if quiet and chip.note else (f"paper: {chip.paper}" if chip.paper else chip.note)
    if aside:
        looks = {"fontsize": size, "color": theme.MUTED}
        left_over = room - width(figure, verdict[0][0], size, "semibold") - 10
        if width(figure, aside, size) <= left_over:
            verdict.append((aside, "right", looks))
        elif compact:
            verdict.append((fit(figure, aside, left_over, size).text, "right", looks))
        else:
            lines.append([(fit(figure, aside, room, size).text, "left", looks)])
    return [*lines, verdict]


def _shared_lines(figure: Figure, chips: Sequence[Chip], room: float, most: int) -> list[ChipLine]:
    """Claims of one status in one card: their titles if these fit into ``most`` lines, else their ids."""
    titles = "\u00a0· ".join(f"{c.id}\u00a0{c.title}" for c in chips)
    listed = fit(figure, titles, room, theme.SMALL, lines=most)
    if listed.cut:
        listed = fit(figure, ", ".join(c.id for c in chips), room, theme.SMALL, lines=most)
    if listed.cut:
        listed = fit(figure, f"{len(chips)} more, {chips[0].id} to {chips[-1].id}", room, theme.SMALL, lines=most)
    looks = {"fontsize": theme.SMALL, "color": theme.MUTED}
    verdict = _verdict(chips[0].status)
    note = chips[0].note if len({c.note for c in chips}) == 1 else ""
    if width(figure, note, theme.SMALL) <= room - width(figure, verdict[0][0], theme.SMALL, "semibold") - 10:
        verdict.append((note, "right", looks))
    return [*[[(line, "left", looks)] for line in listed.lines], verdict]


def _verdict(status: StatusName) -> ChipLine:
    looks = {"fontsize": theme.SMALL, "weight": "semibold", "color": theme.STATUS_COLORS[status]}
    return [(f"{theme.STATUS_MARKS[status]} {theme.STATUS_WORDS[status]}", "left", looks)]


def _draw_chip(figure: Figure, name: str, status: StatusName, lines: Sequence[ChipLine], box: Box) -> None:
    card = _card(figure, box, f"card-chip-{name}", radius=9.0)
    low = HEIGHT - box.bottom
    color = theme.STATUS_COLORS[status]
    bar = Rectangle((box.left, low), 7, box.height, transform=_pixels(figure), facecolor=color, zorder=-1)
    figure.add_artist(bar)
    bar.set_clip_path(card)
    for i, line in enumerate(lines):
        y = box.top + 8 + LINE * (i + 0.5)
        if i == len(lines) - 1:  # the verdicts of a row stand on one line
            y = box.bottom - 8 - LINE / 2
        for text, side, looks in line:
            x = box.left + 18 if side == "left" else box.right - 11
            rest = {k: v for k, v in looks.items() if k != "fontsize"}
            _write(figure, x, y, text, looks["fontsize"], f"chip-{name}-text", ha=side, **rest)
