"""Reads the files of auto-sklearn 2: portfolios and the data of its selector, as its public repository has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput, MissingFile

from .policy import Policy
from .space import Config, Value, pipeline_space

_FOREST: Mapping[str, tuple[Value, ...]] = {
    "max_depth": ("None",),
    "max_leaf_nodes": ("None",),
    "min_impurity_decrease": (0.0,),
    "min_weight_fraction_leaf": (0.0,),
}
_FIXED: Mapping[str, tuple[Value, ...]] = {
    "data_preprocessor:__choice__": ("feature_type",),
    "feature_preprocessor:__choice__": ("no_preprocessing",),
    **{
        f"classifier:{forest}:{key}": values
        for forest in ("extra_trees", "random_forest")
        for key, values in _FOREST.items()
    },
    "classifier:gradient_boosting:loss": ("auto",),
    "classifier:gradient_boosting:max_bins": (255,),
    "classifier:gradient_boosting:max_depth": ("None",),
    "classifier:gradient_boosting:scoring": ("loss",),
    "classifier:gradient_boosting:tol": (1e-07,),
    "classifier:mlp:batch_size": ("auto",),
    "classifier:mlp:beta_1": (0.9,),
    "classifier:mlp:beta_2": (0.999,),
    "classifier:mlp:epsilon": (1e-08,),
    "classifier:mlp:n_iter_no_change": (32,),
    "classifier:mlp:shuffle": ("True",),
    "classifier:mlp:solver": ("adam",),
    "classifier:mlp:tol": (0.0001,),
    "classifier:mlp:validation_fraction": (0.1,),
    "classifier:passive_aggressive:fit_intercept": ("True",),
    "classifier:sgd:fit_intercept": ("True",),
}
"""Keys that have one value there, and what our learners do as well."""
_RENAMED = {
    "balancing:strategy": "balancing",
    "classifier:__choice__": "learner",
    "data_preprocessor:feature_type:numerical_transformer:imputation:strategy": "imputation",
    "data_preprocessor:feature_type:numerical_transformer:rescaling:__choice__": "rescaling",
    "data_preprocessor:feature_type:categorical_transformer:categorical_encoding:__choice__": "encoding",
    "data_preprocessor:feature_type:categorical_transformer:category_coalescence:__choice__": "coalescence",
    "data_preprocessor:feature_type:categorical_transformer:category_coalescence:minority_coalescer:minimum_fraction": (
        "coalescence:minimum_fraction"
    ),
}
_SCALER = "data_preprocessor:feature_type:numerical_transformer:rescaling:"
_WORDS: Mapping[str, Value] = {
    "True": True,
    "False": False,
    "no_encoding": "none",
    "one_hot_encoding": "one_hot",
    "minority_coalescer": "minority",
    "no_coalescense": "none",
}


@dataclass(frozen=True)
class OfficialPortfolio:
    """A portfolio of auto-sklearn in our space.

    Parameters
    ----------
    configs
        The pipelines in the order in which they are tried.
    ids
        What they are called in the file.
    cutoffs
        Seconds that a run may take; infinite where there is no limit of its own.
    tasks
        For each pipeline the OpenML tasks whose best pipeline it was.
    """

    configs: tuple[Config, ...]
    ids: tuple[str, ...]
    cutoffs: tuple[float, ...]
    tasks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class OfficialSelectorData:
    """Losses of eight policies on 208 OpenML tasks.

    Parameters
    ----------
    tasks
        OpenML numbers.
    meta_features
        ``(tasks, 2)``: number of columns and of rows.
    policies
        Their official names are :attr:`names`.
    losses, minima, maxima
        ``(tasks, policies)``: the loss of each policy, and the smallest and largest loss for the normalization.
    order
        Numbers of the policies, the first to be taken at a tie first.
    configuration
        Settings of the official selector.
    """

    tasks: tuple[int, ...]
    meta_features: NDArray[np.float64]
    names: tuple[str, ...]
    policies: tuple[Policy, ...]
    losses: NDArray[np.float64]
    minima: NDArray[np.float64]
    maxima: NDArray[np.float64]
    order: tuple[int, ...]
    configuration: dict[str, Any]


def map_official_config(config: Mapping[str, Any], where: str = "the configuration") -> Config:
    """A configuration of auto-sklearn in our space.

    Parameters
    ----------
    config
        Its keys are auto-sklearn's, such as ``classifier:sgd:alpha``.
    where
        How a refusal calls it.

    Raises
    ------
    InvalidInput
        If a key, or a value of a key, is none that our learners have; the message names it.

    Examples
    --------
    >>> map_official_config({"classifier:__choice__": "sgd", "classifier:sgd:alpha": 0.01})["sgd:alpha"]
    0.01
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in _FIXED:
            if value not in _FIXED[key]:
                raise InvalidInput(f"{where} has {key!r} = {value!r}; our learners have {_FIXED[key][0]!r} only.")
            continue
        found[_name(key, where)] = _WORDS.get(value, value) if isinstance(value, str) else value
    space = pipeline_space("classification")
    # An official validation fraction of a network is in the file only where it is used.
    return space.check(found, where)


