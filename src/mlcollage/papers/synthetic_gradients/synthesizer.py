"""Models of the gradient: from an activation, and what is known of the sample, to the gradient that will arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

NORMS = ("batch", "layer")


class SyntheticGradient(nn.Module):
    r"""A perceptron :math:`M(h, c) = \hat g` over the last axis of an activation; without hidden layers affine.

    Parameters
    ----------
    dim
        Units D of the activation: its last axis.
    context_dim
        Units C of the context, such as the number of classes of a one-hot label; 0 for none.
    hidden
        Widths of hidden layers (ReLU); ``()`` is the linear synthesizer of the theory.
    norm
        None, ``"batch"`` or ``"layer"``, before each ReLU. Batch norm takes (B, D) only.
    zero_init
        Start with the last layer's weights **and bias** at zero, so that the first update moves nothing.
    out_dim
        Units of the output; default ``dim``. Input synthesizers and critics have others.
    rank
        r > 0 for an affine map of low rank, :math:`\hat g = U V h + W c + b` with V (r, D) and U (D, r), whose cost
        is a small part of that of the full one where r is small beside D; 0 for the full one.

    Notes
    -----
    The output is the gradient of one sample's loss: :class:`~mlcollage.papers.synthetic_gradients.Decoupled` divides it
    by the loss's own divisor where it is injected. Jaderberg et al., section 2.1 and appendix A.

    Of a classifier with C classes and upper part :math:`z = J h + z_0`, linearized, the true gradient is
    :math:`J^\top (p(z) - y)`, and its linearization in h is :math:`J^\top S J h - J^\top y` plus a constant, with S
    (C, C) the slope of the probabilities p, of rank C - 1. So a rank of C - 1 loses nothing to first order.

    Examples
    --------
    >>> synthesizer = SyntheticGradient(5, context_dim=3, hidden=(16,))
    >>> h, context = torch.randn(4, 5), torch.eye(3)[[0, 1, 2, 0]]
    >>> bool((synthesizer(h, context) == 0).all())
    True
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        hidden: Sequence[int] = (),
        norm: str | None = None,
        zero_init: bool = True,
        *,
        out_dim: int | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.context_dim = _sizes(dim, context_dim)
        self.rank = checks.integer("rank", rank, least=0)
        if self.rank and (hidden or norm):
            raise InvalidInput("rank is of a synthesizer without hidden layers and norm: give one of them only.")
        if norm is not None:
            checks.choice("norm, if not None,", norm, NORMS)
        widths = [checks.integer("each width of hidden", w, least=1) for w in hidden]
        self.out_dim = self.dim if out_dim is None else checks.integer("out_dim", out_dim, least=1)
        norms = {None: None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}[norm]
        if self.rank:
            self.layers = nn.Sequential(
                nn.Linear(self.dim, self.rank, bias=False), nn.Linear(self.rank + self.context_dim, self.out_dim)
            )
            if zero_init:
                zero_(self.layers[1])
            return
        sizes = [self.dim + self.context_dim, *widths, self.out_dim]
        self.layers = _stack(sizes, nn.Linear, norms, zero_init)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Gradients like ``h`` (B, ..., D), of a context (B, C) or (B, ..., C)."""
        if not self.rank:
            return self.layers(beside(h, context, self.dim, self.context_dim))
        few, last = self.layers
        return last(beside(few(beside(h, None, self.dim, 0)), context, self.rank, self.context_dim))


class ConvSyntheticGradient(nn.Module):
    """Convolutions from feature maps (B, channels, ...) to gradients of that shape; the label fills maps of its own.

    Parameters
    ----------
    channels, context_dim, zero_init
        As for :class:`SyntheticGradient`; channels are axis 1.
    hidden
        Channels of hidden layers.
    kernel
        Odd size of all kernels.
    axes
        Number of spatial axes: 1, 2 or 3.
    norm
        None or ``"batch"``.

    Examples
    --------
    >>> synthesizer = ConvSyntheticGradient(8, context_dim=10, hidden=(16,))
    >>> synthesizer(torch.randn(4, 8, 6, 6), torch.eye(10)[:4]).shape
    torch.Size([4, 8, 6, 6])
    """

    def __init__(
        self,
        channels: int,
        context_dim: int = 0,
        hidden: Sequence[int] = (),
        *,
        kernel: int = 5,
        axes: int = 2,
        norm: str | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.context_dim = _sizes(channels, context_dim, "channels")
        checks.integer("axes", axes, least=1, most=3)
        if checks.integer("kernel", kernel, least=1) % 2 == 0:
            raise InvalidInput(f"kernel must be odd, so that maps keep their size, not {kernel}.")
        if norm is not None:
            checks.choice("norm, if not None,", norm, ("batch",))
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        batch_norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
        widths = [checks.integer("each of hidden", w, least=1) for w in hidden]
        sizes = [self.dim + self.context_dim, *widths, self.dim]
        same = partial(conv, kernel_size=kernel, padding=kernel // 2)
        self.layers = _stack(sizes, same, None if norm is None else batch_norm, zero_init)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Gradients like ``h`` (B, channels, ...), of a context (B, C)."""
        return self.layers(beside(h, context, self.dim, self.context_dim, 1))


