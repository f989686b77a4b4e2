"""What varies between images of :class:`~mlcollage.data.glyphs.GlyphWorld`, drawn block by block on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlcollage.data._blocks import BLOCK, block_generator
from mlcollage.data._glyph_alphabet import MAX_SEGMENTS, MAX_VERTICES
from mlcollage.data._glyph_settings import GlyphSettings

FIELD = 5
"""Nodes of the background field in each direction."""

NOISE_GROUP = 8
"""Images that share one generator of pixel noise: small, so that a single image is cheap to get."""

_EXTENT = 0.8  # half-width of a glyph at scale 1; the frame is [-1, 1] x [-1, 1]
_OUTSIDE = 1e3  # where absent strokes are put

Latents = dict[str, Tensor]


def draw_block(world: GlyphSettings, split: str, seed: int, block: int) -> Latents:
    """Everything but the pixel noise of images ``1024 * block ...`` of a split, one row per image.

    All draws are made whatever the options are, in one order: worlds that differ in options only share them
    (common random numbers), e.g. the same scene with and without clutter.
    """
    generator = block_generator("glyphs", world.seed, split, seed, block)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(BLOCK, *shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BLOCK, *shape, generator=generator)

    # Arguments are evaluated in the order in which they stand, which is part of the definition of the stream.
    latents = _labels(world, uniform(4))
    latents |= {
        "rotation": uniform(low=-math.radians(world.rotation), high=math.radians(world.rotation)),
        "aspect": world.aspect * normal(),
        "shear": uniform(low=-world.shear, high=world.shear),
        "scale": uniform(low=world.scale[0], high=world.scale[1]),
        "shift": uniform(2, low=-world.shift, high=world.shift),
        "width": uniform(low=world.width[0], high=world.width[1]),
    }
    # (1024, 5, 2): coefficients of the warp's five functions in x and y; (1024, 10, 2): one step per vertex.
    bend, tremor = world.jitter * normal(5, 2), 0.3 * world.jitter * normal(MAX_VERTICES, 2)
    latents |= _appearance(world, latents["cue"], normal(3), uniform(3, low=0.25, high=0.75), uniform(6))
    # Three channels are drawn and one is kept for gray images, so that gray and RGB worlds share what follows.
    latents["field"] = (world.background * normal(3, FIELD, FIELD))[:, : world.channels].contiguous()
    latents |= _occluders(world, uniform(4, 4), uniform(4, 3))
    strokes = _strokes(world, latents, bend, tremor)  # (1024, 5, 2, 2)
    clutter, color, count = _clutter(world, latents["foreground"], uniform(5), uniform(world.clutter, 4))
    latents |= {"clutter_color": color, "clutter_count": count}
    half_width = (latents["width"] * latents["scale"])[:, None]
    latents["half_width"] = half_width
    latents["strokes"] = _segment_terms(strokes)  # (1024, 5, 7)
    latents["clutter"] = _segment_terms(clutter)  # (1024, clutter, 7)
    return latents


def pixel_noise(world: GlyphSettings, split: str, seed: int, group: int) -> Tensor:
    """Gaussian noise of images ``8 * group ...``: ``(8, channels, size, size)``."""
    generator = block_generator("glyphs-noise", world.seed, split, seed, group)
    return torch.randn(NOISE_GROUP, world.channels, world.size, world.size, generator=generator).mul_(world.noise)


def _labels(world: GlyphSettings, u: Tensor) -> Latents:
    """Class by inverse transform of the (im)balanced prior; then the noisy label and the spurious cue."""
    classes = world.num_classes
    weights = world.imbalance ** (-torch.arange(classes, dtype=torch.float64) / (classes - 1))
    edges = (weights / weights.sum()).cumsum(0)[:-1]  # (classes - 1,) inner edges of the distribution function
    true = torch.searchsorted(edges, u[:, 0].double(), right=True)
    # Any class but the true one: 1 to classes - 1 steps on from it, in a circle.
    other = (true + 1 + (u[:, 2] * (classes - 1)).long().clamp(max=classes - 2)) % classes
    flipped = u[:, 1] < world.label_noise
    latents = {"true_label": true, "label": torch.where(flipped, other, true)}
    # One uniform number decides twice: whether the cue agrees and, stretched to [0, 1] again, with which other class.
    agrees, wrong = u[:, 3] < world.spurious, (u[:, 3] - world.spurious) / max(1 - world.spurious, 1e-9)
    conflicting = (true + 1 + (wrong.clamp(0) * (classes - 1)).long().clamp(max=classes - 2)) % classes
    cue = torch.where(agrees, true, conflicting) if world.spurious else torch.full_like(true, -1)
    return latents | {"cue": cue}


def _appearance(world: GlyphSettings, cue: Tensor, direction: Tensor, background: Tensor, u: Tensor) -> Latents:
    """Colors and texture. The stroke's color is the background's plus a random direction: no class in it."""
    direction = direction[:, : world.channels]  # (1024, channels), made a unit vector: bright as often as dark
    direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-6)
    background = background[:, : world.channels].contiguous()
    contrast = world.contrast[0] + (world.contrast[1] - world.contrast[0]) * u[:, 0]
    foreground = (background + contrast[:, None] * direction).clamp(0, 1)
    if world.spurious and world.spurious_cue == "color":
        foreground = _palette(world.num_classes)[cue]
    cycles = 1.0 + 2.0 * u[:, 1]  # per half-frame
    angle = 2 * math.pi * u[:, 2]
    return {
        "background": background,
        "contrast": contrast,
        "foreground": foreground,
        "texture": world.texture * u[:, 4],
        "wave": torch.stack([cycles * angle.cos(), cycles * angle.sin(), u[:, 3]], dim=1),
    }


def _palette(classes: int) -> Tensor:
    """``(classes, 3)`` saturated colors, evenly spaced in hue."""
    phase = torch.arange(classes) / classes  # hue in turns; red, green and blue are a third of a turn apart
    return (0.5 + 0.5 * torch.cos(2 * math.pi * (phase[:, None] - torch.tensor([0.0, 1 / 3, 2 / 3])))).float()


def _occluders(world: GlyphSettings, box: Tensor, color: Tensor) -> Latents:
    """Up to four rectangles that hide what is below them: (left, top, right, bottom)."""
    # (1024, 4, 2) each: centers in [-0.8, 0.8], half-sides in [0.15, 0.35].
    center, half = 1.6 * box[..., :2] - 0.8, 0.15 + 0.2 * box[..., 2:]
    edges = torch.cat([center - half, center + half], dim=-1)
    return {
        "occluder": edges[:, : world.occluders].contiguous(),
        "occluder_color": color[:, : world.occluders, : world.channels].contiguous(),
    }


def _strokes(world: GlyphSettings, latents: Latents, bend: Tensor, tremor: Tensor) -> Tensor:
    """End points ``(1024, 5, 2, 2)`` of the glyph's strokes in the frame.

    A smooth warp and a tremor of the vertices, then rotation, shear, aspect, scale and shift.
    """
    label = latents["true_label"]
    points = world.alphabet_vertices[label]  # (1024, 10, 2)
    x, y = points[..., 0], points[..., 1]
    basis = torch.stack([x * y, x**2 - 0.5, y**2 - 0.5, torch.sin(2 * x), torch.sin(2 * y)], dim=-1)
    # (1024, 10, 5, 1) * (1024, 1, 5, 2), summed over the five functions.
    points = points + (basis[..., None] * bend[:, None]).sum(2) + tremor
    # The product of both factors is 1, so that the area stays.
    x = points[..., 0] * torch.exp(latents["aspect"] / 2)[:, None]
    y = points[..., 1] * torch.exp(-latents["aspect"] / 2)[:, None]
    x = x + latents["shear"][:, None] * y
    cos, sin = latents["rotation"].cos()[:, None], latents["rotation"].sin()[:, None]
    points = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
    center = latents["shift"]
    if world.spurious and world.spurious_cue == "position":
        # The classes' places lie on a circle; less of the shift is left, so that they stay apart.
        turn = 2 * math.pi * latents["cue"] / world.num_classes
        center = 0.3 * center + 0.35 * torch.stack([turn.cos(), turn.sin()], dim=-1)
    latents["center"] = center
    points = _EXTENT * latents["scale"][:, None, None] * points + center[:, None]
    # (1024, 5, 2) vertex numbers as (1024, 10, 2), to pick both coordinates of both ends of each stroke.
    ends = world.alphabet_segments[label].reshape(BLOCK, 2 * MAX_SEGMENTS, 1).expand(-1, -1, 2)
    return points.gather(1, ends).reshape(BLOCK, MAX_SEGMENTS, 2, 2)


def _clutter(world: GlyphSettings, foreground: Tensor, u: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """End points of 0 to ``clutter`` stray strokes, and their color: between the glyph's and a random one."""
    center, angle = 2 * place[..., :2] - 1, math.pi * place[..., 2]
    # (1024, clutter, 2): from the center of a stroke to its end.
    half = (0.15 + 0.3 * place[..., 3])[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
    count = (u[:, 0] * (world.clutter + 1)).long().clamp(max=world.clutter)
    absent = torch.arange(world.clutter) >= count[:, None]  # (1024, clutter)
    center = torch.where(absent[..., None], _OUTSIDE, center)
    color = foreground + u[:, 4:] * (u[:, 1 : 1 + world.channels] - foreground)
    return torch.stack([center - half, center + half], dim=2), color, count


def _segment_terms(ends: Tensor) -> Tensor:
    r"""What the rasterizer needs of each stroke from ``a`` to ``b``: ``(1024, S, 7)``.

    With ``c`` the middle, ``h`` half the length, ``u`` the direction and ``n`` the normal, the distance of a pixel
    ``p`` from the stroke is :math:`d^2 = (n \cdot (p - c))^2 + h^2 \max(|u \cdot (p - c)| / h - 1, 0)^2`. Columns:
    ``n_x, n_y, -n \cdot c, u_x / h, u_y / h, -u \cdot c / h, h^2``.
    """
    start, end = ends[:, :, 0], ends[:, :, 1]  # (1024, S, 2) each
    center, step = (start + end) / 2, (end - start) / 2
    half = step.norm(dim=-1, keepdim=True).clamp(min=1e-3)  # (1024, S, 1); a dot is a very short stroke
    u = step / half
    n = torch.stack([-u[..., 1], u[..., 0]], dim=-1)
    offset = -(n * center).sum(-1, keepdim=True)
    along = -(u * center).sum(-1, keepdim=True) / half
    return torch.cat([n, offset, u / half, along, half**2], dim=-1)
