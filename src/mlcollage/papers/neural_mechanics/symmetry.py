"""Symmetries of a network's loss and what each of them conserves: the data structures everything else stands on.

A symmetry is a family of laws of one kind over named parameters. With A the index set of one law
(Kunin et al. 2021, section 3; the matrix law is derived in section 4 of this paper's page):

===========  =============================================  ==================================  =======================
kind         finite action                                  gradient constraint                 conserved under flow
===========  =============================================  ==================================  =======================
translation  :math:`θ_A → θ_A + α w_A`                      :math:`⟨g, w_A⟩ = 0`                :math:`⟨θ, w_A⟩`
scale        :math:`θ_A → α θ_A`                            :math:`⟨g_A, θ_A⟩ = 0`              :math:`‖θ_A‖²`
rescale      :math:`θ_{A_1} → αθ_{A_1}`,                    :math:`⟨g_{A_1}, θ_{A_1}⟩ =         :math:`‖θ_{A_1}‖² -
             :math:`θ_{A_2} → θ_{A_2}/α`                    ⟨g_{A_2}, θ_{A_2}⟩`                 ‖θ_{A_2}‖²`
matrix       :math:`U → MU, V → M^{-⊤}V`                    :math:`G_U U^⊤ = V G_V^⊤`           :math:`UU^⊤ - VV^⊤`
===========  =============================================  ==================================  =======================

All sums are accumulated in float64: after one step of SGD a conserved quantity has moved by about 1e-4 of itself, which
leaves three digits in float32.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.papers.neural_mechanics._reduce import Plan

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Kind", "Symmetry", "SymmetrySet", "Term", "named_tensors", "typical_size"]

Kind = Literal["translation", "scale", "rescale", "matrix"]
Tensors = Mapping[str, "Tensor | None"]
KINDS: tuple[str, ...] = ("translation", "scale", "rescale", "matrix")


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
        Integer weight of these entries: the exponent of α for scale and rescale, the coefficient of the shift for
        translation, +1 (acts by M) or -1 (acts by the inverse transpose) for matrix laws.
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
    sign: int = 1
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
    def reduction(self) -> tuple[Any, ...]:
        """What is summed, without sign and law names: terms that agree in it share one pass over the parameter."""
        return self.rows, self.columns, self.view, self.kept, self.gram

    def cut(self, tensor: Tensor) -> Tensor:
        """The rows and columns of `tensor` that take part, as a view of it."""
        if self.rows is not None:
            tensor = tensor.narrow(0, self.rows[0], self.rows[1] - self.rows[0])
        if self.columns is not None:
            tensor = tensor.narrow(1, self.columns[0], self.columns[1] - self.columns[0])
        return tensor

    def block(self, tensor: Tensor) -> Tensor:
        """The cut of `tensor` in the term's view."""
        piece = self.cut(tensor)
        return piece if self.view is None else piece.reshape(self.view)

    def to_laws(self, reduced: Tensor, n_laws: int) -> Tensor:
        """Sums by kept index, (kept, ...), turned into sums by law, (n_laws, ...); the sign is not applied."""
        if self.laws is None:
            return reduced
        index = torch.tensor(self.laws, device=reduced.device)
        used = index >= 0
        out = reduced.new_zeros((n_laws, *reduced.shape[1:]))
        return out.index_add_(0, index[used], reduced[used])

    def linear(self, a: Tensor, n_laws: int) -> Tensor:
        """Signed sums of the entries of `a` by law: (n_laws,), float64."""
        return self.sign * self.to_laws(reduce_sum(self, a), n_laws)

    def bilinear(self, a: Tensor, b: Tensor, n_laws: int) -> Tensor:
        """Signed sums of the products a·b by law: (n_laws,), or (blocks, d, d) for a matrix term; float64."""
        return self.sign * self.to_laws(reduce_product(self, a, b), n_laws)

    def spread(self, alpha: Tensor, tensor: Tensor, neutral: float) -> Tensor:
        """`alpha` (n_laws,) by law, broadcast against ``block(tensor)``; left-out entries get `neutral`."""
        shape = self.block(tensor).shape
        kept = self.kept
        if self.laws is not None:
            index = torch.tensor(self.laws, device=alpha.device)
            alpha = torch.where(index >= 0, alpha[index.clamp(min=0)], torch.full((), neutral).to(alpha))
        return alpha.reshape([size if axis in kept else 1 for axis, size in enumerate(shape)])

    def act(self, kind: Kind, tensor: Tensor, alpha: Tensor) -> Tensor:
        """The finite action of parameter `alpha` on this term's entries of `tensor`; returns a new tensor."""
        out = tensor.detach().clone()
        piece = self.cut(out)
        block = self.block(out).to(torch.float64)
        alpha = alpha.to(block)
        if kind == "matrix":
            moved = self._act_matrix(block, alpha)
        elif kind == "translation":
            moved = block + self.sign * self.spread(alpha, tensor, 0.0)
        else:
            moved = block * self.spread(alpha, tensor, 1.0) ** self.sign
        piece.copy_(moved.reshape(piece.shape))
        return out

    def _act_matrix(self, block: Tensor, matrices: Tensor) -> Tensor:
        order = _gram_order(self, block.dim())
        flat = block.permute(order)
        shape = flat.shape
        if self.sign < 0:
            matrices = torch.linalg.inv(matrices).transpose(-1, -2)
        if self.laws is not None:  # left-out blocks stay as they are
            index = torch.tensor(self.laws, device=block.device)
            eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=block.device)
            matrices = torch.where((index >= 0)[:, None, None], matrices[index.clamp(min=0)], eye)
        n_kept = len(self.kept)
        folded = flat.reshape(math.prod(shape[:n_kept]), shape[n_kept], -1)
        moved = (matrices @ folded).reshape(shape)
        return moved.permute([order.index(axis) for axis in range(block.dim())])


