"""Which few rows are labeled: so many of each class, or a share of all."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure.knn import labels_of

__all__ = ["few_shot_split", "semi_supervised_split"]


def few_shot_split(y: Any, shots: int, *, seed: int = 0) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of ``shots`` rows of each class, drawn at random, and of the rest.

    Parameters
    ----------
    y
        Labels (n,).
    shots
        Rows of each class.
    seed
        The same seed gives the same rows.

    Raises
    ------
    InvalidInput
        If a class has fewer rows.

    Examples
    --------
    >>> few, rest = few_shot_split([0, 0, 0, 1, 1, 1], 1)
    >>> len(few), len(rest)
    (2, 4)
    """
    shots = checks.integer("shots", shots, least=1)
    index, names = labels_of(y, len(y), "y")
    counts = np.bincount(index.numpy(), minlength=len(names))
    if counts.min() < shots:
        scarce = names.tolist()[counts.argmin()]
        raise InvalidInput(f"class {scarce!r} has {counts.min()} rows, {shots} are wanted; lower shots.")
    return _split(index.numpy(), np.full(len(names), shots), seed)


def semi_supervised_split(y: Any, share: float = 0.01, *, seed: int = 0) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of a share of the rows of each class, one of each at least, and of the rest.

    The labels of 1 % and 10 % of ImageNet in the literature are fixed lists; on other data this draws such a list.

    Parameters
    ----------
    y
        Labels (n,).
    share
        0.01 by default.
    seed
        The same seed gives the same rows.

    Examples
    --------
    >>> labeled, rest = semi_supervised_split([0] * 200 + [1] * 100 + [2] * 10, 0.05)
    >>> len(labeled), len(rest)
    (16, 294)
    """
    share = checks.probability("share", share)
    index, names = labels_of(y, len(y), "y")
    counts = np.bincount(index.numpy(), minlength=len(names))
    return _split(index.numpy(), np.maximum(1, np.rint(share * counts).astype(int)), seed)


def _split(index: NDArray[Any], wanted: NDArray[Any], seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    rng = np.random.default_rng(seed)
    few = np.concatenate([rng.permutation(np.flatnonzero(index == c))[:count] for c, count in enumerate(wanted)])
    few.sort()
    return few, np.setdiff1d(np.arange(len(index)), few)
