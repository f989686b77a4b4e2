"""Speed and accuracy of the gated linear network classifier beside its peers, in one run.

``mlcollage bench gated_linear_networks`` prints the table. All learn online, one sample at a time, from the same
stream: ours, river's logistic regression (one-vs-rest on standardized features), and a straightforward numpy network of
the same layers (16-16-1, four hyperplanes, ten classes). One core unless a row says otherwise; ``fit`` is timed whole.
The ratio is to the row called baseline. Last come the bytes of first-layer weights that ``fit`` reads and writes in a
second, beside a STREAM-like triad on arrays of the same size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from mlcollage.data import fashion_mnist
from mlcollage.data.digits import load_digits_split
from mlcollage.errors import MissingDependency
from mlcollage.papers.gated_linear_networks import GLNClassifier

Array = NDArray[Any]
Row = dict[str, Any]
Split = tuple[Array, Array, Array, Array]

SIZES, CONTEXT_DIM, RATE = (16, 16), 4, 0.02


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio."""
    rows = []
    with threadpool_limits(1):
        for what, data in (("digits, 64 features", load_digits_split()), _images()):
            rows += _compare(what, data, quick)
    return rows


def _images() -> tuple[str, Split]:
    """Fashion-MNIST where it is installed, else the digits enlarged to 28 x 28."""
    if fashion_mnist.find() is not None:
        return "Fashion-MNIST, 784 features", fashion_mnist.load()
    X, y, X_test, y_test = load_digits_split()
    nearest = np.arange(28) * 8 // 28
    large = [x.reshape(-1, 8, 8)[:, nearest][:, :, nearest].reshape(-1, 784) for x in (X, X_test)]
    return "digits enlarged to 784 features", (large[0], y, large[1], y_test)


