"""What users give, against plain autograd and numpy written out here, and what is refused in one sentence."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.synthetic_gradients import (
    Context,
    DNIRecurrent,
    SyntheticGradient,
    decouple,
    divisor_of,
    linear_sg_convergence,
    sg_quality,
)

LOSS = nn.CrossEntropyLoss()
N = 12


@pytest.fixture
def x():
    return torch.randn(N, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


Y = torch.arange(N) % 3
HOT = F.one_hot(Y, 3).double()


def chain():
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(a, 8), nn.Tanh()) for a in (6, 8)]
    return nn.Sequential(*parts, nn.Linear(8, 3)).double()


def randomized(net):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.synthesizer_parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return net.double()


def close(parameters, gradients, tolerance=1e-11):
    for p, g in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=tolerance, atol=tolerance)


def grads(value, parameters, along=None):
    return torch.autograd.grad(value, list(parameters), along, retain_graph=True)


# Against autograd ----------------------------------------------------------------------------------------------


def test_class_weights_ignored_labels_and_smoothing_at_once(x):
    y = Y.clone()
    y[3] = -100
    weight = torch.tensor([1.0, 2.0, 5.0]).double()
    loss_fn = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1)
    m = chain()
    net = randomized(decouple(m, ["0", "1"], example=x, context=3, hidden=(7,)))
    net.training_step(x, y, loss_fn)
    divisor, keep = float(weight[y[y >= 0]].sum()), (y >= 0).double()[:, None]
    first, second = net.synthesizers["0"], net.synthesizers["1"]
    h1 = m[0](x)
    a = h1.detach().requires_grad_()
    h2 = m[1](a)
    b = h2.detach().requires_grad_()
    said1, said2 = first(a.detach(), HOT * keep), second(b.detach(), HOT * keep)
    (true,) = grads(loss_fn(m[2](b), y), [b])
    *own2, below = grads(h2, [*m[1].parameters(), a], said2.detach() * keep / divisor)
    close(m[0].parameters(), grads(h1, m[0].parameters(), said1.detach() * keep / divisor))
    close(m[1].parameters(), own2)
    close(first.parameters(), grads(((said1 - below * divisor) ** 2 * keep).sum() / 11, first.parameters()))
    close(second.parameters(), grads(((said2 - true * divisor) ** 2 * keep).sum() / 11, second.parameters()))
    assert net.report()["1"]["divisor"] == divisor


def test_lambda_mixes_as_the_recursion_says(x):
    torch.manual_seed(0)
    m = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)], nn.Linear(6, 3)).double()
    net = randomized(decouple(m, ["0", "1", "2"], example=x, context=3, lam=0.3))
    net.training_step(x, Y, LOSS)
    h, inside = x, []
    for block in list(m)[:3]:
        leaf = h.detach().requires_grad_()
        h = block(leaf)
        inside.append((leaf, h))
    top = h.detach().requires_grad_()
    (arrived,) = grads(LOSS(m[3](top), Y), [top])
    for i in (2, 1, 0):
        leaf, h = inside[i]
        torch.testing.assert_close(net.targets()[str(i)][1], arrived * N)
        mixed = 0.7 * net.synthesizers[str(i)](h.detach(), HOT).detach() / N + 0.3 * arrived
        *own, arrived = grads(h, [*m[i].parameters(), leaf], mixed)
        close(m[i].parameters(), own)


def test_a_critic_is_the_slope_of_a_predicted_loss(x):
    m = chain()
    net = randomized(decouple(m, ["0"], example=x, context=3, credit="critic"))
    net.training_step(x, Y, LOSS)
    critic, h = net.synthesizers["0"], m[0](x)
    leaf = h.detach().requires_grad_()
    foreseen = critic(leaf, HOT)
    (slope,) = grads(foreseen.sum(), [leaf])
    close(m[0].parameters(), grads(h, m[0].parameters(), slope / N))
    losses = F.cross_entropy(m(x), Y, reduction="none").detach()
    close(critic.parameters(), grads(((foreseen - losses) ** 2).mean(), critic.parameters()))


def test_two_cuts_fully_unlocked(x):
    m = chain()
    net = randomized(decouple(m, ["0", "1"], example=x, context=3, unlock="full"))
    for _ in range(2):  # the second step updates at once
        net.zero_grad()
        net.training_step(x, Y, LOSS)
    made = [net.inputs[k](x, HOT) for k in "01"]
    a, b = (t.detach().requires_grad_() for t in made)
    h1, h2 = m[0](x), m[1](a)
    said = [net.synthesizers[k](h.detach(), HOT).detach() / N for k, h in (("0", h1), ("1", h2))]
    (true,) = grads(LOSS(m[2](b), Y), [b])
    *own, below = grads(h2, [*m[1].parameters(), a], said[1])
    close(m[0].parameters(), grads(h1, m[0].parameters(), said[0]))
    close(m[1].parameters(), own)
    error = 0.0
    for k, leaf, target, copy, real in (("0", a, below, made[0], h1), ("1", b, true, made[1], h2)):
        error = error + (net.synthesizers[k](leaf.detach(), HOT) - target * N).square().sum() / N
        error = error + (copy - real.detach()).square().mean()
    close(net.synthesizer_parameters(), grads(error, net.synthesizer_parameters()))


@pytest.mark.parametrize("flat", [False, True])
def test_tokens_with_labels_of_their_own(flat):
    """(B, T) labels of which two are ignored; with ``flat`` the network runs on (B * T, d) tokens."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3)

        def forward(self, x):
            h = self.body(x.flatten(0, 1) if flat else x)
            return self.head(h).reshape(4, 5, 3).transpose(1, 2)

    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(20).reshape(4, 5) % 3
    y[0, 3:] = -100
    m = Net().double()
    net = randomized(decouple(m, ["body"], example=x, context=3))
    net.training_step(x, y, LOSS)
    keep = (y >= 0).double()[..., None]
    hot = F.one_hot(y.clamp(min=0), 3).double() * keep
    h = m.body(x)
    leaf = h.detach().requires_grad_()
    (true,) = grads(LOSS(m.head(leaf).transpose(1, 2), y), [leaf])
    said = net.synthesizers["body"](leaf.detach(), hot)
    close(m.body.parameters(), grads(h, m.body.parameters(), said.detach() * keep / 18))
    own = net.synthesizer_parameters()
    close(own, grads(((said - true * 18) ** 2 * keep).sum() / 18, own))


