"""How the evidence on the Fisher explosion is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from mlcollage.collage import Collage, Diagram, Panel, theme
from mlcollage.errors import UnknownName
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.headlines import with_headlines

SMALL, LARGE, FP = (theme.PALETTE[c] for c in ("vermillion", "blue", "green"))
GRAY = theme.GRAYS[0]
ARMS = {"small": ("small η", SMALL), "large": ("large η", LARGE), "small_fp": ("small η + FP", FP)}
METHODS = {
    "none": "none",
    "gpx": "GPx",
    "gp": "GP",
    "gpr": "GPr",
    "fp": "FP",
    "trf": "Tr F",
    "sam": "SAM",
    "mixup": "mixup",
}


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """The idea, and five panels; a panel whose runs are missing is left out."""
    panels = []
    for draw in (_explosion, _memorizing, _scatter, _methods, _flat):
        try:
            panels.append(draw(evidence))
        except (UnknownName, LookupError):
            continue
    if not panels:
        raise UnknownName("no run of this study has finished, so there is nothing to draw.")
    return Collage("tame the trace early, generalize late", _IDEA, with_headlines(panels, verdicts, _MESSAGES))


_MESSAGES = {
    "The trace while training": ("C1", "Small steps, large trace"),
    "Accuracy with wrong labels": ("C6", "FP holds out against noise"),
    "What is memorized": ("C6b", "Wrong labels are learned later"),
    "Early trace, late accuracy": ("C2", "The early trace foretells"),
    "Flatness at equal loss": ("C7b", "FP ends flatter"),
}


def _draw_idea(ax: Axes) -> None:
    d = Diagram(ax, 400, 400)
    batch = d.box(70, 40, 116, 48, "batch $x_i$")
    model = d.box(210, 40, 90, 48, "model", color=FP, filled=True)
    label = d.box(336, 40, 106, 48, r"draw $\hat y_i$", color=FP)
    gradient = d.box(336, 138, 106, 48, r"gradient $\bar g$", color=FP)
    penalty = d.box(186, 138, 130, 48, r"$+\,\alpha\,\|\bar g\|^2$", color=FP)
    d.arrow(batch, model)
    d.arrow(model, label, color=FP)
    d.arrow(label, gradient, color=FP)
    d.arrow(gradient, penalty, color=FP)
    d.arrow(penalty, model, "back", color=FP, dashed=True)
    d.field(200, 300, 400, 196)
    d.equation(200, 232, r"\mathrm{Tr}\,F=\mathrm{E}_x\,\mathrm{E}_{\hat y\sim p_\theta}\,\|g(x,\hat y)\|^2", size=19)
    d.equation(200, 278, r"\mathrm{E}\,\|\bar g\|^2=\mathrm{Tr}\,F\,/\,B", size=20)
    d.note(200, 312, "one mini-batch gradient measures the trace", color=FP, weight="semibold")
    d.note(200, 362, "The claim: the trace explodes early when\nsteps are small; penalized, it cannot.")


_IDEA = Panel(
    "The idea",
    _draw_idea,
    "A batch goes through the model, which draws labels from its own predictions; the squared norm of the gradient at "
    "these labels, times alpha, is added to the loss. Its expectation is the trace of the Fisher information over the "
    "batch size.",
    "Penalize the gradient at labels that the model itself would draw.",
)


def _interval(values: pd.Series) -> tuple[float, float]:
    from mlcollage.stats import t_interval

    x = values.to_numpy(dtype=float)
    return t_interval(x, 0.95) if len(x) > 1 and np.ptp(x) > 0 else (float(x.mean()), float(x.mean()))


def _explosion(evidence: Evidence) -> Panel:
    curves = {arm: evidence.across_seeds("trace", arm=arm) for arm in ARMS}
    # Seeds share their steps, but a branch adds one of its own: keep those that all seeds have.
    curves = {arm: c[c["seeds"] == c["seeds"].max()] for arm, c in curves.items()}

    def draw(ax: Axes) -> None:
        for arm, c in curves.items():
            name, color = ARMS[arm]
            theme.band(ax, c.index, c["lo"], c["hi"], color)
            ax.plot(c.index, c["mean"], color=color)
            top = int(c["mean"].argmax())
            ax.plot([c.index[top]], [c["mean"].iloc[top]], "o", color=color, markersize=8)
            theme.label_line_end(ax, c.index[-1], c["mean"].iloc[-1], name, color)
        ax.set_xscale("log")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("steps (log); dot: peak")
        theme.tidy(ax, grid="y", ticks=4)

    peaks = ", ".join(f"{ARMS[a][0]} {c['mean'].max():.0f}" for a, c in curves.items())
    return Panel("The trace while training", draw, f"Tr(F) over steps; peaks: {peaks}.", "Tr(F), mean and 95% interval")


def _methods(evidence: Evidence) -> Panel:
    there = {m: f"noise_{m}" for m in METHODS if f"noise_{m}" in set(evidence.table["arm"])}
    found = {
        (m, metric): evidence.select(metric, arm=arm)["value"]
        for m, arm in there.items()
        for metric in ("final_accuracy", "best_accuracy")
    }
    order = sorted(there, key=lambda m: float(found[m, "final_accuracy"].mean()))

    def draw(ax: Axes) -> None:
        for place, m in enumerate(order):
            color = {"fp": FP, "none": SMALL}.get(m, GRAY)
            best, values = float(found[m, "best_accuracy"].mean()), found[m, "final_accuracy"]
            lo, hi = _interval(values)
            theme.dots_with_interval(ax, [place], [values.mean()], [lo], [hi], color, seeds=[values])
            ax.plot([place], [best], "_", color=color, markersize=17, markeredgewidth=2.6)
        ax.set_xticks(range(len(order)), [METHODS[m] for m in order])
        ax.set_xlim(-0.6, len(order) - 0.4)
        theme.tidy(ax, grid="y", ticks=4)
        ax.tick_params(axis="x", length=0)

    alt = "Final (and best) test accuracy with wrong labels: " + ", ".join(
        f"{METHODS[m]} {found[m, 'final_accuracy'].mean():.3f} ({found[m, 'best_accuracy'].mean():.3f})" for m in order
    )
    return Panel(
        "Accuracy with wrong labels",
        draw,
        alt + ".",
        "30% wrong labels; dot: final, dash: best step",
    )


def _memorizing(evidence: Evidence) -> Panel:
    arms = {"noise_none": ("none", SMALL), "noise_fp": ("FP", FP)}
    kinds = {"fit_right": "-", "fit_wrong": (0, (3, 2))}
    curves = {(a, k): evidence.across_seeds(k, arm=a) for a in arms for k in kinds}

    def draw(ax: Axes) -> None:
        for (arm, kind), c in curves.items():
            name, color = arms[arm]
            theme.band(ax, c.index, c["lo"], c["hi"], color)
            ax.plot(c.index, c["mean"], color=color, linestyle=kinds[kind])
            word = "right" if kind == "fit_right" else "wrong"
            theme.label_line_end(ax, c.index[-1], c["mean"].iloc[-1], f"{name}, {word}", color)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel("steps")
        theme.tidy(ax, grid="y", ticks=4)

    ends = ", ".join(f"{arms[a][0]} {k.removeprefix('fit_')} {c['mean'].iloc[-1]:.2f}" for (a, k), c in curves.items())
    return Panel("What is memorized", draw, f"Fitted shares at the end: {ends}.", "share of train labels fitted")


def _scatter(evidence: Evidence) -> Panel:
    rows = evidence.select(arm="grid")
    # A setting counts where most seeds reached both losses: a mean over the others alone would not compare.
    least = rows["seed"].nunique() / 2
    by_point = {m: rows[rows["metric"] == m].groupby("point")["value"] for m in ("early_trace", "accuracy_at_loss")}
    both = pd.DataFrame({m: g.mean()[g.count() > least] for m, g in by_point.items()}).dropna()
    if len(both) < 2:
        raise LookupError("fewer than two settings reached both losses")
    lr, batch = (rows.groupby("point")[name].first().reindex(both.index) for name in ("lr", "batch"))
    rho = both["early_trace"].corr(both["accuracy_at_loss"], method="spearman")
    lost = rows["point"].nunique() - len(both)

    def draw(ax: Axes) -> None:
        full = batch.max()
        for x, y, rate, size in zip(both["early_trace"], both["accuracy_at_loss"], lr, batch, strict=True):
            face = LARGE if size == full else theme.CARD
            ax.plot([x], [y], "o", color=LARGE, markerfacecolor=face, markersize=9, markeredgewidth=2)
            if size == full and rate in (lr.min(), lr.max()):
                spot, side = ((9, -5), "left") if x < both["early_trace"].mean() else ((0, -19), "center")
                ax.annotate(f"η={rate:.2g}", (x, y), spot, textcoords="offset points", ha=side, color=theme.MUTED)
        ax.margins(0.18, 0.45)
        ax.set_xlabel("early Tr(F); hollow: B/2" + (f"; {lost} left out" if lost else ""))
        theme.tidy(ax, ticks=3)

    missing = f"; {lost} left out, where few seeds got there" if lost else ""
    alt = (
        f"Early trace against test accuracy at equal train loss, {len(both)} settings; rho of means {rho:.2f}{missing}."
    )
    words = f"accuracy at one loss; ρ = {rho:.2f}".replace("-", "−")
    return Panel("Early trace, late accuracy", draw, alt, words)


def _flat(evidence: Evidence) -> Panel:
    found = {arm: evidence.select("hessian_trace", arm=arm)["value"] for arm in ARMS}
    noise = evidence.select("identity_noise", arm="small")["value"].mean()
    error = evidence.select("identity_error", arm="small")["value"]
    draws = evidence.find_runs(experiment="clean")[0].settings["label_draws"]

    def draw(part: SubFigure) -> None:
        left, right = part.subplots(1, 2, gridspec_kw={"width_ratios": [1.5, 1], "wspace": 0.55})
        shapes = left.violinplot([v.to_numpy() for v in found.values()], positions=range(len(found)), showextrema=False)
        for body, arm in zip(shapes["bodies"], found, strict=True):
            body.set_facecolor(ARMS[arm][1])
            body.set_alpha(0.2)
        for i, (arm, values) in enumerate(found.items()):
            lo, hi = _interval(values)
            theme.dots_with_interval(left, [i], [values.mean()], [lo], [hi], ARMS[arm][1], seeds=[values])
        left.set_xticks(range(len(found)), ["small", "large", "FP"])
        left.set_ylim(bottom=0)
        theme.tidy(left, grid="y", ticks=4)
        left.tick_params(axis="x", length=0)
        bars = [100 * noise, 100 * error.abs().mean()]
        right.bar([0, 1], bars, color=[GRAY, FP], width=0.6)
        for x, value in enumerate(bars):
            right.text(x, value, f"{value:.0f}%", ha="center", va="bottom")
        right.set_ylim(0, 1.25 * max(bars))
        right.set_xticks([0, 1], ["1 draw", f"{draws}"])
        right.set_yticks([])
        right.spines["left"].set_visible(False)
        right.set_xlabel(r"error of $B\,\|\bar g\|^2$")
        right.tick_params(axis="x", length=0)

    values = ", ".join(f"{ARMS[a][0]} {v.mean():.0f}" for a, v in found.items())
    alt = (
        f"Trace of the Hessian where the train loss first falls below a tenth of its value at chance: {values}. One "
        f"draw of the mini-batch estimate of Tr(F) is off by {noise:.0%}, the mean of many by "
        f"{error.abs().mean():.1%}."
    )
    return Panel(
        "Flatness at equal loss", draw, alt, "Tr(H) at one train loss; noise of the estimate of Tr(F)", own_axes=True
    )
