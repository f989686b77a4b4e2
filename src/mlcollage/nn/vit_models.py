"""The vision transformers of "How to train your ViT?" by name (Steiner et al. 2022, arXiv:2106.10270, section 3.3)."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable
from types import MappingProxyType

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn.vit import ViT


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer.

    Attributes
    ----------
    layers
        Blocks.
    width
        Numbers of a token.
    mlp
        Hidden units of each block's MLP.
    heads
        Attention heads of each block.
    patch
        Side of a patch, in pixels, or in cells of the stem's output.
    resnet
        Bottleneck units in the stages of a ResNet stem; ``()`` for a stem without stages; None for no stem.

    Examples
    --------
    >>> VIT_MODELS["S/16"]
    ViTConfig(layers=12, width=384, mlp=1536, heads=6, patch=16, resnet=None)
    """

    layers: int
    width: int
    mlp: int
    heads: int
    patch: int
    resnet: tuple[int, ...] | None = None


def _models() -> dict[str, ViTConfig]:
    size = {
        "Ti": (12, 192, 768, 3),
        "S": (12, 384, 1536, 6),
        "B": (12, 768, 3072, 12),
        "L": (24, 1024, 4096, 16),
        "H": (32, 1280, 5120, 16),
    }
    plain = ["Ti/16", "S/32", "S/16", "B/32", "B/16", "B/8", "L/32", "L/16", "H/14"]
    found = {name: ViTConfig(*size[name.split("/")[0]], int(name.split("/")[1])) for name in plain}
    # The stem of R+Ti/16 shrinks an image by 4, so that patches of 8 give 7 x 7 tokens at 224: those of a /32 model.
    hybrids = {
        "R+Ti/16": ("Ti", 8, ()),
        "R26+S/32": ("S", 1, (2, 2, 2, 2)),
        "R26+B/32": ("B", 1, (2, 2, 2, 2)),
        "R50+B/16": ("B", 1, (3, 4, 9)),
        "R50+L/32": ("L", 1, (3, 4, 6, 3)),
    }
    found |= {name: ViTConfig(*size[s], patch, blocks) for name, (s, patch, blocks) in hybrids.items()}
    return found


#: All models by name.
VIT_MODELS = MappingProxyType(_models())

#: The ten models of the paper's sweep and its later release, cheapest first.
AUGREG_MODELS = ("R+Ti/16", "Ti/16", "S/32", "S/16", "R26+S/32", "B/32", "B/16", "B/8", "R50+L/32", "L/16")


def vit(
    name: str | ViTConfig,
    num_classes: int = 1000,
    in_shape: tuple[int, int, int] = (3, 224, 224),
    *,
    patch_size: int | tuple[int, int] | None = None,
    pool: str = "token",
    head: str = "linear",
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    fused: bool = True,
    crop: bool = False,
) -> ViT:
    """A vision transformer of the paper with the reference's numerics and initialization.

    Equal to ``google-research/vision_transformer`` number by number: tanh approximation of GELU, epsilon 1e-6,
    standardized convolutions, TensorFlow's 'SAME' padding, dropout after the position embedding, after both branches
    and inside the MLP but not on attention weights. The images it expects are scaled to [-1, 1]. Weights:
    :func:`mlcollage.nn.vit_checkpoints.load_augreg_npz`.

    Parameters
    ----------
    name
        ``"Ti/16"``, ``"S/32"``, ``"S/16"``, ``"B/32"``, ``"B/16"``, ``"B/8"``, ``"L/32"``, ``"L/16"``, ``"H/14"``, the
        hybrids ``"R+Ti/16"``, ``"R26+S/32"``, ``"R26+B/32"``, ``"R50+B/16"``, ``"R50+L/32"``, or sizes of your own.
    num_classes
        Number of logits.
    in_shape
        (channels, height, width) of one image; it need not be square.
    patch_size
        Another patch than the name's, for small images, such as 4.
    pool
        ``"token"`` or ``"mean"``, the mean of patch tokens.
    head
        ``"linear"``, or ``"mlp"``: a tanh layer as wide as a token first, as early releases have it.
    dropout
        Probability of dropout; the paper has 0 and 0.1.
    stochastic_depth
        Probability of dropping a branch of the last block, linear from 0 in the first; the paper has 0 and 0.1.
    fused
        Use torch's fused attention; False where second derivatives or ``torch.vmap`` are wanted.
    crop
        Accept images that the patches do not tile, and cut them.

    Returns
    -------
    ViT

    Raises
    ------
    UnknownName
        For another name; the closest one is suggested.
    InvalidInput
        As :class:`mlcollage.nn.vit.ViT`.

    Examples
    --------
    >>> model = vit("Ti/16", num_classes=10, in_shape=(1, 28, 28), patch_size=7)
    >>> model.grid, sum(p.numel() for p in model.parameters())
    ((4, 4), 5353738)
    """
    sizes = name if isinstance(name, ViTConfig) else VIT_MODELS[checks.choice("name", name, VIT_MODELS)]
    checks.choice("head", head, ("linear", "mlp"))
    return ViT(
        in_shape,
        num_classes,
        patch_size=sizes.patch if patch_size is None else patch_size,
        dim=sizes.width,
        depth=sizes.layers,
        heads=sizes.heads,
        mlp_dim=sizes.mlp,
        pool=pool,
        dropout=dropout,
        attention_dropout=0.0,
        stochastic_depth=stochastic_depth,
        fused=fused,
        gelu="tanh",
        stem=sizes.resnet,
        pre_logits=sizes.width if head == "mlp" else None,
        init="reference",
        crop=crop,
    )


