"""Tr(F): exact against autograd, drawn against exact, as part of a loss; and what cannot be measured."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.measure._likelihood import columns, count_columns
from mlcollage.measure.fisher import fisher_sqnorm, fisher_trace, sample_labels
from mlcollage.measure.grad_norms import GhostNorms
from mlcollage.measure.trace import TraceResult
from mlcollage.nn.init import seeded
from mlcollage.nn.mlp import MLP
from mlcollage.nn.resnet import ResNet


def build(make):
    with seeded(0):
        return make().double()


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(outputs=3):
    return build(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)))


def nll(z, y, likelihood):
    if likelihood == "categorical":
        return F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1), reduction="sum")
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(z, y, reduction="sum")
    return (z - y).square().sum() / 2


def matrix_trace(model, x, likelihood="categorical"):
    """Tr(J^T F_z J) for each example, F_z by formula, J row by row."""
    params = list(model.parameters())
    traces = []
    for i in range(len(x)):
        z = model(x[i : i + 1])[0].reshape(-1)
        rows = [torch.autograd.grad(v, params, retain_graph=True) for v in z]
        j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        if likelihood == "categorical":
            p = z.softmax(0)
            inner = torch.diag(p) - torch.outer(p, p)
        else:
            inner = torch.diag(z.sigmoid() * (1 - z.sigmoid())) if likelihood == "bernoulli" else torch.eye(len(z))
        traces.append(((inner.double() @ j) * j).sum())
    return torch.stack(traces).detach()


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_exact_is_the_trace_of_the_matrix(likelihood):
    model, x = mlp(), inputs(5, 4)
    found = fisher_trace(model, x, likelihood=likelihood, per_example=True, per_layer=True, batch_size=2)
    truth = matrix_trace(model, x, likelihood)
    torch.testing.assert_close(found.per_example, truth)
    assert found.value == pytest.approx(float(truth.mean()))
    assert found.stderr == 0
    assert found.draws == 0
    assert sum(found.per_layer.values()) == pytest.approx(found.value)
    assert set(found.per_layer) == {"0", "2"}


def test_exact_is_the_expectation_over_labels():
    model, x = build(lambda: ResNet((1, 8, 8), 4, blocks=(1,), width=4, norm="group")), inputs(3, 1, 8, 8)
    p = model(x).softmax(1).detach()
    total = torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        for k in range(4):
            loss = F.cross_entropy(model(x[i : i + 1]), torch.tensor([k]))
            g = torch.autograd.grad(loss, list(model.parameters()))
            total[i] += p[i, k] * sum(v.square().sum() for v in g)
    torch.testing.assert_close(fisher_trace(model, x, per_example=True).per_example, total)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-300, 300), min_size=2, max_size=6), st.integers(1, 7))
def test_columns_are_a_root_of_the_outputs_fisher_matrix(z, size):
    z = torch.tensor([z], dtype=torch.float64)
    root = torch.cat(list(columns(z, "categorical", 1, size)))[:, 0]
    assert len(root) == z.shape[1] - 1 == count_columns(z, "categorical", 1)
    p = z[0].softmax(0)
    torch.testing.assert_close(root.T @ root, torch.diag(p) - torch.outer(p, p), atol=1e-15, rtol=1e-9)


def test_columns_of_tokens_and_pixels():
    z = inputs(2, 3, 4)
    root = torch.cat(list(columns(z, "categorical", 2, 5)))
    assert root.shape == (9, 2, 3, 4)
    gram = torch.einsum("kbtc,kbsd->btcsd", root, root)
    p = z.softmax(2)
    for t in range(3):
        inner = torch.diag_embed(p[:, t]) - p[:, t, :, None] * p[:, t, None, :]
        torch.testing.assert_close(gram[:, t, :, t], inner)
        torch.testing.assert_close(gram[:, t, :, t - 1], torch.zeros_like(inner))
    moved = torch.cat(list(columns(z.movedim(2, 1), "categorical", 1, 9)))
    torch.testing.assert_close(moved.movedim(2, 3), root)


class Tokens(nn.Module):
    def __init__(self, image=False):
        super().__init__()
        self.image, self.mix, self.head = image, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        z = self.head(torch.tanh(self.mix(x)) + x.mean(1, keepdim=True).sum(-1, keepdim=True))
        return z.unsqueeze(1).movedim(-1, 1) if self.image else z


def test_tokens_and_pixels():
    x = inputs(3, 2, 4)
    model = build(Tokens)
    params = list(model.parameters())
    truth = torch.zeros(3, dtype=torch.float64)
    for i in range(3):  # labels of the tokens are independent given x: all combinations
        z = model(x[i : i + 1])
        p = z[0].softmax(-1)
        for a in range(3):
            for b in range(3):
                g = torch.autograd.grad(nll(z, torch.tensor([[a, b]]), "categorical"), params, retain_graph=True)
                truth[i] += (p[0, a] * p[1, b]).detach() * sum(v.square().sum() for v in g)
    torch.testing.assert_close(fisher_trace(model, x, per_example=True).per_example, truth)
    image = build(lambda: Tokens(True))
    assert image(x).shape == (3, 3, 1, 2)
    torch.testing.assert_close(fisher_trace(image, x, per_example=True).per_example, truth)
    drawn = fisher_trace(model, x, method="mc", draws=2000, generator=0)
    assert abs(drawn.value - float(truth.mean())) < 4 * drawn.stderr


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("method", ["mc", "minibatch"])
def test_drawn_estimates_are_unbiased_and_their_errors_honest(method, likelihood):
    model, x = mlp(), inputs(6, 4)
    truth = float(matrix_trace(model, x, likelihood).mean())
    found = fisher_trace(
        model, x, method=method, likelihood=likelihood, draws=400, generator=0, batch_size=4, per_layer=True
    )
    assert abs(found.value - truth) < 4 * found.stderr
    assert sum(found.per_layer.values()) == pytest.approx(found.value)
    again = [fisher_trace(model, x, method=method, likelihood=likelihood, draws=10, generator=s) for s in range(60)]
    spread = torch.tensor([r.value for r in again]).std()
    assert float(torch.tensor([r.stderr for r in again]).mean()) == pytest.approx(float(spread), rel=0.35)


def test_the_minibatch_identity_holds_exactly():
    """The mean over all label combinations of B |mean gradient|^2 is the mean trace."""
    model, x = mlp(2), inputs(3, 4)
    z = model(x)
    p = z.softmax(1).detach()
    total = 0.0
    for code in range(8):
        y = torch.tensor([code >> i & 1 for i in range(3)])
        g = torch.autograd.grad(F.cross_entropy(z, y), list(model.parameters()), retain_graph=True)
        total += float(p[range(3), y].prod() * 3 * sum(v.square().sum() for v in g))
    assert total == pytest.approx(fisher_trace(model, x).value)


def test_standard_errors_without_repeated_draws():
    model, x = mlp(), inputs(40, 4)
    one = fisher_trace(model, x, method="mc", generator=0, per_example=True)
    assert one.stderr == pytest.approx(float(one.per_example.std()) / math.sqrt(40))
    assert math.isnan(fisher_trace(model, x, method="minibatch", generator=0).stderr)
    several = fisher_trace(model, x, method="minibatch", generator=0, batch_size=4)
    assert several.stderr > 0
    assert math.isnan(TraceResult(1.0, math.nan).interval()[0])
    assert TraceResult(1.0, 0.0).interval() == (1.0, 1.0)


def test_same_seed_same_numbers_and_the_global_state_is_untouched():
    model, x = mlp(), inputs(6, 4)
    before = torch.get_rng_state()
    a, b = (fisher_trace(model, x, method="mc", generator=3).value for _ in range(2))
    c = fisher_trace(model, x, method="mc", generator=torch.Generator().manual_seed(3)).value
    assert a == b == c
    assert a != fisher_trace(model, x, method="mc", generator=4).value
    assert torch.equal(before, torch.get_rng_state())


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x):
        h = self.body(x)
        return {"hidden": h * 2, "logits": h.sin()}


def test_kinds_of_data_and_of_output():
    model, x = mlp(), inputs(10, 4)
    y = torch.zeros(10, dtype=torch.long)
    truth = fisher_trace(model, x).value
    loader = DataLoader(TensorDataset(x, y), batch_size=3)  # the last batch has one example
    for data in (x, (x, y), loader, [x[:7], x[7:]], [(x[:7], y[:7]), (x[7:], y[7:])], [{"input": x, "labels": y}]):
        assert fisher_trace(model, data).value == pytest.approx(truth)
    drawn = fisher_trace(model, loader, method="minibatch", draws=300, generator=0)
    assert abs(drawn.value - truth) < 4 * drawn.stderr
    named = build(Named)
    assert fisher_trace(named, {"x": x, "labels": None}).value > 0
    torch.testing.assert_close(
        fisher_trace(named, x, per_example=True).per_example,
        matrix_trace(lambda_module(named), x),
    )


def lambda_module(named):
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.named = named

        def forward(self, x):
            return self.named(x)["logits"]

    return Only()


@pytest.mark.parametrize("score_term", [False, True])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_the_expectation_as_a_loss(score_term, likelihood):
    model = mlp(3 if likelihood == "categorical" else 1)
    x, params = inputs(4, 4), list(model.parameters())
    found = fisher_sqnorm(model, x, method="exact", score_term=score_term, likelihood=likelihood)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        z = model(x[i : i + 1])
        p = z.softmax(1)[0] if likelihood == "categorical" else torch.cat([(-z).sigmoid(), z.sigmoid()])[:, 0]
        p = p if score_term else p.detach()
        for k in range(len(p)):
            y = torch.tensor([k]) if likelihood == "categorical" else torch.tensor([[float(k)]], dtype=torch.float64)
            g = torch.autograd.grad(nll(z, y, likelihood), params, create_graph=True)
            total = total + p[k] * sum(v.square().sum() for v in g)
    torch.testing.assert_close(found.sum(), total)
    a = torch.autograd.grad(found.sum(), params, materialize_grads=True)
    b = torch.autograd.grad(total, params, materialize_grads=True)
    for u, v in zip(a, b, strict=True):
        torch.testing.assert_close(u, v)


@pytest.mark.parametrize("labels", ["model", "uniform", "given"])
def test_drawn_labels_as_a_loss(labels):
    model, x = mlp(), inputs(4, 4)
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(5)
    if labels == "given":
        y = torch.tensor([0, 2, 1, 1])
        found = fisher_sqnorm(model, x, labels=y)
    else:
        found = fisher_sqnorm(model, x, labels=labels, generator=5)
        y = sample_labels(model(x) if labels == "model" else torch.zeros_like(model(x)), generator=generator)[0]
    rows = []
    for i in range(4):
        g = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), params, create_graph=True)
        rows.append(sum(v.square().sum() for v in g))
    torch.testing.assert_close(found, torch.stack(rows))
    a = torch.autograd.grad(found.mean(), params, materialize_grads=True)
    b = torch.autograd.grad(torch.stack(rows).mean(), params, materialize_grads=True)
    for u, v in zip(a, b, strict=True):
        torch.testing.assert_close(u, v)


def test_one_forward_pass_serves_loss_and_penalty():
    model, x, y = mlp(), inputs(4, 4), torch.tensor([0, 1, 2, 0])
    ghost = GhostNorms(model)
    loss = F.cross_entropy(ghost.run(x, differentiable=True), y)
    parts = fisher_sqnorm(ghost, generator=0, per_layer=True, draws=2)
    (loss + 0.1 * sum(parts.values()).mean()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert set(parts) == {"0", "2"}


def test_labels_follow_the_models_distribution():
    z = torch.tensor([[0.0, math.log(3.0)]]).expand(4000, 2)
    rate = sample_labels(z, generator=0).double().mean()
    assert abs(rate - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)
    ones = sample_labels(torch.full((4000,), math.log(3.0)), likelihood="bernoulli", generator=0)
    assert abs(ones.mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)
    assert sample_labels(torch.zeros(5, 7, 2), draws=3, generator=0).shape == (3, 5, 7)
    values = sample_labels(torch.full((4000,), 2.0), likelihood="gaussian", generator=0)
    assert abs(values.mean() - 2) < 4 / math.sqrt(4000)


def test_labels_invert_the_distribution_function_at_the_generators_numbers():
    """What makes a generator give the same labels on every device."""
    z = inputs(6, 5)
    u = torch.rand(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    below = z.double().softmax(1).cumsum(1).unsqueeze(1) <= u.unsqueeze(2)  # (examples, draws, classes)
    assert torch.equal(sample_labels(z, draws=3, generator=2), below.sum(2).T)


def test_half_precision():
    model, x = build(lambda: MLP((4,), 3, (32,))).float(), inputs(20, 4).float()
    truth = fisher_trace(model, x).value
    with torch.autocast("cpu", torch.bfloat16):
        assert fisher_trace(model, x).value == pytest.approx(truth, rel=0.05)
    assert fisher_trace(model.bfloat16(), x.bfloat16()).value == pytest.approx(truth, rel=0.05)


def test_bad_input():
    model, x = mlp(), inputs(4, 4)
    with pytest.raises(UnknownName, match="must be one of 'exact', 'mc', 'minibatch'"):
        fisher_trace(model, x, method="empirical")
    with pytest.raises(UnknownName, match="must be one of 'categorical'"):
        fisher_trace(model, x, likelihood="poisson")
    for method in ("mc", "minibatch"):
        with pytest.raises(InvalidInput, match="pass generator="):
            fisher_trace(model, x, method=method)
    with pytest.raises(InvalidInput, match="draws nothing"):
        fisher_trace(model, x, draws=2)
    with pytest.raises(InvalidInput, match="draws must be a whole number"):
        fisher_trace(model, x, method="mc", draws=0, generator=0)
    with pytest.raises(InvalidInput, match="no value for a single example"):
        fisher_trace(model, x, method="minibatch", per_example=True, generator=0)
    with pytest.raises(InvalidInput, match="return logits, without the softmax"):
        fisher_trace(nn.Sequential(model, nn.Softmax(1)), x)
    with pytest.raises(InvalidInput, match="not finite"):
        fisher_trace(model, x / 0)
    with pytest.raises(InvalidInput, match="have one class"):
        fisher_trace(mlp(1), x)
    with pytest.raises(InvalidInput, match="for one logit an example"):
        fisher_trace(nn.Sequential(mlp(1), nn.Flatten(0)), x)
    assert fisher_trace(mlp(1), x, likelihood="bernoulli").value > 0
    for method in ("exact", "minibatch"):
        with pytest.raises(InvalidInput, match=r"model.eval\(\) first"):
            fisher_trace(nn.Sequential(nn.BatchNorm1d(4).double(), model), x, method=method, generator=0)
    with pytest.raises(InvalidInput, match=r"torch\.compile"):
        fisher_trace(torch.compile(model), x)
    with pytest.raises(InvalidInput, match="there are no data"):
        fisher_trace(model, [])
    with pytest.raises(InvalidInput, match="data is int"):
        fisher_trace(model, 3)
    with pytest.raises(InvalidInput, match=r"a batch must be inputs, a pair .*, not str"):
        fisher_trace(model, ["x"])
    with pytest.raises(InvalidInput, match="'logits'"):
        fisher_trace(nn.LSTM(4, 3).double(), inputs(2, 3, 4))
    with pytest.raises(InvalidInput, match="first dimension"):
        fisher_trace(model, x, class_dim=0)
    with pytest.raises(InvalidInput, match="have no score term"):
        fisher_sqnorm(model, x, score_term=True, generator=0)
    with pytest.raises(InvalidInput, match="use method='mc'"):
        fisher_sqnorm(build(Tokens), inputs(3, 2, 4), method="exact")
    with pytest.raises(UnknownName, match="must be one of 'model', 'uniform'"):
        fisher_sqnorm(model, x, labels="true", generator=0)
    with pytest.raises(UnknownName, match="must be one of 'mc', 'exact'"):
        fisher_sqnorm(model, x, method="minibatch", generator=0)
    with pytest.raises(InvalidInput, match="pass generator="):
        sample_labels(torch.zeros(2, 2), generator="seed")
