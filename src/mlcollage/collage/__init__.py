"""Turns evidence into pictures: the theme, diagrams, the slide of a paper and the digest of a month."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
