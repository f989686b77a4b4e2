"""Soft-error and the bootstrap error: what the two worlds are compared by."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

METRICS = ("loss", "error", "soft_error")


def _check(logits: Tensor, target: Tensor, name: str) -> Tensor:
    """Labels broadcast to ``logits.shape[:-1]``, or one clear sentence."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise InvalidInput(
            f"{name} needs integer class labels, but the target is {target.dtype}; "
            "a regression target has no soft-error, use the loss itself."
        )
    if logits.ndim < 1 or not logits.is_floating_point():
        raise InvalidInput(f"{name} needs float logits (..., classes), not {logits.dtype} {tuple(logits.shape)}.")
    try:
        labels = target.expand(logits.shape[:-1])
    except RuntimeError:
        raise InvalidInput(
            f"{name}: logits {tuple(logits.shape)} need labels of shape {tuple(logits.shape[:-1])}, got "
            f"{tuple(target.shape)}."
        ) from None
    if labels.numel() and (int(target.min()) < 0 or int(target.max()) >= logits.shape[-1]):
        raise InvalidInput(
            f"{name}: labels run from {int(target.min())} to {int(target.max())}, "
            f"but {logits.shape[-1]} logits allow 0 to {logits.shape[-1] - 1}."
        )
    return labels


def _reduce(values: Tensor, reduction: str) -> Tensor:
    return values.mean() if checks.choice("reduction", reduction, ("mean", "none")) == "mean" else values


def soft_error(logits: Tensor, target: Tensor, *, reduction: Literal["mean", "none"] = "mean") -> Tensor:
    r"""Soft-error of a classifier: one minus the softmax mass on the true label.

    .. math:: \mathrm{SoftError}(f) = \mathbb{E}_{(x, y)}\,[\,1 - p_f(y \mid x)\,]

    It is the error of the classifier that *samples* its label from the softmax, and is smoother in training time
    than the error of the most likely label.

    Parameters
    ----------
    logits
        ``(..., classes)``, e.g. ``(b, classes)``, or ``(R, b, classes)`` for R networks at once.
    target
        Integer labels that broadcast to ``logits.shape[:-1]``.
    reduction
        ``"mean"`` (default) or ``"none"``, which keeps ``logits.shape[:-1]``.

    Returns
    -------
    Tensor
        Values in [0, 1]; differentiable in the logits, exact also near 0.

    Raises
    ------
    InvalidInput
        For regression targets, labels out of range or shapes that do not fit.

    References
    ----------
    Nakkiran, Neyshabur, Sedghi, "The Deep Bootstrap Framework", ICLR 2021, section 2.

    Examples
    --------
    >>> soft_error(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    tensor(0.7500)
    """
    labels = _check(logits, target, "soft_error")
    log_p = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)  # (...)
    # 1 - p by expm1: of p near 1 the difference would keep no digit.
    return _reduce(-torch.expm1(log_p), reduction)


def error(logits: Tensor, target: Tensor, *, reduction: Literal["mean", "none"] = "mean") -> Tensor:
    """Share of samples whose most likely label is wrong (0-1 error).

    Parameters
    ----------
    logits, target, reduction
        As in :func:`soft_error`.

    Examples
    --------
    >>> error(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    labels = _check(logits, target, "error")
    return _reduce((logits.argmax(-1) != labels).to(logits.dtype), reduction)  # of shape logits.shape[:-1]


def bootstrap_error(real: npt.ArrayLike, ideal: npt.ArrayLike) -> Any:
    r"""Bootstrap error: how much worse the Real World tests than the Ideal World after the same number of steps.

    .. math::
        \mathrm{TestError}(f_t) = \mathrm{TestError}(f_t^{\mathrm{iid}}) + \varepsilon(n, D, F, t)

        \varepsilon(n, D, F, t) = \mathrm{TestError}(f_t) - \mathrm{TestError}(f_t^{\mathrm{iid}})

    Parameters
    ----------
    real, ideal
        Test errors (any metric) at the same steps: scalars or arrays of one shape.

    Returns
    -------
    float or numpy.ndarray
        ``real - ideal``; negative where the Real World tests better.

    Raises
    ------
    InvalidInput
        If the shapes differ: the worlds must be compared step by step.

    Examples
    --------
    >>> round(bootstrap_error(0.168, 0.147), 3)
    0.021
    """
    a, b = np.asarray(real, dtype=np.float64), np.asarray(ideal, dtype=np.float64)
    if a.shape != b.shape:
        raise InvalidInput(
            f"the Real World has errors of shape {a.shape}, the Ideal World {b.shape}; "
            "the bootstrap error compares the same steps, so give both at the same ones."
        )
    gap = a - b
    return float(gap) if gap.ndim == 0 else gap
