"""What comes with the package: the official files, and the tensor that this project measured."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from .official import OfficialPortfolio, OfficialSelectorData, read_official_portfolio, read_official_selector
from .policy import Policy


def official_folder() -> Path:
    """The folder with eight portfolios and the selector's data of auto-sklearn (BSD-3-Clause, see its README)."""
    return Path(__file__).parent / "official_data"


@cache
def official_portfolio(policy: Policy) -> OfficialPortfolio:
    """The official portfolio of 32 pipelines for a policy."""
    name = "SH-eta4-i" if policy.allocation == "sh" else "None"
    how = "holdout" if policy.evaluation == "holdout" else f"{policy.folds}CV"
    return read_official_portfolio(official_folder() / f"RF_{name}_{how}_iterative_es_if.json")


@cache
def official_selector_data() -> OfficialSelectorData:
    """Losses of the eight policies on 208 OpenML tasks."""
    return read_official_selector(official_folder() / "selector_training_data_balanced_accuracy.json")
