"""MujocoTabletop: boxes on a table and a gripper, with contacts, friction and rotations, stepped on threads."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.data.goal_tasks import GoalSet
from mlcollage.errors import InvalidInput, MissingDependency

from .rotation import Symmetry, euler_to_quaternion, on_its_side, rotation_distance

__all__ = ["MujocoTabletop", "tabletop_holdouts"]

_HALF = 0.025  # of a box's edge, in meters
_TABLE = 0.3  # half of the table's edge
_OPEN = 0.05  # of a finger from the middle
_COLORS = (  # of the boxes
    "0.84 0.37 0",
    "0 0.45 0.7",
    "0 0.62 0.45",
    "0.9 0.62 0",
    "0.8 0.47 0.65",
    "0.34 0.71 0.91",
    "0.6 0.6 0.6",
    "0 0 0",
)


def _model_text(boxes: int) -> str:
    bodies = "".join(
        f'<body name="box{k}" pos="{0.1 * k - 0.2} 0.2 {_HALF}"><freejoint/>'
        f'<geom type="box" size="{_HALF} {_HALF} {_HALF}" mass="0.05" friction="1 0.01 0.0005" condim="4" '
        f'rgba="{_COLORS[k]} 1"/></body>'
        for k in range(boxes)
    )
    finger = 'type="box" size="0.012 0.006 0.03" mass="0.05" friction="2 0.02 0.001" condim="4" rgba="0.2 0.2 0.2 1"'
    slides = "".join(
        f'<joint name="{axis}" type="slide" axis="{d}" damping="20" armature="0.1"/>'
        for axis, d in (("x", "1 0 0"), ("y", "0 1 0"), ("z", "0 0 1"))
    )
    fingers = "".join(
        f'<body name="{name}" pos="0 0 -0.05" gravcomp="1"><joint name="{name}" type="slide" axis="0 {sign} 0" '
        f'range="0.004 {_OPEN}" limited="true" damping="5"/><geom {finger}/></body>'
        for name, sign in (("left", 1), ("right", -1))
    )
    pulls = "".join(f'<position joint="{axis}" kp="800" kv="60"/>' for axis in "xyz")
    grips = "".join(f'<position joint="{name}" kp="150" forcerange="-8 8"/>' for name in ("left", "right"))
    return f"""<mujoco>
  <option timestep="0.002" cone="elliptic" integrator="implicitfast" impratio="5"/>
  <worldbody>
    <light pos="0 0 2"/><camera name="front" pos="0 -0.9 0.6" xyaxes="1 0 0 0 0.55 0.83"/>
    <geom name="table" type="box" size="{_TABLE} {_TABLE} 0.02" pos="0 0 -0.02" rgba="0.9 0.88 0.83 1"/>
    <body name="palm" pos="0 0 0.2" gravcomp="1">{slides}
      <joint name="yaw" type="hinge" axis="0 0 1" damping="1" armature="0.01"/>
      <geom type="box" size="0.02 0.06 0.01" mass="0.3" contype="0" conaffinity="0" rgba="0.4 0.4 0.4 1"/>{fingers}
    </body>{bodies}
  </worldbody>
  <actuator>{pulls}<position joint="yaw" kp="5" kv="0.5"/>{grips}</actuator>
