"""How the evidence on AugReg is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

# One meaning per color: what is changed in training.
PLAIN, LIGHT, REGULARIZED = theme.PALETTE["black"], theme.PALETTE["blue"], theme.PALETTE["orange"]
SCRATCH = theme.GRAYS[0]
_SIZES = {"small": "300 series", "large": "3000 series"}


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """Accuracy by data, steps and augmentation; what transfers; transfer against training from scratch."""
    own = evidence.workload == "default"
    return Collage(
        "the right augmentation is worth ten times the data",
        _idea(),
        measured_panel("Accuracy by data and steps", _accuracy, evidence),
        [
            measured_panel("What helps 300 series", _helps, evidence),
            measured_panel("Transfer and scratch", _courses, evidence),
        ],
        data="series with hidden templates" if own else "the workload",
        network="ViT, 2 blocks of width 32",
    )


def _idea() -> Panel:
    def draw(ax: Axes) -> None:
        d = Diagram(ax, 374, 372)
        knobs = [("data", "300 · 3000"), ("augmentation", "none · light"), ("regularization", "0 · 0.1")]
        knobs += [("steps", "400 · 1600")]
        for k, (name, values) in enumerate(knobs):
            y = 40 + 62 * k
            color = (theme.INK, LIGHT, REGULARIZED, theme.INK)[k]
            d.note(8, y, name, ha="left", color=color, weight="semibold")
            d.note(8, y + 24, values, ha="left")
            d.arrow((168, y + 10), (236, 152), color=theme.GRAYS[1])
        d.field(300, 152, 116, 92)
        d.note(300, 140, "one ViT", weight="semibold")
        d.note(300, 164, "2 blocks")
        d.equation(187, 312, r"\tilde x = \lambda x + (1-\lambda)\, x'", size=20)
        d.note(187, 350, "mixup, one of seven presets")

    return Panel(
        "The idea",
        draw,
        "Four knobs of training lead into one vision transformer: data, augmentation, regularization and steps.",
        "Nothing but data, augmentation, regularization and compute is changed.",
    )


def _accuracy(evidence: Evidence) -> Panel:
    lengths = ("short", "long")
    found = {
        (data, aug): [100 * evidence.by_seed("accuracy", arm="sweep", data=data, aug=aug, length=n) for n in lengths]
        for data in ("small", "large")
        for aug in ("light", "none")
    }

    upper = max((key for key in found if key[0] == "large"), key=lambda key: float(found[key][1].mean()))

    def draw(ax: Axes) -> None:
        for (data, aug), values in found.items():
            color, style = (LIGHT if aug == "light" else PLAIN), ("-" if data == "small" else "--")
            means = [float(v.mean()) for v in values]
            ax.plot([0, 1], means, style, color=color, linewidth=2.4, zorder=2)
            for x, v in enumerate(values):
                lo, hi = theme.mean_interval(v)
                theme.dots_with_interval(ax, [x], [float(v.mean())], [lo], [hi], color)
            ax.annotate(
                f"{data.replace('small', '300').replace('large', '3000')}, {aug}",
                (1, means[1]),
                (10, 8 if (data, aug) == upper else 1 if data == "large" else -10),  # three lie close
                textcoords="offset points",
                va="center",
                color=theme.ink(color),
                weight="semibold",
            )
        ax.set_xlim(-0.15, 1.5)
        ax.set_xticks([0, 1], ["400 steps", "1600 steps"])
        theme.tidy(ax, grid="y", ticks=5)

    text = "; ".join(f"{d} {a}: {v[0].mean():.0f} and {v[1].mean():.0f}%" for (d, a), v in found.items())
    return Panel(
        "Accuracy by data and steps",
        draw,
        f"Test accuracy in short and long runs: {text}."[:300],
        "test accuracy (%) by number of series and augmentation; mean, 95% interval",
        claim="C1",
    )


def _helps(evidence: Evidence) -> Panel:
    names = {"none": "none", "light": "light", "medium": "medium", "regularized": "dropout"}
    found = {
        shown: 100 * evidence.by_seed("accuracy", arm="sweep", data="small", aug=aug, length="short")
        for aug, shown in names.items()
    }
    colors = {"none": PLAIN, "light": LIGHT, "medium": LIGHT, "dropout": REGULARIZED}

    def draw(ax: Axes) -> None:
        marks.columns(ax, found, colors)

    return Panel(
        "What helps 300 series",
        draw,
        f"Test accuracy on 300 series, 400 steps: {marks.listed(found)}.",
        "test accuracy (%), 300 series, 400 steps",
        claim="C3",
    )


def _courses(evidence: Evidence) -> Panel:
    table = {arm: 100 * evidence.across_seeds("course", over="step", arm=arm) for arm in ("transfer", "scratch")}

    def draw(ax: Axes) -> None:
        for arm, color in (("transfer", LIGHT), ("scratch", SCRATCH)):
            marks.course(ax, table[arm], color, arm, dots=True)
        ax.set_xscale("log", base=2)
        steps = sorted({int(s) for t in table.values() for s in np.asarray(t.index, float)})
        ax.set_xticks(steps, [str(s) for s in steps])
        ax.minorticks_off()
        theme.tidy(ax, grid="y", ticks=2)

    return Panel(
        "Transfer and scratch",
        draw,
        f"Test accuracy on a new task by steps: {marks.from_to(table)}.",
        "new task: test accuracy (%) by steps",
        claim="C4",
    )
