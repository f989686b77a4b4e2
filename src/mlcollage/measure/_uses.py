r"""Squared norms of the gradients of single examples, made of layers' inputs and output gradients.

For :math:`z_t = W a_t` at positions t = 1..T, with :math:`b_t = \partial \ell_i / \partial z_t`, the gradient of
example i is :math:`G_i = \sum_t b_t a_t^\top`, and

.. math:: \|G_i\|^2 = \sum_{t, s} (b_t \cdot b_s)(a_t \cdot a_s)

without making :math:`G_i`, for :math:`T^2 (d_{in} + d_{out})` operations; making it costs :math:`T d_{in} d_{out}`. The
cheaper one is taken for each layer. A weight used several times is a layer with the positions of all uses, so the terms
across uses are exact. (Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679, section 4; Bu et al. 2022,
arXiv:2205.10683.)

Gradients come with a leading dimension K, for K different losses of the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from mlcollage.errors import InvalidInput

__all__ = ["Conv", "Dense", "Embed", "Linear", "Normed", "Prelu", "Use", "sqnorm"]

_CHUNK = 2**22  # numbers in the gradients of a few examples held at once


class Use:
    """One use of a parameter: by what, on which input, and where in the graph its output's gradient is found."""

    edge: GradientEdge

    def __init__(self, param: nn.Parameter | None, unsure: bool, part: int | None = None) -> None:
        self.owner, self.unsure, self.part = param, unsure, part
        self.inputs: list[tuple[Tensor, int]] = []

    @property
    def param(self) -> nn.Parameter:
        """The parameter, or its third called ``part``."""
        assert self.owner is not None
        return self.owner

    def hold(self, a: Tensor) -> Tensor:
        """Keep an input, with the number of times it has been written to."""
        self.inputs.append((a, a._version))
        return a

    def check(self, name: str) -> None:
        """Raise InvalidInput if an input was overwritten since."""
        if any(a._version != version for a, version in self.inputs):
            raise InvalidInput(
                f"the input of the layer with parameter {name!r} was overwritten in place after the layer used it: "
                "take inplace=True from the operation behind it."
            )

    def dense(self, g: Tensor, batch: int) -> Tensor:
        """The gradients themselves, (K, batch, size of the parameter or its part)."""
        raise NotImplementedError


class Dense(Use):
    """The output's gradient is the parameter's, up to a sum over positions: biases, copies for each example."""

    def __init__(self, param: nn.Parameter, unsure: bool, *, channels: bool = False, part: int | None = None) -> None:
        super().__init__(param, unsure, part)
        self.channels = channels

    def dense(self, g: Tensor, batch: int) -> Tensor:
        if self.channels:
            return g.flatten(3).sum(-1) if g.ndim > 3 else g
        size = self.param.numel() // (3 if self.part is not None else 1)
        g = g.reshape(len(g), batch, -1, size)
        return g.squeeze(2) if g.shape[2] == 1 else g.sum(2)


class Normed(Use):
    """The scale of a normalisation layer: the gradient is the sum over positions of b times the normalised input."""

    def __init__(
        self, param: nn.Parameter | None, unsure: bool, a: Tensor, normalise: Callable[[Tensor], Tensor], kept: int
    ) -> None:
        super().__init__(param, unsure)
        self.a, self.normalise, self.kept = self.hold(a), normalise, kept

    def dense(self, g: Tensor, batch: int) -> Tensor:
        product = g * self.normalise(wide(self.a)).reshape(g.shape[1:])
        if self.kept:
            return product.reshape(len(g), batch, -1, self.param.numel()).sum(2)
        return product.flatten(3).sum(-1) if product.ndim > 3 else product


class Prelu(Use):
    """The slopes of a parametric ReLU, one for all channels or one each."""

    def __init__(self, param: nn.Parameter, unsure: bool, a: Tensor) -> None:
        super().__init__(param, unsure)
        self.a = self.hold(a)

    def dense(self, g: Tensor, batch: int) -> Tensor:
        product = g * wide(self.a).clamp(max=0)
        product = product.flatten(3).sum(-1) if product.ndim > 3 else product
        return product if self.param.numel() > 1 else product.sum(-1, keepdim=True)


class Embed(Use):
    """Rows of a table looked up by ids (batch, positions)."""

    def __init__(self, param: nn.Parameter, unsure: bool, ids: Tensor, padding: int | None) -> None:
        super().__init__(param, unsure)
        self.ids = ids
        self.padding = None if padding is None or padding < 0 else padding

    def rows(self, g: Tensor, batch: int) -> Tensor:
        """Gradients of the rows that were looked up, (K, batch, positions, features)."""
        g = g.reshape(len(g), batch, -1, g.shape[-1])
        return g if self.padding is None else g * (self.ids != self.padding).unsqueeze(-1)

    def dense(self, g: Tensor, batch: int) -> Tensor:
        rows = self.rows(g, batch)
        table = rows.new_zeros(len(g), batch, *self.param.shape)
        index = self.ids.unsqueeze(-1).expand(rows.shape)
        return table.scatter_add(2, index, rows).flatten(2)


