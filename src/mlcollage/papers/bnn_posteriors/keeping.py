"""What samplers keep of their draws while they pass by: positions, predictions, or what a function makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
    count : int
        Draws of each chain so far.
    """

    def __init__(self, target: Target, store: Store, at: Any):
        self.target, self.store = target, store
        self.kept, self.count = list[Tensor](), 0
        if store == "predictions" and at is None:
            raise InvalidInput("store='predictions' needs the inputs to predict: give them as at=.")
        network = target.network
        shape = target.density.target_shape
        self.stream = None if at is None else PredictionStream(network.likelihood, network.inputs(at, "at"), shape)

    def __call__(self, q: Tensor) -> None:
        """Take in one draw of every chain, (chains, P)."""
        self.count += 1
        if self.stream is not None:
            self.stream.update(self.target.density.outputs(q, self.stream.x))
        # cloned, since the sampler may move its positions in place
        value = q.clone() if self.store == "params" else self.store(q) if callable(self.store) else None
        if value is not None:
            self.kept.append(value)

    def copy(self) -> Keeper:
        """One that goes on by itself."""
        made = copy.copy(self)
        made.kept, made.stream = list(self.kept), copy.deepcopy(self.stream)
        return made

    def posterior(self, method: Method, stats: dict[str, Tensor], info: dict[str, Any]) -> Posterior:
        """What was kept, with how the sampler fared."""
        kept = torch.stack(self.kept, dim=1) if self.kept else None  # (chains, draws, ...)
        self.kept = [] if kept is None else list(kept.unbind(dim=1))  # views, so that memory holds them once
        params, other = (kept, None) if self.store == "params" else (None, kept)
        return self.target.posterior(method, params, info, sample_stats=stats, kept=other, stream=self.stream)


def sample_stats(run: Chains) -> dict[str, Tensor]:
    """How the sampler fared, (chain, draw) each, under ArviZ's names."""
    # as the leapfrog used it, in the positions' type
    step = run.step_size.to(run.state.position.dtype).double()[:, None].expand(run.accept.shape)
    return {
        "accept_prob": run.accept, "energy": run.energy, "diverging": run.diverging, "lp": run.log_prob,
        "n_steps": run.steps, "step_size": step,
    }  # fmt: skip
