r"""RandAugment as the TensorFlow code has it, batched: every image its own draw of operations.

Cubuk, Zoph, Shlens and Le, "RandAugment: Practical automated data augmentation with a reduced search space", NeurIPS
2020, arXiv:1909.13719; the code that Steiner et al. (2022, arXiv:2106.10270) trained with.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

#: The sixteen operations, drawn with equal probability.
OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)
_FILL = 128
_GRAY = (0.2989, 0.587, 0.114)  # TensorFlow's weights of red, green and blue


def randaugment(
    x: Tensor,
    layers: int,
    magnitude: float,
    *,
    generator: torch.Generator,
    variant: str = "tf",
    reference_size: int | None = None,
) -> Tensor:
    r"""Apply ``layers`` operations to each image, drawn one after the other out of sixteen with equal probability.

    With magnitude m: rotation by :math:`\pm 3 m` degrees, shear by :math:`\pm 0.03 m`, shift by :math:`\pm 10 m`
    pixels, color, contrast, brightness and sharpness by a factor of :math:`0.18 m + 0.1`, posterize to :math:`\lfloor
    0.4 m \rfloor` bits, solarize above :math:`\lfloor 25.6 m \rfloor`, add :math:`\lfloor 11 m \rfloor` to pixels
    below 128, cut out a square of half-side :math:`\lfloor 4 m \rfloor`. What comes in from outside is gray (128), and
    pixels are the nearest ones. Magnitude 0 is *not* the identity (posterize keeps one bit, a factor of 0.1 is nearly
    gray), and strength is not monotone in m; ``layers=0`` is the identity.

    Parameters
    ----------
    x
        Images (B, 1 or 3, H, W) of type uint8.
    layers
        Operations for each image.
    magnitude
        m, from 0 to 30.
    generator
        Draws operations, signs and centers where it is, so that they do not depend on where the images are.
    variant
        ``"tf"``: what the code that trained the released models computes, overflow included: the threshold of solarize
        wraps at 256 (m = 10, 20, 30 invert the image), posterize with 0 or more than 8 bits keeps the highest one, and
        contrast moves away from min(H W / 256, 255) instead of the mean gray. It is the default, since the paper's
        presets are this. ``"corrected"``: no overflow, 8 bits at most, and the mean gray.
    reference_size
        Shifts and squares are in pixels, meant for images of side 224. With ``reference_size=224`` they shrink with the
        image; None leaves them, and warns if they wipe out images.

    Returns
    -------
    Tensor
        Images of the same shape and type.

    Raises
    ------
    InvalidInput
        For images that are not uint8 of shape (B, 1 or 3, H, W), or a magnitude outside [0, 30].

    Examples
    --------
    >>> x = torch.arange(2 * 3 * 32 * 32, dtype=torch.uint8).view(2, 3, 32, 32)
    >>> g = torch.Generator().manual_seed(0)
    >>> y = randaugment(x, 2, 15, generator=g, reference_size=224)
    >>> y.shape == x.shape, y.dtype
    (True, torch.uint8)
    """
    _check_images(x)
    layers = checks.integer("layers", layers, least=0)
    magnitude = checks.real("magnitude", magnitude, least=0, most=30)
    checks.choice("variant", variant, ("tf", "corrected"))
    checks.generator(generator)
    b, _, h, w = x.shape
    scale = 1.0
    if reference_size is not None:
        scale = min(h, w) / checks.integer("reference_size", reference_size, least=1)
    elif layers and (lost := erased_probability(h, w, layers, magnitude)) > 0.05:
        warnings.warn(
            f"shifts and squares of magnitude {magnitude:g} are meant for images of side 224: of these, of {h} x {w}, "
            f"{lost:.0%} become plain gray; pass reference_size=224.",
            stacklevel=2,
        )

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (layers, b), generator=generator, device=generator.device).to(x.device)

    chosen, sign = draw(0, len(OPERATIONS)), 2 * draw(0, 2) - 1
    center = torch.stack([draw(0, h), draw(0, w)], -1)  # (layers, B, 2)
    for layer in range(layers):
        out = torch.empty_like(x)
        # Images with the same operation are changed together.
        for k, name in enumerate(OPERATIONS):
            rows = (chosen[layer] == k).nonzero().squeeze(1)
            if len(rows):
                out[rows] = apply_operation(
                    x[rows], name, magnitude, sign[layer, rows], center[layer, rows], variant=variant, scale=scale
                )
        x = out
    return x


def apply_operation(
    x: Tensor,
    name: str,
    magnitude: float,
    sign: Tensor,
    center: Tensor,
    *,
    variant: str = "tf",
    scale: float = 1.0,
) -> Tensor:
    """One operation on all images.

    Parameters
    ----------
    x
        Images (B, 1 or 3, H, W) of type uint8.
    name
        One of :data:`OPERATIONS`.
    magnitude
        From 0 to 30.
    sign
        1 or -1 for each image, (B,); geometric operations use it.
    center
        (row, column) of the square to cut out, (B, 2).
    variant
        As for :func:`randaugment`.
    scale
        Factor on shifts and squares.

    Examples
    --------
    >>> x = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    >>> one, center = torch.ones(1), torch.zeros(1, 2, dtype=torch.long)
    >>> apply_operation(x, "Invert", 10, one, center).flatten().tolist()
    [255, 155, 55, 0]
    """
    checks.choice("name", name, OPERATIONS)
    _check_images(x)
    settings = _Settings(magnitude / 10, sign.to(x.device, torch.float32), center.to(x.device), variant == "tf", scale)
    return _FUNCTIONS[name](x, settings)


def erased_probability(height: int, width: int, layers: int, magnitude: float) -> float:
    """Share of images of this size that become plain gray, when shifts and squares are not scaled.

    Examples
    --------
    >>> [round(erased_probability(32, 32, layers, 10), 4) for layers in (1, 2, 4)]
    [0.1875, 0.3398, 0.5642]
    """
    half = int(4 * magnitude)

    def covered(side: int) -> float:  # share of centers from which the square covers the whole side
        return sum(c <= half and side - c <= half for c in range(side)) / side

    each = (10 * magnitude >= width) + (10 * magnitude >= height) + covered(height) * covered(width)
    return 1 - (1 - each / len(OPERATIONS)) ** layers


@dataclass(frozen=True)
class _Settings:
    """What an operation needs: the magnitude over 10, signs (B,), centers (B, 2), overflow or not, scale of pixels."""

    level: float
    sign: Tensor
    center: Tensor
    wrap: bool
    scale: float

    @property
    def factor(self) -> float:
        return self.level * 1.8 + 0.1


def _autocontrast(x: Tensor, _: _Settings) -> Tensor:
    v = x.float()
    low, high = v.amin((2, 3), keepdim=True), v.amax((2, 3), keepdim=True)  # (B, C, 1, 1)
    scale = 255.0 / (high - low)
    stretched = (v * scale + -low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, v).to(torch.uint8)


def _equalize(x: Tensor, _: _Settings) -> Tensor:
    flat = x.flatten(2).long()  # (B, C, pixels)
    counts = torch.zeros(*x.shape[:2], 256, dtype=torch.long, device=x.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    last = flat.amax(2, keepdim=True)  # the highest value that occurs
    step = (flat.shape[2] - counts.gather(2, last)) // 255  # (B, C, 1); 0 for small or constant images
    table = (counts.cumsum(2) + step // 2) // step.clamp(min=1)
    table = F.pad(table[:, :, :-1], (1, 0)).clamp(0, 255)
    return torch.where(step == 0, flat, table.gather(2, flat)).view(x.shape).to(torch.uint8)


def _invert(x: Tensor, _: _Settings) -> Tensor:
    return 255 - x


def _posterize(x: Tensor, s: _Settings) -> Tensor:
    bits = int(s.level * 4)
    shift = 8 - bits if s.wrap else max(0, 8 - bits)
    if s.wrap and not 0 <= shift <= 7:
        shift = 7  # an 8-bit shift is limited to 7, and a negative one is a large one
    v = x.to(torch.int32)
    return ((v >> shift) << shift).to(torch.uint8)


def _solarize(x: Tensor, s: _Settings) -> Tensor:
    threshold = int(s.level * 256)
    threshold = threshold % 256 if s.wrap else threshold
    v = x.to(torch.int32)  # a comparison as uint8 would wrap in torch too
    return torch.where(v < threshold, v, 255 - v).to(torch.uint8)


def _solarize_add(x: Tensor, s: _Settings) -> Tensor:
    v = x.to(torch.int32)
    return torch.where(v < 128, (v + int(s.level * 110)).clamp(0, 255), v).to(torch.uint8)


def _gray(x: Tensor) -> Tensor:
    """Gray values (B, 1, H, W) as uint8: TensorFlow's weights, and its scale of 255.5 on the way back."""
    if x.shape[1] == 1:
        return x
    v = x.float() * (1 / 255)
    gray = v[:, :1] * _GRAY[0] + v[:, 1:2] * _GRAY[1] + v[:, 2:] * _GRAY[2]
    return (gray * 255.5).clamp(0, 255).to(torch.uint8)


