"""From an image file of any kind to numbers: what becomes of every mode that Pillow knows, in one table."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from mlcollage._users import described
from mlcollage.errors import InvalidInput, MLCollageError


class Mode(NamedTuple):
    """What becomes of the pixels of one of Pillow's modes.

    Parameters
    ----------
    channels
        1 for gray, 3 for color, where the user does not say.
    via
        Modes to convert to, one after the other, before ``"L"`` or ``"RGB"``.
    white
        For pixels that are no bytes: the value that becomes 1.
    """

    channels: int
    via: tuple[str, ...] = ()
    white: float | None = None


_DEEP = Mode(1, white=65535)
MODES = {
    "1": Mode(1),  # black and white
    "L": Mode(1),
    "LA": Mode(1),  # alpha is dropped, here and below
    "La": Mode(1, via=("LA",)),  # the color is divided by alpha first
    "P": Mode(3),  # palette, transparent entries as their color
    "PA": Mode(3),
    "RGB": Mode(3),
    "RGBA": Mode(3),
    "RGBX": Mode(3),
    "RGBa": Mode(3, via=("RGBA",)),
    "CMYK": Mode(3),
    "YCbCr": Mode(3),
    "HSV": Mode(3),
    "LAB": Mode(3, via=("RGB",)),
    "I;16": _DEEP,
    "I;16L": _DEEP,
    "I;16B": _DEEP,
    "I;16N": _DEEP,
    "I": _DEEP,  # only of the formats in _DEEP_FORMATS
    "F": Mode(1, white=1),  # only in [0, 1]
}
"""The modes that are scaled to [0, 1]; any other is refused."""

_DEEP_FORMATS = ("PNG", "PPM")  # of these, Pillow gives 16-bit gray as 32-bit whole numbers, scaled to 65535
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that exchange width and height


def mode_of(image: Image.Image) -> Mode:
    """What becomes of an image; an unknown mode, and whole numbers without a known white, are refused."""
    found = MODES.get(image.mode)
    if found is None:
        raise InvalidInput(f"its mode is {image.mode!r}; convert it to RGB or L")
    if image.mode == "I" and image.format not in _DEEP_FORMATS:
        raise InvalidInput("its pixels are 32-bit whole numbers, whose white is not known; save them as 16 or 8 bits")
    return found


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as they will be when the EXIF orientation is applied; pixels are not decoded."""
    width, height = image.size
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return width, height  # Pillow turns the size of a TIFF itself, and would decode a PNG to look for a tag
    return (height, width) if image.getexif().get(_ORIENTATION) in _LYING else (width, height)


def image_tensor(image: Image.Image, size: int | None, channels: int) -> torch.Tensor:
    """A Pillow image as ``(channels, h, w)`` float32 in [0, 1], upright, cut and resized to a square if asked for."""
    mode = mode_of(image)  # before anything is done to it: copies do not know their format
    image = ImageOps.exif_transpose(image)
    if mode.white is not None:
        gray = np.asarray(image, dtype=np.float32) / np.float32(mode.white)  # (h, w)
        if not (gray.min() >= 0 and gray.max() <= 1):  # also NaN
            low, high = (float(v) * mode.white for v in (gray.min(), gray.max()))
            raise InvalidInput(f"its pixels are from {low:g} to {high:g}; expected 0 to {mode.white:g}")
        image = Image.fromarray(gray)  # mode "F"
    else:
        for step in (*mode.via, "L" if channels == 1 else "RGB"):
            image = image.convert(step)
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(1 if mode.white is not None else 255)
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # (1 or 3, h, w)
    return torch.from_numpy(np.repeat(planes, channels // len(planes), axis=0))


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file, open: whatever goes wrong with it is one sentence that names it.

    Pillow raises anything for damaged files. More pixels than ``Image.MAX_IMAGE_PIXELS`` are not decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            yield image  # decoded by whoever asked, so that damaged pixels are caught here too
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidInput(
            f"the image {path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller, or delete it."
        ) from error
    except MLCollageError as error:
        raise InvalidInput(f"the image {path} cannot be used: {str(error).rstrip('.')}.") from error
    except Exception as error:
        raise InvalidInput(
            f"the image {path} is damaged ({described(error, where=False)}); delete or replace it."
        ) from error
