"""Simulation-based calibration passes for the sampler and fails for each bug put into it."""

import numpy as np
import pytest
import torch
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.infer import hmc
from mlcollage.infer.validation import sbc
from mlcollage.stats.simulation import sbc_uniformity

SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64) / 3
MU, TAU = 5.0, 5.0  # mu ~ N(0, 5), tau ~ half-normal(5), theta = mu + tau z
SIMS, RANKS = 600, 100


def prior(n, generator):
    x = torch.randn(n, 10, dtype=torch.float64, generator=generator)
    return torch.cat([MU * x[:, :1], (TAU * x[:, 1:2].abs()).log(), x[:, 2:]], dim=1)


def simulate(x, generator):
    theta = x[:, :1] + x[:, 1:2].exp() * x[:, 2:]
    return theta + SIGMA * torch.randn(theta.shape, dtype=torch.float64, generator=generator)


def posterior(y, jacobian=1.0, tau_scale=TAU):
    """The log-density over (mu, log tau, z), by hand; with the bugs that its arguments name."""

    def log_prob(x):
        mu, tau, z = x[:, :1], x[:, 1:2].exp(), x[:, 2:]
        r, k = (y - mu - tau * z) / SIGMA, (tau / tau_scale) ** 2
        value = (-0.5 * (mu / MU) ** 2 - 0.5 * k + jacobian * x[:, 1:2])[:, 0]
        pull = r / SIGMA
        by_mu = pull.sum(1, keepdim=True) - mu / MU**2
        by_log_tau = jacobian - k + tau * (pull * z).sum(1, keepdim=True)
        gradient = torch.cat([by_mu, by_log_tau, tau * pull - z], dim=1)
        return value - 0.5 * (z.square() + r.square()).sum(1), gradient

    return log_prob


def by_hmc(**bugs):
    def fit(y, draws, generator):
        start = 0.5 * torch.randn(len(y), 10, dtype=torch.float64, generator=generator)
        return hmc.sample(
            posterior(y, **bugs),
            start,
            draws=draws,
            warmup=200,
            thin=6,
            steps=(3, 7),
            pooled=False,
            generator=generator,
        )

    return fit


def without_metropolis(y, draws, generator):
    """A sampler whose author forgot to reject, at a step size where that matters."""
    kernel = hmc.build(posterior(y), step_size=0.9, steps=4, metropolis=False)
    state = kernel.init(0.5 * torch.randn(len(y), 10, dtype=torch.float64, generator=generator))
    kept = []
    for i in range(draws * 4):
        state, _ = kernel.update(state, generator)
        if i % 4 == 3:
            kept.append(state.position)
    return torch.stack(kept, dim=1)


QUANTITIES = {
    "mu": lambda x, y: x[:, 0],
    "tau": lambda x, y: x[:, 1].exp(),
    "theta_1": lambda x, y: x[:, 0] + x[:, 1].exp() * x[:, 2],
    "log_likelihood": lambda x, y: -(((y - x[:, :1] - x[:, 1:2].exp() * x[:, 2:]) / SIGMA) ** 2).sum(1),
}


def pvalues(fit):
    ranks = sbc(prior, simulate, fit, QUANTITIES, n_sims=SIMS, n_ranks=RANKS, generator=1)
    return sbc_uniformity(ranks, RANKS).p_values


def test_the_sampler_is_calibrated():
    assert min(pvalues(by_hmc())) > 0.05 / len(QUANTITIES)


@pytest.mark.parametrize(
    "fit",
    [by_hmc(jacobian=0.0), by_hmc(tau_scale=2 * TAU), without_metropolis],
    ids=["no Jacobian of log tau", "prior scale of tau doubled", "Metropolis dropped"],
)
def test_every_seeded_bug_is_caught(fit):
    assert min(pvalues(fit)) < 1e-4


def test_ranks_of_an_exact_posterior_are_uniform_and_those_of_a_wide_one_are_not():
    def fit(width):
        def draw(y, draws, generator):
            return y[:, None] / 2 + width * torch.randn(len(y), draws, 1, generator=generator)

        return draw

    def ranks(width):
        return sbc(
            lambda n, g: torch.randn(n, 1, generator=g),
            lambda x, g: x + torch.randn(x.shape, generator=g),
            fit(width),
            {"mu": lambda x, y: x[:, 0]},
            n_sims=2000,
            n_ranks=20,
        )["mu"]

    exact = ranks(0.5**0.5)
    assert exact.min() == 0
    assert exact.max() == 19
    assert sps.chisquare(np.bincount(exact, minlength=20)).pvalue > 0.01
    assert sps.chisquare(np.bincount(ranks(1.0), minlength=20)).pvalue < 1e-6


def test_ranks_count_the_draws_below_and_ties_are_broken_evenly():
    true = torch.arange(5.0)[:, None]
    below = sbc(
        lambda n, g: true, lambda x, g: None, lambda y, n, g: torch.arange(5.0).expand(5, 5)[..., None] - 0.5,
        {"x": lambda x, y: x[:, 0]}, n_sims=5, n_ranks=6,
    )  # fmt: skip
    assert below["x"].tolist() == [1, 2, 3, 4, 5]
    tied = sbc(
        lambda n, g: torch.zeros(n, 1), lambda x, g: None, lambda y, n, g: torch.zeros(4000, n, 1),
        {"x": lambda x, y: x[:, 0]}, n_sims=4000, n_ranks=4,
    )  # fmt: skip
    assert sps.chisquare(np.bincount(tied["x"], minlength=4)).pvalue > 0.01


def test_more_draws_than_ranks_are_thinned_evenly():
    seen = []

    def quantity(x, y):
        seen.append(float(x[0, 0]))
        return x[:, 0]

    sbc(
        lambda n, g: torch.zeros(n, 1), lambda x, g: None, lambda y, n, g: torch.arange(11.0).expand(2, 11)[..., None],
        {"x": quantity}, n_sims=2, n_ranks=4,
    )  # fmt: skip
    assert seen[1:] == [2, 5, 8]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"n_sims": 0}, "n_sims must be a whole number of at least 1"),
        ({"n_ranks": 1}, "n_ranks must be a whole number of at least 2"),
        ({"n_ranks": 2.5}, "n_ranks must be a whole number of at least 2"),
        ({"quantities": {}}, "quantities is empty"),
        ({"prior": lambda n, g: torch.zeros(n)}, r"prior returned shape \(4,\)"),
        ({"fit": lambda y, n, g: torch.zeros(4, n - 1, 2)}, r"shape \(4, 8, 2\); \(4, at least 9, 2\)"),
        ({"fit": lambda y, n, g: torch.zeros(4, n, 3)}, "is needed"),
        ({"quantities": {"q": lambda x, y: x}}, r"'q' returned shape \(4, 2\)"),
        ({"quantities": {"q": lambda x, y: x[:, 0] / 0}}, "'q' is not finite"),
    ],
)
def test_bad_input_gets_one_sentence(changed, says):
    arguments = {
        "prior": lambda n, g: torch.zeros(n, 2),
        "simulate": lambda x, g: x,
        "fit": lambda y, n, g: torch.zeros(4, n, 2),
        "quantities": {"q": lambda x, y: x[:, 0]},
        "n_sims": 4,
        "n_ranks": 10,
    }
    with pytest.raises(InvalidInput, match=says):
        sbc(**{**arguments, **changed})
