"""All processes' rows as one batch, with a gradient into the rows of this process."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mlcollage.errors import InvalidInput


def world(group: Any) -> int:
    """How many processes a group has; 1 without one."""
    if group is None:
        return 1
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidInput(
            "group is given, but torch.distributed is not initialized; call init_process_group first, or leave out "
            "group where there is one process."
        )
    return dist.get_world_size(group)


def others() -> bool:
    """Whether there are other processes at all."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Gathered(NamedTuple):
    """Both views (N, D) of all processes, differentiable in this process's rows only."""

    a: Tensor
    b: Tensor
    own: slice  # this process's rows
    grads: bool  # whether any process wants gradients


def gather(z_a: Tensor, z_b: Tensor, group: Any, refused: str | None) -> Gathered:
    """Rows of both views of all processes, in the order of the ranks; numbers of rows may differ.

    ``refused`` says what is wrong with this process's views, None if nothing is. Every process learns of it, so that
    all stop instead of waiting for one that has stopped.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    wanted = not refused and torch.is_grad_enabled() and (z_a.requires_grad or z_b.requires_grad)
    kind = -1 if refused else [torch.float32, torch.float64].index(z_a.dtype)
    mine = [int(wanted), *([-1, -1] if refused else z_a.shape), kind]
    device = z_a.device if isinstance(z_a, Tensor) else torch.device("cpu")
    headers = [torch.empty(4, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(headers, torch.tensor(mine, device=device), group=group)
    found = torch.stack(headers).tolist()  # of each rank: gradients or not, rows, columns, type
    shapes = [header[1:] for header in found]
    if refused:
        raise InvalidInput(refused)
    bad = [r for r, shape in enumerate(shapes) if shape[0] < 0]
    if bad:
        raise InvalidInput(f"process {bad[0]} of the group refused its embeddings; its own message says why.")
    if len({tuple(shape[1:]) for shape in shapes}) > 1:
        widths = ", ".join(str(shape[1]) for shape in shapes)
        raise InvalidInput(f"the processes' embeddings differ in width or type (widths {widths}); all must be alike.")
    counts = [shape[0] for shape in shapes]
    longest = max(counts)
    padded = z_a.new_zeros(2, longest, z_a.shape[1])
    padded[0, : len(z_a)], padded[1, : len(z_b)] = z_a.detach(), z_b.detach()
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    views = []
    for i, own in enumerate((z_a, z_b)):
        rows = [own if r == rank else part[i, : counts[r]] for r, part in enumerate(parts)]
        views.append(torch.cat(rows))  # (N, D)
    start = sum(counts[:rank])
    return Gathered(views[0], views[1], slice(start, start + counts[rank]), any(header[0] for header in found))
