"""Effective draws per CPU second of HMC and NUTS, beside BlackJAX and NumPyro in one run.

``python benchmarks/samplers.py`` prints the table; with names of posteriors behind it (``"eight schools"``), and with
``--hmc``, of those, without NUTS and with three repetitions. Four posteriors, the same ones for all: eight schools
(non-centered), a regression without scaling (x about 100, y about 86), a logistic regression of 20 coefficients on 500
points, and a Gaussian in 50 dimensions with condition number 100. Same starts, chains, warm-up and draws for all; each
adapts as it does by default, BlackJAX's HMC in windows with a fixed number of steps. CPU seconds are those of the
process, warm-up and draws together, after a first run that compiles; ESS is ArviZ's bulk ESS, the least over
parameters; repetitions take turns, and the median is printed. All is in float64 (NumPyro and BlackJAX with
``jax_enable_x64``). A peer that is not installed is left out.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlcollage.infer import hmc, nuts

Row = dict[str, Any]
Array = np.ndarray[Any, Any]
Run = Callable[[int], Array]  # a seed to draws (chains, draws, dim)

CHAINS, MANY, WARMUP, DRAWS = 64, 1024, 500, 500
STEPS = 5


@dataclass(frozen=True)
class Problem:
    """A density twice: for chains in rows, in torch, and for one position with a library like numpy's."""

    name: str
    start: Array  # (chains, dim)
    torch: Callable[[torch.Tensor], torch.Tensor]
    jax: Callable[[Any, Any], Any]  # (position, jax.numpy)


def problems(chains: int, seed: int = 0) -> list[Problem]:
    """All of them."""
    rng = np.random.default_rng(seed)
    y, s = np.array([28.0, 8, -3, 7, -1, 1, 18, 12]), np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    ty, ts = torch.tensor(y), torch.tensor(s)

    def schools(x: torch.Tensor) -> torch.Tensor:
        mu, tau, z = x[:, 0], x[:, 1].exp(), x[:, 2:]
        prior = -0.5 * (mu / 5).square() - torch.log1p((tau / 5).square()) + x[:, 1] - 0.5 * z.square().sum(1)
        return prior - 0.5 * ((ty - mu[:, None] - tau[:, None] * z) / ts).square().sum(1)

    def schools_jax(x: Any, np: Any) -> Any:
        mu, tau, z = x[0], np.exp(x[1]), x[2:]
        prior = -0.5 * (mu / 5) ** 2 - np.log1p((tau / 5) ** 2) + x[1] - 0.5 * (z**2).sum()
        return prior - 0.5 * (((y - mu - tau * z) / s) ** 2).sum()

    u = 100 + 15 * rng.normal(size=100)
    v = 26 + 0.6 * u + 18 * rng.normal(size=100)
    tu, tv = torch.tensor(u), torch.tensor(v)

    def regression(x: torch.Tensor) -> torch.Tensor:
        log_sigma = x[:, 2]
        off = (tv - x[:, :1] - x[:, 1:2] * tu) / log_sigma.exp()[:, None]
        return -99 * log_sigma - 0.5 * off.square().sum(1) - torch.log1p((log_sigma.exp() / 2.5).square())

    def regression_jax(x: Any, np: Any) -> Any:
        off = (v - x[0] - x[1] * u) / np.exp(x[2])
        return -99 * x[2] - 0.5 * (off**2).sum() - np.log1p((np.exp(x[2]) / 2.5) ** 2)

    design = rng.normal(size=(500, 20))
    labels = (rng.random(500) < 1 / (1 + np.exp(-design @ rng.normal(size=20) / 3))).astype(float)
    td, tl = torch.tensor(design), torch.tensor(labels)

    def logistic(x: torch.Tensor) -> torch.Tensor:
        logits = x @ td.T
        likelihood = tl * logits - torch.nn.functional.softplus(logits)
        return likelihood.sum(1) - 0.5 * x.square().sum(1)

    def logistic_jax(x: Any, np: Any) -> Any:
        logits = design @ x
        return (labels * logits - np.logaddexp(0, logits)).sum() - 0.5 * (x**2).sum()

    axes = np.linalg.qr(rng.normal(size=(50, 50)))[0]
    precision = (axes / np.logspace(-1, 1, 50)) @ axes.T
    tp = torch.tensor(precision)

    def gaussian(x: torch.Tensor) -> torch.Tensor:
        return -0.5 * ((x @ tp) * x).sum(1)

    def gaussian_jax(x: Any, np: Any) -> Any:
        return -0.5 * x @ precision @ x

    def near(*center: float) -> Array:
        return np.array(center) + 0.5 * rng.normal(size=(chains, len(center)))

    return [
        Problem("eight schools", near(*[0.0] * 10), schools, schools_jax),
        Problem("unscaled regression", near(0.0, 1.0, 3.0), regression, regression_jax),
        Problem("logistic regression", near(*[0.0] * 20), logistic, logistic_jax),
        Problem("Gaussian, 50 dimensions", near(*[0.0] * 50), gaussian, gaussian_jax),
    ]