</mujoco>"""


class MujocoTabletop:
    """Boxes on a table and a gripper in MuJoCo, as a :class:`~mlcollage.data.GoalWorld`.

    A row of the state is MuJoCo's full physics state; each control step begins without a solver's warm start, so that
    it is a function of the row, and replays are exact on one machine. Rows are stepped by ``mujoco.rollout`` on
    threads.

    Parameters
    ----------
    boxes
        1 to 8, with edges of 5 cm.
    threshold, angle
        How near its goal a box must be: 0.04 m and 0.2 rad in the paper.
    stride, turn
        Longest move of the gripper along one axis, in meters, and of its yaw, in radians, in one step.
    substeps
        Physics steps of 2 ms in a control step: 20 for the paper's 40 ms.
    symmetry
        Of the boxes, for :func:`rotation_distance`; declared, never guessed.
    threads
        By default as many as there are processors.

    Attributes
    ----------
    bins : tuple of int
        (11, 11, 11, 11, 11): x, y, z, yaw (choice 5 stands still), and how far the fingers are open.
    thresholds : tuple of float
        ``(threshold, angle)``.

    Raises
    ------
    MissingDependency
        Without MuJoCo.
    InvalidInput
        For sizes out of range.

    Notes
    -----
    MuJoCo resets a simulation that has become unstable. Such rows become NaN, which makes a goal invalid for a reason
    of its own and ends Bob's turn.

    Examples
    --------
    >>> world = MujocoTabletop(threads=1)
    >>> state = world.initial(2, torch.Generator().manual_seed(0))
    >>> after = world.step(state, torch.full((2, 5), 5))
    >>> bool((world.distance(world.achieved(after), world.achieved(state)) < 0.01).all())
    True
    """

    bins = (11, 11, 11, 11, 11)

    def __init__(
        self,
        boxes: int = 1,
        *,
        threshold: float = 0.04,
        angle: float = 0.2,
        stride: float = 0.05,
        turn: float = 0.3,
        substeps: int = 20,
        symmetry: Symmetry = "none",
        threads: int | None = None,
    ) -> None:
        try:
            import mujoco
            from mujoco import rollout
        except ImportError as error:
            raise MissingDependency("MujocoTabletop needs MuJoCo: pip install 'mlcollage[rl]'.") from error
        self.boxes = checks.integer("boxes", boxes, least=1, most=8)
        self.thresholds = (checks.real("threshold", threshold, above=0, below=_TABLE), checks.positive("angle", angle))
        self.stride, self.turn = checks.positive("stride", stride), checks.positive("turn", turn)
        self.substeps = checks.integer("substeps", substeps, least=1)
        self.symmetry = checks.choice("symmetry", symmetry, ("none", "mod90", "mod180"))
        self._threads = checks.integer("threads", threads or os.cpu_count() or 1, least=1)
        self.model = mujoco.MjModel.from_xml_string(_model_text(self.boxes))
        self._mujoco, self._rollout = mujoco, rollout
        self._spec = mujoco.mjtState.mjSTATE_FULLPHYSICS
        self._size = mujoco.mj_stateSize(self.model, self._spec)
        self._datas = [mujoco.MjData(self.model) for _ in range(self._threads)]

    # A row: time, qpos (x, y, z, yaw, left, right, then 7 for each box), qvel (6, then 6 for each box).
    def _parts(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each row: gripper's joints (n, 6) and their speeds, boxes (n, K, 7) and their speeds (n, K, 6)."""
        nq, nv, k = self.model.nq, self.model.nv, self.boxes
        q, v = state[:, 1 : 1 + nq], state[:, 1 + nq : 1 + nq + nv]
        return q[:, :6], v[:, :6], q[:, 6:].unflatten(1, (k, 7)), v[:, 6:].unflatten(1, (k, 6))

    def initial(self, n: int, generator: torch.Generator) -> Tensor:
        """An open gripper above the table, boxes at rest anywhere on it, turned about the vertical."""
        k = self.boxes
        u = torch.rand(n, 4 + 3 * k, generator=generator, dtype=torch.float64)
        state = torch.zeros(n, self._size, dtype=torch.float64)
        joints, _, boxes, _ = self._parts(state)
        joints[:, :2] = 0.15 * (2 * u[:, :2] - 1)
        joints[:, 2] = -0.1 * u[:, 2]
        joints[:, 3] = math.pi / 2 * (u[:, 3] - 0.5)
        joints[:, 4:] = _OPEN
        # Boxes stand in cells of a grid of their own, so that none overlap.
        cells = torch.stack([torch.randperm(9, generator=generator)[:k] for _ in range(n)])
        middles = torch.stack((cells % 3 - 1, cells // 3 - 1), -1) * 0.13
        boxes[..., :2] = middles + 0.05 * (u[:, 4 : 4 + 2 * k].unflatten(1, (k, 2)) - 0.5)
        boxes[..., 2] = _HALF
        yaw = math.pi / 2 * (u[:, 4 + 2 * k :] - 0.5)
        boxes[..., 3:] = euler_to_quaternion(torch.stack((0 * yaw, 0 * yaw, yaw), -1))
        return state

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """One control step of all rows; rows that are not finite stay so."""
        joints, _, _, _ = self._parts(state)
        share = (action.to(state.dtype) - 5) / 5  # (n, 5) in [-1, 1]
        edge = state.new_tensor([_TABLE, _TABLE, 0.15, math.pi])
        target = joints[:, :4] + share[:, :4] * state.new_tensor([self.stride] * 3 + [self.turn])
        low = state.new_tensor([-_TABLE, -_TABLE, -0.115, -math.pi])
        opening = _OPEN * (share[:, 4:] + 1) / 2
        control = torch.cat((target.clamp(low, edge), opening, opening), 1)
        out = torch.full_like(state, torch.nan)
        whole = torch.isfinite(state).all(1)
        if bool(whole.any()):
            out[whole] = self._simulated(state[whole], control[whole])
        return out

    def _simulated(self, state: Tensor, control: Tensor) -> Tensor:
        rows = np.ascontiguousarray(state.cpu().numpy(), dtype=np.float64)
        controls = np.repeat(control.cpu().numpy()[:, None], self.substeps, axis=1)
        found, _ = self._rollout.rollout(self.model, self._datas, rows, controls)
        after = torch.from_numpy(np.array(found[:, -1])).to(state)
        # A simulation that was reset begins at time 0 again.
        due = state[:, 0] + self.substeps * self.model.opt.timestep
        after[(after[:, 0] - due).abs() > 0.5 * self.model.opt.timestep] = torch.nan
        return after

    def observe(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Robot (n, 6): place, sine and cosine of yaw, opening. Objects (n, K, 17): there, pose, speeds, offset."""
        joints, _, boxes, speeds = self._parts(state)
        place = torch.cat((joints[:, :2], joints[:, 2:3] + 0.15), 1)  # between the fingertips
        robot = torch.cat((place, joints[:, 3:4].sin(), joints[:, 3:4].cos(), 10 * joints[:, 4:5]), 1)
        one = torch.ones_like(boxes[..., :1])
        offset = boxes[..., :3] - place[:, None]
        return robot, torch.cat((one, self.achieved(state), 0.1 * speeds, offset), -1)

    def achieved(self, state: Tensor) -> Tensor:
        """Poses of the boxes, (n, K, 7): places, and quaternions with the w first and not negative."""
        boxes = self._parts(state)[2]
        sign = torch.where(boxes[..., 3:4] < 0, -1.0, 1.0)
        return torch.cat((boxes[..., :3], sign * boxes[..., 3:]), -1)

    def distance(self, achieved: Tensor, goal: Tensor) -> Tensor:
        """Meters and radians, (..., K, 2)."""
        a, g = achieved.double(), goal.double()
        angle = rotation_distance(g[..., 3:], a[..., 3:], self.symmetry)
        return torch.stack(((a[..., :3] - g[..., :3]).norm(dim=-1), angle), -1)

    def off_table(self, state: Tensor) -> Tensor:
        """Boxes whose middle is past the table's edge, or that fall."""
        place = self._parts(state)[2][..., :3]
        return (place[..., :2].abs() > _TABLE).any(-1) | (place[..., 2] < 0)

    def out_of_zone(self, state: Tensor) -> Tensor:
        """Boxes near the edge, or higher than 0.3 m."""
        place = self._parts(state)[2][..., :3]
        return (place[..., :2].abs() > 0.8 * _TABLE).any(-1) | (place[..., 2] > 0.3)

    def frame(self, row: Tensor, *, width: int = 320, height: int = 240) -> Any:
        """A picture (height, width, 3) of one state (S,), seen from the front, where MuJoCo can draw.

        Raises
        ------
        InvalidInput
            Where there is no OpenGL; set ``MUJOCO_GL=egl`` or ``osmesa`` on machines without a display.
        """
        data = self._datas[0]
        self._mujoco.mj_setState(self.model, data, row.cpu().numpy().astype(np.float64), self._spec)
        self._mujoco.mj_forward(self.model, data)
        try:
            with self._mujoco.Renderer(self.model, height, width) as renderer:
                renderer.update_scene(data, camera="front")
                return renderer.render()
        except Exception as error:
            raise InvalidInput(
                "MuJoCo cannot draw here; set the environment variable MUJOCO_GL to egl or osmesa before starting, and "
                "install the library."
            ) from error


def tabletop_holdouts(world: MujocoTabletop) -> dict[str, GoalSet]:
    """Hold-out goals: ``push``, ``flip``, ``pick``, and ``stack`` with two boxes or more.

    ``push``: the first box elsewhere on the table; ``flip``: where it is, on its side;
    ``pick``: up to 0.2 m above the table; ``stack``: on top of the second box. The others stay where they are.

    Examples
    --------
    >>> sorted(tabletop_holdouts(MujocoTabletop(2, threads=1)))
    ['flip', 'pick', 'push', 'stack']
    """

    def of(name: str) -> GoalSet:
        def goals(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            state = world.initial(n, generator)
            goal = world.achieved(state).clone()
            drawn = torch.rand(n, 3, generator=generator, dtype=torch.float64)
            if name in ("push", "pick"):  # on the other side of the table's middle
                sign = torch.where(goal[:, 0, :2] > 0, -1.0, 1.0)
                goal[:, 0, :2] = sign * (0.08 + 0.1 * drawn[:, :2])
            if name == "pick":
                goal[:, 0, 2] = 0.1 + 0.1 * drawn[:, 2]
            if name == "stack":
                goal[:, 0] = goal[:, 1]
                goal[:, 0, 2] += 2 * _HALF
            if name == "flip":
                goal[:, 0, 3:] = on_its_side(goal[:, 0, 3:])
            return state, goal

        return goals

    return {name: of(name) for name in ("push", "flip", "pick", *(("stack",) if world.boxes > 1 else ()))}
