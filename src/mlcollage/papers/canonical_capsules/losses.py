r"""The paper's losses, each without its weight, and their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure import RigidTransform

from ._clouds import center_of, moments, shares, without_padding

__all__ = [
    "LossWeights",
    "canonical_loss",
    "equilibrium_loss",
    "equivariance_loss",
    "invariance_loss",
    "localization_loss",
]


@dataclass(frozen=True)
class LossWeights:
    """What each term counts; those of the paper by default. A term with weight 0 is not computed at all.

    Parameters
    ----------
    equivariance, invariance, canonical, localization, reconstruction
        5, 1, 1, 1 and 1.
    equilibrium
        1048.576: of the variance of *shares* of the points. At the paper's 1,024 points that equals 0.001 times the
        variance of numbers of points, which is how the paper has it; unlike that, it does not change with the number of
        points.

    Examples
    --------
    >>> LossWeights(reconstruction=0.0).equivariance
    5.0
    """

    equivariance: float = 5.0
    invariance: float = 1.0
    canonical: float = 1.0
    equilibrium: float = 1e-3 * 1024**2
    localization: float = 1.0
    reconstruction: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            checks.real(f"weight {name}", getattr(self, name), least=0)


def equivariance_loss(theta_a: Tensor, theta_b: Tensor, a: RigidTransform, b: RigidTransform) -> Tensor:
    r"""Poses turn with the cloud: squared distance of the second view's poses from the first's, moved.

    .. math::

        L = \frac1K \sum_k \bigl\| \theta^b_k - T^b (T^a)^{-1} \theta^a_k \bigr\|^2

    Parameters
    ----------
    theta_a, theta_b
        (B, K, D), of the cloud moved by a and by b.
    a, b
        The two motions of each cloud.

    Returns
    -------
    Tensor
        One number, the mean over clouds and capsules.
    """
    return (theta_b - b.after(a.inverse()).apply(theta_a)).square().sum(-1).mean()


def invariance_loss(beta_a: Tensor, beta_b: Tensor) -> Tensor:
    r"""Descriptors do not turn: the mean of :math:`(\beta^a_{kc} - \beta^b_{kc})^2` over clouds, k and c."""
    return (beta_a - beta_b).square().mean()


def canonical_loss(theta: Tensor, theta_bar: Tensor, transform: RigidTransform) -> Tensor:
    r"""Poses in canonical pose lie where the canonicalizer says: the mean of
    :math:`\|\bar R \theta_k + \bar t - \bar\theta_k\|^2` over clouds and k.
    """
    return (transform.apply(theta) - theta_bar).square().sum(-1).mean()


def equilibrium_loss(attention: Tensor, mask: Tensor | None = None, *, unit: str = "share") -> Tensor:
    r"""Capsules have equal masses: the variance over k of :math:`\sum_n A_{nk}`, averaged over clouds.

    Parameters
    ----------
    attention
        (B, N, K).
    mask
        Boolean (B, N), False at padding.
    unit
        Of the masses: ``"share"`` (default) of the cloud's points, or ``"points"``, as the official code counts.

    Examples
    --------
    >>> equilibrium_loss(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), unit="points").item()
    2.0
    """
    checks.choice("unit", unit, ("share", "points"))
    if attention.shape[-1] < 2:
        raise InvalidInput("the equilibrium is a variance over capsules; attention has one: give two or more.")
    attention = without_padding(attention, mask)
    mass = attention.sum(1)  # (B, K)
    if unit == "share":
        mass = mass / (attention.shape[1] if mask is None else mask.sum(1, keepdim=True))
    return mass.var(1).mean()


def localization_loss(attention: Tensor, points: Tensor, mask: Tensor | None = None, *, norm: str = "sum") -> Tensor:
    r"""Capsules are compact: squared distance of their points from their poses, summed over capsules.

    .. math::

        L = \sum_k \sum_n \hat A_{nk} \|P_n - \theta_k\|^2

    Parameters
    ----------
    attention, points
        (B, N, K) and (B, N, D).
    mask
        Boolean (B, N), False at padding.
    norm
        ``"sum"`` over k (default), or ``"l2"``, the root of the sum of squares over k.

    Returns
    -------
    Tensor
        One number, the mean over clouds.

    Examples
    --------
    >>> localization_loss(torch.ones(1, 2, 1), torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])).item()
    1.0
    """
    checks.choice("norm", norm, ("sum", "l2"))
    if mask is not None:
        points = torch.where(mask[..., None], points, torch.zeros_like(points))
    _, squares = moments(shares(attention, mask), points, center_of(points, mask))
    each = squares.sum(-1)  # (B, K)
    return each.sum(1).mean() if norm == "sum" else each.norm(dim=1).mean()
