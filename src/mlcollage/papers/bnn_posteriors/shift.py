r"""The dead-input alarm: where a Bayesian model average will fail under covariate shift, and what to do about it.

Where training inputs never vary along a direction v, :math:`v^\top x_i = c` for all i, the likelihood does not depend
on the first layer's weights along v (but for what the bias takes up): there the posterior is the prior. Harmless as
long as test inputs do not vary along v either; if they do, each posterior draw answers with weights that no datum ever
saw, and the average drowns in the prior's noise, where a network trained with weight decay has weights of zero.
P. Izmailov, P. Nicholson, S. Lotfi and A. G. Wilson, "Dangers of Bayesian Model Averaging under Covariate Shift",
NeurIPS 2021, section 4.

:func:`dead_inputs` finds these directions before any sampling, :meth:`DeadInputs.report` says which test inputs reach
into them, and :class:`~mlcollage.papers.bnn_posteriors.empcov.EmpCovPrior` is the prior that mends it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlcollage._checks import positive, real
from mlcollage.errors import InvalidInput

from .first_layer import layer_batches, network_of


def dead_inputs(module: Any, X: Tensor | NDArray, *, tol: float = 1e-6, batch_size: int = 1024) -> DeadInputs:
    r"""Find the directions along which the inputs of a network's first layer never vary in training.

    Eigenvectors of the covariance of these inputs (for a convolution, of the patches it sees) whose eigenvalue is at
    most ``tol`` times the mean one.

    Parameters
    ----------
    module
        A network, or a :class:`~mlcollage.papers.bnn_posteriors.BayesianNetwork`. Its first linear map or convolution
        is looked at.
    X
        Training inputs, (n, ...), as the network takes them.
    tol
        Relative variance up to which a direction counts as dead, in [0, 1).
    batch_size
        Inputs per pass.

    Returns
    -------
    DeadInputs

    Raises
    ------
    InvalidInput
        If there is no such layer, or inputs are too few or not finite.

    Examples
    --------
    The third input is always 0, and the second always equals the first:

    >>> x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    >>> x = torch.cat([x, x, torch.zeros(50, 1)], dim=1)
    >>> dead = dead_inputs(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), x)
    >>> dead.parameter, dead.count
    ('0.weight', 2)
    >>> report = dead.report(torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [1.0, 1.0, 3.0]]), warn=False)
    >>> report.share.round(2).tolist(), report.alarmed.tolist()
    ([0.0, 1.0, 0.83], [False, True, True])
    """
    real("tol", tol, least=0, below=1)
    network = network_of(module)
    n, total, second, origin, parameter = 0, torch.zeros(()), torch.zeros(()), torch.zeros(()), ""
    for weight, seen, _ in layer_batches(network, X, batch_size):  # seen (rows, D)
        parameter = weight
        origin = origin if n else seen[0]  # near the data, so that squares lose no digits
        shifted = seen - origin
        n, total, second = n + len(shifted), total + shifted.sum(dim=0), second + shifted.T @ shifted
    if n < 2:
        raise InvalidInput(f"the first layer saw {n} inputs or patches; at least two are needed to see what varies.")
    mean = total / n  # (D,)
    # axes (D, D), a direction per column
    variances, axes = torch.linalg.eigh(second / n - torch.outer(mean, mean))
    variances = variances.clamp(min=0)  # (D,), ascending; rounding may leave some below zero
    dead = variances <= tol * variances.mean()
    if bool(dead.all()):
        raise InvalidInput("the inputs of the first layer are all the same; there is nothing to learn from them.")
    directions, spread = axes[:, dead].T.contiguous(), float(variances.sum().sqrt())
    return DeadInputs(parameter, directions, variances, mean + origin, spread, network, batch_size)


@dataclass(frozen=True)
class DeadInputs:
    """Directions of the first layer's inputs without variance in training.

    Attributes
    ----------
    parameter : str
        The first layer's weight.
    directions : Tensor
        (k, D), orthonormal rows; float64.
    variances : Tensor
        (D,), of all directions, ascending.
    mean : Tensor
        (D,), of the layer's inputs in training.
    spread : float
        Root mean square distance of the layer's training inputs from their mean.
    """

    parameter: str
    directions: Tensor
    variances: Tensor
    mean: Tensor
    spread: float
    _network: nn.Module
    _batch_size: int

    @property
    def count(self) -> int:
        """k, number of dead directions."""
        return len(self.directions)

    @property
    def constants(self) -> NDArray[np.int64]:
        """Places, among the D inputs of the layer, of those that are constant on their own."""
        reach = self.directions.square().sum(dim=0)  # 1 where a unit vector lies among the dead directions
        return np.flatnonzero((reach > 1 - 1e-6).cpu().numpy())

    def report(self, X: Tensor | NDArray, *, threshold: float = 0.3, warn: bool = True) -> ShiftReport:
        """How far test inputs reach into the dead directions.

        Parameters
        ----------
        X
            Test inputs, (n, ...), as the network takes them.
        threshold
            Level from which an input counts as alarmed. At level 1 the dead directions move the first layer's units,
            a priori, as much as all that varied in training.
        warn
            Whether to warn when any input is alarmed.

        Returns
        -------
        ShiftReport
        """
        positive("threshold", threshold)
        levels, shares = [], []
        for _, seen, size in layer_batches(self._network, X, self._batch_size):
            offset = seen - self.mean  # (rows, D); the rows of an input, such as patches, are averaged
            into = (offset @ self.directions.T).square().sum(dim=1).reshape(size, -1).mean(dim=1)  # (size,)
            whole = offset.square().sum(dim=1).reshape(size, -1).mean(dim=1)
            # lengths, relative to the spread of all that varied in training
            levels.append((into.sqrt() / self.spread).cpu())
            shares.append((into / whole.clamp(min=1e-300)).cpu())
        report = ShiftReport(torch.cat(levels).numpy(), torch.cat(shares).numpy(), float(threshold), self)
        if warn and report.alarmed.any():
            warnings.warn(str(report), stacklevel=2)
        return report

    def __str__(self) -> str:
        if not self.count:
            return f"Every direction of the inputs of {self.parameter} varies in training."
        constant = f", {len(self.constants)} of the inputs themselves are constant" if len(self.constants) else ""
        return (
            f"{self.count} of {len(self.mean)} directions of the inputs of {self.parameter} never vary in training"
            f"{constant}: the posterior of the weights along them is the prior."
        )


@dataclass(frozen=True)
class ShiftReport:
    """How far each test input reaches into directions that never varied in training.

    Attributes
    ----------
    level : ndarray
        (N,), length of the part in dead directions, over the spread of the training inputs; for a convolution the root
        mean square over patches.
    share : ndarray
        (N,), share of the squared distance from the training mean that lies in dead directions, in [0, 1].
    threshold : float
        Level from which an input is alarmed.
    dead : DeadInputs
        The directions.
    """

    level: NDArray[np.float64]
    share: NDArray[np.float64]
    threshold: float
    dead: DeadInputs

    @property
    def alarmed(self) -> NDArray[np.bool_]:
        """(N,), where the model average is not to be trusted."""
        return self.level >= self.threshold

    def to_frame(self) -> pd.DataFrame:
        """One row per input: ``level``, ``share``, ``alarmed``."""
        return pd.DataFrame({"level": self.level, "share": self.share, "alarmed": self.alarmed})

    def __str__(self) -> str:
        if not self.alarmed.any():
            most = float(self.level.max())
            return f"No input reaches into directions that never varied in training (largest level {most:.2g})."
        count = int(self.alarmed.sum())
        return (
            f"{count} of {len(self.level)} inputs reach into the {self.dead.count} directions of the inputs of "
            f"{self.dead.parameter} that never varied in training (level up to {self.level.max():.2g}): there weights "
            "follow the prior, and a Bayesian model average will fail; sample again with an EmpCovPrior, or drop these "
            "inputs."
        )
