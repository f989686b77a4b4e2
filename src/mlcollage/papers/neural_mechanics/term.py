"""The part of one parameter that takes part in a family of laws, and how its entries are summed by law."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mlcollage.errors import InvalidInput

Kind = Literal["translation", "scale", "rescale", "matrix"]
KINDS: tuple[Kind, ...] = ("translation", "scale", "rescale", "matrix")


@dataclass(frozen=True)
class Term:
    """The part of one parameter that takes part in a family of laws, and how its entries are shared out among them.

    The parameter is cut (`rows`, `columns`), reshaped to `view`, and summed over every axis that is not kept. The kept
    axes, flattened in order, index the laws; `laws` renames them where that index is not the law's own.

    Parameters
    ----------
    parameter
        Name as in ``model.named_parameters()``.
    sign
        Weight of these entries: the exponent of α for scale and rescale (a whole number), the coefficient of the shift
        for translation, +1 (acts by M) or -1 (acts by the inverse transpose) for matrix laws.
    view
        Shape to read the cut parameter in, for example ``(out, C, H * W)`` for a linear layer after a flatten. None:
        as it is.
    keep
        Axis, or axes, of the view whose index tells the law. None: all entries belong to one law.
    rows, columns
        Half-open range of the parameter's axis 0, and of its axis 1, that takes part (packed projections).
    laws
        The law of each kept index; -1 leaves an index out. None: index k belongs to law k.
    gram
        For matrix laws: the axis of the view that carries the d×d matrix.

    Examples
    --------
    >>> import torch
    >>> columns = Term("weight", sign=-1, view=(2, 3, 4), keep=1)  # a Linear(12, 2) after 3 channels of 4 pixels
    >>> columns.bilinear(torch.ones(2, 12), torch.ones(2, 12), 3).tolist()
    [-8.0, -8.0, -8.0]
    """

    parameter: str
    sign: float = 1
    view: tuple[int, ...] | None = None
    keep: int | tuple[int, ...] | None = None
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    laws: tuple[int, ...] | None = None
    gram: int | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """The kept axes as a tuple."""
        if self.keep is None:
            return ()
        return (self.keep,) if isinstance(self.keep, int) else tuple(self.keep)

    @property
    def reduction(self) -> tuple[object, ...]:
        """What is summed, without sign and law names: terms that agree in it share one pass over the parameter."""
        return self.rows, self.columns, self.view, self.kept, self.gram

    def cut(self, tensor: Tensor) -> Tensor:
        """The rows and columns of `tensor` that take part, as a view of it."""
        for axis, span in enumerate((self.rows, self.columns)):
            if span is not None:
                tensor = tensor.narrow(axis, span[0], span[1] - span[0])
        return tensor

    def block(self, tensor: Tensor) -> Tensor:
        """The cut of `tensor` in the term's view."""
        piece = self.cut(tensor)
        return piece if self.view is None else piece.reshape(self.view)

    def summed(self, dims: int) -> tuple[int, ...]:
        """The axes of a block of so many that are summed over."""
        return tuple(axis for axis in range(dims) if axis not in self.kept)

    def sums(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """Unsigned sums of a, or of a·b, by kept index, (kept,) in float64; a bᵀ, (kept, d, d), for a matrix term."""
        x = self.block(a.detach()).to(torch.float64)
        if b is not None:
            y = x if b is a else self.block(b.detach()).to(torch.float64)
            if self.gram is not None:
                return self._folded(x) @ self._folded(y).transpose(-1, -2)
            x = x * y
        axes = self.summed(x.dim())
        return (x.sum(axes) if axes else x).reshape(-1)

    def to_laws(self, sums: Tensor, n_laws: int) -> Tensor:
        """Sums by kept index, (kept, ...), turned into sums by law, (n_laws, ...); the sign is not applied."""
        if self.laws is None:
            return sums
        index = torch.tensor(self.laws, device=sums.device)
        used = index >= 0
        return sums.new_zeros((n_laws, *sums.shape[1:])).index_add_(0, index[used], sums[used])

    def linear(self, a: Tensor, n_laws: int) -> Tensor:
        """Signed sums of the entries of `a` by law: (n_laws,), float64."""
        return self.sign * self.to_laws(self.sums(a), n_laws)

    def bilinear(self, a: Tensor, b: Tensor, n_laws: int) -> Tensor:
        """Signed sums of the products a·b by law: (n_laws,), or (blocks, d, d) for a matrix term; float64."""
        return self.sign * self.to_laws(self.sums(a, b), n_laws)

    def act(self, kind: Kind, tensor: Tensor, alpha: Tensor) -> Tensor:
        """The finite action of parameter `alpha` on this term's entries of `tensor`; returns a new tensor.

        `alpha` is (n_laws,), or (blocks, d, d) for a matrix law.
        """
        out = tensor.detach().clone()
        piece = self.cut(out)
        block = self.block(out).to(torch.float64)
        if kind == "matrix":
            moved = self._act_matrix(block, alpha.to(block))
        else:
            neutral = 0.0 if kind == "translation" else 1.0  # what an entry of no law is shifted, or multiplied, by
            strength = self._by_index(alpha.to(block), torch.full((), neutral).to(block))
            # one number per kept index, broadcast over the axes that are summed
            strength = strength.reshape([n if axis in self.kept else 1 for axis, n in enumerate(block.shape)])
            moved = block + self.sign * strength if kind == "translation" else block * strength**self.sign
        piece.copy_(moved.reshape(piece.shape))
        return out

    def _act_matrix(self, block: Tensor, matrices: Tensor) -> Tensor:
        if self.sign < 0:
            matrices = torch.linalg.inv(matrices).transpose(-1, -2)
        matrices = self._by_index(matrices, torch.eye(matrices.shape[-1]).to(matrices))  # (kept, d, d)
        order = self._gram_order(block.dim())
        shape = [block.shape[axis] for axis in order]
        moved = (matrices @ self._folded(block)).reshape(shape)
        return moved.permute([order.index(axis) for axis in range(block.dim())])

    def _by_index(self, by_law: Tensor, neutral: Tensor) -> Tensor:
        """Values by law, (n_laws, ...), as values by kept index, (kept, ...); left-out indices get `neutral`."""
        if self.laws is None:
            return by_law
        index = torch.tensor(self.laws, device=by_law.device)
        used = (index >= 0).reshape(-1, *[1] * (by_law.dim() - 1))
        return torch.where(used, by_law[index.clamp(min=0)], neutral)

    def _gram_order(self, dims: int) -> list[int]:
        """Axes of the view in the order kept, gram, summed."""
        if self.gram is None:
            raise InvalidInput(f"the matrix law of {self.parameter} needs the axis `gram` that carries its matrix.")
        return [*self.kept, self.gram, *(axis for axis in self.summed(dims) if axis != self.gram)]

    def _folded(self, block: Tensor) -> Tensor:
        """The block as (kept, d, summed)."""
        flat = block.permute(self._gram_order(block.dim()))
        n_kept = len(self.kept)
        return flat.reshape(math.prod(flat.shape[:n_kept]), flat.shape[n_kept], -1)


def as_keep(axes: Iterable[int]) -> int | tuple[int, ...] | None:
    """Kept axes in their plainest form: None for none, a number for one."""
    kept = tuple(axes)
    return kept[0] if len(kept) == 1 else kept or None


def check_parameter(name: str, value: Tensor) -> None:
    """Refuse a parameter that has no laws of these kinds.

    Raises
    ------
    InvalidInput
        If it is lazy, complex, quantized or sparse.
    """
    if isinstance(value, nn.parameter.UninitializedParameter):
        raise InvalidInput(f"the parameter {name!r} is lazy; run one batch through the model first.")
    if value.is_complex():
        raise InvalidInput(f"the parameter {name!r} is complex; only real parameters have these laws.")
    if value.is_quantized or not value.is_floating_point():
        raise InvalidInput(f"the parameter {name!r} is quantized ({value.dtype}); pass the model before quantization.")
    if value.layout != torch.strided:
        raise InvalidInput(f"the parameter {name!r} is sparse ({value.layout}); make it dense first.")
