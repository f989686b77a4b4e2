"""How the evidence on class selectivity is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes

from mlcollage.collage import Collage, Diagram, Panel, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.headlines import with_headlines

LESS, PLAIN, MORE = theme.PALETTE["blue"], theme.PALETTE["black"], theme.PALETTE["vermillion"]
BOUND, LONG = theme.PALETTE["purple"], theme.PALETTE["green"]
GRAY = theme.GRAYS[0]
_EXAMPLE = np.array([0.22, 0.3, 0.18, 1.0, 0.26, 0.15, 0.34, 0.2, 0.28, 0.17])


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """The idea, and five panels; those of a user's workload have what its networks allow."""
    panels = [_knob(evidence), _headline(evidence), _scatter(evidence), _depth(evidence), _off_axis(evidence)]
    return Collage("turn selectivity up or down, and see", _idea(evidence), with_headlines(panels, verdicts, _MESSAGES))


_MESSAGES = {
    "Selectivity against alpha": ("C1", "The penalty turns it both ways"),
    "Accuracy against alpha": ("C5", "More selectivity harms"),
    "Accuracy against selectivity": ("C6", "Up costs more than down"),
    "Layer by layer, alpha = 0, −, +": ("C10", "Selectivity grows with depth"),
}


def _alphas(evidence: Evidence) -> list[float]:
    """The penalties that networks were trained with, in order."""
    return sorted(evidence.select("si", arm="penalty")["alpha"].unique().tolist())


def _color(alpha: float) -> str:
    return LESS if alpha < 0 else MORE if alpha > 0 else PLAIN


def _shown(alpha: float) -> str:
    return f"{alpha:+g}".replace("-", "−") if alpha else "0"


def _listed(table: pd.DataFrame, digits: int = 2) -> str:
    """Means by alpha, for text alternatives."""
    arms = np.asarray(table.index, dtype=float)
    return ", ".join(f"{m:.{digits}f} at alpha {_shown(a)}" for a, m in zip(arms, table["mean"], strict=True))


def _positions(alphas: list[float]) -> npt.NDArray[np.float64]:
    """Where alphas are drawn: a signed logarithm, so that those near 0 keep apart."""
    a = np.asarray(alphas)
    return np.sign(a) * np.log1p(np.abs(a))


def _axis(ax: Axes, alphas: list[float]) -> None:
    ax.set_xticks(_positions(alphas), [_shown(a) for a in alphas])
    ax.set_xlabel("α")


def _idea(evidence: Evidence) -> Panel:
    """Mean responses of a unit to the classes: measured, if the study's own data were run."""
    runs = evidence.find_runs(arm="sweep", seed=0)
    try:
        curve = evidence.array(runs[0].id, "tuning_0") if runs else _EXAMPLE
        measured = bool(runs)
    except LookupError:
        curve, measured = _EXAMPLE, False
    curve = np.nan_to_num(curve)[:20]
    curve = np.sort(curve)[::-1]  # the preferred class first

    def draw(ax: Axes) -> None:
        d = Diagram(ax, 400, 470)
        left, base, height = 24.0, 196.0, 176.0
        width = 310.0 / len(curve)
        for i, response in enumerate(curve):
            # A bar per class, as an image of one color: diagrams have no bars.
            tall = max(2.0, height * float(response))
            shade = MORE if i == 0 else GRAY
            d.image(left + width * (i + 0.5), base - tall / 2, 0.7 * width, tall, _patch(shade))
        rest = base - height * float(curve[1:].mean())
        d.line((left, base), (left + 310, base))
        d.arrow((left + width, rest), (left + 310, rest), head=False, dashed=True, color=theme.INK, width=1.4)
        d.note(left + 316, rest, r"$\mu_{-\max}$", color=theme.INK, ha="left", fontsize=theme.BODY + 2)
        d.note(left + width + 6, base - height + 10, r"$\mu_{\max}$", color=MORE, ha="left", fontsize=theme.BODY + 2)
        d.note(left + 155, 218, "a unit's mean response to each class")
        d.field(200, 356, 400, 220)
        equation = r"\mathrm{SI} = \frac{\mu_{\max} - \mu_{-\max}}{\mu_{\max} + \mu_{-\max} + \varepsilon}"
        d.equation(200, 290, equation, size=22)
        d.equation(200, 356, r"L = \mathrm{CE} - \alpha \cdot \overline{\mathrm{SI}}", size=22)
        d.note(104, 404, "α < 0 discourages", color=LESS, weight="semibold")
        d.note(302, 404, "α > 0 promotes", color=MORE, weight="semibold")
        d.note(200, 440, "the mean is over units, then layers")

    alt = (
        "Mean responses of one unit to the classes, the largest first; the selectivity index is the difference of the "
        "largest and the mean of the others over their sum. The loss is cross-entropy minus alpha times the mean index."
    )
    subtitle = "Bars: a unit of the last layer, measured." if measured else "Bars: an example."
    return Panel("The idea", draw, alt, subtitle)


