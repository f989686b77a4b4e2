"""Neural mechanics: symmetries of the loss, the laws they give, and how real training breaks them.

Every symmetry of a network's loss ties all gradients and gives a quantity that gradient flow conserves; weight decay,
finite steps and momentum break it in ways that can be predicted exactly (Kunin et al., ICLR 2021).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
