r"""Registration of point clouds: refinement by iterative closest points, errors, and all poses of symmetric objects."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure.chamfer import nearest_neighbors
from mlcollage.measure.rigid import RigidTransform, procrustes, rotation_angle

__all__ = ["ICPResult", "all_poses", "icp", "principal_frame", "registration_rmse"]


class ICPResult(NamedTuple):
    """What :func:`icp` finds.

    Attributes
    ----------
    transform
        The motion of source onto target.
    rmse
        Root mean squared distance of kept source points from their nearest target points, (B,).
    coverage
        Share of source points within twice that distance of the target, (B,): low for parts of an object.
    steps
        Iterations done.
    """

    transform: RigidTransform
    rmse: Tensor
    coverage: Tensor
    steps: int


def icp(
    source: Tensor,
    target: Tensor,
    start: RigidTransform | None = None,
    *,
    max_iter: int = 50,
    trim: float = 1.0,
    tolerance: float = 1e-7,
) -> ICPResult:
    """Iterative closest points: match each source point to its nearest target point, move, and again.

    Parameters
    ----------
    source, target
        Clouds (B, N, D) and (B, M, D), or single ones.
    start
        A motion to start from; by default none. The result is the nearest local optimum to it.
    max_iter
        Most iterations.
    trim
        Share of the best matches that are used, 1 by default; less for clouds that overlap in part.
    tolerance
        It stops when no motion changes the mean squared distance by more than this share.

    Raises
    ------
    InvalidInput
        For clouds that do not fit each other, and settings out of range.

    References
    ----------
    Besl and McKay, "A method for registration of 3-D shapes", IEEE PAMI 14 (1992); trimmed: Chetverikov et al. (2002).

    Examples
    --------
    >>> draw = torch.Generator().manual_seed(0)
    >>> x = torch.randn(200, 3, generator=draw)
    >>> found = icp(x, x + 0.05)
    >>> found.transform.t.round(decimals=4).tolist(), bool(found.rmse < 1e-6)
    ([0.05..., 0.05..., 0.05...], True)
    """
    checks.integer("max_iter", max_iter, least=1)
    checks.real("trim", trim, above=0, most=1)
    single = source.ndim == 2
    if single:
        source, target = source[None], target[None]
        start = None if start is None else RigidTransform(start.R[None], start.t[None])
    size, n, dim = source.shape
    if start is None:
        eye = torch.eye(dim, dtype=source.dtype, device=source.device).expand(size, -1, -1)
        start = RigidTransform(eye, torch.zeros_like(source[:, 0]))
    motion, before = start, torch.full((size,), math.inf, dtype=source.dtype, device=source.device)
    kept = max(dim, round(trim * n))
    if kept > n:
        raise InvalidInput(f"a source of {n} points determines no motion in {dim} dimensions.")
    done = 0
    while done < max_iter:
        done += 1
        moved = motion.apply(source)
        partner = _nearest(moved, target)
        d = (moved - partner).square().sum(-1)
        weight = _trimmed(d, kept)
        fit = procrustes(source, partner, weight)
        now = (d * weight).sum(1) / kept
        motion = fit.transform
        if bool(((before - now).abs() <= tolerance * now + 1e-14).all()):
            break
        before = now
    moved = motion.apply(source)
    d = (moved - _nearest(moved, target)).square().sum(-1)
    rmse = ((d * _trimmed(d, kept)).sum(1) / kept).sqrt()
    # The typical gap of a sample is the target's own distance to its neighbors.
    gap = torch.maximum(2 * rmse, 2 * _spacing(target))
    coverage = (d.sqrt() <= gap[:, None]).to(d.dtype).mean(1)
    if single:
        return ICPResult(RigidTransform(motion.R[0], motion.t[0]), rmse[0], coverage[0], done)
    return ICPResult(motion, rmse, coverage, done)


def _nearest(x: Tensor, y: Tensor) -> Tensor:
    index = nearest_neighbors(x, y)
    return y.gather(1, index[..., None].expand(-1, -1, y.shape[2]))


def _trimmed(d: Tensor, kept: int) -> Tensor:
    if kept == d.shape[1]:
        return torch.ones_like(d)
    return torch.zeros_like(d).scatter(1, d.topk(kept, 1, largest=False).indices, 1.0)


def _spacing(x: Tensor) -> Tensor:
    """Median distance of points to their nearest neighbors, (B,), from at most 256 of them."""
    few = x[:, :: max(1, x.shape[1] // 256)]
    return torch.cdist(few, x).topk(2, largest=False).values[..., 1].median(1).values


def registration_rmse(found: RigidTransform, true: RigidTransform, points: Tensor) -> Tensor:
    """Root mean squared distance, (B,), between points (B, N, D) moved by one motion and by the other.

    Examples
    --------
    >>> still = RigidTransform(torch.eye(3)[None], torch.zeros(1, 3))
    >>> registration_rmse(still, RigidTransform(still.R, torch.tensor([[3.0, 4.0, 0.0]])), torch.randn(1, 9, 3)).item()
    5.0
    """
    return (found.apply(points) - true.apply(points)).square().sum(-1).mean(-1).sqrt()


def principal_frame(points: Tensor) -> RigidTransform:
    """The motion of each cloud (B, N, D) into the frame of its principal axes, with signs by the third moment.

    The rival that needs no training. Axes of like variance, or without skew, are a matter of chance.

    Examples
    --------
    >>> x = torch.randn(1, 50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2.0, 1.0])
    >>> principal_frame(x).apply(x).var(1).argsort(descending=True).tolist()
    [[0, 1, 2]]
    """
    centered = points - points.mean(1, keepdim=True)
    _, axes = torch.linalg.eigh(centered.mT @ centered)
    axes = axes.flip(-1)  # (B, D, D), columns by falling variance
    skew = (centered @ axes).pow(3).sum(1)
    axes = axes * torch.where(skew < 0, -1.0, 1.0).to(axes)[:, None]
    axes = torch.cat([axes[..., :-1], axes[..., -1:] * torch.linalg.det(axes)[:, None, None]], -1)
    r = axes.mT
    return RigidTransform(r, -(r @ points.mean(1)[..., None])[..., 0])


def all_poses(
    source: Tensor,
    target: Tensor,
    start: RigidTransform,
    *,
    turns: int = 12,
    tolerance: float = 1.5,
    apart: float = 15.0,
    max_iter: int = 30,
) -> list[tuple[RigidTransform, float]]:
    """All motions that register a cloud about as well as the best one: several for symmetric objects.

    Turns of the registered source about its principal axes are refined by :func:`icp`; those whose error is within
    ``tolerance`` times the least one, and ``apart`` from each other, are kept.

    Parameters
    ----------
    source, target
        Single clouds (N, D) and (M, D).
    start
        A motion that registers them roughly.
    turns
        Equal turns of a circle that are tried about each axis.
    tolerance
        Largest ratio of an error to the least one (or to the spacing of the points, where that is larger).
    apart
        Least angle in degrees between two poses of the list.
    max_iter
        Of each refinement.

    Returns
    -------
    list of (RigidTransform, float)
        Motions with their root mean squared errors, the best first. As many as ``turns`` about one axis mean that any
        turn will do.

    Examples
    --------
    >>> draw = torch.Generator().manual_seed(0)
    >>> bar = (torch.rand(400, 2, generator=draw) - 0.5) * torch.tensor([3.0, 1.0])
    >>> len(all_poses(bar, bar, RigidTransform(torch.eye(2), torch.zeros(2)), tolerance=2))
    2
    """
    if source.ndim != 2 or target.ndim != 2:
        raise InvalidInput(f"all_poses takes single clouds; got {tuple(source.shape)} and {tuple(target.shape)}.")
    checks.integer("turns", turns, least=2)
    checks.real("tolerance", tolerance, least=1)
    limit = math.radians(checks.real("apart", apart, above=0, most=180))
    dim = source.shape[1]
    moved = start.apply(source)
    center = moved.mean(0)
    axes = torch.linalg.eigh((moved - center).mT @ (moved - center))[1].mT  # rows
    first = [_turn(None, k / turns, moved) if dim == 2 else None for k in range(turns)]
    rotations = (
        [r for r in first if r is not None]
        if dim == 2
        else [_turn(axis, k / turns, moved) for axis, k in itertools.product(axes, range(turns)) if k]
        + [torch.eye(3, dtype=moved.dtype, device=moved.device)]
    )
    starts = [RigidTransform(r, center - r @ center).after(start) for r in rotations]
    together = RigidTransform(*(torch.stack(x) for x in zip(*starts, strict=True)))
    n = len(starts)
    found = icp(source.expand(n, -1, -1), target.expand(n, -1, -1), together, max_iter=max_iter)
    floor = max(float(found.rmse.min()), float(_spacing(target[None])[0]))
    kept: list[tuple[RigidTransform, float]] = []
    for i in found.rmse.argsort().tolist():
        motion = RigidTransform(found.transform.R[i], found.transform.t[i])
        if float(found.rmse[i]) > tolerance * floor:
            break
        if all(float(rotation_angle(motion.R, other.R)) > limit for other, _ in kept):
            kept.append((motion, float(found.rmse[i])))
    return kept


def _turn(axis: Tensor | None, part: float, like: Tensor) -> Tensor:
    """The rotation by a part of a circle, about an axis in three dimensions."""
    c, s = math.cos(2 * math.pi * part), math.sin(2 * math.pi * part)
    if axis is None:
        return torch.tensor([[c, -s], [s, c]], dtype=like.dtype, device=like.device)
    x, y, z = axis.tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=like.dtype, device=like.device)
    eye = torch.eye(3, dtype=like.dtype, device=like.device)
    return eye + s * cross + (1 - c) * (cross @ cross)
