"""Two random views of each image of a batch: the augmentation of BYOL and Barlow Twins, on tensors on any device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

__all__ = ["TwoViews", "ViewSettings", "adjust_color", "blur_images", "solarize", "two_view_augment"]

_GRAY = (0.2989, 0.587, 0.114)  # luma of ITU-R 601, as PIL and torchvision have it
_TRIES = 10  # crops that are drawn before the middle is taken, as in torchvision
Preset = Literal["byol", "cifar", "gray"]
Color = Literal["brightness", "contrast", "saturation", "hue"]


@dataclass(frozen=True)
class ViewSettings:
    """Probabilities and strengths of one view's changes, in the order in which they are made.

    Parameters
    ----------
    scale
        Smallest and largest share of the area that is cropped; the crop is resized to the view's size.
    ratio
        Smallest and largest ratio of the crop's width to its height.
    flip
        Probability of a horizontal flip.
    jitter
        Probability of a change of color.
    brightness, contrast, saturation
        Factors are drawn from 1 - s to 1 + s.
    hue
        Shifts are drawn from -h to h, in turns of the color circle.
    gray
        Probability of losing all color.
    blur
        Probability of a Gaussian blur.
    sigma
        Its smallest and largest standard deviation, in pixels.
    solarize
        Probability that values from 128/255 on are inverted.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray: float = 0.2
    blur: float = 1.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "gray", "blur", "solarize"):
            checks.probability(name, getattr(self, name), inside=False)
        for name in ("brightness", "contrast", "saturation"):
            checks.real(name, getattr(self, name), least=0)
        checks.real("hue", self.hue, least=0, most=0.5)
        for name, most in (("scale", 1.0), ("ratio", None), ("sigma", None)):
            try:
                low, high = getattr(self, name)
            except (TypeError, ValueError):
                raise InvalidInput(f"{name} is a pair (smallest, largest), not {getattr(self, name)!r}.") from None
            checks.real(f"{name}[0]", low, above=0, most=high)
            checks.real(f"{name}[1]", high, above=0, most=most)


_PAPER = (ViewSettings(), ViewSettings(blur=0.1, solarize=0.2))
_CIFAR = tuple(replace(s, scale=(0.2, 1.0), blur=0.0) for s in _PAPER)
_NO_COLOR = tuple(replace(s, saturation=0.0, hue=0.0, gray=0.0) for s in _PAPER)
_PRESETS: dict[str, tuple[ViewSettings, ...]] = {"byol": _PAPER, "cifar": _CIFAR, "gray": _NO_COLOR}


