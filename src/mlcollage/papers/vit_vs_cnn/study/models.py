"""The study's networks and how they are trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.data import Problem
from mlcollage.errors import InvalidInput
from mlcollage.measure import remove_skip
from mlcollage.nn import ResNet, ViT, build
from mlcollage.train import cosine, epochs, steps

WARMUP, CLIP, DECAY = 0.2, 1.0, 0.05


@dataclass(frozen=True)
class Networks:
    """Networks that see the same images in the same order, and what is measured of them."""

    train: int = 2500  # training images, of each seed's own
    test: int = 1000  # images that everything is measured on
    dim: int = 48  # width of a token
    depth: int = 8  # blocks of the transformers and of the residual network
    heads: int = 4  # attention heads of a block
    width: int = 16  # channels of the residual network's first stage
    batch: int = 32  # images in an update
    epochs: float = 3.0  # passes over the training images
    lr: float = 2e-3  # peak learning rate of AdamW, for all networks
    share: float = 0.1  # part of the training images for the network that has few
    field: int = 64  # images of which receptive fields are means
    probe: int = 1000  # training images of the linear probes
    compared: int = 512  # test images of the maps
    compared_at_once: int = 256  # images in a batch of the maps
    users: bool = False  # whether the networks are those of the workload


class Mixer(nn.Module):
    """An MLP-Mixer (Tolstikhin et al. 2021): blocks that mix tokens, then channels, without attention."""

    def __init__(self, shape: tuple[int, int, int], classes: int, patch: tuple[int, int], dim: int, depth: int) -> None:
        super().__init__()
        tokens = (shape[1] // patch[0]) * (shape[2] // patch[1])
        self.patches = nn.Conv2d(shape[0], dim, patch, stride=patch)
        self.blocks = nn.ModuleList(_MixerBlock(tokens, dim) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        h = self.patches(x).flatten(2).transpose(1, 2)  # (batch, tokens, dim)
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(self.norm(h).mean(1))
        return logits


class _MixerBlock(nn.Module):
    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.tokens(self.ln1(h).transpose(1, 2)).transpose(1, 2)
        out: Tensor = h + self.mlp(self.ln2(h))
        return out


def patch_of(side: int) -> int:
    """The largest patch that tiles a side and leaves four of them at least."""
    fits = [p for p in range(2, side // 4 + 1) if side % p == 0]
    if not fits:
        raise InvalidInput(
            f"images with a side of {side} pixels cannot be cut into four patches or more of two pixels or more; "
            "resize them, to 32 pixels for instance."
        )
    return fits[-1]


def makers(s: Networks, shape: tuple[int, ...], classes: int) -> dict[str, Callable[[], nn.Module]]:
    """The study's own networks for images of a shape, by name."""
    size = (shape[0], shape[1], shape[2])
    patch = (patch_of(shape[1]), patch_of(shape[2]))
    stages = [s.depth // 3 + (k < s.depth % 3) for k in range(3)]

    def vit(pool: str) -> Callable[[], nn.Module]:
        return lambda: ViT(size, classes, patch_size=patch, dim=s.dim, depth=s.depth, heads=s.heads, pool=pool)

    return {
        "vit": vit("token"),
        "gap": vit("mean"),
        "mixer": lambda: Mixer(size, classes, patch, s.dim, s.depth),
        # of 28 pixels, feature maps of 14, 7 and 4, the last of which is the grid of the patches
        "cnn": lambda: ResNet(
            size, classes, blocks=stages, width=s.width, stem_stride=2 if min(shape[1:]) >= 16 else 1
        ),
    }


def train(
    make: Callable[[], nn.Module], p: Problem, s: Networks, seed: int, *, few: bool = False, cut: str | None = None
) -> nn.Module:
    """A trained network; all of one seed see the same batches, and ``few`` a part of the images as many times.

    ``cut`` trains without the skips of this block, from the same weights.
    """
    model = build(make, seed).to(p.device)
    x, y = p.train
    total = max(1, round(s.epochs * len(x) / s.batch))
    if few:
        x, y = (t[: max(10, round(s.share * len(x)))] for t in (x, y))
    batches = epochs(x, y, min(s.batch, len(x)), generator=seed)
    # foreach: the same numbers bit for bit, for half the time that an update of these hundred small tensors takes
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=DECAY, foreach=True)
    schedule = cosine(total, warmup=max(1, round(WARMUP * total)) if total > 1 else 0)
    options: dict[str, Any] = {"loss": F.cross_entropy, "schedule": schedule, "clip_norm": CLIP}
    with remove_skip(model, cut, x[:2]) if cut is not None else nullcontext():
        for _ in steps(model, batches, optimizer, **options, max_steps=total, seed=seed):
            pass
    return model
