"""Hands-free machine learning on tables: a learned portfolio of pipelines, a selected policy, a search, an ensemble.

Portfolio and selector are learned from earlier tasks, the authors' or the user's own (Feurer, Eggensperger, Falkner,
Lindauer and Hutter, "Auto-Sklearn 2.0: Hands-free AutoML via Meta-Learning", JMLR 2022).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
