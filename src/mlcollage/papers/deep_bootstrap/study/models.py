"""The study's networks with how each is trained, and its augmentations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage.nn import MLP, ConvNet, ResNet, ViT
from mlcollage.train import shift_images


@dataclass(frozen=True)
class Architecture:
    """A network and how it is trained: the procedure F of the paper, one for all worlds."""

    make: Callable[[Any, int], nn.Module]
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    warmup: int = 0


def _mlp(width: int, lr: float) -> Architecture:
    """Three layers with BatchNorm, as the paper's MLPs; SGD without momentum."""
    return Architecture(
        lambda shape, k: MLP(shape, k, widths=(width,) * 3, norm="batch"), partial(torch.optim.SGD, lr=lr)
    )


_MOMENTUM = partial(torch.optim.SGD, momentum=0.9)
ARCHITECTURES: Mapping[str, Architecture] = {
    "mlp8": _mlp(8, 0.1),
    "mlp32": _mlp(32, 0.1),
    "mlp128": _mlp(128, 0.1),
    "mlp128_slow": _mlp(128, 0.01),
    "cnn": Architecture(lambda s, k: ConvNet(s, k, widths=(16, 32, 64), strides=(2, 2, 1)), partial(_MOMENTUM, lr=0.1)),
    "resnet": Architecture(lambda s, k: ResNet(s, k, width=8, stem_stride=2), partial(_MOMENTUM, lr=0.05)),
    "vit": Architecture(
        lambda s, k: ViT(s, k, patch_size=s[-1] // 2, dim=48, depth=2, pool="mean"),
        partial(torch.optim.AdamW, lr=3e-3),
        warmup=30,
    ),
}


def _shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to two pixels each way; what enters repeats the edge."""
    return shift_images(x, 2, generator=generator)


def _occlude(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half the width and height of each image, anywhere, set to the image's mean."""
    n, _, h, w = x.shape
    corner = torch.rand((2, n, 1), generator=generator, device=generator.device).to(x.device)
    rows = torch.arange(h, device=x.device) - (corner[0] * (h // 2)).long()  # (n, h): place within the patch
    columns = torch.arange(w, device=x.device) - (corner[1] * (w // 2)).long()  # (n, w)
    hidden = ((rows >= 0) & (rows < h // 2))[:, :, None] & ((columns >= 0) & (columns < w // 2))[:, None, :]
    return torch.where(hidden[:, None], x.mean(dim=(1, 2, 3), keepdim=True), x)


AUGMENTATIONS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {"shift": _shift, "occlude": _occlude}
