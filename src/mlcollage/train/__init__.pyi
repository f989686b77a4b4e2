from .augmentation import shift_images as shift_images
from .augreg import AugReg as AugReg
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
from .rand_augment import apply_operation as apply_operation
from .rand_augment import erased_probability as erased_probability
from .rand_augment import randaugment as randaugment
from .recipes import TrainingRecipe as TrainingRecipe
from .recipes import clip_by_global_norm as clip_by_global_norm
from .recipes import finetune_recipe as finetune_recipe
from .recipes import kernel_groups as kernel_groups
from .recipes import pretrain_recipe as pretrain_recipe
from .recipes import reference_schedule as reference_schedule
from .recipes import sigmoid_cross_entropy as sigmoid_cross_entropy
from .replicas import Replicas as Replicas
from .replicas import stackable as stackable
from .sam import SAM as SAM
from .schedules import Schedule as Schedule
from .schedules import constant as constant
from .schedules import cosine as cosine
from .schedules import linear as linear
from .schedules import step_decay as step_decay
from .schedules import warmup_cosine as warmup_cosine
from .two_views import TwoViews as TwoViews
from .two_views import ViewSettings as ViewSettings
from .two_views import two_view_augment as two_view_augment

__all__ = [
    "LARS",
    "SAM",
    "AugReg",
    "HuggingFaceCallback",
    "HuggingFaceTrainer",
    "LightningCallback",
    "Mixed",
    "Replicas",
    "Schedule",
    "Step",
    "TrainingRecipe",
    "TwoViews",
    "ViewSettings",
    "accuracy",
    "apply_operation",
    "clip_by_global_norm",
    "constant",
    "cosine",
    "epochs",
    "erased_probability",
    "evaluate",
    "evaluating",
    "finetune_recipe",
    "kernel_groups",
    "linear",
    "mixup_batch",
    "predict",
    "pretrain_recipe",
    "randaugment",
    "reference_schedule",
    "shift_images",
    "sigmoid_cross_entropy",
    "soft_cross_entropy",
    "split_bias_and_norm",
    "stackable",
    "step_decay",
    "steps",
    "two_view_augment",
    "warmup_cosine",
]
