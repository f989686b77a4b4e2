"""Which two tensors of a batch are the views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mlcollage.errors import InvalidInput

__all__ = ["two_views"]


def two_views(batch: Any) -> tuple[Tensor, Tensor]:
    """The views of a batch as loaders give it: ``(a, b)``, ``((a, b), labels)``, ``(a, b, index)``, ``{"a": ...}``.

    Parameters
    ----------
    batch
        A pair of equally shaped floating tensors, row n of both being views of one sample; or a tuple whose first part
        is such a pair; or a tuple that begins with one, followed by labels, indices or file names; or a mapping with
        two such entries, the first ones in its order.

    Returns
    -------
    tuple of Tensor
        The two views.

    Raises
    ------
    InvalidInput
        For one tensor (which half of it is which view cannot be told), more than two views, and views of different
        shapes.

    Examples
    --------
    >>> import torch
    >>> a, b = two_views(([torch.zeros(4, 3), torch.ones(4, 3)], torch.arange(4)))
    >>> a.shape, float(b.mean())
    (torch.Size([4, 3]), 1.0)
    """
    if isinstance(batch, Tensor):
        raise InvalidInput(
            f"one tensor of shape {tuple(batch.shape)} was given where two views are needed: views that were joined or "
            "interleaved cannot be told apart; pass the pair (x_a, x_b)."
        )
    if not isinstance(batch, Mapping | list | tuple):
        raise InvalidInput(f"a batch is a {type(batch).__name__}; give (x_a, x_b), or ((x_a, x_b), labels).")
    parts = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    if len(parts) > 1 and all(isinstance(p, Mapping) for p in parts[:2]):
        raise InvalidInput(
            "the views are mappings; two tensors are needed: take the entry that is the input out of each."
        )
    if parts and isinstance(parts[0], list | tuple | Mapping):
        return two_views(parts[0])
    views = [p for p in parts if isinstance(p, Tensor) and p.is_floating_point() and p.ndim > 1]
    leading = 0
    while leading < len(parts) and any(parts[leading] is v for v in views):
        leading += 1
    if len(views) > 2:
        raise InvalidInput(
            f"a batch has {len(views)} views; the loss is of two: average it over pairs, such as "
            "sum(model(a, b) for a, b in itertools.combinations(views, 2))."
        )
    if len(views) < 2 or (leading < 2 and not isinstance(batch, Mapping)):
        kinds = ", ".join(
            f"{type(p).__name__} {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__ for p in parts
        )
        raise InvalidInput(
            f"no two views were found in a batch of ({kinds}); give (x_a, x_b), or ((x_a, x_b), labels), floating "
            "tensors of one shape."
        )
    a, b = views
    if a.shape != b.shape:
        raise InvalidInput(f"the views have shapes {tuple(a.shape)} and {tuple(b.shape)}; row n of both is one sample.")
    return a, b
