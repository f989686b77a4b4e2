"""All sums of a set of laws in one pass over each parameter.

Products are taken in the parameters' own type (half types in float32) and summed in float64; a parameter's row and
column sums share one product, and the sums of all families are joined and added up to laws by one indexed addition, so
that a tracked step costs a few kernels a parameter and not a few a family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mlcollage.papers.neural_mechanics.symmetry import Symmetry, Term

__all__ = ["Plan"]

CHUNK = 1 << 22  # entries of the products that are held at a time


class Plan:
    """Which sums over which parameters make which laws; for the families with one number per law.

    Parameters
    ----------
    symmetries
        Families of kind translation, scale or rescale.
    """

    def __init__(self, symmetries: Sequence[Symmetry]) -> None:
        self.symmetries = tuple(symmetries)
        self.sizes = [law.n_laws for law in self.symmetries]
        self._linear = self._gather([law.kind == "translation" for law in self.symmetries])
        self._quadratic = self._gather([law.kind != "translation" for law in self.symmetries])
        self._indices: dict[tuple[bool, tuple[str, ...], torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def _gather(self, wanted: Sequence[bool]) -> dict[str, dict[object, list[tuple[int, Term]]]]:
        """By parameter, by sum: the terms that use it, each with the number of the first law of its family."""
        out: dict[str, dict[object, list[tuple[int, Term]]]] = {}
        start = 0
        for law, use in zip(self.symmetries, wanted, strict=True):
            for term in law.terms if use else ():
                out.setdefault(term.parameter, {}).setdefault(term.reduction, []).append((start, term))
            start += law.n_laws
        return out

    def __call__(self, a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None], device: torch.device) -> Tensor:
        """Σ ± a·b by law, and Σ w·b for translations: (all laws,) in float64."""
        total = torch.zeros(sum(self.sizes), dtype=torch.float64, device=device)
        for linear, uses in ((True, self._linear), (False, self._quadratic)):
            sums: list[Tensor] = []
            order: list[str] = []
            for name, value in _values(uses, a, b, linear):
                order.append(name)
                sums += _sums(value, [terms[0][1] for terms in uses[name].values()])
            if sums:
                joined = torch.cat([s.to(device) for s in sums])
                source, target, weight = self._index(linear, tuple(order), uses, [s.numel() for s in sums], device)
                total.index_add_(0, target, joined[source] * weight)
        return total

    def split(self, total: Tensor) -> dict[str, Tensor]:
        """The laws by family."""
        return dict(zip([law.name for law in self.symmetries], total.split(self.sizes), strict=True))

    def _index(
        self,
        linear: bool,
        names: tuple[str, ...],
        uses: dict[str, dict[object, list[tuple[int, Term]]]],
        counts: Sequence[int],
        device: torch.device,
    ) -> tuple[Tensor, Tensor, Tensor]:
        key = (linear, names, device)
        if key not in self._indices:
            source, target, weight = [], [], []
            start, k = 0, 0
            for name in names:
                for terms in uses[name].values():
                    for first, term in terms:
                        laws = torch.arange(counts[k]) if term.laws is None else torch.tensor(term.laws)
                        used = torch.nonzero(laws >= 0).flatten()
                        source.append(start + used)
                        target.append(first + laws[used])
                        weight.append(torch.full((used.numel(),), float(term.sign), dtype=torch.float64))
                    start, k = start + counts[k], k + 1
            joined = torch.cat(source), torch.cat(target), torch.cat(weight)
            self._indices[key] = tuple(part.to(device) for part in joined)  # type: ignore[assignment]
        return self._indices[key]


def _values(
    names: Mapping[str, object], a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None], linear: bool
) -> Iterator[tuple[str, Tensor]]:
    """The tensors to sum: b, or products a·b, of which no more than a chunk is held at a time."""
    waiting: list[tuple[str, Tensor, Tensor]] = []
    held = 0
    for name in names:
        x, y = a[name], b[name]
        if y is None or (x is None and not linear):
            continue
        if linear or x is None:
            yield name, y.detach()
            continue
        waiting.append((name, x.detach(), y.detach()))
        held += y.numel()
        if held >= CHUNK:
            yield from _products(waiting)
            waiting, held = [], 0
    yield from _products(waiting)


def _products(pairs: Sequence[tuple[str, Tensor, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    if not pairs:
        return
    left, right = [_wide(x) for _, x, _ in pairs], [_wide(y) for _, _, y in pairs]
    for (name, _, _), product in zip(pairs, torch._foreach_mul(left, right), strict=True):
        yield name, product


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _sums(value: Tensor, terms: Sequence[Term]) -> list[Tensor]:
    """The sums of one tensor that several terms ask for."""
    return [_sum(term, value) for term in terms]


def _sum(term: Term, value: Tensor) -> Tensor:
    block = term.block(value)
    kept = term.kept
    axes = tuple(axis for axis in range(block.dim()) if axis not in kept)
    if not axes:
        return block.reshape(-1).to(torch.float64)
    if kept == (0,) and block.is_contiguous():
        return block.flatten(1).sum(1, dtype=torch.float64)
    if kept and kept[0] > 0 and block.dim() > 2 and block.is_contiguous():  # rows away first: contiguous additions
        return block.sum(0, dtype=torch.float64).sum([axis - 1 for axis in axes if axis]).reshape(-1)
    return block.sum(axes, dtype=torch.float64).reshape(-1)
