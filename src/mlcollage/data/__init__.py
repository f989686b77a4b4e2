"""Data: workloads by name and from your code, problems made of them, endless worlds, tables and the papers' sets."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
