"""The eight statistical ideas as tools (after Gelman and Vehtari, JASA 2021); the judge of all studies stands on them.

=============================  =================================================================================
causal inference               :class:`AverageEffect`, :func:`paired_difference`, :func:`sign_flip_test`, ...
bootstrap and simulation       :func:`bootstrap_ci`, :func:`posterior_predictive_check`, :func:`sbc_uniformity`, ...
regularization                 :class:`RandomReLURegressor`, :func:`double_descent`, :class:`HorseshoePrior`, ...
multilevel models              :class:`PartialPooling`
generic computation            :mod:`hmc`, :mod:`nuts`, :func:`sbc`, :func:`rhat`, :func:`ess`
adaptive decisions             :class:`ThompsonSampling`, :class:`SuccessiveHalving`, :class:`ConfidenceSequence`, ...
robust inference               :func:`iqm`, :func:`hodges_lehmann`, :func:`prob_improvement`, :func:`multiverse`, ...
exploratory analysis           :func:`forest`, :func:`slope`, :func:`ecdf`, :func:`cd_diagram`, :func:`lineup`, ...
=============================  =================================================================================

They live in ``mlcollage.stats`` and ``mlcollage.infer``, a module an idea; here they are gathered by name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlcollage.infer import hmc, nuts
    from mlcollage.infer.diagnostics import ess, rhat
    from mlcollage.infer.validation import sbc
    from mlcollage.stats.adaptive import holm, power, required_seeds, tost
    from mlcollage.stats.bandits import UCB1, EpsilonGreedy, ThompsonSampling, TopTwoThompson
    from mlcollage.stats.bootstrap import bootstrap_ci, bootstrap_t_interval, wild_bootstrap
    from mlcollage.stats.causal import page_trend, paired_difference, permutation_test_two_sample, sign_flip_test
    from mlcollage.stats.causal_effects import AverageEffect, aipw, hajek, regression_adjustment
    from mlcollage.stats.explore import cd_diagram, ecdf, forest, lineup, sbc_ecdf, slope
    from mlcollage.stats.multilevel import PartialPooling
    from mlcollage.stats.regularize import (
        HorseshoePrior,
        RandomReLURegressor,
        double_descent,
        effective_degrees_of_freedom,
        psis_loo,
    )
    from mlcollage.stats.robust import (
        hodges_lehmann,
        huber,
        iqm,
        median_of_means,
        multiverse,
        optimality_gap,
        prob_improvement,
    )
    from mlcollage.stats.search import SuccessiveHalving
    from mlcollage.stats.sensitivity import e_value, placebo, random_common_cause, rosenbaum_gamma
    from mlcollage.stats.sequential import ConfidenceSequence
    from mlcollage.stats.simulation import posterior_predictive_check, sbc_uniformity

__all__ = [
    "UCB1",
    "AverageEffect",
    "ConfidenceSequence",
    "EpsilonGreedy",
    "HorseshoePrior",
    "PartialPooling",
    "RandomReLURegressor",
    "SuccessiveHalving",
    "ThompsonSampling",
    "TopTwoThompson",
    "aipw",
    "bootstrap_ci",
    "bootstrap_t_interval",
    "cd_diagram",
    "double_descent",
    "e_value",
    "ecdf",
    "effective_degrees_of_freedom",
    "ess",
    "forest",
    "hajek",
    "hmc",
    "hodges_lehmann",
    "holm",
    "huber",
    "iqm",
    "lineup",
    "median_of_means",
    "multiverse",
    "nuts",
    "optimality_gap",
    "page_trend",
    "paired_difference",
    "permutation_test_two_sample",
    "placebo",
    "posterior_predictive_check",
    "power",
    "prob_improvement",
    "psis_loo",
    "random_common_cause",
    "regression_adjustment",
    "required_seeds",
    "rhat",
    "rosenbaum_gamma",
    "sbc",
    "sbc_ecdf",
    "sbc_uniformity",
    "sign_flip_test",
    "slope",
    "tost",
    "wild_bootstrap",
]

_HOME = {
    "stats.causal": ("page_trend", "paired_difference", "permutation_test_two_sample", "sign_flip_test"),
    "stats.causal_effects": ("AverageEffect", "aipw", "hajek", "regression_adjustment"),
    "stats.sensitivity": ("e_value", "placebo", "random_common_cause", "rosenbaum_gamma"),
    "stats.bootstrap": ("bootstrap_ci", "bootstrap_t_interval", "wild_bootstrap"),
    "stats.simulation": ("posterior_predictive_check", "sbc_uniformity"),
    "stats.regularize": (
        "HorseshoePrior",
        "RandomReLURegressor",
        "double_descent",
        "effective_degrees_of_freedom",
        "psis_loo",
    ),
    "stats.multilevel": ("PartialPooling",),
    "infer.validation": ("sbc",),
    "infer.diagnostics": ("ess", "rhat"),
    "stats.adaptive": ("holm", "power", "required_seeds", "tost"),
    "stats.search": ("SuccessiveHalving",),
    "stats.bandits": ("EpsilonGreedy", "ThompsonSampling", "TopTwoThompson", "UCB1"),
    "stats.sequential": ("ConfidenceSequence",),
    "stats.robust": (
        "hodges_lehmann",
        "huber",
        "iqm",
        "median_of_means",
        "multiverse",
        "optimality_gap",
        "prob_improvement",
    ),
    "stats.explore": ("cd_diagram", "ecdf", "forest", "lineup", "sbc_ecdf", "slope"),
}
_MODULE = {name: f"mlcollage.{module}" for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a tool from its module when it is first used."""
    if name in ("hmc", "nuts"):
        return importlib.import_module(f"mlcollage.infer.{name}")
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
