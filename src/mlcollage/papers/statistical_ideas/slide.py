"""How the evidence on the eight statistical ideas is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.text import Annotation

from mlcollage.collage import Collage, Diagram, Panel, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.stats import forest, sbc_ecdf, sbc_uniformity

from .study import STUDY
from .study.schools import MUTANTS, QUANTITIES

BLUE, RED, GREEN, PURPLE = (theme.PALETTE[c] for c in ("blue", "vermillion", "green", "purple"))
GRAY = theme.GRAYS[0]


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """The idea, and a panel for each experiment that was run (on a user's workload: the paired seeds)."""
    panels = {
        "causal": _bias,
        "coverage": _coverage,
        "descent": _descent,
        "pooling": _schools,
        "calibration": _calibration,
        "adaptive": _regret_and_error,
    }
    there = {r.experiment for r in evidence.runs}
    if "robust" not in there:
        panels.pop("adaptive")
    shown = [draw(evidence) for experiment, draw in panels.items() if experiment in there]
    if len(shown) < len(panels) and "paired" in there:
        shown.append(_pairs(evidence))
    return Collage("eight ideas that judge all the others", _IDEA, shown)


_EIGHT = (
    ("causal inference", r"$Y(1) - Y(0)$"),
    ("bootstrap, simulation", r"$x^* \sim \hat F$"),
    ("regularized models", r"$\min\, \ell + \lambda\|\beta\|^2$"),
    ("multilevel models", r"$\theta_j \sim \mathrm{N}(\mu, \tau^2)$"),
    ("generic computation", r"$\theta \sim e^{-H}$"),
    ("adaptive decisions", r"$\arg\max_a\, \tilde\theta_a$"),
    ("robust inference", r"$\mathrm{med},\ \mathrm{IQM}$"),
    ("exploring by eye", r"$y$ among $y^{\mathrm{rep}}$"),
)


def _draw_idea(ax: Axes) -> None:
    d = Diagram(ax, 440, 440)
    colors = (BLUE, RED, GREEN, PURPLE, theme.PALETTE["orange"], theme.PALETTE["sky"], GRAY, theme.PALETTE["black"])
    places = [(74, 62), (220, 62), (366, 62), (366, 220), (366, 378), (220, 378), (74, 378), (74, 220)]
    center = d.box(220, 220, 118, 92, "one claim, one verdict", color=theme.INK, filled=True, size=theme.BODY + 1)
    for (name, formula), (x, y), color in zip(_EIGHT, places, colors, strict=True):
        d.field(x, y, 140, 110)
        d.box(x, y - 18, 140, 62, name, color=color)
        d.equation(x, y + 34, formula, size=15, room=134)
        start = (x + 70 * np.sign(220 - x), y + 55 * np.sign(220 - y))
        d.arrow((float(start[0]), float(start[1])), center.edge_towards((float(start[0]), float(start[1]))))


_IDEA = Panel(
    "The idea",
    _draw_idea,
    "Eight boxes (causal inference, bootstrap and simulation, regularization, multilevel models, generic computation, "
    "adaptive decisions, robust inference, exploring by eye) point at the center: one claim, one verdict.",
    "The eight ideas are the tools with which claims are judged here; this study judges the tools.",
)


def _bias(evidence: Evidence) -> Panel:
    names = {
        "naive": "naive contrast",
        "ipw": "IPW",
        "aipw": "AIPW",
        "aipw_wrong_propensity": "… wrong e(x)",
        "aipw_wrong_outcome": "… wrong m(x)",
    }
    found = {arm: evidence.across_seeds("bias", arm=arm).iloc[0] for arm in names}
    # a value per block of repetitions, drawn as small dots behind the mean
    blocks = {arm: evidence.select("bias", arm=arm)["value"].to_numpy() for arm in names}

    def draw(ax: Axes) -> None:
        for row, (arm, s) in enumerate(found.items()):
            color = BLUE if arm.startswith("aipw") else RED if arm == "naive" else GRAY
            theme.dots_with_interval(
                ax, [row], [s["mean"]], [s["lo"]], [s["hi"]], color, seeds=[blocks[arm]], horizontal=True
            )
        ax.axvline(0, color=theme.LINE, linewidth=1.4, zorder=1)
        ax.set_yticks(range(len(names)), list(names.values()))
        ax.set_ylim(len(names) - 0.5, -0.5)
        theme.tidy(ax, grid="x", ticks=4)
        ax.tick_params(axis="y", length=0)

    alt = "Bias of the average effect: " + ", ".join(f"{names[a]} {s['mean']:+.3f}" for a, s in found.items())
    return Panel("Right if either model is right", draw, alt, "estimate − true effect, confounded")


def _coverage(evidence: Evidence) -> Panel:
    names = {"t": "Student t", "bootstrap_t": "bootstrap-t", "bca": "BCa", "percentile": "percentile"}
    colors = dict(zip(names, (GREEN, BLUE, PURPLE, RED), strict=True))
    curves = {a: evidence.across_seeds("coverage", over="n", arm=a, population="normal") for a in names}

    def draw(ax: Axes) -> None:
        ax.axhline(0.95, color=theme.LINE, linewidth=1.6, linestyle=(0, (4, 3)), zorder=1)
        for arm, c in curves.items():
            theme.band(ax, range(len(c)), c["lo"], c["hi"], colors[arm])
            ax.plot(range(len(c)), c["mean"], "-o", color=colors[arm])
            theme.label_line_end(ax, len(c) - 1, c["mean"].iloc[-1], names[arm], colors[arm])
        ax.set_xticks(range(len(curves["t"])), [f"{n:g}" for n in curves["t"].index])
        ax.set_xlabel("seeds")
        theme.tidy(ax, grid="y", ticks=4)

    alt = "Coverage of nominal 95% intervals of a mean, by seeds: " + "; ".join(
        f"{names[a]} " + ", ".join(f"{n}: {v:.3f}" for n, v in c["mean"].items()) for a, c in curves.items()
    )
    return Panel("Few seeds fool the percentile", draw, alt, "coverage of nominal 95% intervals")


def _descent(evidence: Evidence) -> Panel:
    names = {"min_norm": "least norm", "ridge": "tuned ridge"}
    colors = {"min_norm": RED, "ridge": BLUE}
    curves = {}
    for arm in names:
        by_size = evidence.select("test_error", arm=arm).groupby("features")["value"]
        curves[arm] = pd.DataFrame(
            {"mid": by_size.median(), "lo": by_size.quantile(0.25), "hi": by_size.quantile(0.75)}
        )

    def draw(ax: Axes) -> None:
        for arm, c in curves.items():
            theme.band(ax, c.index, c["lo"], c["hi"], colors[arm])
            ax.plot(c.index, c["mid"], "-o", color=colors[arm])
            theme.label_line_end(ax, c.index[-1], c["mid"].iloc[-1], names[arm], colors[arm])
        ax.set_xscale("log")
        ax.set_yscale("log")
        theme.reference_line(ax, 100, "P = n", vertical=True)
        ax.set_xlabel("random features P (log)")
        theme.tidy(ax, grid="y")

    peak, end = (curves["min_norm"]["mid"].loc[p] for p in (100, 3000))
    ridge = curves["ridge"]["mid"]
    alt = (
        f"Median test error of the least-norm fit: {peak:.3g} where features equal units, {end:.3g} at 3,000 features; "
        f"the tuned ridge goes from {ridge.iloc[0]:.2f} to {ridge.iloc[-1]:.2f} without a peak."
    )
    return Panel("Past the peak, more is better", draw, alt, "test error (log), median and quartiles")


def _schools(evidence: Evidence) -> Panel:
    # columns of the table of schools, (8,) each; every block holds the same one
    estimate, se, shrunken, *_ = _arrays(evidence, "pooling", "schools")[0].T
    errors = {
        a: evidence.across_seeds("mean_effect_error", arm=a)["mean"].iloc[0] for a in ("none", "complete", "partial")
    }

    def draw(ax: Axes) -> None:
        intervals = np.stack([estimate - 1.96 * se, estimate + 1.96 * se], axis=1)
        forest(ax, list("ABCDEFGH"), estimate, intervals, shrunken=shrunken, color=GRAY, shrunken_color=BLUE)
        for note in ax.texts:
            if isinstance(note, Annotation) and note.arrow_patch is not None:
                note.arrow_patch.set_linewidth(1.4)  # the slides' style draws patches without an edge
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        theme.tidy(ax, ticks=5)

    alt = (
        "Eight schools: estimates from "
        f"{estimate.min():.0f} to {estimate.max():.0f} are pulled to {shrunken.min():.1f} to {shrunken.max():.1f}. In "
        f"simulations the error is {errors['none']:.1f} alone, {errors['complete']:.1f} pooled, "
        f"{errors['partial']:.1f} partially pooled."
    )
    subtitle = f"simulated error {errors['none']:.1f} alone, {errors['partial']:.1f} in part"
    return Panel("Eight schools, pooled in part", draw, alt, subtitle)


def _arrays(evidence: Evidence, experiment: str, name: str) -> list[npt.NDArray[Any]]:
    """An array of every block."""
    return [
        evidence.array(run, f"{name}.{seed}") for run in evidence.find_runs(experiment=experiment) for seed in run.seeds
    ]


def _calibration(evidence: Evidence) -> Panel:
    names = dict(zip(MUTANTS, ("no Jacobian", "prior × 2", "no Metropolis"), strict=True))
    pooled = {a: np.concatenate(_arrays(evidence, "calibration", f"ranks_{a}")) for a in ("correct", *MUTANTS)}
    (run, *_), right = evidence.find_runs(experiment="calibration"), pooled["correct"]
    ranks = STUDY.experiment("calibration").task(run).settings.ranks
    passed = sbc_uniformity({q: right[:, i] for i, q in enumerate(QUANTITIES)}, ranks)
    tau = QUANTITIES.index("tau")  # the quantity in which all three bugs show
    broken = sbc_uniformity({names[a]: pooled[a][:, tau] for a in MUTANTS}, ranks)
    score = evidence.select("mutation_score")["value"].mean()

    def draw(ax: Axes) -> None:
        sbc_ecdf(ax, passed, colors=[BLUE] * len(QUANTITIES))
        tones = (RED, GREEN, PURPLE)
        for name, difference, color in zip(broken.names, broken.difference, tones, strict=True):
            ax.plot(broken.band.z, difference, color=color)
            at = float(difference[np.abs(difference).argmax()])
            theme.label_line_end(ax, 1.0, at, name, color)
        theme.label_line_end(ax, 1.0, 0.0, "as it is", BLUE)
        ax.set_yscale("symlog", linthresh=0.05)
        ax.set_yticks([-0.5, -0.05, 0, 0.05], ["−.5", "−.05", "0", ".05"])
        ax.set_yticks([], minor=True)
        ax.set_xticks([0, 1], ["0", "1"])
        ax.set_xlabel("rank")
        ax.set_ylabel("")
        theme.tidy(ax)

    alt = (
        f"Ranks of simulation-based calibration: the sampler's {len(passed.names)} quantities, "
        f"{int(passed.inside.sum())} of them within the 95% band; "
        f"{int((~broken.inside).sum())} of {len(names)} mutants leave it in tau. Mutants caught: {score:.0%}."
    )
    return Panel("The check notices the bug", draw, alt, f"rank ECDF − uniform; {score:.0%} caught")


def _regret_and_error(evidence: Evidence) -> Panel:
    policies = {"uniform": "uniform", "ucb1": "UCB1", "epsilon_greedy": "ε-greedy", "thompson": "Thompson"}
    tones = dict(zip(policies, (GRAY, PURPLE, GREEN, BLUE), strict=True))
    curves = {a: evidence.across_seeds("regret", arm=a) for a in policies}
    locations = ("mean", "median", "iqm")
    populations = {"clean": "N", "contaminated": "N+", "t2": "t₂"}
    errors = {
        a: [evidence.across_seeds("rmse", arm=a, population=p)["mean"].iloc[0] for p in populations] for a in locations
    }

    def draw(part: SubFigure) -> None:
        left, right = part.subplots(1, 2)
        for arm, c in curves.items():
            left.plot(c.index, c["mean"], color=tones[arm])
        top = curves["uniform"]["mean"].iloc[-1]
        left.text(0, 1.02 * top, "uniform", color=theme.ink(GRAY), va="top")
        left.text(curves["uniform"].index[-1], -0.03 * top, "Thompson", color=theme.ink(BLUE), ha="right", va="top")
        left.set_ylim(bottom=-0.3 * top)
        left.set_xticks([])
        left.set_xlabel("pulls")
        theme.tidy(left, grid="y", ticks=2)
        named = (["mean", "median", "IQM"], list(populations.values()))
        theme.heatmap(right, list(errors.values()), text="{:.1f}", labels=named)
        right.set_xlabel("+ outliers")

    alt = (
        "Regret at the end: "
        + ", ".join(f"{policies[a]} {c['mean'].iloc[-1]:.0f}" for a, c in curves.items())
        + ". Root mean squared error of 20 values: "
        + "; ".join(f"{a} " + ", ".join(f"{v:.2f}" for v in values) for a, values in errors.items())
        + " (clean, outliers, heavy tails)."
    )
    return Panel("Adaptive and robust", draw, alt, "regret of bandits; error of 20 values", own_axes=True)


def _pairs(evidence: Evidence) -> Panel:
    with_decay, without = (
        np.concatenate(_arrays(evidence, "paired", f"accuracy_{a}")) for a in ("weight_decay", "none")
    )
    rho = evidence.select("pair_correlation")["value"].mean()

    def draw(ax: Axes) -> None:
        ends = [min(with_decay.min(), without.min()), max(with_decay.max(), without.max())]
        ax.plot(ends, ends, color=GRAY, linewidth=1.4, zorder=1)
        ax.plot(without, with_decay, "o", color=BLUE, alpha=0.5, markeredgewidth=0)
        ax.set_xlabel("accuracy without weight decay")
        ax.set_ylabel("with")
        theme.tidy(ax, ticks=4)

    alt = f"Test accuracies of {len(without)} seeds with and without weight decay; mean correlation {rho:.2f}."
    return Panel("What a pair of seeds shares", draw, alt, f"one dot per seed; correlation {rho:.2f}")
