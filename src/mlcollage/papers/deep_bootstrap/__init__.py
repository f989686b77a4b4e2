"""The Deep Bootstrap framework: the same training run in the Real and in the Ideal World.

The Real World trains on a fixed set of n samples for many epochs, the Ideal World takes the same steps on fresh
samples; the difference of their test errors is the bootstrap error (Nakkiran, Neyshabur, Sedghi, ICLR 2021).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlcollage.papers.deep_bootstrap.callback import BootstrapCallback, lightning_callback, transformers_callback
    from mlcollage.papers.deep_bootstrap.framework import DeepBootstrap
    from mlcollage.papers.deep_bootstrap.metrics import bootstrap_error, error, soft_error
    from mlcollage.papers.deep_bootstrap.result import BootstrapResult
    from mlcollage.papers.deep_bootstrap.worlds import FiniteAsIdeal, NpzParts, cifar5m

__all__ = [
    "BootstrapCallback",
    "BootstrapResult",
    "DeepBootstrap",
    "FiniteAsIdeal",
    "NpzParts",
    "bootstrap_error",
    "cifar5m",
    "error",
    "lightning_callback",
    "soft_error",
    "transformers_callback",
]

_HOME = {
    "BootstrapCallback": "callback",
    "lightning_callback": "callback",
    "transformers_callback": "callback",
    "DeepBootstrap": "framework",
    "BootstrapResult": "result",
    "bootstrap_error": "metrics",
    "error": "metrics",
    "soft_error": "metrics",
    "FiniteAsIdeal": "worlds",
    "NpzParts": "worlds",
    "cifar5m": "worlds",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that reading the paper's metadata does not import torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
