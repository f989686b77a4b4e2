from .applier import LFAnalysis as LFAnalysis
from .applier import LFApplier as LFApplier
from .label_model import SequenceLabelModel as SequenceLabelModel
from .labeling import ABSTAIN as ABSTAIN
from .labeling import GridIntent as GridIntent
from .labeling import LabelingFunction as LabelingFunction
from .labeling import Stationary as Stationary
from .labeling import Threshold as Threshold
from .labeling import Window as Window
from .labeling import labeling_function as labeling_function

__all__ = [
    "ABSTAIN",
    "GridIntent",
    "LFAnalysis",
    "LFApplier",
    "LabelingFunction",
    "SequenceLabelModel",
    "Stationary",
    "Threshold",
    "Window",
    "labeling_function",
]
