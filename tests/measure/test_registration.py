"""Registration: closest points find small motions, errors are what they say, symmetric objects have several poses."""

import math

import pytest
import torch

from mlcollage.errors import InvalidInput, MissingDependency
from mlcollage.measure import (
    RigidTransform,
    all_poses,
    icp,
    principal_frame,
    random_rotation,
    registration_rmse,
    rotation_angle,
)
from mlcollage.measure.registration import covered


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=draw(seed), dtype=torch.float64) * torch.tensor([1.0, 0.6, 0.3])[: shape[-1]]


def turn(degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)


def test_small_motions_are_found_exactly():
    x = cloud(2, 300, 3)
    true = RigidTransform(turn(8).expand(2, -1, -1), torch.full((2, 3), 0.05, dtype=torch.float64))
    found = icp(x, true.apply(x))
    assert float(registration_rmse(found.transform, true, x).max()) < 1e-9
    assert float(found.rmse.max()) < 1e-9
    assert torch.equal(found.coverage, torch.ones(2, dtype=torch.float64))


def test_a_start_value_is_used_and_half_a_turn_is_not_found_without():
    x = cloud(300, 3)
    true = RigidTransform(turn(180), torch.zeros(3, dtype=torch.float64))
    assert float(icp(x, true.apply(x)).rmse) > 0.01
    near = RigidTransform(turn(172), torch.zeros(3, dtype=torch.float64))
    assert float(icp(x, true.apply(x), near).rmse) < 1e-9


def open3d_stand_in(calls):
    """A module with what is used of Open3D; its iterations are SciPy's tree and decomposition, pair by pair."""
    import types

    import numpy as np
    from scipy.spatial import cKDTree

    def registration_icp(source, target, reach, init, estimation, criteria):
        calls.append((reach, criteria))
        x, y, m = source.points, target.points, init.copy()
        for _ in range(criteria[2]):
            moved = x @ m[:3, :3].T + m[:3, 3]
            d, i = cKDTree(y).query(moved)
            assert d.max() <= reach
            a, b = x - x.mean(0), y[i] - y[i].mean(0)
            u, _, vt = np.linalg.svd(a.T @ b)
            r = vt.T @ np.diag([1, 1, np.linalg.det(vt.T @ u.T)]) @ u.T
            m = np.eye(4)
            m[:3, :3], m[:3, 3] = r, y[i].mean(0) - r @ x.mean(0)
        return types.SimpleNamespace(transformation=m)

    made = types.ModuleType("open3d")
    made.utility = types.SimpleNamespace(Vector3dVector=lambda x: x)
    made.geometry = types.SimpleNamespace(PointCloud=lambda x: types.SimpleNamespace(points=x))
    made.pipelines = types.SimpleNamespace(
        registration=types.SimpleNamespace(
            registration_icp=registration_icp,
            ICPConvergenceCriteria=lambda *a: a,
            TransformationEstimationPointToPoint=lambda scale: scale,
        )
    )
    made.__spec__ = types.SimpleNamespace(name="open3d")
    return made


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_open3d_iterates_where_it_is_asked_to(monkeypatch, offset):
    import sys

    x = cloud(2, 200, 3)
    true = RigidTransform(turn(8).expand(2, -1, -1), torch.full((2, 3), 0.05, dtype=torch.float64))
    y = true.apply(x) + offset
    start = RigidTransform(torch.eye(3, dtype=torch.float64), torch.full((3,), offset, dtype=torch.float64))
    if "open3d" not in sys.modules:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(MissingDependency, match="pip install open3d"):
            icp(x, y, engine="open3d")
        assert icp(x, y, start, engine="auto").steps < 50
    calls = []
    monkeypatch.setitem(sys.modules, "open3d", open3d_stand_in(calls))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for engine in ("open3d", "auto"):
        found, own = icp(x, y, start, engine=engine), icp(x, y, start)
        assert torch.allclose(found.transform.R, own.transform.R, atol=1e-6)
        assert float(registration_rmse(found.transform, own.transform, x).max()) < 1e-6 * max(1, offset * 1e-3)
        assert float(found.rmse.max()) < 1e-6
    assert len(calls) == 4
    assert icp(x[..., :2], y[..., :2] - offset, engine="auto").steps < 50
    with pytest.raises(InvalidInput, match=r"trim=0\.5"):
        icp(x, y, trim=0.5, engine="open3d")


def test_a_part_of_the_target():
    x = cloud(400, 3)
    part = x[x[:, 0] > 0.2]
    moved = RigidTransform(turn(4), torch.full((3,), 0.02, dtype=torch.float64))
    found = icp(x, moved.apply(part), trim=0.35, max_iter=200)
    assert float(found.coverage) < 0.8
    assert float(torch.rad2deg(rotation_angle(found.transform.R, moved.R))) < 1


