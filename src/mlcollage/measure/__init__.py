"""Instruments that look at any network or at what it predicts."""
