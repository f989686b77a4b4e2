"""Posteriors of neural networks: Hamiltonian Monte Carlo for any module, and what is cheaper, measured against it.

=============================  =================================================================================
:class:`BayesianModule`        a network with a likelihood and a prior; ``fit``, ``predict_proba``, ``log_density``
:class:`Posterior`             draws, or predictions averaged while they pass by
:class:`GaussianPrior`, ...    priors: Laplace, Student's t, logistic, mixture, and EmpCov for covariate shift
:class:`GaussianLikelihood`    and other likelihoods, or a function of your own
:func:`audit`                  how far any cheap method, or any predictions, are from an HMC reference
:class:`HMCClassifier`         scikit-learn classifier, and :class:`HMCRegressor`
:func:`dead_inputs`            the alarm for inputs that never varied in training; :func:`empcov_prior` the remedy
=============================  =================================================================================

P. Izmailov, S. Vikram, M. D. Hoffman and A. G. Wilson, "What Are Bayesian Neural Network Posteriors Really Like?",
ICML 2021, arXiv:2104.14421.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auditing import AuditReport, audit
    from .density import PosteriorDensity, largest_curvature
    from .laplace import LaplacePosterior, laplace_posterior, linearized
    from .layout import Layout
    from .likelihoods import (
        BernoulliLikelihood,
        CategoricalLikelihood,
        CustomLikelihood,
        GaussianLikelihood,
        Likelihood,
    )
    from .module import BayesianModule
    from .posterior import Posterior, PredictionStream
    from .priors import (
        EmpCovPrior,
        GaussianMixturePrior,
        GaussianPrior,
        LaplacePrior,
        LogisticPrior,
        Prior,
        StudentTPrior,
    )
    from .shift import DeadInputs, ShiftReport, dead_inputs, empcov_prior
    from .sklearn import HMCClassifier, HMCRegressor

__all__ = [
    "AuditReport",
    "BayesianModule",
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "CustomLikelihood",
    "DeadInputs",
    "EmpCovPrior",
    "GaussianLikelihood",
    "GaussianMixturePrior",
    "GaussianPrior",
    "HMCClassifier",
    "HMCRegressor",
    "LaplacePosterior",
    "LaplacePrior",
    "Layout",
    "Likelihood",
    "LogisticPrior",
    "Posterior",
    "PosteriorDensity",
    "PredictionStream",
    "Prior",
    "ShiftReport",
    "StudentTPrior",
    "audit",
    "dead_inputs",
    "empcov_prior",
    "laplace_posterior",
    "largest_curvature",
    "linearized",
]

_HOME = {
    "module": ("BayesianModule",),
    "posterior": ("Posterior", "PredictionStream"),
    "density": ("PosteriorDensity", "largest_curvature"),
    "layout": ("Layout",),
    "likelihoods": (
        "BernoulliLikelihood",
        "CategoricalLikelihood",
        "CustomLikelihood",
        "GaussianLikelihood",
        "Likelihood",
    ),
    "priors": (
        "EmpCovPrior",
        "GaussianMixturePrior",
        "GaussianPrior",
        "LaplacePrior",
        "LogisticPrior",
        "Prior",
        "StudentTPrior",
    ),
    "shift": ("DeadInputs", "ShiftReport", "dead_inputs", "empcov_prior"),
    "auditing": ("AuditReport", "audit"),
    "laplace": ("LaplacePosterior", "laplace_posterior", "linearized"),
    "sklearn": ("HMCClassifier", "HMCRegressor"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used."""
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
