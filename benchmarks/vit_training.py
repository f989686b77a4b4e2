"""Speed of a training step of the vision transformer, and of RandAugment.

``mlcollage bench vit_training`` prints the table. Times are CPU seconds of one thread, taken in turns, so that other
load on the machine falls on all alike; ratios are times over that of the row called baseline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.nn.init import build
from mlcollage.nn.vit_models import ViTConfig, vit
from mlcollage.train import randaugment

Row = dict[str, Any]
SIZES = ViTConfig(4, 192, 768, 3, 8)


class Plain(nn.Module):
    """A vision transformer of torch's own parts: a convolution, nn.TransformerEncoder, a linear head."""

    def __init__(self, sizes: ViTConfig, side: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, sizes.width, sizes.patch, sizes.patch)
        self.token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.position = nn.Parameter(torch.randn(1, (side // sizes.patch) ** 2 + 1, sizes.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            sizes.width,
            sizes.heads,
            sizes.mlp,
            dropout=0.0,
            activation=nn.GELU(approximate="tanh"),
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, sizes.layers, nn.LayerNorm(sizes.width, 1e-6), enable_nested_tensor=False
        )
        self.head = nn.Linear(sizes.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.encoder(x)[:, 0])


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a run of a study has it
    try:
        return [*_steps(quick), *_augmentation(quick)]
    finally:
        torch.set_num_threads(before)


def _in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """CPU seconds of each; the first's its least, the others' by the median ratio to the first of their turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            start = time.process_time()
            runs[name]()
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - start)
    first = np.array(next(iter(seconds.values())))
    return {name: float(first.min() * np.median(np.array(values) / first)) for name, values in seconds.items()}


def _rows(what: str, seconds: Mapping[str, float]) -> list[Row]:
    first = next(iter(seconds.values()))
    return [
        {"name": name, "what": what, "value": 1e3 * value, "unit": "ms", "ratio": value / first}
        for name, value in seconds.items()
    ]


def _steps(quick: bool) -> list[Row]:
    side, classes, batch = 64, 100, 8 if quick else 32
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    y = torch.arange(batch) % classes
    models = {
        "torch TransformerEncoder (baseline)": build(lambda: Plain(SIZES, side, classes), 0),
        "mlcollage": build(lambda: vit(SIZES, classes, (3, side, side)), 0),
    }

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    runs = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        runs[name] = lambda model=model, optimizer=optimizer: step(model, optimizer)
    what = f"training step, {SIZES.layers} blocks of width {SIZES.width}, 65 tokens, batch {batch}"
    return _rows(what, _in_turns(runs, 9 if quick else 25))


def _augmentation(quick: bool) -> list[Row]:
    try:
        from kornia.augmentation.auto import RandAugment
    except ImportError:
        return []
    n, side = (32, 64) if quick else (128, 224)
    x = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats, theirs, g = x.float() / 255, RandAugment(n=2, m=9), torch.Generator().manual_seed(0)
    runs = {
        "kornia RandAugment (baseline; one draw for the batch)": lambda: theirs(floats),
        "mlcollage (a draw for each image)": lambda: randaugment(x, 2, 9, generator=g, reference_size=224),
    }
    return _rows(f"RandAugment, 2 layers, {n} images of {side} x {side}", _in_turns(runs, 9))
