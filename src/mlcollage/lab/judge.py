"""The judge: what the evidence says of each claim.

Rules, fixed before any data (``docs/how-claims-are-judged.md`` explains them in plain words). The effect is the mean
over seeds: of the values, of treatment minus control, or of Spearman's correlation of value and level (``trend``).

``greater``, ``less``
    Supported if the effect lies beyond ``null`` in that direction, significantly, unless its interval lies short of
    the margin. Contradicted if an effect of ``margin`` or more in that direction is ruled out, significantly.
``within``
    Supported if the effect lies inside ``null ± margin`` by two one-sided tests, contradicted if significantly outside.
``at_most``, ``at_least``
    Supported if the effect lies on the allowed side of the limit ``null``, contradicted if on the other; significantly.
test ``exact``
    Supported if every seed satisfies the direction (for ``within``: inside ``null ± margin``; otherwise the margin is
    not used), contradicted if any violates it. The estimate is the worst value. No p value.

A claim some of whose runs are neither finished nor failed is ``pending``: no estimate is shown, since a look at half
of the seeds is not the test that was registered.

Everything else is ``inconclusive``, with the number of seeds that would give 80 % power at the margin. "Significantly"
means a one-sided test at the claim's ``alpha`` after Holm's correction over all claims of the study that are due at
this scale; supports are one family, contradictions another. A claim that is due but cannot be tested counts in its
family with p = 1, so that failed runs never make the other tests easier. A contradiction takes precedence. The
interval that vetoes "supported" is the one printed beside it: two-sided, 95 %, not corrected for the number of claims.

Evidence with seeds that were added after a look at the results (``evidence.registered`` is set) is judged by
anytime-valid tests and intervals (:mod:`mlcollage.stats.sequential`), whose error rates hold however often one looks
and whenever one stops; the rules above are the same, and so is Holm's correction, which needs nothing but p values
that are valid when they are read. A test without such a version (``bootstrap_t``) sees the registered seeds only.

Seeds that all agree (zero variance) are tested by exact sign flips (two arms: permutations), never by a t of infinity.
Below five seeds the verdict says how few they are, below two there is none. What is missing or failed is listed in
``warnings``.

Seeds that were run and have no value (NaN, a failed run) count against each verdict: for a test of "above the null", as
far below the null as the farthest value seen lies from it; in unpaired arms as the least favorable value of either;
in a trend as the reversed order. The p value is the larger of that one and the one without them. Seeds that repeat
another in every number count once (:mod:`mlcollage.lab.seeds`).

The error rates hold on a condition: differences (or values) that are normal, or symmetric about their mean. A long
tail against the claim breaks it, the more the fewer seeds lie in it. Where the seeds show strong skewness or outlying
values (:mod:`mlcollage.stats.shape`), the verdict says so, and stays inconclusive unless a t test that allows for
skewness, or one without the outlying seeds, agrees at ``alpha``. A disaster that no seed shows, no test can know of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mlcollage._users import users_code
from mlcollage.errors import InvalidInput, MLCollageError, UserCodeError
from mlcollage.lab.claim import Claim, Status, Verdict
from mlcollage.lab.evidence import Evidence, Failure
from mlcollage.lab.procedures import (
    ANYTIME,
    LEVEL,
    Samples,
    against_the_alternative,
    constant_procedure,
    mean_procedure,
    shape_of,
    stricter_tests,
    trend_procedure,
)
from mlcollage.lab.run import Scale
from mlcollage.lab.seeds import awaited_runs, copied_seeds, listed, lost_seeds, mixed_units, plural, relevant_failures
from mlcollage.stats._values import Floats, difference, is_constant
from mlcollage.stats.adaptive import Design, Goal, holm, required_seeds, tost

POWER = 0.8  # of the number of seeds that a verdict recommends
FEW = 5  # seeds below which a verdict says how few they are

_DIRECTIONS = ("greater", "less", "within", "at_most", "at_least")
_TESTS = ("t", "bootstrap_t", "sign_flip", "permutation", "trend", "exact")


@dataclass
class _Finding:
    """What was found of one claim before the correction over claims."""

    claim: Claim
    status: Status | None = None
    reason: str = ""
    estimate: float | None = None
    interval: tuple[float, float] | None = None
    means: dict[str, float] = field(default_factory=dict)
    seeds: int = 0
    p_support: float | None = None
    p_contradict: float | None = None
    test: str = ""
    seeds_needed: int | None = None
    anytime: bool = False
    lost: tuple[list[int], ...] = ()
    stricter: list[tuple[str, float, float]] = field(default_factory=list)  # tests that must agree, and both p values
    measured: tuple[float, float] | None = None  # both p values without the seeds that were lost
    warnings: list[str] = field(default_factory=list)

    @property
    def in_family(self) -> bool:
        """Whether the claim counts in Holm's correction."""
        return self.status is not Status.UNTESTED and self.claim.test != "exact"


