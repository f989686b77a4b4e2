from .applier import LFAnalysis as LFAnalysis
from .applier import LFApplier as LFApplier
from .baselines import VRAEMI as VRAEMI
from .baselines import RNNGauss as RNNGauss
from .baselines import VRNNIndep as VRNNIndep
from .baselines import VRNNMixed as VRNNMixed
from .baselines import VRNNSingle as VRNNSingle
from .frames import TrackBatch as TrackBatch
from .label_model import SequenceLabelModel as SequenceLabelModel
from .labeling import ABSTAIN as ABSTAIN
from .labeling import GridIntent as GridIntent
from .labeling import LabelingFunction as LabelingFunction
from .labeling import Stationary as Stationary
from .labeling import Threshold as Threshold
from .labeling import Window as Window
from .labeling import labeling_function as labeling_function
from .macro import IntentModel as IntentModel
from .macro_vrnn import MacroVRNN as MacroVRNN
from .official import load_official_weights as load_official_weights
from .official import official_model as official_model
from .vrnn import AgentVRNN as AgentVRNN
from .vrnn import Wiring as Wiring

__all__ = [
    "ABSTAIN",
    "VRAEMI",
    "AgentVRNN",
    "GridIntent",
    "IntentModel",
    "LFAnalysis",
    "LFApplier",
    "LabelingFunction",
    "MacroVRNN",
    "RNNGauss",
    "SequenceLabelModel",
    "Stationary",
    "Threshold",
    "TrackBatch",
    "VRNNIndep",
    "VRNNMixed",
    "VRNNSingle",
    "Window",
    "Wiring",
    "labeling_function",
    "load_official_weights",
    "official_model",
]
