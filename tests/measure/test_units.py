"""Unit axes against what a bias moves: a change of a unit's bias shows in its slice of the true axis, nowhere else."""

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.measure.layer_tap import LayerTap
from mlcollage.measure.units import LayerUnits, UnitAxes, unit_axes
from mlcollage.nn.init import seeded
from mlcollage.nn.resnet import ResNet
from mlcollage.nn.vit import ViT


def outputs(model, x):
    found, handles = {}, []
    for name, m in model.named_modules():
        handles.append(m.register_forward_hook(lambda _m, _a, o, n=name: found.setdefault(n, o)))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def moved(model, x, bias, layer):
    """Shape of the layer's output, and the axes along which a change of ``bias[0]`` is confined to the first slice."""
    before = outputs(model, x)[layer]
    with torch.no_grad():
        bias[0] += 1.0
    after = outputs(model, x)[layer]
    with torch.no_grad():
        bias[0] -= 1.0
    changed = (after - before).abs() > 1e-6
    assert changed.any()
    axes = [k for k in range(1, changed.ndim) if not changed.narrow(k, 1, changed.shape[k] - 1).any()]
    return tuple(before.shape), axes


class Turned(nn.Module):
    """Channels first, last, first again, and a residual sum, with activations everywhere."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Identity()
        self.up, self.third, self.down, self.fourth = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.ReLU()
        self.pool, self.tokens = nn.MaxPool2d(2), nn.Identity()

    def forward(self, x):
        h = self.first(self.conv(x))
        last = self.second(h.permute(0, 2, 3, 1))
        wide = self.third(self.up(last))
        back = self.fourth(h + self.down(wide).movedim(-1, 1))
        return self.tokens(self.pool(back).flatten(2).transpose(1, 2).contiguous())


@pytest.mark.parametrize(
    ("make", "shape", "bias", "layers"),
    [
        (lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.AvgPool1d(2)), (4, 2, 20), "0", "012"),
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.0)), (4, 7, 5), "0", "012"),
        (lambda: nn.Sequential(nn.Conv3d(2, 6, 1), nn.BatchNorm3d(6), nn.ReLU()), (4, 2, 6, 6, 6), "0", "012"),
        (Turned, (2, 3, 8, 8), "conv", ["conv", "first", "second"]),
        (Turned, (2, 3, 8, 8), "up", ["up", "third"]),
        (Turned, (2, 3, 8, 8), "down", ["down", "fourth", "pool", "tokens"]),
    ],
)
def test_the_axis_is_the_one_that_a_bias_moves(make, shape, bias, layers):
    with seeded(0):
        model = make().eval()
        x = torch.randn(shape)
    found = unit_axes(model, x)
    for layer in layers:
        _, axes = moved(model, x, model.get_submodule(bias).bias, layer)
        assert [found[layer]] == axes, layer


def test_networks_of_this_package_have_no_open_axes():
    with seeded(0):
        resnet, vit = ResNet((3, 8, 8), 10).eval(), ViT((3, 8, 8), 10).eval()
    assert None not in unit_axes(resnet, torch.ones(2, 3, 8, 8)).values()
    found = unit_axes(vit, torch.ones(2, 3, 8, 8))
    assert None not in found.values()
    assert found["block1.ln1"] == 2


def test_transformers_convnext_has_as_many_units_as_its_layers():
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=3)
    with seeded(0):
        model = transformers.ConvNextForImageClassification(config).eval()
    x = torch.ones(2, 3, 64, 64)
    found, made = unit_axes(model, x), outputs(model, x)
    units = [made[name].shape[axis] for name, axis in found.items() if name.endswith(".act")]
    assert units == [32, 64, 96, 128]
    assert found["convnext.encoder.stages.0.layers.0.dwconv"] == 1


def test_what_cannot_be_followed_is_open_and_repeated_layers_must_agree():
    class Open(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.products, self.act = nn.Conv1d(2, 5, 1), nn.Identity(), nn.ReLU()

        def forward(self, x):
            h = self.act(self.conv(x))
            self.act(h.transpose(1, 2))
            return self.products(h @ h.transpose(1, 2))

    assert unit_axes(Open(), torch.ones(3, 2, 5)) == {"conv": 1, "act": None, "products": None}
    with UnitAxes() as axes:
        x = torch.ones(3, 4)
        y = nn.Linear(4, 5)(x)
    assert (axes.of(x), axes.of(y)) == (None, 1)


def test_recurrent_and_fused_layers_have_features_last():
    lstm, layer = nn.LSTM(4, 5), nn.TransformerEncoderLayer(8, 2, 16, batch_first=False)
    assert unit_axes(nn.Sequential(lstm), torch.ones(3, 2, 4)) == {"0": 2}
    found = unit_axes(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval(), torch.ones(3, 2, 8))
    assert set(found.values()) == {2}


# --- examples and units of a layer together ---------------------------------------------------------------------------


def laid(model, x, layers="*", **options):
    """Outputs of the layers, each as (N, U, *positions), as `LayerUnits` sees them."""
    units, found = LayerUnits(model, layers, **options), {}
    with LayerTap(model, layers) as tap, torch.no_grad():
        units.look(x)
        model(x)
        for name, h in tap.items():
            found[name] = units(name, h)
    return found


class SequenceFirst(nn.Module):
    """(T, B, U) throughout, as nn.MultiheadAttention has it by default, and (B, C) at the end."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(4, 2), nn.LayerNorm(4)
        self.rnn, self.relu, self.head = nn.LSTM(4, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        h = self.norm(x + self.attention(x, x, x)[0])
        return self.head(self.relu(self.rnn(h)[0]).mean(0))


def test_a_sequence_first_model_has_its_examples_second():
    model = SequenceFirst().eval()
    found = laid(model, torch.randn(5, 5, 4), batch_dim=1)  # as many positions as examples
    shapes = {name: h if h is None else tuple(h.shape) for name, h in found.items()}
    assert shapes == {
        **{"attention": (5, 4, 5), "attention[1]": None, "norm": (5, 4, 5), "rnn": (5, 6, 5)},
        **{"rnn[1][0]": (5, 6, 1), "rnn[1][1]": (5, 6, 1), "relu": (5, 6, 5), "head": (5, 3)},
    }
    x = torch.randn(5, 5, 4)
    one = laid(model, x[:, 2:3], batch_dim=1)  # an example alone has the row that it has in the batch
    torch.testing.assert_close(laid(model, x, batch_dim=1)["relu"][2:3], one["relu"])
    with pytest.raises(InvalidInput, match=r"no output of the model has as many rows .*: give batch_dim"):
        laid(model, x)


def test_looking_leaves_nothing_behind_and_is_seen_by_nobody():
    model, seen = nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.Dropout(), nn.ReLU()), []
    model.register_forward_hook(lambda *args: seen.append("model"))
    model[3].register_forward_pre_hook(lambda *args: seen.append("layer"))
    x, before = torch.randn(1, 2, 9), {k: v.clone() for k, v in model.state_dict().items()}
    state, units = torch.get_rng_state(), LayerUnits(model)
    units.look(x)
    assert not seen
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(torch.randn(4, 2, 9))
    assert seen == ["layer", "model"]
    assert len(model._forward_hooks) == 1


