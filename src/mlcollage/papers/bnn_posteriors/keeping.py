"""What samplers keep of their draws while they pass by: positions, predictions, or what a function makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.infer import Chains

from .method import Method, Target
from .posterior import Posterior, PredictionStream

Store = Literal["params", "predictions"] | Callable[[Tensor], Tensor | None]


class Keeper:
    """Takes in draws.

    Parameters
    ----------
    target
        What is sampled.
    store
        ``"params"``, ``"predictions"`` or a function of positions (chains, P).
    at
        Inputs whose predictions are averaged on the way, or None.

    Attributes
    ----------
    kept : list of Tensor
        One per draw, (chains, ...).
    stream : PredictionStream or None
        Running predictions.
    """

    def __init__(self, target: Target, store: Store, at: Any):
        self.target, self.store = target, store
        self.kept: list[Tensor] = []
        if store == "predictions" and at is None:
            raise InvalidInput("store='predictions' needs the inputs to predict: give them as at=.")
        network = target.network
        shape = target.density.target_shape
        self.stream = None if at is None else PredictionStream(network.likelihood, network.inputs(at, "at"), shape)

    def __call__(self, q: Tensor) -> None:
        """Take in one draw of every chain, (chains, P)."""
        if self.stream is not None:
            self.stream.update(self.target.density.outputs(q, self.stream.x))
        # cloned, since the sampler may move its positions in place
        value = q.clone() if self.store == "params" else self.store(q) if callable(self.store) else None
        if value is not None:
            self.kept.append(value)

    def posterior(self, method: Method, stats: dict[str, Tensor], info: dict[str, Any]) -> Posterior:
        """What was kept, with how the sampler fared."""
        kept = torch.stack(self.kept, dim=1) if self.kept else None  # (chains, draws, ...)
        params, other = (kept, None) if self.store == "params" else (None, kept)
        return self.target.posterior(method, params, info, sample_stats=stats, kept=other, stream=self.stream)


def sample_stats(runs: Sequence[Chains]) -> dict[str, Tensor]:
    """How the sampler fared over consecutive runs, (chain, draw) each, under ArviZ's names."""
    # where ArviZ has another name
    ours = {"accept": "accept_prob", "log_prob": "lp", "steps": "n_steps"}
    names = ("accept", "energy", "diverging", "log_prob", "steps")
    stats = {ours.get(name, name): torch.cat([getattr(run, name) for run in runs], dim=1) for name in names}
    # as the leapfrog used it, in the positions' type
    steps = [run.step_size.to(run.state.position.dtype).double()[:, None].expand(run.accept.shape) for run in runs]
    stats["step_size"] = torch.cat(steps, dim=1)
    return stats
