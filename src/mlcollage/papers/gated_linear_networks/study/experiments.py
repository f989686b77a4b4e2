"""The study's experiments: one function each, from a run's settings to its measurements.

Every learner sees one sample at a time, once, unless an experiment says otherwise. Learners are tuned inside the run:
each setting of a grid makes one pass over the first 80 % of the training data and is scored on the rest (or as the
experiment says); the best one then makes its pass over all of it. Test data is never looked at before the end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from mlcollage.lab import Measurements, Task

from ..sklearn import GLNClassifier
from .data import Split, classification_data
from .models import Gated, Rival, best, grid, held_out_accuracy, inputs, learner, right

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Stream:
    """One online pass over a classification set."""

    data: str = "digits"  # digits, fashion_mnist or workload
    train: int = 1257  # samples learned from, each once
    test: int = 540  # samples tested on at the end
    hidden: tuple[int, ...] = (50, 25)  # neurons per layer of the GLN, for each class


def stream(task: Task[Stream]) -> Measurements:
    """One pass over a stream: accuracy on the way, accuracy on test data at the end, and a look inside."""
    s = task.settings
    raw = classification_data(task.seed, s.train, s.test, data=s.data, workload=task.workload)
    X, y, X_test, y_test, _ = split = inputs(task.arm, raw)
    make = partial(learner, task.arm, split, task.seed, hidden_layer_sizes=s.hidden)
    early = len(X) // 5

    def on_the_way(setting: dict[str, Any]) -> float:
        other = slice(early, 2 * early)  # not the samples judged below
        return float(right(make(setting).learn(X[other], y[other]), y[other]).mean())

    chosen = best(grid(task.arm), lambda setting: held_out_accuracy(make(setting), X, y))
    model, quickest = make(chosen), make(best(grid(task.arm), on_the_way))
    clock = time.perf_counter()
    hits = right(model.learn(X, y), y)
    seconds = time.perf_counter() - clock
    m = Measurements()
    m.add("accuracy", float(right(model.scores(X_test), y_test).mean()))
    m.add("early_accuracy", float(right(quickest.learn(X[:early], y[:early]), y[:early]).mean()))
    m.add("samples_per_second", len(X) / seconds)
    window = max(1, len(X) // 12)
    for end in range(window, len(X) + 1, window):
        m.add("progressive_accuracy", float(hits[end - window : end].mean()), step=end)
    for name, value in chosen.items():
        if isinstance(value, float | int):
            m.add(f"chosen_{name}", value)
    if isinstance(model, Gated):
        precise = make({**chosen, "dtype": "float64"})
        assert isinstance(precise, Gated)
        _look_inside(m, model.model, precise, split, example=task.seed == 0)
    return m


def _look_inside(m: Measurements, gln: GLNClassifier, precise: Gated, split: Split, *, example: bool) -> None:
    """Layer by layer log-loss, and how exactly the saliency of ``precise`` (in float64) reproduces its output."""
    X, y, X_test, y_test, _ = split
    truth = (y_test[:, None] == np.arange(split.classes))[:, :, None]  # (n, classes, 1), against (n, classes, K_l)
    for layer, p in enumerate(gln.layer_predictions(X_test), start=1):
        m.add("layer_log_loss", float(-np.where(truth, np.log(p), np.log1p(-p)).mean()), layer=layer)
    precise.learn(X, y)
    gln = precise.model
    free: Array = ~gln.clip_active(X_test)
    exact = np.einsum("nkd,nd->nk", gln.saliency(X_test), gln.base_logits(X_test))
    residual = np.abs(exact - gln._logits(X_test))  # of two classes, decision_function is the log-odds of their ratio
    m.add("linearity_share", float(free.mean()))
    if free.any():
        m.add("linearity_residual", float(residual[free].max()))
    if example:
        _example_saliency(m, gln, X_test, y_test)


def _example_saliency(m: Measurements, gln: GLNClassifier, X_test: Array, y_test: Array) -> None:
    """One correctly classified sample per class, for up to five classes: the input and what spoke for its class."""
    guess = gln.predict(X_test)
    sure = gln.predict_proba(X_test).max(axis=1)
    chosen = [
        int(np.flatnonzero(hits)[np.argmax(sure[hits])])
        for c in range(min(5, int(y_test.max()) + 1))
        if (hits := (guess == c) & (y_test == c)).any()
    ]
    if not chosen:
        return
    weights = gln.saliency(X_test[chosen])
    inputs = gln.base_logits(X_test[chosen])
    spoke = np.stack([weights[i, y_test[c], 1:] * inputs[i, 1:] for i, c in enumerate(chosen)])
    m.array("saliency_input", X_test[chosen])
    m.array("saliency", spoke)
    m.array("saliency_label", y_test[chosen])


@dataclass(frozen=True)
class Forget:
    """Tasks one after the other: the same set with its features permuted."""

    data: str = "digits"  # digits, fashion_mnist or workload
    train: int = 1257  # samples per task, each once
    test: int = 540  # samples per task that it is tested on
    hidden: tuple[int, ...] = (50, 25)  # neurons per layer of the GLN, for each class
    tasks: int = 4  # the first one is not permuted


def forget(task: Task[Forget]) -> Measurements:
    """Permuted tasks one after the other, one pass each; every task is tested after every task."""
    s = task.settings
    raw = classification_data(task.seed, s.train, s.test, data=s.data, workload=task.workload)
    # Permuted features trade places: they are standardized before, and those of a table for the method too.
    X, y, X_test, y_test, _ = split = inputs(task.arm, raw) if raw.offset else raw.standardized()
    rng = np.random.default_rng([task.seed, 2])
    orders = [np.arange(X.shape[1]), *(rng.permutation(X.shape[1]) for _ in range(s.tasks - 1))]
    settings = grid(task.arm)
    if task.arm.startswith("gln"):
        half_spaces = int(task.arm.removeprefix("gln_m"))
        settings = [{"context_dim": half_spaces, "learning_rate": lr} for lr in (0.01, 0.03, 0.1)]
    make = partial(learner, task.arm, split, task.seed, hidden_layer_sizes=s.hidden)
    cut = int(0.8 * len(X))

    def at_the_end(setting: dict[str, Any]) -> float:
        """Tuned for what is judged: accuracy over all tasks at the end of the sequence."""
        return float(np.mean(_sequence(make(setting), orders, X[:cut], y[:cut], X[cut:], y[cut:])[-1]))

    model = make(best(settings, at_the_end))
    accuracy = _sequence(model, orders, X, y, X_test, y_test)
    m = Measurements()
    m.add("numbers_kept", model.kept)
    for after, row in enumerate(accuracy, start=1):
        for number, value in enumerate(row[:after], start=1):
            m.add("task_accuracy", value, task=number, after=after)
        m.add("mean_task_accuracy", float(np.mean(row[:after])), after=after)
    m.add("average_accuracy", float(np.mean(accuracy[-1])))
    m.add("retention", accuracy[-1][0])
    return m


def _sequence(
    model: Gated | Rival, orders: Sequence[Array], X: Array, y: Array, X_test: Array, y_test: Array
) -> list[list[float]]:
    """Test accuracy on every task, after each task."""
    table = []
    for order in orders:
        model.learn(X[:, order], y)
        model.end_task(X[:, order])
        table.append([float(right(model.scores(X_test[:, o]), y_test).mean()) for o in orders])
    return table


@dataclass(frozen=True)
class Capacity:
    """Random labels of uniform noise, learned in several passes."""

    samples: int = 300  # vectors of noise
    inputs: int = 32  # features of a vector
    classes: int = 10  # labels drawn from
    passes: int = 20  # over the data
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # neurons of the hidden layer, for each class


def capacity(task: Task[Capacity]) -> Measurements:
    """How many random labels of noise a network of each size can learn, in several passes."""
    s = task.settings
    rng = np.random.default_rng([task.seed, 3])
    X, y = rng.uniform(size=(s.samples, s.inputs)), rng.integers(s.classes, size=s.samples)
    split, m = inputs(task.arm, Split(X, y, X, y)), Measurements()
    for size in s.sizes:
        if task.arm == "gln":
            settings = [{"context_dim": 1, "learning_rate": lr} for lr in (0.01, 0.03, 0.1, 0.3)]
        else:  # as many hidden neurons as the one-vs-all networks have together
            settings = [{**setting, "hidden": size * s.classes} for setting in grid("mlp")[1::2]]
        fitted = []
        for setting in settings:
            model = learner(task.arm, split, task.seed, setting, hidden_layer_sizes=(size,))
            for _ in range(s.passes):
                model.learn(split.X, y)
            fitted.append(float(right(model.scores(split.X), y).mean()))
        m.add("memorized", max(fitted), size=size)
    return m


@dataclass(frozen=True)
class Tables:
    """Four small tables: breast cancer, digits, iris and wine."""

    hidden: tuple[int, ...] = (50, 25)  # neurons per layer of the GLN, for each class
    limit: int | None = None  # at most so many samples to train and to test on


def tables(task: Task[Tables]) -> Measurements:
    """Small tables: one online pass against methods that see all data at once."""
    from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
    from sklearn.model_selection import train_test_split

    s = task.settings
    loaders = {"breast_cancer": load_breast_cancer, "digits": load_digits, "iris": load_iris, "wine": load_wine}
    m, accuracies = Measurements(), []
    for name, load in loaders.items():
        X, y = load(return_X_y=True)
        split = train_test_split(X, y, test_size=0.3, random_state=task.seed, stratify=y)
        X, X_test, y, y_test = (part[: s.limit] for part in split)
        if task.arm == "gln":
            accuracy = _one_pass_accuracy(task, Split(X, y, X_test, y_test))
        else:
            accuracy = float(_batch_model(task).fit(X, y).score(X_test, y_test))
        accuracies.append(accuracy)
        m.add("table_accuracy", accuracy, data=name)
    m.add("mean_table_accuracy", float(np.mean(accuracies)))
    return m


def _one_pass_accuracy(task: Task[Tables], split: Split) -> float:
    make = partial(learner, "gln", split, task.seed, hidden_layer_sizes=task.settings.hidden)
    model = make(best(grid("gln"), lambda setting: held_out_accuracy(make(setting), split.X, split.y)))
    model.learn(split.X, split.y)
    return float(right(model.scores(split.X_test), split.y_test).mean())


def _batch_model(task: Task[Tables]) -> Any:
    """The batch methods, tuned by three-fold cross-validation where they have a constant that matters."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import GridSearchCV
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    if task.arm == "svm":
        return GridSearchCV(make_pipeline(StandardScaler(), SVC()), {"svc__C": [1.0, 10.0]}, cv=3)
    if task.arm == "boosting":
        return HistGradientBoostingClassifier(max_iter=60, random_state=task.seed)
    mlp = MLPClassifier((64,), max_iter=1000, random_state=task.seed)
    return make_pipeline(StandardScaler(), mlp)


@dataclass(frozen=True)
class Surface:
    """The picture: two half-moons in the plane."""

    train: int = 3000  # points learned from


def surface(task: Task[Surface]) -> Measurements:
    """Two half-moons in the plane: what the neurons of each layer predict after one pass."""
    from sklearn.datasets import make_moons

    X, y = make_moons(task.settings.train, noise=0.15, random_state=task.seed)
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    model = GLNClassifier((16, 8), context_dim=4, learning_rate=0.03, context_bias_scale=1.0, random_state=task.seed)
    model.fit(X, y)
    axis = np.linspace(-2.5, 2.5, 61)
    plane = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    m = Measurements()
    for layer, p in enumerate(model.layer_predictions(plane), start=1):
        m.array(f"layer{layer}", expit(logit(p[:, -1]).mean(axis=-1)).reshape(61, 61))
        m.add("surface_layer", layer, step=layer)
    m.array("points", X[:300])
    m.array("labels", y[:300])
    m.add("surface_accuracy", float(model.score(X, y)))
    return m
