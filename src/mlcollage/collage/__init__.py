"""Turns evidence into pictures: the theme, diagrams, the slide of a paper and the digest of a month."""
