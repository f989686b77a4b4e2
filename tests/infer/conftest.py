"""Posteriors whose moments are known without a sampler."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch


@dataclass(frozen=True)
class Known:
    """A log-density (value and gradient by hand), the draws' map to named quantities, and their exact moments."""

    log_prob: object
    dim: int
    quantities: object
    mean: np.ndarray
    sd: np.ndarray


Y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
S = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])


def quadrature(y, s, prior_sd, tau_scale):
    """Moments of mu, tau, theta_1..J: mu and theta integrated by hand, tau on a fine grid of its logarithm."""
    tau = np.exp(np.linspace(-12, 7, 40_001))[:, None]
    v = s**2 + tau**2
    precision = (1 / v).sum(1) + 1 / prior_sd**2
    m = (y / v).sum(1) / precision
    log_p = -np.log1p((tau[:, 0] / tau_scale) ** 2) + np.log(tau[:, 0])  # half-Cauchy, and the grid's spacing
    log_p += -0.5 * np.log(precision) - 0.5 * np.log(v).sum(1)
    log_p += -0.5 * ((y - m[:, None]) ** 2 / v).sum(1) - 0.5 * m**2 / prior_sd**2
    w = np.exp(log_p - log_p.max())
    w /= w.sum()
    shrink = tau**2 / v  # theta_j | mu, tau = shrink y_j + (1 - shrink) mu, with variance shrink s_j^2
    theta = shrink * y + (1 - shrink) * m[:, None]
    theta_var = shrink * s**2 + (1 - shrink) ** 2 / precision[:, None]
    first = np.concatenate([[w @ m], [w @ tau[:, 0]], w @ theta])
    second = np.concatenate([[w @ (1 / precision + m**2)], [w @ tau[:, 0] ** 2], w @ (theta_var + theta**2)])
    return first, np.sqrt(second - first**2)


@pytest.fixture(scope="session")
def eight_schools():
    """mu ~ N(0, 5), tau ~ half-Cauchy(5), theta = mu + tau z, over (mu, log tau, z)."""
    y, s = torch.from_numpy(Y), torch.from_numpy(S)

    def log_prob(x):
        mu, tau, z = x[:, :1], x[:, 1:2].exp(), x[:, 2:]
        r, k = (y - mu - tau * z) / s, (tau / 5) ** 2
        value = (-0.5 * (mu / 5) ** 2 - torch.log1p(k) + x[:, 1:2])[:, 0] - 0.5 * (z.square() + r.square()).sum(1)
        pull = r / s
        by_mu = pull.sum(1, keepdim=True) - mu / 25
        by_log_tau = 1 - 2 * k / (1 + k) + tau * (pull * z).sum(1, keepdim=True)
        return value, torch.cat([by_mu, by_log_tau, tau * pull - z], dim=1)

    def quantities(draws):
        mu, tau, z = draws[..., :1], draws[..., 1:2].exp(), draws[..., 2:]
        return torch.cat([mu, tau, mu + tau * z], dim=-1)

    return Known(log_prob, 10, quantities, *quadrature(Y, S, 5.0, 5.0))


@pytest.fixture(scope="session")
def regression():
    """Linear regression with known noise and a Gaussian prior: a Gaussian posterior in closed form."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)) * [1.0, 10.0, 0.1]
    y = x @ [1.0, -0.2, 3.0] + 0.5 * rng.normal(size=40)
    precision = x.T @ x / 0.25 + np.eye(3)
    covariance = np.linalg.inv(precision)
    xt, yt = torch.from_numpy(x), torch.from_numpy(y)

    def log_prob(w):
        return -0.5 * ((w @ xt.T - yt) / 0.5).square().sum(1) - 0.5 * w.square().sum(1)

    mean = covariance @ x.T @ y / 0.25
    return Known(log_prob, 3, lambda draws: draws, mean, np.sqrt(np.diag(covariance)))
