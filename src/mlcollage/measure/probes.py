"""Linear probes in closed form: of all layers at once, and of one with a ridge chosen by leave-one-out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure.knn import known_labels, labels_of
from mlcollage.measure.representation import as_double, centered_matrix

__all__ = ["RidgeProbe", "layer_probes", "ridge_probe"]

_RIDGES = tuple(10.0**e for e in range(-6, 4))


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


@dataclass(frozen=True)
class RidgeProbe:
    """A linear map from a representation to targets or classes; made by :func:`ridge_probe`.

    Parameters
    ----------
    weight, bias
        (p, k) and (k,), for representations as they were given.
    ridge
        The ridge that was chosen.
    scores
        Leave-one-out score of each ridge that was tried: accuracy, or mean R^2 of the targets.
    names
        Labels by class; None for targets.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    scores: Mapping[float, float] = field(repr=False)
    names: NDArray[Any] | None = None

    def predict(self, X: Any) -> Any:
        """Targets (m, k), or labels (m,)."""
        x = as_double(X)
        if x.ndim != 2 or x.shape[1] != len(self.weight):
            raise InvalidInput(f"X has shape {tuple(x.shape)}; expected (rows, {len(self.weight)}).")
        if not bool(x.isfinite().all()):
            raise InvalidInput("X holds NaN or infinity, of which nothing can be predicted.")
        out = x @ self.weight.to(x.device) + self.bias.to(x.device)
        return out if self.names is None else self.names[out.argmax(1).cpu().numpy()]

    def score(self, X: Any, y: Any) -> float:
        """Accuracy, or R^2 of other rows, mean over targets.

        Raises
        ------
        InvalidInput
            For labels that the probe has not seen, another number of rows or targets, and targets that do not vary.
        """
        if self.names is None:
            t = as_double(y)
            t = t[:, None] if t.ndim == 1 else t
            out = self.predict(X).to(t.device)
            if t.shape != out.shape:
                raise InvalidInput(f"targets have shape {tuple(t.shape)}; expected {tuple(out.shape)}, as predicted.")
            spread = (t - t[:1]).var(0, correction=0)
            if not bool((spread > 0).all()):
                raise InvalidInput("a target is the same in all rows, or NaN: it has no R^2; give rows that differ.")
            return float((1 - (t - out).square().mean(0) / spread).mean())
        predicted = self.predict(X)
        return float((predicted == known_labels(y, len(predicted), self.names)).mean())


def ridge_probe(X: Any, y: Any, *, ridges: Sequence[float] = _RIDGES) -> RidgeProbe:
    r"""Ridge regression on a frozen representation, the ridge being the best in leave-one-out, which costs nothing.

    With :math:`A` centered and :math:`H = A (A^\top A + n \rho s I)^{-1} A^\top + \tfrac1n 1 1^\top`, where s is the
    mean square of A's entries, the residual of a row that was left out is

    .. math:: e_i = \frac{y_i - \hat y_i}{1 - H_{ii}} .

    Parameters
    ----------
    X
        Representations (n, p).
    y
        Labels (n,), whole numbers or text, for which one-hot targets are fitted and the ridge of the best accuracy is
        taken; or floating targets (n,) or (n, k), for which that of the smallest squared error is.
    ridges
        Values of :math:`\rho` to try, in units of the mean square of the centered features: ten decades by default.
        Of equal scores the largest wins.

    Returns
    -------
    RidgeProbe

    Raises
    ------
    InvalidInput
        For fewer than three rows, a single class, labels below 0, NaN, and a representation that is constant.

    Examples
    --------
    >>> draw = torch.Generator().manual_seed(0)
    >>> x = torch.randn(200, 5, generator=draw)
    >>> y = x[:, :2] + 0.1 * torch.randn(200, 2, generator=draw)
    >>> probe = ridge_probe(x[:100], y[:100])
    >>> round(probe.score(x[100:], y[100:]), 2)
    0.99
    """
    x = as_double(X)
    a = centered_matrix(X, "X")
    n = len(a)
    if n < 3:
        raise InvalidInput(f"a probe with leave-one-out needs three rows or more, not {n}.")
    if not ridges:
        raise InvalidInput("ridges is empty; give the values to try.")
    target, names = _targets(y, n)
    target = target.to(a.device)
    unit = float(a.square().mean())
    if unit == 0:
        raise InvalidInput("X is the same for all rows; there is nothing to fit.")
    u, s, vt = torch.linalg.svd(a, full_matrices=False)  # (n, r), (r,), (r, p)
    t = target - target.mean(0)
    inner = u.T @ t  # (r, k)
    scores: dict[float, float] = {}
    for ridge in sorted(checks.positive("each ridge", r) for r in ridges):
        shrink = s.square() / (s.square() + n * ridge * unit)
        out = 1 - (u.square() @ shrink) - 1 / n  # 1 - H_ii
        rest = (t - u @ (shrink[:, None] * inner)) / out.clamp(min=1e-12)[:, None]
        if names is None:
            spread = t.square().mean(0).clamp(min=1e-300)
            scores[ridge] = float((1 - rest.square().mean(0) / spread).mean())
        else:
            scores[ridge] = float(((target - rest).argmax(1) == target.argmax(1)).double().mean())
    best = max(scores, key=lambda ridge: (scores[ridge], ridge))
    shrink = s / (s.square() + n * best * unit)
    weight = vt.T @ (shrink[:, None] * inner)
    return RidgeProbe(weight, target.mean(0) - x.mean(0).to(weight) @ weight, best, scores, names)


def _targets(y: Any, n: int) -> tuple[Tensor, NDArray[Any] | None]:
    """Targets (n, k), or one-hot ones and the labels' names."""
    y = y.detach().cpu() if isinstance(y, Tensor) else y
    values = np.asarray(y.double() if isinstance(y, Tensor) and y.is_floating_point() else y)  # numpy has no bfloat16
    if values.dtype.kind == "f":
        t = torch.from_numpy(values).double()
        if t.ndim not in (1, 2) or len(t) != n or not bool(t.isfinite().all()):
            raise InvalidInput(f"targets have shape {values.shape}; finite ones (n,) or (n, k) with n={n} are needed.")
        return t.reshape(n, -1), None
    index, names = labels_of(values, n, "y")
    if len(names) < 2:
        raise InvalidInput("a probe needs training samples of at least two classes.")
    return torch.eye(len(names), dtype=torch.float64)[index], names


def _rows(acts: Any, n: int, name: str) -> Tensor:
    x = as_double(acts).cpu()
    if x.ndim < 2 or len(x) != n:
        raise InvalidInput(f"layer {name!r} has activations of shape {tuple(x.shape)}, but {n} labels.")
    if not bool(x.isfinite().all()):
        raise InvalidInput(f"layer {name!r} has activations that are NaN or infinite.")
    return x.flatten(1)
