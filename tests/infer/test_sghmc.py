"""SGHMC: momentum and friction as in its papers, the stationary law in closed form; cycles of step sizes."""

import copy
import math

import numpy as np
import pytest
import torch

from mlcollage.errors import InvalidInput
from mlcollage.infer.sghmc import SGHMC, Cyclical
from mlcollage.infer.sgld import SGLD


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64, requires_grad=True)


def walk(optimizer, w, gradient, steps):
    for _ in range(steps):
        w.grad = gradient(w.detach())
        optimizer.step()
    return w.detach()


def test_steps_equal_a_loop_in_the_variables_of_chen_et_al():
    """Their velocity v = sqrt(h) m, learning rate eta = h and friction alpha = 1 - beta, in plain numpy."""
    h, beta, temperature, n, decay = 0.02, 0.8, 0.6, 7, 0.5
    xi = np.random.default_rng(9).normal(size=(30, 3))
    theta, v = np.ones(3), np.zeros(3)
    for noise in xi:
        gradient = n * np.sin(theta) + decay * theta
        v = v - h * gradient - (1 - beta) * v + math.sqrt(2 * (1 - beta) * h * temperature) * noise
        theta = theta + v
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)

    class Listed(SGHMC):
        def _add_noise(self, to, variance):
            to.add_(torch.from_numpy(xi[self.at]), alpha=math.sqrt(variance))
            self.at += 1

    sampler = Listed([w], lr=h, num_data=n, momentum=beta, weight_decay=decay, temperature=temperature)
    sampler.at = 0
    assert np.allclose(walk(sampler, w, torch.sin, 30).numpy(), theta, rtol=1e-11)


def test_without_noise_it_is_torch_s_momentum_and_without_momentum_sgld():
    a, b, c, d = zeros(3), zeros(3), zeros(3), zeros(3)

    def pull(x):
        return (x - 1) ** 3

    cold = walk(SGHMC([a], lr=1e-3, num_data=100, momentum=0.9, weight_decay=2.0, temperature=0.0), a, pull, 30)
    torch_sgd = torch.optim.SGD([b], lr=1e-3 * 100, momentum=0.9, weight_decay=2.0 / 100)
    assert torch.allclose(cold, walk(torch_sgd, b, pull, 30), rtol=1e-11)
    ours = walk(SGHMC([c], lr=1e-3, num_data=100, momentum=0.0, generator=2), c, pull, 30)
    assert torch.allclose(ours, walk(SGLD([d], lr=1e-3, num_data=100, generator=2), d, pull, 30), rtol=1e-11)


@pytest.mark.parametrize(
    ("h", "beta", "temperature"), [(0.5, 0.0, 1.0), (0.5, 0.5, 1.0), (0.8, 0.9, 1.0), (0.2, 0.9, 0.1)]
)
def test_a_quadratic_has_the_stationary_variance_of_the_discretized_chain(h, beta, temperature):
    curvature, chains = 2.0, 30_000
    w = zeros(chains)
    sampler = SGHMC([w], lr=h, num_data=1, momentum=beta, temperature=temperature)
    draws = walk(sampler, w, lambda x: curvature * x, 150)
    exact = temperature / curvature / (1 - h * curvature / (2 * (1 + beta)))
    assert abs(float(draws.var()) / exact - 1) < 4 * math.sqrt(2 / chains)
    # the same by brute force: the covariance of (w, m) iterated to its fixed point
    root = math.sqrt(h)
    step = np.array([[1 - h * curvature, root * beta], [-root * curvature, beta]])
    kick = np.outer([root, 1.0], [root, 1.0]) * 2 * (1 - beta) * temperature
    covariance = np.zeros((2, 2))
    for _ in range(500):
        covariance = step @ covariance @ step.T + kick
    assert math.isclose(covariance[0, 0], exact, rel_tol=1e-9)


def test_gradient_noise_warms_by_what_is_documented():
    h, beta, variance, chains = 0.05, 0.9, 9.0, 30_000
    rng, w = torch.Generator().manual_seed(3), zeros(chains)
    sampler = SGHMC([w], lr=h, num_data=1, momentum=beta, generator=4)

    def noisy(x):
        return x + math.sqrt(variance) * torch.randn(chains, dtype=x.dtype, generator=rng)

    draws = walk(sampler, w, noisy, 150)
    exact = (1 + h * variance / (2 * (1 - beta))) / (1 - h / (2 * (1 + beta)))
    assert abs(float(draws.var()) / exact - 1) < 4 * math.sqrt(2 / chains)


