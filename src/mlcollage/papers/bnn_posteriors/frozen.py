"""The part of a network that no sampled parameter reaches: it is run once per input, not once per gradient.

A backbone whose parameters are frozen gives the same features at every position. They are computed once, and a *head*,
the network with stubs in place of its frozen layers, goes on from there. That this is the same function is not read off
the code but tried: the features must not change between two positions, and the head must give the network's own outputs
to the last bit, at two positions for the first data and at one for all others. What fails is run whole.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from mlcollage.nn import logits_of

from .layout import Layout

_MOST_TRIES = 12  # outputs of frozen layers that may be the features, the last ones first
_MOST_FEATURES = 2**28  # numbers that are kept, 1 GB in float32


class _Stub(nn.Module):
    """Stands for a frozen layer: the features at their place, numbers that would spoil the result elsewhere."""

    def __init__(self, like: Any, place: int | None):
        super().__init__()
        leaves, self.structure = pytree.tree_flatten(like)
        # shape of one datum and type; what is no tensor stays
        self.leaves = [(v.shape, v.dtype) if isinstance(v, Tensor) else v for v in leaves]
        self.count = next((len(v) for v in leaves if isinstance(v, Tensor) and v.ndim), 0)
        self.place, self.features = place, torch.empty(0)

    def forward(self, *_: Any, **__: Any) -> Any:
        made = []
        for place, leaf in enumerate(self.leaves):
            if place == self.place:
                made.append(self.features)
            else:
                made.append(_void(self.features, self.count, *leaf) if isinstance(leaf, tuple) else leaf)
        return pytree.tree_unflatten(made, self.structure)


def _void(features: Tensor, count: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """As many data as the features, without memory: not a number, or the least one, so that no use goes unseen."""
    size = [len(features) if shape and shape[0] == count else n for n in shape[:1]]
    value = torch.nan if dtype.is_floating_point else 1 if dtype == torch.bool else torch.iinfo(dtype).min
    return torch.full((), value, dtype=dtype, device=features.device).expand(*size, *shape[1:])


class Split:
    """Features of inputs, and the head that takes them.

    Attributes
    ----------
    head : Module
        Features (n, ...) to outputs (n, ...); its sampled parameters have the network's own names.
    """

    def __init__(self, module: nn.Module, layout: Layout, name: str, place: int | None, head: nn.Module, q: Tensor):
        # features are a leaf of what the layer of that name returns, or (None) what it is given
        self.head, self._module, self._layout, self._name, self._place, self._q = head, module, layout, name, place, q

    @torch.no_grad()
    def __call__(self, x: Tensor, q: Tensor | None = None) -> Tensor | None:
        """Features of inputs (n, ...); None where the head does not give the network's outputs for them."""
        parameters = self._layout.unflatten(self._q if q is None else q)
        with _listening(self._module, [self._name], given=self._place is None) as heard:
            whole = logits_of(functional_call(self._module, parameters, (x,)))
        found = [leaf for _, value in heard for leaf in pytree.tree_leaves(value)]
        features = found[self._place or 0] if len(heard) == 1 and found else None
        if not isinstance(features, Tensor) or (self._place is None and len(found) > 1):
            return None
        try:
            by_head = logits_of(functional_call(self.head, parameters, (features,)))
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError):
            return None
        # a head that writes to its features would spoil them for the next position
        return features if torch.equal(whole, by_head) and features._version == 0 else None


