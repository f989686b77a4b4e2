"""Panels whose runs are not there say so; the others are drawn."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes

from mlcollage.collage import theme
from mlcollage.collage.content import Panel
from mlcollage.lab.evidence import Evidence


def measured_panel(title: str, draw: Callable[[Evidence], Panel], evidence: Evidence) -> Panel:
    """What ``draw`` makes of the evidence, or a panel that says why there is nothing to see.

    Parameters
    ----------
    title
        What the panel is about; printed if it cannot be drawn.
    draw
        Raises ``LookupError`` (which :class:`~mlcollage.errors.UnknownName` is) if what it needs was not measured; or
        ``StopIteration``, as ``next`` does where there is no run or curve.
    evidence
        What was measured.
    """
    try:
        return draw(evidence)
    except (LookupError, StopIteration):
        if not (evidence.waiting or evidence.failures or evidence.workload != "default"):
            raise  # everything was run, so the panel asks for something that no experiment records
    if evidence.waiting:
        every = len(evidence.runs) + len(evidence.failures) + evidence.missing
        why, more = "not measured yet", f"{evidence.missing} of {every} runs are missing"
    elif evidence.failures:
        why, more = "not measured", f"{len(evidence.failures)} runs failed"
    else:
        why, more = "not measured", "not part of this workload"

    def say(ax: Axes) -> None:
        ax.set_axis_off()
        words = f"{theme.STATUS_MARKS['pending']} {why}"
        ax.text(0.5, 0.5, words, ha="center", va="center", color=theme.MUTED, transform=ax.transAxes)

    return Panel(f"{title}: {why}", say, f"{title}: {why}; {more}", subtitle=more)
