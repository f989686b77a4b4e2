"""The eight statistical ideas as tools.

* causal: ``causal`` (paired designs, randomization tests), ``causal_effects`` (adjustment, weighting, AIPW),
  ``sensitivity`` (placebo, E-value, Rosenbaum bounds)
* bootstrap: ``bootstrap`` (all intervals), ``simulation`` (calibration, predictive checks), ``likelihood_free``
  (posteriors by simulation)
* regularization: ``regularize`` (degrees of freedom, double descent, PSIS-LOO), ``horseshoe`` (its prior)
* multilevel: ``multilevel`` (partial pooling)
* adaptive: ``adaptive`` (power, several claims), ``bandits``, ``search`` (halving, expected improvement),
  ``sequential`` (anytime-valid tests and intervals)
* robust: ``robust`` (locations, scales, improvement, multiverse), ``shape`` (skewness, outlying values)
* exploration: ``explore`` (forest, slope, ECDF, bands, critical difference, lineup)

The eighth, generic computation, is :mod:`mlcollage.infer`. Every public name can be had from here:
``from mlcollage.stats import bootstrap_ci``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
