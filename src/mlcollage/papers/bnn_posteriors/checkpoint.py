"""Long runs that survive: the state of the chains in a folder, written whole or not at all, and never pickled."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.infer import Chains, State
from mlcollage.infer._run import Mass

from . import tensor_file
from .keeping import Keeper
from .method import Target
from .posterior import PredictionStream

_KIND = "checkpoint of a run of HMC (mlcollage, 1)"
_COLUMNS = ("log_prob", "accept", "energy", "diverging", "steps")


@dataclass
class Progressed:
    """Where a run stands.

    Attributes
    ----------
    position : Tensor
        (chains, P).
    step_size, mass
        With what it goes on.
    draws : int
        Draws of each chain so far.
    runs : list of Chains
        How the sampler fared so far.
    """

    position: Tensor
    step_size: Tensor | float | None
    mass: Mass
    draws: int = 0
    runs: list[Chains] = field(default_factory=list)


class Checkpoint:
    """A run's folder: ``state.safetensors`` and a file for each block of draws.

    Parameters
    ----------
    folder
        Made if it is not there.
    target, keeper
        What is sampled, and what is kept of it.
    settings
        Of the method; a run goes on only under the same.
    """

    def __init__(self, folder: Any, target: Target, keeper: Keeper, settings: dict[str, Any]):
        if callable(keeper.store):
            raise InvalidInput("a checkpoint cannot hold what a function keeps; use store='params' or 'predictions'.")
        self.folder, self.target, self.keeper = Path(folder), target, keeper
        self.file = self.folder / "state.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.layout, density, prior = target.network.layout, target.density, repr(target.network.prior)
        at = keeper.stream.x if keeper.stream else None
        self.header: dict[str, Any] = {
            # the default repr holds an address, which changes from run to run
            "prior": prior if "object at" not in prior else type(target.network.prior).__name__,
            "data": _fingerprint(density.x, density.y, at),
            "settings": settings,
            "blocks": [],
        }

    def read(self) -> Progressed | None:
        """The run that the folder holds; its draws go to the keeper, its random state to the generator.

        Raises
        ------
        InvalidInput
            If it is of another architecture, other settings or other data.
        """
        if not self.file.exists():
            return None
        _, state, header = tensor_file.load(self.file, _KIND, self.layout)
        # through JSON, as the file went: tuples are lists there
        for what in ("prior", "data", "settings"):
            if json.loads(json.dumps(self.header[what])) != header[what]:
                raise InvalidInput(f"{self.folder} holds a run with other {what}; give another folder.")
        device, keeper = self.target.density.x.device, self.keeper
        # the state of a generator is on the CPU, wherever the generator is
        self.target.generator.set_state(state.pop("generator"))
        state = {name: value.to(device) for name, value in state.items()}
        if keeper.stream is not None:
            stream = tensor_file.under(state, "stream.")
            keeper.stream = PredictionStream.from_tensors(keeper.stream.likelihood, stream, keeper.stream.target_shape)
        for name in header["blocks"]:  # (chains, draws, P) each
            keeper.kept += list(tensor_file.load(self.folder / name, _KIND)[1]["params"].to(device).unbind(dim=1))
        self.header["blocks"] = header["blocks"]
        position, step_size, mass = state["position"], state["step_size"], state.get("mass")
        columns = tensor_file.under(state, "columns.")  # (chains, draws) each
        # the draws are the keeper's, so the run itself holds none, (chains, 0)
        nothing = position.new_empty((len(position), 0))
        run = Chains(nothing, **columns, step_size=step_size, mass=mass, state=State(position, nothing, nothing))
        return Progressed(position, step_size, mass, int(state["draws"]), [run])

    def write(self, run: Progressed, since: int) -> None:
        """Write where the run stands, with its draws from ``since`` on; the old state stays until that is complete."""
        # draws go to files of their own, so that a long run does not write its past again
        if self.keeper.store == "params":
            name = f"draws-{since:06d}-{run.draws:06d}.safetensors"
            new = torch.stack(self.keeper.kept[since : run.draws], dim=1)  # (chains, new draws, P)
            tensor_file.save(self.folder / name, _KIND, self.layout, {"params": new})
            self.header["blocks"].append(name)
        state = {
            "position": run.position,
            "step_size": torch.as_tensor(run.step_size),
            "mass": torch.as_tensor(run.mass) if isinstance(run.mass, Tensor) else None,
            "draws": torch.tensor(run.draws),
            "generator": self.target.generator.get_state(),
            **{f"columns.{n}": torch.cat([getattr(part, n) for part in run.runs], dim=1) for n in _COLUMNS},
        }
        if self.keeper.stream is not None:
            state |= {f"stream.{name}": value for name, value in self.keeper.stream.tensors().items()}
        tensor_file.save(self.file, _KIND, self.layout, state, **self.header)


def _fingerprint(*values: Tensor | None) -> str:
    digest = hashlib.sha256()
    for value in values:
        if value is not None:
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
