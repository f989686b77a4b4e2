"""What an instrument is, and what it gives: numbers with intervals, health, and pictures' arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlcollage.errors import InvalidInput
from mlcollage.portraits.subject import Subject

State = Literal["measured", "does not apply", "failed", "no time"]
Need = Literal["outputs", "labels", "probabilities", "untrained", "train"]


class DoesNotApply(InvalidInput):
    """The question cannot be asked of this network; the sentence says why."""


@dataclass(frozen=True)
class Number:
    """One measured quantity.

    Parameters
    ----------
    quantity
        What it is, such as ``"accuracy"``; the same name in every portrait and in the matrix.
    value
        The estimate.
    low, high
        Ends of the interval; NaN where there is none.
    unit
        Such as ``"nats"``; empty for a share or a ratio.
    layer
        Which layer; empty for the whole network.
    interval
        What the interval speaks of, such as ``"95%, other test examples"``.
    digits
        Significant digits that are printed.

    Examples
    --------
    >>> str(Number("accuracy", 0.912, 0.89, 0.93))
    '0.912 [0.89, 0.93]'
    """

    quantity: str
    value: float
    low: float = math.nan
    high: float = math.nan
    unit: str = ""
    layer: str = ""
    interval: str = ""
    digits: int = 3

    def __str__(self) -> str:
        def text(v: float) -> str:
            return f"{v:,.{self.digits}g}" if abs(v) < 1e5 else f"{v:.{self.digits}g}"

        ends = "" if math.isnan(self.low) else f" [{text(self.low)}, {text(self.high)}]"
        return f"{text(self.value)}{ends}{' ' if self.unit else ''}{self.unit}"


@dataclass(frozen=True, eq=False)
class Reading:
    """What one instrument said of one network.

    Parameters
    ----------
    instrument
        Its name.
    state
        ``"measured"``, ``"does not apply"``, ``"failed"`` or ``"no time"``.
    numbers
        Those of the whole network (``layer == ""``) first.
    health
        Sentences on how far to trust them.
    sentence
        Why there are none, where there are none.
    arrays
        For pictures, by name.
    seconds
        How long it took; of one that found no time, how long it would need.
    """

    instrument: str
    state: State = "measured"
    numbers: Sequence[Number] = ()
    health: Sequence[str] = ()
    sentence: str = ""
    arrays: Mapping[str, npt.NDArray] = field(default_factory=dict)
    seconds: float = 0.0

    def headline(self, quantity: str) -> Number | None:
        """The number of that name for the whole network, or None."""
        return next((n for n in self.numbers if n.quantity == quantity and not n.layer), None)

    def by_layer(self, quantity: str) -> list[Number]:
        """The numbers of that name of single layers, in the order of execution."""
        return [n for n in self.numbers if n.quantity == quantity and n.layer]


@dataclass(frozen=True)
class Instrument:
    """One question to a network.

    Parameters
    ----------
    name
        Short name.
    title
        What is read, in a few words.
    question
        The question that it answers, one sentence.
    paper
        Slug of the paper whose instrument it is.
    quantities
        Names of the numbers for the whole network.
    measure
        From a prepared network to numbers, health and arrays. Raises :class:`DoesNotApply` with a sentence.
    cost
        Estimated seconds for a prepared network.
    needs
        What the network or the data must have.
    """

    name: str
    title: str
    question: str
    paper: str
    quantities: tuple[str, ...]
    measure: Callable[[Subject], Reading]
    cost: Callable[[Subject], float]
    needs: tuple[Need, ...] = ()

    def why_not(self, subject: Subject) -> str:
        """Why it does not apply, as far as that can be told without measuring; empty if it does."""
        return next((why for need in self.needs if (why := subject.lacks(need))), "")


def finite(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Values as float64, those that are no finite numbers left out."""
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]