class Strange(nn.Module):
    """Units that a product of activations makes, rows that belong to windows, and an axis that only the user knows."""

    def __init__(self):
        super().__init__()
        self.made, self.rows, self.last = nn.ReLU(), nn.ReLU(), nn.Flatten()

    def forward(self, x):
        h = self.made(torch.einsum("nct,ct->ntc", x, torch.ones(x.shape[1:])))
        self.rows(h.flatten(0, 1))
        return self.last(h)


def test_what_is_open_is_refused_or_given():
    x = torch.randn(4, 3, 5)
    with pytest.raises(
        InvalidInput, match=r"layer 'made', which gives \(4, 5, 3\), counts its units .* unit_axis=\{'made'"
    ):
        laid(Strange(), x, "made")
    assert laid(Strange(), x, "made", unit_axis=-1)["made"].shape == (4, 3, 5)
    assert laid(Strange(), x, ["made", "last"], unit_axis={"mad*": 1})["made"].shape == (4, 5, 3)
    with pytest.raises(InvalidInput, match=r"layer 'rows' gives \(20, 3\), of which no axis belongs to the examples"):
        laid(Strange(), x[:1].expand(4, -1, -1), "rows")  # examples that are alike prove nothing
    with pytest.raises(InvalidInput, match=r"unit_axis=0 is no axis of units of layer 'made'"):
        laid(Strange(), x, "made", unit_axis=0)
    with pytest.raises(UnknownName, match="unit_axis names 'other'; the layers are made"):
        LayerUnits(Strange(), "made", unit_axis={"other": 1})


