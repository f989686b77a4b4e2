from .auditing import AuditReport as AuditReport
from .auditing import audit as audit
from .density import PosteriorDensity as PosteriorDensity
from .density import largest_curvature as largest_curvature
from .empcov import EmpCovPrior as EmpCovPrior
from .ensemble import MAP as MAP
from .ensemble import Ensemble as Ensemble
from .function import linearized as linearized
from .hmc import HMC as HMC
from .laplace import Laplace as Laplace
from .laplace import LaplacePosterior as LaplacePosterior
from .layout import Layout as Layout
from .likelihoods import BernoulliLikelihood as BernoulliLikelihood
from .likelihoods import CategoricalLikelihood as CategoricalLikelihood
from .likelihoods import CustomLikelihood as CustomLikelihood
from .likelihoods import GaussianLikelihood as GaussianLikelihood
from .likelihoods import Likelihood as Likelihood
from .method import Method as Method
from .method import Target as Target
from .mfvi import MFVI as MFVI
from .network import BayesianNetwork as BayesianNetwork
from .nuts import NUTS as NUTS
from .posterior import Posterior as Posterior
from .posterior import PredictionStream as PredictionStream
from .priors import GaussianMixturePrior as GaussianMixturePrior
from .priors import GaussianPrior as GaussianPrior
from .priors import LaplacePrior as LaplacePrior
from .priors import LogisticPrior as LogisticPrior
from .priors import Prior as Prior
from .priors import StudentTPrior as StudentTPrior
from .sgmcmc import SGHMC as SGHMC
from .sgmcmc import SGLD as SGLD
from .sgmcmc import CyclicalSGHMC as CyclicalSGHMC
from .shift import DeadInputs as DeadInputs
from .shift import ShiftReport as ShiftReport
from .shift import dead_inputs as dead_inputs
from .sklearn import HMCClassifier as HMCClassifier
from .sklearn import HMCRegressor as HMCRegressor
from .swag import SWAG as SWAG

__all__ = [
    "HMC",
    "MAP",
    "MFVI",
    "NUTS",
    "SGHMC",
    "SGLD",
    "SWAG",
    "AuditReport",
    "BayesianNetwork",
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "CustomLikelihood",
    "CyclicalSGHMC",
    "DeadInputs",
    "EmpCovPrior",
    "Ensemble",
    "GaussianLikelihood",
    "GaussianMixturePrior",
    "GaussianPrior",
    "HMCClassifier",
    "HMCRegressor",
    "Laplace",
    "LaplacePosterior",
    "LaplacePrior",
    "Layout",
    "Likelihood",
    "LogisticPrior",
    "Method",
    "Posterior",
    "PosteriorDensity",
    "PredictionStream",
    "Prior",
    "ShiftReport",
    "StudentTPrior",
    "Target",
    "audit",
    "dead_inputs",
    "largest_curvature",
    "linearized",
]
