r"""What a method found out about the weights, and what it predicts.

.. math:: p(y \mid x, D) = E_{w \mid D} \, p(y \mid x, w) \approx \frac{1}{M} \sum_{m=1}^M p(y \mid x, w_m)

:class:`Posterior` holds draws (chain, draw, P), or the predictions they made while passing by, and how the sampler
fared.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mlcollage._checks import integer
from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.infer import diagnostics
from mlcollage.infer.ensemble import RunningMixture
from mlcollage.infer.export import to_arviz

from . import tensor_file
from .function import NetworkFunction
from .layout import Layout
from .linearization import linearized
from .predictions import PredictionStream

__all__ = ["Posterior"]

_FORMAT = "mlcollage bnn posterior 1"


@dataclass(frozen=True, eq=False)
class Posterior:
    """Draws of a network's weights, or what was kept of them.

    Attributes
    ----------
    layout : Layout
        Names and shapes of the sampled parameters.
    method : str
        How they were drawn.
    params : Tensor or None
        (chain, draw, P); None if draws were not stored.
    sample_stats : dict of Tensor
        (chain, draw) each: of HMC ``accept_prob``, ``energy``, ``diverging``, ``lp``, ``n_steps`` and ``step_size``.
    kept : Tensor or None
        (chain, draw, ...), what a ``store`` of your own made of each draw; of a Laplace approximation the mode, of
        mean-field inference mean and standard deviation.
    stream : PredictionStream or None
        Running predictions, with ``at=``.
    info : dict
        Settings and what was measured on the way: numbers, words, lists of them.
    network : NetworkFunction or None
        Whose weights these are; predictions need it.
    """

    layout: Layout
    method: str
    params: Tensor | None = None
    sample_stats: dict[str, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None
    stream: PredictionStream | None = None
    info: dict[str, Any] = field(default_factory=dict)
    network: NetworkFunction | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.params is not None and (self.params.ndim != 3 or self.params.shape[2] != self.layout.size):
            raise InvalidInput(
                f"params have shape {tuple(self.params.shape)}; (chain, draw, {self.layout.size}) is needed."
            )

    @property
    def chains(self) -> int:
        """Number of chains, or of members trained on their own."""
        for value in (self.params, self.kept, *self.sample_stats.values()):
            if value is not None:
                return len(value)
        return 0 if self.stream is None else len(self.stream.diagnostics.mean_of_chains())

    @property
    def accept_rate(self) -> float:
        """Mean acceptance probability; not a number for methods without a Metropolis test."""
        value = self.sample_stats.get("accept_prob")
        return float("nan") if value is None else float(value.mean())

    # --- draws --------------------------------------------------------------------------------------------------------

    def draws(self) -> Tensor:
        """The stored draws, (chain, draw, P), or a sentence that says there are none."""
        if self.params is None:
            raise InvalidInput(
                "the draws of the weights were not stored; fit with store='params', or ask for predictions at the "
                "inputs given as at=."
            )
        return self.params

    def thinned(self, every: int) -> Posterior:
        """One of every so many draws, beginning with the first."""
        step = slice(None, None, integer("every", every, least=1))
        stats = {name: value[:, step] for name, value in self.sample_stats.items()}
        kept = None if self.kept is None else self.kept[:, step]
        params = self.draws()[:, step]
        return Posterior(self.layout, self.method, params, stats, kept, None, dict(self.info), self.network)

    def state_dict(self, chain: int, draw: int) -> dict[str, Tensor]:
        """One draw as parameters by name, for ``module.load_state_dict(..., strict=False)``."""
        return {name: value.clone() for name, value in self.layout.unflatten(self.draws()[chain, draw]).items()}

    def to_arviz(self) -> Any:
        """The draws as ArviZ data: one variable per parameter, and ``sample_stats``."""
        named = {"posterior": self.layout.unflatten(self.draws()), "sample_stats": self.sample_stats}
        return to_arviz({group: {n: v.detach().cpu().numpy() for n, v in of.items()} for group, of in named.items()})

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, whose header says what it is in JSON; nothing is pickled.

        The file is complete or not there. Returns its path.
        """
        tensors = {"params": self.params, "kept": self.kept}
        tensors |= {f"stats.{name}": value for name, value in self.sample_stats.items()}
        if self.stream is not None:
            tensors |= {f"stream.{name}": value for name, value in self.stream.tensors().items()}
        header = {"format": _FORMAT, "method": self.method, "info": self.info}
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensor_file.save(target, tensors, {**header, "names": self.layout.names, "shapes": self.layout.shapes})
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], network: NetworkFunction | None = None) -> Posterior:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path
            The file.
        network
            The network it is meant for, a ``BayesianNetwork``; another architecture is refused. Without it the draws
            are there, but no predictions.

        Raises
        ------
        MissingFile
            If it is not there.
        InvalidInput
            If it is another kind of file, or of another architecture.
        """
        source = Path(path)
        if not source.is_file():
            raise MissingFile(f"there is no file {source}.")
        header, tensors = tensor_file.load(source)
        if header.get("format") != _FORMAT:
            raise InvalidInput(f"{source} holds no posterior; give a file that Posterior.save wrote.")
        found = Layout(tuple(header["names"]), tuple(tuple(shape) for shape in header["shapes"]))
        if network is not None and (difference := network.layout.difference(found)) is not None:
            raise InvalidInput(f"{source} is of another architecture: {difference} (this network, and the file).")
        stream = tensor_file.under(tensors, "stream.")
        return cls(
            found,
            header["method"],
            tensors.get("params"),
            tensor_file.under(tensors, "stats."),
            tensors.get("kept"),
            PredictionStream.from_tensors(network.likelihood, stream) if stream and network else None,
            header["info"],
            network,
        )

    # --- predictions --------------------------------------------------------------------------------------------------

    def _network(self) -> NetworkFunction:
        if self.network is None:
            raise InvalidInput("this posterior knows no network to predict with; give one to Posterior.load.")
        return self.network

    def _outputs(self, X: Any, batch_size: int | None) -> Iterator[Tensor]:
        """Outputs of one draw of every chain after the other, (chains, N, ...)."""
        draws, network = self.draws(), self._network()
        x, here = network.inputs(X), network.parameters_flat
        size = None if batch_size is None else integer("batch_size", batch_size, least=1)
        # a Laplace approximation predicts by the linearization about the mode that it keeps
        mode = self.kept[0, 0].to(here) if self.info.get("linearized") and self.kept is not None else None
        for draw in range(draws.shape[1]):
            q = draws[:, draw].to(here)  # (chains, P)
            if mode is None:
                yield network.outputs(q, x, size)
            else:
                yield linearized(network.module, mode, q, x, batch_size=size)

    def _streamed(self, X: Any) -> PredictionStream | None:
        """The stream that was filled while fitting, if the draws were not stored."""
        if self.params is not None or self.stream is None:
            return None
        if X is not None:
            x = self._network().inputs(X)
            if not torch.equal(x, self.stream.x.to(x)):
                raise InvalidInput(
                    "only the predictions at the inputs given as at= were kept; ask for those (X=None), or fit with "
                    "store='params'."
                )
        return self.stream

    def predict_proba(self, X: Any = None, batch_size: int | None = None) -> Tensor:
        """Class probabilities averaged over all draws of all chains: the Bayesian model average.

        Parameters
        ----------
        X
            Inputs (N, ...). Where only predictions were kept, the inputs given as ``at``, or None.
        batch_size
            Inputs per pass; by default all.

        Returns
        -------
        Tensor
            (N, K), float64. Memory does not grow with the draws.
        """
        likelihood = self._network().likelihood
        if likelihood.kind != "classification":
            likelihood.log_proba(torch.zeros(0))  # says why there are none
        stream = self._streamed(X)
        if stream is not None:
            return stream.proba
        running = RunningMixture()
        for outputs in self._outputs(X, batch_size):
            running.update(likelihood.log_proba(outputs))
        return running.proba.mean(dim=0)

    def predict_moments(self, X: Any = None, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of the predictive mixture of a Gaussian likelihood, (N, ...) each, float64."""
        network = self._network()
        if network.likelihood.kind != "regression":
            network.likelihood.moments(torch.zeros(0))  # says why there are none
        stream = self._streamed(X)
        if stream is None:
            stream = PredictionStream(network.likelihood, network.inputs(X))
            for outputs in self._outputs(X, batch_size):
                stream.update(outputs)
        return stream.moments

    def predict(self, X: Any = None, batch_size: int | None = None) -> Tensor:
        """Most probable class, (N,), or the predictive mean."""
        if self._network().likelihood.kind == "regression":
            return self.predict_moments(X, batch_size)[0]
        return self.predict_proba(X, batch_size).argmax(dim=-1)

    def predict_draws(self, X: Any, batch_size: int | None = None) -> Tensor:
        """The prediction of every draw, (chain, draw, N, ...): class probabilities, means, or outputs as they are."""
        likelihood = self._network().likelihood

        def prediction(outputs: Tensor) -> Tensor:
            if likelihood.kind == "classification":
                return likelihood.log_proba(outputs).exp()
            return likelihood.moments(outputs)[0] if likelihood.kind == "regression" else outputs

        return torch.stack([prediction(outputs) for outputs in self._outputs(X, batch_size)], dim=1)

    def function_rhat(self, X: Any = None, method: Literal["rank", "split", "folded"] = "rank") -> np.ndarray:
        """R-hat of each predicted number, (N, K) or (N, ...): whether the chains agree where it matters."""
        stream = self._streamed(X)
        if stream is None:
            return diagnostics.rhat(self.predict_draws(X), method)
        if self.chains == 1:
            warnings.warn("R-hat of one chain compares only its halves; run several chains from different starts.")
        return stream.diagnostics.rhat().cpu().numpy()

    def function_ess(self, X: Any = None, method: Literal["bulk", "tail", "mean"] = "bulk") -> np.ndarray:
        """Effective sample size of each predicted number, (N, K) or (N, ...)."""
        stream = self._streamed(X)
        return (
            diagnostics.ess(self.predict_draws(X), method) if stream is None else stream.diagnostics.ess().cpu().numpy()
        )
