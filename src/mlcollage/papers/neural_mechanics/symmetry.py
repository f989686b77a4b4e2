"""Symmetries of a network's loss and what each of them conserves.

A symmetry is a family of laws of one kind over named parameters. With A the index set of one law
(Kunin et al. 2021, section 3; matrix laws go beyond the paper):

| kind        | finite action                   | gradient constraint             | conserved under flow    |
| ----------- | ------------------------------- | ------------------------------- | ----------------------- |
| translation | :math:`θ_A → θ_A + α w_A`       | :math:`⟨g, w_A⟩ = 0`            | :math:`⟨θ, w_A⟩`        |
| scale       | :math:`θ_A → α θ_A`             | :math:`⟨g_A, θ_A⟩ = 0`          | :math:`‖θ_A‖²`          |
| rescale     | :math:`θ_1 → αθ_1, θ_2 → θ_2/α` | :math:`⟨g_1, θ_1⟩ = ⟨g_2, θ_2⟩` | :math:`‖θ_1‖² - ‖θ_2‖²` |
| matrix      | :math:`U → MU, V → M^{-⊤}V`     | :math:`G_U U^⊤ = V G_V^⊤`       | :math:`UU^⊤ - VV^⊤`     |

where 1 and 2 stand for two index sets, such as the weights into and out of a ReLU.

All sums are accumulated in float64: after one step of SGD a conserved quantity has moved by about 1e-4 of itself, which
leaves three digits in float32.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import pandas as pd
import torch
from torch import Tensor, nn

from mlcollage._checks import choice, integer
from mlcollage.errors import InvalidInput, UnknownName

from ._sums import LawSums
from .term import KINDS, Kind, Term

Tensors = Mapping[str, "Tensor | None"]


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
        How the family was found and confirmed, as plain numbers and words (see ``find_symmetries``); empty if it was
        not.
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
    certificate: Mapping[str, Any] = field(default_factory=dict)
    broken_by: str | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        choice("kind", self.kind, KINDS)
        if not self.terms:
            raise InvalidInput(f"symmetry {self.name!r} has no terms: name at least one parameter.")
        integer(f"n_laws of {self.name!r}", self.n_laws, least=1)
        if (self.kind == "matrix") != (self.size is not None):
            raise InvalidInput(f"symmetry {self.name!r}: `size` belongs to matrix laws, and to them only.")

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
        return self._total(named_tensors(a))

    def bilinear(
        self, a: nn.Module | Tensors, b: nn.Module | Tensors, cache: dict[Any, Tensor] | None = None
    ) -> Tensor:
        """Σ ± a·b by law, of the shape of the quantities, float64; symmetrized for matrix laws.

        For every kind but translation ``Q(θ + Δ) = Q(θ) + 2 bilinear(θ, Δ) + bilinear(Δ, Δ)``. A translation sums w·a·b
        over its index set. Families that are summed with one `cache`, over the same a and b, share their sums.
        """
        total = self._total(named_tensors(a), named_tensors(b), cache=cache)
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
        # each (blocks, d, d): G_U Uᵀ over the terms that M acts on, G_V Vᵀ over those of its inverse transpose
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
        broken = self.constraint(params, grads).abs()  # of the quantities' shape
        if self.size is not None:
            broken = broken.flatten(1).norm(dim=1)
        own = {name: grads.get(name) for name in self.parameters}
        ones = {name: None if value is None else torch.ones_like(value) for name, value in own.items()}
        extent = self.norms(ones)  # square root of the number of entries, (blocks,)
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
            current = out[term.parameter] if term.parameter in out else _entry(values, term, self.name)
            assert current is not None, "parameters have values"
            out[term.parameter] = term.act(self.kind, current, strength.to(current.device))
        return out

    def _strength(self, alpha: float | Tensor) -> Tensor:
        value = torch.as_tensor(alpha, dtype=torch.float64)
        if not bool(torch.isfinite(value).all()):
            raise InvalidInput(f"alpha of {self.name!r} must be finite; got {alpha}.")
        if self.size is not None and value.dim() == 0:
            value = value * torch.eye(self.size, dtype=torch.float64)
        if self.kind in ("scale", "rescale") and not bool((value > 0).all()):
            raise InvalidInput(f"alpha of {self.kind} {self.name!r} must be positive; got {alpha}.")
        try:
            return value.expand(self.shape)
        except RuntimeError:
            raise InvalidInput(
                f"alpha of {self.name!r} must be one number or of shape {self.shape}; got {tuple(value.shape)}."
            ) from None

    def _total(
        self,
        a: Tensors,
        b: Tensors | None = None,
        weight: Callable[[float], float] | None = None,
        cache: dict[Any, Tensor] | None = None,
    ) -> Tensor:
        """Sums of a, or of a·b, by law, each term counted with its sign, or with `weight` of it."""
        total: Tensor | None = None
        cache = {} if cache is None else cache
        for term in self.terms:
            x, y = _entry(a, term, self.name), None if b is None else _entry(b, term, self.name)
            factor = term.sign if weight is None else weight(term.sign)
            if x is None or (b is not None and y is None) or factor == 0:
                continue
            key = (term.parameter, term.reduction)  # terms of one parameter often differ in their sign only
            if key not in cache:
                cache[key] = term.sums(x, y)
            part = factor * term.to_laws(cache[key], self.blocks)
            total = part if total is None else total + part.to(total.device)
        device = next((value.device for value in a.values() if value is not None), None)
        return torch.zeros(self.shape, dtype=torch.float64, device=device) if total is None else total


def typical_size(grads: Tensors) -> tuple[float, float]:
    """Root mean square of all entries of the gradients, and the coarsest relative precision among their types."""
    present = [value.detach() for value in grads.values() if value is not None]
    count = sum(value.numel() for value in present)
    total = sum(float(value.double().square().sum()) for value in present)
    precision = max((torch.finfo(value.dtype).eps for value in present), default=0.0)
    return (total / max(count, 1)) ** 0.5, precision


def _entry(values: Tensors, term: Term, law: str) -> Tensor | None:
    if term.parameter not in values:
        raise UnknownName(f"symmetry {law!r} acts on {term.parameter!r}, which the parameters do not hold.")
    return values[term.parameter]


def named_tensors(source: nn.Module | Tensors) -> Tensors:
    """Named parameters of a module, or the mapping itself (a gradient that is None counts as zero)."""
    return dict(source.named_parameters()) if isinstance(source, nn.Module) else source


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
            raise InvalidInput(f"names of symmetries must be unique; {', '.join(twice)} occur more than once.")

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
        return self.bilinear(values, values)

    def bilinear(self, a: nn.Module | Tensors, b: nn.Module | Tensors) -> dict[str, Tensor]:
        """Σ ± a·b of every family, by name, each parameter's sums computed once and shared by its families; float64.

        As :meth:`Symmetry.bilinear`, except that a translation, whose law is linear, gives ``linear(b)``. Matrix laws
        are summed in float64; for the others each product a·b is rounded to the parameter's own type.

        Parameters
        ----------
        a, b
            A model, or named tensors of its parameters' shapes (None counts as zero).
        """
        a, b = named_tensors(a), named_tensors(b)
        for name in self.parameters:
            if name not in a or name not in b:
                raise UnknownName(f"the laws act on {name!r}, which the parameters do not hold.")
        device = next((value.device for value in b.values() if value is not None), torch.device("cpu"))
        vectors = iter(self._sums(a, b, device))
        cache: dict[Any, Tensor] = {}  # of the matrix families
        return {law.name: next(vectors) if law.size is None else law.bilinear(a, b, cache) for law in self.symmetries}

    @functools.cached_property
    def _sums(self) -> LawSums:
        return LawSums([(law.kind == "translation", law.n_laws, law.terms) for law in self if law.size is None])

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
        rows = [
            {
                "kind": law.kind,
                "name": law.name,
                "parameters": ", ".join(law.parameters),
                "n_laws": law.n_laws,
                "residual": math.nan if law.residual is None else law.residual,
                "broken_by": law.broken_by or "",
                "found_by": law.certificate.get("found_by", ""),
                "p_value": law.certificate.get("p_value", math.nan),
            }
            for law in self.symmetries
        ]
        columns = ["kind", "name", "parameters", "n_laws", "residual", "broken_by", "found_by", "p_value"]
        return pd.DataFrame(rows, columns=columns)
