"""The study's experiments: one function each, from a run's settings to its measurements.

Every run is a block of simulated repetitions with a stream of random numbers of its own; what is compared (estimators,
intervals, samplers, policies) are the arms of its rows, on the same simulated data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import stats as sps
from sklearn.datasets import load_digits
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures

from mlcollage.data.workload import Workload, arrays
from mlcollage.errors import InvalidInput
from mlcollage.infer import hmc
from mlcollage.infer.diagnostics import ess, rhat
from mlcollage.infer.sbc import sbc
from mlcollage.lab.claim import Claim, Status
from mlcollage.lab.estimand import Difference
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.judge import judge
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run, Scale
from mlcollage.nn.mlp import MLP
from mlcollage.stats.adaptive import required_seeds
from mlcollage.stats.bandits import UCB1, Bandit, EpsilonGreedy, ThompsonSampling
from mlcollage.stats.bootstrap import Method, bootstrap_ci, t_interval
from mlcollage.stats.causal import paired_difference
from mlcollage.stats.causal_effects import AverageEffect, hajek
from mlcollage.stats.explore import Lineup
from mlcollage.stats.multilevel import PartialPooling
from mlcollage.stats.regularize import double_descent, noisy_line
from mlcollage.stats.robust import iqm, mad
from mlcollage.stats.search import SuccessiveHalving
from mlcollage.stats.sequential import ConfidenceSequence
from mlcollage.stats.simulation import posterior_predictive_check, sbc_uniformity
from mlcollage.train.replicas import Replicas

from . import schools
from .study import FEATURES, MUTANTS

__all__ = ["EXPERIMENTS", "anscombe_like", "confounded"]

Array = npt.NDArray[Any]
Interval = tuple[float, float]
_LEVEL = 0.95
_PROBABILITIES = np.array([0.5, 0.45, 0.4, 0.4, 0.35])
_BOOTSTRAPS: Mapping[str, Method] = {"percentile": "percentile", "bca": "bca", "bootstrap_t": "bootstrap-t"}
_DECAY = 0.01


# --- idea 1: causal inference -----------------------------------------------------------------------------------------


def confounded(n: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    r"""Units whose treatment depends on what their outcome depends on; the average effect is 1.

    .. math:: \operatorname{logit} e = .8 x_1 - .6 x_2 + .4 x_1 x_2, \qquad y = a + 2 x_1 + x_2^2 + \epsilon.
    """
    x = rng.normal(size=(n, 3))
    e = 1 / (1 + np.exp(-(0.8 * x[:, 0] - 0.6 * x[:, 1] + 0.4 * x[:, 0] * x[:, 1])))
    a = rng.random(n) < e
    return x, a, a + 2 * x[:, 0] + x[:, 1] ** 2 + rng.normal(size=n)


def _effects(x: Array, a: Array, y: Array) -> dict[str, tuple[float, Interval]]:
    """Estimates and intervals of every estimator; the right models are fitted once and shared."""
    squares = partial(PolynomialFeatures, 2, include_bias=False)
    outcome = make_pipeline(squares(), LinearRegression())
    aipw = AverageEffect(outcome, make_pipeline(squares(), LogisticRegression(max_iter=1000))).fit(x, a, y)
    fitted = {
        "naive": AverageEffect(method="naive").fit(x, a, y),
        "regression": AverageEffect(method="regression").fit(x, a, y),
        "aipw": aipw,
        "aipw_wrong_propensity": AverageEffect(outcome).fit(x, a, y, known_propensity=np.full(len(a), a.mean())),
        "aipw_wrong_outcome": AverageEffect(LinearRegression()).fit(x, a, y, known_propensity=aipw.propensity_),
    }
    assert aipw.propensity_ is not None
    ipw = hajek(a, y, aipw.propensity_)
    return {"ipw": (ipw.ate, ipw.ci), **{name: (m.ate_, m.ci_) for name, m in fitted.items()}}


def causal(run: Run, workload: Workload | None) -> Measurements:
    """Bias and coverage of estimators of an average effect under confounding."""
    rng = np.random.default_rng([run.seed, 1])
    found = [_effects(*confounded(run.integer("units"), rng)) for _ in range(run.integer("repeats"))]
    m = Measurements()
    for arm in found[0]:
        estimates = np.array([f[arm][0] for f in found])
        m.add("bias", estimates.mean() - 1, arm=arm)
        m.add("spread", estimates.std(ddof=1), arm=arm)
        m.add("effect_coverage", _mean([_holds(f[arm][1], 1.0) for f in found]), arm=arm)
    return m


def _mean(values: Sequence[float] | Array) -> float:
    return float(np.mean(values))


def _holds(interval: Interval, truth: float) -> bool:
    return interval[0] <= truth <= interval[1]


def paired(run: Run, workload: Workload | None) -> Measurements:
    """Networks with and without weight decay from the same seeds: how much their accuracies share."""
    x, y = _classification(workload)
    replicas, steps, batch = run.integer("replicas"), run.integer("steps"), 32
    n = min(run.integer("train"), int(0.6 * len(x)))
    held = min(run.integer("test"), len(x) - n)
    seeds = [run.seed * replicas + r for r in range(replicas)]
    streams = [np.random.default_rng([seed, 2]) for seed in seeds]
    order = torch.from_numpy(np.stack([rng.permutation(len(x))[: n + held] for rng in streams]))
    picked = torch.from_numpy(np.stack([rng.integers(n, size=(steps, batch)) for rng in streams]))
    model = partial(MLP, tuple(x.shape[1:]), int(y.max()) + 1, widths=(run.integer("width"),))
    accuracy: dict[str, Array] = {}
    for arm, decay in (("weight_decay", _DECAY), ("none", 0.0)):
        networks = Replicas(model, seeds, lr=0.1, momentum=0.9, weight_decay=decay)
        for step in range(steps):
            index = order[:, :n].gather(1, picked[:, step])
            networks.step(x[index], y[index])
        test = order[:, n:]
        right = networks.predict(x[test], in_dim=0).argmax(dim=2) == y[test]
        accuracy[arm] = right.double().mean(dim=1).numpy()
    pair = paired_difference(accuracy["weight_decay"], accuracy["none"])
    m = Measurements()
    m.add("pair_correlation", pair.correlation, arm="weight_decay")
    for arm, values in accuracy.items():
        m.add("accuracy", values.mean(), arm=arm)
        m.array(f"accuracy_{arm}", values)
    return m


def _classification(workload: Workload | None) -> tuple[torch.Tensor, torch.Tensor]:
    """All samples, flat and standardized as a whole, with their labels: digits, or the user's."""
    if workload is None:
        features, labels = load_digits(return_X_y=True)
    else:
        parts = [arrays(workload.train), arrays(workload.test)]
        features, labels = (np.concatenate(p) for p in zip(*parts, strict=True))
    if len(features) < 10:
        raise InvalidInput(f"the workload has {len(features)} samples; at least 10 are needed to train and to test.")
    flat = features.reshape(len(features), -1).astype(np.float32)
    flat = (flat - flat.mean()) / (flat.std() or 1.0)
    return torch.from_numpy(flat), torch.from_numpy(np.asarray(labels, dtype=np.int64))


