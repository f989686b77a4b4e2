"""The vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1), plain or behind a ResNet stem."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn._parts import Block, Network, Record, as_image_shape, as_sizes, cut_normal_, keep, through
from mlcollage.nn._vit_stem import ResNetStem, StdConv

# Deviation of a normal distribution of deviation 1 that is cut at two, by which flax divides ("LeCun normal").
_CUT_DEVIATION = 0.87962566103423978


class _Patches(nn.Module):
    """Cut an image into patches and map each linearly; a stride-p convolution written as one matrix product."""

    def __init__(self, in_shape: tuple[int, ...], patch: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(in_shape[0] * patch[0] * patch[1], dim)

    def forward(self, x: Tensor) -> Tensor:
        (b, c, h, w), (p, q) = x.shape, self.patch
        h, w = h // p * p, w // q * q
        x = x[:, :, :h, :w]  # the pixels after the last whole patch, if the network was made with crop=True
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
        q, k, v = qkv.unbind(0)  # (batch, heads, tokens, d / heads) each; its gradient is one stack
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

    def __init__(self, dim: int, hidden: int, dropout: float, gelu: str) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.gelu = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.drop = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, record: Record = None, name: str = "") -> Tensor:
        h = keep(record, f"{name}.gelu", self.gelu(self.linear1(x)))
        return keep(record, name, self.linear2(self.drop(h)))


class _Block(Block):
    """Pre-norm transformer block: x + attn(ln1(x)), then x + mlp(ln2(x))."""

    def __init__(self, attn: _Attention, mlp: _Mlp, dim: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(dim, eps=1e-6), attn
        self.ln2, self.mlp = nn.LayerNorm(dim, eps=1e-6), mlp
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
    r"""Vision transformer: patches, learned position embedding, pre-norm blocks, class token or mean pooling.

    .. math::

        z_0 = [t;\, E x_1;\, \dots;\, E x_N] + P, \qquad
        z'_l = z_{l-1} + \mathrm{MSA}(\mathrm{LN}(z_{l-1})), \qquad
        z_l = z'_l + \mathrm{MLP}(\mathrm{LN}(z'_l))

    with patches :math:`x_i`, class token t and position embedding P; logits are a linear map of
    :math:`\mathrm{LN}(z_L)` at the class token, or of its mean over patches. This one class is the small network of
    the studies and, by name through :func:`mlcollage.nn.vit_models.vit`, each network of Steiner et al. (2022,
    arXiv:2106.10270). LayerNorm has the reference's epsilon of 1e-6.

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
    attention_dropout
        Another probability for the attention weights; the reference has 0 there. None: ``dropout``.
    stochastic_depth
        Probability of dropping a branch for a sample in the last block; it grows linearly from 0 in the first.
    fused
        Use torch's fused attention kernel. It saves memory and, with many tokens, time, but has no second derivative
        and no fast path through ``torch.vmap`` on a CPU. Not used when activations are asked for.
    mlp_dim
        Hidden units of each block's MLP, in place of ``mlp_ratio``.
    gelu
        ``"erf"``, or ``"tanh"`` for the approximation that JAX computes by default and the released weights expect.
    stem
        Bottleneck units in each stage of a ResNet before the patches, such as ``(2, 2, 2, 2)``; ``()`` for its first
        convolution and pooling only; None for none. Patches are then cut from its output, whose sides are those of
        the image over 4, and over 2 more for each stage after the first.
    stem_width
        Channels of the stem's first convolution, a multiple of 32.
    pre_logits
        Units of a tanh layer between the pooled token and the head; None for none.
    init
        ``"small"``: weights and embeddings from a normal distribution of deviation 0.02 cut at two deviations, biases
        from zero, as ViT's successors do. ``"reference"``: as the paper's code, Xavier for attention and MLP, class
        token and head from zero, MLP biases of deviation 1e-6. The gradient of the first step is then zero everywhere
        but in the head.
    crop
        Cut the pixels after the last whole patch, as the reference does, instead of refusing such images.

    Raises
    ------
    InvalidInput
        For an image that the patches do not tile, a width that the heads do not divide, sizes that are not positive
        whole numbers, probabilities outside [0, 1), and inputs of another shape.

    Notes
    -----
    Activations, in order of execution: those of the ``stem``, if there is one; ``patches`` (batch, patches, dim),
    ``embed`` (with class token and position); for each block ``block1.ln1``, ``block1.attn.weights`` (batch, heads,
    tokens, tokens), ``block1.attn``, ``block1.add1``, ``block1.ln2``, ``block1.mlp.gelu``, ``block1.mlp``,
    ``block1.add2`` (the residual stream after the block); ``norm``, ``pool``, ``pre_logits`` if there is one,
    ``logits``. Where a name is a module's path, the value is that module's output; every value is the one that the
    logits were computed from, so gradients with respect to it are right.

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
        mlp_dim: int | None = None,
        attention_dropout: float | None = None,
        gelu: str = "erf",
        stem: Sequence[int] | None = None,
        stem_width: int = 64,
        pre_logits: int | None = None,
        init: str = "small",
        crop: bool = False,
    ) -> None:
        super().__init__(as_image_shape(in_shape), num_classes)
        shape = self.in_shape
        if stem is not None:
            self.stem = _stem(self.in_shape[0], stem, stem_width)
            shape = self.stem.out_shape(*self.in_shape[1:])
        self.has_stem = stem is not None
        self.patch_size = _patch_size(patch_size, shape, crop)
        self.grid = (shape[1] // self.patch_size[0], shape[2] // self.patch_size[1])
        dim, heads = checks.integer("dim", dim, least=1), checks.integer("heads", heads, least=1)
        depth = checks.integer("depth", depth, least=1)
        if dim % heads:
            raise InvalidInput(f"dim={dim} is not a multiple of heads={heads}; each head gets dim / heads numbers.")
        checks.choice("pool", pool, ("token", "mean"))
        dropout = checks.real("dropout", dropout, least=0, below=1)
        stochastic_depth = checks.real("stochastic_depth", stochastic_depth, least=0, below=1)
        if attention_dropout is None:
            attention_dropout = dropout
        attention_dropout = checks.real("attention_dropout", attention_dropout, least=0, below=1)
        if mlp_dim is None:
            hidden = checks.integer("mlp_ratio * dim", round(mlp_ratio * dim), least=1)
        else:
            hidden = checks.integer("mlp_dim", mlp_dim, least=1)
        checks.choice("gelu", gelu, ("erf", "tanh"))
        checks.choice("init", init, ("small", "reference"))

        self.patches = _Patches(shape, self.patch_size, dim)
        self.token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "token" else None
        tokens = self.grid[0] * self.grid[1] + (pool == "token")
        self.position = nn.Parameter(torch.zeros(1, tokens, dim))
        self.drop = nn.Dropout(dropout)
        for i in range(depth):
            path = stochastic_depth * i / max(1, depth - 1)
            attn = _Attention(dim, heads, attention_dropout, fused)
            self.add_module(f"block{i + 1}", _Block(attn, _Mlp(dim, hidden, dropout, gelu), dim, dropout, path))
        self.depth = depth
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        width = dim
        if pre_logits is not None:
            width = checks.integer("pre_logits", pre_logits, least=1)
            self.pre_logits = nn.Sequential(nn.Linear(dim, width), nn.Tanh())
        self.has_pre_logits = pre_logits is not None
        self.head = nn.Linear(width, self.num_classes)
        if init == "small":
            self._initialize()
        else:
            self._initialize_as_reference()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                cut_normal_(module.weight, 0.02)
                nn.init.zeros_(module.bias)
        cut_normal_(self.position, 0.02)
        if self.token is not None:
            cut_normal_(self.token, 0.02)

    def _initialize_as_reference(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | StdConv):  # flax's default for convolutions and layers
                _lecun_normal_(module.weight)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, _Attention):
                for part in module.qkv.weight.chunk(3):  # query, key and value are three kernels in the reference
                    nn.init.xavier_uniform_(part)
                nn.init.xavier_uniform_(module.proj.weight)
            if isinstance(module, _Mlp):
                for linear in (module.linear1, module.linear2):
                    nn.init.xavier_uniform_(linear.weight)
                    nn.init.normal_(linear.bias, std=1e-6)
        if self.has_stem:
            self.stem.zero_last_norms()
        nn.init.normal_(self.position, std=0.02)
        nn.init.zeros_(self.head.weight)  # the class token is zero already

    def features(self, x: Tensor, record: Record = None) -> Tensor:
        """What the head sees: the class token or the mean of all tokens, (batch, dim), or the tanh layer's units."""
        if not x.is_floating_point():
            raise InvalidInput(f"images must be floating point, not {x.dtype}; scale raw pixels, as x / 127.5 - 1.")
        x = through(self, ["stem", "patches"] if self.has_stem else ["patches"], x, record)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1).to(x.dtype), x], 1)  # (batch, 1 + patches, dim)
        x = keep(record, "embed", self.drop(x + self.position))
        x = through(self, [*(f"block{i + 1}" for i in range(self.depth)), "norm"], x, record)
        x = keep(record, "pool", x.mean(1) if self.token is None else x[:, 0])
        return through(self, ["pre_logits"], x, record) if self.has_pre_logits else x


