"""Where each sampled parameter lies in a position (P,): names, shapes and slices, in the module's own order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor, nn

from mlcollage.errors import InvalidInput, UnknownName

V = TypeVar("V")


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the sampled parameters, one after the other.

    Parameters
    ----------
    names
        As in ``module.named_parameters()``.
    shapes
        One per name.

    Examples
    --------
    >>> layout = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1, bias=False)))
    >>> layout.names, layout.size
    (('0.weight', '0.bias', '2.weight'), 10)
    >>> layout.slices["0.bias"]
    slice(6, 8, None)
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """The parameters of ``module`` that require a gradient; a shared one counts once, under its first name."""
        own = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
        return cls(tuple(own), tuple(own.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Numbers in each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """P, numbers in all."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in a position (P,)."""
        ends = list(accumulate(self.sizes))
        return {n: slice(end - size, end) for n, size, end in zip(self.names, self.sizes, ends, strict=True)}

    def flatten(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Parameters (..., *shape) by name as one tensor (..., P); leading dimensions must agree."""
        missing = [name for name in self.names if name not in parameters]
        if missing:
            raise UnknownName(f"parameter {missing[0]} is missing ({len(missing)} in all); give every sampled one.")
        parts = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            value = parameters[name]
            lead = value.ndim - len(shape)  # dimensions of chains and draws
            if lead < 0 or tuple(value.shape[lead:]) != shape:
                raise InvalidInput(f"parameter {name} has shape {tuple(value.shape)}; (..., {shape}) is needed.")
            parts.append(value.detach().reshape(*value.shape[:lead], -1))  # (..., size)
        return torch.cat(parts, dim=-1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """A tensor (..., P) as parameters (..., *shape) by name, views of it."""
        if flat.ndim < 1 or flat.shape[-1] != self.size:
            raise InvalidInput(f"a position of shape {tuple(flat.shape)} was given; (..., {self.size}) is needed.")
        lead = flat.shape[:-1]
        parts = flat.split(self.sizes, dim=-1)  # (..., size) each
        # a parameter that is one number has no dimension of its own
        return {
            n: p.unflatten(-1, s) if s else p.reshape(lead)
            for n, s, p in zip(self.names, self.shapes, parts, strict=True)
        }

    def vector(self, values: Mapping[str, float | bool]) -> Tensor:
        """The value of each parameter by name, repeated for each of its numbers, (P,), in float64."""
        # one number per parameter, (names,), then as often as it has numbers
        each = torch.tensor([values[name] for name in self.names], dtype=torch.float64)
        return each.repeat_interleave(torch.tensor(self.sizes))

    def assign(self, values: V | Mapping[str, V], what: str) -> dict[str, V]:
        """A value for each parameter, from values for names, modules (``"conv1"``) or patterns (``"*.bias"``).

        The longest key that fits counts, and ``""`` fits everything; so does a value that is no mapping.

        Examples
        --------
        >>> layout = Layout(("0.weight", "0.bias", "2.weight"), ((2, 3), (2,), (1, 2)))
        >>> layout.assign({"": 1.0, "0": 0.1, "*.bias": 2.0}, "variance")
        {'0.weight': 0.1, '0.bias': 2.0, '2.weight': 1.0}
        """

        def fits(key: str, name: str) -> bool:
            return key in ("", name) or name.startswith(f"{key}.") or fnmatchcase(name, key)

        if not isinstance(values, Mapping):
            return dict.fromkeys(self.names, values)
        for key in values:
            if not any(fits(key, name) for name in self.names):
                raise UnknownName(f"{what} names {key!r}, which is no sampled parameter; there are {_few(self.names)}.")
        found = {}
        for name in self.names:
            # a name is longer than its module's, which is longer than ""
            keys = [key for key in values if fits(key, name)]
            if not keys:
                raise InvalidInput(f"{what} leaves out {name}; add it, or '' for all that are not named.")
            found[name] = values[max(keys, key=len)]
        return found

    def difference(self, other: Layout) -> str | None:
        """The first way in which another layout differs, in words; None if it does not."""
        here, there = dict(zip(self.names, self.shapes, strict=True)), dict(zip(other.names, other.shapes, strict=True))
        for name in [*here, *there]:
            if name not in there or name not in here:
                return f"{name} is only in {'the one' if name in here else 'the other'}"
            if here[name] != there[name]:
                return f"{name} has shape {here[name]} in the one and {there[name]} in the other"
        return None if self.names == other.names else "their order differs"


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
