from .bandit import GLNBandit as GLNBandit
from .gaussian import GaussianNetwork as GaussianNetwork
from .module import GLN as GLN
from .network import GatedNetwork as GatedNetwork
from .river import RiverGLN as RiverGLN
from .sklearn import GLNClassifier as GLNClassifier
from .sklearn import GLNDensity as GLNDensity
from .sklearn import GLNRegressor as GLNRegressor

__all__ = [
    "GLN",
    "GLNBandit",
    "GLNClassifier",
    "GLNDensity",
    "GLNRegressor",
    "GatedNetwork",
    "GaussianNetwork",
    "RiverGLN",
]
