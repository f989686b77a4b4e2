r"""What warm-up learns: a step size by dual averaging and a diagonal mass by Welford's recursion.

Both work on *groups* of chains: one group when all chains sample the same density (what one chain learns helps all),
or one group per chain when each has a density of its own, as in simulation-based calibration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlcollage._checks import probability
from mlcollage.errors import InvalidInput


@dataclass
class DualAveraging:
    r"""Nesterov's dual averaging of the log step size towards an acceptance rate.

    With :math:`\bar H_t` the running mean of :math:`\delta - \alpha_t`,

    .. math::
        \bar H_t = \Big(1 - \frac{1}{t + t_0}\Big) \bar H_{t-1} + \frac{1}{t + t_0} (\delta - \alpha_t)

        \log \epsilon_t = \mu - \frac{\sqrt t}{\gamma} \bar H_t

        \log \bar\epsilon_t = t^{-\kappa} \log \epsilon_t + (1 - t^{-\kappa}) \log \bar\epsilon_{t-1}

    with :math:`\mu = \log 10\epsilon_0`. M. D. Hoffman and A. Gelman, "The No-U-Turn Sampler", JMLR 2014,
    section 3.2.1.

    Parameters
    ----------
    first
        :math:`\epsilon_0`, one per group, (groups,).
    target
        :math:`\delta`, in (0, 1).
    gamma, t0, kappa
        The paper's .05, 10, .75.

    Examples
    --------
    >>> rule = DualAveraging(torch.tensor([1.0]), target=0.8)
    >>> for _ in range(5000):  # acceptance exp(-step): the fixed point is -log(.8) = .223
    ...     rule.update(torch.exp(-rule.step_size))
    >>> round(float(rule.averaged), 2)
    0.22
    """

    first: Tensor
    target: float = 0.8
    gamma: float = 0.05
    t0: float = 10.0
    kappa: float = 0.75

    def __post_init__(self) -> None:
        probability("target", self.target)
        # all (groups,), in the logarithm of the step size
        self._mu = (10 * self.first).log()
        self._error = torch.zeros_like(self.first)
        self._log_step = self.first.log()
        self._log_averaged = torch.zeros_like(self.first)
        self._t = 0

    def update(self, accept: Tensor) -> None:
        """Take in the mean acceptance probability of each group, (groups,)."""
        self._t += 1
        # early errors weigh little (t0); the step size reacts at once, and what is kept is a slow average of it
        weight = 1 / (self._t + self.t0)
        self._error = (1 - weight) * self._error + weight * (self.target - accept)
        self._log_step = self._mu - self._t**0.5 / self.gamma * self._error
        new = self._t**-self.kappa
        self._log_averaged = new * self._log_step + (1 - new) * self._log_averaged

    @property
    def step_size(self) -> Tensor:
        """The step size to try next, (groups,)."""
        return self._log_step.exp()

    @property
    def averaged(self) -> Tensor:
        """The step size to keep when adaptation ends, (groups,)."""
        return self._log_averaged.exp() if self._t else self.first


class RunningVariance:
    r"""Welford's variance of positions, over draws and over the chains of a group.

    Batches are merged by Chan's formula, :math:`M_2 = M_2^a + M_2^b + \delta^2 n_a n_b / (n_a + n_b)`, so nothing is
    stored and nothing cancels.

    Parameters
    ----------
    pooled
        Whether all chains are one group.

    Examples
    --------
    >>> running, x = RunningVariance(pooled=True), torch.randn(50, 4, 3, dtype=torch.float64)
    >>> for row in x:
    ...     running.update(row)
    >>> torch.allclose(running.variance, x.reshape(200, 3).var(dim=0))
    True
    """

    def __init__(self, pooled: bool = True):
        self.pooled = pooled
        self.count = 0
        self._mean: Tensor | None = None
        self._m2: Tensor | None = None

    def update(self, position: Tensor) -> None:
        """Take in one draw of every chain, (chains, dim)."""
        # count, mean and sum of squared deviations of this batch, (groups, dim)
        if self.pooled:
            n, mean = len(position), position.mean(dim=0, keepdim=True)
            m2 = (position - mean).square().sum(dim=0, keepdim=True)
        else:
            n, mean, m2 = 1, position, torch.zeros_like(position)
        if self._mean is None or self._m2 is None:
            self.count, self._mean, self._m2 = n, mean.clone(), m2
            return
        total = self.count + n
        # Chan's formula: the means move by their difference, whose square joins the sums of squares
        delta = mean - self._mean
        self._mean = self._mean + delta * (n / total)
        self._m2 = self._m2 + m2 + delta.square() * (self.count * n / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Unbiased variance, (groups, dim)."""
        if self._m2 is None or self.count < 2:
            raise InvalidInput(f"a variance needs at least two draws; {self.count} were taken in.")
        return self._m2 / (self.count - 1)

    def mass(self) -> Tensor:
        """Diagonal mass, (groups, dim): one over ``(n * variance + 5 * 1e-3) / (n + 5)``, shrunk as in Stan."""
        n = self.count  # five draws of variance 1e-3 regularize few
        return (n + 5) / (n * self.variance + 5e-3)


def mass_windows(warmup: int) -> list[range]:
    """Stretches of warm-up at whose ends the mass is learned anew; they grow by doubling, as in Stan.

    The first tenth finds the bulk, the last fifth settles the step size for the final mass; less than 20 iterations
    are too few to learn a mass from.

    Examples
    --------
    >>> mass_windows(1000), mass_windows(10)
    ([range(100, 150), range(150, 250), range(250, 800)], [])
    """
    if warmup < 20:
        return []
    at, width = max(warmup // 10, 5), max(warmup // 20, 5)  # begin of the next window and its length
    end = warmup - max(warmup // 5, 5)
    windows = []
    while at + 3 * width <= end:  # space for this one and the next, twice as long
        windows.append(range(at, at + width))
        at, width = at + width, 2 * width
    return [*windows, range(at, end)]
