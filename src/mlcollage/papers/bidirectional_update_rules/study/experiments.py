"""The study's experiments: one function each, from a run's settings to its measurements.

Genomes of several seeds are trained as one population, since a member never meets another one: seeds stay independent.
Networks learn from batches of training rows; genomes and settings are chosen on validation rows; accuracies are those
on test rows that neither learning nor meta-learning has seen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mlcollage._random import derive, generator
from mlcollage.errors import InvalidInput
from mlcollage.lab import Measurements, Task

from .._activations import ACTIVATIONS
from .._layers import Path, from_module, from_sizes
from ..analysis import check_backprop_identity, update_asymmetry
from ..comparison import compare_optimizers
from ..genome import Genome
from ..meta import MetaTrainer, run_episode
from ..network import BlurNetwork
from ..tasks import ArrayTasks
from .models import Sets, other_tasks, sets, start, train_users_model


@dataclass(frozen=True)
class Identity:
    """Random networks trained twice, by the backprop genome and by autograd."""

    steps: int = 50  # of both trainings
    widest: int = 12  # neurons of a layer, at most


def identity(task: Task[Identity]) -> Measurements:
    """Largest difference of a weight between the backprop genome and autograd, one random network for each seed."""
    m = Measurements()
    for seed in task.seeds:
        rng = np.random.default_rng([seed, 11])
        sizes = rng.integers(2, task.settings.widest + 1, size=int(rng.integers(2, 6))).tolist()
        found = check_backprop_identity(
            sizes,
            activation=str(rng.choice(["sigmoid", "tanh", "relu", "gelu", "softplus", "identity"])),
            loss="squared" if rng.random() < 0.5 else "cross_entropy",
            steps=task.settings.steps,
            seed=seed,
        )
        m.add("identity_error", found.difference, seed=seed)
        m.add("identity_moved", found.moved, seed=seed)
    return m


@dataclass(frozen=True)
class Meta:
    """Meta-training of genomes, and what they teach afterwards."""

    data: str = "digits"  # digits, fashion_mnist or workload
    members: int = 4  # genomes trained for each seed
    updates: int = 60  # of the genomes
    unroll: int = 10  # steps of learning in an episode
    batch_size: int = 32  # rows of a step
    hidden: int = 32  # neurons of the hidden layer
    learning_rate: float = 0.03  # of Adam
    episodes: int = 4  # on validation rows, to choose a genome
    tests: int = 4  # episodes on test rows, averaged
    long: int = 200  # steps of the longest test


def meta_train(task: Task[Meta]) -> Measurements:
    """Genomes from random starts by gradients: what the chosen one teaches, wider, deeper and for longer."""
    s, m = task.settings, Measurements()
    data = sets(task, s.data)
    population = Genome.stack([g for seed in task.seeds for g in start(task.arm, s.members, derive(seed, 21))])
    hidden = (s.hidden,) * (3 if task.arm == "deep" else 1)
    trainer = MetaTrainer(
        data.train,
        population,
        hidden=hidden,
        unroll=s.unroll,
        batch_size=s.batch_size,
        learning_rate=s.learning_rate,
        seed=derive(*task.seeds, 22),
    )
    for trained in (False, True):
        if trained:
            clock = time.perf_counter()
            trainer.fit(s.updates)
            m.add("seconds_of_meta_training", time.perf_counter() - clock, seed=task.seeds[0])
        chosen = _chosen(trainer, data, s, len(task.seeds))
        _tested(m, task, chosen, data, trained=trained)
        if trained:
            _carried_over(m, task, chosen, data)
            if task.arm == "k2":
                _matrices(m, chosen[0])
    for row in trainer.history:
        m.add("median_meta_loss", row["median_loss"], step=int(row["update"]), seed=task.seeds[0])
    return m


def _chosen(trainer: MetaTrainer, data: Sets, s: Meta, seeds: int) -> Genome:
    """For each seed the member that is best on validation rows, as a population."""
    accuracy = trainer.evaluate(data.validation, episodes=s.episodes).mean((0, 1)).reshape(seeds, -1)
    members = accuracy.argmax(1) + torch.arange(seeds) * accuracy.shape[1]
    return trainer.population[members]


def _taught(
    genome: Genome, task: Task[Any], data: Sets, hidden: tuple[int, ...], horizons: tuple[int, ...], batch_size: int,
    tests: int,
) -> torch.Tensor:  # fmt: skip
    """Test accuracies (horizons, P), the mean over some episodes that all members share."""
    found = []
    path = _path(genome, data.train, hidden)
    for i in range(tests):
        x, y = data.train.sample(1, max(horizons), batch_size, generator(31, i))
        with torch.inference_mode():
            parts = (x, y, data.test.X.flatten(1)[None], data.test.y[None])
            found.append(run_episode(path, genome, *parts, horizons=horizons, seed=derive(32, i)).accuracies)
    return torch.stack(found).mean(0)


def _path(genome: Genome, tasks: ArrayTasks, hidden: tuple[int, ...]) -> Path:
    s = genome.settings
    sizes = (tasks.X[0].numel(), *hidden, tasks.classes)
    return from_sizes(sizes, ACTIVATIONS[s.activation], ACTIVATIONS[s.top_activation])


def _tested(m: Measurements, task: Task[Any], genome: Genome, data: Sets, *, trained: bool) -> None:
    s = task.settings
    accuracy = _taught(genome, task, data, (s.hidden,), (s.unroll,), s.batch_size, s.tests)
    for seed, value in zip(task.seeds, accuracy[0].tolist(), strict=True):
        m.add("accuracy", value, seed=seed, trained=trained)


def _carried_over(m: Measurements, task: Task[Meta], genome: Genome, data: Sets) -> None:
    """The same genomes on deeper and larger networks, and past the horizon that they were trained for."""
    s = task.settings
    for depth in (1, 2, 3, 4):
        accuracy = _taught(genome, task, data, (s.hidden,) * depth, (s.unroll,), s.batch_size, s.tests)
        for seed, value in zip(task.seeds, accuracy[0].tolist(), strict=True):
            m.add("depth_accuracy", value, seed=seed, depth=depth)
    larger = _taught(genome, task, data, (4 * s.hidden,) * 2, (s.unroll,), s.batch_size, s.tests)
    horizons = (s.unroll, 2 * s.unroll, 5 * s.unroll)
    later = _taught(genome, task, data, (s.hidden,), horizons, s.batch_size, s.tests)
    growth = _growth(task, genome, data)
    for i, seed in enumerate(task.seeds):
        m.add("larger_accuracy", float(larger[0, i]), seed=seed)
        m.add("later_gain", float(later[2, i] - later[0, i]), seed=seed)
        m.add("log_growth", float(growth[i]), seed=seed)
        for step, value in zip(horizons, later[:, i].tolist(), strict=True):
            m.add("accuracy_by_step", value, step=step, seed=seed)


def _growth(task: Task[Meta], genome: Genome, data: Sets) -> torch.Tensor:
    """Logarithm of how much the deviation of the synapses grows from a tenth of the longest test to its end."""
    s = task.settings
    path, weights, sizes = _path(genome, data.train, (s.hidden,)), None, []
    for part, steps in enumerate((max(1, s.long // 10), s.long - max(1, s.long // 10))):
        x, y = data.train.sample(1, steps, s.batch_size, generator(33, part))
        with torch.inference_mode():
            parts = (x, y, x[:, 0], y[:, 0])
            weights = run_episode(path, genome, *parts, horizons=(steps,), weights=weights, seed=derive(34)).weights
        flat = torch.cat([w.flatten(1) for w in weights.forward], dim=1)
        # what has no finite size any more has grown past all bounds; 1e30 stands for it
        sizes.append(torch.nan_to_num(flat, nan=1e30, posinf=1e30, neginf=-1e30).double().std(1).clamp(1e-30, 1e30))
    return (sizes[1] / sizes[0]).log()


def _matrices(m: Measurements, genome: Genome) -> None:
    for name in ("nu", "mu", "hebb_pre", "hebb_post"):
        m.array(f"matrix_{name}", genome.numbers[name].numpy())


@dataclass(frozen=True)
class Evolve:
    """CMA-ES on accuracy."""

    data: str = "digits"  # digits, fashion_mnist or workload
    particles: int = 24  # candidates of a generation
    updates: int = 60  # generations
    unroll: int = 10  # steps of learning in an episode
    batch_size: int = 32  # rows of a step
    test_size: int = 128  # rows that accuracy is taken on
    replicas: int = 2  # episodes that accuracy is averaged over
    hidden: int = 32  # neurons of the hidden layer
    sigma: float = 0.3  # first deviation of the candidates
    tests: int = 4  # episodes on test rows, averaged


def evolve(task: Task[Evolve]) -> Measurements:
    """One search for each seed from a random genome; the center at the end is tested, not the luckiest candidate."""
    s, m = task.settings, Measurements()
    data = sets(task, s.data)
    for seed in task.seeds:
        genome = start("k2", 1, derive(seed, 21))
        trainer = MetaTrainer(
            data.train,
            genome,
            hidden=(s.hidden,),
            method="cmaes",
            unroll=s.unroll,
            batch_size=s.batch_size,
            test_size=s.test_size,
            replicas=s.replicas,
            particles=s.particles,
            sigma=s.sigma,
            seed=derive(seed, 23),
        )
        one = replace(task, seeds=(seed,))
        _tested(m, one, trainer.population, data, trained=False)
        trainer.fit(s.updates)
        _tested(m, one, trainer.population, data, trained=True)
        for row in trainer.history:
            m.add("median_generation_accuracy", row["median_accuracy"], step=int(row["update"]), seed=seed)
    return m


@dataclass(frozen=True)
class Race:
    """The shipped genome beside tuned optimizers."""

    data: str = "digits"  # digits, fashion_mnist or workload
    hidden: int = 32  # neurons of the hidden layer
    horizons: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)  # steps at which accuracy is taken
    batch_size: int = 64  # rows of a step
    budget: int = 12  # settings that each method is tuned over
    tuning_seeds: int = 4  # runs of each setting
    first_seed: int = 0  # added to the seeds; a replication has new ones, and its metrics are called fresh


def race(task: Task[Race]) -> Measurements:
    """Accuracy over steps of one method, with the best of its settings for each step."""
    s, m = task.settings, Measurements()
    data = sets(task, s.data)
    table = compare_optimizers(
        torch.cat([data.train.X, data.validation.X]),
        torch.cat([data.train.y, data.validation.y]),
        data.test.X,
        data.test.y,
        genomes={"blur": "digits-2s"} if task.arm == "blur" else {},
        optimizers=() if task.arm == "blur" else (task.arm,),
        hidden=(s.hidden,),
        horizons=s.horizons,
        batch_size=s.batch_size,
        budget=s.budget,
        tuning_seeds=s.tuning_seeds,
        seeds=[s.first_seed + seed for seed in task.seeds],
    )
    for _, row in table.iterrows():
        step, seed = int(row["step"]), int(row["seed"]) - s.first_seed
        m.add(_fresh("accuracy", s), float(row["accuracy"]), step=step, seed=seed, after=step)
        m.add(_fresh("setting", s), float(row["setting"]), step=step, seed=seed)
    return m


def _fresh(metric: str, settings: Any) -> str:
    return f"fresh_{metric}" if settings.first_seed else metric


@dataclass(frozen=True)
class Stay:
    """A shipped genome far past its horizon."""

    horizons: tuple[int, ...] = (20, 60, 200, 600)  # steps at which accuracy is taken
    hidden: int = 32  # neurons of the hidden layer
    batch_size: int = 64  # rows of a step
    part: int = 50  # steps whose batches are drawn at once


def stay(task: Task[Stay]) -> Measurements:
    """Test accuracy on digits over many steps, all seeds as one population."""
    s, m = task.settings, Measurements()
    data, genome = sets(task), Genome.load({"lasting": "digits-2s-lasting", "ordinary": "digits-2s"}[task.arm])
    population = Genome.stack([genome] * len(task.seeds))
    path, weights, done = _path(genome, data.train, (s.hidden,)), None, 0
    generators = [generator(seed, 61) for seed in task.seeds]
    while done < s.horizons[-1]:
        steps = min(s.part, next(h for h in s.horizons if h > done) - done)
        drawn = [data.train.sample(1, steps, s.batch_size, g) for g in generators]
        x, y = (torch.cat([pair[i] for pair in drawn]) for i in (0, 1))
        with torch.inference_mode():
            parts = (x, y, data.test.X[None], data.test.y[None])
            starts = [derive(seed, 62) for seed in task.seeds]
            episode = run_episode(path, population, *parts, horizons=(steps,), weights=weights, seed=starts)
        weights, done = episode.weights, done + steps
        if done in s.horizons:
            for seed, value in zip(task.seeds, episode.accuracies[0].tolist(), strict=True):
                m.add("later_accuracy", value, step=done, seed=seed, after=done)
    return m


@dataclass(frozen=True)
class UsersModel:
    """A user's own model, trained by the shipped genome and by SGD."""

    horizons: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)  # steps at which accuracy is taken
    batch_size: int = 64  # rows of a step
    budget: int = 4  # settings that both are tuned over


