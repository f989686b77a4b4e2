"""Text that fits: measured with the renderer, wrapped at words, set smaller only down to the smallest size allowed."""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text

from mlcollage.collage import theme

_PIECES = re.compile(r"(?:\$[^$]*\$|[^ \n$]|\$)+?(?= |\n|$)")  # a formula or a no-break space is never broken


T = TypeVar("T")


def drawable(thing: T) -> T:
    r"""A text, or a dataclass with all its texts, as it can be drawn.

    Control characters and those that turn the direction of writing are left out. Where what stands between dollar
    signs is no formula that matplotlib can set, the dollar signs are printed as they are.

    Examples
    --------
    >>> drawable("from $5 to $9 and $x_1"), drawable("$x_1$ wins")
    ('from \\$5 to \\$9 and \\$x_1', '$x_1$ wins')
    """
    made: Any = thing
    if isinstance(thing, str):
        made = "".join(
            c for c in thing if c == "\n" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _TURNS)
        )
        # A single dollar sign, a price for instance, would begin a formula and fail.
        if not _is_formula(made):
            made = re.sub(r"(?<!\\)\$", r"\$", made)
    # Slides and panels: every text in them, however deep.
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        names = [f.name for f in dataclasses.fields(thing)]
        made = dataclasses.replace(thing, **{name: drawable(getattr(thing, name)) for name in names})
    elif isinstance(thing, Sequence):
        made = [drawable(part) for part in thing]
    return made


_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@functools.lru_cache(maxsize=4096)
def _is_formula(text: str) -> bool:
    """Whether matplotlib can set every line of the text."""
    if "$" not in text:
        return True
    if len(re.findall(r"(?<!\\)\$", text)) % 2:
        return False
    try:
        for line in text.split("\n"):
            MathTextParser("path").parse(line)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Fitted:
    """Lines of text and the size, in points, at which they fit; ``cut`` when the end had to be left out."""

    lines: tuple[str, ...]
    size: float
    cut: bool = False

    @property
    def text(self) -> str:
        """The lines in one string."""
        return "\n".join(self.lines)


def width(figure: Figure, text: str, size: float, weight: str = "normal", slant: str = "normal") -> float:
    """Width of one line in pixels, in the style that is in force."""
    return _width(text, round(size, 3), weight, slant, figure.dpi, tuple(mpl.rcParams["font.family"]))


@functools.lru_cache(maxsize=4096)
def _width(text: str, size: float, weight: str, slant: str, dpi: float, family: tuple[str, ...]) -> float:
    figure = Figure(dpi=dpi)
    artist = Text(0, 0, text, fontsize=size, fontweight=weight, fontstyle=slant, fontfamily=list(family))
    artist.set_figure(figure)
    return float(artist.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width)


def wrap(
    figure: Figure, text: str, room: float, size: float, weight: str = "normal", slant: str = "normal"
) -> list[str]:
    """Break at spaces so that each line is at most ``room`` pixels wide; a single word may stay wider.

    A newline in the text is kept as a break.
    """
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in _PIECES.findall(paragraph):
            longer = f"{line} {word}" if line else word
            if line and width(figure, longer, size, weight, slant) > room:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return [line for line in lines if line]


def balance(figure: Figure, fitted: Fitted, room: float, *, weight: str = "normal") -> Fitted:
    """The same text on as many lines of nearly equal length, so that no single word is left for the last."""
    if fitted.cut or len(fitted.lines) < 2:
        return fitted
    best = fitted.lines
    # The narrowest room that needs no further line; words may not be wider than the room.
    for share in (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55):
        lines = wrap(figure, " ".join(fitted.lines), share * room, fitted.size, weight)
        if len(lines) > len(fitted.lines) or any(width(figure, x, fitted.size, weight) > room for x in lines):
            break
        best = tuple(lines)
    return dataclasses.replace(fitted, lines=best)


def fit(
    figure: Figure,
    text: str,
    room: float,
    size: float,
    *,
    lines: int = 1,
    smallest: float = theme.MIN_SIZE,
    weight: str = "normal",
    slant: str = "normal",
) -> Fitted:
    """Largest setting of the text, not above ``size``, that takes at most ``lines`` lines of ``room`` pixels.

    Shrinks in steps of half a point. Where even the smallest size is too large, the last line ends in an ellipsis;
    the whole text is in the slide's text alternative and in the digest.
    """
    now = size
    while True:
        set_lines = wrap(figure, text, room, now, weight, slant)
        widest = max((width(figure, line, now, weight, slant) for line in set_lines), default=0.0)
        if len(set_lines) <= lines and widest <= room:
            return Fitted(tuple(set_lines), now)
        if now <= smallest:
            break
        now = max(smallest, now - 0.5)
    kept = set_lines[:lines]
    lost = len(set_lines) > lines
    for i, line in enumerate(kept):
        tail = "…" if (lost and i == len(kept) - 1) or width(figure, line, now, weight, slant) > room else ""
        while tail and line and width(figure, line + tail, now, weight, slant) > room:
            line = line[:-1].rstrip(" ,;:·")
        kept[i] = line + tail
    return Fitted(tuple(kept), now, cut=True)
