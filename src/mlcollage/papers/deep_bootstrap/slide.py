"""How the evidence on the Deep Bootstrap framework is drawn."""

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

from .study.claims import FITTED, SWEEP

IDEAL = theme.PALETTE["green"]
REAL = theme.PALETTE["blue"]
CLASSICAL = theme.PALETTE["orange"]
GLYPHS = ("easy16", "standard32")  # worlds of which a run keeps examples
FAMILIES = {"mlp": "MLP", "cnn": "CNN", "resnet": "ResNet", "vit": "ViT", "user": "your model"}


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """The idea, and the panels for which there is evidence (a user's workload has one network or two)."""
    arms = set(evidence.table["arm"])
    main = next((arm for arm in (*SWEEP, *FITTED) if arm in arms), None)
    if main is None:
        raise UnknownName(f"no network of this slide was measured; there are: {', '.join(sorted(arms))}.")
    panels = [_curves(evidence, main), _scatter(evidence), _by_n(evidence, main)]
    if "cnn_shift" in arms:
        panels.append(_augmentations(evidence))
    if "least_squares" in arms:
        panels.append(_limits(evidence))
    sheets = [run for run in evidence.find_runs(arm="mlp128", seed=0) if run.settings["data"] in GLYPHS]
    if sheets:
        panels.append(_examples(evidence, sheets[0].id))
    tagline = "to generalize offline is to learn fast online"
    return Collage(tagline, _IDEA, with_headlines(panels, verdicts, _MESSAGES))


_MESSAGES = {
    "Real and ideal, step by step": ("C1", "Real follows ideal, then parts"),
    "Networks in both worlds": ("C2", "One ranking in both worlds"),
    "The gap by sample size": ("C3b", "The gap shrinks with n"),
    "Convex, d > n": ("C8b", "Where it fails: convex, d > n"),
}


def _draw_idea(ax: Axes) -> None:
    d = Diagram(ax, 400, 400)
    d.note(100, 8, "Real World", color=REAL, weight="semibold", fontsize=theme.BODY)
    d.note(300, 8, "Ideal World", color=IDEAL, weight="semibold", fontsize=theme.BODY)
    sample = d.box(100, 48, 150, 46, "n samples", color=REAL)
    fresh = d.box(300, 48, 150, 46, "fresh samples", color=IDEAL)
    left = d.box(100, 142, 150, 46, "network $f_t$", color=REAL, filled=True)
    right = d.box(300, 142, 150, 46, "its twin", color=IDEAL, filled=True)
    d.arrow(sample, left, "many epochs", color=REAL)
    d.arrow(fresh, right, "one pass", color=IDEAL)
    d.arrow(left, right, both=True, dashed=True, color=theme.MUTED)
    d.note(200, 188, "same start, same steps, same schedule")
    d.field(200, 306, 400, 188)
    d.equation(200, 238, r"\mathrm{TestError}(f_t) \; =", size=18)
    d.equation(200, 278, r"\mathrm{TestError}(f_t^{\,\mathrm{ideal}})\; +\; \varepsilon(n, t)", size=20)
    d.note(128, 316, "online learning", color=IDEAL, weight="semibold")
    d.note(302, 316, "bootstrap error", color=REAL, weight="semibold")
    d.note(200, 366, "The claim: the second term stays\nsmall until the train set is fitted.")


_IDEA = Panel(
    "The idea",
    _draw_idea,
    "Two worlds train the same network by the same steps: the Real World reuses n samples for many epochs, the Ideal "
    "World draws every batch fresh. Test error is the ideal test error plus the bootstrap error.",
    "A network on fixed data has a twin that never sees a sample twice.",
)


def _label(arm: str) -> str:
    for prefix, name in FAMILIES.items():
        if arm.startswith(prefix):
            rest = arm.removeprefix(prefix).replace("_", " ").strip()
            return f"{name} {rest}".strip()
    return arm


