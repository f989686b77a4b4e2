r"""Priors over the weights of a network, every parameter independent of the others.

A prior knows its density, the gradient of the logarithm (by hand, since it is needed in every leapfrog step) and how
to draw. Wherever a scale is asked for, a number holds for all parameters, and a mapping gives one for each parameter,
layer or pattern: ``{"": 0.2, "head": 1.0, "*.bias": 0.5}``, the longest key that fits.

``prior.place(layout, like)`` lays it out over a network's parameters; a ``BayesianNetwork`` does that. For the prior
with the covariance of the data see :mod:`mlcollage.papers.bnn_posteriors.empcov`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlcollage._checks import integer, positive
from mlcollage.errors import InvalidInput
from mlcollage.infer.density import Generator, torch_generator

from .layout import Layout

__all__ = ["GaussianMixturePrior", "GaussianPrior", "LaplacePrior", "LogisticPrior", "Prior", "StudentTPrior"]

Scale = float | Mapping[str, float]


class PlacedPrior(ABC):
    """A prior laid out over the positions (chains, P) of one network."""

    @abstractmethod
    def log_prob(self, w: Tensor) -> Tensor:
        """Log-density of positions (chains, P), (chains,), normalized, in float64."""

    @abstractmethod
    def add_gradient_(self, out: Tensor, w: Tensor) -> Tensor:
        """Add the gradient of the log-density at ``w`` to ``out``, both (chains, P); returns ``out``."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Independent draws, (n, P)."""

    @abstractmethod
    def sd(self) -> Tensor:
        """Standard deviation of each parameter, (P,); infinite where there is none."""

    def gradient(self, w: Tensor) -> Tensor:
        """Gradient of the log-density, (chains, P)."""
        return self.add_gradient_(torch.zeros_like(w), w)


