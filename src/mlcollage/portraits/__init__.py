"""The portrait of one trained network: what the instruments of the sixteen papers say of it, within some minutes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
