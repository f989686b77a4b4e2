"""Every backend gives the gradients that float64 autograd gives, on any shape, in any chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mlcollage.errors import InvalidInput
from mlcollage.nn.convnet import ConvNet
from mlcollage.nn.init import build
from mlcollage.nn.mlp import MLP
from mlcollage.papers.bnn_posteriors import (
    MAP,
    BayesianNetwork,
    GaussianLikelihood,
    GaussianPrior,
    function,
    largest_curvature,
)
from mlcollage.papers.bnn_posteriors.backends import Batch, LoopBackend

ACTIVATIONS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "softplus": lambda: nn.Softplus(2.0),
    "elu": lambda: nn.ELU(0.7),
    "leaky": lambda: nn.LeakyReLU(0.2),
}


def reference(model, x, y, q, temperature=1.0):
    """Value and gradient of one chain after the other, by autograd alone."""
    values, gradients = [], []
    for row in q:
        w = row.clone().requires_grad_(True)
        out = functional_call(model.module, model.layout.unflatten(w), (x,))
        value = model.likelihood.log_prob(out, y).sum() + model.placed_prior.log_prob(w[None])[0]
        values.append(value.detach() / temperature)
        gradients.append(torch.autograd.grad(value, w)[0] / temperature)
    return torch.stack(values), torch.stack(gradients)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    chains=st.integers(1, 4),
    n=st.integers(1, 12),
    chunk=st.integers(1, 13),
    temperature=st.sampled_from([1.0, 0.1, 3.0]),
    seed=st.integers(0, 99),
)
def test_perceptrons_by_hand_equal_autograd(sizes, activation, bias, chains, n, chunk, temperature, seed):
    layers = []
    for a, b in zip([*sizes, 3][:-1], [*sizes, 3][1:], strict=True):
        layers += [nn.Linear(a, b, bias=bias), ACTIVATIONS[activation]()]
    model = BayesianNetwork(build(lambda: nn.Sequential(*layers[:-1]).double(), seed), prior=GaussianPrior(0.3))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, sizes[0], dtype=torch.float64, generator=g)
    y = torch.randint(0, 3, (n,), generator=g)
    density = model.log_density(x, y, temperature, chunk_size=chunk)
    assert density.backend.name == "mlp"
    q = model.initial(chains, "prior", generator=seed)
    value, gradient = density(q)
    exact, by_autograd = reference(model, x, y, q, temperature)
    torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(density.gradient(q), by_autograd, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        density.outputs(q, x)[0], functional_call(model.module, model.layout.unflatten(q[0]), (x,))
    )


class Odd(nn.Module):
    """A shared layer, a frozen one, a number that is used twice, data-dependent branches on request."""

    def __init__(self, branch=False):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.branch = branch

    def forward(self, x):
        h = torch.tanh(self.a(torch.tanh(self.a(x)))) * self.scale
        if self.branch and h.sum() > 1e9:
            h = h + 1
        return self.b(self.frozen(h))


@pytest.mark.parametrize(
    ("make", "shape", "name"),
    [
        (lambda: MLP((2, 3), 3, (5, 4), activation="silu"), (2, 3), "mlp"),
        (lambda: MLP((6,), 3, ()), (6,), "mlp"),
        (
            lambda: nn.Sequential(
                nn.Flatten(), nn.Sequential(nn.Linear(6, 4), nn.Identity(), nn.Tanh()), nn.Linear(4, 3)
            ),
            (2, 3),
            "mlp",
        ),
        (lambda: MLP((6,), 3, (5,), norm="layer"), (6,), "vmap"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3), nn.LogSoftmax(1)), (6,), "vmap"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 3)), (6,), "vmap"),
        (Odd, (4,), "vmap"),
        (lambda: Odd(branch=True), (4,), "loop"),
        (lambda: ConvNet((1, 8, 8), 3, (4,), norm="group"), (1, 8, 8), "loop"),
    ],
)
def test_each_module_takes_its_backend_and_all_agree(make, shape, name):
    model = BayesianNetwork(build(lambda: make().double(), 0), prior=GaussianPrior(0.5))
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, *shape, dtype=torch.float64, generator=g), torch.tensor([0, 1, 2, 1, 0])
    q = model.initial(3, "prior", generator=1)
    density = model.log_density(x, y, backend="untimed")
    assert density.backend.name == name
    exact, by_autograd = reference(model, x, y, q)
    index = torch.tensor([[0, 1], [2, 3], [4, 0]])
    estimates = []
    for way in {name, "loop", "vmap"} - ({"vmap"} if name == "loop" and shape == (4,) else set()):
        other = model.log_density(x, y, backend=way, chunk_size=2)
        value, gradient = other(q)
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, by_autograd, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(other.gradient(q), by_autograd, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(other.outputs(q, x), density.outputs(q, x), rtol=1e-9, atol=1e-10)
        estimates.append(other.estimate(q, index, value=True))
    for value, gradient in estimates[1:]:
        torch.testing.assert_close(value, estimates[0][0])
        torch.testing.assert_close(gradient, estimates[0][1])


@pytest.mark.parametrize("slow", ["vmap", "loop"])
def test_auto_takes_what_the_clock_says_and_the_posterior_records_it(monkeypatch, slow):
    monkeypatch.setattr(function, "_seconds", lambda backend, q, batch: 1.0 + (backend.name == slow))
    model = BayesianNetwork(build(lambda: MLP((6,), 3, (5,), norm="layer"), 0))
    fast = {"vmap": "loop", "loop": "vmap"}[slow]
    posterior = model.fit(
        torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3, MAP(steps=2)
    )
    assert posterior.info["backend"] == fast
    # near ties go to the likely one, whoever won
    monkeypatch.setattr(function, "_seconds", lambda backend, q, batch: 1.0 + 0.1 * (backend.name == "vmap"))
    again = BayesianNetwork(model.module).log_density(torch.zeros(3, 6), torch.arange(3))
    assert again.backend.name == "vmap"


def test_a_gradient_is_timed():
    model = BayesianNetwork(build(lambda: nn.Linear(3, 2).double(), 0))
    density = model.log_density(torch.zeros(4, 3), torch.arange(4) % 2)
    assert 0 < function._seconds(density.backend, model.initial(2), density._chunks[0]) < 1


def test_minibatches_are_unbiased_whatever_their_size_so_temperature_does_not_depend_on_it():
    model = BayesianNetwork(
        build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), 0), "gaussian"
    )
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, dtype=torch.float64, generator=g), torch.randn(12, generator=g, dtype=torch.float64)
    for temperature in (1.0, 0.25):
        density = model.log_density(x, y, temperature)
        q = model.initial(2, "prior")
        exact = density(q)
        for size in (1, 3, 4, 12):
            parts = [density.estimate(q, index, value=True) for index in torch.arange(12).split(size)]
            torch.testing.assert_close(torch.stack([v for v, _ in parts]).mean(0), exact[0])
            torch.testing.assert_close(torch.stack([d for _, d in parts]).mean(0), exact[1])


def test_data_of_each_chains_own_and_a_transform():
    model = BayesianNetwork(build(lambda: nn.Linear(3, 2).double(), 0), GaussianLikelihood(1.0))
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    density, q = model.log_density(x, y), model.initial(2)
    index = torch.tensor([[0, 1, 2], [3, 4, 5]])
    both = density.estimate(q, index)[1]
    for c in range(2):
        torch.testing.assert_close(both[c : c + 1], density.estimate(q[c : c + 1], index[c])[1])
    turned = model.log_density(-x, y).estimate(q, index)[1]
    torch.testing.assert_close(density.estimate(q, index, transform=torch.neg)[1], turned)


def test_a_position_that_moves_in_place_is_seen_and_buffers_do_not_leak():
    model = BayesianNetwork(build(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 0))
    density = model.log_density(torch.randn(9, 3), torch.randint(0, 2, (9,)))
    q = model.initial(2)
    first = density(q)[1]
    kept = first.clone()
    q.add_(0.1)
    moved = density.gradient(q).clone()
    assert not torch.allclose(moved, first)
    torch.testing.assert_close(moved, density(q.clone())[1])
    assert torch.equal(first, kept)  # what was returned with a value is nobody's buffer
    outputs = density.outputs(q, torch.zeros(1, 3)).clone()
    torch.testing.assert_close(outputs, density.outputs(q.clone(), torch.zeros(1, 3)))


def test_float32_agrees_with_float64_and_values_are_float64():
    net = build(lambda: nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)), 0)
    x, y = torch.randn(100, 20, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 5
    single, double = BayesianNetwork(net), BayesianNetwork(net.double())
    q = single.initial(3)
    value, gradient = single.log_density(x, y)(q)
    exact, exact_gradient = double.log_density(x, y)(q.double())
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, exact, rtol=1e-7, atol=1e-4)
    torch.testing.assert_close(gradient, exact_gradient.float(), rtol=1e-4, atol=1e-4)


def test_hooks_and_other_kinds_of_layer_are_left_to_the_general_backend():
    net = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 0)
    net[0].register_forward_hook(lambda m, i, o: 2 * o)
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    assert BayesianNetwork(net).log_density(x, y).backend.name != "mlp"
    with pytest.raises(InvalidInput, match="no plain stack"):
        BayesianNetwork(net).log_density(x, y, backend="mlp")
    with pytest.raises(InvalidInput, match="vmap cannot batch"):
        BayesianNetwork(Odd(branch=True)).log_density(torch.randn(5, 4), y, backend="vmap")


def test_largest_curvature_is_the_largest_eigenvalue():
    model = BayesianNetwork(build(lambda: nn.Linear(4, 1).double(), 0), GaussianLikelihood(0.5), GaussianPrior(2.0))
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], dim=1)
    exact = torch.linalg.eigvalsh(ones.T @ ones / 0.25 + torch.eye(5, dtype=torch.float64) / 2).max()
    density = model.log_density(x, torch.zeros(30))
    torch.testing.assert_close(
        largest_curvature(density, model.initial(2), steps=100), exact.expand(2), rtol=1e-4, atol=0
    )


def test_the_compiled_backend_is_the_general_one(monkeypatch):
    """Compiled with a backend that needs no compiler: what is tested is that the function can be captured whole."""
    import functools

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    model = BayesianNetwork(build(lambda: MLP((6,), 3, (5,), norm="layer").double(), 0), backend="compile")
    x, y, q = torch.randn(5, 6), torch.tensor([0, 1, 2, 1, 0]), model.initial(2)
    density, plain = model.log_density(x, y), model.log_density(x, y, backend="vmap")
    assert (density.backend.name, plain.backend.name) == ("compile", "vmap")
    for a, b in zip(density(q), plain(q), strict=True):
        torch.testing.assert_close(a, b)


class Checkpointed(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.first, self.second, self.head, self.hidden = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3), hidden

    def forward(self, x):
        h = self.first(x).tanh()
        h = checkpoint(self.second, h, use_reentrant=False) if self.hidden else self.second(h)
        return self.head(h.tanh())


def test_chains_of_a_checkpointed_network_keep_their_own_parameters():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 4, generator=g, dtype=torch.float64), torch.arange(6) % 3
    found = []
    for hidden in (False, True):
        module = build(lambda hidden=hidden: Checkpointed(hidden).double(), 0)
        model = BayesianNetwork(module, prior=GaussianPrior(0.5))
        backend = LoopBackend(model.module, model.layout, model.likelihood)
        q = torch.randn(2, model.layout.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        out = torch.empty_like(q)
        backend.gradient(q, [Batch(x, y, None, False)], out, True)
        found.append(out)
    torch.testing.assert_close(found[1], found[0])
