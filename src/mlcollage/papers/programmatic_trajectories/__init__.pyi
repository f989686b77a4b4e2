from .applier import LFAnalysis as LFAnalysis
from .applier import LFApplier as LFApplier
from .baselines import VRAEMI as VRAEMI
from .baselines import RNNGauss as RNNGauss
from .baselines import VRNNIndep as VRNNIndep
from .baselines import VRNNMixed as VRNNMixed
from .baselines import VRNNSingle as VRNNSingle
from .boids import BoidsWorld as BoidsWorld
from .boids import boids_step as boids_step
from .boids import friendly_label as friendly_label
from .frames import TrackBatch as TrackBatch
from .half_court import HalfCourtWorld as HalfCourtWorld
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
from .metrics import best_of_n as best_of_n
from .metrics import collision_rate as collision_rate
from .metrics import distance as distance
from .metrics import intent_calibration as intent_calibration
from .metrics import intent_information as intent_information
from .metrics import nearest_distance as nearest_distance
from .metrics import out_of_bounds as out_of_bounds
from .metrics import speed as speed
from .metrics import two_sample_auc as two_sample_auc
from .metrics import wasserstein as wasserstein
from .official import load_official_weights as load_official_weights
from .official import official_model as official_model
from .play_page import play_page as play_page
from .rating import bradley_terry as bradley_terry
from .rating import rating_page as rating_page
from .roles import RoleAssigner as RoleAssigner
from .sklearn import MacroTrajectoryModel as MacroTrajectoryModel
from .vrnn import AgentVRNN as AgentVRNN
from .vrnn import Wiring as Wiring

__all__ = [
    "ABSTAIN",
    "VRAEMI",
    "AgentVRNN",
    "BoidsWorld",
    "GridIntent",
    "HalfCourtWorld",
    "IntentModel",
    "LFAnalysis",
    "LFApplier",
    "LabelingFunction",
    "MacroTrajectoryModel",
    "MacroVRNN",
    "RNNGauss",
    "RoleAssigner",
    "SequenceLabelModel",
    "Stationary",
    "Threshold",
    "TrackBatch",
    "VRNNIndep",
    "VRNNMixed",
    "VRNNSingle",
    "Window",
    "Wiring",
    "best_of_n",
    "boids_step",
    "bradley_terry",
    "collision_rate",
    "distance",
    "friendly_label",
    "intent_calibration",
    "intent_information",
    "labeling_function",
    "load_official_weights",
    "nearest_distance",
    "official_model",
    "out_of_bounds",
    "play_page",
    "rating_page",
    "speed",
    "two_sample_auc",
    "wasserstein",
]
