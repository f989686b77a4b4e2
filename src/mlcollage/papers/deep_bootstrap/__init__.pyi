from .callbacks import HuggingFaceBootstrap as HuggingFaceBootstrap
from .callbacks import LightningBootstrap as LightningBootstrap
from .framework import DeepBootstrap as DeepBootstrap
from .metrics import bootstrap_error as bootstrap_error
from .metrics import error as error
from .metrics import soft_error as soft_error
from .npz_parts import NpzParts as NpzParts
from .result import BootstrapResult as BootstrapResult
from .twin import IdealTwin as IdealTwin
from .worlds import FiniteAsIdeal as FiniteAsIdeal
from .worlds import cifar5m as cifar5m

__all__ = [
    "BootstrapResult",
    "DeepBootstrap",
    "FiniteAsIdeal",
    "HuggingFaceBootstrap",
    "IdealTwin",
    "LightningBootstrap",
    "NpzParts",
    "bootstrap_error",
    "cifar5m",
    "error",
    "soft_error",
]
