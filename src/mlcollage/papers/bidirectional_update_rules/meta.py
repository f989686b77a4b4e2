"""The outer loop: genomes are meta-learned by gradients through the unrolled steps, or by evolution strategies."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mlcollage import _checks as checks
from mlcollage._random import derive, generator
from mlcollage.errors import InvalidInput, MissingDependency
from mlcollage.infer import tensor_file

from ._activations import ACTIVATIONS
from ._layers import Path, from_module, from_sizes
from .genome import Genome, as_genome
from .network import Diverged, Weights, functional_forward, functional_step, init_weights
from .tasks import TaskDistribution

Method = Literal["gradient", "pes", "cmaes"]
_KIND = "training of genomes"
_WORST = 20.0  # loss, in nats, that a learner which diverged is given


@dataclass(frozen=True)
class Episode:
    """What learners know at chosen steps, on a batch that they did not learn from.

    Attributes
    ----------
    losses
        (horizons, P): cross-entropy in nats; of a learner whose logits are not finite, the largest one.
    hits
        (horizons, P, N): 1 where a row was predicted right; never by logits that are not finite.
    weights
        The synapses at the end.
    """

    losses: Tensor
    hits: Tensor
    weights: Weights

    @property
    def accuracies(self) -> Tensor:
        """Share of right answers, (horizons, P)."""
        return self.hits.mean(-1)


def _score(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (P,) and hits (P, B) of logits (P, B, C); what is not finite is no class, although argmax would name one."""
    p = logits.shape[0]
    finite = torch.isfinite(logits).flatten(1).all(1)  # (P,)
    safe = torch.where(finite[:, None, None], logits, torch.zeros_like(logits))
    y = y.expand(p, *y.shape[1:])
    loss = F.cross_entropy(safe.flatten(0, 1), y.flatten(), reduction="none").reshape(p, -1).mean(1)
    hits = (safe.argmax(-1) == y).to(logits.dtype) * finite[:, None]
    return torch.where(finite, loss.clamp(max=_WORST), _WORST), hits


def run_episode(
    path: Path,
    genome: Genome,
    x: Tensor,
    y: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    *,
    horizons: Sequence[int],
    weights: Weights | None = None,
    seed: int | Sequence[int] = 0,
    checkpointed: bool = False,
    truncation: int | None = None,
) -> Episode:
    """Let a population learn for as many steps as the last horizon, and test it at each horizon.

    Messages of test batches are normalized by the statistics of the last training batch, so that no test row sees
    another one.

    Parameters
    ----------
    path, genome
        The layers and the population.
    x, y
        Inputs (P or 1, T, B, ...) and labels; one batch a step.
    x_test, y_test
        Inputs (P or 1, N, ...) and labels to test on.
    horizons
        Steps after which to test, increasing.
    weights
        Synapses to begin with; default: drawn from ``seed``, one number, or one for each member.
    checkpointed
        Keep activations of every √T-th step only, and compute the others again for the gradient.
    truncation
        The gradient flows through so many steps at most.
    """
    steps = max(horizons)
    if x.shape[1] < steps:
        raise InvalidInput(f"an unroll of {steps} steps needs as many batches; there are {x.shape[1]}.")
    w = init_weights(path, genome, seed=seed, dtype=x.dtype) if weights is None else weights
    losses, hits = [], []
    stride = max(1, math.isqrt(steps)) if checkpointed else steps
    cuts = sorted({*range(stride, steps, stride), *(range(truncation, steps, truncation) if truncation else ())})
    marks = sorted({*cuts, *horizons})
    begin = 0
    statistics: tuple[tuple[Tensor, Tensor], ...] = ()
    for end in marks:

        def segment(w: Weights, begin: int = begin, end: int = end) -> tuple[Weights, Any]:
            for t in range(begin, end):
                step = functional_step(path, w, genome, x[:, t], y[:, t].expand(len(w.forward[0]), -1))
                w = step.weights
            return w, step.statistics

        if checkpointed and torch.is_grad_enabled():
            w, statistics = checkpoint(segment, w, use_reentrant=False)
        else:
            w, statistics = segment(w)
        if end in horizons:
            loss, right = _score(functional_forward(path, w, genome, x_test, statistics)[0], y_test)
            losses.append(loss)
            hits.append(right)
        if truncation and end % truncation == 0:
            w = Weights(*(tuple(v.detach() for v in part) for part in w))
        begin = end
    return Episode(torch.stack(losses), torch.stack(hits), w)


