"""How the evidence on the Deep Bootstrap framework is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.errors import UnknownName
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

from .study.claims import FITTED, PLAIN, SWEEP

# One meaning per color: the world. Networks are told apart by their names.
IDEAL, REAL = theme.PALETTE["green"], theme.PALETTE["blue"]
FIT = theme.GRAYS[0]  # the train set
FAMILIES = {"mlp": "MLP", "cnn": "CNN", "resnet": "ResNet", "vit": "ViT", "user": "your model"}


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """Both worlds step by step; how networks rank in them; what augmentation changes."""
    arms = set(evidence.table["arm"])
    main = next((arm for arm in (*SWEEP, *FITTED) if arm in arms), SWEEP[0])
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
        network=", ".join(families) or "networks still to run",
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
    where: dict[str, Any] = {"arm": main, "split": "test"}
    ideal = evidence.across_seeds("soft_error", world="ideal", **where).drop(0, errors="ignore")
    sizes = sorted(int(n) for n in evidence.select("final_gap", arm=main)["n"].unique())
    reused = {
        n: evidence.across_seeds("soft_error", world="real", n=n, **where).drop(0, errors="ignore") for n in sizes
    }
    fitted = {n: evidence.by_seed("stop_train_error", arm=main, n=n) for n in sizes}  # NaN where it never was
    shades = dict(zip(sizes, np.linspace(0.45, 1.0, len(sizes)) if len(sizes) > 1 else [1.0], strict=True))

    def draw(ax: Axes) -> None:
        for n, curve in reused.items():
            color = theme.tint(REAL, float(shades[n]))
            marks.course(ax, curve, color, f"n = {n:,}", bounds=(0, 1))
            if fitted[n].notna().all():  # marked only where every seed was fitted
                t = float(fitted[n].median())
                ax.plot(t, np.interp(t, curve.index, curve["mean"]), "o", color=color, markersize=13, zorder=4)
        marks.course(ax, ideal, IDEAL, "always fresh", bounds=(0, 1))
        marks.log_steps(ax)
        # Where nothing is learned yet there is nothing to see: begin when the first twentieth of it has been.
        start, end = ideal["mean"].iloc[0], ideal["mean"].min()
        learned = ideal.index[ideal["mean"] < start - 0.05 * (start - end)]
        ax.set_xlim(left=0.8 * max(learned[0] / 2, ideal.index[0]) if len(learned) else None)
        ax.set_xlabel("steps")
        theme.tidy(ax, grid="y", ticks=5)

    ends = marks.listed({f"{n:,} reused": curve["mean"].iloc[-1] for n, curve in reused.items()}, "{:.3f}")
    return Panel(
        "Reused and fresh data, step by step",
        draw,
        f"Soft error of {_label(main)} at the end: always fresh {ideal['mean'].iloc[-1]:.3f}, {ends}. Each course "
        "follows that of fresh data until about where its train set is fitted.",
        f"soft error (1 − probability of the right class) of {_label(main)} on n reused images; dot: these are fitted",
        claim="C3b",
    )


def _scatter(evidence: Evidence) -> Panel:
    finals = {}
    for arm in sorted(set(evidence.select("final_real")["arm"]) & {*PLAIN, "user"}):
        pair = [evidence.select(name, arm=arm).groupby("n")["value"].mean() for name in ("final_ideal", "final_real")]
        finals[arm] = pd.concat(pair, axis=1, keys=("ideal", "real"))
    if not finals:
        raise UnknownName("none of the networks that are ranked was measured.")
    largest = max(float(t.index.max()) for t in finals.values())
    ranked = pd.DataFrame({arm: t.loc[largest] for arm, t in finals.items() if largest in t.index}).T
    rho = ranked["ideal"].corr(ranked["real"], method="spearman") if len(ranked) > 2 else np.nan

    def draw(ax: Axes) -> None:
        top = float(ranked.to_numpy().max()) * 1.15
        ax.plot([0, top], [0, top], color=theme.GRAYS[0], linewidth=1.4, zorder=1)
        ax.plot(ranked["ideal"], ranked["real"], "o", color=REAL, markersize=7)
        ends = ranked.sort_values("real")
        for arm, place, side in ((ends.index[0], (-4, 7), "left"), (ends.index[-1], (-8, 4), "right")):
            looks: dict[str, Any] = {"color": theme.MUTED, "ha": side, "va": "bottom"}
            ax.annotate(_label(str(arm)), tuple(ends.loc[arm]), place, textcoords="offset points", **looks)
        ax.set_xlim(0, top)
        ax.set_ylim(0, top)
        ax.set_xlabel("fresh data")
        ax.set_ylabel("reused")
        theme.tidy(ax, ticks=3)

    return Panel(
        "Networks in both worlds",
        draw,
        f"Final soft error of {len(ranked)} networks on fresh and on reused data; rank correlation {rho:.2f}.",
        f"final soft error, n = {largest:,.0f}, by network",
        claim="C2",
    )


def _by_n(evidence: Evidence, main: str) -> Panel:
    sizes = sorted(evidence.select("final_gap", arm=main)["n"].unique())
    found = {f"{n:,.0f}": evidence.by_seed("final_gap", arm=main, n=n) for n in sizes}

    def draw(ax: Axes) -> None:
        marks.columns(ax, found, REAL, reference=0)
        ax.set_xlabel("samples n")

    first, last = (float(np.mean(found[name])) for name in (next(iter(found)), list(found)[-1]))
    return Panel(
        f"From the fewest to the most samples, the cost of reuse goes from {first:.2f} to {last:.2f}",
        draw,
        f"Final soft error on reused minus on fresh data by the number of samples: {marks.listed(found, '{:.3f}')}.",
        "final soft error, reused minus fresh data",
    )


def _shifts(evidence: Evidence) -> Panel:
    n = min(int(v) for v in evidence.select("final_real", arm="cnn_shift")["n"].unique())
    metrics = {"on the train set": "final_train", "on fresh data": "final_ideal", "on reused data": "final_real"}
    effects = {
        name: evidence.by_seed(m, arm="cnn_shift", n=n).sub(evidence.by_seed(m, arm="cnn", n=n)).dropna()
        for name, m in metrics.items()
    }
    return Panel(
        "What image shifts change",
        lambda ax: marks.rows(ax, effects, dict(zip(effects, (FIT, IDEAL, REAL), strict=True)), reference=0),
        f"What random image shifts add to the soft error of a CNN with n = {n:,}: {marks.listed(effects, '{:+.3f}')}.",
        f"soft error added by shifts; CNN, n = {n:,}",
        claim="C6",
    )
