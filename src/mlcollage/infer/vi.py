r"""Mean-field Gaussian variational inference: the closest axis-aligned Gaussian to any log-density.

With :math:`q(x) = \prod_j N(x_j; \mu_j, \sigma_j^2)` and :math:`x = \mu + \sigma \epsilon`, :func:`fit` maximizes

.. math:: \mathrm{ELBO}(\mu, \sigma) = E_\epsilon\Big[\frac{1}{T} \log p(\mu + \sigma \epsilon)\Big] + H(q), \qquad
    H(q) = \sum_j \log \sigma_j + \frac{d}{2} (1 + \log 2 \pi),

the entropy exactly and the expectation by draws of :math:`\epsilon` in pairs :math:`\pm\epsilon`, which makes the
gradient by :math:`\mu` exact wherever the density is Gaussian. D. P. Kingma and M. Welling, "Auto-Encoding Variational
Bayes", ICLR 2014, section 2.3; C. Blundell et al., "Weight Uncertainty in Neural Networks", ICML 2015, section 3.

Of a Gaussian with precision matrix :math:`\Lambda` it finds the mean and :math:`\sigma_j^2 = 1 / \Lambda_{jj}`, which
is less than the marginal variance wherever dimensions are correlated: mean-field posteriors are too sure of themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlcollage._checks import integer, positive
from mlcollage.errors import InvalidInput
from mlcollage.infer.density import Generator, LogDensity, LogProb, normal, start, torch_generator


@dataclass(frozen=True)
class MeanField:
    """An axis-aligned Gaussian.

    Attributes
    ----------
    mean, sd : Tensor
        (dim,); ``sd`` is positive.
    trace : Tensor
        (steps,), the estimate of the ELBO at each step of :func:`fit`, before the step; empty if made by hand.

    Raises
    ------
    InvalidInput
        If shapes differ, or a standard deviation is not positive.

    Examples
    --------
    >>> q = MeanField(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    >>> q.sample(5, generator=0).shape
    torch.Size([5, 2])
    >>> q.log_prob(torch.tensor([0.0, 1.0]))
    tensor(-2.5310)
    """

    mean: Tensor
    sd: Tensor
    trace: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.sd.shape:
            raise InvalidInput(
                f"mean has shape {tuple(self.mean.shape)} and sd {tuple(self.sd.shape)}; both must be (dim,)."
            )
        if not bool((self.sd > 0).all()):
            raise InvalidInput("sd must be positive in every dimension.")

    def sample(self, n: int, *, generator: Generator = 0) -> Tensor:
        """Independent draws, (n, dim); ``generator`` is a torch.Generator on the mean's device, or a seed."""
        shape = (integer("n", n, least=1), len(self.mean))
        noise = normal(shape, self.mean, torch_generator(generator, self.mean.device))
        return torch.addcmul(self.mean, self.sd, noise)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density, (...), of points (..., dim)."""
        if x.ndim < 1 or x.shape[-1] != len(self.mean):
            raise InvalidInput(f"x has shape {tuple(x.shape)}; (..., {len(self.mean)}) is needed.")
        z = (x - self.mean) / self.sd
        return -0.5 * z.square().sum(dim=-1) - self.sd.log().sum() - 0.5 * len(self.mean) * math.log(2 * math.pi)

    @property
    def entropy(self) -> Tensor:
        """Entropy in nats, a scalar."""
        return self.sd.log().sum() + 0.5 * len(self.mean) * (1 + math.log(2 * math.pi))


def elbo(
    log_prob: LogProb | LogDensity, mean: Tensor, log_sd: Tensor, *, draws: int = 16, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    r"""An unbiased estimate of the ELBO and of its gradients, for an optimization loop of one's own.

    .. math:: \nabla_\mu = E[g], \quad \nabla_{\log \sigma} = E[g \, \sigma \epsilon] + 1, \quad
        g = \nabla \log p(\mu + \sigma \epsilon) / T

    Parameters
    ----------
    log_prob
        See :mod:`mlcollage.infer.density`; it is called with positions (draws, dim). It may be an unbiased estimate
        itself, from a minibatch. A ``LogDensity`` brings its temperature.
    mean, log_sd
        (dim,).
    draws
        An even number of positions: half of them, and their mirror images.
    generator
        On the mean's device.

    Returns
    -------
    Tensor, Tensor, Tensor
        The estimate, a scalar; its gradients by ``mean`` and ``log_sd``, (dim,).

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> value, by_mean, by_log_sd = elbo(
    ...     lambda x: -0.5 * (x - 3).square().sum(1), torch.zeros(1), torch.zeros(1), generator=generator)
    >>> round(float(by_mean), 4)  # exact, since the density is Gaussian
    3.0
    """
    if integer("draws", draws, least=2) % 2:
        raise InvalidInput(f"draws={draws} must be even: positions come in mirrored pairs.")
    density = LogDensity.of(log_prob)
    half = normal((draws // 2, len(mean)), mean, generator)
    offset = torch.cat([half, -half]) * log_sd.exp()  # sigma epsilon, (draws, dim)
    value, gradient = density(mean + offset)
    entropy = log_sd.sum() + 0.5 * len(mean) * (1 + math.log(2 * math.pi))
    return value.mean() + entropy, gradient.mean(dim=0), (gradient * offset).mean(dim=0) + 1


def fit(
    log_prob: LogProb,
    init: Tensor | Any,
    *,
    init_sd: float = 0.1,
    steps: int = 2000,
    draws: int = 16,
    learning_rate: float = 0.05,
    temperature: float = 1.0,
    generator: Generator = 0,
) -> MeanField:
    r"""Fit a mean-field Gaussian by stochastic gradient ascent on the ELBO.

    Adam moves the means and the logarithms of the standard deviations; its learning rate falls to zero along half a
    cosine, so that the noise of the gradients averages out.

    Parameters
    ----------
    log_prob
        See :func:`elbo`. Transform constrained parameters to the real line, with the Jacobian.
    init
        First mean, (dim,): float64 or float32, or an array, which becomes float64. For a network, start at a
        trained one.
    init_sd
        First standard deviation of every dimension.
    steps
        Steps of Adam.
    draws
        Even number of positions per estimate.
    learning_rate
        Of Adam, at the start; about the share of the typical standard deviation that a mean may move in a step.
    temperature
        The whole log-density is divided by it, likelihood and prior alike.
    generator
        A torch.Generator on ``init``'s device, or a seed.

    Raises
    ------
    InvalidInput
        For shapes or settings that cannot work, and where the ELBO ceases to be finite.

    Examples
    --------
    Two Gaussian dimensions with correlation 0.6: the standard deviations are 0.8 where the marginal ones are 1.

    >>> precision = torch.linalg.inv(torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64))
    >>> q = fit(lambda x: -0.5 * ((x @ precision) * x).sum(dim=1), torch.ones(2, dtype=torch.float64), steps=800)
    >>> q.mean.abs().max() < 0.01, [round(sd, 2) for sd in q.sd.tolist()]
    (tensor(True), [0.8, 0.8])
    """
    positive("init_sd", init_sd), positive("learning_rate", learning_rate), integer("steps", steps, least=1)
    density = LogDensity(log_prob, temperature)
    first = init if isinstance(init, Tensor) else torch.as_tensor(init, dtype=torch.float64)
    if first.ndim != 1:
        raise InvalidInput(f"init has shape {tuple(first.shape)}; one mean (dim,) is needed, there are no chains here.")
    mean = start(density, first[None]).position[0]  # checked as a single chain
    log_sd = torch.full_like(mean, math.log(init_sd))
    generator = torch_generator(generator, mean.device)
    adam = torch.optim.Adam([mean, log_sd], lr=learning_rate, maximize=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    trace = []
    # gradients are computed in closed form over the sample, and handed to Adam in place of autograd's
    for step in range(steps):
        value, mean.grad, log_sd.grad = elbo(density, mean, log_sd, draws=draws, generator=generator)
        if not value.isfinite():
            raise InvalidInput(
                f"the ELBO is {float(value)} at step {step}; lower learning_rate or init_sd, or make log_prob finite "
                "on the whole real line."
            )
        trace.append(value)
        adam.step()
        schedule.step()
    mean.grad = log_sd.grad = None
    return MeanField(mean, log_sd.exp(), torch.stack(trace))
