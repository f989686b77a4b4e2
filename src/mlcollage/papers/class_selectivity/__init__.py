"""Class selectivity of units: an index, a knob that turns it up or down in training, and tests of what it does.

The regularizer adds -alpha times the mean selectivity index to the loss (Leavitt and Morcos, "Selectivity considered
harmful", ICLR 2021): negative alpha discourages, positive alpha promotes class selectivity.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlcollage.papers.class_selectivity.ablation import ablate_units
    from mlcollage.papers.class_selectivity.callbacks import lightning_callback, transformers_callback
    from mlcollage.papers.class_selectivity.controller import SelectivityController, alpha_schedule
    from mlcollage.papers.class_selectivity.distance import cca_distance_ratio, distance_ratio, representations
    from mlcollage.papers.class_selectivity.index import SelectivityReport, measure_selectivity, selectivity_index
    from mlcollage.papers.class_selectivity.off_axis import OffAxisResult, class_variance_ratios, off_axis_upper_bound
    from mlcollage.papers.class_selectivity.regularizer import SelectivityRegularizer

__all__ = [
    "OffAxisResult",
    "SelectivityController",
    "SelectivityRegularizer",
    "SelectivityReport",
    "ablate_units",
    "alpha_schedule",
    "cca_distance_ratio",
    "class_variance_ratios",
    "distance_ratio",
    "lightning_callback",
    "measure_selectivity",
    "off_axis_upper_bound",
    "representations",
    "selectivity_index",
    "transformers_callback",
]

_HOME = {
    "ablate_units": "ablation",
    "lightning_callback": "callbacks",
    "transformers_callback": "callbacks",
    "SelectivityController": "controller",
    "alpha_schedule": "controller",
    "cca_distance_ratio": "distance",
    "distance_ratio": "distance",
    "representations": "distance",
    "SelectivityReport": "index",
    "measure_selectivity": "index",
    "selectivity_index": "index",
    "OffAxisResult": "off_axis",
    "class_variance_ratios": "off_axis",
    "off_axis_upper_bound": "off_axis",
    "SelectivityRegularizer": "regularizer",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that reading the paper's metadata does not import torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
