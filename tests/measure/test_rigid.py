"""Rigid motions: the best one against SciPy and the official numbers, its gradient, random ones, and angles."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from mlcollage.errors import InvalidInput
from mlcollage.measure import (
    RigidTransform,
    mean_rotation,
    procrustes,
    random_rotation,
    rotation_angle,
    symmetric_angle,
)
from mlcollage.measure.rigid import _official

TETRAHEDRON = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=draw(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["noisy", "planar", "reflected", "weighted"])
def test_the_best_rotation_is_scipys(kind):
    for seed in range(5):
        p, noise, w = cloud(7, 3, seed=seed), cloud(7, 3, seed=100 + seed), torch.ones(7, dtype=torch.float64)
        if kind == "planar":
            p[:, 2] = 0
        q = p @ random_rotation(1, generator=draw(seed), dtype=torch.float64)[0].T + 0.1 * noise
        if kind == "reflected":
            q = q * torch.tensor([1.0, 1, -1], dtype=torch.float64)
        if kind == "weighted":
            w = torch.rand(7, generator=draw(seed), dtype=torch.float64)
        found = procrustes(p, q, w)
        share = (w / w.sum())[:, None]
        centered = [(x - (share * x).sum(0)).numpy() for x in (p, q)]
        expected, root = Rotation.align_vectors(centered[1], centered[0], weights=w.numpy())
        np.testing.assert_allclose(found.R.numpy(), expected.as_matrix(), atol=1e-9)
        assert float(found.residual) == pytest.approx(root**2 / float(w.sum()), rel=1e-8)
        assert torch.linalg.det(found.R).item() == pytest.approx(1)
        assert bool(found.mirrored) == (kind == "reflected")


def test_a_batch_is_its_items():
    p, q = cloud(4, 6, 3), cloud(4, 6, 3, seed=1)
    q[1] = p[1] * torch.tensor([1.0, 1, -1], dtype=torch.float64)  # a mirror image is one item's own
    whole = procrustes(p, q)
    for i in range(4):
        assert torch.allclose(whole.R[i], procrustes(p[i], q[i]).R, atol=1e-12)
    assert whole.mirrored[1]


def test_a_mirror_image_is_not_flipped_in_silence():
    p = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]], dtype=torch.float64)
    q = p * torch.tensor([1.0, 1, -1], dtype=torch.float64)
    found = procrustes(p, q)
    assert math.sqrt(found.residual) == pytest.approx(0.6713, abs=1e-4)
    assert found.mirrored
    free = procrustes(p, q, allow_reflection=True)
    assert float(free.residual) < 1e-20
    assert torch.linalg.det(free.R).item() == pytest.approx(-1)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_gradient_is_that_of_finite_differences(dim):
    p, q = (cloud(3, 5, dim, seed=s).requires_grad_() for s in (0, 1))
    w = torch.rand(3, 5, generator=draw(), dtype=torch.float64).requires_grad_()

    def motion(p, q, w):
        found = procrustes(p, q, w)
        return found.R, found.t, found.residual

    assert torch.autograd.gradcheck(motion, (p, q, w))
    assert torch.autograd.gradgradcheck(motion, (p, q, w))


def test_equal_singular_values_have_a_gradient():
    target = TETRAHEDRON.clone().requires_grad_()
    (grad,) = torch.autograd.grad(procrustes(TETRAHEDRON, target).R[0, 1], target)
    expected = torch.tensor([[1.0, -1, 0], [-1, -1, 0], [1, 1, 0], [-1, 1, 0]], dtype=torch.float64) / 8
    assert torch.allclose(grad, expected, atol=1e-12)


@pytest.mark.parametrize(
    "p",
    [torch.zeros(5, 3), torch.arange(5.0)[:, None] * torch.ones(3), 7 + 0 * torch.zeros(5, 3)],
    ids=["zero", "line", "one place"],
)
def test_where_no_rotation_is_determined(p):
    p = p.double().requires_grad_()
    q = cloud(5, 3)
    found = procrustes(p, q)
    assert not found.defined
    assert torch.equal(found.R, torch.eye(3, dtype=torch.float64))
    assert float(found.condition) < 1e-6
    (grad,) = torch.autograd.grad(found.R.sum() + found.t.sum(), p)
    assert grad.isfinite().all()


def test_the_gradient_works_under_vmap():
    p, q = cloud(4, 6, 3), cloud(4, 6, 3, seed=1)

    def entry(p, q):
        return procrustes(p, q, check=False).R[0, 1]

    each = torch.stack([torch.func.grad(entry)(a, b) for a, b in zip(p, q, strict=True)])
    assert torch.allclose(torch.func.vmap(torch.func.grad(entry))(p, q), each, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_and_autocast(dtype):
    p = TETRAHEDRON.to(dtype)
    found = procrustes(p, p)
    assert found.R.dtype == found.t.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = procrustes(TETRAHEDRON.float() + 100, TETRAHEDRON.float() + 100)
    assert inside.R.dtype == torch.float32
    assert torch.allclose(inside.R, torch.eye(3), atol=1e-6)


def test_official_motions(official_capsules):
    d = official_capsules("procrustes")
    for dim in ("d3", "d2"):
        get = {k.removeprefix(dim + "_"): torch.from_numpy(v) for k, v in d.items() if v.dtype.kind == "f" and dim in k}
        p, q = get["source"].requires_grad_(), get["target"].requires_grad_()
        found = procrustes(p, q, get["weights"])
        for name in ("R", "t", "residual"):
            assert torch.allclose(getattr(found, name), get[name], atol=1e-13, rtol=1e-13)
        loss = (found.R * get["cot_R"]).sum() + (found.t * get["cot_t"]).sum()
        for grad, name in zip(torch.autograd.grad(loss, (p, q)), ("source", "target"), strict=True):
            expected = get[f"grad_{name}"]
            assert float((grad - expected).abs().max() / expected.abs().max().clamp_min(1)) < 1e-13


def test_what_is_refused():
    p = cloud(2, 4, 3)
    for wrong, words in (
        ((p, p[:1]), "partners"),
        ((p[..., :1], p[..., :1]), "K, 2"),
        ((p.long(), p.long()), "floating"),
        ((p[:, :1], p[:, :1]), "two points"),
        ((p, p * torch.tensor([[[1.0]], [[math.nan]]])), "item 1"),
        ((p, p, -torch.ones(2, 4, dtype=torch.float64)), "at least 0"),
        ((p, p, torch.zeros(2, 4, dtype=torch.float64)), "above 0"),
        ((p, p, torch.ones(4)), "weights"),
    ):
        with pytest.raises(InvalidInput, match=words):
            procrustes(*wrong)


def test_motions_compose_and_invert():
    a, b = (RigidTransform(random_rotation(2, generator=draw(s)).double(), cloud(2, 3, seed=s)) for s in (0, 1))
    x = cloud(2, 9, 3)
    assert torch.allclose(a.after(b).apply(x), a.apply(b.apply(x)))
    assert torch.allclose(a.inverse().apply(a.apply(x)), x, atol=1e-6)
    column = torch.cat([x[0, 0], torch.ones(1, dtype=torch.float64)])
    assert torch.allclose((a.matrix()[0] @ column)[:3], a.apply(x)[0, 0])
    z = RigidTransform(torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]), torch.zeros(3))
    assert z.apply(torch.tensor([[1.0, 0, 0]])).tolist() == [[0, 1, 0]]


def test_uniform_rotations():
    r = random_rotation(20_000, generator=draw(), dtype=torch.float64)
    assert torch.allclose(r @ r.mT, torch.eye(3, dtype=torch.float64).expand_as(r), atol=1e-12)
    assert float(torch.linalg.det(r).min()) > 0.999
    degrees = torch.rad2deg(rotation_angle(r))
    # The density of the angle is (1 - cos) / pi: mean pi / 2 + 2 / pi.
    assert float(degrees.mean()) == pytest.approx(126.476, abs=0.7)
    assert float((degrees > 90).double().mean()) == pytest.approx(0.5 + 1 / math.pi, abs=0.01)
    assert float(r.mean(0).abs().max()) < 0.02
    again = random_rotation(20_000, generator=draw(), dtype=torch.float64)
    assert torch.equal(r, again)
    plane = random_rotation(5000, 2, generator=draw(), dtype=torch.float64)
    assert float(torch.rad2deg(rotation_angle(plane)).mean()) == pytest.approx(90, abs=2)


def test_the_official_sampler(official_capsules):
    d = {k: torch.from_numpy(v) for k, v in official_capsules("rotation_sampler").items()}
    for limit in (180, 90, 30):
        r = _official(*(d[f"lim{limit}_{n}"] for n in ("normal", "uniform")), d[f"lim{limit}_bit"] > 0, limit)
        assert torch.allclose(r, d[f"lim{limit}_R"], atol=1e-12)
    degrees = torch.rad2deg(rotation_angle(random_rotation(20_000, sampler="official", generator=draw())))
    assert float(degrees.mean()) == pytest.approx(94.746, abs=1.0)
    assert float((degrees > 90).double().mean()) == pytest.approx(0.50757, abs=0.012)
    narrow = random_rotation(500, sampler="official", limit=30, generator=draw(), dtype=torch.float64)
    assert float(torch.rad2deg(rotation_angle(narrow)).max()) < 30 + 1e-6
    with pytest.raises(InvalidInput, match="limit"):
        random_rotation(3, limit=30)
    with pytest.raises(InvalidInput, match="dim"):
        random_rotation(3, 4)


def test_angles():
    small = torch.from_numpy(Rotation.from_rotvec([0, 1e-4, 0]).as_matrix()).float()
    assert float(rotation_angle(small)) == pytest.approx(1e-4, rel=1e-3)
    euler = torch.from_numpy(Rotation.from_euler("zyx", [0, 30, 30], degrees=True).as_matrix())
    assert float(torch.rad2deg(rotation_angle(euler))) == pytest.approx(42.18, abs=0.01)
    half = torch.diag(torch.tensor([-1.0, -1, 1]))
    assert float(torch.rad2deg(rotation_angle(half))) == pytest.approx(180)
    many = random_rotation(50, generator=draw(), dtype=torch.float64)
    expected = Rotation.from_matrix(many.numpy()).magnitude()
    np.testing.assert_allclose(rotation_angle(many).numpy(), expected, atol=1e-9)
    with pytest.raises(InvalidInput):
        rotation_angle(torch.zeros(3))


def test_the_mean_rotation_is_scipys():
    near = Rotation.from_rotvec(0.3 * np.random.default_rng(0).normal(size=(20, 3)))
    expected = near.mean().as_matrix()
    np.testing.assert_allclose(mean_rotation(torch.from_numpy(near.as_matrix())).numpy(), expected, atol=1e-9)
    with pytest.raises(InvalidInput):
        mean_rotation(torch.zeros(0, 3, 3))


def test_other_instruments_name_what_does_not_fit():
    eye = torch.eye(3)
    for call, words in (
        (lambda: rotation_angle(eye, torch.eye(2)), "agree in dimension"),
        (lambda: rotation_angle(eye, eye.double()), "agree in dimension, type"),
        (lambda: rotation_angle(eye.long()), "floating"),
        (lambda: mean_rotation(torch.stack([torch.eye(2), -torch.eye(2)])), "have no mean"),
        (lambda: mean_rotation(torch.full((2, 3, 3), math.nan)), "finite"),
        (lambda: random_rotation(2, dtype=torch.int64), "floating type"),
        (lambda: random_rotation(2, generator=0), "generator"),
        (lambda: procrustes(cloud(5, 3) * 1e200, cloud(5, 3) * 1e200), "overflow"),
    ):
        with pytest.raises(InvalidInput, match=words):
            call()


def about(axis, degrees):
    direction = np.array(axis, dtype=float) / np.linalg.norm(axis)
    return torch.from_numpy(Rotation.from_rotvec(np.radians(degrees) * direction).as_matrix())


def test_symmetric_angles_of_a_bottle_and_a_square_table():
    still = torch.eye(3, dtype=torch.float64)
    bottle = about((0, 0, 1), 120) @ about((1, 0, 0), 10)
    naive, axis = (float(torch.rad2deg(symmetric_angle(still, bottle, n))) for n in (1, 0))
    assert naive == pytest.approx(120.25, abs=0.01)
    assert axis == pytest.approx(10)
    assert float(torch.rad2deg(symmetric_angle(still, about((0, 0, 1), 93), 4))) == pytest.approx(3)


@pytest.mark.parametrize("order", [2, 3, 6])
@pytest.mark.parametrize("axis", [(0, 0, 1), (1, -2, 0.5)])
def test_the_symmetric_angle_is_the_least_over_the_group(order, axis):
    a, b = (random_rotation(20, generator=draw(k), dtype=torch.float64) for k in (1, 2))
    turns = [about(axis, 360 * k / order) for k in range(order)]
    least = torch.stack([rotation_angle(a @ g, b) for g in turns]).amin(0)
    assert torch.allclose(symmetric_angle(a, b, order, axis), least, atol=1e-9)
    assert torch.allclose(symmetric_angle(a, b @ turns[1], order, axis), least, atol=1e-9)
    flat = random_rotation(20, 2, generator=draw(), dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64).expand_as(flat)
    corner = [
        torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        for c, s in ((math.cos(2 * math.pi * k / order), math.sin(2 * math.pi * k / order)) for k in range(order))
    ]
    least = torch.stack([rotation_angle(eye @ g, flat) for g in corner]).amin(0)
    assert torch.allclose(symmetric_angle(eye, flat, order), least, atol=1e-9)


def test_symmetric_angles_refuse_what_is_no_axis_or_order():
    r = torch.eye(3)
    for order, axis, words in ((-1, (0, 0, 1), "order"), (2, (0, 0, 0), "axis"), (0, (1, 2), "axis")):
        with pytest.raises(InvalidInput, match=words):
            symmetric_angle(r, r, order, axis)
