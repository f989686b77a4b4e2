r"""The horseshoe prior of sparse coefficients, for any gradient sampler; the one module of statistics that needs torch.

C. Carvalho, N. Polson and J. Scott, Biometrika 2010; A. Gelman and A. Vehtari, JASA 2021, idea 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mlcollage._checks import integer, positive, real
from mlcollage.errors import InvalidInput


def horseshoe_scale(relevant: float, dim: int, *, sigma: float = 1.0, n: int) -> float:
    r"""Global scale :math:`\tau_0 = \frac{p_0}{D - p_0} \frac{\sigma}{\sqrt n}` for about ``relevant`` effects.

    J. Piironen and A. Vehtari, Electronic Journal of Statistics 2017, eq. 3.12; columns of X have unit variance.

    Examples
    --------
    >>> round(horseshoe_scale(5, 100, n=400), 5)
    0.00263
    """
    real("relevant", relevant, above=0, below=dim), positive("sigma", sigma), integer("n", n, least=1)
    return relevant / (dim - relevant) * sigma / math.sqrt(n)


def _log_half_cauchy(log_value: Tensor) -> Tensor:
    """Density of u = log v, v ~ half-Cauchy(0, 1), Jacobian included: (2 / pi) / (e^u + e^-u)."""
    return math.log(2 / math.pi) - torch.logaddexp(log_value, -log_value)


@dataclass(frozen=True)
class HorseshoePrior:
    r"""Horseshoe prior on D coefficients, non-centered and unconstrained, ready for any gradient sampler.

    .. math:: \beta_j = z_j\, \tau\, \tilde\lambda_j, \quad z_j \sim N(0, 1), \quad \lambda_j \sim C^+(0, 1), \quad
        \tau \sim C^+(0, \tau_0), \quad \tilde\lambda_j^2 = \frac{c^2 \lambda_j^2}{c^2 + \tau^2 \lambda_j^2}.

    Small coefficients are shrunk to nothing, large ones hardly at all (C. Carvalho, N. Polson and J. Scott, Biometrika
    2010) or, with a slab, as by :math:`N(0, c^2)` (Piironen and Vehtari 2017, eq. 2.8). The sampler moves
    :math:`\theta = (z, \log\lambda, \log\tau)`, of length 2D + 1.

    Parameters
    ----------
    dim
        D.
    scale
        :math:`\tau_0`; see :func:`horseshoe_scale`.
    slab
        c; infinite (the original horseshoe) by default.

    Examples
    --------
    A batch of 8 chains:

    >>> prior = HorseshoePrior(dim=3, scale=0.1)
    >>> theta = prior.sample(8, generator=torch.Generator().manual_seed(0))
    >>> theta.shape, prior.log_prob(theta).shape, prior.coefficients(theta).shape
    (torch.Size([8, 7]), torch.Size([8]), torch.Size([8, 3]))
    """

    dim: int
    scale: float = 1.0
    slab: float = math.inf

    def __post_init__(self) -> None:
        integer("dim", self.dim, least=1), positive("scale", self.scale)
        if self.slab != math.inf:
            positive("slab", self.slab)

    @property
    def size(self) -> int:
        """Length of theta, 2 dim + 1."""
        return 2 * self.dim + 1

    def _split(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not theta.ndim or theta.shape[-1] != self.size:
            raise InvalidInput(
                f"theta has shape {tuple(theta.shape)}; its last axis must be 2 dim + 1 = {self.size}: "
                "z, log lambda, log tau."
            )
        # (..., dim), (..., dim) and (...)
        return theta[..., : self.dim], theta[..., self.dim : -1], theta[..., -1]

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density of theta, Jacobians of the logarithms included; shape ``theta.shape[:-1]``."""
        z, log_lambda, log_tau = self._split(theta)
        # normal z, and half-Cauchys of the logarithms with their Jacobians
        normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
        return normal + _log_half_cauchy(log_lambda).sum(-1) + _log_half_cauchy(log_tau - math.log(self.scale))

    def coefficients(self, theta: Tensor) -> Tensor:
        """Coefficients beta, shape ``(..., dim)``."""
        z, log_lambda, log_tau = self._split(theta)
        log_scale = log_lambda + log_tau[..., None]  # of tau * lambda, kept in logs: both may be huge
        if math.isfinite(self.slab):
            log_slab = math.log(self.slab)
            log_scale = log_scale + log_slab - 0.5 * torch.logaddexp(2 * log_scale, log_scale.new_tensor(2 * log_slab))
        return z * log_scale.exp()

    def sample(self, n: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
        """Independent draws of theta, shape ``(n, 2 dim + 1)``: starts of chains, or simulation-based calibration."""
        z = torch.randn(n, self.dim, generator=generator, dtype=dtype)
        # lambda and tau, away from 0 and 1, where a quantile of the half-Cauchy would be 0 or infinite
        u = torch.rand(n, self.dim + 1, generator=generator, dtype=dtype).clamp(1e-12, 1 - 1e-12)
        logs = (math.pi / 2 * u).tan().log()  # the half-Cauchy's quantile function
        logs[:, -1] += math.log(self.scale)
        return torch.cat([z, logs], dim=-1)