def _blend(start: Tensor, x: Tensor, factor: float) -> Tensor:
    """From ``start`` (factor 0) through x (factor 1) and beyond, cut to whole numbers toward zero."""
    if factor == 1.0:
        return x
    first = start.float()
    return (first + factor * (x.float() - first)).clamp(0, 255).to(torch.uint8)


def _color(x: Tensor, s: _Settings) -> Tensor:
    return _blend(_gray(x).expand_as(x), x, s.factor)


def _contrast(x: Tensor, s: _Settings) -> Tensor:
    if s.wrap:
        # The original takes the mean of a histogram's 256 counts, H W / 256, for the mean of the image.
        mean = torch.full((len(x), 1, 1, 1), min(x.shape[2] * x.shape[3] / 256, 255.0), device=x.device)
    else:
        mean = _gray(x).float().mean((1, 2, 3), keepdim=True)
    return _blend(mean.to(torch.uint8).expand_as(x), x, s.factor)


def _brightness(x: Tensor, s: _Settings) -> Tensor:
    return _blend(torch.zeros_like(x), x, s.factor)


def _sharpness(x: Tensor, s: _Settings) -> Tensor:
    smooth = x.clone()  # the border stays
    if min(x.shape[2:]) >= 3:
        kernel = torch.ones(3, 3, device=x.device)
        kernel[1, 1] = 5
        kernel = (kernel / 13).expand(x.shape[1], 1, 3, 3)
        inner = F.conv2d(x.float(), kernel, groups=x.shape[1])
        smooth[:, :, 1:-1, 1:-1] = inner.clamp(0, 255).to(torch.uint8)
    return _blend(smooth, x, s.factor)


