from .callbacks import HuggingFaceLossGauge as HuggingFaceLossGauge
from .callbacks import LightningLossGauge as LightningLossGauge
from .checkpoint import OfficialCheckpoint as OfficialCheckpoint
from .checkpoint import load_official_checkpoint as load_official_checkpoint
from .finetune import FineTuned as FineTuned
from .finetune import finetune as finetune
from .gauge import GaugeReading as GaugeReading
from .gauge import LossGauge as LossGauge
from .gauge import lambda_like as lambda_like
from .gauge import loss_floor as loss_floor
from .gauge import start_level as start_level
from .loss import BarlowTerms as BarlowTerms
from .loss import BarlowTwinsLoss as BarlowTwinsLoss
from .loss import barlow_twins_loss as barlow_twins_loss
from .loss import standardize as standardize
from .mixed import mixed_barlow_term as mixed_barlow_term
from .model import BarlowProjector as BarlowProjector
from .model import BarlowTwins as BarlowTwins
from .model import accumulate_gradients as accumulate_gradients
from .recipe import Pretraining as Pretraining
from .recipe import pretraining as pretraining
from .sklearn import BarlowTwinsEncoder as BarlowTwinsEncoder
from .views import two_views as two_views

__all__ = [
    "BarlowProjector",
    "BarlowTerms",
    "BarlowTwins",
    "BarlowTwinsEncoder",
    "BarlowTwinsLoss",
    "FineTuned",
    "GaugeReading",
    "HuggingFaceLossGauge",
    "LightningLossGauge",
    "LossGauge",
    "OfficialCheckpoint",
    "Pretraining",
    "accumulate_gradients",
    "barlow_twins_loss",
    "finetune",
    "lambda_like",
    "load_official_checkpoint",
    "loss_floor",
    "mixed_barlow_term",
    "pretraining",
    "standardize",
    "start_level",
    "two_views",
]