def test_the_error_is_that_of_moved_points():
    still = RigidTransform(torch.eye(3)[None].double(), torch.zeros(1, 3).double())
    x = torch.tensor([[[1.0, 0, 0], [0, 2, 0]]]).double()
    quarter = RigidTransform(turn(90)[None], torch.zeros(1, 3).double())
    assert float(registration_rmse(quarter, still, x)) == pytest.approx(math.sqrt((2 + 8) / 2))


@pytest.mark.parametrize("dim", [2, 3])
def test_principal_frames_do_not_depend_on_the_pose(dim):
    skewed = cloud(1, 500, dim).exp()
    motion = RigidTransform(random_rotation(1, dim, generator=draw(), dtype=torch.float64), torch.ones(1, dim).double())
    a, b = principal_frame(skewed).apply(skewed), principal_frame(motion.apply(skewed)).apply(motion.apply(skewed))
    assert torch.allclose(a, b, atol=1e-9)
    assert float(torch.linalg.det(principal_frame(skewed).R)) == pytest.approx(1)


def box(n, *sides):
    x = torch.rand(n, 3, generator=draw(), dtype=torch.float64) - 0.5
    return x * torch.tensor(sides, dtype=torch.float64)


def test_a_symmetric_object_has_several_poses():
    still = RigidTransform(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    x, y = box(900, 3.0, 2.0, 1.0), box(900, 3.0, 2.0, 1.0).flip(0)
    poses = all_poses(x, y, still, turns=4, tolerance=2)
    assert len(poses) == 4  # a box of three lengths: the identity and three half turns
    assert [e for _, e in poses] == sorted(e for _, e in poses)
    lopsided = cloud(300, 3).exp()
    assert len(all_poses(lopsided, lopsided, still, turns=4)) == 1


def test_what_is_refused():
    x = cloud(20, 3)
    with pytest.raises(InvalidInput, match="max_iter"):
        icp(x, x, max_iter=0)
    with pytest.raises(InvalidInput, match="trim"):
        icp(x, x, trim=0)
    with pytest.raises(InvalidInput, match="determines no motion"):
        icp(x[:2], x)
    with pytest.raises(InvalidInput, match="single clouds"):
        all_poses(x[None], x[None], RigidTransform(torch.eye(3)[None], torch.zeros(1, 3)))


@pytest.mark.parametrize("unit", [1e-9, 1e-3, 1e3])
def test_the_unit_of_the_clouds_changes_nothing(unit):
    x, y = cloud(200, 3), cloud(200, 3, seed=1) @ turn(20).T
    one, other = icp(x, y), icp(x * unit, y * unit)
    assert one.steps == other.steps
    assert torch.allclose(one.transform.R, other.transform.R, atol=1e-9)
    assert float(other.rmse) / unit == pytest.approx(float(one.rmse), rel=1e-9)


def test_coverage_tells_a_part_from_the_whole_also_in_coordinates_of_a_map():
    x, y = (box(600, 2.0, 1.0, 0.0) if k == 0 else box(1200, 2.0, 1.0, 0.0)[600:] for k in range(2))
    part = y[y[:, 0] > 0]
    for offset in (0.0, 5e6):
        whole, half = (float(covered(x[None] + offset, z[None] + offset)) for z in (y, part))
        assert whole > 0.95
        assert half < 0.65
    assert float(covered(x[None], y[:1][None])) <= 1  # a target of one point has no spacing


def test_clouds_and_starts_that_do_not_fit_are_named():
    x = cloud(20, 3)
    still = RigidTransform(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    flat = RigidTransform(still.R[:2, :2], still.t[:2])
    bad = x.clone()
    bad[3] = math.nan
    for call, words in (
        (lambda: icp(x.numpy(), x), "source must be a floating tensor"),
        (lambda: icp(x, x[None]), "must both be"),
        (lambda: icp(x, x.float()), "one type"),
        (lambda: icp(x, bad), "target holds NaN"),
        (lambda: icp(x[:0], x), "source has no points"),
        (lambda: icp(x, x, flat), "start must be a RigidTransform of 3"),
        (lambda: icp(x, x, (still.R, still.t)), "start must be a RigidTransform"),
        (lambda: icp(x, x, tolerance=-1), "tolerance"),
        (lambda: all_poses(x, x, None), "start must be"),
        (lambda: registration_rmse(still, flat, x), "true must be"),
        (lambda: principal_frame(x), r"points must be a floating tensor \(B, N, D\)"),
        (lambda: principal_frame(bad[None]), "NaN"),
    ):
        with pytest.raises(InvalidInput, match=words):
            call()
