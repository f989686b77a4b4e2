"""The Deep Bootstrap framework: the same training run in the Real and in the Ideal World.

The Real World trains on a fixed set of n samples for many epochs, the Ideal World takes the same steps on fresh
samples; the difference of their test errors is the bootstrap error (Nakkiran, Neyshabur, Sedghi, ICLR 2021).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
