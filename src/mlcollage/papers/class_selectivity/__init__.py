"""Class selectivity of units: an index, a penalty that lowers or raises it in training, and tests of what it does.

The regularizer adds -alpha times the mean selectivity index to the loss (Leavitt and Morcos, "Selectivity considered
harmful", ICLR 2021): negative alpha discourages, positive alpha promotes class selectivity.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
