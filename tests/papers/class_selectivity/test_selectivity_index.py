"""The index against its formula, known cases and brute force; its biases and intervals against simulation."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize, stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlcollage.errors import InvalidInput
from mlcollage.nn.init import seeded
from mlcollage.papers.class_selectivity import SelectivityRegularizer, measure_selectivity, selectivity_index


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
    measure_selectivity(model, blobs, debias="cross_fit", ci=True)
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


NOISE = {
    "normal": lambda g, n, u: (3 + torch.randn(n, u, generator=g)).clamp(min=0),
    "exponential": lambda g, n, u: -torch.log(torch.rand(n, u, generator=g)),
    "rectified": lambda g, n, u: (torch.randn(n, u, generator=g) - 0.5).relu(),
}


def responses(noise, classes, per_class, effect, units=100, seed=0):
    """Units whose mean response to class 0 is 1 + ``effect`` times that to all others, and their index."""
    y = torch.arange(classes * per_class) % classes
    x = NOISE[noise](torch.Generator().manual_seed(seed), len(y), units)
    return (x * (1 + effect * (y[:, None] == 0)), y), effect / (2 + effect)


@pytest.mark.filterwarnings("ignore:with .* samples per class")
@pytest.mark.parametrize(
    ("noise", "classes", "per_class"),
    [
        ("normal", 100, 20),
        ("normal", 10, 5),
        ("exponential", 10, 20),
        ("exponential", 40, 10),
        ("rectified", 10, 50),
    ],
)
def test_noise_has_no_selectivity_once_it_is_debiased_and_its_interval_covers_0(noise, classes, per_class):
    model = nn.Sequential(nn.ReLU())
    values, plain, covered = [], [], []
    for seed in range(3):
        data, _ = responses(noise, classes, per_class, 0.0, seed=seed)
        plain.append(measure_selectivity(model, data).mean)
        units = measure_selectivity(model, data, debias="cross_fit", ci=True, generator=seed).per_unit
        values += units["si"].tolist()
        covered += ((units["lo"] <= 0) & (units["hi"] >= 0)).tolist()
    assert np.mean(plain) > 0.08
    assert abs(np.mean(values)) < max(0.01, 3 * np.std(values) / np.sqrt(len(values)))
    assert np.mean(covered) > 0.95
    # What the report says of units without preference is what the plain index makes of them.
    assert units["floor"].mean() == pytest.approx(np.mean(plain), rel=0.2)


@pytest.mark.parametrize("per_class", [2, 3, 5])
def test_noise_of_a_few_skewed_samples_has_no_selectivity_once_it_is_debiased(per_class):
    draw = torch.Generator().manual_seed(per_class)
    y = torch.arange(10).repeat_interleave(per_class)
    # Products of exponential variables: most are small, a few are large.
    x = torch.rand(2, len(y), 4000, generator=draw).log().prod(0)
    with pytest.warns(UserWarning, match=f"with {per_class} samples per class .* hardly tell which class"):
        units = measure_selectivity(nn.Sequential(nn.ReLU()), (x, y), debias="cross_fit").per_unit
    assert abs(units["si"].mean()) < 2.5 * units["si"].std() / np.sqrt(len(units))


@pytest.mark.parametrize(
    ("noise", "classes", "per_class", "effect"),
    [
        ("normal", 100, 20, 1.0),
        ("normal", 10, 50, 0.3),
        ("exponential", 10, 250, 1.0),
        ("exponential", 10, 100, 4.0),
        ("rectified", 10, 250, 4.0),
    ],
)
def test_selectivity_that_is_there_stays_and_is_covered(noise, classes, per_class, effect):
    values, covered = [], []
    for seed in range(2):
        data, truth = responses(noise, classes, per_class, effect, seed=10 + seed)
        units = measure_selectivity(
            nn.Sequential(nn.ReLU()), data, debias="cross_fit", ci=True, generator=seed
        ).per_unit
        values += units["si"].tolist()
        covered += ((units["lo"] <= truth) & (units["hi"] >= truth)).tolist()
        assert (units["lo"] <= units["hi"]).all()
    assert np.mean(values) == pytest.approx(truth, abs=0.015)
    assert 0.9 <= np.mean(covered) <= 1.0


def test_cross_fitting_by_brute_force():
    (x, y), _ = responses("exponential", 4, 10, 1.0, units=6)
    report = measure_selectivity(nn.Sequential(nn.ReLU()), (x, y), debias="cross_fit", generator=3)
    first = torch.randint(5, (4,), generator=torch.Generator().manual_seed(3))
    fold = torch.stack([(first[c] + torch.arange(10)) % 5 for c in range(4)], 1).flatten()  # y is 0, 1, 2, 3, 0, ...
    x, expected = x.double().numpy(), np.zeros(6)
    for k in range(5):
        for u in range(6):
            train = [x[(y == c) & (fold != k), u] for c in range(4)]
            held = [x[(y == c) & (fold == k), u].mean() for c in range(4)]
            best = int(np.argmax([t.mean() for t in train]))
            rest, own_rest = (np.delete(m, best).mean() for m in ([t.mean() for t in train], held))
            size = train[best].mean() + rest + 1e-6
            error = train[best].var(ddof=1) / len(train[best]) / size**2
            expected[u] += (held[best] - own_rest) / size / (1 + error) / 5
    np.testing.assert_allclose(report.per_unit["si"], expected, rtol=1e-9)


def test_fiellers_interval_is_where_the_test_of_the_contrast_does_not_reject():
    (x, y), _ = responses("normal", 3, 30, 2.0, units=5)
    units = measure_selectivity(nn.Sequential(nn.ReLU()), (x, y), ci=True).per_unit
    for u, row in units.iterrows():
        groups = [x[y == c, u].double().numpy() for c in range(3)]
        z = stats.t.ppf(0.975, 29)  # one class alone can be the preferred one

        def rejects(s, groups=groups, z=z):
            rest = (groups[1].mean() + groups[2].mean()) / 2
            errors = [g.var(ddof=1) / 30 for g in groups]
            size = (1 - s) ** 2 * errors[0] + (1 + s) ** 2 * (errors[1] + errors[2]) / 4
            return abs((1 - s) * groups[0].mean() - (1 + s) * rest) / np.sqrt(size) - z

        assert optimize.brentq(rejects, -0.5, row["si"]) == pytest.approx(row["lo"], abs=1e-6)
        assert optimize.brentq(rejects, row["si"], 0.99) == pytest.approx(row["hi"], abs=1e-6)


def test_few_samples_per_class_are_said():
    data, _ = responses("normal", 100, 20, 0.0)
    with pytest.warns(
        UserWarning, match=r"with 20 samples per class .* expected to be 0\.08\d.*: take more samples, or debias"
    ):
        measure_selectivity(nn.Sequential(nn.ReLU()), data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure_selectivity(nn.Sequential(nn.ReLU()), data, debias="cross_fit")
        measure_selectivity(nn.Sequential(nn.ReLU()), responses("normal", 10, 50, 1.0)[0])


def test_one_sign_policy_in_the_measure_and_in_the_regularizer(images):
    """Responses are looked at one by one, not their means over space, which may hide a negative one."""
    x, y = images
    with seeded(0), torch.no_grad():
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU())
        model[0].bias.fill_(1.0)  # means over space are positive
    assert model(x).mean((2, 3)).min() > 0 > model(x).min()
    with SelectivityRegularizer(model, -1.0, "1", exclude_output=False) as penalty:
        model(x)
        with pytest.raises(InvalidInput, match="layer '1' has min -0"):
            penalty(y)
    with pytest.raises(InvalidInput, match="layer '1' has min -0"):
        measure_selectivity(model, images, "1")
    with pytest.raises(InvalidInput, match=r"0 / 0.* use negative='relu' or 'abs'"):
        measure_selectivity(
            nn.Sequential(nn.Linear(5, 4)), (torch.randn(60, 5), y[:60]), "0", negative="shift", ci=True
        )


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
    with pytest.raises(InvalidInput, match=r"debias must be one of .*, not 'jackknife'"):
        measure_selectivity(mlp, blobs, debias="jackknife")
    with pytest.raises(InvalidInput, match=r"reduce must be one of .*, not 'max'"):
        measure_selectivity(mlp, blobs, reduce="max")
    with pytest.raises(InvalidInput, match=r"must be a pair .* targets are needed"):
        measure_selectivity(mlp, [x])
    with pytest.raises(InvalidInput, match="no batch"):
        measure_selectivity(mlp, [], num_classes=2)
    with pytest.raises(InvalidInput, match="in several folds"):
        measure_selectivity(mlp, (x[:3], y[:3]), debias="cross_fit")
    with pytest.raises(InvalidInput, match="choose layers with feature maps"):
        measure_selectivity(mlp, (x, y[:, None].expand(-1, 4)))
