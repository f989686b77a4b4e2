"""Unit axes against what a bias moves: a change of a unit's bias shows in its slice of the true axis, nowhere else."""

import pytest
import torch
from torch import nn

from mlcollage.measure.units import UnitAxes, unit_axes
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
    transformers = pytest.importorskip("transformers")
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
