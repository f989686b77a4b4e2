from .ablation import ablate_units as ablate_units
from .callbacks import HuggingFaceSelectivity as HuggingFaceSelectivity
from .callbacks import LightningSelectivity as LightningSelectivity
from .controller import SelectivityController as SelectivityController
from .controller import alpha_schedule as alpha_schedule
from .distance import cca_distance_ratio as cca_distance_ratio
from .distance import distance_ratio as distance_ratio
from .distance import representations as representations
from .index import SelectivityReport as SelectivityReport
from .index import measure_selectivity as measure_selectivity
from .index import selectivity_index as selectivity_index
from .off_axis import OffAxisResult as OffAxisResult
from .off_axis import class_variance_ratios as class_variance_ratios
from .off_axis import off_axis_upper_bound as off_axis_upper_bound
from .regularizer import SelectivityRegularizer as SelectivityRegularizer

__all__ = [
    "HuggingFaceSelectivity",
    "LightningSelectivity",
    "OffAxisResult",
    "SelectivityController",
    "SelectivityRegularizer",
    "SelectivityReport",
    "ablate_units",
    "alpha_schedule",
    "cca_distance_ratio",
    "class_variance_ratios",
    "distance_ratio",
    "measure_selectivity",
    "off_axis_upper_bound",
    "representations",
    "selectivity_index",
]
