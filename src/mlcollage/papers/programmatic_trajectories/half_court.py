"""A procedural half-court offense: five players run scripts on a shared clock, with true macro-intents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks

from .labeling import GridIntent

__all__ = ["HalfCourtWorld"]

_FPS = 6.25
# Feet from the left baseline and the upper sideline; the hoop is at (5.25, 25).
_SPOTS = {
    "top": (29.0, 25.0),
    "slot_l": (27.0, 15.0),
    "slot_r": (27.0, 35.0),
    "wing_l": (20.0, 6.0),
    "wing_r": (20.0, 44.0),
    "corner_l": (4.0, 1.6),
    "corner_r": (4.0, 48.4),
    "elbow_l": (19.0, 17.0),
    "elbow_r": (19.0, 33.0),
    "block_l": (8.0, 17.0),
    "block_r": (8.0, 33.0),
    "rim": (7.5, 25.0),
    "high": (18.0, 25.0),
    "deep": (36.0, 25.0),
}
# Each script: for each of five roles the spots of four phases; "a/b" is chosen by the play's read of that phase, which
# all roles share, so that they branch together.
_SCRIPTS = (
    ("top slot_l/slot_r wing_l/wing_r top", "wing_l corner_l rim/block_r corner_r", "wing_r elbow_r/rim top slot_r",
     "block_l high/block_r rim block_l", "corner_r wing_r/corner_l slot_r wing_r"),
    ("deep top slot_r/slot_l elbow_r", "wing_r corner_r/rim block_r corner_r", "slot_l wing_l corner_l/rim corner_l",
     "high slot_r/slot_l rim/high block_l", "corner_l corner_l/block_l wing_l slot_l"),
    ("slot_r top wing_r/high rim", "slot_l wing_l/rim corner_l wing_l", "corner_r corner_r wing_r/block_r corner_r",
     "elbow_l high/block_l elbow_r/rim high", "corner_l block_l/wing_l corner_l corner_l"),
    ("top high/slot_r rim/top deep", "wing_l rim/slot_l corner_r/wing_l wing_r", "wing_r wing_r corner_r/slot_r top",
     "block_r elbow_r/block_l block_r high", "corner_l wing_l corner_l/elbow_l wing_l"),
    ("deep slot_l/slot_r top high", "corner_l corner_l/wing_l rim corner_r", "corner_r corner_r/wing_r wing_r slot_r",
     "block_l elbow_l/elbow_r high/rim block_l", "block_r high/rim wing_l/corner_l wing_l"),
    ("slot_l elbow_l/rim wing_r corner_r", "top slot_r/slot_l top top/high", "wing_r corner_r/block_r corner_r rim",
     "high block_l/elbow_r block_r elbow_l", "corner_l wing_l/wing_l slot_l corner_l"),
    ("top slot_r wing_r/slot_l slot_r", "elbow_l rim/wing_l corner_l corner_l", "elbow_r wing_r/rim corner_r wing_r",
     "wing_l slot_l/high top elbow_l", "corner_r block_r/corner_r rim/block_l block_r"),
    ("slot_r wing_r/elbow_r corner_r rim", "wing_l slot_l top/high slot_l", "block_r block_l/high elbow_l block_l",
     "corner_l corner_l/rim block_l wing_l", "top high/slot_r rim/slot_r top"),
)  # fmt: skip


def _table() -> NDArray[np.float64]:
    """Spots by script, role, phase and read, (8, 5, 4, 2, 2)."""
    out = np.empty((len(_SCRIPTS), 5, 4, 2, 2))
    for s, script in enumerate(_SCRIPTS):
        for k, chain in enumerate(script):
            for p, names in enumerate(chain.split()):
                first, _, second = names.partition("/")
                out[s, k, p] = _SPOTS[first], _SPOTS[second or first]
    return out


@dataclass(frozen=True)
class HalfCourtWorld:
    """Plays of five attackers on the left half-court, in feet, at 6.25 frames a second.

    Each play runs one of eight scripts or its mirror image. A clock that all players share starts each phase, and a
    read that all share chooses between the branches; players start a little late, run to their spots with limited
    acceleration, and wait there. Speed, distance and share out of bounds are near those of the paper's data.

    Parameters
    ----------
    x
        Positions (N, T, 5, 2), float32.
    target
        Where each player is heading, (N, T, 5, 2).
    script, mirrored
        Of each play, (N,).

    Examples
    --------
    >>> plays = HalfCourtWorld.draw(3, seed=0)
    >>> plays.x.shape, plays.intents().shape, plays.fps
    ((3, 50, 5, 2), (3, 50, 5), 6.25)
    """

    x: NDArray[np.float32]
    target: NDArray[np.float32]
    script: NDArray[np.int64]
    mirrored: NDArray[np.bool_]
    fps: float = _FPS

    @classmethod
    def draw(cls, n: int, *, seed: int, frames: int = 50) -> HalfCourtWorld:
        """Draw ``n`` plays."""
        checks.integer("n", n, least=1)
        checks.integer("frames", frames, least=2)
        rng = np.random.default_rng([21, checks.integer("seed", seed, least=0)])
        script, mirrored = rng.integers(len(_SCRIPTS), size=n), rng.random(n) < 0.5
        spots = _goals(script, mirrored, rng)  # (N, 5, 4, 2)
        # Phase p begins at starts[p], a player's at a lag of its own; dwell times are log-normal.
        dwell = np.exp(rng.normal(np.log(15.0), 0.25, (n, 3)))
        starts = np.concatenate(
            [np.full((n, 1), -99.0), rng.uniform(3, 11, (n, 1)) + np.cumsum(dwell, 1) - dwell[:, :1]], 1
        )
        begins = starts[:, None] + np.abs(rng.normal(0, 1.2, (n, 5, 4)))
        top = rng.uniform(1.6, 2.5, (n, 5, 1))  # fastest steps, ft per frame
        pos, vel = spots[:, :, 0] + rng.normal(0, 1.0, (n, 5, 2)), np.zeros((n, 5, 2))
        x, goal = np.empty((n, frames, 5, 2), np.float32), np.empty((n, frames, 5, 2), np.float32)
        rows = np.arange(n)[:, None], np.arange(5)[None]
        for t in range(frames):
            now = (begins <= t).sum(-1) - 1
            aim = spots[(*rows, np.maximum(now, 0))]
            x[:, t], goal[:, t] = pos, aim
            vel = vel + _limited(_limited((aim - pos) / 3.0, top) - vel, 0.45) + rng.normal(0, 0.03, (n, 5, 2))
            pos = pos + vel
        return cls(x, goal, script, mirrored)

    def intents(self, grid: GridIntent | None = None) -> NDArray[np.int64]:
        """The true macro-intents: the cell each player is heading for, (N, T, 5)."""
        grid = GridIntent() if grid is None else grid
        return grid.cells(self.target.astype(np.float64))


def _goals(script: NDArray, mirrored: NDArray, rng: np.random.Generator) -> NDArray[np.float64]:
    n = len(script)
    read = rng.integers(2, size=(n, 1, 4, 1, 1))
    spots = np.take_along_axis(_table()[script], np.broadcast_to(read, (n, 5, 4, 1, 2)), 3)[..., 0, :]
    spots[mirrored, ..., 1] = 50.0 - spots[mirrored, ..., 1]
    return spots + rng.normal(0, 0.8, spots.shape)


def _limited(v: NDArray, most: NDArray | float) -> NDArray[np.float64]:
    size = np.linalg.norm(v, axis=-1, keepdims=True)
    return v * np.minimum(1.0, most / np.maximum(size, 1e-9))
