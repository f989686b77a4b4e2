"""Single steps are those of a public implementation, in double precision, with all of its cases."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.papers.synthetic_gradients import Decoupled, DecoupledSequential, DNIRecurrent, SyntheticGradient

FILE = np.load(Path(__file__).parent / "reference" / "koz4k_steps.npz", allow_pickle=False)
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def tensor(name):
    return torch.from_numpy(np.array(FILE[name]))


def linear(name):
    weight = tensor(f"{name}_weight")
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(tensor(f"{name}_bias"))
    return layer


def synthesizer(name):
    """Theirs adds a map of the activation and a map of the context; ours maps both side by side."""
    w, b = tensor(f"{name}_trigger_weight"), tensor(f"{name}_trigger_bias")
    classes = 0
    if f"{name}_context_weight" in FILE.files:
        c = tensor(f"{name}_context_weight")
        w, b, classes = torch.cat([w, c], 1), b + tensor(f"{name}_context_bias"), c.shape[1]
    layers = [(w, b)]
    while f"{name}_layer{len(layers) - 1}_weight" in FILE.files:
        k = len(layers) - 1
        layers.append((tensor(f"{name}_layer{k}_weight"), tensor(f"{name}_layer{k}_bias")))
    made = SyntheticGradient(
        w.shape[1] - classes, classes, [len(b) for _, b in layers[:-1]], out_dim=len(layers[-1][1])
    ).double()
    maps = [m for m in made.layers if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for m, (weight, bias) in zip(maps, layers, strict=True):
            m.weight.copy_(weight)
            m.bias.copy_(bias)
    return made


def first_gradients(made, name):
    """Our gradients under their names."""
    maps = [m for m in made.layers if isinstance(m, nn.Linear)]
    d = made.dim
    found = {"trigger_weight": maps[0].weight.grad[:, :d], "trigger_bias": maps[0].bias.grad}
    if made.context_dim:
        found |= {"context_weight": maps[0].weight.grad[:, d:], "context_bias": maps[0].bias.grad}
    for k, m in enumerate(maps[1:]):
        found |= {f"layer{k}_weight": m.weight.grad, f"layer{k}_bias": m.bias.grad}
    return {f"{name}_{key}_grad": value for key, value in found.items()}


def same(ours, name):
    np.testing.assert_allclose(ours.detach().numpy(), FILE[name], atol=1e-12, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("unlock", ["update", "backward"])
@pytest.mark.parametrize("case", ["linear_context", "mlp_context", "linear_plain", "one_sample"])
def test_feed_forward_steps(case, unlock):
    count = sum(f"{case}_block{i}_weight" in FILE.files for i in range(9))
    make = ACTIVATIONS[str(FILE[f"{case}_activation"])]
    blocks = [nn.Sequential(linear(f"{case}_block{i}"), make()) for i in range(count)]
    head = linear(f"{case}_head")
    synthesizers = [synthesizer(f"{case}_synthesizer{i}") for i in range(count)]
    x, y = tensor(f"{case}_x"), tensor(f"{case}_y")
    context = head.out_features if int(FILE[f"{case}_context"]) else None
    net = DecoupledSequential(
        blocks, synthesizers, head, example=x, context=context, target_scale="batch", unlock=unlock
    )
    lr = float(FILE[f"{case}_learning_rate"])
    # Theirs has a bias for the activation and one for the context, and each takes its step.
    twice = [m.layers[0].bias for m in synthesizers] if context else []
    rest = [p for p in net.parameters() if not any(p is t for t in twice)]
    sgd = torch.optim.SGD([{"params": rest}, {"params": twice, "lr": 2 * lr}], lr=lr)
    for s in range(3):
        here = f"{case}_step{s}"
        if f"{here}_loss" not in FILE.files:
            break
        sgd.zero_grad()
        same(net.training_step(x, y, F.cross_entropy), f"{here}_loss")
        for i, block in enumerate(blocks):
            same(block[0].weight.grad, f"{here}_block{i}_weight_grad")
            same(block[0].bias.grad, f"{here}_block{i}_bias_grad")
            predicted, target, _ = net.targets()[str(i)]
            same(predicted, f"{here}_synthetic_gradient{i}")
            same(target, f"{here}_target{i}")
            if s == 0:
                for name, grad in first_gradients(synthesizers[i], f"{here}_synthesizer{i}").items():
                    same(grad, name)
        same(head.weight.grad, f"{here}_head_weight_grad")
        sgd.step()
    for i, block in enumerate(blocks):
        same(block[0].weight, f"{case}_final_block{i}_weight")
        w = next(m for m in synthesizers[i].layers if isinstance(m, nn.Linear)).weight
        same(w[:, : synthesizers[i].dim], f"{case}_final_synthesizer{i}_trigger_weight")
    same(net.eval()(x), f"{case}_eval_logits")


@pytest.mark.parametrize("case", ["rnn", "rnn_unscaled"])
def test_recurrent_chunks(case):
    w = tensor(f"{case}_weight_ih_l0")
    rnn = nn.RNN(w.shape[1], w.shape[0]).double()
    with torch.no_grad():
        for name, p in rnn.named_parameters():
            p.copy_(tensor(f"{case}_{name}"))
    made = synthesizer(f"{case}_synthesizer")
    head = linear(f"{case}_head")
    net = DNIRecurrent(rnn, head, made, truncate=3, scale=float(FILE[f"{case}_factor"]), target_scale="batch")
    for k in (0, 1):
        here = f"{case}_chunk{k}"
        x, y = tensor(f"{here}_x"), tensor(f"{here}_y")
        if k == 0:
            net._carried = tensor(f"{here}_h0")[0]
        net.zero_grad()
        same(net.chunk(x, y, F.cross_entropy), f"{here}_loss")
        same(net._carried[None], f"{here}_hT")
        for name, p in rnn.named_parameters():
            same(p.grad, f"{here}_{name}_grad")
        same(head.weight.grad, f"{here}_head_weight_grad")
        for name, grad in first_gradients(made, f"{here}_synthesizer").items():
            same(grad * x.shape[1], name)  # the package sums over the batch here


def test_synthetic_inputs_and_gradients():
    block = nn.Sequential(linear("unlock_block"), nn.Tanh())
    head = linear("unlock_head")
    gradients, activations = synthesizer("unlock_gradient_synthesizer"), synthesizer("unlock_input_synthesizer")
    x, y = tensor("unlock_x"), tensor("unlock_y")
    net = DecoupledSequential(
        [block], [gradients], head, example=x, context=3, target_scale="batch", unlock="full", inputs={"0": activations}
    )
    assert isinstance(net, Decoupled)
    same(net.training_step(x, y, F.cross_entropy), "unlock_loss")
    same(block[0].weight.grad, "unlock_block_weight_grad")
    same(head.weight.grad, "unlock_head_weight_grad")
    predicted, target, _ = net.targets()["0"]
    same(predicted, "unlock_gradient_at_synthetic_hidden")
    same(target, "unlock_target_gradient")
    for made, name in ((activations, "unlock_input_synthesizer"), (gradients, "unlock_gradient_synthesizer")):
        for key, grad in first_gradients(made, name).items():
            same(grad, key)


def test_a_synthesizers_error_never_leaks_into_the_network():
    x, y = tensor("leak_x"), F.one_hot(torch.zeros(7, dtype=torch.long), 3)
    block, head, made = linear("leak_block"), linear("leak_head"), synthesizer("leak_synthesizer")
    # The labels are not in the file, but the target is: a head whose gradient at the activation is just that.
    target = tensor("leak_target")

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h.sum()

        @staticmethod
        def backward(ctx, g):
            return target

    class Head(nn.Module):
        def forward(self, h):
            return Through.apply(h)

    del head, y
    activation = next(a for a in (nn.Tanh(), nn.ReLU(), nn.Identity()) if _fits(block, a, x, target))
    net = DecoupledSequential(
        [nn.Sequential(block, activation)], [made], Head(), example=x, target_scale="batch", lam=1.0
    )
    net.training_step(x, None, lambda out, y: out)
    same(block.weight.grad, "leak_block_weight_grad_right")
    assert not np.allclose(FILE["leak_block_weight_grad_leaky"], block.weight.grad.numpy())
    for name, grad in first_gradients(made, "leak_synthesizer").items():
        same(grad, name)


def _fits(block, activation, x, target):
    weight = block.weight.detach().clone().requires_grad_(True)
    out = activation(F.linear(x, weight, block.bias.detach()))
    (grad,) = torch.autograd.grad(out, weight, target)
    return np.allclose(grad, FILE["leak_block_weight_grad_right"], atol=1e-12)
