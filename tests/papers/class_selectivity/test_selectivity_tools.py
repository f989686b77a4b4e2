"""Controller, off-axis bound, distance ratio and ablation against constructed truths."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.measure.cca import cca
from mlcollage.nn.init import seeded
from mlcollage.papers.class_selectivity import (
    SelectivityController,
    SelectivityRegularizer,
    ablate_units,
    alpha_schedule,
    cca_distance_ratio,
    class_variance_ratios,
    distance_ratio,
    measure_selectivity,
    off_axis_upper_bound,
    representations,
    selectivity_index,
)

# --- alpha over time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.05, 0.15, 0.5])
def test_the_controller_holds_its_target(blobs, target):
    """The plain network of this problem has an index of about 0.3."""
    x, y = blobs
    with seeded(0):
        model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with SelectivityRegularizer(model, 0.0) as penalty:
        control = SelectivityController(penalty, target)
        for _ in range(300):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + penalty(y)).backward()
            optimizer.step()
            assert control.step() == penalty.alpha
    assert measure_selectivity(model, blobs).mean == pytest.approx(target, abs=0.03)


class Plant:
    """A regularizer whose selectivity follows alpha at once: SI = 0.3 + 0.05 alpha."""

    alpha = 0.0

    @property
    def last(self):
        return {"a": 0.3 + 0.05 * self.alpha}


def test_the_loop_settles_without_a_remaining_error_and_does_not_wind_up():
    plant = Plant()
    control = SelectivityController(plant, 0.1, limits=(-2.0, 2.0))
    for _ in range(500):
        control.step()
    assert plant.alpha == -2.0
    control.target = 0.28
    for _ in range(60):
        control.step()
    assert plant.alpha > -2.0, "the sum did not grow while alpha stood at its limit"
    for _ in range(500):
        control.step()
    assert plant.last["a"] == pytest.approx(0.28, abs=1e-3)
    state = control.state_dict()
    twin = SelectivityController(Plant(), 0.28, limits=(-2.0, 2.0))
    twin.load_state_dict(state)
    assert twin.step(0.3) == control.step(0.3)


def test_bad_control(mlp):
    with SelectivityRegularizer(mlp, 0.0) as penalty:
        with pytest.raises(InvalidInput, match="not been called yet"):
            SelectivityController(penalty, 0.1).step()
        with pytest.raises(InvalidInput, match="measured must be a finite number"):
            SelectivityController(penalty, 0.1).step(float("nan"))
        for settings, message in [
            ({"target": 2.0}, "target must be"),
            ({"integral": 0.0}, "integral must be .* above 0"),
            ({"limits": (1.0, -1.0)}, "limits.1. must be .* above 1"),
            ({"smoothing": 1.0}, "smoothing must be .* below 1"),
        ]:
            with pytest.raises(InvalidInput, match=message):
                SelectivityController(penalty, **{"target": 0.1, **settings})
    for settings, message in [
        ({"alpha": float("inf")}, "alpha must be a finite number, not inf"),
        ({"alpha": 1.0, "warmup": -1}, "warmup must be .* at least 0, not -1"),
        ({"alpha": 1.0, "start": 5, "stop": 5}, "stop must be .* at least 6, not 5"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            alpha_schedule(**settings)
    assert [alpha_schedule(2.0)(t) for t in (0, 100)] == [2.0, 2.0]


# --- off the axes ---------------------------------------------------------------------------------------------------


def hidden(k=4, n=1200, seed=0, noise=0.03):
    """k classes, each with a direction of its own, turned by a random rotation; and the selective layer itself."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % k
    selective = np.eye(k)[y] * rng.uniform(0.8, 1.2, (n, 1)) + noise * rng.random((n, k))
    rotation = np.linalg.qr(rng.normal(size=(k, k)))[0]
    return selective, selective @ rotation, y


@pytest.mark.parametrize("orthonormal", [True, False])
def test_selectivity_that_was_rotated_away_is_found_again(orthonormal):
    selective, turned, y = hidden()
    truth = off_axis_upper_bound(selective, y, steps=1).si_axis
    result = off_axis_upper_bound(turned, y, orthonormal=orthonormal, steps=300)
    assert truth > 0.9
    assert result.si_axis < 0.8
    assert result.si_bound > truth - 0.05
    np.testing.assert_allclose(result.W @ result.W.T, np.eye(4), atol=1e-8 if orthonormal else 0.2)
    assert result.si_fit >= result.si_axis - 0.05


def test_what_is_not_there_is_not_found():
    rng = np.random.default_rng(0)
    acts, y = rng.random((1500, 6)) + 1, np.arange(1500) % 3
    result = off_axis_upper_bound(acts, y, steps=100)
    assert result.si_bound < 0.05
    assert result.ratios[0] < 0.02
    assert off_axis_upper_bound(acts, y, steps=100, response="relu").si_bound > 0.2, "what the docstring warns of"


