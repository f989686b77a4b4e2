"""Units are counted on the axis that the layer has them on: every instrument against means taken by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.measure.layer_tap import LayerTap
from mlcollage.nn.init import seeded
from mlcollage.papers.class_selectivity import (
    SelectivityRegularizer,
    ablate_units,
    measure_selectivity,
    representations,
    selectivity_index,
)

Y = torch.arange(12) % 3


class Tokens(nn.Module):
    """Tokens (N, T, U) through attention and a two-layer map, sequence first inside; logits (N, C)."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.norm, self.up, self.relu, self.head = nn.LayerNorm(4), nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)
        self.time = 1 if batch_first else 0

    def forward(self, x):
        h = self.norm(x + self.attention(x, x, x)[0])
        return self.head(self.relu(self.up(h)).mean(self.time))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.relu, self.head = nn.LSTM(4, 6, batch_first=True), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.relu(self.rnn(x)[0])[:, -1])


def convolution(d):
    conv, pool = getattr(nn, f"Conv{d}d"), getattr(nn, f"AdaptiveAvgPool{d}d")
    return nn.Sequential(conv(2, 6, 3), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(6, 3))


# The model, its inputs, the layer, the axes of its examples and of its units, and the dimension of the examples.
CASES = {
    "Conv1d": (lambda: convolution(1), (12, 2, 20), "1", 0, 1, 0),
    "Conv2d": (lambda: convolution(2), (12, 2, 6, 6), "1", 0, 1, 0),
    "Conv3d": (lambda: convolution(3), (12, 2, 4, 4, 4), "1", 0, 1, 0),
    "tokens": (Tokens, (12, 5, 4), "relu", 0, 2, 0),
    "sequence first": (lambda: Tokens(batch_first=False), (5, 12, 4), "relu", 1, 2, 1),
    "as many tokens as examples": (lambda: Tokens(batch_first=False), (12, 12, 4), "relu", 1, 2, 1),
    "recurrent": (Recurrent, (12, 7, 4), "relu", 0, 2, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_every_instrument_counts_the_layers_own_units(case):
    make, shape, layer, examples, units, batch_dim = CASES[case]
    with seeded(0):
        model, x = make().eval(), torch.randn(shape)
    if batch_dim == 0:
        x = x + Y.reshape(-1, *(1,) * (x.ndim - 1))
    with LayerTap(model, layer) as tap, torch.no_grad():
        model(x)
        h = tap[layer].movedim((examples, units), (0, 1))  # (N, U, *positions)
    rows = h.flatten(2).mean(2)
    expected = selectivity_index(torch.stack([rows[c == Y].double().mean(0) for c in range(3)]))
    options = {"batch_dim": batch_dim}
    data = x, Y
    report = measure_selectivity(model, data, layer, **options)
    np.testing.assert_allclose(report.per_unit["si"], expected, atol=1e-6)
    torch.testing.assert_close(representations(model, data, layer, **options)[layer], rows)
    with SelectivityRegularizer(model, -1.0, layer, exclude_output=False, **options) as penalty:
        model(x)
        assert float(penalty(Y).detach()) == pytest.approx(float(expected.mean()), abs=1e-5)
    # Without units a layer gives nothing, so that all logits are the head's biases.
    table = ablate_units(model, data, layer, report=report, fractions=(0.5, 1.0), **options)
    assert table["units"].tolist() == [rows.shape[1] // 2, rows.shape[1]]
    constant = int(model.get_submodule("head" if hasattr(model, "head") else "4").bias.argmax())
    assert table["accuracy"].tolist()[1] == pytest.approx(float((constant == Y).double().mean()))


def test_transformers_convnext_has_as_many_units_as_its_layers():
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=3)
    with seeded(0):
        model, x = transformers.ConvNextForImageClassification(config).eval(), torch.randn(6, 3, 32, 32)
    y = torch.arange(6) % 3
    found = measure_selectivity(model, (x, y), "*.act", negative="relu").per_layer["units"].tolist()
    assert found == [32, 64, 96, 128]
    assert [h.shape[1] for h in representations(model, (x, y), "*.act").values()] == found
    with SelectivityRegularizer(model, -1.0, "*.act", negative="relu") as penalty:
        model(x)
        penalty(y)
        assert penalty._averages[1].shape == (4, sum(found))


def test_two_regularizers_of_one_model_do_not_see_each_others_look():
    with seeded(0):
        model, x = convolution(1), torch.randn(12, 2, 20)
    alone = SelectivityRegularizer(model, -1.0)
    model(x)
    expected = float(alone(Y).detach())
    with SelectivityRegularizer(model, -1.0) as second:
        model(x)
        assert [float(p(Y).detach()) for p in (alone, second)] == [expected] * 2
    alone.remove()


def test_labels_of_tokens_and_pixels_go_to_layers_of_any_order():
    with seeded(0):
        model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU()), torch.randn(6, 7, 4)
    y = torch.randint(3, (6, 7), generator=torch.Generator().manual_seed(0))
    rows = model(x).detach().flatten(0, 1).double()
    expected = selectivity_index(torch.stack([rows[y.flatten() == c].mean(0) for c in range(3)]))
    report = measure_selectivity(model, (x, y))
    np.testing.assert_allclose(report.per_unit["si"], expected, atol=1e-6)
    soft = nn.functional.one_hot(y, 3).float().movedim(-1, 1)  # (N, C, T), as torch.nn.CrossEntropyLoss takes it
    np.testing.assert_allclose(measure_selectivity(model, (x, soft)).per_unit["si"], expected, atol=1e-6)


def test_units_that_cannot_be_told_are_given_or_refused():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(torch.einsum("nct,cu->ntu", x, torch.ones(3, 4)))

    x = torch.randn(12, 3, 5)
    for instrument in (measure_selectivity, representations):
        with pytest.raises(InvalidInput, match=r"layer 'act', which gives \(12, 5, 4\), counts its units"):
            instrument(Mixed(), (x, Y), "act")
    assert measure_selectivity(Mixed(), (x, Y), "act", unit_axis=-1).per_layer["units"].tolist() == [4]
    assert representations(Mixed(), (x, Y), "act", unit_axis={"act": 2})["act"].shape == (12, 4)