def judge(claims: Sequence[Claim], evidence: Evidence) -> dict[str, Verdict]:
    """Verdicts on all claims of a study, by claim id; the rules are in the module's docstring.

    Pure and deterministic. A claim that the evidence cannot answer (an arm that is absent, a single seed) gets an
    inconclusive verdict with the reason; it never stops the others.

    Parameters
    ----------
    claims
        All claims of the study: Holm's correction is over these.
    evidence
        What was measured.

    Raises
    ------
    InvalidInput
        If the claims themselves are malformed: two with one id, or a test that does not fit the design.

    Examples
    --------
    >>> from mlcollage.lab.estimand import Difference
    >>> claim = Claim("C1", "a beats b", "Arm a is more accurate.", "Fig. 1", Difference("accuracy", "a", "b"),
    ...               "greater", margin=0.02, factor=100, unit="pts", digits=1)
    >>> values = {"a": [0.91, 0.94, 0.90, 0.93, 0.92, 0.93], "b": [0.86, 0.90, 0.84, 0.89, 0.85, 0.88]}
    >>> table = pd.DataFrame([{"arm": arm, "seed": seed, "metric": "accuracy", "step": 0, "value": v}
    ...                       for arm, column in values.items() for seed, v in enumerate(column)])
    >>> verdict = judge([claim], Evidence("demo", Scale.QUICK, "digits", table))["C1"]
    >>> verdict.status.value, verdict.effect, verdict.test
    ('supported', '+5.2 pts [3.9, 6.4]', 'paired t')
    """
    claims = _checked_claims(claims)
    findings = [_examine(claim, evidence) for claim in claims]
    family = [f for f in findings if f.in_family]
    # A claim without a p value stays in its family with 1: failed runs must not make the other tests easier.
    support = holm([1.0 if f.p_support is None else f.p_support for f in family])
    contradict = holm([1.0 if f.p_contradict is None else f.p_contradict for f in family])
    # Supports and contradictions are two families: each may err once in 1 / alpha studies.
    adjusted = {f.claim.id: (float(s), float(c)) for f, s, c in zip(family, support, contradict, strict=True)}
    verdicts = {}
    for f in findings:
        p_holm = None
        if f.status is None:
            p_holm, p_contradict = adjusted[f.claim.id]
            f.status, f.reason = _decide(f, p_holm, p_contradict)
        verdicts[f.claim.id] = Verdict(
            claim=f.claim,
            status=f.status,
            scale=Scale(evidence.scale),
            workload=evidence.workload,
            estimate=f.estimate,
            interval=f.interval,
            means=f.means,
            level=LEVEL,
            seeds=f.seeds,
            p_value=f.p_support,
            p_holm=p_holm,
            test=f.test,
            seeds_needed=f.seeds_needed,
            reason=f.reason,
            warnings=tuple(f.warnings),
        )
    return verdicts


def _checked_claims(given: Any) -> list[Claim]:
    seen: set[str] = set()
    # A list, since a generator would be used up by this check, and then nothing be judged.
    claims = [given] if isinstance(given, Claim) else list(given)
    for c in claims:
        if not isinstance(c, Claim):
            raise InvalidInput(f"{c!r} is no claim; expected mlcollage.lab.Claim(...).")
        if c.id in seen:
            raise InvalidInput(f"two claims have the id {c.id!r}; ids must differ.")
        seen.add(c.id)
        if c.direction not in _DIRECTIONS:
            raise InvalidInput(f"claim {c.id}: direction {c.direction!r} must be one of {', '.join(_DIRECTIONS)}.")
        if c.test not in _TESTS:
            raise InvalidInput(f"claim {c.id}: test {c.test!r} must be one of {', '.join(_TESTS)}.")
        if c.test == "permutation" and c.paired:
            raise InvalidInput(f"claim {c.id}: test 'permutation' is unpaired; set paired=False or use 'sign_flip'.")
        if c.test in ("sign_flip", "trend") and not c.paired:
            raise InvalidInput(f"claim {c.id}: test {c.test!r} needs seeds that pair the arms; paired is False.")
        if c.test == "trend" and (c.direction not in ("greater", "less") or c.null != 0 or c.margin >= 1):
            raise InvalidInput(
                f"claim {c.id}: a trend has direction 'greater' or 'less', null=0 and a margin below 1 "
                "(its effect is a rank correlation)."
            )
    return claims


