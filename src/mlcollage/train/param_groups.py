"""Groups of parameters for optimizers: weights on one side, biases and the parameters of norms on the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mlcollage.errors import InvalidInput, UnknownName

__all__ = ["split_bias_and_norm"]


def split_bias_and_norm(model: nn.Module, *, also: str | Sequence[str] = (), **settings: Any) -> list[dict[str, Any]]:
    """Two parameter groups: weights, and biases and norms with settings of their own.

    The second group holds every parameter with fewer than two axes, every ``bias``, and every parameter of a module
    whose class name contains "norm". Frozen parameters are in neither; one that is used twice is listed once.

    Parameters
    ----------
    model
        Any module.
    also
        Further parameters for the second group, by name or pattern, such as ``"*pos_embed"`` or ``"*cls_token"``, which
        many recipes do not decay either.
    **settings
        Of the second group, such as ``lr=0.0048`` or ``weight_decay=0.0``. By default it has no weight decay.

    Raises
    ------
    UnknownName
        If a pattern matches no parameter.
    InvalidInput
        If no parameter of the model is trained.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> groups = split_bias_and_norm(model, lr=0.0048)
    >>> [[tuple(p.shape) for p in group["params"]] for group in groups]
    [[(4, 3), (2, 4)], [(4,), (4,), (4,), (2,)]]
    >>> optimizer = torch.optim.SGD(groups, lr=0.2, weight_decay=1e-4)
    >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    [(0.2, 0.0001), (0.0048, 0.0)]
    """
    patterns = [also] if isinstance(also, str) else list(also)
    named = dict(model.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise UnknownName(f"no parameter of the model matches {pattern!r}; it has {_some(named)}.")
    normed = {
        id(p)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in named.items():
        if not p.requires_grad:
            continue
        apart = p.ndim < 2 or name.rsplit(".", 1)[-1] == "bias" or id(p) in normed
        (others if apart or any(fnmatchcase(name, pattern) for pattern in patterns) else weights).append(p)
    if not weights and not others:
        raise InvalidInput("no parameter of the model is trained: all have requires_grad=False.")
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, **settings}]
    return [group for group in groups if group["params"]]


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:6]) + (", ..." if len(every) > 6 else "")
