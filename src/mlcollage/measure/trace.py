"""The estimate of a trace, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class TraceResult:
    """A trace, and how far chance may have moved it.

    Parameters
    ----------
    value
        The trace; a mean over examples where the matrix is one.
    stderr
        Standard error of ``value`` as an estimate of the trace for these data: 0 where nothing was drawn, NaN where
        there was only one draw.
    per_layer
        The part of each module's own parameters, by path; the parts sum to ``value``.
    per_example
        (N,), the trace for each example, whose mean is ``value``.
    draws
        Independent draws (of labels or vectors) behind ``value``, 0 where nothing was drawn.

    Examples
    --------
    >>> float(TraceResult(3.0, 0.5))
    3.0
    >>> TraceResult(3.0, 0.5).interval(0.95)
    (2.02..., 3.97...)
    """

    value: float
    stderr: float
    per_layer: Mapping[str, float] | None = None
    per_example: Tensor | None = field(default=None, repr=False)
    draws: int = 0

    def __float__(self) -> float:
        return self.value

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Normal interval for the trace that covers it with probability ``level``."""
        from scipy.stats import norm

        # Half the width; zero where nothing was drawn, NaN where the error is not known.
        half = float(norm.ppf(0.5 + level / 2)) * self.stderr if self.stderr else 0.0
        return (math.nan, math.nan) if math.isnan(half) else (self.value - half, self.value + half)
