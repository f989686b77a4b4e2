r"""The linearization of a network about given weights, which is what Laplace approximations predict with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from mlcollage.nn.wrapped import logits_of

from .layout import Layout

__all__ = ["linearized"]


def linearized(module: nn.Module, mean: Tensor, draws: Tensor, X: Tensor, *, batch_size: int | None = None) -> Tensor:
    r"""Outputs of the network's linearization about ``mean``, for each draw.

    .. math:: f_{lin}(x, w) = f(x, \hat w) + J(x, \hat w) \, (w - \hat w)

    by one Jacobian-vector product per draw; no Jacobian is stored.

    Parameters
    ----------
    module
        The network, in evaluation mode.
    mean
        :math:`\hat w`, (P,).
    draws
        (n, P).
    X
        Inputs (N, ...).
    batch_size
        Inputs per pass; by default all.

    Returns
    -------
    Tensor
        (n, N, ...).

    Examples
    --------
    A linear map is its own linearization:

    >>> net = nn.Linear(2, 1)
    >>> mean = torch.zeros(3)
    >>> linearized(net, mean, torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 1.0]])).tolist()
    [[[6.0]]]
    """
    layout = Layout.of(module)

    def output(w: Tensor, x: Tensor) -> Tensor:
        return logits_of(functional_call(module, layout.unflatten(w), (x,)))

    def one(draw: Tensor, x: Tensor) -> Tensor:
        value, change = jvp(lambda w: output(w, x), (mean,), (draw - mean,))  # (N, ...) each
        return value + change

    with torch.no_grad():
        parts = [vmap(one, in_dims=(0, None))(draws, x) for x in X.split(batch_size or len(X))]
    return torch.cat(parts, dim=1)
