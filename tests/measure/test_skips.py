"""Skip ratios against norms of recorded activations, and networks without one of their skips."""

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.measure import remove_skip, residual_sums, skip_ratio
from mlcollage.nn import ResNet, ViT, build
from mlcollage.train import Replicas


def vit(seed=0, **changes):
    return build(lambda: ViT((1, 8, 8), 3, **{"patch_size": 4, "dim": 8, "depth": 2, "heads": 2, **changes}), seed)


def close(a, b, **options):
    np.testing.assert_allclose(a, b.detach().double().numpy(), **{"rtol": 1e-5, **options})


def test_ratios_of_a_vit_are_those_of_its_activations():
    model, x = vit().eval(), torch.rand(5, 1, 8, 8)
    _, acts = model(x, activations=True)
    found = skip_ratio(model, x, batch_size=2)
    assert found.names == ("block1", "block1#1", "block2", "block2#1")
    stream = acts["embed"]
    for i in (1, 2):
        for name, branch, after in ((f"block{i}", "attn", "add1"), (f"block{i}#1", "mlp", "add2")):
            close(found.ratios[name], stream.norm(dim=-1) / acts[f"block{i}.{branch}"].norm(dim=-1))
            stream = acts[f"block{i}.{after}"]
    assert found.per_place("block1").shape == (5,)
    table = found.to_dataframe()
    assert table["median"][0] == pytest.approx(np.median(found.ratios["block1"]))
    assert found.plot().get_xlabel().startswith("residual sum")
    with pytest.raises(UnknownName, match="no residual sum 'block9'"):
        found.per_place("block9")


def test_ratios_of_a_resnet_take_the_projection_and_come_before_the_relu():
    model, x = build(lambda: ResNet((1, 8, 8), 3, width=4), 0).eval(), torch.rand(4, 1, 8, 8)
    _, acts = model(x, activations=True)
    found = skip_ratio(model, x)
    assert [s.kind for s in found.sums] == ["identity", "projection", "projection"]
    close(found.ratios["block1"], acts["stem"].norm(dim=1) / acts["block1.norm2"].norm(dim=1), rtol=1e-4)
    close(found.ratios["block2"], acts["block2.shortcut"].norm(dim=1) / acts["block2.norm2"].norm(dim=1), rtol=1e-4)


class Residual(nn.Module):
    """Identity (3, 0, -4) and branch (0, 1, 0), added in several ways."""

    def __init__(self, way="plain"):
        super().__init__()
        self.way, self.layer = way, nn.Linear(3, 3)
        with torch.no_grad():
            self.layer.weight.zero_()
            self.layer.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
        self.scale = nn.Parameter(torch.full((3,), 1e-5))

    def forward(self, x):
        x = x * 1
        f = self.layer(x)
        if self.way == "plain":
            return x + f
        if self.way == "in place":
            f += x
            return f
        if self.way == "scaled":
            return torch.add(x, self.scale * f)
        if self.way == "alpha":
            return torch.add(x, f, alpha=2)
        if self.way == "reversed":
            return f + x
        if self.way == "parallel":
            return x + f + 2 * self.layer(x)
        return nn.functional.layer_norm(x + f, (3,))


@pytest.mark.parametrize(
    ("way", "ratios"),
    [
        ("plain", [5]),
        ("in place", [5]),
        ("scaled", [5e5]),
        ("alpha", [2.5]),
        ("reversed", [5]),
        ("parallel", [5, 2.5]),
        ("post norm", [5]),
    ],
)
def test_definitions(way, ratios):
    x = torch.tensor([[3.0, 0.0, -4.0]]).repeat(4, 1)
    found = skip_ratio(Residual(way), x)
    np.testing.assert_allclose([found.ratios[n][0] for n in found.names], ratios, rtol=1e-5)


