from .ensemble import EnsembleSelection as EnsembleSelection
from .metrics import ScoreMetric as ScoreMetric
from .official import OfficialPortfolio as OfficialPortfolio
from .official import OfficialSelectorData as OfficialSelectorData
from .official import map_official_config as map_official_config
from .official import read_official_portfolio as read_official_portfolio
from .official import read_official_selector as read_official_selector
from .pipeline import IterativePipeline as IterativePipeline
from .policy import POLICIES as POLICIES
from .policy import Policy as Policy
from .policy import halving_schedule as halving_schedule
from .portfolio import PortfolioBuilder as PortfolioBuilder
from .replay import Replay as Replay
from .replay import simulate as simulate
from .selector import PolicySelector as PolicySelector
from .shipped import default_portfolio as default_portfolio
from .shipped import official_portfolio as official_portfolio
from .shipped import official_selector as official_selector
from .shipped import official_selector_data as official_selector_data
from .shipped import shipped_tensor as shipped_tensor
from .sklearn import AutoClassifier as AutoClassifier
from .sklearn import AutoRegressor as AutoRegressor
from .sklearn import TrialEvent as TrialEvent
from .smac import SmacImprovement as SmacImprovement
from .smac import to_configspace as to_configspace
from .space import Hyperparameter as Hyperparameter
from .space import SearchSpace as SearchSpace
from .space import pipeline_space as pipeline_space
from .surrogate import ForestImprovement as ForestImprovement
from .tasks import TableTask as TableTask
from .tasks import make_task as make_task
from .tensor import PerformanceTensor as PerformanceTensor
from .trials import PipelineTrial as PipelineTrial

__all__ = [
    "POLICIES",
    "AutoClassifier",
    "AutoRegressor",
    "EnsembleSelection",
    "ForestImprovement",
    "Hyperparameter",
    "IterativePipeline",
    "OfficialPortfolio",
    "OfficialSelectorData",
    "PerformanceTensor",
    "PipelineTrial",
    "Policy",
    "PolicySelector",
    "PortfolioBuilder",
    "Replay",
    "ScoreMetric",
    "SearchSpace",
    "SmacImprovement",
    "TableTask",
    "TrialEvent",
    "default_portfolio",
    "halving_schedule",
    "make_task",
    "map_official_config",
    "official_portfolio",
    "official_selector",
    "official_selector_data",
    "pipeline_space",
    "read_official_portfolio",
    "read_official_selector",
    "shipped_tensor",
    "simulate",
    "to_configspace",
]
