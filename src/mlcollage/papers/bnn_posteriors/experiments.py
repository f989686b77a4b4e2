"""The study's parts: what is sampled, trained and compared for one split of the data."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlcollage.data.workload import Workload, arrays
from mlcollage.errors import InvalidInput
from mlcollage.infer import sghmc
from mlcollage.infer.diagnostics import ess, rhat
from mlcollage.infer.hmc import prior_period
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run
from mlcollage.measure import calibration
from mlcollage.nn.init import build
from mlcollage.nn.mlp import MLP
from mlcollage.nn.resnet import ResNet
from mlcollage.train.loop import epochs

from .density import largest_curvature
from .empcov import EmpCovPrior
from .ensemble import Ensemble
from .hmc import HMC
from .method import Method
from .mfvi import MFVI
from .network import BayesianNetwork
from .posterior import Posterior
from .priors import GaussianPrior, LogisticPrior, Prior
from .sgmcmc import SGHMC, SGLD, CyclicalSGHMC
from .study import FACTORS, FRACTIONS, NOISES, TEMPERATURES

__all__ = ["measure"]

Probabilities = NDArray[np.float64]
_DEAD = 64  # constant inputs that the shift experiment appends
_DECAYS = (0.1, 0.3, 1.0, 10.0, 1000.0)  # prior variances that optima and ensembles are tuned over, to almost flat
_RATES = (0.1, 0.3, 1.0)  # step sizes of stochastic-gradient samplers, times half of one over the largest curvature
_VI_RATES = (0.003, 0.01, 0.03)


@dataclass(frozen=True)
class Split:
    """Training, validation and test samples, and foreign inputs; standardized by the training samples."""

    x: Tensor
    y: Tensor
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor
    x_foreign: Tensor
    classes: int


def measure(run: Run, workload: Workload | None) -> Measurements:
    """One part of the study for one split."""
    parts: Mapping[str, Callable[[Run, Workload | None, Split], Measurements]] = {
        "methods": _methods,
        "settings": _settings,
        "shift": _shift,
        "augmentation": _augmentation,
    }
    return parts[run.arm](run, workload, _split(run, workload))


# --- data and networks ------------------------------------------------------------------------------------------------


def _load(run: Run, workload: Workload | None) -> tuple[NDArray, NDArray, NDArray, NDArray, int]:
    data = run.text("data")
    if workload is not None:
        x, y = arrays(workload.train)
        x_test, y_test = arrays(workload.test)
        return x, y, x_test, y_test, workload.num_classes
    if data == "digits":
        from mlcollage.data.digits import load_digits_split

        x, y, x_test, y_test = load_digits_split(run.seed, run.integer("test"))
        return x, y, x_test, y_test, 10
    if data == "fashion_mnist":
        from mlcollage.data import fashion_mnist

        x, y, x_test, y_test = fashion_mnist.load()
        return x.reshape(-1, 1, 28, 28), y, x_test.reshape(-1, 1, 28, 28), y_test, 10
    folder = os.environ.get("MLCOLLAGE_DATA")
    if not folder:
        raise InvalidInput("scale paper needs CIFAR-10: put its binary version into $MLCOLLAGE_DATA/cifar10.")
    from mlcollage.data.workload import load_workload

    loaded = load_workload(f"cifar10:{Path(folder) / 'cifar10'}")
    return (*arrays(loaded.train), *arrays(loaded.test), 10)


def _split(run: Run, workload: Workload | None) -> Split:
    x, y, x_test, y_test, classes = _load(run, workload)
    flat = run.text("network") == "mlp"
    train, held, test = (run.integer(name) for name in ("train", "validation", "test"))
    rng = np.random.default_rng([run.seed, 11])
    order = rng.permutation(len(x))
    chosen, validation = order[:train], order[train : train + held]
    picked = rng.permutation(len(x_test))[:test]
    mean, std = float(x[chosen].mean()), float(x[chosen].std()) or 1.0

    def tensor(values: NDArray) -> Tensor:
        t = torch.from_numpy((values - mean) / std).float()
        return t.flatten(1) if flat else t

    return Split(
        tensor(x[chosen]),
        torch.from_numpy(y[chosen]),
        tensor(x[validation]),
        torch.from_numpy(y[validation]),
        tensor(x_test[picked]),
        torch.from_numpy(y_test[picked]),
        tensor(_foreign(run, x_test[picked], rng)),
        classes,
    )


def _foreign(run: Run, x: NDArray, rng: np.random.Generator) -> NDArray:
    """Inputs from elsewhere: clothes among digits, else the test inputs with each feature shuffled over samples."""
    if run.text("data") == "digits":
        from mlcollage.data import fashion_mnist

        images = fashion_mnist.load(limit=len(x))[2].reshape(-1, 28, 28)[:, 2:26, 2:26]
        return images.reshape(-1, 8, 3, 8, 3).mean(axis=(2, 4)).reshape(-1, 64)
    flat = x.reshape(len(x), -1)
    return rng.permuted(flat, axis=0).reshape(x.shape)


def _network(run: Run, workload: Workload | None, split: Split, norm: str = "frn") -> nn.Module:
    kind, shape = run.text("network"), tuple(split.x.shape[1:])
    if kind == "user":
        assert workload is not None
        assert workload.model is not None
        return build(workload.model, run.seed).eval()
    if kind == "resnet":
        width = 16 if run.text("data") == "cifar10" else 8
        make: Callable[[], nn.Module] = lambda: ResNet(  # noqa: E731
            (shape[0], shape[1], shape[2]), split.classes, width=width, norm=norm, activation="silu", conv_bias=True
        )
        return build(make, run.seed)
    return build(lambda: MLP(shape, split.classes, widths=(50, 50)), run.seed)


# --- sampling and predicting ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A network, its data, and how it is sampled by the study's rules."""

    run: Run
    network: nn.Module
    split: Split

    def model(self, prior: Prior | float | None = None) -> BayesianNetwork:
        """The network with a prior: by default the study's."""
        if prior is None:
            prior = self.run.real("variance")
        return BayesianNetwork(self.network, prior=prior if isinstance(prior, Prior) else GaussianPrior(prior))

    def hmc(
        self,
        prior: Prior | float | None = None,
        *,
        chains: int | None = None,
        draws: int | None = None,
        temperature: float = 1.0,
        fraction: float = 1.0,
        stream: int = 0,
    ) -> Posterior:
        """Chains of HMC by the paper's rules: a quarter period of the prior, half of the burn-in without a test."""
        burn = self.run.integer("burn_in")
        given = self.run.real("step_size")
        scale = prior**0.5 if isinstance(prior, float) else self.run.real("variance") ** 0.5
        method = HMC(
            chains=chains or self.run.integer("chains"),
            draws=draws or self.run.integer("draws"),
            burn_in=burn // 2,
            warmup=burn - burn // 2 if given else max(10, burn),
            step_size=given * math.sqrt(min(temperature, 1.0)) or None,
            trajectory_length=prior_period(scale, temperature) * fraction,
            temperature=temperature,
        )
        return self.model(prior).fit(self.split.x, self.split.y, method, generator=_seed(self.run, stream))

    def members(self, prior: float, stream: int, members: int | None = None) -> Posterior:
        """Optima from independent starts."""
        method = Ensemble(
            members=members or self.run.integer("members"),
            steps=self.run.integer("epochs"),
            batch_size=None if self.run.text("network") == "mlp" else 100,
        )
        return self.model(prior).fit(self.split.x, self.split.y, method, generator=_seed(self.run, stream))

    def predict(self, posterior: Posterior, x: Tensor) -> NDArray[np.float32]:
        """Class probabilities of every draw, (chains, draws, n, K)."""
        return posterior.predict_draws(x, batch_size=2000).float().numpy()

    def average(self, posterior: Posterior, x: Tensor) -> Probabilities:
        """Class probabilities averaged over all draws, (n, K)."""
        return self.predict(posterior, x).mean(axis=(0, 1), dtype=np.float64)


