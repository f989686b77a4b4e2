"""Procedural shapes: reproducible, centered, on their surfaces, with parts, normals and broken symmetries."""

import numpy as np
import pytest

from mlcollage.data import procedural_shapes
from mlcollage.data._meshes import box, face_normals, sample_surface, turned
from mlcollage.data.shapes import SHAPES
from mlcollage.errors import InvalidInput, UnknownName


def test_all_categories_in_both_dimensions():
    for dim in (2, 3):
        shapes = procedural_shapes(tuple(SHAPES), 16, 200, dim=dim)
        assert shapes.points.shape == (16, 200, dim)
        assert np.isfinite(shapes.points).all()
        assert (shapes.normals is None) == (dim == 2)
        assert np.linalg.norm(shapes.points, axis=-1).max() <= 1 + 1e-6
        for i in range(16):
            names = shapes.part_names[shapes.categories[shapes.labels[i]]]
            assert shapes.parts[i].max() < len(names)
            assert len(np.unique(shapes.parts[i])) >= 2


def test_the_same_seed_gives_the_same_shapes_however_many():
    few, many = (procedural_shapes(("plane", "mug"), n, 30, seed=3) for n in (6, 300))
    assert np.array_equal(few.points, many.points[:6])
    assert not np.array_equal(few.points, procedural_shapes(("plane", "mug"), 6, 30, seed=4).points)
    assert len(np.unique(many.points[:, 0].round(6), axis=0)) == 300


def test_points_are_uniform_on_a_box():
    rng = np.random.default_rng(0)
    solid = box(np.zeros((2, 3)), np.array([[1.0, 1, 1], [1, 2, 3]]))
    points, face = sample_surface(solid.corners, solid.faces, 6000, rng)
    assert np.allclose(np.abs(points[0]).max(-1), 1)
    areas = np.array([3 * 2, 3 * 1, 2 * 1]) / 11  # of the pairs of sides along x, y, z
    for axis, half in enumerate((1, 2, 3)):
        share = np.isclose(np.abs(points[1, :, axis]), half).mean()
        assert share == pytest.approx(areas[axis], abs=0.01)
    # Any beginning of the points covers the surface too.
    assert (points[0, :500, 2] > 0).mean() == pytest.approx(0.5, abs=0.08)
    normals = face_normals(solid.corners, solid.faces, face)
    assert (np.einsum("snd,snd->sn", normals, points) > 0).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_surfaces_of_revolution(axis):
    solid = turned(np.array([[1.0, 1.0]]), np.array([[0.0, 2.0]]), sides=200, axis=axis)
    points, face = sample_surface(solid.corners, solid.faces, 500, np.random.default_rng(0))
    others = [i for i in range(3) if i != axis]
    assert np.allclose(np.linalg.norm(points[0][:, others], axis=1), 1, atol=1e-3)
    assert points[0][:, axis].min() >= 0
    normals = face_normals(solid.corners, solid.faces, face)[0]
    assert (np.abs(np.einsum("nd,nd->n", normals[:, others], points[0][:, others])) > 0.9).all()


def test_symmetries_and_how_they_are_broken():
    plain, broken = (procedural_shapes("bottle", 3, 4000, asymmetric=a) for a in (False, True))
    assert plain.symmetry["bottle"].order == 0
    assert broken.symmetry["bottle"].order == 1
    assert "tag" in broken.part_names["bottle"]

    def lopsided(x):  # difference of extents to both sides
        return np.abs(x[..., 0].max(1) + x[..., 0].min(1)).max()

    center = plain.points.mean(1)
    assert np.abs(center[:, :2]).max() < 0.05
    tagged = broken.points[np.arange(3)][:, :, 0]
    assert (tagged[broken.parts == 3] > 0).all()
    assert lopsided(plain.points) < 0.05


def test_what_is_refused():
    with pytest.raises(UnknownName, match="category"):
        procedural_shapes("boat")
    with pytest.raises(InvalidInput, match="no categories"):
        procedural_shapes(())
    with pytest.raises(InvalidInput, match="dim"):
        procedural_shapes("plane", dim=4)
    with pytest.raises(InvalidInput, match="n_shapes"):
        procedural_shapes("plane", 0)
