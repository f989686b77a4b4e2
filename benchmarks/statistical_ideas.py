"""Speed of the statistical layer beside scipy, ArviZ, statsmodels, NumPyro and BlackJAX.

``mlcollage bench statistical_ideas`` prints the table. Times are CPU seconds of all threads of the process, so that
libraries with one thread and with many compare; torch has one thread. Each is the best of several repetitions; what is
compiled is compiled before. Ratios are to the row called baseline of the same comparison, larger is better. A peer
that is not installed is named in its row and the other rows are printed.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from mlcollage.infer import hmc
from mlcollage.infer.diagnostics import Streaming
from mlcollage.papers.statistical_ideas.study import schools
from mlcollage.stats.bootstrap import bootstrap_ci
from mlcollage.stats.multilevel import PartialPooling
from mlcollage.stats.regularize import psis_loo

Row = dict[str, Any]
Array = np.ndarray[Any, Any]
_Y, _S = np.array(schools.EFFECTS), np.array(schools.ERRORS)


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio."""
    repeats = 3 if quick else 7
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a run of a study has it
    try:
        parts = (_bootstrap, _eight_schools, _calibration, _pooling, _loo, _streaming)
        return [row for part in parts for row in part(quick, repeats)]
    finally:
        torch.set_num_threads(before)


def _best(run: Callable[[int], Any], repeats: int) -> tuple[float, Any]:
    """CPU seconds of the cheapest repetition, and what the last one gave; ``run`` is told its number, a seed."""
    result = run(0)
    times = []
    for i in range(1, repeats + 1):
        start = time.process_time()
        result = run(i)
        times.append(time.process_time() - start)
    return min(times), result


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _missing(name: str, what: str) -> Row:
    return _row(f"{name} is not installed: pip install 'mlcollage[bench]' to compare", what, float("nan"), "")


def _there(*modules: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in modules)


def _bootstrap(quick: bool, repeats: int) -> Iterator[Row]:
    from scipy import stats as sps

    x, n = np.random.default_rng(0).normal(size=100), 10_000
    what = "10,000 resamples of the mean of 100 tasks, percentile interval"
    theirs, interval = _best(
        lambda i: sps.bootstrap((x,), np.mean, n_resamples=n, method="percentile", vectorized=True, rng=i), repeats
    )
    ours, found = _best(lambda i: bootstrap_ci(x, method="percentile", n_boot=n, rng=i), repeats)
    ends = interval.confidence_interval
    assert abs(found.low - ends.low) + abs(found.high - ends.high) < 0.05 * (ends.high - ends.low) * 2
    yield _row("scipy.stats.bootstrap (baseline)", what, theirs, "CPU-s", 1.0)
    yield _row("bootstrap_ci", what, ours, "CPU-s", theirs / ours)
    what = "10,000 studentized resamples of the same, bootstrap-t interval"
    ours, _ = _best(lambda i: bootstrap_ci(x, n_boot=n, rng=i), repeats)
    yield _row("bootstrap_ci", what, ours, "CPU-s")


# --- eight schools ----------------------------------------------------------------------------------------------------


def _least_ess(draws: Array) -> float:
    """Smallest bulk effective sample size of mu, log tau and the eight effects, by ArviZ; draws (chains, draws, 10).

    A sampler that gives another posterior than quadrature does not count, however fast it is.
    """
    import arviz as az

    exact = PartialPooling(prior_mu_scale=schools.SCALE, tau_scale=schools.SCALE).fit(_Y, _S).exact()
    off = np.abs(np.r_[draws[..., 0].mean() - exact.mu.mean, np.exp(draws[..., 1]).mean() - exact.tau.mean])
    assert (off < 0.1 * np.r_[exact.mu.sd, exact.tau.sd]).all(), off
    return min(float(az.ess(draws[..., k], method="bulk")) for k in range(draws.shape[2]))


def _with_effects(mu: Array, log_tau: Array, z: Array) -> Array:
    return np.concatenate([mu[..., None], log_tau[..., None], mu[..., None] + np.exp(log_tau)[..., None] * z], axis=-1)


def _eight_schools(quick: bool, repeats: int) -> Iterator[Row]:
    yield from _compare_samplers(64, 300, 400 if quick else 2000, repeats, all_peers=True)
    yield from _compare_samplers(1024, 300, 100, 1 if quick else repeats, all_peers=False)