def _moved(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels nearest to (row, column) of each output pixel, each (B, H, W); gray outside."""
    h, w = x.shape[2:]

    def nearest(t: Tensor) -> Tensor:  # halves away from zero, as C rounds; torch rounds them to even
        return (torch.sign(t) * (t.abs() + 0.5).floor()).long()

    i, j = nearest(rows), nearest(columns)
    inside = (i >= 0) & (i < h) & (j >= 0) & (j < w)
    index = (i.clamp(0, h - 1) * w + j.clamp(0, w - 1)).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    found = x.flatten(2).gather(2, index).view(x.shape)
    return torch.where(inside[:, None], found, torch.full_like(found, _FILL))


def _places(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row (H, 1) and column (1, W) of each output pixel."""
    h, w = x.shape[2:]
    return torch.arange(h, device=x.device).float()[:, None], torch.arange(w, device=x.device).float()[None, :]


def _rotate(x: Tensor, s: _Settings) -> Tensor:
    h, w = x.shape[2:]
    angle = (s.sign * (s.level * 30 * (math.pi / 180)))[:, None, None]  # (B, 1, 1)
    cos, sin = angle.cos(), angle.sin()
    row, column = _places(x)
    # About the center ((h - 1) / 2, (w - 1) / 2).
    x0 = ((w - 1) - (cos * (w - 1) - sin * (h - 1))) / 2
    y0 = ((h - 1) - (sin * (w - 1) + cos * (h - 1))) / 2
    return _moved(x, sin * column + cos * row + y0, cos * column - sin * row + x0)


def _shear(x: Tensor, s: _Settings, horizontal: bool) -> Tensor:
    slope = (s.sign * (s.level * 0.3))[:, None, None]
    row, column = _places(x)
    full = torch.zeros_like(slope)
    if horizontal:
        return _moved(x, row + 0 * column + full, column + slope * row)
    return _moved(x, row + slope * column, column + 0 * row + full)


def _translate(x: Tensor, s: _Settings, horizontal: bool) -> Tensor:
    pixels = (s.sign * (s.level * 100 * s.scale))[:, None, None]
    row, column = _places(x)
    full = torch.zeros_like(pixels)
    if horizontal:
        return _moved(x, row + 0 * column + full, column + 0 * row + pixels)  # positive: the content moves left
    return _moved(x, row + 0 * column + pixels, column + 0 * row + full)


def _cutout(x: Tensor, s: _Settings) -> Tensor:
    half = int(int(s.level * 40) * s.scale)
    row, column = _places(x)
    i, j = s.center[:, 0, None, None], s.center[:, 1, None, None]  # (B, 1, 1)
    cut = (row >= i - half) & (row < i + half) & (column >= j - half) & (column < j + half)
    return torch.where(cut[:, None], torch.full_like(x, _FILL), x)


_FUNCTIONS: dict[str, Callable[[Tensor, _Settings], Tensor]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": lambda x, s: _shear(x, s, True),
    "ShearY": lambda x, s: _shear(x, s, False),
    "TranslateX": lambda x, s: _translate(x, s, True),
    "TranslateY": lambda x, s: _translate(x, s, False),
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}


def _check_images(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        what = type(x).__name__
        if isinstance(x, Tensor):
            what = f"{x.dtype}" + (f" from {float(x.min()):.4g} to {float(x.max()):.4g}" if x.numel() else "")
        raise InvalidInput(
            f"RandAugment works on raw pixels: x must be uint8 from 0 to 255, not {what}; augment before scaling."
        )
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not x.numel():
        raise InvalidInput(f"x has shape {tuple(x.shape)}; images (B, 1 or 3, H, W) are needed.")