@pytest.mark.parametrize("kind", ["BertModel", "DistilBertModel", "ViTModel"])
def test_transformers_have_features_last(kind):
    import transformers

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    if kind == "ViTModel":
        config, x = transformers.ViTConfig(**small, image_size=16, patch_size=4), torch.randn(2, 3, 16, 16)
    elif kind == "BertModel":
        config, x = transformers.BertConfig(**small, vocab_size=20), torch.arange(10).reshape(2, 5)
    else:
        config = transformers.DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=12)
        x = torch.arange(10).reshape(2, 5)
    with seeded(0):
        model = getattr(transformers, kind)(config).eval()
    found = laid(model, x, nn.Linear)
    widths = {name: m.out_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {name: h.shape[1] for name, h in found.items()} == {name: widths[name] for name in found}
    assert all(len(h) == 2 for h in found.values())


class Windowed(nn.Module):
    """Attention within shifted windows of a grid: (B, H, W, C) as rows (B * windows, w * w, C), or windows first."""

    def __init__(self, ahead=True, shift=1, size=2):
        super().__init__()
        self.embed, self.qkv, self.act, self.head = nn.Linear(1, 6), nn.Linear(6, 18), nn.ReLU(), nn.Linear(6, 2)
        self.ahead, self.shift, self.size = ahead, shift, size

    def forward(self, x):
        h = self.embed(x.movedim(1, -1)).roll((-self.shift, -self.shift), (1, 2))
        n, s = h.shape[1] // self.size, self.size
        rows = h.unflatten(2, (n, s)).unflatten(1, (n, s)).transpose(2, 3)  # (B, n, n, s, s, C)
        rows = (rows if self.ahead else rows.movedim(0, 2)).flatten(0, 2).flatten(1, 2)
        q, k, v = self.qkv(rows).chunk(3, -1)
        rows = self.act((q @ k.mT).softmax(-1) @ v)
        h = rows.unflatten(0, (-1, n * n) if self.ahead else (n * n, -1))
        h = h if self.ahead else h.transpose(0, 1)
        return self.head(h.mean((1, 2)))


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("frozen", [True, False])
def test_windows_are_laid_to_their_examples(ahead, shift, frozen):
    with seeded(0):
        model, x = Windowed(ahead, shift).requires_grad_(not frozen), torch.randn(5, 1, 6, 6)
    units, found = LayerUnits(model, ["qkv", "act"], unit_axis={"act": -1}), {}
    units.look(x)
    with LayerTap(model, ["qkv", "act"], consume=lambda name, h: found.update({name: units(name, h)})):
        model(x)
        whole = dict(found)
        assert whole["act"].shape == (5, 6, 9, 4)
        assert whole["qkv"].shape == (5, 18, 9, 4)
        for i in range(5):  # each alone is the truth
            model(x[i : i + 1])
            for name, h in found.items():
                torch.testing.assert_close(h[0], whole[name][i])
    with pytest.raises(InvalidInput, match="whose places in the example are not known"):
        units("act", torch.zeros(45, 4, 6), places=True)
    with pytest.raises(InvalidInput, match="give inputs of one size"):
        units("act", torch.zeros(46, 4, 6))
    assert all(m.training for m in model.modules())


def test_rows_that_the_data_choose_are_no_windows():
    class Chosen(nn.Module):
        """Two positions of each example here, perhaps not in the next batch."""

        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x):
            h = self.fc(x[x[..., 0] > 0])
            return self.head(h.sum(0)).expand(len(x), 1)

    x = torch.randn(4, 5, 2)
    x[..., 0] = torch.tensor([1.0, 1, -1, -1, -1])
    with pytest.raises(InvalidInput, match="of which no axis belongs to the examples"):
        laid(Chosen(), x, "fc")


def test_swin_of_theirs_is_measured_as_example_by_example():
    import transformers

    from mlcollage.papers.class_selectivity import measure_selectivity

    config = transformers.SwinConfig(
        image_size=16, patch_size=2, num_channels=1, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4
    )
    with seeded(0):
        model, x, y = transformers.SwinModel(config).eval(), torch.randn(12, 1, 16, 16), torch.arange(12) % 3
    layers = "*attention.self.value"
    names = [n for n, _ in model.named_modules() if n.endswith("attention.self.value")] or ["*.value", "*.v_proj"]
    layers = names if len(names) == 4 else [n for n, m in model.named_modules() if n.endswith((".value", ".v_proj"))]
    assert len(layers) == 4
    means = {name: [] for name in layers}
    with LayerTap(model, layers, consume=lambda name, h: means[name].append(h.mean((0, 1)))), torch.no_grad():
        for i in range(12):
            model(x[i : i + 1])
    report = measure_selectivity(model, (x, y), layers, negative="shift", batch_size=5)
    for name, rows in means.items():
        per_class = torch.stack([torch.stack(rows)[y == c].mean(0) for c in range(3)])
        torch.testing.assert_close(
            torch.as_tensor(report.class_means[name]), per_class.double(), atol=1e-5, rtol=1e-4, check_dtype=False
        )