def _lecun_normal_(weight: Tensor) -> None:
    """Deviation 1 / sqrt(inputs), from a normal distribution cut at two of its own deviations."""
    cut_normal_(weight, 1 / (math.sqrt(weight[0].numel()) * _CUT_DEVIATION))


def _stem(channels: int, blocks: Sequence[int], width: int) -> ResNetStem:
    if checks.integer("stem_width", width, least=32) % 32:
        raise InvalidInput(f"stem_width={width} must be a multiple of 32, the groups of its group norm.")
    return ResNetStem(channels, as_sizes("stem", blocks, empty=True), width)


def _patch_size(patch_size: int | tuple[int, int], in_shape: tuple[int, ...], crop: bool) -> tuple[int, int]:
    sides = as_sizes("patch_size", patch_size if isinstance(patch_size, tuple | list) else (patch_size, patch_size))
    if len(sides) != 2:
        raise InvalidInput(f"patch_size must be one side or (height, width), not {patch_size!r}.")
    for side, size, what in zip(sides, in_shape[1:], ("height", "width"), strict=True):
        if crop and size >= side:
            continue
        if size % side:
            fits = [d for d in range(1, size + 1) if size % d == 0]
            near = sorted({max(side, size // side * side), (size // side + 1) * side})
            raise InvalidInput(
                f"patches of {what} {side} do not tile an image of {what} {size}; choose one of "
                f"{', '.join(map(str, fits))}, or pad or resize the images to {' or '.join(map(str, near))} "
                "(crop=True drops the pixels after the last whole patch)."
            )
    return sides[0], sides[1]
