"""How the evidence on Barlow Twins is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

# One color for an arm, on the whole slide.
TWINS, RIVAL, CHANGED, ASYMMETRIC = (theme.PALETTE[c] for c in ("blue", "vermillion", "orange", "green"))
UNTRAINED = theme.GRAYS[0]
VARIANTS = {  # as the paper's tables have them, best first
    "Barlow Twins": ("barlow", TWINS),
    "no batch norm": ("plain_projector", CHANGED),
    "stop-gradient": ("stop_gradient", ASYMMETRIC),
    "predictor": ("predictor", ASYMMETRIC),
    "both of these": ("predictor_and_stop", ASYMMETRIC),
    "rows standardized": ("feature", CHANGED),
    "no normalization": ("neither", CHANGED),
    "no redundancy term": ("invariance", CHANGED),
    "untrained": ("random", UNTRAINED),
    "no invariance term": ("redundancy", CHANGED),
}


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """What each part of the loss is worth; width and batch size beside a contrastive loss."""
    own = evidence.workload == "default"
    return Collage(
        "two views, one identity matrix",
        _idea(evidence),
        measured_panel("What each part is worth", _parts, evidence),
        [
            measured_panel("Width of the embedding", _widths, evidence),
            measured_panel("Size of the batch", _batches, evidence),
        ],
        data="views that share 8 of 24 latent numbers" if own else "the workload",
        network="MLP 64-256-64" if own else "the workload's network or the study's",
    )


def _quantity(evidence: Evidence) -> str:
    return "R² of a linear probe" if evidence.workload == "default" else "accuracy of a linear probe"


def _short(evidence: Evidence) -> str:
    return "R²" if evidence.workload == "default" else "accuracy"


def _matrices(evidence: Evidence) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], bool]:
    """C before and after training: measured, or an example."""
    runs = evidence.find_runs(arm="barlow")
    try:
        found = [evidence.array(runs[0].id, f"correlation_{when}") for when in ("before", "after")] if runs else []
    except LookupError:
        found = []
    if len(found) == 2:
        return found[0], found[1], True
    noise = np.random.default_rng(0).normal(size=(2, 32, 32))
    return 0.5 * np.tanh(noise[0] + 0.4), np.clip(np.eye(32) + 0.06 * noise[1], -1, 1), False


def _idea(evidence: Evidence) -> Panel:
    """Two views through one network; their cross-correlation at the start, after training, and its goal."""
    before, after, measured = _matrices(evidence)

    def draw(ax: Axes) -> None:
        d = Diagram(ax, 374, 372)
        x = d.circle(26, 66, 21, "$x$", color=theme.GRAYS[2])
        for y, name in ((28, "A"), (104, "B")):
            view = d.box(124, y, 84, 44, f"view {name}", color=theme.GRAYS[2])
            net = d.box(236, y, 64, 44, "$f$", color=TWINS)
            z = d.box(334, y, 56, 44, f"$z^{name}$", color=TWINS, filled=True)
            d.arrow(x, view)
            d.arrow(view, net)
            d.arrow(net, z)
        d.note(236, 66, "the same network", color=theme.MUTED)
        looks = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1, "interpolation": "nearest"}
        goal = np.eye(len(before))
        for at, matrix, name in ((56, before, "C at the start"), (187, after, "C trained"), (318, goal, "goal")):
            d.image(at, 206, 104, 104, matrix, **looks)
            d.note(at, 274, name)
        d.arrow((112, 206), (131, 206))
        d.arrow((243, 206), (262, 206))
        d.field(187, 330, 374, 76)
        equation = r"L = \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \neq j} C_{ij}^2"
        d.equation(187, 330, equation, size=21)

    return Panel(
        "The idea",
        draw,
        "Two views of a sample pass through one network. C holds the correlations of the columns of the two "
        "embeddings: many at the start, near the identity matrix after training.",
        "Columns of two views' embeddings are correlated: each with itself, none with another. "
        + ("C: measured, seed 0." if measured else "C: an example."),
    )


def _parts(evidence: Evidence) -> Panel:
    found = {name: evidence.by_seed("score", arm=arm) for name, (arm, _) in VARIANTS.items()}

    def draw(ax: Axes) -> None:
        marks.rows(ax, found, {name: color for name, (_, color) in VARIANTS.items()})
        ax.axvline(float(found["Barlow Twins"].mean()), color=theme.tint(TWINS, 0.5), linewidth=1.6, zorder=1)
        ax.set_xlabel(_quantity(evidence))

    return Panel(
        "What each part is worth",
        draw,
        f"{_quantity(evidence).capitalize()}: {marks.listed(found)}."[:300],
        f"{_quantity(evidence)} on the frozen representation; mean and 95% interval, pale dots are seeds",
        claim="C1",
    )


def _curves(ax: Axes, evidence: Evidence, over: str) -> None:
    for arm, color, name in (("barlow", TWINS, "Barlow Twins"), ("infonce", RIVAL, "InfoNCE")):
        marks.course(ax, evidence.across_seeds("score", over=over, arm=f"{arm}_{over}"), color, name, dots=True)
    levels = sorted(evidence.select("score", arm=f"barlow_{over}")[over].unique().tolist())
    marks.log_steps(ax, levels)
    theme.tidy(ax, grid="y", ticks=4)


def _listed(evidence: Evidence, over: str) -> str:
    parts = {
        name: evidence.across_seeds("score", over=over, arm=f"{arm}_{over}")
        for name, arm in (("Barlow Twins", "barlow"), ("InfoNCE", "infonce"))
    }
    return "; ".join(f"{n} " + ", ".join(f"{k:g}: {v:.2f}" for k, v in t["mean"].items()) for n, t in parts.items())


def _widths(evidence: Evidence) -> Panel:
    text = _listed(evidence, "width")
    return Panel(
        "Width of the embedding",
        lambda ax: _curves(ax, evidence, "width"),
        f"{_quantity(evidence).capitalize()} by width of the embedding: {text}."[:300],
        f"{_short(evidence)} by columns of the embedding",
        claim="C4",
    )


def _batches(evidence: Evidence) -> Panel:
    text = _listed(evidence, "batch")
    return Panel(
        "Size of the batch",
        lambda ax: _curves(ax, evidence, "batch"),
        f"{_quantity(evidence).capitalize()} by rows of a batch, equally many samples: {text}."[:300],
        f"{_short(evidence)} by rows of a batch",
        claim="C3",
    )