# --- idea 2: bootstrap ------------------------------------------------------------------------------------------------


def coverage(run: Run, workload: Workload | None) -> Measurements:
    """How often nominal 95 % intervals of a mean hold it, by method, population and sample size."""
    rng = np.random.default_rng([run.seed, 3])
    repeats, resamples = run.integer("repeats"), run.integer("resamples")
    draw: dict[str, Callable[..., Array]] = {"normal": rng.normal, "lognormal": rng.lognormal}
    truth = {"normal": 0.0, "lognormal": float(np.exp(0.5))}
    m = Measurements()
    for population, sample in draw.items():
        for n in (5, 10, 30):
            hits = dict.fromkeys(("t", *_BOOTSTRAPS), 0)
            for x in sample(size=(repeats, n)):
                intervals = {"t": t_interval(x, _LEVEL)}
                for arm, method in _BOOTSTRAPS.items():
                    ci = bootstrap_ci(x, method=method, n_boot=resamples, level=_LEVEL, rng=rng)
                    intervals[arm] = (ci.low, ci.high)
                for arm, interval in intervals.items():
                    hits[arm] += _holds(interval, truth[population])
            for arm, count in hits.items():
                m.add("coverage", count / repeats, arm=arm, population=population, n=n)
    return m


# --- idea 3: overparameterized models and regularization --------------------------------------------------------------