def _seed(run: Run, stream: int) -> int:
    return int(np.random.SeedSequence([run.seed, 23, stream]).generate_state(1)[0])


def _problem(run: Run, workload: Workload | None, split: Split) -> Problem:
    return Problem(run, _network(run, workload, split), split)


def _scores(p: Probabilities, y: Tensor, foreign: Probabilities | None = None) -> dict[str, float]:
    scores = {
        "accuracy": calibration.accuracy(p, y),
        "nll": calibration.nll(np.clip(p, 1e-12, 1), y),
        "brier": calibration.brier(p, y),
        "ece": calibration.ece(p, y),
        "overconfidence": calibration.confidence_gap(p, y),
    }
    if foreign is not None:
        entropies = calibration.predictive_entropy(p), calibration.predictive_entropy(foreign)
        scores["auroc_ood"] = calibration.auroc_ood(*entropies)
    return scores


def _distances(p: Probabilities, reference: Probabilities) -> dict[str, float]:
    return {"tv": calibration.total_variation(p, reference), "agreement": calibration.agreement(p, reference)}


def _validation(problem: Problem, posterior: Posterior) -> dict[str, float]:
    return _scores(problem.average(posterior, problem.split.x_validation), problem.split.y_validation)


# --- parts ------------------------------------------------------------------------------------------------------------


