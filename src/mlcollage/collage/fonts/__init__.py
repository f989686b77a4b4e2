"""The typeface of slides and pages: a subset of Inter 3.19, and the script that made it (``build.py``)."""