def test_time_first_with_a_mask():
    """(T, B, d) with as many steps as samples, so that a wrong axis would go unnoticed."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 5, 6, generator=g, dtype=torch.float64)
    y, mask = torch.randint(3, (5, 5), generator=g), torch.rand(5, 5, generator=g) > 0.3
    torch.manual_seed(0)
    m = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3)).double()
    count = float(mask.sum())

    def loss_fn(z, t):
        return F.cross_entropy(z.transpose(0, 1)[mask], t[mask])

    net = randomized(decouple(m, ["0"], example=x, context=3, batch_dim=1, divisor=count))
    net.training_step(x, y, loss_fn, mask=mask)
    keep, h = mask.T[..., None].double(), m[0](x)
    leaf = h.detach().requires_grad_()
    (true,) = grads(loss_fn(m[1](leaf), y), [leaf])
    said = net.synthesizers["0"](leaf.detach(), F.one_hot(y, 3).double().transpose(0, 1))
    close(m[0].parameters(), grads(h, m[0].parameters(), said.detach() * keep / count))
    own = net.synthesizer_parameters()
    close(own, grads(((said - true * count) ** 2 * keep).sum() / count, own))


def test_several_labels_a_sample(x):
    t = (torch.rand(N, 3, generator=torch.Generator().manual_seed(1)) > 0.5).double()
    m, loss_fn = chain(), nn.BCEWithLogitsLoss()
    net = randomized(decouple(m, ["0"], example=x, context=Context("labels", 3)))
    net.training_step(x, t, loss_fn)
    h = m[0](x)
    leaf = h.detach().requires_grad_()
    (true,) = grads(loss_fn(m[2](m[1](leaf)), t), [leaf])
    close(m[0].parameters(), grads(h, m[0].parameters(), net.synthesizers["0"](h.detach(), t).detach() / (3 * N)))
    torch.testing.assert_close(net.targets()["0"][1], true * 3 * N)


def test_quality_is_that_of_the_true_gradient(x):
    m = chain()
    net = randomized(decouple(m, ["0", "1"], example=x, context=3))
    found = sg_quality(net, x, Y, LOSS)["0"]
    h = m[0](x).detach().requires_grad_()
    true = grads(LOSS(m[2](m[1](h)), Y) * N, [h])[0].numpy()
    said = net.synthesizers["0"](h.detach(), HOT).detach().numpy()
    cosines = (said * true).sum(1) / np.linalg.norm(said, axis=1) / np.linalg.norm(true, axis=1)
    assert found["cosine"] == pytest.approx(cosines.mean(), abs=1e-12)
    assert found["relative_error"] == pytest.approx(((said - true) ** 2).sum() / (true**2).sum())
    assert found["loss"] == pytest.approx(((said - true) ** 2).sum() / N)


def test_the_linear_theory_in_numpy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 3)), rng.normal(size=30)
    rows, w, m = np.c_[x, np.ones(30)], np.zeros(4), np.zeros(3)
    best = np.linalg.lstsq(rows, y, rcond=None)[0]
    for _ in range(50):
        h = rows @ w
        read, residual = np.c_[h, y, np.ones(30)], h - y
        said = read @ m
        w = w - 0.05 * rows.T @ said / 30
        error = said - residual
        slope = read.T @ error / 30
        m = m - (error @ (read @ slope)) / np.sum((read @ slope) ** 2) * slope
    found = linear_sg_convergence(torch.tensor(x), torch.tensor(y), steps=50)
    gap = 0.5 * np.mean((rows @ w - y) ** 2) - 0.5 * np.mean((rows @ best - y) ** 2)
    assert found.final_gap == pytest.approx(gap, abs=1e-13)


def test_streams_that_go_on_with_scale_clip_and_two_layers():
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    rnn, head = nn.GRU(3, 5, 2, batch_first=True).double(), nn.Linear(5, 4).double()
    made = SyntheticGradient(10, 4, (6,), zero_init=False).double()
    net = DNIRecurrent(rnn, head, made, truncate=2, scale=0.3, clip=0.5)
    x, y = torch.randn(3, 6, 3, generator=g, dtype=torch.float64), torch.randint(4, (3, 6), generator=g)
    context, state = torch.eye(4).double()[:3], torch.zeros(2, 3, 5).double()
    for start, stop in ((0, 4), (4, 6)):  # two calls, as of a stateful loader
        part = slice(start, stop)
        chunks = net.chunks(x[:, part], y[:, part], LOSS, context=context, goes_on=True)
        for at in range(start, stop, 2):
            next(chunks)
            h0 = state.detach().requires_grad_()
            out, state = rnn(x[:, at : at + 2], h0)
            ahead = state.transpose(0, 1).flatten(1)
            sent = 0.3 * made(ahead.detach(), context).detach()
            sent = sent * (0.5 / sent.norm(dim=1, keepdim=True)).clamp(max=1)
            value = LOSS(head(out).flatten(0, 1), y[:, at : at + 2].flatten()) + (ahead * sent).sum() / 6
            *own, target = grads(value, [*rnn.parameters(), *head.parameters(), h0])
            close([*rnn.parameters(), *head.parameters()], own)
            if at:
                said = made(h0.detach().transpose(0, 1).flatten(1), context)
                error = (said - 6 * target.transpose(0, 1).flatten(1)).square().sum() / 3
                close(made.parameters(), grads(error, made.parameters()))
            net.zero_grad()


def test_chunks_without_any_label_only_carry_credit():
    """The label comes last, -100 before: torch's mean of nothing would be NaN."""
    torch.manual_seed(0)
    net = DNIRecurrent(nn.RNN(2, 4), nn.Linear(4, 2), SyntheticGradient(4, zero_init=False), truncate=2)
    x, y = torch.randn(6, 5, 2), torch.full((6, 5), -100)
    y[-1] = torch.arange(5) % 2
    losses = [float(loss) for loss in net.chunks(x, y, LOSS)]
    assert losses[:2] == [0.0, 0.0]
    assert losses[2] > 0
    net.zero_grad()
    net.chunk(x[:2], y[:2], LOSS)
    out = net.rnn(x[:2])[0]
    said = net.synthesizer(out[-1].detach()).detach()
    close(net.rnn.parameters(), grads(out[-1], net.rnn.parameters(), 0.1 * said / 5), 1e-6)  # five rows


