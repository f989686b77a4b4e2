"""Goals that nobody trains on: pushing, picking up and stacking, and the states of robogym's hand-made tasks."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlcollage.data.goal_tasks import GoalSet
from mlcollage.errors import InvalidInput, MissingFile

from .grasp import Grasp25D
from .grasp_turn import GraspAndTurn
from .planar import PlanarPush
from .rotation import on_its_side

__all__ = ["RobogymState", "block_holdouts", "disc_holdouts", "load_robogym_state"]

_FAR = 2.0  # thresholds that a goal lies from the start, at least
_TRIES = 64
# What numpy, zipfile and zlib raise for archives that are damaged, or hold pickled objects.
_UNREADABLE = (
    *(ValueError, OSError, EOFError, KeyError, RuntimeError, SyntaxError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)


def block_holdouts(world: Grasp25D) -> dict[str, GoalSet]:
    """Hold-out goals for blocks: ``push``, ``pick``, and ``stack`` if there are two blocks or more.

    Parameters
    ----------
    world
        The world whose states and goals are made.

    Returns
    -------
    dict
        Functions of (n, generator) that give start states (n, S) and goals (n, K, G). ``push``: each block elsewhere
        on the table, by two thresholds at least; ``pick``: the first block held in the air, 0.2 to 0.4 above the table,
        the others where they are; ``stack``: the first block on top of the second; with rotations also ``flip``: the
        first block where it is, on its side.

    Examples
    --------
    >>> state, goal = block_holdouts(Grasp25D())["pick"](3, torch.Generator().manual_seed(0))
    >>> goal.shape, bool((goal[..., 2] >= 0.2).all())
    (torch.Size([3, 1, 3]), True)
    """

    def push(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        state = world.initial(n, generator)
        return state, _elsewhere(world, state, generator)

    def pick(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        state = world.initial(n, generator)
        goal = world.achieved(state).clone()
        goal[:, 0, :2] = _elsewhere(world, state, generator)[:, 0, :2]
        goal[:, 0, 2] = 0.2 + 0.2 * torch.rand(n, generator=generator, device=state.device)
        return state, goal

    def stack(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        state = world.initial(n, generator)
        goal = world.achieved(state).clone()
        goal[:, 0, :3] = goal[:, 1, :3]
        goal[:, 0, 2] += world.size
        return state, goal

    def flip(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        state = world.initial(n, generator)
        goal = world.achieved(state).clone()
        goal[:, 0, 3:] = on_its_side(goal[:, 0, 3:])
        return state, goal

    sets: dict[str, GoalSet] = {"push": push, "pick": pick}
    sets |= {"stack": stack} if world.blocks > 1 else {}
    return sets | ({"flip": flip} if isinstance(world, GraspAndTurn) else {})


def disc_holdouts(world: PlanarPush) -> dict[str, GoalSet]:
    """Hold-out goals for discs: ``push``, each disc elsewhere on the table, by two thresholds at least.

    Examples
    --------
    >>> state, goal = disc_holdouts(PlanarPush())["push"](3, torch.Generator().manual_seed(0))
    >>> goal.shape
    torch.Size([3, 1, 2])
    """

    def push(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        state = world.initial(n, generator)
        return state, _elsewhere(world, state, generator)

    return {"push": push}


def _elsewhere(world: Grasp25D | PlanarPush, state: Tensor, generator: torch.Generator) -> Tensor:
    """Places that an initial state of its own could have, far from the present ones."""
    goal = world.achieved(state).clone()
    places = 2 if isinstance(world, PlanarPush) else 3  # rotations stay
    open_ = torch.ones(len(goal), dtype=torch.bool, device=goal.device)
    for _ in range(_TRIES):
        drawn = world.achieved(world.initial(len(goal), generator))
        far = (world.distance(drawn, world.achieved(state))[..., 0] > _FAR * world.threshold).all(-1)
        goal[..., :places] = torch.where((open_ & far)[:, None, None], drawn[..., :places], goal[..., :places])
        open_ = open_ & ~far
        if not bool(open_.any()):
            return goal
    raise InvalidInput(
        f"no goal lies {_FAR:g} thresholds from its start: threshold {world.threshold:g} is too large for a table "
        f"{2 * world.half_width:g} wide."
    )


def mixed(sets: dict[str, GoalSet]) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """All sets in equal parts, in random order: the goals of direct training."""

    def goals(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = [f(n, generator) for f in sets.values()]
        which = torch.randint(len(drawn), (n,), generator=generator, device=generator.device)
        rows = torch.arange(n, device=which.device)
        return (
            torch.stack([state for state, _ in drawn])[which, rows],
            torch.stack([goal for _, goal in drawn])[which, rows],
        )

    return goals


class RobogymState(NamedTuple):
    """Objects of one state of robogym: places (n, 3) in meters, and rotations (n, 4) as unit quaternions, w first."""

    position: Tensor
    quaternion: Tensor


def load_robogym_state(path: str | Path) -> RobogymState:
    """Read an initial or goal state of robogym's hold-out tasks, an ``.npz`` of ``obj_pos`` and ``obj_quat``.

    Parameters
    ----------
    path
        The file; any number of objects, with or without a leading axis of 1.

    Returns
    -------
    RobogymState
        float64; rotations normalized.

    Raises
    ------
    MissingFile
        If there is no such file.
    InvalidInput
        For a damaged file, missing or pickled arrays, shapes that do not fit, NaN, quaternions far from length 1
        (another order or unit, perhaps), and places beyond 10 meters (millimeters, perhaps); the sentence names file
        and key.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "stack.npz"
    ...     np.savez(file, obj_pos=np.zeros((3, 3)), obj_quat=np.tile([1.0, 0, 0, 0], (3, 1)))
    ...     load_robogym_state(file).position.shape
    torch.Size([3, 3])
    """
    if not isinstance(path, str | os.PathLike):
        raise InvalidInput(f"path must be the name of a file, not a {type(path).__name__}.")
    file = Path(path)
    if not file.is_file():
        raise MissingFile(f"there is no file {file}.")
    found = {}
    for key, width in (("obj_pos", 3), ("obj_quat", 4)):
        try:
            opened = np.load(file, allow_pickle=False)
            if not isinstance(opened, np.lib.npyio.NpzFile):
                raise InvalidInput(
                    f"{file.name} holds one array without a name; expected an .npz of obj_pos, obj_quat."
                )
            with opened as archive:
                if key not in archive.files:
                    raise InvalidInput(f"{file.name} has no {key!r}; it has {', '.join(archive.files) or 'nothing'}.")
                values = np.asarray(archive[key])
        except InvalidInput:
            raise
        except _UNREADABLE as error:
            raise InvalidInput(
                f"{key} of {file.name} cannot be read: the archive is damaged, or holds pickled objects, which are not "
                "loaded."
            ) from error
        if values.ndim == 3 and len(values) == 1:
            values = values[0]
        if values.ndim != 2 or values.shape[1] != width or not len(values) or values.dtype.kind not in "fiu":
            raise InvalidInput(f"{key} of {file.name} is {values.dtype} {values.shape}; expected numbers (n, {width}).")
        if not np.isfinite(values).all():
            raise InvalidInput(f"{key} of {file.name} has NaN or infinity in row {_first_bad(values)}.")
        found[key] = torch.from_numpy(values.astype(np.float64))
    position, quaternion = found["obj_pos"], found["obj_quat"]
    if len(position) != len(quaternion):
        raise InvalidInput(f"{file.name} has {len(position)} rows of obj_pos and {len(quaternion)} of obj_quat.")
    if float(position.abs().max()) > 10:
        raise InvalidInput(
            f"obj_pos of {file.name} goes to {float(position.abs().max()):g}; expected meters on a table. Divide "
            "millimeters by 1,000."
        )
    lengths = quaternion.norm(dim=-1)
    if float((lengths - 1).abs().max()) > 0.01:
        raise InvalidInput(
            f"obj_quat of {file.name} has quaternions of length {float(lengths.min()):.3g} "
            f"to {float(lengths.max()):.3g}; expected unit quaternions, w first."
        )
    return RobogymState(position, quaternion / lengths[:, None])


def _first_bad(values: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(values).all(1))[0])