class TwoViews:
    """Makes two views of each image of a batch; every image has draws of its own.

    Parameters
    ----------
    size
        Height and width of the views, one number if they are the same.
    first, second
        Settings of the two views.
    channels
        Of the images; changes of hue and saturation need 3.
    mean, std
        Subtracted from each channel and divided by in the end; None leaves views in [0, 1].

    Raises
    ------
    InvalidInput
        For changes of color of images that have none, and when called for images that are not (n, channels, h, w),
        uint8 or floating in [0, 1].

    Notes
    -----
    Crops are resized by bicubic sampling without antialiasing, all in one call; PIL antialiases, which shows where
    crops are much larger than views.

    Examples
    --------
    >>> augment = two_view_augment(8, preset="cifar")
    >>> x = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    >>> x_a, x_b = augment(x, torch.Generator().manual_seed(1))
    >>> tuple(x_a.shape), bool((x_a != x_b).any())
    ((4, 3, 8, 8), True)
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        first: ViewSettings,
        second: ViewSettings,
        *,
        channels: int = 3,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        high, wide = (size, size) if not isinstance(size, tuple) else size
        self.size = checks.integer("size", high, least=1), checks.integer("size", wide, least=1)
        self.channels = checks.integer("channels", channels, least=1)
        self.settings = (first, second)
        for s in self.settings:
            colored = [n for n in ("saturation", "hue", "gray") if getattr(s, n)]
            if channels != 3 and colored:
                raise InvalidInput(
                    f"images of {channels} channels have no {', '.join(colored)}: use preset='gray', or set these to 0."
                )
        if (mean is None) != (std is None) or any(np.shape(v) != (channels,) for v in (mean, std) if v is not None):
            raise InvalidInput(f"mean and std are given together, {channels} numbers each, or not at all.")
        self.mean = None if mean is None else tuple(checks.real("mean", float(v)) for v in mean)
        self.std = None if std is None else tuple(checks.positive("std", float(v)) for v in std)

    def __call__(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two views (n, channels, height, width), float32, on the images' device; draws come from ``generator``."""
        checks.generator(generator)
        x = _checked(x, self.channels)
        a, b = (self._view(x, s, generator) for s in self.settings)
        return a, b

    def _view(self, x: Tensor, s: ViewSettings, generator: torch.Generator) -> Tensor:
        draw = _Draws(len(x), generator, x.device)
        x = _crop(x, self.size, s, draw)
        x = _jitter(x, s, draw)
        x = _some(x, draw.chosen(s.gray), lambda part, _: _to_gray(part).expand_as(part))
        sigma = draw.between(*s.sigma)
        x = _some(x, draw.chosen(s.blur), lambda part, index: blur_images(part, sigma[index], most=s.sigma[1]))
        x = _some(x, draw.chosen(s.solarize), lambda part, _: solarize(part))
        if self.mean is not None and self.std is not None:
            mean, std = (x.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
            x = (x - mean) / std
        return x


def two_view_augment(
    size: int | tuple[int, int],
    channels: int = 3,
    preset: Preset = "byol",
    *,
    mean: Any = None,
    std: Any = None,
    **changed: Any,
) -> TwoViews:
    """The views of a known recipe.

    Parameters
    ----------
    size, channels, mean, std
        As for :class:`TwoViews`.
    preset
        ``"byol"``, that of BYOL and Barlow Twins: the first view is always blurred and never solarized, the second
        blurred with probability 0.1 and solarized with 0.2; ``"cifar"``, the same without blur and with crops of 20 %
        of the area and more, for small images; ``"gray"``, without changes of hue and saturation, for images of any
        number of channels.
    **changed
        Settings of both views that are to differ, by the names of :class:`ViewSettings`.

    References
    ----------
    Grill et al., "Bootstrap your own latent", 2020, arXiv:2006.07733, appendix B; Barlow Twins, section 2.2.
    """
    checks.choice("preset", preset, _PRESETS)
    first, second = (replace(s, **changed) for s in _PRESETS[preset])
    return TwoViews(size, first, second, channels=channels, mean=mean, std=std)


def adjust_color(x: Tensor, kind: Color, amount: Tensor) -> Tensor:
    """Change one quality of each image (n, c, h, w) in [0, 1] by an amount of its own (n,).

    Parameters
    ----------
    x
        Images; three channels for saturation and hue.
    kind
        ``"brightness"`` multiplies; ``"contrast"`` moves away from the mean gray, ``"saturation"`` from the pixel's
        gray, by this factor; ``"hue"`` turns the color circle by this share. Values are cut to [0, 1].
    amount
        (n,), factors or shares of a turn.

    Examples
    --------
    >>> red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
    >>> adjust_color(red, "hue", torch.tensor([1 / 3])).flatten().round(decimals=4).tolist()
    [0.0, 1.0, 0.0]
    """
    checks.choice("kind", kind, ("brightness", "contrast", "saturation", "hue"))
    f = amount[:, None, None, None]
    if kind == "brightness":
        return (x * f).clamp(0, 1)
    if kind == "contrast":
        middle = _to_gray(x).mean((1, 2, 3), keepdim=True)
        return (f * x + (1 - f) * middle).clamp(0, 1)
    if kind == "saturation":
        return (f * x + (1 - f) * _to_gray(x)).clamp(0, 1)
    return _turn_hue(x, amount)


def blur_images(x: Tensor, sigma: Tensor, *, most: float | None = None) -> Tensor:
    """Gaussian blur of each image (n, c, h, w) by a standard deviation of its own (n,), edges reflected.

    Parameters
    ----------
    x, sigma
        Images and standard deviations in pixels.
    most
        The largest sigma, where it is known: saves asking the device. The kernel reaches 4 of these, or to the edge of
        small images.
    """
    most = float(sigma.max()) if most is None else most
    n, c, h, w = x.shape
    for axis, length in ((2, h), (3, w)):
        reach = min(math.ceil(4 * most), length - 1)  # reflection has no more to offer
        steps = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
        kernel = torch.exp(-0.5 * (steps / sigma[:, None]) ** 2)
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # (n c, taps)
        pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        flat = F.pad(x.reshape(1, n * c, h, w), pad, mode="reflect")
        shape = (n * c, 1, -1, 1) if axis == 2 else (n * c, 1, 1, -1)
        x = F.conv2d(flat, kernel.reshape(shape), groups=n * c).reshape(n, c, h, w)
    return x


def solarize(x: Tensor, threshold: float = 128 / 255) -> Tensor:
    """Values in [0, 1] from the threshold on are inverted.

    Examples
    --------
    >>> solarize(torch.tensor([0.25, 0.75, 1.0])).tolist()
    [0.25, 0.25, 0.0]
    """
    # Eight-bit values that were divided by 255 lie on the threshold up to rounding.
    return torch.where(x >= threshold - 1e-6, 1 - x, x)


class _Draws:
    """Random numbers of each image, drawn where the generator is."""

    def __init__(self, n: int, generator: torch.Generator, device: torch.device) -> None:
        self.n, self.generator, self.device = n, generator, device

    def uniform(self, *shape: int) -> Tensor:
        u = torch.rand(self.n, *shape, generator=self.generator, device=self.generator.device)
        return u.to(self.device)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * self.uniform(*shape)

    def chosen(self, probability: float) -> Tensor:
        """Indices of the images that a change is made to."""
        return (self.uniform() < probability).nonzero().flatten()


def _some(x: Tensor, index: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return x if not len(index) else x.index_copy(0, index, change(x[index], index))


def _crop(x: Tensor, size: tuple[int, int], s: ViewSettings, draw: _Draws) -> Tensor:
    """A crop of each image at random, flipped at random, in the view's size."""
    _, _, h, w = x.shape
    area = h * w * draw.between(*s.scale, _TRIES)
    ratio = torch.exp(draw.between(math.log(s.ratio[0]), math.log(s.ratio[1]), _TRIES))
    wide, high = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # (n, tries)
    fits = (wide >= 1) & (wide <= w) & (high >= 1) & (high <= h)
    first = fits.long().argmax(1, keepdim=True)
    wide, high = (v.gather(1, first).flatten() for v in (wide, high))
    # If none fits, the largest part of the middle that has an allowed ratio.
    whole = min(max(w / h, s.ratio[0]), s.ratio[1])
    middle_w, middle_h = (w, round(w / whole)) if w / h < whole else (round(h * whole), h)
    lost = ~fits.any(1)
    wide, high = torch.where(lost, middle_w, wide), torch.where(lost, min(middle_h, h), high)
    u = draw.uniform(2)
    left = torch.where(lost, ((w - wide) / 2).floor(), (u[:, 0] * (w - wide + 1)).floor())
    top = torch.where(lost, ((h - high) / 2).floor(), (u[:, 1] * (h - high + 1)).floor())
    sign = torch.where(draw.uniform() < s.flip, -1.0, 1.0)
    # Coordinates of grid_sample run from -1 to 1 over the pixels' outer edges.
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = sign * wide / w, (2 * left + wide) / w - 1
    theta[:, 1, 1], theta[:, 1, 2] = high / h, (2 * top + high) / h - 1
    grid = F.affine_grid(theta, [len(x), 1, *size], align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)


def _jitter(x: Tensor, s: ViewSettings, draw: _Draws) -> Tensor:
    """The four changes of color in an order of each image's own."""
    strengths: dict[Color, float] = {
        "brightness": s.brightness,
        "contrast": s.contrast,
        "saturation": s.saturation,
        "hue": s.hue,
    }
    used: list[Color] = [kind for kind, strength in strengths.items() if strength]
    amounts = {
        kind: draw.between(-strengths[kind], strengths[kind])
        if kind == "hue"
        else draw.between(max(0.0, 1 - strengths[kind]), 1 + strengths[kind])
        for kind in used
    }
    on = draw.uniform() < s.jitter
    if not used:
        return x
    order = draw.uniform(len(used)).argsort(1)  # (n, changes): a random order for each image
    for turn in range(len(used)):
        for k, kind in enumerate(used):
            index = (on & (order[:, turn] == k)).nonzero().flatten()
            if len(index):
                x = x.index_copy(0, index, adjust_color(x[index], kind, amounts[kind][index]))
    return x


def _to_gray(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor(_GRAY)[:, None, None]).sum(1, keepdim=True)


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Hue is shifted in the hexagonal color space (HSV); value and saturation stay."""
    most, where = x.max(1)  # (n, h, w)
    span = most - x.amin(1)
    safe = torch.where(span > 0, span, 1.0)
    r, g, b = x.unbind(1)
    sector = torch.stack([(g - b) / safe, 2 + (b - r) / safe, 4 + (r - g) / safe], 1).gather(1, where[:, None])[:, 0]
    hue = torch.where(span > 0, sector / 6, 0.0) + turn[:, None, None]
    # A channel is the value less what of the span the hue's distance takes off.
    shifts = x.new_tensor([5.0, 3.0, 1.0])[:, None, None]
    k = (shifts + 6 * hue[:, None]) % 6  # (n, 3, h, w)
    return most[:, None] - span[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _checked(x: Tensor, channels: int) -> Tensor:
    """Images as float32 in [0, 1]."""
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels:
        found = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        last = isinstance(x, Tensor) and x.ndim == 4 and x.shape[-1] == channels
        hint = "; move the channels with x.permute(0, 3, 1, 2)" if last else ""
        raise InvalidInput(f"images are {found}; a tensor (n, {channels}, h, w) is needed{hint}.")
    if not x.numel():
        raise InvalidInput(f"there are no images in a tensor of shape {tuple(x.shape)}.")
    if x.dtype == torch.uint8:
        return x.float() / 255
    low, high = (float(v) for v in torch.aminmax(x if x.is_floating_point() else x.double()))
    if not x.is_floating_point() or low < -1e-6 or high > 1 + 1e-6 or not math.isfinite(low + high):
        raise InvalidInput(
            f"images are {x.dtype} with values from {low:g} to {high:g}; expected uint8, or floating in [0, 1]: divide "
            "by the largest possible value, and standardize after the augmentation (mean=, std=)."
        )
    return x.float()
