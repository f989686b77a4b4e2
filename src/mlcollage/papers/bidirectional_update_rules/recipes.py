"""How the genomes that come with the package were trained, as a command.

``python -m mlcollage.papers.bidirectional_update_rules.recipes digits-2s --out mine.safetensors`` does it again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.data import load_digits_split

from .genome import Genome
from .meta import MetaTrainer
from .tasks import ArrayTasks, TaskDistribution

_TRAINED_ON = 900  # of the 1,257 training rows of digits; the others choose the genome


@dataclass(frozen=True)
class Kind:
    """A kind of task made of digits, and the hidden layers of its networks."""

    ways: int = 10  # classes of a task, drawn anew for each learner
    features: int | None = None  # random projections that a learner sees; None: the pixels
    hidden: tuple[int, ...] = (32,)  # neurons of the hidden layers


_KINDS = (Kind(), Kind(2, 16), Kind(3, 8), Kind(hidden=(64, 64)), Kind(2), Kind(5, 16, (24, 24)))


@dataclass(frozen=True)
class Recipe:
    """Settings of a meta-training."""

    start: str = "random"  # random matrices, or those of backprop
    settings: dict[str, Any] = field(default_factory=dict)  # of the genome
    kinds: tuple[Kind, ...] = _KINDS  # of tasks, that take turns
    members: int = 6  # genomes trained side by side
    updates: int = 720  # of the genome
    horizons: tuple[int, ...] = (1, 3, 10)  # steps at which a learner is tested, at first
    curriculum: tuple[tuple[int, int], ...] = ((360, 20),)  # update, and the unroll from there on
    batch_size: int = 64  # rows of a step
    learning_rate: float = 0.02  # of Adam
    seed: int = 0  # of all draws


RECIPES: dict[str, Recipe] = {
    "digits-2s": Recipe(settings={"k": 2}),
    "digits-4s": Recipe(settings={"k": 4}),
    "digits-2s-single": Recipe(
        start="backprop", settings={"k": 2, "multistate": False, "backward": "multiplicative_second"}
    ),
    # Accuracy that does not fall after the horizon: synapses are normalized in use, so that their growth makes the
    # steps smaller and smaller, and the objective looks at early and late steps.
    "digits-2s-lasting": Recipe(
        start="backprop",
        settings={"k": 2, "multistate": False, "backward": "multiplicative_second", "synapse_norm": "in_use"},
        curriculum=((240, 20), (480, 60)),
        updates=600,
    ),
}
"""By the name of the genome."""


def digits_tasks(kind: Kind | None = None, *, validation: bool = False) -> ArrayTasks:
    """Batches of digits that genomes are trained on, or those that choose among them; standardized by the former."""
    kind = kind or Kind()
    X, y, _, _ = load_digits_split(seed=0)
    center, spread = X[:_TRAINED_ON].mean(), X[:_TRAINED_ON].std()
    part = slice(_TRAINED_ON, None) if validation else slice(0, _TRAINED_ON)
    ways = None if kind.ways == 10 else kind.ways
    return ArrayTasks((X[part] - center) / spread, y[part], classes=10, ways=ways, features=kind.features)


def make_trainer(recipe: Recipe) -> MetaTrainer:
    """The trainer of a recipe, before its first update."""
    if recipe.start == "backprop":
        genome = Genome.backprop(
            noise=0.1, exact=False, learning_rate=1.0, seed=recipe.seed, population=recipe.members, **recipe.settings
        )
    else:
        genome = Genome.random(seed=recipe.seed, population=recipe.members, **recipe.settings)
    tasks: Sequence[TaskDistribution] = [digits_tasks(kind) for kind in recipe.kinds]
    return MetaTrainer(
        tasks,
        genome,
        hidden=[kind.hidden for kind in recipe.kinds],
        unroll=recipe.horizons[-1],
        horizons=recipe.horizons,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        curriculum=recipe.curriculum,
        seed=recipe.seed,
    )


def train(name: str, callback: Any = None) -> Genome:
    """Train the genome of a recipe; its card says how, and what it reached on validation rows."""
    recipe = RECIPES[checks.choice("name", name, RECIPES)]
    trainer = make_trainer(recipe).fit(recipe.updates, callback=callback)
    # (kinds, horizons, P), on rows that were not trained on
    found = [trainer.evaluate(digits_tasks(k, validation=True), number=i).mean(0) for i, k in enumerate(recipe.kinds)]
    accuracy: Tensor = torch.stack(found)
    chosen = int(accuracy.mean((0, 1)).argmax())
    genome = trainer.population[chosen]
    genome.card = {
        "name": name,
        "tasks": "scikit-learn digits, 900 of the training rows of load_digits_split(seed=0), one scale for all "
        "pixels; some of the classes, and random projections of the pixels, as the recipe's kinds say",
        "validation": "the other 357 training rows, 8 episodes for each kind; accuracy is the mean over kinds",
        "accuracy": {
            str(h): round(float(a), 4) for h, a in zip(trainer.horizons, accuracy[:, :, chosen].mean(0), strict=True)
        },
        "accuracy_on_digits": {
            str(h): round(float(a), 4) for h, a in zip(trainer.horizons, accuracy[0, :, chosen], strict=True)
        },
        "lost_updates": int(trainer.lost.sum()),
        "batch_size": recipe.batch_size,
        "horizon": trainer.unroll,
        "recipe": {k: v for k, v in asdict(recipe).items() if k != "settings"},
    }
    return genome


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="recipes", description="Train a genome that comes with the package again.")
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", required=True, help="the safetensors file to write")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)

    def report(trainer: MetaTrainer) -> None:
        if trainer.updates % 50 == 49:
            row = trainer.history[-1]
            print(f"update {trainer.updates + 1}, unroll {trainer.unroll}: loss {row['loss']:.3f}", flush=True)

    genome = train(given.name, report)
    genome.save(given.out)
    print(f"{given.out}: validation accuracy by steps {genome.card['accuracy']}")


if __name__ == "__main__":
    main()
