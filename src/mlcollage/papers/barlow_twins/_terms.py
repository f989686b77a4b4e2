"""The two sums of the loss from standardized views, in three forms, with gradients in closed form.

With standardized views a, b (N, D), C = a^T b / N and d its diagonal, the sums are

    invariance = sum_i (1 - d_i)^2,        redundancy = sum_{i != j} C_ij^2 = <a a^T, b b^T> / N^2 - sum_i d_i^2 .

The second form of the redundancy has matrices (N, N) instead of (D, D): the Gram identity |a^T b|_F^2 = <a a^T, b b^T>.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TILE = 1024  # columns of C that exist at one time in the tiled form


def direct(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Invariance and redundancy through the matrix C itself; plain operations, which vmap and compilers can follow."""
    c = a.T @ b / len(a)  # (D, D)
    d = c.diagonal()
    off = c - torch.diag(d)
    return (d - 1).square().sum(), off.square().sum()


def gram(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same through the samples' Gram matrices: O(N^2 D) operations and O(N^2 + N D) memory.

    Where N is not well below D, the redundancy is a small difference of two large sums, so that it is taken in double
    precision there.
    """
    if a.dtype == torch.float32 and 4 * len(a) >= 3 * a.shape[1]:
        inv, red = _Gram.apply(a.double(), b.double())
        return inv.to(a.dtype), red.to(a.dtype)
    return _Gram.apply(a, b)


def tiled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same through blocks of columns of C, computed again for the gradient: no (D, D) matrix is kept."""
    return _Tiled.apply(a, b)


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        n = len(a)
        d = (a * b).sum(0) / n  # (D,)
        gram_a, gram_b = a @ a.T, b @ b.T  # (N, N)
        ctx.save_for_backward(a, b, gram_a, gram_b, d)
        return (d - 1).square().sum(), (gram_a * gram_b).sum() / n**2 - d.square().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        g_inv, g_red = grads
        a, b, gram_a, gram_b, d = ctx.saved_tensors
        n = len(a)
        if torch.is_grad_enabled():  # a second derivative is wanted: what was saved must depend on a and b again
            d, gram_a, gram_b = (a * b).sum(0) / n, a @ a.T, b @ b.T
        w = (2 / n) * (g_inv * (d - 1) - g_red * d)  # (D,)
        s = 2 * g_red / n**2  # put on the small matrices, so that no further (N, D) passes are needed
        return torch.addmm(b * w, gram_b * s, a), torch.addmm(a * w, gram_a * s, b)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        d = (a * b).sum(0) / len(a)
        red = a.new_zeros(())
        for start in range(0, b.shape[1], TILE):
            c = _block(a, b, d, start)[0]
            red = red + c.square().sum()
        return (d - 1).square().sum(), red

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        g_inv, g_red = grads
        a, b = ctx.saved_tensors
        n = len(a)
        d = (a * b).sum(0) / n
        w = (2 / n) * g_inv * (d - 1)
        grad_a, parts = b * w, []
        for start in range(0, b.shape[1], TILE):
            c, columns = _block(a, b, d, start)  # (D, T)
            grad_a = grad_a + (2 * g_red / n) * (b[:, columns] @ c.T)
            parts.append((2 * g_red / n) * (a @ c))
        return grad_a, a * w + torch.cat(parts, 1)


def _block(a: Tensor, b: Tensor, d: Tensor, start: int) -> tuple[Tensor, slice]:
    """Columns of C from ``start`` on, with 0 on the diagonal."""
    columns = slice(start, min(start + TILE, b.shape[1]))
    c = a.T @ b[:, columns] / len(a)
    rows = torch.arange(columns.start, columns.stop, device=a.device)
    return c.index_put((rows, rows - start), c.new_zeros(())), columns