# Loops that call backward --------------------------------------------------------------------------------------


def test_accumulation_in_a_loop_of_your_own(x):
    net = randomized(decouple(chain(), ["0", "1"], example=x, context=3, lam=0.5))
    net.training_step(x, Y, LOSS)
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for part in (slice(0, 6), slice(6, 12)):
        with net.cut(Y[part], LOSS, scale=0.5):
            loss = LOSS(net.model(x[part]), Y[part]) / 2
        loss.backward()
        net.fill_synthesizers()
    close(net.parameters(), expected)


@pytest.mark.parametrize("lam", [0.0, 0.4])
def test_several_backward_passes_add_up(x, lam):
    found = []
    for shares in ((1.0,), (0.25, 0.75)):
        net = randomized(decouple(chain(), ["0"], example=x, context=3, lam=lam))
        with net.cut(Y, LOSS):
            z = net.model(x)
        for share in shares:
            (share * LOSS(z, Y)).backward(retain_graph=True)
        net.fill_synthesizers()
        found.append([p.grad for p in net.parameters()])
    close(net.parameters(), found[0])


def test_a_step_between_backward_and_fill_is_told_of(x):
    net = randomized(decouple(chain(), ["0"], example=x, context=3, hidden=(4,)))
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    net.training_step(x, Y, LOSS)  # so that all parameters have gradients, and move
    with net.cut(Y, LOSS):
        loss = LOSS(net.model(x), Y)
    loss.backward()
    sgd.step()
    with pytest.raises(InvalidInput, match="call fill_synthesizers after backward"):
        net.fill_synthesizers()


