"""Genomes beside tuned gradient descent: the same data, the same steps, the same number of settings searched."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from mlcollage import _checks as checks
from mlcollage._random import derive, generator
from mlcollage.errors import InvalidInput

from ._activations import ACTIVATIONS
from ._layers import from_sizes
from .genome import Genome, as_genome
from .meta import run_episode
from .rule import EPS
from .tasks import ArrayTasks

OPTIMIZERS = ("sgd", "sgd_bn", "adam", "adam_bn")
"""SGD, half of its settings with momentum 0.9, and Adam; without and with batch norm."""


def _grid(method: str, budget: int) -> list[tuple[float, float]]:
    """Learning rates over four decades, and momentum; ``budget`` settings."""
    if method.startswith("adam"):
        return [(float(r), 0.0) for r in np.geomspace(1e-4, 1.0, budget)]
    plain = [(float(r), 0.0) for r in np.geomspace(1e-3, 10, budget - budget // 2)]
    return plain + [(float(r), 0.9) for r in np.geomspace(3e-4, 3, budget // 2)]


def _descend(
    method: str, settings: Sequence[tuple[float, float]], sizes: Sequence[int], activation: str,
    x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], horizons: Sequence[int], seeds: Sequence[int],
) -> Tensor:  # fmt: skip
    """Accuracies (horizons, settings, seeds) of one baseline; all settings and seeds as one stacked network.

    ``x`` is (seeds, T, B, n); weights are drawn as torch's Linear draws them, by the seed alone.
    """
    g, s = len(settings), len(seeds)
    normalized = method.endswith("_bn")
    parameters = []
    draws = [generator(seed, 0xB) for seed in seeds]
    for n, m in itertools.pairwise(sizes):
        w = torch.stack([2 * torch.rand(n + 1, m, generator=d) - 1 for d in draws]) * n**-0.5  # (S, n + 1, m)
        parameters.append(w.repeat(g, 1, 1).requires_grad_())  # (G S, n + 1, m), the setting is the slow index
    gains = [torch.ones(g * s, 2, 1, m) for m in sizes[1:-1]] if normalized else []
    for v in gains:
        v[:, 1] = 0.0
        v.requires_grad_()
    everything = [*parameters, *gains]
    rate, momentum = (torch.tensor([v[i] for v in settings]).repeat_interleave(s) for i in (0, 1))
    first = [torch.zeros_like(p) for p in everything]
    second = [torch.zeros_like(p) for p in everything]
    function = ACTIVATIONS[activation].function

    def logits(rows: Tensor, moments: list[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, Any]:
        found, h = [], rows.repeat(g, 1, 1) if rows.shape[0] == s else rows.expand(g * s, *rows.shape[1:])
        for i, w in enumerate(parameters):
            h = torch.baddbmm(w[:, -1:], h, w[:, :-1])
            if i < len(parameters) - 1:
                if normalized:
                    mean, variance = (h.mean(1, keepdim=True), h.var(1, correction=0, keepdim=True))
                    if moments is not None:
                        mean, variance = moments[i]
                    found.append((mean.detach(), variance.detach()))
                    h = (h - mean) * (variance + EPS).rsqrt() * gains[i][:, 0] + gains[i][:, 1]
                h = function(h)
        return h, found

    out = []
    for t in range(max(horizons)):
        z, moments = logits(x[:, t])
        loss = F.cross_entropy(z.flatten(0, 1), y[:, t].repeat(g, 1).flatten(), reduction="sum") / y.shape[2]
        gradients = torch.autograd.grad(loss, everything)
        with torch.no_grad():
            for i, (p, d) in enumerate(zip(everything, gradients, strict=True)):
                shape = (-1, *[1] * (p.ndim - 1))
                r, mu = rate.reshape(shape), momentum.reshape(shape)
                if method.startswith("adam"):
                    first[i] = 0.9 * first[i] + 0.1 * d
                    second[i] = 0.999 * second[i] + 0.001 * d**2
                    d = (first[i] / (1 - 0.9 ** (t + 1))) / ((second[i] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
                else:
                    first[i] = d = mu * first[i] + d
                p -= r * d
        if t + 1 in horizons:
            with torch.no_grad():
                z, _ = logits(test[0], moments)
                finite = torch.isfinite(z).flatten(1).all(1)  # argmax would call NaN class 0
                out.append(((z.argmax(-1) == test[1]).float().mean(1) * finite).reshape(g, s))
    return torch.stack(out)


def compare_optimizers(
    X: Any,
    y: Any,
    X_test: Any,
    y_test: Any,
    *,
    genomes: Mapping[str, Genome | str] | None = None,
    optimizers: Sequence[str] = OPTIMIZERS,
    hidden: Sequence[int] = (32,),
    horizons: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    batch_size: int = 64,
    budget: int = 12,
    seeds: Sequence[int] = (0, 1, 2, 3),
    tuning_seeds: int = 4,
    validation_fraction: float = 0.25,
) -> pd.DataFrame:
    """Accuracy over steps of genomes and of tuned optimizers, on the same batches.

    Every method is given ``budget`` settings: learning rates over four decades for optimizers, and for a genome factors
    from 1/4 to 4 on its synapse update. For each method and horizon the best setting on validation rows, in runs with
    seeds of their own, is the one whose test accuracy counts, so each horizon has a baseline that was tuned for it.

    Parameters
    ----------
    X, y, X_test, y_test
        Rows (n, features), best standardized, and classes from 0.
    genomes
        By the name that the table gives them; default: the ones of ``digits-2s``.
    optimizers
        Some of :data:`OPTIMIZERS`.
    hidden
        Neurons of the hidden layers; all networks have the genome's activation.
    horizons
        Steps at which accuracy is taken.
    batch_size
        Rows of a step.
    budget
        Settings searched for each method.
    seeds
        Of initial weights and of the order of the batches, for testing.
    tuning_seeds
        How many others the search uses.
    validation_fraction
        Share of the training rows that chooses, and is not learned from.

    Returns
    -------
    pandas.DataFrame
        Columns ``method, seed, step, accuracy, setting``: the accuracy on test rows with the setting chosen for that
        step, and the chosen one's number in its grid.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> X, y = load_wine(return_X_y=True)
    >>> X = (X - X.mean(0)) / X.std(0)
    >>> table = compare_optimizers(X[::2], y[::2], X[1::2], y[1::2], optimizers=["sgd"], horizons=(5, 10), budget=2,
    ...                            seeds=(0, 1), batch_size=16)
    >>> table.groupby("method")["accuracy"].count().to_dict()
    {'digits-2s': 4, 'sgd': 4}
    """
    for name in optimizers:
        checks.choice("each of optimizers", name, OPTIMIZERS)
    checks.integer("budget", budget, least=1), checks.integer("tuning_seeds", tuning_seeds, least=1)
    checks.probability("validation_fraction", validation_fraction)
    found = {name: as_genome(g) for name, g in ({"digits-2s": "digits-2s"} if genomes is None else genomes).items()}
    data = ArrayTasks(X, y)
    held = max(2, int(validation_fraction * len(data.y)))
    if len(data.y) - held < 2:
        raise InvalidInput(f"{len(data.y)} rows are too few to hold {held} out for the choice of settings.")
    order = torch.randperm(len(data.y), generator=generator(0, len(data.y)))
    keep, out = order[held:], order[:held]
    test = ArrayTasks(X_test, y_test, classes=data.classes)
    if test.X[0].numel() != data.X[0].numel():
        raise InvalidInput(f"X_test has {test.X[0].numel()} features, X has {data.X[0].numel()}.")
    learned = ArrayTasks(data.X[keep].flatten(1), data.y[keep], classes=data.classes)
    validation = data.X[out].flatten(1)[None], data.y[out][None]
    on_test = test.X.flatten(1)[None], test.y[None]
    horizons = tuple(sorted(checks.integer("each of horizons", h, least=1) for h in horizons))
    if not horizons or not seeds:
        raise InvalidInput("horizons and seeds must not be empty.")
    sizes = (learned.X.shape[1], *hidden, data.classes)
    reference = next(iter(found.values()), None)
    activation = reference.settings.activation if reference is not None else "tanh"

    def accuracies(name: str, settings: Sequence[int], runs: Sequence[int], on: tuple[Tensor, Tensor]) -> Tensor:
        """(horizons, settings, runs) of a method, with some settings of its grid."""
        batches = [learned.sample(1, horizons[-1], min(batch_size, len(keep)), generator(run, 0xD)) for run in runs]
        x, labels = (torch.cat([part[i] for part in batches]) for i in (0, 1))  # (runs, T, B, n), (runs, T, B)
        if name in found:
            factors = [_factors(budget)[i] for i in settings]
            return _learn(found[name], factors, sizes, x, labels, on, horizons, runs)
        grid = [_grid(name, budget)[i] for i in settings]
        return _descend(name, grid, sizes, activation, x, labels, on, horizons, runs)

    rows = []
    for name in (*found, *optimizers):
        tuned = accuracies(name, range(budget), [derive(0x7A, i) for i in range(tuning_seeds)], validation)
        best = tuned.mean(2).argmax(1).tolist()  # for each horizon
        chosen = sorted(set(best))
        tested = accuracies(name, chosen, seeds, on_test)
        for i, step in enumerate(horizons):
            for j, seed in enumerate(seeds):
                value = float(tested[i, chosen.index(best[i]), j])
                rows.append({"method": name, "seed": seed, "step": step, "accuracy": value, "setting": best[i]})
    return pd.DataFrame(rows)


def _factors(budget: int) -> list[float]:
    """What a genome's synapse update is multiplied by: 1/4 to 4."""
    return [1.0] if budget == 1 else [float(f) for f in np.geomspace(0.25, 4, budget)]


def _learn(
    genome: Genome, factors: Sequence[float], sizes: Sequence[int], x: Tensor, y: Tensor, test: tuple[Tensor, Tensor],
    horizons: Sequence[int], seeds: Sequence[int],
) -> Tensor:  # fmt: skip
    """Accuracies (horizons, factors, seeds) of a genome with its synapse update scaled."""
    s, count = genome.settings, len(factors)
    path = from_sizes(sizes, ACTIVATIONS[s.activation], ACTIVATIONS[s.top_activation])
    members = genome.lifted().map(lambda v: v.repeat_interleave(count * len(seeds), 0))
    scale = torch.tensor(factors).repeat_interleave(len(seeds))
    update = members.numbers["synapse_update"]
    members.numbers["synapse_update"] = update * scale.reshape(-1, *[1] * (update.ndim - 1))
    x, y = x.repeat(count, 1, 1, 1), y.repeat(count, 1, 1)
    with torch.inference_mode():
        episode = run_episode(path, members, x, y, *test, horizons=horizons, seed=list(seeds) * count)
        return episode.accuracies.reshape(len(horizons), count, len(seeds)).clone()
