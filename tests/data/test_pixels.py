"""Images of every mode and format: the numbers that come out are those that the pixels stand for, or a sentence."""

import colorsys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlcollage.data import arrays, load_workload
from mlcollage.data._pixels import MODES, image_tensor, opened, upright_size
from mlcollage.errors import InvalidInput

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (4, 6, 4), dtype=np.uint8)  # (h, w, bands)
DEEP = RNG.integers(0, 65536, (4, 6)).astype(np.uint16)
FLOATS = RNG.random((4, 6)).astype(np.float32)


def luma(rgb):
    """ITU-R 601-2, as Pillow documents its "L"."""
    return rgb @ np.array([299, 587, 114]) / 1000


def of(mode):
    """An image of a mode, and what its pixels mean by its definition: gray (h, w) or color (h, w, 3), in [0, 1]."""
    gray, rgb, alpha = BYTES[..., 0], BYTES[..., :3], np.maximum(BYTES[..., 3], 1)
    unit = rgb / 255
    if mode == "1":
        return Image.fromarray(gray > 99), (gray > 99).astype(float)
    if mode == "F":
        return Image.fromarray(FLOATS), FLOATS
    if mode.startswith("I;16"):
        order = ">u2" if mode == "I;16B" else "<u2"
        return Image.frombytes(mode, (6, 4), DEEP.astype(order).tobytes()), DEEP / 65535
    if mode in ("L", "LA"):
        return Image.fromarray(gray if mode == "L" else BYTES[..., :2]), gray / 255
    if mode in ("La", "RGBa"):
        plain = Image.fromarray(np.dstack([gray if mode == "La" else rgb, alpha]).astype(np.uint8))
        held = np.asarray(plain.convert(mode))
        color = np.minimum(held[..., :-1].astype(float) * 255 / alpha[..., None], 255) / 255
        return plain.convert(mode), color[..., 0] if mode == "La" else color
    if mode in ("P", "PA"):
        palette = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
        image = Image.frombytes("P", (6, 4), gray.tobytes())
        image.putpalette(palette.tobytes())
        return image.convert("PA") if mode == "PA" else image, palette[gray] / 255
    if mode in ("RGB", "RGBX", "RGBA"):
        return Image.frombytes(mode, (6, 4), BYTES[..., : len(mode)].tobytes()), unit
    if mode == "CMYK":
        ink = BYTES / 255
        return Image.frombytes(mode, (6, 4), BYTES.tobytes()), (1 - ink[..., :3]) * (1 - ink[..., 3:])
    if mode == "HSV":
        flat = [colorsys.hsv_to_rgb(*pixel) for pixel in unit.reshape(-1, 3)]
        return Image.frombytes(mode, (6, 4), rgb.tobytes()), np.array(flat).reshape(4, 6, 3)
    if mode == "YCbCr":
        image = Image.fromarray(rgb).convert(mode)  # colors that exist
        y, cb, cr = (np.asarray(image)[..., k].astype(float) for k in range(3))
        color = [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]
        return image, np.clip(np.dstack(color), 0, 255) / 255
    assert mode == "LAB"
    light = np.dstack([gray, np.zeros_like(gray), np.zeros_like(gray)])  # gray: a = b = 0
    y = (gray / 255 * 100 + 16) / 116
    linear = np.where(y > 6 / 29, y**3, (y - 4 / 29) * 3 * (6 / 29) ** 2)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return Image.frombytes(mode, (6, 4), light.astype(np.uint8).tobytes()), np.dstack([srgb] * 3)


def test_every_mode_that_pillow_knows_is_in_the_table():
    assert set(MODES) == set(Image.MODES)


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"I"}))
def test_a_mode_becomes_what_its_pixels_mean(mode):
    image, expected = of(mode)
    assert image.mode == mode
    exact = MODES[mode].white is not None
    tolerance = 1e-6 if exact else 2.5 / 255
    channels = MODES[mode].channels
    own = image_tensor(image, None, channels).numpy()
    wanted = expected[None] if channels == 1 else expected.transpose(2, 0, 1)
    np.testing.assert_allclose(own, wanted, atol=tolerance)
    other = image_tensor(image, None, 4 - channels).numpy()
    np.testing.assert_allclose(
        other, np.stack([expected] * 3) if channels == 1 else luma(expected)[None], atol=tolerance
    )
    assert image_tensor(image, 2, channels).shape == (channels, 2, 2)
    assert 0 <= float(own.min()) <= float(own.max()) <= 1


# Files


def saved(folder: Path, image, name, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)
    return folder / name


def read(path, channels):
    with opened(path) as image:
        size = upright_size(image)
        x = image_tensor(image, None, channels).numpy()
    assert x.shape == (channels, size[1], size[0]), "sizes are compared as they will be"
    return x


