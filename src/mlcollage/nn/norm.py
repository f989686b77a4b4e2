r"""Normalization layers by name, and filter response normalization.

Filter response normalization (FRN) and its thresholded linear unit (TLU) are from Singh and Krishnan, "Filter
Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep Neural Networks", CVPR 2020,
arXiv:1911.09737, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn._parts import wide


class FilterResponseNorm(nn.Module):
    r"""Divide each channel of each sample by the root mean square of its own responses.

    .. math::

        \nu^2 = \frac{1}{N} \sum_i x_i^2, \qquad
        y = \gamma \frac{x}{\sqrt{\nu^2 + \epsilon}} + \beta

    The mean runs over the N positions of one channel of one sample: nothing depends on the batch, and no mean is
    subtracted. Put :class:`TLU` behind it instead of a ReLU (section 3.1).

    Parameters
    ----------
    num_channels
        Channels C of an input (batch, C, *positions), with any number of position dimensions.
    eps
        :math:`\epsilon`, added to the mean square; the paper's 1e-6.
    learnable_eps
        Learn :math:`\epsilon = \mathrm{eps} + |\epsilon_l|`, one number for the layer, from
        :math:`\epsilon_l = 10^{-4}`. For layers with N = 1, such as fully connected ones, where a fixed small
        epsilon would leave only the sign of x (section 3.2).

    Notes
    -----
    Under autocast, and for half-precision inputs, the mean square is taken in float32 and the result has the type
    of the input.

    Examples
    --------
    >>> norm = FilterResponseNorm(3)
    >>> y = norm(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    >>> torch.allclose(y.square().mean((2, 3)), torch.ones(2, 3), atol=1e-4)
    True
    """

    def __init__(self, num_channels: int, *, eps: float = 1e-6, learnable_eps: bool = False) -> None:
        super().__init__()
        self.num_channels = checks.integer("num_channels", num_channels, least=1)
        self.eps = checks.positive("eps", eps)
        self.weight = nn.Parameter(torch.ones(self.num_channels))
        self.bias = nn.Parameter(torch.zeros(self.num_channels))
        self.learned_eps = nn.Parameter(torch.tensor(1e-4)) if learnable_eps else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, shape (batch, C, *positions); the shape is kept."""
        _check_channels(x, self.num_channels, "FilterResponseNorm")
        v = wide(x)
        # (batch, C, 1, ..., 1); without positions each response is its own mean square.
        nu2 = v.square().mean(tuple(range(2, v.ndim)), keepdim=True) if v.ndim > 2 else v.square()
        eps = self.eps if self.learned_eps is None else self.eps + self.learned_eps.abs()
        shape = (self.num_channels,) + (1,) * (x.ndim - 2)  # one number per channel, for all positions
        # The equation above; rsqrt is one operation in place of a square root and a division.
        y = self.weight.view(shape) * v * torch.rsqrt(nu2 + eps) + self.bias.view(shape)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.num_channels}, eps={self.eps:g}, learnable_eps={self.learned_eps is not None}"


class TLU(nn.Module):
    r"""Thresholded linear unit :math:`z = \max(y, \tau)`, with a threshold :math:`\tau` learned for each channel.

    FRN does not center its output, so the fixed threshold 0 of a ReLU may lie anywhere in it (section 3.1 of the
    paper, equation 3). With :math:`\tau = 0`, where it starts, it is a ReLU.

    Parameters
    ----------
    num_channels
        Channels C of an input (batch, C, *positions).

    Examples
    --------
    >>> TLU(2)(torch.tensor([[-1.0, 3.0]])).tolist()
    [[0.0, 3.0]]
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels = checks.integer("num_channels", num_channels, least=1)
        self.tau = nn.Parameter(torch.zeros(self.num_channels))

    def forward(self, y: Tensor) -> Tensor:
        """Threshold y, shape (batch, C, *positions); the shape is kept."""
        _check_channels(y, self.num_channels, "TLU")
        return torch.maximum(y, self.tau.view((self.num_channels,) + (1,) * (y.ndim - 2)).to(y.dtype))

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.num_channels}"


def _check_channels(x: Tensor, channels: int, layer: str) -> None:
    if x.ndim < 2 or x.shape[1] != channels:
        raise InvalidInput(f"{layer}({channels}) takes inputs of shape (batch, {channels}, ...), not {tuple(x.shape)}.")


def group_count(channels: int) -> int:
    """Groups for group normalization: the most that divide the channels, at most 32, with at least two channels each.

    Wu and He (2018, arXiv:1803.08494) use 32 groups; narrow networks need fewer.

    Examples
    --------
    >>> [group_count(c) for c in (16, 64, 96, 256, 3)]
    [8, 32, 32, 32, 1]
    """
    # A group of one channel would normalize it by itself, and take its mean away.
    return max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 2))


def image_norm(kind: str | None, channels: int) -> nn.Module:
    """The normalization called ``kind`` for a feature map (batch, channels, height, width).

    Parameters
    ----------
    kind
        ``"batch"``, ``"group"`` (with :func:`group_count` groups), ``"frn"`` (without its TLU) or None.
    channels
        Number of channels.

    Raises
    ------
    UnknownName
        For any other name.
    """
    if kind is None:
        return nn.Identity()
    makers: dict[str, Callable[[int], nn.Module]] = {
        "batch": nn.BatchNorm2d,
        "group": lambda c: nn.GroupNorm(group_count(c), c),
        "frn": FilterResponseNorm,
    }
    return makers[checks.choice("norm, if not None,", kind, makers)](channels)
