"""Linear probes of all layers at once, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure.representation import as_double

__all__ = ["layer_probes"]


def layer_probes(
    train: Mapping[str, Any],
    y_train: Any,
    test: Mapping[str, Any],
    y_test: Any,
    *,
    num_classes: int | None = None,
    ridge: float = 1e-2,
) -> dict[str, float]:
    r"""Accuracy of a linear classifier on each layer's activations: ridge regression on one-hot targets.

    With activations :math:`A` (centered and scaled by the training samples, in units of their root mean square) and
    centered one-hot targets :math:`T`, :math:`W = (A^\top A / n + \rho I)^{-1} A^\top T / n`. One Cholesky
    factorization a layer; the smaller of the two Gram matrices is taken, so wide layers cost no more than the
    samples do.

    Parameters
    ----------
    train, test
        Activations by layer, (n, ...) and (m, ...), such as a :class:`~mlcollage.measure.layer_tap.LayerTap`;
        everything behind the first axis is flattened.
    y_train, y_test
        Class indices, (n,) and (m,).
    num_classes
        Default: the largest index plus one.
    ridge
        :math:`\rho`.

    Returns
    -------
    dict of str to float
        Test accuracy by layer, in the order of ``train``.

    Raises
    ------
    InvalidInput
        For a single class, no common layer, or counts that do not fit.

    Examples
    --------
    >>> y = torch.arange(60) % 3
    >>> noise = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    >>> layers = {"useful": torch.eye(3)[y] + 0.1 * noise, "noise": noise}
    >>> found = layer_probes(layers, y, layers, y)
    >>> found["useful"], found["noise"] < 0.7
    (1.0, True)
    """
    checks.positive("ridge", ridge)
    y, target = (torch.as_tensor(np.asarray(v)).long().flatten() for v in (y_train, y_test))
    classes = int(max(y.max(), target.max())) + 1 if num_classes is None else num_classes
    if len(y.unique()) < 2:
        raise InvalidInput("a probe needs training samples of at least two classes.")
    if missing := [name for name in train if name not in test]:
        raise InvalidInput(f"layer {missing[0]!r} is in the training activations only.")
    found = {}
    for name in train:
        a, b = _rows(train[name], len(y), name), _rows(test[name], len(target), name)
        center = a.mean(0)
        a, b = a - center, b - center
        scale = a.square().mean().sqrt()
        a, b = (a / scale, b / scale) if float(scale) > 0 else (a, b)
        one_hot = torch.eye(classes, dtype=torch.float64)[y]
        t = one_hot - one_hot.mean(0)  # (n, C)
        n, p = a.shape
        if p <= n:
            gram = a.T @ a / n + ridge * torch.eye(p, dtype=torch.float64)
            weight = torch.cholesky_solve(a.T @ t / n, torch.linalg.cholesky(gram))  # (p, C)
        else:  # the same weights, through the samples' Gram matrix
            gram = a @ a.T / n + ridge * torch.eye(n, dtype=torch.float64)
            weight = a.T @ torch.cholesky_solve(t / n, torch.linalg.cholesky(gram))
        found[name] = float(((b @ weight + one_hot.mean(0)).argmax(1) == target).double().mean())
    return found


def _rows(acts: Any, n: int, name: str) -> Tensor:
    x = as_double(acts).cpu()
    if x.ndim < 2 or len(x) != n:
        raise InvalidInput(f"layer {name!r} has activations of shape {tuple(x.shape)}, but {n} labels.")
    if not bool(x.isfinite().all()):
        raise InvalidInput(f"layer {name!r} has activations that are NaN or infinite.")
    return x.flatten(1)
