"""Claims, written before the runs, and the verdicts given on them."""

from __future__ import annotations

import enum
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from mlcollage._checks import choice, integer, positive, probability, real
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
    PENDING = "pending"

    @property
    def mark(self) -> str:
        """A sign that goes before the word, so that color is never the only cue."""
        return _MARKS[self]

    @property
    def words(self) -> str:
        """What a reader is told."""
        return {"untested": "not tested", "pending": "not measured yet"}.get(self.value, self.value)


_MARKS = {
    Status.SUPPORTED: "✓",
    Status.CONTRADICTED: "✗",
    Status.INCONCLUSIVE: "≈",
    Status.UNTESTED: "○",
    Status.PENDING: "◌",
}


_UNSPACED = ("", "%", "×", "°")  # units that stand at the number itself


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
    bounds
        Lowest and highest value that the effect can have, where printed intervals stop; -1 and 1 for correlations.
    log_ratio
        The effect is a natural logarithm of a ratio and is printed as the ratio (``3.0×``). By default so for a
        difference of two arms whose estimand takes logarithms.
    headline
        Whether it is one of the three to six claims that tell the paper's story.
    says
        The finding in a full sentence for each outcome: ``"supported"``, ``"contradicted"``, ``"inconclusive"``.
        ``{effect}`` stands for the size of the effect without its sign, ``{0}`` and ``{1}`` for the means of the
        estimand's columns, ``{last}`` for the last of them, all with units:
        ``"With wrong labels the penalty ends at {0}, without it at {1}"``.
        The slide prints it above the picture that shows the claim. Without one, the title and the effect are printed.
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
    bounds: tuple[float, float] | None = None
    log_ratio: bool | None = None
    headline: bool = False
    says: Mapping[str, str] = field(default_factory=dict, hash=False)
    kind: Literal["finding", "check"] = "finding"

    def __post_init__(self) -> None:
        probability(f"alpha of claim {self.id}", self.alpha)
        choice(f"kind of claim {self.id}", self.kind, ("finding", "check"))
        choice(f"from_scale of claim {self.id}", self.from_scale, [str(scale) for scale in Scale])
        for name in ("margin", "null"):
            real(f"{name} of claim {self.id}", getattr(self, name))
        positive(f"factor of claim {self.id}", self.factor), integer(f"digits of claim {self.id}", self.digits, least=0)
        for name, kind in (("id", str), ("title", str), ("unit", str), ("paired", bool)):
            if not isinstance(value := getattr(self, name), kind):
                raise InvalidInput(f"{name} of claim {self.id!r} must be a {kind.__name__}, not {value!r}.")
        if self.margin < 0:
            raise InvalidInput(
                f"claim {self.id}: margin={self.margin} must not be negative; it is a size, not a direction."
            )
        if self.direction in ("greater", "less", "within") and self.test != "exact" and self.margin == 0:
            raise InvalidInput(
                f"claim {self.id}: direction {self.direction!r} needs margin > 0, the smallest effect that matters."
            )
        for name in ("id", "title"):
            if not getattr(self, name).strip():
                raise InvalidInput(f"claim {self.id!r}: its {name} is empty; verdicts, slides and digests print it.")
        if len(self.title) > TITLE:
            raise InvalidInput(
                f"claim {self.id}: title {self.title!r} has {len(self.title)} characters; at most {TITLE} are shown."
            )

    def due_at(self, scale: Scale) -> bool:
        """Whether a verdict is given at this scale; scale smoke gives none."""
        return scale is not Scale.SMOKE and scale.rank >= Scale(self.from_scale).rank

    @property
    def _is_correlation(self) -> bool:
        return self.test == "trend" or self.unit in ("rho", "tau")

    @property
    def is_ratio(self) -> bool:
        """Whether the effect is printed as a ratio."""
        taken = getattr(self.estimand, "log", False) and len(getattr(self.estimand, "arms", ())) == 2
        return bool(taken) if self.log_ratio is None else self.log_ratio

    def shown(self, value: float) -> float:
        """A value of the effect as it is printed: within its bounds, in its unit, as a ratio if it is one."""
        bounds = (-1.0, 1.0) if self.bounds is None and self._is_correlation else self.bounds
        if bounds is not None:
            value = min(max(value, bounds[0]), bounds[1])
        return math.exp(value) if self.is_ratio else value * self.factor

    def _digits(self, v: float) -> str:
        """A printed value without sign and unit; large ratios need no decimals."""
        digits = self.digits if not self.is_ratio else 0 if v >= 100 else max(1, self.digits)
        return f"{v:.{digits}f}".replace("-", "−")

    def format(self, value: float, *, signed: bool = True) -> str:
        """Print a value of this claim's effect with its unit."""
        v = self.shown(value)
        if self.is_ratio:
            return f"{self._digits(v)}×"
        if self.unit in ("pts", "%") and abs(v) < 1e-9:
            v = 0.0  # the rounding of a mean of shares, not a finding
        magnitude = abs(v)
        if v != 0 and (magnitude < 10 ** -(self.digits + 1) or magnitude >= 1e5):
            text = f"{v:+.1e}" if signed else f"{v:.1e}"
        else:
            text = f"{v:+.{self.digits}f}" if signed else f"{v:.{self.digits}f}"
        return f"{text}{'' if self.unit in _UNSPACED else ' '}{self.unit}".strip().replace("-", "−")

    def format_limit(self, value: float) -> str:
        """Print a limit or margin, which was chosen and not measured, with all the digits that it has."""
        v = self.shown(value)
        if self.is_ratio or math.isclose(round(v, self.digits), v, rel_tol=1e-9):
            return self.format(value, signed=False)
        return f"{v:.6g}{'' if self.unit in _UNSPACED else ' '}{self.unit}".strip().replace("-", "−")

    def format_level(self, value: float) -> str:
        """Print the mean of one arm: a difference in points is one of percentages, one of logarithms of values."""
        v = math.exp(value) if self.is_ratio else value * self.factor
        bare = self.is_ratio or self._is_correlation  # what is ranked has not the unit of the correlation
        unit = {"pts": "%", "points": "%"}.get(self.unit, "" if bare else self.unit)
        text = f"{v:,.{self.digits}f}" if 1e-3 < abs(v) < 1e6 or v == 0 else f"{v:.1e}"
        return f"{text}{'' if unit in _UNSPACED else ' '}{unit}".replace("-", "−")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the function; its source text stands in for it."""
        fields = {k: getattr(self, k) for k in self.__dataclass_fields__ if k != "estimand"}
        fields["says"] = dict(self.says)
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


_PRINTED = ("title", "unit", "factor", "digits", "bounds", "log_ratio", "headline", "says", "kind")


def fingerprint(claims: tuple[Claim, ...]) -> str:
    """Hash of what a study's claims assert and how they are judged, not of how they are worded and printed.

    Stored with each run, so that a later change of a claim shows.
    """
    judged = [{k: v for k, v in c.to_dict().items() if k not in _PRINTED} for c in claims]
    text = json.dumps(judged, sort_keys=True, default=str)
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
    means: Mapping[str, float] = field(default_factory=dict)
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
        # A sign tells the direction of a difference; what is compared with another value than 0 is none.
        signed = self.claim.null == 0 and self.claim.direction in ("greater", "less", "within")
        text = self.claim.format(self.estimate, signed=signed)
        if self.interval is not None:
            lo, hi = (self.claim._digits(self.claim.shown(v)) for v in self.interval)
            text += f" [{lo}, {hi}]"
        return text

    @property
    def finding(self) -> str:
        """What was found, in a full sentence that fits the verdict; without an end mark, as titles are.

        Examples
        --------
        ``With 30% wrong labels the penalty ends at 74%, without it at 65%``
        """
        claim = self.claim
        if self.status in (Status.UNTESTED, Status.PENDING) or self.estimate is None:
            return f"{claim.title}: {self.status.words}"
        size = claim.format(self.estimate, signed=False).lstrip("−").removesuffix(" rho").removesuffix(" tau")
        if template := claim.says.get(self.status.value, ""):
            means = [claim.format_level(v) for v in self.means.values()]
            return template.format(*means, effect=size, last=means[-1] if means else "")
        before = {"contradicted": "Not so here: ", "inconclusive": "Not settled here: "}.get(self.status.value, "")
        return f"{before}{claim.title} ({self.effect.split(' [')[0]})"

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
            "means": dict(self.means),
            "seeds": self.seeds,
            "p_value": self.p_value,
            "p_holm": self.p_holm,
            "test_used": self.test,
            "seeds_needed": self.seeds_needed,
            "reason": self.reason,
            "warnings": list(self.warnings),
        }
