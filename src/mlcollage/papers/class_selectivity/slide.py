"""How the evidence on class selectivity is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

# One meaning per color: what the penalty does to selectivity.
LESS, PLAIN, MORE = theme.PALETTE["blue"], theme.PALETTE["black"], theme.PALETTE["vermillion"]
GRAY = theme.GRAYS[0]
_EXAMPLE = np.array([0.22, 0.3, 0.18, 1.0, 0.26, 0.15, 0.34, 0.2, 0.28, 0.17])


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """Accuracy against selectivity, the distance that is more than affine, and the most selective rotation."""
    return Collage(
        "turn selectivity up or down, and see",
        _idea(evidence),
        measured_panel("Accuracy against selectivity", _accuracy, evidence),
        [
            measured_panel("More than an affine map", _distance, evidence),
            measured_panel("Hidden off the axes?", _off_axis, evidence),
        ],
        data="GlyphWorld images" if evidence.workload == "default" else "the workload",
        network="small ResNet and CNN" if evidence.workload == "default" else "the workload's network",
    )


def _color(alpha: float) -> str:
    return LESS if alpha < 0 else MORE if alpha > 0 else PLAIN


def _shown(alpha: float) -> str:
    return f"{alpha:+g}".replace("-", "−") if alpha else "0"


def _idea(evidence: Evidence) -> Panel:
    """Mean responses of a unit to the classes: measured, if the study's own data were run."""
    runs = evidence.find_runs(arm="sweep", seed=0)
    try:
        curve = evidence.array(runs[0].id, "tuning_0") if runs else _EXAMPLE
        measured = bool(runs)
    except LookupError:
        curve, measured = _EXAMPLE, False
    curve = np.sort(np.nan_to_num(curve)[:20])[::-1]  # the preferred class first

    def draw(ax: Axes) -> None:
        d = Diagram(ax, 374, 372)
        left, base, height, wide = 10.0, 172.0, 150.0, 290.0
        each = wide / len(curve)
        for i, response in enumerate(curve):
            tall = max(2.0, height * float(response))
            shade = MORE if i == 0 else theme.tint(GRAY, 0.7)
            ax.add_patch(
                Rectangle((left + each * (i + 0.15), base - tall), 0.7 * each, tall, facecolor=shade, zorder=2)
            )
        rest = base - height * float(curve[1:].mean())
        d.line((left, base), (left + wide, base))
        d.arrow((left + each, rest), (left + wide, rest), head=False, dashed=True, color=theme.INK, width=1.4)
        d.note(left + wide + 8, rest, r"$\mu_{-\max}$", color=theme.INK, ha="left", fontsize=15)
        d.note(left + each + 8, base - height + 8, r"$\mu_{\max}$", color=MORE, ha="left", fontsize=15)
        d.note(left + wide / 2, 190, "a unit's mean response to each class")
        d.field(187, 290, 374, 164)
        equation = r"\mathrm{SI} = \frac{\mu_{\max} - \mu_{-\max}}{\mu_{\max} + \mu_{-\max} + \varepsilon}"
        d.equation(187, 244, equation, size=20)
        d.equation(187, 302, r"L = \mathrm{CE} - \alpha \cdot \overline{\mathrm{SI}}", size=20)
        d.note(98, 346, "α < 0 discourages", color=LESS, weight="semibold")
        d.note(282, 346, "α > 0 promotes", color=MORE, weight="semibold")

    return Panel(
        "The idea",
        draw,
        "Mean responses of one unit to the classes, largest first; the selectivity index (SI) is the largest minus the "
        "mean of the others, over their sum. The loss is cross-entropy minus alpha times the mean index.",
        "A unit is selective if it answers to one class. One term in the loss turns that up or down. "
        + ("Bars: a unit of the last layer, measured." if measured else "Bars: an example."),
    )


def _accuracy(evidence: Evidence) -> Panel:
    alphas = sorted(evidence.select("si", arm="penalty")["alpha"].unique().tolist())
    where = {a: {"arm": "penalty", "alpha": a} for a in alphas}
    pairs = {a: (evidence.by_seed("si", **w), 100 * evidence.by_seed("test_accuracy", **w)) for a, w in where.items()}

    def draw(ax: Axes) -> None:
        middle = [(float(si.mean()), float(accuracy.mean())) for si, accuracy in pairs.values()]
        ax.plot(*zip(*middle, strict=True), color=theme.GRAYS[1], linewidth=2.0, zorder=1)
        for k, ((a, (si, accuracy)), (x, y)) in enumerate(zip(pairs.items(), middle, strict=True)):
            color = _color(a)
            ax.plot(si, accuracy[si.index], "o", color=color, alpha=0.3, markersize=6, markeredgewidth=0)
            lo, hi = theme.mean_interval(accuracy)
            theme.dots_with_interval(ax, [x], [y], [lo], [hi], color)
            ax.annotate(
                f"α = {_shown(a)}",
                (x, lo if k % 2 else hi),  # above and below in turn, since neighbors may lie close
                (0, -7 if k % 2 else 7),
                textcoords="offset points",
                ha="center",
                va="top" if k % 2 else "bottom",
                color=theme.ink(color),
                weight="semibold",
            )
        ax.margins(0.12, 0.18)
        ax.set_xlabel("mean class selectivity of the network")
        theme.tidy(ax, grid="y", ticks=5)

    text = "; ".join(f"alpha {_shown(a)}: {s.mean():.2f} and {c.mean():.1f}%" for a, (s, c) in pairs.items())
    return Panel(
        "Accuracy against selectivity",
        draw,
        f"Mean selectivity and test accuracy by alpha: {text}."[:300],
        "test accuracy (%); mean and 95% interval, pale dots are seeds",
        claim="C5",
    )


def _distance(evidence: Evidence) -> Panel:
    alphas = sorted(evidence.select("cca_ratio", arm="penalty")["alpha"].unique().tolist())
    found = {_shown(a): evidence.by_seed("cca_ratio", arm="penalty", alpha=a) for a in alphas}

    def draw(ax: Axes) -> None:
        marks.columns(ax, found, {_shown(a): _color(a) for a in alphas})
        theme.reference_line(ax, 1.0, "another seed", GRAY)
        ax.set_xlabel("α")

    return Panel(
        "More than an affine map",
        draw,
        "CCA distance to a plain network over that between two plain ones, by alpha: "
        f"{marks.listed({f'at {name}': v for name, v in found.items()})}.",
        "CCA distance to plain ÷ that of two seeds",
        claim="C7",
    )


def _off_axis(evidence: Evidence) -> Panel:
    bound, axis = (evidence.across_seeds(m, over="alpha", arm="penalty") for m in ("si_bound", "si_axis"))

    def draw(ax: Axes) -> None:
        for table, name in ((bound, "best rotation"), (axis, "single units")):
            steps = table.reset_index(drop=True)  # one step from alpha to alpha: they are not evenly spaced
            marks.course(ax, steps, PLAIN, name, dots=True, dashed=table is axis, bounds=(0, 1))
        ax.set_xticks(range(len(bound)), [_shown(float(str(a))) for a in bound.index])
        ax.set_xlabel("α")
        ax.set_ylim(bottom=0)
        theme.tidy(ax, grid="y", ticks=4)

    return Panel(
        "Hidden off the axes?",
        draw,
        "Selectivity of a middle layer from the lowest to the highest alpha: "
        f"{marks.from_to({'best rotation': bound, 'single units': axis})}.",
        "selectivity of a middle layer, new samples",
        claim="C8",
    )
