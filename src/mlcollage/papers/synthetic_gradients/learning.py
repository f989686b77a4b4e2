"""How a synthesizer learns: what it said, the error of that, and its gradients."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all

from mlcollage.errors import InvalidInput

from .synthesizer import SyntheticGradient, beside


class Said:
    """What a module said, with its graph.

    Parameters
    ----------
    out
        Its output.
    """

    def __init__(self, out: Tensor) -> None:
        self._out, self.value = out, out.detach()

    def backward(self, slope: Tensor, factor: float = 1.0) -> None:
        """Add to ``.grad`` the gradients of a loss, of which ``factor * slope`` is the slope by what was said."""
        if self._out.requires_grad:  # a synthesizer of the user's may be fixed
            self._out.backward(slope if factor == 1 else slope * factor)


class SaidWithoutGraph(Said):
    r"""What a perceptron :math:`z_l = W_l a_{l-1} + b_l`, :math:`a_l = \max(z_l, 0)` said, and its gradients.

    With :math:`\delta_L` the slope of a loss by the output :math:`z_L`,

    .. math::

        \nabla_{W_l} = \delta_l^\top a_{l-1}, \quad \nabla_{b_l} = \sum_n \delta_{l, n}, \quad
        \delta_{l-1} = (W_l^\top \delta_l) \odot [a_{l-1} > 0].

    Of a low rank there is no ReLU, and the context comes beside :math:`V h` only. A graph of so few operations costs
    more than the operations where batches are small.

    Parameters
    ----------
    synthesizer
        One that :func:`is_plain`.
    h, context
        As it takes them.
    """

    def __init__(self, synthesizer: SyntheticGradient, h: Tensor, context: Tensor | None) -> None:
        self.layers = [part for part in synthesizer.layers if type(part) is nn.Linear]
        self.read: list[Tensor] = []  # by each layer, (B, ..., width)
        self.rank = rank = synthesizer.rank
        with torch.no_grad():
            a = beside(h, None if rank else context, synthesizer.dim, 0 if rank else synthesizer.context_dim)
            for layer in self.layers:
                if self.read:
                    a = beside(a, context, rank, synthesizer.context_dim) if rank else a.relu_()
                self.read.append(a)
                a = nn.functional.linear(a, layer.weight, layer.bias)
        self.value = a
        self._versions = [layer.weight._version for layer in self.layers[1:]]

    def backward(self, slope: Tensor, factor: float = 1.0) -> None:
        """Add to ``.grad`` the gradients of a loss, of which ``factor * slope`` is the slope by what was said."""
        if self._versions != [layer.weight._version for layer in self.layers[1:]]:
            raise InvalidInput(CHANGED)
        with torch.no_grad():
            delta = slope.reshape(-1, slope.shape[-1])
            for i in range(len(self.layers) - 1, -1, -1):
                layer, a = self.layers[i], self.read[i].reshape(-1, self.read[i].shape[-1])
                _add_product(layer.weight, delta.t(), a, factor)
                if layer.bias is not None:
                    _add(layer.bias, delta.sum(0).mul_(factor))
                if i:
                    weight = layer.weight
                    delta = delta @ weight[:, : self.rank] if self.rank else (delta @ weight).mul_(a > 0)


CHANGED = (
    "the synthesizers were changed before they were trained: call fill_synthesizers after backward() and before the "
    "optimizer's step."
)


def say(module: nn.Module, h: Tensor, context: Tensor | None = None) -> Said:
    """What a synthesizer says of an activation, with what its gradients will need."""
    if is_plain(module) and not torch.is_autocast_enabled(h.device.type):
        return SaidWithoutGraph(module, h, context)
    return Said(module(h, context))


def is_plain(module: nn.Module) -> TypeGuard[SyntheticGradient]:
    """Whether a module is the usual synthesizer of linear layers and ReLU, and nothing listens to it or its parts.

    It is asked in each step, so that it looks at plain attributes only.
    """
    if type(module) is not SyntheticGradient or not torch.is_grad_enabled() or _is_heard(module):
        return False
    for part in module.layers._modules.values():
        if type(part) not in (nn.Linear, nn.ReLU) or _is_heard(part):
            return False
        for p in part._parameters.values():  # parametrized parts are of another type
            if p is None:
                continue
            if type(p) is not nn.Parameter or not p.requires_grad or p._backward_hooks:
                return False
            if getattr(p, "_post_accumulate_grad_hooks", None):
                return False
    return not (of_all._global_forward_hooks or of_all._global_forward_pre_hooks or of_all._global_backward_hooks)


def _is_heard(module: Any) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _add_product(p: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    if p.grad is None:
        grad = torch.empty_like(p)
        p.grad = torch.addmm(grad, left, right, beta=0, alpha=factor, out=grad)
    else:
        p.grad.addmm_(left, right, alpha=factor)


def _add(p: Tensor, value: Tensor) -> None:
    if p.grad is None:
        p.grad = value
    else:
        p.grad.add_(value)


def outside(rows: Tensor, h: Tensor) -> Tensor:
    """Where rows (B,) or (B, T) do not count, as a mask that broadcasts over ``h`` (B, ...)."""
    return ~rows.reshape(*rows.shape, *(1,) * (h.ndim - rows.ndim))


def squared_error(predicted: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    r"""A synthesizer's loss :math:`\frac{1}{n} \sum_n \lVert \hat g_n - g_n \rVert^2`: sum over units, mean over rows.

    Parameters
    ----------
    predicted, target
        (B, ...).
    rows
        (B,), true where a row counts.
    """
    squares = (predicted - target).square().flatten(1).sum(1)
    # What does not count may be NaN, so that it is replaced and not multiplied by 0.
    return squares.masked_fill(~rows, 0.0).sum() / rows.sum().clamp(min=1)


def learn(
    said: Said, arrived: Tensor, rows: Tensor | None = None, *, factor: float = 1.0, scale: float = 1.0
) -> Tensor:
    r"""Fill a synthesizer's gradients along :math:`\frac{s}{n} \sum_n \lVert \hat g_n - f g_n \rVert^2`.

    The slope of the loss is written down rather than differentiated: it takes two passes over the activation.

    Parameters
    ----------
    said
        :math:`\hat g`, (B, ...) or (B, T, ...).
    arrived
        g, of that shape.
    rows
        (B,) or (B, T), true where a row counts; None: all do.
    factor, scale
        f, from what arrives to the gradient of one sample, and s.

    Returns
    -------
    Tensor
        The loss, with s = 1.
    """
    predicted = said.value
    # Gradients of one sample in at least single precision: those of a mean vanish in half.
    wide = torch.promote_types(predicted.dtype, torch.float32)
    with torch.no_grad():
        difference = torch.sub(predicted.to(wide), arrived.to(wide), alpha=factor)
        n = float(len(difference))
        if rows is not None:  # what does not count may be NaN, so that it is replaced and not multiplied by 0
            difference.masked_fill_(outside(rows, difference), 0.0)
            n = max(float(rows.sum()), 1.0)
        flat = difference.reshape(-1)
        loss = flat.dot(flat) / n
    said.backward(difference.to(predicted.dtype), 2 * scale / n)
    return loss
