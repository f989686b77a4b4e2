"""Laplace approximations: exact where the posterior is Gaussian, and never silently something else."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, MissingDependency, UnknownName
from mlcollage.papers.bnn_posteriors.function import linearized
from mlcollage.papers.bnn_posteriors.laplace import Laplace
from mlcollage.papers.bnn_posteriors.layout import Layout
from mlcollage.papers.bnn_posteriors.likelihoods import CustomLikelihood, GaussianLikelihood
from mlcollage.papers.bnn_posteriors.network import BayesianNetwork
from mlcollage.papers.bnn_posteriors.posterior import Posterior
from mlcollage.papers.bnn_posteriors.priors import GaussianPrior, LaplacePrior

NOISE = 0.5


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def regression(temperature=1.0, variance=0.3):
    """A linear model at its mode, with the closed-form posterior of its weights and bias."""
    x = normal(40, 3) * torch.tensor([1.0, 5.0, 0.2])
    y = x @ torch.tensor([1.0, -0.3, 2.0], dtype=torch.float64) + 0.7 + NOISE * normal(40, seed=1)
    design = torch.cat([x, torch.ones(40, 1)], dim=1)
    covariance = torch.linalg.inv(design.T @ design / NOISE**2 + torch.eye(4) / variance)
    mode = covariance @ design.T @ y / NOISE**2
    net = nn.Linear(3, 1).double()
    with torch.no_grad():
        net.weight.copy_(mode[None, :3])
        net.bias.copy_(mode[3:])
    return net, x, y, mode, temperature * covariance


@pytest.mark.parametrize(("temperature", "batch_size"), [(1.0, None), (0.25, 16)])
def test_of_a_linear_model_it_is_the_posterior(temperature, batch_size):
    net, x, y, mode, covariance = regression(temperature)
    method = Laplace(structure="full", temperature=temperature, batch_size=batch_size)
    posterior = method.around(net, x, y, likelihood=GaussianLikelihood(noise=NOISE), prior=GaussianPrior(0.3))
    torch.testing.assert_close(posterior.mean, mode)
    torch.testing.assert_close(temperature * posterior.approximation.posterior_covariance, covariance)
    draws = posterior.sample(20_000, 0)
    sd = covariance.diagonal().sqrt()
    assert float(((draws.mean(0) - mode) / sd).abs().max()) < 4 / 20_000**0.5
    scale = sd[:, None] * sd
    assert float(((torch.cov(draws.T) - covariance) / scale).abs().max()) < 4 * (2 / 20_000) ** 0.5
    assert torch.equal(posterior.sample(3, 1), posterior.sample(3, torch.Generator().manual_seed(1)))


def test_variances_by_parameter_and_the_diagonal_are_the_closed_form():
    net, x, y, _, _ = regression()
    prior = GaussianPrior({"weight": 0.05, "bias": 2.0})
    posterior = Laplace(structure="diag").around(net, x, y, likelihood=GaussianLikelihood(NOISE), prior=prior)
    design = torch.cat([x, torch.ones(40, 1)], dim=1)
    precision = design.square().sum(0) / NOISE**2 + torch.tensor([20.0, 20, 20, 0.5], dtype=torch.float64)
    torch.testing.assert_close(posterior.approximation.posterior_variance, 1 / precision)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_only_what_is_chosen_varies_and_the_network_stays_as_it_was(structure):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    frozen = structure != "kron"
    net[0].bias.requires_grad_(not frozen)
    x, y = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    before = {name: p.clone() for name, p in net.named_parameters()}
    posterior = Laplace(structure=structure, only="3").around(net, x, y)
    layout = Layout.of(net)
    assert posterior.mean.shape == (layout.size,)
    draws = layout.unflatten(posterior.sample(5))
    assert torch.equal(draws["0.weight"], net[0].weight.expand(5, -1, -1, -1, -1))
    assert float(draws["3.weight"].std(0).min()) > 0
    assert ("0.bias" in draws) == (not frozen)
    assert [p.requires_grad for p in net.parameters()] == [True, not frozen, True, True]
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())
    assert not hasattr(net, "output_size")
    everything = Laplace(structure=structure).around(net, x, y)
    assert everything.chosen.all()
    assert float(everything.sample(50).std(0).min()) > 0


def test_the_kronecker_factors_of_one_layer_of_gaussian_outputs_are_exact():
    """With one output layer and constant curvature, G is a Kronecker product; with a bias it is not."""
    x, y = normal(30, 3), normal(30, 2, seed=1)
    net = nn.Linear(3, 2, bias=False).double()
    options = {"likelihood": GaussianLikelihood(NOISE), "prior": GaussianPrior(0.3)}
    kron = Laplace(structure="kron").around(net, x, y, **options).sample(20_000)
    full = Laplace(structure="full").around(net, x, y, **options).approximation.posterior_covariance
    sd = full.diagonal().sqrt()
    assert float(((torch.cov(kron.T) - full) / (sd[:, None] * sd)).abs().max()) < 4 * (2 / 20_000) ** 0.5


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 3)), r"1 \(LayerNorm\) has no Kronecker factors"),
        (nn.Sequential(nn.Linear(2, 3)), r"of 0 \(Linear\) only weight varies"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)), r"1 \(Linear\) shares parameters"),
    ],
)
def test_layers_without_kronecker_factors_are_refused_and_can_be_done_in_full(net, says):
    if "varies" in says:
        net[0].bias.requires_grad_(False)
    if "shares" in says:
        net[1].weight = nn.Parameter(net[1].weight[:2].detach())
        net[1].bias = net[0].bias
        net.append(nn.Linear(2, 3))
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InvalidInput, match=says):
        Laplace(structure="kron").around(net, x, Y.repeat(2)[:9])
    if "shares" not in says:
        posterior = Laplace(structure="full").around(net, x, Y.repeat(2)[:9])
        assert float(posterior.sample(20).std(0).min()) > 0


def test_the_linearization_is_the_first_order_of_the_network():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    layout = Layout.of(net)
    mean = layout.flatten(dict(net.named_parameters()))
    direction, x = normal(3, layout.size), normal(7, 4, seed=1)
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(net, layout.unflatten(w), (x,)))(mean)
    expected = net(x).detach() + torch.einsum("nkp,cp->cnk", jacobian, direction)
    torch.testing.assert_close(linearized(net, mean, mean + direction, x), expected)
    torch.testing.assert_close(linearized(net, mean, mean + direction, x, batch_size=3), expected)
    small = 1e-5 * direction
    exact = torch.stack([torch.func.functional_call(net, layout.unflatten(mean + d), (x,)) for d in small]).detach()
    assert float((linearized(net, mean, mean + small, x) - exact).abs().max()) < 1e-7


def test_fit_finds_the_mode_and_predicts_by_the_closed_form():
    _, x, y, mode, covariance = regression()
    bnn = BayesianNetwork(nn.Linear(3, 1).double(), GaussianLikelihood(NOISE), GaussianPrior(0.3))
    posterior = bnn.fit(x, y, Laplace(structure="full", draws=4000, steps=1500, lr=0.05), generator=1)
    torch.testing.assert_close(posterior.kept[0, 0], mode, rtol=1e-3, atol=1e-3)
    x_test = normal(5, 3, seed=2)
    design = torch.cat([x_test, torch.ones(5, 1)], dim=1)
    mean, variance = posterior.predict_moments(x_test)
    exact = (design @ covariance * design).sum(1) + NOISE**2
    torch.testing.assert_close(mean, design @ mode, rtol=0.02, atol=0.02)
    torch.testing.assert_close(variance, exact, rtol=0.05, atol=0)


def test_fit_predicts_by_the_linearized_network_unless_told_otherwise():
    x = normal(30, 2)
    y = (x[:, 0] > 0).long()
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    method = Laplace(steps=200, lr=0.05, draws=6)
    posterior = BayesianNetwork(net).fit(x, y, method, generator=3)
    assert posterior.params.shape == (1, 6, posterior.layout.size)
    expected = linearized(net, posterior.kept[0, 0], posterior.params[0], x).softmax(-1)
    torch.testing.assert_close(posterior.predict_draws(x)[0], expected)
    torch.testing.assert_close(posterior.predict_proba(x, batch_size=7), expected.mean(0))
    plain = BayesianNetwork(net).fit(x, y, replace(method, linearized=False), generator=3)
    assert torch.equal(plain.params, posterior.params)
    first = torch.func.functional_call(net, plain.state_dict(0, 0), (x,)).softmax(-1)
    torch.testing.assert_close(plain.predict_draws(x)[0, 0], first)
    head = BayesianNetwork(net).fit(x, y, replace(method, only="2", structure="full"), generator=3)
    assert float(head.params[0, :, :12].std(0).max()) == 0


def test_a_saved_approximation_predicts_the_same(tmp_path):
    x = normal(20, 2)
    bnn = BayesianNetwork(nn.Linear(2, 2).double())
    posterior = bnn.fit(x, (x[:, 0] > 0).long(), Laplace(steps=50, draws=4))
    again = Posterior.load(posterior.save(tmp_path / "p"), bnn)
    torch.testing.assert_close(again.predict_proba(x), posterior.predict_proba(x))


NET = nn.Linear(2, 3)
X, Y = torch.zeros(6, 2), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"likelihood": "gaussian"}, InvalidInput, r"GaussianLikelihood without noise; laplace-torch knows"),
        ({"likelihood": "bernoulli"}, InvalidInput, "BernoulliLikelihood; laplace-torch knows"),
        ({"likelihood": CustomLikelihood(lambda out, y: out[:, 0])}, InvalidInput, "CustomLikelihood"),
        (
            {"prior": LaplacePrior(1.0)},
            InvalidInput,
            "prior is LaplacePrior; .* need a GaussianPrior",
        ),
    ],
)
def test_what_cannot_be_approximated_is_refused(options, error, says):
    with pytest.raises(error, match=says):
        Laplace().around(NET, X, Y, **options)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UnknownName, match=r"structure must be one of .* not 'dense'"):
        Laplace(structure="dense")
    with pytest.raises(InvalidInput, match=r"temperature must be .* not 0"):
        Laplace(temperature=0)
    with pytest.raises(UnknownName, match="'head', which is no sampled parameter"):
        Laplace(only="head").around(NET, X, Y)


def test_a_missing_package_and_counts_of_draws_are_named(monkeypatch):
    posterior = Laplace().around(NET, X, Y)
    with pytest.raises(InvalidInput, match=r"n must be .* not 0"):
        posterior.sample(0)
    monkeypatch.setitem(sys.modules, "laplace", None)
    with pytest.raises(MissingDependency, match=r"pip install 'mlcollage\[laplace\]'"):
        Laplace().around(NET, X, Y)
