"""How the evidence on the eight statistical ideas is drawn: a tile for each, and the judge that they make up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel
from mlcollage.stats import sbc_uniformity

from .study import STUDY
from .study.schools import MUTANTS, QUANTITIES

# What the idea recommends, what it warns of, and context.
GOOD, BAD, GRAY = theme.PALETTE["blue"], theme.PALETTE["vermillion"], theme.GRAYS[0]


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """Eight tiles, the test that is repeated after each seed, and the coverage of intervals from few seeds."""
    there = {run.experiment for run in evidence.runs}
    if evidence.workload != "default" and "paired" in there:
        main = _pairs(evidence)
    else:
        main = measured_panel("Eight ideas of fifty years", lambda e: _tiles(e, verdicts), evidence)
    return Collage(
        "eight ideas that judge all the others",
        _IDEA,
        main,
        [
            measured_panel("Looking after each seed", _peeking, evidence),
            measured_panel("Coverage with few seeds", _coverage, evidence),
        ],
        data="simulated data, known truth" if "causal" in there else "the workload",
        network="linear models, small CNN" if "causal" in there else "the workload's network",
    )


def _draw_idea(ax: Axes) -> None:
    """How an interval, a reference and a margin make a verdict."""
    d = Diagram(ax, 384, 330)
    d.field(192, 104, 384, 208)
    zero, margin = 120.0, 190.0
    ax.fill_between([zero, margin], 34, 196, color=theme.SHADE, linewidth=0, zorder=0.8)
    ax.fill_between([margin, 240], 34, 196, color=theme.CLAIMED, linewidth=0, zorder=0.8)
    d.line((zero, 34), (zero, 196), color=theme.INK, width=1.6)
    d.note(zero, 20, "no effect", color=theme.INK)
    d.note(margin + 6, 20, "matters", ha="left", color=theme.INK)
    rows = {
        "supported": (146, 226, "✓ supported"),
        "inconclusive": (84, 206, "≈ inconclusive"),
        "contradicted": (76, 160, "✗ contradicted"),
    }
    for row, (status, (lo, hi, words)) in enumerate(rows.items()):
        y, color = 62 + 54 * row, theme.STATUS_COLORS[status]
        d.line((lo, y), (hi, y), color=color, width=3.4)
        ax.plot([(lo + hi) / 2], [y], "o", color=color, markersize=8, zorder=3)
        d.note(374, y, words, ha="right", color=color, weight="semibold")
    d.note(192, 240, "Claim, margin and test are fixed", color=theme.INK)
    d.note(192, 266, "before the runs. Each seed is one", color=theme.INK)
    d.note(192, 292, "observation; the interval decides.", color=theme.INK)


_IDEA = Panel(
    "The idea",
    _draw_idea,
    "Three intervals beside the value of no effect and the smallest effect that matters: one lies beyond both and is "
    "supported, one covers both and is inconclusive, one ends short of what matters and is contradicted.",
    "Statistics as unit tests: the eight ideas judge every claim of these slides, and are judged here.",
)


# --- the eight tiles --------------------------------------------------------------------------------------------------


def _mean(evidence: Evidence, metric: str, arm: str, **where: Any) -> float:
    return float(evidence.select(metric, arm=arm, **where)["value"].mean())


def _arrays(evidence: Evidence, experiment: str, name: str) -> list[npt.NDArray[Any]]:
    """An array of every block."""
    return [
        evidence.array(run, f"{name}.{seed}") for run in evidence.find_runs(experiment=experiment) for seed in run.seeds
    ]


def _bars(ax: Axes, values: Mapping[str, float], good: str, text: str = "{:.2f}") -> None:
    """Named values, the recommended one in its color."""
    for row, (name, value) in enumerate(values.items()):
        color = GOOD if name == good else GRAY
        ax.barh(row, value, color=theme.tint(color, 0.75), height=0.36)
        words = f"{name} {text.format(value)}"
        ax.text(0, row - 0.24, words, va="bottom", color=theme.ink(color), fontsize=theme.SMALL)
    ax.set_ylim(len(values) - 0.7, -0.9)
    ax.set_xlim(0, 1.05 * max(values.values()))
    ax.set(xticks=[], yticks=[])
    ax.spines[["bottom", "left"]].set_visible(False)


def _causal(ax: Axes, e: Evidence) -> str:
    arms = {"naive": "naive", "IPW": "ipw", "AIPW": "aipw"}
    bias = {name: abs(_mean(e, "bias", arm)) for name, arm in arms.items()}
    _bars(ax, bias, "AIPW")
    return f"bias {bias['naive']:.2f} → {bias['AIPW']:.2f}"


def _simulation(ax: Axes, e: Evidence) -> str:
    pooled = {a: np.concatenate(_arrays(e, "calibration", f"ranks_{a}")) for a in ("correct", *MUTANTS)}
    ranks = STUDY.experiment("calibration").task(e.find_runs(experiment="calibration")[0]).settings.ranks
    tau = QUANTITIES.index("tau")  # the quantity in which every bug shows
    found = sbc_uniformity({a: r[:, tau] for a, r in pooled.items()}, ranks)
    for name, difference in zip(found.names, found.difference, strict=True):
        ax.plot(found.band.z, difference, color=GOOD if name == "correct" else BAD, linewidth=1.8)
    ax.axhline(0, color=theme.LINE, linewidth=1)
    ax.set(xticks=[], yticks=[])
    return f"{_mean(e, 'mutation_score', e.select('mutation_score')['arm'].iloc[0]):.0%} of bugs found"


def _regularized(ax: Axes, e: Evidence) -> str:
    for arm, color in (("min_norm", BAD), ("ridge", GOOD)):
        by_size = e.select("test_error", arm=arm).groupby("features")["value"].median()
        ax.plot(by_size.index, by_size, color=color)
    ax.set(xscale="log", yscale="log", xticks=[], yticks=[])
    ax.minorticks_off()
    return "ridge has no peak"


def _multilevel(ax: Axes, e: Evidence) -> str:
    arms = {"alone": "none", "pooled": "complete", "partial": "partial"}
    errors = {name: _mean(e, "mean_effect_error", arm) for name, arm in arms.items()}
    _bars(ax, errors, "partial", "{:.1f}")
    return f"error {errors['alone']:.1f} → {errors['partial']:.1f}"


def _computation(ax: Axes, e: Evidence) -> str:
    estimate, se, shrunken, *_ = _arrays(e, "pooling", "schools")[0].T  # (8,) each; every block holds the same
    rows = np.arange(len(estimate))
    ax.hlines(rows, estimate - se, estimate + se, color=GRAY, linewidth=1.6)
    ax.plot(estimate, rows, "o", color=GRAY, markersize=4)
    ax.plot(shrunken, rows, "o", color=GOOD, markersize=6)
    ax.set(xticks=[], yticks=[])
    return "eight schools"


def _decisions(ax: Axes, e: Evidence) -> str:
    ends = {}
    for arm, color in (("uniform", GRAY), ("thompson", GOOD)):
        curve = e.across_seeds("regret", arm=arm)["mean"]
        ax.plot(curve.index, curve, color=color)
        ends[arm] = curve.iloc[-1]
    ax.set(xticks=[], yticks=[])
    return f"regret {ends['uniform']:.0f} → {ends['thompson']:.0f}"


def _robust(ax: Axes, e: Evidence) -> str:
    errors = {n: _mean(e, "rmse", a, population="t2") for n, a in (("mean", "mean"), ("IQM", "iqm"))}
    _bars(ax, errors, "IQM")
    return f"error {errors['mean']:.2f} → {errors['IQM']:.2f}"


def _exploring(ax: Axes, e: Evidence) -> str:
    shares = {
        n: _mean(e, m, a) for n, m, a in (("checks", "right_flags", "checks"), ("lineup", "lineup_detection", "crash"))
    }
    _bars(ax, shares, "lineup", "{:.0%}")
    return f"crash seen {shares['lineup']:.0%}"


_TILES: Mapping[str, Callable[[Axes, Evidence], str]] = {
    "causal inference": _causal,
    "simulation": _simulation,
    "regularization": _regularized,
    "multilevel models": _multilevel,
    "computation": _computation,
    "adaptive decisions": _decisions,
    "robust inference": _robust,
    "exploring by eye": _exploring,
}


def _tiles(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Panel:
    if evidence.waiting:
        raise LookupError("a tile needs all its runs")
    counts = Counter(v.status.value for v in verdicts.values())
    tested = sum(counts[s] for s in ("supported", "contradicted", "inconclusive"))
    found: dict[str, str] = {}

    def draw(part: SubFigure) -> None:
        axes = part.subplots(2, 4, gridspec_kw={"hspace": 0.5}).ravel()
        for ax, (name, tile) in zip(axes, _TILES.items(), strict=True):
            found[name] = tile(ax, evidence)
            ax.set_title(name, fontsize=theme.SMALL, color=theme.INK, loc="center")
            ax.set_xlabel(found[name], fontsize=theme.SMALL, color=theme.INK)

    return Panel(
        f"Eight ideas put to {tested} tests: {counts['supported']} hold, {counts['contradicted']} fail",
        draw,
        "A small picture for each idea: " + ", ".join(_TILES) + f". Of {tested} claims {counts['supported']} hold.",
        "blue: what the idea recommends; red: what it warns of; gray: for comparison",
        own_axes=True,
    )


# --- small panels -----------------------------------------------------------------------------------------------------


def _peeking(evidence: Evidence) -> Panel:
    arms = {"peeking": ("t test, repeated", BAD), "confidence_sequence": ("confidence sequence", GOOD)}
    found = {name: 100 * evidence.by_seed("false_positive", arm=a) for a, (name, _) in arms.items()}

    def draw(ax: Axes) -> None:
        marks.rows(ax, found, dict(arms.values()), reference=5)
        ax.set_xlim(left=0)

    return Panel(
        "Looking after each seed",
        draw,
        "False positives where there is no effect and one looks after each of 5 to 100 seeds: "
        f"{marks.listed(found, '{:.1f}%')}; promised: 5%.",
        "false positives (%); 5 are promised (line)",
        claim="C6d",
    )


def _coverage(evidence: Evidence) -> Panel:
    arms = {"bootstrap_t": ("bootstrap-t", GOOD), "percentile": ("percentile", BAD), "t": ("Student t", GRAY)}
    curves = {a: 100 * evidence.across_seeds("coverage", over="n", arm=a, population="normal") for a in arms}

    def draw(ax: Axes) -> None:
        ax.axhline(95, color=theme.LINE, linewidth=1.6, zorder=1)
        for arm, c in curves.items():
            marks.course(ax, c.reset_index(drop=True), arms[arm][1], arms[arm][0], dots=True, bounds=(0, 100))
        ax.set_xticks(range(len(curves["t"])), [f"{n:g}" for n in curves["t"].index])
        ax.set_xlabel("seeds")
        theme.tidy(ax, grid="y", ticks=4)

    ends = ", ".join(f"{arms[a][0]} {c['mean'].iloc[0]:.1f}%" for a, c in curves.items())
    return Panel(
        "Coverage with few seeds",
        draw,
        f"Coverage of 95% intervals of a mean over the number of seeds; with the fewest: {ends}.",
        "coverage (%) of 95% intervals of a mean",
        claim="C2",
    )


def _pairs(evidence: Evidence) -> Panel:
    """On a user's workload: what the seeds of two arms share."""
    with_decay, without = (
        100 * np.concatenate(_arrays(evidence, "paired", f"accuracy_{a}")) for a in ("weight_decay", "none")
    )
    rho = evidence.select("pair_correlation")["value"].mean()

    def draw(ax: Axes) -> None:
        ends = [min(with_decay.min(), without.min()), max(with_decay.max(), without.max())]
        ax.plot(ends, ends, color=GRAY, linewidth=1.4, zorder=1)
        ax.plot(without, with_decay, "o", color=GOOD, alpha=0.5, markeredgewidth=0)
        ax.set_xlabel("without weight decay")
        ax.set_ylabel("with")
        theme.tidy(ax, ticks=4)

    return Panel(
        f"Paired seeds share what makes them easy: correlation {rho:.2f}",
        draw,
        f"Test accuracies of {len(without)} seeds with and without weight decay; mean correlation {rho:.2f}.",
        "test accuracy (%), one dot per seed",
        claim="C1b",
    )
