r"""Chamfer distance of point clouds: how far each point is from the nearest one of the other cloud."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

__all__ = ["Chamfer", "chamfer_distance", "nearest_neighbors"]

Direction = Literal["both", "x_to_y", "y_to_x"]
Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "dense", "chunked", "kdtree"]
_TREE_FROM = 256  # points of a cloud from which a KD-tree beats all distances, measured on one core
_BLOCK = 1 << 22  # distances of one block of the chunked backend


class Chamfer(NamedTuple):
    """The distance with the nearest neighbors that it was computed from.

    Attributes
    ----------
    value
        The reduced distance.
    x_to_y, y_to_x
        Index of the nearest point in the other cloud: (B, N) into y, and (B, M) into x; None for a direction that was
        not asked for. Padded points have index 0.
    """

    value: Any
    x_to_y: Tensor | None
    y_to_x: Tensor | None


def chamfer_distance(
    x: Tensor,
    y: Tensor,
    *,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    squared: bool = True,
    direction: Direction = "both",
    point_reduction: Reduction = "mean",
    batch_reduction: Reduction = "mean",
    backend: Backend = "auto",
    return_indices: bool = False,
) -> Any:
    r"""Chamfer distance between clouds, by default the sum of both mean squared distances.

    .. math::

        d(X, Y) = \frac1N \sum_n \min_m \|x_n - y_m\|^2 + \frac1M \sum_m \min_n \|x_n - y_m\|^2

    The nearest neighbors are found without a gradient; their distances are then computed from the points themselves. So
    values are never negative, equal clouds have distance 0, and the gradient takes N + M differences, not N M.

    Parameters
    ----------
    x, y
        Clouds (B, N, D) and (B, M, D), or single ones (N, D) and (M, D).
    x_lengths, y_lengths
        (B,) whole numbers: how many points of each cloud are real; those behind are padding and are not looked at.
    x_weights, y_weights
        (B, N) and (B, M), at least 0: weights of the points in the mean (divided by their sum) or sum.
    squared
        False takes distances and not their squares; the gradient of a distance of 0 is 0.
    direction
        ``"both"`` adds the two; ``"x_to_y"`` is the mean over points of x alone, ``"y_to_x"`` over those of y.
    point_reduction
        Over the points of a cloud: ``"mean"`` (default), ``"sum"``, or ``"none"``, which returns the pair of tensors
        (B, N) and (B, M), zero at padding, and takes no reduction over the batch.
    batch_reduction
        Over clouds: ``"mean"`` (default; a mean over clouds of means over points, so that clouds count alike whatever
        their number of points), ``"sum"`` or ``"none"``.
    backend
        ``"dense"`` forms all distances, ``"chunked"`` a block of them at a time, ``"kdtree"`` asks SciPy's KD-tree (on
        the CPU). ``"auto"`` (default) takes the KD-tree for clouds of 256 points and more on the CPU, ``"chunked"``
        where all distances would be more than 4 million, else ``"dense"``.
    return_indices
        Return :class:`Chamfer`, with the nearest neighbors.

    Returns
    -------
    Tensor, pair of Tensors, or Chamfer
        In the type of the clouds; half precision is computed in float32.

    Raises
    ------
    InvalidInput
        For shapes and types that do not fit, empty clouds, lengths out of range, weights that are negative or sum to 0,
        points that are not finite, and the KD-tree for tensors that are not on the CPU.

    Notes
    -----
    Conventions differ: others take the mean of both directions, sums over points, or distances. Say which one stands
    beside a number. Tables of papers often print it times 1,000.

    References
    ----------
    Fan, Su and Guibas, "A Point Set Generation Network for 3D Object Reconstruction from a Single Image", CVPR 2017.

    Examples
    --------
    >>> x, y = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    >>> chamfer_distance(x, y).item(), chamfer_distance(x, y, squared=False).item()
    (21.5, 6.5)
    >>> chamfer_distance(x, y, direction="x_to_y").item(), chamfer_distance(x, y, point_reduction="sum").item()
    (9.0, 34.0)
    """
    checks.choice("direction", direction, ("both", "x_to_y", "y_to_x"))
    for name, reduction in (("point_reduction", point_reduction), ("batch_reduction", batch_reduction)):
        checks.choice(name, reduction, ("mean", "sum", "none"))
    checks.choice("backend", backend, ("auto", "dense", "chunked", "kdtree"))
    single = isinstance(x, Tensor) and x.ndim == 2 and isinstance(y, Tensor) and y.ndim == 2
    if single:
        x, y = x[None], y[None]
    _check_clouds(x, y)
    real_x, real_y = _real(x, x_lengths, "x"), _real(y, y_lengths, "y")
    # Padding may hold anything, also NaN.
    x, y = (
        z if r is None else torch.where(r[..., None], z, torch.zeros_like(z)) for z, r in ((x, real_x), (y, real_y))
    )
    _check_finite(x, y)
    weight_x = _weights(x, x_weights, real_x, "x", single)
    weight_y = _weights(y, y_weights, real_y, "y", single)
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x, y = x.float(), y.float()
    to_y = to_x = None
    parts = []
    if direction in ("both", "x_to_y"):
        to_y = nearest_neighbors(x, y, x_real=real_x, y_real=real_y, backend=backend, check=False)
        parts.append((_distances(x, y, to_y, real_x, squared), weight_x))
    if direction in ("both", "y_to_x"):
        to_x = nearest_neighbors(y, x, x_real=real_y, y_real=real_x, backend=backend, check=False)
        parts.append((_distances(y, x, to_x, real_y, squared), weight_y))
    if point_reduction == "none":
        each = [d.to(dtype)[0] if single else d.to(dtype) for d, _ in parts]
        value: Any = each[0] if len(each) == 1 else tuple(each)
    else:
        clouds = [(d * w).sum(1) / (w.sum(1) if point_reduction == "mean" else 1) for d, w in parts]  # (B,) each
        value = torch.stack(clouds).sum(0).to(dtype)
        if single:
            value = value[0]
        elif batch_reduction != "none":
            value = value.mean() if batch_reduction == "mean" else value.sum()
    if not return_indices:
        return value
    if single:
        to_y, to_x = (None if i is None else i[0] for i in (to_y, to_x))
    return Chamfer(value, to_y, to_x)


def _distances(x: Tensor, y: Tensor, index: Tensor, real: Tensor | None, squared: bool) -> Tensor:
    """(B, N) from the points themselves; padding is 0."""
    partner = y.gather(1, index[..., None].expand(-1, -1, y.shape[2]))
    gap = x - partner
    if real is not None:
        gap = torch.where(real[..., None], gap, torch.zeros_like(gap))
    d = gap.square().sum(-1)
    if squared:
        return d
    # The root has no derivative at 0: there the distance and its gradient are 0.
    apart = d > 0
    return torch.where(apart, torch.where(apart, d, torch.ones_like(d)).sqrt(), torch.zeros_like(d))


def nearest_neighbors(
    x: Tensor,
    y: Tensor,
    *,
    x_real: Tensor | None = None,
    y_real: Tensor | None = None,
    backend: Backend = "auto",
    check: bool = True,
) -> Tensor:
    """Index (B, N) of the point of y (B, M, D) that is nearest to each point of x (B, N, D); no gradient.

    Parameters
    ----------
    x, y
        Clouds (B, N, D) and (B, M, D), or single ones (N, D) and (M, D).
    x_real, y_real
        Boolean (B, N) and (B, M): False where a point is padding. Padding of x gets index 0.
    backend
        As for :func:`chamfer_distance`.
    check
        Whether the clouds are looked at first.

    Raises
    ------
    InvalidInput
        For clouds as :func:`chamfer_distance` refuses them, masks that are not boolean or leave no point of y, and
        the KD-tree for tensors that are not on the CPU.

    Examples
    --------
    >>> nearest_neighbors(torch.tensor([[[0.9], [0.2]]]), torch.tensor([[[0.0], [1.0]]])).tolist()
    [[1, 0]]
    """
    checks.choice("backend", backend, ("auto", "dense", "chunked", "kdtree"))
    if isinstance(x, Tensor) and x.ndim == 2 and isinstance(y, Tensor) and y.ndim == 2:
        masks = (None if m is None else m[None] for m in (x_real, y_real))
        x_real, y_real = masks
        return nearest_neighbors(x[None], y[None], x_real=x_real, y_real=y_real, backend=backend, check=check)[0]
    if check:
        _check_clouds(x, y)
        _check_real(x, x_real, "x")
        _check_real(y, y_real, "y")
        x, y = (
            z if r is None else torch.where(r[..., None], z, torch.zeros_like(z)) for z, r in ((x, x_real), (y, y_real))
        )
        _check_finite(x, y)
    if backend == "kdtree" and x.device.type != "cpu":
        raise InvalidInput(f"backend='kdtree' works on the CPU; these clouds are on {x.device}: use 'chunked'.")
    if backend == "auto":
        large = min(x.shape[1], y.shape[1]) >= _TREE_FROM
        if x.device.type == "cpu" and large:
            backend = "kdtree"
        else:
            backend = "chunked" if x.shape[0] * x.shape[1] * y.shape[1] > _BLOCK else "dense"
    with torch.no_grad():
        if backend == "kdtree":
            return _by_tree(x, y, x_real, y_real)
        if x.dtype in (torch.float16, torch.bfloat16):
            x, y = x.float(), y.float()
        far = None if y_real is None else ~y_real
        rows = x.shape[1] if backend == "dense" else max(1, _BLOCK // max(1, x.shape[0] * y.shape[1]))
        found = []
        for part in x.split(rows, 1):
            # Differences, not the expansion |x|^2 + |y|^2 - 2 x y: that loses all digits far from the origin.
            d = torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist")
            if far is not None:
                d.masked_fill_(far[:, None, :], torch.inf)
            found.append(d.argmin(2))
        index = torch.cat(found, 1)
        return index if x_real is None else index.masked_fill(~x_real, 0)


def _by_tree(x: Tensor, y: Tensor, x_real: Tensor | None, y_real: Tensor | None) -> Tensor:
    index = np.zeros(x.shape[:2], dtype=np.int64)
    a, b = (z.detach().double().numpy() for z in (x, y))
    for i in range(len(a)):
        rows = slice(None) if x_real is None else x_real[i].numpy()
        kept = None if y_real is None else np.flatnonzero(y_real[i].numpy())
        # An unbalanced tree without tight boxes is built several times as fast, and asked about as fast.
        tree = cKDTree(b[i] if kept is None else b[i][kept], balanced_tree=False, compact_nodes=False)
        found = tree.query(a[i][rows])[1]
        index[i, rows] = found if kept is None else kept[found]
    return torch.from_numpy(index)


def _check_clouds(x: Tensor, y: Tensor) -> None:
    for name, z in (("x", x), ("y", y)):
        if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim != 3:
            what = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise InvalidInput(f"{name} must be floating clouds (B, N, D), or both single ones (N, D); got {what}.")
        if not z.shape[1]:
            raise InvalidInput(f"{name} has no points; a distance to an empty cloud is not defined.")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2] or x.dtype != y.dtype or x.device != y.device:
        raise InvalidInput(
            f"x and y must agree in number of clouds, dimension, type and device; got {tuple(x.shape)} {x.dtype} on "
            f"{x.device} and {tuple(y.shape)} {y.dtype} on {y.device}."
        )
    # Two points in space are a cloud; 1,024 coordinates of three points are not likely to be one.
    if x.shape[2] > 3 and x.shape[1] in (2, 3) and y.shape[2] > y.shape[1]:
        raise InvalidInput(
            f"clouds are (B, N, D), one point a row; {tuple(x.shape)} looks like coordinates first: use "
            "x.transpose(1, 2)."
        )


def _check_finite(x: Tensor, y: Tensor) -> None:
    for name, z in (("x", x), ("y", y)):
        if not bool(torch.isfinite(z).all()):
            bad = sorted(set((~torch.isfinite(z)).nonzero()[:, 0].tolist()))
            raise InvalidInput(f"{name} holds NaN or infinity (cloud {bad[0]} of the batch); drop such points first.")


def _check_real(x: Tensor, real: Tensor | None, name: str) -> None:
    if real is None:
        return
    if not isinstance(real, Tensor) or real.dtype != torch.bool or real.shape != x.shape[:2]:
        what = f"{real.dtype} {tuple(real.shape)}" if isinstance(real, Tensor) else type(real).__name__
        raise InvalidInput(
            f"{name}_real must be boolean {tuple(x.shape[:2])}, True for the real points of {name}; got {what}."
        )
    if not bool(real.any(1).all()):
        raise InvalidInput(f"{name}_real leaves no point in a cloud of {name}; leave that cloud out.")


def _real(x: Tensor, lengths: Tensor | None, name: str) -> Tensor | None:
    if lengths is None:
        return None
    sizes = torch.as_tensor(lengths, device=x.device)
    if sizes.is_floating_point() or sizes.dtype == torch.bool or sizes.shape != (x.shape[0],):
        raise InvalidInput(f"{name}_lengths must be {x.shape[0]} whole numbers, one for each cloud; got {lengths!r}.")
    if bool(((sizes < 1) | (sizes > x.shape[1])).any()):
        raise InvalidInput(f"{name}_lengths must lie between 1 and {x.shape[1]}, the points of {name}; got {lengths}.")
    return torch.arange(x.shape[1], device=x.device) < sizes[:, None]


def _weights(x: Tensor, weights: Tensor | None, real: Tensor | None, name: str, single: bool) -> Tensor:
    work = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    w = torch.ones(x.shape[:2], dtype=work, device=x.device)
    if weights is not None:
        given = weights[None] if single and isinstance(weights, Tensor) else weights
        if not isinstance(given, Tensor) or given.shape != x.shape[:2]:
            raise InvalidInput(f"{name}_weights must be a tensor {tuple(x.shape[:2])}, one for each point.")
        w = given.to(work)
    if real is not None:
        w = torch.where(real, w, torch.zeros_like(w))  # padding may hold anything here too
    if weights is not None and bool(((w < 0) | ~w.isfinite()).any() | (w.sum(1) <= 0).any()):
        raise InvalidInput(f"{name}_weights must be finite and at least 0, with a sum above 0 in each cloud.")
    return w
