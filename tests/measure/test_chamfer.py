"""Chamfer distance: against brute force and the official numbers, in every convention, with padding and weights."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from mlcollage.errors import InvalidInput
from mlcollage.measure import chamfer_distance, nearest_neighbors

BACKENDS = ["dense", "chunked", "kdtree"]
X, Y = torch.tensor([[0.0, 0, 0]]), torch.tensor([[3.0, 0, 0], [0, 4, 0]])


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [2, 3])
def test_it_is_the_kd_trees(backend, dim):
    x, y = cloud(3, 40, dim), cloud(3, 25, dim, seed=1)
    found = chamfer_distance(x, y, backend=backend, batch_reduction="none", return_indices=True)
    for i in range(3):
        there, to_y = cKDTree(y[i].numpy()).query(x[i].numpy())
        back, to_x = cKDTree(x[i].numpy()).query(y[i].numpy())
        assert float(found.value[i]) == pytest.approx((there**2).mean() + (back**2).mean(), rel=1e-12)
        assert (found.x_to_y[i].numpy() == to_y).all()
        assert (found.y_to_x[i].numpy() == to_x).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["d3", "d2", "equal", "perm", "far"])
def test_official_numbers(official_capsules, backend, case):
    d = {k.removeprefix(case + "_"): torch.from_numpy(v) for k, v in official_capsules("chamfer").items() if case in k}
    x, y = d["x"].requires_grad_(), d["y"].requires_grad_()
    each = chamfer_distance(x, y, backend=backend, batch_reduction="none")
    assert torch.allclose(each, d["both_per_cloud"], rtol=1e-12, atol=4e-13)
    for direction, name in (("both", "both"), ("y_to_x", "left"), ("x_to_y", "right")):
        value = chamfer_distance(x, y, direction=direction, backend=backend)
        assert torch.allclose(value, d[name], rtol=1e-12, atol=4e-13)
        single = chamfer_distance(x.float(), y.float(), direction=direction, backend=backend)
        assert float(single.detach()) == pytest.approx(float(d[name].detach()), rel=2e-6, abs=2e-7)
    if "grad_x" in d:
        for grad, name in zip(torch.autograd.grad(each.mean(), (x, y)), "xy", strict=True):
            assert torch.allclose(grad, d[f"grad_{name}"], atol=1e-14)


def test_each_convention_by_its_name():
    values = {
        21.5: {},
        6.5: {"squared": False},
        34.0: {"point_reduction": "sum"},
        9.0: {"direction": "x_to_y"},
        12.5: {"direction": "y_to_x"},
    }
    for value, how in values.items():
        assert float(chamfer_distance(X, Y, **how)) == pytest.approx(value)
    there, back = chamfer_distance(X, Y, point_reduction="none")
    assert there.tolist() == [9.0]
    assert back.tolist() == [9.0, 16.0]


def test_equal_clouds_far_from_the_origin_have_distance_zero():
    x = 100 + 0.01 * cloud(256, 3).float()
    for backend in BACKENDS:
        x.requires_grad_()
        for squared in (True, False):
            value = chamfer_distance(x, x.detach()[torch.randperm(256)], squared=squared, backend=backend)
            assert float(value.detach()) == 0
            assert torch.equal(torch.autograd.grad(value, x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fill", [0.0, 1e6, math.nan])
def test_padding_counts_for_nothing(backend, fill):
    x, y = cloud(2, 9, 3), cloud(2, 7, 3, seed=1)
    alone = torch.stack([chamfer_distance(x[0, :5], y[0, :7]), chamfer_distance(x[1], y[1, :3])])
    lengths = torch.tensor([5, 9]), torch.tensor([7, 3])
    padded_x, padded_y = x.clone(), y.clone()
    padded_x[0, 5:], padded_y[1, 3:] = fill, fill
    padded_x.requires_grad_()
    value = chamfer_distance(
        padded_x, padded_y, x_lengths=lengths[0], y_lengths=lengths[1], batch_reduction="none", backend=backend
    )
    assert torch.allclose(value, alone, rtol=1e-12)
    assert torch.equal(torch.autograd.grad(value.sum(), padded_x)[0][0, 5:], torch.zeros(4, 3, dtype=torch.float64))


def test_clouds_count_alike_whatever_their_size():
    x = torch.zeros(2, 3, 3)
    y = torch.zeros(2, 1, 3)
    y[0, 0, 0], y[1, 0, 0] = 1.0, 3.0
    value = chamfer_distance(x, y, x_lengths=torch.tensor([1, 3]), direction="x_to_y")
    assert float(value) == pytest.approx(5.0)  # (1 + 9) / 2, not (1 + 9 + 9 + 9) / 4


def test_weights():
    x, y = cloud(1, 6, 3), cloud(1, 4, 3, seed=1)
    w = torch.rand(1, 6, dtype=torch.float64) + 0.1
    d, _ = chamfer_distance(x, y, point_reduction="none")
    expected = (w * d).sum() / w.sum()
    assert torch.allclose(chamfer_distance(x, y, x_weights=w, direction="x_to_y"), expected)
    without = torch.tensor([[1.0, 1, 1, 1, 0, 0]], dtype=torch.float64)
    assert torch.allclose(
        chamfer_distance(x, y, x_weights=without, direction="x_to_y"),
        chamfer_distance(x[:, :4], y, direction="x_to_y"),
    )


def test_the_gradient_is_that_of_finite_differences():
    x, y = cloud(2, 5, 3).requires_grad_(), cloud(2, 4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: chamfer_distance(a, b), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: chamfer_distance(a, b, squared=False), (x, y))


def test_chunks_are_the_whole(monkeypatch):
    monkeypatch.setattr("mlcollage.measure.chamfer._BLOCK", 64)
    x, y = cloud(2, 33, 3), cloud(2, 20, 3, seed=1)
    assert torch.equal(nearest_neighbors(x, y, backend="chunked"), nearest_neighbors(x, y, backend="dense"))


def test_half_precision_is_computed_in_single():
    x, y = cloud(1, 30, 3), cloud(1, 30, 3, seed=1)
    half = chamfer_distance(x.half(), y.half())
    assert half.dtype == torch.float16
    assert float(half) == pytest.approx(float(chamfer_distance(x.half().double(), y.half().double())), rel=1e-3)


def test_what_is_refused():
    x = cloud(2, 9, 3)
    bad = x.clone()
    bad[1, 0, 0] = math.nan
    for wrong, how, words in (
        ((x, x[:1]), {}, "agree"),
        ((x, x.float()), {}, "agree"),
        ((x.long(), x.long()), {}, "floating"),
        ((x[:, :0], x), {}, "no points"),
        ((x, bad), {}, "cloud 1"),
        ((x.transpose(1, 2), x.transpose(1, 2)), {}, "coordinates first"),
        ((x, x), {"x_lengths": torch.tensor([10, 3])}, "between 1 and 9"),
        ((x, x), {"x_lengths": torch.tensor([0, 3])}, "between 1 and 9"),
        ((x, x), {"x_lengths": torch.tensor([3])}, "whole numbers"),
        ((x, x), {"x_weights": -torch.ones(2, 9)}, "at least 0"),
        ((x, x), {"direction": "left"}, "direction"),
        ((x, x), {"backend": "gpu"}, "backend"),
        ((x.numpy(), x), {}, "floating"),
    ):
        with pytest.raises(InvalidInput, match=words):
            chamfer_distance(*wrong, **how)


def test_other_strides_give_the_same_number():
    x, y = cloud(2, 9, 3), cloud(2, 7, 3, seed=1)
    strided = torch.from_numpy(np.asfortranarray(x.numpy()))
    assert torch.equal(chamfer_distance(strided, y), chamfer_distance(x, y))


def test_two_points_in_space_are_a_cloud():
    x, y = cloud(1, 2, 3), cloud(1, 2, 3, seed=1)
    d = torch.cdist(x, y)[0] ** 2
    assert float(chamfer_distance(x, y)) == pytest.approx(float(d.min(0).values.mean() + d.min(1).values.mean()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbors_of_single_and_padded_clouds(backend):
    x, y = cloud(7, 3), cloud(9, 3, seed=1)
    found = nearest_neighbors(x, y, backend=backend)
    assert torch.equal(found, torch.cdist(x, y).argmin(1))
    padded = torch.cat([y, torch.full((2, 3), math.nan, dtype=y.dtype)])
    real = torch.arange(11) < 9
    assert torch.equal(nearest_neighbors(x, padded, y_real=real, backend=backend), found)


def test_weights_at_padding_may_hold_anything():
    weights = torch.tensor([[1.0, 2.0, math.nan]])
    x, y = torch.tensor([[[0.0], [1.0], [9.0]]]), torch.tensor([[[0.0]]])
    found = chamfer_distance(x, y, x_lengths=torch.tensor([2]), x_weights=weights, direction="x_to_y")
    assert float(found) == pytest.approx(2 / 3)


def test_masks_and_backends_of_neighbors_are_checked():
    x = cloud(1, 4, 3)
    with pytest.raises(InvalidInput, match="backend"):
        nearest_neighbors(x, x, backend="tree")
    with pytest.raises(InvalidInput, match="y_real must be boolean"):
        nearest_neighbors(x, x, y_real=torch.ones(1, 4))
    with pytest.raises(InvalidInput, match="leaves no point"):
        nearest_neighbors(x, x, y_real=torch.zeros(1, 4, dtype=torch.bool))
