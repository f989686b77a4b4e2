"""Priors agree with torch.distributions, float64 autograd and their own draws."""

import math

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.papers.bnn_posteriors import (
    EmpCovPrior,
    GaussianMixturePrior,
    GaussianPrior,
    LaplacePrior,
    Layout,
    LogisticPrior,
    StudentTPrior,
)

D = torch.distributions
NET = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
LAYOUT = Layout.of(NET)
LIKE = torch.zeros(1, dtype=torch.float64)


def t(x):
    return torch.tensor(x, dtype=torch.float64)


LOGISTIC = D.TransformedDistribution(
    D.Uniform(t(0.0), t(1.0)), [D.SigmoidTransform().inv, D.AffineTransform(t(0.0), t(0.3))]
)
MIXTURE = D.MixtureSameFamily(D.Categorical(t([0.25, 0.75])), D.Normal(t([0.0, 0.0]), t([2.0, 0.1]).sqrt()))
FAMILIES = [
    (GaussianPrior(0.3), D.Normal(t(0.0), t(0.3).sqrt())),
    (LaplacePrior(0.4), D.Laplace(t(0.0), t(0.4))),
    (StudentTPrior(5.0, 0.5), D.StudentT(t(5.0), t(0.0), t(0.5))),
    (LogisticPrior(0.3), LOGISTIC),
    (GaussianMixturePrior((2.0, 0.1), (1.0, 3.0)), MIXTURE),
]


