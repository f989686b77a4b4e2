"""How the evidence on Gated Linear Networks is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import SubFigure

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

COLORS = theme.arm_colors(["gln", "mlp", "linear", "replay", "ewc"])
DIVERGING = LinearSegmentedColormap.from_list("for_against", [theme.PALETTE["purple"], "#FFFFFF", COLORS["gln"]])


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """What is kept of earlier tasks, how fast one pass learns, and what spoke for a prediction."""
    found = evidence.find_runs(experiment="stream", arm="gln")
    hidden: Any = found[0].settings.get("hidden", ()) if found else ()
    return Collage(
        "learns online, without backpropagation, and forgets little",
        _IDEA,
        measured_panel("Tasks one after the other", _keeps, evidence),
        [
            measured_panel("A single pass", _progress, evidence),
            measured_panel("What spoke for the class", _saliency, evidence),
        ],
        data="scikit-learn digits, permuted" if evidence.workload == "default" else "the workload",
        network=f"GLN {'-'.join(map(str, (*hidden, 1)))}, one per class",
    )


def _draw_idea(ax: Axes) -> None:
    d = Diagram(ax, 374, 372)
    blue, red = COLORS["gln"], COLORS["mlp"]
    plane = d.halfspaces(62, 62, 120, 112, [[1.0, 0.45], [-0.5, 1.0]], [0.1, -0.15])
    d.circle(80, 52, 6, color=red)
    d.note(98, 46, "$z$", color=theme.INK, fontsize=16)
    d.note(62, 134, "input $z$")
    values = np.array([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5], [8, 9, 7, 9, 3], [4, 9, 6, 2, 7]])
    weights = d.tensor(272, 78, values, cell=23, highlight=[3], color=blue)
    d.note(272, 14, "one row per region", color=theme.INK)
    d.arrow(plane.right, (210, 112), curve=0.2)
    q = d.circle(272, 192, 24, "$q$", color=blue, size=15)
    d.arrow(weights.bottom, q.top, "$w_{c(z)}$")
    for y in (162, 182, 202, 222):
        d.line(d.circle(146, y, 7, color="#9DB2C2"), q)
    d.note(66, 192, "predictions\nbelow", color=theme.INK)
    d.arrow(q, (330, 192))
    d.note(352, 192, "next", color=theme.INK)
    d.field(187, 306, 374, 122)
    d.equation(187, 272, r"q = \sigma(w_{c(z)} \cdot \mathrm{logit}(p))", size=19)
    d.equation(187, 308, r"w_{c(z)} \leftarrow w_{c(z)} - \eta\,(q - x)\,\mathrm{logit}(p)", size=17, room=350)
    d.note(187, 344, "a convex problem in every neuron", color=theme.INK)


_IDEA = Panel(
    "The idea",
    _draw_idea,
    "Lines cut the input plane into regions; the region of z picks one row of weights, which mixes the predictions of "
    "the layer below into the neuron's own prediction q. Only that row is updated.",
    "Every neuron predicts the label. Half-spaces of the input pick the weights it mixes with; only those learn.",
)


def _keeps(evidence: Evidence) -> Panel:
    names = {"gln_m8": "GLN", "replay": "MLP + replay", "ewc": "MLP + EWC", "mlp": "MLP"}
    curves = {arm: 100 * evidence.across_seeds("mean_task_accuracy", over="after", arm=arm) for arm in names}
    kept = {arm: float(evidence.select("numbers_kept", arm=arm)["value"].mean()) for arm in names}

    def draw(ax: Axes) -> None:
        for arm, c in curves.items():
            color, name = COLORS[arm.removesuffix("_m8")], f"{names[arm]} {c['mean'].iloc[-1]:.0f}"
            marks.course(ax, c, color, name, dots=True, dashed=arm in ("replay", "ewc"), bounds=(0, 100))
        ax.set_xticks(curves["mlp"].index)
        ax.set_xlabel("permuted tasks learned so far")
        theme.tidy(ax, grid="y", ticks=5)

    ends = marks.from_to({names[a]: c for a, c in curves.items()}, "{:.0f}")
    times = kept["gln_m8"] / kept["replay"]
    return Panel(
        "Tasks one after the other",
        draw,
        f"Accuracy in percent over the tasks learned so far, after the first to after the last: {ends}.",
        f"accuracy (%) over the tasks so far; the GLN stores {times:,.0f} times as many numbers as replay",
        claim="C3c",
    )


def _progress(evidence: Evidence) -> Panel:
    names = {"gln": "GLN", "linear": "linear", "mlp": "MLP"}
    curves = {arm: 100 * evidence.across_seeds("progressive_accuracy", arm=arm) for arm in names}

    def draw(ax: Axes) -> None:
        for arm, c in curves.items():
            marks.course(ax, c, COLORS[arm], names[arm], bounds=(0, 100))
        marks.log_steps(ax)
        ax.set_xlabel("seen")
        theme.tidy(ax, grid="y", ticks=4)

    ends = marks.from_to({names[a]: c for a, c in curves.items()}, "{:.0f}")
    return Panel(
        "A single pass",
        draw,
        f"Accuracy in percent on the samples to come, from the first to the last look: {ends}.",
        "accuracy (%) on the samples to come",
        claim="C2",
    )


def _picture(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Features as an image if their number allows it (gray or three planes), else as one row."""
    for planes in (1, 3):
        side = round((len(features) / planes) ** 0.5)
        if side > 4 and planes * side * side == len(features):
            return features.reshape(planes, side, side).mean(axis=0)
    return features[None]


def _saliency(evidence: Evidence) -> Panel:
    run = next(r for r in evidence.find_runs(arm="gln", seed=0, experiment="stream"))
    inputs, spoke = evidence.array(run, "saliency_input"), evidence.array(run, "saliency")
    labels = evidence.array(run, "saliency_label")
    count = min(len(labels), 4)
    worst = evidence.select("linearity_residual", arm="gln")["value"].max()

    pictures = [_picture(s) for s in spoke[:count]]
    limit = float(np.abs(pictures).max()) or 1.0  # one scale for all, so that colors can be compared

    def draw(part: SubFigure) -> None:
        axes = part.subplots(2, count + 1, squeeze=False, width_ratios=[*[1.0] * count, 0.12])
        for j, picture in enumerate(pictures):
            axes[0, j].imshow(_picture(inputs[j]), cmap="gray_r", aspect="auto" if inputs[j].size < 9 else "equal")
            axes[1, j].imshow(picture, cmap=DIVERGING, vmin=-limit, vmax=limit)
            axes[0, j].set_ylabel(str(labels[j]), rotation=0, ha="right", va="center")
        for ax in axes.ravel():
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        marks.color_scale(axes[1, count], DIVERGING, (-limit, limit))

    return Panel(
        "What spoke for the class",
        draw,
        f"For {count} test samples: the input, and what each feature added to the logit of the right class. The "
        f"products of matrices reproduce the outputs to {worst:.0e}.",
        "what each pixel adds to the class's logit",
        claim="C5",
        own_axes=True,
    )