def descent(run: Run, workload: Workload | None) -> Measurements:
    """Test error over the number of random features, without a penalty and with a tuned ridge."""
    problem = noisy_line(
        run.integer("units"),
        run.integer("inputs"),
        run.real("noise"),
        n_test=run.integer("test"),
        rng=np.random.default_rng([run.seed, 4]),
    )
    m = Measurements()
    for row in double_descent(*problem, features=FEATURES, random_state=run.seed).to_dict("records"):
        for arm in ("min_norm", "ridge"):
            m.add("test_error", row[arm], arm=arm, features=int(row["features"]))
    return m


# --- idea 4: multilevel models ----------------------------------------------------------------------------------------


def pooling(run: Run, workload: Workload | None) -> Measurements:
    """Errors of effects estimated alone, together, and partially pooled; and the eight schools themselves."""
    rng = np.random.default_rng([run.seed, 5])
    model = PartialPooling(schools.SCALE, schools.SCALE, "half-cauchy")
    squares: dict[tuple[str, int, float], list[float]] = {}
    for groups in (8, 20):
        s = np.resize(schools.ERRORS, groups)
        for spread in (0.0, 5.0, 20.0):
            for _ in range(run.integer("repeats")):
                theta = schools.SCALE * rng.normal() + spread * rng.normal(size=groups)
                y = theta + s * rng.normal(size=groups)
                estimates = {
                    "none": y,
                    "complete": np.full(groups, np.average(y, weights=s**-2)),
                    "partial": model.fit(y, s).exact().theta.mean,
                }
                for arm, estimate in estimates.items():
                    squares.setdefault((arm, groups, spread), []).append(float(np.mean((estimate - theta) ** 2)))
    m = Measurements()
    rows = [(*key, float(np.sqrt(np.mean(values)))) for key, values in squares.items()]
    for arm, groups, spread, error in rows:
        m.add("effect_error", error, arm=arm, groups=groups, spread=spread)
    for arm in ("none", "complete", "partial"):
        m.add("mean_effect_error", _mean([error for name, *_, error in rows if name == arm]), arm=arm)
    shrunken = model.fit(schools.EFFECTS, schools.ERRORS, list("ABCDEFGH")).shrunken()
    m.array("schools", shrunken[["estimate", "se", "shrunken", "low", "high"]].to_numpy())
    return m


# --- idea 5: generic computation --------------------------------------------------------------------------------------


def sampler(run: Run, workload: Workload | None) -> Measurements:
    """Hamiltonian Monte Carlo against quadrature, and two forms of one posterior."""
    generator = torch.Generator().manual_seed(run.seed)
    y, s = (torch.tensor(v, dtype=torch.float64) for v in (schools.EFFECTS, schools.ERRORS))
    m = Measurements()
    draws = _sampled(run, schools.non_centered(y, s), generator)
    flat = torch.cat(
        [draws[..., :1], draws[..., 1:2].exp(), draws[..., :1] + draws[..., 1:2].exp() * draws[..., 2:]], 2
    )
    exact = PartialPooling(schools.SCALE, schools.SCALE, "half-normal").fit(schools.EFFECTS, schools.ERRORS).exact()
    parts = (exact.mu, exact.tau, exact.theta)
    mean, sd = (np.concatenate([np.atleast_1d(getattr(p, name)) for p in parts]) for name in ("mean", "sd"))
    m.add("quadrature_error", np.abs((flat.mean(dim=(0, 1)).numpy() - mean) / sd).max(), arm="non_centered")
    m.add("rhat", rhat(flat).max(), arm="non_centered")
    theta = schools.SCALE * torch.randn(1, generator=generator) + torch.randn(8, generator=generator)
    small = theta.double() + s * torch.randn(8, dtype=torch.float64, generator=generator)
    for arm, form in (("non_centered", schools.non_centered), ("centered", schools.centered)):
        draws = _sampled(run, form(small, s), generator)
        m.add("ess_share", float(ess(draws[..., 1])) / draws[..., 1].numel(), arm=arm)
    return m