@pytest.mark.parametrize("beta", [0.0, 0.95])
def test_preconditioned_steps_equal_a_loop_of_the_paper_s_equations(beta):
    """Gradient ascent on the log-density with M = eps + sqrt(moving average of squared gradients), from zero."""
    h, decay, eps, n, prior = 0.003, 0.9, 1e-2, 7, 0.5
    xi = np.random.default_rng(9).normal(size=(30, 3))
    w, m, v = np.ones(3), np.zeros(3), np.zeros(3)
    for noise in xi:
        g = -n * np.sin(w) - prior * w
        v = decay * v + (1 - decay) * g**2
        mass = eps + np.sqrt(v)
        m = beta * m + math.sqrt(h) * g + math.sqrt(2 * (1 - beta)) * np.sqrt(mass) * noise
        w = w + math.sqrt(h) * m / mass
    settings = {"lr": h, "num_data": n, "weight_decay": prior, "rmsprop": decay, "eps": eps}
    samplers = [(SGHMC, {"momentum": beta})] + ([(SGLD, {})] if beta == 0 else [])
    for kind, more in samplers:

        class Listed(kind):
            def _add_noise(self, to, variance, scale=None):
                to.add_(torch.from_numpy(xi[self.at]) * scale, alpha=math.sqrt(variance))
                self.at += 1

        p = torch.ones(3, dtype=torch.float64, requires_grad=True)
        sampler = Listed([p], **settings, **more)
        sampler.at = 0
        assert np.allclose(walk(sampler, p, torch.sin, 30).numpy(), w, rtol=1e-11)


@pytest.mark.parametrize(("kind", "more", "beta"), [(SGLD, {}, 0.0), (SGHMC, {"momentum": 0.95}, 0.95)])
def test_a_settled_preconditioner_leaves_the_law_and_evens_out_the_scales(kind, more, beta):
    """Curvatures 1 and 400 in one step size; M settles under gradient noise, then stays, and draws are exact."""
    curvature, chains, noise = torch.tensor([1.0, 400.0], dtype=torch.float64), 8_000, 3.0
    w = zeros(chains, 2)
    rng = torch.Generator().manual_seed(5)
    h = 0.05 * (1 - beta)
    sampler = kind([w], lr=h, num_data=1, rmsprop=0.99, eps=0.5, generator=1, **more)

    def noisy(x):
        return curvature * x + noise * curvature.sqrt() * torch.randn(x.shape, dtype=x.dtype, generator=rng)

    walk(sampler, w, noisy, 300)
    mass = sampler.state[w]["square_avg"].sqrt() + 0.5
    assert 15 < float(mass[:, 1].mean() / mass[:, 0].mean()) < 24  # gradients of both differ by about 20
    sampler.param_groups[0]["rmsprop"] = 1.0
    draws = walk(sampler, w, lambda x: curvature * x, 400)
    assert torch.equal(sampler.state[w]["square_avg"].sqrt() + 0.5, mass)
    exact = (1 / curvature / (1 - h * curvature / (2 * mass * (1 + beta)))).mean(0)
    assert float((draws.var(0) / exact - 1).abs().max()) < 4 * math.sqrt(2 / chains)


def test_preconditioned_cycles_find_a_conjugate_posterior_from_minibatches():
    """The paper's CLR-Prec on linear regression with features of very different scale; means and spreads."""
    n, chains, batch, cycles, cycle = 60, 100, 20, 40, 100
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, dtype=torch.float64, generator=rng) * torch.tensor([1.0, 20.0])
    y = x @ torch.tensor([1.0, -0.1], dtype=torch.float64) + torch.randn(n, dtype=torch.float64, generator=rng)
    covariance = torch.linalg.inv(x.T @ x + torch.eye(2))
    w = zeros(chains, 2)
    sampler = SGHMC([w], lr=1e-4, num_data=n, momentum=0.95, weight_decay=1.0, rmsprop=0.99, generator=1)
    schedule, kept = Cyclical(sampler, cycle), []
    for _ in range(cycles * cycle):
        rows = torch.randint(0, n, (chains, batch), generator=rng)
        residual = torch.einsum("cbf,cf->cb", x[rows], w.detach()) - y[rows]
        w.grad = torch.einsum("cb,cbf->cf", residual, x[rows]) / batch
        last = schedule.last_of_cycle
        sampler.step()
        schedule.step()
        if last and schedule.cycle > 10:
            kept.append(w.detach().clone())
    draws = torch.cat(kept)
    sd = covariance.diagonal().sqrt()
    assert float(((draws.mean(0) - covariance @ x.T @ y) / sd).abs().max()) < 0.05
    assert float((draws.std(0) / sd - 1).abs().max()) < 0.15


