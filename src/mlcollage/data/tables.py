"""Small tables that come with scikit-learn or are generated: real data with nothing to download."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput


class TableInfo(NamedTuple):
    """What a table holds.

    Attributes
    ----------
    task
        ``"classification"`` or ``"regression"``.
    rows, features
        Its size; generated tables have as many rows as asked for, by default these.
    classes
        Names of the classes, empty for regression.
    what
        One line.
    """

    task: Literal["classification", "regression"]
    rows: int
    features: int
    classes: tuple[str, ...]
    what: str


TABLES: dict[str, TableInfo] = {
    "breast_cancer": TableInfo("classification", 569, 30, ("malignant", "benign"), "cell nuclei of breast masses"),
    "wine": TableInfo("classification", 178, 13, ("class_0", "class_1", "class_2"), "chemistry of three wines"),
    "iris": TableInfo("classification", 150, 4, ("setosa", "versicolor", "virginica"), "Fisher's irises"),
    "digits": TableInfo("classification", 1797, 64, tuple("0123456789"), "handwritten digits, 8 x 8 gray levels"),
    "diabetes": TableInfo("regression", 442, 10, (), "progression of diabetes after a year"),
    "friedman1": TableInfo("regression", 1000, 10, (), "Friedman's function of five of ten uniform features"),
    "noisy_sine": TableInfo("regression", 200, 1, (), "a sine with Gaussian noise of deviation 0.1"),
}
"""The tables by name."""


def load(
    name: str, *, seed: int = 0, test_fraction: float = 0.25, n: int | None = None
) -> tuple[NDArray[np.float64], NDArray, NDArray[np.float64], NDArray]:
    r"""Return a table in its natural units, split at random (classes in proportion).

    Parameters
    ----------
    name
        One of :data:`TABLES`. ``friedman1`` is
        :math:`y = 10 \sin(\pi x_1 x_2) + 20 (x_3 - 1/2)^2 + 10 x_4 + 5 x_5 + \varepsilon`, ``noisy_sine`` is
        :math:`y = \sin x + 0.1\,\varepsilon` with :math:`x` uniform on :math:`[-\pi, \pi]`; both with standard normal
        :math:`\varepsilon`.
    seed
        Seeds the split, and the rows of a generated table.
    test_fraction
        Part of the rows that is for testing.
    n
        Rows of a generated table.

    Returns
    -------
    X_train, y_train, X_test, y_test
        ``(rows, features)`` float64 and ``(rows,)``: int64 classes, or float64 values.

    Examples
    --------
    >>> X_train, y_train, X_test, y_test = load("iris")
    >>> X_train.shape, X_test.shape, y_train.dtype
    ((112, 4), (38, 4), dtype('int64'))
    """
    from sklearn.model_selection import train_test_split

    checks.choice("name", name, TABLES)
    test_fraction = checks.probability("test_fraction", test_fraction)
    x, y = _rows(name, seed, n)  # (rows, features), (rows,)
    classes = TABLES[name].task == "classification"
    parts = train_test_split(x, y, test_size=test_fraction, random_state=seed, stratify=y if classes else None)
    # scikit-learn's order is X_train, X_test, y_train, y_test.
    return parts[0], parts[2], parts[1], parts[3]


def _rows(name: str, seed: int, n: int | None) -> tuple[NDArray[np.float64], NDArray]:
    from sklearn import datasets

    if name not in ("friedman1", "noisy_sine"):
        if n is not None:
            raise InvalidInput(f"{name} has {TABLES[name].rows} rows; only generated tables take n.")
        x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        return x.astype(np.float64), y.astype(np.int64 if TABLES[name].task == "classification" else np.float64)
    rows = TABLES[name].rows if n is None else checks.integer("n", n, least=4)
    if name == "friedman1":
        return datasets.make_friedman1(rows, n_features=10, noise=1.0, random_state=seed)
    rng = np.random.default_rng(seed)
    # The noisy sine: (rows, 1) and (rows,).
    x = rng.uniform(-np.pi, np.pi, size=(rows, 1))
    return x, np.sin(x[:, 0]) + 0.1 * rng.standard_normal(rows)