def _curves(evidence: Evidence, main: str) -> Panel:
    ideal = evidence.across_seeds("soft_error", arm=main, world="ideal", split="test")
    sizes = sorted(int(n) for n in evidence.select("final_gap", arm=main)["n"].unique())
    shown = [sizes[0], sizes[-1]] if len(sizes) > 2 else sizes  # more lines would hide each other
    shades = dict(zip(shown, (theme.PALETTE["vermillion"], REAL), strict=False))

    def draw(ax: Axes) -> None:
        for n, color in shades.items():
            test, train = (
                evidence.across_seeds("soft_error", arm=main, world="real", split=split, n=n).drop(0, errors="ignore")
                for split in ("test", "train")
            )
            theme.band(ax, test.index, test["lo"], test["hi"], color)
            ax.plot(test.index, test["mean"], color=color)
            ax.plot(train.index, train["mean"], color=color, linestyle=(0, (3, 2)), linewidth=1.6)
            theme.label_line_end(ax, test.index[-1], test["mean"].iloc[-1], f"n={n:,}", color)
            stop = evidence.select("stop_train_error", arm=main, n=n)["value"]
            if stop.notna().all():  # T is marked only where every seed was fitted
                t = float(stop.median())
                ax.plot([t], [np.interp(t, test.index, test["mean"])], "o", color=color, markersize=8)
        curve = ideal.drop(0, errors="ignore")  # step 0 has no place on a logarithmic axis
        theme.band(ax, curve.index, curve["lo"], curve["hi"], IDEAL)
        ax.plot(curve.index, curve["mean"], color=IDEAL)
        theme.label_line_end(ax, curve.index[-1], curve["mean"].iloc[-1], "ideal", IDEAL)
        ax.set_xscale("log")
        ax.set_xlabel("steps; dashed: train set; dot: T")
        theme.tidy(ax, grid="y", ticks=4)

    finals = {n: evidence.across_seeds("final_real", over="n", arm=main)["mean"][n] for n in shown}
    alt = (
        f"Test soft-error of {_label(main)} over steps: ideal ends at {ideal['mean'].iloc[-1]:.3f}, "
        + ", ".join(f"real with n={n} at {v:.3f}" for n, v in finals.items())
        + "."
    )
    return Panel("Real and ideal, step by step", draw, alt, f"soft-error of {_label(main)}")


def _scatter(evidence: Evidence) -> Panel:
    finals = {}
    for arm in sorted(set(evidence.select("final_real")["arm"])):
        pair = [evidence.select(name, arm=arm) for name in ("final_ideal", "final_real")]
        # Two tables with a row per seed and a column per n.
        finals[arm] = [t.pivot(index="seed", columns="n", values="value") for t in pair]
    largest = max(float(t[0].columns.max()) for t in finals.values())
    colors = dict(zip(FAMILIES, theme.PALETTE.values(), strict=False))

    def draw(ax: Axes) -> None:
        top = max(float(np.nanmax(t.to_numpy())) for pair in finals.values() for t in pair) * 1.08
        ax.plot([0, top], [0, top], color=theme.GRAYS[0], linewidth=1.4, zorder=1)
        named = set()
        for arm, (ideal, real) in finals.items():
            family = next((f for f in FAMILIES if arm.startswith(f)), "mlp")
            for n in real.columns:
                full = float(str(n)) == largest  # filled: the size at which networks are ranked
                face = colors[family] if full else theme.CARD
                x, y = ideal[n].mean(), real[n].mean()
                ax.plot([x], [y], "o", color=colors[family], markerfacecolor=face, markersize=8, markeredgewidth=1.8)
                if full and family not in named:
                    named.add(family)
        for i, family in enumerate(f for f in reversed(FAMILIES) if f in named):
            ax.text(
                0.98,
                0.05 + 0.135 * i,
                FAMILIES[family],
                transform=ax.transAxes,
                color=theme.ink(colors[family]),
                weight="semibold",
                ha="right",
                va="bottom",
            )
        ax.set_xlim(0, top)
        ax.set_ylim(0, top)
        ax.set_xlabel("ideal")
        ax.set_ylabel("real")
        theme.tidy(ax, ticks=4)

    rho = _spearman(finals, largest)
    alt = f"Final soft-error in the two worlds for {len(finals)} networks, with the diagonal; rank correlation {rho}."
    return Panel("Networks in both worlds", draw, alt, f"final soft-error; filled: n={largest:,.0f}")


def _spearman(finals: Mapping[str, list[pd.DataFrame]], n: float) -> str:
    x, y = (pd.Series([pair[k][n].mean() for pair in finals.values() if n in pair[k]]) for k in (0, 1))
    return f"{x.corr(y, method='spearman'):.2f}" if len(x) > 2 else "not defined"


def _by_n(evidence: Evidence, main: str) -> Panel:
    gap = evidence.across_seeds("final_gap", over="n", arm=main)
    classical = _classical(evidence, main)

    def draw(ax: Axes) -> None:
        x = np.arange(len(gap))
        rows = [evidence.select("final_gap", arm=main, n=n)["value"].to_numpy() for n in gap.index]
        theme.dots_with_interval(ax, x, gap["mean"], gap["lo"], gap["hi"], REAL, seeds=rows)
        ax.plot(x, gap["mean"], color=REAL, linewidth=1.6)
        ax.plot(x, classical, "-s", color=CLASSICAL, linewidth=1.6)
        theme.label_line_end(ax, x[-1], gap["mean"].iloc[-1], "bootstrap", REAL)
        theme.label_line_end(ax, x[-1], classical.iloc[-1], "classical", CLASSICAL)
        ax.axhline(0, color=theme.GRAYS[1], linewidth=1)
        ax.set_xticks(x, [f"{n:,.0f}" for n in gap.index])
        ax.set_xlabel("samples n")
        theme.tidy(ax, grid="y", ticks=4)

    values = ", ".join(f"n={n:.0f}: {m:.3f}" for n, m in gap["mean"].items())
    return Panel(
        "The gap by sample size",
        draw,
        f"Final bootstrap error by n: {values}.",
        "at the end; classical: test − train",
    )


