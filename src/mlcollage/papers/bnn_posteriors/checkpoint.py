"""Long runs that survive: the state of a chain in a folder, written whole or not at all, and never pickled."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.infer.density import State
from mlcollage.infer.chains import Chains

from ._checks import as_tensor
from .layout import Layout
from .posterior import PredictionStream

if TYPE_CHECKING:
    from ._keep import Keeper
    from .module import BayesianModule

__all__ = ["Checkpoint"]

_FORMAT = "mlcollage hmc checkpoint 1"
_COLUMNS = ("log_prob", "accept", "energy", "diverging", "steps")


@dataclass
class Checkpoint:
    """A run's folder: ``state.safetensors`` and a file for each block of draws.

    Attributes
    ----------
    position, step_size, mass
        Where the chains stand, and with what they go on; None in a fresh folder.
    draws : int
        Draws of each chain so far.
    columns : list of Chains
        How the sampler fared so far.
    """

    folder: Path
    header: dict[str, Any]
    position: Tensor | None = None
    step_size: Tensor | None = None
    mass: Tensor | None = None
    draws: int = 0
    columns: list[Chains] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        folder: Any,
        model: BayesianModule,
        settings: dict[str, Any],
        X: Any,
        y: Any,
        keeper: Keeper,
        rng: torch.Generator,
    ) -> Checkpoint:
        """The folder's run if there is one, which must be this one; its draws go to ``keeper``, its state to ``rng``.

        Raises
        ------
        InvalidInput
            If the folder holds a run of another architecture, other settings or other data.
        """
        if callable(keeper.store):
            raise InvalidInput("a checkpoint cannot hold what a function keeps; use store='params' or 'predictions'.")
        header = {
            "format": _FORMAT,
            "names": list(model.layout.names),
            "shapes": [list(shape) for shape in model.layout.shapes],
            "prior": repr(model.prior) if "object at" not in repr(model.prior) else type(model.prior).__name__,
            "data": _fingerprint(X, y, keeper.stream.x if keeper.stream else None),
            "settings": settings,
        }
        made = cls(Path(folder), header)
        made.folder.mkdir(parents=True, exist_ok=True)
        file = made.folder / "state.safetensors"
        if file.exists():
            made._read(file, keeper, rng, model)
        return made

    def _read(self, file: Path, keeper: Keeper, rng: torch.Generator, model: BayesianModule) -> None:
        header, state = _load(file)
        if header.get("format") != _FORMAT:
            raise InvalidInput(f"{file} is no checkpoint of a run; give another folder.")
        found = Layout(tuple(header["names"]), tuple(tuple(s) for s in header["shapes"]))
        if (difference := model.layout.difference(found)) is not None:
            raise InvalidInput(f"{self.folder} holds a run of another architecture: {difference} (this one, and that).")
        for what in ("prior", "data", "settings"):
            if json.loads(json.dumps(self.header[what])) != header[what]:
                raise InvalidInput(
                    f"{self.folder} holds a run with other {what}; give another folder, or the same {what}."
                )
        device = model.parameters_flat.device
        self.position, self.step_size = state["position"].to(device), state["step_size"].to(device)
        self.mass = state["mass"].to(device) if "mass" in state else None
        self.draws = int(state["draws"])
        rng.set_state(state["generator"])
        self.columns = [self._as_chains({name: state[f"columns.{name}"].to(device) for name in _COLUMNS})]
        if keeper.stream is not None:
            own = {k.removeprefix("stream."): v.to(device) for k, v in state.items() if k.startswith("stream.")}
            keeper.stream = PredictionStream.from_tensors(model.likelihood, own)
        if keeper.store == "params":
            for name in header["blocks"]:
                keeper.kept += list(_load(self.folder / name)[1]["params"].to(device).unbind(dim=1))
        self.header["blocks"] = header["blocks"]

    def _as_chains(self, columns: dict[str, Tensor]) -> Chains:
        assert self.position is not None
        assert self.step_size is not None
        nothing = self.position.new_empty((len(self.position), 0))
        state = State(self.position, nothing[:, 0:0], nothing)
        return Chains(nothing, **columns, step_size=self.step_size, mass=self.mass, state=state)

    def write(
        self,
        position: Tensor,
        step_size: Tensor,
        mass: Tensor | None,
        draws: int,
        columns: list[Chains],
        keeper: Keeper,
        rng: torch.Generator,
    ) -> None:
        """Write the state after ``draws`` draws; what was there before stays until the new is complete."""
        blocks = self.header.setdefault("blocks", [])
        if keeper.store == "params" and draws > self.draws:
            name = f"draws-{self.draws:06d}-{draws:06d}.safetensors"
            _save(self.folder / name, {"params": torch.stack(keeper.kept[self.draws : draws], dim=1)}, {})
            blocks.append(name)
        state = {
            "position": position,
            "step_size": step_size,
            "draws": torch.tensor(draws),
            "generator": rng.get_state(),
            **{f"columns.{n}": torch.cat([getattr(c, n) for c in columns], dim=1) for n in _COLUMNS},
        }
        if mass is not None:
            state["mass"] = mass
        if keeper.stream is not None:
            state |= {f"stream.{name}": value for name, value in keeper.stream.tensors().items()}
        _save(self.folder / "state.safetensors", state, self.header)
        self.draws = draws


def _fingerprint(*values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        if value is not None:
            array = as_tensor(value, "X").detach().cpu().contiguous()
            digest.update(f"{array.dtype} {tuple(array.shape)}".encode())
            digest.update(array.numpy().tobytes())
    return digest.hexdigest()


def _save(file: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    present = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(present, temporary, metadata={"mlcollage": json.dumps(header)})
    os.replace(temporary, file)


def _load(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            header = json.loads((opened.metadata() or {}).get("mlcollage", "{}"))
            return header, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInput(f"{file} is damaged or no checkpoint: {error}.") from None
