"""Finds what a reader would: text that overlaps, is cut off, leaves its card or is too small."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text
from matplotlib.transforms import Bbox, BboxBase

from mlcollage.collage.theme import MIN_SIZE

SLACK = 2.0  # pixels: anti-aliasing and side bearings


def check_layout(fig: Figure) -> list[str]:
    """Sentences about what is wrong with the layout of a slide; an empty list when all is well.

    Checked for every visible text, tick labels included: it lies in the figure and in its own card, it overlaps no
    other text, was not cut, and is not set smaller than :data:`mlcollage.collage.theme.MIN_SIZE`. In the idea's
    drawing, text also lies on the canvas, in the shape that it names, across no edge of another shape, and no line or
    arrow runs through it. Call it within :func:`mlcollage.collage.theme.style` on the figure from
    ``build_figure``.
    """
    renderer = fig.canvas.get_renderer()  # type: ignore[attr-defined]
    fig.draw_without_rendering()
    cards = {str(p.get_gid())[5:]: p.get_window_extent(renderer) for p in fig.findobj(_is_card)}
    found = []
    placed: list[tuple[Text, str, Bbox]] = []
    for text, owner in _texts(fig):
        box = _letters(text, renderer)
        if box.width <= 0 or box.height <= 0:
            continue
        name = _quote(text)
        if not _inside(box, fig.bbox):
            found.append(f"{name} runs out of the slide.")
        elif owner in cards and not _inside(box, cards[owner]):
            found.append(f"{name} runs out of its card ({owner}).")
        size = float(text.get_fontsize())
        if size < MIN_SIZE - 0.05:
            found.append(f"{name} is set in {size:.1f} points; the smallest size is {MIN_SIZE}.")
        if "…" in text.get_text():
            found.append(f"{name} was cut to fit; make it shorter or its place larger.")
        placed.append((text, owner, box))
    for i, (one, _, a) in enumerate(placed):
        for other, _, b in placed[i + 1 :]:
            if min(a.x1, b.x1) - max(a.x0, b.x0) > SLACK and min(a.y1, b.y1) - max(a.y0, b.y0) > SLACK:
                found.append(f"{_quote(one)} overlaps {_quote(other)}.")
    for axes in fig.axes:
        if axes.get_gid() == "idea":
            found += _check_drawing(axes, [(text, box) for text, owner, box in placed if owner == "idea"], renderer)
    return found


def _check_drawing(axes: Axes, texts: list[tuple[Text, Bbox]], renderer: object) -> list[str]:
    """What is wrong between the texts of a diagram and its shapes, lines and canvas."""
    shapes = {str(p.get_gid()): p.get_window_extent(renderer) for p in axes.patches if p.get_gid()}  # type: ignore[arg-type]
    drawn: list[Line2D | FancyArrowPatch] = [*axes.lines, *(p for p in axes.patches if isinstance(p, FancyArrowPatch))]
    points = np.concatenate([_points(artist) for artist in drawn]) if drawn else np.empty((0, 2))
    found = []
    for text, box in texts:
        if text.axes is not axes:
            continue  # the title and subtitle of the card
        name, holder = _quote(text), str(text.get_gid() or "").removeprefix("in-")
        if not _inside(box, axes.get_window_extent(renderer)):  # type: ignore[arg-type]
            found.append(f"{name} runs out of the canvas.")
        for shape, extent in shapes.items():
            overlap = Bbox.intersection(box, extent)
            if overlap is None or min(overlap.width, overlap.height) <= SLACK:
                if shape == holder:
                    found.append(f"{name} lies outside its shape.")
            elif not _inside(box, extent):
                found.append(f"{name} runs {'out of its shape' if shape == holder else 'across the edge of a shape'}.")
        x, y = points.T
        inside = (x > box.x0 + SLACK) & (x < box.x1 - SLACK) & (y > box.y0 + SLACK) & (y < box.y1 - SLACK)
        if inside.any():
            found.append(f"a line runs through {name}.")
    return found


def _points(artist: Line2D | FancyArrowPatch) -> npt.NDArray[np.float64]:
    """Points along a line or an arrow, shape (n, 2), in pixels, at most a few of these apart."""
    path = artist.get_transform().transform_path(artist.get_path())
    along = np.linspace(0, 1, 60)[:, None]
    parts = [np.empty((0, 2))]
    for polygon in path.to_polygons(closed_only=False):
        corners = np.asarray(polygon, dtype=np.float64)
        parts += [a + along * (b - a) for a, b in itertools.pairwise(corners)]
    return np.concatenate(parts)


def _is_card(artist: Artist) -> bool:
    return str(artist.get_gid() or "").startswith("card-")


def _quote(text: Text) -> str:
    words = " ".join(text.get_text().split())
    return repr(words if len(words) <= 40 else words[:39] + "…")


def _inside(inner: Bbox, outer: BboxBase) -> bool:
    return bool(
        inner.x0 >= outer.x0 - SLACK
        and inner.x1 <= outer.x1 + SLACK
        and inner.y0 >= outer.y0 - SLACK
        and inner.y1 <= outer.y1 + SLACK
    )


def _letters(text: Text, renderer: object) -> Bbox:
    """Extent of the letters: a line box is taller than what is printed in it, so a sixth is taken off its height."""
    box = Text.get_window_extent(text, renderer)  # type: ignore[arg-type]  # an annotation without its arrow
    if text.get_rotation() % 180 == 0:
        return Bbox([[box.x0, box.y0 + box.height * 0.1], [box.x1, box.y1 - box.height * 0.07]])
    return box


def _texts(fig: Figure) -> Iterator[tuple[Text, str]]:
    """Every visible text with the name of the card that it belongs to."""
    seen: set[int] = set()
    parts: tuple[Figure | SubFigure, ...] = (*fig.subfigs, fig)
    for part in parts:
        for axes in _axes_of(part):
            owner = str(axes.get_gid() or part.get_gid() or "")
            not_drawn = _not_drawn(axes)
            for text in _found(axes):
                if id(text) not in seen and id(text) not in not_drawn and _shown(text):
                    yield text, owner
                seen.add(id(text))
        for text in _found(part):
            if id(text) not in seen and _shown(text):
                yield text, str(part.get_gid()) if isinstance(part, SubFigure) else _owner(str(text.get_gid() or ""))
            seen.add(id(text))


def _axes_of(part: Figure | SubFigure) -> list[Axes]:
    insets = [child for axes in part.axes for child in axes.child_axes if isinstance(child, Axes)]
    return [*part.axes, *insets]


def _found(artist: Artist) -> list[Text]:
    return [text for text in artist.findobj(Text) if isinstance(text, Text)]


def _owner(gid: str) -> str:
    """``panel-1-head`` belongs to ``panel-1``; ``band-title`` to ``band``."""
    return gid.rsplit("-", 1)[0]


def _not_drawn(axes: Axes) -> set[int]:
    """Tick labels that matplotlib keeps but does not draw: out of the view, or of a hidden axis."""
    hidden: set[int] = set()
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        slack = 1e-9 * ((high - low) or 1.0)
        shown = axis.get_visible() and axes.axison
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not shown or not low - slack <= float(tick.get_loc()) <= high + slack:
                hidden.update((id(tick.label1), id(tick.label2)))
        if not shown:
            hidden.update((id(axis.label), id(axis.offsetText)))
    return hidden


def _shown(text: Text) -> bool:
    return bool(text.get_visible() and text.get_text().strip() and text.get_alpha() != 0)
