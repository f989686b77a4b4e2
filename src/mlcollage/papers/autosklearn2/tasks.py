"""Tasks to learn portfolios from: six families that are generated, and the sets that come with scikit-learn.

Families: Gaussian clusters (``make_classification``), quantized Friedman functions, random causal graphs, random trees
as teachers, rings and parities, and parts of real sets. Sizes, imbalance, wrong labels, gaps, categories and scales are
drawn for each task.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn import datasets
from sklearn.tree import DecisionTreeRegressor

from mlcollage import _checks as checks
from mlcollage.errors import UnknownName

from .rows import TableRows

FAMILIES = ("clusters", "friedman", "graph", "trees", "shapes", "real")
_REAL = ("digits", "breast_cancer", "wine", "iris")


@dataclass(frozen=True)
class TableTask:
    """A task: rows to learn from and rows to test on.

    Parameters
    ----------
    name
        ``family-number``.
    rows, y
        Training rows and their labels, 0 and up.
    test_rows, y_test
        TableRows that no pipeline sees before it is scored.
    n_classes
        Number of classes.
    """

    name: str
    rows: TableRows
    y: NDArray[np.int64]
    test_rows: TableRows
    y_test: NDArray[np.int64]
    n_classes: int

    @property
    def family(self) -> str:
        """The family that it is from."""
        return self.name.split("-")[0]

    @property
    def meta_features(self) -> tuple[int, int]:
        """Number of columns and of training rows: all that the selector sees."""
        return self.rows.numbers.shape[1] + self.rows.codes.shape[1], len(self.rows)


def make_task(name: str, *, most_rows: int = 1000) -> TableTask:
    """Make the task ``family-number``; the same name gives the same task.

    Parameters
    ----------
    name
        One of the families and a number, such as ``"graph-3"``: clusters, friedman, graph, trees, shapes, real.
    most_rows
        Most training rows; at least 200 are drawn, on a logarithmic scale. As many again, at most 2,000, are for
        testing.

    Examples
    --------
    >>> task = make_task("trees-0")
    >>> len(task.rows) == len(task.y), task.family
    (True, 'trees')
    """
    family, _, number = name.partition("-")
    if family not in FAMILIES or not number.isdigit():
        raise UnknownName(f"a task is called family-number, such as graph-3, with a family of {', '.join(FAMILIES)}.")
    most_rows = checks.integer("most_rows", most_rows, least=200)
    rng = np.random.default_rng([FAMILIES.index(family), int(number), 20220701])
    n = int(np.exp(rng.uniform(np.log(200), np.log(most_rows))))
    if family == "real":
        X, y, n = _real(int(number), n, rng)
    else:
        X, y = _drawn(family, n + min(max(n, 300), 2000), rng)
    X, y = _worn(X, y, rng, wear=family != "real")
    codes, X = _some_categories(X, rng) if family != "real" else (np.empty((len(X), 0), np.int64), X)
    y = np.unique(y, return_inverse=True)[1].astype(np.int64)
    rows, train, test = TableRows(X, codes), np.arange(n), np.arange(n, len(y))
    return TableTask(name, rows[train], y[train], rows[test], y[test], int(y.max()) + 1)


def _drawn(family: str, n: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray]:
    d = int(np.exp(rng.uniform(np.log(3), np.log(40))))
    k = int(rng.choice([2, 2, 2, 3, 4, 5, 7]))
    seed = int(rng.integers(2**31))
    if family == "clusters":
        informative = max(2, int(d * rng.uniform(0.2, 0.9)))
        per = int(rng.integers(1, 4))
        while k * per > 2**informative:
            per, k = max(1, per - 1), k if per > 1 else k - 1
        return datasets.make_classification(
            n, d, n_informative=informative, n_redundant=min(d - informative, int(rng.integers(0, 4))), n_classes=k,
            n_clusters_per_class=per, class_sep=rng.uniform(0.4, 1.8), flip_y=0, random_state=seed,
        )  # fmt: skip
    if family == "friedman":
        which = int(rng.integers(4))
        if which == 0:
            X, value = datasets.make_friedman1(n, n_features=max(5, d), noise=rng.uniform(0, 2), random_state=seed)
        elif which < 3:
            make = datasets.make_friedman2 if which == 1 else datasets.make_friedman3
            X, value = make(n, noise=0, random_state=seed)
            value = value + rng.uniform(0, 0.3) * value.std() * rng.normal(size=n)
        else:
            X, label = datasets.make_hastie_10_2(n, random_state=seed)
            return X, label
        return X, _cut(value, k, rng)
    if family == "graph":
        return _graph(n, d, k, rng)
    if family == "trees":
        X = rng.normal(size=(n, d))
        depth, value = int(rng.integers(3, 9)), np.zeros(n)
        for _ in range(int(rng.choice([1, 1, 5, 20]))):
            tree = DecisionTreeRegressor(max_depth=depth, random_state=int(rng.integers(2**31)), splitter="random")
            value += tree.fit(X[:400], rng.normal(size=min(n, 400))).predict(X)
        return X, _cut(value + 1e-6 * rng.normal(size=n), k, rng)
    return _shape(n, d, k, rng)


def _cut(value: NDArray[np.float64], k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Classes of a number: ranges with shares from a Dirichlet distribution, none below a twentieth."""
    shares = 0.05 + (1 - 0.05 * k) * rng.dirichlet(np.full(k, 3.0))
    return np.searchsorted(np.quantile(value, np.cumsum(shares)[:-1]), value)


