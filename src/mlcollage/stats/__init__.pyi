from .adaptive import holm as holm
from .adaptive import power as power
from .adaptive import required_seeds as required_seeds
from .adaptive import tost as tost
from .bandits import UCB1 as UCB1
from .bandits import Bandit as Bandit
from .bandits import EpsilonGreedy as EpsilonGreedy
from .bandits import ThompsonSampling as ThompsonSampling
from .bandits import TopTwoThompson as TopTwoThompson
from .bootstrap import BootstrapInterval as BootstrapInterval
from .bootstrap import WildBootstrap as WildBootstrap
from .bootstrap import bootstrap_ci as bootstrap_ci
from .bootstrap import bootstrap_t_interval as bootstrap_t_interval
from .bootstrap import bootstrap_t_test as bootstrap_t_test
from .bootstrap import resample_counts as resample_counts
from .bootstrap import t_interval as t_interval
from .bootstrap import wild_bootstrap as wild_bootstrap
from .causal import PageTrend as PageTrend
from .causal import PairedDifference as PairedDifference
from .causal import page_trend as page_trend
from .causal import paired_difference as paired_difference
from .causal import permutation_test_two_sample as permutation_test_two_sample
from .causal import sign_flip_interval as sign_flip_interval
from .causal import sign_flip_test as sign_flip_test
from .causal import t_test as t_test
from .causal_effects import AverageEffect as AverageEffect
from .causal_effects import Effect as Effect
from .causal_effects import Overlap as Overlap
from .causal_effects import aipw as aipw
from .causal_effects import hajek as hajek
from .causal_effects import regression_adjustment as regression_adjustment
from .explore import CriticalDifference as CriticalDifference
from .explore import Lineup as Lineup
from .explore import cd_diagram as cd_diagram
from .explore import coverage as coverage
from .explore import critical_difference as critical_difference
from .explore import ecdf as ecdf
from .explore import forest as forest
from .explore import lineup as lineup
from .explore import lineup_p_value as lineup_p_value
from .explore import sbc_ecdf as sbc_ecdf
from .explore import slope as slope
from .horseshoe import HorseshoePrior as HorseshoePrior
from .horseshoe import horseshoe_scale as horseshoe_scale
from .likelihood_free import AbcPosterior as AbcPosterior
from .likelihood_free import abc_rejection as abc_rejection
from .multilevel import EffectPosterior as EffectPosterior
from .multilevel import PartialPooling as PartialPooling
from .regularize import Loo as Loo
from .regularize import RandomReLURegressor as RandomReLURegressor
from .regularize import double_descent as double_descent
from .regularize import effective_degrees_of_freedom as effective_degrees_of_freedom
from .regularize import noisy_line as noisy_line
from .regularize import penalty_for as penalty_for
from .regularize import psis_loo as psis_loo
from .robust import Improvement as Improvement
from .robust import Line as Line
from .robust import Multiverse as Multiverse
from .robust import hodges_lehmann as hodges_lehmann
from .robust import huber as huber
from .robust import iqm as iqm
from .robust import mad as mad
from .robust import median_of_means as median_of_means
from .robust import multiverse as multiverse
from .robust import optimality_gap as optimality_gap
from .robust import prob_improvement as prob_improvement
from .robust import theil_sen as theil_sen
from .robust import trimmed_mean as trimmed_mean
from .robust import tukey_biweight as tukey_biweight
from .search import AsynchronousHalving as AsynchronousHalving
from .search import ExpectedImprovement as ExpectedImprovement
from .search import Halving as Halving
from .search import Hyperband as Hyperband
from .search import SuccessiveHalving as SuccessiveHalving
from .search import Trial as Trial
from .search import expected_improvement as expected_improvement
from .sensitivity import EValue as EValue
from .sensitivity import Refutation as Refutation
from .sensitivity import e_value as e_value
from .sensitivity import placebo as placebo
from .sensitivity import random_common_cause as random_common_cause
from .sensitivity import rosenbaum_gamma as rosenbaum_gamma
from .sensitivity import rosenbaum_p as rosenbaum_p
from .sequential import ConfidenceSequence as ConfidenceSequence
from .sequential import sequential_bounded_test as sequential_bounded_test
from .sequential import sequential_sign_interval as sequential_sign_interval
from .sequential import sequential_sign_test as sequential_sign_test
from .sequential import sequential_t_interval as sequential_t_interval
from .sequential import sequential_t_test as sequential_t_test
from .shape import outlying as outlying
from .shape import skewed_t_test as skewed_t_test
from .shape import skewness as skewness
from .shape import skewness_p as skewness_p
from .simulation import EcdfBand as EcdfBand
from .simulation import PredictiveCheck as PredictiveCheck
from .simulation import SBCResult as SBCResult
from .simulation import ecdf_band as ecdf_band
from .simulation import posterior_predictive_check as posterior_predictive_check
from .simulation import sbc_ranks as sbc_ranks
from .simulation import sbc_uniformity as sbc_uniformity

__all__ = [
    "UCB1",
    "AbcPosterior",
    "AsynchronousHalving",
    "AverageEffect",
    "Bandit",
    "BootstrapInterval",
    "ConfidenceSequence",
    "CriticalDifference",
    "EValue",
    "EcdfBand",
    "Effect",
    "EffectPosterior",
    "EpsilonGreedy",
    "ExpectedImprovement",
    "Halving",
    "HorseshoePrior",
    "Hyperband",
    "Improvement",
    "Line",
    "Lineup",
    "Loo",
    "Multiverse",
    "Overlap",
    "PageTrend",
    "PairedDifference",
    "PartialPooling",
    "PredictiveCheck",
    "RandomReLURegressor",
    "Refutation",
    "SBCResult",
    "SuccessiveHalving",
    "ThompsonSampling",
    "TopTwoThompson",
    "Trial",
    "WildBootstrap",
    "abc_rejection",
    "aipw",
    "bootstrap_ci",
    "bootstrap_t_interval",
    "bootstrap_t_test",
    "cd_diagram",
    "coverage",
    "critical_difference",
    "double_descent",
    "e_value",
    "ecdf",
    "ecdf_band",
    "effective_degrees_of_freedom",
    "expected_improvement",
    "forest",
    "hajek",
    "hodges_lehmann",
    "holm",
    "horseshoe_scale",
    "huber",
    "iqm",
    "lineup",
    "lineup_p_value",
    "mad",
    "median_of_means",
    "multiverse",
    "noisy_line",
    "optimality_gap",
    "outlying",
    "page_trend",
    "paired_difference",
    "penalty_for",
    "permutation_test_two_sample",
    "placebo",
    "posterior_predictive_check",
    "power",
    "prob_improvement",
    "psis_loo",
    "random_common_cause",
    "regression_adjustment",
    "required_seeds",
    "resample_counts",
    "rosenbaum_gamma",
    "rosenbaum_p",
    "sbc_ecdf",
    "sbc_ranks",
    "sbc_uniformity",
    "sequential_bounded_test",
    "sequential_sign_interval",
    "sequential_sign_test",
    "sequential_t_interval",
    "sequential_t_test",
    "sign_flip_interval",
    "sign_flip_test",
    "skewed_t_test",
    "skewness",
    "skewness_p",
    "slope",
    "t_interval",
    "t_test",
    "theil_sen",
    "tost",
    "trimmed_mean",
    "tukey_biweight",
    "wild_bootstrap",
]
