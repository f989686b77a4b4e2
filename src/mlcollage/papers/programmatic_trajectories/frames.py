"""What a model sees of a batch of tracks: scaled positions, targets, contexts, and which entries count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput

__all__ = ["TrackBatch"]


@dataclass(frozen=True)
class TrackBatch:
    """Tracks that a model is trained on or scored with.

    Parameters
    ----------
    x
        Positions (B, T, K, D), in the user's unit.
    intents
        Macro-intents (B, T, K), or (B, T) where they are shared; -1 where there is none. None for models without.
    mask
        True where an agent was seen, (B, T, K); entries that are not finite never count. None is everywhere.

    Examples
    --------
    >>> TrackBatch(torch.zeros(2, 10, 5, 2)).mask is None
    True
    """

    x: Tensor
    intents: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, batch: Any) -> TrackBatch:
        """Make one of a tensor, a tuple in the order of the fields, or a mapping with their names.

        Raises
        ------
        InvalidInput
            If it is none of these, or x is no float tensor (B, T, K, D) with two frames at least.
        """
        if isinstance(batch, TrackBatch):
            made = batch
        elif isinstance(batch, Tensor):
            made = cls(batch)
        elif isinstance(batch, Mapping):
            unknown = set(batch) - {"x", "intents", "mask"}
            if unknown or "x" not in batch:
                raise InvalidInput(f"a batch has x, and may have intents and mask; got {', '.join(map(str, batch))}.")
            made = cls(**batch)
        elif isinstance(batch, tuple | list) and 1 <= len(batch) <= 3:
            made = cls(*batch)
        else:
            raise InvalidInput(f"a batch is a tensor (B, T, K, D), a tuple or a mapping; got {type(batch).__name__}.")
        x = made.x
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point() or 0 in x.shape or x.shape[1] < 2:
            what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InvalidInput(f"x must be a float tensor (B, T, K, D) with T of at least 2; got {what}.")
        if made.mask is not None and made.mask.shape != x.shape[:3]:
            raise InvalidInput(f"the mask must be {tuple(x.shape[:3])}; got {tuple(made.mask.shape)}.")
        return made

    def seen(self) -> Tensor:
        """True where an agent was seen and its position is finite, (B, T, K)."""
        finite = self.x.isfinite().all(-1)
        return finite if self.mask is None else finite & self.mask.bool()


def centered(x: Tensor, shift: Tensor) -> Tensor:
    """Positions less a model's center, in the model's floating type.

    The difference is taken in the wider of both types: coordinates far from their origin (UTM) keep their digits.
    """
    return (x.to(torch.promote_types(x.dtype, shift.dtype)) - shift).to(shift.dtype)


def placed(u: Tensor, shift: Tensor, like: Tensor) -> Tensor:
    """The reverse of :func:`centered`, in the wider of the types of the model and of what the user gave."""
    return u.to(torch.promote_types(like.dtype, shift.dtype)) + shift


def vector(name: str, value: Any, dim: int, *, positive: bool) -> Tensor:
    """One finite number for each coordinate, (D,), of D numbers or one."""
    try:
        given = torch.as_tensor(value, dtype=torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(f"{name} must be a number, or one for each coordinate; got {value!r}.") from None
    if given.shape not in ((), (1,), (dim,)):
        raise InvalidInput(f"{name} must be one number, or {dim}, one for each coordinate; got {tuple(given.shape)}.")
    if not bool(given.isfinite().all()) or (positive and bool((given <= 0).any())):
        raise InvalidInput(f"{name} must be finite{' and above 0' if positive else ''}; got {value!r}.")
    return given.expand(dim).clone()


def carried(x: Tensor, seen: Tensor) -> Tensor:
    """Positions (B, T, K, D) with the last seen one in the place of those that were not; before the first, the first.

    A frame's result depends on later frames only before an agent's first, where nothing is scored.
    """
    if bool(seen.all()):
        return x
    t = torch.arange(x.shape[1], device=x.device)[None, :, None]
    last = torch.where(seen, t, -1).cummax(1).values
    first = torch.where(seen, t, x.shape[1] - 1).min(1, keepdim=True).values
    at = torch.where(last < 0, first, last)[..., None].expand(x.shape)
    return torch.where(seen.any(1, keepdim=True)[..., None], x.nan_to_num(0, 0, 0).gather(1, at), 0.0)


def steps_before(x: Tensor, previous: Tensor | None = None) -> Tensor:
    """Displacements that led to each frame, (B, T, K, D); 0 for the first unless the frame before it is given."""
    first = torch.zeros_like(x[:, :1]) if previous is None else x[:, :1] - previous
    return torch.cat([first, x[:, 1:] - x[:, :-1]], 1)


def neighbor_features(u: Tensor, step: Tensor, seen: Tensor, neighbors: int) -> Tensor:
    """Own position and last step, then the nearest others: offset, their step relative to the own one, 1 if there.

    Parameters
    ----------
    u, step
        Scaled positions and last steps (B, T, K, D).
    seen
        (B, T, K).
    neighbors
        How many others.

    Returns
    -------
    features
        (B, T, K, 2 D + neighbors (2 D + 1)); agents may change places without a change of their features.
    """
    k, d = u.shape[-2:]
    offset = u[:, :, None] - u[:, :, :, None]  # of j as seen from i, (B, T, i, j, D)
    away = (offset**2).sum(-1)
    absent = ~seen[:, :, None, :] | torch.eye(k, dtype=torch.bool, device=u.device)
    order = away.masked_fill(absent, torch.inf).argsort(dim=-1, stable=True)[..., :neighbors]
    index = order[..., None].expand(*order.shape, d)
    relative = (step[:, :, None] - step[:, :, :, None]).gather(3, index)
    there = (~absent).gather(3, order)[..., None]
    near = torch.cat([offset.gather(3, index) * there, relative * there, there.to(u.dtype)], -1)
    return torch.cat([u, step, near.flatten(3)], -1)
