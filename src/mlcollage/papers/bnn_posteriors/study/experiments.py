"""The study's experiments: one function each, from a task to its measurements.

The arms are the rows' own: one run samples or trains all that is compared on one split, since a reference serves many.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlcollage.infer import ess, rhat, sghmc
from mlcollage.lab import Measurements, Task
from mlcollage.measure import calibration
from mlcollage.train import epochs

from ..empcov import EmpCovPrior
from ..mfvi import MFVI
from ..posterior import Posterior
from ..priors import GaussianPrior, LogisticPrior
from ..sgmcmc import SGHMC, SGLD, CyclicalSGHMC
from .claims import FACTORS, FRACTIONS, NOISES, TEMPERATURES
from .data import Sizes, network
from .sampling import Case, Probabilities, distances, scores, shifted

_DEAD = 64  # constant inputs that the shift experiment appends
_DECAYS = (0.1, 0.3, 1.0, 10.0, 1000.0)  # prior variances that optima and ensembles are tuned over, to almost flat
_RATES = (0.1, 0.3, 1.0)  # step sizes of stochastic-gradient samplers, times half of one over the largest curvature
_VI_RATES = (0.003, 0.01, 0.03)


# --- methods ----------------------------------------------------------------------------------------------------------


def methods(task: Task[Sizes]) -> Measurements:
    """HMC, an independent reference, one long chain, and every cheap method against them."""
    case, m, s = Case.of(task), Measurements(), task.settings
    x, y = case.data.test
    main = case.hmc(stream=1)
    reference = case.average(case.hmc(stream=2), x)
    # as many gradients as all chains together, burn-in included
    long = case.hmc(chains=1, draws=s.chains * s.draws + (s.chains - 1) * s.burn_in, stream=3)
    each = case.predict(main, x)  # (chains, draws, n, K)
    p = each.mean(axis=(0, 1), dtype=np.float64)
    m.add_all({**scores(p, y, case.average(main, case.foreign)), **distances(p, reference)}, arm="hmc")
    m.add("single_draw_accuracy", case.mean_accuracy(main, x), arm="hmc")
    m.add("acceptance", float(main.sample_stats["accept_prob"].mean()), arm="hmc")
    _mixing(m, main, each, keep=task.seed == 0)
    p_long = case.average(long, x)
    m.add_all({**scores(p_long, y), **distances(p_long, reference)}, arm="long_chain")
    for arm, found in _rivals(case, main).items():
        p = case.average(found, x)
        m.add_all({**scores(p, y, case.average(found, case.foreign)), **distances(p, reference)}, arm=arm)
    _tuned_optima(m, case, reference)
    if task.seed == 0:
        _plane(m, case, main.draws())
    return m


def _mixing(m: Measurements, posterior: Posterior, each: NDArray[np.float32], keep: bool) -> None:
    """Split-R-hat of every predicted probability and of every weight."""
    params = posterior.draws()
    if params.shape[1] < 4:
        return
    values = {"function": each.reshape(*each.shape[:2], -1), "weight": params.cpu().numpy()}
    for space, x in values.items():
        r = rhat(np.ascontiguousarray(x), "split").ravel()
        r = r[np.isfinite(r)]
        m.add("rhat_median", float(np.median(r)), arm="hmc", space=space)
        m.add("rhat_share", float((r < 1.1).mean()), arm="hmc", space=space)
        if keep:
            m.array(f"rhat_{space}", r.astype(np.float32))


def _tuned_optima(m: Measurements, case: Case, reference: Probabilities) -> None:
    """One optimum and an ensemble of them; each score is of the prior that is best on validation samples for it."""
    d = case.data
    found = {v: case.optima(v, stream=10 + k) for k, v in enumerate(_DECAYS)}
    # class probabilities of each member, (members, n, K), by prior variance
    held, tests, others = (
        {v: case.predict(f, x)[:, 0].astype(np.float64) for v, f in found.items()}
        for x in (d.validation.x, d.test.x, case.foreign)
    )

    def ensemble(parts: NDArray, y: Tensor, foreign: NDArray | None = None) -> dict[str, float]:
        return scores(parts.mean(axis=0), y, None if foreign is None else foreign.mean(axis=0))

    def one(parts: NDArray, y: Tensor, foreign: NDArray | None = None) -> dict[str, float]:
        return _mean([scores(part, y, None if foreign is None else foreign[k]) for k, part in enumerate(parts)])

    for arm, score in (("ensemble", ensemble), ("sgd", one)):
        validation = {v: score(parts, d.validation.y) for v, parts in held.items()}
        by = {
            "accuracy": max(_DECAYS, key=lambda v: (validation[v]["accuracy"], -validation[v]["nll"])),
            "nll": min(_DECAYS, key=lambda v: validation[v]["nll"]),
        }
        results = {v: score(tests[v], d.test.y, others[v]) for v in set(by.values())}
        m.add("accuracy", results[by["accuracy"]]["accuracy"], arm=arm)
        m.add_all({k: v for k, v in results[by["nll"]].items() if k != "accuracy"}, arm=arm)
        for metric, variance in by.items():
            m.add(f"tuned_variance_{metric}", variance, arm=arm)
        parts = tests[by["nll"]]
        compared = [parts.mean(axis=0)] if arm == "ensemble" else parts
        m.add_all(_mean([distances(p, reference) for p in compared]), arm=arm)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _rivals(case: Case, main: Posterior) -> dict[str, Posterior]:
    """Stochastic-gradient samplers and variational inference.

    The step size of each is the one with the lowest negative log-likelihood on validation samples.
    """
    # half of one over the largest curvature where the chains of HMC stand
    base = 0.5 / case.curvature(main.draws()[:, -1])
    tries = {
        kind.name: [case.stochastic(kind, rate * base, 30 + 3 * k + j) for j, rate in enumerate(_RATES)]
        for k, kind in enumerate((SGLD, SGHMC, CyclicalSGHMC))
    }
    variational = [MFVI(draws=50, steps=case.sizes.epochs, lr=rate, map_steps=100) for rate in _VI_RATES]
    tries["mfvi"] = [case.fit(method, None, case.stream(50)) for method in variational]
    return {arm: min(found, key=lambda f: case.validated(f)["nll"]) for arm, found in tries.items()}


def _plane(m: Measurements, case: Case, draws: Tensor) -> None:
    """The log-density on the plane through three of the draws (chains, draws, P), two of one chain."""
    a, b = draws[0, 0], draws[0, -1]
    c = draws[1, -1] if len(draws) > 1 else draws[0, draws.shape[1] // 2]
    # orthogonal axes u, from a to b, and v, towards c
    u = b - a
    length = u.norm()
    u = u / length
    v = c - a
    v = v - (v @ u) * u
    height = v.norm()
    v = v / height
    axis = torch.linspace(-0.45, 1.45, 33)
    points = torch.stack([a + x * length * u + y * length * v for y in axis for x in axis])  # (33 * 33, P)
    density = case.bayesian().log_density(*case.data.train)
    values = torch.cat([density(row)[0] for row in points.split(33)])
    m.array("plane", values.reshape(33, 33).cpu().numpy())
    m.array("plane_axis", axis.numpy())
    across = float(((c - a) @ u) / length)
    m.array("plane_points", np.array([[0.0, 0.0], [1.0, 0.0], [across, float(height / length)]]))


# --- settings ---------------------------------------------------------------------------------------------------------


def settings(task: Task[Sizes]) -> Measurements:
    """HMC with one setting changed at a time: length of trajectories, temperature, prior."""
    case, m = Case.of(task), Measurements()
    chains = max(2, task.settings.chains // 2)
    usual = case.hmc(chains=chains)
    _trajectories(m, case, usual, chains)
    _temperatures(m, case, usual, chains)
    _priors(m, case, usual, chains)
    return m


def _trajectories(m: Measurements, case: Case, usual: Posterior, chains: int) -> None:
    """Shorter trajectories with as many gradients: more of them."""
    for k, fraction in enumerate(FRACTIONS):
        posterior = usual
        if fraction < 1:
            draws = round(case.sizes.draws / fraction)
            posterior = case.hmc(chains=chains, draws=draws, fraction=fraction, stream=60 + k)
        each = case.predict(posterior, case.data.test.x[:200])
        gradients = float(posterior.sample_stats["n_steps"].sum())
        effective = ess(np.ascontiguousarray(each.reshape(*each.shape[:2], -1)), "mean")
        values = {"ess_per_gradient": float(np.nanmedian(effective)) / gradients, "gradients": gradients}
        m.add_all({**values, **case.tested(posterior)}, arm="trajectory", fraction=fraction)


def _temperatures(m: Measurements, case: Case, usual: Posterior, chains: int) -> None:
    """Several temperatures, and the one that validation samples prefer."""
    validation, test = {}, {}
    for k, temperature in enumerate(TEMPERATURES):
        cooled = temperature != 1
        posterior = case.hmc(chains=chains, temperature=temperature, stream=70 + k) if cooled else usual
        validation[temperature] = case.validated(posterior)
        test[temperature] = case.tested(posterior)
        m.add_all(test[temperature], arm="tempered", temperature=temperature)
    best = max(validation, key=lambda t: (validation[t]["accuracy"], -validation[t]["nll"]))
    m.add("accuracy", test[best]["accuracy"], arm="tempered_best")
    m.add("best_temperature", best, arm="tempered_best")


def _priors(m: Measurements, case: Case, usual: Posterior, chains: int) -> None:
    """Prior variances and another family, for HMC and for the optimum."""
    own = case.sizes.variance
    for k, factor in enumerate(FACTORS):
        variance = own * factor
        posterior = usual if factor == 1 else case.hmc(variance, chains=chains, stream=80 + k)
        m.add_all(case.tested(posterior), arm="prior_hmc", factor=factor, family="gaussian")
        accuracy = case.mean_accuracy(case.optima(variance, stream=90 + k, members=4), case.data.test.x)
        m.add("accuracy", accuracy, arm="prior_map", factor=factor, family="gaussian")
    # a logistic distribution of scale b has the variance pi^2 b^2 / 3
    posterior = case.hmc(LogisticPrior(math.sqrt(3 * own) / math.pi), chains=chains, stream=99)
    m.add_all(case.tested(posterior), arm="prior_hmc", factor=1.0, family="logistic")


# --- shift ------------------------------------------------------------------------------------------------------------


def shift(task: Task[Sizes]) -> Measurements:
    """Constant inputs that come alive at test time."""
    case, m, variance = Case.of(task), Measurements(), task.settings.variance
    x, y = case.data.test

    def widened(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(len(x), _DEAD)], dim=1)

    wide = case.with_inputs(task, widened)
    inputs = wide.data.train.x  # (n, features + dead)
    covariance = float(inputs.square().sum() / (len(inputs) - 1) / x.shape[1])
    mended = EmpCovPrior.from_module(
        wide.network, inputs, alpha=variance / covariance, eps=1e-4, rest=GaussianPrior(variance)
    )
    usual = wide.hmc(stream=1)
    sampled = {"shift_hmc": usual, "shift_empcov": wide.hmc(mended, stream=2)}
    optima = wide.optima(variance, stream=3)
    generator = torch.Generator().manual_seed(wide.stream(4))
    noise = torch.randn((len(x), _DEAD), generator=generator).to(x.device)
    for sigma in NOISES:
        noisy = torch.cat([x, sigma * noise], dim=1)
        for arm, posterior in sampled.items():
            m.add("accuracy", calibration.accuracy(wide.average(posterior, noisy), y.cpu()), arm=arm, noise=sigma)
        m.add("accuracy", wide.mean_accuracy(optima, noisy), arm="shift_map", noise=sigma)
    first = usual.layout.unflatten(usual.draws())[usual.layout.names[0]]  # (chain, draw, unit, input)
    ratio = float(first[..., -_DEAD:].double().square().mean()) / variance
    m.add("dead_variance_ratio", ratio, arm="shift_hmc")
    return m


# --- augmentation -----------------------------------------------------------------------------------------------------


def augmentation(task: Task[Sizes]) -> Measurements:
    """Stochastic-gradient HMC with and without random shifts in each minibatch, hot and cold."""
    case, m = Case.of(task), Measurements()
    near = case.optima(task.settings.variance, stream=1, members=2).draws()
    rate = 0.3 * 0.5 / case.curvature(near[:, 0])
    for temperature in (0.1, 1.0):
        for arm in ("plain", "augmented"):
            generator = torch.Generator().manual_seed(case.stream(2))
            transform = partial(shifted, generator=generator) if arm == "augmented" else None
            found = case.stochastic(SGHMC, rate, 3, temperature, transform)
            m.add_all(case.tested(found), arm=arm, temperature=temperature)
        if task.settings.network == "resnet":
            p = _batchnorm(case, network(task, case.data, "batch"), rate, temperature)
            m.add_all(scores(p, case.data.test.y), arm="augmented_batchnorm", temperature=temperature)
    return m


def _batchnorm(case: Case, net: nn.Module, rate: float, temperature: float) -> Probabilities:
    """The same sampler on a network with batch norm, which has no likelihood: averaged predictions, with shifts."""
    train, test = case.data.train, case.data.test
    generator = torch.Generator().manual_seed(case.stream(2))
    sampler = sghmc.SGHMC(
        net.parameters(),
        lr=rate,
        num_data=len(train.x),
        momentum=0.9,
        weight_decay=1 / case.sizes.variance,
        temperature=temperature,
        generator=case.stream(3),
    )
    burn, total, count = case.steps // 5, np.zeros((len(test.x), case.data.num_classes)), 0
    thin = max(1, (case.steps - burn) // 40)
    passes = epochs(train.x, train.y, case.batch_size, generator=generator)
    for step, (x, y) in zip(range(case.steps), passes, strict=False):
        net.train()
        sampler.zero_grad()
        nn.functional.cross_entropy(net(shifted(x, generator)), y).backward()
        sampler.step()
        if step >= burn and (step - burn) % thin == thin - 1:
            net.eval()
            with torch.no_grad():
                parts = [net(part).softmax(dim=1) for part in test.x.split(2000)]
            total, count = total + torch.cat(parts).double().cpu().numpy(), count + 1
    return total / max(count, 1)
