"""Triangles: area-weighted points on the surfaces of many meshes of one topology at once, and the solids of shapes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Solid(NamedTuple):
    """Surfaces of one part in each of S shapes: corners (S, V, 3) and triangles (F, 3) that all shapes share."""

    corners: Array
    faces: NDArray[np.int64]


def sample_surface(
    corners: Array, faces: NDArray[np.int64], n: int, rng: np.random.Generator
) -> tuple[Array, NDArray[np.int64]]:
    """Points (S, n, 3) uniform on the surface of each of S meshes, and the triangle (S, n) that each lies on.

    ``corners`` (S, V, 3), ``faces`` (F, 3). Draws are stratified by area, so that n points cover the surface evenly;
    their order is random, so that the first m of them cover it too.
    """
    area = triangle_areas(corners, faces)  # (S, F)
    total = np.cumsum(area, 1)
    shapes = len(corners)
    place = (np.arange(n) + rng.random((shapes, n))) / n  # (S, n), increasing along a row
    # One search for all: row s holds values in [s, s + 1).
    ladder = (total / total[:, -1:] + np.arange(shapes)[:, None]).ravel()
    levels = (np.minimum(place, 1 - 1e-12) + np.arange(shapes)[:, None]).ravel()
    found = np.searchsorted(ladder, levels, side="right") - np.repeat(np.arange(shapes) * len(faces), n)
    face = np.clip(found, 0, len(faces) - 1).reshape(shapes, n)[:, rng.permutation(n)]
    row = np.arange(shapes)[:, None]
    a, b, c = (corners[row, faces[face, i]] for i in range(3))  # (S, n, 3) each
    u, v = rng.random((2, shapes, n, 1))
    outside = u + v > 1
    u, v = np.where(outside, 1 - u, u), np.where(outside, 1 - v, v)
    return a + u * (b - a) + v * (c - a), face


def triangle_areas(corners: Array, faces: NDArray[np.int64]) -> Array:
    """Areas (S, F)."""
    a, b, c = (corners[:, faces[:, i]] for i in range(3))
    return 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=-1)


def face_normals(corners: Array, faces: NDArray[np.int64], face: NDArray[np.int64]) -> Array:
    """Unit normals (S, n, 3) of the triangles that points lie on; triangles wind outwards."""
    row = np.arange(len(corners))[:, None]
    a, b, c = (corners[row, faces[face, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    return normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-300)


def box(center: Array, half: Array) -> Solid:
    """Boxes along the axes: centers and half sizes (S, 3)."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)  # (8, 3)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    return Solid(center[:, None] + signs * half[:, None], _split(quads))


def plate(corners: Array) -> Solid:
    """A thin four-cornered plate, (S, 4, 3), seen from both sides."""
    return Solid(corners, _split([(0, 1, 2, 3)]))


def turned(radii: Array, heights: Array, sides: int = 12, axis: int = 2) -> Solid:
    """Surfaces of revolution about an axis: radii and heights (S, rings)."""
    shapes, rings = radii.shape
    angle = 2 * np.pi * np.arange(sides) / sides
    ring = np.stack([np.cos(angle), np.sin(angle)], -1)  # (sides, 2)
    corners = np.empty((shapes, rings, sides, 3))
    others = [i for i in range(3) if i != axis]
    if axis == 1:
        others = others[::-1]  # a right-handed frame
    corners[..., others] = radii[:, :, None, None] * ring
    corners[..., axis] = heights[:, :, None]
    quads = [
        (r * sides + i, r * sides + (i + 1) % sides, (r + 1) * sides + (i + 1) % sides, (r + 1) * sides + i)
        for r in range(rings - 1)
        for i in range(sides)
    ]
    return Solid(corners.reshape(shapes, -1, 3), _split(quads))


def arc_tube(center: Array, radius: Array, thickness: Array, steps: int = 8, sides: int = 6) -> Solid:
    """Half a torus in the x-z plane, open towards negative x: centers (S, 3), radii (S, 1) of arc and tube."""
    along = np.linspace(-np.pi / 2, np.pi / 2, steps)
    around = 2 * np.pi * np.arange(sides) / sides
    out = radius[..., None] + thickness[..., None] * np.cos(around)  # (S, 1, sides)
    x = out * np.cos(along)[:, None]
    z = out * np.sin(along)[:, None]
    y = np.broadcast_to(thickness[..., None] * np.sin(around), x.shape)
    corners = np.stack([x, y, z], -1).reshape(len(center), -1, 3) + center[:, None]
    quads = [
        (s * sides + i, (s + 1) * sides + i, (s + 1) * sides + (i + 1) % sides, s * sides + (i + 1) % sides)
        for s in range(steps - 1)
        for i in range(sides)
    ]
    return Solid(corners, _split(quads))


def shifted(solid: Solid, by: Array) -> Solid:
    """The solid moved by (S, 3)."""
    return Solid(solid.corners + by[:, None], solid.faces)


def leaned(solid: Solid, angle: Array, pivot: Array) -> Solid:
    """The solid turned about the x axis through ``pivot`` (S, 3) by ``angle`` (S,)."""
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x = solid.corners - pivot[:, None]
    y, z = x[..., 1], x[..., 2]
    moved = np.stack([x[..., 0], c * y - s * z, s * y + c * z], -1)
    return Solid(moved + pivot[:, None], solid.faces)


def _split(quads: list[tuple[int, int, int, int]]) -> NDArray[np.int64]:
    return np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))], dtype=np.int64)
