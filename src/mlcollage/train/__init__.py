"""Training: one loop, many networks at once (``replicas``), learning-rate schedules, SAM and mixup."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