def _gram_order(term: Term, dims: int) -> list[int]:
    """Axes of the view in the order kept, gram, summed."""
    if term.gram is None:
        raise InvalidInput(f"the matrix law of {term.parameter} needs the axis `gram` that carries its matrix")
    rest = [axis for axis in range(dims) if axis not in term.kept and axis != term.gram]
    return [*term.kept, term.gram, *rest]


def _summed_axes(term: Term, dims: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(dims) if axis not in term.kept)


def reduce_sum(term: Term, a: Tensor) -> Tensor:
    """Unsigned sums of the entries of `a` by kept index, (kept,) in float64."""
    block = term.block(a.detach())
    axes = _summed_axes(term, block.dim())
    return (block.sum(axes, dtype=torch.float64) if axes else block.to(torch.float64)).reshape(-1)


def reduce_product(term: Term, a: Tensor, b: Tensor) -> Tensor:
    """Unsigned sums of a·b by kept index, (kept,) in float64; (kept, d, d), unsymmetrized a bᵀ, for a matrix term."""
    x = term.block(a.detach()).to(torch.float64)
    y = x if b is a else term.block(b.detach()).to(torch.float64)
    if term.gram is None:
        axes = _summed_axes(term, x.dim())
        return ((x * y).sum(axes) if axes else x * y).reshape(-1)
    order = _gram_order(term, x.dim())
    shape = [x.shape[axis] for axis in order]
    fold = (math.prod(shape[: len(term.kept)]), shape[len(term.kept)], -1)
    return x.permute(order).reshape(fold) @ y.permute(order).reshape(fold).transpose(-1, -2)


