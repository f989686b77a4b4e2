"""How the evidence on neural mechanics is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from mlcollage.collage import theme
from mlcollage.collage.content import Collage, Panel
from mlcollage.collage.diagram import Diagram
from mlcollage.lab.claim import Verdict
from mlcollage.lab.evidence import Evidence
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
Floats = npt.NDArray[np.float64]


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """The idea with the laws that were found, and the panels for which the model has laws."""
    metrics = set(evidence.table["metric"])
    panels = []
    if "measured_along" in metrics:
        panels.append(_curves(evidence))
    if "closed_form_rc" in metrics:
        panels.append(_errors(evidence))
    if "drift" in metrics and not _slopes(evidence).empty:
        panels.append(_drift(evidence))
    if "first_order_along" in metrics:
        panels.append(_oscillator(evidence))
    if "budget" in metrics:
        panels.append(_budget(evidence))
    if not panels:
        panels.append(_counts_panel(evidence))
    shown = with_headlines(panels, verdicts, _MESSAGES)
    return Collage("symmetries conserve; training breaks them predictably", _idea(evidence), shown)


_MESSAGES = {
    "Measured and predicted": ("C4n", "The closed form predicts every law"),
    "Error relative to the change": ("C6b", "Error, in % of the change"),
    "Drift by learning rate": ("C3", "Drift falls with the step size"),
    "Momentum": ("C6", "Momentum: an oscillator"),
    "The breaking budget": ("C8b", "The budget closes exactly"),
}


def _networks(evidence: Evidence) -> list[str]:
    found = [a for a in ("user", "norm", "plain") if a in set(evidence.select("laws")["arm"])]
    return found or ["attention"]


def _counts(evidence: Evidence) -> dict[str, dict[str, int]]:
    """Laws by kind and network."""
    rows = evidence.select("laws")
    found: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    for (kind, arm), values in rows.groupby(["kind", "arm"])["value"]:
        if values.max() > 0:
            found[str(kind)][str(arm)] = int(values.max())
    return found


# --- the idea ---------------------------------------------------------------------------------------------------------


_LAWS = (
    ("translation", "softmax", r"$\langle g,\, \mathbb{1}_A\rangle = 0$", r"$\langle\theta, \mathbb{1}_A\rangle$"),
    ("scale", "batch norm", r"$\langle g_A,\, \theta_A\rangle = 0$", r"$\|\theta_A\|^2$"),
    (
        "rescale",
        "ReLU",
        r"$\langle g_1, \theta_1\rangle = \langle g_2, \theta_2\rangle$",
        r"$\|\theta_1\|^2-\|\theta_2\|^2$",
    ),
    ("matrix", "attention", r"$G_Q Q^T = K\,G_K^{\,T}$", r"$QQ^T-KK^T$"),
)


def _idea(evidence: Evidence) -> Panel:
    counts = _counts(evidence)
    on = "your model" if "user" in _networks(evidence) else "the networks"

    def draw(ax: Axes) -> None:
        d = Diagram(ax, 420, 466)
        for row, (kind, source, constraint, law) in enumerate(_LAWS):
            y, color = 52 + 102 * row, KINDS[kind]
            d.field(210, y, 420, 94, theme.WASH if row % 2 else theme.PAPER)
            _SURFACES[kind](ax, 62, y, color)
            number = sum(counts[kind].values())
            d.note(128, y - 30, kind, color=color, weight="semibold", fontsize=theme.BODY, ha="left")
            d.note(412, y - 30, f"{number:,} found" if number else "none found", ha="right", color=color)
            d.note(128, y + 1, f"{source}:", ha="left")
            d.equation(322, y + 1, constraint, size=15.5, room=180)
            d.note(128, y + 31, "conserves", ha="left")
            d.equation(322, y + 31, law, size=15.5, room=180)
        d.note(210, 434, "An SGD path leaves the surface by what")
        d.note(210, 454, r"is finite: step size $\eta$, decay $\lambda$, momentum $\beta$.")

    found = "; ".join(
        f"{kind} {', '.join(f'{v} on {NAMES.get(a, a)}' for a, v in by.items())}" for kind, by in counts.items() if by
    )
    return Panel(
        "The idea",
        draw,
        "Three surfaces (plane, sphere, hyperbola) and an orbit of matrices, each with a training path that leaves "
        f"it. Laws found: {found or 'none'}.",
        f"Symmetries constrain every gradient; laws found on {on}.",
    )


def _path(ax: Axes, x: Floats, y: Floats) -> None:
    """A training path with its start and its arrow head."""
    ax.plot(x, y, color=theme.INK, linewidth=2.0, zorder=3)
    ax.plot(x[:1], y[:1], "o", color=theme.INK, markersize=5.5, zorder=3)
    ax.annotate(
        "", (x[-1], y[-1]), (x[-2], y[-2]), arrowprops={"arrowstyle": "-|>", "color": theme.INK, "linewidth": 1.6}
    )


def _wiggle(n: int = 60) -> tuple[Floats, Floats]:
    t = np.linspace(0, 1, n)
    return t, 2.2 * np.sin(26 * t) * (1 - 0.4 * t)


def _plane(ax: Axes, x: float, y: float, color: str) -> None:
    corners = np.array([(-52, 22), (12, 22), (52, -10), (-12, -10)]) + np.array((x, y))
    ax.fill(*corners.T, facecolor=theme.tint(color, 0.25), edgecolor=color, linewidth=1.6, zorder=2)
    t, w = _wiggle()
    _path(ax, x - 28 + 52 * t, y + 10 - 8 * t - 36 * t**2.5 + w)


def _sphere(ax: Axes, x: float, y: float, color: str) -> None:
    angle = np.linspace(0, 2 * np.pi, 120)
    ax.fill(x + 34 * np.cos(angle), y + 34 * np.sin(angle), facecolor=theme.tint(color, 0.25), edgecolor=color,
            linewidth=1.6, zorder=2)  # fmt: skip
    half = angle[:60]
    ax.plot(x + 34 * np.cos(half), y + 11 * np.sin(half), color=color, linewidth=1.2, zorder=2)
    t, w = _wiggle()
    a, r = np.pi * (0.95 + 0.75 * t), 30 + 16 * t**1.5
    _path(ax, x + r * np.cos(a), y + r * np.sin(a) + w)


def _hyperbola(ax: Axes, x: float, y: float, color: str) -> None:
    s = np.linspace(-1.25, 1.25, 60)
    for side in (-1, 1):
        xs, ys = x + side * (16 + 20 * (np.cosh(s) - 1)), y + 22 * np.sinh(s)
        edge = x + side * 56 + 0 * s
        ax.fill_betweenx(ys, xs, edge, color=theme.tint(color, 0.25), linewidth=0, zorder=1.8)
        ax.plot(xs, ys, color=color, linewidth=1.6, zorder=2)
    t, w = _wiggle()
    v = 1.1 - 1.9 * t
    _path(ax, x + 16 + 20 * (np.cosh(v) - 1) - 15 * t**1.5 + w, y + 22 * np.sinh(v))


def _cells(ax: Axes, x: float, y: float, color: str) -> None:
    values = np.array([[0.9, 0.35, 0.15], [0.35, 0.7, 0.45], [0.15, 0.45, 1.0]])
    size = 20
    for (i, j), v in np.ndenumerate(values):
        left, top = x - 1.5 * size + j * size, y - 1.5 * size + i * size
        ax.fill([left, left + size - 2, left + size - 2, left], [top, top, top + size - 2, top + size - 2],
                color=theme.tint(color, 0.15 + 0.7 * v), linewidth=0, zorder=2)  # fmt: skip
    t, w = _wiggle()
    _path(ax, x - 26 + 62 * t, y + 20 - 20 * t - 34 * t**3 + w)


_SURFACES: Mapping[str, Any] = {"translation": _plane, "scale": _sphere, "rescale": _hyperbola, "matrix": _cells}


# --- panels -----------------------------------------------------------------------------------------------------------


def _home(evidence: Evidence, kind: str) -> str | None:
    """The network whose laws of a kind are drawn: the user's; else that in which the law is exact and central."""
    order = ("user", "norm", "plain") if kind == "scale" else ("user", "plain", "norm")
    rows = evidence.select("measured_along")
    there = set(rows[(rows["kind"] == kind) & (rows["momentum"] == 0)]["arm"])
    return next((a for a in order if a in there), None)


