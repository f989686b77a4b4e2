"""How the evidence on Gated Linear Networks is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import SubFigure
from matplotlib.ticker import NullLocator

from mlcollage.collage import Collage, Diagram, Panel, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.headlines import with_headlines

from .study.claims import FORGET_ARMS

COLORS = theme.arm_colors(["gln", "mlp", "linear", "replay", "ewc"])
DIVERGING = LinearSegmentedColormap.from_list("for_against", [COLORS["mlp"], "#FFFFFF", COLORS["gln"]])


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """The idea, and the panels for which there is evidence (a user's workload has no half-moons)."""
    panels = [_progress(evidence), _keeps(evidence), _dose(evidence)]
    if evidence.find_runs(experiment="surface"):
        panels.append(_surfaces(evidence))
    panels.append(_saliency(evidence, wide=len(panels) == 4))
    tagline = "learns online, without backpropagation, and forgets little"
    return Collage(tagline, _IDEA, with_headlines(panels, verdicts, _MESSAGES))


_MESSAGES = {
    "A single pass": ("C2", "Strong in a single pass"),
    "Tasks one after the other": ("C3", "It keeps what it learned"),
    "Half-spaces and forgetting": ("C3b", "More half-spaces keep more"),
    "What spoke for the class": ("C5", "Each prediction can be read off"),
}


def _draw_idea(ax: Axes) -> None:
    d = Diagram(ax, 400, 400)
    blue, red = COLORS["gln"], COLORS["mlp"]
    plane = d.halfspaces(68, 68, 132, 120, [[1.0, 0.45], [-0.5, 1.0]], [0.1, -0.15])
    d.circle(88, 56, 6, color=red)
    d.note(106, 50, "$z$", color=theme.INK, fontsize=16)
    d.note(68, 146, "input $z$")
    values = np.array([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5], [8, 9, 7, 9, 3], [4, 9, 6, 2, 7]])
    weights = d.tensor(290, 66, values, cell=25, highlight=[3], color=blue)
    d.note(290, 2, "weights, one row per region")
    d.arrow(plane.right, (224, 102), curve=0.2)
    q = d.circle(290, 196, 25, "$q$", color=blue, size=18)
    d.arrow(weights.bottom, q.top, "$w_{c(z)}$")
    for y in (166, 187, 208, 229):
        d.line(d.circle(150, y, 8, color="#9DB2C2"), q)
    d.note(66, 206, "predictions $p_i$\nof the layer\nbelow")
    d.arrow(q, (346, 196))
    d.note(374, 196, "next\nlayer")
    d.field(200, 326, 400, 140)
    d.equation(200, 288, r"q = \sigma(w_{c(z)} \cdot \mathrm{logit}(p))", size=20)
    d.equation(200, 330, r"w_{c(z)} \leftarrow \mathrm{clip}(w_{c(z)} - \eta\,(q - x)\,\mathrm{logit}(p))", room=380)
    d.note(200, 370, "convex in every neuron; local", room=380)


_IDEA = Panel(
    "The idea",
    _draw_idea,
    "Lines cut the input plane into regions; the region of z picks one row of weights, which mixes the predictions of "
    "the layer below into the neuron's own prediction q. Only that row is updated.",
    "Every neuron predicts the label. Half-spaces of the input pick the weights it mixes with; only those learn.",
)