@pytest.mark.parametrize("sampler", [SGLD, SGHMC])
def test_a_preconditioned_chain_resumes_and_refuses_bad_settings(sampler):
    def build():
        w = zeros(3)
        return w, sampler([w], lr=0.1, num_data=1, rmsprop=0.9, eps=0.1, generator=1)

    def pull(x):
        return x - 1

    w, chain = build()
    walk(chain, w, pull, 5)
    position, state = w.detach().clone(), copy.deepcopy(chain.state_dict())
    again, other = build()
    with torch.no_grad():
        again.copy_(position)
    other.load_state_dict(state)
    assert torch.equal(walk(chain, w, pull, 5), walk(other, again, pull, 5))
    for bad in ({"rmsprop": 1.5}, {"rmsprop": "0.9"}, {"rmsprop": True}, {"eps": 0.0}, {"eps": math.nan}):
        with pytest.raises(InvalidInput, match=f"{next(iter(bad))} must be"):
            sampler([zeros(1)], lr=0.1, num_data=1, **bad)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, "0.9", math.nan])
def test_momentum_out_of_range_is_named(momentum):
    with pytest.raises(InvalidInput, match="momentum must be a finite number of at least 0 and below 1"):
        SGHMC([zeros(2)], lr=0.1, num_data=1, momentum=momentum)


@pytest.mark.parametrize("sampler", [SGLD, SGHMC])
def test_cycles_follow_the_equation_in_every_group(sampler):
    groups = [{"params": [zeros(1)], "lr": 0.4}, {"params": [zeros(1)], "temperature": 0.5}]
    optimizer = sampler(groups, lr=0.1, num_data=1)
    cycle = Cyclical(optimizer, 10, exploration=0.3)
    for k in range(35):
        share = (k % 10) / 10
        for group, lr, temperature in zip(optimizer.param_groups, (0.4, 0.1), (1.0, 0.5), strict=True):
            assert math.isclose(group["lr"], lr / 2 * (1 + math.cos(math.pi * share)), rel_tol=1e-12)
            assert group["temperature"] == (temperature if share >= 0.3 else 0.0)
        assert cycle.cycle == k // 10
        assert cycle.sampling == (share >= 0.3)
        assert cycle.last_of_cycle == (k % 10 == 9)
        optimizer.step()
        cycle.step()


def test_cycles_visit_modes_that_one_constant_step_size_does_not():
    """Two modes 8 apart: large first steps cross, and each cycle ends in a mode."""

    def force(x):  # -log of a mixture of N(-4, 1) and N(4, 1)
        return x - 4 * torch.tanh(4 * x)

    visited = {}
    for name, h in (("constant", 0.02), ("cyclical", 2.5)):
        w = torch.full((500,), 4.0, dtype=torch.float64, requires_grad=True)
        sampler = SGLD([w], lr=h, num_data=1, generator=1)
        cycle = Cyclical(sampler, 50) if name == "cyclical" else None
        for _ in range(200):
            w.grad = force(w.detach())
            sampler.step()
            if cycle is not None:
                cycle.step()
        visited[name] = float((w.detach() < 0).double().mean())
        assert float((w.detach().abs() - 4).abs().mean()) < 1.5
    assert visited["constant"] < 0.02
    assert 0.2 < visited["cyclical"] < 0.8


def test_a_resumed_cycle_repeats_the_uninterrupted_one():
    def build():
        w = zeros(3)
        sampler = SGHMC([w], lr=0.1, num_data=1, generator=1)
        return w, sampler, Cyclical(sampler, 6, exploration=0.5)

    def go(w, sampler, cycle, steps):
        for _ in range(steps):
            walk(sampler, w, lambda x: x - 1, 1)
            cycle.step()

    w, sampler, cycle = build()
    go(w, sampler, cycle, 8)
    position, states = w.detach().clone(), copy.deepcopy((sampler.state_dict(), cycle.state_dict()))
    again, sampler2, cycle2 = build()
    with torch.no_grad():
        again.copy_(position)
    sampler2.load_state_dict(states[0])
    cycle2.load_state_dict(states[1])
    go(w, sampler, cycle, 9)
    go(again, sampler2, cycle2, 9)
    assert torch.equal(w, again)
    assert sampler2.param_groups[0]["lr"] == sampler.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cycle_length": 0}, "cycle_length must be a whole number of at least 1"),
        ({"cycle_length": 2.5}, "cycle_length must be a whole number of at least 1"),
        ({"cycle_length": 5, "exploration": 1.0}, "exploration must be a finite number of at least 0 and below 1"),
    ],
)
def test_cycles_out_of_range_are_named(settings, says):
    with pytest.raises(InvalidInput, match=says):
        Cyclical(SGLD([zeros(1)], lr=0.1, num_data=1), **settings)


def test_a_cycle_needs_a_sampler():
    with pytest.raises(InvalidInput, match="optimizer is SGD; SGLD or SGHMC is needed"):
        Cyclical(torch.optim.SGD([zeros(1)], lr=0.1), 5)
