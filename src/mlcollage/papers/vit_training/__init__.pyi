from .leaks import LeakReport as LeakReport
from .leaks import find_leaks as find_leaks
from .models import AUGREG_MODELS as AUGREG_MODELS
from .models import ViTConfig as ViTConfig
from .models import check_pixels as check_pixels
from .models import load_augreg_npz as load_augreg_npz
from .models import model_table as model_table
from .models import resize_posemb as resize_posemb
from .models import save_augreg_npz as save_augreg_npz
from .models import vit as vit
from .recommend import PresetRecommender as PresetRecommender
from .recommend import judge_recommender as judge_recommender
from .recommend import published_sweep as published_sweep
from .selection import pareto as pareto
from .selection import random_search_curve as random_search_curve
from .selection import rank_agreement as rank_agreement
from .selection import select_best as select_best
from .selection import selection_regret as selection_regret
from .sklearn import ViTClassifier as ViTClassifier
from .sweep import Sweep as Sweep
from .sweep import augreg_space as augreg_space
from .throughput import Throughput as Throughput
from .throughput import measure_throughput as measure_throughput
from .training import AugReg as AugReg
from .training import finetune_recipe as finetune_recipe
from .training import pretrain_recipe as pretrain_recipe
from .training import randaugment as randaugment

__all__ = [
    "AUGREG_MODELS",
    "AugReg",
    "LeakReport",
    "PresetRecommender",
    "Sweep",
    "Throughput",
    "ViTClassifier",
    "ViTConfig",
    "augreg_space",
    "check_pixels",
    "find_leaks",
    "finetune_recipe",
    "judge_recommender",
    "load_augreg_npz",
    "measure_throughput",
    "model_table",
    "pareto",
    "pretrain_recipe",
    "published_sweep",
    "randaugment",
    "random_search_curve",
    "rank_agreement",
    "resize_posemb",
    "save_augreg_npz",
    "select_best",
    "selection_regret",
    "vit",
]
