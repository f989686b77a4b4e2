r"""The decoder: each capsule draws a patch of points around its pose, from its descriptor."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

__all__ = ["PatchDecoder"]


class PatchDecoder(nn.Module):
    r"""K networks that do not share weights, run as one batched product over capsules.

    .. math::

        x_{km} = \theta_k + \tanh\bigl(f_k([g_{km}, \beta_k])\bigr), \qquad m = 1 \dots M

    Codes :math:`g_{km}` are learned. The first layer is split into the part of the codes, the same for all clouds, and
    that of the descriptors, the same for all points: B K M (C + G) H products become (M G + B C) K H.

    Parameters
    ----------
    dim, capsules, channels
        D, K and C, as the encoder has them.
    points
        Points of a cloud to draw, N; each patch has M = N // K of them.
    hidden
        Width H of the first layer, 1280 in the paper; the next two have half and a quarter of it.
    codes
        G, 10 in the paper.
    scale
        Largest distance of a patch's point from its pose along an axis, 1 by default, in units of the cloud.

    Examples
    --------
    >>> decoder = PatchDecoder(dim=3, capsules=4, channels=8, points=22, hidden=16)
    >>> decoder(torch.zeros(2, 4, 3), torch.randn(2, 4, 8)).shape
    torch.Size([2, 4, 5, 3])
    """

    grid: Tensor

    def __init__(
        self,
        dim: int = 3,
        capsules: int = 10,
        channels: int = 128,
        *,
        points: int = 1024,
        hidden: int = 1280,
        codes: int = 10,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if dim not in (2, 3):
            raise InvalidInput(f"dim must be 2 or 3, not {dim!r}.")
        k = checks.integer("capsules", capsules, least=1)
        self.dim, self.capsules, self.patch = dim, k, checks.integer("points", points, least=k) // k
        self.scale, h = checks.positive("scale", scale), checks.integer("hidden", hidden, least=4)
        g, c = checks.integer("codes", codes, least=1), checks.integer("channels", channels, least=1)
        sizes = [g + c, h, h // 2, h // 4, dim]
        self.grid = nn.Parameter(torch.rand(k, self.patch, g))
        self.weight = nn.ParameterList()
        self.bias = nn.ParameterList()
        for before, after in itertools.pairwise(sizes):
            bound = 1 / math.sqrt(before)  # as nn.Conv1d and nn.Linear start
            self.weight.append(nn.Parameter(torch.empty(k, after, before).uniform_(-bound, bound)))
            self.bias.append(nn.Parameter(torch.empty(k, after).uniform_(-bound, bound)))
        self.norm = nn.ModuleList(nn.BatchNorm1d(k * after) for after in sizes[1:-1])

    def forward(self, theta: Tensor, beta: Tensor) -> Tensor:
        """Patches (B, K, M, D) from poses (B, K, D) and descriptors (B, K, C)."""
        b, (k, m, g) = len(theta), self.grid.shape
        w = self.weight[0]  # (K, H, G + C), the codes first
        codes = torch.baddbmm(self.bias[0][:, None], self.grid, w[..., :g].mT)  # (K, M, H)
        described = torch.einsum("bkc,khc->bkh", beta, w[..., g:])
        x = codes.transpose(0, 1)[None] + described[:, None]  # (B, M, K, H)
        for i, norm in enumerate(self.norm):
            x = norm(x.reshape(b * m, -1)).relu().reshape(b * m, k, -1)
            x = torch.baddbmm(self.bias[i + 1][:, None], x.transpose(0, 1), self.weight[i + 1].mT)  # (K, B M, H')
            x = x.transpose(0, 1)
        offset = x.reshape(b, m, k, self.dim).transpose(1, 2).tanh()
        return theta[:, :, None] + self.scale * offset
