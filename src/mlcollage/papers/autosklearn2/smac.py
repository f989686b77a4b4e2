"""SMAC in place of the light search: its forest, its expected improvement, its maximizer (section 2.1.1).

Only its parts that propose are used. Which pipelines come first, that every second proposal is random, and what is
fitted under which limits, is decided here as for the light search.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput, MissingDependency

from .space import Config, Hyperparameter, SearchSpace, Value, config_id
from .surrogate import log_losses


def has_smac() -> bool:
    """Whether SMAC and ConfigSpace are installed."""
    return find_spec("smac") is not None and find_spec("ConfigSpace") is not None


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(f"SMAC needs {name.split('.')[0]}: pip install 'mlcollage[automl]'.") from error


def to_configspace(space: SearchSpace, seed: int | None = None) -> Any:
    """The space as a ``ConfigurationSpace`` of the package ConfigSpace, with the same names and conditions.

    Parameters
    ----------
    space
        What to export, such as ``pipeline_space()``.
    seed
        Of what the result samples.

    Returns
    -------
    ConfigSpace.ConfigurationSpace
        ``dict(configuration)`` of its configurations is one of ours, up to the types of numpy.

    Raises
    ------
    MissingDependency
        If ConfigSpace is not installed.
    """
    if not isinstance(space, SearchSpace):
        raise InvalidInput(f"to_configspace takes a SearchSpace, such as pipeline_space(), not {type(space).__name__}.")
    cs = _imported("ConfigSpace")
    made: dict[str, Any] = {}
    for p in space.parameters:
        default: Any = p.default
        if p.choices:
            made[p.name] = cs.CategoricalHyperparameter(p.name, list(p.choices), default_value=default)
        elif p.whole:
            bounds = int(p.low), int(p.high)
            made[p.name] = cs.UniformIntegerHyperparameter(p.name, *bounds, default_value=int(default), log=_log(p))
        else:
            bounds_ = float(p.low), float(p.high)
            made[p.name] = cs.UniformFloatHyperparameter(p.name, *bounds_, default_value=float(default), log=p.log)
    found = cs.ConfigurationSpace(seed=seed)
    found.add(list(made.values()))
    found.add([cs.InCondition(made[p.name], made[p.parent], list(p.when)) for p in space.parameters if p.parent])
    return found


def _log(p: Hyperparameter) -> bool:
    return p.log and p.low > 0


class SmacImprovement:
    """Proposes configurations as SMAC does; in place of :class:`ForestImprovement`.

    Parameters
    ----------
    space
        Where configurations come from.
    challengers
        Random configurations that are looked at.
    n_local
        Starts of the local search.

    Raises
    ------
    MissingDependency
        If SMAC is not installed.
    """

    def __init__(self, space: SearchSpace, *, challengers: int = 1000, n_local: int = 10) -> None:
        self.space = space
        self.challengers = checks.integer("challengers", challengers, least=1)
        self.n_local = checks.integer("n_local", n_local, least=1)
        logging.getLogger("smac").setLevel(logging.WARNING)
        self.cs = to_configspace(space)
        self.configuration = _imported("ConfigSpace").Configuration
        self.forest = _imported("smac.model.random_forest").RandomForest
        self.function = _imported("smac.acquisition.function").EI
        self.maximizer = _imported("smac.acquisition.maximizer").LocalAndSortedRandomSearch

    def propose(self, configs: Sequence[Config], losses: ArrayLike, rng: np.random.Generator) -> Config:
        """The most promising configuration that was not tried; a random one if there are fewer than three losses."""
        y = np.asarray(losses, np.float64)
        if len(configs) != len(y):
            raise InvalidInput(f"there are {len(configs)} configurations and {len(y)} losses; they must be as many.")
        if len(y) < 3:
            return self.space.sample(rng)
        seed = int(rng.integers(2**31))
        self.cs.seed(seed)
        tried = [self.configuration(self.cs, values=dict(c)) for c in configs]
        target = log_losses(y)
        model = self.forest(self.cs, log_y=True, seed=seed)
        model.train(np.array([c.get_array() for c in tried]), target[:, None])
        gain = self.function(log=True)
        gain.update(model=model, eta=float(target.min()))
        search = self.maximizer(
            self.cs, gain, challengers=self.challengers, local_search_iterations=self.n_local, seed=seed
        )
        known = {config_id(c) for c in configs}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # SMAC's local search takes means of nothing
            for found in search.maximize(tried):
                config = self._ours(dict(found))
                if config_id(config) not in known:
                    return config
        return self.space.sample(rng)

    def _ours(self, found: dict[str, Any]) -> Config:
        """Values of ours: numpy's types become Python's, and numbers stay within their bounds."""
        values: dict[str, Value] = {}
        for p in self.space.parameters:
            if p.name not in found:
                continue
            given = found[p.name]
            if p.choices:
                values[p.name] = next(c for c in p.choices if str(c) == str(given))
            else:
                number = min(max(float(given), p.low), p.high)
                values[p.name] = round(number) if p.whole else float(f"{number:.12g}")
        return self.space._complete(values)
