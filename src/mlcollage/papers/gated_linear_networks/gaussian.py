r"""The Gaussian gated linear network on arrays (Budden et al., NeurIPS 2020).

A neuron multiplies the Gaussians :math:`N(\mu_i, \sigma_i^2)` of the layer below, each to the power of a weight:

.. math::
    \frac{1}{\sigma^2} = \tau = \sum_i w_i \lambda_i, \quad
    \mu = \frac{1}{\tau} \sum_i w_i \lambda_i \mu_i, \quad \lambda_i = 1/\sigma_i^2,

and descends its own negative log-likelihood of the target :math:`x`,

.. math::
    \frac{\partial \ell}{\partial w_i} = \lambda_i \Big( -\frac{1}{2\tau} + \frac{(x-\mu)^2}{2}
        - (x-\mu)(\mu_i-\mu) \Big).

Where :math:`\tau` leaves :math:`[1/\sigma^2_{max}, 1/\sigma^2_{min}]` the weights are moved back along
:math:`\lambda`: :math:`w \leftarrow w - \lambda (\tau - \tau_{bound}) / \lVert\lambda\rVert^2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from . import _kernels
from ._settings import LearningRate, step_sizes
from .network import GatedNetwork

Array = NDArray[Any]


class GaussianNetwork(GatedNetwork):
    r"""One Gaussian gated linear network: gates, tables and state of :class:`GatedNetwork` with Gaussian neurons.

    Parameters
    ----------
    sizes : sequence of int
        Neurons in each layer; the last must be 1.
    n_inputs, side_dim : int
        Base Gaussians, and width of the side information.
    min_variance, max_variance : float, default 0.01 and 1e5
        Bounds of every neuron's variance.
    weight_clip : float, default 1000
        Box of the weights.
    step_limit : float or None, default 1
        Longest step, in units of the inverse of the neuron's information
        :math:`\sum_i \lambda_i^2 [(\mu_i - \mu)^2/\tau + 1/\tau^2 + (x - \mu)^2/\tau]`, beyond which a gradient step
        overshoots its target. None is the plain gradient of the paper, which diverges unless the learning rate is small
        against ``min_variance**2``.
    gradient : {"paper", "official"}, default "paper"
        Projected gradient descent: the stored weights are projected, then moved by the closed form. Or the official
        code's: the stored weights stay, and the projection is part of the function that is differentiated.
    **settings
        As in :class:`GatedNetwork`.
    """

    bias_means = (-1.0, 0.0, 1.0)

    def __init__(
        self,
        sizes: Sequence[int],
        n_inputs: int,
        side_dim: int,
        *,
        min_variance: float = 0.01,
        max_variance: float = 1e5,
        weight_clip: float = 1000.0,
        step_limit: float | None = 1.0,
        **settings: Any,
    ) -> None:
        if not 0 < min_variance <= max_variance:
            raise InvalidInput(f"Variances need 0 < min_variance <= max_variance; got {min_variance}, {max_variance}.")
        longest = np.inf if step_limit is None else checks.positive("step_limit", step_limit)
        super().__init__(sizes, n_inputs, side_dim, weight_clip=weight_clip, **settings)
        self.constants = self._constants(
            _kernels.Product, 1 / max_variance, 1 / min_variance, float(weight_clip), longest
        )

    def fans(self, head: int) -> Array:
        """Inputs of a neuron in each layer, with the three bias Gaussians."""
        return np.concatenate([[self.n_inputs], self.sizes[:-1]]).astype(np.int64) + len(self.bias_means)

    @property
    def base_width(self) -> int:
        """Columns of ``base``: the bias means and the base means."""
        return self.n_inputs + len(self.bias_means)

    def run(
        self,
        base: Array,
        side: Array,
        targets: Array | None = None,
        *,
        rate: LearningRate = "paper",
        initial_rate: float = 0.01,
        memory: int | None = None,
        weight: Array | None = None,
    ) -> Array:
        """Mean and precision of every neuron, ``(n, 2, neurons)``, from before each sample; targets are learned from.

        ``base`` is ``(n, 3 + d)``: the three bias means, then the means of the base Gaussians, all of variance 1.
        """
        base, side = self._check(base, side)
        out = np.empty((len(base), 2, self.neurons), self.dtype)
        learn = targets is not None
        table = self.heads[0]
        goals = rates = np.empty(0, self.dtype)
        if targets is not None:
            targets = self._finite("Targets", targets)
        for part in self.chunks(len(base)):
            if targets is not None:
                count = part.stop - part.start
                rates = step_sizes(rate, self.steps[0] + 1, count, initial=initial_rate, memory=memory)
                rates = (rates if weight is None else rates * weight[part]).astype(self.dtype)
                goals = targets[part]
                self.steps[0] += count
            rows = table.rows(self.contexts.gates(side[part], [0])(0, table.first), allocate=learn)
            samples = _kernels.plain(_kernels.Samples(base[part], goals, rates, rows))
            constants = _kernels.plain(self.constants)
            _kernels.run_gaussian(samples, table.arrays, self.sizes, constants, self.official, learn, out[part])
        return out
