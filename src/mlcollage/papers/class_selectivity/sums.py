"""Class sums of all layers at once, and the index of them with its gradient in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label of samples that are left out, as in ``torch.nn.CrossEntropyLoss``."""


class SelectivityFunction(torch.autograd.Function):
    r"""Index (U,) of class sums (C, U) and counts (C, 1) or (C, U), with its gradient in closed form.

    With :math:`s = \mu_{\max} + \mu_{-\max}` of the (shifted) means,
    :math:`\partial \mathrm{SI} / \partial \mu_{\max} = (2 \mu_{-\max} + \varepsilon) / (s + \varepsilon)^2` and
    :math:`\partial \mathrm{SI} / \partial \mu_{-\max} = -(2 \mu_{\max} + \varepsilon) / (s + \varepsilon)^2`.
    The backward pass is written in differentiable operations, so second derivatives exist too.
    """

    @staticmethod
    def forward(
        ctx: Any, sums: Tensor, counts: Tensor, present: Tensor, eps: float, shift: bool, scale: Tensor | float
    ) -> Tensor:
        """Index (U,) of sums (C, U), classes ``present`` (C, 1) or (C, U) and a factor on the gradient."""
        parts = _parts(sums, counts, present, shift)
        ctx.save_for_backward(sums, counts, present, *parts)
        ctx.eps, ctx.shift, ctx.scale = eps, shift, scale
        top, rest = parts[2:4]
        return (top - rest) / (top + rest + eps) * parts[5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient with respect to the class sums, times ``scale``."""
        sums, counts, present, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative the parts must be functions of the sums
            parts = _parts(sums, counts, present, ctx.shift)
        best, least, top, rest, others, enough = parts  # (1, U), (1, U), the rest (U,)
        power = grad * enough / (top + rest + ctx.eps).square()
        by_top, by_rest = power * (2 * rest + ctx.eps), -power * (2 * top + ctx.eps)
        by_mean = present.to(sums.dtype) * (by_rest / others)  # (C, U): every class but the preferred is in the rest
        by_mean = by_mean.scatter(0, best, by_top[None])
        if ctx.shift:  # a unit whose smallest mean is raised to 0 moves with it
            below = (_means(sums, counts).gather(0, least).squeeze(0) < 0).to(power)
            by_mean = by_mean.scatter_add(0, least, (-below * (by_top + by_rest))[None])
        return by_mean * (ctx.scale / counts.clamp(min=1e-12)), None, None, None, None, None


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    # The clamp is for classes without samples; soft counts may be far below 1, so it is tiny.
    return sums / counts.clamp(min=1e-12)


def _parts(sums: Tensor, counts: Tensor, present: Tensor, shift: bool) -> tuple[Tensor, ...]:
    """Indices of the largest and smallest class, the two means, C - 1, and whether there are two classes."""
    means = _means(sums, counts)  # (C, U)
    # Without a shift the smallest class is not needed; a tensor must stand in its place to be saved for backward.
    least = means.masked_fill(~present, torch.inf).argmin(dim=0, keepdim=True) if shift else present
    if shift:
        means = means - means.gather(0, least).clamp(max=0)
    top, best = means.masked_fill(~present, -torch.inf).max(dim=0, keepdim=True)
    classes = present.sum(dim=0)  # (1,) or, with counts of each layer's own, (U,)
    others, enough = (classes - 1).clamp(min=1).to(means.dtype), (classes >= 2).to(means.dtype)
    # Summed without the largest: taking it off the sum would leave its rounding behind.
    rest = means.masked_fill(~present, 0.0).scatter(0, best, 0.0).sum(dim=0) / others
    return best, least, top.squeeze(0), rest, others, enough


def class_sums(rows: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Class sums (C, U) and counts (C, 1) of rows (N, U), all layers at once."""
    if targets.is_floating_point():
        weights = targets.to(rows.dtype)  # (N, C)
        return weights.T @ rows, weights.sum(dim=0)[:, None]
    targets = torch.where(targets == IGNORED, classes, targets)  # into a row of their own, which is cut off
    if torch.are_deterministic_algorithms_enabled():  # adding by index is not deterministic on CUDA
        one_hot = (targets[:, None] == torch.arange(classes, device=targets.device)).to(rows.dtype)
        return one_hot.T @ rows, one_hot.sum(dim=0)[:, None]
    sums = rows.new_zeros(classes + 1, rows.shape[1]).index_add(0, targets, rows)
    counts = rows.new_zeros(classes + 1).index_add(0, targets, rows.new_ones(len(rows)))
    return sums[:classes], counts[:classes, None]
