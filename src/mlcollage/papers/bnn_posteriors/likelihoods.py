r"""Likelihoods: what a network's outputs say about one target each, summed over the data, never averaged.

A :class:`Likelihood` checks targets once, gives :math:`\log p(y_i \mid x_i, w)` of every datum, and turns outputs into
predictions. Those built in also give the gradient by the outputs by hand, for the fast backend of
:mod:`mlcollage.papers.bnn_posteriors.backends`.

A temperature T divides the whole log-density, likelihood and prior. The official code tempers a Gaussian likelihood by
:math:`\sigma \sqrt T` instead, which leaves :math:`\log \sigma` as it was: for regression the two differ.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlcollage._checks import choice, positive, real
from mlcollage.errors import InvalidInput
from mlcollage.infer.density import normal

from .validation import check_finite

__all__ = ["BernoulliLikelihood", "CategoricalLikelihood", "CustomLikelihood", "GaussianLikelihood", "Likelihood"]

LogLikelihood = Callable[[Tensor, Tensor], Tensor]
_MEND = "drop or impute such data"


class Likelihood(ABC):
    """How targets are distributed, given a network's outputs."""

    kind: str  # "classification", "regression" or "other": what predictions are

    @abstractmethod
    def check(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Targets (n, ...) made fit for :meth:`log_prob`, given some of the network's outputs (m, ...)."""

    @abstractmethod
    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Log-likelihood of each datum, (n,), of outputs (n, ...) and checked targets (n, ...)."""

    def targets(self, y: Tensor, outputs: Tensor) -> Tensor:
        """Checked targets as :meth:`score` takes them: the data last, (..., n)."""
        return y.movedim(0, -1)

    def score(self, z: Tensor, targets: Tensor, value: bool) -> tuple[Tensor | None, Tensor]:
        """Log-likelihood and its gradient by the outputs, with the data last.

        Parameters
        ----------
        z
            Outputs of every chain, (chains, K, n); may be overwritten.
        targets
            From :meth:`targets`, (..., n), or with a leading dimension of chains.
        value
            Whether the value is needed too.

        Returns
        -------
        Tensor or None, Tensor
            Sums over the data, (chains,) in float64; the gradient, (chains, K, n).
        """
        own = targets.ndim > self._target_dims  # whether each chain has targets of its own
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            each = [(targets[c] if own else targets).movedim(-1, 0) for c in range(len(z))]  # (n, ...) per chain
            log_p = torch.stack([self.log_prob(one.T, y) for one, y in zip(leaf, each, strict=True)])  # (chains, n)
            (gradient,) = torch.autograd.grad(log_p.sum(), leaf)
        return (log_p.detach().double().sum(dim=1) if value else None), gradient

    _target_dims = 1  # dimensions of targets without chains

    def log_proba(self, outputs: Tensor) -> Tensor:
        """Log-probabilities of the classes, (..., K), of outputs; only of classifications."""
        raise InvalidInput(f"{type(self).__name__} has no class probabilities; use predict_moments or predict_draws.")

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the target, (...) each, of outputs; only of regressions."""
        raise InvalidInput(f"{type(self).__name__} has no mean and variance; use predict_proba or predict_draws.")

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A target of each datum, (...) or (..., d), drawn at outputs (..., n, K)."""
        raise InvalidInput(f"{type(self).__name__} draws no targets; give it a function sample(outputs, generator).")

    def cdf(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Probability of a target of at most ``y``, in the shape of the mean, in float64; only of regressions."""
        raise InvalidInput(f"{type(self).__name__} has no quantiles; give it a function cdf(outputs, y).")


class CategoricalLikelihood(Likelihood):
    r"""Classes by softmax of the outputs: :math:`\log p(y \mid z) = z_y - \log \sum_k e^{z_k}`.

    Examples
    --------
    >>> CategoricalLikelihood().log_prob(torch.zeros(1, 4), torch.tensor([2])).exp()
    tensor([0.2500])
    """

    kind = "classification"

    def check(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Whole labels 0 to K - 1, (n,), for outputs (m, K)."""
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise InvalidInput(
                f"outputs have shape {tuple(outputs.shape)}; (n, K) logits are needed (for one logit use 'bernoulli')."
            )
        classes = outputs.shape[1]
        if y.ndim != 1:
            raise InvalidInput(f"y has shape {tuple(y.shape)}; one label per datum, (n,), is needed, not one-hot rows.")
        if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
            raise InvalidInput(f"labels are {y.dtype}; whole numbers from 0 to {classes - 1} are needed (y.long()).")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= classes:
            raise InvalidInput(f"labels run from {low} to {high}, but the network has {classes} outputs.")
        return y.long()

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        return outputs.log_softmax(dim=-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)

    _target_dims = 2

    def targets(self, y: Tensor, outputs: Tensor) -> Tensor:
        """One-hot, (K, n)."""
        # the data last, as the outputs of the backends
        return F.one_hot(y, outputs.shape[1]).T.to(outputs.dtype).contiguous()

    def score(self, z: Tensor, targets: Tensor, value: bool) -> tuple[Tensor | None, Tensor]:
        """See :class:`Likelihood`."""
        if not value:
            proba = z.softmax(dim=1)
            return None, torch.sub(targets, proba, out=proba)
        log_p = z.log_softmax(dim=1)  # (chains, K, n), overwritten by the gradient below
        total = (log_p * targets).sum(dim=(1, 2), dtype=torch.float64)
        return total, torch.sub(targets, log_p.exp_(), out=log_p)

    def log_proba(self, outputs: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        return outputs.log_softmax(dim=-1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`Likelihood`; classes, (...)."""
        proba = outputs.softmax(dim=-1).flatten(0, -2)  # multinomial takes rows
        return torch.multinomial(proba, 1, generator=generator).reshape(outputs.shape[:-1])


class BernoulliLikelihood(Likelihood):
    r"""Two classes by one logit: :math:`\log p(y \mid z) = y z - \log(1 + e^z)`.

    Outputs are (n,) or (n, 1), targets 0 or 1, (n,).
    """

    kind = "classification"

    def check(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Zeros and ones, (n,), for outputs (m,) or (m, 1)."""
        if outputs.ndim > 2 or (outputs.ndim == 2 and outputs.shape[1] != 1):
            raise InvalidInput(
                f"outputs have shape {tuple(outputs.shape)}; one logit each is needed (for classes use 'categorical')."
            )
        y = y.squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y
        check_finite(y, "y", _MEND)
        if y.ndim != 1 or not bool(((y == 0) | (y == 1)).all()):
            raise InvalidInput(f"y of shape {tuple(y.shape)} must be zeros and ones of shape (n,).")
        return y.to(outputs.dtype)

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        z = outputs.reshape(y.shape)
        return y * z - F.softplus(z)

    def score(self, z: Tensor, targets: Tensor, value: bool) -> tuple[Tensor | None, Tensor]:
        """See :class:`Likelihood`."""
        y = targets if targets.ndim == 1 else targets.unsqueeze(1)  # (n,) or (chains, 1, n), against z (chains, 1, n)
        total = (y * z - F.softplus(z)).sum(dim=(1, 2), dtype=torch.float64) if value else None
        return total, y - z.sigmoid()

    def log_proba(self, outputs: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        z = outputs.squeeze(-1) if outputs.ndim and outputs.shape[-1] == 1 else outputs
        return torch.stack([-F.softplus(z), -F.softplus(-z)], dim=-1)  # log p(0), log p(1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`Likelihood`; zeros and ones, (...)."""
        return torch.bernoulli(self.log_proba(outputs)[..., 1].exp(), generator=generator)


class GaussianLikelihood(Likelihood):
    r"""Targets with Gaussian noise, of a known size or of one the network gives.

    Without ``noise`` the outputs are :math:`(\mu, r)` and

    .. math:: \log p(y \mid \mu, r) = -\frac{(y - \mu)^2}{2 \sigma^2} - \log \sigma - \frac{1}{2} \log 2 \pi, \qquad
        \sigma = \log(1 + e^r);

    with it they are :math:`\mu` alone, and :math:`\sigma` is ``noise``. For d targets per datum the outputs are
    :math:`\mu_1 \ldots \mu_d, r_1 \ldots r_d`.

    Parameters
    ----------
    noise
        Standard deviation of the noise, if it is known.
    floor
        Smallest standard deviation that the network may give; it is added. On data without noise the spread may
        otherwise go to zero and the density's curvature to infinity: no step size would do.

    Examples
    --------
    >>> GaussianLikelihood(noise=1.0).log_prob(torch.zeros(1, 1), torch.zeros(1, 1))
    tensor([-0.9189])
    """

    kind = "regression"
    _target_dims = 2

    def __init__(self, noise: float | None = None, *, floor: float = 0.0):
        self.noise = None if noise is None else positive("noise", noise)
        self.floor = real("floor", floor, least=0)

    def check(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Numbers, (n, d), for outputs (m, 2d), or (m, d) where the noise is known."""
        y = y.unsqueeze(1) if y.ndim == 1 else y
        if y.ndim != 2:
            raise InvalidInput(f"y has shape {tuple(y.shape)}; (n,) or (n, d) is needed.")
        check_finite(y, "y", _MEND)
        # a mean per target, and a spread if the noise is not known
        wanted = y.shape[1] * (2 if self.noise is None else 1)
        have = 1 if outputs.ndim == 1 else outputs.shape[1]
        if outputs.ndim > 2 or have != wanted:
            what = "mean and spread" if self.noise is None else "the mean"
            hint = "; or give GaussianLikelihood(noise=...) for a network without spread" if have * 2 == wanted else ""
            shape = tuple(outputs.shape)
            raise InvalidInput(f"outputs have shape {shape}; {wanted} are needed, {what} of each target{hint}.")
        return y.to(outputs.dtype)

    def _split(self, outputs: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if self.noise is not None:
            return outputs, outputs.new_tensor(self.noise)
        mean, r = outputs.chunk(2, dim=dim)
        return mean, F.softplus(r) + self.floor

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        mean, sigma = self._split(outputs.unsqueeze(-1) if outputs.ndim == y.ndim - 1 else outputs, -1)
        each = -0.5 * ((y - mean) / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)
        return each.sum(dim=-1)

    def score(self, z: Tensor, targets: Tensor, value: bool) -> tuple[Tensor | None, Tensor]:
        """See :class:`Likelihood`."""
        mean, sigma = self._split(z, 1)  # (chains, d, n) each
        standard = (targets - mean) / sigma
        total = None
        if value:
            each = -0.5 * standard.double().square() - sigma.double().log() - 0.5 * math.log(2 * math.pi)
            total = each.sum(dim=(1, 2))
        by_mean = standard / sigma
        if self.noise is not None:
            return total, by_mean
        by_sigma = (standard.square() - 1) / sigma  # and sigma by r is the logistic function of r
        return total, torch.cat([by_mean, by_sigma * z.chunk(2, dim=1)[1].sigmoid()], dim=1)

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Likelihood`; (..., d), or (...) for outputs without a last dimension of their own."""
        mean, sigma = self._split(outputs, -1)
        return mean, sigma.square().expand_as(mean)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`Likelihood`; (..., d)."""
        mean, sigma = self._split(outputs, -1)
        return mean + sigma * normal(mean.shape, mean, generator)

    def cdf(self, outputs: Tensor, y: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        mean, sigma = (part.double() for part in self._split(outputs, -1))
        return torch.special.ndtr((y - mean) / sigma)


class CustomLikelihood(Likelihood):
    """A function of your own.

    Parameters
    ----------
    log_prob
        Outputs (n, ...) and targets (n, ...) to the log-likelihood of each datum, (n,), in torch operations.

    Examples
    --------
    Counts, with the logarithm of the rate as output:

    >>> poisson = CustomLikelihood(lambda out, y: y * out[:, 0] - out[:, 0].exp() - torch.lgamma(y + 1))
    >>> poisson.log_prob(torch.zeros(2, 1), torch.tensor([0.0, 1.0]))
    tensor([-1., -1.])
    """

    kind = "other"

    def __init__(self, log_prob: LogLikelihood):
        if not callable(log_prob):
            raise InvalidInput(f"the likelihood is {type(log_prob).__name__}; a function of (outputs, y) is needed.")
        self._log_prob = log_prob

    def check(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Tries the function: one value per datum, finite or minus infinity."""
        check_finite(y, "y", _MEND)
        self._target_dims = y.ndim
        # one value per datum, so that nothing was averaged or summed
        value = self._log_prob(outputs, y[: len(outputs)])
        if not isinstance(value, Tensor) or value.shape != (len(outputs),):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInput(
                f"the likelihood returned {found} for {len(outputs)} data; the log-likelihood of each, "
                f"({len(outputs)},), is needed: it is summed here, and a mean would weigh as one datum "
                "(use reduction='none', and the sign of a log-likelihood, not of a loss)."
            )
        return y

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        return self._log_prob(outputs, y)


def make_likelihood(likelihood: Any) -> Likelihood:
    """A likelihood by name (``"categorical"``, ``"gaussian"``, ``"bernoulli"``), itself, or around a function.

    Raises
    ------
    UnknownName
        For another name.
    """
    known = {"categorical": CategoricalLikelihood, "gaussian": GaussianLikelihood, "bernoulli": BernoulliLikelihood}
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str):
        return known[choice("likelihood", likelihood, known)]()
    if isinstance(likelihood, torch.nn.Module):
        raise InvalidInput(
            f"the likelihood is the module {type(likelihood).__name__}, a loss; name the likelihood, or give a "
            "function of (outputs, y) that returns the log-likelihood of each datum."
        )
    return CustomLikelihood(likelihood)
