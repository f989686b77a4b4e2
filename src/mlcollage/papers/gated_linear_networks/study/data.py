"""Classification data of a run, as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mlcollage.data import Labeled, problem

Array = npt.NDArray[Any]
Split = tuple[Array, Array, Array, Array]  # X (n, d), y (n,), X_test, y_test
PIXELS = 255.0  # images are learned from at the scale of the official code, with its offset of 1 to their deviation


def classification_data(
    seed: int, train: int, test: int | None = None, *, data: str = "digits", workload: Labeled | None = None
) -> Split:
    """Train and test arrays of one seed, features in natural units, at most as many samples as asked for."""

    def default() -> Labeled:
        if data == "fashion_mnist":
            from mlcollage.data.fashion_mnist import load

            return Labeled.from_arrays(*load(), 10)
        from mlcollage.data import load_digits_split

        return Labeled.from_arrays(*load_digits_split(seed=seed), 10)

    rng = np.random.default_rng([seed, 1])
    p = problem(workload, default, rng=rng, train=train, test=test, standardize="none", flat=True)
    X, y, X_test, y_test = (part.numpy() for part in (*p.train, *p.test))
    if X.min() >= 0 and X.max() <= 1:
        X, X_test = X * PIXELS, X_test * PIXELS
    return X, y, X_test, y_test
