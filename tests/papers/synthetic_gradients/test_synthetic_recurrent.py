"""Recurrent networks in chunks: against formulas by hand, with states of all kinds, ends and streams."""

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.infer import tensor_file
from mlcollage.papers.synthetic_gradients import DNIRecurrent, SyntheticGradient

LOSS = nn.CrossEntropyLoss()


class One(nn.Module):
    def forward(self, state, context=None):
        return torch.ones_like(state)


def scalar():
    """h' = tanh(0.5 h + x)."""
    rnn = nn.RNN(1, 1, bias=False, batch_first=True).double()
    with torch.no_grad():
        rnn.weight_ih_l0.fill_(1.0), rnn.weight_hh_l0.fill_(0.5)
    return rnn


def test_rows_that_end_get_nothing_from_the_future():
    """Rows x = (1, -1) and (0.5, 2) from h = 0.2, a synthetic gradient of 1 behind two steps."""
    x = torch.tensor([[[1.0], [-1.0]], [[0.5], [2.0]]], dtype=torch.float64)
    for ends, expected in (([True, False], 0.025495), ([False, False], 0.620831)):
        net = DNIRecurrent(scalar(), nn.Identity(), One(), truncate=2, scale=1.0, divisor="sum")
        net._carried = torch.full((2, 1), 0.2, dtype=torch.float64)
        net.chunk(x, x, lambda out, y: 0.0 * out.sum(), ends=torch.tensor(ends))
        assert float(net.rnn.weight_hh_l0.grad) == pytest.approx(expected, abs=1e-6)
        assert net._carried[0].item() == (0.0 if ends[0] else pytest.approx(net._carried[0].item()))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_exact_synthesizer_gives_the_whole_gradient(kind, layers, batch_first):
    """With the true gradient of the second half as its output, the first half's is that of the whole sequence."""
    torch.manual_seed(0)
    rnn = kind(3, 5, layers, batch_first=batch_first).double()
    head = nn.Linear(5, 4).double()
    x, y = torch.randn(6, 6, 3, dtype=torch.float64), torch.randint(4, (6, 6))  # as many steps as rows
    time = 1 if batch_first else 0
    out = head(rnn(x)[0])
    whole = LOSS(out.reshape(-1, 4), y.flatten())
    expected = torch.autograd.grad(whole, list(rnn.parameters()))
    net = DNIRecurrent(rnn, head, truncate=3, scale=1.0)
    first = x.narrow(time, 0, 3), y.narrow(time, 0, 3)
    second = x.narrow(time, 3, 3), y.narrow(time, 3, 3)
    state = net.flat(rnn(first[0])[1]).detach().requires_grad_(True)
    late = LOSS(head(rnn(second[0], net.unflat(state))[0]).reshape(-1, 4), second[1].flatten())
    (truth,) = torch.autograd.grad(late, state)

    class Exact(nn.Module):
        def forward(self, state, context=None):
            return truth * 18

    net.synthesizer = Exact()
    net.chunk(*first, LOSS)
    net.synthesizer = One()
    net.chunk(*second, LOSS, last=True)
    for p, g in zip(rnn.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad / 2, g)  # each chunk's loss is a mean over half the positions


def test_states_of_projections():
    rnn = nn.LSTM(3, 5, 2, proj_size=2, batch_first=True)
    net = DNIRecurrent(rnn, nn.Linear(2, 2), truncate=2)
    x = torch.randn(4, 2, 3)
    h, c = rnn(x)[1]
    assert (h.shape, c.shape) == ((2, 4, 2), (2, 4, 5))
    again = net.unflat(net.flat((h, c)))
    assert torch.equal(again[0], h)
    assert torch.equal(again[1], c)
    assert net.widths == [4, 10]


def test_seven_steps_by_three_make_three_chunks_and_two_injections():
    net = DNIRecurrent(nn.GRU(3, 5), nn.Linear(5, 2), truncate=3, aux=True)
    x, y = torch.randn(7, 4, 3), torch.zeros(7, 4, dtype=torch.long)
    assert len(list(net.chunks(x, y, LOSS))) == 3
    assert net.counts["injections"] == 2
    assert net.counts["aux"] == 3
    assert net.aux.weight.grad is not None
    assert net.last_loss["aux"] >= 0


