r"""How far a study's verdicts can be trusted: labels permuted, arms swapped, power at the margin.

*Permuted labels.* In each seed the arms' labels are drawn anew. Whatever the arms differ in is then gone, and what the
judge still calls supported is an error of the judge with this study's seeds, values and claims. The rate of draws in
which at least one claim is supported must be at most the level that Holm's correction promises. A claim on one value
:math:`v` per seed is reflected at its reference value, :math:`v' = v_0 \pm (v - v_0)`, the same sign for all claims.

*Swapped arms.* With treatment and control exchanged, a supported claim must lose its support.

*Power.* Whether the registered seeds would detect an effect of the margin's size in four of five repetitions, given
the spread that was measured.

Claims of equivalence and identities have no "no difference" among their assumptions, and are left out of the first two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mlcollage._checks import integer
from mlcollage.errors import InvalidInput, MLCollageError
from mlcollage.lab.claim import Claim, Status, Verdict
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.judge import claim_table, judge
from mlcollage.lab.run import Scale
from mlcollage.stats._values import Floats

_DIRECTED = ("greater", "less", "at_most", "at_least")


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found.

    Attributes
    ----------
    study, scale
        What was audited.
    claims
        A row per claim (the index): ``title``, ``headline``, ``verdict``, ``swapped`` (the verdict with arms swapped,
        or empty), ``false_support`` (share of permutations in which it was supported; NaN where it was left out),
        ``seeds``, and ``seeds_needed`` for 80 % power at the margin (NaN where that is not defined).
    draws
        How many permutations.
    false_any
        Share of permutations in which at least one claim was supported.
    level
        The largest share that the tests promise.
    left_out
        Claims that could not be permuted, and why.
    """

    study: str
    scale: Scale
    claims: pd.DataFrame
    draws: int
    false_any: float
    level: float
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def standard_error(self) -> float:
        """Standard error of ``false_any`` from the number of draws, at the promised level."""
        return float(np.sqrt(self.level * (1 - self.level) / self.draws))

    @property
    def kept_support(self) -> list[str]:
        """Claims that are supported both ways round, which none may be."""
        both = (self.claims["verdict"] == Status.SUPPORTED) & (self.claims["swapped"] == Status.SUPPORTED)
        return [str(i) for i in self.claims.index[both]]

    @property
    def powered(self) -> tuple[int, int]:
        """How many headline claims have seeds for 80 % power at their margin, and of how many that is known."""
        known = self.claims[self.claims["headline"] & self.claims["seeds_needed"].notna()]
        return int((known["seeds"] >= known["seeds_needed"]).sum()), len(known)

    def cells(self) -> tuple[str, ...]:
        """The row of a table, as text: study, claims, chance support, promise, support kept when swapped, power."""
        enough, known = self.powered
        return (
            self.study,
            f"{len(self.claims) - len(self.left_out)} of {len(self.claims)}",
            f"{self.false_any:.1%} ± {self.standard_error:.1%}",
            f"{self.level:.0%}",
            ", ".join(self.kept_support) or "none",
            f"{enough} of {known} headlines",
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        rows = self.claims.reset_index().astype(object).where(lambda t: t.notna(), None).to_dict("records")
        own = {name: getattr(self, name) for name in ("study", "draws", "false_any", "level", "left_out")}
        return {**own, "scale": str(self.scale), "kept_support": self.kept_support, "claims": rows}


def audit(claims: Sequence[Claim], evidence: Evidence, *, draws: int = 200, seed: int = 0) -> Audit:
    """Judge evidence with labels permuted and with arms swapped, and compare its seeds with those that power needs.

    Parameters
    ----------
    claims, evidence
        As for :func:`~mlcollage.lab.judge.judge`. Seeds that were added after a look are left out: the audit is of the
        design that was registered.
    draws
        Permutations. With 200 a share of 5 % has a standard error of 1.5 points.
    seed
        Of the permutations.

    Raises
    ------
    InvalidInput
        If nothing was measured, or no claim compares anything.

    Examples
    --------
    >>> import numpy as np
    >>> from mlcollage.lab import Claim, Difference
    >>> claim = Claim("C1", "a beats b", "Arm a is better.", "Fig. 1", Difference("m", "a", "b"), "greater", margin=0.5)
    >>> draw = np.random.default_rng(0)
    >>> rows = [{"arm": arm, "seed": s, "metric": "m", "step": 0, "value": mean + draw.normal()}
    ...         for arm, mean in (("a", 4.0), ("b", 0.0)) for s in range(8)]
    >>> found = audit([claim], Evidence("demo", Scale.QUICK, "noise", pd.DataFrame(rows)))
    >>> found.claims.loc["C1", ["verdict", "swapped"]].tolist(), found.false_any <= 0.05
    (['supported', 'contradicted'], True)
    """
    draws = integer("draws", draws, least=1)
    if not len(evidence.table):
        raise InvalidInput(f"nothing was measured of {evidence.study} at scale {evidence.scale}; run it first.")
    if evidence.registered is not None:
        own = evidence.table[evidence.table["seed"] < evidence.registered]
        evidence = dataclasses.replace(evidence, table=own, registered=None)
    verdicts = judge(claims, evidence)
    tables: dict[str, pd.DataFrame] = {}
    left_out: dict[str, str] = {}
    for claim in claims:
        found = _values(claim, evidence, verdicts[claim.id])
        if isinstance(found, str):
            left_out[claim.id] = found
        else:
            tables[claim.id] = found
    if not tables:
        raise InvalidInput(
            f"no claim of {evidence.study} compares arms, or a value with a reference, by a test; there is nothing to "
            "permute."
        )
    chosen = [claim for claim in claims if claim.id in tables]
    swapped = _judged(chosen, {claim.id: _swap(claim, tables[claim.id]) for claim in chosen})
    rng = np.random.default_rng(seed)
    supported = np.array([_permuted(chosen, tables, rng) for _ in range(draws)])  # (draws, claims)
    false = dict(zip(tables, supported.mean(axis=0), strict=True))
    rows = {
        claim.id: {
            "title": claim.title,
            "headline": claim.headline,
            "verdict": str(verdicts[claim.id].status),
            "swapped": str(swapped.get(claim.id, "")),
            "false_support": float(false.get(claim.id, np.nan)),
            "seeds": verdicts[claim.id].seeds,
            "seeds_needed": float(verdicts[claim.id].seeds_needed or np.nan),
        }
        for claim in claims
    }
    return Audit(
        study=evidence.study,
        scale=Scale(evidence.scale),
        claims=pd.DataFrame.from_dict(rows, orient="index").rename_axis("claim"),
        draws=draws,
        false_any=float(supported.any(axis=1).mean()),
        level=max(claim.alpha for claim in chosen),
        left_out=left_out,
    )


def _values(claim: Claim, evidence: Evidence, verdict: Verdict) -> pd.DataFrame | str:
    """What is permuted, a row per seed and a column per arm; or why nothing is."""
    if claim.test == "exact":
        return "true or false, without a test"
    if claim.direction not in _DIRECTED:
        return "an equivalence, which assumes a difference until the opposite is shown"
    if verdict.status in (Status.UNTESTED, Status.PENDING):
        return verdict.reason or verdict.status.words
    try:
        # Arms that are not paired may have seeds of their own, so that a row may have gaps.
        table = claim_table(claim, evidence).dropna(how="any" if claim.paired else "all")
    except MLCollageError as error:
        return str(error)
    return table if len(table) > 1 else "fewer than two seeds"


def _permuted(claims: list[Claim], tables: dict[str, pd.DataFrame], rng: np.random.Generator) -> list[bool]:
    """Which claims are supported after one permutation of labels, the same for all claims with the same arms."""
    seeds = sorted(set().union(*(table.index for table in tables.values())))
    turned = pd.Series(rng.random(len(seeds)) < 0.5, index=seeds)  # (seeds,) whether two labels change places
    orders: dict[int, pd.Series] = {}  # by number of columns, an order for each seed
    drawn: dict[str, pd.DataFrame] = {}
    for claim in claims:
        table = tables[claim.id]
        columns = table.shape[1]
        values = table.to_numpy(float)  # (seeds, arms)
        turn = turned[table.index].to_numpy()
        if columns == 1 or (columns == 2 and claim.paired):
            values = np.where(turn[:, None], _reflected(values, claim.null), values)
        elif columns == 2:
            values = _shuffled(values, claim.null, rng)
        else:
            if columns not in orders:
                orders[columns] = pd.Series([rng.permutation(columns) for _ in seeds], index=seeds)
            values = np.take_along_axis(values, np.stack(list(orders[columns][table.index])), axis=1)
        drawn[claim.id] = pd.DataFrame(values, index=table.index, columns=table.columns)
    statuses = _judged(claims, drawn)
    return [statuses[claim.id] is Status.SUPPORTED for claim in claims]


def _shuffled(values: Floats, null: float, rng: np.random.Generator) -> Floats:
    """Values of two unpaired arms (n, 2), of which the first exceeds the second by ``null``, dealt out anew."""
    there = np.isfinite(values)
    pool = (values - np.array([[null, 0.0]]))[there]
    dealt = np.full_like(values, np.nan)
    dealt[there] = rng.permutation(pool)
    return dealt + np.array([[null, 0.0]])


def _swap(claim: Claim, table: pd.DataFrame) -> pd.DataFrame:
    """The same seeds with the effect turned round its reference value; levels of a trend in reverse."""
    values = table.to_numpy(float)
    turned = _reflected(values, claim.null) if values.shape[1] < 3 else values[:, ::-1]
    return pd.DataFrame(turned, index=table.index, columns=table.columns)


def _reflected(values: Floats, null: float) -> Floats:
    """Effect e turned into 2 null - e: of values (n, 1) themselves, of two arms (n, 2) by exchanging them."""
    return 2 * null - values if values.shape[1] == 1 else values[:, ::-1] + np.array([[null, -null]])


def _judged(claims: list[Claim], tables: dict[str, pd.DataFrame]) -> dict[str, Status]:
    """The judge's words on claims whose estimands give these tables."""

    def giving(table: pd.DataFrame) -> Callable[[Evidence], pd.DataFrame]:
        return lambda _: table

    judged = [dataclasses.replace(claim, estimand=giving(tables[claim.id])) for claim in claims]
    # Nothing is looked up in it: the tables are there. One row says that something was measured.
    row = {"experiment": "audit", "arm": "audit", "seed": -1, "metric": "audit", "step": 0, "value": 0.0}
    evidence = Evidence("audit", Scale.PAPER, "audit", pd.DataFrame([row]))
    return {key: verdict.status for key, verdict in judge(judged, evidence).items()}
