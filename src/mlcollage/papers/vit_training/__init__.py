"""AugReg: vision transformers, their 28 settings of augmentation and regularization, recipes, and choosing among runs.

Steiner, Kolesnikov, Zhai, Wightman, Uszkoreit and Beyer, "How to train your ViT?", TMLR 2022, arXiv:2106.10270.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
