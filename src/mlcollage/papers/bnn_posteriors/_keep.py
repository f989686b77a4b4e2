"""What the methods share: checked settings, and what is kept of the draws while they pass by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlcollage.errors import InvalidInput, UnknownName

from ._checks import as_inputs
from .density import PosteriorDensity
from .posterior import Posterior, PredictionStream

if TYPE_CHECKING:
    from .module import BayesianModule

__all__ = ["Init", "Keeper", "Progress", "Store", "Transform", "positive", "whole"]

Progress = Callable[[int, int], None]
Init = Tensor | str | Callable[[], nn.Module]
Store = str | Callable[[Tensor], Tensor | None]
Transform = Callable[[Tensor], Tensor]


def whole(value: Any, what: str, least: int = 1) -> int:
    """A whole number of at least ``least``, or one sentence that says what is wrong."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInput(f"{what}={value!r} must be a whole number of at least {least}.")
    return value


def positive(value: Any, what: str) -> float:
    """A positive finite number, or one sentence that says what is wrong."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidInput(f"{what}={value!r} must be a positive number.")
    return float(value)


class Keeper:
    """What is kept of the draws while they pass by: positions, predictions, or what a function makes of them."""

    def __init__(self, model: BayesianModule, density: PosteriorDensity, store: Store, at: Any):
        self.density, self.store = density, store
        self.stream: PredictionStream | None = None
        self.kept: list[Tensor] = []
        if store == "predictions" or at is not None:
            if at is None:
                raise InvalidInput("store='predictions' needs the inputs to predict: give them as at=.")
            self.stream = PredictionStream(model.likelihood, as_inputs(at, model.module, model.parameters_flat, "at"))
        if not callable(store) and store not in ("params", "predictions"):
            raise UnknownName(
                f"store={store!r} is not known; choose 'params', 'predictions' or a function of positions."
            )

    def __call__(self, q: Tensor) -> None:
        """Take in one draw of every chain, (chains, P)."""
        if self.stream is not None:
            self.stream.update(self.density.outputs(q, self.stream.x))
        value = q.clone() if self.store == "params" else self.store(q) if callable(self.store) else None
        if value is not None:
            self.kept.append(value)

    def posterior(
        self, model: BayesianModule, method: str, stats: dict[str, Tensor], info: dict[str, Any]
    ) -> Posterior:
        """What was kept, with how the sampler fared."""
        kept = torch.stack(self.kept, dim=1) if self.kept else None
        params, other = (kept, None) if self.store == "params" else (None, kept)
        return Posterior(model.layout, method, params, stats, other, self.stream, info)
