"""The slide of one network: what is read through its depth, beside calibration, the CKA map and its curvature."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from mlcollage.collage import Collage, Diagram, Panel, Slide, marks, theme
from mlcollage.portraits.instrument import Number, Reading
from mlcollage.portraits.recorded import by_network

THIS = theme.PALETTE["vermillion"]
PROBE, SELECTIVE, WIDE = theme.PALETTE["blue"], theme.PALETTE["green"], theme.PALETTE["purple"]
_KEY = (
    *("accuracy", "r2", "ece", "nll", "rmse", "selectivity", "dimensions", "tr_fisher", "tr_hessian"),
    *("conservation laws", "moved", "uniformity", "likeness to untrained", "attention reach", "skip ratio"),
    *("confidence changed", "online gap"),
)
_SHORT = {
    "accuracy": "accuracy", "r2": "R²", "ece": "calibration error", "nll": "NLL (nats)", "rmse": "RMSE",
    "selectivity": "class selectivity", "dimensions": "dimensions (mean)", "tr_fisher": "Tr(F)", "tr_hessian": "Tr(H)",
    "conservation laws": "conservation laws", "moved": "of these moved", "uniformity": "uniformity",
    "likeness to untrained": "CKA with untrained", "attention reach": "attention reach", "skip ratio": "skip ratio",
    "confidence changed": "posterior: sure", "online gap": "online gap", "brier": "Brier score",
    "best probe accuracy": "best probe", "first probe accuracy": "first probe",
    "dimensions of the last layer": "dimensions (last)", "dead units": "dead units", "overconfidence": "overconfidence",
}  # fmt: skip


def slug_of(name: str) -> str:
    """A file name without ending.

    Examples
    --------
    >>> slug_of("My Net (v2)")
    'portrait-my-net-v2'
    """
    return "portrait-" + (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "network")


def make_slide(
    name: str, facts: Mapping[str, Any], asked: Sequence[Reading], *, minutes: float = 0.0, seconds: float = 0.0
) -> Slide:
    """The slide of a portrait: the widest picture that was measured is the dominant one."""
    readings = {r.instrument: r for r in asked if r.state == "measured"}
    makers: list[Callable[[dict[str, Reading]], Panel | None]] = [
        _among, _depth, _reliability, _scatter, _map, _heads, _curvature, _moved, _fills,
    ]  # fmt: skip
    panels = [p for make in makers if (p := make(readings)) is not None] or [_nothing()]
    main, small = panels[0], panels[1:4] or [_counts(asked)]
    f = facts
    return Slide(
        slug=slug_of(name),
        title=f"Portrait of {name}",
        byline=f"{f['class']}  ·  {f['parameters']:,} parameters  ·  task: {f['task']}",
        month=str(f["date"]),
        collage=Collage(
            f"{len(readings)} of {len(asked)} instruments measured",
            _key(readings),
            main,
            small,
            data=f"{f['test examples']:,} test examples",
            network=str(f["class"]),
        ),
        cards=[],
        foot_left=f"{f['test examples']:,} test examples  ·  {f['training examples read']:,} training ones read  ·  "
        f"{seconds:,.0f} of {60 * minutes:,.0f} s  ·  brackets: 95% intervals",
        foot_right=f"mlcollage {f['mlcollage']}  ·  torch {f['torch']}  ·  {f['date']}",
    )


def _headlines(readings: dict[str, Reading]) -> dict[str, Number]:
    return {n.quantity: n for r in readings.values() for n in r.numbers if not n.layer}


def _key(readings: dict[str, Reading]) -> Panel:
    found = _headlines(readings)
    chosen = [q for q in _KEY if q in found][:15]

    def draw(ax: Axes) -> None:
        d = Diagram(ax, 374, 44.0 * max(len(chosen), 8))
        for i, quantity in enumerate(chosen):
            n, y = found[quantity], 44.0 * i + 22
            d.note(0, y, _SHORT.get(quantity, quantity), ha="left", color=theme.MUTED)
            ends = "" if np.isnan(n.low) else f"  [{_text(n.low)}, {_text(n.high)}]"
            d.note(374, y, f"{_text(n.value)}{ends}", ha="right", color=theme.INK, weight="semibold")
            if i:
                d.line((0, y - 22), (374, y - 22), color=theme.RULE, width=1.0)

    words = "; ".join(f"{_SHORT.get(q, q)} {_text(found[q].value)}" for q in chosen) or "nothing was measured"
    return Panel("In numbers", draw, words[:299], "with 95% intervals; of what each speaks stands on the page")


def _text(value: float) -> str:
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3f}" if abs(value) < 1 else f"{value:.3g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.1e}"


# --- panels -----------------------------------------------------------------------------------------------------------


def _among(readings: dict[str, Reading]) -> Panel | None:
    """Each number on the scale of the recorded networks."""
    found = _headlines(readings)
    rows = [q for q in (*_KEY, "brier", "best probe accuracy") if q in found and len(by_network(q)) >= 4][:12]
    if len(rows) < 4:
        return None

    def draw(ax: Axes) -> None:
        for i, quantity in enumerate(rows):
            n = found[quantity]
            x = _scale([*by_network(quantity).values(), n.value])
            others = [x(v) for v in by_network(quantity).values()]
            ax.plot([0, 1], [i, i], color=theme.GRID, linewidth=1.4, zorder=0)
            ax.plot(others, [i] * len(others), "o", color=theme.GRAYS[3], markersize=9, zorder=1)
            if not np.isnan(n.low):
                ax.plot([x(n.low), x(n.high)], [i, i], color=THIS, zorder=2)
            ax.plot(x(n.value), i, "o", color=THIS, markersize=13, zorder=3)
            ax.text(-0.05, i, _SHORT.get(quantity, quantity), ha="right", va="center", color=theme.INK)
            ax.text(1.05, i, _text(n.value), ha="left", va="center", color=theme.ink(THIS), weight="semibold")
        ax.set_ylim(len(rows) - 0.5, -0.6)
        ax.set_xlim(-0.04, 1.04)
        ax.set_axis_off()

    extreme = sum(
        not min(by_network(q).values()) <= found[q].value <= max(by_network(q).values()) for q in rows
    )  # fmt: skip
    title = (
        "Within the range of the recorded networks in every number"
        if not extreme
        else f"Outside the range of the recorded networks in {extreme} of {len(rows)} numbers"
    )
    words = "; ".join(f"{_SHORT.get(q, q)} {_text(found[q].value)}" for q in rows)
    return Panel(
        title,
        draw,
        f"Rows of dots for recorded networks, with this network among them: {words}"[:299],
        "each row from the smallest to the largest value (logarithmic where they differ 50-fold); gray: networks of "
        "the matrix on its own data, orange: this one",
    )


def _scale(values: Sequence[float]) -> Callable[[float], float]:
    """From a value to its place between the smallest and the largest, 0 to 1; logarithmic where they differ 50-fold."""
    low, high = min(values), max(values)
    log = low > 0 and high / low > 50

    def place(value: float) -> float:
        start, end, v = (math.log(max(u, 1e-300)) for u in (low, high, value)) if log else (low, high, value)
        return min(max((v - start) / ((end - start) or 1.0), -0.03), 1.03)

    return place


def _depth(readings: dict[str, Reading]) -> Panel | None:
    """Probes, selectivity and the share of dimensions used, through the depth of the network."""
    lines: dict[str, tuple[str, list[Number]]] = {}
    if "probes" in readings:
        quantity = "probe accuracy" if readings["probes"].by_layer("probe accuracy") else "probe R²"
        lines[quantity] = (PROBE, readings["probes"].by_layer(quantity))
    if "selectivity" in readings:
        lines["class selectivity"] = (SELECTIVE, readings["selectivity"].by_layer("selectivity"))
    if "dimensions" in readings:
        wide = {n.layer: n.value for n in readings["dimensions"].by_layer("units")}
        share = [
            Number(n.quantity, n.value / wide[n.layer], n.low / wide[n.layer], n.high / wide[n.layer], layer=n.layer)
            for n in readings["dimensions"].by_layer("dimensions")
        ]
        lines["share of dimensions used"] = (WIDE, share)
    lines = {k: v for k, v in lines.items() if len(v[1]) >= 2}
    if not lines:
        return None
    names = max((list(dict.fromkeys(n.layer for n in v)) for _, v in lines.values()), key=len)

    def draw(ax: Axes) -> None:
        for label, (color, numbers) in lines.items():
            at = [names.index(n.layer) for n in numbers if n.layer in names]
            own = [n for n in numbers if n.layer in names]
            theme.band(ax, at, [n.low for n in own], [n.high for n in own], color)
            ax.plot(at, [n.value for n in own], "o-", color=color, zorder=3)
            theme.label_line_end(ax, at[-1], own[-1].value, label, color)
        low = min(0.0, *(n.value for _, v in lines.values() for n in v))
        ax.set_ylim(low - 0.02, 1.04)
        ax.set_xticks([0, len(names) - 1], [_short(names[0]), _short(names[-1])])
        ax.set_xlabel("layers in the order of execution")
        theme.tidy(ax, grid="y", ticks=5)
        theme.spread_labels(ax)

    best = next(iter(lines))
    first, last = lines[best][1][0].value, lines[best][1][-1].value
    title = f"{best[:1].upper()}{best[1:]}: {first:.2f} in the first layer, {last:.2f} in the last"
    said = "; ".join(f"{k}: {v[0].value:.2f} to {v[-1].value:.2f}" for k, (_, v) in lines.items())
    return Panel(title, draw, f"Layer by layer, {said}."[:299], "share, from 0 to 1, in each layer that was read")


def _short(name: str) -> str:
    name = f"layer {name}" if name.isdigit() else name
    return name if len(name) <= 22 else "…" + name[-21:]


def _reliability(readings: dict[str, Reading]) -> Panel | None:
    if "quality" not in readings or "confidence" not in readings["quality"].arrays:
        return None
    reading = readings["quality"]
    a = reading.arrays
    gap, over = reading.headline("ece"), reading.headline("overconfidence")
    assert gap is not None
    assert over is not None
    word = "more" if over.value > 0 else "less"

    def draw(ax: Axes) -> None:
        ax.plot([0, 1], [0, 1], color=theme.GRAYS[0], linewidth=1.4)
        ax.scatter(a["confidence"], a["right"], s=20 + 260 * a["share"], color=PROBE, zorder=3)
        ax.set(xlim=(0, 1.03), ylim=(-0.03, 1.03), xlabel="confidence", ylabel="share right")
        theme.tidy(ax, ticks=3)

    return Panel(
        f"{abs(over.value):.1%} {word} sure than right",
        draw,
        f"Confidence against share of right answers in bins; calibration error {gap.value:.3f}.",
        f"share right by confidence; ECE {gap.value:.3f}",
    )


def _scatter(readings: dict[str, Reading]) -> Panel | None:
    if "quality" not in readings or "predicted" not in readings["quality"].arrays:
        return None
    a, r2 = readings["quality"].arrays, readings["quality"].headline("r2")
    assert r2 is not None

    def draw(ax: Axes) -> None:
        ends = [min(a["target"].min(), a["predicted"].min()), max(a["target"].max(), a["predicted"].max())]
        ax.plot(ends, ends, color=theme.GRAYS[0], linewidth=1.4)
        ax.plot(a["target"], a["predicted"], "o", color=PROBE, markersize=4, alpha=0.5, markeredgewidth=0)
        ax.set(xlabel="target", ylabel="predicted")
        theme.tidy(ax, ticks=3)

    return Panel(
        f"It explains {r2.value:.0%} of the variance", draw, f"Predictions against targets; R² {r2.value:.3f}.",
        "predictions against targets, first output",
    )  # fmt: skip


def _map(readings: dict[str, Reading]) -> Panel | None:
    if "likeness" not in readings or len(readings["likeness"].arrays["map"]) < 4:
        return None
    reading = readings["likeness"]
    u = reading.headline("uniformity")
    assert u is not None
    m = reading.arrays["map"]

    def draw(figure: SubFigure) -> None:
        ax, key = figure.subplots(1, 2, width_ratios=[14, 1])
        colors = theme.sequential()
        ax.imshow(m, cmap=colors, vmin=0, vmax=1, origin="lower", aspect="auto")
        ax.set(xticks=[0, len(m) - 1], yticks=[0, len(m) - 1])
        ax.set_xticklabels(["first", "last layer"])
        ax.set_yticklabels(["first", "last"])
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        marks.color_scale(key, colors, (0.0, 1.0), "{:.0f}")

    return Panel(
        f"Early and late layers are {u.value:.2f} alike",
        draw,
        f"Map of CKA between all {len(m)} layers; mean of the first quarter with the last {u.value:.2f}.",
        f"CKA of {len(m)} layers with one another",
        own_axes=True,
    )


def _heads(readings: dict[str, Reading]) -> Panel | None:
    if "attention" not in readings:
        return None
    reading = readings["attention"]
    heads, n = reading.arrays["heads"], reading.headline("attention distance")
    assert n is not None

    def draw(ax: Axes) -> None:
        for i, row in enumerate(heads):
            ax.plot([i + 1] * len(row), row, "o", color=PROBE, markersize=6, alpha=0.7, markeredgewidth=0)
        ax.set(xlabel="block", ylabel=n.unit)
        ax.set_ylim(bottom=0)
        theme.tidy(ax, grid="y", ticks=4)

    return Panel(
        f"Heads look {n.value:.1f} {n.unit} far", draw, f"Mean distance of {heads.size} heads by block, {n}.",
        f"attention distance of each head ({n.unit})",
    )  # fmt: skip


def _curvature(readings: dict[str, Reading]) -> Panel | None:
    if "fisher" not in readings:
        return None
    layers = readings["fisher"].by_layer("tr_fisher")
    total = readings["fisher"].headline("tr_fisher")
    assert total is not None
    if len(layers) < 2 or total.value <= 0:
        return None
    shares = np.array([n.value for n in layers]) / total.value
    top = int(shares.argmax())

    def draw(ax: Axes) -> None:
        ax.bar(range(len(shares)), shares, color=THIS, width=0.8)
        ax.set_xticks([0, len(shares) - 1], [_short(layers[0].layer)[-12:], _short(layers[-1].layer)[-12:]])
        theme.tidy(ax, grid="y", ticks=3)

    return Panel(
        f"{shares[top]:.0%} of Tr(F) is in {_short(layers[top].layer)}",
        draw,
        f"Share of the trace of the Fisher matrix by layer; {_short(layers[top].layer)} has {shares[top]:.0%}.",
        f"share of Tr(F) = {_text(total.value)} by layer",
    )


def _moved(readings: dict[str, Reading]) -> Panel | None:
    if "laws" not in readings or readings["laws"].headline("moved") is None:
        return None
    laws, n = readings["laws"].by_layer("moved"), readings["laws"].headline("moved")
    assert n is not None
    laws = laws[:12]

    def draw(ax: Axes) -> None:
        for i, law in enumerate(laws):
            ax.plot([law.low, law.high], [i, i], color=SELECTIVE)
            ax.plot(law.value, i, "o", color=SELECTIVE)
        ax.set_yticks(range(len(laws)), [_short(law.layer.partition(":")[0]) for law in laws])
        ax.invert_yaxis()
        ax.set_xlabel("share moved")
        theme.tidy(ax, grid="x", ticks=3)

    return Panel(
        f"Training moved {n.value:.0%} of what symmetries conserve", draw,
        f"Median share by which conserved quantities moved, {n.value:.2f}.", "median and quartiles over the laws",
    )  # fmt: skip


def _fills(readings: dict[str, Reading]) -> Panel | None:
    """The numbers that speak of one layer or of none, where there is no other picture."""
    skips = readings.get("skips")
    if skips is None:
        return None
    values = [n.value for n in skips.by_layer("skip ratio")]

    def draw(ax: Axes) -> None:
        ax.plot(range(1, len(values) + 1), values, "o-", color=WIDE)
        ax.axhline(1, color=theme.GRAYS[0], linewidth=1.4)
        ax.set_xlabel("residual sum")
        theme.tidy(ax, grid="y", ticks=4)

    return Panel(
        "Skips against blocks", draw, f"Norm of skip over block for {len(values)} residual sums.",
        "norm of the skip over norm of the block",
    )  # fmt: skip


def _say(lines: Sequence[str]) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", color=theme.MUTED, transform=ax.transAxes)

    return draw


def _nothing() -> Panel:
    return Panel("No picture could be drawn", _say(["◌ see the page for the reasons"]), "No picture.", "nothing to see")


def _counts(asked: Sequence[Reading]) -> Panel:
    states = [r.state for r in asked]
    lines = [f"{states.count(s)} {s}" for s in dict.fromkeys(states)]
    return Panel("What was asked", _say(lines), "; ".join(lines), f"{len(states)} instruments")
