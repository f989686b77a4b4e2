"""The Gram form over several processes: each has all rows, and computes its own rows of the Gram matrices only.

With standardized views a, b (N, D) and the rows R of one process,

    redundancy = 1/N^2 sum_R <a_R a^T, b_R b^T> - sum_i d_i^2,
    d redundancy / d a_R = 2/N^2 (b_R b^T) a - 2/N d b_R,

so that operations and (N, N) memory are divided by the number of processes. Through the statistics of its columns a
row's gradient depends on two sums over all rows, found in the forward pass: the backward pass needs no other process.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mlcollage.errors import InvalidInput


class Statistics(NamedTuple):
    """How columns were standardized: factors (1, D) of each view, and N / (N - correction)."""

    scale_a: Tensor
    scale_b: Tensor
    ratio: float


class Setting(NamedTuple):
    """Rows of this process, its group, whether any process wants gradients, and how columns were standardized."""

    own: slice
    group: Any
    grads: bool
    statistics: Statistics | None


def blocks(own_a: Tensor, own_b: Tensor, a: Tensor, b: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Invariance and redundancy of a, b (N, D), with gradients into this process's rows ``own_a`` and ``own_b``.

    With ``setting.statistics`` these are the rows before columns were standardized, without it the rows of a and b
    themselves.
    """
    found: tuple[Tensor, Tensor] = _Blocks.apply(own_a, own_b, a, b, setting)
    return found


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own_a: Tensor, own_b: Tensor, a: Tensor, b: Tensor, setting: Setting
    ) -> tuple[Tensor, Tensor]:
        kind = a.dtype
        if kind == torch.float32 and 4 * len(a) >= 3 * a.shape[1]:  # a small difference of two large sums
            a, b = a.double(), b.double()
        n, mine_a, mine_b = len(a), a[setting.own], b[setting.own]  # (N,), (n, D)
        d = (a * b).sum(0) / n  # (D,)
        gram_a, gram_b = mine_a @ a.T, mine_b @ b.T  # (n, N)
        parts = [(gram_a * gram_b).sum()[None]]
        if setting.grads:
            p_a, p_b = gram_b @ a, gram_a @ b  # (n, D)
            if setting.statistics is not None:  # sums over rows that the gradient of a column's statistics needs
                parts += [p_a.sum(0), p_b.sum(0), (p_a * mine_a).sum(0), (p_b * mine_b).sum(0)]
        total = torch.cat(parts)
        dist.all_reduce(total, group=setting.group)
        if setting.grads:
            ctx.save_for_backward(mine_a, mine_b, p_a, p_b, d, total[1:].view(-1, len(d)))
        ctx.n, ctx.statistics, ctx.kind = n, setting.statistics, own_a.dtype
        redundancy = total[0] / n**2 - d.square().sum()
        return (d - 1).square().sum().to(kind), redundancy.to(kind)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: a silent zero would be wrong
            raise InvalidInput("the loss in blocks has no second derivatives; use impl='gram' or 'direct' for them.")
        g_inv, g_red = (g.to(ctx.saved_tensors[0].dtype) for g in grads)
        a, b, p_a, p_b, d, sums = ctx.saved_tensors
        n = ctx.n
        w = (2 / n) * (g_inv * (d - 1) - g_red * d)  # (D,)
        s = 2 * g_red / n**2
        found = []
        for k, (own, other, p) in enumerate(((a, b, p_a), (b, a, p_b))):
            g = other * w + s * p  # (n, D)
            if ctx.statistics is not None:
                # Means over all N rows of g, and of g times the standardized column; those of the other view are 0.
                mean, along = s * sums[k] / n, w * d + s * sums[2 + k] / n
                g = ctx.statistics[k] * (g - mean - ctx.statistics.ratio * own * along)
            found.append(g.to(ctx.kind))
        return found[0], found[1], None, None, None
