"""Data of a run, genomes of the arms, and gradient descent on a user's own model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlcollage.data import Labeled, load_digits_split, problem, tables
from mlcollage.lab import Task
from mlcollage.nn import build

from ..genome import Genome
from ..network import BlurNetwork
from ..tasks import ArrayTasks, ToyTasks


class Sets(NamedTuple):
    """Rows to learn from, to choose by, and to test on."""

    train: ArrayTasks
    validation: ArrayTasks
    test: ArrayTasks


def sets(task: Task[Any], data: str = "digits", *, flat: bool = True) -> Sets:
    """The study's digits, Fashion-MNIST at 14 x 14, or the user's data; the split is the same for all arms."""

    def default() -> Labeled:
        if data == "fashion_mnist":
            from mlcollage.data import fashion_mnist

            X, y, X_test, y_test = fashion_mnist.load()
            small = [_halved(part) for part in (X, X_test)]
            return Labeled.from_arrays(small[0], y, small[1], y_test, 10)
        return Labeled.from_arrays(*load_digits_split(seed=0), 10)

    # Rows keep their order, so that those which the shipped genomes were trained on are never tested on.
    p = problem(task.workload, default, validation=0, flat=flat)
    x, y = p.train
    held = len(y) - 900 if task.workload is None and data == "digits" else max(2, len(y) // 4)
    count = p.num_classes
    if task.workload is not None:  # a user's rows may be sorted by class
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        x, y = x[order], y[order]
    return Sets(
        ArrayTasks(x[:-held], y[:-held], classes=count),
        ArrayTasks(x[-held:], y[-held:], classes=count),
        ArrayTasks(p.test.x, p.test.y, classes=count),
    )


def _halved(images: Any) -> Any:
    """28 x 28 pixels as 14 x 14 means."""
    return images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(-1, 196)


def start(arm: str, members: int, seed: int) -> Genome:
    """The population that an arm begins with."""
    known: dict[str, dict[str, Any]] = {
        "k4": {"k": 4},
        "k8": {"k": 8},
        "no_norm": {"norm": "none"},
        "forward_norm": {"norm": "forward"},
        "backward_norm": {"norm": "backward"},
        "oja": {"oja": "weights"},
        "synapse_norm": {"synapse_norm": "in_use"},
    }
    options = known.get(arm, {})
    if arm.count("_") == 2:  # one of the eight variants
        symmetry, channels, init = arm.split("_")
        options = {"symmetric": symmetry == "sym", "multistate": channels == "multi"}
        if init == "backprop":
            return Genome.backprop(noise=0.1, exact=False, learning_rate=1.0, seed=seed, population=members, **options)
    return Genome.random(**{"k": 2, **options}, seed=seed, population=members)


def other_tasks(seed: int) -> dict[str, tuple[ArrayTasks, ArrayTasks]]:
    """Training and test rows of data that no genome was trained on."""
    found = {}
    for name in ("breast_cancer", "wine", "iris"):
        X, y, X_test, y_test = tables.load(name, seed=seed)
        center, spread = X.mean(axis=0), X.std(axis=0)
        classes = int(y.max()) + 1
        parts = ((X - center) / spread, y), ((X_test - center) / spread, y_test)
        found[name] = tuple(ArrayTasks(np.float32(a), b, classes=classes) for a, b in parts)
    for name in ("xor", "circle"):
        g = torch.Generator().manual_seed(seed)
        drawn, labels = (part[0, 0] for part in ToyTasks((name,), turn=False).sample(1, 1, 1000, g))
        found[name] = ArrayTasks(drawn[:500], labels[:500]), ArrayTasks(drawn[500:], labels[500:])
    return found  # type: ignore[return-value]


def train_users_model(
    arm: str, workload: Any, data: Sets, horizons: Sequence[int], seed: int, batch_size: int, budget: int
) -> dict[int, float]:
    """Test accuracy by step of a user's model, trained by the shipped genome or by SGD.

    Both are tuned on validation rows for each horizon: SGD's learning rate, the factor on the genome's step.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = data.train.sample(1, max(horizons), min(batch_size, len(data.train.y)), generator)
    best: dict[int, tuple[float, float]] = {}
    for setting in range(budget):
        model = build(workload.model, seed)
        network = _blur(model, data, setting, budget, seed) if arm == "blur" else None
        rate = float(np.geomspace(1e-3, 1, budget)[setting])
        for t in range(max(horizons)):
            if network is not None:
                network.learn(x[0, t], y[0, t])
            else:
                model.train()
                gradients = torch.autograd.grad(F.cross_entropy(model(x[0, t]), y[0, t]), list(model.parameters()))
                with torch.no_grad():
                    for p, g in zip(model.parameters(), gradients, strict=True):
                        p.sub_(rate * g)
            if t + 1 in horizons:
                scores = [_accuracy(network or model.eval(), part) for part in (data.validation, data.test)]
                best[t + 1] = max(best.get(t + 1, (-1.0, 0.0)), (scores[0], scores[1]), key=lambda pair: pair[0])
    return {step: test for step, (_, test) in best.items()}


def _blur(model: Any, data: Sets, setting: int, budget: int, seed: int) -> BlurNetwork:
    genome = Genome.load("digits-2s")
    genome.numbers["synapse_update"] = genome.numbers["synapse_update"] * float(np.geomspace(0.25, 4, budget)[setting])
    return BlurNetwork(model, genome, input_shape=data.train.input_shape, seed=seed)


def _accuracy(model: Any, part: ArrayTasks) -> float:
    with torch.no_grad():
        logits: Tensor = model(part.X)
    return float((logits.argmax(1) == part.y).float().mean()) if bool(torch.isfinite(logits).all()) else 0.0
