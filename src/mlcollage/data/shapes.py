"""Procedural shapes: planes, chairs, mugs and others as point clouds whose parts and poses are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage._random import derive
from mlcollage.data import _meshes as mesh
from mlcollage.errors import InvalidInput

__all__ = ["SHAPES", "ShapeSet", "SymmetryGroup", "procedural_shapes"]

Array = NDArray[np.float64]
Draw = Callable[[float, float], Array]
Parts = list[tuple[str, mesh.Solid]]
_BLOCK = 128  # shapes that are made at once


@dataclass(frozen=True)
class SymmetryGroup:
    """Rotations that leave shapes of a category as they are.

    Attributes
    ----------
    order
        How many turns about the vertical axis z do: 1 for none but the identity, 0 for all of them.
    """

    order: int = 1


@dataclass(frozen=True)
class ShapeSet:
    """Point clouds of procedural shapes, all in the pose in which they were built.

    Attributes
    ----------
    points
        (S, N, D) float32, within the unit ball about the center of the bounding box.
    labels
        Category of each shape, (S,), an index into ``categories``.
    parts
        Part of each point, (S, N), an index into ``part_names[category]``.
    normals
        Outward normals (S, N, 3) in three dimensions, else None.
    categories
        Names by label.
    part_names
        Names of the parts by category.
    symmetry
        The symmetry group by category: z is up, and shapes look along y.
    """

    points: NDArray[np.float32]
    labels: NDArray[np.int64]
    parts: NDArray[np.int64]
    normals: NDArray[np.float32] | None
    categories: tuple[str, ...]
    part_names: dict[str, tuple[str, ...]]
    symmetry: dict[str, SymmetryGroup]


def procedural_shapes(
    categories: str | Sequence[str] = ("plane", "chair"),
    n_shapes: int = 100,
    n_points: int = 1024,
    *,
    dim: int = 3,
    asymmetric: bool = False,
    seed: int = 0,
) -> ShapeSet:
    """Shapes with random proportions, as points drawn evenly from their surfaces.

    Parameters
    ----------
    categories
        Of ``plane``, ``chair``, ``table``, ``mug``, ``lamp``, ``car``, ``bottle``, ``bench``; shapes take them in turn.
    n_shapes, n_points
        S and N.
    dim
        3, or 2 for their projections: planes from above, mugs from the front, all others from the side.
    asymmetric
        Whether each shape gets a small box on one side, which breaks the symmetries that it has.
    seed
        The same seed gives the same shapes; shape i does not depend on ``n_shapes``.

    Raises
    ------
    InvalidInput, UnknownName
        For unknown categories, none at all, and numbers out of range.

    Examples
    --------
    >>> shapes = procedural_shapes(("plane", "mug"), 4, 64)
    >>> shapes.points.shape, shapes.labels.tolist(), shapes.part_names["mug"]
    ((4, 64, 3), [0, 1, 0, 1], ('body', 'bottom', 'handle'))
    """
    names = (categories,) if isinstance(categories, str) else tuple(categories)
    if not names:
        raise InvalidInput(f"there are no categories; name some of {', '.join(SHAPES)}.")
    for name in names:
        checks.choice("a category", name, SHAPES)
    checks.integer("n_shapes", n_shapes, least=1), checks.integer("n_points", n_points, least=1)
    if dim not in (2, 3):
        raise InvalidInput(f"dim must be 2 or 3, not {dim!r}.")
    points = np.empty((n_shapes, n_points, dim), dtype=np.float32)
    normals = np.empty((n_shapes, n_points, 3), dtype=np.float32) if dim == 3 else None
    parts = np.empty((n_shapes, n_points), dtype=np.int64)
    labels = np.arange(n_shapes) % len(names)
    part_names = {}
    for label, name in enumerate(names):
        rows = np.flatnonzero(labels == label)
        for block, start in enumerate(range(0, max(len(rows), 1), _BLOCK)):
            here = rows[start : start + _BLOCK]
            # A whole block is made, so that a shape is the same however many are asked for.
            rng = np.random.default_rng(derive(seed, label, block, n_points))
            made = _block(name, _BLOCK, n_points, asymmetric, rng)
            part_names[name] = made[3]
            x = made[0][: len(here)]
            points[here] = x if dim == 3 else x[..., _VIEW.get(name, [1, 2])]
            parts[here] = made[1][: len(here)]
            if normals is not None:
                normals[here] = made[2][: len(here)]
    symmetry = {name: SymmetryGroup(1 if asymmetric else _SYMMETRY.get(name, 1)) for name in names}
    return ShapeSet(points, labels, parts, normals, names, part_names, symmetry)


def _block(
    name: str, size: int, n_points: int, asymmetric: bool, rng: np.random.Generator
) -> tuple[Array, NDArray[np.int64], Array, tuple[str, ...]]:
    """Points (size, N, 3), parts (size, N), normals, and the names of the parts."""

    def draw(low: float, high: float) -> Array:
        return rng.uniform(low, high, size)

    solids = SHAPES[name](draw)
    if asymmetric:
        everything = np.concatenate([s.corners for _, s in solids], 1)
        low, high = everything.min(1), everything.max(1)  # (S, 3)
        at = np.stack([high[:, 0], 0.7 * high[:, 1] + 0.3 * low[:, 1], 0.6 * high[:, 2] + 0.4 * low[:, 2]], -1)
        solids.append(("tag", mesh.box(at, np.full((size, 3), 0.07))))
    names = tuple(dict.fromkeys(part for part, _ in solids))
    corners = np.concatenate([s.corners for _, s in solids], 1)
    first = np.cumsum([0, *(s.corners.shape[1] for _, s in solids)])
    faces = np.concatenate([s.faces + start for (_, s), start in zip(solids, first, strict=False)])
    part = np.concatenate([np.full(len(s.faces), names.index(p)) for p, s in solids])
    center = (corners.min(1) + corners.max(1)) / 2
    corners = corners - center[:, None]
    corners /= np.linalg.norm(corners, axis=-1).max(1)[:, None, None]
    points, face = mesh.sample_surface(corners, faces, n_points, rng)
    return points, part[face], mesh.face_normals(corners, faces, face), names


def _at(x: Array | float, y: Array | float, z: Array | float) -> Array:
    x, y, z = np.broadcast_arrays(x, y, z)
    return np.stack([x, y, z], -1)


def _plane(draw: Draw) -> Parts:
    """Nose along y; wings with sweep and taper, tail plane, a tall fin, two engines in half of them."""
    r = draw(0.07, 0.11)
    level = np.array([0.0, 0.5, 0.9, 1, 1, 0.9, 0.6, 0.3, 0.0])
    along = np.array([1.0, 0.93, 0.8, 0.5, -0.2, -0.5, -0.75, -0.95, -1])
    body = mesh.turned(r[:, None] * level, np.broadcast_to(along, (len(r), 9)), axis=1)
    span, sweep, root = draw(0.6, 1.0), draw(0.05, 0.5), draw(0.3, 0.5)
    tip, at = root * draw(0.3, 0.7), draw(0.0, 0.2)
    tail, tail_root = span * draw(0.3, 0.45), root * draw(0.4, 0.6)
    fin, engine = draw(0.25, 0.4), np.where(draw(0, 1) < 0.5, draw(0.04, 0.06), 0.0)
    parts: Parts = [("fuselage", body)]
    for side in (-1.0, 1.0):
        quad = _at(side * r * 0.5, at, 0), _at(side * span, at - sweep, 0), _at(side * span, at - sweep - tip, 0)
        parts.append(("wings", mesh.plate(np.stack([*quad, _at(side * r * 0.5, at - root, 0)], 1))))
        quad = _at(0 * r, -0.72, 0), _at(side * tail, -0.8 - sweep * 0.3, 0), _at(side * tail, -0.95 - sweep * 0.3, 0)
        parts.append(("tail", mesh.plate(np.stack([*quad, _at(0 * r, -0.72 - tail_root, 0)], 1))))
        where = _at(side * span * 0.45, at - sweep * 0.45 - 0.05, -0.06)
        parts.append(("engines", mesh.box(where, _at(engine, 2.5 * engine, engine))))
    tall = [_at(0 * r, y, z) for y, z in ((-0.65, 0.0), (-0.85, fin), (-1.0, fin), (-0.97, 0.0))]
    parts.append(("fin", mesh.plate(np.stack(tall, 1))))
    return parts


def _legs(width: Array, depth: Array, height: Array, thick: Array) -> Parts:
    return [
        ("legs", mesh.box(_at(x * (width - thick), y * (depth - thick), -height / 2), _at(thick, thick, height / 2)))
        for x in (-1, 1)
        for y in (-1, 1)
    ]


def _chair(draw: Draw) -> Parts:
    """Sits along y: the back is behind, at negative y; arms in half of them."""
    width, depth, height, thick = draw(0.4, 0.55), draw(0.4, 0.55), draw(0.7, 1.0), draw(0.03, 0.06)
    back, lean = draw(0.7, 1.1), draw(0.0, 0.3)
    arm = np.where(draw(0, 1) < 0.5, draw(0.03, 0.05), 0.0)
    upright = mesh.box(_at(0.0, -depth, back / 2), _at(width, 0.04, back / 2))
    parts: Parts = [("seat", mesh.box(_at(0.0, 0.0, 0 * width), _at(width, depth, thick)))]
    parts += [("back", mesh.leaned(upright, lean, _at(0.0, -depth, 0 * depth)))]
    parts += _legs(width, depth, height, draw(0.03, 0.06))
    for side in (-1, 1):
        parts.append(("arms", mesh.box(_at(side * width, -0.1 * depth, 0.35), _at(arm, (arm > 0) * depth * 0.8, arm))))
    return parts


def _table(draw: Draw) -> Parts:
    width, depth, height = draw(0.5, 0.75), draw(0.8, 1.1), draw(0.6, 1.0)
    top = mesh.box(_at(0.0, 0.0, 0 * width), _at(width, depth, draw(0.03, 0.06)))
    return [("top", top), *_legs(width, depth, height, draw(0.04, 0.08))]


def _mug(draw: Draw) -> Parts:
    """The handle is along x."""
    r, h = draw(0.4, 0.6), draw(0.9, 1.3)
    body = mesh.turned(np.stack([r * draw(0.8, 1.0), r], 1), np.stack([-h / 2, h / 2], 1), sides=16)
    bottom = mesh.turned(np.stack([0 * r, r * 0.8], 1), np.stack([-h / 2, -h / 2], 1), sides=16)
    handle = mesh.arc_tube(_at(r * 0.95, 0.0, 0 * r), (h * draw(0.25, 0.35))[:, None], draw(0.06, 0.09)[:, None])
    return [("body", body), ("bottom", bottom), ("handle", handle)]


def _lamp(draw: Draw) -> Parts:
    base, height = draw(0.35, 0.5), draw(1.2, 1.8)
    foot = mesh.turned(np.stack([0 * base, base, base, 0 * base], 1), np.array([0, 0, 0.08, 0.08]) + 0 * base[:, None])
    thin = draw(0.03, 0.05)
    pole = mesh.turned(np.stack([thin, thin], 1), np.stack([0 * height, height], 1))
    shade = mesh.turned(
        np.stack([draw(0.4, 0.6), draw(0.2, 0.4)], 1), np.stack([height - 0.1, height + draw(0.3, 0.5)], 1)
    )
    return [("foot", foot), ("pole", pole), ("shade", shade)]


def _car(draw: Draw) -> Parts:
    """Drives along y: a cabin towards the back, four wheels."""
    width, length, height = draw(0.38, 0.48), draw(0.9, 1.1), draw(0.16, 0.22)
    body = mesh.box(_at(0.0, 0.0, 0 * width), _at(width, length, height))
    back, front, roof = draw(-0.9, -0.6), draw(0.15, 0.35), draw(0.28, 0.4)
    cabin = mesh.box(_at(0.0, 0.0, 0 * width), _at(0 * width + 1, 1.0, 1.0))
    c = cabin.corners  # its upper corners are drawn in
    y = np.where(c[..., 1] > 0, front[:, None] - 0.2 * (c[..., 2] > 0), back[:, None] + 0.1 * (c[..., 2] > 0))
    x = c[..., 0] * width[:, None] * np.where(c[..., 2] > 0, 0.8, 0.95)
    z = height[:, None] + roof[:, None] * (c[..., 2] + 1) / 2
    cabin = mesh.Solid(np.stack([x, y, z], -1), cabin.faces)
    radius, parts = draw(0.16, 0.22), [("body", body), ("cabin", cabin)]
    for side in (-1, 1):
        for end in (-0.6, 0.62):
            wheel = mesh.turned(
                np.stack([0 * radius, radius, radius, 0 * radius], 1),
                np.array([-0.07, -0.07, 0.07, 0.07]) + 0 * radius[:, None],
                sides=10,
                axis=0,
            )
            parts.append(("wheels", mesh.shifted(wheel, _at(side * width, end * length, -height))))
    return parts


def _bottle(draw: Draw) -> Parts:
    r, h, neck, top = draw(0.3, 0.45), draw(1.0, 1.4), draw(0.1, 0.16), draw(0.3, 0.5)
    shoulder = h + draw(0.15, 0.3)
    body = mesh.turned(np.stack([0 * r, r, r], 1), np.stack([0 * h, 0 * h, h], 1), sides=16)
    slope = mesh.turned(np.stack([r, neck], 1), np.stack([h, shoulder], 1), sides=16)
    spout = mesh.turned(np.stack([neck, neck], 1), np.stack([shoulder, shoulder + top], 1), sides=16)
    return [("body", body), ("shoulder", slope), ("neck", spout)]


def _bench(draw: Draw) -> Parts:
    width, depth, height, thick = draw(0.9, 1.2), draw(0.25, 0.35), draw(0.4, 0.55), draw(0.03, 0.05)
    back = draw(0.4, 0.6)
    seat = mesh.box(_at(0.0, 0.0, 0 * width), _at(width, depth, thick))
    upright = mesh.box(_at(0.0, -depth, back / 2 + 0.1), _at(width, 0.03, back / 2))
    sides = [
        ("sides", mesh.box(_at(x * width * 0.85, 0.0, -height / 2), _at(0.05, depth * 0.9, height / 2)))
        for x in (-1, 1)
    ]
    return [("seat", seat), ("back", mesh.leaned(upright, draw(0.0, 0.25), _at(0.0, -depth, 0 * depth))), *sides]


SHAPES: dict[str, Callable[[Draw], Parts]] = {
    "plane": _plane,
    "chair": _chair,
    "table": _table,
    "mug": _mug,
    "lamp": _lamp,
    "car": _car,
    "bottle": _bottle,
    "bench": _bench,
}
_VIEW = {"plane": [0, 1], "mug": [0, 2]}  # axes of the projection
_SYMMETRY = {"table": 2, "lamp": 0, "bottle": 0}
