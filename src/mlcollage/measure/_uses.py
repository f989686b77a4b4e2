r"""Squared norms of the gradients of single examples, made of layers' inputs and output gradients.

For :math:`z_t = W a_t` at positions t = 1..T, with :math:`b_t = \partial \ell_i / \partial z_t`, the gradient of
example i is :math:`G_i = \sum_t b_t a_t^\top`, and

.. math:: \|G_i\|^2 = \sum_{t, s} (b_t \cdot b_s)(a_t \cdot a_s)

without making :math:`G_i`, for :math:`T^2 (d_{in} + d_{out})` operations; making it costs :math:`T d_{in} d_{out}`. The
cheaper one is taken for each layer. A weight used several times is a layer with the positions of all uses, so the terms
across uses are exact. (Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679, section 4; Bu et al. 2022,
arXiv:2205.10683.)

Shapes, in comments too: K different losses of the same batch come first, then the examples. T positions are all those
at which a layer treats an example's input alike: tokens, pixels, or the single one of a dense layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from mlcollage.errors import InvalidInput
from mlcollage.measure._examples import Layout
from mlcollage.nn._parts import wide

__all__ = ["Conv", "Dense", "Embed", "Linear", "Normed", "Prelu", "Use", "sqnorm", "square_sum", "wide"]

_CACHE = 2**19  # numbers made at once on a CPU, few enough for its cache
_MEMORY = 2**26  # and on other devices


class Use:
    """One use of a parameter: by what, on which input, and where in the graph its output's gradient is found.

    ``options`` are the layouts that the sizes allow, ``layout`` the one that is true.
    """

    edge: GradientEdge
    shape: tuple[int, ...]  # of the output
    dtype: torch.dtype

    def __init__(self, param: nn.Parameter | None, options: Sequence[Layout], part: int | None = None) -> None:
        self.owner, self.options, self.part = param, tuple(options), part
        self.layout = self.options[0]
        self.inputs: list[tuple[Tensor, int]] = []

    @property
    def a(self) -> Tensor:
        """The input, (batch, ...)."""
        return self.layout(self.inputs[0][0])

    @property
    def param(self) -> nn.Parameter:
        """The parameter, or its third called ``part``."""
        assert self.owner is not None
        return self.owner

    def hold(self, a: Tensor) -> None:
        """Keep the input, with the number of times it has been written to."""
        self.inputs.append((a, a._version))

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

    def __init__(
        self, param: nn.Parameter, options: Sequence[Layout], *, channels: bool = False, part: int | None = None
    ) -> None:
        super().__init__(param, options, part)
        self.channels = channels

    def dense(self, g: Tensor, batch: int) -> Tensor:
        if self.channels:
            return _over_positions(g)
        size = self.param.numel() // (3 if self.part is not None else 1)
        g = g.reshape(len(g), batch, -1, size)  # (K, batch, T, size)
        return g.squeeze(2) if g.shape[2] == 1 else g.sum(2)  # a sum would copy


class Normed(Use):
    """The scale of a normalization layer: the gradient is the sum over positions of b times the normalized input."""

    def __init__(
        self,
        param: nn.Parameter | None,
        options: Sequence[Layout],
        a: Tensor,
        normalize: Callable[[Tensor], Tensor],
        kept: int,
    ) -> None:
        super().__init__(param, options)
        self.hold(a)
        self.normalize, self.kept = normalize, kept

    def dense(self, g: Tensor, batch: int) -> Tensor:
        a = self.a
        # A few examples at a time, so that the products stay in the cache.
        step = max(1, (_CACHE if g.device.type == "cpu" else _MEMORY) // (g[:, 0].numel() or 1))
        parts = [self._some(g[:, i : i + step], a[i : i + step]) for i in range(0, batch, step)]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _some(self, g: Tensor, a: Tensor) -> Tensor:
        product = g * self.normalize(wide(a))
        if self.kept:  # the scale has the trailing dimensions: (K, batch, T, size)
            return product.reshape(len(g), len(a), -1, self.param.numel()).sum(2)
        return _over_positions(product)  # the scale has the channels


class Prelu(Use):
    """The slopes of a parametric ReLU, one for all channels or one each."""

    def __init__(self, param: nn.Parameter | None, options: Sequence[Layout], a: Tensor) -> None:
        super().__init__(param, options)
        self.hold(a)

    def dense(self, g: Tensor, batch: int) -> Tensor:
        product = _over_positions(g * wide(self.a).clamp(max=0))  # z = a for a > 0, else slope times a
        return product if self.param.numel() > 1 else product.sum(-1, keepdim=True)


class Embed(Use):
    """Rows of a table looked up by ids (batch, positions)."""

    def __init__(self, param: nn.Parameter, options: Sequence[Layout], ids: Tensor, padding: int | None) -> None:
        super().__init__(param, options)
        self.hold(ids)
        self.padding = None if padding is None or padding < 0 else padding

    @property
    def ids(self) -> Tensor:
        """(batch, positions)."""
        ids = self.a
        return ids.reshape(len(ids), -1)

    def rows(self, g: Tensor, batch: int) -> Tensor:
        """Gradients of the rows that were looked up, (K, batch, positions, features)."""
        g = g.reshape(len(g), batch, -1, g.shape[-1])
        return g if self.padding is None else g * (self.ids != self.padding).unsqueeze(-1)

    def dense(self, g: Tensor, batch: int) -> Tensor:
        rows = self.rows(g, batch)
        table = rows.new_zeros(len(g), batch, *self.param.shape)  # (K, batch, rows, features)
        index = self.ids.unsqueeze(-1).expand(rows.shape)
        return table.scatter_add(2, index, rows).flatten(2)


class Factored(Use):
    """A matrix, or one for each group: the gradient is a sum over positions of outer products."""

    def factors(self, g: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Left and right factors (K or 1, rows, groups, features, positions); the left belong to the first axis.

        ``rows`` are the examples asked for; g, (K, rows, ...), has them only.
        """
        raise NotImplementedError

    def sizes(self, g: Tensor) -> tuple[int, int, int, int]:
        """Positions, groups, features of the left factor and of the right."""
        raise NotImplementedError

    def quick(self, g: Tensor) -> bool:
        """Is :meth:`gradient` faster than a product of the factors?"""
        return False

    def gradient(self, g: Tensor, rows: slice) -> Tensor:
        """The gradients themselves, (K, rows, groups, left features, right features)."""
        left, right = self.factors(g, rows)
        return left @ right.transpose(-1, -2)  # sum over positions of left_t right_t^T

    def dense(self, g: Tensor, batch: int) -> Tensor:
        return self.gradient(g, slice(None)).flatten(2)


