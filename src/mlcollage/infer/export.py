"""Draws as ArviZ data, for its releases before and after 1.0."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcollage.errors import InvalidInput

__all__ = ["to_arviz"]


def to_arviz(groups: Mapping[str, Mapping[str, npt.ArrayLike]]) -> Any:
    """Groups of arrays ``(chains, draws, ...)`` as what the installed ArviZ works with.

    Parameters
    ----------
    groups
        Group name (``"posterior"``, ``"sample_stats"``, ``"log_likelihood"``, ...) to variable name to array.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        The former from ArviZ 0.x, the latter from 1.x; ``az.summary``, ``az.loo`` and the plots take either.

    Raises
    ------
    InvalidInput
        If an array lacks the two leading dimensions or they differ within a group.

    Examples
    --------
    >>> data = to_arviz({"posterior": {"mu": np.zeros((4, 100))}})
    >>> data.posterior["mu"].shape
    (4, 100)
    """
    arviz: Any = import_module("arviz")  # the two interfaces cannot both be typed

    arrays = {group: {name: np.asarray(a) for name, a in variables.items()} for group, variables in groups.items()}
    for group, variables in arrays.items():
        if group in ("observed_data", "constant_data"):
            continue
        leading = {a.shape[:2] for a in variables.values()}
        if any(a.ndim < 2 for a in variables.values()) or len(leading) > 1:
            shapes = ", ".join(f"{name} {a.shape}" for name, a in variables.items())
            raise InvalidInput(f"the arrays of {group} must begin with the same (chains, draws); they are {shapes}.")
    with warnings.catch_warnings():  # batches often have more chains than draws; the dimensions were checked above
        warnings.filterwarnings("ignore", "More chains|Found chain", UserWarning)
        if is_before_1(arviz):
            return arviz.from_dict(**arrays)  # a keyword per group
        return arviz.from_dict(arrays)  # one nested mapping


def is_before_1(arviz: ModuleType) -> bool:
    """Whether this ArviZ has data of its own; from 1.0 the name is only a signpost to xarray's."""
    return "InferenceData" in vars(arviz)
