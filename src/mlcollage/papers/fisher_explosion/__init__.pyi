from .callbacks import HuggingFaceFisherTrace as HuggingFaceFisherTrace
from .callbacks import HuggingFaceFisherTrainer as HuggingFaceFisherTrainer
from .callbacks import LightningFisherPenalty as LightningFisherPenalty
from .callbacks import LightningFisherTrace as LightningFisherTrace
from .penalty import FisherPenalty as FisherPenalty
from .tracker import Alarm as Alarm
from .tracker import ExplosionWarning as ExplosionWarning
from .tracker import FisherTraceTracker as FisherTraceTracker

__all__ = [
    "Alarm",
    "ExplosionWarning",
    "FisherPenalty",
    "FisherTraceTracker",
    "HuggingFaceFisherTrace",
    "HuggingFaceFisherTrainer",
    "LightningFisherPenalty",
    "LightningFisherTrace",
]
