"""How the evidence on neural mechanics is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from mlcollage.collage import Collage, Diagram, Panel, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.headlines import with_headlines

KINDS: Mapping[str, str] = {
    "translation": theme.PALETTE["green"],
    "scale": theme.PALETTE["blue"],
    "rescale": theme.PALETTE["vermillion"],
    "matrix": theme.PALETTE["purple"],
}
PARTS: Mapping[str, tuple[str, str]] = {
    "discretization": ("steps", theme.PALETTE["orange"]),
    "preconditioner": ("Adam", theme.PALETTE["purple"]),
    "momentum": ("momentum", theme.PALETTE["sky"]),
    "weight_decay": ("decay", theme.PALETTE["blue"]),
    "symmetry": ("ε of BN", theme.PALETTE["vermillion"]),
}
DECAYS = (theme.PALETTE["orange"], theme.PALETTE["sky"], theme.PALETTE["purple"], theme.PALETTE["green"])
NAMES = {"plain": "no norm", "norm": "batch norm", "user": "your model", "attention": "transformer"}
DASHED = (0, (3, 2))


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """The idea with the laws that were found, and the panels for which the model has laws."""
    metrics = ("measured_along", "closed_form_rc", "drift", "first_order_along", "budget")
    draws = zip(metrics, (_curves, _errors, _drift, _oscillator, _budget), strict=True)
    panels = [draw(evidence) for metric, draw in draws if metric in set(evidence.table["metric"])]
    found = [panel for panel in panels if panel is not None] or [_counts_panel(evidence)]
    shown = with_headlines(found, verdicts, _MESSAGES)
    return Collage("symmetries conserve; training breaks them predictably", _idea(evidence), shown)


_MESSAGES = {
    "Measured and predicted": ("C4n", "The closed form predicts every law"),
    "Error relative to the change": ("C6b", "Error, in % of the change"),
    "Drift by learning rate": ("C3", "Drift falls with the step size"),
    "Momentum": ("C6", "Momentum: an oscillator"),
    "The breaking budget": ("C8b", "The budget closes exactly"),
}


def _counts(evidence: Evidence) -> dict[str, dict[str, int]]:
    """Laws by kind and network."""
    rows = evidence.select("laws")
    most = {kind: rows[rows["kind"] == kind].groupby("arm")["value"].max() for kind in KINDS}
    return {kind: {str(arm): int(count) for arm, count in by.items() if count > 0} for kind, by in most.items()}


def _present(rows: pd.DataFrame, kinds: tuple[str, ...] = tuple(KINDS)) -> list[str]:
    """The kinds of law that rows are of, in the order given."""
    return [kind for kind in kinds if (rows["kind"] == kind).any()]


# --- the idea ---------------------------------------------------------------------------------------------------------


_LAWS = {  # where they come from, what they ask of every gradient, what they conserve
    "translation": ("softmax", r"$\langle g,\, \mathbb{1}_A\rangle = 0$", r"$\langle\theta, \mathbb{1}_A\rangle$"),
    "scale": ("batch norm", r"$\langle g_A,\, \theta_A\rangle = 0$", r"$\|\theta_A\|^2$"),
    "rescale": (
        "ReLU",
        r"$\langle g_1, \theta_1\rangle = \langle g_2, \theta_2\rangle$",
        r"$\|\theta_1\|^2-\|\theta_2\|^2$",
    ),
    "matrix": ("attention", r"$G_Q Q^T = K\,G_K^{\,T}$", r"$QQ^T-KK^T$"),
}


def _idea(evidence: Evidence) -> Panel:
    counts = _counts(evidence)
    on = "your model" if "user" in set(evidence.select("laws")["arm"]) else "the networks"

    def draw(ax: Axes) -> None:
        d = Diagram(ax, 420, 466)
        for row, (kind, (source, constraint, law)) in enumerate(_LAWS.items()):
            y, color = 52 + 102 * row, KINDS[kind]
            d.field(210, y, 420, 94, theme.WASH if row % 2 else theme.PAPER)
            _surface(ax, kind, 62, y, color)
            number = sum(counts[kind].values())
            d.note(128, y - 30, kind, color=color, weight="semibold", fontsize=theme.BODY, ha="left")
            d.note(412, y - 30, f"{number:,} found" if number else "none found", ha="right", color=color)
            for below, name, equation in ((1, f"{source}:", constraint), (31, "conserves", law)):
                d.note(128, y + below, name, ha="left")
                d.equation(322, y + below, equation, size=15.5, room=180)
        d.note(210, 434, "An SGD path leaves the surface by what")
        d.note(210, 454, r"is finite: step size $\eta$, decay $\lambda$, momentum $\beta$.")

    on_each = {kind: ", ".join(f"{v} on {NAMES.get(a, a)}" for a, v in by.items()) for kind, by in counts.items()}
    found = "; ".join(f"{kind} {laws}" for kind, laws in on_each.items() if laws)
    alt = (
        "Three surfaces (plane, sphere, hyperbola) and an orbit of matrices, each with a training path that leaves it. "
        f"Laws found: {found or 'none'}."
    )
    return Panel("The idea", draw, alt, f"Symmetries constrain every gradient; laws found on {on}.")


def _surface(ax: Axes, kind: str, x: float, y: float, color: str) -> None:
    """The surface on which a law keeps training, around (x, y), and a training path that leaves it."""
    light: dict[str, Any] = {"facecolor": theme.tint(color, 0.25), "edgecolor": color, "linewidth": 1.6, "zorder": 2}
    t = np.linspace(0, 1, 60)  # along the path
    wiggle = 2.2 * np.sin(26 * t) * (1 - 0.4 * t)
    if kind == "translation":  # a plane
        corners = np.array([(x - 52, y + 22), (x + 12, y + 22), (x + 52, y - 10), (x - 12, y - 10)])
        ax.fill(*corners.T, **light)
        path = -28 + 52 * t, 10 - 8 * t - 36 * t**2.5 + wiggle
    elif kind == "scale":  # a sphere
        angle = np.linspace(0, 2 * np.pi, 120)
        ax.fill(x + 34 * np.cos(angle), y + 34 * np.sin(angle), **light)
        ax.plot(x + 34 * np.cos(angle[:60]), y + 11 * np.sin(angle[:60]), color=color, linewidth=1.2, zorder=2)
        a, r = np.pi * (0.95 + 0.75 * t), 30 + 16 * t**1.5
        path = r * np.cos(a), r * np.sin(a) + wiggle
    elif kind == "rescale":  # a hyperbola
        s = np.linspace(-1.25, 1.25, 60)
        for side in (-1, 1):
            xs, ys = x + side * (16 + 20 * (np.cosh(s) - 1)), y + 22 * np.sinh(s)
            ax.fill_betweenx(ys, xs, x + side * 56 + 0 * s, color=light["facecolor"], linewidth=0, zorder=1.8)
            ax.plot(xs, ys, color=color, linewidth=1.6, zorder=2)
        v = 1.1 - 1.9 * t
        path = 16 + 20 * (np.cosh(v) - 1) - 15 * t**1.5 + wiggle, 22 * np.sinh(v)
    else:  # an orbit of matrices: the entries of one
        for (i, j), v in np.ndenumerate(np.array([[0.9, 0.35, 0.15], [0.35, 0.7, 0.45], [0.15, 0.45, 1.0]])):
            left, top = x - 30 + 20 * j + np.array([0, 18, 18, 0]), y - 30 + 20 * i + np.array([0, 0, 18, 18])
            ax.fill(left, top, color=theme.tint(color, 0.15 + 0.7 * v), linewidth=0, zorder=2)
        path = -26 + 62 * t, 20 - 20 * t - 34 * t**3 + wiggle
    px, py = x + path[0], y + path[1]
    ax.plot(px, py, color=theme.INK, linewidth=2.0, zorder=3)
    ax.plot(px[:1], py[:1], "o", color=theme.INK, markersize=5.5, zorder=3)
    arrow = {"arrowstyle": "-|>", "color": theme.INK, "linewidth": 1.6}
    ax.annotate("", (px[-1], py[-1]), (px[-2], py[-2]), arrowprops=arrow)


# --- panels -----------------------------------------------------------------------------------------------------------


def _against_theory(ax: Axes, measured: pd.DataFrame, predicted: pd.DataFrame, color: str) -> None:
    """What was measured, with its interval, under the dashed prediction."""
    theme.band(ax, measured.index, measured["lo"], measured["hi"], color, strength=0.25)
    ax.plot(measured.index, measured["mean"], color=color, linewidth=4.0)
    ax.plot(predicted.index, predicted["mean"], color=theme.INK, linewidth=1.6, linestyle=DASHED)


def _home(rows: pd.DataFrame, kind: str) -> str:
    """The network whose laws of a kind are drawn: the user's; else that in which the law is exact and central."""
    order = ("user", "norm", "plain") if kind == "scale" else ("user", "plain", "norm")
    return next(a for a in order if (rows.loc[rows["kind"] == kind, "arm"] == a).any())


