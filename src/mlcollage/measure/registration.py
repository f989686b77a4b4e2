r"""Registration of point clouds: refinement by iterative closest points, errors, and all poses of symmetric objects."""

from __future__ import annotations

import importlib.util
import itertools
import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput, MissingDependency
from mlcollage.measure.chamfer import nearest_neighbors
from mlcollage.measure.rigid import RigidTransform, procrustes, rotation_angle

__all__ = ["ICPResult", "all_poses", "icp", "principal_frame", "registration_rmse"]

Engine = Literal["mlcollage", "open3d", "auto"]


class ICPResult(NamedTuple):
    """What :func:`icp` finds.

    Attributes
    ----------
    transform
        The motion of source onto target.
    rmse
        Root mean squared distance of kept source points from their nearest target points, (B,).
    coverage
        Share of moved source points with a target point near them, (B,): low where the target is a part of the source.
        Near is within twice the spacing that nine of ten target points have, or, if that is more, within three times
        the distance below which a quarter of the source points are (noise).
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
    engine: Engine = "mlcollage",
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
        It stops when no motion changes the mean squared distance by more than this share, whatever the unit.
    engine
        Who iterates: ``"mlcollage"`` (default: batched, on any device, by a KD-tree on the CPU); ``"open3d"``, point to
        point, for clouds of three dimensions on the CPU without ``trim``; ``"auto"``, Open3D where it is installed and
        can, else mlcollage. Both go to the same optimum, to about the tolerance. ``steps`` of Open3D is ``max_iter``,
        since it does not say.

    Raises
    ------
    InvalidInput
        For clouds that do not fit each other or are not finite, a start that does not fit them, and settings out of
        range; for ``engine="open3d"`` also for what Open3D cannot do.
    MissingDependency
        For ``engine="open3d"`` where Open3D is not installed.

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
    checks.real("tolerance", tolerance, least=0)
    checks.choice("engine", engine, ("mlcollage", "open3d", "auto"))
    _check_pair(source, target)
    if start is not None:
        _check_motion("start", start, source)
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
    least = 1e-14 * _magnitude(target) ** 2  # of a squared distance, in the unit of the clouds
    done = 0
    if _open3d_serves(engine, source, trim):
        motion, done = _by_open3d(source, target, start, max_iter, tolerance), max_iter
    while done < max_iter:
        done += 1
        moved = motion.apply(source)
        partner = _nearest(moved, target)
        d = (moved - partner).square().sum(-1)
        weight = _trimmed(d, kept)
        fit = procrustes(source, partner, weight)
        now = (d * weight).sum(1) / kept
        motion = fit.transform
        if bool(((before - now).abs() <= tolerance * now + least).all()):
            break
        before = now
    moved = motion.apply(source)
    d = (moved - _nearest(moved, target)).square().sum(-1)
    rmse = ((d * _trimmed(d, kept)).sum(1) / kept).sqrt()
    coverage = _near(d.sqrt(), target)
    if single:
        return ICPResult(RigidTransform(motion.R[0], motion.t[0]), rmse[0], coverage[0], done)
    return ICPResult(motion, rmse, coverage, done)


def _open3d_serves(engine: Engine, source: Tensor, trim: float) -> bool:
    if engine == "mlcollage":
        return False
    fits = source.shape[2] == 3 and source.device.type == "cpu" and trim == 1
    if engine == "open3d" and not fits:
        raise InvalidInput(
            f"Open3D takes clouds of three dimensions on the CPU, and trim=1; these have {source.shape[2]}, are on "
            f"{source.device}, and trim={trim:g}: use engine='mlcollage'."
        )
    found = fits and importlib.util.find_spec("open3d") is not None
    if engine == "open3d" and not found:
        raise MissingDependency("engine='open3d' needs Open3D: pip install open3d, or use engine='mlcollage'.")
    return found


def _by_open3d(
    source: Tensor, target: Tensor, start: RigidTransform, max_iter: int, tolerance: float
) -> RigidTransform:
    """Open3D's point-to-point iterations for each pair, about the target's mean, where numbers keep their digits."""
    import open3d

    found = open3d.pipelines.registration
    stop = found.ICPConvergenceCriteria(0.0, tolerance, max_iter)
    first = RigidTransform(start.R.expand(len(source), -1, -1), start.t.expand(len(source), -1))
    center = target.mean(1, keepdim=True)

    def cloud(points: Tensor) -> Any:
        return open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points.double().numpy()))

    rotations, shifts = [], []
    for x, y, c, r, t in zip(source, target, center[:, 0], first.R, first.t, strict=True):
        near = RigidTransform(r, t + r @ c - c).matrix().double().numpy()
        reach = float((x - c).norm(dim=1).max() + (y - c).norm(dim=1).max() + (t + r @ c - c).norm())  # all matches
        m = found.registration_icp(
            cloud(x - c), cloud(y - c), reach, near, found.TransformationEstimationPointToPoint(False), stop
        ).transformation
        moved = torch.from_numpy(np.array(m, dtype=np.float64)).to(source)
        rotations.append(moved[:3, :3])
        shifts.append(moved[:3, 3] + c - moved[:3, :3] @ c)
    return RigidTransform(torch.stack(rotations), torch.stack(shifts))


def covered(x: Tensor, y: Tensor) -> Tensor:
    """Share (B,) of the points of x (B, N, D) that have a point of y (B, M, D) near them, as :func:`icp` counts it."""
    return _near((x - _nearest(x, y)).square().sum(-1).sqrt(), y)


def _near(d: Tensor, target: Tensor) -> Tensor:
    # The typical gap of a sample is the target's own distance to its neighbors. Noise makes all distances larger, also
    # the least ones; a missing part does not.
    noise = d.sort(1).values[:, (d.shape[1] - 1) // 4]
    gap = torch.maximum(2 * _spacing(target, 0.9), 3 * noise)
    return (d <= gap[:, None]).to(d.dtype).mean(1)


def _check_pair(source: Tensor, target: Tensor) -> None:
    for name, x in (("source", source), ("target", target)):
        _check_cloud(name, x, (2, 3))
    if source.ndim != target.ndim or source.shape[:-2] != target.shape[:-2] or source.shape[-1] != target.shape[-1]:
        raise InvalidInput(
            f"source and target must both be (N, D) and (M, D), or (B, N, D) and (B, M, D); got {tuple(source.shape)} "
            f"and {tuple(target.shape)}."
        )
    if source.dtype != target.dtype or source.device != target.device:
        raise InvalidInput(
            f"source and target must have one type and device; got {source.dtype} on {source.device} and "
            f"{target.dtype} on {target.device}."
        )


def _check_cloud(name: str, x: Tensor, ndim: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim not in ndim or x.shape[-1] not in (2, 3):
        what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        shape = " or ".join({2: "(N, D)", 3: "(B, N, D)"}[n] for n in ndim)
        raise InvalidInput(f"{name} must be a floating tensor {shape}, D being 2 or 3; got {what}.")
    if not x.shape[-2]:
        raise InvalidInput(f"{name} has no points; give at least one.")
    if not bool(x.isfinite().all()):
        raise InvalidInput(f"{name} holds NaN or infinity; drop such points first.")


def _check_motion(name: str, motion: RigidTransform, points: Tensor, *, batch: bool = True) -> None:
    """Refuse what is no motion of these points; one motion for a whole batch will do."""
    r, t = motion if isinstance(motion, tuple) and len(motion) == 2 else (None, None)
    dim = points.shape[-1]
    fits = isinstance(motion, RigidTransform) and isinstance(r, Tensor) and isinstance(t, Tensor)
    if fits and isinstance(r, Tensor) and isinstance(t, Tensor):
        ahead = [()] if points.ndim == 2 or not batch else [(), (1,), tuple(points.shape[:1])]
        fits = tuple(r.shape[-2:]) == (dim, dim) and tuple(t.shape[-1:]) == (dim,)
        fits = fits and tuple(r.shape[:-2]) in ahead and r.shape[:-2] == t.shape[:-1] and r.is_floating_point()
    if not fits:
        got = f"R {tuple(r.shape)}, t {tuple(t.shape)}" if isinstance(r, Tensor) and isinstance(t, Tensor) else "none"
        raise InvalidInput(
            f"{name} must be a RigidTransform of {dim} dimensions that fits clouds {tuple(points.shape)}; got {got}."
        )


def _magnitude(x: Tensor) -> float:
    """Order of magnitude of the radii, a power of 10: 1 for clouds about a unit in radius."""
    if not len(x):
        return 1.0
    radius = float((x.detach() - x.detach().mean(1, keepdim=True)).double().norm(dim=-1).max())
    return 10.0 ** round(math.log10(radius)) if radius > 0 else 1.0


def _nearest(x: Tensor, y: Tensor) -> Tensor:
    index = nearest_neighbors(x, y)
    return y.gather(1, index[..., None].expand(-1, -1, y.shape[2]))


def _trimmed(d: Tensor, kept: int) -> Tensor:
    if kept == d.shape[1]:
        return torch.ones_like(d)
    return torch.zeros_like(d).scatter(1, d.topk(kept, 1, largest=False).indices, 1.0)


def _spacing(x: Tensor, level: float = 0.5) -> Tensor:
    """Median (or another quantile) distance of points to their nearest neighbors, (B,), from at most 256 of them."""
    if x.shape[1] < 2:
        return torch.zeros_like(x[:, 0, 0])
    if x.dtype in (torch.float16, torch.bfloat16):
        return _spacing(x.float(), level).to(x.dtype)
    few = x[:, :: max(1, x.shape[1] // 256)]
    # Not by the expansion of the square, which has no digits left in coordinates of a map.
    gaps = torch.cdist(few, x, compute_mode="donot_use_mm_for_euclid_dist")
    return gaps.topk(2, largest=False).values[..., 1].sort(1).values[:, int(level * (few.shape[1] - 1))]


def registration_rmse(found: RigidTransform, true: RigidTransform, points: Tensor) -> Tensor:
    """Root mean squared distance, (B,), between points (B, N, D) moved by one motion and by the other.

    A single cloud (N, D) gives one number.

    Raises
    ------
    InvalidInput
        For points and motions that do not fit each other.

    Examples
    --------
    >>> still = RigidTransform(torch.eye(3)[None], torch.zeros(1, 3))
    >>> registration_rmse(still, RigidTransform(still.R, torch.tensor([[3.0, 4.0, 0.0]])), torch.randn(1, 9, 3)).item()
    5.0
    """
    _check_cloud("points", points, (2, 3))
    for name, motion in (("found", found), ("true", true)):
        _check_motion(name, motion, points)
    return (found.apply(points) - true.apply(points)).square().sum(-1).mean(-1).sqrt()


def principal_frame(points: Tensor) -> RigidTransform:
    """The motion of each cloud (B, N, D) into the frame of its principal axes, with signs by the third moment.

    The rival that needs no training. Axes of like variance, or without skew, are a matter of chance.

    Raises
    ------
    InvalidInput
        For what is no batch of finite clouds.

    Examples
    --------
    >>> x = torch.randn(1, 50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2.0, 1.0])
    >>> principal_frame(x).apply(x).var(1).argsort(descending=True).tolist()
    [[0, 1, 2]]
    """
    _check_cloud("points", points, (3,))
    dtype = points.dtype
    points = points.float() if dtype in (torch.float16, torch.bfloat16) else points
    centered = points - points.mean(1, keepdim=True)
    _, axes = torch.linalg.eigh(centered.mT @ centered)
    axes = axes.flip(-1)  # (B, D, D), columns by falling variance
    skew = (centered @ axes).pow(3).sum(1)
    axes = axes * torch.where(skew < 0, -1.0, 1.0).to(axes)[:, None]
    axes = torch.cat([axes[..., :-1], axes[..., -1:] * torch.linalg.det(axes)[:, None, None]], -1)
    r = axes.mT
    return RigidTransform(r.to(dtype), -(r @ points.mean(1)[..., None])[..., 0].to(dtype))


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

    Raises
    ------
    InvalidInput
        As :func:`icp`.

    Examples
    --------
    >>> draw = torch.Generator().manual_seed(0)
    >>> bar = (torch.rand(400, 2, generator=draw) - 0.5) * torch.tensor([3.0, 1.0])
    >>> len(all_poses(bar, bar, RigidTransform(torch.eye(2), torch.zeros(2)), tolerance=2))
    2
    """
    _check_pair(source, target)
    if source.ndim != 2:
        raise InvalidInput(f"all_poses takes single clouds; got {tuple(source.shape)} and {tuple(target.shape)}.")
    _check_motion("start", start, source, batch=False)
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