def _examine(claim: Claim, evidence: Evidence) -> _Finding:
    """Estimate and raw p values, or the reason why there are none."""
    found = _Finding(claim)
    if not claim.due_at(Scale(evidence.scale)):
        found.status, found.reason = Status.UNTESTED, "not tested at this scale"
        return found
    found.anytime = evidence.registered is not None and claim.test in ANYTIME
    # Before anything is counted, so that seeds added for other claims are no missing values of this one.
    evidence = _seeds_of_claim(found, evidence)
    if awaited := awaited_runs(claim, evidence):
        damaged = len({f.run.id for f in evidence.damaged} & {run.id for run in awaited})
        note = f", of which {damaged} {'is' if damaged == 1 else 'are'} damaged" if damaged else ""
        found.status = Status.PENDING
        found.reason = f"{len(awaited)} run{plural(len(awaited))} missing{note}"
        return found
    failures = relevant_failures(claim, evidence)
    if failures:
        found.warnings.append(_failure_text(failures))
    try:
        if evidence.table.empty:
            raise InvalidInput("nothing was measured.")
        table = claim_table(claim, evidence)
        found.warnings += table.attrs.get("notes", [])
        # Copies first: a copied seed is neither a value nor a lost one.
        table, copies = copied_seeds(claim, evidence, table)
        found.warnings += copies
        found.lost = lost_seeds(claim, evidence, table)
        whole = table[np.isfinite(table.to_numpy()).all(axis=1)]
        found.means = {str(arm): float(whole[arm].mean()) for arm in whole}
        {"exact": _exact, "trend": _trend}.get(claim.test, _mean)(found, table)
        if found.estimate is not None and claim.test != "trend":
            found.warnings += mixed_units(claim, table, found.estimate)
    except UserCodeError as error:
        if not (isinstance(error.__cause__, LookupError) and (evidence.missing or evidence.failures)):
            raise  # everything is there, so the estimand is wrong
        found.status = Status.INCONCLUSIVE
        found.reason = f"cannot be computed from the runs that finished: {error}"
    except MLCollageError as error:
        found.status, found.reason = Status.INCONCLUSIVE, str(error)
    return found


def _seeds_of_claim(found: _Finding, evidence: Evidence) -> Evidence:
    """Evidence without the added seeds that were not meant for the claim.

    Seeds are added to the arms of open claims only, so an added seed counts if all of the claim's arms were run with
    it. One in which a run failed stays: what is missing there must be reported.
    """
    own = evidence.registered
    if own is None or evidence.table.empty:
        return evidence
    table, claim = evidence.table, found.claim
    keep = set(range(own))  # registered seeds count in any case
    if claim.test == "bootstrap_t":
        found.warnings.append(
            f"judged by the {own} registered seeds: {claim.test} has no anytime-valid version, so the seeds that were "
            "added later cannot count"
        )
    else:
        arms_of: dict[int, set[str]] = {}
        for seed, arm in table[["seed", "arm"]].drop_duplicates().itertuples(index=False):
            arms_of.setdefault(int(seed), set()).add(arm)
        usual = set(table.loc[table["seed"].between(1, own - 1), "arm"])  # seed 0 may hold what is drawn only once
        needed = usual & set(getattr(claim.estimand, "arms", ()) or usual)
        broken = {seed for f in evidence.failures for seed in f.run.seeds}
        keep |= {seed for seed, arms in arms_of.items() if needed <= arms or seed in broken}
    return dataclasses.replace(
        evidence,
        table=table[table["seed"].isin(keep)],
        failures=[f for f in evidence.failures if keep & set(f.run.seeds)],
    )