def _patch(color: str) -> npt.NDArray[np.float64]:
    from matplotlib.colors import to_rgb

    return np.asarray(to_rgb(color)).reshape(1, 1, 3)


def _by_alpha(evidence: Evidence, metric: str, arm: str) -> pd.DataFrame:
    return evidence.across_seeds(metric, over="alpha", arm=arm)


def _dots(ax: Axes, evidence: Evidence, metric: str, table: pd.DataFrame, factor: float = 1.0) -> None:
    """Mean and interval of each alpha, with the seeds, on a line through the means."""
    x = _positions([float(a) for a in table.index])
    ax.plot(x, table["mean"], color=theme.GRAYS[1], linewidth=1.6, zorder=1)
    for i, a in enumerate(table.index):
        row = table.iloc[i]
        values = factor * evidence.select(metric, arm="penalty", alpha=a)["value"].to_numpy(dtype=float)
        theme.dots_with_interval(ax, [x[i]], [row["mean"]], [row["lo"]], [row["hi"]], _color(a), seeds=[values])


def _knob(evidence: Evidence) -> Panel:
    si = _by_alpha(evidence, "si", "penalty")
    alphas = [float(a) for a in si.index]

    def draw(ax: Axes) -> None:
        _dots(ax, evidence, "si", si)
        ax.set_ylim(0, max(0.1, float(si["hi"].max()) * 1.08))
        _axis(ax, alphas)
        theme.tidy(ax, grid="y", ticks=4)

    return Panel(
        "Selectivity against alpha", draw, f"Mean selectivity: {_listed(si, 3)}.", "mean SI of all layers, test set"
    )