def _progress(evidence: Evidence) -> Panel:
    names = {"gln": "GLN", "linear": "linear", "mlp": "MLP"}
    curves = {arm: evidence.across_seeds("progressive_accuracy", arm=arm) for arm in names}

    def draw(ax: Axes) -> None:
        for arm, c in curves.items():
            theme.band(ax, c.index, c["lo"].clip(0, 1), c["hi"].clip(0, 1), COLORS[arm])
            ax.plot(c.index, c["mean"], color=COLORS[arm])
            theme.label_line_end(ax, c.index[-1], c["mean"].iloc[-1], names[arm], COLORS[arm])
        seen = curves["gln"].index
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks([seen[0], seen[len(seen) // 3], seen[-1]], [f"{seen[i]:,}" for i in (0, len(seen) // 3, -1)])
        ax.set_xlabel("samples seen, each once (log)")
        theme.tidy(ax, grid="y", ticks=4)

    first, last = curves["gln"]["mean"].iloc[0], curves["gln"]["mean"].iloc[-1]
    mlp = curves["mlp"]["mean"]
    alt = (
        f"Accuracy on the coming samples rises from {first:.2f} to {last:.2f} for the GLN, "
        f"from {mlp.iloc[0]:.2f} to {mlp.iloc[-1]:.2f} for the MLP."
    )
    return Panel("A single pass", draw, alt, "accuracy on the samples to come")


def _keeps(evidence: Evidence) -> Panel:
    names = {"gln_m8": "GLN", "replay": "replay", "ewc": "EWC", "mlp": "MLP"}
    curves = {arm: evidence.across_seeds("mean_task_accuracy", over="after", arm=arm) for arm in names}

    def draw(ax: Axes) -> None:
        for arm, c in curves.items():
            color = COLORS[arm.removesuffix("_m8")]
            theme.band(ax, c.index, c["lo"].clip(0, 1), c["hi"].clip(0, 1), color)
            ax.plot(c.index, c["mean"], "-o" if arm == "gln_m8" else "--o", color=color)
            theme.label_line_end(ax, c.index[-1], c["mean"].iloc[-1], names[arm], color)
        ax.set_xticks(curves["mlp"].index)
        ax.set_xlabel("permuted tasks learned so far")
        theme.tidy(ax, grid="y", ticks=4)

    ends = ", ".join(f"{names[arm]} {c['mean'].iloc[0]:.2f} to {c['mean'].iloc[-1]:.2f}" for arm, c in curves.items())
    kept = {arm: evidence.select("numbers_kept", arm=arm)["value"].mean() for arm in names}
    memory = ", ".join(f"{names[arm]} {number:,.0f}" for arm, number in kept.items())
    alt = f"Mean accuracy over the tasks learned so far, first to last: {ends}. Numbers kept in memory: {memory}."
    times = kept["gln_m8"] / kept["replay"]
    subtitle = f"accuracy over the tasks so far; memory: {times:,.0f} times that of replay"
    return Panel("Tasks one after the other", draw, alt, subtitle)


def _dose(evidence: Evidence) -> Panel:
    sizes = [int(arm.removeprefix("gln_m")) for arm in FORGET_ARMS]
    by_arm = [evidence.select("average_accuracy", arm=arm)["value"].to_numpy() for arm in FORGET_ARMS]
    summary = [evidence.across_seeds("average_accuracy", arm=arm).iloc[0] for arm in FORGET_ARMS]
    mlp = evidence.across_seeds("average_accuracy", arm="mlp").iloc[0]

    def draw(ax: Axes) -> None:
        mean, lo, hi = ([s[k] for s in summary] for k in ("mean", "lo", "hi"))
        theme.dots_with_interval(ax, range(len(sizes)), mean, lo, hi, COLORS["gln"], seeds=by_arm)
        theme.reference_line(ax, mlp["mean"], "MLP", COLORS["mlp"])
        ax.set_xticks(range(len(sizes)), [str(m) for m in sizes])
        ax.set_xlim(-0.5, len(sizes) - 0.5)
        ax.set_xlabel("half-spaces per neuron")
        theme.tidy(ax, grid="y", ticks=4)

    values = ", ".join(f"{m}: {s['mean']:.2f}" for m, s in zip(sizes, summary, strict=True))
    alt = f"Mean accuracy over all tasks by half-spaces per neuron: {values}; MLP {mlp['mean']:.2f}."
    return Panel("Half-spaces and forgetting", draw, alt, "accuracy over all tasks at the end")


def _surfaces(evidence: Evidence) -> Panel:
    (run,) = evidence.find_runs(experiment="surface")[:1]
    layers = [evidence.array(run, f"layer{i}") for i in range(1, len(evidence.select("surface_layer")) + 1)]
    points, labels = evidence.array(run, "points"), evidence.array(run, "labels")

    def draw(part: SubFigure) -> None:
        axes = np.atleast_1d(part.subplots(1, len(layers)))
        for i, (ax, p) in enumerate(zip(axes, layers, strict=True), start=1):
            ax.imshow(p, origin="lower", extent=(-2.5, 2.5, -2.5, 2.5), cmap=DIVERGING, vmin=0, vmax=1)
            ax.contour(np.linspace(-2.5, 2.5, len(p)), np.linspace(-2.5, 2.5, len(p)), p, [0.5], colors=theme.INK)
            for c, color in ((0, COLORS["mlp"]), (1, COLORS["gln"])):
                chosen = points[labels == c][:60]
                ax.plot(*chosen.T, "o", color=color, markersize=3.2, markeredgewidth=0.5, markeredgecolor="white")
            ax.set_title("output" if i == len(layers) else f"layer {i}", loc="center")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)

    alt = f"Two half-moons: the mean prediction of the neurons of each of {len(layers)} layers sharpens with depth."
    return Panel("Every layer predicts", draw, alt, "mean of a layer, after one pass", own_axes=True)


def _picture(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Features as an image if their number allows it (gray or three planes), else as one row."""
    for planes in (1, 3):
        side = round((len(features) / planes) ** 0.5)
        if side > 4 and planes * side * side == len(features):
            return features.reshape(planes, side, side).mean(axis=0)
    return features[None]


def _saliency(evidence: Evidence, *, wide: bool) -> Panel:
    run = next(r for r in evidence.find_runs(arm="gln", seed=0, experiment="stream"))
    inputs, spoke = evidence.array(run, "saliency_input"), evidence.array(run, "saliency")
    labels = evidence.array(run, "saliency_label")
    count = min(len(labels), 5 if wide else 3)
    worst = evidence.select("linearity_residual", arm="gln")["value"].max()

    def draw(part: SubFigure) -> None:
        axes = part.subplots(2, count, squeeze=False)
        for j in range(count):
            axes[0, j].imshow(_picture(inputs[j]), cmap="gray_r", aspect="auto" if inputs[j].size < 9 else "equal")
            picture = _picture(spoke[j])
            limit = float(np.abs(picture).max()) or 1.0
            axes[1, j].imshow(picture, cmap=DIVERGING, vmin=-limit, vmax=limit)
            axes[0, j].set_title(f"class {labels[j]}", loc="center")
        for ax in axes.ravel():
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)

    alt = (
        f"For {count} test samples: the input, and what each feature added to the logit of the right class. "
        f"The products of matrices reproduce the outputs to {worst:.0e}."
    )
    subtitle = f"blue spoke for the class, orange against; exact to {worst:.0e} where no clip is active"
    return Panel("What spoke for the class", draw, alt, subtitle, own_axes=True, wide=wide)
