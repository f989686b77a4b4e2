"""Geweke's test passes for every kernel of ours that is exact, and fails for each bug put into one."""

import numpy as np
import pytest
import torch
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.infer import hmc, nuts
from mlcollage.infer.density import LogDensity
from mlcollage.infer.sgld import SGLD
from mlcollage.infer.validation import geweke

# A normal mean and the logarithm of its spread: mu ~ N(0, 1), s ~ half-normal(1), x = (mu, log s), y_1..4 ~ N(mu, s)


def prior(n, generator):
    x = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    return torch.stack([x[:, 0], x[:, 1].abs().log()], dim=1)


def simulate(x, generator):
    noise = torch.randn(len(x), 4, dtype=torch.float64, generator=generator)
    return x[:, :1] + x[:, 1:].exp() * noise


def log_likelihood(x, y):
    return -(0.5 * ((y - x[:, :1]) / x[:, 1:].exp()) ** 2 + x[:, 1:]).sum(1)


def posterior(y, jacobian=1.0, prior_scale=1.0):
    def log_prob(x):
        return (
            log_likelihood(x, y) - 0.5 * (x[:, 0] / prior_scale) ** 2 - 0.5 * (2 * x[:, 1]).exp() + jacobian * x[:, 1]
        )

    return log_prob


def by_hmc(metropolis=True, step_size=0.12, temperature=1.0, **bugs):
    def transition(x, y, generator):
        log_prob = posterior(y, **bugs)
        kernel = hmc.build(log_prob, step_size=step_size, steps=5, metropolis=metropolis, temperature=temperature)
        return kernel.update(kernel.init(x), generator)[0].position

    return transition


QUANTITIES = {
    "mu": lambda x, y: x[:, 0],
    "mu^2": lambda x, y: x[:, 0] ** 2,
    "log s": lambda x, y: x[:, 1],
    "log_likelihood": log_likelihood,
    "mean of y": lambda x, y: y.mean(1),
}


def run(transition, **options):
    return geweke(prior, simulate, transition, QUANTITIES, **{"n_chains": 1500, "n_steps": 20, **options})


def test_hmc_passes_whatever_its_step_size():
    for step_size in (0.05, 0.3):
        result = run(by_hmc(step_size=step_size), generator=1)
        assert result.passed(), str(result)


def test_nuts_passes():
    def transition(x, y, generator):
        density = LogDensity(posterior(y))
        state, _ = nuts.update(density.state(x), density, step_size=0.2, generator=generator)
        return state.position

    result = run(transition, n_chains=400, n_steps=3)
    assert result.passed(), str(result)


@pytest.mark.parametrize(
    "transition",
    [
        by_hmc(jacobian=0.0),
        by_hmc(prior_scale=2.0),
        by_hmc(temperature=1.5),
        by_hmc(metropolis=False, step_size=0.08),
    ],
    ids=["no Jacobian of log s", "prior scale of mu doubled", "temperature not 1", "Metropolis dropped"],
)
def test_every_seeded_bug_is_caught(transition):
    result = run(transition)
    assert min(result.p_values.min(), result.z_p_values.min()) < 1e-4, str(result)
    assert not result.passed()


def test_langevin_steps_pass_when_small_and_fail_when_large():
    """SGLD is exact only in the limit of small steps; a unit normal posterior shows by how much."""

    def sgld(h):
        def transition(x, y, generator):
            w = x.clone().requires_grad_()
            sampler = SGLD([w], lr=h, num_data=1, generator=generator)
            w.grad = 2 * x - y
            sampler.step()
            return w.detach()

        return geweke(
            lambda n, g: torch.randn(n, 1, dtype=torch.float64, generator=g),
            lambda x, g: x + torch.randn(x.shape, dtype=x.dtype, generator=g),
            transition,
            n_steps=30,
            n_chains=4000,
        )

    assert sgld(0.005).passed()
    assert not sgld(0.4).passed()


def test_p_values_are_uniform_for_an_exact_kernel():
    p, z = [], []
    for seed in range(120):
        result = geweke(
            lambda n, g: torch.randn(n, 1, generator=g),
            lambda x, g: x + torch.randn(x.shape, generator=g),
            lambda x, y, g: y / 2 + 0.5**0.5 * torch.randn(x.shape, generator=g),
            {"theta": lambda x, y: x[:, 0]},
            n_chains=100,
            n_steps=3,
            generator=seed,
        )
        p.append(result.z_p_values[0])
        z.append(result.z[0])
    assert sps.kstest(p, "uniform").pvalue > 0.01
    assert abs(np.std(z) - 1) < 0.25


def test_the_same_seed_gives_the_same_result_and_the_default_quantities_are_moments():
    results = [geweke(prior, simulate, by_hmc(), n_chains=50, n_steps=2, generator=seed) for seed in (3, 3, 4)]
    assert results[0].names == ("theta_1", "theta_2", "theta_1^2", "theta_2^2")
    np.testing.assert_array_equal(results[0].z, results[1].z)
    assert (results[0].z != results[2].z).all()
    assert "theta_1: z = " in str(results[0])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"n_chains": 5}, "n_chains must be a whole number of at least 10"),
        ({"n_steps": 0}, "n_steps must be a whole number of at least 1"),
        ({"quantities": {}}, "quantities is empty"),
        ({"prior": lambda n, g: torch.zeros(n)}, r"prior returned shape \(20,\)"),
        ({"transition": lambda x, y, g: x[:5]}, r"transition returned shape \(5, 2\); \(20, 2\)"),
        ({"transition": lambda x, y, g: x / 0}, "transition returned parameters that are not finite"),
        ({"quantities": {"q": lambda x, y: x}}, r"'q' returned shape \(20, 2\)"),
        ({"quantities": {"q": lambda x, y: x[:, 0] / 0}}, "'q' is not finite"),
    ],
)
def test_bad_input_gets_one_sentence(changed, says):
    arguments = {
        "prior": lambda n, g: torch.zeros(n, 2),
        "simulate": lambda x, g: x,
        "transition": lambda x, y, g: x,
        "n_chains": 20,
        "n_steps": 2,
    }
    with pytest.raises(InvalidInput, match=says):
        geweke(**{**arguments, **changed})