def _sampled(run: Run, density: schools.Density, generator: torch.Generator) -> torch.Tensor:
    start = 0.5 * torch.randn(run.integer("chains"), 10, dtype=torch.float64, generator=generator)
    draws, warmup = run.integer("draws"), run.integer("warmup")
    return hmc.sample(density, start, draws=draws, warmup=warmup, steps=(3, 7), generator=generator).draws


def calibration(run: Run, workload: Workload | None) -> Measurements:
    """Simulation-based calibration of the sampler, and of mutants of it."""
    s = torch.tensor(schools.ERRORS, dtype=torch.float64) / 3  # informative data, so that bugs of the prior are hard
    ranks, m = run.integer("ranks"), Measurements()
    rejected = {}
    for place, arm in enumerate(("correct", *MUTANTS)):
        found = sbc(
            schools.prior,
            schools.simulator(s),
            schools.by_sampler(s, warmup=run.integer("warmup"), thin=run.integer("thin"), mutant=arm),
            schools.quantities(s),
            n_sims=run.integer("simulations"),
            n_ranks=ranks,
            generator=10 * run.seed + place,
        )
        result = sbc_uniformity(found, ranks, rng=run.seed)
        rejected[arm] = not result.passed(0.01)
        m.add("rejected", rejected[arm], arm=arm)
        m.array(f"ranks_{arm}", np.stack([found[q] for q in schools.QUANTITIES], axis=1))
    m.add("mutation_score", _mean([rejected[arm] for arm in MUTANTS]), arm="mutants")
    return m


# --- idea 6: adaptive decisions ---------------------------------------------------------------------------------------


def adaptive(run: Run, workload: Workload | None) -> Measurements:
    """Regret of bandits, races by successive halving, and what peeking does to a test."""
    rng = np.random.default_rng([run.seed, 6])
    m, pulls = Measurements(), run.integer("pulls")
    policies: dict[str, Callable[[], Bandit | None]] = {
        "thompson": lambda: ThompsonSampling(5, rng=rng),
        "epsilon_greedy": lambda: EpsilonGreedy(5, 0.1, rng=rng),
        "ucb1": lambda: UCB1(5, rng=rng),
        "uniform": lambda: None,
    }
    for arm, policy in policies.items():
        curve = np.mean([_regret(policy(), pulls, rng) for _ in range(run.integer("repeats"))], axis=0)
        for t in np.unique(np.linspace(0, pulls, 21).astype(int)[1:]):
            m.add("regret", curve[t - 1], arm=arm, step=int(t))
    races = [_race(rng) for _ in range(run.integer("races"))]
    m.add("found_best", _mean([found for found, _ in races]), arm="halving")
    m.add("budget_share", _mean([share for _, share in races]), arm="halving")
    peeking, sequence = _peeks(rng.normal(size=(run.integer("sequences"), run.integer("peeks"))))
    m.add("false_positive", peeking, arm="peeking")
    m.add("false_positive", sequence, arm="confidence_sequence")
    return m


def _regret(policy: Bandit | None, pulls: int, rng: np.random.Generator) -> Array:
    """Expected regret so far, after each pull; without a policy arms take turns."""
    lost = _PROBABILITIES.max() - _PROBABILITIES
    chosen = np.arange(pulls) % len(lost)
    if policy is not None:
        success = rng.random((pulls, len(lost))) < _PROBABILITIES
        for t in range(pulls):
            arm = policy.ask()
            assert isinstance(arm, int)
            policy.tell(arm, float(success[t, arm]))
            chosen[t] = arm
    return np.cumsum(lost[chosen])


