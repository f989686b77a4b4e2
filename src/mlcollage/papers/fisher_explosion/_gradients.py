"""Gradients of the squared norm of a gradient: by double backpropagation, and without it.

Written for one network and for R stacked ones alike. ``lead`` is 0 for tensors of one network and 1 for tensors
(R, ...) whose first dimension numbers replicas; losses and squared norms then have shape () or (R,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointError

from mlcollage.measure._tape import second_derivatives
from mlcollage.nn import logits_of, unwrap

Closure = Callable[[], Any]
Gradient = Callable[[Mapping[str, Tensor], Sequence[Tensor] | None], list[Tensor]]


def nll(logits: Tensor, y: Tensor) -> Tensor:
    """Mean negative log-likelihood in at least single precision: () of (B, C), or (R,) of (R, B, C)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    each = F.cross_entropy(wide.flatten(0, -2), y.flatten(), reduction="none")  # (B,) or (R * B,)
    return each.view(y.shape).mean(-1)


def dot(a: Sequence[Tensor], b: Sequence[Tensor], lead: int = 0) -> Tensor:
    """Inner product of two lists of tensors, in at least single precision: (), or (R,)."""
    parts = []  # one for each pair of tensors: () or (R,)
    for left, right in zip(a, b, strict=True):
        product = left * right if left.dtype == torch.float64 else left.float() * right.float()
        parts.append(product.reshape(*product.shape[:lead], -1).sum(-1))
    return torch.stack(parts).sum(0)


def gradient_at(loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool, scale: float = 1.0) -> list[Tensor]:
    """Gradient of the loss with respect to the parameters, zeros where it does not depend on one.

    Of losses (R,) of stacked networks the sum is differentiated, which gives each network its own gradient. It is taken
    of ``scale`` times the loss and divided by ``scale``, so that half-precision activations do not underflow on the
    way.
    """
    total = loss.sum() if scale == 1.0 else loss.sum() * scale
    found = torch.autograd.grad(
        total, list(parameters), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return list(found) if scale == 1.0 else [g / scale for g in found]


# --- several processes ------------------------------------------------------------------------------------------------


def world_size() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def mean_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Means over all processes, by one reduction of one flat vector; the tensors themselves if there is one process."""
    if world_size() == 1:
        return [t.detach() for t in tensors]
    flat = torch.cat([t.detach().flatten() for t in tensors])  # one message for all
    dist.all_reduce(flat)
    flat /= world_size()
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


# --- without double backpropagation -----------------------------------------------------------------------------------


class _Calling(nn.Module):
    """A module that calls a function, so that ``functional_call`` can put other parameters into ``model`` meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], list[Tensor]]) -> list[Tensor]:
        return function()


@contextmanager
def frozen_noise_and_statistics(model: nn.Module) -> Iterator[Callable[[], Any]]:
    """Inside, every ``with replay():`` starts from the same random state; outside, nothing was drawn or updated.

    Dropout masks are then the same in every evaluation, and running statistics of batch norm are put back.
    """
    inner = unwrap(model)
    devices = sorted({p.device.index or 0 for p in inner.parameters() if p.device.type == "cuda"})
    buffers = [(b, b.detach().clone()) for b in inner.buffers()]
    with ExitStack() as stack:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            stack.enter_context(model.no_sync())  # else its reducer waits for gradients that never come
        try:
            yield lambda: torch.random.fork_rng(devices=devices)
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):  # else graphs that hold it stay valid
                        buffer.copy_(before)


def gradient_of(
    model: nn.Module, closure: Closure, y: Tensor, replay: Callable[[], Any], scale: float = 1.0
) -> Gradient:
    """The gradient of a batch's loss at labels y as a function of the parameters, with the noise of ``replay``.

    Called with a direction v it gives the Hessian times v instead, by differentiating backward twice.
    """
    calling = _Calling(unwrap(model))

    def gradient(parameters: Mapping[str, Tensor], direction: Sequence[Tensor] | None) -> list[Tensor]:
        swapped = {f"model.{name}": p for name, p in parameters.items()}
        leaves = list(parameters.values())

        def found() -> list[Tensor]:
            loss = nll(logits_of(closure()), y)
            if direction is None:
                return gradient_at(loss, leaves, create_graph=False, scale=scale)
            along = dot(gradient_at(loss, leaves, create_graph=True, scale=scale), direction)
            return gradient_at(along, leaves, create_graph=False)

        # Backward passes too while the parameters are swapped: checkpointing computes activations in them.
        with replay(), torch.enable_grad():
            return functional_call(calling, swapped, (found,))

    return gradient


def gradient_change(
    gradient: Gradient,
    parameters: Mapping[str, Tensor],
    here: Sequence[Tensor],
    direction: Sequence[Tensor],
    step: float | None,
) -> list[Tensor]:
    r"""Hessian times direction by a forward difference from the gradient ``here``.

    :math:`H v \approx [g(\theta + h\, v / \|v\|) - g(\theta)]\, \|v\| / h`, with
    :math:`h = \sqrt{\epsilon}\,(1 + \|\theta\|)` unless given.
    """
    length = float(nn.utils.get_total_norm(direction))
    if length == 0.0:  # no direction to step in, and H 0 = 0
        return [torch.zeros_like(v) for v in direction]
    kind = next(iter(parameters.values())).dtype
    size = float(nn.utils.get_total_norm([p.detach() for p in parameters.values()]))
    # Balances the rounding of the gradients, eps / h, against the curvature that a longer step would see.
    h = step if step is not None else torch.finfo(kind).eps ** 0.5 * (1 + size)
    moved = {
        name: (p.detach() + v * (h / length)).requires_grad_()
        for (name, p), v in zip(parameters.items(), direction, strict=True)
    }
    return [(a - b) * (length / h) for a, b in zip(gradient(moved, None), here, strict=True)]


def gradient_tangent(
    model: nn.Module, gradient: Gradient, parameters: Mapping[str, Tensor], direction: Sequence[Tensor]
) -> list[Tensor]:
    """Hessian times direction, exactly: forward-mode differentiation of the backward pass.

    Where an operation has no forward mode (group norm, checkpointing), the backward pass is differentiated backward
    instead.
    """
    with ExitStack() as stack:
        # Fused attention and library recurrent layers have no second derivative of either kind; their plain forms do.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(second_derivatives(unwrap(model)))
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}  # the model's own stay untouched
        try:
            with forward_ad.dual_level():
                # theta + epsilon v: the tangent of the gradient there is d g(theta + epsilon v) / d epsilon = H v.
                duals = {
                    name: forward_ad.make_dual(p, v) for (name, p), v in zip(leaves.items(), direction, strict=True)
                }
                tangents = [forward_ad.unpack_dual(g).tangent for g in gradient(duals, None)]
        except (NotImplementedError, CheckpointError):
            tangents = gradient(leaves, direction)
    # There is no tangent where a gradient does not depend on the parameters.
    return [torch.zeros_like(v) if t is None else t.detach() for t, v in zip(tangents, direction, strict=True)]
