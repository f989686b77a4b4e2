"""Samplers whose runs can be killed, resumed and extended: the same draws as without a pause.

A run's folder holds its state and a file for each block of draws, each written whole or not at all. It goes on only
under everything that defines density and run: data, network, likelihood, prior, settings, seed. That is told by a
:func:`~mlcollage.papers.bnn_posteriors.fingerprint.fingerprint` of each, and tried: the log-density at the chains'
positions must be what it was.
"""

from __future__ import annotations

import os
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlcollage._checks import integer
from mlcollage.errors import InvalidInput
from mlcollage.infer import Unhealthy, tensor_file
from mlcollage.infer.health import warn_of

from .fingerprint import fingerprint
from .keeping import Keeper, Store
from .method import CountFrom1, Method, Target
from .posterior import Posterior

_STATE, _BLOCK = "state of a run (mlcollage, 2)", "block of draws (mlcollage, 2)"

State = dict[str, Any]  # "position" (chains, P), "drawn", "generator" and what else a sampler goes on with
Save = Callable[[State], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampler(Method):
    """What methods with chains share.

    Parameters
    ----------
    chains, draws
        Chains, side by side, and kept draws of each.
    thin
        Iterations per kept draw.
    store
        ``"params"`` keeps the draws, ``"predictions"`` only the running predictions at the inputs ``at``, a function
        of positions (chains, P) what it returns of each draw (None: nothing).
    at
        Inputs (n, ...) whose predictions are averaged on the way.
    checkpoint
        A folder: the run's state is written there every so often, burn-in and warm-up included. A run with the same
        folder goes on from there, to the same numbers, also to more draws; one of another density, other settings or
        another seed is refused.
    checkpoint_every
        Draws between writes, and iterations of HMC's and NUTS's warm-up.

    Warns
    -----
    Unhealthy
        Of chains that hardly moved, of divergences and of R-hat above 1.01 of log-density or predictions; see
        :meth:`Posterior.health <mlcollage.papers.bnn_posteriors.posterior.Posterior.health>`.
    """

    chains: CountFrom1 = 4
    draws: CountFrom1 = 100
    thin: CountFrom1 = 1
    store: Store = "params"
    at: Any = None
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: CountFrom1 = 10

    def settings(self) -> dict[str, Any]:
        """See :class:`Method`; without where and how often the run is written, which changes nothing."""
        return {name: value for name, value in super().settings().items() if not name.startswith("checkpoint")}

    def run(self, target: Target) -> Posterior:
        """Draw, or go on drawing; called by ``BayesianNetwork.fit``."""
        return self._go_on(target, Keeper(target, self.store, self.at), None)

    @abstractmethod
    def _sample(
        self, target: Target, keeper: Keeper, state: State | None, save: Save, every: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Draw until ``keeper`` has all draws: statistics of the sampler, and what was found on the way.

        Starts from ``state``, if there is one, and calls ``save`` with such states every so many draws and at the end.
        """

    def _go_on(self, target: Target, keeper: Keeper, state: State | None) -> Posterior:
        folder = None if self.checkpoint is None else Checkpoint(self, target, keeper)
        state = (folder.read() if folder else None) or state
        if state is not None:
            if state["drawn"] > self.draws:
                raise InvalidInput(f"the run has {state['drawn']} draws already; ask for as many, not {self.draws}.")
            target.generator.set_state(state["generator"].cpu())
        last: list[State | None] = [state]

        def save(now: State) -> None:
            last[0] = now
            if folder:
                folder.write(now)

        # without a folder only the end is needed, to go on from
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Unhealthy)  # of what is kept here, the posterior tells more
            stats, info = self._sample(target, keeper, state, save, self.checkpoint_every if folder else sys.maxsize)
        more = partial(_extended, self, target, keeper, last[0])
        posterior = replace(keeper.posterior(self, stats, info), continuation=more)
        warn_of(posterior.health())
        return posterior


def _extended(method: Sampler, target: Target, keeper: Keeper, state: State | None, draws: int) -> Posterior:
    """The posterior of a run with so many draws more."""
    longer = replace(method, draws=method.draws + integer("draws", draws, least=1))
    return longer._go_on(target, keeper.copy(), state)


class Checkpoint:
    """A run's folder.

    Parameters
    ----------
    method, target, keeper
        How what is sampled, and what is kept of it.
    """

    def __init__(self, method: Sampler, target: Target, keeper: Keeper):
        if callable(keeper.store):
            raise InvalidInput("a checkpoint cannot hold what a function keeps; use store='params' or 'predictions'.")
        self.folder, self.target, self.keeper = Path(os.fspath(method.checkpoint or "")), target, keeper
        # blocks of draws, and draws in them
        self.file, self.blocks, self.written = self.folder / "state.safetensors", list[str](), 0
        free = ("draws", "checkpoint", "checkpoint_every")  # a run with other ones is the same, or longer
        settings = {f.name: getattr(method, f.name) for f in fields(method) if f.name not in free}
        self.marks = {"method": method.name, **{name: fingerprint(value) for name, value in settings.items()}}
        self.marks |= target.marks()

    def read(self) -> State | None:
        """The run that the folder holds, None if it is empty; draws and predictions go to the keeper.

        Raises
        ------
        InvalidInput
            If it is of another density or other settings, or damaged.
        """
        if not self.file.exists():
            return None
        content = tensor_file.load(self.file, _STATE)
        marks = content["marks"]
        if other := [what for what in {**marks, **self.marks} if marks.get(what) != self.marks.get(what)]:
            raise InvalidInput(
                f"{self.folder} holds a run with another {', '.join(other)}; give another folder, or what it had."
            )
        # paths to a gradient round differently
        self.target.density.take_path(content["path"])
        device, keeper = self.target.density.x.device, self.keeper
        state: State = pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, content["state"])
        self._try(state["position"], content["log_prob"])
        self.blocks, keeper.kept, keeper.count = content["blocks"], [], state["drawn"]
        for name in self.blocks:  # (chains, draws, P) each
            block = tensor_file.load(self.folder / name, _BLOCK)
            if block["marks"] != self.marks:
                raise InvalidInput(f"{self.folder / name} is of another run; restore the folder, or give another one.")
            keeper.kept += list(block["params"].to(device).unbind(dim=1))
        self.written = len(keeper.kept)
        if keeper.stream is not None:
            keeper.stream.load_state_dict(content["stream"])
        return state

    def _try(self, position: Tensor, known: Tensor) -> None:
        """The log-density at the chains' positions, (chains,), must be what it was, up to rounding elsewhere."""
        here = self.target.density(position)[0].cpu()
        rounding = 1e3 * torch.finfo(position.dtype).eps * (known.abs() + self.target.density.num_data)
        off = (here - known).abs() > rounding  # not where both are not finite
        if bool((off | (here.isfinite() != known.isfinite())).any()):
            was, now = float(known.mean()), float(here.mean())
            raise InvalidInput(
                f"{self.folder} holds a run of another density: at the chains' positions its logarithm was {was:.6g} "
                f"and is {now:.6g} now, though no setting differs; give another folder."
            )

    def write(self, state: State) -> None:
        """Write where the run stands; the old state stays until that is complete."""
        density, keeper, done = self.target.density, self.keeper, self.written
        # draws go to files of their own, so that a long run does not write its past again
        if len(keeper.kept) > done:
            name = f"draws-{done:06d}-{len(keeper.kept):06d}.safetensors"
            new = torch.stack(keeper.kept[done:], dim=1)  # (chains, new draws, P)
            tensor_file.save(self.folder / name, _BLOCK, {"marks": self.marks, "params": new})
            self.blocks, self.written = [*self.blocks, name], len(keeper.kept)
        content = {
            "marks": self.marks, "path": density.backend.name, "log_prob": density(state["position"])[0],
            "state": state, "blocks": self.blocks, "stream": keeper.stream.state_dict() if keeper.stream else None,
        }  # fmt: skip
        tensor_file.save(self.file, _STATE, content)
