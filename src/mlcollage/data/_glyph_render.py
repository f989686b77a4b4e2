"""The rasterizer of :class:`~mlcollage.data.glyphs.GlyphWorld`.

Only additions, products, comparisons and square roots, each its own operation: IEEE 754 rounds every one of them
the same way in a vectorized loop, in its scalar tail, on any number of threads and on any device. So an image has
the same bits whichever batch it is drawn in. (A fused multiply-add, a GEMM or a vectorized ``exp`` would not.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softshrink

_EDGE = 6.0  # an edge fades over 6 / size of the frame's half-width, i.e. three pixels


def render(latents: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Images ``(n, channels, size, size)`` in [0, 1]; ``noise`` gives the size and is overwritten."""
    size = noise.shape[-1]
    # line: (size,) centers of the pixels of a row, and of a column.
    line = _pixels(size, noise.device)
    color = latents["foreground"][..., None, None]
    image = _background(latents, line)  # (n, channels, size, size)
    if latents["clutter"].shape[1]:
        # The nearest of the strokes counts: (n, S, size, size) to (n, size, size).
        mask = _ink(_squared_distance(latents["clutter"], line).amin(1), latents["half_width"], size)
        image += (latents["clutter_color"][..., None, None] - image) * mask[:, None]
    # The glyph lies over the clutter.
    mask = _ink(_squared_distance(latents["strokes"], line).amin(1), latents["half_width"], size)
    image += (color + _texture(latents, line)[:, None] - image) * mask[:, None]
    for number in range(latents["occluder"].shape[1]):
        hidden = _inside(latents["occluder"][:, number], line)[:, None]
        image = torch.where(hidden, latents["occluder_color"][:, number, :, None, None], image)
    return noise.add_(image).clamp_(0, 1)


def part_mask(latents: dict[str, Tensor], size: int) -> Tensor:
    """Which stroke a pixel belongs to: ``(n, size, size)``, 0 for none, ``s + 1`` for stroke ``s`` of the skeleton."""
    line = _pixels(size, latents["strokes"].device)
    squared, nearest = _squared_distance(latents["strokes"], line).min(1)
    parts = torch.where(_ink(squared, latents["half_width"], size) > 0.5, nearest + 1, 0)
    for number in range(latents["occluder"].shape[1]):
        parts = parts.masked_fill(_inside(latents["occluder"][:, number], line), 0)
    return parts


def _pixels(size: int, device: torch.device) -> Tensor:
    """Centers of the pixels of a row, in [-1, 1]; made on the CPU so that every device has the same."""
    return ((2 * torch.arange(size) + 1) / size - 1).to(device)


def _plane(terms: Tensor, line: Tensor) -> Tensor:
    """``terms[0] * x + terms[1] * y + terms[2]`` at every pixel: ``(..., size, size)``, rows are ``y``."""
    # A plane is a sum of a row and a column: 2 size products for each of its size^2 values.
    across = terms[..., 0, None] * line + terms[..., 2, None]  # (..., size)
    down = terms[..., 1, None] * line  # (..., size)
    return across[..., None, :] + down[..., :, None]


def _squared_distance(segments: Tensor, line: Tensor) -> Tensor:
    """``(n, S, size, size)``; see :func:`mlcollage.data._glyph_latents._segment_terms`."""
    side = _plane(segments[..., 0:3], line)  # distance from the line through the stroke
    # Along the stroke in half-lengths: softshrink gives 0 between the ends and what is beyond them elsewhere.
    beyond = softshrink(_plane(segments[..., 3:6], line), 1.0)
    return side.mul_(side).add_(beyond.mul_(beyond).mul_(segments[..., 6, None, None]))


def _ink(squared: Tensor, half_width: Tensor, size: int) -> Tensor:
    """Smooth step ``s^2 (3 - 2 s)`` from 0 outside a stroke to 1 inside."""
    s = (half_width[..., None] - squared.sqrt_()).mul_(size / _EDGE).add_(0.5).clamp_(0, 1)
    return (s * s).mul_(3 - 2 * s)


def _background(latents: dict[str, Tensor], line: Tensor) -> Tensor:
    """A color plus a bilinear interpolation of the 5 x 5 field."""
    field = latents["field"]
    where = (line + 1) * ((field.shape[-1] - 1) / 2)  # in nodes, 0 to 4
    low = where.floor().long()
    part = where - low  # of the way from one node to the next
    steps = field[..., 1:] - field[..., :-1]
    # First along each row of nodes, (n, channels, 5, size), then down the columns.
    rows = field[..., low] + steps[..., low] * part + latents["background"][..., None, None]
    steps = rows[..., 1:, :] - rows[..., :-1, :]
    return rows[..., low, :] + steps[..., low, :] * part[:, None]


def _texture(latents: dict[str, Tensor], line: Tensor) -> Tensor:
    """A wave of period 1 built of parabolas (a sine to within 6%): ``v (8 - 16 |v|)``, ``v`` in [-1/2, 1/2]."""
    phase = _plane(latents["wave"], line)
    v = phase - phase.round()  # one period is one unit
    return v.mul_(8 - 16 * v.abs()).mul_(latents["texture"][..., None, None])


def _inside(box: Tensor, line: Tensor) -> Tensor:
    """Pixels in a rectangle (left, top, right, bottom): ``(n, size, size)`` booleans."""
    across = (line >= box[:, 0, None]) & (line <= box[:, 2, None])
    down = (line >= box[:, 1, None]) & (line <= box[:, 3, None])
    return across[:, None, :] & down[:, :, None]
