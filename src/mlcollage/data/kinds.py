"""The kinds of workload, in the one place that knows them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from mlcollage.data.goal_tasks import GoalTask
from mlcollage.data.point_clouds import PointClouds
from mlcollage.data.trajectories import Trajectories
from mlcollage.data.workload import Labeled, Workload
from mlcollage.errors import InvalidInput

#: Every kind; a new one is a frozen dataclass, whose fields without default are what a user's function must return.
KINDS: tuple[type[Workload], ...] = (Labeled, PointClouds, Trajectories, GoalTask)


def as_workload(given: Any, where: str) -> Workload:
    """What a user's function returned, as a workload: that, or a dictionary or any object with the fields of one kind.

    Parameters
    ----------
    given
        What was returned.
    where
        Begins the sentence of a refusal.

    Raises
    ------
    InvalidInput
        If the fields of no kind are there, those of several are, or a name is not a string.

    Examples
    --------
    >>> from torch.utils.data import TensorDataset
    >>> import torch
    >>> data = TensorDataset(torch.rand(20, 3), torch.arange(20) % 2)
    >>> type(as_workload({"train": data, "test": data, "num_classes": 2}, "mine")).__name__
    'Labeled'
    """
    if isinstance(given, Workload):
        _check_names(vars(given), where)
        return given
    parts = {str(k): v for k, v in given.items()} if isinstance(given, Mapping) else None
    every = {name for kind in KINDS for name in _names(kind)}
    there = {name for name in every if hasattr(given, name)} if parts is None else set(parts)
    fitting = [kind for kind in KINDS if set(_required(kind)) <= there]
    if parts is not None:  # an object may have whatever else it likes, a dictionary means all that it holds
        fitting = [kind for kind in fitting if there <= set(_names(kind))]
    if not fitting:
        # The sentence is about the kind that comes nearest; without any likeness, about the first.
        nearest = max(KINDS, key=lambda kind: len(there & set(_names(kind))))
        missing = [name for name in _required(nearest) if name not in there]
        wrong = f"lacks {_list(missing)}" if missing else f"has {_list(sorted(there - set(_names(nearest))))} too"
        raise InvalidInput(f"{where} must return {_offer(nearest)}; the {type(given).__name__} it returned {wrong}.")
    if len(fitting) > 1:
        kinds = " and of a ".join(kind.__name__ for kind in fitting)
        raise InvalidInput(f"what {where} returned has the fields of a {kinds}; return one of these objects itself.")
    (kind,) = fitting
    if parts is None:
        parts = {name: getattr(given, name) for name in _names(kind) if hasattr(given, name)}
    _check_names(parts, where)
    return kind(**parts)


def _names(kind: type[Workload]) -> list[str]:
    return [field.name for field in fields(kind)]


def _required(kind: type[Workload]) -> list[str]:
    return [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]


def _offer(kind: type[Workload]) -> str:
    """The kind and its fields in words."""
    required = _required(kind)
    others = [name for name in _names(kind) if name not in (*required, "name", "fingerprint")]
    perhaps = f" (and perhaps {_list(others)})" if others else ""
    others = [f"mlcollage.data.{k.__name__}" for k in KINDS if k is not kind]
    besides = f"; other kinds are {_list(others)}" if others else ""
    return f"a mlcollage.data.{kind.__name__}, or a dictionary or an object with {_list(required)}{perhaps}{besides}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _check_names(parts: Mapping[str, Any], where: str) -> None:
    for key in ("name", "fingerprint"):
        if not isinstance(parts.get(key, ""), str):
            raise InvalidInput(f"{key} of what {where} returned must be a string; it is {parts[key]!r}.")
