r"""The canonicalizer: descriptors say where capsules lie in canonical pose, and the best motion takes them there."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure import RigidTransform, procrustes

from .encoder import CapsuleOutput

__all__ = ["CanonicalPose", "Canonicalizer"]


class CanonicalPose(NamedTuple):
    r"""The motion of each cloud into canonical pose, and how far it can be trusted.

    Attributes
    ----------
    R, t
        :math:`\bar R` (B, D, D) and :math:`\bar t` (B, D).
    theta_bar
        Canonical poses :math:`\bar\theta` (B, K, D), with mean 0.
    residual
        Mean squared distance between moved and canonical poses, (B,).
    condition
        (B,), 0 where the poses determine no rotation, 1 where all directions are determined as well.
    defined
        (B,), whether the rotation is unique; where it is not, R is the identity and has no gradient.
    mirrored
        (B,), whether a mirror image would fit better.
    """

    R: Tensor
    t: Tensor
    theta_bar: Tensor
    residual: Tensor
    condition: Tensor
    defined: Tensor
    mirrored: Tensor

    @property
    def transform(self) -> RigidTransform:
        """R and t as a motion."""
        return RigidTransform(self.R, self.t)


class Canonicalizer(nn.Module):
    r"""Canonical poses from the descriptors, and the motion that takes the measured poses there.

    .. math::

        \bar\theta = \operatorname{K}(\beta_1, \dots, \beta_K), \qquad
        (\bar R, \bar t) = \operatorname{argmin}_{R, t} \sum_k \|R\,\theta_k + t - \bar\theta_k\|^2

    K is a network with one hidden layer of K C units. Descriptors do not change with the pose, so neither do the
    canonical poses, and two clouds of one object are brought together.

    Parameters
    ----------
    dim, capsules, channels
        D, K and C.

    Examples
    --------
    >>> import torch
    >>> from mlcollage.papers.canonical_capsules import CapsuleEncoder
    >>> pose = Canonicalizer(3, 5, 8)(CapsuleEncoder(3, 5, 8)(torch.randn(2, 20, 3)))
    >>> pose.R.shape, pose.t.shape
    (torch.Size([2, 3, 3]), torch.Size([2, 3]))
    """

    def __init__(self, dim: int = 3, capsules: int = 10, channels: int = 128) -> None:
        super().__init__()
        if dim not in (2, 3):
            raise InvalidInput(f"dim must be 2 or 3, not {dim!r}.")
        k, c = checks.integer("capsules", capsules, least=2), checks.integer("channels", channels, least=1)
        self.dim = dim
        self.fc1, self.fc2 = nn.Linear(k * c, k * c), nn.Linear(k * c, k * dim)

    def canonical_poses(self, beta: Tensor) -> Tensor:
        """Canonical poses (B, K, D) with mean 0, from descriptors (B, K, C)."""
        # The official code's order: channels outside, capsules inside, and likewise for coordinates.
        flat = beta.transpose(1, 2).flatten(1)
        poses = self.fc2(F.relu(self.fc1(flat))).reshape(len(beta), self.dim, -1).transpose(1, 2)
        return poses - poses.mean(1, keepdim=True)

    def forward(self, capsules: CapsuleOutput) -> CanonicalPose:
        """The motion into canonical pose of each cloud."""
        theta_bar = self.canonical_poses(capsules.beta)
        fit = procrustes(capsules.theta, theta_bar.to(capsules.theta.dtype))
        return CanonicalPose(fit.R, fit.t, theta_bar, fit.residual, fit.condition, fit.defined, fit.mirrored)
