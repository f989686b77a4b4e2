r"""Stochastic-gradient Langevin dynamics: an optimizer whose steps are draws.

With N data, the mean loss :math:`\hat\ell(w)` of a minibatch, prior precision :math:`\lambda` and temperature T, the
potential and its estimate are

.. math::
    U(w) = -\sum_{i=1}^N \log p(y_i \mid x_i, w) + \frac{\lambda}{2} \|w\|^2, \qquad
    \nabla \hat U(w) = N \nabla \hat\ell(w) + \lambda w

and a step is

.. math:: w \leftarrow w - h \nabla \hat U(w) + \sqrt{2 h T} \, \xi, \qquad \xi \sim N(0, I).

With a diagonal preconditioner M it is :math:`w \leftarrow w - h M^{-1} \nabla \hat U(w) + \sqrt{2 h T} M^{-1/2} \xi`,
where RMSprop's is

.. math:: v \leftarrow \alpha v + (1 - \alpha) \, \nabla \hat U(w)^2, \qquad M = \epsilon + \sqrt v .

For :math:`h \to 0` its draws follow :math:`\exp(-U/T)`. M. Welling and Y. W. Teh, "Bayesian Learning via Stochastic
Gradient Langevin Dynamics", ICML 2011, equation 4, whose :math:`\epsilon` is :math:`2h`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from mlcollage.infer._langevin import Langevin
from mlcollage.infer.density import Generator


class SGLD(Langevin):
    r"""Langevin dynamics on minibatches, as a :class:`torch.optim.Optimizer`.

    **The loss is the mean negative log-likelihood of a minibatch**, without the prior. ``num_data`` makes a sum over
    the data of it, so neither the minibatch's size nor the number of devices that averaged their gradients changes
    the temperature. For a summed loss of the whole data set, or any potential of your own, give ``num_data=1``.

    **The prior is** :math:`N(0, 1/\lambda)` on every parameter of a group with ``weight_decay`` :math:`\lambda`, which
    is added once and is not multiplied by ``num_data``: the same mode in :class:`torch.optim.SGD` on the mean loss
    has ``weight_decay`` :math:`\lambda / N`.

    For a quadratic potential of curvature k the stationary variance is exactly

    .. math:: \frac{T}{k} \, \frac{1}{1 - h k / 2},

    so keep h well below 2 over the largest curvature. A minibatch gradient whose estimate of the sum has
    variance V works like a temperature :math:`T + h V / 2`; it vanishes with h.

    Parameters
    ----------
    params
        Parameters, or groups of them, each with settings of its own. float32 or float64, on one device.
    lr
        Step size h > 0 of the summed loss: of the order of one over ``num_data``. A schedule of torch may change it.
    num_data
        N, number of training examples.
    weight_decay
        :math:`\lambda \ge 0`, precision of the Gaussian prior; 0 is a flat one.
    temperature
        :math:`T \ge 0`; 1 samples the posterior, 0 is gradient descent and draws no noise.
    rmsprop
        Decay :math:`\alpha` in [0, 1] of the running mean v of squared gradients that preconditions each parameter, .99
        in Izmailov et al. (2021); None for no preconditioning. v starts from zero, as in their code, so the first steps
        are long, and very long where a first gradient is near zero, unless ``eps`` guards. The drift
        that comes from M's own change is left out, as there: draws are exact only while M stands still, so let v settle
        and then set ``group["rmsprop"] = 1.0``, which keeps it.
    eps
        :math:`\epsilon > 0`, smallest value of M.
    generator
        A torch.Generator on the parameters' device, or a seed. The global generator is not touched.

    Raises
    ------
    InvalidInput
        For settings out of range, half-precision parameters, parameters on several devices, sparse gradients.

    Notes
    -----
    Frozen parameters, and those without a gradient, stay as they are. Dropout, batch statistics and augmentation make
    the likelihood another one than written here.

    Examples
    --------
    The mean of four observations of unit variance, under a flat prior, has the posterior N(2, 1/4):

    >>> import torch
    >>> y = torch.tensor([1.0, 2.0, 2.0, 3.0])
    >>> mean = torch.zeros(1000, requires_grad=True)  # a thousand chains
    >>> sampler = SGLD([mean], lr=0.02, num_data=4)
    >>> for _ in range(200):
    ...     sampler.zero_grad()
    ...     (0.5 * (y[:, None] - mean) ** 2).mean(0).sum().backward()
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
            weight_decay=weight_decay,
            temperature=temperature,
            rmsprop=rmsprop,
            eps=eps,
        )

    def _move(self, p: Tensor, force: Tensor, mass: Tensor | None, group: dict[str, Any]) -> None:
        # the optimizer's base adds the prior to the gradient; here the step, in place, and its noise
        variance = 2 * group["lr"] * group["temperature"]
        if mass is None:
            p.add_(force, alpha=-group["lr"])
            self._add_noise(p, variance)
        else:
            p.addcdiv_(force, mass, value=-group["lr"])
            self._add_noise(p, variance, mass.rsqrt())