def test_the_bound_is_not_below_the_axes_where_it_is_fitted():
    """A layer that is selective already is one of the two starts."""
    selective, _, y = hidden(noise=0.3)
    result = off_axis_upper_bound(selective, y, steps=1)
    np.testing.assert_allclose(result.W @ result.W.T, np.eye(4), atol=1e-12)
    assert result.si_bound >= result.si_axis - 0.01


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_more_or_fewer_classes_than_units(classes):
    rng = np.random.default_rng(0)
    y = np.arange(700) % classes
    acts = rng.random((700, 4)) + rng.random((classes, 4))[y]
    result = off_axis_upper_bound(acts, y, steps=30)
    np.testing.assert_allclose(result.W @ result.W.T, np.eye(4), atol=1e-8)
    assert result.si_bound > result.si_axis


def test_the_bound_does_not_depend_on_a_constant():
    _, turned, y = hidden()
    a, b = (off_axis_upper_bound(turned + shift, y, steps=40) for shift in (0.0, 50.0))
    assert a.si_axis == pytest.approx(b.si_axis, abs=1e-6)
    assert a.si_bound == pytest.approx(b.si_bound, abs=0.02)


def test_variance_ratios_are_those_of_linear_discriminants():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 900)
    acts = rng.normal(size=(900, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=(3, 5))[y]
    ratios = class_variance_ratios(acts, y)
    one_hot = np.eye(3)[y][:, 1:]
    np.testing.assert_allclose(ratios, cca(acts, one_hot).coefs ** 2, atol=1e-9)  # the same by another way
    scores = rng.normal(size=(5, 1000))
    z = acts @ scores
    means = np.stack([z[y == c].mean(0) for c in range(3)])
    share = np.bincount(y)[:, None] / 900
    between = (share * (means - z.mean(0)) ** 2).sum(0)
    assert (between / z.var(0)).max() <= ratios[0] + 1e-12
    result = off_axis_upper_bound(acts, y, steps=20)
    assert max(result.ratio_axis, result.ratio_bound) <= result.ratios[0] + 1e-12


def test_bad_rotations():
    _, acts, y = hidden()
    for args, options, message in [
        ((acts, y[:-1]), {}, "an integer label from 0 for each of the 1200"),
        ((acts, y * 0.5), {}, "integer label"),
        ((acts, y * 0), {}, "at least 2 classes"),
        ((acts, y), {"split": 1.0}, "split must be .* not 1.0"),
        ((acts, y), {"response": "square"}, "response must be one of .* not 'square'"),
        ((acts * np.nan, y), {}, "NaN"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            off_axis_upper_bound(*args, **options)
    with pytest.raises(InvalidInput, match="constant"):
        class_variance_ratios(np.ones((10, 2)), np.arange(10) % 2)


# --- distances ------------------------------------------------------------------------------------------------------


def seeds_of(n, p=4, samples=200, own=0.5, start=0):
    """Representations that share a signal and have noise of their own."""
    shared = np.random.default_rng(99).normal(size=(samples, p))
    draws = [np.random.default_rng(start + s) for s in range(n)]
    return [{"a": shared @ r.normal(size=(p, p)) + own * r.normal(size=(samples, p))} for r in draws]


def test_affine_maps_have_ratio_one_and_other_changes_a_larger_one():
    base = seeds_of(5)
    rng = np.random.default_rng(0)
    rotated = [{"a": b["a"] @ rng.normal(size=(4, 4)) - 3} for b in base]
    assert distance_ratio(rotated, base).loc["a", "ratio"] == pytest.approx(1.0, abs=1e-9)
    noisy = [{"a": b["a"] + 2 * rng.normal(size=(200, 4))} for b in base]
    row = distance_ratio(noisy, base).loc["a"]
    assert 1 < row["lo"] <= row["ratio"] <= row["hi"]


def test_means_are_over_the_pairs_of_different_seeds():
    base, reg = seeds_of(3), seeds_of(3, own=2.0, start=50)
    d = np.array([[cca(r["a"], b["a"]).distance for b in base] for r in reg])
    plain = np.mean([cca(base[i]["a"], base[j]["a"]).distance for i in range(3) for j in range(3) if i != j])
    row = distance_ratio(reg, base).loc["a"]
    assert row["d_reg"] == pytest.approx(d[~np.eye(3, dtype=bool)].mean(), abs=1e-9)
    assert row["d_base"] == pytest.approx(plain, abs=1e-9)
    assert distance_ratio(reg, base, paired=False).loc["a", "d_reg"] == pytest.approx(d.mean(), abs=1e-9)
    few = distance_ratio(reg[:2], base[:2]).loc["a"]
    assert np.isnan(few["lo"])
    assert few["ratio"] > 0


def test_intervals_over_seeds_cover_the_ratio_of_many():
    truth = distance_ratio(seeds_of(40, own=1.0, start=1000), seeds_of(40, start=2000), paired=False).loc["a", "ratio"]
    hits = 0
    for trial in range(20):
        reg, base = seeds_of(8, own=1.0, start=5000 + 100 * trial), seeds_of(8, start=9000 + 100 * trial)
        row = distance_ratio(reg, base, paired=False, n_boot=300).loc["a"]
        hits += row["lo"] <= truth <= row["hi"]
    assert hits >= 15


def test_networks_and_their_layers(mlp, blobs):
    with seeded(1):
        other = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    acts = representations(mlp, blobs)
    assert {k: tuple(v.shape) for k, v in acts.items()} == {"1": (300, 12), "3": (300, 8)}
    torch.testing.assert_close(acts["1"], mlp[:2](blobs[0]).detach())
    table = cca_distance_ratio([copy.deepcopy(mlp), copy.deepcopy(other)], [mlp, other], blobs)
    assert list(table.index) == ["1", "3"]
    np.testing.assert_allclose(table["ratio"], 1.0, atol=1e-6)
    for args, message in [
        (([mlp], [other]), "at least 2 plain"),
        (([mlp], [mlp, other]), "paired=True needs as many"),
        (([mlp, nn.Sequential(nn.Linear(5, 4), nn.ReLU())], [mlp, other]), "the same layers"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            cca_distance_ratio(*args, blobs)


# --- ablation -------------------------------------------------------------------------------------------------------


def reader():
    """Units 0 to 2 carry one class each, 3 to 5 the same for all; the head reads the first three."""
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.cat([torch.eye(3), torch.zeros(3, 3)]))
        model[0].bias.copy_(torch.tensor([0.0, 0, 0, 1, 1, 1]))
        model[2].weight.copy_(torch.cat([torch.eye(3), torch.zeros(3, 3)], 1))
        model[2].bias.zero_()
    y = torch.arange(90) % 3
    return model, (torch.eye(3)[y], y)


def test_order_decides_what_is_lost():
    model, data = reader()
    state = copy.deepcopy(model.state_dict())

    def run(**options):
        return ablate_units(model, data, fractions=(0, 0.5, 1), **options).set_index("fraction")["accuracy"].tolist()

    assert run(order="si") == [1.0, 1.0, pytest.approx(1 / 3)]
    assert run(order="si_desc") == [1.0, pytest.approx(1 / 3), pytest.approx(1 / 3)]
    assert run(order="si_desc", mode="mean") == [1.0, pytest.approx(1 / 3), pytest.approx(1 / 3)]
    assert run(order="si_desc", mode="class_mean") == [1.0, 1.0, 1.0]
    assert run(order="random", rng=1) == run(order="random", rng=1)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_units_of_maps_and_of_each_call_are_taken_out_everywhere(shared_relu, images):
    x, y = images
    report = measure_selectivity(shared_relu, images)
    table = ablate_units(shared_relu, images, report=report, fractions=(0, 0.5), order="si_desc")
    assert table["layer"].unique().tolist() == ["relu", "relu#1"]
    top = report.per_unit[report.per_unit["layer"] == "relu"].sort_values("si", ascending=False)["unit"][:3].tolist()
    with torch.no_grad():
        h = shared_relu.conv1(x).relu()
        h[:, top] = 0
        logits = shared_relu.head((shared_relu.conv2(h) + h).relu().mean((2, 3)))
    expected = float((logits.argmax(1) == y).double().mean())
    row = table[(table["layer"] == "relu") & (table["fraction"] == 0.5)]
    assert row["accuracy"].item() == pytest.approx(expected)
    whole = ablate_units(shared_relu, images, report=report, fractions=(1.0,), scope="network")
    assert whole["units"].tolist() == [12]
    assert isinstance(whole, pd.DataFrame)


@pytest.mark.parametrize("mode", ["zero", "class_mean"])
def test_samples_without_a_label_count_in_no_accuracy(mode):
    model, (x, y) = reader()
    unlabeled = torch.where(torch.arange(90) < 30, 255, y)
    expected = ablate_units(model, (x[30:], y[30:]), mode=mode, fractions=(0, 0.5))
    found = ablate_units(model, (x, unlabeled), mode=mode, fractions=(0, 0.5), ignore_index=255)
    pd.testing.assert_frame_equal(found, expected)


def test_bad_ablations(mlp, blobs):
    report = measure_selectivity(mlp, blobs, "1")
    for options, message in [
        ({"order": "size"}, "order must be one of .* not 'size'"),
        ({"mode": "noise"}, "mode must be one of .* not 'noise'"),
        ({"scope": "block"}, "scope must be one of .* not 'block'"),
        ({"fractions": (1.5,)}, "a share in fractions must be .* at most 1, not 1.5"),
        ({"layers": "3", "report": report}, "no units of these layers"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            ablate_units(mlp, blobs, **options)
    with pytest.raises(InvalidInput, match="no output of the model has as many rows as its inputs"):
        ablate_units(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Flatten(0)), blobs, "1", report=report)


def test_labels_in_words_and_arrays_in_the_place_of_tensors_get_a_sentence():
    words = np.array(["a", "b"] * 10)
    with pytest.raises(InvalidInput, match="y must hold integer labels from 0; number words"):
        class_variance_ratios(np.random.default_rng(0).random((20, 3)), words)
    with pytest.raises(InvalidInput, match="means must be a tensor"):
        selectivity_index(np.ones((2, 3)))
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    regularizer = SelectivityRegularizer(model, -1.0)
    model(torch.zeros(20, 3))
    with pytest.raises(InvalidInput, match="targets must be a tensor of class numbers, not a ndarray"):
        regularizer(words)
