"""How the evidence on Auto-Sklearn 2.0 is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from mlcollage.collage import Collage, Diagram, Panel, marks, theme
from mlcollage.lab import Evidence, Verdict
from mlcollage.lab.panels import measured_panel

# One color for an arm, on the whole slide.
PORTFOLIO, SEARCH, NEAREST, FAMILIES = (theme.PALETTE[c] for c in ("blue", "vermillion", "orange", "green"))
RANDOM = theme.GRAYS[0]
ARMS = {
    "portfolio": ("portfolio", PORTFOLIO),
    "other families": ("other_families", FAMILIES),
    "nearest tasks": ("nearest", NEAREST),
    "search": ("search", SEARCH),
    "random order": ("random", RANDOM),
}
TIMED = {
    "portfolio": ("portfolio_timed", PORTFOLIO),
    "random order": ("intermittent", RANDOM),
    "stopped fits lost": ("bare", theme.GRAYS[2]),
}


def collage(evidence: Evidence, verdicts: Mapping[str, Verdict]) -> Collage:
    """How fast a portfolio is on new tasks, what little time gives, and which policy the selector picks."""
    if evidence.workload != "default":
        return Collage(
            "a portfolio and a selector, hands free",
            _idea(),
            measured_panel("Real fits", _fits, evidence),
            [measured_panel("Ensemble", _members, evidence)],
            data="the workload",
            network="pipelines of scikit-learn",
        )
    return Collage(
        "a portfolio and a selector, hands free",
        _idea(),
        measured_panel("Loss after few pipelines", _courses, evidence),
        [
            measured_panel("With little time", _timed, evidence),
            measured_panel("Which policy", _policies, evidence),
        ],
        data="120 pipelines measured; the authors' 208 tasks",
        network="scikit-learn",
    )


def _idea() -> Panel:
    """Tasks by pipelines, the greedy picks, and the way of a new table."""
    rng = np.random.default_rng(2)
    losses = np.clip(rng.random((6, 9)) ** 0.7, 0, 1)
    picks = (2, 5, 7)
    for k, c in enumerate(picks):
        losses[2 * k : 2 * k + 2, c] = 0.06

    def draw(ax: Axes) -> None:
        d = Diagram(ax, 374, 372)
        d.note(96, 14, "losses on earlier tasks")
        d.image(96, 92, 180, 120, losses, cmap=theme.sequential(PORTFOLIO), vmin=0, vmax=1, interpolation="nearest")
        for c in picks:
            d.field(6 + 20 * c + 10, 92, 3, 126, color=SEARCH)
        d.note(96, 166, "pipelines; marked: picks", color=theme.MUTED)
        p = d.box(286, 70, 150, 46, "portfolio", color=PORTFOLIO, filled=True)
        d.arrow((188, 80), p)
        table = d.box(67, 214, 122, 46, "new table", color=theme.GRAYS[2])
        policy = d.box(188, 214, 82, 46, "policy", color=NEAREST)
        d.arrow(table, policy)
        search = d.box(307, 140, 116, 44, "search", color=SEARCH)
        ensemble = d.box(307, 214, 122, 46, "ensemble", color=FAMILIES)
        d.arrow(p, search)
        d.arrow(search, ensemble)
        d.arrow(policy, ensemble)
        d.note(54, 252, "rows, columns", color=theme.MUTED)
        d.field(187, 322, 374, 86)
        d.equation(187, 322, r"c^* = \arg\min_c \frac{1}{|D|} \sum_d L_d(P + [c])", size=20)

    return Panel(
        "The idea",
        draw,
        "From losses of many pipelines on earlier tasks a portfolio is picked greedily. On a new table a policy is "
        "chosen from its size; the portfolio is tried first, then a search goes on, and an ensemble is built.",
        "Pipelines that were good together on earlier tasks are tried first. The matrix is an example.",
    )


def _courses(evidence: Evidence) -> Panel:
    tables = {name: evidence.across_seeds("loss", over="evaluated", arm=arm) for name, (arm, _) in ARMS.items()}

    def draw(ax: Axes) -> None:
        for name, table in tables.items():
            marks.course(ax, 100 * table, ARMS[name][1], name, dots=True, interval=name in ("portfolio", "search"))
        marks.log_steps(ax, [1, 2, 4, 8, 16])
        ax.set_xlabel("pipelines evaluated")
        theme.tidy(ax, grid="y")

    said = "; ".join(
        f"{name} {100 * t['mean'].iloc[0]:.0f} to {100 * t['mean'].iloc[-1]:.0f}" for name, t in tables.items()
    )
    return Panel(
        "Loss after few pipelines",
        draw,
        f"Normalized loss on held-out tasks after 1 to 16 pipelines: {said}."[:300],
        "Loss on tasks held out, in % of the task's range; mean and 95% interval over groups of tasks",
        claim="C2",
    )


def _timed(evidence: Evidence) -> Panel:
    found = {name: 100 * evidence.by_seed("timed_loss", arm=arm) for name, (arm, _) in TIMED.items()}

    def draw(ax: Axes) -> None:
        marks.rows(ax, found, {name: color for name, (_, color) in TIMED.items()})

    return Panel(
        "With little time",
        draw,
        f"Loss in percent of the range within half a second of fits: {marks.listed(found, '{:.0f}')}."[:300],
        "Loss within half a second of fits, % of range",
        claim="C5b",
    )


def _policies(evidence: Evidence) -> Panel:
    arms = {"right one each time": ("oracle", FAMILIES), "selector": ("selected", PORTFOLIO)}
    arms["single best"] = ("single_best", RANDOM)
    found = {name: 100 * evidence.by_seed("policy_loss", arm=arm) for name, (arm, _) in arms.items()}

    def draw(ax: Axes) -> None:
        marks.rows(ax, found, {name: color for name, (_, color) in arms.items()})

    return Panel(
        "Which policy",
        draw,
        f"Loss of the picked policy on the authors' 208 tasks, percent of the range: {marks.listed(found, '{:.0f}')}."[
            :300
        ],
        "Loss of the policy on the authors' tasks, % of range",
        claim="C4",
    )


def _fits(evidence: Evidence) -> Panel:
    arms = {"portfolio, then search": ("both", PORTFOLIO), "portfolio only": ("portfolio_only", FAMILIES)}
    arms["search from scratch"] = ("scratch", SEARCH)
    found = {n: 100 * evidence.by_seed("balanced_error", arm=a, model="ensemble") for n, (a, _) in arms.items()}

    def draw(ax: Axes) -> None:
        marks.rows(ax, found, {name: color for name, (_, color) in arms.items()})
        ax.set_xlabel("balanced error, %")

    return Panel(
        "Real fits",
        draw,
        f"Balanced error in percent on the test rows: {marks.listed(found, '{:.1f}')}."[:300],
        "Balanced error on test rows, equally many pipelines; dots are seeds",
        claim="L1",
    )


def _members(evidence: Evidence) -> Panel:
    models = {"ensemble": ("ensemble", PORTFOLIO), "best pipeline": ("single", RANDOM)}
    found = {n: 100 * evidence.by_seed("balanced_error", arm="both", model=m) for n, (m, _) in models.items()}

    def draw(ax: Axes) -> None:
        marks.rows(ax, found, {name: color for name, (_, color) in models.items()})

    return Panel(
        "Ensemble",
        draw,
        f"Balanced error in percent of the ensemble and of its best pipeline: {marks.listed(found, '{:.1f}')}."[:300],
        "Balanced error on test rows, %",
        claim="C6",
    )
