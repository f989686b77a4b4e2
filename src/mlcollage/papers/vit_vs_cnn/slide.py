"""How the evidence on vision transformers and residual networks is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

VIT, CNN = theme.PALETTE["blue"], theme.PALETTE["vermillion"]
MAP = theme.sequential(theme.PALETTE["green"])  # CKA, from 0 to 1, on the whole slide
NAMES = {"vit": "ViT", "cnn": "ResNet", "vit untrained": "ViT, untrained", "cnn untrained": "ResNet, untrained"}
COLORS = {"vit": VIT, "cnn": CNN, "vit untrained": VIT, "cnn untrained": CNN}


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """The maps, of the network that was cut too; the control before training; what skips carry."""
    own = evidence.workload == "default"
    return Collage(
        "which layers of two networks are alike",
        _idea(),
        measured_panel("Every layer with every layer", _maps, evidence),
        [
            measured_panel("Training or architecture?", _control, evidence),
            measured_panel("What skips carry", _skips, evidence),
        ],
        data="Fashion-MNIST" if own else "the workload",
        network="small ViT and ResNet, eight blocks each" if own else "the workload's networks",
    )


def _idea() -> Panel:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(6, 2))
    grams = [hidden @ hidden.T + 0.5 * (g + g.T) for g in rng.normal(size=(2, 6, 6))]

    def draw(ax: Axes) -> None:
        d = Diagram(ax, 374, 372)
        d.note(187, 16, "n examples")
        for x, name, color, kernel in ((82, "a layer", VIT, "K = XX^\\top"), (292, "another", CNN, "L = YY^\\top")):
            d.stack(x, 62, 56, 46, 4, color=color)
            d.note(x, 112, name, color=color, weight="semibold")
            d.arrow((x, 124), (x, 142))
            d.tensor(x, 190, np.clip(grams[0] if x < 187 else grams[1], -3, 3), cell=14, color=color)
            d.note(x, 246, f"${kernel}$", color=theme.INK)
        d.note(187, 178, "who is")
        d.note(187, 200, "like whom")
        d.field(187, 318, 374, 104)
        equation = r"\mathrm{CKA} = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\;\mathrm{HSIC}(L, L)}}"
        d.equation(187, 304, equation, size=18)
        d.note(187, 352, "1: alike, 0: unrelated")

    return Panel(
        "The idea",
        draw,
        "Two layers, seen on the same examples. Each gives a matrix of similarities between the examples; centered "
        "kernel alignment (CKA) compares the two matrices.",
        "Two layers are alike if they find the same examples alike.",
    )


def _first(evidence: Evidence, name: str) -> npt.NDArray[Any]:
    runs = evidence.find_runs(seed=0)
    if not runs:
        raise LookupError("the run of seed 0 is missing")
    return evidence.array(runs[0].id, name)


def _maps(evidence: Evidence) -> Panel:
    maps = {name: _first(evidence, f"map_{name}") for name in ("vit", "cnn")}
    uniform = {name: evidence.by_seed("uniformity", arm=name) for name in maps}
    try:  # on a user's data there is no such network
        cut = _first(evidence, "map_cut")
        across = {"with": evidence.by_seed("across", arm="vit"), "without": evidence.by_seed("across", arm="cut")}
        fell = f" CKA across a block in the middle: {marks.listed(across)} its skips."
    except LookupError:
        cut, fell = None, ""

    def draw(part: SubFigure) -> None:
        count = 2 if cut is None else 3
        axes = part.subplots(1, count + 1, width_ratios=[*[1.0] * count, 0.06])
        for ax, (name, m) in zip(axes, maps.items(), strict=False):
            ax.imshow(m, origin="lower", cmap=MAP, vmin=0, vmax=1)
            n, quarter = len(m), len(m) // 4
            # what uniformity is the mean of: the first quarter of layers with the last
            box = np.array([(n - quarter, 0), (n, 0), (n, quarter), (n - quarter, quarter), (n - quarter, 0)]) - 0.5
            ax.plot(*box.T, color=theme.INK, linewidth=2.2, clip_on=False)
            _name_ends(ax, n)
            title = f"{NAMES[name]}: {uniform[name].mean():.2f}"
            ax.set_title(title, color=theme.ink(COLORS[name]), weight="semibold")
        if cut is not None:
            axes[2].imshow(cut, origin="lower", cmap=MAP, vmin=0, vmax=1)
            axes[2].set_title("ViT, skips cut", color=theme.ink(VIT), weight="semibold")
            _name_ends(axes[2], len(cut))
        marks.color_scale(axes[count], MAP, (0.0, 1.0), "{:g}")

    return Panel(
        "Every layer with every layer",
        draw,
        "CKA of all pairs of layers, for one seed. Mean of the first with the last quarter of layers: "
        f"{marks.listed({NAMES[k]: v for k, v in uniform.items()})}.{fell}",
        "CKA of all pairs of layers, one seed; numbers: mean in the box, all seeds",
        claim="C1",
        own_axes=True,
    )


def _name_ends(ax: Axes, layers: int) -> None:
    """Say where the first and the last layers are, and nothing else."""
    ax.set_xticks([0, layers - 1], ["first", "last"])
    first, last = ax.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    ax.set_yticks([])
    ax.set_xlabel("layer")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _control(evidence: Evidence) -> Panel:
    found = {NAMES[k]: evidence.by_seed("uniformity", arm=k) for k in ("vit untrained", "vit", "cnn untrained", "cnn")}
    colors = {NAMES[k]: COLORS[k] for k in COLORS}

    def draw(ax: Axes) -> None:
        marks.rows(ax, found, colors)

    return Panel(
        "Training or architecture?",
        draw,
        f"Uniformity, the mean CKA of the first and the last quarter of layers: {marks.listed(found)}.",
        "CKA of first and last quarter of layers",
        claim="C1b",
    )


def _skips(evidence: Evidence) -> Panel:
    courses = {name: evidence.across_seeds("skip", arm=name) for name in ("vit", "cnn")}

    def draw(ax: Axes) -> None:
        for name, table in courses.items():
            # both from the first to the last sum: the ViT has two in each block
            depth = (np.arange(len(table)) + 0.5) / len(table)
            marks.course(ax, table.set_axis(depth, axis=0), COLORS[name], NAMES[name], dots=True, bounds=(1e-3, np.inf))
        ax.set_yscale("log")
        ax.set_yticks([1, 10], ["1", "10"])
        ax.minorticks_off()
        theme.tidy(ax, grid="y")
        ax.set_xlabel("depth of the residual sum, first to last")

    return Panel(
        "What skips carry",
        draw,
        "Norm of the skip over norm of the branch, from the first to the last residual sum: "
        f"{marks.from_to({NAMES[k]: v for k, v in courses.items()}, '{:.1f}')}.",
        "norm of skip ÷ norm of branch, median",
        claim="C7",
    )
