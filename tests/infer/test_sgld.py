"""SGLD: its stationary law is the closed form, whatever the minibatch, and its state is whole."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcollage.errors import InvalidInput
from mlcollage.infer.sghmc import SGHMC
from mlcollage.infer.sgld import SGLD

BOTH = pytest.mark.parametrize("sampler", [SGLD, SGHMC])


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64, requires_grad=True)


def normal(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def walk(optimizer, w, gradient, steps):
    for _ in range(steps):
        w.grad = gradient(w.detach())
        optimizer.step()
    return w.detach()


def test_a_step_is_the_equation():
    w = normal(4).requires_grad_()
    old, gradient, noise = w.detach().clone(), normal(4, seed=2), normal(4, seed=3)
    sampler = SGLD([w], lr=0.01, num_data=50, weight_decay=2.0, temperature=0.3, generator=3)
    w.grad = gradient.clone()
    sampler.step()
    expected = old - 0.01 * (50 * gradient + 2.0 * old) + math.sqrt(2 * 0.01 * 0.3) * noise
    assert torch.allclose(w, expected, rtol=1e-14)
    assert torch.equal(w.grad, gradient)  # the gradient is the user's


@pytest.mark.parametrize(("h", "temperature"), [(0.25, 1.0), (0.125, 1.0), (0.05, 0.1)])
def test_a_quadratic_has_the_stationary_variance_of_the_discretized_chain(h, temperature):
    curvature, chains = 2.0, 40_000
    w = zeros(chains)
    sampler = SGLD([w], lr=h, num_data=1, temperature=temperature)
    draws = walk(sampler, w, lambda x: curvature * x, math.ceil(5 / (h * curvature)))
    exact = temperature / curvature / (1 - h * curvature / 2)  # first order in h: 33 %, 14 %, 5 % above T / k
    assert abs(float(draws.var()) / exact - 1) < 4 * math.sqrt(2 / chains)
    assert abs(float(draws.mean())) < 4 * math.sqrt(exact / chains)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_conjugate_linear_regression(temperature):
    """Mean, and covariance T A^-1 (1 - h A / 2)^-1 with A the posterior precision."""
    n, chains, noise, prior = 30, 4_000, 0.7, 4.0
    x = normal(n, 3) @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 1.3]], dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + noise * normal(n, seed=2)
    precision = x.T @ x / noise**2 + prior * torch.eye(3)
    h = 0.3 / float(torch.linalg.eigvalsh(precision)[-1])
    w = zeros(chains, 3)
    sampler = SGLD([w], lr=h, num_data=n, weight_decay=prior, temperature=temperature, generator=1)
    for _ in range(400):
        sampler.zero_grad()
        (0.5 * ((y - w @ x.T) / noise) ** 2).mean(dim=1).sum().backward()
        sampler.step()
    mean = torch.linalg.solve(precision, x.T @ y / noise**2)
    covariance = temperature * torch.linalg.inv(precision - h / 2 * precision @ precision)
    sd = covariance.diagonal().sqrt()
    assert bool(((w.detach().mean(0) - mean).abs() < 4 * sd / math.sqrt(chains)).all())
    error = (torch.cov(w.detach().T) - covariance) / torch.outer(sd, sd)
    assert float(error.abs().max()) < 4 * math.sqrt(2 / chains)


@pytest.mark.parametrize("batch", [1, 4, 20])
@pytest.mark.parametrize("h", [0.01, 0.0005])
def test_temperature_does_not_depend_on_the_minibatch(batch, h):
    """A mean of N data: minibatches add h V / 2 to the temperature, V = N^2 var(y) / batch, and nothing else."""
    n, chains = 20, 20_000
    y = normal(n)
    y = (y - y.mean()) / y.std(correction=0)
    w, rng = zeros(chains), torch.Generator().manual_seed(5)
    with torch.no_grad():
        w.copy_(normal(chains, seed=6) / math.sqrt(n))  # the posterior without discretization
    sampler = SGLD([w], lr=h, num_data=n, generator=7)
    for _ in range(40 if h > 0.001 else 400):
        rows = torch.randint(n, (batch, chains), generator=rng)
        w.grad = (w.detach() - y[rows]).mean(dim=0)
        sampler.step()
    exact = (1 + h * n**2 / batch / 2) / n / (1 - h * n / 2)
    assert abs(float(w.detach().var()) / exact - 1) < 4 * math.sqrt(2 / chains) + 0.001
    if h < 0.001:
        assert float(w.detach().var()) * n < 1.15  # towards 1 for every minibatch, one of a single row included


@BOTH
@settings(deadline=None)
@given(shards=st.sampled_from([1, 2, 3, 4, 6, 12]), seed=st.integers(0, 2**31))
def test_gradients_averaged_over_shards_give_the_same_step(sampler, shards, seed):
    x, w0 = normal(12, 3, seed=seed % 1000), normal(3, seed=8)
    steps = []
    for pieces in (1, shards):
        w = w0.clone().requires_grad_()
        optimizer = sampler([w], lr=0.01, num_data=500, weight_decay=1.0, generator=seed)
        gradients = [torch.autograd.grad((part @ w).square().mean(), w)[0] for part in x.chunk(pieces)]
        w.grad = torch.stack(gradients).mean(0)
        optimizer.step()
        steps.append(w.detach())
    assert torch.allclose(*steps, rtol=1e-12, atol=1e-12)


def test_weight_decay_is_the_prior_s_precision():
    """No data's force: the draws are the prior's. And the mode is that of SGD with weight_decay / num_data."""
    w = zeros(20_000)
    draws = walk(SGLD([w], lr=0.01, num_data=1000, weight_decay=5.0), w, torch.zeros_like, 120)
    assert abs(float(draws.var()) * 5 * (1 - 0.01 * 5 / 2) - 1) < 4 * math.sqrt(2 / 20_000)
    a, b = normal(3).requires_grad_(), normal(3).requires_grad_()
    ours = SGLD([a], lr=1e-4, num_data=1000, weight_decay=5.0, temperature=0.0)
    theirs = torch.optim.SGD([b], lr=1e-4 * 1000, weight_decay=5.0 / 1000)
    for _ in range(20):
        for w, optimizer in ((a, ours), (b, theirs)):
            w.grad = (w.detach() - 1) ** 3
            optimizer.step()
    assert torch.allclose(a, b, rtol=1e-12)


@BOTH
def test_a_resumed_chain_repeats_the_uninterrupted_one(sampler):
    def build(w):
        return sampler([w], lr=0.05, num_data=3, weight_decay=0.1, generator=4)

    w = zeros(5)
    whole = build(w)
    walk(whole, w, lambda x: x, 3)
    file = io.BytesIO()
    torch.save({"w": w.detach(), "sampler": whole.state_dict()}, file)
    twin = copy.deepcopy((w, whole))
    end = walk(whole, w, lambda x: x, 4).clone()
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # tensors and numbers only: nothing needs unpickling
    again = saved["w"].requires_grad_()
    resumed = build(again)
    resumed.load_state_dict(saved["sampler"])
    assert torch.equal(walk(resumed, again, lambda x: x, 4), end)
    w_twin, copied = twin
    assert torch.equal(walk(copied, w_twin, lambda x: x, 4), end)


@BOTH
def test_closures_groups_and_frozen_parameters(sampler):
    a, b, frozen = zeros(2), zeros(2), torch.ones(2)
    optimizer = sampler([{"params": [a], "temperature": 0.0}, {"params": [b, frozen]}], lr=0.1, num_data=2)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = ((a - 1) ** 2).mean()
        loss.backward()
        calls.append(loss)
        return loss

    assert float(optimizer.step(closure).detach()) == 1.0
    assert len(calls) == 1
    assert torch.allclose(a.detach(), torch.full((2,), 0.2, dtype=torch.float64))  # no noise at temperature zero
    assert torch.equal(b.detach(), torch.zeros(2, dtype=torch.float64))  # no gradient: not moved
    assert torch.equal(frozen, torch.ones(2))


@BOTH
def test_the_same_seed_gives_the_same_draws_and_the_global_generator_is_left_alone(sampler):
    before = torch.random.get_rng_state()
    runs = []
    for seed in (1, 1, 2):
        w = zeros(4)
        runs.append(walk(sampler([w], lr=0.1, num_data=1, generator=seed), w, lambda x: x, 5).numpy().copy())
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    assert torch.equal(before, torch.random.get_rng_state())


@BOTH
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr": 0.0}, "lr must be a finite number above 0"),
        ({"lr": math.nan}, "lr must be a finite number above 0"),
        ({"num_data": 0}, "num_data must be a finite number above 0"),
        ({"num_data": "60000"}, "num_data must be a finite number above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number of at least 0"),
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0"),
        ({"temperature": math.inf}, "temperature must be a finite number of at least 0"),
        ({"generator": 1.5}, "generator is float"),
    ],
)
def test_settings_out_of_range_are_named(sampler, settings, says):
    with pytest.raises(InvalidInput, match=says):
        sampler([zeros(2)], **{"lr": 0.1, "num_data": 10, **settings})


@BOTH
def test_parameters_and_states_that_cannot_work_are_refused(sampler):
    with pytest.raises(InvalidInput, match="float16; float32 or float64"):
        sampler([torch.zeros(2, dtype=torch.float16, requires_grad=True)], lr=0.1, num_data=1)
    w = zeros(2)
    optimizer = sampler([w], lr=0.1, num_data=1)
    with pytest.raises(InvalidInput, match=r"lr must be a finite number above 0"):
        optimizer.add_param_group({"params": [zeros(1)], "lr": -1})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(InvalidInput, match="no generator, so it is not of"):
        optimizer.load_state_dict(torch.optim.SGD([w], lr=0.1).state_dict())
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    optimizer = sampler(embedding.parameters(), lr=0.1, num_data=1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(InvalidInput, match="dense embedding"):
        optimizer.step()
