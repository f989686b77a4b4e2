"""How the evidence on Bayesian neural-network posteriors is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from mlcollage.collage import Collage, Diagram, Panel, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.headlines import with_headlines

from .study.claims import METHODS

NAMES = {
    "hmc": "HMC",
    "ensemble": "deep ensemble",
    "csghmc": "cyclical SGHMC",
    "sghmc": "SGHMC",
    "sgld": "SGLD",
    "mfvi": "mean-field VI",
    "sgd": "one optimum",
}
COLORS = dict(
    zip(METHODS, (theme.PALETTE[c] for c in ("blue", "orange", "sky", "green", "purple", "vermillion")), strict=False)
) | {"sgd": theme.GRAYS[0]}
BLUE, ORANGE, RED, GREEN = (theme.PALETTE[c] for c in ("blue", "orange", "vermillion", "green"))


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """The idea, and a panel for each part of the study that was run."""
    parts = {run.experiment for run in evidence.runs}
    panels: list[Panel] = []
    if "methods" in parts:
        panels += [*_plane(evidence), _methods(evidence), _distance(evidence), _mixing(evidence)]
    if {"settings", "augmentation"} <= parts:
        panels.append(_temperature(evidence))
    if parts & {"shift", "shift_of_workloads"}:
        panels.append(_shift(evidence))
    return Collage("full-batch HMC as the reference", _IDEA, with_headlines(panels, verdicts, _MESSAGES))


_MESSAGES = {
    "Accuracy": ("C1", "Averaging beats one optimum"),
    "Convergence": ("C2", "Functions mix, weights less"),
    "Temperature": ("C5", "No cold posterior is needed"),
    "Under shift": ("C7", "Averaging breaks under shift"),
    "Distance to HMC": ("C8", "Ensembles are closer than VI"),
}


def _draw_idea(ax: Axes) -> None:
    d = Diagram(ax, 400, 400)
    turn = np.linspace(0, np.pi / 2, 60)
    x0, y0, radius = 116.0, 168.0, 96.0
    for r, strength in ((112, 0.07), (80, 0.14), (48, 0.24)):
        d.circle(x0, y0, r, filled=True, color=theme.tint(BLUE, strength))
    path = x0 + radius * np.cos(turn + 0.5), y0 - radius * np.sin(turn + 0.5)
    ax.plot(*path, color=BLUE, linewidth=2.6, zorder=5)
    d.circle(float(path[0][0]), float(path[1][0]), 7, color=BLUE)
    d.circle(float(path[0][-1]), float(path[1][-1]), 7, color=BLUE)
    d.note(x0, 24, "one iteration", color=BLUE, weight="semibold")
    d.note(x0, 284, "the prior's level sets")
    d.equation(312, 64, r"m \sim \mathrm{N}(0, I)", size=16)
    d.equation(312, 104, r"m \leftarrow m + \frac{\epsilon}{2}\nabla \log p(w | D)", size=15, room=180)
    d.equation(312, 150, r"w \leftarrow w + \epsilon\, m", size=16)
    d.equation(312, 186, r"m \leftarrow m + \frac{\epsilon}{2}\nabla \log p(w | D)", size=15, room=180)
    d.note(312, 222, r"$L = \tau / \epsilon$ times, then accept", color=theme.INK)
    d.equation(312, 266, r"\tau = \frac{\pi}{2}\, s", size=18)
    d.field(200, 352, 400, 92)
    d.equation(200, 336, r"p(y|x, D) \approx \mathrm{mean}_k\ p(y|x, w_k)", size=17, room=380)
    d.note(200, 370, "every draw votes, every gradient sees all data")


_IDEA = Panel(
    "The idea",
    _draw_idea,
    "Hamiltonian Monte Carlo: momentum is drawn, L leapfrog steps follow the log-posterior of all data for a quarter "
    "of the prior's period, the end is accepted or not; predictions are averaged over draws.",
    "The exact posterior, at last, to measure the cheap ones by.",
)


def _plane(evidence: Evidence) -> list[Panel]:
    found = evidence.find_runs(experiment="methods", seed=0)
    if not found:
        return []
    grid, points = evidence.array(found[0], "plane"), evidence.array(found[0], "plane_points")
    axis = evidence.array(found[0], "plane_axis")
    top = grid.max()

    def draw(ax: Axes) -> None:
        height = grid - top
        shares = np.quantile(height, [0.0, 0.25, 0.45, 0.65, 0.8, 0.9, 0.96])
        ax.contourf(axis, axis, height, levels=[*shares, 1.0], colors=theme.sequential()(np.linspace(0.05, 0.75, 7)))
        ax.plot(*zip(*points[:2], strict=True), color=ORANGE, linewidth=1.4, zorder=3)
        for k, (x, y) in enumerate(points):
            color = ORANGE if k < 2 else RED
            ax.plot(x, y, "o", color=color, markeredgecolor="white", markersize=9, zorder=4)
            if k:
                ax.annotate(
                    f"chain {k}",
                    (x, y),
                    (9, 0),
                    textcoords="offset points",
                    va="center",
                    color=theme.ink(color),
                    weight="semibold",
                    path_effects=[withStroke(linewidth=3, foreground="white")],
                )
        ax.set_aspect("equal")
        ax.set_axis_off()

    alt = f"Log-posterior on the plane through three draws, two of one chain; it spans {top - grid.min():.0f} nats."
    return [Panel("A plane of the posterior", draw, alt, "log-density through three draws")]


def _methods(evidence: Evidence) -> Panel:
    there = [arm for arm in METHODS if (evidence.table["arm"] == arm).any()]
    found = {arm: evidence.across_seeds("accuracy", arm=arm).iloc[0] for arm in there}
    seeds = {arm: evidence.select("accuracy", arm=arm)["value"].to_numpy() for arm in there}

    def draw(ax: Axes) -> None:
        for row, (arm, s) in enumerate(found.items()):
            theme.dots_with_interval(
                ax, [row], [s["mean"]], [s["lo"]], [s["hi"]], COLORS[arm], seeds=[seeds[arm]], horizontal=True
            )
        ax.set_yticks(range(len(found)), [NAMES[arm] for arm in found])
        ax.set_ylim(len(found) - 0.5, -0.5)
        theme.tidy(ax, grid="x", ticks=4)
        ax.tick_params(axis="y", length=0)

    alt = "Test accuracy: " + ", ".join(f"{NAMES[a]} {s['mean']:.3f}" for a, s in found.items()) + "."
    return Panel("Accuracy", draw, alt, "test accuracy, dots are splits")


def _distance(evidence: Evidence) -> Panel:
    there = [arm for arm in METHODS if (evidence.table["arm"] == arm).any()]
    tv, same = (
        {arm: evidence.across_seeds(metric, arm=arm).iloc[0] for arm in there} for metric in ("tv", "agreement")
    )

    def draw(ax: Axes) -> None:
        for row, arm in enumerate(there):
            s = tv[arm]
            theme.dots_with_interval(ax, [row], [s["mean"]], [s["lo"]], [s["hi"]], COLORS[arm], horizontal=True)
            agree = f"{100 * same[arm]['mean']:.0f}%"
            ax.text(1.0, row, agree, transform=ax.get_yaxis_transform(), va="center", ha="right", color=theme.MUTED)
        ax.set_yticks(range(len(there)), ["HMC again" if arm == "hmc" else NAMES[arm] for arm in there])
        ax.set_ylim(len(there) - 0.5, -0.5)
        ax.set_xlim(0, 1.5 * max(float(s["hi"]) for s in tv.values()))
        theme.tidy(ax, grid="x", ticks=4)
        ax.tick_params(axis="y", length=0)

    alt = "Total variation and agreement with independent HMC chains: " + ", ".join(
        f"{NAMES[a]} {tv[a]['mean']:.3f} and {same[a]['mean']:.3f}" for a in there
    )
    return Panel("Distance to HMC", draw, f"{alt}.", "total variation; at right, agreement")


def _mixing(evidence: Evidence) -> Panel:
    run = evidence.find_runs(experiment="methods", seed=0)[0]
    values = {space: evidence.array(run, f"rhat_{space}") for space in ("function", "weight")}
    medians = {
        space: float(evidence.across_seeds("rhat_median", arm="hmc", space=space)["mean"].iloc[0]) for space in values
    }

    def draw(ax: Axes) -> None:
        edges = np.linspace(0.98, float(np.quantile(np.concatenate([*values.values()]), 0.985)), 40)
        for space, color in (("weight", theme.GRAYS[1]), ("function", BLUE)):
            shares, _ = np.histogram(np.clip(values[space], edges[0], edges[-1]), edges)
            ax.stairs(shares / len(values[space]), edges, fill=True, color=color, alpha=0.55)
            ax.stairs(shares / len(values[space]), edges, color=color, linewidth=1.8)
        for y, (space, color, name) in zip(
            (0.9, 0.68),
            (("function", BLUE, "predictions"), ("weight", theme.GRAYS[0], "weights")),
            strict=True,
        ):
            ax.text(
                0.97,
                y,
                f"{name}: median {medians[space]:.3f}",
                color=theme.ink(color),
                ha="right",
                transform=ax.transAxes,
                fontsize=theme.SMALL,
                weight="semibold",
            )
        ax.set_xlabel("split-R̂")
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        theme.tidy(ax, ticks=4)

    alt = f"Split-R-hat: median {medians['function']:.3f} of predictions, {medians['weight']:.3f} of weights."
    return Panel("Convergence", draw, alt, "split-R̂ over chains: 1 is converged")


def _temperature(evidence: Evidence) -> Panel:
    curves = {
        "HMC": (BLUE, evidence.across_seeds("accuracy", over="temperature", arm="tempered")),
        "SGHMC": (theme.GRAYS[0], evidence.across_seeds("accuracy", over="temperature", arm="plain")),
        "… shifts": (RED, evidence.across_seeds("accuracy", over="temperature", arm="augmented")),
    }

    ticks = sorted({float(t) for _, c in curves.values() for t in c.index})

    def draw(ax: Axes) -> None:
        for name, (color, c) in curves.items():
            theme.band(ax, c.index, c["lo"], c["hi"], color)
            ax.plot(c.index, c["mean"], "-o", color=color)
            theme.label_line_end(ax, ticks[-1], c["mean"].iloc[-1], name, color)
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_xlabel("temperature T")
        theme.tidy(ax, grid="y", ticks=4)

    alt = "Accuracy by temperature: " + "; ".join(
        f"{name} " + ", ".join(f"{v:.3f} at {t:g}" for t, v in c["mean"].items()) for name, (_, c) in curves.items()
    )
    return Panel("Temperature", draw, f"{alt}.", "test accuracy")


def _shift(evidence: Evidence) -> Panel:
    arms = {
        "shift_empcov": ("HMC, EmpCov", GREEN),
        "shift_map": ("one optimum", theme.GRAYS[0]),
        "shift_hmc": ("HMC", BLUE),
    }
    curves = {arm: evidence.across_seeds("accuracy", over="noise", arm=arm) for arm in arms}

    def draw(ax: Axes) -> None:
        for arm, c in curves.items():
            name, color = arms[arm]
            theme.band(ax, c.index, c["lo"], c["hi"], color)
            ax.plot(c.index, c["mean"], "-o", color=color)
            theme.label_line_end(ax, c.index[-1], c["mean"].iloc[-1], name, color)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel("standard deviation")
        theme.tidy(ax, grid="y", ticks=4)

    alt = "Accuracy by noise on inputs that were constant in training: " + "; ".join(
        f"{arms[a][0]} " + ", ".join(f"{v:.2f} at {n:g}" for n, v in c["mean"].items()) for a, c in curves.items()
    )
    return Panel("Under shift", draw, f"{alt}.", "accuracy, noise on dead inputs")
