"""A training as a file: everything that decides how it goes on, and nothing pickled."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.infer.tensor_file import load, save

from .learner import Learner

if TYPE_CHECKING:
    from mlcollage.train.replicas import Replicas


__all__ = ["Snapshot", "resume_training", "save_training"]

_KIND = "training of asymmetric self-play"
_STATES = ("_alice_state", "_bob_state", "_goals_set", "_failed", "_over")


@dataclass(frozen=True)
class Snapshot:
    """Policies of both sides at one moment, all seeds stacked; never touched by later updates."""

    steps: tuple[int, ...]  # environment steps so far, for each seed
    alice: Mapping[str, Tensor]
    bob: Mapping[str, Tensor]


def _about(game: Any) -> dict[str, Any]:
    """What must be the same in the game that goes on."""
    settings = dataclasses.asdict(game.config)
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "the world": type(game.world).__name__,
        "bins": [int(b) for b in game.world.bins],
        "thresholds": [float(t) for t in game.world.thresholds],
        "the shape of states": list(game._alice_state.shape),
        "seeds": list(game.seeds),
        "direct training on given goals": game.goals is not None,
    }


def _networks(game: Any) -> dict[str, Replicas]:
    sides: dict[str, Learner] = {"Alice": game.alice, "Bob": game.bob}
    return {
        f"{name}'s {part}": getattr(learner, part) for name, learner in sides.items() for part in ("policy", "value")
    }


def save_training(game: Any, path: str | os.PathLike[str]) -> Path:
    """Write a training; see :meth:`AsymmetricSelfPlay.save`."""
    networks = {
        name: {
            "parameters": dict(replicas.parameters),
            "buffers": dict(replicas.buffers),
            "optimizer": replicas.optimizer.state_dict()["state"],
            "steps": replicas.steps_done,
        }
        for name, replicas in _networks(game).items()
    }
    return save(
        path,
        _KIND,
        {
            "about": _about(game),
            "networks": networks,
            "states": {name: getattr(game, name) for name in _STATES},
            "pool": [{"steps": s.steps, "alice": dict(s.alice), "bob": dict(s.bob)} for s in game.pool],
            "turns": game.turns,
            "steps": game.steps,
            "history": game.history,
        },
    )


def resume_training(game: Any, path: str | os.PathLike[str]) -> None:
    """Go on from a file; see :meth:`AsymmetricSelfPlay.resume`."""
    content = load(path, _KIND)
    theirs, ours = content["about"], _about(game)
    for name in dict.fromkeys((*ours, *theirs)):
        if theirs.get(name) != ours.get(name):
            raise InvalidInput(
                f"{path} is of another game: {name} is {theirs.get(name)!r} there and {ours.get(name)!r} here; make "
                "the game as it was made then."
            )
    networks = _networks(game)
    for name, replicas in networks.items():
        for part in ("parameters", "buffers"):
            here = {k: (v.shape, v.dtype) for k, v in getattr(replicas, part).items()}
            there = {k: (v.shape, v.dtype) for k, v in content["networks"][name][part].items()}
            if here != there:
                raise InvalidInput(f"{path} is of another game: {name} has other layers there than here.")
    for name, replicas in networks.items():
        found = content["networks"][name]
        with torch.no_grad():
            for part in ("parameters", "buffers"):
                for key, value in found[part].items():
                    getattr(replicas, part)[key].copy_(value)
        state = {int(i): s for i, s in found["optimizer"].items()}
        replicas.optimizer.load_state_dict(
            {"state": state, "param_groups": replicas.optimizer.state_dict()["param_groups"]}
        )
        replicas.steps_done = found["steps"]
    for name in _STATES:
        setattr(game, name, content["states"][name].to(game.device))

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(game.device) for name, value in tensors.items()}

    game.pool = [Snapshot(tuple(s["steps"]), moved(s["alice"]), moved(s["bob"])) for s in content["pool"]]
    game.turns, game.steps, game.history, game.last = content["turns"], content["steps"], content["history"], None
