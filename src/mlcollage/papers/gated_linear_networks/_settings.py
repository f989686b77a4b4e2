"""What settings may be: layer sizes and step sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

Array = NDArray[Any]
LearningRate = float | Literal["paper", "official", "sqrt"] | Callable[[int], float]


def hidden_sizes(value: Any) -> tuple[int, ...]:
    """Hidden layer sizes as integers.

    Raises
    ------
    InvalidInput
        What is given is not a sequence of integers >= 1.

    Examples
    --------
    >>> hidden_sizes([16, 8])
    (16, 8)
    """
    try:
        sizes = tuple(value)
    except TypeError:
        raise InvalidInput(f"Layer sizes must be a sequence of integers, such as (50, 25), not {value!r}.") from None
    return tuple(checks.integer("Each of the layer sizes", size, least=1) for size in sizes)


def check_rate(rate: LearningRate, initial: float) -> None:
    """Refuse learning rates that are neither a known schedule, nor a function, nor > 0."""
    if isinstance(rate, str):
        checks.choice("learning_rate", rate, ("paper", "official", "sqrt"))
    elif not callable(rate):
        checks.positive("learning_rate", rate)
    checks.positive("learning_rate_init", initial)


def step_sizes(
    rate: LearningRate, first: int, count: int, *, initial: float = 0.01, memory: int | None = None
) -> Array:
    """Learning rates of steps ``first .. first + count - 1`` (the first step of all is 1).

    Parameters
    ----------
    rate : "paper", "official", "sqrt", float or callable
        ``"paper"``: ``min(initial, 100 / t)``; ``"official"``: ``min(initial, 1 / (1 + 0.1 t))``; ``"sqrt"``:
        ``initial / sqrt(t)``, the decay of the regret bound; a constant; or a function of the step ``t = 1, 2, ...``.
    first, count : int
        The steps.
    initial : float, default 0.01
        Largest rate of the named schedules.
    memory : int or None, default None
        Step at which the schedule stops.

    Examples
    --------
    >>> step_sizes("paper", 10_000, 3)
    array([0.01    , 0.009999, 0.009998])
    """
    # Rates are made in float64 and rounded once, by the network: a schedule must not depend on its precision.
    t = np.minimum(np.arange(first, first + count, dtype=np.float64), np.inf if memory is None else memory)
    if rate == "paper":
        return np.minimum(initial, 100.0 / t)
    if rate == "official":
        return np.minimum(initial, 1.0 / (1.0 + 0.1 * t))
    if rate == "sqrt":
        return initial / np.sqrt(t)
    if callable(rate):
        sizes = np.array([float(rate(int(step))) for step in t], np.float64)
        if not np.isfinite(sizes).all() or (sizes < 0).any():
            raise InvalidInput(
                "learning_rate returned a negative or non-finite step size; it must return a float >= 0."
            )
        return sizes
    return np.full(count, float(rate))