def _curves(evidence: Evidence) -> Panel:
    homes = {k: h for k in ("translation", "scale", "rescale", "matrix") if (h := _home(evidence, k))}
    homes = dict(list(homes.items())[:3])
    rows = evidence.select("measured_along")
    decays = sorted(rows[rows["momentum"] == 0]["weight_decay"].unique())
    colors = dict(zip(decays, DECAYS, strict=False))
    curves = {
        (kind, decay, what): evidence.across_seeds(
            f"{what}_along", arm=home, kind=kind, weight_decay=decay, momentum=0.0
        )
        for kind, home in homes.items()
        for decay in decays
        for what in ("measured", "predicted")
    }

    def draw(part: SubFigure) -> None:
        axes = part.subplots(1, len(homes), squeeze=False, gridspec_kw={"wspace": 0.5})[0]
        for ax, kind in zip(axes, homes, strict=True):
            ax.axhline(1, color=theme.GRAYS[0], linewidth=1.4, linestyle=(0, (1, 2)), zorder=1)
            for decay, color in colors.items():
                c, p = curves[kind, decay, "measured"], curves[kind, decay, "predicted"]
                theme.band(ax, c.index, c["lo"], c["hi"], color, strength=0.25)
                ax.plot(c.index, c["mean"], color=color, linewidth=4.0)
                ax.plot(p.index, p["mean"], color=theme.INK, linewidth=1.6, linestyle=(0, (3, 2)))
            ax.set_title(f"{kind} (BN)" if homes[kind] == "norm" else kind, color=theme.ink(KINDS[kind]))
            ax.set_xlabel("steps")
            ax.margins(y=0.12)
            theme.tidy(ax, grid="y", ticks=4)
        kind = next(iter(homes))
        for decay, color in colors.items():
            c = curves[kind, decay, "measured"]
            theme.label_line_end(axes[0], c.index[-1], c["mean"].iloc[-1], f"λ={_short(decay)}", color)

    ends = ", ".join(
        f"{kind} λ={decay:g}: {curves[kind, decay, 'measured']['mean'].iloc[-1]:.4f} measured, "
        f"{curves[kind, decay, 'predicted']['mean'].iloc[-1]:.4f} predicted"
        for kind in homes
        for decay in decays
    )
    return Panel(
        "Measured and predicted",
        draw,
        f"Conserved quantities along their start, at the end: {ends}.",
        "Q along Q at the start; dashed: predicted; dotted: nothing moves",
        own_axes=True,
        wide=True,
    )


