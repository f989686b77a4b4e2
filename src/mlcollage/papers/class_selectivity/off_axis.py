"""Is selectivity hidden off the axes? The most selective rotation of a layer, and a relaxation in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure import as_samples, centered_matrix

from .index import index_parts

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class OffAxisResult:
    """Selectivity of a layer's units and of its most selective rotation; made by :func:`off_axis_upper_bound`.

    Parameters
    ----------
    si_axis
        Mean index of the units themselves, with the same ``response``, on the samples held out.
    si_bound
        Mean index of the rotated units there. It is what the search found: a lower estimate of the true maximum.
    si_fit
        The same on the samples that the rotation was fitted to; the difference is overfitting.
    W
        (U, U) float64, one direction per row; orthonormal up to rounding with ``orthonormal=True``.
    ratios
        Class variance ratios of the relaxation, falling; see :func:`class_variance_ratios`.
    ratio_axis, ratio_bound
        Mean ratio of the units and of the rotated units (before rectification); no direction exceeds ``ratios[0]``.
    """

    si_axis: float
    si_bound: float
    si_fit: float
    W: Floats
    ratios: Floats
    ratio_axis: float
    ratio_bound: float


def off_axis_upper_bound(
    acts: Any,
    y: Any,
    *,
    steps: int = 200,
    orthonormal: bool = True,
    split: float = 0.5,
    generator: torch.Generator | int = 0,
    lr: float = 0.05,
    penalty: float = 1.0,
    response: Literal["shift", "relu"] = "shift",
    unit_axis: int | None = None,
    eps: float = 1e-6,
) -> OffAxisResult:
    r"""The largest mean selectivity of rotated units :math:`f(W a)` of a frozen layer, fitted on one part of the data.

    .. math:: \max_W \frac1U \sum_u \mathrm{SI}_u\big(f(W a)\big), \qquad W W^\top = I

    by Adam. The objective has local optima, so the search begins at the units themselves and at the rotations whose
    axes lie nearest to the class means, and goes on from the best. If selectivity had only been moved off the units'
    axes, the bound would stay high where the units' own index falls. W is the exponential of a skew-symmetric matrix
    times the start, so exactly orthonormal; with
    ``orthonormal=False`` it is free and the loss has the term :math:`\lambda \|W W^\top - I\|_F^2 / U`.

    Parameters
    ----------
    acts
        (N, U) responses of a layer, e.g. averaged over space; feature maps are.
    y
        (N,) integer labels.
    steps, lr
        Of Adam.
    orthonormal, penalty
        See above; penalty is :math:`\lambda`.
    split
        Share of the samples that W is fitted to; all results but ``si_fit`` are of the others.
    generator
        Draws the split, on the CPU; an int seeds a fresh one.
    response
        :math:`f`, since a rotation makes responses negative. ``"shift"`` (default) takes off each direction's minimum
        over the fitting samples; a unit that is off for some sample is left as it is. ``"relu"`` cuts at zero, as a
        unit of a network would. Beware of it: the search can turn a direction until hardly any sample passes,
        and the index of the few that do is large and means nothing.
    unit_axis
        Of feature maps, as for :func:`~mlcollage.measure.representation.as_samples`.
    eps
        Of the index.

    Returns
    -------
    OffAxisResult

    Raises
    ------
    InvalidInput
        For shapes that do not fit, fewer than two classes in a part, or settings out of range.

    References
    ----------
    Leavitt and Morcos, ICLR 2021, arXiv:2003.01262, section on off-axis selectivity.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 2, 600)
    >>> selective = np.eye(2)[y] + 0.05 * rng.random((600, 2))
    >>> result = off_axis_upper_bound(selective @ np.array([[1, 1], [-1, 1]]) / 2**0.5, y)
    >>> round(result.si_axis, 1), round(result.si_bound, 1)
    (0.5, 1.0)
    """
    checks.integer("steps", steps, least=1)
    checks.probability("split", split)
    checks.positive("lr", lr)
    checks.real("penalty", penalty, least=0)
    checks.choice("response", response, ("relu", "shift"))
    a, labels = _check(acts, y, unit_axis)  # (N, U), (N,)
    if not isinstance(generator, torch.Generator):
        generator = torch.Generator().manual_seed(generator)
    order = torch.randperm(len(a), generator=generator).to(a.device)
    cut = max(1, round(split * len(a)))
    fit, held = order[:cut], order[cut:]  # indices of the samples to fit on and to judge on
    averages = {part: _averages(labels[index], part) for part, index in (("fitted", fit), ("held out", held))}

    def mean_index(w: Tensor, index: Tensor, part: str) -> Tensor:
        z = a[index] @ w.T  # (samples, U) rotated
        z = z.relu() if response == "relu" else (z - (a[fit] @ w.T).amin(dim=0)).clamp(min=0)
        return index_parts(averages[part] @ z, eps)[0].mean()

    def search(start: Tensor, count: int) -> tuple[float, Tensor]:
        return _search(lambda w: mean_index(w, fit, "fitted"), start, count, lr, penalty, orthonormal)

    eye = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    starts = (eye, *_class_frames(averages["fitted"] @ a[fit]))
    # Short searches from all starts choose the one that is worth a long one.
    tries = [search(start, max(1, steps // 5)) for start in starts]
    w = search(max(tries, key=lambda pair: pair[0])[1], steps)[1]
    # A dead layer has no ratio, and its index is 0 in any rotation.
    alive = bool((a[held] != a[held][0]).any())
    ratios = class_variance_ratios(a[held], labels[held]) if alive else np.zeros(1)
    on, off = (_mean_variance_ratio(a[held] @ m.T, labels[held]) for m in (eye, w))
    with torch.no_grad():
        axis, bound = (float(mean_index(m, held, "held out")) for m in (eye, w))
        fitted = float(mean_index(w, fit, "fitted"))
    return OffAxisResult(axis, bound, fitted, w.cpu().numpy(), ratios, on, off)


def class_variance_ratios(acts: Any, y: Any, *, unit_axis: int | None = None) -> Floats:
    r"""Largest share of variance between classes that any directions of a layer hold: a relaxation in closed form.

    .. math:: S_B w = \lambda S_T w, \qquad \lambda(w) = \frac{w^\top S_B w}{w^\top S_T w} \in [0, 1]

    For one direction the share between classes is a Rayleigh quotient, so the best directions solve a generalized
    eigenproblem: no search, no local optimum. No rotation can give a unit a larger share than the first value.

    Parameters
    ----------
    acts, y, unit_axis
        As for :func:`off_axis_upper_bound`.

    Returns
    -------
    numpy.ndarray
        (min(C - 1, rank),) ratios, falling.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 2, 500)
    >>> class_variance_ratios(np.c_[y + 0.5 * rng.normal(size=500), rng.normal(size=500)], y).round(1).tolist()
    [0.5]
    """
    a, labels = _check(acts, y, unit_axis)
    x = a - a.mean(dim=0)  # (N, U)
    means = (_averages(labels, "given") @ x).cpu().numpy()  # (C, U)
    share = torch.bincount(labels)[labels.unique()].cpu().numpy() / len(x)  # (C,)
    rows = x.cpu().numpy()
    total, between = rows.T @ rows / len(rows), (means * share[:, None]).T @ means  # S_T and S_B, both (U, U)
    values, vectors = scipy.linalg.eigh(total)
    kept = values > values[-1] * len(rows) * np.finfo(np.float64).eps  # units that depend on others add no direction
    if not kept.any() or values[-1] <= 0:
        raise InvalidInput("all responses are constant, so that no direction varies; look at the layer.")
    whitener = vectors[:, kept] / np.sqrt(values[kept])  # (U, rank): turns S_T into the identity
    ratios = scipy.linalg.eigvalsh(whitener.T @ between @ whitener)[::-1].clip(0, 1)
    return ratios[: min(len(means) - 1, len(ratios))]


def _check(acts: Any, y: Any, unit_axis: int | None) -> tuple[Tensor, Tensor]:
    if isinstance(acts, Tensor) and acts.ndim > 2:
        acts = as_samples(acts, unit_axis=unit_axis)
    a = acts.detach() if isinstance(acts, Tensor) else torch.from_numpy(np.array(acts, dtype=np.float64))
    centered_matrix(a, "acts")  # checks shape and values
    a = (a.cpu() if a.device.type == "mps" else a).double()
    if not isinstance(y, Tensor) and np.asarray(y).dtype.kind not in "iuf":
        raise InvalidInput("y must hold integer labels from 0; number words with np.unique(y, return_inverse=True)[1].")
    labels = torch.as_tensor(y).to(a.device)
    if labels.is_floating_point() or labels.shape != a.shape[:1] or bool((labels < 0).any()):
        raise InvalidInput(
            f"y must hold an integer label from 0 for each of the {len(a)} samples, not {labels.dtype} "
            f"{tuple(labels.shape)}."
        )
    return a, labels.long()


def _averages(labels: Tensor, part: str) -> Tensor:
    """(C, N) whose rows average over the samples of each class that is there."""
    classes = labels.unique()
    if len(classes) < 2:
        raise InvalidInput(f"selectivity needs at least 2 classes; the samples {part} hold {len(classes)}.")
    members = (classes[:, None] == labels).double()
    return members / members.sum(dim=1, keepdim=True)


def _mean_variance_ratio(z: Tensor, labels: Tensor) -> float:
    """Share of variance between classes of each column of z (N, U), mean over columns (0 if constant)."""
    averages = _averages(labels, "given")
    z = z - z.mean(dim=0)
    share = (averages > 0).double().mean(dim=1, keepdim=True)  # (C, 1)
    between, total = (share * (averages @ z).square()).sum(dim=0), z.square().mean(dim=0)  # both (U,)
    return float(torch.where(total > 0, between / total.clamp(min=1e-300), 0.0).mean())


def _class_frames(means: Tensor) -> list[Tensor]:
    """Rotations (U, U) whose first rows lie nearest to the class means (C, U), less their mean (Procrustes).

    Less their mean, C means span C - 1 directions; the one that is left open is that of the mean itself, either way.
    """
    center = means.mean(dim=0)
    largest = (means - center).norm(dim=1).argsort(descending=True)[: means.shape[1]]  # at most U rows fit
    k = len(largest)
    left, size, right = torch.linalg.svd((means - center)[largest], full_matrices=True)  # (k, k), (k,), (U, U)
    rank = int((size > 1e-9 * size[0]).sum()) if float(size[0]) > 0 else 0
    bases = [right]
    if rank < k:
        rest = right[rank:]  # directions outside of the span; turn them so that the mean's part there is the first
        turned = torch.linalg.svd((rest @ center)[None], full_matrices=True)[2] @ rest
        bases = [torch.cat([right[:rank], sign * turned[:1], turned[1:]]) for sign in (1.0, -1.0)]
    return [torch.cat([left @ basis[:k], basis[k:]]) for basis in bases]


def _search(
    objective: Callable[[Tensor], Tensor], start: Tensor, steps: int, lr: float, penalty: float, orthonormal: bool
) -> tuple[float, Tensor]:
    """The largest value that Adam finds from one start (U, U), and where."""
    units = len(start)
    eye = torch.eye(units, dtype=start.dtype, device=start.device)
    free = torch.zeros_like(start, requires_grad=True)
    best, best_value = start, -float("inf")
    optimizer = torch.optim.Adam([free], lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            # The exponential of a skew-symmetric matrix is a rotation, so w stays orthonormal by construction.
            w = torch.linalg.matrix_exp(free - free.T) @ start if orthonormal else start + free
            value = objective(w)
            if not orthonormal:
                value = value - penalty * (w @ w.T - eye).square().sum() / units
            if float(value.detach()) > best_value:
                best, best_value = w.detach().clone(), float(value.detach())
            optimizer.zero_grad()
            (-value).backward()
            optimizer.step()
    return best_value, best
