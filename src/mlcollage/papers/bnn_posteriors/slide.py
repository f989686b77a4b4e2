"""How the evidence on Bayesian neural-network posteriors is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

NAMES = {
    "hmc": "HMC",
    "ensemble": "deep ensemble",
    "csghmc": "cyclical SGHMC",
    "sghmc": "SGHMC",
    "sgld": "SGLD",
    "mfvi": "mean-field VI",
    "sgd": "one optimum",
}
SHOWN = ("ensemble", "sgld", "mfvi", "sgd")  # one of each kind; the others stand in the table of numbers
# One meaning per color: HMC, stochastic-gradient samplers without and with augmentation, and all that is compared.
HMC, SAMPLED, AUGMENTED, OTHER = (*(theme.PALETTE[c] for c in ("blue", "green", "vermillion")), theme.GRAYS[0])


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """Temperature, the cheaper methods beside HMC, and longer trajectories (on a user's workload: methods first)."""
    parts = {run.experiment for run in evidence.runs}
    own = evidence.workload == "default"
    methods = measured_panel("Accuracy beside HMC", _methods, evidence)
    trajectory = measured_panel("Longer trajectories", _trajectory, evidence)
    if own or "settings" in parts:
        main, small = measured_panel("Temperature", _temperature, evidence), [methods, trajectory]
    else:
        main, small = methods, [measured_panel("Distance to HMC", _distance, evidence)]
    return Collage(
        "full-batch HMC as the reference",
        _IDEA,
        main,
        small,
        data="digits, two moons" if own else "the workload",
        network="small MLPs and CNNs" if own else "the workload's network",
    )


def _draw_idea(ax: Axes) -> None:
    """A curved valley of the posterior, one long trajectory through it, and the short steps of an optimizer."""
    d = Diagram(ax, 374, 350)
    x, y = np.meshgrid(np.linspace(-2.4, 2.4, 90), np.linspace(-1.6, 1.9, 90))
    density = np.exp(-0.5 * (x / 1.25) ** 2 - 3.2 * (y - 0.42 * (x**2 - 1.1)) ** 2)

    def place(u: np.ndarray | float, v: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        return 187 + 74 * np.asarray(u), 104 - 56 * np.asarray(v)

    px, py = place(x, y)
    levels = [0.03, 0.12, 0.3, 0.55, 0.8, 1.0]
    ax.contourf(px, py, density, levels=levels, colors=theme.sequential(OTHER)(np.linspace(0.02, 0.5, 5)), zorder=1)
    t = np.linspace(-1.75, 1.75, 80)
    course = place(t, 0.42 * (t**2 - 1.1) + 0.16 * np.sin(3.4 * t))
    ax.plot(*course, color=HMC, linewidth=3.0, zorder=4)
    for end in (0, -1):
        d.circle(float(course[0][end]), float(course[1][end]), 6, color=HMC)
    s = np.linspace(-0.35, 0.4, 8)
    steps = place(s, 0.42 * (s**2 - 1.1) + 0.1 * (-1.0) ** np.arange(8))
    ax.plot(*steps, "-o", color=SAMPLED, linewidth=1.8, markersize=3.5, zorder=5)
    d.note(187, 20, "one trajectory of HMC", color=HMC, weight="semibold")
    d.note(187, 184, "the same cost in small steps", color=SAMPLED, weight="semibold")
    d.field(187, 276, 374, 148)
    d.equation(
        187,
        228,
        r"m \leftarrow m + \frac{\epsilon}{2}\nabla \log p(w | D),\quad w \leftarrow w + \epsilon\, m",
        size=15,
        room=350,
    )
    d.note(187, 264, r"$L = \tau / \epsilon$ times, with $\tau = \frac{\pi}{2}\, s$; then accept", color=theme.INK)
    d.equation(187, 304, r"p(y|x, D) \approx \mathrm{mean}_k\ p(y|x, w_k)", size=17, room=350)
    d.note(187, 332, "every draw votes", color=theme.INK)


_IDEA = Panel(
    "The idea",
    _draw_idea,
    "A curved valley of the posterior over two weights: one trajectory of Hamiltonian Monte Carlo runs through all of "
    "it, small steps of the same cost stay near where they began. Predictions are averaged over draws.",
    "The exact posterior, at last, to measure the cheap ones by: each gradient sees all data.",
)


def _temperature(evidence: Evidence) -> Panel:
    arms = {"tempered": ("HMC", HMC), "plain": ("SGHMC", SAMPLED), "augmented": ("SGHMC with shifts", AUGMENTED)}
    curves = {a: 100 * evidence.across_seeds("accuracy", over="temperature", arm=a) for a in arms}
    ticks = sorted({float(t) for c in curves.values() for t in c.index})

    def draw(ax: Axes) -> None:
        for arm, c in curves.items():
            marks.course(ax, c, arms[arm][1], arms[arm][0], dots=True, bounds=(0, 100))
        ax.axvline(1.0, color=theme.LINE, linewidth=1.4, linestyle=marks.DASHED, zorder=1)
        marks.log_steps(ax, ticks)
        ax.set_xlabel("temperature T (1 is the posterior, less is colder)")
        theme.tidy(ax, grid="y", ticks=5)

    ends = marks.from_to({arms[a][0]: c for a, c in curves.items()}, "{:.1f}")
    return Panel(
        "Temperature",
        draw,
        f"Test accuracy in percent from temperature {ticks[0]:g} to {ticks[-1]:g}: {ends}.",
        "test accuracy (%) by temperature; mean and 95% interval",
        claim="C5",
    )


def _paired(evidence: Evidence, metric: str, factor: float = 1.0) -> dict[str, pd.Series]:
    """Each method minus HMC, seed by seed."""
    there = [arm for arm in SHOWN if (evidence.table["arm"] == arm).any()]
    hmc = evidence.by_seed(metric, arm="hmc")
    return {NAMES[a]: factor * (evidence.by_seed(metric, arm=a) - hmc).dropna() for a in there}


def _rows(ax: Axes, found: Mapping[str, pd.Series]) -> None:
    marks.rows(ax, found, OTHER)
    ax.axvline(0, color=HMC, linewidth=2.0, zorder=1)


def _methods(evidence: Evidence) -> Panel:
    found = _paired(evidence, "accuracy", 100)
    return Panel(
        "Accuracy beside HMC",
        lambda ax: _rows(ax, found),
        f"Test accuracy minus that of HMC, in points, on the same splits: {marks.listed(found, '{:+.1f}')}.",
        "accuracy minus HMC's (points)",
        claim="C1",
    )


def _distance(evidence: Evidence) -> Panel:
    found = _paired(evidence, "tv")
    return Panel(
        "Distance to HMC",
        lambda ax: _rows(ax, found),
        f"Total variation to HMC's predictions, minus that of other chains of HMC: {marks.listed(found, '{:+.3f}')}.",
        "total variation to HMC, minus other chains'",
        claim="C8",
    )


def _trajectory(evidence: Evidence) -> Panel:
    curve = 1000 * evidence.across_seeds("ess_per_gradient", over="fraction", arm="trajectory")

    def draw(ax: Axes) -> None:
        marks.course(ax, curve, HMC, dots=True, bounds=(0, np.inf))
        marks.log_steps(ax, list(curve.index), "{:.2g}")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("length in quarter periods of the prior")
        theme.tidy(ax, grid="y", ticks=4)

    values = ", ".join(f"{v:.2g} at {f:.2g}" for f, v in curve["mean"].items())
    return Panel(
        "Longer trajectories",
        draw,
        f"Effective draws of the predictions per 1,000 gradients by trajectory length in quarter periods: {values}.",
        "effective draws per 1,000 gradients",
        claim="C4",
    )
