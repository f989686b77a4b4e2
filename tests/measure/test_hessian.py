"""Hessian products, traces and eigenvalues against the explicit matrix in double precision."""

import functools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from mlcollage.errors import InvalidInput, MissingDependency, UnknownName
from mlcollage.measure.hessian import hessian_eigenvalues, hessian_trace, hessian_vector_product
from mlcollage.nn.init import seeded
from mlcollage.nn.vit import ViT


def model_of(make=lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))):
    with seeded(0):
        return make().double()


def data(n=8, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=rng, dtype=torch.float64), torch.randint(0, 3, (n,), generator=rng)


def explicit(model, loss_fn, x, y):
    """The whole matrix, row by row."""
    params = list(model.parameters())
    g = torch.autograd.grad(loss_fn(model(x), y), params, create_graph=True)
    flat = torch.cat([v.flatten() for v in g])
    rows = [torch.autograd.grad(v, params, retain_graph=True, materialize_grads=True) for v in flat]
    return torch.stack([torch.cat([v.flatten() for v in row]) for row in rows])


def test_products_and_eigenvalues_are_those_of_the_matrix():
    model, (x, y) = model_of(), data()
    h = explicit(model, F.cross_entropy, x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    found = hessian_vector_product(model, F.cross_entropy, loader, torch.eye(len(h), dtype=torch.float64))
    torch.testing.assert_close(found, h)
    torch.testing.assert_close(hessian_vector_product(model, nn.CrossEntropyLoss(), (x, y), h[:, 0]), h @ h[:, 0])
    values = np.linalg.eigvalsh(h.numpy())
    for which, truth in (("LA", values[-1:-4:-1]), ("SA", values[2::-1])):
        got = hessian_eigenvalues(model, F.cross_entropy, (x, y), k=3, which=which, tol=1e-8)
        np.testing.assert_allclose(got, truth, rtol=1e-6)
    top = values[np.abs(values).argmax()]
    np.testing.assert_allclose(hessian_eigenvalues(model, F.cross_entropy, (x, y), which="LM"), [top], rtol=1e-2)


def test_sums_and_separate_losses_are_read_as_means():
    model, (x, y) = model_of(), data()
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    truth = hessian_vector_product(model, F.cross_entropy, (x, y), v)
    for loss_fn in (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(reduction="none")):
        torch.testing.assert_close(hessian_vector_product(model, loss_fn, [(x[:5], y[:5]), (x[5:], y[5:])], v), truth)


def test_batches_have_the_shares_that_their_losses_have():
    """A product over uneven batches is that of the loss of all data at once."""
    model, (x, y) = model_of(), data()
    v = torch.randn(43, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    by_class = torch.tensor([1.0, 5.0, 0.5], dtype=torch.float64)
    plain = F.cross_entropy
    for loss_fn, of_all in (
        (nn.CrossEntropyLoss(weight=by_class), None),
        (functools.partial(F.cross_entropy, weight=by_class, ignore_index=1), None),
        (nn.CrossEntropyLoss(ignore_index=1), None),
        (functools.partial(F.cross_entropy, reduction="sum"), plain),
        (lambda z, y: F.cross_entropy(z, y, reduction="sum"), plain),  # does not say that it is one
        (lambda z, y: F.cross_entropy(z, y), plain),
    ):
        expected = explicit(model, of_all or loss_fn, x, y) @ v
        found = hessian_vector_product(model, loss_fn, [(x[:5], y[:5]), (x[5:], y[5:])], v)
        torch.testing.assert_close(found, expected)
    single = hessian_vector_product(model, plain, (x.float(), y), v)
    torch.testing.assert_close(single, explicit(model, plain, x.float().double(), y) @ v)


def test_hutchinson_with_honest_errors_and_layers():
    model, (x, y) = model_of(), data()
    h = explicit(model, F.cross_entropy, x, y)
    found = hessian_trace(
        model, F.cross_entropy, [(x[:3], y[:3]), (x[3:], y[3:])], n_vectors=300, per_layer=True, generator=0
    )
    assert found.draws == 300
    assert abs(found.value - float(h.trace())) < 4 * found.stderr
    first = sum(p.numel() for p in model[0].parameters())
    for layer, truth in (("0", h[:first, :first].trace()), ("2", h[first:, first:].trace())):
        assert found.per_layer[layer] == pytest.approx(float(truth), abs=5 * found.stderr)
    assert sum(found.per_layer.values()) == pytest.approx(found.value)
    # Var(v^T H v) = 2 sum of squares off the diagonal; one batch
    one = hessian_trace(model, F.cross_entropy, (x, y), n_vectors=300, generator=1)
    off = h - torch.diag(h.diagonal())
    assert one.stderr == pytest.approx(float((2 * off.square().sum() / 300).sqrt()), rel=0.25)


def test_tolerance_stops_early():
    model, (x, y) = model_of(), data()
    loose = hessian_trace(model, F.cross_entropy, (x, y), n_vectors=4000, tol=0.5, generator=0)
    tight = hessian_trace(model, F.cross_entropy, (x, y), n_vectors=400, tol=0.1, generator=0)
    assert loose.draws < tight.draws <= 400
    assert loose.stderr <= 0.5 * abs(loose.value)


@pytest.mark.parametrize(("method", "vectors"), [("hutchpp", 12), ("xtrace", 12)])
def test_sketches(method, vectors):
    model, (x, y) = model_of(), data()
    truth = float(explicit(model, F.cross_entropy, x, y).trace())
    state = torch.get_rng_state()
    found = hessian_trace(model, F.cross_entropy, (x, y), method=method, n_vectors=vectors, repeats=20, generator=0)
    assert torch.equal(state, torch.get_rng_state())
    assert abs(found.value - truth) < 4 * found.stderr
    assert found.draws == 20 * vectors
    one = hessian_trace(model, F.cross_entropy, (x, y), method=method, n_vectors=vectors, generator=0)
    again = hessian_trace(model, F.cross_entropy, (x, y), method=method, n_vectors=vectors, generator=0)
    assert math.isnan(one.stderr)
    assert one.value == again.value


def test_a_trace_may_be_negative():
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.eye(2, dtype=torch.float64)
    found = hessian_trace(model, lambda o, y: -(o - y).square().mean(), (x, torch.zeros(2, 1)), generator=0)
    assert found.value == pytest.approx(-2)
    assert found.interval() == pytest.approx((-2, -2))


def test_fused_attention_and_recurrence_have_products():
    vit = model_of(lambda: ViT((1, 4, 4), 3, patch_size=2, dim=8, depth=1, heads=2, fused=True))
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert hessian_trace(vit, F.cross_entropy, (x, torch.tensor([0, 1, 2])), n_vectors=2, generator=0).stderr > 0


def test_a_loss_that_is_linear_has_no_curvature():
    found = hessian_trace(nn.Linear(2, 1), lambda o, y: o.mean(), (torch.ones(3, 2), torch.zeros(3)), generator=0)
    assert found.value == 0


def test_parameters_can_be_chosen():
    model, (x, y) = model_of(), data()
    h = explicit(model, F.cross_entropy, x, y)
    bias = model[2].bias
    found = hessian_vector_product(model, F.cross_entropy, (x, y), torch.eye(3, dtype=torch.float64), params=[bias])
    torch.testing.assert_close(found, h[-3:, -3:])


class NoSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return NoSecond.apply(self.linear(x))


def test_bad_input(monkeypatch):
    model, (x, y) = model_of(), data()

    def trace(model=model, loss_fn=F.cross_entropy, data=(x, y), generator=0, **kwargs):
        return hessian_trace(model, loss_fn, data, generator=generator, **kwargs)

    with pytest.raises(UnknownName, match="method must be one of 'hutchinson'"):
        trace(method="lanczos")
    with pytest.raises(InvalidInput, match="pass generator="):
        trace(generator=None)
    with pytest.raises(InvalidInput, match="n_vectors must be"):
        trace(n_vectors=0)
    with pytest.raises(InvalidInput, match="tol must be"):
        trace(tol=-1.0)
    with pytest.raises(InvalidInput, match="raise n_vectors instead"):
        trace(repeats=2)
    with pytest.raises(InvalidInput, match="multiple of 3"):
        trace(method="hutchpp", n_vectors=4)
    with pytest.raises(InvalidInput, match="less than the 43 parameters"):
        trace(method="xtrace", n_vectors=100)
    with pytest.raises(InvalidInput, match="no per_layer and no tol"):
        trace(method="xtrace", n_vectors=4, per_layer=True)
    with pytest.raises(InvalidInput, match=r"model\.eval\(\) first"):
        trace(nn.Sequential(nn.BatchNorm1d(4).double(), model))
    with pytest.raises(InvalidInput, match=r"torch\.compile"):
        trace(torch.compile(model))
    with pytest.raises(InvalidInput, match="without second derivative"):
        trace(Opaque().double())
    with pytest.raises(InvalidInput, match="not a finite number"):
        trace(data=(x / 0, y))
    with pytest.raises(InvalidInput, match="targets are needed"):
        trace(data=x)
    with pytest.raises(InvalidInput, match="targets are needed"):
        trace(data=[x])
    with pytest.raises(InvalidInput, match="there are no data"):
        trace(data=[])
    with pytest.raises(InvalidInput, match="or a dict of named parts, not tuple of str"):
        trace(data=[("x", y)])
    with pytest.raises(InvalidInput, match="one loss for each of the"):
        trace(loss_fn=lambda o, t: o)
    with pytest.raises(InvalidInput, match="depends on the model's output"):
        trace(loss_fn=lambda o, t: 0.0)
    with pytest.raises(InvalidInput, match="43 rows"):
        hessian_vector_product(model, F.cross_entropy, (x, y), torch.ones(3))
    with pytest.raises(UnknownName, match="which must be one of 'LA'"):
        hessian_eigenvalues(model, F.cross_entropy, (x, y), which="BE")
    with pytest.raises(InvalidInput, match="at least 1 and at most 42"):
        hessian_eigenvalues(model, F.cross_entropy, (x, y), k=43)
    with pytest.raises(InvalidInput, match="did not converge"):
        hessian_eigenvalues(model, F.cross_entropy, (x, y), tol=1e-12, max_products=3)
    monkeypatch.setitem(__import__("sys").modules, "curvlinops", None)
    with pytest.raises(MissingDependency, match=r"mlcollage\[curvature\]"):
        trace(method="xtrace", n_vectors=4)


class Checkpointed(nn.Module):
    def __init__(self, reentrant, block):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)])
        self.reentrant, self.block = reentrant, block

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if i == self.block else layer(x)
            x = x.tanh() if i < 2 else x
        return x