def _race(rng: np.random.Generator) -> tuple[bool, float]:
    """Successive halving over 27 learning curves a + b r^-c with noise: found the best to a point; share spent."""
    a, b, c = rng.uniform(0.05, 0.5, 27), rng.uniform(0.3, 0.4, 27), rng.uniform(0.8, 1.2, 27)
    search = SuccessiveHalving(range(27), eta=3, min_r=1, max_r=27, maximize=False)
    while (trial := search.ask()) is not None:
        i, r = trial.index, trial.resource
        search.tell(trial, float(a[i] + b[i] * r ** -c[i] + 0.005 * rng.normal()))
    final = a + b * 27.0**-c
    return bool(final[search.best.index] <= final.min() + 0.01), search.spent / 27**2


def _peeks(x: Array) -> tuple[float, float]:
    """Share of null sequences that a repeated t test, and a confidence sequence, ever call an effect."""
    n = np.arange(1, x.shape[1] + 1)
    mean, square = x.cumsum(axis=1) / n, (x**2).cumsum(axis=1)
    late = slice(4, None)
    error = np.sqrt((square[:, late] - n[late] * mean[:, late] ** 2) / (n[late] - 1) / n[late])
    rejected = np.abs(mean[:, late]) / error > sps.t.ppf(0.975, n[late] - 1)
    sequence = ConfidenceSequence("t", alpha=0.05)
    missed = np.zeros(len(x), dtype=bool)
    for column in x.T:
        sequence.update(column)
        low, high = sequence.interval()
        missed |= (low > 0) | (high < 0)
    return float(rejected.any(axis=1).mean()), float(missed.mean())


# --- idea 7: robust inference -----------------------------------------------------------------------------------------


def robust(run: Run, workload: Workload | None) -> Measurements:
    """Root mean squared errors of three locations on clean, heavy-tailed and contaminated values."""
    rng = np.random.default_rng([run.seed, 7])
    size = (run.integer("repeats"), run.integer("values"))
    wild = np.where(rng.random(size) < 0.1, 10.0, 1.0)
    populations = {
        "clean": rng.normal(size=size),
        "t2": rng.standard_t(2, size=size),
        "contaminated": wild * rng.normal(size=size),
    }
    m = Measurements()
    for population, x in populations.items():
        estimates = {"mean": x.mean(axis=1), "median": np.median(x, axis=1), "iqm": np.array([iqm(row) for row in x])}
        for arm, values in estimates.items():
            m.add("rmse", np.sqrt(np.mean(values**2)), arm=arm, population=population)
    return m


# --- idea 8: exploratory analysis -------------------------------------------------------------------------------------


def anscombe_like(n: int, rng: np.random.Generator) -> dict[str, tuple[Array, Array]]:
    """Four data sets (x, y) with the same means, variances, slope and correlation, of which one is a noisy line.

    After F. J. Anscombe, "Graphs in statistical analysis", American Statistician 1973.
    """
    x = rng.normal(size=n)
    lever = 0.05 * rng.normal(size=n)
    lever[0] = 5.0
    shapes = {
        "line": (x, rng.normal(size=n)),
        "curve": (x, x**2 + 0.1 * rng.normal(size=n)),
        "outlier": (x, 0.1 * rng.normal(size=n) + 3.0 * (np.arange(n) == 0)),
        "lever": (lever, rng.normal(size=n)),
    }
    made = {}
    for name, (at, noise) in shapes.items():
        z = (at - at.mean()) / at.std()
        rest = noise - noise.mean() - z * (z @ noise) / n
        made[name] = (z, 0.8 * z + 0.6 * rest / rest.std())
    return made


def _flagged(x: Array, y: Array, replicates: int, rng: np.random.Generator) -> bool:
    """Whether predictive checks of a normal linear model of y on normal x flag anything, at 5 % together."""
    n = len(x)
    q, _ = np.linalg.qr(np.column_stack([np.ones(n), x]))
    bend = x**2 - q @ (q.T @ x**2)
    sigma = np.sqrt(np.sum((y - q @ (q.T @ y)) ** 2) / rng.chisquare(n - 2, size=(replicates, 1)))
    line = (q.T @ y + sigma * rng.normal(size=(replicates, 2))) @ q.T
    made_y = line + sigma * rng.normal(size=(replicates, n))

    def residual(v: Array) -> Array:
        rest = v - q @ (q.T @ v)
        return np.asarray(rest / rest.std())

    def bent(v: Array) -> float:
        return float(abs(residual(v) @ bend) / np.linalg.norm(bend))

    def farthest(v: Array) -> float:
        return float(np.abs(residual(v)).max())

    def lever(v: Array) -> float:
        return float(np.abs(v - v.mean()).max() / v.std())

    checks = (
        posterior_predictive_check(made_y, y, {"bent": bent, "farthest": farthest}, rng=rng),
        posterior_predictive_check(rng.normal(size=(replicates, n)), x, {"lever": lever}, rng=rng),
    )
    return any(check.flagged(0.05 / 3) for check in checks)


