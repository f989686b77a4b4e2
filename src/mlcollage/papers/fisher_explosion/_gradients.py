"""Gradients of the squared gradient norm without double backpropagation, and what stands in double backward's way."""

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
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlcollage.errors import InvalidInput

__all__ = [
    "Closure",
    "batch_coupled",
    "check_double_backward",
    "frozen_noise_and_statistics",
    "gradient_at",
    "gradient_change",
    "gradient_tangent",
    "mean_over_ranks",
    "nll",
    "rank",
    "trainable",
    "unwrap",
    "world_size",
]

Closure = Callable[[], Any]

# Backward passes that have no derivative of their own; what the graph calls them, and what a user may do.
_NO_DOUBLE_BACKWARD: Mapping[str, str] = {
    "CompiledFunction": "a part of the network that torch.compile compiled",
    "ScaledDotProductFlash": "flash attention",
    "ScaledDotProductEfficient": "memory-efficient attention",
    "ScaledDotProductCudnn": "cuDNN's fused attention",
    "ScaledDotProductFused": "fused attention",
    "CudnnRnn": "a cuDNN recurrent layer",
}


def nll(logits: Tensor, y: Tensor) -> Tensor:
    """Mean negative log-likelihood in at least single precision, shape ()."""
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), y)


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def trainable(model: nn.Module, chosen: Sequence[nn.Parameter] | None) -> dict[str, nn.Parameter]:
    """Parameters that require gradients now, by name, among the chosen ones (None: all)."""
    keep = None if chosen is None else {id(p) for p in chosen}
    found = {n: p for n, p in unwrap(model).named_parameters() if p.requires_grad and (keep is None or id(p) in keep)}
    if not found:
        raise InvalidInput(
            "none of the penalized parameters requires a gradient; unfreeze some, or choose others with params."
        )
    return found


def batch_coupled(model: nn.Module) -> list[str]:
    """Names of layers whose output for one sample now depends on the others: batch norm in training mode."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [
        name or type(m).__name__
        for name, m in unwrap(model).named_modules()
        if isinstance(m, kinds) and (m.training or not m.track_running_stats)
    ]


def check_double_backward(logits: Tensor) -> None:
    """Walk the graph of the logits; refuse if one of its backward passes cannot be differentiated.

    Without this the error would come out of the user's ``loss.backward()``, far from its cause.
    """
    todo, seen = [logits.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = type(node).__name__
        for start, what in _NO_DOUBLE_BACKWARD.items():
            if name.startswith(start):
                raise InvalidInput(
                    f"the logits come out of {what} ({name}), whose backward pass cannot be differentiated again; use "
                    "grad='finite_difference' or 'jvp' with step_grad"
                    + (
                        ", or run the network under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
                        if name.startswith("Scaled")
                        else ", or torch.compile(model, backend='eager')."
                        if name.startswith("Compiled")
                        else ", or torch.backends.cudnn.flags(enabled=False)."
                    )
                )
        todo += [n for n, _ in node.next_functions]


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
    flat = torch.cat([t.detach().flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


class _Calling(nn.Module):
    """A module that calls a closure, so that ``functional_call`` can put other parameters into ``model`` meanwhile."""

    def __init__(self, model: nn.Module, closure: Closure) -> None:
        super().__init__()
        self.model, self.closure = model, closure

    def forward(self) -> Any:
        return self.closure()


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
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def gradient_at(loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool, scale: float = 1.0) -> list[Tensor]:
    """Gradient of the loss with respect to the parameters, zeros where it does not depend on one.

    It is taken of ``scale`` times the loss and divided by ``scale``, so that half-precision activations do not
    underflow on the way.
    """
    scaled = loss if scale == 1.0 else loss * scale
    found = torch.autograd.grad(
        scaled, list(parameters), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return list(found) if scale == 1.0 else [g / scale for g in found]


def _logits_with(model: nn.Module, closure: Closure, parameters: Mapping[str, Tensor]) -> Tensor:
    swapped = {f"model.{name}": p for name, p in parameters.items()}
    with torch.enable_grad():
        return logits_of(functional_call(_Calling(unwrap(model), closure), swapped, ()))


def logits_of(out: Any) -> Tensor:
    """The logits of what a model returned."""
    return getattr(out, "logits", out)


def gradient_change(
    model: nn.Module,
    closure: Closure,
    y: Tensor,
    parameters: Mapping[str, nn.Parameter],
    gradient: Sequence[Tensor],
    direction: Sequence[Tensor],
    step: float | None,
    replay: Callable[[], Any],
    scale: float,
) -> list[Tensor]:
    r"""Hessian times direction by a forward difference.

    :math:`H v \approx [g(\theta + h\, v / \|v\|) - g(\theta)]\, \|v\| / h`, with
    :math:`h = \sqrt{\epsilon}\,(1 + \|\theta\|)` unless given.
    """
    length = float(nn.utils.get_total_norm(direction))
    if length == 0.0:
        return [torch.zeros_like(v) for v in direction]
    kind = next(iter(parameters.values())).dtype
    size = float(nn.utils.get_total_norm([p.detach() for p in parameters.values()]))
    h = step if step is not None else torch.finfo(kind).eps ** 0.5 * (1 + size)
    moved = {
        name: (p.detach() + v * (h / length)).requires_grad_()
        for (name, p), v in zip(parameters.items(), direction, strict=True)
    }
    with replay():
        logits = _logits_with(model, closure, moved)
    there = gradient_at(nll(logits, y), list(moved.values()), create_graph=False, scale=scale)
    return [(a - b) * (length / h) for a, b in zip(there, gradient, strict=True)]


def gradient_tangent(
    model: nn.Module,
    closure: Closure,
    y: Tensor,
    parameters: Mapping[str, nn.Parameter],
    direction: Sequence[Tensor],
    replay: Callable[[], Any],
    scale: float,
) -> list[Tensor]:
    """Hessian times direction, exactly: forward-mode differentiation of the backward pass.

    Where an operation has no forward mode (group norm), the backward pass is differentiated backward instead.
    """
    with ExitStack() as stack:
        # Fused attention and library recurrent layers have no second derivative of either kind; their plain forms do.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in unwrap(model).modules()):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}

        def gradient(values: Mapping[str, Tensor], create_graph: bool) -> list[Tensor]:
            with replay():
                logits = _logits_with(model, closure, values)
                return gradient_at(nll(logits, y), list(values.values()), create_graph=create_graph, scale=scale)

        try:
            with forward_ad.dual_level():
                duals = {
                    name: forward_ad.make_dual(p, v) for (name, p), v in zip(leaves.items(), direction, strict=True)
                }
                tangents = [forward_ad.unpack_dual(g).tangent for g in gradient(duals, create_graph=False)]
        except NotImplementedError:
            found = gradient(leaves, create_graph=True)
            along = torch.stack([(g * v).sum() for g, v in zip(found, direction, strict=True)]).sum()
            tangents = gradient_at(along, list(leaves.values()), create_graph=False)
    return [torch.zeros_like(v) if t is None else t.detach() for t, v in zip(tangents, direction, strict=True)]
