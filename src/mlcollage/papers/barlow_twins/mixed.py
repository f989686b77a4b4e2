r"""Mixed Barlow Twins: embeddings of mixed inputs are drawn to the mixture of the embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .loss import standardize

__all__ = ["mixed_barlow_term"]


def mixed_barlow_term(
    z_m: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    index: Tensor,
    alpha: float,
    *,
    lambd: float = 0.0051,
    eps: float = 1e-5,
    correction: int = 0,
) -> Tensor:
    r"""Regularizer of Mixed Barlow Twins, to be weighted (the authors use 4 or 5) and added to the loss.

    With :math:`x^M = \alpha x^A + (1 - \alpha) x^B_\pi` for an order :math:`\pi`, and standardized embeddings,

    .. math::

        R = \hat z^M - \alpha \hat z^A - (1 - \alpha) \hat z^B_\pi, \qquad
        \lambda \left( \|\tfrac1N R^\top \hat z^A\|_F^2 + \|\tfrac1N R^\top \hat z^B\|_F^2 \right).

    It is the squared distance of the mixture's two cross-correlation matrices to those which a linear network would
    have. Computed through Gram matrices (N, N) where N is below D.

    Parameters
    ----------
    z_m, z_a, z_b
        Embeddings (N, D) of the mixture and of the two views.
    index
        The order :math:`\pi`, (N,).
    alpha
        :math:`\alpha` in [0, 1].
    lambd, eps, correction
        As for :func:`~mlcollage.papers.barlow_twins.loss.barlow_twins_loss`.

    References
    ----------
    Bandara, De Melo and Patel, "Guarding Barlow Twins against overfitting with mixed samples", 2023, arXiv:2312.02151.

    Examples
    --------
    >>> z = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    >>> float(mixed_barlow_term(z, z, z, torch.arange(32), 0.5)) < 1e-12
    True
    """
    alpha = checks.real("alpha", alpha, least=0, most=1)
    if not z_m.shape == z_a.shape == z_b.shape or z_m.ndim != 2:
        shapes = ", ".join(str(tuple(z.shape)) for z in (z_m, z_a, z_b))
        raise InvalidInput(f"expected three (N, D) tensors of one shape, got {shapes}.")
    if index.shape != (len(z_m),):
        raise InvalidInput(f"index has shape {tuple(index.shape)}; the order of the {len(z_m)} rows is needed.")
    with torch.autocast(z_m.device.type, enabled=False):
        whole = [z.float() if z.dtype in (torch.float16, torch.bfloat16) else z for z in (z_m, z_a, z_b)]
        m, a, b = (standardize(z, "batch", eps, correction) for z in whole)
        rest = m - alpha * a - (1 - alpha) * b[index]  # (N, D)
        return lambd * (_squared_product(rest, a) + _squared_product(rest, b))


def _squared_product(x: Tensor, y: Tensor) -> Tensor:
    """Squared Frobenius norm of x^T y / N."""
    n, d = x.shape
    if n < d:
        return ((x @ x.T) * (y @ y.T)).sum() / n**2
    return (x.T @ y / n).square().sum()
