"""mlcollage: sixteen deep-learning papers as methods, studies and slides.

Importing the package costs almost nothing: torch and the rest are imported when a method is.
:func:`mlcollage.portrait` looks at one trained network of yours with all instruments.

>>> import mlcollage
>>> mlcollage.__version__.count(".")
2
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, submod_attrs={"portraits": ["portrait"]})
__version__ = "0.1.0"
