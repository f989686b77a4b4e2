"""The statistical ideas as tools, one module an idea: causal contrasts, the bootstrap, adaptive decisions."""
