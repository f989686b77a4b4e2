"""Identities: what decoupled training must be equal to, in double precision."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.papers.synthetic_gradients import (
    ConvSyntheticGradient,
    DecoupledSequential,
    RecurrentSyntheticGradient,
    SyntheticGradient,
    decouple,
    feedback_weights,
)

LOSS = nn.CrossEntropyLoss()


def mlp(norm=False):
    torch.manual_seed(0)
    layers = []
    for a, b in itertools.pairwise((6, 8, 7, 5)):
        layers.append(nn.Sequential(nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU(inplace=True)))
    return nn.Sequential(*layers, nn.Linear(5, 3)).double()


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(20, 6, generator=g, dtype=torch.float64), torch.randint(3, (20,), generator=g)


def gradients(model):
    return [p.grad.clone() if p.grad is not None else None for p in model.parameters()]


def plain(model, x, y):
    model = copy.deepcopy(model)
    LOSS(model(x), y).backward()
    return gradients(model)


def close(a, b, tolerance=1e-12):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def randomized(net):
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in net.synthesizer_parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return net.double()


def with_cuts(model, x, **options):
    return randomized(decouple(model, ["0", "1", "2"], example=x, context=3, **options))


@pytest.mark.parametrize("options", [{"credit": "bp"}, {"lam": 1.0}])
def test_lambda_1_is_backpropagation(data, options):
    model = mlp(norm=True)
    expected = plain(model, *data)
    net = with_cuts(model, data[0], **options)
    net.training_step(*data, LOSS)
    close(gradients(model), expected)


def test_training_only_synthesizers_leaves_the_gradients_bit_for_bit(data):
    model = mlp()
    expected = plain(model, *data)
    net = with_cuts(model, data[0], lam=1.0)
    net.training_step(*data, LOSS)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))
    assert all(p.grad.abs().sum() > 0 for p in net.synthesizers.parameters())


def test_feedback_alignment_with_the_weights_themselves_is_backpropagation(data):
    model = mlp()
    expected = plain(model, *data)
    net = decouple(model, ["0", "1"], example=data[0], credit="fa")
    with torch.no_grad():
        for key, b in net._feedback.items():
            b.copy_(model.get_submodule(key.replace("/", ".")).weight)
    net.training_step(*data, LOSS)
    close(gradients(model), expected)


def test_feedback_alignment_of_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 3)
    )
    model = model.double()
    x, y = torch.randn(5, 2, 8, 8, dtype=torch.float64), torch.arange(5) % 3
    expected = plain(model, x, y)
    net = decouple(model, ["1"], example=x, credit="fa")
    assert sorted(feedback_weights(model)) == ["0", "2", "4"]
    with torch.no_grad():
        for key, b in net._feedback.items():
            b.copy_(model.get_submodule(key.replace("/", ".")).weight)
    net.training_step(x, y, LOSS)
    close(gradients(model), expected)
    with torch.no_grad():
        net._feedback["2"].neg_()
    model.zero_grad()
    net.training_step(x, y, LOSS)
    close(gradients(model)[:2], [-g for g in expected[:2]])
    assert "forward" not in model[0].__dict__


class Oracle(nn.Module):
    """Says the true gradient of one sample."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, h, context=None):
        return self.values


def test_lambda_0_with_an_oracle_is_backpropagation(data):
    model = mlp()
    x, y = data
    h, acts = x, []
    for part in list(model)[:-1]:
        h = part(h)
        acts.append(h)
    true = torch.autograd.grad(LOSS(model[-1](h), y), acts)
    expected = plain(model, *data)
    for unlock in ("update", "backward"):
        model.zero_grad()
        oracles = {str(i): Oracle(20 * g) for i, g in enumerate(true)}
        net = decouple(model, ["0", "1", "2"], example=x, context=3, synthesizers=oracles, unlock=unlock)
        for _ in range(2):  # the first step also looks for paths, the second updates at once
            model.zero_grad()
            net.training_step(*data, LOSS)
            close(gradients(model), expected)


@pytest.mark.parametrize("unlock", ["update", "backward"])
def test_duplicating_a_batch_changes_no_gradient(data, unlock):
    found = []
    for copies in (1, 3):
        net = with_cuts(mlp(norm=True), data[0], unlock=unlock)
        x, y = data[0].repeat(copies, 1), data[1].repeat(copies)
        net.training_step(x, y, LOSS)
        net.zero_grad()
        net.training_step(x, y, LOSS)
        found.append(gradients(net))
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_at_once_and_at_the_end_are_the_same(data):
    found = []
    for unlock in ("update", "backward"):
        net = with_cuts(mlp(norm=True), data[0], unlock=unlock)
        for _ in range(2):
            net.zero_grad()
            net.training_step(*data, LOSS)
        found.append(gradients(net))
    close(*found)


def test_a_loop_with_its_own_backward_pass_is_the_same(data):
    net = with_cuts(mlp(), data[0], lam=0.3)
    net.training_step(*data, LOSS)
    expected = gradients(net)
    net.zero_grad()
    with net.cut(data[1], LOSS):
        LOSS(net.model(data[0]), data[1]).backward()
    net.fill_synthesizers()
    close(gradients(net), expected)


def test_the_first_step_moves_no_part_below_a_cut(data):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    net = decouple(model, ["0", "1", "2"], example=data[0], context=3, hidden=(16,)).double()
    sgd = torch.optim.SGD(net.parameters(), lr=1.0)
    net.training_step(*data, LOSS)
    sgd.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"3.weight", "3.bias"}


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("the upper part ran backward")


