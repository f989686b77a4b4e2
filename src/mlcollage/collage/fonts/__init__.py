"""The typeface of slides and pages: a subset of Inter 3.19; ``tools/build_fonts.py`` in the source made it."""
