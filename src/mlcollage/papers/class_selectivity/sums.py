"""Class sums of all layers at once, and the index of them with its gradient in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "SelectivityFunction", "class_sums"]

IGNORED = -100
"""Label of samples that are left out, as in ``torch.nn.CrossEntropyLoss``."""


class SelectivityFunction(torch.autograd.Function):
    r"""Index (U,) of class sums (C, U) and counts (C, 1) or (C, U), with its gradient in closed form.

    With :math:`s = \mu_{\max} + \mu_{-\max}` of the (shifted) means,
    :math:`\partial \mathrm{SI} / \partial \mu_{\max} = (2 \mu_{-\max} + arepsilon) / (s + arepsilon)^2` and
    :math:`\partial \mathrm{SI} / \partial \mu_{-\max} = -(2 \mu_{\max} + arepsilon) / (s + arepsilon)^2`.
    The backward pass is written in differentiable operations, so second derivatives exist too.
    """

    @staticmethod
    def forward(
        ctx: Any, sums: Tensor, counts: Tensor, present: Tensor, eps: float, shift: bool, scale: Tensor | float
    ) -> Tensor:
        """Index (U,)."""
        ctx.save_for_backward(sums, counts, present)
        ctx.eps, ctx.shift, ctx.scale = eps, shift, scale
        return _parts(sums, counts, present, eps, shift)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient with respect to the class sums, times ``scale``."""
        sums, counts, present = ctx.saved_tensors
        _, best, least, top, rest, others, enough = _parts(sums, counts, present, ctx.eps, ctx.shift)
        power = grad * enough / (top + rest + ctx.eps).square()
        by_top, by_rest = power * (2 * rest + ctx.eps), -power * (2 * top + ctx.eps)
        by_mean = (present * (by_rest / others)).scatter(0, best, by_top[None])
        if ctx.shift:  # a unit whose smallest mean is raised to 0 moves with it
            below = (_means(sums, counts).gather(0, least).squeeze(0) < 0).to(power)
            by_mean = by_mean.scatter_add(0, least, (-below * (by_top + by_rest))[None])
        return by_mean * ctx.scale / counts.clamp(min=1e-12), None, None, None, None, None


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    return sums / counts.clamp(min=1e-12)


def _parts(sums: Tensor, counts: Tensor, present: Tensor, eps: float, shift: bool) -> tuple[Tensor, ...]:
    """Index, indices of the largest and smallest class, the two means, C - 1, and whether there are two classes."""
    means = _means(sums, counts)
    there = present.expand_as(means)
    best = means.masked_fill(~there, -torch.inf).argmax(dim=0, keepdim=True)
    least = means.masked_fill(~there, torch.inf).argmin(dim=0, keepdim=True) if shift else best
    if shift:
        means = means - means.gather(0, least).clamp(max=0)
    top = means.gather(0, best).squeeze(0)
    others = (there.sum(dim=0) - 1).clamp(min=1)
    # Summed without the largest: taking it off the sum would leave its rounding behind.
    rest = (means * there).scatter(0, best, 0.0).sum(dim=0) / others
    enough = there.sum(dim=0) >= 2
    return (top - rest) / (top + rest + eps) * enough, best, least, top, rest, others, enough


def class_sums(rows: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Class sums (C, U) and counts (C, 1) of rows (N, U), all layers at once."""
    if targets.is_floating_point():
        weights = targets.to(rows.dtype)
        return weights.T @ rows, weights.sum(dim=0)[:, None]
    targets = torch.where(targets == IGNORED, classes, targets)  # into a row of their own, which is cut off
    if torch.are_deterministic_algorithms_enabled():
        one_hot = (targets[:, None] == torch.arange(classes, device=targets.device)).to(rows.dtype)
        return one_hot.T @ rows, one_hot.sum(dim=0)[:, None]
    sums = rows.new_zeros(classes + 1, rows.shape[1]).index_add(0, targets, rows)
    counts = rows.new_zeros(classes + 1).index_add(0, targets, rows.new_ones(len(rows)))
    return sums[:classes], counts[:classes, None]
