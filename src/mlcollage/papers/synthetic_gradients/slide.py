"""How the evidence on synthetic gradients is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

# One meaning per color: what the gradient comes from.
TRUE, SYNTHETIC = theme.PALETTE["black"], theme.PALETTE["blue"]
OTHER, GRAY = theme.PALETTE["orange"], theme.GRAYS[0]
NAMES = {
    "bp": "backpropagation",
    "cdni": "synthetic gradient",
    "dni": "synthetic, no label",
    "dfa": "direct feedback",
    "fa": "feedback alignment",
    "kickback": "kickback",
    "critic": "critic",
    "noise": "noise",
    "none": "last layer only",
}
COLORS = {"bp": TRUE, "cdni": SYNTHETIC, "dni": SYNTHETIC, "none": GRAY, "noise": GRAY}


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """Accuracy of all rules; the timeline of two processes; representations by layer."""
    own = evidence.workload == "default"
    panels = [
        measured_panel("Two processes", _processes, evidence),
        measured_panel("Representations by layer", _layers, evidence),
    ]
    return Collage(
        "a model of the gradient unlocks the backward pass",
        _IDEA,
        measured_panel("Rules of credit assignment", _rules, evidence),
        panels,
        data="Fashion-MNIST" if own else "the workload",
        network="MLPs of 4 and 8 layers" if own else "the workload's network",
    )


def _draw_idea(ax: Axes) -> None:
    """Two chains: gradients that come back through all layers, and gradients that are predicted at each."""
    d = Diagram(ax, 374, 372)
    for column, (x, color) in enumerate(((84, TRUE), (282, SYNTHETIC))):
        d.note(x, 14, ("backpropagation", "synthetic gradient")[column], color=color, weight="semibold")
        boxes = [d.box(x - 22, y, 74, 40, text, color=theme.INK) for y, text in ((228, "$f_1$"), (142, "$f_2$"))]
        loss = d.box(x - 22, 56, 74, 40, "loss", color=theme.INK)
        chain = [*boxes, loss]
        for a, b in pairwise(chain):
            d.arrow((a.x - 18, a.top[1]), (b.x - 18, b.bottom[1]), color=theme.INK)
        for a, b in pairwise(chain):
            if column == 0:
                d.arrow((b.x + 18, b.bottom[1]), (a.x + 18, a.top[1]), color=TRUE, dashed=True)
                continue
            m = d.circle(x + 62, (a.y + b.y) / 2, 19, "$M$", color=SYNTHETIC)
            d.arrow(m, (a.right[0] - 6, a.top[1] + 2), color=SYNTHETIC)
            d.arrow((b.right[0] - 6, b.bottom[1]), m, color=SYNTHETIC, dashed=True)
    d.field(187, 322, 374, 96)
    d.equation(187, 300, r"\Delta\theta_i \propto M_i(h_i, y)^\top\, \partial h_i / \partial \theta_i", size=18)
    d.note(187, 344, "M learns from the layer above it")


_IDEA = Panel(
    "The idea",
    _draw_idea,
    "Left: in backpropagation a layer waits until the gradient has come back from the loss through all layers above. "
    "Right: a model M behind each layer predicts that gradient at once, and learns later from the layer above it.",
    "A layer need not wait for the loss: a small model M says now which gradient will arrive.",
)


def _rules(evidence: Evidence) -> Panel:
    measured = set(evidence.select("test_accuracy")["arm"])
    values = {arm: 100 * evidence.select("test_accuracy", arm=arm)["value"] for arm in NAMES if arm in measured}
    order = sorted(values, key=lambda arm: float(values[arm].mean()))

    def draw(ax: Axes) -> None:
        for row, arm in enumerate(order):
            v = values[arm]
            lo, hi = theme.mean_interval(v)
            color = COLORS.get(arm, OTHER)
            theme.dots_with_interval(
                ax, [row], [v.mean()], [lo], [hi], color, seeds=[v.to_numpy()], horizontal=True, hollow=arm == "dni"
            )
            ax.annotate(
                f"{v.mean():.1f}", (max(hi, v.max()), row), (10, 0), textcoords="offset points", va="center",
                color=theme.ink(color), weight="semibold",
            )  # fmt: skip
        ax.set_yticks(range(len(order)), [NAMES[arm] for arm in order])
        ax.set_ylim(-0.6, len(order) - 0.4)
        ax.margins(x=0.12)
        theme.tidy(ax, grid="x", ticks=5)

    text = ", ".join(f"{NAMES[a]} {values[a].mean():.1f}" for a in reversed(order))
    return Panel(
        "Rules of credit assignment",
        draw,
        f"Test accuracy in %: {text}."[:300],
        "test accuracy (%), four hidden layers, each rule at its best learning rate; mean, 95% interval, seeds",
        claim="C5",
    )


def _processes(evidence: Evidence) -> Panel:
    run = evidence.find_runs(arm="processes", seed=0)[0]
    spans = {arm: evidence.array(run, f"spans_{arm}") for arm in ("sequential", "dni")}
    speed = {arm: float(evidence.select("steps_per_second", arm=arm)["value"].mean()) for arm in spans}

    def draw(ax: Axes) -> None:
        for group, (arm, color) in enumerate((("dni", SYNTHETIC), ("sequential", TRUE))):
            s: npt.NDArray[np.float64] = spans[arm]
            start = float(s[(s[:, 1] == 0) & (s[:, 4] >= 3)][:, 2].min())
            for rank in (0, 1):
                y = 3.6 * group + 1.05 * rank
                for _, kind, begin, stop, _ in s[(s[:, 0] == rank) & (s[:, 3] > start) & (s[:, 2] < start + 0.3)]:
                    left, right = max(0.0, 1e3 * (begin - start)), min(300.0, 1e3 * (stop - start))
                    face = color if kind == 0 else theme.tint(GRAY, 0.25)
                    ax.add_patch(Rectangle((left, y - 0.45), right - left, 0.9, facecolor=face, linewidth=0))
            name = "decoupled" if arm == "dni" else "one batch at a time"
            text = f"{name}: {speed[arm]:.0f} steps/s"
            ax.text(0, 3.6 * group + 2.35, text, color=theme.ink(color), weight="semibold", va="center")
        ax.set_yticks([])
        ax.set_ylim(-0.6, 6.5)
        ax.set_xlim(0, 300)
        theme.tidy(ax, ticks=4)
        ax.spines["left"].set_visible(False)

    return Panel(
        "Two processes",
        draw,
        f"Timeline of two processes: decoupled, {speed['dni']:.0f} steps per second and hardly a gap; with one batch "
        f"at a time, {speed['sequential']:.0f} steps per second, each waiting half of the time.",
        "computing (full), blocked (pale); ms",
        claim="C11",
    )


def _layers(evidence: Evidence) -> Panel:
    shown = (("other", "backprop, other seed", TRUE), ("cdni", "synthetic", SYNTHETIC))
    curves = {arm: evidence.across_seeds("similarity_to_bp", over="layer", arm=arm) for arm, *_ in shown}

    def draw(ax: Axes) -> None:
        for arm, name, color in shown:
            marks.course(ax, curves[arm], color, name, dots=True)
        ax.set_xlabel("layer")
        theme.tidy(ax, grid="y", ticks=4)

    text = marks.from_to({name: curves[arm] for arm, name, _ in shown})
    return Panel(
        "Representations by layer",
        draw,
        f"Correlation of dissimilarity matrices with those of backpropagation, first to last layer: {text}.",
        "similarity of representations to backprop's",
        claim="C6",
    )