class Factored(Use):
    """A matrix, or one for each group: the gradient is a sum over positions of outer products."""

    def factors(self, g: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Left and right factors (K or 1, batch, groups, features, positions); the left belong to the first axis."""
        raise NotImplementedError

    def dense(self, g: Tensor, batch: int) -> Tensor:
        left, right = self.factors(g, batch)
        return (left @ right.transpose(-1, -2)).flatten(2)


class Linear(Factored):
    """z = a W^T at any number of positions; ``turned``: z = a W."""

    def __init__(
        self, param: nn.Parameter | None, unsure: bool, a: Tensor, turned: bool, part: int | None = None
    ) -> None:
        super().__init__(param, unsure, part)
        self.a, self.turned = self.hold(a), turned

    def factors(self, g: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        a = wide(self.a)
        right = a.reshape(1, batch, 1, -1, a.shape[-1]).transpose(-1, -2)
        left = g.reshape(len(g), batch, 1, -1, g.shape[-1]).transpose(-1, -2)
        return (right, left) if self.turned else (left, right)


class Conv(Factored):
    """A convolution over 1 to 3 dimensions, with the patches of its input as positions; or a transposed one."""

    def __init__(
        self,
        param: nn.Parameter | None,
        unsure: bool,
        a: Tensor,
        kernel: Sequence[int],
        geometry: tuple[list[int], Any, list[int]],
        groups: int,
        transposed: bool,
    ) -> None:
        super().__init__(param, unsure)
        self.a, self.kernel, self.geometry = self.hold(a), list(kernel), geometry
        self.groups, self.transposed = groups, transposed

    @staticmethod
    def read_geometry(dims: int, stride: Any, padding: Any, dilation: Any) -> tuple[list[int], Any, list[int]]:
        """Stride, padding (numbers or a word) and dilation, one for each dimension."""
        each = [[v] * dims if isinstance(v, int) else list(v) * (dims // len(v)) for v in (stride, dilation)]
        if isinstance(padding, str):
            return each[0], padding, each[1]
        return (
            each[0],
            [padding] * dims if isinstance(padding, int) else list(padding) * (dims // len(padding)),
            each[1],
        )

    def factors(self, g: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        a, n = wide(self.a), self.groups
        k = len(g)
        if not self.transposed:
            left = g.reshape(k, batch, n, g.shape[2] // n, -1)
            patches = self.patches(a, list(g.shape[3:]))
            return left, patches.reshape(1, batch, n, -1, patches.shape[-1])
        left = a.reshape(1, batch, n, a.shape[1] // n, -1)
        patches = self.patches(g.flatten(0, 1), list(a.shape[2:]))
        return left, patches.reshape(k, batch, n, -1, patches.shape[-1])

    def patches(self, x: Tensor, grid: list[int]) -> Tensor:
        """Patches (batch, channels x kernel, positions) of x, for the positions of ``grid``."""
        stride, padding, dilation = self.geometry
        dims = len(self.kernel)
        if padding == "valid":
            padding = [0] * dims
        elif padding == "same":
            spans = [d * (k - 1) for d, k in zip(dilation, self.kernel, strict=True)]
            x = F.pad(x, [v for s in reversed(spans) for v in (s // 2, s - s // 2)])
            padding = [0] * dims
        if all(k == 1 for k in self.kernel) and not any(padding):
            for axis, (s, size) in enumerate(zip(stride, grid, strict=True), 2):
                x = x.narrow(axis, 0, s * (size - 1) + 1)
                x = x[(slice(None),) * axis + (slice(None, None, s),)] if s > 1 else x
            return x.flatten(2)
        if dims == 3 or self.transposed:
            return _windows(x, self.kernel, stride, padding, dilation, grid)
        if dims == 1:
            one = (1, dilation[0]), (0, padding[0]), (1, stride[0])
            return F.unfold(x.unsqueeze(2), (1, self.kernel[0]), *one)
        return F.unfold(x, tuple(self.kernel), tuple(dilation), tuple(padding), tuple(stride))


def _windows(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], grid: list[int]
) -> Tensor:
    """Patches in any number of dimensions, as views that are copied once."""
    x = F.pad(x, [v for p in reversed(padding) for v in (p, p)])
    for axis, (k, s, d, size) in enumerate(zip(kernel, stride, dilation, grid, strict=True), 2):
        x = x.unfold(axis, d * (k - 1) + 1, s).narrow(axis, 0, size)[..., ::d]
    dims = len(kernel)
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    x = x.permute(order)
    return x.reshape(len(x), x.shape[1] * _product(kernel), _product(grid))


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def wide(x: Tensor) -> Tensor:
    """The numbers of x in at least float32, for sums over many numbers."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def sqnorm(uses: Sequence[Use], gradients: Sequence[Tensor], batch: int) -> Tensor:
    """Squared norms (K, batch) of the gradients with respect to one parameter, or one part of it.

    Parameters
    ----------
    uses
        All uses of it.
    gradients
        For each use the gradient with respect to its output, with K in front.
    batch
        Number of examples.
    """
    gradients = [wide(g) for g in gradients]
    pairs = list(zip(uses, gradients, strict=True))
    if all(isinstance(u, Factored) for u in uses):
        factors = [u.factors(g, batch) for u, g in pairs if isinstance(u, Factored)]
        if len({left.shape[2] for left, _ in factors}) == 1:
            return _factored(factors)
    if all(isinstance(u, Embed) for u in uses):
        return _embedded([(u.ids, u.rows(g, batch)) for u, g in pairs if isinstance(u, Embed)])
    tied = _tied(pairs, batch)
    if tied is not None:
        return tied
    if all(not isinstance(u, Factored | Embed) for u in uses):
        return _square(sum(u.dense(g, batch) for u, g in pairs))
    return _by_chunks(pairs, batch)


def _square(g: Any) -> Tensor:
    return (g * g).sum(-1)


def _by_chunks(pairs: list[tuple[Use, Tensor]], batch: int) -> Tensor:
    """Uses of different kinds: make the gradients, and add them."""
    return _square(sum(u.dense(g, batch) for u, g in pairs))


def _factored(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    left, right = factors[0]
    if len(factors) > 1:
        k = max(f.shape[0] for pair in factors for f in pair)
        left, right = (
            torch.cat([f.expand(k, *f.shape[1:]) if mixed else f for f in side], -1)
            for side in zip(*factors, strict=True)
            for mixed in [len({f.shape[0] for f in side}) > 1]
        )
    positions, rows, columns = left.shape[-1], left.shape[-2], right.shape[-2]
    if positions == 1:
        return (left.square().sum((-2, -1)) * right.square().sum((-2, -1))).sum(-1)
    if positions * (rows + columns) < rows * columns:
        grams = (left.transpose(-1, -2) @ left) * (right.transpose(-1, -2) @ right)
        return grams.sum((-3, -2, -1))
    if right.shape[0] == 1:
        return _direct(left, right)
    if left.shape[0] == 1:
        return _direct(right, left)
    return (left @ right.transpose(-1, -2)).square().sum((-3, -2, -1))


def _direct(many: Tensor, one: Tensor) -> Tensor:
    """Make the gradients of a few examples at a time; the K gradients of one example share its other factor."""
    k, batch, groups, rows, positions = many.shape
    columns = one.shape[-2]
    many = many.permute(1, 2, 0, 3, 4).reshape(batch, groups, k * rows, positions)
    other = one[0].transpose(-1, -2)
    step = max(1, _CHUNK // (k * groups * rows * columns))
    parts = []
    for i in range(0, batch, step):
        g = many[i : i + step] @ other[i : i + step]
        g = g.reshape(len(g), groups, k, rows * columns)
        parts.append((g * g).sum((1, 3)))
    return torch.cat(parts).T if len(parts) > 1 else parts[0].T


def _embedded(looked_up: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum the rows of equal ids within each example, and square: no table is made."""
    ids = torch.cat([i for i, _ in looked_up], 1)
    rows = torch.cat([r for _, r in looked_up], 2)
    batch, positions = ids.shape
    if positions == 1:
        return rows.square().sum((-2, -1))
    if positions <= 32:
        same = (ids.unsqueeze(1) == ids.unsqueeze(2)).to(rows.dtype)
        return ((rows @ rows.transpose(-1, -2)) * same).sum((-2, -1))
    key = ids + torch.arange(batch, device=ids.device).unsqueeze(1) * (ids.max() + 1)
    found, place = key.unique(return_inverse=True)
    sums = rows.new_zeros(len(rows), len(found), rows.shape[-1])
    sums = sums.index_add(1, place.flatten(), rows.flatten(1, 2))
    owner = torch.empty_like(found).index_copy(
        0, place.flatten(), torch.arange(batch, device=ids.device).repeat_interleave(positions)
    )
    return rows.new_zeros(len(rows), batch).index_add(1, owner, _square(sums))


def _tied(pairs: list[tuple[Use, Tensor]], batch: int) -> Tensor | None:
    """A table that is also the matrix of the last layer, as in language models."""
    tables = [(u, g) for u, g in pairs if isinstance(u, Embed)]
    matrices = [(u, g) for u, g in pairs if isinstance(u, Linear)]
    if not tables or len(tables) + len(matrices) != len(pairs):
        return None
    looked_up = [(u.ids, u.rows(g, batch)) for u, g in tables]
    factors = [u.factors(g, batch) for u, g in matrices]
    ids = torch.cat([i for i, _ in looked_up], 1)
    rows = torch.cat([r for _, r in looked_up], 2)
    total = _embedded(looked_up) + _factored(factors)
    for left, right in factors:  # 2 sum_ts left_s[id_t] (row_t . right_s)
        at = left.squeeze(2).gather(2, ids.unsqueeze(-1).expand(len(left), -1, -1, left.shape[-1]))
        total = total + 2 * (at * (rows @ right.squeeze(2))).sum((-2, -1))
    return total
