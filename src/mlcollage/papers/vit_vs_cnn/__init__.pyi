from .compare import compare as compare
from .comparison import ComparisonHealth as ComparisonHealth
from .comparison import Interval as Interval
from .comparison import LayerComparison as LayerComparison
from .weights import load_weights as load_weights
from .weights import untrained as untrained

__all__ = ["ComparisonHealth", "Interval", "LayerComparison", "compare", "load_weights", "untrained"]