class RecurrentSyntheticGradient(nn.Module):
    """A GRU over the tokens of an activation (B, T, D), whose outputs become gradients by a linear map.

    Parameters
    ----------
    dim, context_dim, zero_init
        As for :class:`SyntheticGradient`.
    hidden
        Units of the GRU.
    bidirectional
        Let a token's gradient depend on the tokens behind it too.

    Examples
    --------
    >>> RecurrentSyntheticGradient(6, hidden=8)(torch.randn(2, 7, 6)).shape
    torch.Size([2, 7, 6])
    """

    def __init__(
        self, dim: int, context_dim: int = 0, hidden: int = 64, *, bidirectional: bool = True, zero_init: bool = True
    ) -> None:
        super().__init__()
        self.dim, self.context_dim = _sizes(dim, context_dim)
        width = checks.integer("hidden", hidden, least=1)
        self.core = nn.GRU(self.dim + self.context_dim, width, batch_first=True, bidirectional=bidirectional)
        self.last = nn.Linear(width * (2 if bidirectional else 1), self.dim)
        if zero_init:
            zero_(self.last)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Gradients like ``h`` (B, T, D), of a context (B, C) or (B, T, C)."""
        if h.ndim != 3:
            raise InvalidInput(f"a recurrent synthesizer needs tokens (batch, time, units), not {tuple(h.shape)}.")
        return self.last(self.core(beside(h, context, self.dim, self.context_dim))[0])


class Critic(nn.Module):
    """A prediction of each sample's loss from an activation; its slope is the gradient that a critic gives.

    Parameters
    ----------
    dim, context_dim, hidden
        As for :class:`SyntheticGradient`; feature maps and tokens are averaged over positions first, unless ``flat``.
    channels
        Axis of the units: -1, or 1 for feature maps.

    Examples
    --------
    >>> Critic(5, context_dim=2)(torch.randn(3, 5), torch.eye(2)[[0, 1, 0]]).shape
    torch.Size([3])
    """

    def __init__(self, dim: int, context_dim: int = 0, hidden: Sequence[int] = (64,), *, channels: int = -1) -> None:
        super().__init__()
        # Squares of the activation let even a critic without hidden layers have a slope that depends on it.
        self.net = SyntheticGradient(dim, context_dim, hidden, out_dim=1)
        self.dim, self.context_dim, self.channels = dim, context_dim, channels

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Losses (B,)."""
        units = h.movedim(self.channels, -1)
        pooled = units.flatten(1, -2).mean(1) if units.ndim > 2 else units  # (B, D)
        return self.net(pooled, context)[:, 0]


def zero_(layer: nn.Module) -> None:
    """Set weights and bias of a layer to zero."""
    for p in layer.parameters(recurse=False):
        nn.init.zeros_(p)


def _sizes(dim: int, context_dim: int, name: str = "dim") -> tuple[int, int]:
    return checks.integer(name, dim, least=1), checks.integer("context_dim", context_dim, least=0)