LYING = Image.Exif()
LYING[0x0112] = 6  # the row 0 of what is stored is the right side of what is meant: turn it clockwise


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jpg"])
def test_an_orientation_is_applied_before_sizes_are_compared(tmp_path, name):
    rgb = np.repeat(np.repeat(BYTES[:2, :3, :3], 16, 0), 16, 1)  # blocks that JPEG keeps
    options = {"lossless": True} if name == "a.webp" else {"quality": 100, "subsampling": 0} if name == "a.jpg" else {}
    path = saved(tmp_path, Image.fromarray(rgb), name, exif=LYING, **options)
    turned = np.rot90(rgb, -1).transpose(2, 0, 1) / 255
    assert turned.shape == (3, 48, 32)
    np.testing.assert_allclose(read(path, 3), turned, atol=4 / 255)
    upright = saved(tmp_path, Image.fromarray(np.rot90(rgb, -1).copy()), f"upright{path.suffix}")
    for kind in "xy":
        for i, file in enumerate([path, upright] * 5):
            target = tmp_path / "set" / kind / f"{i}{path.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    assert arrays(load_workload(str(tmp_path / "set")).train)[0].shape[1:] == (3, 48, 32)


def test_a_cmyk_jpeg_that_lies(tmp_path):
    ink = np.repeat(np.repeat(BYTES[:2, :3], 16, 0), 16, 1)
    path = saved(tmp_path, Image.frombytes("CMYK", (48, 32), ink.tobytes()), "a.jpg", quality=100, exif=LYING)
    expected = (1 - ink[..., :3] / 255) * (1 - ink[..., 3:] / 255)
    np.testing.assert_allclose(read(path, 3), np.rot90(expected, -1).transpose(2, 0, 1), atol=6 / 255)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_keep_their_precision(tmp_path, name):
    x = read(saved(tmp_path, Image.fromarray(DEEP), name), 1)
    np.testing.assert_allclose(x[0], DEEP / 65535, rtol=1e-6)


def test_a_float_tiff_in_the_unit_interval_is_as_it_is(tmp_path):
    np.testing.assert_array_equal(read(saved(tmp_path, Image.fromarray(FLOATS), "a.tif"), 1)[0], FLOATS)


def test_a_gif_with_transparency_has_its_palettes_colors(tmp_path):
    palette = np.arange(768).reshape(256, 3) % 251
    index = BYTES[..., 0] % 8
    image = Image.frombytes("P", (6, 4), index.astype(np.uint8).tobytes())
    image.putpalette(palette.astype(np.uint8).tobytes())
    path = saved(tmp_path, image, "a.gif", transparency=3)
    np.testing.assert_allclose(read(path, 3), (palette[index] / 255).transpose(2, 0, 1), atol=1e-6)


def test_a_webp_with_alpha_keeps_its_colors(tmp_path):
    rgba = np.dstack([BYTES[..., :3], np.full((4, 6), 200, np.uint8)])
    path = saved(tmp_path, Image.fromarray(rgba), "a.webp", lossless=True, exact=True)
    np.testing.assert_allclose(read(path, 3), (rgba[..., :3] / 255).transpose(2, 0, 1), atol=1e-6)


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width, height, pixels=b""):
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tif", np.full((4, 6), 70000, np.int32), "32-bit whole numbers, whose white is not known; save them as 16"),
        ("b.tif", np.full((4, 6), 200, np.float32), "its pixels are from 200 to 200; expected 0 to 1"),
        ("c.tif", np.full((4, 6), np.nan, np.float32), "its pixels are from nan to nan; expected 0 to 1"),
        ("d.png", png(60_000, 60_000), "has more than 89,478,485 pixels"),
        ("e.png", png(10_000, 10_000), "has more than 89,478,485 pixels"),
        ("f.png", b"no picture", "is damaged"),
        ("g.png", png(6, 4, bytes(range(28)))[:-30], "is damaged"),
        ("h.gif", b"GIF89a\1", "is damaged"),
        ("i.webp", b"RIFF\0\0\0\0WEBPVP8 ", "is damaged"),
        ("j.ppm", b"P5 6 4", "is damaged"),
        ("k.bmp", b"BM" + b"\xff" * 60, "is damaged"),
    ],
)
def test_what_has_no_meaning_is_one_sentence(tmp_path, name, content, message):
    place = tmp_path / "set" / "x" / name
    place.parent.mkdir(parents=True)
    place.write_bytes(content) if isinstance(content, bytes) else Image.fromarray(content).save(place)
    for kind in "xy":
        for i in range(5):
            saved(tmp_path / "set" / kind, Image.fromarray(BYTES[..., 0]), f"z{i}.png")
    with pytest.raises(InvalidInput, match=message) as error:
        load_workload(str(tmp_path / "set")).describe(every=True)
    assert f"the image {place}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_set_larger_than_memory_is_refused_before_it_is_made():
    with pytest.raises(InvalidInput, match=r"1,000,000,030 images of glyphs take 12,288 GB of memory"):
        load_workload("glyphs?n=1000000000&test=30")
