"""The study's experiments: one function each, from a run's settings to its measurements.

Every run is a block of simulated repetitions with a stream of random numbers of its own; what is compared (estimators,
intervals, samplers, policies) are the arms of its rows, on the same simulated data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits

from mlcollage.data import Labeled, arrays
from mlcollage.infer import Unhealthy, ess, hmc, rhat, sbc
from mlcollage.lab import Claim, Difference, Measurements, Task
from mlcollage.nn import MLP
from mlcollage.stats import (
    UCB1,
    Bandit,
    EpsilonGreedy,
    PartialPooling,
    ThompsonSampling,
    double_descent,
    iqm,
    noisy_line,
    paired_difference,
    required_seeds,
    sbc_uniformity,
)
from mlcollage.stats.bootstrap import Method, bootstrap_ci, t_interval
from mlcollage.train import Replicas

from . import schools, simulated

Array = npt.NDArray[Any]
_LEVEL = 0.95
_BOOTSTRAPS: Mapping[str, Method] = {"percentile": "percentile", "bca": "bca", "bootstrap_t": "bootstrap-t"}


def _mean(values: Sequence[float] | Array) -> float:
    return float(np.mean(values))


# --- idea 1: causal inference -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Causal:
    """Average effects of a confounded treatment, estimated in six ways."""

    units: int = 1000  # units of a simulated study
    repeats: int = 10  # simulated studies per seed


def causal(task: Task[Causal]) -> Measurements:
    """Bias and coverage of estimators of an average effect under confounding."""
    s = task.settings
    rng = np.random.default_rng([task.seed, 1])
    found = [simulated.effects(*simulated.confounded(s.units, rng)) for _ in range(s.repeats)]
    m = Measurements()
    for arm in found[0]:
        estimates = np.array([f[arm][0] for f in found])
        m.add("bias", estimates.mean() - 1, arm=arm)
        m.add("spread", estimates.std(ddof=1), arm=arm)
        m.add("effect_coverage", _mean([simulated.holds(f[arm][1], 1.0) for f in found]), arm=arm)
    return m


@dataclass(frozen=True)
class Paired:
    """Networks with and without weight decay, trained from the same seeds."""

    replicas: int = 20  # pairs of networks per seed
    train: int = 400  # training samples, at most 60 % of the data
    test: int = 500  # test samples, at most the rest
    width: int = 16  # hidden units of a network
    steps: int = 120  # training steps
    batch: int = 32  # samples per step
    decay: float = 0.01  # weight decay of the treatment


def paired(task: Task[Paired]) -> Measurements:
    """Networks with and without weight decay from the same seeds: how much their accuracies share."""
    s = task.settings
    x, y = _classification(task.workload)
    n = min(s.train, int(0.6 * len(x)))
    held = min(s.test, len(x) - n)
    seeds = [task.seed * s.replicas + r for r in range(s.replicas)]
    streams = [np.random.default_rng([seed, 2]) for seed in seeds]
    # for each replica its samples (replicas, n + held), and which of the first n a step takes (replicas, steps, batch)
    order = torch.from_numpy(np.stack([rng.permutation(len(x))[: n + held] for rng in streams]))
    picked = torch.from_numpy(np.stack([rng.integers(n, size=(s.steps, s.batch)) for rng in streams]))
    model = partial(MLP, tuple(x.shape[1:]), int(y.max()) + 1, widths=(s.width,))
    accuracy: dict[str, Array] = {}
    for arm, decay in (("weight_decay", s.decay), ("none", 0.0)):
        networks = Replicas(model, seeds, lr=0.1, momentum=0.9, weight_decay=decay)
        for step in range(s.steps):
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


def _classification(workload: Labeled | None) -> tuple[torch.Tensor, torch.Tensor]:
    """All samples, flat and standardized as a whole, with their labels: digits, or the user's."""
    if workload is None:
        features, labels = load_digits(return_X_y=True)
    else:
        parts = [arrays(workload.train), arrays(workload.test)]
        features, labels = (np.concatenate(p) for p in zip(*parts, strict=True))
    flat = features.reshape(len(features), -1).astype(np.float32)
    flat = (flat - flat.mean()) / (flat.std() or 1.0)
    return torch.from_numpy(flat), torch.from_numpy(np.asarray(labels, dtype=np.int64))


