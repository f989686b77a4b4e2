"""Speed of Hamiltonian Monte Carlo over the weights of a perceptron: ours, and BlackJAX and NumPyro, side by side.

``mlcollage bench bnn_posteriors`` prints the table. Everyone samples the same posterior (200 digits, a perceptron
64-50-50-10, prior variance .1) in float32 with the same leapfrog steps, on one core, in a process of its own, compiled
and warmed up before the clock starts. What is counted is gradients of one chain per second of CPU time (of all
threads), everything included that an iteration does. Ratios are to the row called baseline of the same comparison.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

Row = dict[str, Any]
N, SIZES, VARIANCE, STEP, LENGTH = 200, (64, 50, 50, 10), 0.1, 0.007, 70
CHAINS = (4, 16)
PEERS = ("blackjax", "numpyro")
# matrix products of one gradient: forward, by the weights, and by the inputs of all layers but the first
FLOPS = 2 * N * (2 * sum(a * b for a, b in pairwise(SIZES)) + sum(a * b for a, b in pairwise(SIZES[1:])))
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio."""
    repeats = 8 if quick else 40
    rows: list[Row] = []
    peak = _ask("peak", 0, repeats)
    for chains in CHAINS:
        what = f"HMC on a perceptron 64-50-50-10, {N} digits, {chains} chains, {LENGTH} steps"
        rates = {who: _ask(who, chains, repeats) for who in (*PEERS, "vmap", "compile", "mlp")}
        baseline = next((rates[p] for p in PEERS if rates[p]), None)
        for who, label in (
            ("blackjax", "BlackJAX, vmap over chains (baseline)"),
            ("numpyro", "NumPyro, vectorized chains"),
            ("vmap", "ours, general (vmap of autograd)"),
            ("compile", "ours, general, compiled on request"),
            ("mlp", "ours, perceptrons by hand"),
        ):
            rate = rates[who]
            if rate is None:
                print(
                    _missing(who),
                    file=sys.stderr,
                )
                continue
            rows.append(_row(label, what, rate, "chain-gradients/CPU-s", rate / baseline if baseline else None))
        if rates["mlp"] and peak:
            share = 100 * rates["mlp"] * FLOPS / peak
            rows.append(
                _row("ours, perceptrons by hand", f"share of the peak of matrix products, {chains} chains", share, "%")
            )
    return [*rows, *_methods(quick)]


def _missing(who: str) -> str:
    if who == "compile":
        return "torch.compile does not work here (it needs a C++ compiler), so it is left out."
    return f"{who} is not installed, so it is left out; pip install 'mlcollage[bench]' brings it."


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _ask(who: str, chains: int, repeats: int) -> float | None:
    """A rate measured in a process of its own; None if the peer is not installed."""
    if who in PEERS and importlib.util.find_spec(who) is None:
        return None
    command = [
        sys.executable,
        os.path.abspath(__file__),
        "--who",
        who,
        "--chains",
        str(chains),
        "--repeats",
        str(repeats),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ONE_THREAD}, check=False)
    if done.returncode and who == "compile":  # torch.compile needs a C++ compiler
        return None
    if done.returncode:
        raise RuntimeError(f"the benchmark of {who} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["rate"])


def _fastest(run: Callable[[], Any], repeats: int) -> float:
    """CPU seconds, of all threads, of the fastest repetition."""
    run()
    best = math.inf
    for _ in range(repeats):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from mlcollage.data.digits import load_digits_split

    x, y, _, _ = load_digits_split(0)
    return ((x - x.mean()) / x.std())[:N].astype(np.float32), y[:N]


def _starts(chains: int) -> list[np.ndarray]:
    """Weights (chains, in, out) and biases (chains, out) of each layer, small."""
    rng = np.random.default_rng(0)
    shapes = [s for a, b in pairwise(SIZES) for s in ((a, b), (b,))]
    return [(0.1 * rng.normal(size=(chains, *shape))).astype(np.float32) for shape in shapes]


# --- who -------------------------------------------------------------------------------------------------------------


def _peak(repeats: int) -> float:
    import torch

    torch.set_num_threads(1)
    a = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(a)
    return 2 * 1024**3 / _fastest(lambda: torch.mm(a, a, out=out), repeats)


def _ours(backend: str, chains: int, repeats: int) -> float:
    import torch
    from torch import nn

    from mlcollage.infer import hmc
    from mlcollage.infer.density import LogDensity
    from mlcollage.papers.bnn_posteriors import BayesianNetwork, GaussianPrior

    torch.set_num_threads(1)
    x, y = _digits()
    layers: list[nn.Module] = []
    for a, b in pairwise(SIZES):
        layers += [nn.Linear(a, b), nn.ReLU()]
    network = BayesianNetwork(nn.Sequential(*layers[:-1]), prior=GaussianPrior(VARIANCE))
    density = LogDensity(network.log_density(x, y, backend=backend))
    parts = [torch.from_numpy(p).mT if p.ndim == 3 else torch.from_numpy(p) for p in _starts(chains)]
    layout = network.layout
    state = hmc.init(layout.flatten(dict(zip(layout.names, parts, strict=True))), density)
    generator = torch.Generator().manual_seed(0)

    def iterate() -> None:
        nonlocal state
        state, _ = hmc.update(state, density, step_size=STEP, steps=LENGTH, generator=generator)

    return chains * LENGTH / _fastest(iterate, repeats)


def _jax_log_density() -> Callable[[Any], Any]:
    import jax
    import jax.numpy as jnp

    x, y = (jnp.asarray(a) for a in _digits())

    def log_density(weights: list[Any]) -> Any:
        h = x
        for i in range(0, len(weights), 2):
            h = h @ weights[i] + weights[i + 1]
            h = jax.nn.relu(h) if i + 2 < len(weights) else h
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(h), y[:, None], axis=1).sum()
        return likelihood - sum((w**2).sum() for w in weights) / (2 * VARIANCE)

    return log_density


