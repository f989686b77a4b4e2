"""A function that makes networks must make a new one at every call, or one training goes on from another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mlcollage.data.workload import make_network
from mlcollage.errors import InvalidInput


def fresh(model: Callable[[], nn.Module], what: str = "the workload's model()") -> Callable[[], nn.Module]:
    """Return a user's function ``model`` after making sure that every call of it makes a new network.

    A function that returns the same network again, or networks that share weights, would let each training go on from
    the one before. Two networks are made for this; the random state of torch is left as it was.

    Parameters
    ----------
    model
        Makes a network.
    what
        What messages call it.

    Raises
    ------
    InvalidInput
        If two calls give the same module or modules that share a parameter or buffer, if a call fails, or if it
        returns something else.

    Examples
    --------
    >>> net = nn.Linear(2, 2)
    >>> fresh(lambda: net)
    Traceback (most recent call last):
    ...
    mlcollage.errors.InvalidInput: the workload's model() hands out the same Linear at every call; ...
    """
    initialized = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if initialized else []):
        refuse_same(make_network(model, what), make_network(model, what), what)
    return model


def refuse_same(first: nn.Module, second: nn.Module, what: str) -> None:
    """Refuse two networks of one function that are the same, or share a parameter or buffer; both must be alive.

    Raises
    ------
    InvalidInput
        See :func:`fresh`.
    """
    kept = _storages(first)  # both networks are still alive, so no address was used twice
    common = [name for place, name in _storages(second).items() if place in kept]
    if first is second or common:
        same = f"the same {type(first).__name__}" if first is second else f"networks that share {common[0]!r}"
        raise InvalidInput(f"{what} hands out {same} at every call; construct a new network in it, e.g. lambda: Net().")


def _storages(network: nn.Module) -> dict[int, str]:
    """Address of the memory of every parameter and buffer, and one name of it."""
    # Addresses and not tensors: a view of a shared tensor shares its memory too.
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return {t.untyped_storage().data_ptr(): name for name, t in tensors if not is_lazy(t) and t.numel()}