# --- idea 2: bootstrap ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """Nominal 95 % intervals of a mean, by method, population and number of values."""

    repeats: int = 80  # samples of each size per seed
    resamples: int = 399  # of a bootstrap
    sizes: tuple[int, ...] = (5, 10, 30)  # values in a sample


def coverage(task: Task[Coverage]) -> Measurements:
    """How often nominal 95 % intervals of a mean hold it, by method, population and sample size."""
    s = task.settings
    rng = np.random.default_rng([task.seed, 3])
    draw: dict[str, Callable[..., Array]] = {"normal": rng.normal, "lognormal": rng.lognormal}
    truth = {"normal": 0.0, "lognormal": float(np.exp(0.5))}
    m = Measurements()
    for population, sample in draw.items():
        for n in s.sizes:
            hits = dict.fromkeys(("t", *_BOOTSTRAPS), 0)
            for x in sample(size=(s.repeats, n)):
                intervals = {"t": t_interval(x, _LEVEL)}
                for arm, method in _BOOTSTRAPS.items():
                    with warnings.catch_warnings():  # that few units are too few is what is measured
                        warnings.simplefilter("ignore", UserWarning)
                        ci = bootstrap_ci(x, method=method, n_boot=s.resamples, level=_LEVEL, rng=rng)
                    intervals[arm] = (ci.low, ci.high)
                for arm, interval in intervals.items():
                    hits[arm] += simulated.holds(interval, truth[population])
            for arm, count in hits.items():
                m.add("coverage", count / s.repeats, arm=arm, population=population, n=n)
    return m


# --- idea 3: overparameterized models and regularization --------------------------------------------------------------


@dataclass(frozen=True)
class Descent:
    """Least squares on random features of a noisy linear problem."""

    units: int = 100  # training units
    inputs: int = 30  # dimensions of the inputs
    noise: float = 0.5  # standard deviation of the outcome's noise
    test: int = 1000  # test units
    features: tuple[int, ...] = (10, 30, 60, 100, 160, 300, 1000, 3000)  # numbers of random features


def descent(task: Task[Descent]) -> Measurements:
    """Test error over the number of random features, without a penalty and with a tuned ridge."""
    s = task.settings
    problem = noisy_line(s.units, s.inputs, s.noise, n_test=s.test, rng=np.random.default_rng([task.seed, 4]))
    m = Measurements()
    for row in double_descent(*problem, features=s.features, random_state=task.seed).to_dict("records"):
        for arm in ("min_norm", "ridge"):
            m.add("test_error", row[arm], arm=arm, features=int(row["features"]))
    return m


# --- idea 4: multilevel models ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pooling:
    """Effects of groups estimated alone, together, and partially pooled."""

    repeats: int = 15  # simulated tables of each kind per seed
    groups: tuple[int, ...] = (8, 20)  # groups in a table
    spreads: tuple[float, ...] = (0.0, 5.0, 20.0)  # standard deviations of the groups' effects, in points


