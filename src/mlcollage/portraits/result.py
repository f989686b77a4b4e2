"""A portrait: what was read of one network, as a table, a page, a picture and files."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from mlcollage import __version__
from mlcollage.collage import Section, render_portrait, render_slide
from mlcollage.collage.content import Slide
from mlcollage.collage.slide import describe, short_alternative
from mlcollage.errors import UnknownName
from mlcollage.portraits.instrument import Number, Reading
from mlcollage.portraits.pictures import make_slide
from mlcollage.portraits.recorded import beside, places
from mlcollage.portraits.registry import INSTRUMENTS, titled
from mlcollage.portraits.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    *("instrument", "quantity", "layer", "value", "low", "high", "unit", "interval", "state", "sentence"),
    *("seconds", "recorded_low", "recorded_high", "recorded"),
)


@dataclass(frozen=True, eq=False)
class Portrait:
    """What the instruments said of one network; made by :func:`mlcollage.portrait`.

    Parameters
    ----------
    name
        What the network is called.
    facts
        Class, parameters, examples, task, versions, date, in plain values.
    readings
        One for each instrument, in the order of the page.
    notes
        What was decided when the network was read.
    minutes
        What was allowed.
    seconds
        What it took.
    """

    name: str
    facts: Mapping[str, Any]
    readings: Sequence[Reading]
    notes: Sequence[str] = ()
    minutes: float = 0.0
    seconds: float = 0.0
    command: str = field(default="", repr=False)

    @classmethod
    def of(cls, subject: Subject, readings: Sequence[Reading], minutes: float, seconds: float) -> Portrait:
        """The portrait of a prepared network."""
        facts = {
            "class": type(subject.model).__name__,
            "parameters": subject.parameters,
            "test examples": subject.test.size,
            "training examples read": subject.train.size if subject.train else 0,
            "untrained twin": subject.untrained is not None,
            "task": subject.task,
            "classes": subject.classes,
            "seed": subject.seed,
            "device": str(next((p.device for p in subject.model.parameters()), "cpu")),
            "dtype": str(next((p.dtype for p in subject.model.parameters()), "none")).removeprefix("torch."),
            "torch": torch.__version__,
            "mlcollage": __version__,
            "machine": platform.machine(),
            "date": datetime.date.today().isoformat(),
        }
        return cls(subject.name, facts, tuple(readings), tuple(subject.notes), minutes, seconds)

    def __getitem__(self, instrument: str) -> Reading:
        """What one instrument said.

        Raises
        ------
        UnknownName
            If it was not asked.
        """
        found = next((r for r in self.readings if r.instrument == instrument), None)
        if found is None:
            asked = ", ".join(r.instrument for r in self.readings)
            raise UnknownName(f"there is no reading {instrument!r}; there are {asked}.")
        return found

    def __repr__(self) -> str:
        states = [r.state for r in self.readings]
        return f"Portrait({self.name!r}, {states.count('measured')} of {len(states)} instruments measured)"

    @property
    def table(self) -> pd.DataFrame:
        """One row per number, whole-network numbers first; and one for each instrument without numbers.

        Columns: ``instrument, quantity, layer, value, low, high, unit, interval, state, sentence, seconds`` and the
        range of the recorded networks, ``recorded_low, recorded_high``, with where this one lies, ``recorded``.
        """
        rows: list[dict[str, Any]] = []
        for reading in self.readings:
            base: dict[str, Any] = {
                "instrument": reading.instrument,
                "state": reading.state,
                "sentence": reading.sentence,
            }
            base["seconds"] = round(reading.seconds, 3)
            for number in sorted(reading.numbers, key=lambda n: bool(n.layer)):
                fields = dataclasses.asdict(number)
                fields.pop("digits")
                low, high = places(number.quantity) if not number.layer else (math.nan, math.nan)
                told = beside(number) if not number.layer else ""
                rows.append({**base, **fields, "recorded_low": low, "recorded_high": high, "recorded": told})
            if not reading.numbers:
                nothing = dict.fromkeys(("value", "low", "high", "recorded_low", "recorded_high"), math.nan)
                rows.append({**base, **nothing, **dict.fromkeys(("quantity", "layer", "unit", "interval"), ""),
                             "recorded": ""})  # fmt: skip
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def number(self, quantity: str) -> Number | None:
        """The number of that name for the whole network, or None."""
        return next((n for r in self.readings if (n := r.headline(quantity)) is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, in plain values: what :meth:`save` writes as JSON."""

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        readings = [
            {
                "instrument": r.instrument,
                "state": r.state,
                "sentence": r.sentence,
                "seconds": round(r.seconds, 3),
                "health": list(r.health),
                "numbers": [{k: plain(v) for k, v in dataclasses.asdict(n).items()} for n in r.numbers],
            }
            for r in self.readings
        ]
        whole = {"name": self.name, "minutes": self.minutes, "seconds": round(self.seconds, 1)}
        return {**whole, "facts": dict(self.facts), "notes": list(self.notes), "readings": readings}

    def slide(self) -> Slide:
        """The slide, as :func:`mlcollage.collage.render_slide` draws it."""
        return make_slide(self.name, self.facts, self.readings, minutes=self.minutes, seconds=self.seconds)

    def plot(self, figure: Figure | None = None) -> Figure:
        """The dominant picture, into a figure of yours or a new one."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as NewFigure  # not pyplot, which would keep the figure

        if figure is None:
            figure = NewFigure(figsize=(9, 6), layout="constrained")
            FigureCanvasAgg(figure)  # labels are moved apart, for which they must be measured
        panel = self.slide().collage.main
        if panel.own_axes:
            panel.draw(figure.subfigures())  # type: ignore[arg-type]
        else:
            panel.draw(figure.add_subplot())  # type: ignore[arg-type]
        return figure

    def page(self, slide: Path | None = None, links: Sequence[tuple[str, str]] = ()) -> str:
        """The page, a self-contained HTML document; with the picture where its SVG is given."""
        picture = self.slide()
        counted = sum(r.state == "measured" for r in self.readings)
        f = self.facts
        lead = (
            f"{f['class']} with {f['parameters']:,} parameters, looked at with {f['test examples']:,} examples: "
            f"{counted} of {len(self.readings)} instruments measured within {self.seconds:,.0f} seconds."
        )
        return render_portrait(
            f"Portrait of {self.name}",
            lead,
            [_section(r) for r in self.readings],
            notes=self.notes,
            slide=slide,
            slide_alt=short_alternative(picture),
            description=describe(picture),
            command=self.command,
            foot=" · ".join(f"{k} {f[k]}" for k in ("mlcollage", "torch", "dtype", "device", "seed", "date")),
            links=links,
        )

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write the page, the slide, the JSON and the table.

        Parameters
        ----------
        folder
            Made if it is not there. Each file is replaced in one step.

        Returns
        -------
        dict of str to Path
            ``page`` (HTML), ``svg``, ``png``, ``portrait`` (upright), ``json``, ``parquet``.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        slide = self.slide()
        files = render_slide(slide, target, formats=("svg", "png", "portrait"))
        stem = slide.slug
        links = [
            ("every number (Parquet)", f"{stem}.parquet"),
            ("the same as JSON", f"{stem}.json"),
            ("slide (PNG)", f"{stem}.png"),
        ]
        text = {"json": json.dumps(self.to_dict(), indent=1), "html": self.page(files["svg"], links)}
        for ending, content in text.items():
            half = target / f".{stem}.{ending}.{os.getpid()}"
            half.write_text(content, "utf-8")
            files["page" if ending == "html" else ending] = half.replace(target / f"{stem}.{ending}")
        half = target / f".{stem}.parquet.{os.getpid()}"
        self.table.to_parquet(half, index=False)
        files["parquet"] = half.replace(target / f"{stem}.parquet")
        return files


def _section(reading: Reading) -> Section:
    instrument = next(i for i in INSTRUMENTS if i.name == reading.instrument)
    whole = [n for n in reading.numbers if not n.layer]
    layered = list(dict.fromkeys(n.quantity for n in reading.numbers if n.layer))
    names = list(dict.fromkeys(n.layer for n in reading.numbers if n.layer))
    cells = {(n.layer, n.quantity): str(n) for n in reading.numbers if n.layer}
    return Section(
        instrument.name,
        instrument.title,
        instrument.question,
        instrument.paper,
        reading.state,
        reading.sentence,
        f"{reading.seconds:.1f} s" if reading.state == "measured" else "",
        [(titled(n.quantity), str(n), n.interval, beside(n)) for n in whole],
        reading.health,
        ("layer", *layered),
        [(name, *(cells.get((name, q), "–") for q in layered)) for name in names],
    )
