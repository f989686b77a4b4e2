"""Posterior inference for any log-density: one module a method, chains as the leading dimension, explicit state."""
