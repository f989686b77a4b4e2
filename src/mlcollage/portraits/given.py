"""What a user's function returns: the network, its data and, if there is one, the untrained network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mlcollage._users import users_code
from mlcollage.data._user_code import call
from mlcollage.errors import InvalidInput
from mlcollage.portraits.recorded import beside
from mlcollage.portraits.registry import titled
from mlcollage.portraits.result import Portrait
from mlcollage.portraits.sitting import portrait

KEYS = ("model", "data", "train", "test", "untrained", "output", "loss", "task", "layers", "name")


def portrait_of(
    spec: str, *, minutes: float = 10, only: Sequence[str] | None = None, seed: int = 0, progress: bool = True
) -> Portrait:
    """The portrait of what a user's function returns, with the command that makes it again."""
    found = portrait(**load(spec), minutes=minutes, only=only or None, seed=seed, progress=progress)
    chosen = "".join(f" --only {name}" for name in only or ())
    command = f"mlcollage portrait {spec} --minutes {minutes:g}{chosen}" + (f" --seed {seed}" if seed else "")
    return dataclasses.replace(found, command=command)


def lines(found: Portrait) -> list[tuple[str, str, str]]:
    """Quantity, value with interval, and place among the recorded networks, of each number for the whole network."""
    whole = [n for reading in found.readings for n in reading.numbers if not n.layer]
    return [(titled(n.quantity), str(n), beside(n)) for n in whole]


def load(spec: str) -> dict[str, Any]:
    """Call ``module:function`` or ``file.py:function``; the arguments of :func:`~mlcollage.portrait` that it gives.

    Raises
    ------
    InvalidInput
        In one sentence, for a function that is not there, that fails, or that returns something else.
    """
    if not isinstance(spec, str) or ":" not in spec:
        raise InvalidInput(f"{spec!r} names no function; give module:function or path/to/file.py:function.")
    given, _ = call(spec, "a network and its data")
    return {"name": spec.rpartition(":")[2], **read(given, spec)}


def read(given: Any, where: str) -> dict[str, Any]:
    """The parts of a dict, a tuple ``(model, data)`` or ``(model, data, untrained)``, or an object."""
    expected = (
        "a dict with 'model' and 'test' (or 'data'), and if there are any 'train', 'untrained', 'output', 'loss', "
        "'task', 'layers', 'name'; or a tuple (model, data) or (model, data, untrained)"
    )
    if isinstance(given, Mapping):
        if unknown := [k for k in given if k not in KEYS]:
            raise InvalidInput(f"{where} returned a dict with {unknown[0]!r}; expected {expected}.")
        parts = dict(given)
    elif isinstance(given, tuple | list):
        if not 2 <= len(given) <= 3:
            raise InvalidInput(f"{where} returned {len(given)} things; expected {expected}.")
        parts = dict(zip(("model", "data", "untrained"), given, strict=False))
    else:
        with users_code(f"the attributes of what {where} returned"):
            parts = {k: getattr(given, k) for k in KEYS if getattr(given, k, None) is not None}
    if "model" not in parts or not {"data", "test"} & set(parts):
        what = type(given).__name__ if not parts else f"{type(given).__name__} with {', '.join(parts)}"
        raise InvalidInput(f"{where} returned {what}; expected {expected}.")
    for key in ("model", "untrained"):
        if parts.get(key) is not None and not isinstance(parts[key], nn.Module):
            made = parts[key]
            if not callable(made):
                raise InvalidInput(f"{key} in what {where} returned is {type(made).__name__}; expected an nn.Module.")
            with users_code(f"{key} of {where}"):
                parts[key] = made()
    if "data" in parts and ("test" in parts or "train" in parts):
        raise InvalidInput(f"{where} returned 'data' and also 'train' or 'test'; give 'test' and 'train', or 'data'.")
    if "test" in parts:
        train = parts.pop("train", None)
        parts["data"] = {"test": parts.pop("test"), **({} if train is None else {"train": train})}
    return parts
