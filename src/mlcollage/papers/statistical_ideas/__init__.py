"""The eight statistical ideas as tools (after Gelman and Vehtari, JASA 2021); the judge of all studies stands on them.

* causal inference: :class:`AverageEffect`, :func:`paired_difference`, :func:`sign_flip_test`, ...
* bootstrap and simulation: :func:`bootstrap_ci`, :func:`posterior_predictive_check`, :func:`sbc_uniformity`, ...
* regularization: :class:`RandomReLURegressor`, :func:`double_descent`, :class:`HorseshoePrior`, ...
* multilevel models: :class:`PartialPooling`
* generic computation: :mod:`hmc`, :mod:`nuts`, :func:`sbc`, :func:`rhat`, :func:`ess`
* adaptive decisions: :class:`ThompsonSampling`, :class:`SuccessiveHalving`, :class:`ConfidenceSequence`, ...
* robust inference: :func:`iqm`, :func:`hodges_lehmann`, :func:`prob_improvement`, :func:`multiverse`, ...
* exploratory analysis: :func:`forest`, :func:`slope`, :func:`ecdf`, :func:`cd_diagram`, :func:`lineup`, ...

They live in ``mlcollage.stats`` and ``mlcollage.infer``, a module per idea; here all their public names are gathered.
"""

from typing import Any

from mlcollage import infer, stats

__all__ = sorted({*stats.__all__, *infer.__all__})


def __getattr__(name: str) -> Any:
    """A tool by name, imported by its package when it is first used; the stub of the package names them for editors."""
    for package in (stats, infer):
        if name in package.__all__:
            return getattr(package, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
