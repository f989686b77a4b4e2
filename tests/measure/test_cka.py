"""CKA against official numbers, the definitions in float64, and what real features look like."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage._random import generator
from mlcollage.errors import InvalidInput, MissingFile, UnknownName
from mlcollage.measure import RBF, CKAResult, LayerTap, MinibatchCKA, cka

ORACLES = Path(__file__).parent / "oracles" / "cka"
PAIRS = ("tall", "wide", "independent_wide", "smallest", "rotated_scaled", "offset", "relu_like")
CASES = ("equal", "unequal", "tiny_batches", "dead_layer")


@pytest.fixture(scope="module")
def official():
    with np.load(ORACLES / "cka.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def minibatch():
    with np.load(ORACLES / "minibatch_cka.npz") as file:
        return dict(file)


def hsic1(k, el):
    """The unbiased HSIC by its traces (Song et al. 2012)."""
    n = len(k)
    k, el = k - np.diag(np.diag(k)), el - np.diag(np.diag(el))
    one = np.ones(n)
    total = (
        np.trace(k @ el) + (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ el @ one
    )
    return total / (n * (n - 3))


def hsic0(k, el):
    n = len(k)
    h = np.eye(n) - 1 / n
    return np.trace(k @ h @ el @ h) / (n - 1) ** 2


def by_definition(x, y, hsic=hsic1):
    x, y = (z.reshape(len(z), -1).astype(np.float64) for z in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    k, el = x @ x.T, y @ y.T
    return hsic(k, el) / np.sqrt(hsic(k, k) * hsic(el, el))


def data(seed=0, n=24, p=10, q=7):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    return x, x @ rng.normal(size=(p, q)) + rng.normal(size=(n, q))


def as_map(batches_a, batches_b=None, level=0.95, **how):
    maps = MinibatchCKA(**how)
    for i, a in enumerate(batches_a):
        maps.update({"x": torch.as_tensor(a)}, None if batches_b is None else {"y": torch.as_tensor(batches_b[i])})
    return maps.compute(level)


# One pair ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_one_pair_is_that_of_the_official_code(official, pair):
    x, y = official[f"{pair}_x"], official[f"{pair}_y"]
    assert cka(x, y, estimator="biased") == pytest.approx(official[f"{pair}_linear_gram"], abs=1e-10)
    assert cka(x, y) == pytest.approx(official[f"{pair}_debiased_gram"], abs=1e-10)
    values = zip(official[f"{pair}_rbf_fraction"], official[f"{pair}_rbf"], strict=True)
    for fraction, (biased, debiased) in values:
        assert cka(x, y, kernel=RBF(float(fraction)), estimator="biased") == pytest.approx(biased, abs=1e-10)
        assert cka(x, y, kernel=RBF(float(fraction))) == pytest.approx(debiased, abs=1e-10)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize(("n", "p", "q"), [(30, 4, 5), (12, 40, 7), (4, 3, 3), (9, 9, 2)])
def test_one_pair_follows_its_definition_by_both_routes(estimator, n, p, q):
    x, y = data(n=n, p=p, q=q)
    expected = by_definition(x, y, hsic1 if estimator == "unbiased" else hsic0)
    assert cka(x, y, estimator=estimator) == pytest.approx(expected, abs=1e-12)


def test_a_hand_computed_value_is_not_clipped():
    x = [[0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4], [5, 6, 0]]
    y = [[0, 1], [1, 0], [2, 1], [3, 5], [1, 4]]
    assert cka(x, y) == pytest.approx(-0.551025, abs=1e-6)


def test_bad_pairs_are_refused_or_named():
    x, y = data()
    with pytest.raises(InvalidInput, match="X has 24 examples and Y has 23"):
        cka(x, y[:-1])
    with pytest.raises(InvalidInput, match="at least 4 examples"):
        cka(x[:3], y[:3])
    with pytest.raises(UnknownName, match="estimator"):
        cka(x, y, estimator="debiased")
    with pytest.raises(UnknownName, match="kernel"):
        cka(x, y, kernel="rbf")
    with pytest.raises(InvalidInput, match="fraction"):
        RBF(0.0)
    with pytest.warns(UserWarning, match="Y is constant"):
        assert np.isnan(cka(x, np.full((24, 3), 0.1)))


# Maps ----------------------------------------------------------------------------------------------------------


def batches_of(minibatch, case, model):
    """Activations of each batch by layer, as the official code was given them."""
    out, b = [], 0
    while f"{case}_batch{b}_model{model}_layer0" in minibatch:
        names = sorted(k for k in minibatch if k.startswith(f"{case}_batch{b}_model{model}_layer"))
        out.append({k.rsplit("_", 1)[1]: torch.from_numpy(minibatch[k]) for k in names})
        b += 1
    return out


@pytest.fixture(scope="module")
def first_model(minibatch):
    return min(int(k.split("_model")[1][0]) for k in minibatch if "_model" in k and "_layer" in k)


@pytest.mark.parametrize("case", CASES)
def test_a_map_is_that_of_the_official_code(minibatch, first_model, case):
    a, b = (batches_of(minibatch, case, first_model + i) for i in (0, 1))
    crossed, own = MinibatchCKA(), MinibatchCKA()
    for left, right in zip(a, b, strict=True):
        crossed.update(left, right)
        own.update(left)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the dead layer is asserted by its NaN, and few units hold much variance
        found, itself = crossed.compute(), own.compute()
    np.testing.assert_allclose(found.matrix, minibatch[f"{case}_cka_cross"], atol=1e-12)
    np.testing.assert_allclose(itself.matrix, minibatch[f"{case}_cka_self"], atol=1e-12)


def test_batches_of_unequal_size_weigh_as_was_asked():
    sizes = (16, 9, 4, 25)
    parts = [data(seed=i, n=n) for i, n in enumerate(sizes)]
    x, y = zip(*parts, strict=True)

    def ratio(weights):
        grams = [[z - z.mean(0) for z in pair] for pair in parts]
        grams = [[z @ z.T for z in pair] for pair in grams]
        sums = [
            sum(w * hsic1(g[i], g[j]) for w, g in zip(weights, grams, strict=True)) for i, j in ((0, 1), (0, 0), (1, 1))
        ]
        return sums[0] / np.sqrt(sums[1] * sums[2])

    by_pairs = as_map(x, y, weighting="pairs").matrix[0, 0]
    by_batches = as_map(x, y, weighting="batches").matrix[0, 0]
    assert by_pairs == pytest.approx(ratio([n * (n - 3) for n in sizes]), abs=1e-12)
    assert by_batches == pytest.approx(ratio([1] * 4), abs=1e-12)
    assert abs(by_pairs - by_batches) > 1e-3


def test_the_expectation_does_not_depend_on_the_batch_size():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4096, 12))
    y = np.c_[x[:, :6], rng.normal(size=(4096, 20))]
    small = as_map(np.split(x, 512), np.split(y, 512)).matrix[0, 0]
    large = as_map(np.split(x, 8), np.split(y, 8)).matrix[0, 0]
    biased = as_map(np.split(x, 512), np.split(y, 512), estimator="biased").matrix[0, 0]
    assert small == pytest.approx(large, abs=0.02)
    assert abs(biased - large) > 0.2


@pytest.mark.parametrize(("offset", "scale"), [(1000.0, 1.0), (0.0, 1e-12), (0.0, 1e25)])
def test_offsets_and_scales_do_not_cost_digits_in_float32(offset, scale):
    x, y = data(n=64, p=40)
    stored = (torch.as_tensor(x, dtype=torch.float32) * scale + offset).float()
    other = torch.as_tensor(y, dtype=torch.float32)
    maps = MinibatchCKA()
    maps.update({"x": stored}, {"y": other})
    assert maps.compute().matrix[0, 0] == pytest.approx(cka(stored.double(), other.double()), abs=1e-6)


def test_products_of_torch_and_of_numpy_are_the_same(monkeypatch):
    x, y = (torch.as_tensor(z) for z in data(n=40))
    found = []
    for fits in (True, False):
        monkeypatch.setattr(sys.modules[MinibatchCKA.__module__], "_numpy_fits", lambda fits=fits: fits)
        maps = MinibatchCKA()
        maps.update({"x": x}, {"y": y})
        found.append(maps.compute().matrix[0, 0])
    np.testing.assert_allclose(found, cka(x, y), atol=1e-12)


@pytest.mark.parametrize("scales", [(1e25, 1.0), (1.0, 1e12), (1.0, 1e25), (1e-14, 1.0), (1.0, 1e-12), (1e8, 1e14)])
def test_batches_of_very_unequal_scale_are_weighed_as_they_are(scales):
    x, y = data(n=32, p=6)
    parts = [(s * x[16 * i : 16 * i + 16], y[16 * i : 16 * i + 16]) for i, s in enumerate(scales)]
    single, double = MinibatchCKA(), MinibatchCKA()
    for a, b in parts:
        single.update({"x": torch.as_tensor(a).float()}, {"y": torch.as_tensor(b).float()})
        double.update({"x": torch.as_tensor(a)}, {"y": torch.as_tensor(b)})
    sums = sum(np.array([hsic1(p @ p.T, q @ q.T) for p, q in ((a, b), (a, a), (b, b))]) for a, b in parts)
    expected = sums[0] / np.sqrt(sums[1]) / np.sqrt(sums[2])
    assert double.compute().matrix[0, 0] == pytest.approx(expected, abs=1e-12)
    assert single.compute().matrix[0, 0] == pytest.approx(expected, abs=1e-6)


def test_outputs_of_one_number_per_example_are_layers_too():
    x = torch.randn(16, generator=torch.Generator().manual_seed(0))
    maps = MinibatchCKA()
    maps.update({"flat": x, "column": x[:, None], "square": x.square()})
    assert maps.compute().matrix[0, 1] == pytest.approx(1.0, abs=1e-6)


def test_half_precision_is_raised_before_products():
    x = torch.cat([torch.full((4, 4096), 10.0), torch.full((4, 4096), -10.0)]).half()  # its kernel, 409600, is no half
    other = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)).half()
    maps = MinibatchCKA()
    maps.update({"x": x, "other": other})
    result = maps.compute()
    assert result.matrix[0, 1] == pytest.approx(by_definition(x.numpy(), other.numpy()), abs=1e-5)


def test_layers_that_do_not_vary_are_nan_and_named_and_others_stay():
    x, y = data()
    rounding = (
        torch.full((24, 30), 0.1).cumsum(1).add(torch.rand(24, 1, generator=torch.Generator().manual_seed(1)) * 1e-7)
    )
    coarse = torch.linspace(1000, 1000.07, 24)[:, None].bfloat16()
    maps = MinibatchCKA()
    maps.update({"x": torch.as_tensor(x), "token": rounding, "coarse": coarse, "y": torch.as_tensor(y)})
    with pytest.warns(UserWarning, match=r"2 layers do not vary.*bfloat16.*token, coarse"):
        result = maps.compute()
    assert result.constant == ("token", "coarse")
    assert np.isnan(result.matrix[1:3]).all()
    assert np.isnan(result.matrix[:, 1:3]).all()
    assert result.matrix[0, 3] == pytest.approx(by_definition(x, y), abs=1e-12)


def test_a_layer_ruled_by_one_unit_is_reported():
    rng = np.random.default_rng(0)
    shared = 50 * rng.normal(size=(256, 1))
    a, b = (np.c_[rng.normal(size=(256, 64)), shared] for _ in range(2))
    maps = MinibatchCKA()
    maps.update({"x": torch.as_tensor(a)}, {"y": torch.as_tensor(b)})
    with pytest.warns(UserWarning, match="half of the variance.*index 64 of axis 1"):
        result = maps.compute()
    assert result.matrix[0, 0] > 0.99
    assert result.largest_share["a:x"] > 0.9


def test_what_has_no_kernel_is_skipped_in_hooks_and_refused_in_update():
    maps = MinibatchCKA()
    for name, value in {
        "x": torch.randn(8, 3),
        "mask": torch.ones(8, 3, dtype=torch.bool),
        "fourier": torch.ones(8, 3, dtype=torch.complex64),
        "none": torch.ones(8, 0),
    }.items():
        maps.consume(name, value)
    maps.end_batch()
    result = maps.compute()
    assert result.names_a == ("x",)
    assert set(result.skipped) == {"mask", "fourier", "none"}
    with pytest.raises(InvalidInput, match="'mask' is of type bool"):
        maps.update({"x": torch.randn(8, 3), "mask": torch.ones(8, 3, dtype=torch.bool)})


def test_a_refused_batch_leaves_no_trace():
    x = torch.randn(8, 3)
    maps = MinibatchCKA()
    maps.update({"x": x, "y": 2 * x})
    for bad, why in (
        ({"x": x, "y": x[:4]}, "first axis must count"),
        ({"x": x[:3]}, "drop the last batch"),
        ({"x": x, "y": x.clone().fill_(float("nan"))}, "NaN or infinite, in batch 1"),
        ({"x": x, "z": x}, r"other layers than the ones before \(y, z\)"),
        ({"y": x, "x": x}, "another order"),
        ({}, "run the model first"),
    ):
        with pytest.raises(InvalidInput, match=why):
            maps.update(bad)
    assert maps.compute().sizes == (8,)
    maps.reset()
    with pytest.raises(InvalidInput, match="no batch"):
        maps.compute()


def test_layers_are_named_in_the_order_in_which_they_run_with_repeats():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.relu, self.first = nn.Linear(6, 4), nn.ReLU(), nn.Linear(5, 6)

        def forward(self, x):
            return self.relu(self.last(self.relu(self.first(x))))

    model, maps = Odd(), MinibatchCKA()
    x = torch.randn(16, 5)
    with torch.no_grad(), LayerTap(model, consume=maps.consume):
        model(x)
        maps.end_batch()
    result = maps.compute()
    assert result.names_a == ("first", "relu", "last", "relu#1")
    hidden = model.first(x).relu().detach()
    assert result.matrix[1, 2] == pytest.approx(
        by_definition(hidden.numpy(), model.last(hidden).detach().numpy()), abs=1e-6
    )


# Uncertainty -----------------------------------------------------------------------------------------------------


def correlated(seed, batches=20, n=32):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batches, n, 6))
    return x, 0.7 * x + rng.normal(size=x.shape)


def test_intervals_cover_the_value_of_very_many_examples():
    truth = as_map(*correlated(10_000, batches=2000)).matrix[0, 0]
    inside = 0
    for seed in range(200):
        low, high = as_map(*correlated(seed)).ci[:, 0, 0]
        inside += low <= truth <= high
    assert 180 <= inside <= 199  # 95 % of 200, within three standard errors


def test_intervals_are_the_jackknife_and_stay_in_bounds():
    x, y = correlated(3, batches=6)
    result = as_map(x, y, level=0.9)
    deleted = [as_map(np.delete(x, b, 0), np.delete(y, b, 0)).matrix[0, 0] for b in range(6)]
    np.testing.assert_allclose(result.without_each_batch[:, 0, 0], deleted, atol=1e-10)
    z = np.arctanh(deleted)
    half = 2.015048 * np.sqrt(5 / 6 * ((z - z.mean()) ** 2).sum())  # t quantile of 5 degrees of freedom at 0.95
    center = np.arctanh(result.matrix[0, 0])
    np.testing.assert_allclose(result.ci[:, 0, 0], np.tanh([center - half, center + half]), atol=1e-6)
    own = as_map(x)
    np.testing.assert_array_equal(own.ci[:, 0, 0], [1.0, 1.0])
    assert np.isnan(as_map(x[:1], y[:1]).ci).all()
    assert (np.abs(as_map(x[:2], y[:2]).ci) <= 1).all()


def test_unrelated_layers_have_uniform_p_values_and_related_ones_small():
    rng = np.random.default_rng(5)
    p = [
        as_map(rng.normal(size=(3, 12, 4)), rng.normal(size=(3, 12, 5)), permutations=39).p_value[0, 0]
        for _ in range(120)
    ]
    assert 0.4 < np.mean(p) < 0.62
    assert np.mean(np.array(p) <= 0.1) < 0.2
    related = as_map(*correlated(0, batches=3), permutations=99)
    assert related.p_value[0, 0] == 0.01 == related.p_value_any[0, 0]
    with pytest.raises(InvalidInput, match="permutations=199"):
        _ = as_map(*correlated(0, batches=3)).p_value


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_a_random_pairing_is_that_of_the_features(estimator):
    x, y = (torch.as_tensor(z) for z in data(n=14))
    maps = MinibatchCKA(permutations=5, estimator=estimator, seed=3)
    maps.update({"x": x}, {"y": y})
    null = maps.compute().null
    rng = generator(3, 0)
    for k in range(5):
        order = torch.randperm(14, generator=rng)
        one = MinibatchCKA(estimator=estimator)
        one.update({"x": x}, {"y": y[order]})
        assert null[k, 0, 0] == pytest.approx(one.compute().sums[0, 0, 1], rel=1e-10)


def test_the_difference_of_two_maps_uses_their_common_batches():
    x, y = correlated(1)
    rng = np.random.default_rng(2)
    z = y + 0.5 * rng.normal(size=y.shape)
    first, second = as_map(x, y), as_map(x, z)
    paired, apart = first.difference(second), first.difference(second, paired=False)
    assert paired.matrix[0, 0] == pytest.approx(first.matrix[0, 0] - second.matrix[0, 0], abs=1e-12)
    assert np.ptp(paired.ci[:, 0, 0]) < np.ptp(apart.ci[:, 0, 0])
    assert paired.p_value[0, 0] < 1e-3 < apart.p_value[0, 0]
    same = first.difference(first)
    assert same.matrix[0, 0] == 0
    assert same.p_value[0, 0] == 1
    with pytest.raises(InvalidInput, match="not of the same batches"):
        first.difference(as_map(x[:5], y[:5]))
    with pytest.raises(InvalidInput, match="two batches"):
        as_map(x[:1], y[:1]).difference(as_map(x[:1], y[:1]))
    with pytest.raises(InvalidInput, match="other layers"):
        first.difference(as_map(x))


# Collections, files, pictures ------------------------------------------------------------------------------------


def test_collections_of_several_processes_are_merged():
    x, y = correlated(4, batches=6)
    whole = as_map(x, y, permutations=9)
    one, two = MinibatchCKA(permutations=9), MinibatchCKA(permutations=9)
    for i in range(6):  # each process fixes a scale of its own by its first batch
        (one if i < 3 else two).update({"x": torch.as_tensor(x[i])}, {"y": torch.as_tensor(y[i])})
    merged = MinibatchCKA(permutations=9).merge(one).merge(two).compute()
    np.testing.assert_allclose(merged.matrix, whole.matrix, atol=1e-12)
    np.testing.assert_allclose(merged.ci, whole.ci, atol=1e-10)
    assert merged.sizes == whole.sizes
    kernels = [MinibatchCKA(kernel=RBF()) for _ in range(3)]
    for maps, batches in zip(kernels, (range(6), range(3), range(3, 6)), strict=True):
        for i in batches:
            maps.update({"x": torch.as_tensor(x[i] * 10**i)}, {"y": torch.as_tensor(y[i])})
    gathered = kernels[1].merge(kernels[2]).compute()  # a kernel that has no unit is not brought to another
    np.testing.assert_allclose(gathered.matrix, kernels[0].compute().matrix, atol=1e-12)
    with pytest.raises(InvalidInput, match="differ in estimator"):
        one.merge(MinibatchCKA(permutations=9, estimator="biased"))
    other = MinibatchCKA(permutations=9)
    other.update({"other": torch.as_tensor(x[0])})
    with pytest.raises(InvalidInput, match="differ in layers"):
        one.merge(other)


def test_a_result_survives_its_file(tmp_path):
    result = as_map(*correlated(0, batches=4), permutations=9)
    result.save(tmp_path / "map.npz")
    again = CKAResult.load(tmp_path / "map.npz")
    np.testing.assert_array_equal(again.matrix, result.matrix)
    np.testing.assert_array_equal(again.ci, result.ci)
    np.testing.assert_array_equal(again.p_value, result.p_value)
    assert (again.names_a, again.sizes, again.crossed) == (result.names_a, result.sizes, True)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "map.npz").read_bytes()[:200])
    with pytest.raises(InvalidInput, match="damaged"):
        CKAResult.load(tmp_path / "cut.npz")
    with pytest.raises(MissingFile):
        CKAResult.load(tmp_path / "none.npz")


def test_a_result_is_a_table_and_a_picture():
    x, y = (torch.as_tensor(z) for z in data())
    maps = MinibatchCKA(permutations=9)
    for _ in range(2):
        maps.update({"x": x, "y": y}, {"z": x + y[:, :1]})
    result = maps.compute()
    table = result.to_dataframe()
    assert list(table.columns) == ["layer_a", "layer_b", "cka", "low", "high", "p_value"]
    assert table.loc[1, "layer_a"] == "y"
    assert table.loc[1, "cka"] == result.matrix[1, 0]
    ax = result.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["x", "y"]
    assert ax.images[0].get_clim() == (0.0, 1.0)
