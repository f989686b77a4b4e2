r"""Partial pooling across workloads: what all workloads say of a claim together, and what each says in their light.

A study that was run on several workloads has an effect and a standard error of each claim for each. They are taken as
drawn from one population of workloads (:class:`~mlcollage.stats.multilevel.PartialPooling`, exact by quadrature),

.. math:: y_w \sim \mathrm{N}(\theta_w, s_w^2), \qquad \theta_w \sim \mathrm{N}(\mu, \tau^2),

so that a workload with few or noisy seeds borrows from the others, the more so the less the workloads differ. The
verdicts stay with the judge, one workload at a time; pooling says how far a claim carries beyond the data it was
tested on. A. Gelman and A. Vehtari, JASA 2021, idea 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from mlcollage.errors import InvalidInput, MLCollageError
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.claim import Claim
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.judge import claim_table, complete_values, largest
from mlcollage.lab.run import Scale
from mlcollage.lab.seeds import copied_seeds, listed, plural, relevant_failures
from mlcollage.lab.store import Store
from mlcollage.stats._posterior import Marginal
from mlcollage.stats._values import Floats, is_constant
from mlcollage.stats.bootstrap import t_interval
from mlcollage.stats.causal import page_trend
from mlcollage.stats.multilevel import PartialPooling

LEVEL = 0.95
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)  # half-width of a normal interval, in standard errors
_FORMATS = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class PooledClaim:
    """One claim over workloads; numbers are in the metric's own units, intervals central and of 95 %.

    Attributes
    ----------
    claim
        The claim.
    workloads
        A row per workload (the index): ``seeds``, ``estimate`` with Student's t interval ``low``, ``high``; ``se``, the
        standard error whose normal interval is just as wide; ``shrunken``, ``shrunken_low``, ``shrunken_high``.
        The last three are NaN where fewer than two workloads can be pooled.
    left_out
        Workloads without an effect or a standard error, and why.
    population
        Mean effect over workloads: posterior mean, low, high. None if fewer than two can be pooled.
    tau
        Spread of the effects between workloads, a standard deviation: posterior mean, low, high.
    next_workload
        Where the effect on the next workload of the kind is expected: low, high.
    probability
        That the mean effect lies on the claimed side of the reference value (``within``: inside its margin).
    next_probability
        That the effect on the next workload lies there.
    notes
        Workloads that lack seeds: which were left out for want of a value, repeat others, or failed.
    """

    claim: Claim
    workloads: pd.DataFrame
    left_out: Mapping[str, str]
    population: tuple[float, float, float] | None = None
    tau: tuple[float, float, float] | None = None
    next_workload: tuple[float, float] | None = None
    probability: float | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    next_probability: float | None = None

    @property
    def title(self) -> str:
        """Id and title of the claim."""
        return f"{self.claim.id} · {self.claim.title}"

    def cells(self) -> list[list[str]]:
        """A row of text per workload: its name, seeds, the effect alone and, where there is one, pooled."""
        rows = []
        for name, row in self.workloads.iterrows():
            cells = [str(name), f"{row.seeds:.0f}", self._effect(row.estimate, row.low, row.high)]
            if self.population is not None:
                cells.append(self._effect(row.shrunken, row.shrunken_low, row.shrunken_high))
            rows.append(cells)
        return rows

    def sentences(self) -> list[str]:
        """What holds of all workloads, as lines of text, and what was left out."""
        left_out = [f" {name}: {reason}" for name, reason in {**self.left_out, **self.notes}.items()]
        if self.population is None or self.tau is None or self.next_workload is None:
            return [" measured on fewer than two workloads: nothing to pool", *left_out]
        spread = self.claim.format(self.tau[0], signed=False)
        return [
            f" all workloads: {self._effect(*self.population)}; between workloads: sd {spread} "
            f"{self._span(*self.tau[1:])}",
            f" the next workload: {self._span(*self.next_workload)}; as claimed on average with probability "
            f"{self.probability:.2f}",
            *left_out,
        ]

    def _effect(self, value: float, low: float, high: float) -> str:
        signed = self.claim.direction in ("greater", "less", "within")
        return f"{self.claim.format(value, signed=signed)} {self._span(low, high)}"

    def _span(self, low: float, high: float) -> str:
        c = self.claim
        return f"[{low * c.factor:.{c.digits}f}, {high * c.factor:.{c.digits}f}]".replace("-", "−")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        rows = self.workloads.reset_index().to_dict("records")
        workloads = [{str(k): None if v != v else v for k, v in row.items()} for row in rows]  # JSON has no NaN
        of_claim = {name: getattr(self.claim, name) for name in ("id", "title", "unit", "factor", "null")}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("claim", "workloads")}
        return {**of_claim, "workloads": workloads, **own}


def pool(slug: str, scale: Scale | str = Scale.QUICK, *, store: Store | Path | str = "results") -> list[PooledClaim]:
    """Pool each claim of a study over all workloads that the store holds results of.

    Parameters
    ----------
    slug
        Which paper.
    scale
        Of the runs to pool; results of other scales, and of other versions of an experiment, are left alone.
    store
        Folder of results.

    Returns
    -------
    list of PooledClaim
        Of the claims that are due at the scale and have an effect with an error, so not those with ``test="exact"``.

    Raises
    ------
    InvalidInput
        If the store holds results of fewer than two workloads, or the scale gives no verdicts.
    """
    study = BoundStudy(slug, Scale(scale))
    if study.scale is Scale.SMOKE:
        raise InvalidInput("scale smoke is for tests: no claim is due there, so there is nothing to pool.")
    place = store if isinstance(store, Store) else Store(store)
    # Runs of an earlier version of an experiment stay in the store; they measured something else.
    versions = {e.name: e.version for e in study.study.experiments}
    runs = [r for r in place.finished(slug) if r.scale is study.scale and versions.get(r.experiment) == r.version]
    names = sorted({r.workload for r in runs}, key=lambda name: (name != "default", name))  # the study's own data first
    if len(names) < 2:
        there = f"only of {names[0]}" if names else "of none"
        raise InvalidInput(
            f"pooling needs results of {slug} at scale {study.scale} on two workloads or more; {place.root} holds "
            f"results {there}: add some with `mlcollage run {slug} --scale {study.scale} --workload ...`."
        )
    evidences = {
        name: place.evidence([r for r in runs if r.workload == name], study=slug, scale=study.scale, workload=name)
        for name in names
    }
    # An exact claim is about every single seed; it has no effect with an error that could be pooled.
    due = [c for c in study.claims if c.test != "exact" and c.due_at(study.scale)]
    return [pool_claim(claim, evidences) for claim in due]


def pool_claim(claim: Claim, evidences: Mapping[str, Evidence]) -> PooledClaim:
    r"""Pool one claim over workloads.

    The effects are counted from the claim's reference value. With S the larger of their root mean square and the
    median standard error, the priors are :math:`\mu \sim \mathrm{N}(\text{null}, (10 S)^2)` and :math:`\tau \sim`
    half-normal with scale S: wide, but two or three workloads say little about their own spread, and there the prior
    of :math:`\tau` shows. A standard error from n seeds is widened so that its normal interval is as
    wide as Student's t interval.

    Parameters
    ----------
    claim
        What is pooled.
    evidences
        Evidence by name of workload.

    Examples
    --------
    >>> from mlcollage.lab.estimand import Level
    >>> claim = Claim("C1", "Above 0", "The value is positive.", "", Level("m", "a"), "greater", margin=0.1)
    >>> def measured(*values):
    ...     rows = [{"arm": "a", "seed": s, "metric": "m", "step": 0, "value": v} for s, v in enumerate(values)]
    ...     return Evidence("demo", Scale.QUICK, "w", pd.DataFrame(rows))
    >>> pooled = pool_claim(claim, {"digits": measured(0.9, 1.1, 1.0, 1.2), "wine": measured(0.0, 3.1, 1.2, -0.3)})
    >>> pooled.workloads[["estimate", "shrunken"]].round(2).to_numpy().tolist()
    [[1.05, 1.05], [1.0, 1.03]]
    >>> round(pooled.probability, 2)
    0.94
    """
    rows, left_out, notes = {}, {}, {}
    for name, evidence in evidences.items():
        try:
            rows[name], said = _effect(claim, evidence)
            if said:
                notes[name] = "; ".join(said)
        except MLCollageError as error:
            left_out[name] = str(error)
    # Columns of the data, then those of the model, in one table with a row per workload.
    columns = ["seeds", "estimate", "low", "high", "se"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("workload")
    shrunken = ["shrunken", "shrunken_low", "shrunken_high"]
    # The spread between workloads cannot be estimated from one.
    if len(table) < 2:
        return PooledClaim(claim, table.reindex(columns=[*columns, *shrunken]), left_out, notes=notes)
    y, se = (table[c].to_numpy(dtype=np.float64) for c in ("estimate", "se"))  # (workloads,) each
    # The priors are as wide as the effects or, where these are small, as their errors: metrics have any unit.
    size = max(float(np.sqrt(np.mean((y - claim.null) ** 2))), float(np.median(se)))
    # Counted from the null, to which the prior then shrinks.
    model = PartialPooling(prior_mu_scale=10 * size, tau_scale=size).fit(y - claim.null, se, names=list(table.index))
    table[shrunken] = model.shrunken(LEVEL)[["shrunken", "low", "high"]] + claim.null
    found = model.exact()  # by quadrature: no draws, so the same numbers every time
    # Of the mean effect over workloads, of the spread between them, and of a workload not seen yet.
    mean, spread, new = (_summary(m) for m in (found.mu, found.tau, found.new))

    def as_claimed(effect: Marginal) -> float:
        if claim.direction == "within":
            return float(effect.cdf(claim.margin) - effect.cdf(-claim.margin))  # counted from the null, as the model is
        below = float(effect.cdf(0.0))
        return below if claim.direction in ("less", "at_most") else 1 - below

    return PooledClaim(
        claim=claim,
        workloads=table,
        left_out=left_out,
        # Counted from 0 again; the spread between workloads does not depend on where one counts from.
        population=(mean[0] + claim.null, mean[1] + claim.null, mean[2] + claim.null),
        tau=spread,
        next_workload=(new[1] + claim.null, new[2] + claim.null),
        probability=as_claimed(found.mu),
        next_probability=as_claimed(found.new),
        notes=notes,
    )


def _summary(marginal: Marginal) -> tuple[float, float, float]:
    low, high = (float(marginal.quantile(p)) for p in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(marginal.mean), low, high


def _effect(claim: Claim, evidence: Evidence) -> tuple[tuple[int, float, float, float, float], list[str]]:
    """Seeds, estimate, t interval, and the standard error whose normal interval is as wide; what was left out."""
    table, said = copied_seeds(claim, evidence, claim_table(claim, evidence))
    if claim.test == "trend":
        finite = np.isfinite(table.to_numpy()).all(axis=1)  # Page's test takes whole rows
        samples: tuple[Floats, ...] = (page_trend(table[finite].to_numpy()).correlations,)
        if not finite.all():
            said.append(f"left out for want of a finite value: seed {listed(table.index[~finite])}")
    else:
        effects, without = complete_values(claim, table)
        samples, said = tuple(s.to_numpy() for s in effects), said + without
    failures = relevant_failures(claim, evidence)
    if failures:
        named = "; ".join(f"{f.run.arm} seed {f.run.seed}: {f.reason}" for f in failures)
        said.append(f"{len(failures)} run{plural(len(failures))} failed ({named})")
    seeds = min(len(s) for s in samples)  # of the smaller arm, where arms are not paired
    if seeds < 2:
        raise InvalidInput(f"{seeds or 'no'} seed{'' if seeds == 1 else 's'} with all values, so no standard error")
    # Whether seeds agree is a question of rounding, which is relative to the measured values, not to their differences.
    magnitude = largest(table)
    if all(is_constant(s, magnitude) for s in samples):
        raise InvalidInput("its seeds all agree, so there is no standard error")
    # A t interval of few seeds is wider than a normal one of its standard error. The model takes normal errors, so it
    # is given the standard error whose normal interval is as wide.
    low, high = t_interval(samples[0], LEVEL, y=samples[1] if len(samples) == 2 else None)
    return (seeds, (low + high) / 2, low, high, (high - low) / 2 / _Z), said


def draw_forest(pooled: Sequence[PooledClaim], file: Path | str) -> None:
    """Write a forest plot: a panel per claim, a row per workload, arrows to pooled estimates, a band for their mean.

    Parameters
    ----------
    pooled
        What :func:`pool` gave; claims on fewer than two workloads are not drawn.
    file
        Ending in ``.svg``, ``.png`` or ``.pdf``.

    Raises
    ------
    InvalidInput
        If no claim was pooled, or the ending is another.
    """
    from matplotlib.figure import Figure

    from mlcollage.stats.explore import forest

    target = Path(file)
    if target.suffix not in _FORMATS:
        raise InvalidInput(f"{target.name} must end in {', '.join(_FORMATS)}.")
    drawn = [p for p in pooled if p.population is not None]
    if not drawn:
        raise InvalidInput("no claim was measured on two workloads or more, so there is nothing to draw.")
    heights = [1.2 + 0.35 * len(p.workloads) for p in drawn]  # inches: a title and an axis, and a row for each workload
    figure = Figure(figsize=(7, sum(heights)), layout="constrained")
    axes = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, p in zip(axes, drawn, strict=True):
        assert p.population is not None
        table, c = p.workloads * p.claim.factor, p.claim
        forest(
            ax,
            list(table.index),
            table["estimate"],
            table[["low", "high"]],
            shrunken=table["shrunken"],
            null=c.null * c.factor,
        )
        mean, low, high = (v * c.factor for v in p.population)
        ax.axvspan(low, high, color="C1", alpha=0.15, linewidth=0, zorder=-1)
        ax.axvline(mean, color="C1", linewidth=1, zorder=-1)
        left, right = ax.get_xlim()  # which forest chose without the band
        ax.set_xlim(min(left, low), max(right, high))
        ax.set_title(f"{c.id}  {c.title}", loc="left", fontsize="medium")
        ax.set_xlabel(c.unit)
        ax.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
