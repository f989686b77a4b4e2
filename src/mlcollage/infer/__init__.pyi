from . import hmc as hmc
from . import nuts as nuts
from . import vi as vi
from .adaptation import DualAveraging as DualAveraging
from .adaptation import RunningVariance as RunningVariance
from .adaptation import mass_windows as mass_windows
from .chains import Chains as Chains
from .chains import Info as Info
from .density import LogDensity as LogDensity
from .density import State as State
from .diagnostics import Streaming as Streaming
from .diagnostics import bfmi as bfmi
from .diagnostics import ess as ess
from .diagnostics import rhat as rhat
from .ensemble import Ensemble as Ensemble
from .ensemble import RunningMixture as RunningMixture
from .ensemble import mix_gaussians as mix_gaussians
from .ensemble import mix_logits as mix_logits
from .export import to_arviz as to_arviz
from .health import Health as Health
from .health import Unhealthy as Unhealthy
from .sghmc import SGHMC as SGHMC
from .sghmc import Cyclical as Cyclical
from .sgld import SGLD as SGLD
from .swag import SWAG as SWAG
from .validation import GewekeResult as GewekeResult
from .validation import geweke as geweke
from .validation import sbc as sbc
from .vi import MeanField as MeanField

__all__ = [
    "SGHMC",
    "SGLD",
    "SWAG",
    "Chains",
    "Cyclical",
    "DualAveraging",
    "Ensemble",
    "GewekeResult",
    "Health",
    "Info",
    "LogDensity",
    "MeanField",
    "RunningMixture",
    "RunningVariance",
    "State",
    "Streaming",
    "Unhealthy",
    "bfmi",
    "ess",
    "geweke",
    "hmc",
    "mass_windows",
    "mix_gaussians",
    "mix_logits",
    "nuts",
    "rhat",
    "sbc",
    "to_arviz",
    "vi",
]
