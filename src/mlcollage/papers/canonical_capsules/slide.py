"""How the evidence on Canonical Capsules is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

OURS, PLAIN = (theme.PALETTE[c] for c in ("blue", "green"))
# Capsules are told apart by their place; these colors have no meaning elsewhere on the slide.
CAPSULES = (
    "#4477AA",
    "#EE6677",
    "#228833",
    "#CCBB44",
    "#66CCEE",
    "#AA3377",
    "#997700",
    "#555555",
    "#EE99AA",
    "#225555",
)
_ROW = 4  # shapes that are drawn
Array = npt.NDArray[np.float64]


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """Shapes as they came and in canonical pose; errors of the pose, and what it is worth for reconstruction."""
    own = evidence.workload == "default"
    return Collage(
        "what a thing is, apart from where it is",
        _idea(evidence),
        measured_panel("Shapes in any pose, and in one", _shapes, evidence),
        [
            measured_panel("Angle between two views", _angles, evidence),
            measured_panel("Error of reconstruction", _reconstruction, evidence),
        ],
        data="procedural planes, turned" if own else "the workload's clouds in random poses",
        network="8 capsules of 32 channels" if own else "the study's network",
    )


def _at_the_end(evidence: Evidence, metric: str, arm: str) -> Array:
    """One value a seed, of its last step."""
    rows = evidence.select(metric, arm=arm).sort_values("step").groupby("seed").tail(1)
    return rows.set_index("seed")["value"].sort_index().to_numpy(dtype=float)


def _arrays(evidence: Evidence, arm: str, *names: str) -> list[Array]:
    """Arrays of the first run of an arm."""
    run = next(iter(evidence.find_runs(arm=arm)))
    return [evidence.array(run.id, name) for name in names]


def _draw(ax: Axes, points: Array, capsule: Array, at: tuple[float, float], size: float, dot: float) -> None:
    """A cloud in the plane, colored by capsule, with equal scales."""
    x = points[:, [0, 1]] if points.shape[1] == 2 else _projected(points)
    colors = [CAPSULES[int(k) % len(CAPSULES)] for k in capsule]
    ax.scatter(at[0] + size * x[:, 0], at[1] + size * x[:, 1], c=colors, s=dot, linewidths=0, zorder=3)


def _projected(points: Array) -> Array:
    """Three dimensions seen from a corner."""
    a, b = np.radians(35), np.radians(25)
    side = np.array([np.cos(a), np.sin(a), 0])
    up = np.array([-np.sin(a) * np.sin(b), np.cos(a) * np.sin(b), np.cos(b)])
    return np.stack([points @ side, points @ up], 1)


def _idea(evidence: Evidence) -> Panel:
    """A cloud in two poses; its capsules, whose places move and whose descriptors do not; the canonical pose."""
    try:
        moved, canonical, capsule, theta = _arrays(evidence, "pose", "moved", "canonical", "capsule", "theta")
        measured = True
    except (LookupError, StopIteration):
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        ring = np.stack([0.9 * np.cos(angle), 0.4 * np.sin(angle) + 0.2 * np.cos(2 * angle)], 1)
        turn = np.array([[0.5, -0.87], [0.87, 0.5]])
        canonical, moved, capsule = ring[None], (ring @ turn.T)[None], (np.arange(48.0) // 8)[None]
        theta, measured = ring.reshape(6, 8, 2).mean(1)[None], False

    def draw(ax: Axes) -> None:
        d = Diagram(ax, 374, 372)
        ax.autoscale(False)  # points are drawn in the diagram's own units
        d.note(70, 22, "a cloud in any pose")
        d.note(304, 22, "in canonical pose")
        d.arrow((136, 105), (236, 105))
        d.note(187, 82, r"$\bar R,\ \bar t$")
        for points, x in ((moved[0], 70), (canonical[0], 304)):
            flat = points if points.shape[1] == 2 else _projected(points)
            # The diagram's y axis points down.
            _draw(ax, flat * np.array([1.0, -1.0]), capsule[0], (x, 105), 62, 12)
        marks_at = theta[0] if theta.shape[2] == 2 else _projected(theta[0])
        ax.scatter(
            304 + 62 * marks_at[:, 0], 105 - 62 * marks_at[:, 1], s=46, c="white", edgecolors=theme.INK, zorder=4
        )
        d.note(187, 196, "places turn, descriptors do not")
        for y, text in (
            (244, r"$\theta_k = \sum_n \hat A_{nk} P_n \qquad \beta_k = \sum_n \hat A_{nk} F_n$"),
            (322, r"$\min_{\bar R,\,\bar t}\ \sum_k \|\bar R\,\theta_k + \bar t - \bar\theta_k(\beta)\|^2$"),
        ):
            d.field(187, y, 374, 64)
            d.equation(187, y, text.strip("$"), size=17)

    return Panel(
        "The idea",
        draw,
        "Attention splits a cloud into capsules, here by color. Places of the capsules turn with the cloud, "
        "descriptors do not; descriptors say where the places belong, and the best rigid motion takes the cloud there.",
        "Capsules by color; rings are their places. " + ("Measured, seed 0." if measured else "An example."),
    )


def _shapes(evidence: Evidence) -> Panel:
    moved, canonical, capsule = _arrays(evidence, "pose", "moved", "canonical", "capsule")
    angle = _at_the_end(evidence, "angle", "pose").mean()

    def draw(ax: Axes) -> None:
        for i in range(_ROW):
            _draw(ax, moved[i], capsule[i], (2.3 * i, 2.4), 1, 22)
            _draw(ax, canonical[i], capsule[i], (2.3 * i, 0.0), 1, 22)
        ax.set_aspect("equal")
        ax.set_xlim(-1.6, 2.3 * (_ROW - 1) + 1.2)
        ax.set_ylim(-1.2, 3.6)
        ax.set_axis_off()
        for y, text in ((2.4, "as they\ncame"), (0.0, "brought\nto one\npose")):
            ax.text(-1.15, y, text, ha="right", va="center", color=theme.MUTED)

    return Panel(
        "Shapes in any pose, and in one",
        draw,
        f"{_ROW} unseen shapes in random poses, and the same in canonical pose, where they look alike; colors "
        f"are capsules. Two views of a shape end {angle:.1f} degrees apart (median, mean of seeds).",
        "unseen shapes, colored by capsule; equal scales on both axes; no labels, no aligned training data",
        claim="C2",
    )


def _curve(ax: Axes, values: Array, color: str, name: str, high: float, y: float) -> None:
    x = np.sort(values.ravel())
    ax.plot(np.clip(x, None, high), np.arange(1, len(x) + 1) / len(x), color=color)
    ax.text(high * 0.98, y, name, color=color, ha="right", va="center")


def _pooled(evidence: Evidence, arm: str, name: str) -> Array:
    found = [evidence.array(run.id, name) for run in evidence.find_runs(arm=arm)]
    if not found:
        raise LookupError(f"no run of {arm}")
    return np.concatenate([a.ravel() for a in found])


def _angles(evidence: Evidence) -> Panel:
    ours = _pooled(evidence, "pose", "angles")
    space = None
    if evidence.find_runs(arm="spatial"):
        space = _pooled(evidence, "spatial", "angles")

    def draw(ax: Axes) -> None:
        _curve(ax, ours, OURS, "in the plane", 60, 0.52)
        if space is not None:
            x = np.sort(space)
            ax.plot(np.clip(x, None, 60), np.arange(1, len(x) + 1) / len(x), color=OURS, linestyle=marks.DASHED)
            ax.text(59, 0.16, "in space (dashed)", color=OURS, ha="right", va="center")
        ax.set_xlabel("degrees, up to 60")
        ax.set_ylim(0, 1)
        theme.tidy(ax, grid="y", ticks=4)

    text = f"in the plane {np.median(ours):.1f}"
    if space is not None:
        text += f", in space {np.median(space):.1f}"
    return Panel(
        "Angle between two views",
        draw,
        f"Share of unseen shapes by the angle between canonical poses of two views. Medians in degrees: {text}.",
        "share of unseen shapes, by degrees",
        claim="C2b" if space is not None else "C2",
    )


def _reconstruction(evidence: Evidence) -> Panel:
    found = {
        "with canonical pose": 1e3 * _at_the_end(evidence, "chamfer", "capsules"),
        "without": 1e3 * _at_the_end(evidence, "chamfer", "no_canonicalizer"),
    }

    def draw(ax: Axes) -> None:
        marks.rows(ax, found, {"with canonical pose": OURS, "without": PLAIN})
        ax.set_xlabel("Chamfer distance × 1,000")
        ax.set_xlim(left=0)

    return Panel(
        "Error of reconstruction",
        draw,
        f"Chamfer distance (both directions, squared) times 1,000: {marks.listed(found, '{:.1f}')}.",
        "Chamfer distance, both directions, squared",
        claim="C1",
    )