def _methods(run: Run, workload: Workload | None, split: Split) -> Measurements:
    """HMC, an independent reference, one long chain, and every cheap method against them."""
    problem, m = _problem(run, workload, split), Measurements()
    chains, draws, burn = (run.integer(name) for name in ("chains", "draws", "burn_in"))
    main = problem.hmc(stream=1)
    reference = problem.average(problem.hmc(stream=2), split.x_test)
    long = problem.hmc(chains=1, draws=chains * draws + (chains - 1) * burn, stream=3)
    each = problem.predict(main, split.x_test)
    p = each.mean(axis=(0, 1), dtype=np.float64)
    foreign = problem.average(main, split.x_foreign)
    m.add_all({**_scores(p, split.y_test, foreign), **_distances(p, reference)}, arm="hmc")
    m.add("single_draw_accuracy", float((each.argmax(-1) == split.y_test.numpy()).mean()), arm="hmc")
    m.add("acceptance", float(main.sample_stats["accept_prob"].mean()), arm="hmc")
    _mixing(m, main, each, run)
    p_long = problem.average(long, split.x_test)
    m.add_all({**_scores(p_long, split.y_test), **_distances(p_long, reference)}, arm="long_chain")
    for arm, predictive, other in _rivals(problem, main):
        m.add_all({**_scores(predictive, split.y_test, other), **_distances(predictive, reference)}, arm=arm)
    _tuned_optima(m, problem, reference)
    if run.seed == 0:
        _plane(m, problem, main)
    return m


def _mixing(m: Measurements, posterior: Posterior, each: NDArray[np.float32], run: Run) -> None:
    assert posterior.params is not None
    if posterior.params.shape[1] < 4:
        return
    values = {"function": each.reshape(*each.shape[:2], -1), "weight": posterior.params.cpu().numpy()}
    for space, x in values.items():
        r = rhat(np.ascontiguousarray(x), "split").ravel()
        r = r[np.isfinite(r)]
        m.add("rhat_median", float(np.median(r)), arm="hmc", space=space)
        m.add("rhat_share", float((r < 1.1).mean()), arm="hmc", space=space)
        if run.seed == 0:
            m.array(f"rhat_{space}", r.astype(np.float32))


def _tuned_optima(m: Measurements, problem: Problem, reference: Probabilities) -> None:
    """One optimum and an ensemble of them; each score is of the prior that is best on validation samples for it."""
    split = problem.split
    found = {v: problem.members(v, stream=10 + k) for k, v in enumerate(_DECAYS)}
    held = {v: problem.predict(f, split.x_validation)[:, 0].astype(np.float64) for v, f in found.items()}
    tests = {v: problem.predict(f, split.x_test)[:, 0].astype(np.float64) for v, f in found.items()}
    others = {v: problem.predict(f, split.x_foreign)[:, 0].astype(np.float64) for v, f in found.items()}

    def ensemble(parts: NDArray, y: Tensor, foreign: NDArray | None = None) -> dict[str, float]:
        return _scores(parts.mean(axis=0), y, None if foreign is None else foreign.mean(axis=0))

    def one(parts: NDArray, y: Tensor, foreign: NDArray | None = None) -> dict[str, float]:
        rows = [_scores(part, y, None if foreign is None else foreign[k]) for k, part in enumerate(parts)]
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    for arm, score in (("ensemble", ensemble), ("sgd", one)):
        validation = {v: score(parts, split.y_validation) for v, parts in held.items()}
        by = {
            "accuracy": max(_DECAYS, key=lambda v: (validation[v]["accuracy"], -validation[v]["nll"])),
            "nll": min(_DECAYS, key=lambda v: validation[v]["nll"]),
        }
        results = {v: score(tests[v], split.y_test, others[v]) for v in set(by.values())}
        m.add("accuracy", results[by["accuracy"]]["accuracy"], arm=arm)
        m.add_all({k: v for k, v in results[by["nll"]].items() if k != "accuracy"}, arm=arm)
        for metric, variance in by.items():
            m.add(f"tuned_variance_{metric}", variance, arm=arm)
        parts = tests[by["nll"]]
        pairs = [_distances(q, reference) for q in ([parts.mean(axis=0)] if arm == "ensemble" else parts)]
        m.add_all({name: float(np.mean([d[name] for d in pairs])) for name in pairs[0]}, arm=arm)


