from .canonicalizer import Canonicalizer as Canonicalizer
from .canonicalizer import CanonicalPose as CanonicalPose
from .context_norm import AttentiveContextNorm as AttentiveContextNorm
from .context_norm import attentive_context_norm as attentive_context_norm
from .decoder import PatchDecoder as PatchDecoder
from .encoder import CapsuleEncoder as CapsuleEncoder
from .encoder import CapsuleOutput as CapsuleOutput
from .encoder import pool_capsules as pool_capsules
from .losses import LossWeights as LossWeights
from .losses import canonical_loss as canonical_loss
from .losses import equilibrium_loss as equilibrium_loss
from .losses import equivariance_loss as equivariance_loss
from .losses import invariance_loss as invariance_loss
from .losses import localization_loss as localization_loss
from .model import CanonicalCapsules as CanonicalCapsules
from .model import CanonicalOutput as CanonicalOutput
from .model import random_motion as random_motion
from .sklearn import CanonicalCapsulesEstimator as CanonicalCapsulesEstimator
from .sklearn import Registration as Registration
from .training import TrainingReport as TrainingReport
from .training import train_capsules as train_capsules

__all__ = [
    "AttentiveContextNorm",
    "CanonicalCapsules",
    "CanonicalCapsulesEstimator",
    "CanonicalOutput",
    "CanonicalPose",
    "Canonicalizer",
    "CapsuleEncoder",
    "CapsuleOutput",
    "LossWeights",
    "PatchDecoder",
    "Registration",
    "TrainingReport",
    "attentive_context_norm",
    "canonical_loss",
    "equilibrium_loss",
    "equivariance_loss",
    "invariance_loss",
    "localization_loss",
    "pool_capsules",
    "random_motion",
    "train_capsules",
]
