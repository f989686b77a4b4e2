"""How the evidence on neural mechanics is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

# One meaning per color: the kind of law.
KINDS: Mapping[str, str] = {
    "translation": theme.PALETTE["green"],
    "scale": theme.PALETTE["blue"],
    "rescale": theme.PALETTE["vermillion"],
    "matrix": theme.PALETTE["purple"],
}
# What a kind conserves, and which layers have it.
LAWS: Mapping[str, tuple[str, str]] = {
    "translation": (r"$\langle\theta, 1\rangle$", "softmax"),
    "scale": (r"$\|\theta\|^2$", "batch norm"),
    "rescale": (r"$\|\theta_1\|^2-\|\theta_2\|^2$", "ReLU"),
    "matrix": (r"$QQ^T-KK^T$", "attention"),
}
QUANTITY = {"translation": "sum of weights", "scale": "squared norm of weights", "rescale": "difference of norms"}
NETWORKS = {"plain": "plain CNN", "norm": "CNN with batch norm", "user": "your model", "attention": "transformer"}


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """How norms move against their prediction, the drift by step size, and momentum."""
    arms = [a for a in NETWORKS if a in set(evidence.select("laws")["arm"])]
    return Collage(
        "symmetries conserve; training breaks them predictably",
        _idea(evidence),
        measured_panel("Measured and predicted", _curves, evidence),
        [
            measured_panel("Drift by learning rate", _drift, evidence),
            measured_panel("Momentum", _oscillator, evidence),
        ],
        data="Fashion-MNIST" if "user" not in arms else "the workload",
        network=", ".join(NETWORKS[a] for a in arms),
    )


def _idea(evidence: Evidence) -> Panel:
    rows = evidence.select("laws")
    counts = {k: int(rows[rows["kind"] == k].groupby("arm")["value"].max().sum()) for k in KINDS}
    on = "your model" if "user" in set(rows["arm"]) else "the networks"

    def draw(ax: Axes) -> None:
        d = Diagram(ax, 384, 330)
        _sphere(d, 92, 96, 58)
        d.note(186, 44, "Gradient flow stays", ha="left", color=KINDS["scale"], weight="semibold")
        d.note(186, 68, "on the surface.", ha="left", color=KINDS["scale"], weight="semibold")
        d.note(186, 104, "Finite steps, decay and", ha="left", color=theme.INK)
        d.note(186, 128, "momentum leave it.", ha="left", color=theme.INK)
        d.field(192, 252, 384, 146)
        for row, (kind, (law, source)) in enumerate(LAWS.items()):
            y = 196 + 36 * row
            d.note(12, y, source, ha="left", color=theme.INK)
            d.equation(176, y, law, size=16, room=150)
            number = f"{counts[kind]:,} found" if counts[kind] else "none found"
            d.note(374, y, number, ha="right", color=KINDS[kind], weight="semibold")

    found = ", ".join(f"{kind} {number}" for kind, number in counts.items())
    return Panel(
        "The idea",
        draw,
        f"A path on a sphere leaves it as training goes on. Four kinds of law and how many were found: {found}.",
        f"Softmax, batch norm, ReLU and attention conserve combinations of weights. Counted: laws of {on}.",
    )


def _sphere(d: Diagram, x: float, y: float, radius: float) -> None:
    """The sphere on which gradient flow stays, and a path of finite steps that leaves it."""
    color = KINDS["scale"]
    d.circle(x, y, radius, color=color, filled=False)
    t = np.linspace(0, np.pi, 60)
    for height, dash in ((0.3, "-"), (-0.3, marks.DASHED)):
        d.ax.plot(x + radius * np.cos(t), y + height * radius * np.sin(t), color=color, linewidth=1.2, linestyle=dash)
    along = np.linspace(0, 1, 14)
    angle, reach = np.pi * (0.92 + 0.72 * along), radius * (1 + 0.42 * along**2)
    path = np.stack([x + reach * np.cos(angle), y + reach * np.sin(angle)], axis=1)
    d.ax.plot(*path.T, "-o", color=theme.INK, linewidth=2.0, markersize=4, zorder=3)
    d.arrow(tuple(path[-2]), tuple(path[-1] + (path[-1] - path[-2])), width=2.0)


def _along(evidence: Evidence, name: str, **where: Any) -> pd.DataFrame:
    return evidence.across_seeds(f"{name}_along", **where)


def _against_theory(ax: Axes, measured: pd.DataFrame, predicted: pd.DataFrame, color: str) -> None:
    """What was measured, with its interval, under the dashed prediction."""
    theme.band(ax, measured.index, measured["lo"], measured["hi"], color, strength=0.25)
    ax.plot(measured.index, measured["mean"], color=color, linewidth=2 * theme.line_width())
    ax.plot(
        predicted.index, predicted["mean"], color=theme.INK, linewidth=0.7 * theme.line_width(), linestyle=marks.DASHED
    )


def _curves(evidence: Evidence) -> Panel:
    rows = evidence.select("measured_along", momentum=0.0)
    there = set(rows["kind"])
    kind = next(k for k in ("scale", "rescale", "translation") if k in there)
    order = ("user", "norm", "plain") if kind == "scale" else ("user", "plain", "norm")
    arm = next(a for a in order if ((rows["kind"] == kind) & (rows["arm"] == a)).any())
    where = {"arm": arm, "kind": kind, "momentum": 0.0}
    decays = sorted(rows[(rows["kind"] == kind) & (rows["arm"] == arm)]["weight_decay"].unique())
    curves = {
        v: [_along(evidence, what, weight_decay=v, **where) for what in ("measured", "predicted")] for v in decays
    }
    shades = np.linspace(0.4, 1.0, len(decays)) if len(decays) > 1 else [1.0]

    def draw(ax: Axes) -> None:
        for (decay, (measured, predicted)), shade in zip(curves.items(), shades, strict=True):
            color = theme.tint(KINDS[kind], float(shade))
            _against_theory(ax, measured, predicted, color)
            theme.label_line_end(ax, measured.index[-1], measured["mean"].iloc[-1], f"λ = {_short(decay)}", color)
        ax.axhline(1, color=theme.GRAYS[0], linewidth=1.6, linestyle=(0, (1, 2)), zorder=1)
        last = next(iter(curves.values()))[0].index[-1]
        ax.annotate("conserved", (last * 0.98, 1), (0, 5), textcoords="offset points", ha="right", va="bottom")
        ax.set_xlabel("steps of SGD")
        ax.margins(y=0.12)
        theme.tidy(ax, grid="y", ticks=5)

    ends = ", ".join(
        f"λ={decay:g}: {m['mean'].iloc[-1]:.4f} measured, {p['mean'].iloc[-1]:.4f} predicted"
        for decay, (m, p) in curves.items()
    )
    return Panel(
        "Measured and predicted",
        draw,
        f"{QUANTITY[kind].capitalize()} relative to its start, at the end of training: {ends}."[:300],
        f"{QUANTITY[kind]} over its start, {NETWORKS[arm]}; dashed: predicted, by weight decay λ",
        claim={"scale": "C4s", "rescale": "C4r", "translation": "C4t"}[kind],
    )


def _short(value: float) -> str:
    """1e-4 and not 0.0001."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 0.01 else f"{value:g}"


