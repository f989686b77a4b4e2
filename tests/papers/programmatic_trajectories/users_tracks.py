"""A workload of tracks, as a user's function returns it."""

from mlcollage.papers.programmatic_trajectories import HalfCourtWorld


def plays():
    """Twenty plays of five players, in feet."""
    return {"tracks": HalfCourtWorld.draw(20, seed=1, frames=16).x, "fps": 6.25, "units": "ft", "court": (47.0, 50.0)}
