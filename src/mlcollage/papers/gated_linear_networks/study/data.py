"""Classification data of a run, as arrays, with the scale that learners standardize by."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.preprocessing import StandardScaler

from mlcollage.data import Labeled, problem

Array = npt.NDArray[Any]
PIXELS = 255.0  # the range that images are brought to, that of the official code


class Split(NamedTuple):
    """Training and test samples of a run."""

    X: Array  # (n, d)
    y: Array  # (n,), classes from 0
    X_test: Array
    y_test: Array
    # Added to the features' deviations: 1 for pixels from 0 to 255, as in the official code. Features of a table have
    # units of their own, of which no constant may depend.
    offset: float = 0.0

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(max(self.y.max(), self.y_test.max())) + 1

    def standardized(self) -> Split:
        """The same, standardized by the training set, with the offset; a constant feature is 0 there."""
        scaler = StandardScaler().fit(self.X)
        X, X_test = ((part - scaler.mean_) / (scaler.scale_ + self.offset) for part in (self.X, self.X_test))
        return Split(X, self.y, X_test, self.y_test)


def classification_data(
    seed: int, train: int, test: int | None = None, *, data: str = "digits", workload: Labeled | None = None
) -> Split:
    """Training and test arrays of one seed, at most as many samples as asked for; images get the range of pixels."""

    def default() -> Labeled:
        if data == "fashion_mnist":
            from mlcollage.data.fashion_mnist import load

            return Labeled.from_arrays(*load(), 10)
        from mlcollage.data import load_digits_split

        return Labeled.from_arrays(*load_digits_split(seed=seed), 10)

    rng = np.random.default_rng([seed, 1])
    p = problem(workload, default, rng=rng, train=train, test=test, standardize="none")
    X, y, X_test, y_test = (part.numpy() for part in (*p.train, *p.test))
    if workload is not None and X.ndim < 4:  # (n, channels, height, width) are images, all else is a table
        return Split(X.reshape(len(X), -1), y, X_test.reshape(len(X_test), -1), y_test)
    low, span = X.min(), X.max() - X.min() or 1.0
    X, X_test = ((part.reshape(len(part), -1) - low) * (PIXELS / span) for part in (X, X_test))
    return Split(X, y, X_test, y_test, offset=1.0)
