r"""Attentive context normalization: each of K branches standardizes the points that it attends to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from mlcollage import _checks as checks

from ._clouds import LEAST_MASS, center_of, moments, shares, without_padding

__all__ = ["AttentiveContextNorm", "attentive_context_norm"]

_EPS = 1e-3
_BLOCK = 1 << 18  # numbers of features that are normalized at once: temporaries then stay in a core's cache


def attentive_context_norm(x: Tensor, attention: Tensor, mask: Tensor | None = None, *, eps: float = _EPS) -> Tensor:
    r"""Normalize features of points in the context of those that share a branch.

    .. math::

        y_n = \sum_k a_{nk} \frac{x_n - \mu_k}{\sigma_k}, \qquad
        \mu_k = \sum_n \hat a_{nk} x_n, \qquad \sigma_k^2 = \sum_n \hat a_{nk} (x_n - \mu_k)^2 + \varepsilon

    where :math:`\hat a_{nk} = a_{nk} / \max(\sum_n a_{nk}, 10^{-3})`. It is computed as
    :math:`x' \odot (a\,r) - a\,(\nu \odot r)` with :math:`x' = x - c`, :math:`\nu = \mu - c`, :math:`r = 1 / \sigma`:
    four products of thin matrices, and never a tensor of B C K N numbers. For the gradient x, attention and numbers of
    the branches are kept, and the rest is computed again.

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
        with torch.no_grad():  # the result does not depend on the center, but for rounding
            center = center_of(values, mask)
        if _may_be_short(values, a):
            return _Norm.apply(values, a, center, eps).to(x.dtype)
        return _plain(values, a, center, eps).to(x.dtype)


def _plain(x: Tensor, a: Tensor, center: Tensor, eps: float) -> Tensor:
    """The norm in operations that autograd and compilers know."""
    nu, variance = moments(shares(a), x, center)
    r = (variance.clamp_min(0) + eps).rsqrt()  # (B, K, C)
    return (x - center) * (a @ r) - a @ (nu * r)


def _may_be_short(x: Tensor, a: Tensor) -> bool:
    """Whether :class:`_Norm` serves: on the CPU, where looking at values costs no wait, for weights that sum to 1.

    Not for forward mode, ``torch.func`` and compilers, which take operations apart by themselves.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if any(forward_ad.unpack_dual(t).tangent is not None for t in (x, a)):
        return False
    return bool(x.numel()) and bool(a.detach().sum(1).min() >= LEAST_MASS)


class _Norm(torch.autograd.Function):
    """The norm and its gradient where all weights sum to 1, in blocks of clouds.

    What is kept for the gradient is x, the attention and numbers of the branches; the rest is computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, center: Tensor, eps: float) -> Tensor:
        parts = zip(_split(x, x), _split(x, a), _split(x, center), strict=True)
        blocks = [_normalized(*part, eps=eps) for part in parts]
        y, *kept = blocks[0] if len(blocks) == 1 else (torch.cat(t) for t in zip(*blocks, strict=True))
        ctx.eps = eps
        ctx.save_for_backward(x, a, center, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, a, center, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative may follow
            wanted = [t for t, need in zip((x, a), ctx.needs_input_grad[:2], strict=True) if need]
            found = iter(torch.autograd.grad(_plain(x, a, center, ctx.eps), wanted, g, create_graph=True))
            dx, da = (next(found) if need else None for need in ctx.needs_input_grad[:2])
            return dx, da, None, None
        parts = zip(*(_split(x, t) for t in (x, a, center, g, *kept)), strict=True)
        blocks = [_gradients(*part, eps=ctx.eps) for part in parts]
        dx, da = blocks[0] if len(blocks) == 1 else (torch.cat(t) for t in zip(*blocks, strict=True))
        return dx, da, None, None


def _split(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Blocks of clouds of ``t`` that hold about ``_BLOCK`` features of ``x``."""
    clouds = max(1, _BLOCK // (x.shape[1] * x.shape[2]))
    return (t,) if clouds >= len(x) else t.split(clouds)


def _normalized(x: Tensor, a: Tensor, center: Tensor, *, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The result, and of the branches 1 / mass (B, 1, K), m (B, K, C) and the variance (B, K, C).

    As in :func:`moments`, with s = 1: nu is m, and the variance is q' minus the square of m.
    """
    shifted, inverse = x - center, a.sum(1, keepdim=True).reciprocal_()
    weights = (a * inverse).mT  # (B, K, N)
    m = torch.bmm(weights, shifted)
    variance = torch.bmm(weights, shifted.square()).addcmul_(m, m, value=-1)
    r = variance.clamp_min(0).add_(eps).rsqrt_()
    y = torch.bmm(a, r).mul_(shifted).baddbmm_(a, m * r, alpha=-1)
    return y, inverse, m, variance


def _gradients(
    x: Tensor, a: Tensor, center: Tensor, g: Tensor, inverse: Tensor, m: Tensor, variance: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    r"""Gradients by x and a of the loss whose gradient by y is g.

    With :math:`p = m r`, those by r and p are :math:`a^\top (g \odot x')` and :math:`-a^\top g`; from these follow
    those by :math:`q'` and m, and all meet again in a and x.
    """
    shifted, turned = x - center, a.mT
    r = variance.clamp_min(0).add_(eps).rsqrt_()
    scaled, p = g * shifted, m * r
    u = torch.bmm(turned, g)
    d_q = torch.bmm(turned, scaled).addcmul_(u, m, value=-1).mul_(r.pow(3)).mul_(-0.5)  # also that of the variance
    d_q.masked_fill_(variance < 0, 0.0)
    d_m = (u * r).neg_().addcmul_(d_q, m, value=-2)
    d_mass = (d_m * m).addcmul_(d_q, torch.addcmul(variance, m, m)).sum(-1) * inverse[:, 0]  # minus it, (B, K)
    d_m.mul_(inverse.mT), d_q.mul_(inverse.mT)
    dx = torch.bmm(a, d_q).mul_(shifted).mul_(2).baddbmm_(a, d_m).addcmul_(g, torch.bmm(a, r))
    # One product of (N, 4 C) and (4 C, K) in place of four.
    of_points = torch.cat([scaled, g, shifted, shifted.square()], 2)
    of_branches = torch.cat([r, p.neg_(), d_m, d_q], 2)
    return dx, torch.bmm(of_points, of_branches.mT).sub_(d_mass[:, None])


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