def _compare_samplers(chains: int, warmup: int, draws: int, repeats: int, *, all_peers: bool) -> Iterator[Row]:
    what = f"eight schools, {chains:,} chains x ({warmup} + {draws}) draws, least bulk ESS of 10"
    peers = (
        ("NumPyro NUTS, vectorized chains, float32", ("jax", "numpyro"), _numpyro_schools),
        ("BlackJAX NUTS, vmap, float32", ("jax", "blackjax"), _blackjax_schools(nuts=True)),
        ("BlackJAX HMC of 5 steps, vmap, float32", ("jax", "blackjax"), _blackjax_schools(nuts=False)),
    )
    rates: dict[str, float] = {}
    for name, needs, prepare in peers if all_peers else peers[-1:]:
        if not _there(*needs):
            yield _missing(name.split()[0], what)
            continue
        seconds, found = _best(prepare(chains, warmup, draws), repeats)
        rates[name] = _least_ess(found) / seconds
    best = max(rates, key=lambda name: rates[name]) if rates else ""
    for name, value in rates.items():
        label = f"{name} (baseline)" if name == best else name
        yield _row(label, what, value, "ESS/CPU-s", value / rates[best])
    seconds, found = _best(_our_schools(chains, warmup, draws), repeats)
    rate = _least_ess(found) / seconds
    yield _row("infer.hmc of 3 to 7 steps, float64", what, rate, "ESS/CPU-s", rate / rates[best] if rates else None)


