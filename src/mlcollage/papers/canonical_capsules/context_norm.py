r"""Attentive context normalization: each of K branches standardizes the points that it attends to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage import _checks as checks

from ._clouds import center_of, moments, shares, without_padding

__all__ = ["AttentiveContextNorm", "attentive_context_norm"]

_EPS = 1e-3


def attentive_context_norm(x: Tensor, attention: Tensor, mask: Tensor | None = None, *, eps: float = _EPS) -> Tensor:
    r"""Normalize features of points in the context of those that share a branch.

    .. math::

        y_n = \sum_k a_{nk} \frac{x_n - \mu_k}{\sigma_k}, \qquad
        \mu_k = \sum_n \hat a_{nk} x_n, \qquad \sigma_k^2 = \sum_n \hat a_{nk} (x_n - \mu_k)^2 + \varepsilon

    where :math:`\hat a_{nk} = a_{nk} / \max(\sum_n a_{nk}, 10^{-3})`. It is computed as
    :math:`x' \odot (a\,r) - a\,(\nu \odot r)` with :math:`x' = x - c`, :math:`\nu = \mu - c`, :math:`r = 1 / \sigma`:
    four products of thin matrices, and never a tensor of B C K N numbers.

    Parameters
    ----------
    x
        Features (B, N, C).
    attention
        (B, N, K), which sums to 1 over k at each point.
    mask
        Boolean (B, N), False at padding: such points count for nothing and get 0.
    eps
        Added to the variance, 1e-3 by default.

    Returns
    -------
    Tensor
        (B, N, C), in the type of x.

    References
    ----------
    Sun, Jiang, Trulls, Tagliasacchi and Yi, "ACNe: Attentive Context Normalization for Robust Permutation-Equivariant
    Learning", CVPR 2020; used in section 3 of "Canonical Capsules", arXiv:2012.04718.

    Examples
    --------
    >>> x = torch.tensor([[[1.0], [3.0]]])
    >>> attentive_context_norm(x, torch.ones(1, 2, 1), eps=0.0).flatten().tolist()
    [-1.0, 1.0]
    """
    with torch.autocast(x.device.type, enabled=False):
        work = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        values, a = x.to(work), attention.to(work)
        values, a = without_padding(values, mask), without_padding(a, mask)
        center = center_of(values, mask)
        nu, variance = moments(shares(a), values, center)
        r = (variance.clamp_min(0) + eps).rsqrt()  # (B, K, C)
        return ((values - center) * (a @ r) - a @ (nu * r)).to(x.dtype)


class AttentiveContextNorm(nn.Module):
    """:func:`attentive_context_norm` with an attention of its own: a linear map and a softmax over branches.

    Parameters
    ----------
    channels
        C.
    branches
        K.

    Examples
    --------
    >>> AttentiveContextNorm(8, 4)(torch.randn(2, 10, 8)).shape
    torch.Size([2, 10, 8])
    """

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__()
        self.att = nn.Linear(
            checks.integer("channels", channels, least=1), checks.integer("branches", branches, least=1)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize (B, N, C)."""
        return attentive_context_norm(x, self.att(x).softmax(-1), mask)


class PointBatchNorm(nn.BatchNorm1d):
    """Batch norm over the real points of all clouds: (B, N, C), with a mask (B, N)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize; padding gets 0 and enters no statistic."""
        if mask is None:
            return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        rows = super().forward(x[mask])
        return torch.zeros(x.shape, dtype=rows.dtype, device=x.device).index_put((mask,), rows)


class ContextLayer(nn.Module):
    """Linear, attentive context norm, batch norm, ReLU: from (B, N, width) to (B, N, C)."""

    def __init__(self, width: int, channels: int, branches: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, channels)
        self.norm = AttentiveContextNorm(channels, branches)
        self.bn = PointBatchNorm(channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform the features of each point."""
        return F.relu(self.bn(self.norm(self.lin(x), mask), mask))