def claim_table(claim: Claim, evidence: Evidence) -> pd.DataFrame:
    """What the claim's estimand gives, checked: one row per seed, as floats."""
    with users_code(f"the estimand of claim {claim.id}"):
        table = claim.estimand(evidence)
    if not isinstance(table, pd.DataFrame):
        raise UserCodeError(f"the estimand of claim {claim.id} gave {type(table).__name__}, not a DataFrame.")
    if table.index.has_duplicates:
        seeds = table.index[table.index.duplicated()].unique()
        raise InvalidInput(
            f"several rows for seed {listed(seeds)}: one row per seed was expected. If they are episodes or batches, "
            "average them inside the run: the seed is the unit of replication."
        )
    if table.empty:
        raise InvalidInput("the estimand gave no values.")
    if table.columns.has_duplicates or table.index.hasnans or any(map(pd.api.types.is_complex_dtype, table.dtypes)):
        raise UserCodeError(
            f"the estimand of claim {claim.id} gave two columns of one name, a row without a seed or complex numbers; "
            "expected one row per seed (the index), one column per arm, and real numbers."
        )
    attrs = table.attrs  # astype drops them
    with users_code(f"making numbers of what the estimand of claim {claim.id} gave"):
        # Booleans and integers too: shares and counts are compared as numbers.
        table = table.astype(np.float64)
    table.attrs = attrs
    return table


def _failure_text(failures: Sequence[Failure]) -> str:
    named = "; ".join(f"{f.run.arm} seed {f.run.seed}: {f.reason}" for f in failures)
    return f"{len(failures)} run{plural(len(failures))} failed ({named})"


def complete_values(claim: Claim, table: pd.DataFrame) -> tuple[tuple[pd.Series, ...], list[str]]:
    """The effects of the seeds that have all values, and a sentence on those that have not.

    Parameters
    ----------
    claim
        Says whether its arms are paired by seed.
    table
        What :func:`claim_table` gave.

    Returns
    -------
    tuple of Series
        The effect of each seed (n,), by seed; for two arms that are not paired the values of each, (n,) and (m,).
    list of str
        Which seeds were left out.

    Raises
    ------
    InvalidInput
        If the estimand gives more than two columns.
    """
    if table.shape[1] == 2 and not claim.paired:
        parts = [_complete(_measured(table, c)) for c in table.columns]
        return tuple(kept.iloc[:, 0] for kept, _ in parts), [note for _, notes in parts for note in notes]
    # Differences of all seeds, then only those whose two values are finite.
    effects = _seed_effects(claim, table)
    kept, notes = _complete(table)
    return (effects[kept.index],), notes