def _curves(evidence: Evidence) -> Panel | None:
    rows = evidence.select("measured_along", momentum=0.0)
    homes = {kind: _home(rows, kind) for kind in _present(rows)[:3]}
    colors = dict(zip(sorted(rows["weight_decay"].unique()), DECAYS, strict=False))
    curves = {}
    for (kind, home), decay in product(homes.items(), colors):
        where: dict[str, Any] = {"arm": home, "kind": kind, "weight_decay": decay, "momentum": 0.0}
        curves[kind, decay] = [evidence.across_seeds(f"{what}_along", **where) for what in ("measured", "predicted")]

    def draw(part: SubFigure) -> None:
        axes = part.subplots(1, len(homes), squeeze=False, gridspec_kw={"wspace": 0.5})[0]
        for ax, kind in zip(axes, homes, strict=True):
            ax.axhline(1, color=theme.GRAYS[0], linewidth=1.4, linestyle=(0, (1, 2)), zorder=1)
            for decay, color in colors.items():
                measured, predicted = curves[kind, decay]
                _against_theory(ax, measured, predicted, color)
                if ax is axes[0]:
                    end = measured["mean"].iloc[-1]
                    theme.label_line_end(ax, measured.index[-1], end, f"λ={_short(decay)}", color)
            ax.set_title(f"{kind} (BN)" if homes[kind] == "norm" else kind, color=theme.ink(KINDS[kind]))
            ax.set_xlabel("steps")
            ax.margins(y=0.12)
            theme.tidy(ax, grid="y", ticks=4)

    ends = ", ".join(
        f"{kind} λ={decay:g}: {m['mean'].iloc[-1]:.4f} measured, {p['mean'].iloc[-1]:.4f} predicted"
        for (kind, decay), (m, p) in curves.items()
    )
    alt = f"Conserved quantities along their start, at the end: {ends}."
    note = "Q along Q at the start; dashed: predicted; dotted: nothing moves"
    return Panel("Measured and predicted", draw, alt, note, own_axes=True, wide=True)


