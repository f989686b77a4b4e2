"""Permuted tasks for continual learning: one data set, its features in another order in every task."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput


def permutation(features: int, task: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Order of the features in a task; task 0 is the original one. No task depends on how many others there are.

    Examples
    --------
    >>> permutation(5, 0).tolist()
    [0, 1, 2, 3, 4]
    >>> sorted(permutation(5, 3).tolist())
    [0, 1, 2, 3, 4]
    """
    features = checks.integer("features", features, least=1)
    task, seed = checks.integer("task", task, least=0), checks.integer("seed", seed, least=0)
    if task == 0:
        return np.arange(features)
    return np.random.default_rng([seed, task]).permutation(features)


def permuted(X: NDArray, task: int, *, seed: int = 0) -> NDArray:
    """Return ``X`` ``(n, ...)`` with the features of every sample in the order of ``task``, in the same shape.

    Goodfellow et al., *An empirical investigation of catastrophic forgetting* (2013).

    Examples
    --------
    >>> import numpy as np
    >>> X = np.arange(12).reshape(2, 6)
    >>> bool((permuted(X, 0) == X).all()), sorted(permuted(X, 1)[1].tolist())
    (True, [6, 7, 8, 9, 10, 11])
    """
    if X.ndim < 2:
        raise InvalidInput(f"X must be (samples, features...); got shape {X.shape}.")
    flat = X.reshape(len(X), -1)
    # One order for all samples of a task.
    return flat[:, permutation(flat.shape[1], task, seed=seed)].reshape(X.shape)
