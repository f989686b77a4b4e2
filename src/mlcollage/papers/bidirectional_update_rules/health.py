"""How learning by a genome goes, in numbers and in words: what a peak of accuracy alone would hide."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._layers import Path

SATURATED, DEAD, GROWN = 0.5, 0.25, 1e4  # shares and a ratio above which there is something to say
_AT_BOUND = 1e-3  # distance from a bound of the activation within which a unit is saturated
_CONSTANT = 1e-6  # range of a unit's output, beside its size, below which it is dead


@dataclass(frozen=True)
class LearningHealth:
    """How learning went so far.

    Attributes
    ----------
    steps
        Steps of learning.
    first_accuracy, last_accuracy
        On the first batch and on the last one, before each was learned from; NaN where feedback is no class.
    peak_accuracy, peak_step
        The best of these, and the number of steps that had been made by then.
    majority
        Share of the largest class in all batches: what a constant answer would reach.
    saturated
        Share of outputs of hidden units within 0.001 of a bound of their activation, in the last batch.
    dead
        Share of hidden units whose output was the same for all rows of the last batch.
    growth
        Norm of all synapses over what it was before the first step.
    statistics
        What normalizes predictions: ``training rows`` (after ``calibrate``), the ``last batch``, or ``none``.
    advice
        What is amiss and what can be done, a sentence or two each; empty if nothing was found.
    """

    steps: int
    first_accuracy: float
    last_accuracy: float
    peak_accuracy: float
    peak_step: int
    majority: float
    saturated: float
    dead: float
    growth: float
    statistics: str
    advice: tuple[str, ...]


@dataclass
class Record:
    """What a network remembers of its steps."""

    steps: int = 0
    first: float = math.nan
    last: float = math.nan
    peak: float = -1.0
    peak_step: int = 0
    rows: int = 0  # of the last batch
    counts: Tensor | None = None  # rows by class, of all steps
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=20))  # accuracies
    saturated: float = 0.0
    dead: float = 0.0
    norm: float = math.nan  # of the synapses, before the first step
    calibrated: bool = False

    def note(
        self, accuracy: float, y: Tensor | None, classes: int, norm: float, saturated: float, dead: float, rows: int
    ) -> None:
        """Take in a step; ``y`` are its labels, where feedback comes from labels."""
        if not self.steps:
            self.first, self.norm = accuracy, norm
        if accuracy > self.peak:
            self.peak, self.peak_step = accuracy, self.steps
        self.last, self.rows, self.saturated, self.dead = accuracy, rows, saturated, dead
        self.recent.append(accuracy)
        if y is not None:
            counts = y.bincount(minlength=classes)
            self.counts = counts if self.counts is None else self.counts + counts
        self.steps += 1
        self.calibrated = False

    def report(
        self, norm: float, *, normalized: bool, horizon: int | None, grown: float = GROWN, kept: bool = False
    ) -> LearningHealth:
        """The health; ``kept``: the synapses of the best step came back, so that a later fall does no harm."""
        growth = norm / self.norm if self.norm > 0 else 1.0
        total = 0 if self.counts is None else int(self.counts.sum())
        majority = math.nan if self.counts is None else float(self.counts.max()) / total
        advice = []
        if self.saturated > SATURATED:
            advice.append(
                f"{self.saturated:.0%} of the outputs of hidden units are saturated (at a bound of their activation): "
                "standardize the inputs, or use a genome with norm='both'."
            )
        if self.dead > DEAD:
            advice.append(
                f"{self.dead:.0%} of the hidden units are dead (the same output for all rows): look for inputs that do "
                "not vary, or for a few rows so large that all others look alike; else use another genome or seed."
            )
        if growth > grown:
            other = ", or use a genome with oja='weights' or synapse_norm='in_use'" if grown == GROWN else ""
            advice.append(f"The synapses have grown by a factor of {growth:.1g}: stop earlier{other}.")
        noise = 3 * math.sqrt(0.5 / max(1, self.rows))  # three errors of a difference of two shares, at most
        if not kept and self.peak - self.last > max(0.1, noise):
            known = f"; it was trained for {horizon} steps" if horizon else ""
            advice.append(
                f"Accuracy on batches fell from {self.peak:.2f} after {self.peak_step} steps to {self.last:.2f} after "
                f"{self.steps - 1}: the rule overshoots{known}. Keep the synapses of the best step, as "
                "BlurClassifier(keep_best=True) does."
            )
        lately = sum(self.recent) / max(1, len(self.recent))
        if self.steps >= 10 and total >= 200 and lately <= majority + math.sqrt(0.25 / total):
            advice.append(
                f"Nothing was learned: accuracy on the last {len(self.recent)} batches is {lately:.2f}, and always "
                f"naming the largest class would reach {majority:.2f}. Check labels and units, or use another genome."
            )
        source = ("training rows" if self.calibrated else "last batch") if normalized else "none"
        return LearningHealth(
            self.steps, self.first, self.last, self.peak if self.peak >= 0 else math.nan, self.peak_step, majority,
            self.saturated, self.dead, growth, source, tuple(advice),
        )  # fmt: skip


def look(path: Path, states: Sequence[Tensor]) -> tuple[float, float]:
    """Shares of saturated outputs and of dead units in the hidden layers, from state 0 of a forward pass."""
    saturated, dead, outputs, units = [torch.zeros(())], [torch.zeros(())], 0, 0
    for layer, state in zip(path.layers[:-1], states, strict=False):
        value = state[0, 0]  # (R, n)
        low, high = value.aminmax(dim=0)
        dead.append((high - low <= _CONSTANT * (1 + high.abs())).sum())
        outputs, units = outputs + value.numel(), units + len(low)
        if layer.activation.bounds is not None:
            bottom, top = layer.activation.bounds
            saturated.append(((value > top - _AT_BOUND) | (value < bottom + _AT_BOUND)).sum())
    return float(sum(saturated)) / max(1, outputs), float(sum(dead)) / max(1, units)


def say(advice: Sequence[str], told: set[str] | None, stacklevel: int = 4) -> None:
    """Warn, each kind of advice once; kinds are told apart by their first letters. None: nothing is said."""
    for sentence in advice:
        kind = "".join(c for c in sentence if c.isalpha())[:20]
        if told is not None and kind not in told:
            told.add(kind)
            warnings.warn(sentence, stacklevel=stacklevel)
