"""The torch module: the compiled network's numbers, buffers that travel, no autograd in learning."""

import numpy as np
import pytest
import torch

from mlcollage.errors import InvalidInput
from mlcollage.papers.gated_linear_networks import GLN
from mlcollage.papers.gated_linear_networks.network import GatedNetwork


def data(n=150, d=6, classes=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(n, d, generator=generator, dtype=dtype)
    return torch.sigmoid(2 * f), f, f[:, :classes].argmax(dim=1)


@pytest.mark.parametrize("gradient", ["paper", "official"])
def test_equals_the_compiled_network_in_float64(gradient):
    p, z, y = data()
    settings = {"context_dim": 3, "gradient": gradient, "seed": 5, "eps": 0.05, "weight_clip": 0.9}
    head = GLN(6, num_classes=3, hidden_layer_sizes=(5, 4), dtype=torch.float64, **settings)
    core = GatedNetwork((5, 4, 1), 6, 6, dtype="float64", **settings)
    core.add_heads(3)
    base = head._base(p).numpy()
    targets = np.eye(3)[y.numpy()]
    for _ in range(3):
        before = head.update(p, z, y, lr=0.2)
        raw = core.learn(base, z.numpy(), targets, rate=0.2)
        np.testing.assert_allclose(before.numpy(), 1 / (1 + np.exp(-raw)), rtol=0, atol=1e-11)
    np.testing.assert_allclose(head.logits(p, z).numpy(), core.predict(base, z.numpy()), rtol=0, atol=1e-10)
    for layer in range(3):
        np.testing.assert_allclose(head.get_buffer(f"weight{layer}").numpy(), core.layer_weights(layer), atol=1e-11)
    assert np.array_equal(head.contexts(z).numpy(), core.context_indices(z.numpy()))


def test_one_call_equals_one_call_a_sample():
    p, z, y = data()
    one, many = (GLN(6, num_classes=3, dtype=torch.float64) for _ in range(2))
    together = one.update(p, z, y, lr=0.05)
    alone = torch.cat([many.update(p[i : i + 1], z[i : i + 1], y[i : i + 1], lr=0.05) for i in range(len(p))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_state_dict_carries_everything_and_optimizers_see_nothing():
    p, z, y = data(dtype=torch.float32)
    trained, fresh = GLN(6, num_classes=3, seed=1), GLN(6, num_classes=3, seed=2)
    trained.update(p, z, y, lr=0.05)
    assert list(trained.parameters()) == []
    assert not torch.equal(trained(p, z), fresh(p, z))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(trained(p, z), fresh(p, z))
    assert torch.equal(trained.update(p, z, y, lr=0.05), fresh.update(p, z, y, lr=0.05))
    assert int(fresh.visits0.sum()) == 2 * len(p) * 3 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_other_types_run(dtype):
    p, z, y = data(dtype=dtype)
    head = GLN(6, num_classes=3).to(dtype)
    before = head.update(p, z, y, lr=0.05)
    assert before.dtype == dtype
    assert torch.isfinite(head(p, z)).all()


def test_gradients_reach_a_backbone_but_not_the_head():
    p, z, y = data()
    head = GLN(6, num_classes=3, dtype=torch.float64)
    p.requires_grad_()
    torch.nn.functional.binary_cross_entropy(head(p, z)[:, 0], (y == 0).double()).backward()
    assert p.grad.abs().sum() > 0
    out = head.update(p, z, y, lr=0.05)
    assert not out.requires_grad
    assert all(not buffer.requires_grad for buffer in head.buffers())


def test_a_head_on_a_frozen_backbone_learns():
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.Tanh()).requires_grad_(False).eval()
    x = torch.randn(1500, 10, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    head = GLN(32, num_classes=2, context_dim=6)
    f = 2 * backbone(x)
    before = head.update(torch.sigmoid(f), f, y, lr=0.02)
    accuracy = (before.argmax(dim=1) == y).float()
    assert accuracy[-500:].mean() > 0.7
    assert accuracy[-500:].mean() > accuracy[:200].mean()


def test_binary_targets_and_separate_side_information():
    p, z, _ = data()
    head = GLN(6, side_dim=2, num_classes=1, dtype=torch.float64)
    out = head.update(p, z[:, :2], (z[:, :1] > 0).double(), lr=0.1)
    assert out.shape == (150, 1)
    assert head(p, z[:, :2]).shape == (150, 1)
    assert "side_dim=2" in repr(head)


@pytest.mark.parametrize("what", ["p", "z", "target"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1.5])
def test_a_bad_sample_is_refused_and_leaves_the_head_as_it_was(what, value):
    """NaN in p or target, or features that nobody squashed, stayed in the weights for good."""
    p, z, y = data()
    target = torch.nn.functional.one_hot(y, 3).double()
    head = GLN(6, num_classes=3, dtype=torch.float64)
    head.update(p, z, y, lr=0.05)
    before = {name: buffer.clone() for name, buffer in head.state_dict().items()}
    bad = {"p": p.clone(), "z": z.clone(), "target": target.clone()}
    bad[what][70, 1] = value
    if what == "z" and abs(value) < 2:
        head.update(**bad, lr=0.05)  # side information may be any finite number
        return
    with pytest.raises(InvalidInput, match=r"torch\.sigmoid.*nothing was learned"):
        head.update(**bad, lr=0.05)
    assert all(torch.equal(buffer, before[name]) for name, buffer in head.state_dict().items())
    if what != "target":
        told = head(bad["p"], bad["z"])
        assert told[70].isnan().all() or (what == "p" and value == float("inf"))
        assert told.isnan().any(dim=1).sum() == 1, "the other samples are predicted as ever"


def test_bad_input_is_named():
    p, z, y = data()
    head = GLN(6, num_classes=3)
    for call, message in (
        (lambda: GLN(0), "n_inputs"),
        (lambda: GLN(6, eps=0.7), "eps"),
        (lambda: GLN(600, context_dim=30), "GB"),
        (lambda: head(p[:, :5], z), "base predictions"),
        (lambda: head(p, z[0]), "side information"),
        (lambda: head.update(p, z, y + 1, lr=0.1), "Class numbers"),
        (lambda: head.update(p, z, y.double(), lr=0.1), "target"),
        (lambda: head.update(p, z, y[:4], lr=0.1), "target"),
        (lambda: head.update(p, z, y, lr=0.0), "lr"),
    ):
        with pytest.raises(InvalidInput, match=message):
            call()