def _name(key: str, where: str) -> str:
    if key in _RENAMED:
        return _RENAMED[key]
    if key.startswith(_SCALER):
        return f"rescaling:{key.removeprefix(_SCALER).split(':')[-1]}"
    if key.startswith("classifier:"):
        return key.removeprefix("classifier:")
    raise InvalidInput(f"{where} has the key {key!r}, which our space does not have.")


def _read(path: str | Path, kind: str, keys: tuple[str, ...]) -> dict[str, Any]:
    path = Path(path)
    if not path.exists():
        raise MissingFile(f"there is no file {path}; expected {kind} of auto-sklearn.")
    try:
        data = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidInput(f"{path} is not JSON ({error}); expected {kind} of auto-sklearn.") from error
    if not isinstance(data, dict) or (lacking := [key for key in keys if key not in data]):
        raise InvalidInput(
            f"{path} is not {kind} of auto-sklearn: it lacks {lacking[0] if isinstance(data, dict) else keys[0]!r}."
        )
    return data


def read_official_portfolio(path: str | Path) -> OfficialPortfolio:
    """Read a portfolio file of auto-sklearn; keys that are not used (run times, folders) may be there.

    Raises
    ------
    MissingFile, InvalidInput
        If there is no such file, it is no portfolio, or a pipeline is not in our space (its key is named).

    Examples
    --------
    >>> from mlcollage.papers.autosklearn2.shipped import official_folder
    >>> portfolio = read_official_portfolio(official_folder() / "RF_None_holdout_iterative_es_if.json")
    >>> len(portfolio.configs), portfolio.configs[0]["learner"]
    (32, 'extra_trees')
    """
    data = _read(path, "a portfolio", ("portfolio",))
    ids = tuple(data["portfolio"])
    configs = tuple(map_official_config(data["portfolio"][i], f"pipeline {i} of {Path(path).name}") for i in ids)
    cutoffs = tuple(float(c) for c in data.get("cutoffs") or [np.inf] * len(ids))
    if len(cutoffs) != len(ids):
        raise InvalidInput(f"{path} has {len(ids)} pipelines and {len(cutoffs)} cut-offs.")
    tasks = data.get("config_to_task", {})
    return OfficialPortfolio(configs, ids, cutoffs, tuple(tuple(int(t) for t in tasks.get(i, ())) for i in ids))


def read_official_selector(path: str | Path) -> OfficialSelectorData:
    """Read the training data of auto-sklearn's selector.

    Raises
    ------
    MissingFile, InvalidInput
        If there is no such file, or it is something else.

    Examples
    --------
    >>> from mlcollage.papers.autosklearn2.shipped import official_folder
    >>> data = read_official_selector(official_folder() / "selector_training_data_balanced_accuracy.json")
    >>> data.losses.shape, str(data.policies[data.order[0]])
    ((208, 8), 'holdout, successive halving')
    """
    keys = ("metafeatures", "strategies", "y_values", "minima_for_methods", "maxima_for_methods", "tie_break_order")
    data = _read(path, "training data of a selector", keys)
    features = data["metafeatures"]
    tasks = tuple(features["NumberOfFeatures"])
    names = tuple(data["strategies"])
    meta = np.array([[features["NumberOfFeatures"][t], features["NumberOfInstances"][t]] for t in tasks])
    losses = np.array(data["y_values"], np.float64)
    if losses.shape != (len(tasks), len(names)):
        raise InvalidInput(f"{path} has losses {losses.shape}; expected {(len(tasks), len(names))}.")
    limits = [np.array([[data[k][t][name] for name in names] for t in tasks], np.float64) for k in keys[3:5]]
    order = tuple(names.index(name) for name in data["tie_break_order"])
    return OfficialSelectorData(
        tuple(int(t) for t in tasks),
        meta,
        names,
        tuple(Policy.from_official(name) for name in names),
        losses,
        limits[0],
        limits[1],
        order,
        dict(data.get("configuration", {})),
    )
