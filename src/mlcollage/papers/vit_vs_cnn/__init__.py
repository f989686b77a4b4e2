"""Whether two networks see alike: all their layers compared on the same examples, with uncertainty and a control.

The instruments of the paper (Raghu et al., "Do Vision Transformers see like convolutional neural networks?", NeurIPS
2021) that look at one network are in :mod:`mlcollage.measure`: attention distance, receptive fields, skip ratios,
removal of skips, localization, probes of tokens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
