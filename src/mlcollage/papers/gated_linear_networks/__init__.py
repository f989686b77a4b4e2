"""Gated Linear Networks (Veness et al., AAAI 2021): online learning without back-propagation.

| name                     | what it is                                                                        |
| ------------------------ | --------------------------------------------------------------------------------- |
| :class:`GLNClassifier`   | scikit-learn classifier: one pass, one sample at a time, one network per class    |
| :class:`GLNRegressor`    | scikit-learn regressor: the Gaussian network, with predictive standard deviations |
| :class:`GLNDensity`      | density of binary vectors by the chain rule, with exact log-likelihoods           |
| :class:`GLNBandit`       | contextual bandit whose exploration comes from context counts                     |
| :class:`GLN`             | ``torch.nn.Module`` with ``update()``: a head for a frozen backbone               |
| :class:`RiverGLN`        | river classifier: samples as dicts, new features and classes at any time          |
| :class:`GatedNetwork`    | the Bernoulli network itself, on arrays                                           |
| :class:`GaussianNetwork` | the Gaussian network itself, on arrays                                            |
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
