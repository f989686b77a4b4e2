"""What comes with the package: the official files, and the tensor that this project measured."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from .official import OfficialPortfolio, OfficialSelectorData, read_official_portfolio, read_official_selector
from .policy import Policy
from .selector import PolicySelector
from .space import Config
from .tensor import PerformanceTensor


def official_folder() -> Path:
    """The folder with eight portfolios and the selector's data of auto-sklearn (BSD-3-Clause, see its README)."""
    return Path(__file__).parent / "official_data"


@cache
def official_portfolio(policy: Policy) -> OfficialPortfolio:
    """The official portfolio of 32 pipelines for a policy: that with the same evaluation, or the nearest folds."""
    name = "SH-eta4-i" if policy.allocation == "sh" else "None"
    folds = min((3, 5, 10), key=lambda k: abs(k - policy.folds))
    how = "holdout" if policy.evaluation == "holdout" else f"{folds}CV"
    return read_official_portfolio(official_folder() / f"RF_{name}_{how}_iterative_es_if.json")


@cache
def official_selector_data() -> OfficialSelectorData:
    """Losses of the eight policies on 208 OpenML tasks."""
    return read_official_selector(official_folder() / "selector_training_data_balanced_accuracy.json")


@cache
def shipped_tensor() -> PerformanceTensor:
    """The tensor that this project measured, with hold-out; only tasks for which every candidate was measured.

    Made by ``python -m mlcollage.papers.autosklearn2.measuring``; the paper's page says on what.

    Examples
    --------
    >>> tensor = shipped_tensor()
    >>> tensor.shape[1], tensor.measured
    (120, 1.0)
    """
    return PerformanceTensor.load(Path(__file__).parent / "tensor.parquet").complete()


@cache
def default_portfolio(policy: Policy) -> tuple[Config, ...]:
    """The portfolio of 32 pipelines that was learned from :func:`shipped_tensor`, for a policy's allocation.

    It is what ``PortfolioBuilder(32, Policy(allocation=policy.allocation)).fit(shipped_tensor()).configs_`` gives, read
    from a file.
    """
    found = json.loads((Path(__file__).parent / "portfolios.json").read_text("utf-8"))
    return tuple(found[policy.allocation])


@cache
def official_selector(trees: int = 25) -> PolicySelector:
    """The selector with the official settings, fitted on the official data; fewer trees than there, for speed."""
    return PolicySelector.of_official(official_selector_data(), n_estimators=trees)