def test_zero_branches_are_counted_and_not_averaged():
    model = nn.Sequential(Residual())
    with torch.no_grad():
        model[0].layer.weight[1, 0] = -1.0 / 7  # the second example, x = (7, ...), has no branch
    x = torch.tensor([[0.0, 3.0, -4.0], [7.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    table = skip_ratio(model, x).to_dataframe()
    assert table.loc[0, ["median", "mean", "infinite"]].tolist() == [5.0, 5.0, 1]


class Rotary(nn.Module):
    """Sums that are no skips: rotated halves, a position embedding, a polynomial, two gates of one input."""

    def __init__(self):
        super().__init__()
        self.position, self.one, self.two = nn.Parameter(torch.randn(4)), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.position
        x = x * torch.cos(x) + torch.cat([-x[..., 2:], x[..., :2]], -1) * torch.sin(x)
        x = x + 0.04 * x**3
        return self.one(x) + self.two(x)


def test_other_sums_are_no_skips():
    model = Rotary()
    with pytest.raises(InvalidInput, match="no skip connections"):
        skip_ratio(model, torch.rand(2, 4))


def test_hugging_face_and_torch_models():
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config).eval()
    x = torch.rand(3, 3, 8, 8)
    found = skip_ratio(model, {"pixel_values": x})
    assert len(found.names) == 4
    states = model(pixel_values=x, output_hidden_states=True).hidden_states
    # a block's input over what its two branches add together, at most the two ratios' own
    first, second = (found.ratios[n] for n in found.names[:2])
    assert first.shape == second.shape == (3, 5)
    middle = states[0].norm(dim=-1).detach().numpy() / first  # norm of the attention branch
    after = (states[1] - states[0]).norm(dim=-1).detach().numpy()
    assert (after <= middle + (states[0].norm(dim=-1).detach().numpy() + middle) / second + 1e-4).all()
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    sums = residual_sums(encoder, torch.rand(2, 5, 8))
    assert [s.name for s in sums] == ["layers.0", "layers.0#1", "layers.1", "layers.1#1"]
    gpt = transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=9, n_positions=6))
    assert len(residual_sums(gpt, {"input_ids": torch.arange(8).reshape(2, 4)})) == 4


def without_skips(model, x, block):
    """A ViT's logits with the skips of one block left out, by its own layers."""
    h = model.patches(x)
    h = torch.cat([model.token.expand(len(x), -1, -1), h], 1) + model.position
    for i in range(1, 3):
        b = getattr(model, f"block{i}")
        keep = float(i != block)
        h = keep * h + b.attn(b.ln1(h))
        h = keep * h + b.mlp(b.ln2(h))
    return model.head(model.norm(h)[:, 0])


def test_removal_is_exact_and_reversible_and_trains():
    model, x = vit(), torch.rand(4, 1, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = model(x)
    with remove_skip(model, "block1", x) as changed:
        out = model(x)
        torch.testing.assert_close(out, without_skips(model, x, 1))
        out.square().sum().backward()
    assert [s.name for s in changed] == ["block1", "block1#1"]
    assert torch.equal(model(x), plain)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    without_skips(model, x, 1).square().sum().backward()
    for a, b in zip(grads, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with remove_skip(model, "block2#1", x) as changed:
        assert [s.name for s in changed] == ["block2#1"]
    refused = pytest.raises(UnknownName, match="no residual sum in 'block7'; there are block1")
    with refused, remove_skip(model, "block7", x):
        pass


def test_removal_in_a_resnet():
    model, x = build(lambda: ResNet((1, 8, 8), 3, width=4), 0).eval(), torch.rand(4, 1, 8, 8)
    with remove_skip(model, "block2", x):
        _, acts = model(x, activations=True)
    torch.testing.assert_close(acts["block2.add"], acts["block2.norm2"])
    other = copy.deepcopy(model)
    with remove_skip(model, "block2", x):
        assert not torch.allclose(other(x), model(x))  # a copy keeps its skips
    assert torch.equal(other(x), model(x))


def test_removal_in_stacked_replicas():
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    replicas = Replicas(lambda: ViT((1, 8, 8), 3, patch_size=4, dim=8, depth=2, heads=2), seeds=[0, 1], lr=0.1)
    alone = vit(1)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    with remove_skip(replicas._model, "block1", x):
        replicas.step(x, y)
    with remove_skip(alone, "block1", x):
        nn.functional.cross_entropy(alone(x), y).backward()
    optimizer.step()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(replicas.parameters[name][1], p, rtol=1e-4, atol=1e-6)