def test_padding_is_in_no_loss():
    torch.manual_seed(0)
    net = DNIRecurrent(nn.GRU(3, 5, batch_first=True), nn.Linear(5, 2), truncate=2)
    x, y = torch.randn(3, 6, 3), torch.zeros(3, 6, dtype=torch.long)
    lengths = torch.tensor([6, 3, 2])
    found = []
    for fill in (0.0, 9.0):
        padded = torch.where(torch.arange(6)[None, :, None] < lengths[:, None, None], x, fill)
        net.zero_grad()
        losses = list(net.chunks(padded, y, LOSS, lengths=lengths))
        found.append([torch.stack(losses), *(p.grad.clone() for p in net.rnn.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_carried_state_belongs_to_its_rows():
    net = DNIRecurrent(nn.GRU(3, 5, batch_first=True), nn.Linear(5, 2), truncate=2)
    net.chunk(torch.randn(32, 2, 3), torch.zeros(32, 2, dtype=torch.long), LOSS)
    with pytest.raises(InvalidInput, match="state is for 32 rows, but the batch has 17"):
        net.chunk(torch.randn(17, 2, 3), torch.zeros(17, 2, dtype=torch.long), LOSS)
    net.reset()
    net.chunk(torch.randn(17, 2, 3), torch.zeros(17, 2, dtype=torch.long), LOSS)


def test_clipping_bounds_what_is_injected():
    net = DNIRecurrent(scalar(), nn.Identity(), One(), truncate=2, scale=1.0, clip=0.25, divisor="sum")
    x = torch.ones(2, 2, 1, dtype=torch.float64)
    free = DNIRecurrent(scalar(), nn.Identity(), One(), truncate=2, scale=1.0, divisor="sum")
    for n in (net, free):
        n.chunk(x, x, lambda out, y: 0.0 * out.sum())
    assert float(net.rnn.weight_ih_l0.grad) == pytest.approx(0.25 * float(free.rnn.weight_ih_l0.grad))


def test_what_cannot_be_cut_in_time():
    with pytest.raises(InvalidInput, match="reverse half"):
        DNIRecurrent(nn.GRU(3, 5, bidirectional=True), nn.Linear(10, 2), truncate=2)
    with pytest.raises(InvalidInput, match="truncate"):
        DNIRecurrent(nn.GRU(3, 5), nn.Linear(5, 2), truncate=0)
    net = DNIRecurrent(nn.GRU(3, 5), nn.Linear(5, 2), truncate=9)
    with pytest.warns(UserWarning, match="plain backpropagation"):
        list(net.chunks(torch.randn(4, 2, 3), torch.zeros(4, 2, dtype=torch.long), LOSS))
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 3)])
    with pytest.raises(InvalidInput, match="lengths"):
        list(net.chunks(packed, torch.zeros(3, 1), LOSS))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_training_saved_between_chunks_goes_on_to_the_same_numbers(kind, tmp_path):
    def make():
        torch.manual_seed(0)
        net = DNIRecurrent(
            kind(3, 5, 2), nn.Linear(5, 2), SyntheticGradient(20 if kind is nn.LSTM else 10, 2), truncate=2
        )
        return net, torch.optim.Adam(net.parameters(), 0.01)

    def train(net, adam, steps):
        for k in steps:
            adam.zero_grad()
            ends = torch.tensor([k == 2, False, k == 3, False])  # a reset is under way when the file is written
            net.chunk(x[2 * k : 2 * k + 2], y[2 * k : 2 * k + 2], LOSS, context=torch.eye(2)[y[0]], ends=ends)
            adam.step()

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, 3, generator=g), torch.randint(2, (12, 4), generator=g)
    net, adam = make()
    train(net, adam, range(4))
    file = tensor_file.save(tmp_path / "a", "training", {"net": net.state_dict(), "adam": adam.state_dict()})
    train(net, adam, range(4, 6))
    state = tensor_file.load(file, "training")
    again, fresh = make()
    again.load_state_dict(state["net"])
    fresh.load_state_dict({**state["adam"], "state": {int(k): v for k, v in state["adam"]["state"].items()}})
    train(again, fresh, range(4, 6))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))
    assert torch.equal(net._carried, again._carried)
    assert again.counts == net.counts
    other = DNIRecurrent(kind(3, 5, 2), nn.Linear(5, 2), net.synthesizer, truncate=3)
    with pytest.raises(InvalidInput, match="truncate=2, this network 3"):
        other.load_state_dict(net.state_dict())