def _short(value: float) -> str:
    """1e-4 and not 0.0001."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 0.01 else f"{value:g}"


def _errors(evidence: Evidence) -> Panel | None:
    rows = evidence.select("closed_form_rc")
    plain, driven = rows[rows["momentum"] == 0], rows[rows["momentum"] > 0]
    found: dict[str, tuple[float, str]] = {"nothing moves": (100.0, theme.GRAYS[2])}
    if "first_order_rc" in set(evidence.table["metric"]):
        found["β>0, no inertia"] = (_typical(evidence.select("first_order_rc")), theme.GRAYS[0])
    if len(driven):
        found["β>0, oscillator"] = (_typical(driven), theme.PALETTE["black"])
    found |= {f"β=0, {kind}": (_typical(plain[plain["kind"] == kind]), KINDS[kind]) for kind in _present(plain)}

    def draw(ax: Axes) -> None:
        values, colors = [max(v, 1e-9) for v, _ in found.values()], [c for _, c in found.values()]
        theme.lollipops(ax, list(found), values, colors, text=[_percent(v) for v in values], log=True)
        ax.set_xlim(right=max(values) * 12)

    alt = "Largest mean error relative to the change: " + ", ".join(f"{k} {_percent(v)}" for k, (v, _) in found.items())
    return Panel("Error relative to the change", draw, alt + ".", "at the end, worst setting")


def _typical(rows: pd.DataFrame) -> float:
    """Mean over seeds, the worst over networks and settings; in per cent."""
    keys = ["arm", "kind", "weight_decay", "momentum"]
    return 100 * float(rows.groupby(keys)["value"].mean().max())


def _percent(value: float) -> str:
    return f"{value:.3f} %" if value < 0.1 else f"{value:.2g} %" if value < 100 else f"{value:.0f} %"


def _drift(evidence: Evidence) -> Panel | None:
    rows = evidence.select("drift")
    rows = rows[rows["kind"] != "translation"]
    lines = {(str(a), str(k)): g.groupby("eta")["value"].mean() for (a, k), g in rows.groupby(["arm", "kind"])}
    if not lines:
        return None
    colors = (theme.PALETTE["vermillion"], theme.PALETTE["orange"], theme.PALETTE["purple"])
    slopes = {k: float(np.polyfit(np.log(v.index.to_numpy(float)), np.log(v), 1)[0]) for k, v in lines.items()}

    def draw(ax: Axes) -> None:
        for (key, line), shade in zip(lines.items(), colors, strict=False):
            ax.plot(line.index, line, "-o", color=shade)
            theme.label_line_end(ax, line.index[-1], line.iloc[-1], NAMES[key[0]], shade)
        first = next(iter(lines.values()))
        x = first.index.to_numpy(float)
        y = 0.45 * first.iloc[0] * x / x[0]
        ax.plot(x, y, color=theme.GRAYS[0], linewidth=1.6, linestyle=(0, (4, 3)))
        theme.label_line_end(ax, x[-1], y[-1], "slope 1", theme.GRAYS[2])
        ax.set(xscale="log", yscale="log", xlabel="learning rate η")
        theme.tidy(ax, grid="y")

    found = ", ".join(f"{NAMES[a]} {kind} {s:.3f}" for (a, kind), s in slopes.items())
    alt = f"Log-log slope of the drift over the learning rate: {found}."
    return Panel("Drift by learning rate", draw, alt, "relative, same time ηk, full batch")


def _oscillator(evidence: Evidence) -> Panel | None:
    rows = evidence.select("first_order_along")
    kind, momentum = _present(rows)[0], float(rows["momentum"].max())
    where: dict[str, Any] = {"arm": str(rows["arm"].iloc[0]), "kind": kind, "momentum": momentum}
    names = ("measured_along", "predicted_along", "first_order_along")
    measured, predicted, first = (evidence.across_seeds(name, **where) for name in names)

    def draw(ax: Axes) -> None:
        ax.plot(first.index, first["mean"], color=theme.GRAYS[0], linewidth=2.0)
        _against_theory(ax, measured, predicted, KINDS[kind])
        k, arrow = len(first) // 3, {"arrowstyle": "-", "color": theme.GRAYS[0]}
        at, ink = (first.index[k], first["mean"].iloc[k]), theme.ink(theme.GRAYS[2])
        ax.annotate("without inertia", at, (10, 22), textcoords="offset points", color=ink, arrowprops=arrow)
        ax.axhline(0, color=theme.GRAYS[1], linewidth=1)
        ax.set_xlabel("steps")
        theme.tidy(ax, grid="y", ticks=4)

    last = [curve["mean"].iloc[-1] for curve in (measured, predicted, first)]
    alt = (
        f"The {kind} quantities along their start with momentum {momentum:g}: at the end {last[0]:.4f} measured, "
        f"{last[1]:.4f} predicted, {last[2]:.4f} without inertia."
    )
    return Panel("Momentum", draw, alt, f"{kind}, β={momentum:g}; dashed: theory")


def _budget(evidence: Evidence) -> Panel | None:
    every = evidence.select("budget")
    rows = adam if len(adam := every[every["optimizer"] == "AdamW"]) else every
    kind = _present(rows, ("scale", "rescale", "matrix", "translation"))[0]
    rows = rows[rows["kind"] == kind]
    rows = rows[rows["arm"] == rows["arm"].iloc[0]]
    rows = rows[rows["weight_decay"] == rows["weight_decay"].max()] if rows["weight_decay"].notna().any() else rows
    table = rows.groupby(["step", "part"])["value"].mean().unstack("part")
    parts = [p for p in PARTS if p in table and table[p].abs().max() > 0]

    def draw(ax: Axes) -> None:
        reach = float(table[parts].iloc[-1].abs().sum()) or 1.0
        stacks = dict.fromkeys((1, -1), np.zeros(len(table)))  # what raises Q, and what lowers it
        for part in parts:
            name, color = PARTS[part]
            value = table[part].to_numpy(float)
            for side, start in stacks.items():
                stacks[side] = start + side * np.clip(side * value, 0, None)
                ax.fill_between(table.index, start, stacks[side], color=theme.tint(color, 0.75), linewidth=0)
                ends_here = (1 if value[-1] >= 0 else -1) == side
                if ends_here and abs(value[-1]) > 0.04 * reach:  # the others are in the text alternative
                    theme.label_line_end(ax, table.index[-1], (start[-1] + stacks[side][-1]) / 2, name, color)
        ax.plot(table.index, table["change"], color=theme.INK, linewidth=2.2)
        theme.label_line_end(ax, table.index[-1], float(table["change"].iloc[-1]), "ΔQ", theme.INK)
        ax.axhline(0, color=theme.GRAYS[1], linewidth=1)
        ax.set_xlabel("steps")
        theme.tidy(ax, grid="y", ticks=4)

    optimizer = str(rows["optimizer"].iloc[0])
    shares = ", ".join(f"{PARTS[p][0]} {table[p].iloc[-1]:+.3g}" for p in parts)
    alt = f"Parts of the change of {kind} quantities under {optimizer} at the end, relative to their size: {shares}."
    return Panel("The breaking budget", draw, alt, f"{kind} laws, {optimizer}, ΔQ over Q at 0")


def _counts_panel(evidence: Evidence) -> Panel:
    counts = {kind: sum(by.values()) for kind, by in _counts(evidence).items()}

    def draw(ax: Axes) -> None:
        theme.lollipops(ax, list(counts), list(counts.values()), list(KINDS.values()), text="{:.0f}")

    alt = "Laws found: " + ", ".join(f"{kind} {number}" for kind, number in counts.items())
    return Panel("Laws found", draw, alt + ".", "number of conserved quantities by kind")