class Prior(ABC):
    """A distribution over a network's parameters, whatever the network."""

    @abstractmethod
    def place(self, layout: Layout, like: Tensor) -> PlacedPrior:
        """Lay the prior out over the parameters of ``layout``, with the type and device of ``like``."""

    def sample(
        self, layout: Layout, n: int = 1, *, generator: Generator = 0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draws of all parameters of a network, (n, P), on the CPU.

        Parameters
        ----------
        layout
            The network's, ``Layout.of(module)``.
        n
            Number of draws.
        generator
            A torch.Generator or a seed.
        dtype
            Of the draws.
        """
        like = torch.empty(0, dtype=dtype)
        return self.place(layout, like).sample(integer("n", n, least=1), torch_generator(generator, like.device))


def _checked(name: str, scale: Scale) -> Scale:
    if not isinstance(scale, Mapping):
        return positive(name, scale)
    if not scale:
        raise InvalidInput(f"{name} is an empty mapping; give a number, or numbers by parameter name.")
    return {str(key): positive(f"{name}[{key!r}]", value) for key, value in scale.items()}


class _Independent(Prior):
    """Every parameter on its own, centered at zero, of one family with a scale."""

    _scale: ClassVar[str] = "scale"  # the field that holds it

    def __post_init__(self) -> None:
        object.__setattr__(self, self._scale, _checked(self._scale, getattr(self, self._scale)))

    def place(self, layout: Layout, like: Tensor) -> PlacedPrior:
        """See :meth:`Prior.place`."""
        scale: Scale = getattr(self, self._scale)
        if not isinstance(scale, Mapping):
            return _Placed(self, scale, layout.size, like)
        # what is given by name or pattern, spread over the numbers of each parameter
        scales = layout.vector(layout.assign(scale, self._scale))  # (P,)
        return _Placed(self, scales.to(like.device), layout.size, like)

    @abstractmethod
    def _log_density(self, w: Tensor, s: Tensor) -> Tensor:
        """Log-density of each number; float64."""

    @abstractmethod
    def _add_score_(self, out: Tensor, w: Tensor, s: Tensor | float) -> Tensor:
        """Add the derivative of the log-density of each number to ``out``."""

    @abstractmethod
    def _draw(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Numbers of unit scale, float64."""

    @abstractmethod
    def _sd(self, s: Tensor) -> Tensor:
        """Standard deviation at scale s."""

    def _spread(self, s: Tensor) -> Tensor:
        """What a number of unit scale is multiplied by."""
        return s


class _Placed(PlacedPrior):
    """An independent family over P numbers, with one scale or (P,) of them."""

    def __init__(self, family: _Independent, scale: Tensor | float, size: int, like: Tensor):
        self._family, self._size, self._like = family, size, like
        self._exact = torch.as_tensor(scale, dtype=torch.float64, device=like.device)
        # a number stays a number: one operation without a broadcast, in every leapfrog step
        self._scale = scale.to(like.dtype) if isinstance(scale, Tensor) else scale

    def log_prob(self, w: Tensor) -> Tensor:
        return self._family._log_density(w.double(), self._exact).sum(dim=-1)  # (chains,)

    def add_gradient_(self, out: Tensor, w: Tensor) -> Tensor:
        return self._family._add_score_(out, w, self._scale)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        draws = self._family._draw((n, self._size), generator) * self._family._spread(self._exact)
        return draws.to(self._like.dtype)

    def sd(self) -> Tensor:
        return self._family._sd(self._exact).expand(self._size)


def standard_normal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Numbers N(0, 1) in float64."""
    return torch.randn(shape, dtype=torch.float64, device=generator.device, generator=generator)


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """In the open interval (0, 1)."""
    u = torch.rand(shape, dtype=torch.float64, device=generator.device, generator=generator)
    return u.clamp_(min=2.0**-60)  # its logarithm is taken


@dataclass(frozen=True)
class GaussianPrior(_Independent):
    r""":math:`N(0, s^2)` on every parameter, biases and norms included: the paper's prior.

    A weight decay of :math:`1/s^2` on the summed loss has its mode as minimum.

    Parameters
    ----------
    variance
        :math:`s^2`; the paper uses 1/5 for CIFAR and 1/40 for IMDB. A number, or numbers by parameter name.

    Examples
    --------
    >>> layout = Layout.of(torch.nn.Linear(3, 2))
    >>> GaussianPrior(0.25).sample(layout, 2, generator=0).shape
    torch.Size([2, 8])
    >>> GaussianPrior({"weight": 0.1, "bias": 1.0}).place(layout, torch.zeros(1)).sd().unique().round(decimals=2)
    tensor([0.3200, 1.0000], dtype=torch.float64)
    """

    variance: Scale = 1 / 5

    _scale = "variance"

    def _log_density(self, w: Tensor, s: Tensor) -> Tensor:
        return -0.5 * (w.square() / s + (2 * math.pi * s).log())

    def _add_score_(self, out: Tensor, w: Tensor, s: Tensor | float) -> Tensor:
        # -w / s
        return out.addcdiv_(w, s, value=-1) if isinstance(s, Tensor) else out.add_(w, alpha=-1 / s)

    def _draw(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        return standard_normal(shape, generator)

    def _spread(self, s: Tensor) -> Tensor:
        return s.sqrt()

    def _sd(self, s: Tensor) -> Tensor:
        return s.sqrt()


@dataclass(frozen=True)
class LaplacePrior(_Independent):
    r"""Double exponential, :math:`p(w) = e^{-|w|/b} / 2b`; its mode is the lasso.

    Parameters
    ----------
    scale
        b; the standard deviation is :math:`\sqrt 2 \, b`.
    """

    scale: Scale

    def _log_density(self, w: Tensor, s: Tensor) -> Tensor:
        return -w.abs() / s - (2 * s).log()

    def _add_score_(self, out: Tensor, w: Tensor, s: Tensor | float) -> Tensor:
        return out.sub_(w.sign() / s)

    def _draw(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        u = _uniform(shape, generator) - 0.5  # by the inverse of the distribution function
        return -u.sign() * torch.log1p((-2 * u.abs()).clamp(min=-1 + 2.0**-60))

    def _sd(self, s: Tensor) -> Tensor:
        return math.sqrt(2) * s


@dataclass(frozen=True)
class StudentTPrior(_Independent):
    r"""Student's t, :math:`p(w) \propto (1 + w^2 / \nu s^2)^{-(\nu + 1)/2}`: heavy tails.

    Parameters
    ----------
    df
        :math:`\nu`; the variance, :math:`s^2 \nu / (\nu - 2)`, is infinite up to 2.
    scale
        s.
    """

    df: float
    scale: Scale

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "df", positive("df", self.df))

    def _log_density(self, w: Tensor, s: Tensor) -> Tensor:
        v = self.df
        constant = math.lgamma((v + 1) / 2) - math.lgamma(v / 2) - 0.5 * math.log(v * math.pi)
        return constant - s.log() - (v + 1) / 2 * torch.log1p((w / s).square() / v)

    def _add_score_(self, out: Tensor, w: Tensor, s: Tensor | float) -> Tensor:
        # -(df + 1) w / (df s^2 + w^2)
        return out.addcdiv_(w, self.df * s**2 + w.square(), value=-(self.df + 1))

    def _draw(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        # R. W. Bailey, "Polar generation of random variates with the t-distribution", Mathematics of Computation 1994
        # one draw from two uniform numbers: a radius and an angle
        radius = (self.df * torch.expm1(-2 / self.df * _uniform(shape, generator).log())).sqrt()
        return radius * (2 * math.pi * _uniform(shape, generator)).cos()

    def _sd(self, s: Tensor) -> Tensor:
        return s * (math.sqrt(self.df / (self.df - 2)) if self.df > 2 else math.inf)


@dataclass(frozen=True)
class LogisticPrior(_Independent):
    r"""Logistic, :math:`p(w) = \mathrm{sech}^2(w / 2s) / 4s`: the alternative of the paper's section 6.

    Parameters
    ----------
    scale
        s; the standard deviation is :math:`\pi s / \sqrt 3`.
    """

    scale: Scale

    def _log_density(self, w: Tensor, s: Tensor) -> Tensor:
        z = w / s  # softplus, since sech overflows far out
        return -z - 2 * torch.nn.functional.softplus(-z) - s.log()

    def _add_score_(self, out: Tensor, w: Tensor, s: Tensor | float) -> Tensor:
        return out.sub_((w / (2 * s)).tanh() / s)

    def _draw(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        u = _uniform(shape, generator)
        return u.log() - torch.log1p(-u)

    def _sd(self, s: Tensor) -> Tensor:
        return math.pi / math.sqrt(3) * s


@dataclass(frozen=True)
class GaussianMixturePrior(_Independent):
    r"""Mixture of centered Gaussians, :math:`p(w) = \sum_k \pi_k N(w; 0, s_k^2)`: a spike and a slab.

    Parameters
    ----------
    variances
        :math:`s_k^2`, at least one.
    weights
        :math:`\pi_k`, positive; they are divided by their sum. Equal by default.
    scale
        A further factor of the standard deviations, by parameter name if given as a mapping.
    """

    variances: Sequence[float]
    weights: Sequence[float] | None = None
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        variances = tuple(positive(f"variances[{k}]", v) for k, v in enumerate(self.variances))
        given = (1.0,) * len(variances) if self.weights is None else self.weights
        weights = tuple(positive(f"weights[{k}]", v) for k, v in enumerate(given))
        if not variances or len(weights) != len(variances):
            raise InvalidInput(f"{len(variances)} variances and {len(weights)} weights do not belong together.")
        object.__setattr__(self, "variances", variances)
        object.__setattr__(self, "weights", tuple(p / sum(weights) for p in weights))

    def _parts(self, w: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        """Weighted log-densities of the parts, (parts, ...), and their variances."""
        shape = (-1, *(1 for _ in w.shape))  # the parts before the dimensions of w
        v = w.new_tensor(self.variances).reshape(shape) * s**2
        log_p = w.new_tensor(self.weights).log().reshape(shape)
        # (parts, ...) each
        return log_p - 0.5 * (w.square() / v + (2 * math.pi * v).log()), v

    def _log_density(self, w: Tensor, s: Tensor) -> Tensor:
        return self._parts(w, s)[0].logsumexp(dim=0)

    def _add_score_(self, out: Tensor, w: Tensor, s: Tensor | float) -> Tensor:
        log_p, v = self._parts(w, s)
        # each part pulls by -w / v, weighted by how likely w is to come from it
        return out.addcmul_(w, (log_p.softmax(dim=0) / v).sum(dim=0), value=-1)

    def _draw(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        edges = torch.tensor(self.weights, dtype=torch.float64, device=generator.device).cumsum(0)
        # which part each number comes from: where a uniform number falls among the weights
        part = torch.bucketize(_uniform(shape, generator), edges).clamp_(max=len(edges) - 1)
        sd = torch.tensor(self.variances, dtype=torch.float64, device=generator.device).sqrt()
        return standard_normal(shape, generator) * sd[part]

    def _sd(self, s: Tensor) -> Tensor:
        return s * math.sqrt(sum(p * v for p, v in zip(self.weights or (), self.variances, strict=True)))
