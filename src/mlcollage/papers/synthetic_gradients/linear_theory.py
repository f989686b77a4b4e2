"""The convergence theorem for linear networks, as a computation: gap to the optimum and weights of the synthesizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput


@dataclass(frozen=True)
class LinearConvergence:
    """What became of a linear network trained by a linear synthesizer.

    Parameters
    ----------
    gap
        Loss minus the smallest possible loss, after each recorded step.
    steps
        Their numbers.
    weights
        The synthesizer at the output as (a, b, c) of :math:`a h + b y + c`; of deep networks NaN.
    optimum
        The smallest loss; 0 for classes that a plane separates.
    """

    gap: NDArray[np.float64]
    steps: NDArray[np.int64]
    weights: tuple[float, float, float]
    optimum: float

    @property
    def final_gap(self) -> float:
        """The last one."""
        return float(self.gap[-1])


def linear_sg_convergence(
    x: Tensor,
    y: Tensor,
    *,
    loss: Literal["mse", "log"] = "mse",
    depth: int = 1,
    label: bool = True,
    lr: float = 0.05,
    steps: int = 6000,
    records: int = 60,
) -> LinearConvergence:
    r"""Train :math:`h = W_L \cdots W_1 x + w_0` with a linear synthesizer whose step is an exact line search.

    In each step the network moves along :math:`M(h, y)`, then M takes a gradient step of the length that is best on
    :math:`\frac1n \sum \lVert M(h, y) - g \rVert^2`. With one layer M is at the output; with more it is behind the
    middle layer, and the layers above have their true gradient. Loss ``"mse"`` is :math:`\frac{1}{2n} \sum (h - y)^2`,
    whose gradient :math:`h - y` is in M's class, with weights (1, -1, 0); that of ``"log"``, :math:`\sigma(h) - y`, is
    not.

    Parameters
    ----------
    x
        (n, d), taken in float64.
    y
        (n,), numbers; for ``"log"`` 0 or 1.
    loss, depth
        As above; deep networks have hidden layers as wide as the input.
    label
        Whether M reads y.
    lr
        Of the network.
    steps, records
        How many steps, and how often the gap is recorded.

    Returns
    -------
    LinearConvergence

    Notes
    -----
    Czarnecki et al., theorem 1 and 2: some learning rate that is small enough leads to the global optimum.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(50, 2, generator=g, dtype=torch.float64)
    >>> found = linear_sg_convergence(x, x @ torch.tensor([1.0, -2.0], dtype=torch.float64), steps=2000)
    >>> found.final_gap < 1e-12
    True
    """
    checks.choice("loss", loss, ("mse", "log"))
    depth, steps = checks.integer("depth", depth, least=1), checks.integer("steps", steps, least=1)
    lr = checks.positive("lr", lr)
    x, y = torch.as_tensor(x).double(), torch.as_tensor(y).double().flatten()
    if x.ndim != 2 or len(x) != len(y):
        raise InvalidInput(f"x must be (n, d) and y (n,), not {tuple(x.shape)} and {tuple(y.shape)}.")
    if loss == "log" and not bool(((y == 0) | (y == 1)).all()):
        raise InvalidInput("for the log loss y must be 0 or 1.")
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise InvalidInput("x and y must be finite numbers; NaN or infinity was found.")
    n = len(x)
    rows = torch.cat([x, x.new_ones(n, 1)], 1)  # (n, d + 1), the last for the bias
    best = _optimum(rows, y, loss)
    width = x.shape[1]
    lower = _identity_product(depth // 2, width, x) if depth > 1 else []
    upper = _identity_product(depth - 1 - depth // 2, width, x) if depth > 1 else []
    w = x.new_zeros(width + 1)  # of the output, with its bias
    units = width if depth > 1 else 1  # where the synthesizer is
    m = x.new_zeros(units, units + (1 if label else 0) + 1)
    gaps, when, first = [], [], 0.0
    every = max(1, steps // max(1, records))
    if depth > 1:  # a start from which all layers can learn
        w[:width] = 1.0 / width
    for step in range(steps + 1):
        h, below = _forward(lower, x) if depth > 1 else (x, [])
        top, above = _forward(upper, h) if depth > 1 else (x, [])
        z = top @ w[:-1] + w[-1]  # (n,)
        residual = z - y if loss == "mse" else torch.sigmoid(z) - y
        value = float(0.5 * (z - y).square().mean()) if loss == "mse" else float(_log_loss(z, y))
        first = value if step == 0 else first
        if not value <= 1e9 * max(first, 1.0):
            raise InvalidInput(f"the network diverged at step {step}; lower lr={lr:g}.")
        if step % every == 0 or step == steps:
            gaps.append(value - best)
            when.append(step)
        if depth == 1:
            read = torch.cat([z[:, None], *([y[:, None]] if label else []), x.new_ones(n, 1)], 1)  # (n, k)
            target = residual[:, None]
            sent = read @ m.T  # (n, 1)
            w = w - lr * (rows.T @ sent[:, 0]) / n
        else:
            read = torch.cat([h, *([y[:, None]] if label else []), x.new_ones(n, 1)], 1)
            back = residual[:, None] * w[:-1]  # (n, width), of the true gradient
            target = back
            for layer in reversed(upper):
                target = target @ layer
            sent = read @ m.T
            new_w = w - lr * torch.cat([top.T @ residual, residual.sum()[None]]) / n
            _descend(upper, above, back, lr)
            _descend(lower, below, sent, lr)
            w = new_w
        m = _line_search(m, read, target)
    weights = (float("nan"),) * 3
    if depth == 1:
        a, c = float(m[0, 0]), float(m[0, -1])
        weights = (a, float(m[0, 1]) if label else 0.0, c)
    return LinearConvergence(np.array(gaps), np.array(when), weights, best)


def _identity_product(count: int, width: int, x: Tensor) -> list[Tensor]:
    return [torch.eye(width, dtype=x.dtype) for _ in range(max(count, 1))]


def _forward(layers: list[Tensor], h: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output of a linear chain, and each layer's input."""
    inputs = []
    for layer in layers:
        inputs.append(h)
        h = h @ layer.T
    return h, inputs


def _descend(layers: list[Tensor], inputs: list[Tensor], g: Tensor, lr: float) -> None:
    """A gradient step of each layer along g (n, width) at the chain's output."""
    for i in reversed(range(len(layers))):
        own = g.T @ inputs[i] / len(g)
        g = g @ layers[i]
        layers[i] = layers[i] - lr * own


def _line_search(m: Tensor, read: Tensor, target: Tensor) -> Tensor:
    """The synthesizer after a gradient step of the best length: a quadratic, so its minimum is known."""
    error = read @ m.T - target
    slope = error.T @ read / len(read)
    moved = read @ slope.T
    size = float(moved.square().sum())
    return m - (float((error * moved).sum()) / size) * slope if size > 0 else m


def _log_loss(z: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(z, y)


def _optimum(rows: Tensor, y: Tensor, loss: str) -> float:
    if loss == "mse":
        best = torch.linalg.lstsq(rows, y[:, None], driver="gelsd").solution[:, 0]
        return float(0.5 * (rows @ best - y).square().mean())
    a, t = rows.numpy(), y.numpy()

    def value(w: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = a @ w
        p = 1 / (1 + np.exp(-z))
        return float(np.mean(np.logaddexp(0, z) - t * z)), a.T @ (p - t) / len(t)

    found = minimize(value, np.zeros(a.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-16})
    return float(found.fun) if float(found.fun) > 1e-6 else 0.0
