r"""What a method found out about the weights: draws of them, or the predictions they made while passing by.

:class:`Posterior` holds draws (chain, draw, P) and how the sampler fared; :class:`PredictionStream` the average of the
predictions, R-hat and effective sample size of every predicted number, in memory that does not grow with the draws.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.infer.diagnostics import Streaming
from mlcollage.infer.ensemble import RunningMixture
from mlcollage.infer.export import to_arviz

from .layout import Layout
from .likelihoods import Likelihood

__all__ = ["Posterior", "PredictionStream"]

_FORMAT = "mlcollage bnn posterior 1"


class PredictionStream:
    """Predictions at fixed inputs, averaged over draws while they pass by.

    Parameters
    ----------
    likelihood
        Turns outputs into predictions: probabilities of classes, or mean and variance; the outputs themselves for a
        likelihood of your own.
    x
        The inputs, (n, ...), in the network's type.
    """

    def __init__(self, likelihood: Likelihood, x: Tensor):
        self.likelihood, self.x = likelihood, x
        self.mixture = RunningMixture() if likelihood.kind == "classification" else None
        self.diagnostics = Streaming()
        self._variance: Tensor | None = None
        self.count = 0

    def update(self, outputs: Tensor) -> None:
        """Count in the outputs of one draw of every chain, (chains, n, ...)."""
        self.count += 1
        if self.mixture is not None:
            log_p = self.likelihood.log_proba(outputs)
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
        made.diagnostics = Streaming.from_tensors(_under(state, "diagnostics."))
        if made.mixture is not None:
            made.mixture = RunningMixture.from_tensors(_under(state, "mixture."))
        return made


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@dataclass(frozen=True)
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
        (chain, draw, ...), what a ``store`` of your own made of each draw.
    stream : PredictionStream or None
        With ``store="predictions"``.
    info : dict
        Settings and what was measured on the way: numbers, words, lists of them.
    """

    layout: Layout
    method: str
    params: Tensor | None = None
    sample_stats: dict[str, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None
    stream: PredictionStream | None = None
    info: dict[str, Any] = field(default_factory=dict)

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

    def draws(self) -> Tensor:
        """The stored draws, (chain, draw, P), or a sentence that says there are none."""
        if self.params is None:
            raise InvalidInput(
                "the draws of the weights were not stored; fit with store='params', or ask for predictions at the "
                "inputs given as at=."
            )
        return self.params

    def thinned(self, every: int) -> Posterior:
        """Every so manieth draw."""
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InvalidInput(f"every={every!r} must be a positive number of draws.")
        stats = {name: value[:, ::every] for name, value in self.sample_stats.items()}
        kept = None if self.kept is None else self.kept[:, ::every]
        return Posterior(self.layout, self.method, self.draws()[:, ::every], stats, kept, None, dict(self.info))

    def state_dict(self, chain: int, draw: int) -> dict[str, Tensor]:
        """One draw as parameters by name, for ``module.load_state_dict(..., strict=False)``."""
        return {name: value.clone() for name, value in self.layout.unflatten(self.draws()[chain, draw]).items()}

    def to_arviz(self) -> Any:
        """The draws as ArviZ data: a variable a parameter, and ``sample_stats``."""
        arrays = {name: value.cpu().numpy() for name, value in self.layout.unflatten(self.draws()).items()}
        return to_arviz(
            {"posterior": arrays, "sample_stats": {name: _array(value) for name, value in self.sample_stats.items()}}
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, whose header says what it is in JSON; nothing is pickled.

        The file is complete or not there. Returns its path.
        """
        from safetensors.torch import save_file

        tensors = {"params": self.params, "kept": self.kept}
        tensors |= {f"stats.{name}": value for name, value in self.sample_stats.items()}
        if self.stream is not None:
            tensors |= {f"stream.{name}": value for name, value in self.stream.tensors().items()}
        header = {
            "format": _FORMAT,
            "method": self.method,
            "names": self.layout.names,
            "shapes": self.layout.shapes,
            "info": self.info,
        }
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        present = {name: value.detach().contiguous() for name, value in tensors.items() if value is not None}
        save_file(present, temporary, metadata={"mlcollage": json.dumps(header)})
        os.replace(temporary, target)
        return target

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], layout: Layout | None = None, likelihood: Likelihood | None = None
    ) -> Posterior:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path
            The file.
        layout
            Of the network it is meant for; another one is refused.
        likelihood
            Needed for streamed predictions.

        Raises
        ------
        MissingFile
            If it is not there.
        InvalidInput
            If it is another kind of file, or of another architecture.
        """
        from safetensors import SafetensorError, safe_open

        source = Path(path)
        if not source.is_file():
            raise MissingFile(f"there is no file {source}.")
        try:
            with safe_open(source, "pt") as file:
                header = json.loads((file.metadata() or {}).get("mlcollage", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, ValueError) as error:
            raise InvalidInput(f"{source} is no safetensors file: {error}.") from None
        if header.get("format") != _FORMAT:
            raise InvalidInput(f"{source} holds no posterior; give a file that Posterior.save wrote.")
        found = Layout(tuple(header["names"]), tuple(tuple(shape) for shape in header["shapes"]))
        if layout is not None and (difference := layout.difference(found)) is not None:
            raise InvalidInput(f"{source} is of another architecture: {difference} (this network, and the file).")
        stream = _under(tensors, "stream.")
        return cls(
            found,
            header["method"],
            tensors.get("params"),
            _under(tensors, "stats."),
            tensors.get("kept"),
            PredictionStream.from_tensors(likelihood, stream) if stream and likelihood else None,
            header["info"],
        )


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