def _graph(n: int, d: int, k: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray]:
    """Random nodes of a random layered graph; the label is one of them in ranges."""
    nodes = rng.normal(size=(n, max(3, d // 2)))
    for _ in range(int(rng.integers(1, 4))):
        weights = rng.normal(size=(nodes.shape[1], d + 2)) * (rng.random((nodes.shape[1], d + 2)) < 0.5)
        bend = (np.tanh, np.sin, lambda v: np.maximum(v, 0))[int(rng.integers(3))]
        layer = bend(nodes @ weights / np.sqrt(nodes.shape[1] / 2)) + rng.uniform(0, 0.3) * rng.normal(size=(n, d + 2))
        nodes = np.hstack([nodes, layer])
    order = rng.permutation(nodes.shape[1])
    return nodes[:, order[1 : d + 1]], _cut(nodes[:, order[0]], k, rng)


def _shape(n: int, d: int, k: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray]:
    """Rings, parities and checks in a few columns among others of noise."""
    X = rng.normal(size=(n, min(d, 20)))
    which, few = int(rng.integers(4)), int(rng.integers(2, 4))
    if which == 0:
        return X, _cut(np.linalg.norm(X[:, :few], axis=1), k, rng)
    if which == 1:
        return X, (X[:, :few] > 0).sum(1) % 2
    if which == 2:
        return X, np.floor(1.5 * X[:, :2]).sum(1).astype(int) % min(k, 3)
    centers = rng.normal(size=(4 * k, X.shape[1])) * 1.5
    which_center = rng.integers(4 * k, size=n)
    return centers[which_center] + X * rng.uniform(0.4, 1.2), which_center % k


def _real(number: int, n: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray, int]:
    """Some rows and columns of a set that comes with scikit-learn."""
    X, y = getattr(datasets, f"load_{_REAL[number % len(_REAL)]}")(return_X_y=True)
    if number % len(_REAL) == 0 and number % 3:  # digits: some classes only
        kept = rng.choice(10, size=int(rng.integers(2, 8)), replace=False)
        X, y = X[np.isin(y, kept)], y[np.isin(y, kept)]
    order = rng.permutation(len(X))
    columns = rng.permutation(X.shape[1])[: max(2, int(X.shape[1] * rng.uniform(0.15, 0.8)))]
    n = min(n, int(0.6 * len(X)))
    return X[order][:, np.sort(columns)].astype(np.float64), y[order], n


def _worn(X: NDArray, y: NDArray, rng: np.random.Generator, *, wear: bool) -> tuple[NDArray[np.float64], NDArray]:
    """Warp and scale columns, make gaps, change labels: as real tables are."""
    X, y, d = np.array(X, np.float64), np.array(y), X.shape[1]
    if wear:
        warps = np.asarray(rng.integers(4, size=d))
        for j in range(d):
            if int(warps[j]) == 1:
                X[:, j] = np.exp(np.clip(X[:, j] / (X[:, j].std() + 1e-12), -5, 5))
            elif int(warps[j]) == 2:
                X[:, j] = np.argsort(np.argsort(X[:, j]))
        X *= np.exp(rng.normal(0, 2, size=d))
    if rng.random() < 0.5:
        X[rng.random(X.shape) < rng.uniform(0, 0.2)] = np.nan
    noise = rng.uniform(0, 0.1) if rng.random() < 0.6 else 0.0
    wrong = rng.random(len(y)) < noise
    y[wrong] = rng.permutation(y)[: int(wrong.sum())]
    return X, y


def _some_categories(X: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """In a third of the tasks some columns become codes without order; 0 is a gap."""
    few: list[int] = []
    if rng.random() < 0.35:
        few = rng.permutation(X.shape[1])[: int(rng.integers(1, max(2, X.shape[1] // 2)))].tolist()
    codes = []
    for j in few:
        levels = int(rng.integers(2, 12))
        edges = np.nanquantile(X[:, j], np.linspace(0, 1, levels + 1)[1:-1])
        names = 1 + rng.permutation(levels)
        codes.append(np.where(np.isnan(X[:, j]), 0, names[np.searchsorted(edges, np.nan_to_num(X[:, j]))]))
    rest = np.setdiff1d(np.arange(X.shape[1]), np.asarray(few, int))
    return np.column_stack(codes).astype(np.int64) if codes else np.empty((len(X), 0), np.int64), X[:, rest]