def users_model(task: Task[UsersModel]) -> Measurements:
    """Accuracy over steps of the user's model, with the best of the settings for each step."""
    s, m = task.settings, Measurements()
    data = sets(task, flat=False)
    for seed in task.seeds:
        found = train_users_model(task.arm, task.workload, data, s.horizons, seed, s.batch_size, s.budget)
        for step, value in found.items():
            m.add("accuracy", value, step=step, seed=seed, after=step)
    return m


@dataclass(frozen=True)
class Transfer:
    """Data that no genome was trained on."""

    untrained: int = 64  # random genomes, of which the best on digits is taken
    steps: int = 10  # of learning
    batch_size: int = 64  # rows of a step
    hidden: int = 32  # neurons of the hidden layer
    first_seed: int = 0  # as in Race


def transfer(task: Task[Transfer]) -> Measurements:
    """Accuracy after some steps on tables and functions in the plane."""
    s, m = task.settings, Measurements()
    for seed, number in ((s.first_seed + n, n) for n in task.seeds):
        genome = Genome.load("digits-2s").lifted()
        if task.arm == "untrained":
            pool = start("k2", s.untrained, derive(seed, 41))
            digits = sets(task)
            on = Sets(digits.train, digits.validation, digits.validation)
            best = _taught(pool, task, on, (s.hidden,), (s.steps,), s.batch_size, 2)[0].argmax()
            genome = pool[int(best)].lifted()
        values = []
        for name, (train, test) in other_tasks(seed).items():
            path = _path(genome, train, (s.hidden,))
            x, y = train.sample(1, s.steps, min(s.batch_size, len(train.y)), generator(seed, 42))
            with torch.inference_mode():
                parts = (x, y, test.X[None], test.y[None])
                episode = run_episode(path, genome, *parts, horizons=(s.steps,), seed=derive(seed, 43))
            values.append(float(episode.accuracies[0, 0]))
            m.add(_fresh("transfer_accuracy", s), values[-1], seed=number, data=name)
        m.add(_fresh("mean_transfer_accuracy", s), float(np.mean(values)), seed=number)
    return m


