"""GraspAndTurn: the grasp world with rotations: a gripper that turns and tilts, blocks that come to rest on a face."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlcollage import _checks as checks

from .grasp import Grasp25D
from .rotation import (
    Symmetry,
    euler_to_quaternion,
    quaternion_conjugate,
    quaternion_multiply,
    rotation_distance,
)

__all__ = ["GraspAndTurn"]


class GraspAndTurn(Grasp25D):
    r"""A :class:`Grasp25D` whose gripper turns about the vertical and tilts, and with it the block that it holds.

    A block that is let go comes to rest on the face that is nearest to lying flat. Goals are places and rotations,
    so that a block can be asked to be flipped.

    Parameters
    ----------
    blocks, threshold, half_width, stride, reach, size, zone
        As for :class:`Grasp25D`.
    angle
        How near its goal a block's rotation must be, in radians.
    turn
        Largest turn and tilt of the gripper in one step, in radians.
    symmetry
        Of the blocks, for :func:`rotation_distance`; ``"none"``: their faces differ.

    Attributes
    ----------
    bins : tuple of int
        (5, 5, 5, 5, 5, 5): x, y, z, fingers, turn, tilt; choice 2 of each changes nothing.
    thresholds : tuple of float
        ``(threshold, angle)``.

    Raises
    ------
    InvalidInput
        As :class:`Grasp25D`.

    Notes
    -----
    States (n, 7 + 7 K): those of :class:`Grasp25D`, then the gripper's turn and tilt, and a quaternion (w first) of
    each block. A turn is bounded by half a circle to each side, a tilt by a quarter.

    Examples
    --------
    >>> from mlcollage.papers.asymmetric_self_play import certify
    >>> certify(GraspAndTurn(2)).deviation
    0.0
    """

    bins: tuple[int, ...] = (5, 5, 5, 5, 5, 5)

    def __init__(
        self,
        blocks: int = 1,
        *,
        threshold: float = 0.12,
        angle: float = 0.4,
        half_width: float = 0.6,
        stride: float = 0.15,
        reach: float = 0.15,
        size: float = 0.1,
        zone: float = 0.5,
        turn: float = math.pi / 4,
        symmetry: Symmetry = "none",
    ) -> None:
        super().__init__(
            blocks, threshold=threshold, half_width=half_width, stride=stride, reach=reach, size=size, zone=zone
        )
        self.angle, self.turn = checks.real("angle", angle, above=0, below=math.pi), checks.positive("turn", turn)
        self.symmetry = checks.choice("symmetry", symmetry, ("none", "mod90", "mod180"))
        self.thresholds = (self.threshold, self.angle)
        self._width = 5 + 3 * self.blocks  # of what the world without rotations remembers

    def initial(self, n: int, generator: torch.Generator) -> Tensor:
        """As without rotations; blocks lie flat, turned about the vertical, and the gripper points down."""
        state = super().initial(n, generator)
        yaw = math.pi / 2 * (torch.rand(n, self.blocks, generator=generator, device=state.device) - 0.5)
        quaternion = euler_to_quaternion(torch.stack((0 * yaw, 0 * yaw, yaw), -1))
        return torch.cat((state, torch.zeros_like(state[:, :2]), quaternion.flatten(1)), 1)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """Move, turning what is held; then close or open, then push."""
        wrist, quaternion = self._turned(state)
        before, move = state[:, : self._width], (action[:, 4:].to(state.dtype) - 2) / 2
        limit = wrist.new_tensor([math.pi, math.pi / 2])
        target = torch.minimum(torch.maximum(wrist + self.turn * move, -limit), limit)
        after = super().step(before, action[:, :4])
        number = torch.arange(self.blocks, device=state.device)
        holding = (before[:, 4:5] == number)[..., None]  # (n, K, 1)
        change = quaternion_multiply(_orientation(target), quaternion_conjugate(_orientation(wrist)))
        quaternion = torch.where(holding, quaternion_multiply(change[:, None], quaternion), quaternion)
        falling = holding & (after[:, 4] < 0)[:, None, None]
        quaternion = torch.where(falling, flat(quaternion), quaternion)
        return torch.cat((after, target, quaternion.flatten(1)), 1)

    def _turned(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The gripper's turn and tilt (n, 2), and the blocks' rotations (n, K, 4)."""
        w = self._width
        return state[:, w : w + 2], state[:, w + 2 :].unflatten(1, (self.blocks, 4))

    def observe(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """As without rotations; and sine and cosine of turn and tilt, and each block's quaternion."""
        robot, objects = super().observe(state)
        wrist, _ = self._turned(state)
        return torch.cat((robot, wrist.sin(), wrist.cos()), 1), torch.cat((objects, self.achieved(state)[..., 3:]), -1)

    def achieved(self, state: Tensor) -> Tensor:
        """Poses of the blocks, (n, K, 7): places, and quaternions with the w first and not negative."""
        quaternion = self._turned(state)[1]
        sign = torch.where(quaternion[..., :1] < 0, -1.0, 1.0)
        return torch.cat((self._parts(state)[3], sign * quaternion), -1)

    def distance(self, achieved: Tensor, goal: Tensor) -> Tensor:
        """Meters and radians, (..., K, 2)."""
        a, g = achieved.double(), goal.double()
        angle = rotation_distance(g[..., 3:], a[..., 3:], self.symmetry)
        return torch.stack(((a[..., :3] - g[..., :3]).norm(dim=-1), angle), -1)


def _orientation(wrist: Tensor) -> Tensor:
    """The gripper's quaternion (n, 4) of its turn about the vertical and its tilt (n, 2) about its own x."""
    zero = torch.zeros_like(wrist[:, 0])
    turn = euler_to_quaternion(torch.stack((zero, zero, wrist[:, 0]), -1))
    return quaternion_multiply(turn, euler_to_quaternion(torch.stack((wrist[:, 1], zero, zero), -1)))


def flat(quaternion: Tensor) -> Tensor:
    """Rotations (..., 4) of cubes that come to rest on the face that is nearest to lying flat: the smallest turn.

    Examples
    --------
    >>> tilted = euler_to_quaternion(torch.tensor([0.3, 0.0, 0.0]))
    >>> [round(v, 4) for v in flat(tilted).tolist()]
    [1.0, 0.0, 0.0, 0.0]
    """
    w, x, y, z = quaternion.unbind(-1)
    # Columns of the rotation matrix: where the body's axes point.
    axes = torch.stack(
        (
            torch.stack((1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)), -1),
            torch.stack((2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)), -1),
            torch.stack((2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)), -1),
        ),
        -2,
    )  # (..., 3 axes, 3)
    steepest = axes[..., 2].abs().argmax(-1)
    up = axes.gather(-2, steepest[..., None, None].expand(*steepest.shape, 1, 3)).squeeze(-2)
    up = torch.where(up[..., 2:] < 0, -up, up)
    back = torch.stack((1 + up[..., 2], up[..., 1], -up[..., 0], torch.zeros_like(w)), -1)
    turned = quaternion_multiply(back / back.norm(dim=-1, keepdim=True), quaternion)
    return turned / turned.norm(dim=-1, keepdim=True)
