"""The page of one network's portrait: one self-contained HTML file, as the digest's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlcollage.collage.digest import PORTRAIT, data_uri, render_template, webp

_MARKS = {"measured": "✓", "does not apply": "○", "failed": "✗", "no time": "◌"}
_CLASSES = {"measured": "supported", "does not apply": "untested", "failed": "contradicted", "no time": "pending"}


@dataclass(frozen=True)
class Section:
    """What one instrument said.

    Parameters
    ----------
    name, title, question, paper
        Of the instrument.
    state
        ``"measured"``, ``"does not apply"``, ``"failed"`` or ``"no time"``.
    sentence
        Why there is nothing, where there is nothing.
    seconds
        How long it took.
    numbers
        Rows of (quantity, value with interval, what the interval speaks of, beside which recorded networks).
    health
        Sentences.
    columns, layers
        Names and rows of the table by layer.
    """

    name: str
    title: str
    question: str
    paper: str
    state: str
    sentence: str = ""
    seconds: str = ""
    numbers: Sequence[tuple[str, str, str, str]] = ()
    health: Sequence[str] = ()
    columns: Sequence[str] = ()
    layers: Sequence[Sequence[str]] = field(default_factory=tuple)

    @property
    def mark(self) -> str:
        """Mark of the state."""
        return _MARKS[self.state]

    @property
    def css(self) -> str:
        """Class of the state's color."""
        return _CLASSES[self.state]


def render_portrait(
    title: str,
    lead: str,
    sections: Sequence[Section],
    *,
    notes: Sequence[str] = (),
    slide: Path | None = None,
    slide_alt: str = "",
    description: str = "",
    command: str = "",
    foot: str = "",
    links: Sequence[tuple[str, str]] = (),
    named: str = "Question",
) -> str:
    """A complete HTML document; the same content gives the same text.

    Parameters
    ----------
    title, lead
        Heading, and what stands below it.
    sections
        One for each instrument.
    notes
        What was decided when the network was read.
    slide
        Its picture as SVG, with the upright PNG beside it; None for none.
    slide_alt, description
        Short and long text alternative of the picture.
    command
        What makes the page again.
    foot
        Machine, versions and date.
    links
        (label, relative path) of the data.
    named
        What the sections are called.
    """
    picture = upright = ""
    if slide is not None:
        picture = data_uri(slide.read_bytes(), "image/svg+xml")
        tall = slide.with_name(f"{slide.stem}-portrait.png")
        upright = webp(tall, PORTRAIT) if tall.is_file() else ""
    measured = [s for s in sections if s.state == "measured"]
    return render_template(
        "portrait.html.j2",
        title=title,
        description=lead,
        preview="",
        lead=lead,
        sections=sections,
        measured=measured,
        others=[s for s in sections if s.state != "measured"],
        compared=any(row[3] for s in measured for row in s.numbers),
        notes=notes,
        slide=picture,
        upright=upright,
        slide_alt=slide_alt,
        told=description,
        command=command,
        foot=foot,
        links=links,
        named=named,
    )
