"""Predictions averaged while draws pass by, in memory that does not grow with the draws."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.infer.diagnostics import Streaming
from mlcollage.infer.ensemble import RunningMixture

from .likelihoods import Likelihood
from .tensor_file import under

__all__ = ["PredictionStream"]


class PredictionStream:
    """Predictions at fixed inputs, with R-hat and effective sample size of every predicted number.

    Parameters
    ----------
    likelihood
        Turns outputs into predictions: probabilities of classes, or mean and variance; the outputs themselves for a
        likelihood of your own.
    x
        The inputs, (n, ...), in the network's type.

    Attributes
    ----------
    count : int
        Draws of each chain so far.
    diagnostics : Streaming
        Of the predicted numbers.
    """

    def __init__(self, likelihood: Likelihood, x: Tensor):
        self.likelihood, self.x = likelihood, x
        self.mixture = RunningMixture() if likelihood.kind == "classification" else None
        self.diagnostics = Streaming()
        self._variance: Tensor | None = None  # (chains, n, ...), summed over draws
        self.count = 0

    def update(self, outputs: Tensor) -> None:
        """Count in the outputs of one draw of every chain, (chains, n, ...)."""
        self.count += 1
        if self.mixture is not None:
            log_p = self.likelihood.log_proba(outputs)  # (chains, n, K)
            self.mixture.update(log_p)
            self.diagnostics.update(log_p.double().exp())
        elif self.likelihood.kind == "regression":
            mean, variance = (part.double() for part in self.likelihood.moments(outputs))
            self.diagnostics.update(mean)
            self._variance = variance if self._variance is None else self._variance + variance
        else:
            self.diagnostics.update(outputs.double())

    @property
    def proba(self) -> Tensor:
        """Class probabilities averaged over draws and chains, (n, K), float64."""
        if self.mixture is None:
            self.likelihood.log_proba(torch.zeros(0))  # says why there are none
            raise InvalidInput("this likelihood has no class probabilities.")
        return self.mixture.proba.mean(dim=0)

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the mixture of all draws' Gaussians, (n, ...) each."""
        if self._variance is None:
            raise InvalidInput("only a Gaussian likelihood has a predictive mean and variance; use predict_proba.")
        within = (self._variance / self.count).mean(dim=0)
        n = self.count * len(self._variance)
        # the mixture's variance, without the correction for having estimated its mean
        between = self.diagnostics.variance() * ((n - 1) / n) if n > 1 else torch.zeros_like(within)
        return self.diagnostics.mean(), within + between

    def tensors(self) -> dict[str, Tensor]:
        """The state, for a file."""
        state = {f"diagnostics.{k}": v for k, v in self.diagnostics.tensors().items()}
        state |= {} if self.mixture is None else {f"mixture.{k}": v for k, v in self.mixture.tensors().items()}
        state |= {} if self._variance is None else {"variance": self._variance}
        return {**state, "x": self.x, "count": torch.tensor(self.count)}

    @classmethod
    def from_tensors(cls, likelihood: Likelihood, state: Mapping[str, Tensor]) -> PredictionStream:
        """The stream whose state :meth:`tensors` gave."""
        made = cls(likelihood, state["x"])
        made.count = int(state["count"])
        made._variance = state.get("variance")
        made.diagnostics = Streaming.from_tensors(under(state, "diagnostics."))
        if made.mixture is not None:
            made.mixture = RunningMixture.from_tensors(under(state, "mixture."))
        return made