class Linear(Factored):
    """z = a W^T at any number of positions; ``turned``: z = a W."""

    def __init__(
        self, param: nn.Parameter | None, options: Sequence[Layout], a: Tensor, turned: bool, part: int | None = None
    ) -> None:
        super().__init__(param, options, part)
        self.hold(a)
        self.turned = turned

    def factors(self, g: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        a = wide(self.a[rows])
        # (1, rows, 1 group, T, features) turned to (1, rows, 1, features, T); the same input for all K losses
        right = a.reshape(1, len(a), 1, -1, a.shape[-1]).transpose(-1, -2)
        left = g.reshape(len(g), len(a), 1, -1, g.shape[-1]).transpose(-1, -2)
        return (right, left) if self.turned else (left, right)

    def sizes(self, g: Tensor) -> tuple[int, int, int, int]:
        positions = math.prod(self.a.shape[1:-1])
        left, right = g.shape[-1], self.a.shape[-1]
        return (positions, 1, right, left) if self.turned else (positions, 1, left, right)


class Conv(Factored):
    """A convolution over 1 to 3 dimensions, with the patches of its input as positions; or a transposed one."""

    def __init__(
        self,
        param: nn.Parameter | None,
        options: Sequence[Layout],
        a: Tensor,
        kernel: Sequence[int],
        geometry: tuple[list[int], list[int] | str, list[int]],
        groups: int,
        transposed: bool,
    ) -> None:
        super().__init__(param, options)
        self.hold(a)
        self.kernel = list(kernel)
        self.stride, self.padding, self.dilation = geometry
        self.groups, self.transposed = groups, transposed

    @staticmethod
    def geometry(dims: int, stride: Any, padding: Any, dilation: Any) -> tuple[list[int], list[int] | str, list[int]]:
        """Stride, padding (numbers or a word) and dilation, one for each dimension."""

        def each(value: Any) -> list[int]:
            return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))

        if padding == "valid":
            padding = 0
        return each(stride), padding if isinstance(padding, str) else each(padding), each(dilation)

    def factors(self, g: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        a, n, k = wide(self.a[rows]), self.groups, len(g)
        if not self.transposed:
            # g (K, rows, out, *grid) as (K, rows, groups, out / groups, T); patches of a for each place of the grid
            left = g.reshape(k, len(a), n, g.shape[2] // n, -1)
            patches = self._patches(a, g.shape[3:])
            return left, patches.reshape(1, len(a), n, -1, patches.shape[-1])
        # A transposed convolution spreads each input over a patch of the output: the roles of a and g are swapped.
        left = a.reshape(1, len(a), n, a.shape[1] // n, -1)
        patches = self._patches(g.flatten(0, 1), a.shape[2:])
        return left, patches.reshape(k, len(a), n, -1, patches.shape[-1])

    def sizes(self, g: Tensor) -> tuple[int, int, int, int]:
        into, out = self.a.shape[1] // self.groups, g.shape[2] // self.groups
        size = math.prod(self.kernel)
        if self.transposed:
            return math.prod(self.a.shape[2:]), self.groups, into, out * size
        return math.prod(g.shape[3:]), self.groups, out, into * size

    def quick(self, g: Tensor) -> bool:
        """Two dimensions on a CPU, with channels that fill oneDNN's blocks of eight."""
        # Elsewhere the product of the factors is faster.
        channels = self.a.shape[1] // self.groups % 8 == 0 == g.shape[2] // self.groups % 8
        plain = len(self.kernel) == 2 and not self.transposed and not isinstance(self.padding, str)
        cpu = g.device.type == "cpu" and g.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        return channels and plain and cpu

    def gradient(self, g: Tensor, rows: slice) -> Tensor:
        """Where it is quick, every example is a group of one large convolution, and this its weight gradient."""
        if not self.quick(g):
            return super().gradient(g, rows)
        a = wide(self.a[rows])
        many, groups = len(a), len(a) * self.groups
        into, out = a.shape[1] // self.groups, g.shape[2] // self.groups
        shape = groups * out, into, *self.kernel
        weight = g.new_empty(shape)  # its shape is all that is needed of it
        # Not transposed, no output padding; of the gradients for input, weight and bias only that of the weight.
        options = self.stride, self.padding, self.dilation, False, [0, 0], groups, [False, True, False]
        # One image (1, rows x channels, height, width): examples side by side as groups of channels.
        flat = a.reshape(1, -1, *a.shape[2:])
        found = [
            torch.ops.aten.convolution_backward(one.reshape(1, -1, *one.shape[2:]), flat, weight, None, *options)[1]
            for one in g
        ]
        return torch.stack(found).reshape(len(g), many, self.groups, out, -1)  # (K, rows, groups, out, in x kernel)

    def _patches(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Patches (batch, channels x kernel, positions) of x, for the positions of ``grid``."""
        if isinstance(self.padding, str):  # "same": the output has the input's size
            spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            pads = [(s // 2, s - s // 2) for s in spans]
        else:
            pads = [(p, p) for p in self.padding]
        if any(any(p) for p in pads):
            x = F.pad(x, [v for p in reversed(pads) for v in p])  # F.pad starts from the last dimension
        # Each dimension of space becomes two, its places on the grid and, at the end, the kernel's offsets there.
        steps = zip(self.kernel, self.stride, self.dilation, grid, strict=True)
        for axis, (k, s, d, size) in enumerate(steps, 2):  # views; one copy at the end
            # Windows of the dilated kernel's length; narrowed, since a transposed grid may end before the last window.
            x = x.unfold(axis, d * (k - 1) + 1, s).narrow(axis, 0, size)[..., ::d]
        dims = len(self.kernel)
        # From (batch, channels, *grid, *kernel) to (batch, channels, *kernel, *grid).
        x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
        return x.reshape(len(x), x.shape[1] * math.prod(self.kernel), math.prod(grid))


def sqnorm(pairs: Sequence[tuple[Use, Tensor]], batch: int, squares: dict[int, Tensor]) -> Tensor:
    """Squared norms (K, batch) of the gradients with respect to one parameter, or one part of it.

    Parameters
    ----------
    pairs
        All uses of it, each with the gradient with respect to its output, (K, batch, ...), in at least float32.
    batch
        Number of examples.
    squares
        Squared norms of the rows of gradients (K, batch, features), by id: a layer's weight and bias share them.
    """
    use, g = pairs[0]
    if len(pairs) == 1 and g.ndim == 3 and g.shape[1] == batch:  # one position: |b a^T|^2 = |b|^2 |a|^2
        if isinstance(use, Linear) and use.a.ndim == 2:
            return _rows(g, squares) * square_sum(wide(use.a))
        if isinstance(use, Dense):
            return _rows(g, squares)
    if all(isinstance(u, Factored) for u, _ in pairs):
        factored = [(u, v) for u, v in pairs if isinstance(u, Factored)]
        if len({u.sizes(v)[1:] for u, v in factored}) == 1:  # not so for a weight used as W and as W^T
            return _factored(factored, batch)
    if all(isinstance(u, Embed) for u, _ in pairs):
        return _embedded([(u.ids, u.rows(v, batch)) for u, v in pairs if isinstance(u, Embed)])
    tied = _tied(pairs, batch)
    if tied is not None:
        return tied
    total: Any = sum(u.dense(v, batch) for u, v in pairs)
    return square_sum(total)


def square_sum(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Sum of squares, in one pass where no second derivative is wanted."""
    return (x * x).sum(dim) if x.requires_grad else torch.linalg.vector_norm(x, dim=dim).square_()


def _rows(g: Tensor, squares: dict[int, Tensor]) -> Tensor:
    if id(g) not in squares:
        squares[id(g)] = square_sum(g)
    return squares[id(g)]


def _over_positions(g: Tensor) -> Tensor:
    """Sum (K, batch, channels, *positions) over all positions."""
    return g.flatten(3).sum(-1) if g.ndim > 3 else g


def _factored(pairs: list[tuple[Factored, Tensor]], batch: int) -> Tensor:
    """The cheaper contraction, for a few examples at a time, so that what is made for them stays in the cache."""
    k = len(pairs[0][1])
    sizes = [u.sizes(g) for u, g in pairs]
    _, groups, rows, columns = sizes[0]  # the gradient is (groups, rows, columns) for all uses
    positions = sum(size[0] for size in sizes)
    # Gram matrices of the positions, or the gradients themselves: whichever takes fewer operations.
    outer = positions * (rows + columns) < rows * columns
    quick = len(pairs) == 1 and not outer and pairs[0][0].quick(pairs[0][1])
    # Numbers made for one example and group; K gradients usually share one factor, whose Gram matrix is made once.
    made = positions**2 * (k + 1) if outer else k * rows * columns
    each = groups * (made if quick else made + positions * (rows + columns) * k)
    cache = _CACHE if pairs[0][1].device.type == "cpu" else _MEMORY
    step = max(1, cache // each)
    parts = []
    for start in range(0, batch, step):
        some = slice(start, start + step)
        own = [(u, g[:, some]) for u, g in pairs]
        if quick:
            parts.append(square_sum(own[0][0].gradient(own[0][1], some).flatten(2)))
            continue
        left, right = _joined([u.factors(g, some) for u, g in own])
        if positions == 1:  # |b a^T|^2 = |b|^2 |a|^2
            parts.append((square_sum(left, (-2, -1)) * square_sum(right, (-2, -1))).sum(-1))
        elif outer:
            # (K, some, groups, T, T): (b_t . b_s)(a_t . a_s), summed over groups and pairs of positions
            grams = (left.transpose(-1, -2) @ left) * (right.transpose(-1, -2) @ right)
            parts.append(grams.sum((-3, -2, -1)))
        else:
            parts.append(_direct(left, right))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _joined(factors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The positions of all uses behind each other."""
    if len(factors) == 1:
        return factors[0]
    k = max(len(f) for pair in factors for f in pair)  # factors that the K losses share are 1 long there
    left, right = (
        torch.cat([f.expand(k, *f.shape[1:]) if len({len(f) for f in side}) > 1 else f for f in side], -1)
        for side in zip(*factors, strict=True)
    )
    return left, right


def _direct(left: Tensor, right: Tensor) -> Tensor:
    """Make the gradients; the K of one example share a factor, if one of the two has no K."""
    if len(left) == 1 and len(right) > 1:
        left, right = right, left
    if len(right) > 1:
        return square_sum((left @ right.transpose(-1, -2)).flatten(2))
    # left (K, batch, groups, rows, T) and right (1, batch, groups, columns, T): for each example and group one product
    # of K x rows by columns, instead of K products.
    k, batch, groups, rows, positions = left.shape
    many = left.permute(1, 2, 0, 3, 4).reshape(batch * groups, k * rows, positions)
    made = torch.bmm(many, right[0].flatten(0, 1).transpose(-1, -2))  # (batch x groups, K x rows, columns)
    return square_sum(made.reshape(batch, groups, k, -1), (1, 3) if groups > 1 else -1).reshape(batch, k).T


def _embedded(looked_up: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum the rows of equal ids within each example, and square: no table is made."""
    ids = torch.cat([i for i, _ in looked_up], 1)  # (batch, T)
    rows = torch.cat([r for _, r in looked_up], 2)  # (K, batch, T, features)
    batch, positions = ids.shape
    if positions == 1:
        return square_sum(rows, (-2, -1))
    if positions <= 32:  # sum over t, s with equal ids of row_t . row_s
        same = (ids.unsqueeze(1) == ids.unsqueeze(2)).to(rows.dtype)
        return ((rows @ rows.transpose(-1, -2)) * same).sum((-2, -1))
    # Number the pairs of example and id that occur, and add up the rows of each.
    key = ids + torch.arange(batch, device=ids.device).unsqueeze(1) * (ids.max() + 1)
    found, place = key.unique(return_inverse=True)
    sums = rows.new_zeros(len(rows), len(found), rows.shape[-1])  # (K, pairs, features)
    sums = sums.index_add(1, place.flatten(), rows.flatten(1, 2))
    # The example that each pair belongs to, (pairs,).
    owner = torch.empty_like(found).index_copy(
        0, place.flatten(), torch.arange(batch, device=ids.device).repeat_interleave(positions)
    )
    return rows.new_zeros(len(rows), batch).index_add(1, owner, square_sum(sums))


def _tied(pairs: Sequence[tuple[Use, Tensor]], batch: int) -> Tensor | None:
    """A table that is also the matrix of the last layer, as in language models."""
    tables = [(u, g) for u, g in pairs if isinstance(u, Embed)]
    matrices = [(u, g) for u, g in pairs if isinstance(u, Linear)]
    if not tables or len(tables) + len(matrices) != len(pairs):
        return None
    looked_up = [(u.ids, u.rows(g, batch)) for u, g in tables]
    ids = torch.cat([i for i, _ in looked_up], 1)
    rows = torch.cat([r for _, r in looked_up], 2)
    # |E + G|^2 = |E|^2 + |G|^2 + 2 <E, G>; E has row_t in row id_t, and G = sum_s left_s right_s^T, so the last term
    # is 2 sum_ts left_s[id_t] (row_t . right_s), without a table.
    total = _embedded(looked_up) + _factored([(u, g) for u, g in matrices], batch)
    for left, right in (u.factors(g, slice(None)) for u, g in matrices):
        # left (K or 1, batch, 1, rows of the table, S) read at the ids of each example: (K or 1, batch, T, S)
        at = left.squeeze(2).gather(2, ids.unsqueeze(-1).expand(len(left), -1, -1, left.shape[-1]))
        total = total + 2 * (at * (rows @ right.squeeze(2))).sum((-2, -1))  # over t and s
    return total
