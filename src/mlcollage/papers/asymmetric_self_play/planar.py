"""PlanarPush: a finger and discs on a table that it pushes; the easy world, in which little help is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

__all__ = ["PlanarPush"]

_SUBSTEPS = 3


class PlanarPush:
    """A finger that pushes discs about on a table, as batched tensor code on any device.

    The finger moves in small substeps; a disc that it touches is moved out of its way, along the line between the two
    middles. Discs do not touch each other. Nothing has a velocity.

    Parameters
    ----------
    discs
        Number of discs.
    threshold
        How near its goal a disc must be.
    half_width, stride, radius, zone
        Half of the table's width, the longest move along one axis, the distance at which finger and disc touch, and
        the zone in which goals are wanted.

    Attributes
    ----------
    bins : tuple of int
        (5, 5): x and y; choice 2 stands still.
    thresholds : tuple of float
        ``(threshold,)``.

    Raises
    ------
    InvalidInput
        For sizes that are not positive, and a threshold that is not smaller than the table.

    Notes
    -----
    States (n, 2 + 2 K): finger, then discs.

    Examples
    --------
    >>> world = PlanarPush()
    >>> state = world.step(torch.tensor([[0.0, 0.0, 0.15, 0.0]]), torch.tensor([[4, 2]]))
    >>> [round(v, 2) for v in state[0].tolist()]
    [0.15, 0.0, 0.25, 0.0]
    """

    bins = (5, 5)

    def __init__(
        self,
        discs: int = 1,
        *,
        threshold: float = 0.1,
        half_width: float = 0.6,
        stride: float = 0.15,
        radius: float = 0.1,
        zone: float = 0.5,
    ) -> None:
        self.discs = checks.integer("discs", discs, least=1)
        names = ("threshold", "half_width", "stride", "radius", "zone")
        sizes = (threshold, half_width, stride, radius, zone)
        values = (checks.positive(name, value) for name, value in zip(names, sizes, strict=True))
        self.threshold, self.half_width, self.stride, self.radius, self.zone = values
        if self.threshold >= 2 * self.half_width:
            raise InvalidInput(
                f"threshold is {threshold:g} on a table {2 * half_width:g} wide: every goal would be reached at once."
            )
        self.thresholds = (self.threshold,)

    def initial(self, n: int, generator: torch.Generator) -> Tensor:
        """Finger and discs anywhere over the inner three quarters of the table; discs under the finger are pushed."""
        u = torch.rand(n, 2 + 2 * self.discs, generator=generator, device=generator.device)
        state = 0.75 * self.half_width * (2 * u - 1)
        return torch.cat((state[:, :2], self._pushed(state[:, :2], self.achieved(state)).flatten(1)), 1)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """Move the finger; discs in its way are moved along."""
        finger, discs = state[:, :2], self.achieved(state)
        edge = self.half_width + 0.1
        goal = (finger + self.stride * (action.to(state.dtype) - 2) / 2).clamp(-edge, edge)
        for i in range(1, _SUBSTEPS + 1):
            discs = self._pushed(torch.lerp(finger, goal, i / _SUBSTEPS), discs)
        return torch.cat((goal, discs.flatten(1)), 1)

    def _pushed(self, finger: Tensor, discs: Tensor) -> Tensor:
        away = discs - finger[:, None]
        gap = away.norm(dim=-1, keepdim=True)
        # A disc exactly under the finger goes along x.
        along = torch.where(gap > 1e-6, away / gap.clamp(min=1e-6), away.new_tensor([1.0, 0.0]))
        # One that is touched is put where it is touched no more: rounding must not move it again.
        return torch.where(gap < self.radius - 1e-6, finger[:, None] + self.radius * along, discs)

    def observe(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Robot (n, 2): the finger. Objects (n, K, 5): there, place, offset from the finger."""
        finger, discs = state[:, :2], self.achieved(state)
        return finger, torch.cat((torch.ones_like(discs[..., :1]), discs, discs - finger[:, None]), -1)

    def achieved(self, state: Tensor) -> Tensor:
        """Places of the discs, (n, K, 2)."""
        return state[:, 2:].unflatten(1, (self.discs, 2))

    def distance(self, achieved: Tensor, goal: Tensor) -> Tensor:
        """Distance in meters, (..., K, 1)."""
        return (achieved.double() - goal.double()).norm(dim=-1, keepdim=True)

    def off_table(self, state: Tensor) -> Tensor:
        """Discs whose middle is past the table's edge."""
        return (self.achieved(state).abs() > self.half_width).any(-1)

    def out_of_zone(self, state: Tensor) -> Tensor:
        """Discs outside of the zone."""
        return (self.achieved(state).abs() > self.zone).any(-1)
