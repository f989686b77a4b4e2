r"""Rotations as unit quaternions, w first, and how far they lie apart, with the symmetries that a body has."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .inputs import floats

Symmetry = Literal["none", "mod90", "mod180"]

__all__ = [
    "euler_to_quaternion",
    "parallel_rotations",
    "quaternion_conjugate",
    "quaternion_multiply",
    "rotation_distance",
]


def quaternion_multiply(q: Tensor, p: Tensor) -> Tensor:
    """The product q p of quaternions (..., 4), w first: first turn by p, then by q.

    Examples
    --------
    >>> i, j = torch.tensor([0.0, 1, 0, 0]), torch.tensor([0.0, 0, 1, 0])
    >>> quaternion_multiply(i, j).tolist()
    [0.0, 0.0, 0.0, 1.0]
    """
    _quaternions(q=q, p=p)
    a, b, c, d = q.unbind(-1)
    w, x, y, z = p.unbind(-1)
    return torch.stack(
        (
            a * w - b * x - c * y - d * z,
            a * x + b * w + c * z - d * y,
            a * y - b * z + c * w + d * x,
            a * z + b * y - c * x + d * w,
        ),
        -1,
    )


def quaternion_conjugate(q: Tensor) -> Tensor:
    """The inverse of unit quaternions (..., 4), w first.

    Examples
    --------
    >>> quaternion_conjugate(torch.tensor([0.5, 0.5, -0.5, 0.5])).tolist()
    [0.5, -0.5, 0.5, -0.5]
    """
    _quaternions(q=q)
    return q * q.new_tensor([1.0, -1.0, -1.0, -1.0])


def euler_to_quaternion(euler: Tensor) -> Tensor:
    """Quaternions (..., 4), w first, of angles (..., 3) in radians: turns about x, then the new y, then the new z.

    Examples
    --------
    >>> [round(float(v), 4) for v in euler_to_quaternion(torch.tensor([0.0, 0.0, math.pi / 2]))]
    [0.7071, 0.0, 0.0, 0.7071]
    """
    floats(euler=euler)
    if euler.shape[-1:] != (3,):
        raise InvalidInput(f"euler must hold angles (..., 3) in radians; its shape is {tuple(euler.shape)}.")
    half = euler / 2
    c, s = half.cos(), half.sin()
    zero = torch.zeros_like(c[..., 0])
    qx = torch.stack((c[..., 0], s[..., 0], zero, zero), -1)
    qy = torch.stack((c[..., 1], zero, s[..., 1], zero), -1)
    qz = torch.stack((c[..., 2], zero, zero, s[..., 2]), -1)
    return quaternion_multiply(quaternion_multiply(qx, qy), qz)


def on_its_side(q: Tensor) -> Tensor:
    """Orientations (..., 4) after a quarter turn about the body's own x: what lay flat lies flat again, on its side.

    Examples
    --------
    >>> [round(float(v), 4) for v in on_its_side(torch.tensor([1.0, 0, 0, 0]))]
    [0.7071, 0.7071, 0.0, 0.0]
    """
    turned = quaternion_multiply(q, euler_to_quaternion(q.new_tensor([math.pi / 2, 0.0, 0.0])))
    return torch.where(turned[..., :1] < 0, -turned, turned)


def rotation_distance(q: Tensor, p: Tensor, symmetry: Symmetry = "none") -> Tensor:
    r"""Smallest angle in radians that turns one orientation into the other.

    .. math:: d(q, p) = 4 \operatorname{atan2} \bigl( \lVert q - p \rVert, \lVert q + p \rVert \bigr)

    with the sign of p chosen so that :math:`\langle q, p \rangle \ge 0`, since q and -q are one rotation. Unlike
    :math:`2 \arccos \langle q, p \rangle` it is exact for small angles and for lengths a little off 1.

    Parameters
    ----------
    q, p
        (..., 4), w first; q is the goal. Any length but zero.
    symmetry
        ``"none"`` (default); ``"mod90"`` for bodies that look the same after each of a cube's 24 rotations,
        ``"mod180"`` after half turns about their axes (4): the smallest distance over these is taken.

    Returns
    -------
    Tensor
        (...), between 0 and pi.

    Raises
    ------
    InvalidInput
        For tensors that are not (..., 4), and quaternions of length zero, of which no rotation can be made.

    Examples
    --------
    >>> turn = euler_to_quaternion(torch.tensor([0.0, 0.0, 0.1], dtype=torch.float64))
    >>> still = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    >>> round(float(rotation_distance(turn, still)), 12), round(float(rotation_distance(-turn, still)), 12)
    (0.1, 0.1)
    """
    checks.choice("symmetry", symmetry, ("none", "mod90", "mod180"))
    _quaternions(q=q, p=p)
    lengths = q.norm(dim=-1, keepdim=True), p.norm(dim=-1, keepdim=True)
    if any(bool((length < 1e-8).any()) for length in lengths):
        raise InvalidInput("a quaternion has length zero, which is no rotation; the identity is (1, 0, 0, 0), w first.")
    q, p = q / lengths[0], p / lengths[1]
    if symmetry != "none":
        s = parallel_rotations(symmetry).to(q)  # (S, 4)
        q, p = quaternion_multiply(q[..., None, :], s), p[..., None, :]  # turned in the body's own frame
    p = torch.where((q * p).sum(-1, keepdim=True) < 0, -p, p)
    distance = 4 * torch.atan2((q - p).norm(dim=-1), (q + p).norm(dim=-1))
    return distance if symmetry == "none" else distance.amin(-1)


def _quaternions(**values: Tensor) -> None:
    floats(**values)
    for name, value in values.items():
        if value.shape[-1:] != (4,):
            raise InvalidInput(f"{name} must hold quaternions (..., 4), w first; its shape is {tuple(value.shape)}.")


def parallel_rotations(symmetry: Symmetry) -> Tensor:
    """The rotations (S, 4) that leave a body of this symmetry as it looks: 1, 4 or 24 of them, float64.

    Examples
    --------
    >>> [len(parallel_rotations(s)) for s in ("none", "mod180", "mod90")]
    [1, 4, 24]
    """
    return torch.tensor(_parallel(symmetry), dtype=torch.float64)


@cache
def _parallel(symmetry: Symmetry) -> tuple[tuple[float, ...], ...]:
    steps = {"none": (0.0,), "mod180": (0.0, math.pi), "mod90": tuple(k * math.pi / 2 for k in range(4))}[symmetry]
    found: list[Tensor] = []
    for angles in itertools.product(steps, repeat=3):
        q = euler_to_quaternion(torch.tensor(angles, dtype=torch.float64))
        if all(abs(float((q * other).sum())) < 1 - 1e-9 for other in found):
            found.append(q)
    return tuple(tuple(q.tolist()) for q in found)
