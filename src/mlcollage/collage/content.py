"""What a slide and a digest page are made of: plain data, no drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

StatusName = Literal["supported", "contradicted", "inconclusive", "untested"]


@dataclass(frozen=True)
class Panel:
    """One measured picture.

    Parameters
    ----------
    title, subtitle
        What the reader should see, and what is plotted (both printed above the axes by the slide).
    draw
        Draws into an ``Axes`` prepared by the theme; with ``own_axes=True`` it gets a ``SubFigure`` and makes its own.
    alt
        Text alternative: what the picture shows, with its main numbers.
    wide
        Takes two columns.
    """

    title: str
    draw: Callable[[Axes], None] | Callable[[SubFigure], None]
    alt: str
    subtitle: str = ""
    own_axes: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Collage:
    """What a paper's ``slide.py`` returns: the idea and three to five measured panels."""

    tagline: str
    idea: Panel
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Chip:
    """One field of the verdict strip."""

    id: str
    title: str
    paper: str
    ours: str
    status: StatusName
    note: str = ""
    headline: bool = False


@dataclass(frozen=True)
class Slide:
    """A whole slide."""

    slug: str
    title: str
    byline: str
    month: str
    collage: Collage
    chips: Sequence[Chip]
    foot_left: str
    foot_right: str


@dataclass(frozen=True)
class ClaimRow:
    """One row of a digest's claims table: the claim as registered, and what came out."""

    id: str
    sentence: str
    source: str
    paper: str
    estimand: str
    test: str
    smallest_effect: str
    ours: str
    seeds: int
    p_value: str
    status: StatusName
    reason: str = ""
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Entry:
    """One paper on a digest page or in the index.

    ``state``: ``measured`` (slide and verdicts exist), ``built`` (method and study exist, not run here), ``planned``.
    """

    slug: str
    title: str
    authors: str
    venue: str
    month: str
    arxiv: str
    ideas: Sequence[str]
    state: Literal["measured", "built", "planned"]
    summary: str = ""
    usage: str = ""
    slide_svg: Path | None = None
    slide_alt: str = ""
    claims: Sequence[ClaimRow] = ()
    data_links: Sequence[tuple[str, str]] = field(default_factory=tuple)
    foot: str = ""
