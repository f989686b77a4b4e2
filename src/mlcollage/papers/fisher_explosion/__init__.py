"""Catastrophic Fisher explosion: the trace of the Fisher information early in training, and a penalty on it.

Training with a small learning rate lets Tr(F) grow early, and such networks generalize worse; penalizing it early
closes much of that gap (Jastrzębski, Arpit, Åstrand, Kerg, Wang, Xiong, Socher, Cho, Geras, ICML 2021).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlcollage.papers.fisher_explosion.callbacks import (
        lightning_penalty,
        lightning_tracker,
        transformers_tracker,
        transformers_trainer,
    )
    from mlcollage.papers.fisher_explosion.penalty import FisherPenalty
    from mlcollage.papers.fisher_explosion.tracker import Alarm, FisherTraceTracker

__all__ = [
    "Alarm",
    "FisherPenalty",
    "FisherTraceTracker",
    "lightning_penalty",
    "lightning_tracker",
    "transformers_tracker",
    "transformers_trainer",
]

_HOME = {
    "FisherPenalty": "penalty",
    "Alarm": "tracker",
    "FisherTraceTracker": "tracker",
    "lightning_penalty": "callbacks",
    "lightning_tracker": "callbacks",
    "transformers_tracker": "callbacks",
    "transformers_trainer": "callbacks",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that reading the paper's metadata does not import torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