# What models and files are -------------------------------------------------------------------------------------


def test_a_saved_object_and_an_average_train_on(x):
    net = randomized(decouple(chain(), ["0", "1"], example=x, context=3))
    net.training_step(x, Y, LOSS)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    mean = torch.optim.swa_utils.AveragedModel(net)
    mean.update_parameters(net)
    for other in (again, mean.module):
        for n in (net, other):
            n.zero_grad()
            n.training_step(x, Y, LOSS)
        close(net.parameters(), [p.grad for p in other.parameters()])


def test_adapters_train_alone(x):
    class Adapted(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.base = nn.Linear(a, b).requires_grad_(False)
            self.down, self.up = nn.Linear(a, 2, bias=False), nn.Linear(2, b, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    m = nn.Sequential(Adapted(6, 8), nn.Tanh(), Adapted(8, 8), nn.Tanh(), Adapted(8, 3)).double()
    randomized(decouple(m, ["1", "3"], example=x, context=3)).training_step(x, Y, LOSS)
    assert all((p.grad is None) == ("base" in name) for name, p in m.named_parameters())


@pytest.mark.parametrize("kind", ["dead", "one class", "one output"])
def test_gradients_that_are_zero_or_of_rank_one(x, kind):
    outputs = 3 if kind == "dead" else 1
    m = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs)).double()
    if kind == "one output":
        net = decouple(m, ["1"], example=x, credit="dfa")
        net.training_step(x, x[:, :1], nn.MSELoss())
        error = 2 * (m(x) - x[:, :1]) / N
        h = m[1](m[0](x))
        close(m[0].parameters(), grads(h, m[0].parameters(), error @ net._random["1"]))
        return
    with torch.no_grad():
        m[2].bias.fill_(-1e3 if kind == "dead" else 0.0)
    net = randomized(decouple(m, ["1"], example=x, context=outputs))
    net.training_step(x, Y if kind == "dead" else torch.zeros_like(Y), LOSS)
    found = net.report()["1"]
    assert found["zero_rows"] == 1.0
    assert np.isnan(found["cosine"])
    assert np.isfinite(found["loss"])


