"""Neural mechanics: symmetries of the loss, the laws they give, and how real training breaks them.

Every symmetry of a network's loss ties all gradients and gives a quantity that gradient flow conserves; weight decay,
finite steps and momentum break it in ways that can be predicted exactly (Kunin et al., ICLR 2021).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlcollage.papers.neural_mechanics.callbacks import lightning_callback, transformers_callback
    from mlcollage.papers.neural_mechanics.checks import check_gradient, check_hessian
    from mlcollage.papers.neural_mechanics.closed_form import Oscillator, oscillator, predict
    from mlcollage.papers.neural_mechanics.find import find_symmetries
    from mlcollage.papers.neural_mechanics.flow import FlowPath, ModifiedSGDFlow
    from mlcollage.papers.neural_mechanics.ledger import effective_lr, equilibrium, sgd_ledger
    from mlcollage.papers.neural_mechanics.symmetry import Symmetry, SymmetrySet, Term
    from mlcollage.papers.neural_mechanics.tracker import ConservationTracker

__all__ = [
    "ConservationTracker",
    "FlowPath",
    "ModifiedSGDFlow",
    "Oscillator",
    "Symmetry",
    "SymmetrySet",
    "Term",
    "check_gradient",
    "check_hessian",
    "effective_lr",
    "equilibrium",
    "find_symmetries",
    "lightning_callback",
    "oscillator",
    "predict",
    "sgd_ledger",
    "transformers_callback",
]

_HOME = {
    "ConservationTracker": "tracker",
    "FlowPath": "flow",
    "ModifiedSGDFlow": "flow",
    "Oscillator": "closed_form",
    "Symmetry": "symmetry",
    "SymmetrySet": "symmetry",
    "Term": "symmetry",
    "check_gradient": "checks",
    "check_hessian": "checks",
    "effective_lr": "ledger",
    "equilibrium": "ledger",
    "find_symmetries": "find",
    "lightning_callback": "callbacks",
    "oscillator": "closed_form",
    "predict": "closed_form",
    "sgd_ledger": "ledger",
    "transformers_callback": "callbacks",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that reading the paper's metadata does not import torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
