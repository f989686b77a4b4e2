"""The study's experiments: one function each, from a run's settings to its measurements.

Every learner sees one sample at a time, once, unless an experiment says otherwise. Learners are tuned inside the run:
each setting of a grid makes one pass over the first 80 % of the training data and is scored on the rest (or as the
experiment says); the best one then makes its pass over all of it. Test data is never looked at before the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from mlcollage.data.workload import Workload, arrays
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run

from .baselines import EpsilonGreedy, LinUCB, OnlineMLP, grid
from .network import GatedNetwork
from .sklearn import GLNClassifier

__all__ = ["EXPERIMENTS", "classification_data"]

Array = npt.NDArray[Any]
Split = tuple[Array, Array, Array, Array]
_PIXELS = 255.0  # images are learned from at the scale of the official code, with its offset of 1 to their deviation


def classification_data(run: Run, workload: Workload | None) -> Split:
    """Train and test arrays of the run, features in natural units, at most as many samples as its settings say."""
    rng = np.random.default_rng([run.seed, 1])
    if workload is not None:
        X, y = arrays(workload.train)
        X_test, y_test = arrays(workload.test)
        X, X_test = X.reshape(len(X), -1), X_test.reshape(len(X_test), -1)
    elif run.settings["data"] == "fashion_mnist":
        from mlcollage.data.fashion_mnist import load

        X, y, X_test, y_test = load()
    else:
        from mlcollage.data.digits import load_digits_split

        X, y, X_test, y_test = load_digits_split(seed=run.seed)
    if X.min() >= 0 and X.max() <= 1:
        X, X_test = X * _PIXELS, X_test * _PIXELS
    order = rng.permutation(len(X))[: run.integer("train")]
    keep = rng.permutation(len(X_test))[: run.integer("test")]
    return X[order], y[order], X_test[keep], y_test[keep]


def _hidden(run: Run) -> tuple[int, ...]:
    return tuple(int(width) for width in run.text("hidden").split("-"))


class _Scaled:
    """An :class:`OnlineMLP` behind fixed standardization: the baselines may know mean and spread beforehand."""

    def __init__(self, X: Array, classes: int, seed: int, setting: dict[str, Any]) -> None:
        self.mean, self.scale = X.mean(axis=0), X.std(axis=0) + 1.0
        self.model = OnlineMLP(X.shape[1], classes, seed=seed, **setting)

    def learn(self, X: Array, y: Array) -> Array:
        """Scores predicted before each sample was learned."""
        return self.model.learn((X - self.mean) / self.scale, y)

    def scores(self, X: Array) -> Array:
        """Scores of the classes."""
        return self.model.decision_function((X - self.mean) / self.scale)


class _Gated:
    """A :class:`GLNClassifier` with the same two methods."""

    def __init__(self, X: Array, classes: int, seed: int, setting: dict[str, Any], **options: Any) -> None:
        self.model = GLNClassifier(random_state=seed, **setting, **options)
        self.classes = np.arange(classes)

    def learn(self, X: Array, y: Array) -> Array:
        """Probabilities predicted before each sample was learned."""
        return self.model.progressive_predict(X, y, classes=self.classes)

    def scores(self, X: Array) -> Array:
        """Probabilities of the classes."""
        return self.model.predict_proba(X)


Learner = _Scaled | _Gated
Maker = Callable[[dict[str, Any]], Learner]


def _maker(run: Run, arm: str, X: Array, classes: int, **options: Any) -> Maker:
    def make(setting: dict[str, Any]) -> Learner:
        if arm == "gln":
            return _Gated(
                X, classes, run.seed, setting, hidden_layer_sizes=_hidden(run), **{"std_offset": 1.0, **options}
            )
        return _Scaled(X, classes, run.seed, setting)

    return make


def _right(scores: Array, y: Array) -> Array:
    return scores.argmax(axis=1) == y


def stream(run: Run, workload: Workload | None) -> Measurements:
    """One pass over a stream: accuracy on the way, accuracy on test data at the end, and a look inside."""
    X, y, X_test, y_test = classification_data(run, workload)
    classes = int(max(y.max(), y_test.max())) + 1
    make = _maker(run, run.arm, X, classes)
    cut, early = int(0.8 * len(X)), len(X) // 5
    held_out: list[float] = []
    on_the_way: list[float] = []
    for setting in grid(run.arm):
        learner = make(setting)
        learner.learn(X[:cut], y[:cut])
        held_out.append(float(_right(learner.scores(X[cut:]), y[cut:]).mean()))
        rehearsal = make(setting).learn(X[early : 2 * early], y[early : 2 * early])  # not the samples judged below
        on_the_way.append(float(_right(rehearsal, y[early : 2 * early]).mean()))
    best = grid(run.arm)[int(np.argmax(held_out))]
    learner = make(best)
    clock = time.perf_counter()
    right = _right(learner.learn(X, y), y)
    seconds = time.perf_counter() - clock
    quickest = make(grid(run.arm)[int(np.argmax(on_the_way))])
    m = Measurements()
    m.add("accuracy", float(_right(learner.scores(X_test), y_test).mean()))
    m.add("early_accuracy", float(_right(quickest.learn(X[:early], y[:early]), y[:early]).mean()))
    m.add("samples_per_second", len(X) / seconds)
    window = max(1, len(X) // 12)
    for end in range(window, len(X) + 1, window):
        m.add("progressive_accuracy", float(right[end - window : end].mean()), step=end)
    for name, value in best.items():
        if isinstance(value, float | int):
            m.add(f"chosen_{name}", value)
    if isinstance(learner, _Gated):
        _look_inside(m, run, learner.model, best, (X, y, X_test, y_test), classes)
    return m


def _look_inside(
    m: Measurements, run: Run, model: GLNClassifier, best: dict[str, Any], split: Split, classes: int
) -> None:
    """Layer by layer log-loss, and how exactly the saliency reproduces the output (in float64)."""
    X, y, X_test, y_test = split
    truth = (y_test[:, None] == np.arange(classes))[:, :, None]
    for layer, p in enumerate(model.layer_predictions(X_test), start=1):
        m.add("layer_log_loss", float(-np.where(truth, np.log(p), np.log1p(-p)).mean()), layer=layer)
    m.add("layers", layer)
    options = {"hidden_layer_sizes": _hidden(run), "std_offset": 1.0, "dtype": "float64"}
    precise = _Gated(X, classes, run.seed, best, **options)
    precise.learn(X, y)
    gln = precise.model
    free: Array = ~gln.clip_active(X_test)
    exact = np.einsum("nkd,nd->nk", gln.saliency(X_test), gln.base_logits(X_test))
    residual = np.abs(exact - gln._logits(X_test))  # of two classes, decision_function is the log-odds of their ratio
    m.add("linearity_share", float(free.mean()))
    if free.any():
        m.add("linearity_residual", float(residual[free].max()))
    if run.seed == 0:
        _example_saliency(m, gln, X_test, y_test)


def _example_saliency(m: Measurements, gln: GLNClassifier, X_test: Array, y_test: Array) -> None:
    """One correctly classified sample a class, for up to five classes: the input and what spoke for its class."""
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


def forget(run: Run, workload: Workload | None) -> Measurements:
    """Permuted tasks one after the other, one pass each; every task is tested after every task."""
    X, y, X_test, y_test = classification_data(run, workload)
    classes = int(max(y.max(), y_test.max())) + 1
    tasks = run.integer("tasks")
    rng = np.random.default_rng([run.seed, 2])
    orders = [np.arange(X.shape[1]), *(rng.permutation(X.shape[1]) for _ in range(tasks - 1))]
    if run.arm == "mlp":
        make, settings = _maker(run, "mlp", X, classes), grid("mlp")
    else:
        m_bits = int(run.arm.removeprefix("gln_m"))
        make = _maker(run, "gln", X, classes)
        settings = [{"context_dim": m_bits, "learning_rate": lr} for lr in (0.01, 0.03, 0.1)]
    cut = int(0.8 * len(X))
    # The baseline is tuned for what is judged: accuracy over all tasks at the end of the sequence.
    final = [float(np.mean(_sequence(make(s), orders, X[:cut], y[:cut], X[cut:], y[cut:])[-1])) for s in settings]
    accuracy = _sequence(make(settings[int(np.argmax(final))]), orders, X, y, X_test, y_test)
    m = Measurements()
    for after, row in enumerate(accuracy, start=1):
        for task, value in enumerate(row[:after], start=1):
            m.add("task_accuracy", value, task=task, after=after)
        m.add("mean_task_accuracy", float(np.mean(row[:after])), after=after)
    m.add("average_accuracy", float(np.mean(accuracy[-1])))
    m.add("retention", accuracy[-1][0])
    return m


def _sequence(
    learner: Learner, orders: Sequence[Array], X: Array, y: Array, X_test: Array, y_test: Array
) -> list[list[float]]:
    table = []
    for order in orders:
        learner.learn(X[:, order], y)
        table.append([float(_right(learner.scores(X_test[:, o]), y_test).mean()) for o in orders])
    return table


def capacity(run: Run, workload: Workload | None) -> Measurements:
    """How many random labels of noise a network of each size can learn, in several passes."""
    rng = np.random.default_rng([run.seed, 3])
    n, d, classes, passes = (run.integer(k) for k in ("samples", "inputs", "classes", "passes"))
    X, y = rng.uniform(0, _PIXELS, (n, d)), rng.integers(classes, size=n)
    m = Measurements()
    for size in (int(s) for s in run.text("sizes").split("-")):
        if run.arm == "gln":
            settings = [{"context_dim": 1, "learning_rate": lr} for lr in (0.01, 0.03, 0.1, 0.3)]
            learners: list[Learner] = [_Gated(X, classes, run.seed, s, hidden_layer_sizes=(size,)) for s in settings]
        else:  # as many hidden neurons as the one-vs-all networks have together
            settings = [{**s, "hidden": size * classes} for s in grid("mlp")[1::2]]
            learners = [_Scaled(X, classes, run.seed, s) for s in settings]
        fitted = []
        for learner in learners:
            for _ in range(passes):
                learner.learn(X, y)
            fitted.append(float(_right(learner.scores(X), y).mean()))
        m.add("memorized", max(fitted), size=size)
    return m


def regret(run: Run, workload: Workload | None) -> Measurements:
    """A single gated neuron against the best fixed weights a context, found in hindsight by convex optimization."""
    X, y, *_ = classification_data(run, workload)
    rng = np.random.default_rng([run.seed, 4])
    horizon = run.integer("horizon")
    draw = rng.integers(len(X), size=horizon)
    side = ((X - X.mean(axis=0)) / (X.std(axis=0) + 1.0))[draw]
    target = (y[draw] % 2).astype(float)  # odd against even
    network = GatedNetwork((1,), side.shape[1], side.shape[1], context_dim=2, dtype="float64", seed=run.seed)
    network.add_heads(1)
    limit = network.limit
    base = np.column_stack([np.full(horizon, network.bias), np.clip(side, -limit, limit)])
    predicted = network.learn(base, side, target[:, None], rate=lambda t: 0.1 / np.sqrt(t))[:, 0]
    online = np.cumsum(_log_loss(predicted, target))
    context = network.context_indices(side)[:, 0, 0]
    m = Measurements()
    times = np.unique(np.geomspace(horizon / 16, horizon, 9).astype(int))
    gaps = []
    for t in times:
        best = sum(_best_fixed_loss(base[:t][context[:t] == c], target[:t][context[:t] == c]) for c in range(4))
        gaps.append(online[t - 1] - best)
        m.add("regret", gaps[-1], step=int(t))
    positive = np.maximum(gaps, 1e-9)
    m.add("regret_slope", float(np.polyfit(np.log(times), np.log(positive), 1)[0]))
    return m


def _log_loss(a: Array, x: Array) -> Array:
    return np.logaddexp(0, a) - x * a


def _best_fixed_loss(inputs: Array, target: Array, box: float = 200.0) -> float:
    """Smallest total log-loss of fixed weights inside the box."""
    from scipy.optimize import minimize

    if not len(inputs):
        return 0.0

    def objective(w: Array) -> tuple[float, Array]:
        a = inputs @ w
        return float(_log_loss(a, target).sum()), inputs.T @ (expit(a) - target)

    start = np.zeros(inputs.shape[1])
    return float(minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(-box, box)] * len(start)).fun)


def density(run: Run, workload: Workload | None) -> Measurements:
    """Nats an image of binarized digits, predicted pixel after pixel in one pass."""
    from .sklearn import GLNDensity

    X, _, X_test, _ = classification_data(run, workload)
    middle = X.max() / 2
    bits, test = (middle < X).astype(int), (X_test > middle).astype(int)
    m = Measurements()
    if run.arm == "independent":
        p = (bits.sum(axis=0) + 1) / (len(bits) + 2)
        m.add("nats", float(-(test * np.log(p) + (1 - test) * np.log1p(-p)).sum(axis=1).mean()))
        return m
    hidden: tuple[int, ...] = () if run.arm == "autoregression" else (16, 8)
    context_dim = 0 if run.arm == "autoregression" else 4
    rates = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
    cut = int(0.8 * len(bits))

    def fit(rate: float, data: Array) -> GLNDensity:
        model = GLNDensity(hidden, context_dim=context_dim, learning_rate=rate, random_state=run.seed)
        return model.fit(data)

    scores = [float(fit(rate, bits[:cut]).score_samples(bits[cut:]).mean()) for rate in rates]
    m.add("nats", float(-fit(rates[int(np.argmax(scores))], bits).score_samples(test).mean()))
    return m


def regression(run: Run, workload: Workload | None) -> Measurements:
    """Root mean squared error and negative log-likelihood of standardized targets, on three data sets."""
    from sklearn.linear_model import BayesianRidge
    from sklearn.preprocessing import StandardScaler

    m, errors = Measurements(), []
    for name, (X, y, X_test, y_test) in _regression_sets(run).items():
        scaler, spread, center = StandardScaler().fit(X), float(y.std()), float(y.mean())
        X, X_test = scaler.transform(X), scaler.transform(X_test)
        y, y_test = (y - center) / spread, (y_test - center) / spread
        if run.arm == "bayesian_ridge":
            mean, std = BayesianRidge().fit(X, y).predict(X_test, return_std=True)
        else:
            mean, std = _gaussian_gln(run, X, y).predict(X_test, return_std=True)
        errors.append(float(np.sqrt(np.mean((mean - y_test) ** 2))))
        m.add("rmse", errors[-1], data=name)
        nll = 0.5 * np.log(2 * np.pi * std**2) + 0.5 * ((y_test - mean) / std) ** 2
        m.add("nll", float(np.mean(nll)), data=name)
    m.add("mean_log_rmse", float(np.mean(np.log(errors))))
    return m


def _gaussian_gln(run: Run, X: Array, y: Array) -> Any:
    from .sklearn import GLNRegressor

    cut = int(0.8 * len(X))
    settings = [{"context_dim": k, "learning_rate": lr} for k in (1, 2, 4, 6) for lr in (0.01, 0.03, 0.1)]

    def fit(setting: dict[str, Any], n: int) -> Any:
        return GLNRegressor(hidden_layer_sizes=_hidden(run), random_state=run.seed, **setting).fit(X[:n], y[:n])

    errors = [float(np.mean((fit(s, cut).predict(X[cut:]) - y[cut:]) ** 2)) for s in settings]
    return fit(settings[int(np.argmin(errors))], len(X))


def _regression_sets(run: Run) -> dict[str, Split]:
    from sklearn.datasets import load_diabetes, make_friedman1
    from sklearn.model_selection import train_test_split

    rng = np.random.default_rng([run.seed, 5])
    n = run.integer("train")
    x = rng.uniform(-3, 3, (n, 1))
    sets = {
        "diabetes": load_diabetes(return_X_y=True),
        "friedman1": make_friedman1(n, noise=1.0, random_state=run.seed),
        "sine": (x, np.sin(2 * x[:, 0]) + rng.normal(0, 0.2, n)),
    }
    return {
        name: (a, c, b, d)
        for name, (X, y) in sets.items()
        for a, b, c, d in [train_test_split(X, y, test_size=0.3, random_state=run.seed)]
    }


def bandit(run: Run, workload: Workload | None) -> Measurements:
    """Digits as a contextual bandit: the reward is 1 for the right class, and only the played action's is seen."""
    X, y, *_ = classification_data(run, workload)
    n_actions = int(y.max()) + 1
    X = np.column_stack([(X - X.mean(axis=0)) / (X.std(axis=0) + 1.0), np.ones(len(X))])
    rng = np.random.default_rng([run.seed, 6])
    tuning, horizon = run.integer("tuning"), run.integer("horizon")
    rehearsal, play = rng.integers(len(X), size=tuning), rng.integers(len(X), size=horizon)
    choices = _BANDIT_CONSTANTS[run.arm]
    lost = [_play(run, constant, X[rehearsal], y[rehearsal], n_actions)[-1] for constant in choices]
    constant = choices[int(np.argmin(lost))]
    curve = _play(run, constant, X[play], y[play], n_actions)
    m = Measurements()
    m.add("chosen_exploration", constant)
    m.add("bandit_regret", float(curve[-1]), step=horizon)
    for t in np.linspace(0, horizon, 21).astype(int)[1:-1]:
        m.add("bandit_regret", float(curve[t - 1]), step=int(t))
    return m


