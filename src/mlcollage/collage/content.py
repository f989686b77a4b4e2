"""What a slide and a digest page are made of: plain data, no drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from mlcollage.errors import InvalidInput

MOST_ALT = 300
SERIES = 52  # one-page pictures in the series, one for each week of its year

StatusName = Literal["supported", "contradicted", "inconclusive", "untested", "pending"]


@dataclass(frozen=True)
class Panel:
    """One measured picture.

    Parameters
    ----------
    title
        What the reader should see. A panel that shows a claim gets the claim's finding in its place.
    draw
        Draws into an ``Axes`` prepared by the theme; with ``own_axes=True`` it gets a ``SubFigure`` and makes its own.
    alt
        Text alternative: what the picture shows, with its main numbers; at most 300 characters.
    subtitle
        Quantity and unit, e.g. ``"test accuracy (%) along training"``. A measured panel needs it.
    claim
        Id of the claim that the panel shows. Its finding, a full sentence with its number that says what came out, is
        printed above the picture, whatever the verdict.
    """

    title: str
    draw: Callable[[Axes], None] | Callable[[SubFigure], None]
    alt: str
    subtitle: str = ""
    claim: str = ""
    own_axes: bool = False


@dataclass(frozen=True)
class Collage:
    """What a paper's ``slide.py`` returns: one idea, one dominant picture, and two or three small ones.

    Parameters
    ----------
    tagline
        The idea in a few words.
    idea
        The paper's picture and its equation; its title and subtitle explain it to a newcomer.
    main
        The dominant picture: the one that someone sees who looks for ten seconds.
    panels
        One to three small pictures.
    data, network
        What was measured, e.g. ``"Fashion-MNIST 14×14, 1,000 images"`` and ``"MLP 128-128"``; printed in the foot.
    """

    tagline: str
    idea: Panel
    main: Panel
    panels: Sequence[Panel]
    data: str
    network: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.panels) <= 3:
            raise InvalidInput(f"a slide has one to three small panels beside the main one, not {len(self.panels)}.")
        for name in ("data", "network"):
            if not getattr(self, name).strip():
                raise InvalidInput(f"a slide names its {name}; {name} is empty.")
        for panel in (self.main, *self.panels):
            if not panel.subtitle.strip():
                raise InvalidInput(f"panel {panel.title!r} needs a subtitle that names its quantity and unit.")
        for panel in (self.idea, self.main, *self.panels):
            if not 0 < len(panel.alt) <= MOST_ALT:
                raise InvalidInput(
                    f"the text alternative of panel {panel.title!r} has {len(panel.alt)} characters; "
                    f"give 1 to {MOST_ALT}."
                )


@dataclass(frozen=True)
class IntervalPlot:
    """An effect and its interval beside the reference value, in the units in which they are printed.

    ``margin_from`` to ``margin_to`` is the range of effects too small to matter; ``claimed`` is the range of those
    that the claim asserts, with infinity where it has no end.
    """

    estimate: float
    lo: float
    hi: float
    reference: float
    margin_from: float
    margin_to: float
    log: bool = False
    claimed: tuple[float, float] | None = None


@dataclass(frozen=True)
class Card:
    """One claim on a slide: as registered, and what came out.

    ``needs`` says what the interval does not show: what the effect must be, where that is a limit or a range
    (``"needs ≤ 0.1"``), or the p value that leaves a verdict open.
    """

    id: str
    title: str
    paper: str
    ours: str
    status: StatusName
    note: str = ""
    headline: bool = False
    finding: str = ""
    plot: IntervalPlot | None = None
    needs: str = ""


@dataclass(frozen=True)
class Slide:
    """A whole slide."""

    slug: str
    title: str
    byline: str
    month: str
    collage: Collage
    cards: Sequence[Card]
    foot_left: str
    foot_right: str
    number: int | None = None  # in the series of one-page pictures

    @property
    def label(self) -> str:
        """Name, number and month of the series."""
        place = "" if self.number is None else f" {self.number} of {SERIES}"
        return f"ML collage{place}  ·  {self.month}"


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
    title: str = ""
    finding: str = ""
    headline: bool = False
    needs: str = ""


@dataclass(frozen=True)
class Entry:
    """One paper on a digest page or in the index.

    ``state``: ``measured`` (slide and verdicts exist), ``built`` (method and study exist, not run here), ``planned``.
    ``finding`` is the sentence above the dominant picture; ``slide_alt`` has at most 300 characters, and
    ``description`` tells the whole slide. ``picture`` is the address of the slide as a PNG, seen from the page.
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
    number: int | None = None
    tagline: str = ""
    official_code: str = ""
    finding: str = ""
    description: str = ""
    picture: str = ""