@contextmanager
def _listening(module: nn.Module, names: list[str], *, given: bool = False) -> Iterator[list[tuple[str, Any]]]:
    """What these layers return, or are given: pairs with their names, copied, since a later layer may write there."""
    heard: list[tuple[str, Any]] = []

    def listen(name: str, output: Any) -> None:
        heard.append((name, pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, output)))

    handles = []
    for name in names:
        layer = module.get_submodule(name)
        if given:
            handles.append(layer.register_forward_pre_hook(lambda _, *a, n=name: listen(n, a), with_kwargs=True))
        else:
            handles.append(layer.register_forward_hook(lambda _, __, output, n=name: listen(n, output)))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def find_split(module: nn.Module, layout: Layout, here: Tensor, x: Tensor) -> Split | None:
    """Where the frozen part of a network ends, or None if it has none that can be told apart.

    Parameters
    ----------
    module
        In the mode in which it is used.
    layout
        Of its sampled parameters.
    here
        Its own parameters as a position, (P,).
    x
        A few inputs, (m, ...).
    """
    if all(p.requires_grad for p in module.parameters()):
        return None
    numbers = torch.Generator(here.device).manual_seed(0)
    scale = here.std(correction=0) + 0.1  # generic positions, of the order of the network's own
    positions = [
        here + scale * torch.randn(here.shape, dtype=here.dtype, device=here.device, generator=numbers)
        for _ in range(2)
    ]
    frozen = [n for n, m in module.named_modules() if n and not any(p.requires_grad for p in m.parameters())]
    # with gradients recorded, what a sampled parameter reaches requires one
    leaves = {n: v.detach().requires_grad_(True) for n, v in layout.unflatten(positions[0]).items()}
    with _listening(module, frozen) as heard, torch.enable_grad():
        functional_call(module, leaves, (x,))
    free = dict.fromkeys(n for n, out in heard if not any(_reached(leaf) for leaf in pytree.tree_leaves(out)))
    # layers inside of free layers are theirs
    outer = [n for n in free if not any(n.startswith(f"{other}.") for other in free)]
    outputs = {n: out for n, out in heard if n in outer}  # of the last call, in the order of first calls
    candidates = [
        (n, place)
        for n in reversed(outer)
        for place, leaf in enumerate(pytree.tree_leaves(outputs[n]))
        if isinstance(leaf, Tensor) and leaf.ndim > 1 and len(leaf) == len(x) and leaf.dtype == here.dtype
    ]
    heads = [(name, place, _head(module, outputs, name, place, x)) for name, place in candidates[:_MOST_TRIES]]
    for name, place, head in [*_tail(module, layout), *heads]:
        split = Split(module, layout, name, place, head, positions[1])
        found = [split(x, q) for q in positions]
        if found[0] is not None and found[1] is not None and torch.equal(found[0], found[1]):
            return split
    return None


def _tail(module: nn.Module, layout: Layout) -> list[tuple[str, None, nn.Module]]:
    """The least part that has all sampled parameters, which is a head if nothing comes behind it."""
    places = [name.split(".")[:-1] for name in layout.names]
    path = os.path.commonprefix(places)  # noqa: RUF071 (of lists of names, not of strings)
    if not path:
        return []
    tail = copy.deepcopy(module.get_submodule(".".join(path)))
    for name in reversed(path):  # its parameters keep their names
        tail = nn.Sequential(OrderedDict([(name, tail)]))
    return [(".".join(path), None, tail)]


def _reached(leaf: Any) -> bool:
    """Whether a sampled parameter enters; of an object that hides its tensors nobody knows."""
    return leaf.requires_grad if isinstance(leaf, Tensor) else not isinstance(leaf, int | float | str | NoneType)


def _head(module: nn.Module, outputs: dict[str, Any], name: str, place: int, x: Tensor) -> nn.Module:
    """A copy of the module with stubs for its frozen layers, which takes features instead of inputs."""
    # layers in a row pass features on as they are: the head is a plain stack itself, which has the fastest backend
    plain = all(
        type(module.get_submodule(n.rpartition(".")[0])) is nn.Sequential for n in outputs
    ) and type(module) is nn.Sequential  # fmt: skip
    stubs = {n: nn.Identity() if plain else _Stub(out, place if n == name else None) for n, out in outputs.items()}
    # without copying what the stubs replace
    head = copy.deepcopy(module, {id(module.get_submodule(n)): stub for n, stub in stubs.items()})
    if not plain:

        def feed(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            for stub in stubs.values():
                stub.features = args[0]
            return (_void(args[0], len(x), x.shape, x.dtype),)

        head.register_forward_pre_hook(feed)
    return head


def features_of(split: Split, x: Tensor, size: int) -> Tensor | None:
    """Features of all inputs, so many per pass; None where they cannot stand for the inputs, or are too many."""
    parts: list[Tensor] = []
    for part in x.split(size):
        found = split(part)
        if found is None or found[0].numel() * len(x) > _MOST_FEATURES:
            return None
        parts.append(found)
    return torch.cat(parts)
