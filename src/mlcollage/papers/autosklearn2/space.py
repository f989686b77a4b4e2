"""The space of pipelines: learners that fit iteratively, and how the table is prepared for them (section 2.1, Table 1).

A configuration is a plain dictionary, ``{"learner": "extra_trees", "extra_trees:criterion": "gini", ...}``. It holds
the value of every hyperparameter that is active, and of no other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput

Value = str | int | float | bool
Config = dict[str, Value]
Kind = Literal["classification", "regression"]


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter: a choice, or a number between bounds.

    Parameters
    ----------
    name
        Its key in a configuration.
    choices
        Its values if it is a choice; empty for numbers.
    low, high
        Bounds of a number, both included.
    default
        Its value in the default configuration.
    log
        Whether it is drawn, and compared, on a logarithmic scale.
    whole
        Whether it is a whole number.
    parent, when
        It is active only where the hyperparameter ``parent`` has one of the values ``when``.

    Examples
    --------
    >>> rate = Hyperparameter("rate", low=0.01, high=1.0, default=0.1, log=True)
    >>> rate.unit(0.1), rate.value(0.5)
    (0.5, 0.1)
    """

    name: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 1.0
    default: Value = 0.0
    log: bool = False
    whole: bool = False
    parent: str | None = None
    when: tuple[Value, ...] = ()

    def value(self, u: float) -> Value:
        """The value at a place in [0, 1]."""
        if self.choices:
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        low, high = (self.low - 0.5, self.high + 0.4999) if self.whole else (self.low, self.high)
        if self.log:
            low = max(low, 0.5) if self.whole else low
            x = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
        else:
            x = low + u * (high - low)
        x = min(max(x, self.low), self.high)
        return round(x) if self.whole else float(f"{x:.12g}")

    def unit(self, value: Value) -> float:
        """The place of a value in [0, 1]: the inverse of :meth:`value` up to rounding."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        x, low, high = float(value), self.low, self.high
        if self.high == self.low:
            return 0.5
        if self.log:
            return (math.log(x) - math.log(low)) / (math.log(high) - math.log(low))
        return (x - low) / (high - low)

    def holds(self, value: object) -> bool:
        """Whether a value is one that it can have."""
        if self.choices:
            return any(type(value) is type(c) and value == c for c in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            return False
        if self.whole and float(value) != int(value):
            return False
        return self.low <= float(value) <= self.high

    def expected(self) -> str:
        """What its values are, in words."""
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        return f"a {'whole ' if self.whole else ''}number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class SearchSpace:
    """A tree of hyperparameters.

    Parameters
    ----------
    parameters
        Parents stand before their children.

    Examples
    --------
    >>> space = pipeline_space("classification")
    >>> config = space.sample(np.random.default_rng(0))
    >>> space.check(config) == config, space.default()["learner"]
    (True, 'gradient_boosting')
    """

    parameters: tuple[Hyperparameter, ...]

    def __getitem__(self, name: str) -> Hyperparameter:
        return next(p for p in self.parameters if p.name == name)

    def is_active(self, p: Hyperparameter, config: Mapping[str, Value]) -> bool:
        """Whether a hyperparameter has a meaning, given the values of its parents."""
        return p.parent is None or (p.parent in config and config[p.parent] in p.when)

    def default(self) -> Config:
        """The default configuration."""
        return self._complete({})

    def sample(self, rng: np.random.Generator) -> Config:
        """Draw a configuration; every hyperparameter uniformly on its scale."""
        draws = {p.name: p.value(float(rng.random())) for p in self.parameters}
        return self._complete(draws)

    def _complete(self, values: Mapping[str, Value]) -> Config:
        config: Config = {}
        for p in self.parameters:
            if self.is_active(p, config):
                config[p.name] = values.get(p.name, p.default)
        return config

    def neighbors(self, config: Mapping[str, Value], rng: np.random.Generator, count: int = 8) -> list[Config]:
        """Configurations that differ in one hyperparameter: another choice, or a number moved by a normal of 0.2."""
        active = [p for p in self.parameters if p.name in config and (len(p.choices) != 1)]
        found = []
        for _ in range(count):
            p = active[int(rng.integers(len(active)))]
            if p.choices:
                rest = [c for c in p.choices if c != config[p.name]]
                value: Value = rest[int(rng.integers(len(rest)))]
            else:
                value = p.value(float(np.clip(p.unit(config[p.name]) + 0.2 * rng.normal(), 0, 1)))
            found.append(self._complete({**config, p.name: value}))
        return found

    def vector(self, config: Mapping[str, Value]) -> NDArray[np.float64]:
        """A configuration as numbers: the place of each value in [0, 1], and -1 where inactive."""
        return np.array([p.unit(config[p.name]) if p.name in config else -1.0 for p in self.parameters])

    def check(self, config: Mapping[str, Any], where: str = "the configuration") -> Config:
        """Refuse a configuration that is not in the space; fill in defaults of what it leaves out.

        Raises
        ------
        InvalidInput
            If a key is unknown or inactive, or a value is not one that it can have.
        """
        if not isinstance(config, Mapping):
            raise InvalidInput(f"{where} must be a dictionary of hyperparameters, not {type(config).__name__}.")
        known = {p.name: p for p in self.parameters}
        for key, value in config.items():
            if key not in known:
                raise InvalidInput(f"{where} has the key {key!r} = {value!r}, which is not in the search space.")
            if not known[key].holds(value):
                raise InvalidInput(f"{where} has {key!r} = {value!r}; expected {known[key].expected()}.")
        complete = self._complete(config)
        if idle := [key for key in config if key not in complete]:
            p = known[idle[0]]
            raise InvalidInput(
                f"{where} has {idle[0]!r}, which has a meaning only where {p.parent!r} is one of {p.when}; drop it."
            )
        return complete

    def only(self, learners: Sequence[str]) -> SearchSpace:
        """The part of the space with these learners."""
        of_all = self["learner"].choices
        if unknown := [name for name in learners if name not in of_all]:
            raise InvalidInput(f"there is no learner {unknown[0]!r}; there are {', '.join(map(str, of_all))}.")
        if not learners:
            raise InvalidInput(f"include names no learner; there are {', '.join(map(str, of_all))}.")
        kept = tuple(name for name in of_all if name in learners)
        first = self["learner"]
        default = first.default if first.default in kept else kept[0]
        out = [Hyperparameter("learner", kept, default=default)]
        for p in self.parameters:
            if p.name != "learner" and (p.parent != "learner" or set(p.when) & set(kept)):
                out.append(p)
        names = {p.name for p in out}
        return SearchSpace(tuple(p for p in out if p.parent is None or p.parent in names))


def config_id(config: Mapping[str, Value]) -> str:
    """A short name of a configuration, the same on every machine.

    Examples
    --------
    >>> config_id({"a": 1}) == config_id({"a": 1}), len(config_id({"a": 1}))
    (True, 10)
    """
    return hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode()).hexdigest()[:10]


LEARNERS: dict[Kind, tuple[str, ...]] = {
    "classification": ("random_forest", "extra_trees", "gradient_boosting", "mlp", "sgd", "passive_aggressive"),
    "regression": ("random_forest", "extra_trees", "gradient_boosting", "mlp", "sgd"),
}
"""Names of the learners."""
FULL_ITERATIONS = {
    "random_forest": 512,
    "extra_trees": 512,
    "gradient_boosting": 512,
    "mlp": 512,
    "sgd": 1024,
    "passive_aggressive": 1024,
}
"""Iterations of a full fit: trees, boosting rounds, passes over the rows."""


def _choice(name: str, choices: Iterable[Value], default: Value, **more: Any) -> Hyperparameter:
    return Hyperparameter(name, tuple(choices), default=default, **more)


def _number(name: str, low: float, high: float, default: float, **more: Any) -> Hyperparameter:
    return Hyperparameter(name, (), low, high, default, **more)


def _of(learner: str, kind: Kind) -> list[Hyperparameter]:
    """The hyperparameters of one learner."""
    at: dict[str, Any] = {"parent": "learner", "when": (learner,)}

    def choice(name: str, choices: Iterable[Value], default: Value, **more: Any) -> Hyperparameter:
        return _choice(f"{learner}:{name}", choices, default, **{**at, **more})

    def number(name: str, low: float, high: float, default: float, **more: Any) -> Hyperparameter:
        return _number(f"{learner}:{name}", low, high, default, **{**at, **more})

    def if_(name: str, *values: Value) -> dict[str, Any]:
        return {"parent": f"{learner}:{name}", "when": values}

    if learner in ("random_forest", "extra_trees"):
        criteria = ("gini", "entropy") if kind == "classification" else ("squared_error",)
        return [
            choice("bootstrap", (True, False), learner == "random_forest"),
            choice("criterion", criteria, criteria[0]),
            number("max_features", 0, 1, 0.5),
            number("min_samples_leaf", 1, 20, 1, whole=True),
            number("min_samples_split", 2, 20, 2, whole=True),
        ]
    if learner == "gradient_boosting":
        return [
            number("learning_rate", 0.01, 1, 0.1, log=True),
            number("max_leaf_nodes", 3, 2047, 31, log=True, whole=True),
            number("min_samples_leaf", 1, 200, 20, log=True, whole=True),
            number("l2_regularization", 1e-10, 1, 1e-10, log=True),
            choice("early_stop", ("off", "valid", "train"), "off"),
            number("n_iter_no_change", 1, 20, 10, whole=True, **if_("early_stop", "valid", "train")),
            number("validation_fraction", 0.01, 0.4, 0.1, **if_("early_stop", "valid")),
        ]
    if learner == "mlp":
        return [
            choice("activation", ("tanh", "relu"), "relu"),
            number("alpha", 1e-7, 0.1, 1e-4, log=True),
            number("hidden_layer_depth", 1, 3, 1, whole=True),
            number("num_nodes_per_layer", 16, 264, 32, log=True, whole=True),
            number("learning_rate_init", 1e-4, 0.5, 1e-3, log=True),
            choice("early_stopping", ("valid", "train"), "valid"),
        ]
    if learner == "passive_aggressive":
        return [
            number("C", 1e-5, 10, 1, log=True),
            choice("loss", ("hinge", "squared_hinge"), "hinge"),
            choice("average", (False, True), False),
            number("tol", 1e-5, 0.1, 1e-4, log=True),
        ]
    losses = (
        ("log", "hinge", "modified_huber", "squared_hinge", "perceptron")
        if kind == "classification"
        else ("squared_error", "huber", "epsilon_insensitive", "squared_epsilon_insensitive")
    )
    wide = ("modified_huber",) if kind == "classification" else losses[1:]
    return [
        choice("loss", losses, losses[0]),
        choice("penalty", ("l1", "l2", "elasticnet"), "l2"),
        number("alpha", 1e-7, 0.1, 1e-4, log=True),
        number("l1_ratio", 1e-9, 1, 0.15, log=True, **if_("penalty", "elasticnet")),
        number("tol", 1e-5, 0.1, 1e-4, log=True),
        number("epsilon", 1e-5, 0.1, 1e-4, log=True, **if_("loss", *wide)),
        choice("learning_rate", ("optimal", "invscaling", "constant"), "invscaling"),
        number("eta0", 1e-7, 0.1, 0.01, log=True, **if_("learning_rate", "invscaling", "constant")),
        number("power_t", 1e-5, 1, 0.5, **if_("learning_rate", "invscaling")),
        choice("average", (False, True), False),
    ]


RESCALING = ("standardize", "none", "minmax", "normalize", "robust_scaler", "quantile_transformer", "power_transformer")


def pipeline_space(kind: Kind = "classification", *, sparse: bool = False) -> SearchSpace:
    """The space of pipelines of the paper, for labels or for numbers to predict.

    Parameters
    ----------
    kind
        ``"classification"`` or ``"regression"``. The paper has the first; the second has the same learners without the
        passive-aggressive one.
    sparse
        Whether the rows are sparse: without gradient boosting, which needs dense ones, and without rescalings that
        would fill the zeros.
    """
    learners = tuple(name for name in LEARNERS[kind] if not (sparse and name == "gradient_boosting"))
    default = "extra_trees" if sparse else "gradient_boosting"
    parameters = [_choice("learner", learners, default)]
    for learner in learners:
        parameters += _of(learner, kind)
    if kind == "classification":
        parameters.append(_choice("balancing", ("none", "weighting"), "none"))
    rescaling = RESCALING if not sparse else ("standardize", "none", "normalize")
    parameters += [
        _choice("imputation", ("mean", "median", "most_frequent"), "mean"),
        _choice("rescaling", rescaling, "standardize"),
        _choice("encoding", ("one_hot", "none"), "one_hot"),
        _choice("coalescence", ("minority", "none"), "minority"),
        _number("coalescence:minimum_fraction", 1e-4, 0.5, 0.01, log=True, parent="coalescence", when=("minority",)),
    ]
    if not sparse:
        robust: dict[str, Any] = {"parent": "rescaling", "when": ("robust_scaler",)}
        quantile: dict[str, Any] = {"parent": "rescaling", "when": ("quantile_transformer",)}
        parameters += [
            _number("rescaling:q_min", 0.001, 0.3, 0.25, **robust),
            _number("rescaling:q_max", 0.7, 0.999, 0.75, **robust),
            _number("rescaling:n_quantiles", 10, 2000, 1000, whole=True, **quantile),
            _choice("rescaling:output_distribution", ("normal", "uniform"), "normal", **quantile),
        ]
    return SearchSpace(tuple(parameters))
