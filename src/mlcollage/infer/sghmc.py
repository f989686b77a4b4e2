r"""Stochastic-gradient Hamiltonian Monte Carlo, and cyclical step sizes for it and for SGLD.

With the potential U of :mod:`mlcollage.infer.sgld`, momentum decay :math:`\beta` (friction :math:`1 - \beta`) and
step size h, a step is

.. math::
    m \leftarrow \beta m - \sqrt h \, \nabla \hat U(w) + \sqrt{2 (1 - \beta) T} \, \xi, \qquad
    w \leftarrow w + \sqrt h \, m

and with a diagonal preconditioner M (RMSprop's, as in :mod:`mlcollage.infer.sgld`)

.. math::
    m \leftarrow \beta m - \sqrt h \, \nabla \hat U(w) + \sqrt{2 (1 - \beta) T} \, M^{1/2} \xi, \qquad
    w \leftarrow w + \sqrt h \, M^{-1} m

which for :math:`\beta = 0` is SGLD, and for T = 0 is gradient descent with heavy-ball momentum. T. Chen, E. Fox and
C. Guestrin, "Stochastic Gradient Hamiltonian Monte Carlo", ICML 2014, equation 15 with :math:`\eta = h`,
:math:`\alpha = 1 - \beta`, :math:`v = \sqrt h m`; the momentum's scale is that of P. Izmailov et al., "What Are
Bayesian Neural Network Posteriors Really Like?", ICML 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlcollage._checks import integer, real
from mlcollage.errors import InvalidInput
from mlcollage.infer._langevin import Langevin
from mlcollage.infer.density import Generator


class SGHMC(Langevin):
    r"""Langevin dynamics with momentum on minibatches, as a :class:`torch.optim.Optimizer`.

    Loss, prior and ``num_data`` are as in :class:`~mlcollage.infer.sgld.SGLD`: the loss is the **mean** negative
    log-likelihood of a minibatch, and ``weight_decay`` the precision of the Gaussian prior, added once.

    For a quadratic potential of curvature k the stationary variance is exactly

    .. math:: \frac{T}{k} \, \frac{1}{1 - h k / (2 (1 + \beta))},

    and a gradient noise of variance V works like a temperature :math:`T + h V / (2 (1 - \beta))`. One step moves
    about as far as a step of SGLD with :math:`h / (1 - \beta)`.

    Parameters
    ----------
    params
        Parameters, or groups of them, each with settings of its own. float32 or float64, on one device.
    lr
        Step size h > 0 of the summed loss.
    num_data
        N, number of training examples.
    momentum
        :math:`\beta` in [0, 1): what is left of the momentum after a step.
    weight_decay
        :math:`\lambda \ge 0`, precision of the Gaussian prior; 0 is a flat one.
    temperature
        :math:`T \ge 0`; at 0 steps equal those of :class:`torch.optim.SGD` on the summed loss.
    rmsprop, eps
        Decay and smallest value of RMSprop's preconditioner, as in :class:`~mlcollage.infer.sgld.SGLD`; None for none.
        ``rmsprop=0.99, momentum=0.95`` with :class:`Cyclical` is the SGHMC-CLR-Prec of Izmailov et al. In a quadratic
        potential h counts as h / M in the variance above.
    generator
        A torch.Generator on the parameters' device, or a seed.

    Raises
    ------
    InvalidInput
        As SGLD, and for a momentum outside [0, 1).

    Examples
    --------
    >>> mean = torch.zeros(1000, requires_grad=True)  # a thousand chains in the potential 2 (w - 2)^2
    >>> sampler = SGHMC([mean], lr=0.01, num_data=1, momentum=0.9)
    >>> for _ in range(200):
    ...     loss = sampler.zero_grad() or (2 * (mean - 2) ** 2).sum()
    ...     loss.backward()
    ...     sampler.step()
    >>> draws = mean.detach()
    >>> round(float(draws.mean()), 1), round(float(draws.std()), 1)
    (2.0, 0.5)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        num_data: int | float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        temperature: float = 1.0,
        rmsprop: float | None = None,
        eps: float = 1e-7,
        generator: Generator = 0,
    ):
        super().__init__(
            params,
            generator,
            lr=lr,
            num_data=num_data,
            momentum=momentum,
            weight_decay=weight_decay,
            temperature=temperature,
            rmsprop=rmsprop,
            eps=eps,
        )

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        real("momentum", group["momentum"], least=0, below=1)  # 1 would have no friction

    def _move(self, p: Tensor, force: Tensor, mass: Tensor | None, group: dict[str, Any]) -> None:
        state, beta, root = self.state[p], group["momentum"], math.sqrt(group["lr"])
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        m = state["momentum_buffer"]  # the momentum, in the parameter's shape and updated in place
        m.mul_(beta).add_(force, alpha=-root)
        variance = 2 * (1 - beta) * group["temperature"]  # what friction takes, noise gives back
        if mass is None:
            self._add_noise(m, variance)
            p.add_(m, alpha=root)
        else:
            self._add_noise(m, variance, mass.sqrt())
            p.addcdiv_(m, mass, value=root)


