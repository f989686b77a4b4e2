"""A training as a file, from which it goes on as if it had not been stopped; nothing is pickled."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput
from mlcollage.infer.tensor_file import load, save

__all__ = ["Training", "digest", "resume_training", "save_training"]

_KIND = "training of trajectories"


@dataclass(frozen=True)
class Training:
    """All that decides how a training goes on; its updates are counted by the losses."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    generators: Mapping[str, torch.Generator]
    losses: list[float]


def digest(*arrays: NDArray) -> str:
    """A short fingerprint of shapes and values."""
    found = hashlib.sha256()
    for a in arrays:
        found.update(f"{a.dtype} {a.shape}".encode())
        found.update(np.ascontiguousarray(a).tobytes())
    return f"{' and '.join(str(a.shape) for a in arrays)} {found.hexdigest()[:12]}"


def save_training(path: str | os.PathLike[str], training: Training, about: Mapping[str, Any]) -> None:
    """Write the training; ``about`` is what must be the same where it goes on."""
    content = {
        "about": dict(about),
        "weights": {k: v.detach() for k, v in training.model.state_dict().items()},
        "moments": {str(i): dict(s) for i, s in training.optimizer.state_dict()["state"].items()},
        "generators": {name: g.get_state() for name, g in training.generators.items()},
        "losses": list(training.losses),
    }
    save(path, _KIND, content)


def resume_training(path: str | os.PathLike[str], training: Training, about: Mapping[str, Any]) -> None:
    """Go on from a file, if there is one.

    Raises
    ------
    InvalidInput
        If it is of other data or settings; the sentence has both values.
    """
    if not Path(path).exists():
        return
    content = load(path, _KIND)
    theirs, ours = content["about"], dict(about)
    for name in dict.fromkeys((*ours, *theirs)):
        if theirs.get(name) != ours.get(name):
            raise InvalidInput(
                f"{path} is of another training: {name} is {theirs.get(name)!r} there and {ours.get(name)!r} here; "
                "name another file, or remove it."
            )
    training.model.load_state_dict(content["weights"])
    state = {int(i): s for i, s in content["moments"].items()}
    groups = training.optimizer.state_dict()["param_groups"]
    training.optimizer.load_state_dict({"state": state, "param_groups": groups})
    for name, g in training.generators.items():
        g.set_state(content["generators"][name].cpu())
    training.losses[:] = content["losses"]