class NumpyGLN:
    """The method as it is written down, with numpy: a loop over samples and layers, arrays over classes and neurons."""

    def __init__(self, d: int, classes: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.sizes = (*SIZES, 1)
        fans = (d + 1, *(k + 1 for k in SIZES))
        self.planes = [rng.normal(size=(classes, k, CONTEXT_DIM, d)).astype(np.float32) for k in self.sizes]
        self.planes = [v / np.linalg.norm(v, axis=-1, keepdims=True) for v in self.planes]
        self.thresholds = [0.05 * rng.normal(size=v.shape[:3]).astype(np.float32) for v in self.planes]
        self.weights = [
            np.full((classes, k, 2**CONTEXT_DIM, f), 1 / f, np.float32) for k, f in zip(self.sizes, fans, strict=True)
        ]
        self.count, self.mean, self.square = 0, np.zeros(d), np.zeros(d)
        self.limit, self.classes = float(np.log(99)), np.arange(classes)

    def step(self, x: Array, y: int) -> int:
        """Predict, then learn."""
        self.count += 1
        delta = x - self.mean
        self.mean += delta / self.count
        self.square += delta * (x - self.mean)
        std = np.sqrt(self.square / self.count)
        z = np.divide(x - self.mean, std, out=np.zeros_like(std), where=std > 0).astype(np.float32)
        target = (self.classes == y).astype(np.float32)[:, None]
        ones = np.ones((len(self.classes), 1), np.float32)
        values = np.concatenate([ones, np.tile(np.clip(z, -self.limit, self.limit), (len(ones), 1))], axis=1)
        for k, planes, thresholds, table in zip(self.sizes, self.planes, self.thresholds, self.weights, strict=True):
            context = (planes @ z > thresholds) @ (1 << np.arange(CONTEXT_DIM))
            where = (self.classes[:, None], np.arange(k), context)
            rows = table[where]
            raw = np.einsum("ckf,cf->ck", rows, values)
            error = 1 / (1 + np.exp(-raw)) - target
            table[where] = np.clip(rows - RATE * error[:, :, None] * values[:, None], -200, 200)
            values = np.concatenate([ones, np.clip(raw, -self.limit, self.limit)], axis=1)
        return int(raw[:, 0].argmax())


def _compare(what: str, data: Split, quick: bool) -> list[Row]:
    X, y, X_test, y_test = data
    few = min(len(X), (1200 if X.shape[1] <= 64 else 500) if quick else 5000)
    tested = X_test[:few]
    rows = []
    settings: dict[str, Any] = {
        "hidden_layer_sizes": SIZES,
        "context_dim": CONTEXT_DIM,
        "learning_rate": RATE,
        "random_state": 0,
    }
    naive = NumpyGLN(X.shape[1], 10)
    seconds, right = _progressive(naive.step, X[:few], y[:few])
    base = few / seconds
    rows.append(_row("numpy network (baseline)", f"{what}: learn", base, "samples/s", 1.0))
    rows.append(_row("numpy network", f"{what}: progressive accuracy of {few} samples", right, "fraction"))
    step, predict = _river()
    seconds, right = _progressive(step, X[:few], y[:few])
    hits = float(np.mean([predict(x) == label for x, label in zip(tested, y_test[:few], strict=True)]))
    rows.append(_row("river logistic regression", f"{what}: learn", few / seconds, "samples/s", few / seconds / base))
    rows.append(_row("river logistic regression", f"{what}: progressive accuracy of {few} samples", right, "fraction"))
    rows.append(_row("river logistic regression", f"{what}: test accuracy after {few} samples", hits, "fraction"))
    progressive = GLNClassifier(**settings).progressive_predict(X[:few], y[:few], classes=np.arange(10))
    right = float((progressive.argmax(axis=1) == y[:few]).mean())
    hits = GLNClassifier(**settings).fit(X[:few], y[:few]).score(tested, y_test[:few])
    rows.append(_row("GLNClassifier", f"{what}: progressive accuracy of {few} samples", right, "fraction"))
    rows.append(_row("GLNClassifier", f"{what}: test accuracy after {few} samples", hits, "fraction"))
    whole = GLNClassifier(**settings).fit(X, y).score(X_test, y_test)
    rows.append(_row("GLNClassifier", f"{what}: test accuracy after one pass of {len(X)}", whole, "fraction"))
    many = 10_000 if quick else 60_000
    index = np.arange(many) % len(X)
    stream, labels = np.ascontiguousarray(X[index]), y[index]
    speed = {}
    for jobs in sorted({1, os.cpu_count() or 1}):
        seconds = _best(lambda jobs=jobs: GLNClassifier(n_jobs=jobs, **settings).fit(stream, labels), 3)
        speed[jobs] = many / seconds
        name = f"GLNClassifier, {jobs} thread{'s' if jobs > 1 else ''}"
        rows.append(_row(name, f"{what}: fit of {many} samples", speed[jobs], "samples/s", speed[jobs] / base))
    row_bytes = SIZES[0] * (X.shape[1] + 1) * 4
    moved = speed[1] * 10 * 2 * row_bytes / 1e9
    triad = _triad(row_bytes * 2**CONTEXT_DIM)
    rows.append(_row("STREAM-like triad (baseline)", f"{what}: arrays of one class's first layer", triad, "GB/s", 1.0))
    rows.append(_row("GLNClassifier, 1 thread", f"{what}: first-layer rows, whole fit", moved, "GB/s", moved / triad))
    return rows


def _progressive(step: Callable[[Array, int], int], X: Array, y: Array) -> tuple[float, float]:
    start = time.perf_counter()
    right = [step(x, label) == label for x, label in zip(X, y, strict=True)]
    return time.perf_counter() - start, float(np.mean(right))


def _river() -> tuple[Callable[[Array, int], int], Callable[[Array], int]]:
    try:
        from river import linear_model, multiclass, preprocessing
    except ImportError as error:
        raise MissingDependency("This benchmark needs river: pip install 'mlcollage[bench]'.") from error
    model = preprocessing.StandardScaler() | multiclass.OneVsRestClassifier(linear_model.LogisticRegression())

    def predict(x: Array) -> int:
        answer = model.predict_one(dict(enumerate(x.tolist())))
        return -1 if answer is None else int(answer)

    def step(x: Array, y: int) -> int:
        answer = predict(x)
        model.learn_one(dict(enumerate(x.tolist())), int(y))
        return answer

    return step, predict


def _triad(size: int) -> float:
    """GB/s of ``a = b + s c`` in float32 on arrays of ``size`` bytes each, two read and one written."""
    n = size // 4
    b, c, a = np.ones(n, np.float32), np.ones(n, np.float32), np.empty(n, np.float32)

    @numba.njit
    def triad(a, b, c, s, repeats):  # type: ignore[no-untyped-def]
        for _ in range(repeats):
            for i in range(a.shape[0]):
                a[i] = b[i] + s * c[i]
            s += np.float32(1)

    repeats = max(1, int(2e8) // size)
    return 3 * size * repeats / _best(lambda: triad(a, b, c, np.float32(0.5), repeats), 3) / 1e9


def _best(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest repetition, after one that compiles."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


if __name__ == "__main__":
    from mlcollage.lab.bench import to_markdown

    print(to_markdown(bench()))
