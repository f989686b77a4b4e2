"""Decoupled neural interfaces: parts of a network that train apart, by a model of the gradient that will arrive.

Jaderberg et al., ICML 2017; theory and analysis: Czarnecki et al., "Understanding Synthetic Gradients and Decoupled
Neural Interfaces", ICML 2017.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
