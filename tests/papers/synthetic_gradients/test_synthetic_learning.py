"""Synthesizers without autograd, and steps in which they are not trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlcollage.errors import InvalidInput
from mlcollage.papers.synthetic_gradients import Context, SyntheticGradient, decouple, divisor_of, sg_quality
from mlcollage.papers.synthetic_gradients.learning import Said, SaidWithoutGraph, is_plain, learn, say

LOSS = nn.CrossEntropyLoss()


def _drawn(hidden: tuple[int, ...], context: int = 3, rank: int = 0) -> SyntheticGradient:
    torch.manual_seed(0)
    return SyntheticGradient(6, context, hidden, zero_init=False, rank=rank).double()


@pytest.mark.parametrize(("hidden", "rank"), [((), 0), ((7,), 0), ((7, 5), 0), ((), 2)])
@pytest.mark.parametrize("tokens", [False, True])
def test_written_gradients_equal_those_of_autograd(hidden: tuple[int, ...], rank: int, tokens: bool) -> None:
    own, other = _drawn(hidden, rank=rank), _drawn(hidden, rank=rank)
    shape = (4, 5, 6) if tokens else (20, 6)
    h, arrived = torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)
    context = torch.eye(3, dtype=torch.float64)[torch.arange(len(h)) % 3]
    rows = torch.arange(len(h)) != 2
    for _ in range(2):  # gradients add up
        said = say(own, h, context)
        assert isinstance(said, SaidWithoutGraph)
        loss = learn(said, arrived, rows, factor=8.0, scale=0.5)
        out = other(h, context)
        expected = (out - 8.0 * arrived)[rows].square().sum() / int(rows.sum())
        (0.5 * expected).backward()
        torch.testing.assert_close(said.value, out.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    for p, q in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


class _Own(SyntheticGradient):
    pass


@pytest.mark.parametrize("what", ["subclass", "norm", "hook", "hook of a part", "frozen", "hook of a weight"])
def test_whatever_else_listens_has_a_graph(what: str) -> None:
    made: SyntheticGradient = _Own(6) if what == "subclass" else SyntheticGradient(6, hidden=(4,), norm=None)
    if what == "norm":
        made = SyntheticGradient(6, hidden=(4,), norm="layer")
    elif what == "hook":
        made.register_forward_hook(lambda m, a, out: 2 * out)
    elif what == "hook of a part":
        made.layers[0].register_forward_hook(lambda m, a, out: 2 * out)
    elif what == "frozen":
        made.layers[0].weight.requires_grad_(False)
    elif what == "hook of a weight":
        made.layers[0].weight.register_hook(lambda g: 2 * g)
    assert not is_plain(made)
    assert type(say(made, torch.randn(3, 6))) is Said
    assert is_plain(SyntheticGradient(6, hidden=(4,)))


def test_a_hidden_layer_that_moved_is_told_of() -> None:
    made = _drawn((7,), 0)
    said = say(made, torch.randn(5, 6, dtype=torch.float64))
    with torch.no_grad():
        made.layers[-1].weight.mul_(2)
    with pytest.raises(InvalidInput, match="before the optimizer"):
        learn(said, torch.randn(5, 6, dtype=torch.float64))


def _network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).double()


def _drawn_net(**options: Any) -> Any:
    net = decouple(_network(), ["0", "2"], example=torch.randn(4, 5).double(), context=3, **options)
    torch.manual_seed(2)
    for p in net.synthesizer_parameters():
        nn.init.normal_(p)
    return net.double()


def test_steps_between_train_the_network_alike_and_no_synthesizer() -> None:
    x, y = torch.randn(12, 5).double(), torch.arange(12) % 3
    nets = [_drawn_net(), _drawn_net(train_every=3)]
    for step in range(7):
        for net in nets:
            net.zero_grad(set_to_none=True)
            net.training_step(x, y, LOSS)
        for p, q in zip(*(list(net.base_parameters()) for net in nets), strict=True):
            assert torch.equal(p.grad, q.grad)
        trained = [[p.grad is not None for p in net.synthesizer_parameters()] for net in nets]
        assert all(trained[0])
        assert trained[1] == [step % 3 == 0] * len(trained[1])
    assert set(sg_quality(nets[1], x, y, LOSS)) == {"0", "2"}  # whatever the step


def test_steps_between_compute_no_gradient_at_a_cut() -> None:
    seen: list[bool] = []

    class Looks(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            seen.append(h.requires_grad)
            return h

    model = nn.Sequential(nn.Linear(5, 8), Looks(), nn.Linear(8, 3))
    net = decouple(model, ["0"], example=torch.randn(4, 5), context=3, train_every=2)
    seen.clear()
    for _ in range(4):
        net.training_step(torch.randn(6, 5), torch.arange(6) % 3, LOSS)
    assert seen == [True, False, True, False]


def test_synthesizers_that_are_trained_seldom_are_refused_where_it_spares_nothing() -> None:
    for options in ({"credit": "dfa"}, {"lam": 0.5}):
        with pytest.raises(InvalidInput, match="train_every"):
            _drawn_net(train_every=2, **options)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(8, 3)

        def forward(self, h: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.inside, h, use_reentrant=True)
            return out

    model = nn.Sequential(nn.Linear(5, 8), Checkpointed())
    net = decouple(model, ["0"], example=torch.randn(4, 5), context=3, train_every=2)
    with pytest.raises(InvalidInput, match="use_reentrant=False"):
        net.training_step(torch.randn(6, 5), torch.arange(6) % 3, LOSS)


def test_the_divisor_of_labels_that_all_count_is_their_number() -> None:
    y = torch.tensor([0, 2, 1, 1])
    below = Context("labels", 3)(y).below
    assert below == 3
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    for loss_fn in (LOSS, nn.CrossEntropyLoss(ignore_index=1), nn.CrossEntropyLoss(reduction="sum"), weighted):
        assert divisor_of(loss_fn, y, below=below) == divisor_of(loss_fn, y)
    assert Context("labels", 3)(torch.tensor([0, -100])).below == 0


def test_a_copy_of_a_network_is_trained_as_the_network() -> None:
    x, y = torch.randn(12, 5).double(), torch.arange(12) % 3
    net = _drawn_net()
    other = copy.deepcopy(net)
    for n in (net, other):
        n.training_step(x, y, LOSS)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_a_rank_below_the_classes_is_enough_near_a_point() -> None:
    """The best linear map of a classifier's gradient, fitted near one activation, has rank C - 1."""
    g = torch.Generator().manual_seed(0)
    upper = torch.randn(8, 3, generator=g, dtype=torch.float64)
    h = torch.randn(8, generator=g, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda a: upper @ (a @ upper).softmax(0), h)
    made = SyntheticGradient(8, 3, rank=2).double()
    left, values, right = torch.linalg.svd(slope)
    assert float(values[2]) < 1e-14
    with torch.no_grad():
        made.layers[0].weight.copy_(right[:2])
        made.layers[1].weight.copy_(torch.cat([left[:, :2] * values[:2], -upper], 1))
        made.layers[1].bias.copy_(upper @ (h @ upper).softmax(0) - slope @ h)
    for step in (1e-3, 1e-4):
        near = h + step * torch.randn(5, 8, generator=g, dtype=torch.float64)
        near.requires_grad_(True)
        nn.functional.cross_entropy(near @ upper, torch.arange(5) % 3, reduction="sum").backward()
        error = (made(near.detach(), torch.eye(3).double()[torch.arange(5) % 3]) - near.grad).abs().max()
        assert float(error.detach()) < 30 * step**2  # of second order


def test_a_low_rank_starts_at_zero_and_learns_in_steps() -> None:
    net = decouple(_network(), ["0", "2"], example=torch.randn(4, 5).double(), context=3, rank=2).double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.arange(30) % 3
    net.training_step(x, y, LOSS)
    assert float(net.model[0].weight.grad.abs().max()) == 0
    adam = torch.optim.Adam(net.synthesizer_parameters(), lr=0.03)
    for _ in range(200):
        adam.zero_grad()
        net.training_step(x, y, LOSS)
        adam.step()
    assert net.report()["2"]["relative_error"] < 0.5


def test_ranks_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InvalidInput, match="without hidden layers"):
        SyntheticGradient(4, hidden=(3,), rank=2)
    with pytest.raises(InvalidInput, match="rank must be"):
        SyntheticGradient(4, rank=-1)
    conv = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    with pytest.raises(InvalidInput, match=r"hidden=\(2,\)"):
        decouple(conv, ["1"], example=torch.randn(3, 2, 6, 6), context=3, rank=2)
