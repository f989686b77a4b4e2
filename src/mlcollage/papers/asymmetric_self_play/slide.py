"""How the evidence on asymmetric self-play is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

# One color for an arm, on the whole slide. Alice and Bob have theirs in the idea and the filmstrip.
ALICE, BOB = theme.PALETTE["vermillion"], theme.PALETTE["blue"]
ARMS = {
    "self-play": ("asp", BOB),
    "without cloning": ("no_abc", theme.PALETTE["orange"]),
    "direct training": ("direct", theme.PALETTE["green"]),
}
_TABLE, _HIGH = 0.6, 0.55


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """The courses of success, Alice's goals over training, and who beats whom."""
    own = evidence.workload == "default"
    panels = [measured_panel("Who beats whom", _payoff, evidence)]
    if own:
        panels.insert(0, measured_panel("Goals that Alice set", _film, evidence))
    return Collage(
        "Alice sets the goals that teach Bob",
        _idea(),
        measured_panel("Success on unseen goals", _curves, evidence),
        panels,
        data="Grasp25D: a gripper and a block" if own else "the workload",
        network="embedding 32 per object, maximum, 64 tanh",
    )


def _idea() -> Panel:
    """Both begin in the same state; where Bob fails, Alice's steps are cloned."""

    def draw(ax: Axes) -> None:
        d = Diagram(ax, 374, 372)
        start = d.circle(30, 104, 26, "$s_0$", color=theme.GRAYS[2])
        alice = d.box(142, 36, 100, 52, "Alice", color=ALICE, filled=True)
        bob = d.box(142, 172, 100, 52, "Bob", color=BOB, filled=True)
        goal = d.circle(268, 36, 26, "$g$", color=ALICE)
        check = d.box(322, 172, 86, 52, "at $g$?", color=theme.GRAYS[2])
        d.arrow(start, alice)
        d.arrow(start, bob)
        d.arrow(alice, goal)
        d.arrow(goal, bob)
        d.arrow(bob, check)
        d.note(262, 222, "no: Alice +5, clone her", color=ALICE)
        d.note(300, 246, "yes: Bob +5", color=BOB)
        d.field(187, 320, 374, 96)
        d.equation(187, 300, r"L_{Bob} = L_{PPO} - \beta\, E[\,\min(r,\ 1+\varepsilon)\,]", size=17)
        d.equation(187, 342, r"r = \pi_B(a_A \mid s, g)\, /\, \pi_B^{old}(a_A \mid s, g)", size=15)

    return Panel(
        "The idea",
        draw,
        "Alice acts from a start state; where she ends is the goal. Bob tries to reach it from the same start. If he "
        "fails, she earns 5 and her steps are cloned; if not, he earns 5.",
        "What Alice reaches is a goal for Bob. Where he fails, he clones her.",
    )


def _curves(evidence: Evidence) -> Panel:
    found = {}
    for name, (arm, color) in ARMS.items():
        table = evidence.across_seeds("success", over="step", arm=arm)
        table.index = table.index / 1000
        found[name] = (table, color)

    def draw(ax: Axes) -> None:
        for name, (table, color) in found.items():
            marks.course(ax, table, color, name)
        ax.set_ylim(0, 1)
        ax.set_xlabel("environment steps, thousands")
        theme.tidy(ax, grid="y", ticks=5)

    last = ", ".join(f"{name} {table['mean'].iloc[-1]:.2f}" for name, (table, _) in found.items())
    return Panel(
        "Success on unseen goals",
        draw,
        f"Share of hold-out goals that Bob reaches, over environment steps; at the end: {last}."[:300],
        "share of unseen goals reached by Bob (push and pick); mean and 95% interval over seeds",
        claim="C3",
    )


def _payoff(evidence: Evidence) -> Panel:
    runs = evidence.find_runs(arm="asp")
    if not runs:
        raise LookupError("no run of self-play")
    payoff = np.concatenate([evidence.array(run.id, "payoff") for run in runs])  # (R, A, B)
    count = np.isfinite(payoff).sum(0)
    matrix = np.where(count > 0, np.nansum(payoff, 0) / np.maximum(count, 1), np.nan)  # (A, B)

    def draw(ax: Axes) -> None:
        ax.imshow(matrix, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto")
        last = len(matrix) - 1
        for i, j in ((0, 0), (0, last), (last, 0), (last, last)):  # the others are told by their color
            if np.isfinite(value := matrix[i, j]):
                ink = "white" if value > 0.55 else theme.INK
                ax.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=ink)
        ticks = range(len(matrix))
        ax.set_xticks(ticks, ["start", *[""] * (len(matrix) - 2), "end"])
        ax.set_yticks(ticks, ["start", *[""] * (len(matrix) - 2), "end"])
        ax.set_xlabel("Bob's training")
        ax.set_ylabel("Alice's")

    return Panel(
        "Who beats whom",
        draw,
        f"Share of Alice's goals that Bob reaches: first Alice against last Bob {matrix[0, -1]:.2f}, last Alice "
        f"against first Bob {matrix[-1, 0]:.2f}, both at the end {matrix[-1, -1]:.2f}.",
        "% of an Alice's valid goals that a Bob reaches",
        claim="C7",
    )


def _film(evidence: Evidence) -> Panel:
    runs = [run for run in evidence.find_runs(arm="asp") if 0 in run.seeds]
    if not runs:
        raise LookupError("no run of self-play with seed 0")
    film = evidence.array(runs[0].id, "film")  # (marks, games, 2, S)
    chosen = sorted({0, len(film) // 2, len(film) - 1})
    names = ["first turn", "middle", "late"] if len(chosen) == 3 else [f"mark {k}" for k in chosen]

    def draw(ax: Axes) -> None:
        ax.set(xlim=(-0.05, 3 * 1.4), ylim=(-0.2, 0.62))
        ax.axis("off")
        for column, (k, name) in enumerate(zip(chosen, names, strict=True)):
            middle = 0.65 + 1.4 * column
            ax.add_patch(Rectangle((middle - _TABLE, -0.05), 2 * _TABLE, 0.05, color=theme.GRAYS[2], linewidth=0))
            ax.text(middle, -0.13, name, ha="center", va="center", color=theme.MUTED)
            for start, end in film[k]:
                if np.isfinite(end).all():
                    _goal(ax, middle, start, end)

    count = [int(np.isfinite(film[k, :, 1, 0]).sum()) for k in chosen]
    height = [float(np.nanmean(film[k, :, 1, 7])) if n else float("nan") for k, n in zip(chosen, count, strict=True)]
    listed = ", ".join(f"{name} {h:.2f} m" for name, h in zip(names, height, strict=True))
    return Panel(
        "Goals that Alice set",
        draw,
        f"Alice's goals seen from the side, seed 0; mean height of the block: {listed}."[:300],
        "seen from the side: where she found the block (pale) and left it; seed 0",
        claim="C10",
    )


def _goal(ax: Axes, middle: float, start: np.ndarray, end: np.ndarray) -> None:
    """One goal from the side, x and z: a block at its start (pale) and at its goal."""
    wide, high = 0.09, 0.07
    for place, color in ((start[5:8], theme.tint(ALICE, 0.75)), (end[5:8], ALICE)):
        x, z = middle + float(np.clip(place[0], -_TABLE, _TABLE)), float(min(place[2], _HIGH))
        ax.add_patch(Rectangle((x - wide / 2, z), wide, high, facecolor=color, edgecolor="white", linewidth=0.6))