class Cyclical(LRScheduler):
    r"""Cyclical step sizes: large steps find a mode, small ones sample it; again and again.

    In step k of a cycle of length n, counting from 0,

    .. math:: h = \frac{h_0}{2} \big( 1 + \cos(\pi k / n) \big)

    and the temperature is 0 while :math:`k / n` is less than ``exploration``, the optimizer's own afterwards. R. Zhang,
    C. Li, J. Zhang, C. Chen and A. G. Wilson, "Cyclical Stochastic Gradient MCMC for Bayesian Deep Learning", ICLR
    2020, equation 1 and algorithm 1. With :class:`~mlcollage.infer.sgld.SGLD` it is cSGLD, with :class:`SGHMC` cSGHMC.

    Parameters
    ----------
    optimizer
        SGLD or SGHMC. Its ``lr`` is :math:`h_0`.
    cycle_length
        n, steps of a cycle; call ``step()`` after each of the optimizer's.
    exploration
        Share of a cycle without noise, in [0, 1).
    last_epoch
        As in torch. To resume, build optimizer and schedule anew, then load the state dicts of both.

    Raises
    ------
    InvalidInput
        For another optimizer or settings out of range.

    Examples
    --------
    >>> from mlcollage.infer.sgld import SGLD
    >>> w = torch.zeros(2, requires_grad=True)
    >>> sampler = SGLD([w], lr=1.0, num_data=1)
    >>> cycle = Cyclical(sampler, cycle_length=4, exploration=0.5)
    >>> for _ in range(5):
    ...     group = sampler.param_groups[0]
    ...     print(cycle.cycle, round(group["lr"], 3), group["temperature"], cycle.sampling, cycle.last_of_cycle)
    ...     sampler.step()
    ...     cycle.step()
    0 1.0 0.0 False False
    0 0.854 0.0 False False
    0 0.5 1.0 True False
    0 0.146 1.0 True True
    1 1.0 0.0 False False
    """

    def __init__(self, optimizer: Optimizer, cycle_length: int, *, exploration: float = 0.0, last_epoch: int = -1):
        if not isinstance(optimizer, Langevin):
            raise InvalidInput(
                f"optimizer is {type(optimizer).__name__}; SGLD or SGHMC is needed: it has a temperature."
            )
        self.cycle_length = integer("cycle_length", cycle_length, least=1)
        self.exploration = real("exploration", exploration, least=0, below=1)
        # a schedule built anew after loading finds the temperatures of the first one, not a zero of exploration
        for group in optimizer.param_groups:
            group.setdefault("initial_temperature", group["temperature"])
        self.base_temperatures = [group["initial_temperature"] for group in optimizer.param_groups]
        super().__init__(optimizer, last_epoch)

    @property
    def cycle(self) -> int:
        """Number of the cycle that the coming step belongs to, from 0."""
        return self.last_epoch // self.cycle_length

    @property
    def sampling(self) -> bool:
        """Whether the coming step has noise, so that its result may be kept as a draw."""
        return self.last_epoch % self.cycle_length >= self.exploration * self.cycle_length

    @property
    def last_of_cycle(self) -> bool:
        """Whether the coming step is the last of its cycle: with one draw per cycle, keep what it leads to."""
        return self.last_epoch % self.cycle_length == self.cycle_length - 1

    def get_lr(self) -> list[Any]:
        """Step sizes of the groups for the coming step; sets their temperatures too."""
        for group, temperature in zip(self.optimizer.param_groups, self.base_temperatures, strict=True):
            group["temperature"] = temperature if self.sampling else 0.0
        # torch calls the number of the coming step last_epoch
        share = self.last_epoch % self.cycle_length / self.cycle_length
        return [h / 2 * (1 + math.cos(math.pi * share)) for h in self.base_lrs]