@pytest.mark.parametrize("block", [0, 1])
def test_checkpointing_is_right_or_refused(block):
    x, y = data()
    model = model_of(lambda: Checkpointed(False, block))
    plain = model_of(lambda: Checkpointed(False, None))
    eye = torch.eye(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    found = hessian_vector_product(model, F.cross_entropy, (x, y), eye)
    torch.testing.assert_close(found, explicit(plain, F.cross_entropy, x, y))
    with warnings.catch_warnings(), pytest.raises(InvalidInput, match="use_reentrant=False"):  # noqa: PT012
        warnings.simplefilter("ignore")
        hessian_trace(model_of(lambda: Checkpointed(True, block)), F.cross_entropy, (x, y), generator=0)


def test_checkpointed_attention():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
            self.head, self.hidden = nn.Linear(4, 3), False

        def forward(self, x):
            h = checkpoint(self.layer, x, use_reentrant=False) if self.hidden else self.layer(x)
            return self.head(h.mean(1))

    model, (x, y) = model_of(Attends), data()
    x = x.unsqueeze(1) * torch.linspace(0.5, 1, 3, dtype=torch.float64).reshape(1, 3, 1)
    traces = []
    for model.hidden in (False, True):
        traces.append(hessian_trace(model, F.cross_entropy, (x, y), n_vectors=4, generator=0).value)
    assert traces[0] == pytest.approx(traces[1])


def test_weight_normalization_has_its_own_second_derivative():
    """Products with every unit vector against finite differences of the gradient."""
    normal, (x, y) = nn.utils.parametrizations.weight_norm, data()
    model = model_of(lambda: nn.Sequential(normal(nn.Linear(4, 5)), nn.Tanh(), normal(nn.Linear(5, 3))))
    params = list(model.parameters())
    theta = nn.utils.parameters_to_vector(params).detach()

    def gradient(at):
        nn.utils.vector_to_parameters(at, params)
        found = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        return torch.cat([g.flatten() for g in found])

    eye = torch.eye(len(theta), dtype=torch.float64)
    truth = torch.stack([(gradient(theta + 1e-5 * v) - gradient(theta - 1e-5 * v)) / 2e-5 for v in eye], 1)
    nn.utils.vector_to_parameters(theta, params)
    torch.testing.assert_close(hessian_vector_product(model, F.cross_entropy, (x, y), eye), truth, rtol=1e-6, atol=1e-8)
