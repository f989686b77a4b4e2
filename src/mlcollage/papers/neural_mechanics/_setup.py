"""What a tracker checks of model and optimizer before it starts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.neural_mechanics.closed_form import Kernel, kernel
from mlcollage.papers.neural_mechanics.symmetry import SymmetrySet

__all__ = ["Settings", "group_of", "mixed_words", "one_kernel", "tracked"]

_PREFIXES = ("_orig_mod.", "module.")  # what torch.compile and DistributedDataParallel put before names


class Settings(NamedTuple):
    """What one parameter group is trained with in one step."""

    lr: float
    weight_decay: float
    momentum: float
    dampening: float
    ascent: bool


@functools.lru_cache(maxsize=4096)
def one_kernel(lr: float, weight_decay: float, momentum: float, dampening: float, kind: Any) -> Kernel:
    """:func:`kernel`, remembered: one matrix exponential a setting."""
    return kernel(lr, weight_decay, momentum, dampening, kind=kind)


def mixed_words(law: str) -> str:
    """Why a law has no closed form."""
    return (
        f"the law {law!r} spans parameter groups with different settings (learning rate, weight decay, momentum), for "
        "which there is no closed form; use mode='ledger'."
    )


def tracked(model: nn.Module, syms: SymmetrySet) -> dict[str, nn.Parameter]:
    """The laws' parameters by name."""
    named = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        bare = name
        for prefix in _PREFIXES:
            bare = bare.removeprefix(prefix)
        named[bare] = parameter
    found = {}
    for name in syms.parameters:
        if name not in named:
            raise InvalidInput(
                f"the laws act on {name!r}, which the model has not; find them with find_symmetries on this very model."
            )
        parameter = named[name]
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InvalidInput(f"the parameter {name!r} is lazy; run one batch through the model first.")
        if parameter.is_complex():
            raise InvalidInput(f"the parameter {name!r} is complex; laws are tracked for real parameters only.")
        found[name] = parameter
    return found


def group_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Number of the parameter group of each."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidInput(f"optimizer must be a torch.optim.Optimizer, not a {type(optimizer).__name__}.")
    where = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    missing = [name for name, p in parameters.items() if id(p) not in where]
    if missing:
        shown = ", ".join(map(repr, missing[:3])) + (" and more" if len(missing) > 3 else "")
        raise InvalidInput(
            f"the optimizer does not train {shown}, on which the laws act; give it all parameters of the "
            "laws, or track laws of trained parameters only."
        )
    return {name: where[id(p)] for name, p in parameters.items()}