_BANDIT_CONSTANTS = {
    "glcb": (0.0, 0.03, 0.1, 0.3),
    "linucb": (0.0, 0.1, 0.3, 1.0),
    "epsilon_greedy": (0.0, 0.02, 0.05, 0.1),
}


def _play(run: Run, constant: float, X: Array, y: Array, n_actions: int) -> Array:
    """Cumulative number of wrong actions."""
    policy: Any
    if run.arm == "glcb":
        from .bandit import GLNBandit

        policy = GLNBandit(n_actions, X.shape[1], exploration=constant, context_dim=4, random_state=run.seed)
    elif run.arm == "linucb":
        policy = LinUCB(n_actions, X.shape[1], alpha=constant, seed=run.seed)
    else:
        policy = EpsilonGreedy(n_actions, X.shape[1], epsilon=constant, seed=run.seed)
    wrong = np.empty(len(X))
    for t, (z, label) in enumerate(zip(X, y, strict=True)):
        action = int(policy.select(z))
        policy.update(z, action, float(action == label))
        wrong[t] = action != label
    return np.cumsum(wrong)


def tables(run: Run, workload: Workload | None) -> Measurements:
    """Small tables: one online pass against methods that see all data at once."""
    from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
    from sklearn.model_selection import train_test_split

    loaders = {"breast_cancer": load_breast_cancer, "digits": load_digits, "iris": load_iris, "wine": load_wine}
    m, accuracies = Measurements(), []
    for name, load in loaders.items():
        X, y = load(return_X_y=True)
        split = train_test_split(X, y, test_size=0.3, random_state=run.seed, stratify=y)
        if run.settings.get("limit"):
            split = [part[: run.integer("limit")] for part in split]
        X, X_test, y, y_test = split
        if run.arm == "gln":
            make = _maker(run, "gln", X, int(y.max()) + 1, std_offset=0.0)
            cut = int(0.8 * len(X))
            scores = []
            for setting in grid("gln"):
                learner = make(setting)
                learner.learn(X[:cut], y[:cut])
                scores.append(float(_right(learner.scores(X[cut:]), y[cut:]).mean()))
            learner = make(grid("gln")[int(np.argmax(scores))])
            learner.learn(X, y)
            accuracy = float(_right(learner.scores(X_test), y_test).mean())
        else:
            accuracy = float(_batch_model(run).fit(X, y).score(X_test, y_test))
        accuracies.append(accuracy)
        m.add("table_accuracy", accuracy, data=name)
    m.add("mean_table_accuracy", float(np.mean(accuracies)))
    return m


