"""Claims, written before the runs, and the verdicts given on them."""

from __future__ import annotations

import enum
import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from mlcollage._checks import choice, probability, real
from mlcollage._users import users_code
from mlcollage.errors import InvalidInput
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.run import Scale

Direction = Literal["greater", "less", "within", "at_most", "at_least"]
Test = Literal["t", "bootstrap_t", "sign_flip", "permutation", "trend", "exact"]
Estimand = Callable[[Evidence], pd.DataFrame]
TITLE = 60


class Status(enum.StrEnum):
    """The outcome of a claim at one scale."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    INCONCLUSIVE = "inconclusive"
    UNTESTED = "untested"

    @property
    def mark(self) -> str:
        """A sign that goes before the word, so that color is never the only cue."""
        return {"supported": "✓", "contradicted": "✗", "inconclusive": "≈", "untested": "○"}[self.value]


@dataclass(frozen=True)
class Claim:
    """One sentence that the evidence can support or contradict.

    Parameters
    ----------
    id
        ``"C1"`` and so on, as on the paper's page.
    title
        A plain sentence that someone understands who has not read the paper; at most 60 characters.
    sentence
        The claim in one sentence, as tested here.
    source
        The paper's figure or table, e.g. ``"Fig. 1"``.
    paper_value
        What the paper reports, as text; say ``"(from memory)"`` nowhere: leave it empty instead.
    estimand
        Function of the evidence that gives a DataFrame with one row a seed and one column an arm
        (see :mod:`mlcollage.lab.estimand` for the usual ones). One column: the values themselves.
        Two columns: treatment minus control. More: the ordered levels of a trend.
    direction
        ``greater`` or ``less``: the effect differs from ``null`` in that direction.
        ``within``: the effect lies inside ``null ± margin`` (equivalence, two one-sided tests).
        ``at_most`` / ``at_least``: the effect lies on that side of the limit ``null``.
    margin
        Smallest effect that matters, in the metric's own units (always positive). An effect shown to be smaller
        contradicts ``greater`` and ``less``.
    null
        Reference value; 0 for differences.
    test
        ``t`` (Student), ``bootstrap_t``, ``sign_flip`` (exact, paired), ``permutation`` (unpaired),
        ``trend`` (Page's ordered-alternatives test over the columns), ``exact`` (every seed must satisfy it;
        for statements that are true or false, such as an identity).
    paired
        Whether rows pair the arms (same seed, data and initialization).
    alpha
        One-sided error rate of a wrong "supported", before Holm's correction over the study.
    factor, unit
        How the effect is printed: ``factor=100, unit="pts"`` for accuracies.
    from_scale
        The smallest scale that can show the claim; below it the verdict is "not tested at this scale".
    headline
        Whether it is one of the three to six claims that tell the paper's story.
    kind
        ``"finding"``, or ``"check"`` for an identity or a self-check of an instrument.
    """

    id: str
    title: str
    sentence: str
    source: str
    estimand: Estimand
    direction: Direction
    margin: float = 0.0
    paper_value: str = ""
    null: float = 0.0
    test: Test = "t"
    paired: bool = True
    alpha: float = 0.05
    factor: float = 1.0
    unit: str = ""
    digits: int = 2
    from_scale: Scale = Scale.QUICK
    headline: bool = False
    kind: Literal["finding", "check"] = "finding"

    def __post_init__(self) -> None:
        probability(f"alpha of claim {self.id}", self.alpha)
        choice(f"kind of claim {self.id}", self.kind, ("finding", "check"))
        for name in ("margin", "null", "factor"):
            real(f"{name} of claim {self.id}", getattr(self, name))
        if self.margin < 0:
            raise InvalidInput(
                f"claim {self.id}: margin={self.margin} must not be negative; it is a size, not a direction."
            )
        if self.direction in ("greater", "less", "within") and self.test != "exact" and self.margin == 0:
            raise InvalidInput(
                f"claim {self.id}: direction {self.direction!r} needs margin > 0, the smallest effect that matters."
            )
        for name in ("id", "title"):
            if not str(getattr(self, name)).strip():
                raise InvalidInput(f"claim {self.id!r}: its {name} is empty; verdicts, slides and digests print it.")
        if len(self.title) > TITLE:
            raise InvalidInput(
                f"claim {self.id}: title {self.title!r} has {len(self.title)} characters; at most {TITLE} are shown."
            )

    def due_at(self, scale: Scale) -> bool:
        """Whether a verdict is given at this scale; scale smoke gives none."""
        return scale is not Scale.SMOKE and scale.rank >= Scale(self.from_scale).rank

    def format(self, value: float, *, signed: bool = True) -> str:
        """Print a value of this claim's effect with its unit."""
        v = value * self.factor
        if self.unit in ("pts", "%") and abs(v) < 1e-9:
            v = 0.0  # the rounding of a mean of shares, not a finding
        magnitude = abs(v)
        if v != 0 and (magnitude < 10 ** -(self.digits + 1) or magnitude >= 1e5):
            text = f"{v:+.1e}" if signed else f"{v:.1e}"
        else:
            text = f"{v:+.{self.digits}f}" if signed else f"{v:.{self.digits}f}"
        return f"{text} {self.unit}".strip().replace("-", "−")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the function; its source text stands in for it."""
        fields = {k: getattr(self, k) for k in self.__dataclass_fields__ if k != "estimand"}
        return {**fields, "from_scale": str(self.from_scale), "estimand": _describe(self.estimand)}


def _describe(estimand: Estimand) -> str:
    text = getattr(estimand, "describe", None)
    if text is not None:
        with users_code("describe() of an estimand"):
            return str(text())
    try:
        return inspect.getsource(estimand).strip()
    except (OSError, TypeError):
        return repr(estimand)


def fingerprint(claims: tuple[Claim, ...]) -> str:
    """Hash of a study's claims; stored with each run, so that a later change of a claim shows."""
    text = json.dumps([c.to_dict() for c in claims], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Verdict:
    """What the evidence says of a claim.

    ``estimate`` and ``interval`` are in the metric's own units; use ``claim.format`` to print them.
    """

    claim: Claim
    status: Status
    scale: Scale
    workload: str
    estimate: float | None = None
    interval: tuple[float, float] | None = None
    level: float = 0.95
    seeds: int = 0
    p_value: float | None = None
    p_holm: float | None = None
    test: str = ""
    seeds_needed: int | None = None
    reason: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def effect(self) -> str:
        """Estimate and interval as text, e.g. ``+6.1 pts [4.8, 7.4]``."""
        if self.estimate is None:
            return ""
        text = self.claim.format(self.estimate, signed=self.claim.direction in ("greater", "less", "within"))
        if self.interval is not None:
            lo, hi = (f"{v * self.claim.factor:.{self.claim.digits}f}".replace("-", "−") for v in self.interval)
            text += f" [{lo}, {hi}]"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        return {
            **self.claim.to_dict(),
            "status": str(self.status),
            "scale": str(self.scale),
            "workload": self.workload,
            "estimate": self.estimate,
            "interval": list(self.interval) if self.interval else None,
            "level": self.level,
            "seeds": self.seeds,
            "p_value": self.p_value,
            "p_holm": self.p_holm,
            "test_used": self.test,
            "seeds_needed": self.seeds_needed,
            "reason": self.reason,
            "warnings": list(self.warnings),
        }