@dataclass(frozen=True, eq=False)
class Symmetry:
    r"""A family of laws of one kind, for example one per channel of a layer, evaluated together.

    Parameters
    ----------
    kind
        ``translation``, ``scale``, ``rescale`` or ``matrix``.
    name
        Unique within a :class:`SymmetrySet`, for example ``"rescale:conv1->conv2"``.
    terms
        The parts of parameters that act together.
    n_laws
        Number of conserved numbers. For matrix laws with B blocks of size d: B d (d + 1) / 2.
    size
        d for matrix laws, None otherwise.
    residual
        Largest relative error of the gradient constraint seen on random batches, None if not measured.
    certificate
        How the family was found and confirmed, as plain numbers and words (see ``find_symmetries``).
    broken_by
        What breaks the law at a known small size, for example ``"eps of bn1"``.

    Examples
    --------
    >>> import torch
    >>> law = Symmetry("rescale", "rescale:hidden", (Term("0.weight", 1, keep=0), Term("2.weight", -1, keep=1)), 2)
    >>> params = {"0.weight": torch.ones(2, 3), "2.weight": torch.ones(4, 2)}
    >>> law.quantities(params).tolist()
    [-1.0, -1.0]
    """

    kind: Kind
    name: str
    terms: tuple[Term, ...]
    n_laws: int
    residual: float | None = None
    certificate: Mapping[str, Any] | None = None
    broken_by: str | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInput(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if not self.terms:
            raise InvalidInput(f"symmetry {self.name!r} has no terms: name at least one parameter")
        if self.n_laws < 1:
            raise InvalidInput(f"symmetry {self.name!r} needs n_laws >= 1; got {self.n_laws}")
        if (self.kind == "matrix") != (self.size is not None):
            raise InvalidInput(f"symmetry {self.name!r}: `size` belongs to matrix laws, and to them only")

    @property
    def blocks(self) -> int:
        """Number of members of the family: laws, or matrices for a matrix law."""
        return self.n_laws if self.size is None else self.n_laws // (self.size * (self.size + 1) // 2)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the quantities: (n_laws,), or (blocks, d, d)."""
        return (self.n_laws,) if self.size is None else (self.blocks, self.size, self.size)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that take part, each once."""
        return tuple(dict.fromkeys(term.parameter for term in self.terms))

    def quantities(self, params: nn.Module | Tensors) -> Tensor:
        """The conserved quantities Q: ``linear(θ)`` for a translation, ``bilinear(θ, θ)`` otherwise; float64."""
        values = named_tensors(params)
        return self.linear(values) if self.kind == "translation" else self.bilinear(values, values)

    def linear(self, a: nn.Module | Tensors) -> Tensor:
        """Σ_A w·a by law, (n_laws,), float64. A missing gradient (None) counts as zero."""
        return self._total(named_tensors(a), None, None)

    def bilinear(self, a: nn.Module | Tensors, b: nn.Module | Tensors) -> Tensor:
        """Σ ± a·b by law, of the shape of the quantities, float64; symmetrized for matrix laws.

        For every kind but translation ``Q(θ + Δ) = Q(θ) + 2 bilinear(θ, Δ) + bilinear(Δ, Δ)``. A translation sums w·a·b
        over its index set.
        """
        total = self._total(named_tensors(a), named_tensors(b), None)
        return total if self.size is None else 0.5 * (total + total.transpose(-1, -2))

    def norms(self, a: nn.Module | Tensors) -> Tensor:
        """‖a_A‖, every entry of the law counted positive: (blocks,), float64."""
        values = named_tensors(a)
        total = self._total(values, values, abs)
        return (total if self.size is None else total.diagonal(dim1=-2, dim2=-1).sum(-1)).sqrt()

    def constraint(self, params: nn.Module | Tensors, grads: Tensors) -> Tensor:
        """Left minus right side of the gradient constraint, zero for an exact symmetry; of the quantities' shape.

        For matrix laws the full d×d matrix ``G_U Uᵀ - V G_Vᵀ``: its antisymmetric part is a constraint on the gradient
        without a conserved quantity.
        """
        if self.kind == "translation":
            return self.linear(grads)
        values, slopes = named_tensors(params), named_tensors(grads)
        if self.size is None:
            return self.bilinear(values, slopes)
        up = self._total(slopes, values, lambda sign: max(sign, 0))
        down = self._total(slopes, values, lambda sign: max(-sign, 0))
        return up - down.transpose(-1, -2)

    def residuals(
        self, params: nn.Module | Tensors, grads: Tensors, typical: tuple[float, float] | None = None
    ) -> Tensor:
        """Size of the constraint relative to what it could be, in [0, 1]: a cosine by law, or by block.

        A law over a single entry has no cosine: its gradient is measured against the root mean square of all of
        `grads`. Gradients below the square root of the precision times that are taken for rounding. `typical` is
        what :func:`typical_size` gives for `grads`, for callers that ask for many laws.
        """
        broken = self.constraint(params, grads).abs()
        if self.size is not None:
            broken = broken.flatten(1).norm(dim=1)
        own = {name: _entry(grads, name, self.name) for name in self.parameters}
        ones = {name: None if value is None else torch.ones_like(value) for name, value in own.items()}
        extent = self.norms(ones)
        usual, precision = typical or typical_size(grads)
        floor = torch.where(extent <= 1.0, 1.0, precision**0.5) if self.kind == "translation" else precision**0.5
        slope = torch.maximum(self.norms(grads), floor * usual * extent)
        size = slope * (extent if self.kind == "translation" else self.norms(params))
        return torch.where(size > 0, broken / size.clamp(min=torch.finfo(torch.float64).tiny), torch.zeros_like(size))

    def apply(self, params: nn.Module | Tensors, alpha: float | Tensor) -> dict[str, Tensor]:
        """The finite action: new values of the parameters that take part, `params` itself is left alone.

        Parameters
        ----------
        params
            The model or its named parameters.
        alpha
            One number for all laws, or (n_laws,): the shift of a translation, the positive factor of scale and rescale.
            For matrix laws an invertible (blocks, d, d), or one number for that multiple of the identity.
        """
        values = named_tensors(params)
        strength = self._strength(alpha)
        out: dict[str, Tensor] = {}
        for term in self.terms:
            current = out.get(term.parameter, values.get(term.parameter))
            if current is None:
                raise UnknownName(
                    f"symmetry {self.name!r} acts on {term.parameter!r}, which the parameters do not hold"
                )
            out[term.parameter] = term.act(self.kind, current, strength.to(current.device))
        return out

    def _strength(self, alpha: float | Tensor) -> Tensor:
        value = torch.as_tensor(alpha, dtype=torch.float64)
        if not bool(torch.isfinite(value).all()):
            raise InvalidInput(f"alpha of {self.name!r} must be finite; got {alpha}")
        if self.size is not None and value.dim() == 0:
            value = value * torch.eye(self.size, dtype=torch.float64)
        if self.kind in ("scale", "rescale") and not bool((value > 0).all()):
            raise InvalidInput(f"alpha of {self.kind} {self.name!r} must be positive; got {alpha}")
        try:
            return value.expand(self.shape)
        except RuntimeError:
            raise InvalidInput(
                f"alpha of {self.name!r} must be one number or of shape {self.shape}; got {tuple(value.shape)}"
            ) from None

    def _total(self, a: Tensors, b: Tensors | None, weight: Any) -> Tensor:
        total: Tensor | None = None
        for term in self.terms:
            x, y = _entry(a, term.parameter, self.name), None if b is None else _entry(b, term.parameter, self.name)
            factor = term.sign if weight is None else weight(term.sign)
            if x is None or (b is not None and y is None) or factor == 0:
                continue
            reduced = reduce_sum(term, x) if y is None else reduce_product(term, x, y)
            part = factor * term.to_laws(reduced, self.blocks)
            total = part if total is None else total + part.to(total.device)
        return torch.zeros(self.shape, dtype=torch.float64) if total is None else total


def typical_size(grads: Tensors) -> tuple[float, float]:
    """Root mean square of all entries of the gradients, and the coarsest relative precision among their types."""
    present = [value.detach() for value in grads.values() if value is not None]
    count = sum(value.numel() for value in present)
    total = sum(float(value.double().square().sum()) for value in present)
    precision = max((torch.finfo(value.dtype).eps for value in present), default=0.0)
    return (total / max(count, 1)) ** 0.5, precision


def _entry(values: Tensors, name: str, law: str) -> Tensor | None:
    if name not in values:
        raise UnknownName(f"symmetry {law!r} acts on {name!r}, which the parameters do not hold")
    return values[name]


def named_tensors(source: nn.Module | Tensors) -> Tensors:
    """Named parameters of a module, or the mapping itself (a gradient that is None counts as zero)."""
    if isinstance(source, nn.Module):
        return dict(source.named_parameters())
    return source


@dataclass(frozen=True, eq=False)
class SymmetrySet(Sequence[Symmetry]):
    """The symmetries found in one model, and the places where none could be decided.

    Parameters
    ----------
    symmetries
        The families, uniquely named.
    unhandled
        One sentence per place of the model that was looked at and not decided, or whose symmetry was refused, and why.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 4))
    >>> law = Symmetry("rescale", "rescale:0->2", (Term("0.weight", 1, keep=0), Term("2.weight", -1, keep=1)), 2)
    >>> found = SymmetrySet((law,))
    >>> found.n_laws, found["rescale:0->2"].kind
    (2, 'rescale')
    >>> twin = found.apply(model, "rescale:0->2", 3.0)
    >>> x = torch.ones(1, 3)
    >>> torch.allclose(model(x), twin(x), atol=1e-6)
    True
    """

    symmetries: tuple[Symmetry, ...] = ()
    unhandled: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        names = [law.name for law in self.symmetries]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InvalidInput(f"names of symmetries must be unique; {', '.join(twice)} occur more than once")

    def __len__(self) -> int:
        return len(self.symmetries)

    def __iter__(self) -> Iterator[Symmetry]:
        return iter(self.symmetries)

    @overload
    def __getitem__(self, key: int | str) -> Symmetry: ...

    @overload
    def __getitem__(self, key: slice) -> SymmetrySet: ...

    def __getitem__(self, key: int | str | slice) -> Symmetry | SymmetrySet:
        if isinstance(key, slice):
            return replace(self, symmetries=self.symmetries[key])
        if isinstance(key, int):
            return self.symmetries[key]
        for law in self.symmetries:
            if law.name == key:
                return law
        known = ", ".join(law.name for law in self.symmetries) or "none"
        raise UnknownName(f"no symmetry is named {key!r}; found: {known}")

    @property
    def n_laws(self) -> int:
        """Number of conserved numbers over all families."""
        return sum(law.n_laws for law in self.symmetries)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that take part in any law, each once."""
        return tuple(dict.fromkeys(name for law in self.symmetries for name in law.parameters))

    def of_kind(self, *kinds: Kind) -> SymmetrySet:
        """The families of the given kinds."""
        return replace(self, symmetries=tuple(law for law in self.symmetries if law.kind in kinds))

    def quantities(self, params: nn.Module | Tensors) -> dict[str, Tensor]:
        """Conserved quantities of every family, by name, from one pass over each parameter; float64."""
        values = named_tensors(params)
        return self.reduce({"a": values}, [("a", "a")])[("a", "a")]

    def bilinear(self, a: nn.Module | Tensors, b: nn.Module | Tensors) -> dict[str, Tensor]:
        """:meth:`Symmetry.bilinear` of every family; a translation's entry is ``linear(b)``."""
        if a is b:
            return self.reduce({"a": named_tensors(a)}, [("a", "a")])[("a", "a")]
        return self.reduce({"a": named_tensors(a), "b": named_tensors(b)}, [("a", "b")])[("a", "b")]

    def linear(self, a: nn.Module | Tensors) -> dict[str, Tensor]:
        """:meth:`Symmetry.linear` of the translations."""
        values = named_tensors(a)
        return {law.name: law.linear(values) for law in self.symmetries if law.kind == "translation"}

    def reduce(
        self, values: Mapping[str, Tensors], pairs: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], dict[str, Tensor]]:
        """Several bilinear reductions in one go, each parameter's sums computed once and shared by its families.

        Parameters
        ----------
        values
            Named parameter-like mappings, for example ``{"θ": params, "g": grads}``.
        pairs
            Which products to sum, for example ``[("θ", "θ"), ("θ", "g"), ("g", "g")]``. A translation, whose law is
            linear, takes the second of each pair.

        Returns
        -------
        dict
            By pair, by family: a tensor of the family's shape, float64.
        """
        out: dict[tuple[str, str], dict[str, Tensor]] = {}
        for pair in pairs:
            a, b = values[pair[0]], values[pair[1]]
            for name in self.parameters:
                if name not in a or name not in b:
                    raise UnknownName(f"the laws act on {name!r}, which the parameters do not hold")
            cache: dict[Any, Tensor] = {}
            plan = self._plan
            vectors = plan.split(plan(a, b, _device(b)))
            out[pair] = {
                law.name: vectors[law.name] if law.size is None else _shared_total(law, a, b, cache)
                for law in self.symmetries
            }
        return out

    @functools.cached_property
    def _plan(self) -> Plan:
        return Plan([law for law in self.symmetries if law.size is None])

    def apply(self, model: nn.Module, name: str, alpha: float | Tensor, *, inplace: bool = False) -> nn.Module:
        """The finite action of one family on a deep copy of the model, or on the model itself with ``inplace=True``."""
        target = model if inplace else copy.deepcopy(model)
        moved = self[name].apply(target, alpha)
        with torch.no_grad():
            for parameter, value in target.named_parameters():
                if parameter in moved:
                    value.copy_(moved[parameter])
        return target

    def to_frame(self) -> pd.DataFrame:
        """One row per family: kind, name, parameters, laws, residual, what breaks it, and how it was confirmed."""
        import pandas as pd

        columns = ["kind", "name", "parameters", "n_laws", "residual", "broken_by", "found_by", "p_value"]
        rows = [
            {
                "kind": law.kind,
                "name": law.name,
                "parameters": ", ".join(law.parameters),
                "n_laws": law.n_laws,
                "residual": math.nan if law.residual is None else law.residual,
                "broken_by": law.broken_by or "",
                "found_by": (law.certificate or {}).get("found_by", ""),
                "p_value": (law.certificate or {}).get("p_value", math.nan),
            }
            for law in self.symmetries
        ]
        return pd.DataFrame(rows, columns=columns)


def _device(values: Tensors) -> torch.device:
    return next((value.device for value in values.values() if value is not None), torch.device("cpu"))


def _shared_total(law: Symmetry, a: Tensors, b: Tensors, cache: dict[Any, Tensor]) -> Tensor:
    """One matrix family's reduction, with the products by block taken from, or put into, `cache`."""
    total: Tensor | None = None
    for term in law.terms:
        x, y = a[term.parameter], b[term.parameter]
        if x is None or y is None:
            continue
        key = (term.parameter, term.reduction)
        if key not in cache:
            cache[key] = reduce_product(term, x, y)
        part = term.sign * term.to_laws(cache[key], law.blocks)
        total = part if total is None else total + part.to(total.device)
    if total is None:
        return torch.zeros(law.shape, dtype=torch.float64, device=_device(b))
    return 0.5 * (total + total.transpose(-1, -2))
