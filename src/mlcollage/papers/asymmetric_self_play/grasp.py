"""Grasp25D: a gripper that moves in space, blocks that can be pushed, lifted, carried and stacked; no velocities."""

from __future__ import annotations

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

__all__ = ["Grasp25D"]

_HIGH = 0.5  # how high the gripper goes
_MARGIN = 0.1  # how far past the table it reaches


class Grasp25D:
    r"""A table with blocks and a gripper, as batched tensor code on any device.

    The gripper moves by up to ``stride`` in each direction. Closed from open, it holds the nearest block within
    ``reach``; what it holds moves with it. Opened, it lets the block fall to the table, or onto another block below
    it. Closed and empty, and low, its fingers push blocks aside. There are no velocities: a step is a function of
    places, so states are few numbers and replays are exact.

    Parameters
    ----------
    blocks
        Number of blocks.
    threshold
        How near its goal a block must be.
    half_width
        Half of the table's width; its middle is the origin.
    stride
        Longest move of the gripper along one axis in one step.
    reach
        How near a block must be to be held.
    size
        Height and width of a block.
    zone
        Goals are wanted within this distance of the middle, along x and y.

    Attributes
    ----------
    bins : tuple of int
        (5, 5, 5, 5): x, y, z, fingers. Of each, choice 2 changes nothing; fingers close above it and open below it.
    thresholds : tuple of float
        ``(threshold,)``.

    Raises
    ------
    InvalidInput
        For sizes that are not positive, and a threshold that is not smaller than the table.

    Notes
    -----
    States (n, 5 + 3 K): gripper x, y, z; closed; the number of the held block or -1; places of the blocks.

    Examples
    --------
    >>> world = Grasp25D()
    >>> state = torch.tensor([[0.0, 0.0, 0.0, 0.0, -1.0, 0.05, 0.0, 0.0]])  # a block within reach
    >>> state = world.step(state, torch.tensor([[2, 2, 2, 4]]))  # close
    >>> state = world.step(state, torch.tensor([[4, 2, 4, 2]]))  # lift it to the right
    >>> [round(v, 2) for v in world.achieved(state)[0, 0].tolist()]
    [0.15, 0.0, 0.15]
    """

    bins: tuple[int, ...] = (5, 5, 5, 5)

    def __init__(
        self,
        blocks: int = 1,
        *,
        threshold: float = 0.12,
        half_width: float = 0.6,
        stride: float = 0.15,
        reach: float = 0.15,
        size: float = 0.1,
        zone: float = 0.5,
    ) -> None:
        self.blocks = checks.integer("blocks", blocks, least=1)
        names = ("threshold", "half_width", "stride", "reach", "size", "zone")
        sizes = (threshold, half_width, stride, reach, size, zone)
        values = (checks.positive(name, value) for name, value in zip(names, sizes, strict=True))
        self.threshold, self.half_width, self.stride, self.reach, self.size, self.zone = values
        if self.threshold >= 2 * self.half_width:
            raise InvalidInput(
                f"threshold is {threshold:g} on a table {2 * half_width:g} wide: every goal would be reached at once."
            )
        self.thresholds: tuple[float, ...] = (self.threshold,)

    def initial(self, n: int, generator: torch.Generator) -> Tensor:
        """An open gripper anywhere over the table, blocks anywhere on it, apart from each other."""
        k = self.blocks
        u = torch.rand(n, 3 + 2 * k, generator=generator, device=generator.device)
        state = torch.zeros(n, 5 + 3 * k, device=u.device)
        w = 0.75 * self.half_width
        state[:, :2] = w * (2 * u[:, :2] - 1)
        state[:, 2] = 0.3 * _HIGH * u[:, 2]
        state[:, 4] = -1
        places = w * (2 * u[:, 3:].unflatten(1, (k, 2)) - 1)
        # Blocks that would overlap are put side by side, along x from the first of them.
        for j in range(1, k):
            for i in range(j):
                close = (places[:, j] - places[:, i]).norm(dim=-1) < 1.5 * self.size
                side = torch.where(places[:, i, 0] > 0, -1.0, 1.0)
                places[:, j, 0] = torch.where(close, places[:, i, 0] + 2 * self.size * side, places[:, j, 0])
        state[:, 5:].unflatten(1, (k, 3))[..., :2] = places
        return state

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """Move, then close or open, then push what is in the way."""
        gripper, closed, held, blocks = self._parts(state)
        move = (action.to(state.dtype) - 2) / 2  # (n, 4) in [-1, 1]
        reached = gripper + self.stride * move[:, :3]
        edge = self.half_width + _MARGIN
        target = torch.cat((reached[:, :2].clamp(-edge, edge), reached[:, 2:].clamp(0, _HIGH)), 1)
        number = torch.arange(self.blocks, device=state.device)
        holding = held[:, None] == number  # (n, K)
        blocks = torch.where(holding[..., None], target[:, None], blocks)
        closing, opening = (move[:, 3] > 0) & ~closed, (move[:, 3] < 0) & closed
        # Opened: the block that was held falls onto what lies below it.
        falling = holding & opening[:, None]
        blocks = torch.where(falling[..., None], self._dropped(blocks), blocks)
        held = torch.where(opening, torch.full_like(held, -1), held)
        # Closed, empty fingers push, where they were closed and empty when the step began.
        pushing = closed & ~opening & ~holding.any(1) & (target[:, 2] < self.size)
        blocks = self._pushed(blocks, gripper, target, pushing)
        gap = (blocks - target[:, None]).norm(dim=-1)  # (n, K)
        nearest = gap.min(1)
        grasps = closing & (nearest.values < self.reach)
        held = torch.where(grasps, nearest.indices.to(held.dtype), held)
        grasped = (held[:, None] == number) & grasps[:, None]
        blocks = torch.where(grasped[..., None], target[:, None], blocks)
        closed = (closed | closing) & ~opening
        return torch.cat((target, closed.to(state.dtype)[:, None], held[:, None], blocks.flatten(1)), 1)

    def _parts(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            state[:, :3],
            state[:, 3] > 0.5,
            state[:, 4],
            state[:, 5 : 5 + 3 * self.blocks].unflatten(1, (self.blocks, 3)),
        )

    def _dropped(self, blocks: Tensor) -> Tensor:
        """Where each block comes to rest: on the table, or on the highest block under it."""
        if self.blocks == 1:
            return torch.cat((blocks[..., :2], torch.zeros_like(blocks[..., 2:])), -1)
        flat = (blocks[:, :, None, :2] - blocks[:, None, :, :2]).norm(dim=-1)  # (n, K, K)
        below = (flat < self.size) & (blocks[:, None, :, 2] < blocks[:, :, None, 2] - 0.5 * self.size)
        tops = torch.where(below, blocks[:, None, :, 2] + self.size, torch.zeros_like(flat)).amax(-1)
        return torch.cat((blocks[..., :2], tops[..., None]), -1)

    def _pushed(self, blocks: Tensor, start: Tensor, end: Tensor, pushing: Tensor) -> Tensor:
        """Blocks on the way from start to end are taken along, to a block's width before the fingers."""
        way = (end - start)[:, :2]
        length = way.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        along = way / length
        offset = blocks[..., :2] - start[:, None, :2]  # (n, K, 2)
        ahead = (offset * along[:, None]).sum(-1)
        aside = (offset - ahead[..., None] * along[:, None]).norm(dim=-1)
        front = length + self.size
        hit = (ahead > 0) & (ahead < front) & (aside < self.size) & (blocks[..., 2] < 0.5 * self.size)
        hit = hit & pushing[:, None] & (length > 1e-6)
        moved = blocks[..., :2] + (front - ahead)[..., None] * along[:, None]
        return torch.cat((torch.where(hit[..., None], moved, blocks[..., :2]), blocks[..., 2:]), -1)

    def observe(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Robot (n, 5): place, closed, holding. Objects (n, K, 8): there, place, offset from the gripper, held."""
        gripper, closed, held, blocks = self._parts(state)
        held_ = held[:, None] == torch.arange(self.blocks, device=state.device)
        flags = torch.stack((closed, held_.any(1)), 1).to(state.dtype)
        one = torch.ones_like(blocks[..., :1])
        return (
            torch.cat((gripper, flags), 1),
            torch.cat((one, blocks, blocks - gripper[:, None], held_[..., None].to(state.dtype)), -1),
        )

    def achieved(self, state: Tensor) -> Tensor:
        """Places of the blocks, (n, K, 3)."""
        return self._parts(state)[3]

    def distance(self, achieved: Tensor, goal: Tensor) -> Tensor:
        """Distance in meters, (..., K, 1)."""
        return (achieved.double() - goal.double()).norm(dim=-1, keepdim=True)

    def off_table(self, state: Tensor) -> Tensor:
        """Blocks whose middle is past the table's edge."""
        return (self._parts(state)[3][..., :2].abs() > self.half_width).any(-1)

    def out_of_zone(self, state: Tensor) -> Tensor:
        """Blocks outside of the zone, along x or y."""
        return (self._parts(state)[3][..., :2].abs() > self.zone).any(-1)
