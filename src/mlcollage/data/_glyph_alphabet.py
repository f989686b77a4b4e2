"""Stroke skeletons: the classes of :class:`~mlcollage.data.glyphs.GlyphWorld`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput

MAX_SEGMENTS = 5
MAX_VERTICES = 2 * MAX_SEGMENTS
_LIFT = 0.25  # probability that a stroke starts anew instead of where the last one ended
_LIKENESS = 0.45  # largest correlation of two classes
_PATIENCE = 500  # dropped candidates in a row after which more likeness is allowed

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Alphabet:
    """``k`` skeletons as padded arrays.

    Attributes
    ----------
    vertices
        ``(k, 10, 2)``, centered on the center of mass of the ink and scaled to ``max |x| = 1``.
    segments
        ``(k, 5, 2)`` vertex numbers of both ends; the last segment fills unused places.
    lengths
        ``(k,)`` number of segments.
    likeness
        Largest correlation between the blurred rasters of two classes.
    """

    vertices: Array
    segments: NDArray[np.int64]
    lengths: NDArray[np.int64]
    likeness: float


def _squared_distance(vertices: Array, segments: NDArray[np.int64], pixels: Array) -> Array:
    """Squared distance of each of ``(n, 2)`` pixels from the nearest stroke: ``(n,)``."""
    ends = vertices[segments]  # (S, 2, 2): stroke, end, coordinate
    start, step = ends[:, 0], ends[:, 1] - ends[:, 0]
    there = pixels[:, None] - start  # (n, S, 2)
    # (n, S): the foot of the perpendicular as a part of the stroke, kept between its ends.
    along = np.clip((there * step).sum(-1) / (step**2).sum(-1), 0.0, 1.0)
    return ((there - along[..., None] * step) ** 2).sum(-1).min(axis=1)


def _grid(n: int, reach: float) -> Array:
    line = np.linspace(-reach, reach, n)
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def raster(vertices: Array, segments: NDArray[np.int64], *, turn: float = 0.0) -> Array:
    """Blurred 9 x 9 picture of a skeleton turned by ``turn`` radians, as a unit vector of mean 0."""
    cos, sin = np.cos(turn), np.sin(turn)
    squared = _squared_distance(vertices @ np.array([[cos, sin], [-sin, cos]]), segments, _grid(9, 1.0))
    ink = np.exp(-squared / (2 * 0.25**2))
    ink -= ink.mean()
    return ink / np.linalg.norm(ink)


def ink_center(vertices: Array, segments: NDArray[np.int64]) -> Array:
    """Center of mass of the drawn strokes (half-width 0.12); where strokes cross, ink counts once."""
    pixels = _grid(41, 1.2 * float(np.abs(vertices).max()))
    drawn = _squared_distance(vertices, segments, pixels) < (0.12 * np.abs(vertices).max()) ** 2
    return pixels[drawn].mean(axis=0)


def _walk(rng: np.random.Generator) -> tuple[Array, NDArray[np.int64]]:
    """One random skeleton: 3-5 strokes between points of a 4 x 4 lattice, each at least two steps long."""
    lattice = np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1).reshape(-1, 2)  # (16, 2)
    reach = np.abs(lattice[:, None] - lattice[None]).max(-1) >= 2
    points = [int(rng.integers(16))]
    segments: list[tuple[int, int]] = []
    drawn: set[frozenset[int]] = set()  # strokes in either direction
    for number in range(int(rng.integers(3, MAX_SEGMENTS + 1))):
        if number and rng.random() < _LIFT:
            points.append(int(rng.integers(16)))
        here = points[-1]
        free = [p for p in range(16) if reach[here, p] and frozenset((here, p)) not in drawn]
        points.append(int(rng.choice(free)))
        drawn.add(frozenset((here, points[-1])))
        segments.append((len(points) - 2, len(points) - 1))
    where = lattice[points].astype(np.float64)
    pairs = np.array(segments, dtype=np.int64)
    where -= where[pairs].mean(axis=(0, 1))  # the ends of strokes, not the ink: cheap, and enough to compare by
    return where / np.abs(where).max(), pairs


def make_alphabet(num_classes: int, *, seed: int, rotation: float = 0.0) -> Alphabet:
    """Draw ``num_classes`` skeletons that can be told apart.

    A candidate is dropped when its blurred raster correlates above 0.45 with an earlier class (in any rotation the
    world may apply, if that exceeds 45 degrees). When 500 in a row were dropped the bound is raised by 0.02, so
    that large alphabets exist too; the first classes of an alphabet do not depend on how many follow.

    Parameters
    ----------
    num_classes
        Number of classes, 2 to 64.
    seed
        Different seeds give unrelated alphabets.
    rotation
        Largest rotation in degrees.
    """
    if not 2 <= num_classes <= 64:
        raise InvalidInput(f"num_classes must be from 2 to 64; got {num_classes}.")
    rng = np.random.default_rng([abs(seed), int(seed < 0), 0x676C797068])  # the last word spells "glyph"
    turns = np.deg2rad(np.arange(-rotation, rotation + 1, 15.0)) if rotation > 45 else np.zeros(1)
    kept: list[tuple[Array, NDArray[np.int64]]] = []
    pictures: list[Array] = []
    bound, dropped, likeness = _LIKENESS, 0, -1.0
    while len(kept) < num_classes:
        vertices, segments = _walk(rng)
        # First without turning and before centering: most candidates fail already.
        nearest = _likeness(vertices, segments, pictures, turns[len(turns) // 2 :][:1], bound)
        if nearest <= bound:  # the slow part, for the few that may stay: no class is told by where its ink is
            vertices = vertices - ink_center(vertices, segments)
            vertices /= np.abs(vertices).max()
            nearest = _likeness(vertices, segments, pictures, turns, bound)
        if nearest > bound:
            dropped += 1
            if dropped == _PATIENCE:
                bound, dropped = bound + 0.02, 0
            continue
        kept.append((vertices, segments))
        pictures.append(raster(vertices, segments))
        likeness, dropped = max(likeness, nearest), 0
    return _pack(kept, likeness)


def _likeness(vertices: Array, segments: NDArray[np.int64], pictures: list[Array], turns: Array, bound: float) -> float:
    """Largest correlation with the classes so far, in any of the turns; stops at the first above ``bound``."""
    nearest = -1.0
    for turn in turns if pictures else ():
        # (k, 81) @ (81,): pictures are unit vectors of mean 0, so that their product is the correlation.
        nearest = max(nearest, float((np.array(pictures) @ raster(vertices, segments, turn=float(turn))).max()))
        if nearest > bound:
            break
    return nearest


def _pack(kept: list[tuple[Array, NDArray[np.int64]]], likeness: float) -> Alphabet:
    vertices = np.zeros((len(kept), MAX_VERTICES, 2))
    segments = np.zeros((len(kept), MAX_SEGMENTS, 2), dtype=np.int64)
    for number, (points, pairs) in enumerate(kept):
        vertices[number, : len(points)] = points
        segments[number, : len(pairs)] = pairs
        segments[number, len(pairs) :] = pairs[-1]  # drawn twice, a stroke looks the same
    lengths = np.array([len(pairs) for _, pairs in kept], dtype=np.int64)
    return Alphabet(vertices, segments, lengths, likeness)
