"""The index against its formula, known cases and brute force; its biases and intervals against simulation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlcollage.errors import InvalidInput
from mlcollage.papers.class_selectivity import measure_selectivity, selectivity_index


def by_hand(means, eps=1e-6):
    out = []
    for column in np.asarray(means, dtype=float).T:
        top = column.argmax()
        rest = np.delete(column, top).mean()
        out.append((column[top] - rest) / (column[top] + rest + eps))
    return np.array(out)


positive = arrays(np.float64, (4, 6), elements=st.floats(0, 1e3))


@settings(max_examples=50, deadline=None)
@given(positive)
def test_it_is_the_formula_and_lies_between_0_and_1(means):
    index = selectivity_index(torch.tensor(means)).numpy()
    np.testing.assert_allclose(index, by_hand(means), atol=1e-12)
    assert ((index >= -1e-12) & (index <= 1)).all()


def test_known_units():
    same, only, dead = [2.0] * 5, [0, 0, 3.0, 0, 0], [0.0] * 5
    index = selectivity_index(torch.tensor([same, only, dead], dtype=torch.float64).T)
    np.testing.assert_allclose(index, [0, 1, 0], atol=1e-6)


def test_scaling_a_unit_changes_nothing_and_shifting_it_does():
    means = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(selectivity_index(7 * means), selectivity_index(means), atol=1e-5, rtol=0)
    assert (selectivity_index(means + 1) < selectivity_index(means)).all()


def test_classes_without_samples_are_in_neither_mean():
    means = torch.tensor([[4.0], [1.0], [1.0], [torch.nan]])
    assert selectivity_index(means).item() == pytest.approx(0.6, abs=1e-5)
    zeros = torch.tensor([[4.0], [1.0], [1.0], [0.0]])
    assert selectivity_index(zeros, torch.tensor([5, 5, 5, 0])).item() == pytest.approx(0.6, abs=1e-5)
    assert selectivity_index(zeros).item() > 0.65


def test_gradients_agree_with_finite_differences():
    means = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(selectivity_index, (means,), eps=1e-7)


def test_sign_policies():
    means = torch.tensor([[-1.0, 1.0], [3.0, 2.0]], dtype=torch.float64)
    with pytest.raises(InvalidInput, match=r"has min -1; the selectivity index needs non-negative"):
        selectivity_index(means)
    expected = {"shift": [[0.0, 1.0], [4.0, 2.0]], "abs": [[1.0, 1.0], [3.0, 2.0]], "relu": [[0.0, 1.0], [3.0, 2.0]]}
    for policy, transformed in expected.items():
        np.testing.assert_allclose(selectivity_index(means, negative=policy), by_hand(transformed))


def test_bad_means():
    for means, counts, message in [
        (torch.rand(1, 3), None, "at least 2 classes"),
        (torch.rand(2, 3), torch.tensor([1, 0]), "at least 2 classes"),
        (torch.rand(2, 3), torch.ones(3), "one number for each of 2"),
        (torch.rand(3), None, r"\(classes, units\)"),
        (torch.ones(2, 3, dtype=torch.long), None, "floats"),
        (torch.tensor([[1.0, torch.inf], [1.0, 1.0]]), None, "infinite"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            selectivity_index(means, counts)
    with pytest.raises(InvalidInput, match=r"negative must be one of .*, not 'clip'"):
        selectivity_index(torch.rand(2, 2), negative="clip")


# --- a whole network ------------------------------------------------------------------------------------------------


def test_every_layer_of_a_network_by_brute_force(mlp, blobs):
    x, y = blobs
    report = measure_selectivity(mlp, blobs)
    h = x
    for name, layer in mlp.named_children():
        h = layer(h)
        if isinstance(layer, nn.ReLU):
            means = np.stack([h[y == c].detach().double().mean(0) for c in range(3)])
            mine = report.per_unit[report.per_unit["layer"] == name]
            np.testing.assert_allclose(mine["si"], by_hand(means), atol=1e-9)
            assert mine["best_class"].tolist() == means.argmax(0).tolist()
            np.testing.assert_allclose(mine["mu_max"], means.max(0))
            assert mine["dead"].tolist() == (means.max(0) == 0).tolist()
    assert report.mean == pytest.approx(np.mean([g["si"].mean() for _, g in report.per_unit.groupby("layer")]))
    assert report.per_layer["units"].to_dict() == {"1": 12, "3": 8}
    assert report.counts.tolist() == [100, 100, 100]
    assert "2 layers" in repr(report)
    assert len(report.plot().get_xticks()) == 2


def test_space_is_averaged_after_the_relu(images):
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    x, y = images
    pooled = conv(x).detach().double().mean((2, 3))
    means = np.stack([pooled[y == c].mean(0) for c in range(3)])
    np.testing.assert_allclose(measure_selectivity(conv, images).per_unit["si"], by_hand(means), atol=1e-7)
    every = measure_selectivity(conv, images, reduce="positions")
    np.testing.assert_allclose(every.per_unit["si"], by_hand(means), atol=1e-7)  # all positions are as many


def test_how_data_come_does_not_matter(mlp, blobs):
    expected = measure_selectivity(mlp, blobs).per_unit["si"]
    dataset = TensorDataset(*blobs)
    parts = iter([(blobs[0][:50], blobs[1][:50]), (blobs[0][50:], blobs[1][50:])])
    for data in (dataset, DataLoader(dataset, batch_size=17), parts):
        np.testing.assert_allclose(measure_selectivity(mlp, data).per_unit["si"], expected, atol=1e-12)


def test_the_network_is_left_as_it_was(blobs):
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    measure_selectivity(model, blobs, debias="split", ci="bootstrap")
    assert model.training
    assert not model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model[2]._forward_hooks


def test_each_call_of_a_shared_relu_is_a_layer(shared_relu, images):
    report = measure_selectivity(shared_relu, images)
    assert list(report.per_layer.index) == ["relu", "relu#1"]


def test_labels_of_pixels_follow_each_layers_grid():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1), nn.ReLU())
    x, y = torch.rand(4, 1, 6, 6, generator=g), torch.randint(2, (4, 6, 6), generator=g)
    report = measure_selectivity(model, (x, y))
    first, last = model[:2](x).detach(), model(x).detach()
    for layer, h, labels in (("1", first, y), ("4", last, y[:, ::2, ::2])):
        rows = h.movedim(1, -1).flatten(0, -2).double()
        means = np.stack([rows[labels.flatten() == c].mean(0) for c in range(2)])
        mine = report.per_unit[report.per_unit["layer"] == layer]
        np.testing.assert_allclose(mine["si"], by_hand(means), atol=1e-7)


def test_soft_targets_are_weights(mlp, blobs):
    x, y = blobs
    hard = measure_selectivity(mlp, (x, y)).per_unit["si"]
    np.testing.assert_allclose(measure_selectivity(mlp, (x, torch.eye(3)[y])).per_unit["si"], hard, atol=1e-9)
    smooth = measure_selectivity(mlp, (x, 0.7 * torch.eye(3)[y] + 0.1)).per_unit["si"]
    assert (smooth <= hard + 1e-9).all()


def noise_units(n, seed, units=60, classes=10, effect=0.0):
    """Units without preference, or whose preferred class has a mean larger by ``effect``: exponential noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = -torch.log(torch.rand(n, units, generator=g))
    x[:, :] *= 1 + effect * (y[:, None] == torch.arange(units) % classes)
    return x, y