def _batch_model(run: Run) -> Any:
    """The batch methods, tuned by three-fold cross-validation where they have a constant that matters."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import GridSearchCV
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    if run.arm == "svm":
        return GridSearchCV(make_pipeline(StandardScaler(), SVC()), {"svc__C": [1.0, 10.0]}, cv=3)
    if run.arm == "boosting":
        return HistGradientBoostingClassifier(max_iter=60, random_state=run.seed)
    mlp = MLPClassifier((64,), max_iter=1000, random_state=run.seed)
    return make_pipeline(StandardScaler(), mlp)


def surface(run: Run, workload: Workload | None) -> Measurements:
    """Two half-moons in the plane: what the neurons of each layer predict after one pass."""
    from sklearn.datasets import make_moons

    X, y = make_moons(run.integer("train"), noise=0.15, random_state=run.seed)
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    model = GLNClassifier((16, 8), context_dim=4, learning_rate=0.03, context_bias_scale=1.0, random_state=run.seed)
    model.fit(X, y)
    axis = np.linspace(-2.5, 2.5, 61)
    plane = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    m = Measurements()
    for layer, p in enumerate(model.layer_predictions(plane), start=1):
        m.array(f"layer{layer}", expit(logit(p[:, -1]).mean(axis=-1)).reshape(61, 61))
        m.array(f"neuron{layer}", p[:, -1, 0].reshape(61, 61))
        m.add("surface_layer", layer, step=layer)
    m.array("points", X[:300])
    m.array("labels", y[:300])
    m.add("surface_accuracy", float(model.score(X, y)))
    return m


EXPERIMENTS: dict[str, Callable[[Run, Workload | None], Measurements]] = {
    f.__name__: f for f in (stream, forget, capacity, regret, density, regression, bandit, tables, surface)
}