def _headline(evidence: Evidence) -> Panel:
    true, control, long = (
        100 * _by_alpha(evidence, "test_accuracy", arm)[["mean", "lo", "hi"]] for arm in ("penalty", "shuffled", "long")
    )
    alphas = [float(a) for a in true.index]

    def draw(ax: Axes) -> None:
        x = _positions(alphas)
        ax.axhspan(
            float(true["lo"][0.0]), float(true["hi"][0.0]), color=theme.tint(PLAIN, 0.12), linewidth=0, zorder=0.8
        )
        _dots(ax, evidence, "test_accuracy", true, 100)
        for table, color, shift in ((control, GRAY, 0.09), (long, LONG, 0.0)):
            at = _positions([float(a) for a in table.index]) + shift
            # Without a penalty it does not matter which labels it would have had.
            line = table["mean"] if 0.0 in table.index else pd.concat([table["mean"], true["mean"][[0.0]]]).sort_index()
            where = _positions([float(a) for a in line.index]) + shift
            ax.plot(where, line, color=color, linewidth=1.2, linestyle=(0, (3, 2)), zorder=1)
            theme.dots_with_interval(ax, at, table["mean"], table["lo"], table["hi"], color, hollow=True)
        for table, name, color in ((true, "true labels", MORE), (control, "shuffled labels", GRAY)):
            end = float(_positions([float(table.index[-1])])[0]) + 0.12
            theme.label_line_end(ax, end, float(table["mean"].iloc[-1]), name, color)
        middle = float(_positions([float(a) for a in long.index]).mean())
        ax.annotate(
            "trained longer",
            (middle, float(long["mean"].max())),
            (0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=theme.ink(LONG),
            weight="semibold",
        )
        every = pd.concat([true, control, long])
        low, high = float(every["lo"].min()), float(every["hi"].max())
        ax.set_ylim(low - 0.06 * (high - low), high + 0.22 * (high - low))
        ax.set_xlim(x[0] - 0.2, x[-1] + 0.2)
        _axis(ax, alphas)
        theme.tidy(ax, grid="y", ticks=4)

    alt = (
        f"Test accuracy in percent, {_listed(true, 1)}; with shuffled labels {_listed(control, 1)}; "
        f"trained longer {_listed(long, 1)}."
    )
    return Panel("Accuracy against alpha", draw, alt, "test accuracy, %; band: α = 0", wide=True)


def _scatter(evidence: Evidence) -> Panel:
    pairs = {
        a: (
            evidence.select("si", arm="penalty", alpha=a).set_index("seed")["value"],
            100 * evidence.select("test_accuracy", arm="penalty", alpha=a).set_index("seed")["value"],
        )
        for a in _alphas(evidence)
    }

    def draw(ax: Axes) -> None:
        for a, (si, acc) in pairs.items():
            ax.plot(si, acc[si.index], "o", color=_color(a), alpha=0.55, markersize=6, markeredgewidth=0)
        middle = [(float(si.mean()), float(acc.mean())) for si, acc in pairs.values()]  # a line through the means
        ax.plot(*zip(*middle, strict=True), color=theme.GRAYS[1], linewidth=1.6, zorder=1)
        for (a, _), (x, y) in zip(pairs.items(), middle, strict=True):
            ax.annotate(
                _shown(a),
                (x, y),
                (0, 12),
                textcoords="offset points",
                ha="center",
                color=theme.ink(_color(a)),
                weight="semibold",
            )
        ax.margins(0.08, 0.16)
        ax.set_xlabel("mean SI; numbers are α")
        theme.tidy(ax, grid="y", ticks=4)

    text = "; ".join(f"alpha {_shown(a)} at SI {s.mean():.2f}, {c.mean():.1f} %" for a, (s, c) in pairs.items())
    return Panel(
        "Accuracy against selectivity", draw, f"One dot per seed: {text}.", "test accuracy, %; one dot per seed"
    )


def _depth(evidence: Evidence) -> Panel:
    alphas = _alphas(evidence)
    chosen = [min(alphas), 0.0, max(alphas)]  # the extremes and the plain network
    curves = {a: evidence.across_seeds("layer_si", over="layer", arm="penalty", alpha=a) for a in chosen}

    def draw(ax: Axes) -> None:
        for a, c in curves.items():
            theme.band(ax, c.index, c["lo"], c["hi"], _color(a))
            ax.plot(c.index, c["mean"], "o-", color=_color(a), markersize=5)
            theme.label_line_end(ax, float(c.index[-1]), float(c["mean"].iloc[-1]), f"α = {_shown(a)}", _color(a))
        layers = [int(i) for i in curves[0.0].index]
        ax.set_xticks(layers if len(layers) <= 8 else layers[:: len(layers) // 5])
        ax.set_ylim(bottom=0)
        ax.set_xlabel("layer, in order of execution")
        theme.tidy(ax, grid="y", ticks=4)

    alt = "; ".join(
        f"alpha {_shown(a)}: " + ", ".join(f"{v:.2f}" for v in c["mean"].iloc[:20]) for a, c in curves.items()
    )
    return Panel("Layer by layer, alpha = 0, −, +", draw, f"Mean selectivity by layer, {alt}.", "mean SI of each layer")


def _off_axis(evidence: Evidence) -> Panel:
    metrics = set(evidence.table["metric"])
    alphas = _alphas(evidence)
    bound = _by_alpha(evidence, "si_bound", "penalty") if "si_bound" in metrics else None
    axis = _by_alpha(evidence, "si_axis", "penalty") if "si_axis" in metrics else None
    ratio = _by_alpha(evidence, "cca_ratio", "penalty") if "cca_ratio" in metrics else None
    ratios = "not measured" if ratio is None else _listed(ratio)

    def draw(ax: Axes) -> None:
        if bound is None or axis is None:  # on a user's workload
            ax.text(0.5, 0.5, "layers too wide for the search", transform=ax.transAxes, ha="center")
            ax.set_axis_off()
            return
        x = _positions(alphas)
        for table, color, name in ((bound, BOUND, "best rotation"), (axis, PLAIN, "units")):
            theme.band(ax, x, table["lo"], table["hi"], color)
            ax.plot(x, table["mean"], "o-", color=color, markersize=5)
            theme.label_line_end(ax, float(x[-1]), float(table["mean"].iloc[-1]), name, color)
        ax.set_ylim(0, max(0.1, float(max(bound["hi"].max(), axis["hi"].max())) * 1.08))
        _axis(ax, alphas)
        theme.tidy(ax, grid="y", ticks=4)

    alt = f"Ratio of CCA distances: {ratios}."
    if bound is not None and axis is not None:
        alt += f" Selectivity of a middle layer: best rotation {_listed(bound)}; units {_listed(axis)}."
    ends = "" if ratio is None else f"; CCA {ratio['mean'].iloc[0]:.2f} at {_shown(alphas[0])}"
    return Panel("Hidden off the axes?", draw, alt, f"SI, middle layer{ends}")
