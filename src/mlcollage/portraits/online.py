"""What reuse of data costs: the same network trained on few examples many times, and on many examples once."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import torch
from torch import Tensor

from mlcollage.papers.deep_bootstrap import DeepBootstrap, FiniteAsIdeal
from mlcollage.portraits.instrument import DoesNotApply, Number, Reading
from mlcollage.portraits.resampling import mean_interval
from mlcollage.portraits.subject import Subject

_BATCH, _SEEDS, _FEWEST = 32, 3, 1024
_REUSE = 4  # epochs of the Real World in one pass of the Ideal World


def online(subject: Subject) -> Reading:
    """Final soft error on reused minus on fresh examples, from the untrained network."""
    assert subject.train is not None
    assert subject.untrained is not None
    x, y = subject.train.x, subject.train.y
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise DoesNotApply("It trains on one tensor of numbers per example; these inputs are several or are tokens.")
    if subject.task != "classification" or subject.output is not None or subject.gives_probabilities:
        raise DoesNotApply("It trains a classifier that returns logits and nothing else.")
    if len(x) < _FEWEST:
        raise DoesNotApply(f"One pass needs {_FEWEST} training examples at least, each used once; there are {len(x)}.")
    twin = subject.untrained
    labels = y.reshape(-1).long().cpu()
    world = FiniteAsIdeal(
        (x.cpu(), labels),
        num_classes=subject.classes,
        test=(subject.test.x.cpu(), subject.test.y.reshape(-1).long().cpu()),
        seed=subject.seed,
    )
    steps = len(x) // _BATCH
    study = DeepBootstrap(
        lambda: copy.deepcopy(twin),
        world,
        n=steps * _BATCH // _REUSE,
        steps=steps,
        batch_size=_BATCH,
        optimizer_fn=partial(torch.optim.Adam, lr=1e-3),
        eval_at=[steps],
        seeds=_SEEDS,
        test_size=min(len(subject.test.y), 1000),
        stack=False,
        device=next(twin.parameters()).device,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = study.run()
    gaps = result.gap("soft_error", at="end")
    values = gaps["gap"].to_numpy()
    fresh = result.select("ideal").query("step == @steps")["soft_error"].to_numpy()
    numbers = [
        Number("online gap", float(values.mean()), *mean_interval(values), interval="95%, other orders of the data"),
        Number("online soft error", float(fresh.mean()), *mean_interval(fresh), interval="95%, other orders"),
    ]
    health = [
        f"{_SEEDS} orders of {steps * _BATCH:,} training examples, each seen once, against a quarter of them seen "
        f"{_REUSE} times; Adam at 0.001 with a cosine, batches of {_BATCH}: not the procedure that trained your "
        "network, whose settings are not known here."
    ]
    return Reading("online", numbers=numbers, health=health)


def online_cost(subject: Subject) -> float:
    """Seconds: both trainings, for each order."""
    size = subject.train.size if subject.train else 0
    return 2.0 + 2 * _SEEDS * 1.5 * subject.backward * size
