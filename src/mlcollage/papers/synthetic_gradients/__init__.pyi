from .agreement import compare_gradients as compare_gradients
from .callbacks import HuggingFaceSyntheticGradients as HuggingFaceSyntheticGradients
from .callbacks import LightningSyntheticGradients as LightningSyntheticGradients
from .chain import DecoupledSequential as DecoupledSequential
from .chain import local_update as local_update
from .chain import split_blocks as split_blocks
from .context import Context as Context
from .context import divisor_of as divisor_of
from .decouple import decouple as decouple
from .decoupled import Decoupled as Decoupled
from .feedback import feedback_alignment as feedback_alignment
from .feedback import feedback_weights as feedback_weights
from .linear_theory import LinearConvergence as LinearConvergence
from .linear_theory import linear_sg_convergence as linear_sg_convergence
from .pipeline import run_pipeline as run_pipeline
from .quality import ImpliedLoss as ImpliedLoss
from .quality import implied_loss as implied_loss
from .quality import sg_quality as sg_quality
from .recurrent import DNIRecurrent as DNIRecurrent
from .stage import AsyncStage as AsyncStage
from .stage import StageParts as StageParts
from .synthesizer import ConvSyntheticGradient as ConvSyntheticGradient
from .synthesizer import Critic as Critic
from .synthesizer import RecurrentSyntheticGradient as RecurrentSyntheticGradient
from .synthesizer import SyntheticGradient as SyntheticGradient
from .synthesizer import inject_gradient as inject_gradient
from .synthesizer import intercept_gradient as intercept_gradient
from .synthesizer import synthesizer_for as synthesizer_for
from .timeline import Timeline as Timeline

__all__ = [
    "AsyncStage",
    "Context",
    "ConvSyntheticGradient",
    "Critic",
    "DNIRecurrent",
    "Decoupled",
    "DecoupledSequential",
    "HuggingFaceSyntheticGradients",
    "ImpliedLoss",
    "LightningSyntheticGradients",
    "LinearConvergence",
    "RecurrentSyntheticGradient",
    "StageParts",
    "SyntheticGradient",
    "Timeline",
    "compare_gradients",
    "decouple",
    "divisor_of",
    "feedback_alignment",
    "feedback_weights",
    "implied_loss",
    "inject_gradient",
    "intercept_gradient",
    "linear_sg_convergence",
    "local_update",
    "run_pipeline",
    "sg_quality",
    "split_blocks",
    "synthesizer_for",
]
