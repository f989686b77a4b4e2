r"""Stochastic-gradient samplers, ensembles and Gaussian approximations, each with all chains as one batch.

See :mod:`mlcollage.papers.bnn_posteriors.fitting`, which calls them by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.infer import vi
from mlcollage.infer.density import Generator, torch_generator
from mlcollage.infer.sghmc import SGHMC, Cyclical
from mlcollage.infer.sgld import SGLD
from mlcollage.infer.swag import SWAG

from ._keep import Init, Keeper, Progress, Store, Transform, positive, whole
from .density import PosteriorDensity, largest_curvature
from .module import BayesianModule
from .posterior import Posterior

__all__ = ["ensemble", "mfvi", "optimum", "sgmcmc", "swag"]


def _batches(n: int, size: int | None, chains: int, rng: torch.Generator) -> Iterator[Tensor | None]:
    """For ever: a minibatch, (chains, B), reshuffled every epoch for each chain by itself; None for all data."""
    if size is None or size >= n:
        while True:
            yield None
    whole(size, "batch_size")
    while True:
        order = torch.rand((chains, n), generator=rng, device=rng.device).argsort(dim=1)
        yield from order[:, : n // size * size].split(size, dim=1)


def _estimate(density: PosteriorDensity, q: Tensor, index: Tensor | None, transform: Transform | None) -> Tensor:
    if index is None and transform is None:
        return density.gradient(q)
    if index is None:
        index = torch.arange(density.num_data, device=q.device).expand(len(q), -1)
    return density.estimate(q, index, transform=transform)[1]


def sgmcmc(
    model: BayesianModule,
    X: Any,
    y: Any,
    *,
    kind: str = "sghmc",
    chains: int = 4,
    samples: int = 100,
    thin: int = 10,
    burn_in: int = 500,
    lr: float | None = None,
    batch_size: int | None = None,
    momentum: float = 0.9,
    cycle_length: int = 200,
    exploration: float = 0.5,
    rmsprop: float | None = None,
    temperature: float = 1.0,
    init: Init = "reset",
    transform: Transform | None = None,
    store: Store = "params",
    at: Any = None,
    chunk_size: int | None = None,
    seed: Generator = 0,
    progress: Progress | None = None,
) -> Posterior:
    r"""SGLD, SGHMC and cyclical SGHMC with all chains as one batch, each with minibatches of its own.

    The gradient is :math:`\frac{N}{B} \sum_{batch} \nabla \log p(y_i \mid x_i, w) + \nabla \log p(w)`, so neither B nor
    the number of devices changes the temperature; see :mod:`mlcollage.infer.sgld` and :mod:`mlcollage.infer.sghmc`.

    Parameters
    ----------
    kind
        ``"sgld"``, ``"sghmc"`` or ``"csghmc"``.
    samples, thin, burn_in
        Kept draws, steps between them, and steps before them. Cyclical: one draw at the end of each cycle of
        ``cycle_length`` steps, none of which is burn-in unless ``burn_in`` whole steps are given.
    lr
        Step size h of the summed loss; None takes 0.2 over the largest curvature at the start. Smaller is
        less biased.
    batch_size
        B; None for all data.
    momentum, cycle_length, exploration, rmsprop
        Of the samplers.
    temperature
        T; multiplies the noise.
    transform
        Applied to the inputs of each minibatch: an augmentation. The likelihood is then no longer a product over the
        data, and a warning says so.
    chains, init, store, at, chunk_size, seed, progress
        As in :func:`hmc`.
    """
    if kind not in ("sgld", "sghmc", "csghmc"):
        raise UnknownName(f"kind={kind!r} is not known; choose 'sgld', 'sghmc' or 'csghmc'.")
    for value, name, least in ((samples, "samples", 1), (thin, "thin", 1), (burn_in, "burn_in", 0)):
        whole(value, name, least)
    if transform is not None:
        warnings.warn(
            "with augmentation the likelihood is no longer a product over the data: no temperature makes the draws "
            "those of the posterior.",
            stacklevel=4,
        )
    density = model.log_density(X, y, chunk_size=chunk_size)
    rng = torch_generator(seed, model.parameters_flat.device)
    q = model.initial(chains, init, generator=rng)
    keeper = Keeper(model, density, store, at)
    h = 0.2 / float(largest_curvature(density, q).max().clamp(min=1e-12)) if lr is None else positive(lr, "lr")
    extra: dict[str, Any] = {} if rmsprop is None else {"rmsprop": rmsprop}
    common: dict[str, Any] = {"lr": h, "num_data": 1, "temperature": temperature, "generator": rng, **extra}
    optimizer = SGLD([q], **common) if kind == "sgld" else SGHMC([q], momentum=momentum, **common)
    cycle = Cyclical(optimizer, cycle_length, exploration=exploration) if kind == "csghmc" else None
    steps = burn_in + samples * (cycle_length if cycle else thin)
    batches = _batches(density.num_data, batch_size, chains, rng)
    for step in range(steps):
        q.grad = _estimate(density, q, next(batches), transform).neg()
        last = cycle.last_of_cycle if cycle else (step + 1 - burn_in) % thin == 0
        optimizer.step()
        if cycle:
            cycle.step()
        if step >= burn_in and last:
            if not bool(q.isfinite().all()):
                raise InvalidInput(f"the chains ceased to be finite by step {step} at lr={h:.3g}; give a smaller lr.")
            keeper(q.detach())
        if progress:
            progress(step + 1, steps)
    info = {"lr": h, "batch_size": batch_size, "temperature": temperature, "steps": steps, "path": density.path}
    return keeper.posterior(model, kind, {}, info)


def optimum(
    density: PosteriorDensity,
    q: Tensor,
    *,
    steps: int,
    lr: float,
    optimizer: str,
    batch_size: int | None,
    rng: torch.Generator,
    transform: Transform | None = None,
    progress: Progress | None = None,
    each: Callable[[int, Tensor], None] | None = None,
    constant_from: float = 1.0,
) -> Tensor:
    """Climb from positions (chains, P) to optima of the log-posterior, all at once.

    Parameters
    ----------
    optimizer
        ``"adam"``, whose rate ``lr`` is of the order of a weight's change in a step, or ``"sgd"`` with momentum .9,
        whose rate multiplies the summed gradient.
    each
        Called after each step as ``each(step, positions)``.
    constant_from
        Share of the steps after which the rate stays as it is, having fallen along a cosine that would reach zero at
        the end.
    """
    positive(lr, "lr"), whole(steps, "steps")
    if optimizer not in ("adam", "sgd"):
        raise UnknownName(f"optimizer={optimizer!r} is not known; choose 'adam' or 'sgd'.")
    q = q.clone()
    rule: torch.optim.Optimizer = (
        torch.optim.Adam([q], lr=lr) if optimizer == "adam" else torch.optim.SGD([q], lr=lr, momentum=0.9)
    )
    batches = _batches(density.num_data, batch_size, len(q), rng)
    for step in range(steps):
        share = min(step / steps, constant_from)
        rule.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * share))
        q.grad = _estimate(density, q, next(batches), transform).neg()
        rule.step()
        if each:
            each(step, q)
        if progress:
            progress(step + 1, steps)
    if not bool(q.isfinite().all()):
        raise InvalidInput(f"training diverged at lr={lr:.3g}; give a smaller lr.")
    return q.detach()


def ensemble(
    model: BayesianModule,
    X: Any,
    y: Any,
    *,
    members: int = 10,
    steps: int = 1000,
    lr: float = 0.01,
    optimizer: str = "adam",
    batch_size: int | None = None,
    init: Init = "reset",
    transform: Transform | None = None,
    chunk_size: int | None = None,
    seed: Generator = 0,
    progress: Progress | None = None,
) -> Posterior:
    """Optima of the log-posterior from independent starts, trained as one batch: a deep ensemble, or one MAP estimate.

    Weight decay is the prior's; an almost flat prior trains without. Members are chains of one draw.

    Parameters
    ----------
    members
        How many.
    steps, lr, optimizer, batch_size, transform
        Of the training, whose rate falls to zero along a cosine; see :func:`optimum`.
    init, chunk_size, seed, progress
        As in :func:`hmc`.
    """
    density = model.log_density(X, y, chunk_size=chunk_size)
    rng = torch_generator(seed, model.parameters_flat.device)
    start = model.initial(whole(members, "members"), init, generator=rng)
    q = optimum(
        density, start, steps=steps, lr=lr, optimizer=optimizer, batch_size=batch_size, rng=rng, transform=transform,
        progress=progress,
    )  # fmt: skip
    stats = {"lp": density(q)[0][:, None]}
    info = {"steps": steps, "lr": lr, "optimizer": optimizer, "path": density.path}
    return Posterior(model.layout, "map" if members == 1 else "ensemble", q[:, None], stats, info=info)


def mfvi(
    model: BayesianModule,
    X: Any,
    y: Any,
    *,
    samples: int = 50,
    steps: int = 2000,
    draws: int = 8,
    lr: float = 0.01,
    init_sd: float = 0.01,
    map_steps: int = 500,
    map_lr: float = 0.01,
    temperature: float = 1.0,
    init: Init = "reset",
    chunk_size: int | None = None,
    seed: Generator = 0,
    progress: Progress | None = None,
) -> Posterior:
    """Mean-field Gaussian variational inference, started at an optimum: see :mod:`mlcollage.infer.vi`.

    Parameters
    ----------
    samples
        Draws of the fitted Gaussian, as one chain.
    steps, draws, lr, init_sd, temperature
        Of :func:`mlcollage.infer.vi.fit`.
    map_steps, map_lr
        Of the training of the first mean.
    init, chunk_size, seed, progress
        As in :func:`hmc`.
    """
    density = model.log_density(X, y, chunk_size=chunk_size)
    rng = torch_generator(seed, model.parameters_flat.device)
    start = model.initial(1, init, generator=rng)
    best = optimum(
        density, start, steps=map_steps, lr=map_lr, optimizer="adam", batch_size=None, rng=rng, progress=progress
    )
    q = vi.fit(
        density,
        best[0],
        init_sd=init_sd,
        steps=steps,
        draws=draws,
        learning_rate=lr,
        temperature=temperature,
        generator=rng,
    )
    params = q.sample(whole(samples, "samples"), generator=rng)[None]
    info = {"elbo": float(q.trace[-max(1, steps // 20) :].mean()), "temperature": temperature, "path": density.path}
    return Posterior(model.layout, "mfvi", params, info=info, kept=torch.stack([q.mean, q.sd])[None])


class _Flat(nn.Module):
    def __init__(self, w: Tensor):
        super().__init__()
        self.w = nn.Parameter(w, requires_grad=False)


def swag(
    model: BayesianModule,
    X: Any,
    y: Any,
    *,
    members: int = 1,
    samples: int = 30,
    steps: int = 1000,
    collect: int = 40,
    every: int = 10,
    rank: int = 20,
    lr: float | None = None,
    batch_size: int | None = None,
    init: Init = "reset",
    chunk_size: int | None = None,
    seed: Generator = 0,
    progress: Progress | None = None,
) -> Posterior:
    """SWAG: a Gaussian around the path of SGD at a constant rate, :mod:`mlcollage.infer.swag`, of one or more runs.

    Parameters
    ----------
    members
        Runs; more than one is MultiSWAG.
    samples
        Draws of each.
    steps
        Of the training before; the rate falls to half along a cosine and stays there.
    collect, every, rank
        Weights counted in, steps between them, and columns of the low-rank part.
    lr, batch_size
        Rate of SGD on the summed loss (None: a tenth of one over the curvature that the start measures), data a step.
    init, chunk_size, seed, progress
        As in :func:`hmc`.
    """
    whole(collect, "collect", 2), whole(every, "every"), whole(samples, "samples"), whole(steps, "steps", 0)
    density = model.log_density(X, y, chunk_size=chunk_size)
    rng = torch_generator(seed, model.parameters_flat.device)
    start = model.initial(whole(members, "members"), init, generator=rng)
    rate = 0.1 / float(largest_curvature(density, start).max().clamp(min=1e-12)) if lr is None else lr
    total = steps + collect * every
    holders = [_Flat(row.clone()) for row in start]
    gaussians = [SWAG(holder, rank=rank) for holder in holders]

    def count(step: int, q: Tensor) -> None:
        if step < steps or (step - steps + 1) % every:
            return
        for row, holder, gaussian in zip(q, holders, gaussians, strict=True):
            holder.w.copy_(row)
            gaussian.update(holder)

    optimum(
        density, start, steps=total, lr=rate, optimizer="sgd", batch_size=batch_size, rng=rng, progress=progress,
        each=count, constant_from=0.5,
    )  # fmt: skip
    params = torch.stack([torch.stack([g.sample(rng)["w"] for _ in range(samples)]) for g in gaussians])
    return Posterior(model.layout, "swag", params, info={"lr": rate, "steps": total, "path": density.path})