def pooling(task: Task[Pooling]) -> Measurements:
    """Errors of effects estimated alone, together, and partially pooled; and the eight schools themselves."""
    s = task.settings
    rng = np.random.default_rng([task.seed, 5])
    model = PartialPooling(schools.SCALE, schools.SCALE, "half-cauchy")
    squares: dict[tuple[str, int, float], list[float]] = {}
    for groups in s.groups:
        errors = np.resize(schools.ERRORS, groups)
        for spread in s.spreads:
            for _ in range(s.repeats):
                theta = schools.SCALE * rng.normal() + spread * rng.normal(size=groups)
                y = theta + errors * rng.normal(size=groups)
                estimates = {
                    "none": y,
                    "complete": np.full(groups, np.average(y, weights=errors**-2)),
                    "partial": model.fit(y, errors).exact().theta.mean,
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


@dataclass(frozen=True)
class Sampler:
    """Hamiltonian Monte Carlo on the eight schools."""

    chains: int = 16  # chains in one batch
    draws: int = 300  # kept draws per chain
    warmup: int = 200  # iterations before them


def sampler(task: Task[Sampler]) -> Measurements:
    """Hamiltonian Monte Carlo against quadrature, and two forms of one posterior."""
    s = task.settings
    generator = torch.Generator().manual_seed(task.seed)
    y, errors = (torch.tensor(v, dtype=torch.float64) for v in (schools.EFFECTS, schools.ERRORS))
    m = Measurements()
    draws, _ = sampled(s, schools.non_centered(y, errors), generator)  # (chains, draws, 10)
    mu, tau = draws[..., :1], draws[..., 1:2].exp()
    flat = torch.cat([mu, tau, mu + tau * draws[..., 2:]], 2)  # z made into the schools' effects
    exact = PartialPooling(schools.SCALE, schools.SCALE, "half-normal").fit(schools.EFFECTS, schools.ERRORS).exact()
    parts = (exact.mu, exact.tau, exact.theta)
    mean, sd = (np.concatenate([np.atleast_1d(getattr(p, name)) for p in parts]) for name in ("mean", "sd"))
    m.add("quadrature_error", np.abs((flat.mean(dim=(0, 1)).numpy() - mean) / sd).max(), arm="non_centered")
    m.add("rhat", rhat(flat).max(), arm="non_centered")
    theta = schools.SCALE * torch.randn(1, generator=generator) + torch.randn(8, generator=generator)
    small = theta.double() + errors * torch.randn(8, dtype=torch.float64, generator=generator)
    for arm, form in (("non_centered", schools.non_centered), ("centered", schools.centered)):
        draws, divergent = sampled(s, form(small, errors), generator)
        m.add("ess_share", float(ess(draws[..., 1])) / draws[..., 1].numel(), arm=arm)
        m.add("divergent_share", divergent, arm=arm)
    return m


def sampled(s: Sampler, density: schools.Density, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """Draws of the schools' posterior, (chains, draws, 10), and the share of them that diverged."""
    start = 0.5 * torch.randn(s.chains, 10, dtype=torch.float64, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Unhealthy)  # short chains, and a funnel: R-hat, ESS, divergences are measured
        chains = hmc.sample(density, start, draws=s.draws, warmup=s.warmup, steps=(3, 7), generator=generator)
    return chains.draws, float(chains.diverging.double().mean())


@dataclass(frozen=True)
class Calibration:
    """Simulation-based calibration of the sampler and of three broken ones."""

    simulations: int = 200  # simulated data sets, each fitted by a chain
    ranks: int = 50  # possible ranks: one more than draws per data set
    warmup: int = 150  # iterations of a chain before its draws
    thin: int = 4  # iterations per draw


def calibration(task: Task[Calibration]) -> Measurements:
    """Simulation-based calibration of the sampler, and of mutants of it."""
    s = task.settings
    errors = torch.tensor(schools.ERRORS, dtype=torch.float64) / 3  # informative data hide bugs of the prior
    m, rejected = Measurements(), {}
    for place, arm in enumerate(("correct", *schools.MUTANTS)):
        found = sbc(
            schools.prior,
            schools.simulator(errors),
            schools.by_sampler(errors, warmup=s.warmup, thin=s.thin, mutant=arm),
            schools.quantities(errors),
            n_sims=s.simulations,
            n_ranks=s.ranks,
            generator=10 * task.seed + place,
        )
        result = sbc_uniformity(found, s.ranks, rng=task.seed)
        rejected[arm] = not result.passed(0.01)
        m.add("rejected", rejected[arm], arm=arm)
        m.array(f"ranks_{arm}", np.stack([found[q] for q in schools.QUANTITIES], axis=1))
    m.add("mutation_score", _mean([rejected[arm] for arm in schools.MUTANTS]), arm="mutants")
    return m


# --- idea 6: adaptive decisions ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adaptive:
    """Bandits, races of configurations, and repeated tests."""

    pulls: int = 2000  # pulls of a bandit
    repeats: int = 4  # bandits of each policy per seed
    races: int = 40  # races of 27 configurations per seed
    peeks: int = 100  # seeds of a study that is tested after every one
    sequences: int = 200  # such studies per seed


def adaptive(task: Task[Adaptive]) -> Measurements:
    """Regret of bandits, races by successive halving, and what peeking does to a test."""
    s = task.settings
    rng = np.random.default_rng([task.seed, 6])
    m = Measurements()
    policies: dict[str, Callable[[], Bandit | None]] = {
        "thompson": lambda: ThompsonSampling(5, rng=rng),
        "epsilon_greedy": lambda: EpsilonGreedy(5, 0.1, rng=rng),
        "ucb1": lambda: UCB1(5, rng=rng),
        "uniform": lambda: None,
    }
    for arm, policy in policies.items():
        curve = np.mean([simulated.regret(policy(), s.pulls, rng) for _ in range(s.repeats)], axis=0)
        for t in np.unique(np.linspace(0, s.pulls, 21).astype(int)[1:]):
            m.add("regret", curve[t - 1], arm=arm, step=int(t))
    races = [simulated.race(rng) for _ in range(s.races)]
    m.add("found_best", _mean([found for found, _ in races]), arm="halving")
    m.add("budget_share", _mean([share for _, share in races]), arm="halving")
    peeking, sequence = simulated.peeks(rng.normal(size=(s.sequences, s.peeks)))
    m.add("false_positive", peeking, arm="peeking")
    m.add("false_positive", sequence, arm="confidence_sequence")
    return m


# --- idea 7: robust inference -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Robust:
    """Locations of clean, heavy-tailed and contaminated values."""

    repeats: int = 300  # samples of each population per seed
    values: int = 20  # values in a sample


def robust(task: Task[Robust]) -> Measurements:
    """Root mean squared errors of three locations on clean, heavy-tailed and contaminated values."""
    s = task.settings
    rng = np.random.default_rng([task.seed, 7])
    size = (s.repeats, s.values)
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


@dataclass(frozen=True)
class Explore:
    """Predictive checks of four data sets with equal moments, and lineups with a crashed seed."""

    repeats: int = 5  # sets of four data sets per seed
    points: int = 40  # points of a data set
    replicates: int = 200  # data sets simulated from the fitted model
    lineups: int = 30  # lineups per seed, with a crash and without


def explore(task: Task[Explore]) -> Measurements:
    """Predictive checks on sets with equal moments, and lineups with one crashed seed."""
    s = task.settings
    rng = np.random.default_rng([task.seed, 8])
    flags = [
        {name: simulated.flagged(*xy, s.replicates, rng) for name, xy in simulated.anscombe_like(s.points, rng).items()}
        for _ in range(s.repeats)
    ]
    m = Measurements()
    for name in flags[0]:
        m.add("flagged", _mean([f[name] for f in flags]), arm=name)
    m.add("right_flags", _mean([all(v == (k != "line") for k, v in f.items()) for f in flags]), arm="checks")
    for arm, drop in (("crash", 0.1), ("no_crash", 0.0)):
        found = [simulated.stands_out(drop, rng) for _ in range(s.lineups)]
        m.add("lineup_detection", _mean(found), arm=arm)
    return m


# --- the judge itself -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judging:
    """Simulated studies of paired seeds, with an effect and without, and with odd differences, before the judge."""

    studies: int = 25  # simulated studies of each kind per seed
    margin: float = 0.8  # smallest effect that matters, in standard deviations of an arm
    correlation: float = 0.5  # of the paired arms
    odd: int = 10  # simulated studies of each odd null per seed (skewed, crashed, discrete, lost seeds)


def judging(task: Task[Judging]) -> Measurements:
    """How often the judge supports claims about nothing, and about an effect of the size that matters."""
    s = task.settings
    rng = np.random.default_rng([task.seed, 9])
    n = required_seeds(s.margin, 1.0, s.correlation, design="paired")
    claims = [
        Claim(f"C{i}", "A simulated claim", "It holds.", "", Difference(f"value{i}", "a", "b"), "greater", s.margin)
        for i in range(3)
    ]
    m = Measurements()
    for arm, effect, tested in (("null", 0.0, claims), ("effect", s.margin, claims[:1])):
        rates = [simulated.supported(tested, effect, s.correlation, n, rng) for _ in range(s.studies)]
        m.add("supported_rate", _mean(rates), arm=arm)
        m.add("any_supported", _mean(np.array(rates) > 0), arm=arm)
    m.add("recommended_seeds", n, arm="effect")
    # no effect, and differences the tests were not made for; a margin so small that it hides no wrong support
    alone = [replace(claims[0], margin=1e-3)]
    for null in simulated.ODD_NULLS:
        for seeds in (5, 10):
            rates = [simulated.supported_odd(alone, null, seeds, rng) for _ in range(s.odd)]
            m.add("odd_supported_rate", _mean(rates), arm=null, n=seeds)
    return m
