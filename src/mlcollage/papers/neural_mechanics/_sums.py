"""All sums of a set of laws in one pass over each parameter.

Products are taken in the parameters' own type (half types in float32) and summed in float64; a parameter's row and
column sums share one product, and the sums of all families are joined and added up to laws by one indexed addition, so
that a tracked step costs a few kernels per parameter and not a few per family.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from .term import Term

Tensors = Mapping[str, "Tensor | None"]
CHUNK = 1 << 22  # entries of the products that are held at a time
_LOW = (torch.bfloat16, torch.float16)


class LawSums:
    """Which sums over which parameters make which laws, for families with one number per law.

    Parameters
    ----------
    families
        By family: whether its law is linear (a translation), how many laws it has, and its terms.
    """

    def __init__(self, families: Sequence[tuple[bool, int, Sequence[Term]]]) -> None:
        self.sizes = [count for _, count, _ in families]
        # linear or not -> parameter -> what is summed -> the terms that use it, with the first law of their family
        self._uses: dict[bool, dict[str, dict[object, list[tuple[int, Term]]]]] = {True: {}, False: {}}
        self._indices: dict[tuple[bool, tuple[str, ...], torch.device], tuple[Tensor, ...]] = {}
        start = 0
        for linear, count, terms in families:
            for term in terms:
                of_parameter = self._uses[linear].setdefault(term.parameter, {})
                of_parameter.setdefault(term.reduction, []).append((start, term))
            start += count

    def __call__(self, a: Tensors, b: Tensors, device: torch.device) -> tuple[Tensor, ...]:
        """Σ ± a·b by law, or Σ w·b for a translation: by family, (laws,) in float64."""
        total = torch.zeros(sum(self.sizes), dtype=torch.float64, device=device)
        for linear, uses in self._uses.items():
            names, sums = [], []
            for name, value in _values(uses, a, b, linear):
                names.append(name)
                sums += [_sum(terms[0][1], value) for terms in uses[name].values()]
            if sums:
                source, target, weight = self._index(linear, tuple(names), [s.numel() for s in sums], device)
                joined = torch.cat([s.to(device) for s in sums])  # (all sums,)
                total.index_add_(0, target, joined[source] * weight)
        return total.split(self.sizes)

    def _index(
        self, linear: bool, names: tuple[str, ...], counts: Sequence[int], device: torch.device
    ) -> tuple[Tensor, ...]:
        """For each contribution to a law: its place among the joined sums, its law, and its signed weight."""
        key = (linear, names, device)  # which parameters have a value may change from call to call
        if key not in self._indices:
            parts: list[tuple[Tensor, Tensor, Tensor]] = []
            users = [terms for name in names for terms in self._uses[linear][name].values()]
            start = 0
            for terms, count in zip(users, counts, strict=True):
                for first, term in terms:
                    laws = torch.arange(count) if term.laws is None else torch.tensor(term.laws)
                    used = torch.nonzero(laws >= 0).flatten()
                    weight = torch.full((used.numel(),), float(term.sign), dtype=torch.float64)
                    parts.append((start + used, first + laws[used], weight))
                start += count
            self._indices[key] = tuple(torch.cat(column).to(device) for column in zip(*parts, strict=True))
        return self._indices[key]


def _values(names: Iterable[str], a: Tensors, b: Tensors, linear: bool) -> Iterator[tuple[str, Tensor]]:
    """By parameter b, or the product a·b; products are made for many parameters at once, a chunk at a time."""
    if linear:
        yield from ((name, y.detach()) for name in names if (y := b[name]) is not None)
        return
    pairs = [(name, _wide(x), _wide(y)) for name in names if (x := a[name]) is not None and (y := b[name]) is not None]
    ends = accumulate(y.numel() for _, _, y in pairs)
    for _, chunk in groupby(zip(pairs, ends, strict=True), key=lambda pair: pair[1] // CHUNK):
        listed, left, right = zip(*(pair for pair, _ in chunk), strict=True)
        yield from zip(listed, torch._foreach_mul(left, right), strict=True)


def _wide(x: Tensor) -> Tensor:
    return x.detach().float() if x.dtype in _LOW else x.detach()


def _sum(term: Term, value: Tensor) -> Tensor:
    """The term's sums of `value`, (kept,) in float64, in the order of additions that is fastest for its layout."""
    block = term.block(value)
    axes = term.summed(block.dim())
    if not axes:
        return block.reshape(-1).to(torch.float64)
    if term.kept == (0,) and block.is_contiguous():
        return block.flatten(1).sum(1, dtype=torch.float64)
    if term.kept and term.kept[0] > 0 and block.dim() > 2 and block.is_contiguous():
        # rows away first: contiguous additions
        return block.sum(0, dtype=torch.float64).sum([axis - 1 for axis in axes if axis]).reshape(-1)
    return block.sum(axes, dtype=torch.float64).reshape(-1)