def _rivals(problem: Problem, main: Posterior) -> list[tuple[str, Probabilities, Probabilities]]:
    """Predictions, on test and foreign inputs, of stochastic-gradient samplers and variational inference.

    The step size of each is the one with the lowest negative log-likelihood on validation samples.
    """
    run, split = problem.run, problem.split
    base = _base_rate(problem, main)
    size = _batch(run)
    steps = run.integer("sg_epochs") * max(1, run.integer("train") // size)
    found = []
    for k, kind in enumerate(("sgld", "sghmc", "csghmc")):
        tries = [
            _sgmcmc(problem, kind, rate * base, size, steps, _seed(run, 30 + 3 * k + j))
            for j, rate in enumerate(_RATES)
        ]
        found.append((kind, tries))
    variational = [
        problem.model().fit(
            split.x,
            split.y,
            MFVI(draws=50, steps=run.integer("epochs"), lr=rate, map_steps=100),
            generator=_seed(run, 50),
        )
        for rate in _VI_RATES
    ]
    found.append(("mfvi", variational))
    best = [(arm, min(tries, key=lambda t: _validation(problem, t)["nll"])) for arm, tries in found]
    return [(arm, problem.average(b, split.x_test), problem.average(b, split.x_foreign)) for arm, b in best]


def _batch(run: Run) -> int:
    return min(50, run.integer("train"))


def _base_rate(problem: Problem, posterior: Posterior) -> float:
    """Half of one over the largest curvature where the chains of HMC stand."""
    assert posterior.params is not None
    density = problem.model().log_density(problem.split.x, problem.split.y)
    return 0.5 / float(largest_curvature(density, posterior.params[:, -1].contiguous()).max())


def _sgmcmc(
    problem: Problem,
    kind: str,
    rate: float,
    size: int,
    steps: int,
    seed: int,
    temperature: float = 1.0,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Posterior:
    draws = min(40, max(1, steps // 10))
    burn = steps // 5 if kind != "csghmc" else 0
    thin = max(1, (steps - burn) // draws)
    common: dict[str, Any] = {
        "chains": problem.run.integer("chains"),
        "draws": draws,
        "burn_in": burn,
        "lr": rate,
        "batch_size": size,
        "temperature": temperature,
        "transform": transform,
    }
    method: Method = {
        "sgld": lambda: SGLD(thin=thin, **common),
        "sghmc": lambda: SGHMC(thin=thin, **common),
        "csghmc": lambda: CyclicalSGHMC(cycle_length=max(2, thin), **common),
    }[kind]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "with augmentation", UserWarning)  # what this part is about
        return problem.model().fit(problem.split.x, problem.split.y, method, generator=seed)


def _plane(m: Measurements, problem: Problem, posterior: Posterior) -> None:
    """The log-density on the plane through three samples, two of one chain."""
    assert posterior.params is not None
    draws = posterior.params
    a, b = draws[0, 0], draws[0, -1]
    c = draws[min(1, len(draws) - 1), -1] if len(draws) > 1 else draws[0, draws.shape[1] // 2]
    u = b - a
    length = u.norm()
    u = u / length
    v = c - a
    v = v - (v @ u) * u
    height = v.norm()
    v = v / height
    axis = torch.linspace(-0.45, 1.45, 33)
    points = [a + x * length * u + y * length * v for y in axis for x in axis]
    density = problem.model().log_density(problem.split.x, problem.split.y)
    values = torch.cat([density(torch.stack(points[k : k + 33]))[0] for k in range(0, len(points), 33)])
    m.array("plane", values.reshape(33, 33).numpy())
    m.array("plane_axis", axis.numpy())
    shift = float(((c - a) @ u) / length)
    m.array("plane_points", np.array([[0.0, 0.0], [1.0, 0.0], [shift, float(height / length)]]))


def _settings(run: Run, workload: Workload | None, split: Split) -> Measurements:
    """HMC with one setting changed at a time: length of trajectories, temperature, prior."""
    problem, m = _problem(run, workload, split), Measurements()
    chains = max(2, run.integer("chains") // 2)
    usual = problem.hmc(chains=chains)
    _trajectories(m, problem, usual, chains)
    _temperatures(m, problem, usual, chains)
    _priors(m, problem, usual, chains)
    return m


def _trajectories(m: Measurements, problem: Problem, usual: Posterior, chains: int) -> None:
    """Shorter trajectories with as many gradients: more of them."""
    split, draws = problem.split, problem.run.integer("draws")
    for k, fraction in enumerate(FRACTIONS):
        posterior = usual
        if fraction < 1:
            posterior = problem.hmc(chains=chains, draws=round(draws / fraction), fraction=fraction, stream=60 + k)
        each = problem.predict(posterior, split.x_test[:200])
        gradients = float(posterior.sample_stats["n_steps"].sum())
        effective = ess(np.ascontiguousarray(each.reshape(*each.shape[:2], -1)), "mean")
        scores = _scores(problem.average(posterior, split.x_test), split.y_test)
        values = {"ess_per_gradient": float(np.nanmedian(effective)) / gradients, "gradients": gradients}
        m.add_all({**values, **scores}, arm="trajectory", fraction=fraction)


def _temperatures(m: Measurements, problem: Problem, usual: Posterior, chains: int) -> None:
    """Several temperatures, and the one that validation samples prefer."""
    validation, test = {}, {}
    for k, temperature in enumerate(TEMPERATURES):
        cooled = temperature != 1
        posterior = problem.hmc(chains=chains, temperature=temperature, stream=70 + k) if cooled else usual
        validation[temperature] = _validation(problem, posterior)
        test[temperature] = _scores(problem.average(posterior, problem.split.x_test), problem.split.y_test)
        m.add_all(test[temperature], arm="tempered", temperature=temperature)
    best = max(validation, key=lambda t: (validation[t]["accuracy"], -validation[t]["nll"]))
    m.add("accuracy", test[best]["accuracy"], arm="tempered_best")
    m.add("best_temperature", best, arm="tempered_best")


def _priors(m: Measurements, problem: Problem, usual: Posterior, chains: int) -> None:
    """Prior variances and another family, for HMC and for the optimum."""
    split, own = problem.split, problem.run.real("variance")
    for k, factor in enumerate(FACTORS):
        variance = own * factor
        posterior = usual if factor == 1 else problem.hmc(variance, chains=chains, stream=80 + k)
        scores = _scores(problem.average(posterior, split.x_test), split.y_test)
        m.add_all(scores, arm="prior_hmc", factor=factor, family="gaussian")
        optima = problem.predict(problem.members(variance, stream=90 + k, members=4), split.x_test)[:, 0]
        accuracy = float((optima.argmax(-1) == split.y_test.numpy()).mean())
        m.add("accuracy", accuracy, arm="prior_map", factor=factor, family="gaussian")
    posterior = problem.hmc(LogisticPrior(math.sqrt(3 * own) / math.pi), chains=chains, stream=99)
    scores = _scores(problem.average(posterior, split.x_test), split.y_test)
    m.add_all(scores, arm="prior_hmc", factor=1.0, family="logistic")


def _shift(run: Run, workload: Workload | None, split: Split) -> Measurements:
    """Constant inputs that come alive at test time; networks of the user's have no place for more inputs."""
    m = Measurements()
    if split.x.ndim != 2 or run.text("network") != "mlp":
        m.add("not_applicable", 1.0)
        return m

    def widened(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(len(x), _DEAD)], dim=1)

    wide = replace(split, x=widened(split.x), x_validation=widened(split.x_validation), x_test=widened(split.x_test))
    problem = _problem(run, workload, wide)
    variance = run.real("variance")
    covariance = wide.x.square().sum() / (len(wide.x) - 1) / split.x.shape[1]
    mended = EmpCovPrior.from_module(
        problem.network, wide.x, alpha=variance / float(covariance), eps=1e-4, rest=GaussianPrior(variance)
    )
    posteriors = {
        "shift_hmc": problem.hmc(stream=1),
        "shift_empcov": problem.hmc(mended, stream=2),
        "shift_map": problem.members(variance, stream=3),
    }
    rng = torch.Generator().manual_seed(_seed(run, 4))
    noise = torch.randn((len(wide.x_test), _DEAD), generator=rng)
    for sigma in NOISES:
        x = torch.cat([split.x_test, sigma * noise], dim=1)
        for arm, posterior in posteriors.items():
            if arm == "shift_map":
                each = problem.predict(posterior, x)[:, 0]
                accuracy = float((each.argmax(-1) == split.y_test.numpy()).mean())
            else:
                accuracy = calibration.accuracy(problem.average(posterior, x), split.y_test)
            m.add("accuracy", accuracy, arm=arm, noise=sigma)
    params = posteriors["shift_hmc"].params
    assert params is not None
    layout = problem.model().layout
    first = layout.unflatten(params)[layout.names[0]]
    dead = first[..., -_DEAD:]
    m.add("dead_variance_ratio", float(dead.double().square().mean()) / variance, arm="shift_hmc")
    return m


def _augmentation(run: Run, workload: Workload | None, split: Split) -> Measurements:
    """Stochastic-gradient HMC with and without random shifts in each minibatch, hot and cold."""
    problem, m = _problem(run, workload, split), Measurements()
    size = _batch(run)
    steps = run.integer("sg_epochs") * max(1, run.integer("train") // size)
    near = problem.members(run.real("variance"), stream=1, members=2).params
    assert near is not None
    density = problem.model().log_density(split.x, split.y)
    rate = 0.3 * 0.5 / float(largest_curvature(density, near[:, 0].contiguous()).max())
    for temperature in (0.1, 1.0):
        for arm, shifts in (("plain", False), ("augmented", True)):
            rng = torch.Generator().manual_seed(_seed(run, 2))
            transform = partial(_shifted, rng=rng) if shifts else None
            posterior = _sgmcmc(problem, "sghmc", rate, size, steps, _seed(run, 3), temperature, transform)
            scores = _scores(problem.average(posterior, split.x_test), split.y_test)
            m.add_all(scores, arm=arm, temperature=temperature)
        if run.text("network") == "resnet":
            p = _batchnorm(_network(run, workload, split, "batch"), problem, rate, size, steps, temperature)
            m.add_all(_scores(p, split.y_test), arm="augmented_batchnorm", temperature=temperature)
    return m


def _batchnorm(
    network: nn.Module, problem: Problem, rate: float, size: int, steps: int, temperature: float
) -> Probabilities:
    """The same sampler on a network with batch norm, which has no likelihood: averaged predictions, with shifts."""
    run, split = problem.run, problem.split
    rng = torch.Generator().manual_seed(_seed(run, 2))
    sampler = sghmc.SGHMC(
        network.parameters(), lr=rate, num_data=len(split.x), momentum=0.9, weight_decay=1 / run.real("variance"),
        temperature=temperature, generator=_seed(run, 3),
    )  # fmt: skip
    burn, total, count = steps // 5, np.zeros((len(split.x_test), split.classes)), 0
    thin = max(1, (steps - burn) // 40)
    for step, (x, y) in zip(range(steps), epochs(split.x, split.y, size, generator=rng), strict=False):
        network.train()
        sampler.zero_grad()
        nn.functional.cross_entropy(network(_shifted(x, rng)), y).backward()
        sampler.step()
        if step >= burn and (step - burn) % thin == thin - 1:
            network.eval()
            with torch.no_grad():
                parts = [network(part).softmax(dim=1) for part in split.x_test.split(2000)]
            total, count = total + torch.cat(parts).double().numpy(), count + 1
    return total / max(count, 1)


def _shifted(x: Tensor, rng: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel each way, zeros coming in; rows of square numbers of pixels are images."""
    side = math.isqrt(x.shape[1]) if x.ndim == 2 else 0
    if x.ndim == 2 and side * side != x.shape[1]:
        return x + 0.1 * torch.randn(x.shape, generator=rng)
    images = x.reshape(len(x), -1, side, side) if side else x
    n, _, h, w = images.shape
    move = torch.randint(-1, 2, (2, n, 1), generator=rng)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=float(images.min()))
    rows = torch.arange(h) + 1 + move[0]
    columns = torch.arange(w) + 1 + move[1]
    index = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).reshape(x.shape)
