"""mlcollage: sixteen deep-learning papers as methods, studies and slides.

Importing the package costs almost nothing: torch and the rest are imported when a method is.

>>> import mlcollage
>>> mlcollage.__version__.count(".")
2
"""

__version__ = "0.1.0"
