r"""The ways to a posterior: exact samplers, stochastic-gradient samplers, approximations and ensembles.

Each function takes a :class:`BayesianModule` and data and returns a
:class:`~mlcollage.papers.bnn_posteriors.posterior.Posterior`; ``BayesianModule.fit(X, y, method)`` calls the one of
that name. All chains, members or draws are one batch: there is no Python loop over them. The same seed gives the same
numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.infer import hmc as infer_hmc
from mlcollage.infer import nuts as infer_nuts
from mlcollage.infer._run import Mass
from mlcollage.infer.density import Generator, LogDensity, torch_generator
from mlcollage.infer.chains import Chains

from ._checks import as_data
from ._keep import Init, Keeper, Progress, Store, positive, whole
from .checkpoint import Checkpoint
from .density import PosteriorDensity, largest_curvature
from .module import BayesianModule
from .posterior import Posterior
from .training import ensemble, mfvi, optimum, sgmcmc, swag

__all__ = ["METHODS", "ensemble", "fit", "hmc", "mfvi", "nuts", "optimum", "sgmcmc", "swag"]

_STUCK = 0.05


def fit(model: BayesianModule, X: Any, y: Any, method: str, **settings: Any) -> Posterior:
    """Call the method of that name.

    Raises
    ------
    UnknownName
        For a method that does not exist.
    """
    X, y = as_data(X, y)
    if method == "laplace":
        laplace: Any = import_module(f"{__package__}.laplace")
        return laplace.laplace(model, X, y, **settings)
    if method not in METHODS:
        raise UnknownName(f"method {method!r} is not known; choose {', '.join([*METHODS, 'laplace'])}.")
    function, fixed = METHODS[method]
    return function(model, X, y, **{**fixed, **settings})


def hmc(
    model: BayesianModule,
    X: Any,
    y: Any,
    *,
    chains: int = 4,
    samples: int = 100,
    burn_in: int = 10,
    warmup: int = 40,
    step_size: float | None = None,
    trajectory_length: float | str = "prior",
    temperature: float = 1.0,
    target_accept: float = 0.8,
    jitter: float = 0.0,
    mass: Mass = None,
    thin: int = 1,
    init: Init = "reset",
    store: Store = "params",
    at: Any = None,
    chunk_size: int | None = None,
    checkpoint: Any = None,
    checkpoint_every: int = 10,
    seed: Generator = 0,
    progress: Progress | None = None,
) -> Posterior:
    r"""Full-batch Hamiltonian Monte Carlo, as in the paper's section 3, with all chains as one batch.

    Parameters
    ----------
    model, X, y
        What is sampled.
    chains, samples
        Chains, and kept draws of each.
    burn_in
        First iterations, without a Metropolis test: they leave the initialization. With ``step_size=None`` each takes
        a quarter of the leapfrog's stability limit at the curvature it meets.
    warmup
        Further iterations, with the test, that are not kept; they adapt the step size if none is given.
    step_size
        Of the leapfrog; None adapts it to ``target_accept`` and then holds it fixed.
    trajectory_length
        :math:`\tau`; ``"prior"`` is :math:`\frac{\pi}{2} s \sqrt T` with s the prior's (largest) standard deviation.
        An iteration takes :math:`\lceil \tau / \epsilon \rceil` gradients of all data.
    temperature
        T; divides the whole log-density.
    target_accept
        Acceptance that adaptation aims at.
    jitter
        Relative width of a uniform jitter of the step size and so of the length. None in the paper; a nearly Gaussian
        posterior may resonate with a fixed length, and never forget its start, unless there is some.
    mass
        None for the identity, as in the paper; otherwise as in :func:`mlcollage.infer.hmc.sample`.
    thin
        Iterations a kept draw.
    init
        Where chains start: see :meth:`BayesianModule.initial`.
    store
        ``"params"`` keeps the draws, ``"predictions"`` only the running predictions at the inputs ``at``, a function
        of positions (chains, P) what it returns of each draw (None: nothing).
    at
        Inputs whose predictions are averaged on the way.
    chunk_size
        Data a pass; exact.
    checkpoint
        A folder: every ``checkpoint_every`` draws the run's state is written, and a run with the same folder, data and
        settings goes on from there, to the same numbers.
    seed
        A seed or a torch.Generator.
    progress
        Called as ``progress(iterations done, in all)``.

    Warns
    -----
    UserWarning
        If hardly any proposal was accepted, with a step size that the measured curvature allows.
    """
    whole(burn_in, "burn_in", 0), whole(warmup, "warmup", 0), whole(samples, "samples"), whole(thin, "thin")
    if step_size is not None:
        positive(step_size, "step_size")
    elif warmup < 10:
        raise InvalidInput(f"warmup={warmup} is too short to adapt a step size; give at least 10, or step_size.")
    density = model.log_density(X, y, chunk_size=chunk_size)
    length = _trajectory(model, trajectory_length, temperature)
    rng = torch_generator(seed, model.parameters_flat.device)
    keeper = Keeper(model, density, store, at)
    settings = {
        "chains": chains, "samples": samples, "burn_in": burn_in, "warmup": warmup, "step_size": step_size,
        "trajectory_length": length, "temperature": temperature, "thin": thin, "jitter": jitter,
        "target_accept": target_accept, "store": store if isinstance(store, str) else "function",
    }  # fmt: skip
    saved = Checkpoint.open(checkpoint, model, settings, X, y, keeper, rng) if checkpoint is not None else None
    total, done = burn_in + warmup + samples * thin, 0
    step: Tensor | float | None = step_size
    learned: Mass = mass
    if saved is not None and saved.position is not None:
        position, step, learned, done = saved.position, saved.step_size, saved.mass, saved.draws
    else:
        start = model.initial(chains, init, generator=rng)
        advance = _shifted(progress, 0, total)
        position = _burn_in(density, start, burn_in, step_size, length, temperature, rng, advance)
    columns: list[Chains] = [] if saved is None else saved.columns
    block = samples if saved is None else whole(checkpoint_every, "checkpoint_every")
    while done < samples:
        first = done == 0
        warm, count = (warmup if first else 0), min(block, samples - done)
        offset = burn_in + (0 if first else warmup + done * thin)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "only .* of the proposals", UserWarning)  # said below, with advice
            run = infer_hmc.sample(
                density, position, draws=count, warmup=warm, trajectory=length, jitter=jitter, step_size=step,
                target_accept=target_accept, mass=learned, temperature=temperature, thin=thin, store=keeper,
                generator=rng, progress=_shifted(progress, offset, total),
            )  # fmt: skip
        position, step, learned, done = run.state.position, run.step_size, run.mass, done + count
        columns.append(run)
        if saved is not None:
            saved.write(position, step, learned, done, columns, keeper, rng)
    stats = _stats(columns)
    _say_if_stuck(stats, density, position, temperature, step)
    info = {**settings, "path": density.path, "seed": seed if isinstance(seed, int) else None}
    return keeper.posterior(model, "hmc", stats, info)


def _trajectory(model: BayesianModule, length: float | str, temperature: float) -> float:
    positive(temperature, "temperature")
    if length != "prior":
        return positive(length, "trajectory_length")
    scale = float(model.placed_prior.sd().max())
    if not math.isfinite(scale):
        raise InvalidInput("the prior has no variance to take a trajectory length from; give trajectory_length.")
    return infer_hmc.prior_period(scale, temperature)


def _burn_in(
    density: PosteriorDensity,
    position: Tensor,
    iterations: int,
    step_size: float | None,
    length: float,
    temperature: float,
    rng: torch.Generator,
    progress: Progress | None,
) -> Tensor:
    """Leave the initialization, without a Metropolis test."""
    tempered = LogDensity(density, temperature)
    state = infer_hmc.init(position, tempered)
    for i in range(iterations):
        step = step_size or 0.5 / math.sqrt(float(largest_curvature(tempered, state.position).max()))
        step = min(step, length)
        steps = math.ceil(length / step - 1e-9)
        if steps > 1_000_000:
            raise InvalidInput(f"a trajectory of {length:.3g} takes {steps:,} steps of {step:.3g}; shorten it.")
        state, _ = infer_hmc.update(state, tempered, step_size=step, steps=steps, metropolis=False, generator=rng)
        if progress:
            progress(i + 1, iterations)
    return state.position


def _shifted(progress: Progress | None, by: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(by + done, total)


def _stats(columns: list[Chains]) -> dict[str, Tensor]:
    named = {
        "accept_prob": "accept",
        "energy": "energy",
        "diverging": "diverging",
        "lp": "log_prob",
        "n_steps": "steps",
    }
    stats = {ours: torch.cat([getattr(c, theirs) for c in columns], dim=1) for ours, theirs in named.items()}
    # as the leapfrog used it, in the positions' type
    steps = [c.step_size.to(c.state.position.dtype).double()[:, None].expand(c.accept.shape) for c in columns]
    stats["step_size"] = torch.cat(steps, dim=1)
    return stats


def _say_if_stuck(
    stats: dict[str, Tensor], density: PosteriorDensity, position: Tensor, temperature: float, step: Any
) -> None:
    rate = float(stats["accept_prob"].mean())
    if rate >= _STUCK:
        return
    top = float(largest_curvature(density, position).max()) / temperature
    limit = 2 / math.sqrt(top) if top > 0 else math.inf
    what = "every proposal was rejected" if rate < 1e-6 else f"only {rate:.1%} of the proposals were accepted"
    warnings.warn(
        f"{what}, at step size {float(torch.as_tensor(step).max()):.3g}; the curvature here, {top:.3g}, makes steps "
        f"beyond {limit:.2g} unstable: give step_size={0.25 * limit:.1g} or less, or None to adapt it.",
        stacklevel=3,
    )


def nuts(
    model: BayesianModule,
    X: Any,
    y: Any,
    *,
    chains: int = 4,
    samples: int = 500,
    warmup: int = 500,
    step_size: float | None = None,
    target_accept: float = 0.8,
    mass: Mass = "diagonal",
    max_depth: int = 8,
    temperature: float = 1.0,
    thin: int = 1,
    init: Init = "reset",
    store: Store = "params",
    at: Any = None,
    chunk_size: int | None = None,
    seed: Generator = 0,
    progress: Progress | None = None,
) -> Posterior:
    """The no-U-turn sampler, for small networks: see :func:`mlcollage.infer.nuts.sample` and :func:`hmc`."""
    whole(samples, "samples")
    density = model.log_density(X, y, chunk_size=chunk_size)
    rng = torch_generator(seed, model.parameters_flat.device)
    keeper = Keeper(model, density, store, at)
    run = infer_nuts.sample(
        density, model.initial(chains, init, generator=rng), draws=samples, warmup=warmup, step_size=step_size,
        target_accept=target_accept, mass=mass, max_depth=max_depth, temperature=temperature, thin=thin, store=keeper,
        generator=rng, progress=progress,
    )  # fmt: skip
    return keeper.posterior(model, "nuts", _stats([run]), {"temperature": temperature, "path": density.path})


METHODS: dict[str, tuple[Callable[..., Posterior], dict[str, Any]]] = {
    "hmc": (hmc, {}),
    "nuts": (nuts, {}),
    "sgld": (sgmcmc, {"kind": "sgld"}),
    "sghmc": (sgmcmc, {"kind": "sghmc"}),
    "csghmc": (sgmcmc, {"kind": "csghmc", "burn_in": 0}),
    "mfvi": (mfvi, {}),
    "ensemble": (ensemble, {}),
    "map": (ensemble, {"members": 1}),
    "swag": (swag, {}),
}
