r"""The mass of the momenta, M: the identity, a diagonal, or dense.

.. math:: p \sim N(0, M), \qquad \dot q = M^{-1} p, \qquad K(p) = \tfrac{1}{2} p^\top M^{-1} p

Sampling is easiest where :math:`M^{-1}` is the covariance of the positions: then all directions have unit scale. As
everywhere, the leading dimension is that of groups: 1 for all chains together, or one per chain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.infer.density import normal


class Metric:
    """M, with what a trajectory needs of it.

    Parameters
    ----------
    inverse
        :math:`M^{-1}`, (groups, dim) for a diagonal or (groups, dim, dim); None for the identity.

    Attributes
    ----------
    inverse, root : Tensor or None
        :math:`M^{-1}`, and R with :math:`R R^T = M`.

    Examples
    --------
    >>> metric = Metric(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]))
    >>> metric.velocity(torch.tensor([[1.0, 0.0]]))
    tensor([[2., 1.]])
    """

    def __init__(self, inverse: Tensor | None):
        self.inverse, self.root = inverse, None
        self.dense = inverse is not None and inverse.ndim == 3
        if inverse is not None and not self.dense:
            self.root = inverse.rsqrt()
        elif inverse is not None:
            # with the covariance L L^T, M = L^-T L^-1; in float64, where the scales of parameters may differ widely
            lower = torch.linalg.cholesky(inverse.double())
            eye = torch.eye(inverse.shape[1], dtype=lower.dtype, device=lower.device)
            self.root = torch.linalg.solve_triangular(lower.mT, eye, upper=True).to(inverse.dtype)

    @classmethod
    def of(cls, mass: Tensor | Metric | None, position: Tensor) -> Metric:
        """What a user gave as mass M, for chains at ``position`` (chains, dim).

        Raises
        ------
        InvalidInput
            If it has another shape, or is not positive (definite) and finite.
        """
        if mass is None or isinstance(mass, Metric):
            return cls(None) if mass is None else mass
        chains, dim = position.shape
        mass = torch.as_tensor(mass, dtype=position.dtype, device=position.device)
        diagonal = mass.shape in ((dim,), (1, dim), (chains, dim))
        dense = mass.shape in ((dim, dim), (1, dim, dim), (chains, dim, dim))
        if diagonal and dense and dim > 1:
            raise InvalidInput(
                f"mass of shape {tuple(mass.shape)} for {chains} chains may be a diagonal for each or one matrix; give "
                f"the matrix as (1, {dim}, {dim}), or the diagonals as matrices."
            )
        if not diagonal and not dense:
            raise InvalidInput(
                f"mass has shape {tuple(mass.shape)}; the diagonal, shape ({dim},), or ({dim}, {dim}) is needed."
            )
        if not bool(mass.isfinite().all()) or (diagonal and not bool((mass > 0).all())):
            raise InvalidInput("mass must be positive and finite in every dimension.")
        if diagonal:
            return cls(1 / mass.reshape(-1, dim))
        mass = mass.reshape(-1, dim, dim).double()
        lower, failed = torch.linalg.cholesky_ex(mass)
        if bool(failed.any()) or not torch.allclose(mass, mass.mT):
            raise InvalidInput("mass must be a symmetric positive definite matrix.")
        return cls(torch.cholesky_inverse(lower).to(position.dtype))

    @property
    def mass(self) -> Tensor | None:
        """M itself, (groups, dim) or (groups, dim, dim); None for the identity."""
        if self.inverse is None or self.root is None:
            return None
        return self.root @ self.root.mT if self.dense else 1 / self.inverse

    def draw(self, position: Tensor, generator: torch.Generator) -> Tensor:
        """Momenta from N(0, M), in the shape of ``position``."""
        return self._times(self.root, normal(position.shape, position, generator))

    def velocity(self, momentum: Tensor) -> Tensor:
        """:math:`M^{-1} p`, (chains, dim)."""
        return self._times(self.inverse, momentum)

    def kinetic(self, momentum: Tensor) -> Tensor:
        """Kinetic energy of each chain in float64, (chains,)."""
        return 0.5 * (momentum.double() * self.velocity(momentum)).sum(dim=1)

    def _times(self, matrix: Tensor | None, x: Tensor) -> Tensor:
        if matrix is None:
            return x
        if not self.dense:
            return x * matrix
        return x @ matrix[0].mT if len(matrix) == 1 else (matrix @ x[:, :, None])[:, :, 0]
