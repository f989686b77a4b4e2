from .callbacks import HuggingFaceConservation as HuggingFaceConservation
from .callbacks import LightningConservation as LightningConservation
from .checks import check_gradient as check_gradient
from .checks import check_hessian as check_hessian
from .closed_form import Oscillator as Oscillator
from .closed_form import SGDSettings as SGDSettings
from .closed_form import oscillator as oscillator
from .closed_form import predict as predict
from .find import find_symmetries as find_symmetries
from .flow import FlowPath as FlowPath
from .flow import ModifiedSGDFlow as ModifiedSGDFlow
from .ledger import effective_lr as effective_lr
from .ledger import equilibrium as equilibrium
from .ledger import sgd_ledger as sgd_ledger
from .symmetry import Symmetry as Symmetry
from .symmetry import SymmetrySet as SymmetrySet
from .term import Term as Term
from .tracker import ConservationTracker as ConservationTracker

__all__ = [
    "ConservationTracker",
    "FlowPath",
    "HuggingFaceConservation",
    "LightningConservation",
    "ModifiedSGDFlow",
    "Oscillator",
    "SGDSettings",
    "Symmetry",
    "SymmetrySet",
    "Term",
    "check_gradient",
    "check_hessian",
    "effective_lr",
    "equilibrium",
    "find_symmetries",
    "oscillator",
    "predict",
    "sgd_ledger",
]
