"""What laws are called, and of which kind the signs of their terms make them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..symmetry import Symmetry
from ..term import Kind


def diagonal_kind(signs: Iterable[float]) -> Kind:
    """Scale if all entries grow together, rescale if some shrink."""
    return "scale" if all(sign > 0 for sign in signs) else "rescale"


def law_name(kind: Kind, entries: Sequence[tuple[str, float]]) -> str:
    """For example ``rescale:conv1->conv2``: the first module that grows and the first that shrinks."""
    up = [module_of(parameter) for parameter, sign in entries if sign > 0]
    down = [module_of(parameter) for parameter, sign in entries if sign < 0]
    return f"{kind}:{up[0]}->{down[0]}" if up and down else f"{kind}:{(up or down)[0]}"


def module_of(parameter: str) -> str:
    """The module that owns a parameter, unless the name tells more (packed projections, bare parameters)."""
    owner, _, last = parameter.rpartition(".")
    return owner if last in ("weight", "bias") and owner else parameter


def unique_names(symmetries: Iterable[Symmetry]) -> tuple[Symmetry, ...]:
    """Number the second and later families of one name."""
    seen: Counter[str] = Counter()
    out = []
    for law in symmetries:
        seen[law.name] += 1
        out.append(law if seen[law.name] == 1 else replace(law, name=f"{law.name}#{seen[law.name]}"))
    return tuple(out)
