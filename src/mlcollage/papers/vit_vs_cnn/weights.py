"""Which weights a network has: loaded ones, counted, or fresh ones for a control."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage.errors import InvalidInput
from mlcollage.nn.init import seeded

_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "teacher.", "encoder.")


def load_weights(model: nn.Module, state: Mapping[str, Any], *, missing: str | tuple[str, ...] = ()) -> int:
    """Load weights into a network and refuse if any tensor of it was left as it was.

    ``load_state_dict(strict=False)`` loads nothing, in silence, if all names have a prefix, and the comparison is then
    one of random networks. Prefixes that wrappers add (``module.``, ``_orig_mod.``, ``backbone.``, ``teacher.`` and so
    on) are taken off here.

    Parameters
    ----------
    model
        The network, changed in place.
    state
        Tensors by name.
    missing
        Prefixes or patterns of names that may stay as they are, such as ``("head.",)`` or ``("*.bias",)``.

    Returns
    -------
    int
        Number of tensors that were loaded.

    Raises
    ------
    InvalidInput
        If tensors of the network are not in ``state``, or have another shape or NaN there. Nothing is loaded then.

    Examples
    --------
    >>> net = nn.Linear(2, 3)
    >>> load_weights(net, {f"module.{name}": t for name, t in nn.Linear(2, 3).state_dict().items()})
    2
    """
    if not isinstance(state, Mapping):
        raise InvalidInput(f"state is a {type(state).__name__}; a mapping from names to tensors is needed.")
    own, missing = model.state_dict(), (missing,) if isinstance(missing, str) else tuple(missing)
    given = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    inner = [k for k, v in state.items() if isinstance(v, Mapping) and any(isinstance(t, Tensor) for t in v.values())]
    if not given and inner:
        raise InvalidInput(f"the checkpoint holds tensors in its entry {inner[0]!r}: pass state[{inner[0]!r}].")
    best = max(_renamed(given), key=lambda names: len(own.keys() & names.keys()))
    found = {name: t for name, t in best.items() if name in own}
    wrong = [name for name, t in found.items() if t.shape != own[name].shape]
    lacking = [n for n in own if n not in found and not any(n.startswith(m) or fnmatchcase(n, m) for m in missing)]
    spoilt = [name for name, t in found.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if wrong:
        name = wrong[0]
        raise InvalidInput(
            f"{name!r} has the shape {tuple(found[name].shape)} in the checkpoint and {tuple(own[name].shape)} in the "
            f"network ({len(wrong)} such tensors)."
        )
    if lacking:
        raise InvalidInput(
            f"{len(lacking)} of {len(own)} tensors of the network are not in the checkpoint ({', '.join(lacking[:3])}, "
            f"...), whose names begin with {', '.join(list(given)[:2]) or 'none'}: give a mapping of the network's "
            "names, or say which may stay as they are with missing=."
        )
    if spoilt:
        raise InvalidInput(f"{spoilt[0]!r} holds NaN or infinite numbers ({len(spoilt)} such tensors).")
    model.load_state_dict(found, strict=False)
    return len(found)


def untrained(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a network with fresh weights: the control that tells architecture from training.

    Models of Hugging Face are made anew from their configuration. In others every module with ``reset_parameters`` is
    reset, and parameters of their own (class tokens, position embeddings, scales) are put in random order, which keeps
    their size.

    Parameters
    ----------
    model
        Any module; not changed.
    seed
        Of the fresh weights.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> fresh = untrained(net)
    >>> torch.equal(fresh[0].weight, net[0].weight), torch.equal(fresh[0].weight, untrained(net)[0].weight)
    (False, True)
    """
    checks.integer("seed", seed, least=0)
    with seeded(seed):
        if hasattr(model, "config") and hasattr(model, "init_weights") and hasattr(type(model), "from_pretrained"):
            fresh: nn.Module = type(model)(copy.deepcopy(model.config))
            return fresh.to(next(model.parameters()).device).train(model.training)
        fresh = copy.deepcopy(model)
        rng = generator(seed)
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            with torch.no_grad():
                for p in module.parameters(recurse=False):
                    p.copy_(p.flatten()[torch.randperm(p.numel(), generator=rng).to(p.device)].view_as(p))
        return fresh


def _renamed(given: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors under their names, and with each row of prefixes taken off."""
    found = [dict(given)]
    for _ in range(3):
        for prefix in _PREFIXES:
            part = {k.removeprefix(prefix): v for k, v in found[-1].items() if k.startswith(prefix)}
            if part:
                found.append(part)
    return found
