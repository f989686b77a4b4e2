"""Seeded construction of networks, leaving the global random state as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mlcollage._random import derive
from mlcollage.errors import InvalidInput


@contextmanager
def seeded(seed: int, *more: int) -> Iterator[None]:
    """Layers inside draw their numbers as if the process had just been seeded; afterwards nothing has changed.

    Torch layers that draw (initialization, dropout) know only the global generators. This context seeds those of the
    CPU and of every CUDA device already in use, and puts their old states back on leaving, also after an error.

    Parameters
    ----------
    seed
        Any int; the same seed gives the same numbers on one kind of device.
    more
        Further ints that select an independent stream: a step, a replica.

    Examples
    --------
    >>> with seeded(0):
    ...     a = torch.rand(2)
    >>> with seeded(0):
    ...     b = torch.rand(2)
    >>> bool((a == b).all())
    True
    """
    # GPUs only if they are in use already: to ask for the state of another one would start CUDA.
    generators = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generators += list(torch.cuda.default_generators)
    if more:  # a single seed stays what it is: the numbers are those after torch.manual_seed(seed)
        seed = derive(seed, *more)
    states = [g.get_state() for g in generators]
    try:
        for g in generators:
            g.manual_seed(seed)
        yield
    finally:  # also after an error, or the rest of the program would go on with our numbers
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)


def build(model_fn: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Make a network, its initialization drawn from ``seed`` and from nothing else.

    Parameters
    ----------
    model_fn
        Makes a fresh network of any kind; called once, without arguments.
    seed
        The same seed gives the same weights, whatever was drawn before; the global random state is left as it was.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    InvalidInput
        If ``model_fn`` is a network instead of a function that makes one, or returns something else.

    Examples
    --------
    >>> a = build(lambda: nn.Linear(3, 2), seed=1)
    >>> b = build(lambda: nn.Linear(3, 2), seed=1)
    >>> torch.equal(a.weight, b.weight)
    True
    """
    if isinstance(model_fn, nn.Module):
        raise InvalidInput(
            f"build needs a function that makes a fresh network, but got a {type(model_fn).__name__} that exists "
            "already; pass `lambda: ...` around its construction."
        )
    with seeded(seed):
        model = model_fn()
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model_fn must return a torch.nn.Module, but returned a {type(model).__name__}.")
    return model
