"""Catastrophic Fisher explosion: the trace of the Fisher information early in training, and a penalty on it.

Training with a small learning rate lets Tr(F) grow early, and such networks generalize worse; penalizing it early
closes much of that gap (Jastrzębski, Arpit, Åstrand, Kerg, Wang, Xiong, Socher, Cho, Geras, ICML 2021).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