def _blackjax(chains: int, repeats: int) -> float:
    import blackjax
    import jax
    import jax.numpy as jnp

    size = sum((a + 1) * b for a, b in pairwise(SIZES))
    kernel = blackjax.hmc(_jax_log_density(), STEP, jnp.ones(size), LENGTH)
    step = jax.jit(jax.vmap(kernel.step))
    state = jax.vmap(kernel.init)([jnp.asarray(p) for p in _starts(chains)])
    key = jax.random.PRNGKey(0)

    def iterate() -> None:
        nonlocal state, key
        key, use = jax.random.split(key)
        state, _ = step(jax.random.split(use, chains), state)
        jax.block_until_ready(state)

    return chains * LENGTH / _fastest(iterate, repeats)


def _numpyro(chains: int, repeats: int) -> float:
    import jax
    import jax.numpy as jnp
    from numpyro.infer import HMC, MCMC

    log_density = _jax_log_density()
    starts = [jnp.asarray(p) for p in _starts(chains)]

    def seconds(draws: int) -> float:
        kernel = HMC(
            potential_fn=lambda w: -log_density(w),
            step_size=STEP,
            num_steps=LENGTH,
            adapt_step_size=False,
            adapt_mass_matrix=False,
        )
        mcmc = MCMC(
            kernel, num_warmup=0, num_samples=draws, num_chains=chains, chain_method="vectorized", progress_bar=False
        )

        def run() -> None:
            mcmc.run(jax.random.PRNGKey(0), init_params=starts)
            jax.block_until_ready(mcmc.get_samples())

        return _fastest(run, 3)

    few, many = 2, 2 + 40 * repeats // chains  # a run has costs of its own, so what further draws cost is counted
    return chains * LENGTH * (many - few) / (seconds(many) - seconds(few))


# --- the other methods ------------------------------------------------------------------------------------------------


def _methods(quick: bool) -> list[Row]:
    """Convolutions: chains one after the other, and batched."""
    import torch

    from mlcollage.nn.init import build
    from mlcollage.nn.resnet import ResNet
    from mlcollage.papers.bnn_posteriors import BayesianNetwork

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        net = build(lambda: ResNet((3, 16, 16), 10, width=8, norm="frn", activation="silu"), seed=0)
        network = BayesianNetwork(net)
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(32, 3, 16, 16, generator=g), torch.randint(0, 10, (32,), generator=g)
        q = network.initial(4)
        rates = {}
        for backend in ("loop", "vmap"):
            density = network.log_density(x, y, backend=backend)
            rates[backend] = 4 / _fastest(lambda d=density: d.gradient(q), 3 if quick else 10)
    finally:
        torch.set_num_threads(before)
    what = "gradients of a ResNet-8-FRN of width 8, 32 images 3 x 16 x 16, 4 chains"
    return [
        _row("chain by chain (baseline; the choice on a CPU)", what, rates["loop"], "chain-gradients/CPU-s", 1.0),
        _row("vmap (the choice on a GPU)", what, rates["vmap"], "chain-gradients/CPU-s", rates["vmap"] / rates["loop"]),
    ]


def _child() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--who", required=True)
    parser.add_argument("--chains", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    asked = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if asked.who == "peak":
        rate = _peak(asked.repeats)
    elif asked.who == "blackjax":
        rate = _blackjax(asked.chains, asked.repeats)
    elif asked.who == "numpyro":
        rate = _numpyro(asked.chains, asked.repeats)
    else:
        rate = _ours(asked.who, asked.chains, asked.repeats)
    print(json.dumps({"rate": rate}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _child()
    else:
        from mlcollage.lab.bench import to_markdown

        print(to_markdown(bench()))