def _complete(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Rows that are finite in every column, and a sentence on the others."""
    finite = pd.DataFrame(np.isfinite(table.to_numpy()), index=table.index, columns=table.columns)
    lost = [
        f"seed {seed} ({listed(c for c in table.columns if not finite.at[seed, c])})"
        for seed in table.index[~finite.all(axis=1)]
    ]
    return table[finite.all(axis=1)], [f"left out for want of a finite value: {listed(lost)}"] if lost else []


def _measured(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The column's own seeds: an unpaired arm need not have those of the other."""
    seeds = table.attrs.get("measured", {}).get(column)
    return table[[column]] if seeds is None else table.loc[list(seeds), [column]]


def _exact(found: _Finding, table: pd.DataFrame) -> None:
    """Every seed must satisfy the claim; the estimate is the worst of them."""
    claim = found.claim
    values = _seed_effects(claim, table).to_numpy()
    known = values[~np.isnan(values)]
    beyond = difference(known, claim.null)  # 0.1 + 0.2 is not above 0.3
    found.seeds, found.test = len(known), "every seed"
    without = sorted({*table.index[np.isnan(values)], *(s for s in found.lost[0] if s not in table.index)})
    if without:
        found.warnings.append(f"no value for seed {listed(without)}")
    if not len(known):
        raise InvalidInput("no seed has a value.")
    # The worst value, since one violation contradicts.
    found.estimate = float(known[np.argmax(_badness(claim, known))])
    satisfied = {
        "greater": beyond > 0,
        "less": beyond < 0,
        "within": difference(np.abs(beyond), claim.margin) <= 0,
        "at_most": beyond <= 0,
        "at_least": beyond >= 0,
    }[claim.direction]
    bad = int((~satisfied).sum())
    if bad:
        found.status = Status.CONTRADICTED
        found.reason = f"{bad} of {len(known)} seed{plural(len(known))} violate{'s' if bad == 1 else ''} it"
    elif without:
        found.status = Status.INCONCLUSIVE
        found.reason = f"all {len(known)} values satisfy it, but {len(without)} are missing"
    else:
        found.status = Status.SUPPORTED
        found.reason = f"every seed satisfies it ({len(known)})"


def _badness(claim: Claim, values: Floats) -> Floats:
    """How unfavorable each value is to the claim."""
    if claim.direction == "within":
        return np.abs(values - claim.null)
    return values if claim.direction in ("less", "at_most") else -values


def largest(table: pd.DataFrame) -> float:
    """Largest finite magnitude; refused where its square, and so a variance, is not a number of double precision."""
    values = table.to_numpy()
    size = float(np.abs(values[np.isfinite(values)]).max())
    if size and not 1e-150 < size < 1e150:
        raise InvalidInput(
            f"values of the size {size:.0e} have no variance in double precision; use another unit, or log=True."
        )
    return size


def _seed_effects(claim: Claim, table: pd.DataFrame) -> pd.Series:
    """One effect per seed: the value itself, or treatment minus control."""
    if table.shape[1] > 2:
        raise InvalidInput(
            f"the estimand gives {table.shape[1]} columns; test {claim.test!r} takes one (values) or two "
            "(treatment, control)."
        )
    if table.shape[1] == 1:
        return table.iloc[:, 0]
    with np.errstate(invalid="ignore"):  # two infinite values have no difference
        return pd.Series(difference(table.iloc[:, 0], table.iloc[:, 1]), index=table.index)


def _enough(found: _Finding, n: int) -> None:
    found.seeds = n
    if n < 2:
        raise InvalidInput(f"{n or 'no'} seed{plural(n)} with all values: variance not identifiable.")
    if n < FEW:
        found.warnings.append(f"only {n} seeds")


def _mean(found: _Finding, table: pd.DataFrame) -> None:
    """Estimate, interval and p values of a mean or of a difference of means."""
    claim = found.claim
    columns = table.shape[1]
    unpaired = columns == 2 and not claim.paired
    by_seed, notes = complete_values(claim, table)
    samples: Samples = tuple(s.to_numpy() for s in by_seed)  # one array (seeds,), or those of two unpaired arms
    if claim.test == "permutation" and not unpaired:
        raise InvalidInput("test 'permutation' compares two arms; the estimand gives one column.")
    found.warnings += notes
    _enough(found, min(len(s) for s in samples))
    found.estimate = float(samples[0].mean() - samples[1].mean() if unpaired else samples[0].mean())
    procedure = mean_procedure(claim.test, columns, unpaired, found.anytime)
    magnitude = largest(table)
    # Deterministic metrics, or one that is 0 everywhere: a t of infinity would call them proven by two seeds.
    degenerate = all(is_constant(s, magnitude) for s in samples)
    if degenerate:
        procedure = constant_procedure(columns, unpaired, found.anytime)
        found.warnings.append(f"no variation over seeds: p value from {procedure.name}, no interval")
    else:
        ends = procedure.interval(samples)
        if np.isfinite(ends).all():
            found.interval = ends
        else:
            why = "too few seeds" if found.anytime else "too few different values"
            found.warnings.append(f"no {LEVEL:.0%} interval from {procedure.name}: {why}")
    found.test = f"{procedure.name}, two one-sided" if claim.direction == "within" else procedure.name
    found.p_support, found.p_contradict = _p_values(claim, samples, procedure.p)
    if not degenerate and not found.anytime:
        found.seeds_needed = _needed(claim, samples)
    if not degenerate:
        # The p values stand; what the shape casts doubt on is decided after Holm's correction.
        _look_at_shape(found, by_seed)
    if any(found.lost):
        _count_lost(found, _p_values(claim, samples, against_the_alternative(procedure.p, by_seed, found.lost)))


def _look_at_shape(found: _Finding, samples: tuple[pd.Series, ...]) -> None:
    """Say what a t test would not expect of the seeds, and test again in a way that allows for it."""
    claim = found.claim
    skew, far = shape_of(samples)
    if skew is not None:
        side = "lower" if skew < 0 else "higher"
        found.warnings.append(f"the seeds are strongly skewed ({skew:.1f}, the tail towards {side} values)")
    for s, seeds in zip(samples, far, strict=True):
        rest = s.drop(seeds)
        found.warnings += [
            f"seed {seed} lies far from the others: {claim.format(s[seed])}, they from {claim.format(rest.min())} to "
            f"{claim.format(rest.max())}"
            for seed in seeds
        ]
    found.stricter = [
        (name, *_p_values(claim, values, p)) for name, values, p in stricter_tests(samples, skew is not None, far)
    ]


def _count_lost(found: _Finding, p_values: tuple[float, float]) -> None:
    """Let a verdict stand only if it stands with the seeds that were lost counted against it."""
    assert found.p_support is not None
    assert found.p_contradict is not None
    found.measured = (found.p_support, found.p_contradict)
    found.p_support, found.p_contradict = (max(*both) for both in zip(found.measured, p_values, strict=True))
    found.warnings.append(
        f"{_those(found)} counted against the claim: p = {_p(p_values[0])} before Holm's correction, without "
        f"{_p(found.measured[0])}"
    )


def _those(found: _Finding) -> str:
    count = sum(len(seeds) for seeds in found.lost)
    return f"the {count} seed{plural(count)} without a value"


def _p_values(claim: Claim, samples: Samples, p: Callable[..., float]) -> tuple[float, float]:
    """Raw one-sided p values of "supported" and of "contradicted"."""
    null, margin = claim.null, claim.margin
    if claim.direction == "within":
        inside = tost(*samples, low=null - margin, high=null + margin, test=p)
        # Outside on either side: two tests, so twice the smaller p value (Bonferroni).
        above = p(*samples, null=null + margin, alternative="greater")
        below = p(*samples, null=null - margin, alternative="less")
        return inside, min(1.0, 2 * min(above, below))
    if claim.direction in ("at_most", "at_least"):
        low, high = (p(*samples, null=null, alternative=a) for a in ("less", "greater"))
        return (low, high) if claim.direction == "at_most" else (high, low)
    if claim.direction == "greater":
        return p(*samples, null=null, alternative="greater"), p(*samples, null=null + margin, alternative="less")
    return p(*samples, null=null, alternative="less"), p(*samples, null=null - margin, alternative="greater")


def _trend(found: _Finding, table: pd.DataFrame) -> None:
    """Page's test for support; a test of the seeds' rank correlations against the margin for contradiction."""
    claim = found.claim
    if table.shape[1] < 3:
        raise InvalidInput(f"the estimand gives {table.shape[1]} columns; a trend needs at least 3 ordered levels.")
    kept, notes = _complete(table)
    found.warnings += notes
    _enough(found, len(kept))
    rising = claim.direction == "greater"
    rho, procedure, found.p_support, of_constants = trend_procedure(kept.to_numpy(), rising, found.anytime)
    found.estimate, found.test = float(rho.mean()), procedure.name
    if is_constant(rho, 1.0) and procedure is not of_constants:
        procedure = of_constants
        found.warnings.append(
            "every seed has the same rank correlation: no interval, and sign flips against the margin"
        )
    else:
        found.interval = procedure.interval((rho,))
        found.seeds_needed = None if found.anytime else _needed(claim, (rho,))
    sign = 1 if rising else -1
    found.p_contradict = procedure.p(sign * rho, null=claim.margin, alternative="less")
    if any(found.lost):
        # against support: the reversed order; against a contradiction: the claimed one
        lost, k = found.lost[0], kept.shape[1]
        falling = np.tile(np.arange(k, 0, -1.0) if rising else np.arange(1.0, k + 1), (len(lost), 1))
        reversed_ = pd.concat([kept, pd.DataFrame(falling, index=lost, columns=kept.columns)]).sort_index()
        p_support = trend_procedure(reversed_.to_numpy(), rising, found.anytime)[2]
        in_order = pd.concat([pd.Series(sign * rho, kept.index), pd.Series(1.0, lost)]).sort_index()
        _count_lost(found, (p_support, procedure.p(in_order.to_numpy(), null=claim.margin, alternative="less")))


def _needed(claim: Claim, samples: Samples) -> int | None:
    """Seeds (in each arm) for 80 % power at the margin with the observed standard deviation, by the t test."""
    if claim.margin == 0:
        return None
    # By the t test, whatever the test: others need about as many seeds, and have no formula.
    goal: Goal = "equivalence" if claim.direction == "within" else "difference"
    sd = float(np.sqrt(np.mean([s.var(ddof=1) for s in samples])))
    design: Design = "unpaired" if len(samples) == 2 else "one_sample"
    try:
        n = required_seeds(claim.margin, sd, alpha=claim.alpha, power=POWER, design=design, goal=goal)
    except InvalidInput:  # more than a thousand million
        return None
    if claim.test == "sign_flip":  # the smallest p value is 2^-n
        n = max(n, int(np.ceil(-np.log2(claim.alpha))))
    return n


def _decide(f: _Finding, p_support: float, p_contradict: float) -> tuple[Status, str]:
    """Status and reason from Holm-adjusted p values."""
    claim = f.claim
    # The order matters: doubts about few seeds, then a contradiction, then what the interval vetoes, then support.
    shown = p_support <= claim.alpha
    how = f"after Holm, anytime-valid, {f.seeds} seeds" if f.anytime else "after Holm"
    for name, *again in f.stricter:
        for p, p_again, verdict in zip((p_support, p_contradict), again, ("supported", "contradicted"), strict=True):
            if p <= claim.alpha < p_again:
                return Status.INCONCLUSIVE, (
                    f"{verdict} by {f.test} (p = {_p(p)} {how}), but not by {name} (p = {_p(p_again)}): "
                    "the shape of few seeds decides, so more are needed"
                )
    if p_contradict <= claim.alpha:
        return Status.CONTRADICTED, _contradiction(f, shown) + f" (p = {_p(p_contradict)} {how})"
    if shown and _short_of_margin(f):
        reason = f"{_support(claim)} (p = {_p(p_support)} {how}), but by its interval short of {_size(claim)}"
        return Status.INCONCLUSIVE, f"{reason}; whether it is that small is not settled"
    if shown:
        return Status.SUPPORTED, f"{_support(claim)} (p = {_p(p_support)} {how})"
    # Raw p values: with and without the lost seeds, both before Holm's correction.
    counted = zip(f.measured or (), (f.p_support, f.p_contradict), ("supported", "contradicted"), strict=False)
    for measured, with_lost, verdict in counted:
        if with_lost is not None and measured <= claim.alpha < with_lost:
            what = "is" if sum(map(len, f.lost)) == 1 else "are"
            return Status.INCONCLUSIVE, (
                f"not {verdict} once {_those(f)} {what} counted against that: p = {_p(with_lost)}, "
                f"without {_p(measured)}"
            )
    reason = f"{f.seeds} seeds neither show it nor rule it out (p = {_p(p_support)} {how})"
    if f.seeds_needed is not None:
        reason += f"; {POWER:.0%} power for {_size(claim)} takes about {f.seeds_needed}, other claims not counted"
    return Status.INCONCLUSIVE, reason


def _short_of_margin(f: _Finding) -> bool:
    """Whether the printed interval shows the effect to be smaller than what matters."""
    c = f.claim
    if f.interval is None or c.direction not in ("greater", "less"):
        return False
    low, high = f.interval
    return high < c.null + c.margin if c.direction == "greater" else low > c.null - c.margin


def _size(claim: Claim) -> str:
    return claim.format_limit(claim.margin)


def _support(claim: Claim) -> str:
    limit = claim.format_limit(claim.null)
    if claim.test == "trend":
        return "rises along the levels" if claim.direction == "greater" else "falls along the levels"
    return {
        "greater": f"above {limit}",
        "less": f"below {limit}",
        "within": f"within {_size(claim)} of {limit}",
        "at_most": f"below {limit}",
        "at_least": f"above {limit}",
    }[claim.direction]


def _contradiction(f: _Finding, shown: bool) -> str:
    claim = f.claim
    if claim.direction in ("greater", "less"):
        if shown:
            return f"there is an effect, but smaller than what matters, {_size(claim)}"
        return f"an effect of {_size(claim)} or more is ruled out"
    limit = claim.format_limit(claim.null)
    return {
        "within": f"more than {_size(claim)} from {limit}",
        "at_most": f"above {limit}",
        "at_least": f"below {limit}",
    }[claim.direction]


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else f"{p:.0e}"
