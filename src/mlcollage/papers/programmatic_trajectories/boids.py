"""Boids: eight agents that flock or avoid each other, for macro-intents with a known truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .labeling import Threshold
from .metrics import nearest_distance

__all__ = ["BoidsWorld", "boids_step", "friendly_label"]

_START = 0.8 * np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)], dtype=np.float64)
_LOCAL, _CLOSE, _BOUND = 0.9, 0.2, 2.0
_COHESION, _ALIGNMENT, _SEPARATION, _ORIGIN = 1.0, 0.2, 0.1, 1.0


def boids_step(pos: NDArray, vel: NDArray, friendly: NDArray, boost: NDArray) -> tuple[NDArray, NDArray]:
    r"""One step of all sequences.

    .. math::

        v \leftarrow \mathrm{clip}\left(v + \tfrac12 \mathrm{clip}(a)\right), \qquad x \leftarrow x + 0.1\, b\, v

    with a the sum of cohesion (to the mean of the others within 0.9; away from it if unfriendly), 0.2 alignment (their
    mean velocity), 0.1 separation (away from the mean of those within 0.2) and a pull to the origin beyond radius 2.
    Each term is clipped to norm 1, and all velocities are renewed before anyone moves.

    Parameters
    ----------
    pos, vel
        (N, K, 2).
    friendly
        1 or 0 for each sequence, (N,).
    boost
        Factor on each agent's step, (N, K).

    Returns
    -------
    pos, vel
        After the step. Agents at the same place do not see each other.

    Examples
    --------
    >>> x, v = boids_step(np.zeros((1, 1, 2)), np.ones((1, 1, 2)), np.ones(1), np.ones((1, 1)))
    >>> x.round(3).tolist()
    [[[0.071, 0.071]]]
    """
    shapes = [np.shape(v) for v in (pos, vel, friendly, boost)]
    if len(shapes[0]) != 3 or shapes != [shapes[0], shapes[0], shapes[0][:1], shapes[0][:2]]:
        raise InvalidInput(f"shapes must be (N, K, 2), (N, K, 2), (N,), (N, K); got {', '.join(map(str, shapes))}.")
    offset = pos[:, None] - pos[:, :, None]  # of j as seen from i, (N, i, j, 2)
    away = np.sqrt((offset**2).sum(-1))
    local = (away > 0) & (away <= _LOCAL)
    close = (away > 0) & (away <= _CLOSE)
    toward = _clip(_mean(offset, local)) * np.where(friendly > 0, 1.0, -1.0)[:, None, None]
    along = _clip(np.einsum("nij,njd->nid", local / np.maximum(local.sum(-1, keepdims=True), 1), vel))
    apart = _clip(-_mean(offset, close))
    home = _clip(-pos) * (np.linalg.norm(pos, axis=-1, keepdims=True) > _BOUND)
    push = _COHESION * toward + _ALIGNMENT * along + _SEPARATION * apart + _ORIGIN * home
    vel = _clip(vel + 0.5 * _clip(push))
    return pos + 0.1 * boost[..., None] * vel, vel


def _mean(offset: NDArray, chosen: NDArray) -> NDArray:
    total = np.einsum("nij,nijd->nid", chosen.astype(offset.dtype), offset)
    return total / np.maximum(chosen.sum(-1, keepdims=True), 1)


def _clip(v: NDArray) -> NDArray:
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1.0)


@dataclass(frozen=True)
class BoidsWorld:
    """Sequences of eight agents from fixed places with random velocities, half of them friendly.

    Parameters
    ----------
    x
        Positions (N, T, 8, 2), float32.
    friendly
        The true macro-intent of each sequence, (N,): 1 friendly, 0 not.

    Examples
    --------
    >>> world = BoidsWorld.draw(4, seed=0)
    >>> world.x.shape, world.labels().shape
    ((4, 50, 8, 2), (4, 50))
    """

    x: NDArray[np.float32]
    friendly: NDArray[np.int64]

    @classmethod
    def draw(cls, n: int, *, seed: int, frames: int = 50) -> BoidsWorld:
        """Draw ``n`` sequences; every tenth step each agent's speed is drawn anew, 0.8 to 1.4 times.

        The official generator's first step shares one acceleration among all agents, which is not repeated here.
        """
        checks.integer("n", n, least=1)
        checks.integer("frames", frames, least=2)
        rng = np.random.default_rng([20, checks.integer("seed", seed, least=0)])
        friendly = rng.integers(2, size=n)
        pos = np.broadcast_to(_START, (n, 8, 2)).copy()
        vel = rng.normal(size=(n, 8, 2))
        boost = np.ones((n, 8))
        out = np.empty((n, frames, 8, 2), dtype=np.float32)
        out[:, 0] = pos
        for t in range(1, frames):
            if t % 10 == 0:
                boost = rng.uniform(0.8, 1.4, (n, 8))
            pos, vel = boids_step(pos, vel, friendly, boost)
            out[:, t] = pos
        return cls(out, friendly)

    def labels(self) -> NDArray[np.int64]:
        """The macro-intents of all frames, (N, T)."""
        return np.repeat(self.friendly[:, None], self.x.shape[1], 1)


def friendly_label(last: int = 20, cut: float = 0.6) -> Threshold:
    """The labeling function for Boids: friendly (1) if the mean distance to the nearest other is below a cut.

    Parameters
    ----------
    last
        Frames at the end that are looked at.
    cut
        0.6 divides friendly (0.15 on average) and unfriendly flocks (1.08).

    Examples
    --------
    >>> world = BoidsWorld.draw(50, seed=1)
    >>> bool((friendly_label()(world.x)[..., 0] == world.labels()).all())
    True
    """
    checks.integer("last", last, least=1)
    return Threshold(lambda x: nearest_distance(x[:, -last:]).mean((1, 2)), cut, "friendly")
