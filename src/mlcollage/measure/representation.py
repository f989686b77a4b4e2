"""What all instruments of representations share: activations as a matrix, one row per sample, in double precision."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.data.batches import fit_mask
from mlcollage.errors import InvalidInput

__all__ = ["as_samples", "centered_matrix"]

Space = Literal["mean", "positions"]


def as_samples(
    acts: Tensor, space: Space = "mean", *, unit_axis: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Activations of any layer as a matrix (samples, units).

    Parameters
    ----------
    acts
        (N, U) of a dense layer, (N, U, H, W) feature maps (channels first, any number of spatial axes), or others with
        ``unit_axis``.
    space
        ``"mean"`` averages over positions, one row per sample; ``"positions"`` takes each position as a row of its own,
        which compares two layers only if their grids are alike.
    unit_axis
        Which axis counts the units; by default axis 1, which three axes need to have said: tokens (N, T, U) have
        ``unit_axis=-1``, maps of one-dimensional convolutions (N, U, L) ``unit_axis=1``.
        :class:`~mlcollage.measure.units.LayerUnits` finds it out from the model.
    mask
        (N, T), (N, H, W) or (N,), true for positions (samples) that count, such as ``attention_mask``; others are in no
        mean and no row, and a sample without any has none.

    Returns
    -------
    Tensor
        (N, U), or (N * positions, U); same type and device, differentiable.

    Examples
    --------
    >>> as_samples(torch.ones(8, 3, 5, 5)).shape, as_samples(torch.ones(8, 3, 5, 5), "positions").shape
    (torch.Size([8, 3]), torch.Size([200, 3]))
    """
    axis = resolve_unit_axis(acts, unit_axis)
    checks.choice("space", space, ("mean", "positions"))
    if mask is not None:
        rows = acts.movedim(axis, -1)  # (N, *positions, U)
        keep = fit_mask(mask.to(acts.device), rows.shape[1:-1])
        if space == "positions" or acts.ndim == 2:
            return rows[keep]
        return masked_mean(acts.movedim(axis, 1), keep)[keep.flatten(1).any(1)]
    if acts.ndim == 2 and axis == 1:  # a dense layer's already
        return acts
    if space == "mean":
        return acts.mean(dim=[d for d in range(1, acts.ndim) if d != axis])
    return acts.movedim(axis, -1).flatten(0, -2)  # (N, *positions, U) to (N * positions, U)


def masked_mean(acts: Tensor, keep: Tensor) -> Tensor:
    """Mean (N, U) of (N, U, *positions) over the positions that ``keep`` (N, *positions) has; 0 where it has none."""
    rows = acts.flatten(2)  # (N, U, positions)
    keep = keep.flatten(1).unsqueeze(1)  # (N, 1, positions)
    # What does not count may be NaN, so that it is replaced and not multiplied by 0.
    return torch.where(keep, rows, 0.0).sum(2) / keep.sum(2).clamp(min=1)


def resolve_unit_axis(acts: Tensor, unit_axis: int | None) -> int:
    """The axis of the units as a number from 1 to ``acts.ndim - 1``."""
    if acts.ndim < 2:
        raise InvalidInput(
            f"activations of shape {tuple(acts.shape)} have no axis of units; expected (N, U), (N, U, H, W) or "
            "(N, T, U)."
        )
    if unit_axis is None and acts.ndim == 3:
        raise InvalidInput(
            f"activations of shape {tuple(acts.shape)} may be tokens (N, T, U) or maps (N, U, L): give unit_axis=-1 or "
            "unit_axis=1."
        )
    axis = 1 if unit_axis is None else unit_axis
    axis = axis + acts.ndim if axis < 0 else axis
    if not 1 <= axis < acts.ndim:
        raise InvalidInput(
            f"unit_axis={unit_axis} does not name an axis of units of activations {tuple(acts.shape)}; "
            f"use 1 to {acts.ndim - 1} (axis 0 counts the samples)."
        )
    return axis


def as_double(X: Any) -> Tensor:
    """An array or tensor in float64, on its device unless that has no such numbers (Apple's GPUs)."""
    x = X.detach() if isinstance(X, Tensor) else torch.from_numpy(np.array(X, dtype=np.float64))
    return (x.cpu() if x.device.type == "mps" else x).double()


def centered_matrix(X: Any, name: str = "X") -> Tensor:
    """A representation (n, p) as a float64 tensor with the mean of each column taken off; stays on its device.

    Raises
    ------
    InvalidInput
        If it is not a matrix, has fewer than two rows or no column, or holds NaN or infinity.

    Examples
    --------
    >>> centered_matrix([[1.0, 2.0], [3.0, 6.0]])
    tensor([[-1., -2.],
            [ 1.,  2.]], dtype=torch.float64)
    """
    x = as_double(X)
    if x.ndim != 2:
        raise InvalidInput(
            f"{name} has shape {tuple(x.shape)}, but a matrix (samples, features) is needed; pool or flatten it first, "
            "e.g. with mlcollage.measure.representation.as_samples."
        )
    if x.shape[0] < 2 or x.shape[1] < 1:
        raise InvalidInput(f"{name} has shape {tuple(x.shape)}; at least two samples and one feature are needed.")
    if not bool(x.isfinite().all()):
        raise InvalidInput(f"{name} holds {int((~x.isfinite()).sum())} values that are NaN or infinite.")
    return x - x.mean(dim=0)  # (n, p)