def test_the_plain_index_is_biased_upwards_and_splitting_takes_the_bias_off():
    model = nn.Sequential(nn.ReLU())
    plain, split, jack = (
        np.mean([measure_selectivity(model, noise_units(400, s), debias=d).mean for s in range(8)])
        for d in (None, "split", "jackknife")
    )
    assert plain > 0.1
    assert abs(split) < 0.02
    assert abs(jack) < 0.7 * plain


def test_with_a_clear_preference_all_three_agree():
    model, data = nn.Sequential(nn.ReLU()), noise_units(20_000, 0, effect=2.0)
    values = [measure_selectivity(model, data, debias=d).mean for d in (None, "split", "jackknife")]
    assert values == pytest.approx([0.5] * 3, abs=0.01)


def test_intervals_cover_units_that_have_a_preference():
    model = nn.Sequential(nn.ReLU())
    hits = []
    for seed in range(10):
        units = measure_selectivity(model, noise_units(1000, seed, effect=2.0), ci="bootstrap", generator=seed).per_unit
        hits += [((units["lo"] <= 0.5) & (units["hi"] >= 0.5)).mean()]
        assert (units["lo"] <= units["si"]).all()
        assert (units["si"] <= units["hi"]).all()
    assert 0.9 <= np.mean(hits) <= 0.99


def test_bad_networks_and_data(mlp, blobs):
    x, y = blobs
    gelu = nn.Sequential(nn.Linear(5, 4), nn.GELU())
    with pytest.raises(InvalidInput, match=r"layer '1' has min -0\.\d+; the selectivity index needs non-negative"):
        measure_selectivity(gelu, blobs, "1")
    for policy in ("relu", "abs", "shift"):
        assert 0 <= measure_selectivity(gelu, blobs, "1", negative=policy).mean <= 1
    with pytest.raises(InvalidInput, match=r"layer '1': .*NaN"):
        measure_selectivity(mlp, (x * torch.nan, y))
    with pytest.raises(InvalidInput, match="there are 300 inputs and 299 targets"):
        measure_selectivity(mlp, (x, y[1:]))
    with pytest.raises(InvalidInput, match="at least 2 classes; the data hold 1"):
        measure_selectivity(mlp, (x, y * 0))
    with pytest.raises(InvalidInput, match="at least 2 classes with samples"):
        measure_selectivity(mlp, (x, y * 0), num_classes=3)
    with pytest.raises(InvalidInput, match="num_classes=2 allows"):
        measure_selectivity(mlp, (x, y), num_classes=2)
    with pytest.raises(InvalidInput, match="no module of type ReLU"):
        measure_selectivity(gelu, blobs)
    with pytest.raises(InvalidInput, match=r"debias must be one of .*, not 'half'"):
        measure_selectivity(mlp, blobs, debias="half")
    with pytest.raises(InvalidInput, match=r"reduce must be one of .*, not 'max'"):
        measure_selectivity(mlp, blobs, reduce="max")
    with pytest.raises(InvalidInput, match="must be a pair of tensors"):
        measure_selectivity(mlp, [x])
    with pytest.raises(InvalidInput, match="no batch"):
        measure_selectivity(mlp, [], num_classes=2)
    with pytest.raises(InvalidInput, match="both halves"):
        measure_selectivity(mlp, (x[:2], y[:2]), debias="split")
    with pytest.raises(InvalidInput, match="choose layers with feature maps"):
        measure_selectivity(mlp, (x, y[:, None].expand(-1, 4)))
