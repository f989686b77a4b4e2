"""Gated Linear Networks (Veness et al., AAAI 2021): online learning without back-propagation.

=====================  =============================================================================================
:class:`GLNClassifier`  scikit-learn classifier: one pass, one sample at a time, one network a class
:class:`GLNRegressor`   scikit-learn regressor: the Gaussian network, with predictive standard deviations
:class:`GLNDensity`     density of binary vectors by the chain rule, with exact log-likelihoods
:class:`GLNBandit`      contextual bandit whose exploration comes from context counts
:class:`GLN`            ``torch.nn.Module`` with ``update()``: a head for a frozen backbone
:class:`RiverGLN`       river classifier: samples as dicts, new features and classes at any time
:class:`GatedNetwork`   the network itself, on arrays
=====================  =============================================================================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bandit import GLNBandit
    from .classifier import GLNClassifier
    from .density import GLNDensity
    from .module import GLN
    from .network import GatedNetwork
    from .regressor import GLNRegressor
    from .river import RiverGLN

__all__ = ["GLN", "GLNBandit", "GLNClassifier", "GLNDensity", "GLNRegressor", "GatedNetwork", "RiverGLN"]

_HOME = {
    "GLN": "module",
    "GLNBandit": "bandit",
    "GLNClassifier": "classifier",
    "GLNDensity": "density",
    "GLNRegressor": "regressor",
    "GatedNetwork": "network",
    "RiverGLN": "river",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