class MetaTrainer:
    """Trains genomes on a distribution of tasks.

    Parameters
    ----------
    tasks
        A :class:`TaskDistribution`, or several that take turns; their numbers of inputs and classes may differ.
    genome
        Where to begin: a population for ``gradient``, whose members are trained side by side and do not meet; the
        center of the search for ``pes`` and ``cmaes``.
    hidden
        Neurons of the hidden layers; or a sequence of such, one for each of ``tasks``.
    model
        A user's ``nn.Sequential`` instead; its weights are not used, only its layers.
    method
        ``gradient``: Adam through the unrolled steps. ``pes``: persistent evolution strategies (Vicol et al. 2021),
        which cut the unroll into windows of ``truncation`` steps without bias. ``cmaes``: the covariance matrix
        adaptation of the package cma, which needs neither gradients nor a smooth objective.
    unroll
        Steps of learning in an episode.
    horizons
        Steps at which the learner is tested; the objective is the mean over them. Default: the last one.
    batch_size, test_size
        Rows of a step, and of the test at a horizon (default: the same).
    replicas
        Episodes for each genome and update, with data and initial synapses of their own.
    learning_rate, clip
        Of Adam, and the largest norm of a member's gradient.
    particles
        Members of a generation of an evolution strategy; even for ``pes``.
    sigma
        Deviation of their perturbations; the first one for ``cmaes``.
    fitness
        What evolution strategies improve: ``accuracy`` or ``loss``.
    truncation
        The gradient flows through so many steps at most; the window of ``pes``.
    checkpointed
        Trade time for memory in the gradient, see :func:`run_episode`.
    curriculum
        Pairs of update and unroll: from that update on episodes have that length, and the best genome so far is copied
        to all members. Horizons are stretched alike.
    seed
        Of all draws.

    Notes
    -----
    A member whose loss or gradient is not finite is left as it is in that update, and counted; the others never notice.
    Gradients need memory for all steps of an unroll: :meth:`memory_estimate` says how much.

    Examples
    --------
    >>> from mlcollage.papers.bidirectional_update_rules import ToyTasks
    >>> trainer = MetaTrainer(ToyTasks(("and",)), Genome.random(seed=0, population=4), hidden=(8,), unroll=4)
    >>> _ = trainer.fit(3)
    >>> trainer.updates, trainer.best().population
    (3, None)
    """

    def __init__(
        self,
        tasks: TaskDistribution | Sequence[TaskDistribution],
        genome: Genome,
        *,
        hidden: Sequence[Any] = (32,),
        model: nn.Sequential | None = None,
        method: Method = "gradient",
        unroll: int = 10,
        horizons: Sequence[int] | None = None,
        batch_size: int = 64,
        test_size: int | None = None,
        replicas: int = 1,
        learning_rate: float = 0.02,
        clip: float = 1.0,
        particles: int = 40,
        sigma: float = 0.1,
        fitness: Literal["accuracy", "loss"] = "accuracy",
        truncation: int | None = None,
        checkpointed: bool = False,
        curriculum: Sequence[tuple[int, int]] = (),
        seed: int = 0,
    ) -> None:
        self.tasks: list[TaskDistribution] = [tasks] if isinstance(tasks, TaskDistribution) else list(tasks)
        if not self.tasks or not all(isinstance(t, TaskDistribution) for t in self.tasks):
            raise InvalidInput(
                "tasks must be a distribution or several, as ArrayTasks(X, y): with input_shape, classes and sample()."
            )
        genome = as_genome(genome)
        checks.choice("method", method, ("gradient", "pes", "cmaes"))
        checks.choice("fitness", fitness, ("accuracy", "loss"))
        for name, value in (("unroll", unroll), ("batch_size", batch_size), ("replicas", replicas)):
            checks.integer(name, value, least=1)
        for name, number in (("learning_rate", learning_rate), ("clip", clip), ("sigma", sigma)):
            checks.positive(name, number)
        if method == "cmaes" and particles < 4:
            raise InvalidInput(f"particles={particles}: CMA-ES needs at least 4.")
        if method == "pes" and (particles < 2 or particles % 2 or not truncation or unroll % truncation):
            raise InvalidInput(
                "pes needs an even number of particles and a truncation that divides the unroll; got "
                f"particles={particles}, truncation={truncation}, unroll={unroll}."
            )
        if method != "gradient" and genome.population not in (None, 1):
            raise InvalidInput(f"{method} searches around one genome; got {genome.population}. Take genome[0].")
        if genome.settings.norm != "none" and batch_size < 2:
            raise InvalidInput("batch_size=1: normalization needs at least 2 rows; use norm='none' or larger batches.")
        self.genome, self.method, self.unroll, self.seed = genome.lifted(), method, unroll, checks.integer("seed", seed)
        self.horizons = self._checked_horizons(horizons, unroll)
        self.batch_size, self.test_size, self.replicas = batch_size, test_size or batch_size, replicas
        self.learning_rate, self.clip, self.particles, self.sigma = learning_rate, clip, particles, sigma
        self.fitness, self.truncation, self.checkpointed = fitness, truncation, checkpointed
        self.curriculum = tuple((int(a), int(b)) for a, b in curriculum)
        self.paths = self._paths(hidden, model)
        self._start = (
            [unroll, *self.horizons],
            self.clip,
            self.test_size,
            [self._drawn(i) for i in range(len(self.tasks))],
        )
        vector = self.genome.to_vector().detach().clone()
        self._vector = vector  # (P, d)
        self._moments = torch.zeros_like(vector), torch.zeros_like(vector)
        self._counts = torch.zeros(len(vector))
        self.lost = torch.zeros(len(vector), dtype=torch.long)
        self.updates = 0
        self.history: list[dict[str, float]] = []
        self._recent: list[Tensor] = []  # accuracies of the last updates, (P,) each
        self._evolution: Any = None
        self._told: list[list[float]] = []
        self._window: dict[str, Any] | None = None  # of pes

    @staticmethod
    def _checked_horizons(horizons: Sequence[int] | None, unroll: int) -> tuple[int, ...]:
        found = (
            (unroll,) if horizons is None else tuple(sorted(checks.integer("horizons", h, least=1) for h in horizons))
        )
        if found[-1] != unroll:
            raise InvalidInput(f"the last of horizons {found} must be the unroll, {unroll}.")
        return found

    def _paths(self, hidden: Sequence[Any], model: nn.Sequential | None) -> list[Path]:
        if model is not None:
            return [from_module(model, t.input_shape) for t in self.tasks]
        each = list(hidden) if hidden and not isinstance(hidden[0], int) else [hidden] * len(self.tasks)
        if len(each) != len(self.tasks):
            raise InvalidInput(f"hidden gives {len(each)} networks for {len(self.tasks)} distributions of tasks.")
        own = ACTIVATIONS[self.genome.settings.activation], ACTIVATIONS[self.genome.settings.top_activation]
        sizes = [(math.prod(t.input_shape), *h, t.classes) for t, h in zip(self.tasks, each, strict=True)]
        return [from_sizes(s, *own) for s in sizes]

    def _drawn(self, number: int) -> float:
        """A fingerprint of a distribution, from a draw of it, which is checked at the same time."""
        tasks, path = self.tasks[number], self.paths[number]
        x, y = tasks.sample(1, 2, self.batch_size, generator(self.seed, 0xF1))
        wanted = (1, 2, self.batch_size)
        if tuple(x.shape) != (*wanted, *tasks.input_shape) or tuple(y.shape) != wanted:
            raise InvalidInput(
                f"distribution {number} of tasks, asked for 1 task, 2 steps and {self.batch_size} rows, must give "
                f"inputs {(*wanted, *tasks.input_shape)} and labels {wanted}; it gave {tuple(x.shape)} and "
                f"{tuple(y.shape)}."
            )
        if int(y.min()) < 0 or int(y.max()) >= path.classes:
            raise InvalidInput(f"distribution {number} of tasks has labels outside of 0 to {path.classes - 1}.")
        return float(x.double().sum() + y.double().sum())

    # ------------------------------------------------------------------ the loop

    def fit(
        self,
        updates: int | None = None,
        *,
        budget_s: float | None = None,
        callback: Callable[[MetaTrainer], Any] | None = None,
    ) -> MetaTrainer:
        """Update until so many updates or seconds have gone; may be called again, and goes on.

        Parameters
        ----------
        updates
            More updates.
        budget_s
            Seconds, checked before each update.
        callback
            Called after each update with the trainer; a true answer stops.
        """
        if updates is None and budget_s is None:
            raise InvalidInput("say how long to train: updates or budget_s.")
        need, there = self.memory_estimate() / 1e9, psutil.virtual_memory().total / 1e9
        if need > 0.5 * there:
            warnings.warn(
                f"an update keeps about {need:.0f} GB for its gradient, of {there:.0f} GB that there are; use "
                "checkpointed=True, truncation, fewer members or a shorter unroll.",
                stacklevel=2,
            )
        clock, end = time.perf_counter(), math.inf if updates is None else self.updates + updates
        while self.updates < end and (budget_s is None or time.perf_counter() - clock < budget_s):
            self._stage()
            {"gradient": self._descend, "pes": self._persist, "cmaes": self._evolve}[self.method]()
            self.updates += 1
            if callback is not None and callback(self):
                break
        return self

    def _stage(self) -> None:
        """Begin a stage of the curriculum, if it is its turn."""
        for at, unroll in self.curriculum:
            if at == self.updates and unroll != self.unroll:
                self.horizons = tuple(sorted({max(1, round(h * unroll / self.unroll)) for h in self.horizons}))
                self.unroll = unroll
                if self.method == "gradient" and self._recent:
                    best = int(torch.stack(self._recent).mean(0).argmax())
                    # Adam's moments go with the genome that they belong to
                    self._vector = self._vector[best].expand_as(self._vector).clone()
                    self._moments = tuple(m[best].expand_as(m).clone() for m in self._moments)  # type: ignore[assignment]
                    self._counts = self._counts[best].expand_as(self._counts).clone()

    def _episode(self, genome: Genome, *, common: bool = False) -> Episode:
        """One episode of this update for each member and replica; ``common`` gives all members the same data."""
        turn = self.updates % len(self.tasks)
        tasks, members = self.tasks[turn], len(genome)
        copies = self.replicas if common else members * self.replicas
        g = generator(self.seed, self.updates, 1)
        x, y = tasks.sample(copies, self.unroll + 1, max(self.batch_size, self.test_size), g)
        seeds = [derive(self.seed, self.updates, 2, r) for r in range(copies)]
        if common:
            x, y, seeds = x.repeat(members, *[1] * (x.ndim - 1)), y.repeat(members, 1, 1), seeds * members
        if self.replicas > 1:
            genome = genome.map(lambda v: v.repeat_interleave(self.replicas, 0))
        if len(self.paths[turn].input_shape) == 1:
            x = x.flatten(3)
        b = self.batch_size
        return run_episode(
            self.paths[turn], genome, x[:, :-1, :b], y[:, :-1, :b],
            x[:, -1, : self.test_size], y[:, -1, : self.test_size],
            horizons=self.horizons, seed=seeds, checkpointed=self.checkpointed,
            truncation=self.truncation if self.method == "gradient" else None,
        )  # fmt: skip

    def _per_member(self, values: Tensor) -> Tensor:
        """Mean over horizons and replicas, (P,)."""
        return values.mean(0).reshape(-1, self.replicas).mean(1)

    def _descend(self) -> None:
        """Adam, for each member by itself."""
        vector = self._vector.clone().requires_grad_()
        episode = self._episode(self.genome.from_vector(vector))
        loss = self._per_member(episode.losses)
        (gradient,) = torch.autograd.grad(loss.sum(), vector)
        # Members share no number, so a row of the gradient is a member's own.
        fine = torch.isfinite(loss) & torch.isfinite(gradient).all(1) & (loss < _WORST)
        gradient = torch.where(fine[:, None], gradient, torch.zeros_like(gradient))
        gradient = gradient * (self.clip / gradient.norm(dim=1, keepdim=True).clamp(min=self.clip))
        self._adam(gradient, fine)
        self._note(loss.detach(), self._per_member(episode.accuracies), fine)

    def _adam(self, gradient: Tensor, fine: Tensor) -> None:
        keep = fine[:, None]
        first, second = self._moments
        self._counts = self._counts + fine
        first = torch.where(keep, 0.9 * first + 0.1 * gradient, first)
        second = torch.where(keep, 0.999 * second + 0.001 * gradient**2, second)
        self._moments = first, second
        t = self._counts.clamp(min=1)[:, None]
        step = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        self._vector = torch.where(keep, self._vector - self.learning_rate * step, self._vector)

    def _note(self, loss: Tensor, accuracy: Tensor, fine: Tensor) -> None:
        self.lost = self.lost + (~fine if len(fine) == len(self.lost) else (~fine).sum())
        if len(accuracy) == len(self._vector):
            self._recent = [*self._recent[-19:], accuracy]
        row = {"update": self.updates, "unroll": self.unroll, "loss": float(loss.min())}
        row |= {"median_loss": float(loss.median()), "accuracy": float(accuracy.max())}
        self.history.append({**row, "median_accuracy": float(accuracy.median()), "lost": float((~fine).sum())})

    # ------------------------------------------------------------------ evolution strategies

    def ask(self) -> Tensor:
        """Candidates of a generation as vectors (particles, d); of CMA-ES only."""
        import numpy as np

        return torch.as_tensor(np.stack(self._strategy.ask()), dtype=torch.float32)

    def tell(self, candidates: Tensor, costs: Tensor) -> None:
        """Their costs (particles,), smaller is better; what is not finite counts as the worst."""
        costs, fine = costs.detach().double(), torch.isfinite(costs)
        if costs.shape != (self.particles,) or len(candidates) != self.particles or not bool(fine.any()):
            raise InvalidInput(
                f"tell needs all {self.particles} candidates and a cost for each, not all of them NaN or infinite; got "
                f"{len(candidates)} candidates and {int(fine.sum())} finite costs of {costs.numel()}."
            )
        costs = torch.where(fine, costs, costs[fine].max())
        self._strategy.tell(list(candidates.double().numpy()), costs.tolist())
        self._told.append(costs.tolist())
        self._vector = torch.as_tensor(self._strategy.mean, dtype=torch.float32)[None]

    @property
    def _strategy(self) -> Any:
        if self._evolution is None:
            try:
                import cma
            except ImportError as error:
                raise MissingDependency("method='cmaes' needs the package cma: pip install cma.") from error
            import numpy as np

            # A generator of its own: by default cma seeds numpy's global one, and takes the clock for seed 0.
            rng = np.random.default_rng([self.seed & 0xFFFFFFFF, 0xC3A])
            options = {"popsize": self.particles, "randn": lambda *size: rng.standard_normal(size), "seed": np.nan}
            quiet = {"verbose": -9, "verb_log": 0, "tolflatfitness": 10**9, "maxiter": 10**9, "tolfun": 0.0}
            start = self.genome.to_vector()[0].double().numpy()
            self._evolution = cma.CMAEvolutionStrategy(start, self.sigma, {**options, **quiet})
        return self._evolution

    def costs(self, candidates: Tensor) -> tuple[Tensor, Episode]:
        """What candidates (n, d) cost on the data of this update: 1 - accuracy, or the loss; without gradients."""
        with torch.inference_mode():
            episode = self._episode(self.genome.from_vector(candidates), common=True)
        values = 1 - episode.accuracies if self.fitness == "accuracy" else episode.losses
        return self._per_member(values).clone(), episode

    def _evolve(self) -> None:
        candidates = self.ask()
        costs, episode = self.costs(candidates)
        self.tell(candidates, costs)
        loss, accuracy = (self._per_member(v) for v in (episode.losses, episode.accuracies))
        self._note(loss, accuracy, loss < _WORST)

    def _persist(self) -> None:
        """One window of persistent evolution strategies: particles go on where they were, perturbations add up."""
        assert self.truncation is not None
        half, n, d = self.particles // 2, self.particles, self._vector.shape[1]
        if self._window is None or self._window["step"] >= self.unroll:
            self._window = {"step": 0, "weights": None, "sum": torch.zeros(n, d), "episode": self.updates}
        w = self._window
        noise = self.sigma * torch.randn(half, d, generator=generator(self.seed, self.updates, 3))
        noise = torch.cat([noise, -noise])  # antithetic pairs
        w["sum"] = w["sum"] + noise
        turn = w["episode"] % len(self.tasks)
        x, y = self.tasks[turn].sample(1, self.truncation + 1, self.batch_size, generator(self.seed, self.updates, 1))
        x = x.flatten(3) if len(self.paths[turn].input_shape) == 1 else x
        with torch.no_grad():
            particles, path = self.genome.from_vector(self._vector + noise), self.paths[turn]
            episode = run_episode(
                path, particles, x[:, :-1], y[:, :-1], x[:, -1], y[:, -1],
                horizons=(self.truncation,), weights=w["weights"], seed=derive(self.seed, w["episode"], 2),
            )  # fmt: skip
            loss = episode.losses[0] if self.fitness == "loss" else 1 - episode.accuracies[0]
            gradient = (w["sum"] * loss[:, None]).mean(0, keepdim=True) / self.sigma**2
            gradient = gradient * (self.clip / gradient.norm().clamp(min=self.clip))
            self._adam(gradient, torch.isfinite(gradient).all(1))
        # One that diverged begins its inner life anew, with the mean's synapses of no one: a fresh draw.
        dead = episode.losses[0] >= _WORST
        fresh = init_weights(
            self.paths[turn], self.genome.from_vector(self._vector), seed=derive(self.seed, self.updates)
        )
        w["weights"] = Weights(
            *(
                tuple(
                    torch.where(dead[:, None, None, None], a, b) if b.numel() else b for a, b in zip(u, v, strict=True)
                )
                for u, v in zip(fresh, episode.weights, strict=True)
            )
        )
        w["step"] += self.truncation
        self._note(episode.losses[0], episode.accuracies[0], ~dead)

    # ------------------------------------------------------------------ what came out

    @property
    def population(self) -> Genome:
        """The genomes as they are now; of an evolution strategy, its center."""
        return self.genome.from_vector(self._vector.clone())

    def best(self, tasks: TaskDistribution | None = None, *, episodes: int = 8, seed: int | None = None) -> Genome:
        """The member with the best accuracy on tasks of a validation split, at the horizons of training.

        Parameters
        ----------
        tasks
            Tasks that were not trained on; default: fresh batches of the first that was.
        episodes
            Fresh data and initial synapses, the same for all members.
        seed
            Of these; default: one that training did not use.
        """
        accuracy = self.evaluate(tasks, episodes=episodes, seed=seed).mean((0, 1))  # (P,)
        if not bool(accuracy.any()):
            raise Diverged(
                "no member is ever right: all have diverged, or labels do not belong to their inputs; begin again, "
                "perhaps with a smaller learning_rate."
            )
        return self.population[int(accuracy.argmax())]

    def evaluate(
        self, tasks: TaskDistribution | None = None, *, episodes: int = 8, seed: int | None = None, number: int = 0
    ) -> Tensor:
        """Accuracies (episodes, horizons, P) of the present genomes on fresh tasks, the same for all of them.

        ``number`` says which of the trainer's distributions ``tasks`` stand for, and so which network learns them.
        """
        source = self.tasks[number] if tasks is None else tasks
        path = self.paths[number]
        if (math.prod(source.input_shape), source.classes) != (math.prod(path.input_shape), path.classes):
            raise InvalidInput(
                f"tasks for validation have inputs {source.input_shape} and {source.classes} classes; "
                f"network {number} was trained for {path.input_shape} and {path.classes}."
            )
        genome, found = self.population, []
        base = derive(self.seed, 0x7E57) if seed is None else seed
        for i in range(checks.integer("episodes", episodes, least=1)):
            x, y = source.sample(1, self.unroll + 1, max(self.batch_size, self.test_size), generator(base, i))
            x = x.flatten(3) if len(path.input_shape) == 1 else x
            b = self.batch_size
            with torch.inference_mode():
                parts = (x[:, :-1, :b], y[:, :-1, :b], x[:, -1], y[:, -1])
                episode = run_episode(path, genome, *parts, horizons=self.horizons, seed=derive(base, i, 1))
            found.append(episode.accuracies.clone())
        return torch.stack(found)

    def memory_estimate(self) -> int:
        """Bytes of activations and synapses that the gradient of one update keeps, roughly."""
        if self.method != "gradient":
            return 0
        k, c = self.genome.settings.k, self.genome.settings.channels
        per_step = 0
        path = max(self.paths, key=lambda p: sum(layer.inputs * layer.outputs for layer in p.layers))
        for layer in path.layers:
            rows = self.batch_size * layer.positions
            # mixed inputs, messages, normalized ones and states on both ways; old and new synapses
            per_step += 4 * (k * rows * (3 * layer.inputs + 6 * layer.outputs) + 3 * c * layer.inputs * layer.outputs)
        kept = 2 * math.isqrt(self.unroll) + 1 if self.checkpointed else self.unroll
        return per_step * kept * len(self._vector) * self.replicas

    # ------------------------------------------------------------------ going on later

    def _identity(self) -> dict[str, Any]:
        """What must agree for training to go on."""
        return {
            "settings": str(self.genome.settings), "method": self.method, "batch_size": self.batch_size,
            "replicas": self.replicas, "seed": self.seed, "particles": self.particles, "sigma": self.sigma,
            "members": len(self.genome), "curriculum": [list(c) for c in self.curriculum], "fitness": self.fitness,
            "sizes": [[[layer.inputs, layer.outputs] for layer in p.layers] for p in self.paths],
            "truncation": self.truncation, "learning_rate": self.learning_rate, "unroll": self._start[0],
            "clip": self._start[1], "test_size": self._start[2], "data": self._start[3],
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on bit for bit: tensors, numbers and words only."""
        window = None
        if self._window is not None:
            window = {**self._window, "weights": [list(part) for part in self._window["weights"] or ((), ())]}
        return {
            "identity": self._identity(), "vector": self._vector, "start": self.genome.to_vector(),
            "moments": list(self._moments), "counts": self._counts, "lost": self.lost, "updates": self.updates,
            "unroll": self.unroll, "horizons": list(self.horizons), "history": self.history, "told": self._told,
            "recent": list(self._recent), "window": window,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; refused where the trainer was made with other settings."""
        mine, theirs = self._identity(), state["identity"]
        if different := [name for name in mine if mine[name] != theirs.get(name)]:
            name = different[0]
            raise InvalidInput(
                f"the saved training had {name}={theirs.get(name)!r}, this one has {mine[name]!r}; make the trainer as "
                "it was."
            )
        self.genome = self.genome.from_vector(state["start"])
        self._evolution, self._told = None, []
        for costs in state["told"]:  # cma keeps no state that could be stored without pickle: tell it all again
            self.tell(self.ask(), torch.tensor(costs, dtype=torch.float64))
        self._vector, self._counts, self.lost = state["vector"], state["counts"], state["lost"]
        self._moments = state["moments"][0], state["moments"][1]
        self.updates, self.unroll = int(state["updates"]), int(state["unroll"])
        self.horizons, self.history = tuple(state["horizons"]), list(state["history"])
        self._recent, self._window = list(state["recent"]), state["window"]
        if self._window is not None:
            parts = [tuple(p) for p in self._window["weights"]]
            self._window = {**self._window, "weights": Weights(*parts) if parts and parts[0] else None}

    def save(self, path: str | os.PathLike[str]) -> FilePath:
        """Write :meth:`state_dict` to a safetensors file; the old one stays until the new one is complete."""
        return tensor_file.save(path, _KIND, self.state_dict())

    def resume(self, path: str | os.PathLike[str]) -> MetaTrainer:
        """Go on from a file of :meth:`save`."""
        self.load_state_dict(tensor_file.load(path, _KIND))
        return self