class Upper(nn.Module):
    def forward(self, h):
        return Raises.apply(h)


def test_a_lower_part_never_needs_the_backward_pass_of_an_upper_one(data):
    """Targets are bootstrapped: block 1's own step is enough for block 0 and its synthesizer."""
    blocks = [nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 5), nn.ReLU()), Upper()]
    blocks = [b.double() for b in blocks]
    net = randomized(DecoupledSequential(blocks, None, nn.Linear(5, 3).double(), example=data[0], context=3))
    first = net.local_step(0, data[0], data[1], divisor=20.0)
    second = net.local_step(1, first.output, data[1], divisor=20.0)
    assert first.learn(second.below) > 0
    assert blocks[0][0].weight.grad.abs().sum() > 0
    assert next(net.synthesizers["0"].parameters()).grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="ran backward"):
        net.local_step(2, second.output, data[1], divisor=20.0)


def test_accumulated_batches_are_one_batch_of_both(data):
    x, y = data
    net = with_cuts(mlp(), x)
    net.training_step(x, y, LOSS)
    expected = gradients(net)
    net.zero_grad()
    for part in (slice(0, 10), slice(10, 20)):
        net.training_step(x[part], y[part], LOSS, scale=0.5)
    close(gradients(net), expected, 1e-10)


def test_random_times_update_some_parts(data):
    net = with_cuts(mlp(), data[0], probability=0.5)
    seen = set()
    for _ in range(12):
        net.zero_grad(set_to_none=True)
        net.training_step(*data, LOSS)
        seen.add(tuple(part[0].weight.grad is not None for part in list(net.model)[:-1]))
    assert len(seen) >= 4
    again = with_cuts(mlp(), data[0], probability=0.5)
    again.steps = 11
    again._checked = True
    again.training_step(*data, LOSS)
    last = tuple(part[0].weight.grad is not None for part in list(net.model)[:-1])
    assert tuple(part[0].weight.grad is not None for part in list(again.model)[:-1]) == last


@pytest.mark.parametrize("credit", ["sg", "bp", "fa", "dfa", "kickback", "critic"])
def test_every_rule_learns(credit):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(90, 6, generator=g, dtype=torch.float64)
    y = x[:, :3].argmax(1)
    net = decouple(mlp(norm=True), ["0", "1", "2"], example=x, context=3, credit=credit).double()
    adam = torch.optim.Adam(net.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        adam.zero_grad()
        losses.append(float(net.training_step(x, y, LOSS)))
        adam.step()
    assert losses[-1] < 0.8 * losses[0]


def test_direct_feedback_is_a_fixed_matrix_times_the_error(data):
    x, y = data
    model = mlp()
    net = decouple(model, ["0"], example=x, credit="dfa", seed=5)
    net.training_step(x, y, LOSS)
    error = (F.softmax(model(x), 1) - F.one_hot(y, 3)) / 20
    sent = error @ net._random["0"]
    h = model[0](x)
    expected = torch.autograd.grad(h, model[0][0].weight, sent)[0]
    torch.testing.assert_close(model[0][0].weight.grad, expected)


def test_kickback_is_the_error_times_the_influence(data):
    x, y = data
    model = mlp()
    net = decouple(model, ["0", "1"], example=x, credit="kickback")
    net.training_step(x, y, LOSS)
    h0 = model[0](x).detach().requires_grad_()
    h1 = model[1](h0)
    true = torch.autograd.grad(LOSS(model[3](model[2](h1)), y), h1, retain_graph=True)[0]
    influence = torch.autograd.grad(h1.sum(), h0)[0]
    sent = true.mean(1, keepdim=True) * influence
    expected = torch.autograd.grad(model[0](x), model[0][0].weight, sent)[0]
    torch.testing.assert_close(model[0][0].weight.grad, expected)


def test_what_none_and_noise_send(data):
    net = with_cuts(mlp(), data[0], credit="none")
    net.training_step(*data, LOSS)
    assert [p.grad is not None for p in net.model.parameters()] == [False] * 6 + [True] * 2
    noise = [with_cuts(mlp(), data[0], credit="noise", seed=s) for s in (0, 0, 1)]
    state = torch.get_rng_state()
    for net in noise:
        net.training_step(*data, LOSS)
    assert torch.equal(state, torch.get_rng_state())
    grads = [net.model[0][0].weight.grad for net in noise]
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])


@pytest.mark.parametrize(
    ("made", "h"),
    [
        (lambda: ConvSyntheticGradient(3, 4, (5,)), torch.randn(2, 3, 6, 6)),
        (lambda: ConvSyntheticGradient(3, 4, axes=1, kernel=3), torch.randn(2, 3, 9)),
        (lambda: RecurrentSyntheticGradient(3, 4, 5), torch.randn(2, 7, 3)),
        (lambda: SyntheticGradient(3, 4, (6, 6), "layer"), torch.randn(2, 7, 3)),
    ],
)
def test_synthesizers_start_at_zero_and_read_their_context(made, h):
    context = torch.eye(4)[:2]
    net = made()
    assert (net(h, context) == 0).all()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    assert net(h, context).shape == h.shape
    assert not torch.allclose(net(h, context), net(h, context.roll(1, 1)))
