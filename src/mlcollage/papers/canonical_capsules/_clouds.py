"""Clouds at the door: what is refused, and weighted moments that stay exact far from the origin."""

from __future__ import annotations

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput

LEAST_MASS = 1e-3  # the clamp of the official code: weights of a capsule with less mass sum to less than 1


def check_clouds(points: Tensor, dim: int, least: int, mask: Tensor | None = None) -> None:
    """Refuse what is no batch (B, N, D) of finite clouds with ``least`` real points each."""
    if not isinstance(points, Tensor) or not points.is_floating_point():
        what = f"a tensor of {points.dtype}" if isinstance(points, Tensor) else type(points).__name__
        raise InvalidInput(f"points must be a floating tensor (B, N, {dim}); got {what}.")
    if points.ndim != 3 or points.shape[2] != dim:
        hint = ""
        if points.ndim == 3 and points.shape[1] == dim:
            hint = "; it looks like coordinates first: use points.transpose(1, 2)"
        elif points.ndim == 2:
            hint = "; for a single cloud use points[None]"
        elif points.ndim == 4:
            hint = "; an organized grid is to be flattened, and its invalid pixels dropped"
        elif points.ndim == 3 and points.shape[2] > dim:
            hint = f"; further columns are no coordinates: use points[..., :{dim}]"
        raise InvalidInput(f"points must be (B, N, {dim}), one point a row; got {tuple(points.shape)}{hint}.")
    if mask is not None and (
        not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != points.shape[:2]
    ):
        what = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidInput(f"mask must be boolean {tuple(points.shape[:2])}, True for real points; got {what}.")
    sizes = [points.shape[1]] if mask is None else mask.sum(1).tolist()
    fewest = min(sizes, default=0) if len(points) else 0
    if fewest < least:
        raise InvalidInput(f"each cloud needs at least {least} real points (as many as capsules); one has {fewest}.")
    finite = torch.isfinite(points).all(-1)
    if mask is not None:
        finite = finite | ~mask
    if not bool(finite.all()):
        cloud = int((~finite).any(1).nonzero()[0])
        count = int((~finite)[cloud].sum())
        raise InvalidInput(f"cloud {cloud} has {count} points with NaN or infinity; drop them, or mask them out.")


def check_features(features: Tensor, points: Tensor, mask: Tensor | None) -> Tensor:
    """Extra features (B, N, extra) of these points, with 0 at padding, which may hold anything."""
    if not isinstance(features, Tensor) or features.ndim != 3 or features.shape[:2] != points.shape[:2]:
        what = str(tuple(features.shape)) if isinstance(features, Tensor) else type(features).__name__
        raise InvalidInput(
            f"features must be a tensor {(*points.shape[:2], 'extra')}, one row for each point; got {what}."
        )
    if mask is not None:
        features = torch.where(mask[..., None], features, torch.zeros_like(features))
    if not bool(torch.isfinite(features).all()):
        raise InvalidInput("features hold NaN or infinity; drop such points, or mask them out.")
    return features


def check_type(points: Tensor, weight: Tensor) -> None:
    """Refuse points of another type than the network's; under autocast types may differ."""
    if points.dtype != weight.dtype and not torch.is_autocast_enabled(points.device.type):
        raise InvalidInput(
            f"points are {points.dtype} and the network is {weight.dtype}: use points.to({weight.dtype}), after "
            "their mean is subtracted, or network.to(...)."
        )


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """0 at padding (B, N), which may hold anything, also NaN."""
    return x if mask is None else torch.where(mask[..., None], x, torch.zeros_like(x))


def shares(attention: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Weights :math:`\hat A_{nk} = A_{nk} / \max(\sum_n A_{nk}, 10^{-3})`, (B, N, K); 0 at padding."""
    attention = without_padding(attention, mask)
    return attention / attention.sum(1, keepdim=True).clamp_min(LEAST_MASS)


def center_of(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean (B, 1, C) over the real points."""
    if mask is None:
        return x.mean(1, keepdim=True)
    real = mask[..., None].to(x.dtype)
    return (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)


def moments(weights: Tensor, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    r"""Weighted means relative to ``center``, and weighted squared distances from the means, (B, K, C) each.

    .. math::

        \mu_k = \sum_n \hat a_{nk} x_n, \qquad
        v_k = \sum_n \hat a_{nk} (x_n - \mu_k)^2 = q'_k - 2 \nu_k m'_k + s_k \nu_k^2

    with :math:`x' = x - c`, :math:`m' = \hat a^\top x'`, :math:`q' = \hat a^\top x'^2`,
    :math:`s_k = \sum_n \hat a_{nk}` (1, but for capsules below the clamp) and :math:`\nu = \mu - c = m' - (1 - s) c`.
    No tensor is larger than x.
    """
    shifted = x - center
    m = weights.mT @ shifted
    q = weights.mT @ shifted.square()
    total = weights.sum(1)[..., None]  # s (B, K, 1)
    nu = m - (1 - total) * center
    return nu, q - 2 * nu * m + total * nu.square()
