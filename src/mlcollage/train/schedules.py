"""Learning-rate schedules: functions from the 0-based step to a factor on the base learning rate.

A schedule is a plain function without state, so that two runs that share one can be compared at every step, and a
run can be resumed at any step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

Schedule = Callable[[int], float]


def constant(warmup: int = 0) -> Schedule:
    """Factor 1 throughout, after a linear warm-up if one is asked for.

    Examples
    --------
    >>> [constant(warmup=2)(t) for t in range(4)]
    [0.5, 1.0, 1.0, 1.0]
    """
    warmup = checks.integer("warmup", warmup, least=0)
    return lambda step: _warm(step, warmup)


def cosine(total: int, final: float = 0.0, warmup: int = 0, every: int = 1) -> Schedule:
    r"""Half a cosine from 1 down to ``final`` (Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5).

    .. math::

        f(t) = f_\mathrm{final} + \tfrac12 (1 - f_\mathrm{final})
        \left(1 + \cos\left(\pi \frac{t - w}{T - w}\right)\right), \qquad w \le t \le T

    Before it, a linear warm-up :math:`f(t) = (t + 1) / w` for :math:`t < w`; after it, ``final``.

    Parameters
    ----------
    total
        Steps T of the whole run, warm-up included.
    final
        Factor from step ``total`` on. The last of T updates is step T - 1, just above it, as in
        ``torch.optim.lr_scheduler.CosineAnnealingLR``.
    warmup
        Steps w of linear warm-up.
    every
        Hold the factor for this many steps at a time, as schedules that advance once per epoch do.

    Examples
    --------
    >>> f = cosine(4)
    >>> [round(f(t), 3) for t in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    return _ramp(total, final, warmup, every, lambda u: 0.5 * (1 + math.cos(math.pi * u)))


def warmup_cosine(total: int, warmup: int, end: float = 1e-3) -> Schedule:
    r"""Linear warm-up from 0 and half a cosine down to ``end``, as in the code of Barlow Twins.

    .. math::

        f(t) = t / w \quad (t < w), \qquad
        f(t) = q + f_\mathrm{end} (1 - q), \quad q = \tfrac12 \left(1 + \cos \pi \frac{t - w}{T - w}\right)

    Unlike :func:`cosine`'s, the warm-up starts with a step of rate 0.

    Parameters
    ----------
    total
        Optimizer steps T of the whole run, warm-up included; accumulated micro-batches are no steps.
    warmup
        Steps w of the warm-up, fewer than ``total``.
    end
        Factor from step ``total`` on, by default 0.001.

    Examples
    --------
    >>> f = warmup_cosine(6, 2)
    >>> [round(f(t), 4) for t in range(7)]
    [0.0, 0.5, 1.0, 0.8537, 0.5005, 0.1473, 0.001]
    """
    after = cosine(total, end, warmup)
    return lambda step: step / warmup if step < warmup else after(step)


def linear(total: int, final: float = 0.0, warmup: int = 0, every: int = 1) -> Schedule:
    """A straight line from 1 down to ``final`` at step ``total``, after a linear warm-up; arguments as :func:`cosine`.

    Examples
    --------
    >>> f = linear(6, warmup=2)
    >>> [f(t) for t in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return _ramp(total, final, warmup, every, lambda u: 1 - u)


def step_decay(milestones: Sequence[int], factor: float = 0.1) -> Schedule:
    """Multiply by ``factor`` at each milestone, as ``torch.optim.lr_scheduler.MultiStepLR`` does.

    Parameters
    ----------
    milestones
        Steps at which the rate changes, in any order; the update of that step has the new rate already.
    factor
        What the rate is multiplied by.

    Examples
    --------
    >>> [round(step_decay([2, 3], 0.1)(t), 3) for t in range(5)]
    [1.0, 1.0, 0.1, 0.01, 0.01]
    """
    if isinstance(milestones, int):
        raise InvalidInput(f"milestones must be a list of steps such as [{milestones}], not one number.")
    steps = [checks.integer("each milestone", m, least=0) for m in milestones]
    factor = checks.real("factor", factor, least=0)
    return lambda step: float(factor ** sum(step >= m for m in steps))  # once per milestone that is past


def _ramp(total: int, final: float, warmup: int, every: int, shape: Callable[[float], float]) -> Schedule:
    """From 1 after the warm-up down to ``final`` at ``total``; ``shape`` maps the share u of the way to 1 ... 0."""
    total = checks.integer("total", total, least=1)
    warmup, every = checks.integer("warmup", warmup, least=0), checks.integer("every", every, least=1)
    final = checks.real("final", final, least=0)
    if warmup >= total:
        raise InvalidInput(f"warmup={warmup} must be shorter than the whole run of total={total} steps.")

    def factor(step: int) -> float:
        step = step // every * every  # the first step of its period
        if step < warmup:
            return _warm(step, warmup)
        if step >= total:
            return final
        return final + (1 - final) * shape((step - warmup) / (total - warmup))

    return factor


def _warm(step: int, warmup: int) -> float:
    # Step + 1, so that the first update does not have the rate 0, which would waste it.
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
