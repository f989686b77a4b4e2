"""A word that two things share if they mean the same: numbers, tensors, settings, networks, functions by their code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, range, slice)
# whose classes are known by name, since their code is the version's
_LIBRARIES = ("builtins", "torch", "numpy", "mlcollage", "collections", "functools")
_OF_TORCH = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_flat_weights", "_flat_weight_refs")


def fingerprint(*values: Any) -> str:
    """Sixteen hexadecimal digits that change with the values.

    Of a tensor that requires a gradient only shape and type count, since its values are what is sampled. Of functions,
    and of classes that are not a library's, the code counts, with defaults, what is enclosed, and the numbers and
    functions of their own module that they name; of other objects type and attributes.

    Examples
    --------
    >>> fingerprint(0.5, torch.zeros(2)) == fingerprint(0.5, torch.zeros(2))
    True
    >>> fingerprint(lambda x: x + 1) == fingerprint(lambda x: x + 2)
    False
    """
    digest = hashlib.sha256()
    for value in values:
        _feed(digest, value, ())
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any, inside: tuple[int, ...]) -> None:
    def say(*words: Any) -> None:
        digest.update(f"{words!r};".encode())

    def go_on(*parts: Any) -> None:
        for part in parts:
            _feed(digest, part, (*inside, id(value)))

    kind = type(value)
    if id(value) in inside:
        say("again")
    elif isinstance(value, _PLAIN):
        say(kind.__name__, value)
    elif isinstance(value, Tensor):
        say("tensor", str(value.dtype), tuple(value.shape))
        if not value.requires_grad:
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray | np.generic):
        say("array", str(value.dtype), value.shape)
        go_on(value.tolist()) if value.dtype.hasobject else digest.update(value.tobytes())
    elif isinstance(value, Mapping):
        say("mapping", len(value))
        for key in sorted(value, key=repr):
            go_on(key, value[key])
    elif isinstance(value, list | tuple):
        say("list", len(value))
        go_on(*value)
    elif isinstance(value, set | frozenset):
        say("set", sorted(map(repr, value)))
    elif isinstance(value, CodeType):
        say(value.co_code.hex(), value.co_names, value.co_varnames)
        go_on(*value.co_consts)
    elif isinstance(value, FunctionType):
        named = (value.__globals__.get(name) for name in value.__code__.co_names)
        used = [v for v in named if isinstance(v, (*_PLAIN, Tensor, np.ndarray)) or _same_module(v, value)]
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != type(cell)()]
        go_on(value.__code__, value.__defaults__, value.__kwdefaults__, cells, used)
    elif isinstance(value, MethodType):
        go_on(value.__func__, value.__self__)
    elif isinstance(value, partial):
        go_on(value.func, value.args, value.keywords)
    elif isinstance(value, type) or (callable(value) and not hasattr(value, "__dict__")):
        say(getattr(value, "__module__", ""), getattr(value, "__qualname__", kind.__qualname__))
    else:
        for family in kind.__mro__:
            say(family.__module__, family.__qualname__)
            if family.__module__.partition(".")[0] not in _LIBRARIES:
                go_on([part for part in vars(family).values() if isinstance(part, FunctionType)])
        own = dict(getattr(value, "__dict__", {}))
        if isinstance(value, nn.Module):
            go_on({name: (p.requires_grad, p) for name, p in value._parameters.items() if p is not None})
            go_on(value._buffers, list(value._modules), *value._modules.values())
            go_on(*value._forward_pre_hooks.values(), *value._forward_hooks.values())
            own = {name: part for name, part in own.items() if name not in _OF_TORCH and "hooks" not in name}
        go_on(own)


def _same_module(value: Any, function: FunctionType) -> bool:
    return isinstance(value, FunctionType) and value.__module__ == function.__module__
