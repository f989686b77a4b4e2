"""How the evidence on programmatic trajectories is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Arc, Rectangle

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

# One color for an arm, on the whole slide.
WITH, WITHOUT, WINDOW = (theme.PALETTE[c] for c in ("blue", "vermillion", "orange"))
REAL, DRAWN = theme.GRAYS[0], theme.PALETTE["green"]


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """A play and the same play with one intent moved; how far players run; two kinds of flock."""
    own = evidence.workload == "default"
    panels = [measured_panel("How far players run", _distances, evidence)]
    if own:
        panels.append(measured_panel("Two kinds of flock", _flocks, evidence))
    return Collage(
        "cheap labels make coordinated play",
        _idea(),
        measured_panel("One play, one intent moved", _play, evidence),
        panels,
        data="generated half-court plays and Boids" if own else "the workload",
        network="VRNN, 32 units, tied weights",
    )


def _idea() -> Panel:
    def draw(ax: Axes) -> None:
        d = Diagram(ax, 374, 372)
        track = d.box(52, 40, 92, 44, "tracks", color=theme.GRAYS[2])
        label = d.box(190, 40, 108, 44, "program", color=theme.GRAYS[2])
        intent = d.box(324, 40, 84, 44, "$\\hat g_t$", color=WITH, filled=True)
        d.arrow(track, label)
        d.arrow(label, intent)
        macro = d.box(256, 138, 196, 48, "one network for all", color=WITH)
        g = d.circle(56, 138, 26, "$g_t$", color=WITH)
        d.arrow(macro, g)
        for i, y in enumerate((206, 260)):
            net = d.box(196, y, 160, 40, f"player {i + 1}: VRNN", color=theme.GRAYS[1])
            x = d.circle(338, y, 20, f"$x^{i + 1}$", color=theme.GRAYS[1])
            d.arrow(g, (116, y))
            d.arrow(net, x)
        d.field(187, 332, 374, 72)
        equation = r"p(x, g) = \prod_t p(g_t \mid g_{<t}) \prod_k p(x_{t+1}^k \mid g_t)"
        d.equation(187, 332, equation, size=18)

    return Panel(
        "The idea",
        draw,
        "A program labels tracks with macro-intents. One network learns how the intents of all players follow each "
        "other; "
        "each player's VRNN moves by his intent.",
        "A program says where each player is heading. One network plans, one for each player moves.",
    )


def _array(evidence: Evidence, name: str, arm: str) -> np.ndarray:
    for run in evidence.find_runs(arm=arm):
        try:
            return np.asarray(evidence.array(run.id, f"{name}.0"))
        except LookupError:
            continue
    raise LookupError(f"no run of {arm} holds {name}")


def _number(n: int) -> str:
    return ("no", "one", "two", "three", "four", "five", "six")[n] if n < 7 else str(n)


def _play(evidence: Evidence) -> Panel:
    names = ("play_free", "play_moved", "intents_free", "intents_moved", "grid", "player")
    found = {name: _array(evidence, name, "stationary") for name in names}
    who, players = int(found["player"]), _number(found["play_free"].shape[1])
    cells = not np.isnan(found["grid"][0])
    moved = "sent to another cell, one of them runs there" if cells else "the same with another intent"
    try:
        obeyed = [float(evidence.by_seed("obeyed", arm="stationary", of=of).mean()) for of in ("own", "other")]
        said = f"{100 * obeyed[0]:.0f}% " + (
            f"of players end within a cell of where they are sent, {100 * obeyed[1]:.0f}% by chance."
            if cells
            else f"of last labels are those that were commanded, {100 * obeyed[1]:.0f}% by chance."
        )
    except LookupError:  # given intents say nothing of what is drawn
        said = ""

    def draw(ax: Axes) -> None:
        cell, length, width = (float(v) for v in found["grid"])
        _court(ax, length, width, evidence.workload == "default")
        rows = 0 if np.isnan(cell) else round(np.ceil(width / cell - 1e-9))  # NaN: the intents are no cells
        for kind, color in (("free", DRAWN), ("moved", WITH)) if rows else ():
            i, j = divmod(int(found[f"intents_{kind}"][-1, who]), rows)
            ax.add_patch(
                Rectangle((i * cell, j * cell), cell, cell, facecolor=theme.tint(color, 0.35), edgecolor=color, lw=1.6)
            )
        free, other = found["play_free"], found["play_moved"]
        for k in range(free.shape[1]):
            if k != who:
                ax.plot(*free[:, k].T, color=theme.GRAYS[2], lw=1.6, zorder=2)
                ax.plot(*free[-1, k], "o", color=theme.GRAYS[2], ms=6, zorder=3)
        for x, color in ((free, DRAWN), (other, WITH)):
            ax.plot(*x[:, who].T, color=color, lw=3.0, zorder=4)
            ax.plot(*x[-1, who], "o", color=color, ms=9, zorder=5)
        ax.plot(*free[0, who], "s", color=theme.MUTED, ms=7, zorder=6)
        for row, (text, color) in enumerate(
            (("as drawn", DRAWN), ("sent elsewhere", WITH), ("the others", theme.GRAYS[2]))
        ):
            at = width * (0.93 - 0.1 * row)
            ax.plot([1.06 * length, 1.14 * length], [at, at], color=color, lw=3)
            ax.text(1.17 * length, at, text, va="center", color=theme.ink(color))

    return Panel(
        "One play, one intent moved",
        draw,
        f"A generated play of {players} players; {moved}. {said}",
        "a generated play, feet; the same with one player sent elsewhere (colored cells)"
        if evidence.workload == "default"
        else "a generated sequence in the workload's units; the same with one agent sent elsewhere",
        claim="C5",
    )


def _court(ax: Axes, length: float, width: float, basketball: bool) -> None:
    ax.add_patch(Rectangle((0, 0), length, width, facecolor="none", edgecolor=theme.MUTED, lw=1.4, zorder=1))
    if basketball:
        lines: dict[str, Any] = {"fill": False, "edgecolor": theme.GRAYS[2], "lw": 1.0, "zorder": 1}
        ax.add_patch(Rectangle((0, 17), 19, 16, **lines))
        ax.add_patch(Arc((5.25, 25), 47.5, 47.5, theta1=-68, theta2=68, color=theme.GRAYS[2], lw=1.0, zorder=1))
        ax.plot(5.25, 25, "o", ms=7, mfc="none", mec=theme.MUTED, zorder=1)
    ax.set_aspect("equal")
    pad = 0.03 * max(length, width)
    ax.set_xlim(-pad, 1.62 * length)
    ax.set_ylim(-pad, width + pad)
    ax.set_axis_off()


def _distances(evidence: Evidence) -> Panel:
    arms = {
        "where they stop": ("stationary", WITH),
        "where they end": ("window", WINDOW),
        "no intents": ("no_intents", WITHOUT),
    }
    if "window" not in set(evidence.table["arm"]):  # intents that came with the tracks
        arms = {"own intents": arms["where they stop"], "no intents": arms["no intents"]}
    found = {name: evidence.by_seed("distance_w1", arm=arm) for name, (arm, _) in arms.items()}

    def draw(ax: Axes) -> None:
        marks.rows(ax, found, {name: color for name, (_, color) in arms.items()})
        ax.set_xlim(left=0)

    return Panel(
        "How far players run",
        draw,
        f"Gap between distances run in generated and real plays, by label: {marks.listed(found)}."[:300],
        "1-Wasserstein distance to real plays" + (", ft" if evidence.workload == "default" else ""),
        claim="C2",
    )


def _flocks(evidence: Evidence) -> Panel:
    real = _array(evidence, "nearest_real", "macro")
    made = {
        name: _array(evidence, "nearest_made", arm) for name, arm in (("with intent", "macro"), ("without", "indep"))
    }
    share = {
        name: evidence.by_seed("between", arm=arm) for name, arm in (("with intent", "macro"), ("without", "indep"))
    }

    def draw(ax: Axes) -> None:
        top = max(float(v.max()) for v in (real, *made.values()))
        bins = np.linspace(0, top * 1.02, 26)
        flocks = ((real, REAL), (made["with intent"], WITH), (made["without"], WITHOUT))
        for i, (values, color) in enumerate(flocks):
            counts, edges = np.histogram(values, bins)
            base, height = 2 - i, counts / counts.max() * 0.8
            ax.fill_between(edges[:-1], base, base + height, step="post", color=theme.tint(color, 0.5), lw=0)
            ax.step(edges[:-1], base + height, where="post", color=color, lw=1.6)
        theme.tidy(ax)
        ax.set_yticks([2.3, 1.3, 0.3], ["real", "with intent", "without"])
        ax.tick_params(axis="y", length=0)

    return Panel(
        "Two kinds of flock",
        draw,
        f"Real flocks have nearest distances near 0.15 or 1.1. Share of generated flocks between: "
        f"{marks.listed(share)}.",
        "mean distance to the nearest other, seed 0",
        claim="C3",
    )