@dataclass(frozen=True)
class Turning:
    """The Jacobian of an update by the weights."""

    sizes: tuple[int, ...] = (8, 6, 4)  # neurons of the layers
    rows: int = 32  # of the batch


def turning(task: Task[Turning]) -> Measurements:
    """How asymmetric the Jacobian is at random weights, for the shipped genome and for backprop."""
    s, m = task.settings, Measurements()
    genome = Genome.load("digits-2s") if task.arm == "learned" else Genome.backprop()
    for seed in task.seeds:
        network = BlurNetwork(s.sizes, genome, seed=derive(seed, 51))
        g = generator(seed, 52)
        x, y = torch.randn(s.rows, s.sizes[0], generator=g), torch.randint(s.sizes[-1], (s.rows,), generator=g)
        found = update_asymmetry(network, x, y)
        m.add("asymmetry", found.value, seed=seed)
        if seed == 0 and found.jacobian is not None:
            j = found.jacobian
            size = (s.sizes[0] + 1) * s.sizes[1] + (s.sizes[1] + 1) * s.sizes[2]
            # channel 0 of both layers, so that the two pictures have one size
            rows = _first_channel(network, size)
            part = j[rows][:, rows]
            m.array("jacobian", part.numpy())
    return m


def _first_channel(network: BlurNetwork, size: int) -> torch.Tensor:
    index, at = [], 0
    for w in network.weights.forward:
        index.append(torch.arange(at, at + w[0, 0].numel()))
        at += w.numel()
    return torch.cat(index)[:size]


def on_workload(settings: Any, workload: Any, scale: Any) -> Any:
    """The same settings on a user's data; a user's model takes part in an experiment of its own instead."""
    if workload.model is not None:
        x = workload.train[0][0]
        try:
            from_module(workload.model(), tuple(np.shape(x)))
        except InvalidInput as error:
            raise InvalidInput(f"the model of {workload.name} cannot be trained by a genome: {error}") from error
    if isinstance(settings, UsersModel):
        return settings if workload.model is not None else None
    if isinstance(settings, Race) and workload.model is not None:
        return None
    return replace(settings, data="workload")