def _classical(evidence: Evidence, main: str) -> pd.Series:
    real, train = (evidence.across_seeds(name, over="n", arm=main)["mean"] for name in ("final_real", "final_train"))
    return real - train


def _augmentations(evidence: Evidence) -> Panel:
    names = {"cnn_shift": "shift ±2", "cnn_occlude": "occlude"}
    smallest = min(int(n) for n in evidence.select("final_real", arm="cnn")["n"].unique())
    measures = {"final_train": ("fit", CLASSICAL), "final_ideal": ("ideal", IDEAL), "final_real": ("real", REAL)}
    there = [arm for arm in names if arm in set(evidence.table["arm"])]
    effects = {(arm, metric): _added(evidence, metric, arm, smallest) for arm in there for metric in measures}

    def draw(ax: Axes) -> None:
        arms = list(dict.fromkeys(arm for arm, _ in effects))
        for j, (metric, (_, color)) in enumerate(measures.items()):
            values = [effects[arm, metric] for arm in arms]
            place = [i + 0.24 * (j - 1) for i in range(len(arms))]  # three dots beside each other at each arm
            ends = [_interval(v) for v in values]
            theme.dots_with_interval(
                ax, place, [v.mean() for v in values], [e[0] for e in ends], [e[1] for e in ends], color
            )
            theme.label_line_end(ax, place[-1] + 0.06, float(values[-1].mean()), measures[metric][0], color)
        ax.axhline(0, color=theme.GRAYS[1], linewidth=1)
        ax.set_xticks(range(len(arms)), [names[a] for a in arms])
        ax.set_xlim(-0.6, len(arms) - 0.35)
        theme.tidy(ax, grid="y", ticks=4)

    parts = [f"{names[arm]} {measures[metric][0]} {v.mean():+.3f}" for (arm, metric), v in effects.items()]
    alt = f"Added soft-error, CNN: {'; '.join(parts)}."
    return Panel("What augmentation changes", draw, alt, f"added soft-error, CNN, n={smallest:,}")


def _added(evidence: Evidence, metric: str, arm: str, n: int) -> pd.Series:
    with_it, without = (evidence.select(metric, arm=a, n=n).set_index("seed")["value"] for a in (arm, "cnn"))
    return (with_it - without).dropna()


def _interval(values: pd.Series) -> tuple[float, float]:
    from mlcollage.stats import t_interval

    x = values.to_numpy(dtype=float)
    return t_interval(x, 0.95) if len(x) > 1 and np.ptp(x) > 0 else (float(x.mean()), float(x.mean()))


def _limits(evidence: Evidence) -> Panel:
    real, ideal = (
        evidence.across_seeds("regression_error", arm="least_squares", world=world) for world in ("real", "ideal")
    )

    def draw(ax: Axes) -> None:
        for c, name, color in ((real, "real", REAL), (ideal, "ideal", IDEAL)):
            theme.band(ax, c.index, c["lo"], c["hi"], color)
            ax.plot(c.index, c["mean"], color=color)
            theme.label_line_end(ax, c.index[-1], c["mean"].iloc[-1], name, color)
        ax.set_xscale("log")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("steps")
        theme.tidy(ax, grid="y", ticks=4)

    alt = f"Least squares: real test error ends at {real['mean'].iloc[-1]:.2f}, ideal at {ideal['mean'].iloc[-1]:.2f}."
    return Panel("Convex, d > n", draw, alt, "least squares, d=200, n=50, test error")


def _examples(evidence: Evidence, run: str) -> Panel:
    sheet = evidence.array(run, "examples")[:6]
    classes, copies = sheet.shape[:2]

    def draw(part: SubFigure) -> None:
        axes = part.subplots(copies, classes, squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.08})
        for i in range(copies):
            for j in range(classes):
                # sheet is (classes, copies, channels, height, width)
                axes[i, j].imshow(np.moveaxis(sheet[j, i], 0, -1).squeeze(), cmap="gray", vmin=0, vmax=1)
                axes[i, j].set_axis_off()

    alt = f"{copies} example images of each of {classes} glyph classes."
    return Panel("The world: endless glyphs", draw, alt, "one column per class", own_axes=True)
