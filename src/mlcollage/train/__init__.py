"""Training: one loop, many networks at once (``replicas``), learning-rate schedules."""