def _drift(evidence: Evidence) -> Panel:
    rows = evidence.select("drift")
    rows = rows[rows["kind"] != "translation"]  # conserved at any step size
    lines = {(str(a), str(k)): g.groupby("eta")["value"].mean() for (a, k), g in rows.groupby(["arm", "kind"])}
    if not lines:
        raise LookupError("no law drifts")
    slopes = {key: float(np.polyfit(np.log(v.index.to_numpy(float)), np.log(v), 1)[0]) for key, v in lines.items()}

    def draw(ax: Axes) -> None:
        for (arm, kind), line in lines.items():
            ax.plot(line.index, line, "-o", color=KINDS[kind], markersize=5)
            name = f"{kind}, BN" if arm == "norm" else kind
            theme.label_line_end(ax, line.index[-1], line.iloc[-1], name, KINDS[kind])
        first = next(iter(lines.values()))
        x = first.index.to_numpy(float)
        y = 0.4 * first.iloc[0] * x / x[0]
        ax.plot(x, y, color=theme.GRAYS[0], linewidth=1.6, linestyle=(0, (4, 3)))
        theme.label_line_end(ax, x[-1], y[-1], "slope 1", theme.GRAYS[2])
        ax.set(xscale="log", yscale="log", xlabel="rate η")
        theme.tidy(ax, grid="y")

    alt = ", ".join(f"{NETWORKS[arm]} {kind} {slope:.3f}" for (arm, kind), slope in slopes.items())
    return Panel(
        "Drift by learning rate",
        draw,
        f"Log-log slope of the drift over the learning rate: {alt}.",
        "drift over size, at one time ηk",
        claim="C3",
    )


def _oscillator(evidence: Evidence) -> Panel:
    rows = evidence.select("first_order_along")
    kind = next(k for k in KINDS if k in set(rows["kind"]))
    momentum = float(rows["momentum"].max())
    where: dict[str, Any] = {"arm": str(rows["arm"].iloc[0]), "kind": kind, "momentum": momentum}
    measured, predicted, first = (_along(evidence, n, **where) for n in ("measured", "predicted", "first_order"))

    def draw(ax: Axes) -> None:
        ax.plot(first.index, first["mean"], color=theme.GRAYS[0], linewidth=2.0)
        _against_theory(ax, measured, predicted, KINDS[kind])
        theme.label_line_end(ax, first.index[-1], first["mean"].iloc[-1], "no inertia", theme.GRAYS[2])
        theme.label_line_end(ax, measured.index[-1], measured["mean"].iloc[-1], "measured", KINDS[kind])
        ax.axhline(0, color=theme.GRAYS[1], linewidth=1)
        ax.set_xlabel("steps")
        theme.tidy(ax, grid="y", ticks=4)

    last = [curve["mean"].iloc[-1] for curve in (measured, predicted, first)]
    return Panel(
        "Momentum",
        draw,
        f"{QUANTITY[kind].capitalize()} over its start with momentum {momentum:g}: at the end {last[0]:.4f} measured, "
        f"{last[1]:.4f} predicted, {last[2]:.4f} without inertia.",
        f"{QUANTITY[kind]} over its start; β = {momentum:g}",
        claim="C6",
    )
