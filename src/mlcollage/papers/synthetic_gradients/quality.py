"""How a synthesizer does on data: its gradients against true ones, and the loss surface that it implies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn.init import seeded

from .context import LossFn
from .decoupled import Decoupled


def sg_quality(net: Decoupled, x: Any, y: Any, loss_fn: LossFn) -> dict[str, dict[str, float]]:
    """Synthetic against true gradients at each cut, on any data; nothing of the network or its gradients changes.

    True gradients are those of backpropagation from the loss, not the bootstrapped targets that synthesizers learn.

    Parameters
    ----------
    net
        With ``credit="sg"``.
    x, y, loss_fn
        As for :meth:`Decoupled.training_step`.

    Returns
    -------
    dict of str to dict
        By cut: ``cosine`` (mean over samples), ``relative_error`` (squared error over the squared norm of the true
        gradient), ``sign`` (share of coordinates that agree), ``ratio`` of norms, ``zero_rows`` (share of samples
        without gradient, which the others leave out), ``rows``.

    Examples
    --------
    >>> from mlcollage.papers.synthetic_gradients import decouple
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> x, y = torch.randn(6, 4), torch.arange(6) % 3
    >>> net = decouple(model, ["1"], example=x, context=3)
    >>> sg_quality(net, x, y, nn.CrossEntropyLoss())["1"]["relative_error"]  # a synthesizer that still says zero
    1.0
    """
    if net.credit != "sg":
        raise InvalidInput(f"synthetic gradients are measured of credit='sg'; this network has {net.credit!r}.")
    settings = {
        k: getattr(net, k)
        for k in (
            "lam",
            "unlock",
            "probability",
            "train_every",
            "steps",
            "skipped",
            "_seen",
            "_checked",
        )
    }
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    grads = [(p, p.grad) for p in net.parameters()]
    try:
        # As plain backpropagation, with the synthesizers looking on.
        net.lam, net.unlock, net.probability, net.skipped, net._seen = 1.0, "backward", 1.0, {}, {}
        net.train_every = 1
        for p, _ in grads:
            p.grad = None
        with seeded(0):
            net.training_step(x, y, loss_fn)
        return net.report()
    finally:
        for name, value in settings.items():
            setattr(net, name, value)
        with torch.no_grad():
            for name, b in net.named_buffers():
                b.copy_(buffers[name])
        for p, grad in grads:
            p.grad = grad


@dataclass(frozen=True)
class ImpliedLoss:
    """A loss whose gradient a synthesizer would be.

    Parameters
    ----------
    values
        (len(u), len(v)): at the points of the grid, 0 at its origin.
    asymmetry
        Size of the antisymmetric part of the synthesizer's Jacobian over that of the symmetric part, at the origin;
        only where it is 0 is the synthesizer the gradient of anything, and values do not depend on the way.
    u, v
        Coordinates.
    """

    values: NDArray[np.float64]
    asymmetry: float
    u: NDArray[np.float64]
    v: NDArray[np.float64]


def implied_loss(
    synthesizer: nn.Module,
    origin: Tensor,
    directions: tuple[Tensor, Tensor],
    context: Tensor | None = None,
    *,
    u: Sequence[float] = tuple(np.linspace(-1, 1, 21)),
    v: Sequence[float] = tuple(np.linspace(-1, 1, 21)),
    points: int = 16,
) -> ImpliedLoss:
    r"""Integrate a synthesizer along straight lines: :math:`l(h) = \int_0^1 M(o + t (h - o))^\top (h - o)\, dt`.

    Parameters
    ----------
    synthesizer
        Over vectors.
    origin
        o, (D,).
    directions
        Two vectors (D,) that span the plane that is looked at.
    context
        (C,).
    u, v
        Coordinates of the grid along the directions.
    points
        Of Gauss and Legendre's rule: exact for polynomials up to degree ``2 * points - 1``, so for linear synthesizers.

    Examples
    --------
    >>> from mlcollage.papers.synthetic_gradients import SyntheticGradient
    >>> found = implied_loss(SyntheticGradient(3), torch.zeros(3), (torch.eye(3)[0], torch.eye(3)[1]))
    >>> found.values.shape, float(found.values.max())
    ((21, 21), 0.0)
    """
    checks.integer("points", points, least=1)
    if origin.ndim != 1 or any(d.shape != origin.shape for d in directions):
        raise InvalidInput("origin and both directions must be vectors of the activation's width.")
    nodes, weights = np.polynomial.legendre.leggauss(points)
    t, w = torch.from_numpy((nodes + 1) / 2).to(origin), torch.from_numpy(weights / 2).to(origin)
    uu, vv = torch.tensor(list(u)).to(origin), torch.tensor(list(v)).to(origin)
    steps = uu[:, None, None] * directions[0] + vv[None, :, None] * directions[1]  # (U, V, D)
    at = origin + t[:, None, None, None] * steps  # (points, U, V, D)
    rows = at.reshape(-1, len(origin))
    given = None if context is None else context.expand(len(rows), -1)
    mode = synthesizer.training
    synthesizer.eval()
    try:
        with torch.no_grad():
            slopes = synthesizer(rows, given).reshape(at.shape)
        one = None if context is None else context[None]
        jacobian = torch.func.jacrev(lambda h: synthesizer(h[None], one)[0])(origin).detach()  # (D, D)
    finally:
        synthesizer.train(mode)
    values = torch.einsum("p,puvd,uvd->uv", w, slopes, steps)
    symmetric, rest = jacobian + jacobian.T, jacobian - jacobian.T
    size = float(symmetric.norm())
    asymmetry = float(rest.norm()) / size if size > 0 else (0.0 if float(rest.norm()) == 0 else float("inf"))
    return ImpliedLoss(values.double().numpy(), asymmetry, np.array(u, float), np.array(v, float))
