"""Are layers alike? CKA of all pairs of layers, and with the untrained twin."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import scipy.stats

from mlcollage.papers.vit_vs_cnn.compare import compare
from mlcollage.portraits.instrument import DoesNotApply, Number, Reading
from mlcollage.portraits.resampling import Floats
from mlcollage.portraits.subject import Subject

_EXAMPLES, _BATCH = 512, 64
_BATCHES = "95%, other batches of examples"


def likeness(subject: Subject) -> Reading:
    """Uniformity of the layers, and mean CKA of each layer with the same layer before training."""
    if subject.test.size < 2 * _BATCH // 4:
        raise DoesNotApply(f"It needs two batches of examples at least; there are {subject.test.size} examples.")
    twin = subject.untrained
    size = min(_BATCH, subject.test.size // 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        found = compare(
            subject.model,
            subject.model if twin is None else twin,
            _inputs(subject),
            batch_size=size,
            seed=subject.seed,
            labels=("trained", "untrained"),
        )
    names = list(found.a.names_a)
    health = [str(found.health)]
    health += [str(w.message)[:1].upper() + str(w.message)[1:] for w in said if w.category is UserWarning]
    numbers = []
    if len(names) >= 4:
        u = found.uniformity("a")
        numbers.append(Number("uniformity", u.value, u.low, u.high, interval=_BATCHES))
    else:
        health.append(f"Uniformity compares quarters of a network, and {len(names)} layers have none.")
    arrays = {"map": found.a.matrix}
    if twin is None:
        health.append("Likeness to the untrained network is told where one is given.")
    else:
        if len(names) >= 4:
            d = found.uniformity_difference()
            numbers.append(Number("uniformity gained", d.value, d.low, d.high, interval=_BATCHES))
        other = list(found.b.names_a)
        both = [(i, other.index(n)) for i, n in enumerate(names) if n in other]
        rows, columns = [i for i, _ in both], [j for _, j in both]
        own = found.cross.matrix[rows, columns]
        without = np.nanmean(found.cross.without_each_batch[:, rows, columns], axis=1)  # (batches,)
        numbers.append(Number("likeness to untrained", float(np.nanmean(own)), *_ends(own, without), interval=_BATCHES))
        low, high = found.cross.ci
        numbers += [
            Number("likeness to untrained", float(v), float(low[i, j]), float(high[i, j]), layer=names[i],
                   interval=_BATCHES)
            for v, (i, j) in zip(own, both, strict=True)
        ]  # fmt: skip
        arrays["cross"] = found.cross.matrix
    return Reading("likeness", numbers=numbers, health=health, arrays=arrays)


def _ends(own: Floats, without: Floats) -> tuple[float, float]:
    """Jackknife limits of a mean over layers, from its values without each batch."""
    n = len(without)
    if n < 2:
        return math.nan, math.nan
    error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    half, middle = float(scipy.stats.t.ppf(0.975, n - 1)) * error, float(np.nanmean(own))
    return middle - half, middle + half


def _inputs(subject: Subject) -> Any:
    """Inputs and labels, so that batches with few classes are noticed."""
    examples = subject.test.take(_EXAMPLES)
    return examples.batch if examples.y is None or not subject.classes else (examples.x, examples.y)


def likeness_cost(subject: Subject) -> float:
    """Seconds: one pass over the examples and the kernels of all modules."""
    modules = len(list(subject.model.modules()))
    return 0.3 + 4 * subject.forward * min(_EXAMPLES, subject.test.size) + 0.02 * modules + 1e-4 * modules**2
