"""The eight statistical ideas as tools.

==================  ================================================================================================
causal              ``causal`` (paired designs, randomization tests), ``causal_effects`` (adjustment, weighting, AIPW),
                    ``sensitivity`` (placebo, E-value, Rosenbaum bounds)
bootstrap           ``bootstrap`` (all intervals), ``simulation`` (calibration, predictive checks),
                    ``likelihood_free`` (posteriors by simulation)
regularization      ``regularize`` (degrees of freedom, double descent, horseshoe, PSIS-LOO)
multilevel          ``multilevel`` (partial pooling)
adaptive            ``adaptive`` (power, several claims), ``bandits``, ``search`` (Hyperband, expected improvement),
                    ``sequential`` (anytime-valid tests and intervals)
robust              ``robust`` (locations, scales, improvement, multiverse)
exploration         ``explore`` (forest, slope, ECDF, bands, critical difference, lineup)
==================  ================================================================================================

The eighth, generic computation, is :mod:`mlcollage.infer`.
"""
