"""A small vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn._parts import Block, Network, Record, as_image_shape, as_sizes, cut_normal_, keep, through


class _Patches(nn.Module):
    """Cut an image into patches and map each linearly; a stride-p convolution written as one matrix product."""

    def __init__(self, in_shape: tuple[int, ...], patch: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(in_shape[0] * patch[0] * patch[1], dim)

    def forward(self, x: Tensor) -> Tensor:
        (b, c, h, w), (p, q) = x.shape, self.patch
        x = x.reshape(b, c, h // p, p, w // q, q).permute(0, 2, 4, 1, 3, 5)  # (batch, rows, columns, c, p, q)
        return self.linear(x.reshape(b, (h // p) * (w // q), c * p * q))  # (batch, patches, dim)


class _Attention(Block):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v."""

    def __init__(self, dim: int, heads: int, dropout: float, fused: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.fused = heads, dropout, fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, record: Record = None, name: str = "") -> Tensor:
        b, t, d = x.shape  # batch, tokens, width
        qkv = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # (batch, heads, tokens, d / heads) each
        if self.fused and record is None:  # the fused kernel does not hand out its weights
            p = self.dropout if self.training else 0.0
            h = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        else:
            # (batch, heads, tokens, tokens): row i says how much token i takes from each token.
            a = (q @ k.transpose(-2, -1) / math.sqrt(d // self.heads)).softmax(-1)
            a = keep(record, f"{name}.weights", a)
            # Under autocast the softmax is float32 and v is not.
            h = F.dropout(a, self.dropout, self.training).to(v.dtype) @ v
        return keep(record, name, self.proj(h.transpose(1, 2).reshape(b, t, d)))  # heads side by side again


class _Mlp(Block):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.gelu = nn.GELU()
        self.drop = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, record: Record = None, name: str = "") -> Tensor:
        h = keep(record, f"{name}.gelu", self.gelu(self.linear1(x)))
        return keep(record, name, self.linear2(self.drop(h)))


class _Block(Block):
    """Pre-norm transformer block: x + attn(ln1(x)), then x + mlp(ln2(x))."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, drop_path: float, fused: bool) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, heads, dropout, fused)
        self.ln2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _Mlp(dim, hidden, dropout)
        self.drop = nn.Dropout(dropout)
        self.drop_path = drop_path

    def _residual(self, x: Tensor, branch: Tensor) -> Tensor:
        branch = self.drop(branch)
        if self.training and self.drop_path > 0:
            # Stochastic depth: the whole branch of a sample is dropped, the others are scaled up to keep the mean.
            # One mask number per sample, (batch, 1, 1).
            branch = branch * F.dropout(torch.ones_like(branch[:, :1, :1]), self.drop_path)
        return x + branch

    def forward(self, x: Tensor, record: Record = None, name: str = "") -> Tensor:
        x = keep(record, f"{name}.add1", self._residual(x, through(self, ["ln1", "attn"], x, record, name)))
        return keep(record, f"{name}.add2", self._residual(x, through(self, ["ln2", "mlp"], x, record, name)))


class ViT(Network):
    """Vision transformer: patches, learned position embedding, pre-norm blocks, class token or mean pooling.

    Weights start from a normal distribution of standard deviation 0.02 cut at two standard deviations, biases from
    zero (as ViT and its successors do); LayerNorm has the reference's epsilon of 1e-6.

    Parameters
    ----------
    in_shape
        (channels, height, width) of one image. A series of length n is an image of shape (channels, 1, n).
    num_classes
        Number of logits.
    patch_size
        Side of a patch, or (height, width); it must divide the image.
    dim
        Width of a token; a multiple of ``heads``.
    depth
        Number of blocks.
    heads
        Attention heads in each block.
    mlp_ratio
        Hidden units of each block's MLP over ``dim``.
    pool
        ``"token"``: the logits are read from a class token, the first; ``"mean"``: from the mean of all patch
        tokens, without a class token.
    dropout
        Probability of dropout on embeddings, attention weights, MLP units and branch outputs.
    stochastic_depth
        Probability of dropping a branch for a sample in the last block; it grows linearly from 0 in the first.
    fused
        Use torch's fused attention kernel. It saves memory and, with many tokens, time, but has no second derivative
        and no fast path through ``torch.vmap`` on a CPU. Not used when activations are asked for.

    Raises
    ------
    InvalidInput
        For an image that the patches do not tile, a width that the heads do not divide, sizes that are not positive
        whole numbers, probabilities outside [0, 1), and inputs of another shape.

    Notes
    -----
    Activations, in order of execution: ``patches`` (batch, patches, dim), ``embed`` (with class token and position);
    for each block ``block1.ln1``, ``block1.attn.weights`` (batch, heads, tokens, tokens), ``block1.attn``,
    ``block1.add1``, ``block1.ln2``, ``block1.mlp.gelu``, ``block1.mlp``, ``block1.add2`` (the residual stream after
    the block); ``norm``, ``pool``, ``logits``. Where a name is a module's path, the value is that module's output;
    every value is the one that the logits were computed from, so gradients with respect to it are right.

    Examples
    --------
    >>> model = ViT((1, 28, 28), 10, patch_size=7, dim=32, depth=2)
    >>> logits, acts = model(torch.zeros(4, 1, 28, 28), activations=True)
    >>> tuple(logits.shape), tuple(acts["block2.attn.weights"].shape), tuple(acts["block1.add2"].shape)
    ((4, 10), (4, 4, 17, 17), (4, 17, 32))
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        num_classes: int,
        *,
        patch_size: int | tuple[int, int] = 4,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        pool: str = "token",
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        fused: bool = False,
    ) -> None:
        super().__init__(as_image_shape(in_shape), num_classes)
        self.patch_size = _patch_size(patch_size, self.in_shape)
        self.grid = (self.in_shape[1] // self.patch_size[0], self.in_shape[2] // self.patch_size[1])
        dim, heads = checks.integer("dim", dim, least=1), checks.integer("heads", heads, least=1)
        depth = checks.integer("depth", depth, least=1)
        if dim % heads:
            raise InvalidInput(f"dim={dim} is not a multiple of heads={heads}; each head gets dim / heads numbers.")
        checks.choice("pool", pool, ("token", "mean"))
        dropout = checks.real("dropout", dropout, least=0, below=1)
        stochastic_depth = checks.real("stochastic_depth", stochastic_depth, least=0, below=1)
        hidden = checks.integer("mlp_ratio * dim", round(mlp_ratio * dim), least=1)

        self.patches = _Patches(self.in_shape, self.patch_size, dim)
        self.token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "token" else None
        tokens = self.grid[0] * self.grid[1] + (pool == "token")
        self.position = nn.Parameter(torch.zeros(1, tokens, dim))
        self.drop = nn.Dropout(dropout)
        for i in range(depth):
            path = stochastic_depth * i / max(1, depth - 1)
            self.add_module(f"block{i + 1}", _Block(dim, heads, hidden, dropout, path, fused))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, self.num_classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                cut_normal_(module.weight, 0.02)
                nn.init.zeros_(module.bias)
        cut_normal_(self.position, 0.02)
        if self.token is not None:
            cut_normal_(self.token, 0.02)

    def features(self, x: Tensor, record: Record = None) -> Tensor:
        """The class token, or the mean of all tokens, after the last block, (batch, dim)."""
        x = keep(record, "patches", self.patches(x))
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1).to(x.dtype), x], 1)  # (batch, 1 + patches, dim)
        x = keep(record, "embed", self.drop(x + self.position))
        blocks = [name for name, layer in self.named_children() if isinstance(layer, Block)]
        x = through(self, [*blocks, "norm"], x, record)
        return keep(record, "pool", x.mean(1) if self.token is None else x[:, 0])


def _patch_size(patch_size: int | tuple[int, int], in_shape: tuple[int, ...]) -> tuple[int, int]:
    sides = as_sizes("patch_size", patch_size if isinstance(patch_size, tuple | list) else (patch_size, patch_size))
    if len(sides) != 2:
        raise InvalidInput(f"patch_size must be one side or (height, width), not {patch_size!r}.")
    for side, size, what in zip(sides, in_shape[1:], ("height", "width"), strict=True):
        if size % side:
            fits = [d for d in range(1, size + 1) if size % d == 0]
            raise InvalidInput(
                f"patches of {what} {side} do not tile an image of {what} {size}; choose one of "
                f"{', '.join(map(str, fits))}, or pad or resize the images."
            )
    return sides[0], sides[1]
