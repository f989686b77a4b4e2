"""How the evidence on the Deep Bootstrap framework is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mlcollage.collage import Collage, Diagram, Panel, theme
from mlcollage.errors import UnknownName
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

from .study.claims import FITTED, PLAIN, SWEEP

# One meaning per color: the world. Networks are told apart by their names.
IDEAL, REAL = theme.PALETTE["green"], theme.PALETTE["blue"]
FIT = theme.GRAYS[0]  # the train set
FAMILIES = {"mlp": "MLP", "cnn": "CNN", "resnet": "ResNet", "vit": "ViT", "user": "your model"}
DASHED = (0, (3, 2))


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """Both worlds step by step; how networks rank in them; what augmentation changes."""
    arms = set(evidence.table["arm"])
    main = next((arm for arm in (*SWEEP, *FITTED) if arm in arms), None)
    if main is None:
        raise UnknownName(f"no network of this slide was measured; there are: {', '.join(sorted(arms))}.")
    second = measured_panel("The cost of reuse by sample size", lambda e: _by_n(e, main), evidence)
    if "cnn_shift" in arms or evidence.waiting:
        second = measured_panel("What image shifts change", _shifts, evidence)
    families = [name for prefix, name in FAMILIES.items() if any(a.startswith(prefix) for a in arms)]
    return Collage(
        "to generalize offline is to learn fast online",
        _IDEA,
        measured_panel("Reused and fresh data, step by step", lambda e: _curves(e, main), evidence),
        [measured_panel("Networks in both worlds", _scatter, evidence), second],
        data="endless glyph images" if evidence.workload == "default" else "the workload",
        network=", ".join(families),
    )


def _label(arm: str) -> str:
    for prefix, name in FAMILIES.items():
        if arm.startswith(prefix):
            return f"{name} {arm.removeprefix(prefix).replace('_', ' ').strip()}".strip()
    return arm


def _draw_idea(ax: Axes) -> None:
    """Two courses of the test error with one start, and the difference between them."""
    d = Diagram(ax, 374, 330)
    t = np.linspace(0, 1, 60)
    left, right, low, high = 8.0, 252.0, 168.0, 20.0
    ideal = 0.06 + 0.9 * np.exp(-3.2 * t)
    real = ideal + 0.26 * np.clip((t - 0.45) / 0.55, 0, 1) ** 1.3
    x = left + (right - left) * t
    y_ideal, y_real = (low - (low - high) * v for v in (ideal, real))
    d.arrow((left, low), (right + 14, low), color=theme.LINE, width=1.4)
    d.note(right, low + 16, "steps", ha="right")
    ax.fill_between(x, y_ideal, y_real, color=theme.SHADE, linewidth=0, zorder=1)
    ax.plot(x, y_real, color=REAL, linewidth=3.2)
    ax.plot(x, y_ideal, color=IDEAL, linewidth=3.2)
    d.note(right + 8, y_real[-1] - 20, "n samples,", color=REAL, ha="left", weight="semibold")
    d.note(right + 8, y_real[-1] + 4, "reused", color=REAL, ha="left", weight="semibold")
    d.note(right + 8, y_ideal[-1] - 3, "always fresh", color=IDEAL, ha="left", weight="semibold")
    d.note(140, 32, "test error of one network,", ha="left")
    d.note(140, 57, "same start, same steps", ha="left")
    d.field(187, 260, 374, 126)
    d.note(187, 218, "test error  =", color=theme.INK)
    d.note(187, 248, "test error on fresh data (online learning)", color=IDEAL, weight="semibold")
    d.note(187, 276, "+ what reuse costs (bootstrap error)", color=REAL, weight="semibold")
    d.note(187, 305, "small until the n samples are fitted", color=theme.INK)


_IDEA = Panel(
    "The idea",
    _draw_idea,
    "Test error of one network trained twice with the same steps: on n samples reused for many epochs, and on samples "
    "that are always fresh. The curves agree at first; the difference at the end is what reuse costs.",
    "A network on fixed data has a twin that never sees a sample twice. How far do they part?",
)


def _curves(evidence: Evidence, main: str) -> Panel:
    ideal = evidence.across_seeds("soft_error", arm=main, world="ideal", split="test").drop(0, errors="ignore")
    n = max(int(v) for v in evidence.select("final_gap", arm=main)["n"].unique())
    test, train = (
        evidence.across_seeds("soft_error", arm=main, world="real", split=split, n=n).drop(0, errors="ignore")
        for split in ("test", "train")
    )
    stop = evidence.select("stop_train_error", arm=main, n=n)["value"]

    def draw(ax: Axes) -> None:
        for curve, name, color in ((test, f"{n:,} reused", REAL), (ideal, "always fresh", IDEAL)):
            theme.band(ax, curve.index, curve["lo"], curve["hi"], color)
            ax.plot(curve.index, curve["mean"], color=color)
            theme.label_line_end(ax, curve.index[-1], curve["mean"].iloc[-1], name, color)
        ax.plot(train.index, train["mean"], color=FIT, linestyle=DASHED, linewidth=2.4)
        theme.label_line_end(ax, train.index[-1], train["mean"].iloc[-1], "train set", FIT)
        if stop.notna().all():  # T is marked only where every seed was fitted
            t = float(stop.median())
            theme.reference_line(ax, t, "train set fitted (T)", vertical=True)
        ax.set_xscale("log")
        ax.set_xlabel("steps (log)")
        theme.tidy(ax, grid="y", ticks=5)

    return Panel(
        "Reused and fresh data, step by step",
        draw,
        f"Error of {_label(main)} over steps: fresh data end at {ideal['mean'].iloc[-1]:.3f}, {n:,} reused samples at "
        f"{test['mean'].iloc[-1]:.3f}, on their train set at {train['mean'].iloc[-1]:.3f}.",
        f"soft error (1 − probability of the right class), {_label(main)}; mean and 95% interval",
        claim="C1",
    )


def _scatter(evidence: Evidence) -> Panel:
    finals = {}
    for arm in sorted(set(evidence.select("final_real")["arm"]) & {*PLAIN, "user"}):
        pair = [evidence.select(name, arm=arm).groupby("n")["value"].mean() for name in ("final_ideal", "final_real")]
        finals[arm] = pd.concat(pair, axis=1, keys=("ideal", "real"))
    largest = max(float(t.index.max()) for t in finals.values())
    ranked = pd.DataFrame({arm: t.loc[largest] for arm, t in finals.items() if largest in t.index}).T
    rho = ranked["ideal"].corr(ranked["real"], method="spearman") if len(ranked) > 2 else np.nan

    def draw(ax: Axes) -> None:
        top = float(ranked.to_numpy().max()) * 1.15
        ax.plot([0, top], [0, top], color=theme.GRAYS[0], linewidth=1.4, zorder=1)
        ax.plot(ranked["ideal"], ranked["real"], "o", color=REAL, markersize=7)
        ends = ranked.sort_values("real")
        for arm, row in (next(ends.iterrows()), list(ends.iterrows())[-1]):
            label = (row["ideal"], row["real"])
            ax.annotate(_label(str(arm)), label, (9, 5), textcoords="offset points", color=theme.MUTED)
        ax.set_xlim(0, top)
        ax.set_ylim(0, top)
        ax.set_xlabel("fresh data")
        ax.set_ylabel("reused")
        theme.tidy(ax, ticks=3)

    return Panel(
        "Networks in both worlds",
        draw,
        f"Final soft error of {len(ranked)} networks on fresh and on reused data; rank correlation {rho:.2f}.",
        f"final soft error, n = {largest:,.0f}, one dot per network",
        claim="C2",
    )


def _by_n(evidence: Evidence, main: str) -> Panel:
    gap = evidence.across_seeds("final_gap", over="n", arm=main)

    def draw(ax: Axes) -> None:
        x = np.arange(len(gap))
        rows = [evidence.select("final_gap", arm=main, n=n)["value"].to_numpy() for n in gap.index]
        theme.dots_with_interval(ax, x, gap["mean"], gap["lo"], gap["hi"], REAL, seeds=rows)
        ax.axhline(0, color=theme.GRAYS[1], linewidth=1)
        ax.set_xticks(x, [f"{n:,.0f}" for n in gap.index])
        ax.set_xlabel("samples n")
        theme.tidy(ax, grid="y", ticks=4)

    values = ", ".join(f"n={n:.0f}: {m:.3f}" for n, m in gap["mean"].items())
    return Panel(
        "The cost of reuse by sample size",
        draw,
        f"Final soft error on reused minus on fresh data by n: {values}.",
        "final soft error, reused minus fresh data",
        claim="C3b",
    )


def _shifts(evidence: Evidence) -> Panel:
    n = min(int(v) for v in evidence.select("final_real", arm="cnn_shift")["n"].unique())
    measures = {"final_train": ("on the train set", FIT), "final_ideal": ("on fresh data", IDEAL)}
    measures["final_real"] = ("on reused data", REAL)
    effects = {}
    for metric in measures:
        with_it, without = (
            evidence.select(metric, arm=a, n=n).set_index("seed")["value"] for a in ("cnn_shift", "cnn")
        )
        effects[metric] = (with_it - without).dropna().to_numpy(dtype=float)

    def draw(ax: Axes) -> None:
        for row, (metric, values) in enumerate(effects.items()):
            lo, hi = theme.mean_interval(values)
            color = measures[metric][1]
            theme.dots_with_interval(ax, [row], [values.mean()], [lo], [hi], color, seeds=[values], horizontal=True)
        ax.axvline(0, color=theme.LINE, linewidth=1.4, zorder=1)
        ax.set_yticks(range(len(measures)), [name for name, _ in measures.values()])
        ax.set_ylim(len(measures) - 0.4, -0.6)
        ax.tick_params(axis="y", length=0)
        theme.tidy(ax, grid="x", ticks=4)

    parts = ", ".join(f"{measures[m][0]} {v.mean():+.3f}" for m, v in effects.items())
    return Panel(
        "What image shifts change",
        draw,
        f"What random image shifts add to the soft error of a CNN with n = {n:,}: {parts}.",
        f"added soft error, CNN, n = {n:,}, random shifts of 2 pixels",
        claim="C6",
    )
