"""Effective receptive fields against gradients of single images and what architecture allows."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.measure import TokenGrid, effective_receptive_field
from mlcollage.nn import ResNet, ViT, build


def by_hand(fn, images):
    """Mean over images, one by one, of the sum over colors of absolute gradients, divided by its maximum."""
    total = 0.0
    for image in images:
        x = image[None].clone().requires_grad_()
        (g,) = torch.autograd.grad(fn(x), x)
        total = total + g.abs().sum((0, 1)).double()
    return (total / total.max()).numpy()


def test_convolutions_see_what_their_kernels_reach():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3, padding=1))
    x = torch.rand(7, 2, 9, 9)
    field = effective_receptive_field(model, "2", x, batch_size=3)
    np.testing.assert_allclose(field.map, by_hand(lambda z: model(z)[0, :, 4, 4].sum(), x), rtol=1e-4, atol=1e-7)
    assert field.places == ((4, 4),)
    inside = np.zeros((9, 9), bool)
    inside[2:7, 2:7] = True
    assert (field.map[~inside] == 0).all()
    assert field.area(1e-9) == 25 / 81
    first = effective_receptive_field(model, "0", x)
    assert first.area(1e-9) == 9 / 81  # not rectified yet by the layer that overwrites it
    corner = effective_receptive_field(model, "2", x, unit=(0, 0))
    assert corner.map[3:].max() == 0
    assert field.plot().images[0].get_array().shape == (9, 9)


def test_even_sides_have_no_center():
    model = nn.Sequential(nn.Conv2d(1, 2, 1))
    x = torch.rand(3, 1, 4, 5)
    field = effective_receptive_field(model, "0", x)
    assert field.places == ((1, 2), (2, 2))
    assert sorted(np.argwhere(field.map > 0).tolist()) == [[1, 2], [2, 2]]


def test_tokens_channels_last_and_blocks_with_their_skip():
    model = build(lambda: ViT((1, 12, 12), 3, patch_size=4, dim=8, depth=1, heads=2), 0)
    x = torch.rand(4, 1, 12, 12)

    def center(z):
        return model(z, activations=True)[1]["block1.add2"][0, 1 + 4].sum()

    field = effective_receptive_field(model, "block1", x)
    np.testing.assert_allclose(field.map, by_hand(center, x), rtol=1e-4, atol=1e-7)
    own = field.map[4:8, 4:8].mean()
    assert own > 5 * field.map[:4].mean() > 0  # the skip's own patch, and some of all others
    branch = effective_receptive_field(model, "block1.attn", x)
    assert branch.map[4:8, 4:8].mean() / branch.map[:4].mean() < own / field.map[:4].mean()

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(1, 3, 3, padding=1), nn.Tanh()

        def forward(self, x):
            return self.act(self.conv(x).permute(0, 2, 3, 1))

    last = Last()
    field = effective_receptive_field(last, "act", torch.rand(2, 1, 5, 7))
    assert field.places == ((2, 3),)
    assert field.area(1e-9) == 9 / 35


def test_sums_that_do_not_depend_on_the_image_are_refused():
    model = build(lambda: ViT((1, 12, 12), 3, patch_size=4, dim=8, depth=1, heads=2), 0)
    x = torch.rand(3, 1, 12, 12)
    with pytest.raises(InvalidInput, match="use units='each'"):
        effective_receptive_field(model, "norm", x)
    field = effective_receptive_field(model, "norm", x, units="each")

    def each(z):
        h = model(z, activations=True)[1]["norm"][:, 5]
        return h

    total = 0.0
    for image in x:
        z = image[None].clone().requires_grad_()
        for c in range(8):
            total = total + torch.autograd.grad(each(z)[0, c], z)[0].abs().sum((0, 1)).double()
    np.testing.assert_allclose(field.map, (total / total.max()).numpy(), rtol=1e-4, atol=1e-6)


def test_batch_norm_mode_and_checkpointing():
    model = build(lambda: ResNet((1, 8, 8), 3, width=4), 0).train()
    x = torch.rand(6, 1, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    field = effective_receptive_field(model, "block1", x)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    one_by_one = effective_receptive_field(model, "block1", x, batch_size=1)
    np.testing.assert_allclose(field.map, one_by_one.map, rtol=1e-4, atol=1e-6)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.checkpoint = False

        def forward(self, x):
            h = torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False) if self.checkpoint else self.a(x)
            return self.b(h.relu())

    net = Net()
    plain = effective_receptive_field(net, "b", x)
    net.checkpoint = True
    np.testing.assert_allclose(effective_receptive_field(net, "b", x).map, plain.map, atol=1e-12)


def test_hugging_face_model_and_refusals():
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=12, patch_size=4
    )
    model = transformers.ViTModel(config)
    layer = next(n for n, m in model.named_modules() if type(m).__name__ == "ViTLayer")
    field = effective_receptive_field(model, layer, torch.rand(2, 3, 12, 12))
    assert field.map.shape == (12, 12)
    assert field.map[4:8, 4:8].max() == 1
    with pytest.raises(InvalidInput, match="floating-point tensor"):
        effective_receptive_field(model, layer, torch.zeros(2, 3, 12, 12, dtype=torch.uint8))
    with pytest.raises(InvalidInput, match="is not 2 x 2 = 4"):
        effective_receptive_field(model, layer, torch.rand(2, 3, 12, 12), where=TokenGrid((2, 2), (4.0, 4.0), 1))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    with pytest.raises(InvalidInput, match="has no places"):
        effective_receptive_field(flat, "1", torch.rand(2, 1, 3, 3))
    conv = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.raises(InvalidInput, match="outside the grid of 3 x 3"):
        effective_receptive_field(conv, "0", torch.rand(2, 1, 3, 3), unit=(3, 0))
