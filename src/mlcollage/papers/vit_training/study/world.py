"""The study's own data: smooth templates hidden in noisy series, and three other tasks on series of the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

LENGTH, TEMPLATE, CLASSES = 40, 12, 10
SPAN = 4.0  # a template's center lies up to 0.6 of this from the middle
TASKS = ("templates", "polarity", "place")


class Rows(NamedTuple):
    """Series (n, 1, 1, 40) float32 and labels (n,)."""

    x: Tensor
    y: Tensor


def _smooth(white: NDArray[np.float64], passes: int = 1) -> NDArray[np.float64]:
    """Moving averages of five, scaled to keep the variance of white noise after one pass."""
    for _ in range(passes):
        padded = np.pad(white, ((0, 0), (2, 2)), mode="wrap")
        white = np.lib.stride_tricks.sliding_window_view(padded, 5, axis=1).mean(2) * np.sqrt(5)
    return white


def templates(seed: int, classes: int = CLASSES) -> NDArray[np.float64]:
    """Smooth random shapes (classes, 12) of mean 0 and deviation 1, tapered to 0 at both ends."""
    shapes = _smooth(np.random.default_rng([seed, 1]).normal(size=(classes, TEMPLATE)), 1)
    shapes *= np.sin(np.pi * (np.arange(TEMPLATE) + 0.5) / TEMPLATE) ** 0.5
    shapes -= shapes.mean(1, keepdims=True)
    return shapes / shapes.std(1, keepdims=True)


def draw(seed: int, stream: int, n: int, task: str = "upstream") -> Rows:
    """Series of a task.

    A template is stretched by 0.75 to 1.3, scaled by 0.7 to 1.3 and put up to 2.4 samples from the middle; a line and
    smooth noise of deviation 0.3 are added. ``"upstream"`` and ``"templates"`` ask which of ten templates it is (other
    ones in the second), ``"polarity"`` whether it is upside down, ``"place"`` in which quarter of its range it is.
    """
    rng = np.random.default_rng([seed, 2, stream, ("upstream", *TASKS).index(task)])
    shapes = templates(seed + (0 if task == "upstream" else 500_000))
    kind = rng.integers(0, len(shapes), n)
    sign = np.where(rng.random(n) < 0.5, -1.0, 1.0) if task == "polarity" else np.ones(n)
    shift = rng.uniform(-0.6, 0.6, n) * SPAN
    stretch, amplitude = rng.uniform(0.75, 1.3, n), rng.uniform(0.7, 1.3, n)
    places = np.arange(LENGTH) - (LENGTH - 1) / 2 - shift[:, None]  # (n, 40), from the template's center
    places = (places + LENGTH / 2) % LENGTH - LENGTH / 2  # around the end
    at = places / stretch[:, None] + (TEMPLATE - 1) / 2
    low = np.floor(at).astype(int)
    padded = np.pad(shapes, ((0, 0), (1, 1)))  # zero outside

    def value(index: NDArray[np.int64]) -> NDArray[np.float64]:
        return padded[kind[:, None], np.clip(index + 1, 0, TEMPLATE + 1)]

    signal = value(low) * (1 - (at - low)) + value(low + 1) * (at - low)
    x = sign[:, None] * amplitude[:, None] * signal
    x += rng.uniform(-0.5, 0.5, n)[:, None] * np.linspace(-1, 1, LENGTH)
    x += 0.3 * _smooth(rng.normal(size=(n, LENGTH)))
    if task == "polarity":
        y = (sign > 0).astype(int)
    elif task == "place":
        y = np.clip(((shift / (1.2 * SPAN) + 0.5) * 4).astype(int), 0, 3)
    else:
        y = kind
    return Rows(torch.from_numpy(x.astype(np.float32)).view(n, 1, 1, LENGTH), torch.from_numpy(y).long())


def augment(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Series or images (n, C, H, W), each moved, stretched and scaled at random; strength 1 is light, 2 medium."""
    return changed(x, [strength] * len(x), torch.rand(4, len(x), generator=generator))


def changed(x: Tensor, strength: Sequence[float], uniform: Tensor) -> Tensor:
    """Series or images (n, C, H, W), each with a strength (n) and uniform numbers (4, n) of its own.

    Series (H = 1) are moved around their end by up to 0.045 of their length and stretched by up to 7.5 %; images are
    moved by up to 0.09 of their sides and stretched likewise, the edge repeated. All are scaled by up to 9 %.
    """
    n = len(x)
    u = 2 * uniform - 1
    of_move, of_scale, of_gain = (torch.tensor([c * s for s in strength]) for c in (0.18, 0.075, 0.09))
    move, scale = of_move * u[:2], 1 + of_scale * u[2]  # in half sides, as grids are
    gain = (1 + of_gain * u[3]).view(n, 1, 1, 1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale, scale
    theta[:, 0, 2] = move[0]
    if x.shape[2] > 1:
        theta[:, 1, 2] = move[1]
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return gain * F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    w = x.shape[3]
    at = (torch.arange(w) - (w - 1) / 2)[None] * scale[:, None] + (w - 1) / 2 + (move[0] * w / 4)[:, None]  # (n, w)
    low = at.floor().long()
    part = (at - low)[:, None, None]
    c = x.shape[1]

    def taken(index: Tensor) -> Tensor:
        return x.gather(3, (index % w)[:, None, None].expand(-1, c, 1, -1))

    return gain * (taken(low) * (1 - part) + taken(low + 1) * part)