def bench(quick: bool = True, names: Collection[str] = (), nuts: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio, to the best peer of the same method."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sets = [*problems(CHAINS), problems(MANY)[0]]
        wanted = [p for p in sets if not names or p.name in names]
        return [row for p in wanted for row in _compare(p, 1 if quick else 3, nuts and len(p.start) == CHAINS)]
    finally:
        torch.set_num_threads(before)


def _compare(problem: Problem, repeats: int, with_nuts: bool) -> Iterator[Row]:
    chains = len(problem.start)
    what = f"{problem.name}, {chains:,} chains x ({WARMUP} + {DRAWS})"
    peers = []
    if importlib.util.find_spec("blackjax"):
        peers += [(f"BlackJAX HMC of {STEPS} steps", "hmc", _blackjax(problem, False))]
    if with_nuts and importlib.util.find_spec("blackjax"):
        peers += [("BlackJAX NUTS", "nuts", _blackjax(problem, True))]
    if with_nuts and importlib.util.find_spec("numpyro"):
        peers += [("NumPyro NUTS", "nuts", _numpyro(problem))]
    fixed, diagonal = {"steps": (STEPS - 2, STEPS + 2)}, {"mass": "diagonal"}
    name = f"infer.hmc of {STEPS - 2} to {STEPS + 2} steps"
    ours = [
        (f"{name}, compiled", "hmc", _ours(problem, hmc, fixed, compile=True)),
        (f"{name}, compiled, diagonal mass", "hmc", _ours(problem, hmc, fixed | diagonal, compile=True)),
        (name, "hmc", _ours(problem, hmc, fixed)),
    ]
    if chains == CHAINS:
        ours.append(("infer.hmc", "hmc", _ours(problem, hmc, {})))
    if with_nuts:
        ours.append(("infer.nuts", "nuts", _ours(problem, nuts, {})))
    everyone = peers + ours
    found: list[list[tuple[float, float, float]]] = [[] for _ in everyone]
    for seed in range(repeats + 1):  # in turns, since the machine may be slower at times
        for (*_, run), rows in zip(everyone, found, strict=True):
            rows.append(_rate(run, seed))
    # without the first, which compiled
    rates = [(name, kind, *sorted(f[1:])[repeats // 2]) for (name, kind, _), f in zip(everyone, found, strict=True)]
    for name, kind, rate, seconds, least in rates:
        of_peers = [r[2] for r in rates[: len(peers)] if r[1] == kind]
        label = f"{name} (baseline)" if of_peers and rate == max(of_peers) else name
        label += f": ESS {least:,.0f} of {chains * DRAWS:,}, {seconds:.2f} CPU-s"
        ratio = rate / max(of_peers) if of_peers else None
        yield {"name": label, "what": what, "value": rate, "unit": "ESS/CPU-s", "ratio": ratio}


def _rate(run: Run, seed: int) -> tuple[float, float, float]:
    """ESS per CPU second, seconds and ESS of a run."""
    import arviz as az

    begin = time.process_time()
    draws = run(seed)
    seconds = time.process_time() - begin
    least = min(float(az.ess(draws[..., k], method="bulk")) for k in range(draws.shape[2]))
    return least / seconds, seconds, least


def _ours(problem: Problem, sampler: Any, settings: dict[str, Any], **more: Any) -> Run:
    def run(seed: int) -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = torch.tensor(problem.start)
            chains = sampler.sample(
                problem.torch, start, draws=DRAWS, warmup=WARMUP, generator=seed, **settings, **more
            )
        return chains.draws.numpy()

    return run


def _blackjax(problem: Problem, nuts: bool) -> Run:
    """Window adaptation and sampling of each chain, all chains under one vmap, compiled."""
    import blackjax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)

    def log_density(x: Any) -> Any:
        return problem.jax(x, jnp)

    algorithm: Any = blackjax.nuts if nuts else blackjax.hmc
    fixed = {} if nuts else {"num_integration_steps": STEPS}

    def chain(key: Any, start: Any) -> Any:
        adapt, sample = jax.random.split(key)
        warm = blackjax.window_adaptation(algorithm, log_density, **fixed)
        (state, parameters), _ = warm.run(adapt, start, num_steps=WARMUP)
        kernel = algorithm(log_density, **parameters).step

        def one(state: Any, key: Any) -> Any:
            state, _ = kernel(key, state)
            return state, state.position

        return jax.lax.scan(one, state, jax.random.split(sample, DRAWS))[1]

    compiled = jax.jit(jax.vmap(chain))
    start = jnp.array(problem.start)
    return lambda seed: np.asarray(compiled(jax.random.split(jax.random.PRNGKey(seed), len(start)), start))


def _numpyro(problem: Problem) -> Run:
    import jax
    import jax.numpy as jnp
    from numpyro.infer import MCMC, NUTS

    jax.config.update("jax_enable_x64", True)
    kernel = NUTS(potential_fn=lambda x: -problem.jax(x, jnp))
    mcmc = MCMC(
        kernel,
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=len(problem.start),
        chain_method="vectorized",
        progress_bar=False,
    )

    def run(seed: int) -> Array:
        mcmc.run(jax.random.PRNGKey(seed), init_params=jnp.array(problem.start))
        return np.asarray(mcmc.get_samples(group_by_chain=True))

    return run


if __name__ == "__main__":
    from mlcollage.lab.bench import to_markdown

    asked = sys.argv[1:]
    hmc_only = "--hmc" in asked
    print(to_markdown(bench(not hmc_only, [a for a in asked if a != "--hmc"], not hmc_only)))
