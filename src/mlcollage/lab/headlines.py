"""Titles of panels that say what was found only where it was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mlcollage.collage.content import Panel
from mlcollage.lab.claim import Status, Verdict


def with_headlines(
    panels: Sequence[Panel], verdicts: Mapping[str, Verdict], messages: Mapping[str, tuple[str, str]]
) -> list[Panel]:
    """Panels whose plain titles give way to a message where the message's claim is supported.

    Parameters
    ----------
    panels
        With titles that promise nothing.
    verdicts
        By claim id.
    messages
        From a plain title to the id of a claim and the title that a reader sees if it is supported.
    """
    supported = {claim for claim, verdict in verdicts.items() if verdict.status is Status.SUPPORTED}
    return [
        replace(panel, title=message) if claim in supported else panel
        for panel in panels
        for claim, message in [messages.get(panel.title, ("", panel.title))]
    ]
