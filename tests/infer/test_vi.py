"""Mean-field variational inference: the exact solution where it is known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.infer import vi
from mlcollage.infer.density import LogDensity


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(mean, precision):
    return lambda x: -0.5 * (((x - mean) @ precision) * (x - mean)).sum(dim=1)


@pytest.fixture(scope="module")
def correlated():
    a = torch.randn(5, 5, dtype=torch.float64, generator=rng(1))
    return torch.arange(5, dtype=torch.float64), a @ a.T + torch.eye(5, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_a_correlated_gaussian_gives_the_mean_and_the_conditional_variances(correlated, temperature):
    mean, precision = correlated
    start = torch.zeros(5, dtype=torch.float64)
    q = vi.fit(gaussian(mean, precision), start, steps=1500, draws=64, temperature=temperature)
    sd = (temperature / precision.diagonal()).sqrt()
    assert torch.allclose(q.mean, mean, atol=0.02 * float(sd.min()))
    assert torch.allclose(q.sd, sd, rtol=0.03)
    marginal = temperature * torch.linalg.inv(precision).diagonal()
    assert bool((q.sd.square() < marginal).all())
    # the gap of the best mean-field ELBO to the evidence: half the log-determinant of the scaled precision
    evidence = 2.5 * math.log(2 * math.pi * temperature) - 0.5 * float(torch.logdet(precision))
    scale = precision.diagonal().rsqrt()
    gap = -0.5 * float(torch.logdet(precision * torch.outer(scale, scale)))
    assert abs(float(q.trace[-200:].mean()) - (evidence - gap)) < 0.1


def test_conjugate_linear_regression_by_autograd_and_by_hand(regression):
    """Columns of scales 1, 10 and 0.1; the exact solution from the moments of the posterior."""
    known = regression
    mean = torch.from_numpy(known.mean)
    curvature = -torch.autograd.functional.hessian(lambda w: known.log_prob(w[None])[0], mean)

    def by_hand(w):
        leaf = w.detach().requires_grad_()
        with torch.enable_grad():
            value = known.log_prob(leaf)
            return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    fits = [
        vi.fit(log_prob, np.zeros(3), steps=1500, learning_rate=0.03, generator=2)
        for log_prob in (known.log_prob, by_hand)
    ]
    assert torch.allclose(fits[0].mean, mean, atol=0.05 * float(known.sd.min()))
    assert torch.allclose(fits[0].sd, curvature.diagonal().rsqrt(), rtol=0.03)
    assert torch.allclose(fits[0].mean, fits[1].mean)
    assert torch.allclose(fits[0].sd, fits[1].sd)


def test_a_density_of_one_position_is_batched_by_vmap():
    def one(x):
        return -0.5 * ((x - 1) ** 2).sum() / 4

    start = torch.zeros(2, dtype=torch.float64)
    alone = vi.fit(torch.func.vmap(one), start, steps=50)
    batched = vi.fit(lambda x: -0.5 * ((x - 1) ** 2).sum(1) / 4, start, steps=50)
    assert torch.allclose(alone.mean, batched.mean)
    assert torch.allclose(alone.sd, batched.sd)


def test_gradients_are_those_of_the_elbo():
    """Against autograd through the reparameterized estimate with the same noise."""

    def log_prob(x):
        return -(x**4).sum(1) / 4 + torch.sin(x).sum(1) * x[:, 0]

    mean = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    log_sd = torch.tensor([-0.5, 0.1, 0.4], dtype=torch.float64, requires_grad=True)
    half = torch.randn(4, 3, dtype=torch.float64, generator=rng(5))
    x = mean + log_sd.exp() * torch.cat([half, -half])
    value = log_prob(x).mean() / 0.5 + torch.distributions.Normal(mean, log_sd.exp()).entropy().sum()
    expected = value, *torch.autograd.grad(value, (mean, log_sd))
    found = vi.elbo(LogDensity(log_prob, 0.5), mean.detach(), log_sd.detach(), draws=8, generator=rng(5))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_the_elbo_may_come_from_minibatches():
    y = torch.randn(200, dtype=torch.float64, generator=rng(3)) + 2
    picks = rng(4)

    def log_prob(x):
        rows = y[torch.randint(200, (20,), generator=picks)]
        return -0.5 * 200 * (rows - x).square().mean(dim=1) - 0.5 * x.square().sum(dim=1)

    q = vi.fit(log_prob, torch.zeros(1, dtype=torch.float64), steps=1500)
    assert abs(float(q.mean) - float(y.sum()) / 201) < 0.3 / math.sqrt(201)
    assert math.isclose(float(q.sd), 1 / math.sqrt(201), rel_tol=0.1)


def test_draws_and_densities_agree_with_scipy():
    mean, sd = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
    q = vi.MeanField(mean, sd)
    draws = q.sample(4000, generator=1)
    exact = sps.multivariate_normal(mean.numpy(), np.diag(sd.numpy() ** 2))
    assert np.allclose(q.log_prob(draws).numpy(), exact.logpdf(draws.numpy()))
    assert np.isclose(float(q.entropy), exact.entropy())
    for j in range(2):
        assert sps.kstest(draws[:, j].numpy(), "norm", (float(mean[j]), float(sd[j]))).pvalue > 1e-3
    assert q.log_prob(draws.reshape(40, 100, 2)).shape == (40, 100)
    assert torch.equal(draws, q.sample(4000, generator=1))


def test_the_same_seed_gives_the_same_fit_and_inputs_and_the_global_generator_are_left_alone():
    before, init = torch.random.get_rng_state(), torch.ones(2)
    a, b, c = (
        vi.fit(lambda x: -(x**4).sum(1), init, steps=20, generator=seed)
        for seed in (1, torch.Generator().manual_seed(1), 2)
    )
    assert a.mean.dtype == torch.float32
    assert torch.equal(a.sd, b.sd)
    assert not torch.equal(a.sd, c.sd)
    assert a.trace.shape == (20,)
    assert torch.equal(init, torch.ones(2))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"init": torch.zeros(2, 2)}, r"one mean \(dim,\) is needed"),
        ({"init": torch.zeros(2, dtype=torch.int64)}, "float64 or float32"),
        ({"init": torch.full((2,), math.nan)}, "not finite"),
        ({"init_sd": 0.0}, "init_sd must be a finite number above 0"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number above 0"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"draws": 3}, r"draws=3 must be even: positions come in mirrored pairs\."),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"generator": "0"}, "generator is str"),
        ({"log_prob": lambda x: -x.square().sum()}, "one value per chain"),
        ({"log_prob": lambda x: torch.where(x[:, 0] < 0.01, -x.sum(1), torch.nan)}, "the ELBO is nan at step 0"),
    ],
)
def test_what_cannot_work_is_named(settings, says):
    arguments = {"log_prob": lambda x: -x.square().sum(1), "init": torch.zeros(2), "steps": 5, **settings}
    with pytest.raises(InvalidInput, match=says):
        vi.fit(arguments.pop("log_prob"), arguments.pop("init"), **arguments)


def test_gaussians_that_are_none_are_refused():
    with pytest.raises(InvalidInput, match=r"both must be \(dim,\)"):
        vi.MeanField(torch.zeros(2), torch.ones(3))
    with pytest.raises(InvalidInput, match="positive in every dimension"):
        vi.MeanField(torch.zeros(2), torch.tensor([1.0, 0.0]))
    q = vi.MeanField(torch.zeros(2), torch.ones(2))
    with pytest.raises(InvalidInput, match="n must be a whole number of at least 1"):
        q.sample(0)
    with pytest.raises(InvalidInput, match=r"\(\.\.\., 2\) is needed"):
        q.log_prob(torch.zeros(3))
