"""How the evidence on the Fisher explosion is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

# One meaning per color: how the network is trained. A lighter shade is the same training in one quarter only.
SMALL, LARGE, FP = (theme.PALETTE[c] for c in ("vermillion", "blue", "green"))
OTHER = theme.GRAYS[0]
CLEAN = {"small": ("small η", SMALL), "large": ("large η", LARGE), "small_fp": ("small η + FP", FP)}
NOISY = {"noise_none": ("none", SMALL), "noise_mixup": ("mixup", OTHER), "noise_fp": ("FP", FP)}


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """Accuracy with wrong labels, the trace while training, and whether an early penalty matters."""
    settings = evidence.runs[0].settings
    return Collage(
        "tame the trace early, generalize late",
        _IDEA,
        measured_panel("Accuracy with wrong labels", _wrong_labels, evidence),
        [
            measured_panel("The trace while training", _explosion, evidence),
            measured_panel("When the penalty acts", _early, evidence),
        ],
        data=f"Fashion-MNIST 14×14, {settings['train']:,} images",
        network="MLP 128-128",
    )


def _draw_idea(ax: Axes) -> None:
    """Three courses of the trace, and why one extra gradient measures it."""
    d = Diagram(ax, 384, 330)
    t = np.linspace(0, 1, 60)
    courses = {
        "small η": (SMALL, 0.05 + 0.95 / (1 + np.exp(-9 * (t - 0.5)))),
        "+ penalty": (FP, 0.05 + 0.45 / (1 + np.exp(-9 * (t - 0.55)))),
        "large η": (LARGE, 0.22 + 0.02 * t),
    }
    left, right, low, high = 8.0, 282.0, 158.0, 26.0
    d.arrow((left, low), (right + 20, low), color=theme.LINE, width=1.4)
    d.note(right, low + 16, "steps", ha="right")
    d.note(left, 13, "trace of the Fisher matrix", ha="left")
    for name, (color, height) in courses.items():
        d.ax.plot(left + (right - left) * t, low - (low - high) * height, color=color, linewidth=3.2)
        d.note(right + 8, low - (low - high) * height[-1], name, color=color, ha="left", weight="semibold")
    d.field(192, 258, 384, 136)
    d.equation(192, 222, r"\min\;\ell(\theta)+\alpha\,\|\bar g(\hat y)\|^2", size=21)
    d.note(192, 255, r"$\hat y$ drawn from the model; $\bar g$: of the batch", color=theme.INK)
    d.equation(192, 290, r"\mathrm{E}\,\|\bar g(\hat y)\|^2=\mathrm{Tr}\,F\,/\,B", size=20)


_IDEA = Panel(
    "The idea",
    _draw_idea,
    "Courses of the trace of the Fisher matrix: with small steps it explodes, with large ones or a penalty it stays "
    "low. The penalty is the squared norm of a batch gradient at labels that the model draws; its mean is the trace "
    "over the batch size.",
    "Small steps let the gradients grow, and training then memorizes. A penalty on one extra gradient keeps them "
    "small.",
)


def _common(curve: pd.DataFrame) -> pd.DataFrame:
    """The steps that all seeds have: a branch of a training adds one of its own."""
    return curve[curve["seeds"] == curve["seeds"].max()]


def _wrong_labels(evidence: Evidence) -> Panel:
    curves = {a: _common(evidence.across_seeds("test_accuracy", arm=a)) for a in NOISY}
    curves = {a: 100 * c[["mean", "lo", "hi"]] for a, c in curves.items()}
    final = {a: 100 * float(evidence.by_seed("final_accuracy", arm=a).mean()) for a in NOISY}

    def draw(ax: Axes) -> None:
        for arm, c in curves.items():
            (name, color), peer = NOISY[arm], arm == "noise_mixup"
            marks.course(ax, c, color, f"{name} {final[arm]:.1f}", dashed=peer, interval=not peer)
        ax.set_ylim(bottom=np.floor(min(c["lo"].iloc[len(c) // 2 :].min() for c in curves.values()) / 5) * 5 - 5)
        ax.set_xlabel("steps")
        theme.tidy(ax, grid="y", ticks=5)

    ends = marks.listed({NOISY[a][0]: v for a, v in final.items()}, "{:.1f}%")
    share = evidence.find_runs(arm="noise_fp")[0].settings["wrong"]
    return Panel(
        "Accuracy with wrong labels",
        draw,
        f"Test accuracy over steps with {share:.0%} of the training labels wrong; at the end: {ends}.",
        f"test accuracy (%) with {share:.0%} wrong labels; mean and 95% interval",
        claim="C6",
    )


def _explosion(evidence: Evidence) -> Panel:
    curves = {arm: _common(evidence.across_seeds("trace", arm=arm)) for arm in CLEAN}

    def draw(ax: Axes) -> None:
        for arm, c in curves.items():
            name, color = CLEAN[arm]
            marks.course(ax, c, color, name)
            ax.plot(c.index[-1], c["mean"].iloc[-1], "o", color=color, markersize=7)
        marks.log_steps(ax)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("steps")
        theme.tidy(ax, grid="y", ticks=4)

    peaks = marks.listed({CLEAN[a][0]: c["mean"].max() for a, c in curves.items()}, "{:.0f}")
    return Panel(
        "The trace while training",
        draw,
        f"Tr(F) over steps until each training fits; peaks of the mean: {peaks}.",
        "Tr(F), right labels; dots: they are fitted",
        claim="C1",
    )


def _early(evidence: Evidence) -> Panel:
    arms = {
        "noise_early_fp": ("first quarter", FP),
        "noise_late_fp": ("last quarter", FP),
        "noise_fp": ("always", FP),
        "noise_none": ("never", SMALL),
    }
    found = {name: 100 * evidence.by_seed("final_accuracy", arm=a) for a, (name, _) in arms.items()}
    return Panel(
        "When the penalty acts",
        lambda ax: marks.rows(ax, found, dict(arms.values())),
        "Final test accuracy with wrong labels, by the part of training in which the penalty acts: "
        f"{marks.listed(found, '{:.1f}%')}.",
        "final test accuracy (%) by when it acts",
        claim="C5b",
    )
