from .augmentation import shift_images as shift_images
from .callbacks import HuggingFaceCallback as HuggingFaceCallback
from .callbacks import HuggingFaceTrainer as HuggingFaceTrainer
from .callbacks import LightningCallback as LightningCallback
from .lars import LARS as LARS
from .loop import Step as Step
from .loop import accuracy as accuracy
from .loop import epochs as epochs
from .loop import evaluate as evaluate
from .loop import evaluating as evaluating
from .loop import predict as predict
from .loop import steps as steps
from .mixup import Mixed as Mixed
from .mixup import mixup_batch as mixup_batch
from .mixup import soft_cross_entropy as soft_cross_entropy
from .param_groups import split_bias_and_norm as split_bias_and_norm
from .replicas import Replicas as Replicas
from .replicas import stackable as stackable
from .sam import SAM as SAM
from .schedules import Schedule as Schedule
from .schedules import constant as constant
from .schedules import cosine as cosine
from .schedules import linear as linear
from .schedules import step_decay as step_decay
from .schedules import warmup_cosine as warmup_cosine

__all__ = [
    "LARS",
    "SAM",
    "HuggingFaceCallback",
    "HuggingFaceTrainer",
    "LightningCallback",
    "Mixed",
    "Replicas",
    "Schedule",
    "Step",
    "accuracy",
    "constant",
    "cosine",
    "epochs",
    "evaluate",
    "evaluating",
    "linear",
    "mixup_batch",
    "predict",
    "shift_images",
    "soft_cross_entropy",
    "split_bias_and_norm",
    "stackable",
    "step_decay",
    "steps",
    "warmup_cosine",
]
