from .compare import compare as compare
from .comparison import Comparison as Comparison
from .comparison import Health as Health
from .comparison import Interval as Interval
from .weights import load_weights as load_weights
from .weights import untrained as untrained

__all__ = ["Comparison", "Health", "Interval", "compare", "load_weights", "untrained"]