def test_a_transformer_by_keyword_arguments():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    m = transformers.BertForSequenceClassification(config)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[0, 4:] = 0
    batch = {"input_ids": torch.arange(28).reshape(4, 7), "attention_mask": mask, "labels": torch.arange(4) % 3}
    net = decouple(m, ["bert.encoder.layer.0"], example=batch, context=3, divisor="samples", lam=1.0)
    net.training_step(batch, batch["labels"], mask=mask)
    exact = [p.grad.clone() for p in m.parameters() if p.grad is not None]
    m.zero_grad()
    m(**batch).loss.backward()
    close([p for p in m.parameters() if p.grad is not None], exact, 1e-6)
    _, target, rows = net.targets()["bert.encoder.layer.0"]
    assert rows.sum() == 25
    assert target.shape == (4, 7, 16)


# Refusals ------------------------------------------------------------------------------------------------------


def recurrent(**options):
    return DNIRecurrent(nn.GRU(3, 5), nn.Linear(5, 2), truncate=2, **options)


SEQUENCES, TARGETS = torch.randn(6, 4, 3), torch.zeros(6, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (lambda n, x: n.training_step(x, Y[:5], LOSS), r"context is of 5 samples, but the activation \(12, 8\)"),
        (lambda n, x: n.training_step(x, Y, LOSS, mask=torch.ones(5)), r"mask are of 5 samples, but the activation at"),
        (lambda n, x: n.training_step(x, Y.tolist(), LOSS), "targets must be a tensor, not list"),
        (lambda n, x: divisor_of(LOSS, Y.numpy()), "targets that are a tensor, not ndarray"),
        (lambda n, x: n.fill_synthesizers(), "follows a backward pass"),
        (lambda n, x: decouple(nn.DataParallel(chain()), ["0"], example=x), r"give the network inside it"),
        (lambda n, x: list(recurrent().chunks(SEQUENCES, TARGETS[:5], LOSS)), r"targets \(5, 4\) do not belong"),
        (lambda n, x: list(recurrent().chunks(SEQUENCES, TARGETS, LOSS, lengths=[3, 4])), "lengths must be 4 numbers"),
        (lambda n, x: list(recurrent().chunks(SEQUENCES, TARGETS, LOSS, lengths=[3, 4, 9, 2])), "from 0 to 6"),
        (lambda n, x: linear_sg_convergence(x * float("nan"), x[:, 0]), "NaN or infinity"),
        (lambda n, x: linear_sg_convergence(16 * x, x[:, 0], steps=200), "diverged at step"),
    ],
)
def test_one_sentence_says_what_is_wrong(x, what, sentence):
    net = randomized(decouple(chain(), ["0"], example=x, context=3))
    with pytest.raises(InvalidInput, match=sentence):
        what(net, x)


def test_rows_of_other_streams_are_refused():
    net = recurrent()
    net.chunk(SEQUENCES[:2], TARGETS[:2], LOSS, streams=torch.tensor([7, 8, 9, 10]))
    with pytest.raises(InvalidInput, match="other streams than the carried state"):
        net.chunk(SEQUENCES[2:4], TARGETS[2:4], LOSS, streams=torch.tensor([8, 7, 9, 10]))
    net.reset()
    net.chunk(SEQUENCES[2:4], TARGETS[2:4], LOSS, streams=torch.tensor([8, 7, 9, 10]))
    assert net.counts["injections"] == 2


def test_a_loop_of_your_own_cannot_do_every_rule(x):
    for options in ({"credit": "dfa"}, {"credit": "kickback"}, {"credit": "critic"}, {"unlock": "full"}):
        net = decouple(chain(), ["0"], example=x, context=3, **options)
        with pytest.raises(InvalidInput, match="needs training_step"), net.cut(Y, LOSS):
            pass
