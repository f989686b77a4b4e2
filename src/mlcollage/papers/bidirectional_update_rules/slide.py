"""How the evidence on meta-learned bidirectional update rules is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import SubFigure

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

COLORS = theme.arm_colors(["blur", "sgd", "sgd_bn"], muted=["adam"])
RULE, UNTRAINED = COLORS["blur"], theme.GRAYS[1]
NAMES = {"blur": "genome", "sgd_bn": "SGD + batch norm", "adam": "Adam", "sgd": "SGD"}
SIGNED = LinearSegmentedColormap.from_list("signed", [theme.PALETTE["purple"], "#FFFFFF", RULE])
DATA = {"breast_cancer": "cancer", "wine": "wine", "iris": "iris", "xor": "xor", "circle": "circle"}


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """Accuracy over the first steps, other data, and how far the update is from a gradient."""
    own = evidence.workload == "default"
    if own:
        small = [
            measured_panel("Data it never saw", _transfer, evidence),
            measured_panel("Is it a gradient?", _turning, evidence),
        ]
    else:  # those are about data of the study's own
        small = [measured_panel("Searching for a rule", _search, evidence)]
    return Collage(
        "a genome of 29 numbers replaces the gradient",
        _IDEA,
        measured_panel("The first steps", _race, evidence),
        small,
        data="scikit-learn digits" if own else "the workload",
        network="64-32-10, tanh" if own else "one hidden layer of 32",
    )


def _neuron(d: Diagram, x: float, y: float, color: str, names: tuple[str, str]) -> None:
    """A neuron with two states."""
    d.field(x, y, 62, 92, theme.WASH)
    for dy, name in ((-22, names[0]), (22, names[1])):
        d.circle(x, y + dy, 17, name, color=color, size=13)


def _draw_idea(ax: Axes) -> None:
    d = Diagram(ax, 374, 372)
    for x, name in ((46, "i"), (328, "j")):
        _neuron(d, x, 92, RULE, (f"$a_{name}^1$", f"$a_{name}^2$"))
    d.arrow((80, 70), (294, 70), color=RULE, width=2.2)
    d.arrow((294, 114), (80, 114), color=theme.PALETTE["purple"], width=2.2)
    d.note(187, 50, r"up: mixed by $\nu$", color=theme.ink(RULE))
    d.note(187, 134, r"down: mixed by $\mu$", color=theme.ink(theme.PALETTE["purple"]))
    d.note(187, 92, "$w_{ij}^c$", color=theme.INK, fontsize=17)
    d.note(46, 22, "below", color=theme.INK)
    d.note(298, 22, "above (top: truth)", color=theme.INK)
    d.field(187, 268, 374, 208)
    d.equation(187, 188, r"a_j^c \leftarrow \sigma(\eta \sum_{i,d} w_{ij}^c \nu^{dc} a_i^d)", size=16, room=350)
    d.equation(
        187, 239, r"a_i^c \leftarrow \sigma(f a_i^c + \eta \sum_{j,d} w_{ji}^c \mu^{dc} a_j^d)", size=16, room=350
    )
    d.equation(187, 290, r"w_{ij}^c \leftarrow \tilde f w_{ij}^c + \tilde\eta \sum_{e,d} a_i^e \tilde\nu^{ec}"
               r"\tilde\mu^{cd} a_j^d", size=16, room=350)  # fmt: skip
    d.note(187, 332, "the small matrices are the genome,", color=theme.INK)
    d.note(187, 354, "shared by all neurons, layers and tasks", color=theme.INK)


_IDEA = Panel(
    "The idea",
    _draw_idea,
    "Neurons hold two states. They are mixed by one small matrix on the way up and by another on the way down; a "
    "synapse changes by a product of the states on its sides. The matrices are the genome.",
    "One small genome says how states go up, how they come back, and how synapses change.",
)


def _race(evidence: Evidence) -> Panel:
    there = set(evidence.select("accuracy")["arm"])
    curves = {arm: 100 * evidence.across_seeds("accuracy", over="after", arm=arm) for arm in NAMES if arm in there}

    def draw(ax: Axes) -> None:
        for arm, c in curves.items():
            marks.course(ax, c, COLORS[arm], NAMES[arm], dots=arm != "adam", dashed=arm == "adam", bounds=(0, 100))
        marks.log_steps(ax, [int(i) for i in next(iter(curves.values())).index])
        ax.set_xlabel("steps of learning (log)")
        theme.tidy(ax, grid="y", ticks=5)

    def at(step: int) -> str:
        return ", ".join(f"{NAMES[a]} {c['mean'].get(step, np.nan):.0f}" for a, c in curves.items())

    last = int(next(iter(curves.values())).index[-1])
    return Panel(
        "The first steps",
        draw,
        f"Test accuracy in percent after 5 steps: {at(5)}; after {last}: {at(last)}.",
        "test accuracy (%), each method with its best of 12 settings for each step",
        claim="C4",
    )


def _transfer(evidence: Evidence) -> Panel:
    arms = {"shipped": RULE, "untrained": UNTRAINED}
    found = {arm: 100 * evidence.across_seeds("transfer_accuracy", over="data", arm=arm) for arm in arms}
    names = [name for name in DATA if name in found["shipped"].index]

    def draw(ax: Axes) -> None:
        rows = np.arange(len(names))[::-1].astype(float)
        for arm, color in arms.items():
            c = found[arm].loc[names]
            lo, hi = c["lo"].clip(0, 100), c["hi"].clip(0, 100)
            theme.dots_with_interval(ax, rows, c["mean"], lo, hi, color, horizontal=True, hollow=arm == "untrained")
        ax.set_yticks(rows, [DATA[name] for name in names])
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(-0.6, len(names) - 0.4)
        theme.tidy(ax, grid="x", ticks=4)

    told = ", ".join(
        f"{DATA[n]} {found['shipped']['mean'][n]:.0f} against {found['untrained']['mean'][n]:.0f}" for n in names
    )
    return Panel(
        "Data it never saw",
        draw,
        f"Accuracy in percent after 10 steps, genome trained on digits against the best of 64 untrained ones: {told}.",
        "accuracy after 10 steps (%); hollow: untrained",
        claim="C5",
    )


def _turning(evidence: Evidence) -> Panel:
    pictures = {}
    for arm in ("backprop", "learned"):
        run = next(r for r in evidence.find_runs(arm=arm, experiment="turning") if 0 in r.seeds)
        j = evidence.array(run, "jacobian")
        pictures[arm] = (j - j.T) / (np.linalg.norm(j) or 1.0)
    share = {arm: evidence.select("asymmetry", arm=arm)["value"].mean() for arm in pictures}

    def draw(part: SubFigure) -> None:
        axes = part.subplots(1, 2, gridspec_kw={"wspace": 0.08})
        limit = float(np.quantile(np.abs(pictures["learned"]), 0.97)) or 1.0
        for ax, (arm, picture) in zip(axes, pictures.items(), strict=True):
            ax.imshow(picture, cmap=SIGNED, vmin=-limit, vmax=limit)
            ax.set_xlabel("learned" if arm == "learned" else "backprop")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_color(theme.RULE)

    return Panel(
        "Is it a gradient?",
        draw,
        f"The antisymmetric part of the update's Jacobian by the weights: a share of {share['backprop']:.0e} of its "
        f"norm for backprop (blank), {share['learned']:.2f} for the learned rule (speckled).",
        "antisymmetric part of ∂Δw/∂w; blank: a gradient",
        claim="C8",
        own_axes=True,
    )


def _search(evidence: Evidence) -> Panel:
    arms = {"k2": "by gradients", "cmaes": "by evolution"}
    rows = {a: evidence.across_seeds("accuracy", over="trained", arm=a) for a in arms}

    def draw(ax: Axes) -> None:
        for arm, color in zip(arms, (RULE, theme.PALETTE["purple"]), strict=True):
            marks.course(ax, 100 * rows[arm].set_axis([0, 1]), color, arms[arm], dots=True, interval=False)
        ax.set_xticks([0, 1], ["before", "after the search"])
        ax.set_xlim(-0.2, 1.2)
        theme.tidy(ax, grid="y", ticks=4)

    told = marks.from_to({arms[a]: 100 * c for a, c in rows.items()}, "{:.0f}")
    return Panel(
        "Searching for a rule",
        draw,
        f"Accuracy in percent after ten steps by the best genome, before and after the search: {told}.",
        "test accuracy (%) after ten steps",
        claim="C2",
    )
