from .analysis import Asymmetry as Asymmetry
from .analysis import BackpropIdentity as BackpropIdentity
from .analysis import check_backprop_identity as check_backprop_identity
from .analysis import distill_rule as distill_rule
from .analysis import update_asymmetry as update_asymmetry
from .comparison import compare_optimizers as compare_optimizers
from .genome import Genome as Genome
from .genome import GenomeSettings as GenomeSettings
from .genome import shipped_genomes as shipped_genomes
from .health import LearningHealth as LearningHealth
from .meta import Episode as Episode
from .meta import MetaTrainer as MetaTrainer
from .meta import run_episode as run_episode
from .network import BlurNetwork as BlurNetwork
from .network import Diverged as Diverged
from .network import InnerStep as InnerStep
from .network import Learned as Learned
from .network import Weights as Weights
from .network import functional_forward as functional_forward
from .network import functional_step as functional_step
from .network import init_weights as init_weights
from .sklearn import BlurClassifier as BlurClassifier
from .tasks import ArrayTasks as ArrayTasks
from .tasks import TaskDistribution as TaskDistribution
from .tasks import ToyTasks as ToyTasks

__all__ = [
    "ArrayTasks",
    "Asymmetry",
    "BackpropIdentity",
    "BlurClassifier",
    "BlurNetwork",
    "Diverged",
    "Episode",
    "Genome",
    "GenomeSettings",
    "InnerStep",
    "Learned",
    "LearningHealth",
    "MetaTrainer",
    "TaskDistribution",
    "ToyTasks",
    "Weights",
    "check_backprop_identity",
    "compare_optimizers",
    "distill_rule",
    "functional_forward",
    "functional_step",
    "init_weights",
    "run_episode",
    "shipped_genomes",
    "update_asymmetry",
]
