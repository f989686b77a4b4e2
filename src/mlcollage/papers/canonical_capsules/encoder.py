r"""The encoder: attention splits a cloud into capsules, each with a pose and a descriptor."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from ._clouds import center_of, check_clouds, check_features, check_type, moments, shares
from .context_norm import ContextLayer

__all__ = ["CapsuleEncoder", "CapsuleOutput", "pool_capsules"]

Inputs = Literal["coordinates", "distances"]
_QUANTILES = 16  # of the distances to other points, for the invariant input


class CapsuleOutput(NamedTuple):
    """What the encoder says of a batch of clouds.

    Attributes
    ----------
    theta
        Poses of the capsules, (B, K, D): weighted means of the points, in their unit.
    beta
        Descriptors, (B, K, C): weighted means of the features.
    attention
        (B, N, K); each point gives a mass of 1 to the capsules, padding gives none.
    features
        (B, N, C).
    """

    theta: Tensor
    beta: Tensor
    attention: Tensor
    features: Tensor


def pool_capsules(attention: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Weighted means of values under each capsule's attention.

    .. math::

        \theta_k = \sum_n \hat A_{nk} P_n, \qquad \hat A_{nk} = A_{nk} / \max(\sum_n A_{nk}, 10^{-3})

    Parameters
    ----------
    attention
        (B, N, K).
    values
        (B, N, D): points for poses, features for descriptors.
    mask
        Boolean (B, N), False at padding.

    Returns
    -------
    Tensor
        (B, K, D). A capsule with a mass below 1e-3 is drawn to 0, as in the official code.

    Examples
    --------
    >>> pool_capsules(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[0.0], [4.0]]])).item()
    3.0
    """
    with torch.autocast(values.device.type, enabled=False):
        work = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else values.dtype
        kept = values.to(work)
        if mask is not None:
            kept = torch.where(mask[..., None], kept, torch.zeros_like(kept))
        center = center_of(kept, mask)
        nu, _ = moments(shares(attention.to(work), mask), kept, center)
        return (nu + center).to(values.dtype)


class CapsuleEncoder(nn.Module):
    r"""Points to capsules: residual blocks of attentive context normalization, and a readout.

    .. math::

        A_{nk} = \operatorname{softmax}_k (W F_n + b), \qquad \theta_k = \sum_n \hat A_{nk} P_n, \qquad
        \beta_k = \sum_n \hat A_{nk} F_n

    Parameters
    ----------
    dim
        D, 2 or 3.
    capsules
        K, 10 in the paper; at least D + 1, since fewer keypoints determine no pose in general.
    channels
        C, 128 in the paper.
    blocks
        Residual blocks of two layers, 3 by default; the first has a projecting layer before it.
    inputs
        What the network sees of a point. ``"coordinates"`` (default): where it is, as in the paper; that attention does
        not change with the pose is then learned. ``"distances"``: 16 quantiles of its distances to the cloud's points
        and that to their mean. Attention and descriptors are then invariant, and poses equivariant, by construction;
        parts that mirror each other cannot be told apart, and the cost grows with N squared.
    extra
        Further features of each point that the network sees beside them and that do not turn with the cloud (colors,
        intensity): their number, 0 by default.

    Examples
    --------
    >>> out = CapsuleEncoder(dim=3, capsules=5, channels=16)(torch.randn(2, 40, 3))
    >>> out.theta.shape, out.beta.shape, out.attention.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 5, 16]), torch.Size([2, 40, 5]))
    """

    def __init__(
        self,
        dim: int = 3,
        capsules: int = 10,
        channels: int = 128,
        *,
        blocks: int = 3,
        inputs: Inputs = "coordinates",
        extra: int = 0,
    ) -> None:
        super().__init__()
        if dim not in (2, 3):
            raise InvalidInput(f"dim must be 2 or 3, the coordinates of a point; not {dim!r}.")
        if checks.integer("capsules", capsules, least=1) <= dim:
            raise InvalidInput(f"capsules={capsules} determine no pose in {dim} dimensions; use {dim + 1} or more.")
        checks.choice("inputs", inputs, ("coordinates", "distances"))
        self.dim, self.capsules = dim, capsules
        self.channels = checks.integer("channels", channels, least=1)
        self.inputs, self.extra = inputs, checks.integer("extra", extra, least=0)
        width = (dim if inputs == "coordinates" else _QUANTILES + 1) + extra
        self.proj = ContextLayer(width, channels, capsules)
        self.blocks = nn.ModuleList(
            nn.ModuleList([ContextLayer(channels, channels, capsules) for _ in range(2)])
            for _ in range(checks.integer("blocks", blocks, least=1))
        )
        self.readout = nn.Linear(channels, capsules)

    def forward(self, points: Tensor, mask: Tensor | None = None, features: Tensor | None = None) -> CapsuleOutput:
        """Encode clouds (B, N, D); ``mask`` (B, N) is False at padding, ``features`` are the extra ones (B, N, extra).

        Raises
        ------
        InvalidInput
            For clouds of another shape or type than the network's, fewer real points than capsules, features that do
            not belong to the points, and values that are not finite.
        """
        check_clouds(points, self.dim, self.capsules, mask)
        f = self.point_features(points, mask, features)
        attention = self.readout(f).softmax(-1)
        if mask is not None:
            attention = attention * mask[..., None]
        return CapsuleOutput(pool_capsules(attention, points, mask), pool_capsules(attention, f, mask), attention, f)

    def point_features(self, points: Tensor, mask: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Features F (B, N, C) alone, without a check of the values of the points."""
        check_type(points, self.readout.weight)
        if features is not None:
            features = check_features(features, points, mask)
        if (0 if features is None else features.shape[-1]) != self.extra:
            got = "none" if features is None else str(tuple(features.shape))
            raise InvalidInput(f"the encoder was made for {self.extra} extra features of a point; features: {got}.")
        seen = points
        if mask is not None:
            seen = torch.where(mask[..., None], points, torch.zeros_like(points))
        if self.inputs == "distances":
            seen = _distance_profile(seen, mask)
        if features is not None:
            seen = torch.cat([seen, features.to(seen.dtype)], -1)
        x = self.proj(seen, mask)
        for block in self.blocks:
            first, second = cast(nn.ModuleList, block)
            x = x + second(first(x, mask), mask)
        return x


def _distance_profile(points: Tensor, mask: Tensor | None) -> Tensor:
    """(B, N, 17): quantiles of each point's distances to the real points, and its distance to their mean."""
    gaps = points[:, :, None] - points[:, None]  # (B, N, N, D)
    d = (gaps.square().sum(-1) + 1e-12).sqrt()
    center = (points - center_of(points, mask)).square().sum(-1, keepdim=True).add(1e-12).sqrt()
    level = torch.linspace(0, 1, _QUANTILES, dtype=d.dtype, device=d.device)
    size = d.new_tensor(d.shape[1]) if mask is None else mask.sum(1).to(d.dtype)  # (B,) or one number
    if mask is not None:
        d = d.masked_fill(~mask[:, None, :], torch.inf)  # behind all real ones
    ordered = d.sort(-1).values
    place = level * (size.reshape(-1, 1, 1) - 1)  # (B or 1, 1, 16), between two ranks
    place = place.expand(d.shape[0], d.shape[1], -1)
    low = place.floor().long()
    high = torch.minimum(low + 1, (size.reshape(-1, 1, 1) - 1).long().expand_as(low))
    part = place - low
    profile = ordered.gather(-1, low) * (1 - part) + ordered.gather(-1, high) * part
    return torch.cat([profile, center], -1)