def _short(value: float) -> str:
    """1e-4 and not 0.0001."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 0.01 else f"{value:g}"


def _errors(evidence: Evidence) -> Panel:
    rows = evidence.select("closed_form_rc")
    plain, driven = rows[rows["momentum"] == 0], rows[rows["momentum"] > 0]
    found: dict[str, tuple[float, str]] = {"nothing moves": (100.0, theme.GRAYS[2])}
    metrics = set(evidence.table["metric"])
    if "first_order_rc" in metrics:
        first = evidence.select("first_order_rc")
        found["β>0, no inertia"] = (_typical(first), theme.GRAYS[0])
    if len(driven):
        found["β>0, oscillator"] = (_typical(driven), theme.PALETTE["black"])
    for kind in ("translation", "scale", "rescale", "matrix"):
        if (plain["kind"] == kind).any():
            found[f"β=0, {kind}"] = (_typical(plain[plain["kind"] == kind]), KINDS[kind])

    def draw(ax: Axes) -> None:
        values = [max(v, 1e-9) for v, _ in found.values()]
        theme.lollipops(
            ax, list(found), values, [c for _, c in found.values()], text=[_percent(v) for v in values], log=True
        )
        ax.set_xlim(right=max(values) * 12)

    alt = "Largest mean error relative to the change: " + ", ".join(f"{k} {_percent(v)}" for k, (v, _) in found.items())
    return Panel("Error relative to the change", draw, alt + ".", "at the end, worst setting")


def _typical(rows: Any) -> float:
    """Mean over seeds, the worst over networks and settings; in per cent."""
    keys = ["arm", "kind", "weight_decay", "momentum"]
    return 100 * float(rows.groupby(keys)["value"].mean().max())


def _percent(value: float) -> str:
    return f"{value:.3f} %" if value < 0.1 else f"{value:.2g} %" if value < 100 else f"{value:.0f} %"


def _slopes(evidence: Evidence) -> Any:
    rows = evidence.select("drift")
    return rows[rows["kind"].isin(("scale", "rescale", "matrix"))]


def _drift(evidence: Evidence) -> Panel:
    rows = _slopes(evidence)
    lines = {key: g.groupby("eta")["value"].mean() for key, g in rows.groupby(["arm", "kind"])}
    colors = (theme.PALETTE["vermillion"], theme.PALETTE["orange"], theme.PALETTE["purple"])
    shades = dict(zip(lines, colors, strict=False))
    slopes = {k: float(np.polyfit(np.log(v.index.to_numpy(float)), np.log(v), 1)[0]) for k, v in lines.items()}

    def draw(ax: Axes) -> None:
        for key, shade in shades.items():
            line = lines[key]
            ax.plot(line.index, line, "-o", color=shade)
            theme.label_line_end(ax, line.index[-1], line.iloc[-1], NAMES[key[0]], shade)
        first = lines[next(iter(lines))]
        x = first.index.to_numpy(float)
        ax.plot(x, 0.45 * first.iloc[0] * x / x[0], color=theme.GRAYS[0], linewidth=1.6, linestyle=(0, (4, 3)))
        theme.label_line_end(ax, x[-1], 0.45 * first.iloc[0] * x[-1] / x[0], "slope 1", theme.GRAYS[2])
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("learning rate η")
        theme.tidy(ax, grid="y")

    alt = "Log-log slope of the drift over the learning rate: " + ", ".join(
        f"{NAMES[a]} {kind} {s:.3f}" for (a, kind), s in slopes.items()
    )
    return Panel("Drift by learning rate", draw, alt + ".", "relative, same time ηk, full batch")


def _oscillator(evidence: Evidence) -> Panel:
    rows = evidence.select("first_order_along")
    kinds = [k for k in ("translation", "scale", "rescale", "matrix") if (rows["kind"] == k).any()]
    kind, momentum = kinds[0], float(rows["momentum"].max())
    where: dict[str, Any] = {"arm": str(rows["arm"].iloc[0]), "kind": kind, "momentum": momentum}
    curves = {n: evidence.across_seeds(f"{n}_along", **where) for n in ("measured", "predicted", "first_order")}
    color = KINDS[kind]

    def draw(ax: Axes) -> None:
        m, p, f = (curves[n] for n in ("measured", "predicted", "first_order"))
        ax.plot(f.index, f["mean"], color=theme.GRAYS[0], linewidth=2.0)
        theme.band(ax, m.index, m["lo"], m["hi"], color)
        ax.plot(m.index, m["mean"], color=color, linewidth=4.0)
        ax.plot(p.index, p["mean"], color=theme.INK, linewidth=1.6, linestyle=(0, (3, 2)))
        k = len(f) // 3
        ax.annotate(
            "without inertia",
            (f.index[k], f["mean"].iloc[k]),
            (10, 22),
            textcoords="offset points",
            color=theme.ink(theme.GRAYS[2]),
            arrowprops={"arrowstyle": "-", "color": theme.GRAYS[0]},
        )
        ax.axhline(0, color=theme.GRAYS[1], linewidth=1)
        ax.set_xlabel("steps")
        theme.tidy(ax, grid="y", ticks=4)

    last = {n: c["mean"].iloc[-1] for n, c in curves.items()}
    alt = (
        f"The {kind} quantities along their start with momentum {momentum:g}: at the end {last['measured']:.4f} "
        f"measured, {last['predicted']:.4f} predicted, {last['first_order']:.4f} without inertia."
    )
    return Panel("Momentum", draw, alt, f"{kind}, β={momentum:g}; dashed: theory")


def _budget(evidence: Evidence) -> Panel:
    rows = evidence.select("budget")
    adam = rows[rows["optimizer"] == "AdamW"]
    rows = adam if len(adam) else rows
    kinds = [k for k in ("scale", "rescale", "matrix", "translation") if (rows["kind"] == k).any()]
    rows = rows[rows["kind"] == kinds[0]]
    rows = rows[rows["arm"] == rows["arm"].iloc[0]]
    rows = rows[rows["weight_decay"] == rows["weight_decay"].max()] if rows["weight_decay"].notna().any() else rows
    table = rows.groupby(["step", "part"])["value"].mean().unstack("part")
    parts = [p for p in PARTS if p in table and table[p].abs().max() > 0]

    def draw(ax: Axes) -> None:
        top, bottom = np.zeros(len(table)), np.zeros(len(table))
        reach = float(table[parts].iloc[-1].abs().sum()) or 1.0
        for part in parts:
            name, color = PARTS[part]
            value = table[part].to_numpy(float)
            up, down = np.clip(value, 0, None), np.clip(value, None, 0)
            ax.fill_between(table.index, top, top + up, color=theme.tint(color, 0.75), linewidth=0)
            ax.fill_between(table.index, bottom, bottom + down, color=theme.tint(color, 0.75), linewidth=0)
            end = value[-1]
            place = (top + up / 2)[-1] if end >= 0 else (bottom + down / 2)[-1]
            if abs(end) > 0.04 * reach:  # the others are in the text alternative
                theme.label_line_end(ax, table.index[-1], place, name, color)
            top, bottom = top + up, bottom + down
        ax.plot(table.index, table["change"], color=theme.INK, linewidth=2.2)
        theme.label_line_end(ax, table.index[-1], float(table["change"].iloc[-1]), "ΔQ", theme.INK)
        ax.axhline(0, color=theme.GRAYS[1], linewidth=1)
        ax.set_xlabel("steps")
        theme.tidy(ax, grid="y", ticks=4)

    optimizer = str(rows["optimizer"].iloc[0])
    shares = ", ".join(f"{PARTS[p][0]} {table[p].iloc[-1]:+.3g}" for p in parts)
    alt = f"Parts of the change of {kinds[0]} quantities under {optimizer} at the end, relative to their size: {shares}"
    return Panel("The breaking budget", draw, alt + ".", f"{kinds[0]} laws, {optimizer}, ΔQ over Q at 0")


def _counts_panel(evidence: Evidence) -> Panel:
    counts = _counts(evidence)

    def draw(ax: Axes) -> None:
        numbers = [sum(by.values()) for by in counts.values()]
        theme.lollipops(ax, list(counts), numbers, list(KINDS.values()), text="{:.0f}")

    alt = "Laws found: " + ", ".join(f"{k} {sum(by.values())}" for k, by in counts.items())
    return Panel("Laws found", draw, alt + ".", "number of conserved quantities by kind")
