"""Comparisons of two networks against CKA of recorded features, and what users' models and loaders do."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.measure import RBF, LayerTap, MinibatchCKA, cka
from mlcollage.nn import ResNet, ViT, build
from mlcollage.papers.vit_vs_cnn import LayerComparison, compare, load_weights, untrained


def vit(seed=0, **changes):
    return build(lambda: ViT((1, 8, 8), 3, **{"patch_size": 4, "dim": 8, "depth": 2, "heads": 2, **changes}), seed)


def cnn(seed=0):
    return build(lambda: ResNet((1, 8, 8), 3, width=4), seed)


def images(n=48, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def quiet():
    context = warnings.catch_warnings()
    context.__enter__()
    warnings.simplefilter("error")
    return context


class Layers(nn.Module):
    """A network whose layers give what it is told to."""

    def __init__(self, *layers):
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(f"layer{i}", Lambda(layer))

    def forward(self, x):
        for layer in self.children():
            layer(x)
        return x.flatten(1)


class Lambda(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


# Maps --------------------------------------------------------------------------------------------------------------


def test_cells_are_the_cka_of_recorded_features():
    a, b, x = vit().eval(), cnn().eval(), images(32)
    found = compare(a, b, x, batch_size=32)
    acts_a, acts_b = (m(x, activations=True)[1] for m in (a, b))
    for row, column in (("block1.ln1", "block1.conv1"), ("block2", "block3.add"), ("norm", "head")):
        left = acts_a["block2.add2" if row == "block2" else row].flatten(1)
        name = "block3.relu2" if column == "block3.add" else column
        right = acts_b["logits" if name == "head" else name].flatten(1)
        i, j = found.cross.names_a.index(row), found.cross.names_b.index(name)
        assert found.cross.matrix[i, j] == pytest.approx(cka(left, right), abs=1e-5)
    n = found.a.names_a
    assert found.a.matrix[n.index("norm"), n.index("block2")] == pytest.approx(
        cka(acts_a["norm"].flatten(1), acts_a["block2.add2"].flatten(1)), abs=1e-5
    )
    assert np.allclose(np.diagonal(found.b.matrix), 1)


def test_minibatches_and_self_maps_equal_the_instrument():
    a, b, x = vit().eval(), cnn().eval(), images(64)
    loader = DataLoader(x, batch_size=16)
    found = compare(a, b, loader)
    layers = list(found.a.names_a)
    single = MinibatchCKA()
    with torch.no_grad(), LayerTap(a, layers) as tap:
        for batch in loader:
            a(batch)
            single.update(dict(tap))
    alone = single.compute()
    np.testing.assert_allclose(found.a.matrix, alone.matrix, atol=1e-6)
    np.testing.assert_allclose(found.a.ci, alone.ci, atol=1e-5)
    quarter = len(layers) // 4
    u = found.uniformity("a")
    assert u.value == pytest.approx(alone.matrix[:quarter, -quarter:].mean(), abs=1e-6)
    deleted = alone.without_each_batch[:, :quarter, -quarter:].mean((1, 2))
    se = np.sqrt(3 / 4 * ((deleted - deleted.mean()) ** 2).sum())
    assert u.high - u.value == pytest.approx(3.182446 * se, rel=1e-4)
    difference = found.uniformity_difference()
    assert difference.value == pytest.approx(u.value - found.uniformity("b").value)
    assert "[" in str(difference)


def test_order_of_examples_batch_mode_and_results_are_reproducible():
    a, b, x = vit().train(), cnn().train(), images()
    before = {k: v.clone() for k, v in b.state_dict().items()}
    first, second = (compare(a, b, x, batch_size=16) for _ in range(2))
    assert np.array_equal(first.cka.sums, second.cka.sums)
    assert a.training and b.training  # noqa: PT018
    assert all(torch.equal(before[k], v) for k, v in b.state_dict().items())
    assert not any(m._forward_hooks for m in (*a.modules(), *b.modules()))
    other = compare(a, b, x, batch_size=16, seed=1)
    assert not np.array_equal(first.cka.sums, other.cka.sums)


def test_a_network_with_itself_and_options():
    a, x = vit(), images()
    found = compare(a, a, x, batch_size=16, kernel=RBF(0.5), permutations=9, labels=("one", "two"), max_examples=32)
    np.testing.assert_allclose(found.a.matrix, found.b.matrix, atol=1e-6)
    np.testing.assert_allclose(np.diagonal(found.cross.matrix), 1, atol=1e-6)
    assert found.cross.p_value.shape == found.cross.matrix.shape
    assert (found.label_a, found.health.examples) == ("one", 32)


def test_path_is_the_best_of_all_monotone_ones():
    found = compare(vit(), cnn(), images(), layers_a=["block1", "block2", "norm"], layers_b="block?", batch_size=16)
    m = found.cross.matrix
    rows, columns = m.shape
    best = max(
        sum(m[i, j] for j, i in enumerate(way))
        for way in np.ndindex(*([rows] * columns))
        if all(p <= q for p, q in itertools.pairwise(way))
    )
    path = found.path()
    assert path["cka"].sum() == pytest.approx(best)
    assert path["depth_a"].is_monotonic_increasing
    assert list(path["layer_b"]) == list(found.cross.names_b)


def test_files_tables_and_pictures(tmp_path):
    x, y = images(), torch.arange(48) % 3
    found = compare(vit(), cnn(), (x, y), batch_size=16, permutations=9)
    found.save(tmp_path / "maps.npz")
    again = LayerComparison.load(tmp_path / "maps.npz")
    assert np.array_equal(again.cka.sums, found.cka.sums)
    assert again.health == found.health
    assert again.label_b == "ResNet"
    assert again.uniformity("b") == found.uniformity("b")
    assert again.health.classes_per_batch == (3.0, 3)
    table = found.to_dataframe()
    assert set(table["map"]) == {"a", "b", "cross"}
    assert len(table) == found.a.matrix.size + found.b.matrix.size + found.cross.matrix.size
    figure = found.plot()
    assert len([ax for ax in figure.axes if ax.images]) >= 3
    with pytest.raises(MissingFile):
        LayerComparison.load(tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "maps.npz").read_bytes()[:300])
    with pytest.raises(InvalidInput, match="damaged"):
        LayerComparison.load(tmp_path / "cut.npz")


def test_hugging_face_against_a_network_of_ones_own():
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    model = transformers.ViTForImageClassification(config)
    found = compare(model, cnn(), images(), batch_size=16)
    assert np.isfinite(found.uniformity("a").value)
    assert len(found.a.names_a) > 10
    named = compare(model, model, {"pixel_values": images()}, batch_size=16)
    np.testing.assert_allclose(
        np.diagonal(named.cross.matrix)[~np.isnan(np.diagonal(named.cross.matrix))], 1, atol=1e-6
    )


# Layouts -----------------------------------------------------------------------------------------------------------


def hard_case_features():
    i, t, d = np.meshgrid(np.arange(6), np.arange(6), np.arange(4), indexing="ij")
    a = np.sin(1.3 * i + 0.7 * t * (d + 1))
    b = np.cos(0.9 * i * (d + 1) + 0.4 * t)
    return torch.from_numpy(a), torch.from_numpy(b)


@pytest.mark.parametrize("first", [False, True])
def test_sequence_first_layers_are_found_also_where_lengths_are_equal(first):
    a, b = hard_case_features()
    turn = (lambda h: h.transpose(0, 1)) if first else (lambda h: h)
    x = torch.arange(6.0).reshape(6, 1)
    left = Layers(lambda z: turn(a[z[:, 0].long()]))
    right = Layers(lambda z: turn(b[z[:, 0].long()]))
    found = compare(left, right, x)
    assert found.cross.matrix[0, 0] == pytest.approx(-0.479732, abs=1e-6)
    assert found.health.batch_axis == ({"a:layer0": 1, "b:layer0": 1} if first else {})
    mixed = compare(Layers(lambda z: a[z[:, 0].long()]), right, x)
    assert mixed.cross.matrix[0, 0] == pytest.approx(-0.479732, abs=1e-6)


def test_windows_are_folded_and_equal_the_whole_map():
    def windows(z):  # (n, 1, 8, 8) to (n * 4, 16, 1)
        return z.unfold(2, 4, 4).unfold(3, 4, 4).reshape(-1, 16, 1)

    found = compare(Layers(windows, lambda z: z * 1), Layers(lambda z: z.exp()), images(), batch_size=16)
    assert found.health.windows == {"a:layer0": 4}
    assert found.cross.matrix[0, 0] == pytest.approx(found.cross.matrix[1, 0], abs=1e-6)

    def interleaved(z):  # windows first, then examples
        return z.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(z), 4, 16).transpose(0, 1).reshape(-1, 16)

    other = compare(Layers(interleaved, lambda z: z * 1), Layers(lambda z: z.exp()), images(), batch_size=16)
    assert "order is not that of the examples" in other.health.skipped["a:layer0"]


def test_swin_transformer():
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4, num_channels=1
    )
    x = torch.rand(24, 1, 16, 16)
    found = compare(transformers.SwinModel(config), cnn16(), x, batch_size=12)
    assert any(name.endswith("q_proj") for name in found.health.windows)
    assert np.isfinite(found.cross.matrix).any()


def cnn16():
    return build(lambda: ResNet((1, 16, 16), 3, width=4), 0)


def test_odd_outputs_are_skipped_with_the_reason():
    model = Layers(
        lambda z: z * 1,
        lambda z: z > 0,
        lambda z: torch.fft.fft(z),
        lambda z: z.mean(),
        lambda z: None,
        lambda z: (z.flatten(1), z.flatten(1) ** 2),
        lambda z: z.sum(0),
        lambda z: z[:, :0],
        lambda z: z.argmax(1),
    )
    found = compare(model, vit(), images(), batch_size=16)
    assert found.a.names_a == ("layer0", "layer5", "layer5[1]")
    reasons = found.health.skipped
    assert {"a:layer1", "a:layer2", "a:layer3", "a:layer6", "a:layer7", "a:layer8"} <= set(reasons)
    assert "complex" in reasons["a:layer2"]
    assert "no axis counts them" in reasons["a:layer6"]


def test_layers_that_do_not_vary_are_nan_and_named():
    model = vit()
    with pytest.warns(UserWarning, match="do not vary"):
        found = compare(Layers(lambda z: z * 1, lambda z: z * 0 + 3.7), model, images(), batch_size=16)
    assert np.isnan(found.cross.matrix[1]).all()
    assert np.isfinite(found.cross.matrix[0]).all()
    assert found.health.constant == ("a:layer1",)


def test_in_place_layers_wrapped_and_compiled_models():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3))
    inplace = copy.deepcopy(plain)
    inplace[1].inplace = True
    found = compare(plain, inplace, images(), batch_size=16)
    np.testing.assert_allclose(np.diagonal(found.cross.matrix), 1, atol=1e-6)
    assert found.a.matrix[0, 1] < 0.999  # the convolution is not its ReLU
    compiled = torch.compile(plain, backend="eager")
    with pytest.raises(InvalidInput, match=r"torch.compile does not run"):
        compare(compiled, plain, images())
    wrapped = compare(nn.DataParallel(plain), plain, images(), batch_size=16)
    np.testing.assert_allclose(np.diagonal(wrapped.cross.matrix), 1, atol=1e-6)


def test_checkpointing_and_randomness_in_evaluation():
    class Noisy(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, training=True).flatten(1)

    with pytest.raises(InvalidInput, match="other features for the same inputs"):
        compare(nn.Sequential(Noisy(), nn.Linear(64, 2)), vit(), images())


# Data --------------------------------------------------------------------------------------------------------------


def test_sorted_loaders_are_told_and_whole_data_are_shuffled():
    x, y = images(64), torch.arange(64) // 16
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    with pytest.warns(UserWarning, match=r"batches hold 1\.0 of 4 classes"):
        compare(vit(), cnn(), loader)
    context = quiet()
    try:
        found = compare(vit(), cnn(), TensorDataset(x, y), batch_size=16, layers_a="block?", layers_b="block?")
    finally:
        context.__exit__(None, None, None)
    assert found.health.classes_per_batch[0] > 2.5


def test_repeated_examples_are_left_out():
    x = images(16)
    plain = compare(vit(), cnn(), DataLoader(x, batch_size=16))
    with pytest.warns(UserWarning, match="2 examples are equal"):
        found = compare(vit(), cnn(), DataLoader(torch.cat([x, x[:2]]), batch_size=18))
    np.testing.assert_allclose(found.cross.matrix, plain.cross.matrix, atol=1e-6)
    assert found.health.repeated == 2


def test_ragged_ends_small_batches_and_empty_data():
    with pytest.warns(UserWarning, match="3 examples were dropped"):
        found = compare(vit(), cnn(), images(35), batch_size=16)
    assert (found.health.examples, found.health.batches, found.health.dropped) == (32, 2, 3)
    one = compare(vit(), cnn(), images(16), batch_size=16)
    assert np.isnan(one.uniformity("a").low)
    with pytest.raises(InvalidInput, match="no batch had the four examples"):
        compare(vit(), cnn(), images(3))
    with pytest.raises(InvalidInput, match="at least 4"):
        compare(vit(), cnn(), images(8), batch_size=3)
    x = images(8)
    x[3, 0, 2, 2] = float("nan")
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        compare(vit(), cnn(), x)


def test_each_network_gets_its_own_transform_and_type():
    x = (images(32) * 255).round()
    scaled = compare(
        vit(),
        cnn().double(),
        x,
        transform_a=lambda z: z / 255,
        transform_b=lambda z: z.double() / 255 - 0.5,
        batch_size=16,
    )
    plain = compare(vit(), cnn().double(), x / 255, transform_b=lambda z: z.double() - 0.5, batch_size=16)
    np.testing.assert_allclose(scaled.cross.matrix, plain.cross.matrix, atol=1e-5)
    assert scaled.health.precision == ("float32", "float64")
    with pytest.raises(InvalidInput, match="a transform takes one tensor"):
        compare(vit(), cnn(), {"pixels": x}, transform_a=lambda z: z)


def test_half_precision_is_raised_before_the_kernel():
    x = torch.randn(8, 4096) * 10
    wide = Layers(lambda z: z.half())
    found = compare(wide, Layers(lambda z: z * 1), x)
    assert found.cross.matrix[0, 0] == pytest.approx(1, abs=1e-4)
    assert "float16" in found.health.precision
    rows = 1000 + torch.arange(8.0)[:, None] / 100
    with pytest.warns(UserWarning, match="not within the precision of bfloat16"):
        compare(Layers(lambda z: z.bfloat16()), Layers(lambda z: z * 1), rows)


def test_one_giant_channel_is_told():
    def giant(z):
        h = z.flatten(1).clone()
        h[:, 0] *= 50
        return h

    with pytest.warns(UserWarning, match="more than half of the variance"):
        found = compare(Layers(giant), vit(), images(64), batch_size=32)
    share, name = found.health.largest_share
    assert share > 0.9
    assert name == "a:layer0"
    assert "64 examples in 2 batches" in str(found.health)


# Weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "_orig_mod.", "module.backbone."])
def test_prefixes_are_taken_off(prefix):
    a, b = vit(0), vit(1)
    state = {f"{prefix}{k}": v for k, v in b.state_dict().items()}
    assert load_weights(a, state) == len(b.state_dict())
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_weights_that_do_not_load_are_refused():
    a, state = vit(0), vit(1).state_dict()
    before = copy.deepcopy(a.state_dict())
    body = {k: v for k, v in state.items() if not k.startswith("head.")}
    with pytest.raises(InvalidInput, match=r"2 of \d+ tensors of the network are not in the checkpoint"):
        load_weights(a, body)
    assert all(torch.equal(before[k], v) for k, v in a.state_dict().items())
    assert load_weights(a, body, missing=("head.",)) == len(state) - 2
    with pytest.raises(InvalidInput, match="are not in the checkpoint"):
        load_weights(a, {f"other.{k}": v for k, v in state.items()})
    with pytest.raises(InvalidInput, match="has the shape"):
        load_weights(a, {**state, "head.bias": torch.zeros(7)})


def test_untrained_copies_are_fresh_reproducible_and_leave_the_model_alone():
    trained = cnn()
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(1.0)
    before = copy.deepcopy(trained.state_dict())
    fresh, again, other = untrained(trained), untrained(trained), untrained(trained, seed=1)
    assert all(torch.equal(before[k], v) for k, v in trained.state_dict().items())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in fresh.state_dict().items())
    assert not torch.equal(fresh.stem.conv.weight, other.stem.conv.weight)
    assert float(fresh.stem.conv.weight.detach().mean().abs()) < 0.3
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config)
    assert type(untrained(model)) is type(model)
    tokens = vit()
    shuffled = untrained(tokens).position
    assert torch.equal(shuffled.flatten().sort().values, tokens.position.flatten().sort().values)