def _stack(sizes: Sequence[int], layer: Callable[..., nn.Module], norm: Any, zero_init: bool) -> nn.Sequential:
    """Layers with norm and ReLU between them; the last is plain, and may start at zero."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes[:-1]):
        layers += [layer(a, b), *([] if norm is None else [norm(b)]), nn.ReLU()]
    last = layer(sizes[-2], sizes[-1])
    if zero_init:
        zero_(last)
    return nn.Sequential(*layers, last)


def beside(h: Tensor, context: Tensor | None, dim: int, context_dim: int, axis: int = -1) -> Tensor:
    """Activation and context side by side in the axis of units.

    Parameters
    ----------
    h
        (B, ..., dim), or (B, dim, ...) for axis 1.
    context
        (B, context_dim), one for all tokens or positions of a sample, or (B, T, context_dim) with axis -1.

    Raises
    ------
    InvalidInput
        For integers, other widths, and a context that is missing, of another width, or for other samples.
    """
    if not h.is_floating_point():
        raise InvalidInput(f"a synthesizer needs floating-point activations, not {h.dtype}; cut behind the embedding.")
    if h.ndim < 2 or h.shape[axis] != dim:
        where = "last axis" if axis < 0 else "axis 1, the channels"
        raise InvalidInput(
            f"the synthesizer was made for {dim} units in the {where}, but the activation is {tuple(h.shape)}."
        )
    if not context_dim:
        return h
    if context is None:
        raise InvalidInput(f"the synthesizer takes a context of {context_dim} units (labels); none was given.")
    if context.shape[-1] != context_dim:
        raise InvalidInput(f"the context has {context.shape[-1]} units, but the synthesizer takes {context_dim}.")
    if len(context) != len(h):
        raise InvalidInput(
            f"the context is of {len(context)} samples, but the activation {tuple(h.shape)} of {len(h)}."
        )
    context = context.to(h.dtype)
    spread = (1,) * (h.ndim - context.ndim)
    if axis == 1:
        context = context.reshape(*context.shape, *spread).expand(-1, -1, *h.shape[2:])
    elif spread:
        context = context.reshape(len(h), *spread, *context.shape[1:]).expand(*h.shape[:-1], -1)
    return torch.cat([h, context], axis)


def synthesizer_for(
    h: Tensor,
    context_dim: int = 0,
    hidden: Sequence[int] = (),
    norm: str | None = None,
    *,
    channels: int | None = None,
    rank: int = 0,
) -> nn.Module:
    """The usual synthesizer for an activation: convolutions for maps (B, C, H, W), else one over the last axis.

    Parameters
    ----------
    h
        An example, (B, D), (B, T, D) or (B, C, H, W).
    context_dim, hidden, norm, rank
        As for :class:`SyntheticGradient`; maps have no rank.
    channels
        Axis of the units, where it is not axis 1 of four or five and not the last of fewer axes.

    Examples
    --------
    >>> type(synthesizer_for(torch.zeros(2, 3, 8, 8))).__name__, type(synthesizer_for(torch.zeros(2, 7, 3))).__name__
    ('ConvSyntheticGradient', 'SyntheticGradient')
    """
    axis = (1 if h.ndim >= 4 else -1) if channels is None else channels
    if axis % h.ndim == 1 and h.ndim > 2:
        if rank:
            raise InvalidInput(
                f"rank={rank} is of synthesizers over vectors, but the activation {tuple(h.shape)} has maps; say "
                f"hidden=({rank},), whose convolutions go through as many maps."
            )
        kernel = 5 if min(h.shape[2:]) >= 5 else 3
        return ConvSyntheticGradient(h.shape[1], context_dim, hidden, kernel=kernel, axes=h.ndim - 2, norm=norm)
    if axis not in (-1, h.ndim - 1):
        raise InvalidInput(f"units in axis {axis} of {tuple(h.shape)}: give a synthesizer of your own for this cut.")
    return SyntheticGradient(h.shape[-1], context_dim, hidden, norm, rank=rank)


class _Inject(torch.autograd.Function):
    """Identity whose backward pass sends something else down."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, callback: Callable[[Tensor], Tensor | None]) -> Tensor:
        ctx.callback = callback
        return h.clone()  # the part above may write in place into its own copy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            return ctx.callback(grads[0]), None


def intercept_gradient(h: Tensor, callback: Callable[[Tensor], Tensor | None]) -> Tensor:
    """``h`` itself, but what goes down to it in the backward pass is ``callback(gradient that arrived)``.

    Parameters
    ----------
    h
        An activation.
    callback
        Gets the gradient that arrives; gives what is sent on, of the same shape, or None for nothing.

    Examples
    --------
    >>> h = torch.ones(2, requires_grad=True)
    >>> intercept_gradient(3 * h, lambda g: 10 * g).sum().backward()
    >>> h.grad
    tensor([30., 30.])
    """
    out: Tensor = _Inject.apply(h, callback)
    return out


def inject_gradient(h: Tensor, gradient: Tensor) -> Tensor:
    """``h`` itself, but ``gradient`` goes down to it whatever arrives.

    Parameters
    ----------
    h
        An activation.
    gradient
        Of the same shape.

    Raises
    ------
    InvalidInput
        For another shape.

    Examples
    --------
    >>> h = torch.ones(2, requires_grad=True)
    >>> inject_gradient(h, torch.tensor([1.0, -1.0])).sum().backward()
    >>> h.grad
    tensor([ 1., -1.])
    """
    if gradient.shape != h.shape:
        raise InvalidInput(f"a gradient of shape {tuple(gradient.shape)} does not fit an activation {tuple(h.shape)}.")
    return intercept_gradient(h, lambda g: gradient.to(g.dtype))
