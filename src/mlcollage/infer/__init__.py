"""Posterior inference for any log-density: one module per method, chains as the leading dimension, explicit state."""