def _our_schools(chains: int, warmup: int, draws: int) -> Callable[[int], Array]:
    density = schools.non_centered(torch.tensor(_Y), torch.tensor(_S))

    def run(i: int) -> Array:
        start = 0.5 * torch.randn(chains, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        x = hmc.sample(density, start, draws=draws, warmup=warmup, steps=(3, 7), generator=i).draws.numpy()
        return _with_effects(x[..., 0], x[..., 1], x[..., 2:])

    return run


def _schools_model() -> None:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    mu = numpyro.sample("mu", dist.Normal(0, schools.SCALE))
    tau = numpyro.sample("tau", dist.HalfNormal(schools.SCALE))
    z = numpyro.sample("z", dist.Normal(jnp.zeros(8), 1).to_event(1))
    numpyro.sample("y", dist.Normal(mu + tau * z, jnp.array(_S)).to_event(1), obs=jnp.array(_Y))


def _numpyro_schools(chains: int, warmup: int, draws: int) -> Callable[[int], Array]:
    import jax
    from numpyro.infer import MCMC, NUTS

    mcmc = MCMC(
        NUTS(_schools_model),
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )

    def run(i: int) -> Array:
        mcmc.run(jax.random.PRNGKey(i))
        got = {k: np.asarray(v, dtype=np.float64) for k, v in mcmc.get_samples(group_by_chain=True).items()}
        return _with_effects(got["mu"], np.log(got["tau"]), got["z"])

    return run


def _blackjax_schools(*, nuts: bool) -> Callable[[int, int, int], Callable[[int], Array]]:
    """Window adaptation and sampling of each chain, all chains under one vmap, compiled."""

    def prepare(chains: int, warmup: int, draws: int) -> Callable[[int], Array]:
        import blackjax
        import jax
        import jax.numpy as jnp

        y, s, scale = jnp.array(_Y), jnp.array(_S), schools.SCALE

        def log_density(x: Any) -> Any:
            mu, tau, z = x[0], jnp.exp(x[1]), x[2:]
            prior = -0.5 * (mu / scale) ** 2 - 0.5 * (tau / scale) ** 2 + x[1] - 0.5 * (z**2).sum()
            return prior - 0.5 * (((y - mu - tau * z) / s) ** 2).sum()

        algorithm: Any = blackjax.nuts if nuts else blackjax.hmc
        fixed = {} if nuts else {"num_integration_steps": 5}

        def chain(key: Any) -> Any:
            begin, adapt, sample = jax.random.split(key, 3)
            warm = blackjax.window_adaptation(algorithm, log_density, **fixed)
            (state, parameters), _ = warm.run(adapt, 0.5 * jax.random.normal(begin, (10,)), num_steps=warmup)
            kernel = algorithm(log_density, **parameters).step

            def one(state: Any, key: Any) -> Any:
                state, _ = kernel(key, state)
                return state, state.position

            return jax.lax.scan(one, state, jax.random.split(sample, draws))[1]

        compiled = jax.jit(jax.vmap(chain))

        def run(i: int) -> Array:
            x = np.asarray(compiled(jax.random.split(jax.random.PRNGKey(i), chains)), dtype=np.float64)
            return _with_effects(x[..., 0], x[..., 1], x[..., 2:])

        return run

    return prepare


# --- calibration and pooling ------------------------------------------------------------------------------------------


def _calibration(quick: bool, repeats: int) -> Iterator[Row]:
    sims, alone = 600, 6 if quick else 24
    what = "simulation-based calibration, fits of 150 + 99 x 4 iterations"
    s = torch.tensor(_S)
    fit = schools.by_sampler(s, warmup=150, thin=4)

    def data(i: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(i)
        return schools.simulator(s)(schools.prior(sims, generator), generator)

    def one_by_one(i: int) -> None:
        generator = torch.Generator().manual_seed(i)
        for y in data(i)[:alone]:
            fit(y[None], 99, generator)

    apart = alone / _best(one_by_one, 1)[0]
    seconds, _ = _best(lambda i: fit(data(i), 99, torch.Generator().manual_seed(i)), 1 if quick else repeats)
    yield _row(f"one by one, {alone} of them (baseline)", what, apart, "fits/CPU-s", 1.0)
    yield _row(f"{sims} as one batch", what, sims / seconds, "fits/CPU-s", sims / seconds / apart)


def _pooling(quick: bool, repeats: int) -> Iterator[Row]:
    what = "partial pooling of eight schools, whole posterior"

    def model(i: int = 0) -> PartialPooling:
        return PartialPooling(prior_mu_scale=5, tau_scale=5, rng=i).fit(_Y, _S)

    exact, truth = _best(lambda i: model().exact(), 10 * repeats)
    gibbs, drawn = _best(lambda i: model(i).sample(), repeats)
    assert abs(float(drawn.mu.mean) - float(truth.mu.mean)) < 0.3
    if _there("jax", "numpyro"):
        nuts, _ = _best(_numpyro_schools(4, 500, 1000), repeats)
        yield _row("NumPyro NUTS, 4 x 1,000 draws (baseline)", what, nuts, "CPU-s", 1.0)
    else:
        nuts = gibbs
        yield _missing("NumPyro", what)
    yield _row("PartialPooling, Gibbs, 4 x 1,000 draws", what, gibbs, "CPU-s", nuts / gibbs)
    yield _row("PartialPooling, exact quadrature", what, exact, "CPU-s", nuts / exact)
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 10)
    table = pd.DataFrame({"dataset": groups, "value": rng.normal(size=20)[groups] + rng.normal(size=200)})
    what = "mean effect of 20 data sets x 10 seeds, noise unknown"
    if _there("statsmodels"):
        from statsmodels.regression.mixed_linear_model import MixedLM

        reml, _ = _best(lambda i: MixedLM(table["value"], np.ones(200), groups).fit(reml=True), repeats)
        yield _row("statsmodels MixedLM, REML, no posterior (baseline)", what, reml, "CPU-s", 1.0)
    else:
        reml = 0.0
        yield _missing("statsmodels", what)
    ours, _ = _best(lambda i: PartialPooling(2, 1, noise="pooled", rng=i).fit(table).sample(), 1 if quick else repeats)
    yield _row("PartialPooling, Gibbs, 4 x 1,000 draws", what, ours, "CPU-s", reml / ours if reml else None)


# --- predictive accuracy and diagnostics ------------------------------------------------------------------------------


def _loo(quick: bool, repeats: int) -> Iterator[Row]:
    import arviz as az

    rng = np.random.default_rng(0)
    y, mu = rng.normal(size=200), rng.normal(0, 200**-0.5, size=(4, 1000, 1))
    values = -0.5 * (y - mu) ** 2 - 0.5 * np.log(2 * np.pi)
    groups: dict[str, Any] = {"posterior": {"mu": mu[..., 0]}, "log_likelihood": {"y": values}}
    data = az.from_dict(**groups) if az.__version__.startswith("0.") else az.from_dict(groups)
    theirs, _ = _best(lambda i: az.loo(data, pointwise=True, reff=1.0), repeats)
    ours, _ = _best(lambda i: psis_loo(values), repeats)
    what = "PSIS-LOO of 200 units, 4,000 draws"
    yield _row("arviz.loo (baseline)", what, theirs, "CPU-s", 1.0)
    yield _row("psis_loo, which calls it", what, ours, "CPU-s", theirs / ours)


def _streaming(quick: bool, repeats: int) -> Iterator[Row]:
    import arviz as az

    chains, draws, dim = 8, 1000 if quick else 4000, 1000
    x = np.random.default_rng(0).normal(size=(chains, draws, dim))
    each = torch.tensor(x).transpose(0, 1).contiguous()
    what = f"split R-hat of {dim:,} quantities, {chains} chains x {draws:,} draws"

    def stream(i: int) -> Array:
        found = Streaming()
        for draw in each:
            found.update(draw)
        return found.rhat().numpy()

    # a tenth of the quantities: ArviZ goes through them one at a time
    theirs, split = _best(lambda i: np.array([az.rhat(x[..., k], method="split") for k in range(dim // 10)]), 1)
    ours, found = _best(stream, 1 if quick else repeats)
    # halves of the stream are whole batches, so the two differ a little
    assert np.abs(found[: dim // 10] - split).max() < 0.02
    yield _row("arviz.rhat of stored draws (baseline)", what, 10 * theirs, "CPU-s", 1.0)
    yield _row("Streaming, draw by draw", what, ours, "CPU-s", 10 * theirs / ours)
    stored, kept = x.nbytes, 2 * 16 * chains * dim * 8
    yield _row("arviz.rhat of stored draws (baseline)", f"memory for it, {what}", stored / 1e6, "MB", 1.0)
    yield _row("Streaming, draw by draw", f"memory for it, {what}", kept / 1e6, "MB", stored / kept)


if __name__ == "__main__":
    from mlcollage.lab.bench import to_markdown

    print(to_markdown(bench()))
