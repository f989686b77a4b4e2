"""The 1,797 handwritten digits (8 x 8) that come with scikit-learn: real data with nothing to download."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks


def load_digits_split(
    seed: int = 0, test_size: int = 540
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Return the digits in [0, 1], split at random with the classes in proportion.

    Parameters
    ----------
    seed
        Seeds the split.
    test_size
        Number of test images, 10 to 1,787.

    Returns
    -------
    X_train, y_train, X_test, y_test
        ``(1797 - test_size, 64)`` float32, int64, ``(test_size, 64)`` float32, int64.

    Examples
    --------
    >>> X_train, y_train, X_test, y_test = load_digits_split()
    >>> X_train.shape, X_test.shape, float(X_train.max())
    ((1257, 64), (540, 64), 1.0)
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    test_size = checks.integer("test_size", test_size, least=10, most=1787)
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(
        (x / 16).astype(np.float32), y.astype(np.int64), test_size=test_size, random_state=seed, stratify=y
    )
    # scikit-learn's order is X_train, X_test, y_train, y_test.
    return parts[0], parts[2], parts[1], parts[3]
