"""Posteriors of neural networks: Hamiltonian Monte Carlo for any module, and what is cheaper, measured against it.

| names                           | what they are                                                                    |
| ------------------------------- | -------------------------------------------------------------------------------- |
| :class:`BayesianNetwork`        | a network with a likelihood and a prior; ``fit(X, y, method)`` gives a posterior |
| :class:`Posterior`              | draws, or predictions averaged while they pass by; ``predict_proba``             |
| :class:`HMC`, :class:`NUTS`     | exact samplers                                                                   |
| :class:`SGLD`, :class:`SGHMC`   | stochastic-gradient samplers; :class:`CyclicalSGHMC` with cyclical steps         |
| :class:`MFVI`, :class:`SWAG`    | Gaussian approximations; so is :class:`Laplace`                                  |
| :class:`Ensemble`, :class:`MAP` | independent optima, or one                                                       |
| :class:`GaussianPrior`          | and other priors: Laplace, Student's t, logistic, mixture                        |
| :class:`EmpCovPrior`            | the prior for shifts of the inputs                                               |
| :class:`GaussianLikelihood`     | and other likelihoods, or a function of your own                                 |
| :func:`audit`                   | how far any cheap method, or any predictions, are from an HMC reference          |
| :class:`HMCClassifier`          | scikit-learn classifier, and :class:`HMCRegressor`                               |
| :func:`dead_inputs`             | the alarm for inputs that never varied in training                               |

P. Izmailov, S. Vikram, M. D. Hoffman and A. G. Wilson, "What Are Bayesian Neural Network Posteriors Really Like?",
ICML 2021, arXiv:2104.14421.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