def check_pixels(x: torch.Tensor) -> torch.Tensor:
    """A batch as it is, if its numbers look like pixels scaled to [-1, 1], as the released models expect them.

    Call it on the first batch. With other scales released weights lose accuracy and training is slower; there is no
    error that would tell.

    Parameters
    ----------
    x
        Images (B, C, H, W).

    Returns
    -------
    torch.Tensor
        ``x``.

    Raises
    ------
    InvalidInput
        For raw pixels (whole numbers, or numbers up to 255), numbers that are not finite, and images whose channels
        seem to be last.

    Warns
    -----
    UserWarning
        If the numbers lie in [0, 1], or reach beyond [-1, 1] as with ImageNet's mean and deviation.

    Examples
    --------
    >>> check_pixels(torch.tensor([0.0, 127.5, 255.0]).view(1, 3, 1, 1) / 127.5 - 1).flatten().tolist()
    [-1.0, 0.0, 1.0]
    """
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or not x.numel():
        what = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise InvalidInput(f"images are a tensor (B, C, H, W), not {what}.")
    if x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        raise InvalidInput(f"images of shape {tuple(x.shape)} have their channels last; use x.permute(0, 3, 1, 2).")
    low, high = float(x.min()), float(x.max())
    seen = f"the pixels run from {low:.4g} to {high:.4g}"
    if not math.isfinite(low + high):
        raise InvalidInput("the images hold NaN or infinite numbers.")
    if not x.is_floating_point() or high > 16:
        raise InvalidInput(f"{seen}: raw ones; scale them to [-1, 1] with x / 127.5 - 1.")
    if low >= 0 and high <= 1:
        warnings.warn(f"{seen}: these models expect [-1, 1], which 2 * x - 1 makes of [0, 1].", stacklevel=2)
    elif low < -1.001 or high > 1.001:
        warnings.warn(
            f"{seen}: these models expect [-1, 1] (mean and deviation 0.5), not ImageNet's mean and deviation.",
            stacklevel=2,
        )
    return x


def model_table(
    names: Iterable[str] = AUGREG_MODELS, num_classes: int = 1000, in_shape: tuple[int, int, int] = (3, 224, 224)
) -> pd.DataFrame:
    r"""Sizes and cost of the models, counted and not looked up.

    Multiply-accumulates (MACs) of one image are counted in the operations of a forward pass without data: matrix
    products, attention and convolutions. A block of N tokens and width w has :math:`12 N w^2 + 2 N^2 w` of them.

    Parameters
    ----------
    names
        Models of :data:`VIT_MODELS`.
    num_classes
        Number of logits.
    in_shape
        (channels, height, width) of the images.

    Returns
    -------
    pandas.DataFrame
        A row for each model: ``model``, ``layers``, ``width``, ``mlp``, ``heads``, ``patch``, ``resnet``, ``tokens``
        (the class token included), ``params``, ``gmacs`` (1e9 multiply-accumulates for one image).

    Raises
    ------
    UnknownName
        For a name that is not one of the models.
    InvalidInput
        If no model is named, or the images do not fit.

    Examples
    --------
    >>> table = model_table(["Ti/16", "R+Ti/16"])
    >>> table[["model", "tokens", "params"]].values.tolist()
    [['Ti/16', 197, 5717416], ['R+Ti/16', 50, 6337704]]
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise InvalidInput("name at least one model.")
    rows = []
    for name in names:
        with torch.device("meta"):  # shapes only: no memory for weights, no time for arithmetic
            model = vit(name, num_classes, in_shape, fused=False).eval()
            image = torch.empty(1, *in_shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image)
        rows.append(
            {
                "model": name,
                **dataclasses.asdict(VIT_MODELS[name]),
                "tokens": model.position.shape[1],
                "params": sum(p.numel() for p in model.parameters()),
                "gmacs": counter.get_total_flops() / 2e9,  # two operations for each
            }
        )
    return pd.DataFrame(rows)
