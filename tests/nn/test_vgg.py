"""VGG: the published parameter counts, the papers' layouts, and what is refused."""

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn.init import build
from mlcollage.nn.vgg import VGG


def count(**settings):
    shape, classes = settings.pop("in_shape"), settings.pop("num_classes")
    with torch.device("meta"):
        return sum(p.numel() for p in VGG(shape, classes, **settings).parameters())


@pytest.mark.parametrize(
    ("depth", "norm", "parameters"),
    [
        (11, None, 132_863_336),
        (13, None, 133_047_848),
        (16, None, 138_357_544),
        (19, None, 143_667_240),
        (11, "batch", 132_868_840),
        (16, "batch", 138_365_992),
    ],
)
def test_imagenet_sizes_have_the_published_counts(depth, norm, parameters):
    settings = {"in_shape": (3, 224, 224), "num_classes": 1000, "classifier": (4096, 4096)}
    assert count(depth=depth, norm=norm, **settings) == parameters


@pytest.mark.parametrize(("norm", "parameters"), [(None, 18_067_464), ("batch", 18_075_912)])
def test_the_tiny_imagenet_network_of_neural_mechanics(norm, parameters):
    """Configuration D (14,714,688) and a classifier 2048-1024-1024-200."""
    assert count(in_shape=(3, 64, 64), num_classes=200, norm=norm) == parameters
    assert 14_714_688 + 2048 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 200 + 200 == 18_067_464


def small(**settings):
    return build(lambda: VGG((3, 32, 48), 5, depth=11, classifier=(8,), width=1 / 16, **settings), 0)


@pytest.mark.parametrize("norm", [None, "batch"])
def test_activations_by_name_and_logits(norm):
    model = small(norm=norm).eval()
    x = torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    logits, acts = model(x, activations=True)
    assert torch.equal(logits, model(x))
    assert list(acts)[-5:] == ["flatten", "fc1", "fc_relu1", "fc_drop1", "logits"]
    assert ("norm3" in acts) == (norm == "batch")
    assert tuple(acts["pool5"].shape) == (4, 32, 1, 1)
    assert sum(name.startswith("conv") for name in acts) == 8
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_initial_weights_are_the_papers():
    model = build(lambda: VGG((3, 32, 32), 10, depth=11), 0)
    conv, linear = model.conv8, model.fc1
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert float(linear.weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    assert all(float(m.bias.detach().abs().max()) == 0 for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: VGG((3, 28, 28), 10), InvalidInput, "too small"),
        (lambda: VGG((3, 32, 32), 10, depth=12), UnknownName, "depth=12"),
        (lambda: VGG((3, 32, 32), 10, norm="group"), UnknownName, "norm, if not None, must be one of 'batch'"),
        (lambda: VGG((3, 32, 32), 10, dropout=1.0), InvalidInput, "dropout"),
        (lambda: VGG((3, 32, 32), 10, width=0), InvalidInput, "width"),
        (lambda: VGG((32, 32), 10), InvalidInput, "channels"),
        (lambda: small()(torch.zeros(1, 3, 32, 32)), InvalidInput, "shape"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call()
