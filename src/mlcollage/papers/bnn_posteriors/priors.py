r"""Priors over the weights of a network: independent families, and Gaussians with the covariance of the data.

A prior knows its density, the gradient of the logarithm (by hand, since it is needed in every leapfrog step) and how
to draw. Wherever a scale is asked for, a number holds for all parameters, and a mapping gives one for each parameter,
layer or pattern: ``{"": 0.2, "head": 1.0, "*.bias": 0.5}``, the longest key that fits.

``prior.place(layout, like)`` lays it out over a network's parameters; :class:`BayesianModule` does that.
"""

from __future__ import annotations

from ._families import (
    GaussianMixturePrior,
    GaussianPrior,
    LaplacePrior,
    LogisticPrior,
    PlacedPrior,
    Prior,
    StudentTPrior,
)
from .empcov import EmpCovPrior

__all__ = [
    "EmpCovPrior",
    "GaussianMixturePrior",
    "GaussianPrior",
    "LaplacePrior",
    "LogisticPrior",
    "PlacedPrior",
    "Prior",
    "StudentTPrior",
]