@pytest.mark.parametrize(("prior", "known"), FAMILIES, ids=lambda v: type(v).__name__)
def test_log_density_is_that_of_torch_distributions_and_its_gradient_autograds(prior, known):
    placed = prior.place(LAYOUT, LIKE)
    w = torch.randn(5, LAYOUT.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    exact = known.log_prob(w).sum(dim=1)
    torch.testing.assert_close(placed.log_prob(w.detach()), exact.detach(), rtol=1e-12, atol=1e-10)
    (gradient,) = torch.autograd.grad(exact.sum(), w)
    torch.testing.assert_close(placed.gradient(w.detach()), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("prior", "known"), FAMILIES, ids=lambda v: type(v).__name__)
def test_draws_follow_the_density(prior, known):
    from scipy.stats import kstest

    draws = prior.sample(LAYOUT, 400, generator=3, dtype=torch.float64).flatten()
    assert torch.equal(draws, prior.sample(LAYOUT, 400, generator=3, dtype=torch.float64).flatten())
    grid, step = torch.linspace(-40, 40, 400_001, dtype=torch.float64), 80 / 400_000
    inside = grid.clamp(-30, 30)
    cdf = (known.log_prob(inside).exp() * step).cumsum(0).numpy()
    import numpy as np

    assert kstest(draws.numpy(), lambda x: np.interp(x, grid.numpy(), cdf)).pvalue > 0.001
    sd = prior.place(LAYOUT, LIKE).sd()
    assert sd.shape == (LAYOUT.size,)
    assert float(draws.std() / sd[0]) == pytest.approx(1, rel=0.06)


def test_scales_by_name_layer_and_pattern():
    placed = GaussianPrior({"": 1.0, "0": 0.25, "*.bias": 4.0}).place(LAYOUT, LIKE)
    sds = LAYOUT.unflatten(placed.sd())
    assert {n: set(v.flatten().tolist()) for n, v in sds.items()} == {
        "0.weight": {0.5},
        "0.bias": {2.0},
        "2.weight": {1.0},
        "2.bias": {2.0},
    }
    w = torch.randn(2, LAYOUT.size, dtype=torch.float64)
    torch.testing.assert_close(placed.log_prob(w), D.Normal(0, placed.sd()).log_prob(w).sum(1))
    torch.testing.assert_close(placed.gradient(w), -w / placed.sd() ** 2)


def test_student_without_variance_has_an_infinite_one():
    assert bool(StudentTPrior(2.0, 1.0).place(LAYOUT, LIKE).sd().isinf().all())


def test_float32_positions_are_summed_in_float64():
    w = torch.full((1, LAYOUT.size), 1e4)
    value = GaussianPrior(1.0).place(LAYOUT, w).log_prob(w)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(-0.5 * LAYOUT.size * (1e8 + math.log(2 * math.pi)), rel=1e-14)


def test_empcov_is_the_gaussian_of_the_inputs_covariance():
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * t([1.0, 2.0, 0.0])
    prior = EmpCovPrior.from_module(NET, x, alpha=0.5, eps=1e-2, rest=GaussianPrior(0.7))
    sigma = 0.5 / 19 * x.T @ x + 1e-2 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(prior.covariance, sigma)
    placed = prior.place(LAYOUT, LIKE)
    w = torch.randn(4, LAYOUT.size, dtype=torch.float64, requires_grad=True)
    parts = LAYOUT.unflatten(w)
    exact = D.MultivariateNormal(torch.zeros(3, dtype=torch.float64), sigma).log_prob(parts["0.weight"]).sum(1)
    for name in ("0.bias", "2.weight", "2.bias"):
        exact = exact + D.Normal(t(0.0), t(0.7).sqrt()).log_prob(parts[name]).flatten(1).sum(1)
    torch.testing.assert_close(placed.log_prob(w.detach()), exact.detach())
    out = torch.ones_like(w.detach())  # adds to what is there
    torch.testing.assert_close(placed.add_gradient_(out, w.detach()), 1 + torch.autograd.grad(exact.sum(), w)[0])
    draws = LAYOUT.unflatten(prior.sample(LAYOUT, 5000, generator=1, dtype=torch.float64))["0.weight"].reshape(-1, 3)
    torch.testing.assert_close(torch.cov(draws.T), sigma, rtol=0.08, atol=0.02)
    torch.testing.assert_close(placed.sd()[:3], sigma.diagonal().sqrt())


def test_empcov_of_a_later_layer_and_of_patches():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(3 * 9, 2)).double()
    x = torch.randn(7, 2, 5, 5, dtype=torch.float64)
    prior = EmpCovPrior.from_module(net, x, alpha=1.0, eps=0.1, batch_size=3)
    patches = nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 18)
    exact = patches.T @ patches / (len(patches) - 1) + 0.1 * torch.eye(18, dtype=torch.float64)
    torch.testing.assert_close(prior.covariance, exact)
    layout = Layout.of(net)
    later = EmpCovPrior.from_inputs(torch.randn(50, 27), "2.weight").place(layout, LIKE)  # others on both sides of it
    w = torch.randn(2, layout.size, dtype=torch.float64)
    step = torch.zeros_like(w)
    step[:, 60] = 1e-6
    slope = (later.log_prob(w + step) - later.log_prob(w - step)) / 2e-6
    torch.testing.assert_close(later.gradient(w)[:, 60], slope, rtol=1e-5, atol=1e-5)
    assert later.sample(3, torch.Generator()).shape == (3, layout.size)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GaussianPrior(0.0), "variance must be a finite number above 0, not 0.0"),
        (lambda: GaussianPrior(-1), "above 0, not -1"),
        (lambda: GaussianPrior(math.nan), "not nan"),
        (lambda: GaussianPrior({}), "empty mapping"),
        (lambda: GaussianPrior({"0": -1.0}), r"variance\['0'\]"),
        (lambda: StudentTPrior(0, 1.0), "df must be .* not 0"),
        (lambda: GaussianMixturePrior((1.0, 2.0), (1.0,)), "2 variances and 1 weights do not belong"),
        (lambda: GaussianPrior({"0": 1.0}).place(LAYOUT, LIKE), "leaves out 2.weight"),
        (lambda: GaussianPrior(1.0).sample(LAYOUT, 0), "n must be .* not 0"),
        (lambda: EmpCovPrior.from_inputs(torch.zeros(1, 3), "0.weight"), "at least two rows"),
        (lambda: EmpCovPrior.from_inputs(torch.zeros(5, 3), "0.weight", alpha=0.0), "alpha must be .* not 0.0"),
        (lambda: EmpCovPrior.from_inputs(torch.zeros(5, 2), "0.weight").place(LAYOUT, LIKE), "inputs have 2 numbers"),
        (lambda: EmpCovPrior.from_inputs(torch.zeros(5, 3), "9.weight").place(LAYOUT, LIKE), "not sampled"),
        (lambda: EmpCovPrior.from_inputs(torch.zeros(5, 3), "0.weight", rest=3), "rest is int"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(make, says):
    with pytest.raises(InvalidInput, match=says):
        make()


def test_names_that_are_no_parameter_are_refused():
    with pytest.raises(UnknownName, match="'7', which is no sampled parameter"):
        GaussianPrior({"": 1.0, "7": 2.0}).place(LAYOUT, LIKE)