def explore(run: Run, workload: Workload | None) -> Measurements:
    """Predictive checks on sets with equal moments, and lineups with one crashed seed."""
    rng = np.random.default_rng([run.seed, 8])
    replicates = run.integer("replicates")
    flags = [
        {name: _flagged(*xy, replicates, rng) for name, xy in anscombe_like(run.integer("points"), rng).items()}
        for _ in range(run.integer("repeats"))
    ]
    m = Measurements()
    for name in flags[0]:
        m.add("flagged", _mean([f[name] for f in flags]), arm=name)
    m.add("right_flags", _mean([all(v == (k != "line") for k, v in f.items()) for f in flags]), arm="checks")
    for arm, drop in (("crash", 0.1), ("no_crash", 0.0)):
        found = [_stands_out(drop, rng) for _ in range(run.integer("lineups"))]
        m.add("lineup_detection", _mean(found), arm=arm)
    return m


def _stands_out(drop: float, rng: np.random.Generator) -> bool:
    """Whether the plot of 30 accuracies, one of them lower by ``drop``, has the deepest gap of twenty plots."""
    seeds = rng.normal(0.9, 0.01, 30)
    seeds[0] -= drop
    center, scale = float(np.median(seeds)), mad(seeds)
    panels = [rng.normal(center, scale, 30) for _ in range(19)]
    position = int(rng.integers(20))
    panels.insert(position, seeds)
    shown = Lineup(20, position + 1, tuple(panels))
    return shown.p_value(lambda v: float((np.median(v) - v.min()) / mad(v))) <= 0.05


# --- the judge itself -------------------------------------------------------------------------------------------------


def judging(run: Run, workload: Workload | None) -> Measurements:
    """How often the judge supports claims about nothing, and about an effect of the size that matters."""
    rng = np.random.default_rng([run.seed, 9])
    margin, rho = 0.8, 0.5
    n = required_seeds(margin, 1.0, rho, design="paired")
    claims = [
        Claim(f"C{i}", "A simulated claim", "It holds.", "", Difference(f"value{i}", "a", "b"), "greater", margin)
        for i in range(3)
    ]
    m = Measurements()
    for arm, effect, tested in (("null", 0.0, claims), ("effect", margin, claims[:1])):
        rates = [_supported(tested, effect, rho, n, rng) for _ in range(run.integer("studies"))]
        m.add("supported_rate", _mean(rates), arm=arm)
        m.add("any_supported", _mean(np.array(rates) > 0), arm=arm)
    m.add("recommended_seeds", n, arm="effect")
    return m


def _supported(claims: Sequence[Claim], effect: float, rho: float, n: int, rng: np.random.Generator) -> float:
    """Share of claims that the judge supports in one simulated study of paired seeds."""
    rows = []
    for i in range(len(claims)):
        shared = np.sqrt(rho) * rng.normal(size=n)
        for arm, shift in (("a", effect), ("b", 0.0)):
            values = shift + shared + np.sqrt(1 - rho) * rng.normal(size=n)
            rows.append(pd.DataFrame({"arm": arm, "seed": range(n), "metric": f"value{i}", "step": 0, "value": values}))
    evidence = Evidence("simulated", Scale.QUICK, "simulated", pd.concat(rows, ignore_index=True))
    return float(np.mean([v.status is Status.SUPPORTED for v in judge(claims, evidence).values()]))


EXPERIMENTS: dict[str, Callable[[Run, Workload | None], Measurements]] = {
    f.__name__: f
    for f in (causal, paired, coverage, descent, pooling, sampler, calibration, adaptive, robust, explore, judging)
}
